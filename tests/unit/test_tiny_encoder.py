"The image encoder of the tiny pack: crops and their answers, a training that learns, a folder that loads."
import numpy as np
import pytest
import torch
from PIL import Image
from faceid_nb.align import norm_crop
from faceid_nb.encoder import StructureEncoder
from faceid_nb.tiny import encoder as E, people as P
from faceid_nb.tiny.recognizer import known_numbers


@pytest.fixture(scope='module')
def photos(): return P.photographs(12, 2, seed=5, batch=24, compiled=False, progress=False)


def dot(point):
    "A white dot in a black picture of 224 pixels."
    y, x = np.mgrid[:224, :224]
    bright = (255*np.exp(-((x - point[0])**2 + (y - point[1])**2)/18)).astype('uint8')
    return np.repeat(bright[..., None], 3, 2)


def middle_of(picture):
    y, x = np.mgrid[:112, :112]
    w = picture[..., 0].astype(float)
    return (w*x).sum()/w.sum(), (w*y).sum()/w.sum()


@pytest.mark.parametrize('wobble', [0., 3.])
def test_aligned_points_follow_the_warp(wobble):
    photo = P.render(P.sample_people(1, seed=3), seed=4, size=224, roll=.3)[0]
    points = torch.tensor(photo.landmarks)
    by = points + wobble*torch.randn(points.shape, generator=torch.Generator().manual_seed(1))
    there = E.aligned_points(points[None], by[None])[0].numpy()
    for point, want in zip(photo.landmarks, there):
        found = middle_of(norm_crop(dot(point), by.numpy(), 112))
        assert abs(found[0] - want[0]) < .2 and abs(found[1] - want[1]) < .2


def test_a_sharp_crop_is_of_the_same_photograph(photos):
    numbers, _ = known_numbers(photos['identities'])
    def draw(sharp): return E.encoder_batch(photos, numbers, 6, torch.Generator().manual_seed(0), sharp)
    (a, told, mood), (b, told2, mood2) = draw(0), draw(6)
    assert torch.equal(mood, mood2) and torch.equal(told, told2) and a.shape == b.shape == (6, 3, 112, 112)
    assert mood.unique().numel() > 1
    away = torch.cdist(a.flatten(1), b.flatten(1), p=1)
    assert away.argmin(1).tolist() == list(range(6))


def test_answers_are_the_scenes(photos):
    numbers, _ = known_numbers(photos['identities'])
    s = photos['scenes']
    told, mood = E.answers(s, numbers[photos['person']], torch.full((24, 5, 2), 56.))
    assert torch.allclose(told[:, 0]*.19, s['yaw']) and torch.allclose(told[:, 1]*.07, s['pitch'])
    assert torch.equal(mood, s['expression']) and (told[:, 4:14] == 0).all()
    assert set(told[:, 2].tolist()) <= {-1., 1.}
    assert torch.allclose(told[:, 14:], .5*numbers[photos['person']])


def test_it_learns_and_its_folder_loads(photos, tmp_path):
    how = dict(minutes=None, steps=12, batch=16, sharp=0, lr=2e-3, warmup=2, log_every=1)
    figures = list(E.train_encoder(photos, tmp_path, **how))
    reading = figures.pop()['reading']
    first, last = (sum(f['loss'] for f in part)/3 for part in (figures[:3], figures[-3:]))
    assert last < first
    again = StructureEncoder.from_pretrained(tmp_path/'image_encoder')
    crops = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    a, b = (e.states(e.normalised(crops)) for e in (again, reading.vision))
    assert torch.equal(a, b) and not again.model.training
    assert set(E.read_check(reading, 20)) == {'mood', 'yaw', 'pitch', 'points', 'person'}


def test_tensors_are_prepared_as_pictures_are():
    e = StructureEncoder(E.new_encoder())
    x = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(0)).byte()
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    assert torch.allclose(e.normalised(x), e.pixels([picture]), atol=1e-5)


def test_the_command(photos, tmp_path, capsys):
    torch.save(photos, tmp_path/'photos.pt')
    out = tmp_path/'out'
    E.main(['--photos', str(tmp_path/'photos.pt'), '--out', str(out), '--minutes', '.01', '--device', 'cpu'])
    assert 'strangers at 64 pixels' in capsys.readouterr().out
    assert (out/'image_encoder'/'config.json').exists()
