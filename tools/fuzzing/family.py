"What a family of cases is, and what counts as a good end."
import random
import shutil
import tempfile
from pathlib import Path

from faceid_nb.errors import FaceIDError

RIGHT = 'right'


class Fault(AssertionError):
    "Something that must not happen: a wrong result, code that ran, a pipeline half attached."


class Family:
    "Numbered cases; the seed and a number give the same case again."
    patience = 10         # seconds that a case may take
    memory = 2 << 30      # bytes that the process may hold meanwhile; None: not watched
    n = 1000              # cases of a whole run

    def __init__(self, seed=0):
        self.seed, self.folder = seed, Path(tempfile.mkdtemp(prefix='fuzz-'))

    def draw(self, i):
        "(kind, act) of case i: `act()` returns how it ended, and raises where that is no good end."
        raise NotImplementedError

    def random(self, i): return random.Random(f'{type(self).__name__} {self.seed} {i}')

    def close(self): shutil.rmtree(self.folder, ignore_errors=True)


def chain(error):
    "An exception and those that led to it."
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def short_of_memory(error):
    words = "can't allocate memory", 'not enough memory', 'bad_alloc', 'out of memory'
    return isinstance(error, MemoryError) or any(w in str(error).lower() for w in words)


def end_of(act):
    "RIGHT, or the name of an error of ours; everything else is raised."
    try: act()
    except FaceIDError as error:
        if any(map(short_of_memory, chain(error))): raise Fault('it asked for too much memory') from error
        if len(str(error)) > 2000: raise Fault(f'an error of {len(str(error))} characters') from error
        return type(error).__name__
    return RIGHT
