"A model without weights: its pictures are a function of their arguments, and it fails when it is told to."
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from faceid_nb.sweep import Sweep

FACE = np.arange(512, dtype=np.float32)
AXES = dict(s_scale=[0, .5, 1], seed=[0, 1, 2])


class FakePipe:
    device = torch.device('cpu')

    def __init__(self, weight):
        tensors = dict(w=torch.tensor([float(weight)]))
        self.unet = SimpleNamespace(state_dict=lambda: tensors)

    def __call__(self, prompt=None, height=None, width=None, num_inference_steps=30, guidance_scale=7.5): ...


def draw(face, prompt, seed, scale, s_scale):
    "A picture of noise that is another for other arguments."
    numbers = int(np.sum(face)) % 1000, len(prompt), seed, int(100*scale), int(100*s_scale)
    rng = np.random.default_rng(numbers)
    return Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))


class FakeModel:
    "What a sweep asks of a `FaceID`."

    def __init__(self,
        weight=1,                 # stands for all weights
        room=10**6, error=None,   # rows that fit into memory, and what is raised for more
        bad=lambda *_: False,     # (face, seed, s_scale): what cannot be made
        pause=0.,                 # seconds a picture
        steps=1,                  # how often `on_step` is called
    ):
        self.pipe, self.adapter = FakePipe(weight), SimpleNamespace(state_dict=dict, variant='plusv2')
        self.reader, self.origin, self.name, self.negative_prompt = None, None, 'fake', ''
        self.room, self.error, self.bad, self.pause, self.steps = room, error, bad, pause, steps
        self.sizes, self.stopped = [], False   # rows of every call

    def stop(self): self.stopped = True

    def _count(self, on_step, rows):
        for k in range(self.steps if on_step else 0):
            on_step(SimpleNamespace(done=k + 1, total=self.steps, rows=list(rows), clean=None))
            if self.stopped: return

    def generate(self, face, prompt, *, num_samples, seed, scale, s_scale, on_step=None, **shared):
        self.sizes.append(len(face))
        if len(face) > self.room: raise self.error
        for f, k, s in zip(face, seed, s_scale):
            if self.bad(f, k, s): raise ValueError(f'seed {k} cannot be drawn')
        out, self.stopped = [], False
        self._count(on_step, face)
        for row in zip(face, prompt, seed, scale, s_scale):
            if not self.stopped: time.sleep(self.pause)
            if self.stopped: break
            out.append(draw(*row))
        return out


def score(prompts, images):
    "A stand-in for a reader of prompts."
    return np.array([i[0, 0, 0]/255 for i in images])


def fast_sweep(axes, model=None): return Sweep(model or FakeModel(), axes, dict(face=FACE), scorer=score)


def run(sweep, folder, **how):
    "All cells of a sweep, finished."
    return list(sweep.run(folder, progress=False, **how))


def names(cells): return [(c.parameters['s_scale'], c.parameters['seed']) for c in cells]


def pictures(folder):
    "The PNGs of a folder of results; a killed process may leave half a file, under a hidden name."
    return sorted(p for p in (folder/'pictures').glob('*.png') if p.name[0] != '.')


def arrays(cells): return np.stack([np.asarray(c.image, np.float32) for c in cells])


def in_order(cells): return sorted(cells, key=lambda c: c.number)
