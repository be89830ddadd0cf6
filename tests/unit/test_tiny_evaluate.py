"The evaluation of the pack: intervals, likeness, judge, tables; on random weights and on the pack's own."
import json
import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from PIL import Image
import helpers_pack as P
from helpers_face import make_judge
from helpers_tiny import MiddleReader, drawn_photos, write_parts
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.faceid import FaceID
from faceid_nb.measure import mean_interval, share_interval
from faceid_nb.hub import TINY
from faceid_nb.models import load
from faceid_nb.tiny import evaluate as V
from faceid_nb.tiny import people as drawn
from faceid_nb.tiny.adapters import training_table
from faceid_nb.tiny.scenes import SceneReader, load_reader
from faceid_nb.train import train


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
    file = tmp_path_factory.mktemp('judge')/'rec.onnx'
    make_judge(file)
    return V.TinyJudge(MiddleReader(), file)


@pytest.fixture(scope='module')
def tiny():
    faceid = load('tiny-plusv2', device='cpu')
    faceid.pipe.set_progress_bar_config(disable=True)
    return faceid, V.TinyJudge.of(TINY, faceid.reader), load_reader(TINY/'reader.safetensors')


@given(st.integers(1, 200), st.data())
def test_wilson_lies_within_bounds(n, data):
    k = data.draw(st.integers(0, n))
    p, low, high = share_interval(torch.tensor([1]*k + [0]*(n - k)))
    assert p == pytest.approx(k/n)
    assert 0 <= low <= p + 1e-9
    assert p - 1e-9 <= high <= 1
    assert high - low > 0
    # its definition
    z = 1.96
    assert all(abs(abs(k/n - q) - z*math.sqrt(q*(1 - q)/n)) < 1e-6 for q in (low, high) if 0 < q < 1)


def test_intervals_count_people_not_pictures():
    v = torch.randn(40, generator=torch.Generator().manual_seed(0))
    m, h = V.over_people(v)
    assert (m, h) == pytest.approx(mean_interval(v)[:2], rel=1e-5)
    assert V.over_people(v[:, None].expand(40, 9)) == pytest.approx((m, h), rel=1e-5)
    w = v.clone()
    w[3] = float('nan')
    assert V.over_people(w) == pytest.approx(V.over_people(v[torch.arange(40) != 3]), rel=1e-5)


def test_likeness_knows_its_own():
    e = F.normalize(torch.randn(20, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    genuine, impostor, right = V.likeness(torch.stack([e, e.roll(1, 0)], 1), e)
    assert torch.allclose(genuine[:, 0], torch.ones(20))
    assert right[:, 0].all()
    assert not right[:, 1].any()
    assert torch.allclose(impostor[:, 0], ((e @ e.T).sum(1) - 1)/19, atol=1e-5)


def test_a_picture_without_a_face_is_a_miss():
    e = F.normalize(torch.randn(20, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    lost = e[:, None].clone()
    lost[4] = float('nan')
    genuine, impostor, right = V.likeness(lost, e)
    assert genuine[4].isnan().all()
    assert impostor[4].isnan().all()
    assert int(right.sum()) == 19


def test_rank_is_among_sixteen():
    # looks most like itself, next like somebody 20 places off
    e = torch.eye(40, 512)
    near = F.normalize(e + .9*e.roll(-20, 0) + .5*e.roll(20, 0), dim=1)[:, None]
    assert V.likeness(near, e)[2].all()
    off = F.normalize(.5*e + e.roll(-20, 0), dim=1)[:, None]
    assert V.likeness(off, e)[2].all()
    assert not V.likeness(off, e, among=40)[2].any()


def test_evaluated_people_are_not_training_people():
    assert V.HELD_OUT < drawn.TRAINING_SEEDS


def test_photographs_of_repeat():
    a, b = V.photographs_of(3)
    assert (a[0].size, b[0].size) == ((256, 256), (64, 64))
    assert len(a) == len(b) == 3
    assert np.array_equal(np.asarray(a[0]), np.asarray(V.photographs_of(3)[0][0]))


def test_evaluation_on_random_weights(judged):
    pipe = P.pipeline()
    f = FaceID(pipe, FaceIDAdapter.from_state(**P.adapter_state(pipe.unet)), judged.reader)
    few = dict(people=3, each=2, num_inference_steps=2)
    table, pictures = V.evaluate(f, judged, SceneReader().eval(), scales=(0., 1.), **few)
    assert [r['scale'] for r in table['rows']] == [0., 1.]
    assert len(pictures['made'][1.]) == 6
    text = V.show_table(json.loads(json.dumps(table)))
    assert text.count('\n') == 4
    assert 'rank-1 of 16' in text
    assert V.scale_sheet(pictures, 2).size == (3*64, 3*64 + 16)


def test_the_base_is_evaluated_alone(judged):
    row, images = V.evaluate_base(P.pipeline(), SceneReader().eval(), judged, n=4, num_inference_steps=2)
    assert len(images) == 4
    assert set(drawn.EXPRESSIONS) <= set(row)
    assert 'found' in V.show_base(row)


def test_judge_gives_nan_without_a_face(judged):
    e = judged([Image.new('RGB', (64, 64), (10, 200, 10)), *V.photographs_of(2)[0]])
    assert e.shape == (3, 512)
    assert e[0].isnan().all()
    assert torch.allclose(e[1:].norm(dim=1), torch.ones(2), atol=1e-5)
    assert not torch.allclose(e[1], e[2])


def test_a_probe_looks_with_the_averaged_weights(judged, tmp_path):
    write_parts(tmp_path, drawn_photos())
    pipe = P.pipeline()
    table = training_table(tmp_path, pipe.tokenizer, held=2)
    probe = V.Probe(None, people=2, steps=1, judge=judged)
    *_, f = train(pipe, table, steps=1, batch=4, rank=4, gauge=0, mixed_precision='no', watch=probe)
    assert {'gap', 'rank1', 'found'} <= set(f)
    assert f['found'] == 1
    assert not pipe.unet._forward_pre_hooks


def test_structure_is_evaluated(tiny):
    few = dict(people=4, each=1, num_inference_steps=8)
    table, pictures = V.evaluate_structure(*tiny, s_scales=(0., 1.5), **few)
    assert [r['s_scale'] for r in table['rows']] == [0., 1.5]
    assert {k: len(v) for k, v in pictures['made'].items()} == {0.: 4, 1.5: 4}
    for r in table['rows']:
        assert 0 < r['distance'][0] < .5
        assert -1 <= r['yaw'][1] <= r['yaw'][0] <= r['yaw'][2] <= 1
    a, b = (np.array(pictures['made'][s][0], float) for s in (0., 1.5))
    assert np.abs(a - b).mean() > 1
    text = V.show_structure(json.loads(json.dumps(table)))
    assert len(text.splitlines()) == 4
    assert f"{table['rows'][1]['mood'][0]:.2f} [" in text


def test_photographs_are_counted(tiny):
    table, _ = V.evaluate_photos(*tiny, people=3, each=1, counts=(1, 3), num_inference_steps=6)
    first, last = table['rows']
    assert [r['photos'] for r in table['rows']] == [1, 3]
    assert first['gain'][0] == 0
    assert len(last['person']) == 3
    gains = np.subtract(last['person'], first['person'])
    assert last['gain'][0] == pytest.approx(np.nanmean(gains), abs=1e-6)
    assert len(V.show_photos(table).splitlines()) == 4
