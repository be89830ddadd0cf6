"""The renderer: same person again, exact landmarks, truthful captions, clear errors."""
import random
import numpy as np
import pytest
import torch
from faceid_nb.errors import ArgumentError
from faceid_nb.tiny import people as P


def test_a_seed_draws_the_same_people_and_photographs():
    a, b = (P.render(P.sample_people(3, 7), seed=2) for _ in range(2))
    assert all(np.array_equal(x.image, y.image) and x.caption == y.caption for x, y in zip(a, b))
    assert not np.array_equal(a[0].image, P.render(P.sample_people(3, 8), seed=2)[0].image)


def test_a_photograph_does_not_depend_on_its_neighbours():
    g = torch.Generator().manual_seed(0)
    p, s = P.sample_identities(6, g), P.sample_scenes(6, g)
    together = P.draw(p, s)
    for i in (0, 5):
        alone = P.draw(P.take(p, slice(i, i + 1)), P.take(s, slice(i, i + 1)))
        for x, y in zip(together, alone): assert torch.allclose(x[i], y[0], atol=1e-5)


def test_large_photographs_are_drawn_a_few_at_a_time_in_their_order():
    # four, then two
    people = P.sample_people(6, 3)
    made = P.render(people, seed=5, size=256, yaw=[.1*k for k in range(6)])
    s = P.sample_scenes(6, torch.Generator().manual_seed(5))
    s['yaw'] = torch.tensor([.1*k for k in range(6)])
    images, landmarks, boxes = P.draw({k: torch.cat([p.numbers[k] for p in people])
                                       for k in people[0].numbers}, s, 256)
    for photo, image, l, b in zip(made, images, landmarks, boxes, strict=True):
        assert abs(np.asarray(photo.image, np.float32) - 255*image.permute(1, 2, 0).numpy()).max() < .6
        assert np.allclose(photo.landmarks, l, atol=1e-4)
        assert np.allclose(photo.box, b, atol=1e-4)


@pytest.mark.parametrize('size', [64, 200, 512])
def test_landmarks_are_where_the_irises_are_drawn(size):
    g = torch.Generator().manual_seed(size)
    p, s = P.sample_identities(12, g), P.sample_scenes(12, g)
    p |= dict(eyes=torch.tensor([[1., 0., 1.]]).expand(12, 3), eye_tilt=torch.zeros(12))
    s |= dict(glasses=torch.zeros(12), hat=torch.zeros(12), yaw=torch.zeros(12), pitch=torch.zeros(12),
              expression=torch.zeros(12, dtype=torch.long))
    images, landmarks, boxes = P.draw(p, s, size)
    pink = ((images[:, 0] > .6) & (images[:, 1] < .3) & (images[:, 2] > .6)).float()
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)), indexing='ij')
    centre = torch.stack([(pink*x).sum((1, 2)), (pink*y).sum((1, 2))], -1)/pink.sum((1, 2))[:, None]
    apart = (landmarks[:, 1] - landmarks[:, 0]).norm(dim=1)
    # at 64 pixels the catch-light hides part of an iris
    assert ((centre - landmarks[:, :2].mean(1)).norm(dim=1)/apart).max() < (.16 if size == 64 else .06)
    inside = (landmarks > boxes[:, None, :2]) & (landmarks < boxes[:, None, 2:])
    assert inside.all()


def test_landmarks_follow_the_head():
    one = P.sample_people(1, 1)*2
    still = dict(y=0, yaw=0, roll=0, pitch=0, zoom=1, expression='neutral', intensity=1, size=100)
    left, right = P.render(one, x=[-.2, .2], **still)
    assert np.allclose(right.landmarks - left.landmarks, [20, 0], atol=1e-3)
    small, big = P.render(one, x=0, **still | dict(zoom=[.5, 1]))
    def spread(photo): return np.linalg.norm(photo.landmarks[1] - photo.landmarks[0])
    assert np.isclose(spread(big), 2*spread(small), rtol=1e-4)
    turned = P.render(one, x=0, **still | dict(yaw=[-.4, .4]))
    assert turned[0].landmarks[2, 0] < 50 < turned[1].landmarks[2, 0], 'the nose points where the head turns'


def test_size_changes_the_resolution_and_nothing_else():
    args = dict(seed=4, expression='smiling', background='beach')
    small = np.asarray(P.render(P.sample_people(2, 3), size=64, **args)[1].image, float)
    big = P.render(P.sample_people(2, 3), size=256, **args)[1].image.resize((64, 64), 4)  # box average
    assert np.abs(small - np.asarray(big, float)).mean() < 6


def test_captions_say_what_is_drawn():
    photo, = P.render(P.sample_people(1, 3), shirt='red', background='night', expression='frowning',
                      glasses=1, hat='blue')
    scene = 'frowning, night background, wearing glasses, wearing a blue hat'
    assert photo.caption == f'photo of a person in a red shirt, {scene}'
    pixels = np.asarray(photo.image)/255
    assert np.abs(pixels[-2, 28:36].mean(0) - P.COLOURS['red']).max() < .15


def test_captions_use_the_vocabulary():
    words = set(P.vocabulary())
    g = torch.Generator().manual_seed(0)
    p, s = P.sample_identities(300, g), P.sample_scenes(300, g)
    said = set(' '.join(P.captions(p, s, random.Random(0))).replace(',', '').split())
    assert said <= words
    assert len(said) > .9*len(words)


def test_photographs_keep_rows_of_one_person_together():
    t = P.photographs(4, 3, batch=6, compiled=False, progress=False)
    assert t['images'].shape == (12, 3, 64, 64)
    assert t['images'].dtype == torch.uint8
    assert t['person'].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(t['scenes']['yaw']) == 12
    seen, p = P.sample_people(4, P.TRAINING_SEEDS), t['identities']
    assert torch.equal(seen[0].numbers['face_width'][0], p['face_width'][0])


def test_people_can_be_painted_over_any_background():
    g = torch.Generator().manual_seed(0)
    flat = torch.full((1, 3, 64, 64), .3)
    image = P.draw(P.sample_identities(1, g), P.sample_scenes(1, g), background=flat)[0]
    assert torch.equal(image[0, :, 0, 0], flat[0, :, 0, 0])
    assert not torch.allclose(image, flat)


@pytest.mark.parametrize('scene, says', [(dict(shirt='crimson'), 'crimson'), (dict(moustache=1), 'moustache'),
                                         (dict(expression='angry'), 'smiling'),
                                         (dict(glasses=[1, 0]), '2 values for 1 people')])
def test_errors_name_what_was_found(scene, says):
    with pytest.raises(ArgumentError, match=says): P.render(P.sample_people(1, 0), **scene)
