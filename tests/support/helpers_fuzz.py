"Families of cases for the tests of tools/fuzz: one that does everything it must not, and two broken readers."
import os
import signal
import time
from functools import partial

import numpy as np
from fuzzing.family import RIGHT, Family, Fault

BALLAST = 300 << 20   # bytes


def crash(): os.kill(os.getpid(), signal.SIGSEGV)


def hang(): time.sleep(60)


def swell(): return str(np.ones(BALLAST, np.uint8)[0])


def stumble(): raise KeyError('raw')


def err(): raise Fault('wrong')


def fine(): return RIGHT


DEEDS = (fine, crash, hang, swell, stumble, err, fine)


class Misbehaving(Family):
    "Case i is the i-th deed."
    patience, memory = 2, BALLAST
    def draw(self, i): return DEEDS[i].__name__, DEEDS[i]


def only(family, kind):
    "The same family with cases of one kind alone."
    family.kinds = {name: family.kinds[kind] for name in family.kinds}
    return family


def pass_over(*_): "Check nothing."


def trust(load, *args, **how): return load(*args, **how | dict(weights_only=False))


def running_reader(seed):
    "Checkpoints, read by pickle itself."
    import torch
    from faceid_nb import checkpoint
    from fuzzing.checkpoints import Checkpoints
    torch.load = partial(trust, torch.load)
    checkpoint.check_asks_for_tensors = pass_over
    return only(Checkpoints(seed), 'code')


def careless_reader(seed):
    "Checkpoints, of whose tensors nothing is checked."
    from faceid_nb import checkpoint
    from fuzzing.checkpoints import Checkpoints
    for name in ('check_tensors', 'check_plain'): setattr(checkpoint, name, pass_over)
    return only(Checkpoints(seed), 'tensors')


def lenient_reader(seed):
    "Pictures, of which the missing part is grey."
    from fuzzing.pictures import Pictures
    from PIL import ImageFile
    family = only(Pictures(seed), 'cut')
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    return family


for reader in (running_reader, careless_reader, lenient_reader):
    reader.patience = 10   # as a family has it
