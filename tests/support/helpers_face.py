"""A stand-in for a face pack, built in a second: an SCRFD-shaped detector that sees magenta marks, an
ArcFace-shaped recogniser with frozen random weights. Deterministic, content-dependent, and scale-sensitive as
the real one: a mark is found when it fills about one cell (8, 16 or 32 pixels of the detector's input), so a
close-up is missed at a large input size and found at a smaller one."""
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from faceid_nb.errors import FaceIDError

MARK = (255, 0, 255)
# in cells from the middle of the mark; the box is 4 cells each way
POINTS = torch.tensor([[-1.3, -1.2], [1.3, -1.2], [0, 0], [-1.1, 1.5], [1.1, 1.5]])
BOX = .5*torch.tensor([-1., -1, 1, 1])


def magenta(x):
    "How much of a mark every pixel is: (1, 1, H, W)."
    return F.relu(F.conv2d(x, torch.tensor([1., -1, 1]).reshape(1, 3, 1, 1)*2/3) - 1)


def fills_a_cell(quarter):
    "Score of every cell from a picture with four pixels a cell: (cells, 1)."
    window = F.avg_pool2d(F.pad(quarter, (0, 3, 0, 3)), 4, 1)
    around = F.avg_pool2d(F.pad(quarter, (4, 7, 4, 7)), 12, 1)
    score = F.max_pool2d((window**1.6 - 1.6*around).clamp(0, 1), 4)
    return score.permute(0, 2, 3, 1).reshape(-1, 1)


class FakeDetector(nn.Module):
    def __init__(self, outputs=9):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):  # (1,3,H,W) RGB in -1..1
        mark, out = magenta(x), []
        for size in (8, 16, 32):
            mark = F.avg_pool2d(mark, 2)
            score = fills_a_cell(mark)
            # two anchors a cell, the second never fires
            score = torch.stack([score, 0*score], 1).reshape(-1, 1)
            rows = torch.ones_like(score)
            out.append((score, 4*rows.expand(-1, 4) + BOX, (POINTS + .5).reshape(1, 10)*rows))
        scores, boxes, points = zip(*out)
        return (*scores, *boxes, *points)[:self.outputs]


class FakeRecogniser(nn.Module):
    def __init__(self, seed=0, dim=512):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.register_buffer('weight', torch.randn(14*14*3, dim, generator=g)/10)

    def forward(self, x):
        x = F.avg_pool2d(x, 8).flatten(1)
        return (x - x.mean(1, keepdim=True)) @ self.weight


def free_axes(names, dynamic):
    "Which axes of an ONNX file's input and outputs may vary: 'size', 'batch' or none."
    if dynamic == 'batch': return {'input': {0: 'batch'}, 'output': {0: 'batch'}}
    if dynamic == 'size': return {'input': {2: 'height', 3: 'width'}} | {n: {0: 'cells'} for n in names}
    return {}


def export(model, path, size, dynamic):
    "Write a network as ONNX; its path."
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    names = ['output'] if isinstance(model, FakeRecogniser) else [f'o{i}' for i in range(model.outputs)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model.eval(), torch.zeros(1, 3, size, size), str(path), input_names=['input'],
                          output_names=names, dynamic_axes=free_axes(names, dynamic), dynamo=False)
    return Path(path)


def make_pack(root, name='fake', seed=0, det='det.onnx', rec='rec.onnx', batch=True):
    "Write root/models/NAME with both files; returns the root."
    folder = Path(root)/'models'/name
    if det: export(FakeDetector(), folder/det, 160, 'size')
    if rec: export(FakeRecogniser(seed), folder/rec, 112, 'batch' if batch else None)
    return Path(root)


def make_judge(path, seed=99): return export(FakeRecogniser(seed), path, 112, 'batch')


def patchwork(seed, side):
    "What a fake person is made of: 8 x 8 patches without much red."
    patch = np.random.default_rng(seed).integers(0, 200, (8, 8, 3), np.uint8)
    patch[..., 0] //= 2
    return np.asarray(Image.fromarray(patch).resize((side, side), Image.NEAREST))


def fake_photo(people, size=(320, 320), background=(90, 120, 90)):
    "A picture with a fake person for each (x, y, mark, seed): a magenta mark in a patchwork."
    a = np.empty((size[1], size[0], 3), np.uint8)
    a[:] = background
    for x, y, mark, seed in people:
        half = 4*mark
        tile, top, left = patchwork(seed, 2*half), y - half, x - half
        y0, x0, y1, x1 = max(0, top), max(0, left), min(size[1], y + half), min(size[0], x + half)
        a[y0:y1, x0:x1] = tile[y0 - top:y1 - top, x0 - left:x1 - left]
        near, far = mark//2, mark - mark//2
        a[y - near:y + far, x - near:x + far] = MARK
    return a


def helpful(e, *words):
    "An error of ours whose parts are all there and which names what it should."
    e = e.value
    assert isinstance(e, FaceIDError) and e.wrong and e.do, repr(e)
    for word in words: assert str(word) in str(e), f'{word!r} not in {e}'
    return e
