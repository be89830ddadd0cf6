"The code that trained the pack's detector, and the files that it and the recogniser are shipped in."
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from faceid_nb.hub import TINY
from faceid_nb.tiny import detector, shipping


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


@pytest.mark.parametrize('n,longest', [(64, 64), (640, 640), (100, 300), (128, 128)])
def test_shrink_keeps_means_and_positions(n, longest):
    m = detector.shrink_matrix(n, torch.tensor(float(longest)))
    inside = round(n*128/longest) - 2
    assert (m[:inside].sum(1) - 1).abs().max() < 1e-5
    assert (m >= 0).all()
    where = m[2:inside] @ torch.arange(n).float()
    expected = (torch.arange(2, inside) + .5)*longest/128 - .5
    assert (where - expected).abs().max() < .02*longest/128 + 1e-3


def test_refine_follows_an_exact_field():
    goal = torch.tensor([[30., 40.], [70., 40.], [50., 55.], [35., 80.], [66., 78.]]).expand(2, 5, 2)
    axis = (torch.arange(32) + .5)*4 - .5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing='xy'), 0)
    field = ((goal[..., None, None] - grid)/8).reshape(2, 10, 32, 32)
    start = goal[:, None] + torch.randn(2, 7, 5, 2, generator=torch.Generator().manual_seed(1))*4
    assert (detector.refine(start, field) - goal[:, None]).abs().max() < 1e-3


def test_each_face_has_an_anchor():
    boxes = torch.tensor([[[10., 10., 24., 24.], [60., 50., 120., 110.], [0., 0., 0., 0.]]])
    seen = torch.tensor([[True, True, False]])
    answered = set()
    for stride, sizes in zip(detector.STRIDES, detector.ANCHORS):
        index, right, near = detector.assign(boxes, seen, stride, sizes)
        assert (near | ~right).all()
        answered |= set(index[right].tolist())
    assert answered == {0, 1}


def untrained_detector():
    "With scores of a half in the first grid, so that a difference is seen."
    torch.manual_seed(0)
    net = detector.Detector().eval()
    net.heads[0].bias.data[:2] = 0.
    return net


def test_detector_onnx_equals_torch(tmp_path):
    net = untrained_detector()
    s = session(detector.save_detector(net, tmp_path/'det.onnx'))
    for h, w in ((128, 128), (320, 192)):
        x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(1))*2 - 1
        out = s.run(None, {'input': x.numpy()})
        cells = [(h//k)*(w//k)*2 for k in (8, 16, 32)]
        expected = [(n, 1) for n in cells] + [(n, 4) for n in cells] + [(n, 10) for n in cells]
        assert [o.shape[1:] for o in out] == expected
        with torch.no_grad(): assert max(np.abs(a - b.numpy()).max() for a, b in zip(out, net(x))) < .05


def initializers(file): return onnx.load(str(file)).graph.initializer


def test_onnx_ships_in_whole_numbers(tmp_path):
    file = detector.save_detector(untrained_detector(), tmp_path/'det.onnx')
    size = file.stat().st_size
    assert shipping.ship_onnx(file) == file
    assert file.stat().st_size < .65*size
    assert not list(tmp_path.glob('*.part'))
    kinds = {w.name: onnx.numpy_helper.to_array(w) for w in initializers(file)}
    whole = {k: v for k, v in kinds.items() if v.dtype == np.int8}
    assert len(whole) > 10
    assert not any(v.dtype == np.float16 for v in kinds.values())
    for name, q in whole.items():   # every row uses its whole range, and has a step of its own
        assert (np.abs(q.astype(int)).reshape(len(q), -1).max(1) == 127).all()
        assert kinds[name.replace('_whole', '_step')].shape == (len(q), *[1]*(q.ndim - 1))


def test_whole_numbers_answer_nearly_alike(tmp_path):
    file = detector.save_detector(untrained_detector(), tmp_path/'det.onnx')
    before = session(file)
    shipping.ship_onnx(file)
    x = (torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))*2 - 1).numpy()
    a, b = (s.run(None, {'input': x}) for s in (before, session(file)))
    for u, v in zip(a, b): assert 0 < np.abs(u - v).max() < .05*np.abs(u).max() + .02


def test_the_packs_recogniser_ships_in_whole_numbers():
    weights = initializers(TINY/'models'/'tiny'/'rec.onnx')
    assert any(w.data_type == onnx.TensorProto.INT8 for w in weights)


def test_detector_learns_a_little():
    # some are empty
    torch.manual_seed(0)
    pools = detector.detector_pools(None, 0, 96, 96)
    assert pools[0][3].any(1).float().mean() < .95
    losses = [float(r['loss']) for r in detector.learn_detector(pools, steps=20, batch=16)]
    assert np.mean(losses[-3:]) < .9*np.mean(losses[:3])
