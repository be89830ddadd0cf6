"""The tiny pack's detector, recogniser and judge, as insightface loads them, on people that nobody was
trained on; and the code that trained them."""
from pathlib import Path
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import faceid_nb
from faceid_nb.tiny import crops, detector, shipping
import faceid_nb.tiny.recognizer as rz
from faceid_nb.align import ARCFACE_TEMPLATE, norm_crop
from faceid_nb.tiny.people import draw, photographs, render, sample_identities, sample_people, sample_scenes

TINY = Path(faceid_nb.__file__).parent/'weights'/'tiny'


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


@pytest.fixture(scope='module')
def app():
    from insightface.app import FaceAnalysis
    a = FaceAnalysis('tiny', root=str(TINY), providers=['CPUExecutionProvider'])
    a.prepare(-1)
    return a


def bgr(photo): return np.ascontiguousarray(np.array(photo.image)[..., ::-1])


def errors(app, photos):
    "Landmark error in eye distances of the best face of each picture; nan where none was found."
    out = []
    for p in photos:
        faces = app.get(bgr(p))
        d = np.linalg.norm(p.landmarks[0] - p.landmarks[1])
        out.append(min((np.linalg.norm(f.kps - p.landmarks, axis=1).mean()/d for f in faces), default=np.nan))
    return np.array(out)


# ---- the files

def test_insightface_routes_the_files(app):
    assert set(app.models) == {'detection', 'recognition'}
    assert app.models['detection'].use_kps
    assert len(app.models['detection'].output_names) == 9
    r = app.models['recognition']
    assert r.input_size == (112, 112)
    assert (r.input_mean, r.input_std) == (127.5, 127.5)
    crops = [np.random.default_rng(i).integers(0, 255, (112, 112, 3), np.uint8) for i in range(3)]
    assert r.get_feat(crops).shape == (3, 512)
    # rows of a batch do not mix
    np.testing.assert_allclose(r.get_feat(crops)[1], r.get_feat(crops[1])[0], atol=1e-3)
    # the judge must not lie beside them
    assert sorted(p.name for p in (TINY/'models'/'tiny').glob('*.onnx')) == ['det.onnx', 'rec.onnx']


@pytest.mark.parametrize('size,n,rate,error', [(64, 60, .98, .04), (256, 12, 1., .05)])
def test_finds_faces_and_landmarks(app, size, n, rate, error):
    e = errors(app, render(sample_people(n, 40 + size), seed=41, size=size))
    assert (e < .25).mean() >= rate
    assert np.nanmean(e) < error


def test_small_and_large_heads(app):
    for zoom in (.35, .6, 1.35):
        e = errors(app, render(sample_people(8, 50), seed=51, size=128, zoom=zoom, x=0., y=0.))
        assert (e < .3).sum() >= 7, zoom


def test_counts_two_people(app):
    g = torch.Generator().manual_seed(60)
    hits = 0
    for _ in range(8):
        p, s = sample_identities(2, g), sample_scenes(2, g)
        s['zoom'][:], s['x'], s['y'] = .45, torch.tensor([-.5, .5]), torch.tensor([0., .1])
        one = draw({k: v[:1] for k, v in p.items()}, {k: v[:1] for k, v in s.items()}, 128)[0]
        both = draw({k: v[1:] for k, v in p.items()}, {k: v[1:] for k, v in s.items()}, 128,
                    background=one)[0]
        hits += (len(app.get(np.ascontiguousarray((both[0].permute(1, 2, 0)*255).byte().numpy()[..., ::-1])))
                 == 2)
    assert hits >= 7


def test_no_face_in_empty_scenes(app):
    empty = (detector.empty_scenes(100, 64, torch.Generator().manual_seed(70))*255).byte().permute(0, 2, 3,
                                                                                                   1).numpy()
    assert sum(len(app.models['detection'].detect(e)[0]) > 0 for e in empty) <= 2
    assert not app.get(np.zeros((64, 64, 3), np.uint8))
    assert not app.get(np.full((100, 300, 3), 255, np.uint8))


@pytest.mark.parametrize('shape', [(64, 64), (200, 100), (100, 333)])
def test_detector_reads_any_shape(app, shape):
    p = render(sample_people(1, 81), seed=5, size=min(shape))[0]
    canvas = np.full((*shape, 3), 128, np.uint8)
    y, x = (shape[0] - min(shape))//2, (shape[1] - min(shape))//2
    canvas[y:y + min(shape), x:x + min(shape)] = bgr(p)
    faces = app.get(canvas)
    assert len(faces) == 1
    assert np.linalg.norm(faces[0].kps - p.landmarks - [x, y],
                          axis=1).mean() < .15*np.linalg.norm(p.landmarks[0] - p.landmarks[1])


