"""A stand-in for a face pack, built in a second: an SCRFD-shaped detector that sees magenta marks, an ArcFace-shaped recogniser with frozen
random weights. Deterministic, content-dependent, and scale-sensitive as the real one: a mark is found when it fills about one cell (8, 16 or 32
pixels of the detector's input), so a close-up is missed at a large input size and found at a smaller one."""
import warnings
from pathlib import Path
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image

MARK = (255, 0, 255)
POINTS = torch.tensor([[-1.3, -1.2], [1.3, -1.2], [0, 0], [-1.1, 1.5], [1.1, 1.5]])  # in cells from the middle of the mark; the box is 4 cells each way

class FakeDetector(nn.Module):
    def __init__(self, outputs=9):
        super().__init__()
        self.outputs = outputs
    def forward(self, x):  # (1,3,H,W) RGB in -1..1
        mark, out = F.relu(F.conv2d(x, torch.tensor([1., -1, 1]).reshape(1, 3, 1, 1)*2/3) - 1), []
        for s in (8, 16, 32):
            mark = quarter = F.avg_pool2d(mark, 2)
            window, around = F.avg_pool2d(F.pad(quarter, (0, 3, 0, 3)), 4, 1), F.avg_pool2d(F.pad(quarter, (4, 7, 4, 7)), 12, 1)
            score = F.max_pool2d((window**1.6 - 1.6*around).clamp(0, 1), 4).permute(0, 2, 3, 1).reshape(-1, 1)
            # two anchors a cell, the second never fires
            score = torch.stack([score, 0*score], 1).reshape(-1, 1)
            rows = torch.ones_like(score)
            out.append((score, 4*rows.expand(-1, 4) + .5*torch.tensor([-1., -1, 1, 1]), (POINTS + .5).reshape(1, 10)*rows))
        return tuple(o[k] for k in range(self.outputs//3) for o in out)

class FakeRecogniser(nn.Module):
    def __init__(self, seed=0, dim=512):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.register_buffer('weight', torch.randn(14*14*3, dim, generator=g)/10)
    def forward(self, x):
        x = F.avg_pool2d(x, 8).flatten(1)
        return (x - x.mean(1, keepdim=True)) @ self.weight

def export(model, path, size, dynamic):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    axes = {'input': {2: 'height', 3: 'width'}} if dynamic == 'size' else {'input': {0: 'batch'}, 'output': {0: 'batch'}} if dynamic == 'batch' else {}
    names = ['output'] if isinstance(model, FakeRecogniser) else [f'o{i}' for i in range(model.outputs)]
    if dynamic == 'size': axes.update({n: {0: 'cells'} for n in names})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model.eval(), torch.zeros(1, 3, size, size), str(path), input_names=['input'], output_names=names, dynamic_axes=axes, dynamo=False)
    return Path(path)

def make_pack(root, name='fake', seed=0, det='det.onnx', rec='rec.onnx', batch=True):
    "Write root/models/NAME with both files; returns the root."
    folder = Path(root)/'models'/name
    if det: export(FakeDetector(), folder/det, 160, 'size')
    if rec: export(FakeRecogniser(seed), folder/rec, 112, 'batch' if batch else None)
    return Path(root)

def make_judge(path, seed=99): return export(FakeRecogniser(seed), path, 112, 'batch')

def fake_photo(people, size=(320, 320), background=(90, 120, 90)):
    "A picture with a fake person for each (x, y, mark, seed): a magenta mark of `mark` pixels in a patchwork that is who they are."
    a = np.empty((size[1], size[0], 3), np.uint8)
    a[:] = background
    for x, y, mark, seed in people:
        patch = np.random.default_rng(seed).integers(0, 200, (8, 8, 3), np.uint8)
        patch[..., 0] //= 2
        half = 4*mark
        tile = np.asarray(Image.fromarray(patch).resize((2*half, 2*half), Image.NEAREST))
        y0, x0, y1, x1 = max(0, y - half), max(0, x - half), min(size[1], y + half), min(size[0], x + half)
        a[y0:y1, x0:x1] = tile[y0 - y + half:y1 - y + half, x0 - x + half:x1 - x + half]
        a[y - mark//2:y + mark - mark//2, x - mark//2:x + mark - mark//2] = MARK
    return a
