"A model without weights: its pictures are a function of their arguments, and it fails when it is told to."
import time
from types import SimpleNamespace
import numpy as np, torch
from PIL import Image
from faceid_nb.sweep import Sweep

FACE = np.arange(512, dtype=np.float32)

class FakePipe:
    device = torch.device('cpu')
    def __call__(self, prompt=None, height=None, width=None, num_inference_steps=30, guidance_scale=7.5): ...
    def __init__(self, weight): self.unet = SimpleNamespace(state_dict=lambda: dict(w=torch.tensor([float(weight)])))

class FakeModel:
    "`room`: rows that fit into memory; `bad(face, seed, s_scale)`: what cannot be made; `pause`: seconds a picture; `steps`: how often `on_step` is called."
    def __init__(self, weight=1, room=10**6, error=None, bad=lambda *_: False, pause=0., steps=1):
        self.pipe, self.adapter, self.reader, self.origin, self.name, self.negative_prompt = FakePipe(weight), SimpleNamespace(state_dict=dict, variant='plusv2'), None, None, 'fake', ''
        self.room, self.error, self.bad, self.pause, self.steps, self.sizes, self.stopped = room, error, bad, pause, steps, [], False
    def stop(self): self.stopped = True
    def generate(self, face, prompt, *, num_samples, seed, scale, s_scale, negative_prompt=None, on_step=None, **shared):
        self.sizes.append(len(face))
        if len(face) > self.room: raise self.error
        for f, k, s in zip(face, seed, s_scale):
            if self.bad(f, k, s): raise ValueError(f'seed {k} cannot be drawn')
        out, self.stopped = [], False
        for k in range(self.steps if on_step else 0):
            on_step(SimpleNamespace(done=k + 1, total=self.steps, rows=list(face), clean=None))
            if self.stopped: return []
        for row in zip(face, prompt, seed, scale, s_scale):
            time.sleep(self.pause)
            if self.stopped: break
            rng = np.random.default_rng([int(np.sum(row[0])) % 1000, len(row[1]), row[2], int(100*row[3]), int(100*row[4])])
            out.append(Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)))
        return out

def score(prompts, images): return np.array([i[0, 0, 0]/255 for i in images])   # a stand-in for a reader of prompts

def fast_sweep(axes, model=None): return Sweep(model or FakeModel(), axes, dict(face=FACE), scorer=score)
