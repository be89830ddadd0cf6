"""Stand-ins for what the command line loads: a reader of as many faces as it is told, a model that paints
its seed."""
import sys
import types

import numpy as np
from faceid_nb import cli
from faceid_nb.errors import FaceChoiceError, NoFaceError
from PIL import Image

# the command as a process
CLI = [sys.executable, '-c', 'import sys; from faceid_nb.cli import main; sys.exit(main())']


def run(*args):
    return cli.main([str(a) for a in args])


def one_line(capsys):
    "The one line that an error gets, on the error stream."
    printed = capsys.readouterr()
    assert printed.out == '' and printed.err.startswith('faceid-nb: ') and printed.err.count('\n') == 1
    assert 'Traceback' not in printed.err and len(printed.err) > 30
    return printed.err


class Reader:
    "Finds as many faces as it was told."
    def __init__(self, faces=1):
        picture = np.full((120, 200, 3), 99, np.uint8)
        self.faces = [types.SimpleNamespace(box=np.array([10*i, 5, 10*i + 8, 13.]), number=i, found=faces,
                                            image=picture) for i in range(faces)]
    def best(self, image, which='largest'):
        if not self.faces:
            raise NoFaceError('No face was found', 'every size was tried', 'Use another picture')
        if not isinstance(which, int): return self.faces[0]
        if 0 <= which < len(self.faces): return self.faces[which]
        raise FaceChoiceError('No such face', f'{len(self.faces)} faces', 'Count from 0')


class Model:
    "Makes a plain picture in the colour of its seed, and remembers what it was asked."
    name = 'tiny-faceid'
    def __init__(self, faces=1, stop_at=None):
        self.reader, self.asked, self.stop_at = Reader(faces), [], stop_at
        device = types.SimpleNamespace(type='cpu')
        self.pipe = types.SimpleNamespace(set_progress_bar_config=lambda **k: None, device=device)

    def generate(self, face, prompt, *, on_step, **settings):
        self.asked.append(dict(face=face, prompt=prompt, **settings))
        print('chatter of a library')
        seed, steps = settings['seed'], settings['num_inference_steps']
        for i in range(steps):
            if self.stop_at == (seed, i): raise KeyboardInterrupt
            on_step(types.SimpleNamespace(done=i + 1, total=steps))
        return [self.paint(seed + k, prompt) for k in range(settings['num_samples'])]

    def paint(self, seed, prompt):
        image = Image.new('RGB', (64, 64), (seed % 256, 100, 50))
        image.info['faceid_nb'] = dict(prompt=prompt, seed=seed)
        return image


class Judge:
    "Likenesses that were prepared, one after the other."
    def __init__(self, likenesses, warning=''): self.likenesses, self.warning = iter(likenesses), warning
    def similarity(self, reference, images): return np.array([next(self.likenesses) for _ in images])