@pytest.fixture(scope='module')
def pictures(): return crops.strangers(100, 4, seed=90)


@pytest.mark.parametrize('path,tar', [('tiny/rec.onnx', .92), ('judge/rec.onnx', .93)])
def test_recognises_strangers(pictures, path, tar):
    v = rz.verification(rz.embed(*pictures[:2], session(TINY/'models'/path)).view(100, 4, 512))
    assert v['tar'] >= tar
    assert v['genuine'].mean() > .65
    assert abs(v['impostor'].mean()) < .03


def test_recogniser_after_the_detector(app):
    a, b = (render(sample_people(20, 95), seed=s) for s in (1, 2))
    e = [np.stack([app.get(bgr(p))[0].normed_embedding for p in photos]) for photos in (a, b)]
    m = e[0] @ e[1].T
    assert (m.argmax(1) == np.arange(20)).mean() >= .95
    assert np.diag(m).mean() > .6


def test_judge_is_another_network(pictures):
    rec, judge = (session(TINY/'models'/p/'rec.onnx') for p in ('tiny', 'judge'))
    few = [v[:40] for v in pictures[:2]]
    a, b = (F.normalize(rz.embed(*few, s), dim=1) for s in (rec, judge))
    assert F.cosine_similarity(a, b).abs().mean() < .2


# ---- the code

def test_crops_equal_norm_crop():
    images, marks, _ = crops.strangers(4, 1, seed=2, size=96)
    levels = (images*255).round().byte()
    ours = crops.align_crops(levels.float()/255, marks).permute(0, 2, 3, 1).numpy()*255
    cv = np.stack([norm_crop(a, m, 112) for a, m in zip(levels.permute(0, 2, 3, 1).numpy(), marks.numpy())])
    assert np.abs(ours - cv).max() < 8
    assert np.abs(ours - cv).mean() < .6
    np.testing.assert_array_equal(crops.TEMPLATE.numpy(), ARCFACE_TEMPLATE)


@pytest.mark.parametrize('kind', ['cosine', 'angle'])
def test_margin_makes_the_right_answer_dearer(kind):
    g = torch.Generator().manual_seed(0)
    e, w, y = torch.randn(16, 512, generator=g), torch.randn(30, 512, generator=g), torch.arange(16)
    losses = [rz.margin_loss(e, w, y, m, kind=kind)[0].item() for m in (0., .2, .4)]
    assert losses[0] < losses[1] < losses[2]
    plain = F.cross_entropy(24*F.normalize(e, dim=1) @ F.normalize(w, dim=1).T, y).item()
    assert abs(losses[0] - plain) < 1e-3
    assert rz.margin_loss(w[:16], w, y, .3, kind=kind)[1] == 1.


def test_verification_of_perfect_and_of_random_embeddings():
    e = torch.eye(50, 512)[:, None].expand(50, 3, 512)
    v = rz.verification(e)
    assert v['tar'] == 1.
    assert v['genuine'].min() > .999
    assert v['impostor'].abs().max() < 1e-6
    assert rz.verification(torch.randn(80, 3, 512, generator=torch.Generator().manual_seed(1)))['tar'] < .05


def test_training_repeats_and_resumes(tmp_path):
    n = 6
    g = torch.Generator().manual_seed(3)
    p = sample_identities(n, g)
    person = torch.arange(n).repeat_interleave(2)
    images, marks, boxes = draw({k: v[person] for k, v in p.items()}, sample_scenes(2*n, g))
    photos = dict(images=(images*255).byte(), landmarks=marks, boxes=boxes, person=person, identities=p)
    whole = [r for r in rz.learn_faces(photos, 'rec', steps=4, batch=8, seed=1)][-1]['model'].state_dict()
    for r in rz.learn_faces(photos, 'rec', steps=4, batch=8, seed=1):
        if r['step'] == 2:
            shipping.save_state(r['state'](), tmp_path/'x.ckpt')
            break
    state = torch.load(tmp_path/'x.ckpt', weights_only=True)
    assert state['step'] == 2
    again = [r for r in rz.learn_faces(photos, 'rec', steps=4, batch=8, seed=1,
                                       state=state)][-1]['model'].state_dict()
    assert max((whole[k].float() - again[k].float()).abs().max().item() for k in whole) < 1e-5


def test_a_table_too_small_for_the_judge_is_refused():
    with pytest.raises(ValueError, match='larger'): rz.people_for('judge', dict(person=torch.arange(6)))
    photos = photographs(6, 1, batch=6, compiled=False, progress=False)
    with pytest.raises(ValueError, match='larger'): next(rz.learn_faces(photos, 'judge', steps=1))
