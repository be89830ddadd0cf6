"Likeness: rows stand for themselves, missing faces are nan, the judge is another network, and the statistics are right."
import numpy as np, pytest
from hypothesis import given, strategies as st
from PIL import Image
from faceid_nb import measure as M
from faceid_nb.errors import ArgumentError, FaceIDError, ImageError, NoFaceError, PackMissingError
from faceid_nb.face import Embedder, FaceReader, load_face, mean_face, save_face
from faceid_nb.measure import (detection_rate, embed_faces, embed_reference, find_judge, identity_similarity, mean_interval, rank_one, share_interval,
                               similarity_matrix, split_pairs, threshold_at, true_accept_rate)
from helpers_face import fake_photo, make_judge, make_pack

person = lambda seed, x=160, y=150: fake_photo([(x, y, 20, seed)])
BLANK = np.full((320, 320, 3), 120, np.uint8)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = make_pack(tmp_path_factory.mktemp('packs')); make_judge(root/'models'/'judge'/'rec.onnx'); return root

@pytest.fixture(scope='module')
def reader(root): return FaceReader('fake', root, providers='cpu', det_sizes=(640,))

def test_cosines_and_nan(reader):
    s = identity_similarity(person(1), [person(1), person(2), BLANK, Image.fromarray(person(1))], reader=reader)
    assert s.shape == (4,) and s.dtype == np.float64 and abs(s[0] - 1) < 1e-6 and s[0] == s[3] and s[1] < .9 and np.isnan(s[2])
    assert detection_rate(s) == .75 and np.isnan(detection_rate([])) and detection_rate([np.nan]) == 0

@pytest.mark.parametrize('judge', [True, False])
def test_rows_stand_for_themselves(reader, judge):
    pictures = [person(1), BLANK, person(2), person(3, 170, 140)]; many = identity_similarity(person(1), pictures, judge, reader)
    alone = np.concatenate([identity_similarity(person(1), [p], judge, reader) for p in pictures])
    np.testing.assert_allclose(many, alone, atol=1e-6)

def test_the_judge_is_another_network(reader, root):
    ours, other = (identity_similarity(person(1), [person(2), person(3)], j, reader) for j in (False, True)); assert abs(ours - other).min() > 1e-3
    f, g = reader.best(person(1)), reader.best(person(2)); assert abs(ours[0] - f.similarity(g)) < 1e-6
    file = root/'models'/'judge'/'rec.onnx'
    for judge in (file, str(file), Embedder(file, 'cpu')): np.testing.assert_allclose(identity_similarity(person(1), [person(2), person(3)], judge, reader), other, atol=1e-6)
    assert find_judge(reader).name == 'judge' and find_judge(reader) is find_judge(reader)
    np.testing.assert_allclose(identity_similarity(person(1), [person(2), person(3)], reader, reader), ours, atol=1e-6)

def test_references_of_every_kind(reader, tmp_path):
    a, b = person(1), person(1, 163, 148); pictures = [person(1, 166, 152), person(4)]
    f, g = reader.best(a), reader.best(b); one = identity_similarity(a, pictures, reader=reader)
    np.testing.assert_allclose(identity_similarity(f, pictures, reader=reader), one, atol=1e-6)
    both = identity_similarity([a, b], pictures, reader=reader); np.testing.assert_allclose(identity_similarity([f, g], pictures, reader=reader), both, atol=1e-6)
    np.testing.assert_allclose(identity_similarity(mean_face([f, g]), pictures, reader=reader), both, atol=1e-6)
    assert abs(both - one).max() > 1e-4
    kept = load_face(save_face(f, tmp_path/'f.safetensors', crop=True)); assert abs(identity_similarity(kept, pictures, reader=reader) - one).max() < .1
    bare = load_face(save_face(f, tmp_path/'g.safetensors')); np.testing.assert_allclose(identity_similarity(bare, pictures, False, reader), identity_similarity(a, pictures, False, reader), atol=1e-6)
    with pytest.raises(ArgumentError, match='without a picture'): identity_similarity(bare, pictures, reader=reader)

def test_one_picture_is_a_list_of_one(reader, tmp_path):
    path = tmp_path/'p.png'; Image.fromarray(person(1)).save(path)
    for one in (person(1), Image.fromarray(person(1)), path, str(path), path.read_bytes()): assert abs(identity_similarity(person(1), one, reader=reader) - 1).max() < 1e-6
    assert identity_similarity(person(1), np.stack([person(1), person(2)]), reader=reader).shape == (2,) and identity_similarity(person(1), [], reader=reader).shape == (0,)

def test_which_face_counts(reader):
    two = fake_photo([(100, 200, 10, 1), (380, 300, 20, 2)], (640, 480)); f = reader.best(two, 'left')
    left, largest = (identity_similarity(f, [two], reader=reader, which=w)[0] for w in ('left', 'largest')); assert abs(left - 1) < 1e-6 and largest < .9

def test_errors(reader, tmp_path):
    with pytest.raises(NoFaceError): identity_similarity(BLANK, [person(1)], reader=reader)
    with pytest.raises(ImageError): identity_similarity(person(1), ['nowhere.png'], reader=reader)
    for judge in (3, 'x' and object(), {}):
        with pytest.raises(ArgumentError): identity_similarity(person(1), [person(1)], judge, reader)
    with pytest.raises(ArgumentError): embed_reference([], reader)
    lonely = FaceReader('fake', make_pack(tmp_path), providers='cpu')
    with pytest.raises(PackMissingError) as e: identity_similarity(person(1), [person(1)], reader=lonely)
    assert 'judge=False' in str(e.value) and 'antelopev2' in str(e.value)
    assert identity_similarity(person(1), [person(1)], False, lonely).shape == (1,)

def test_matrix_ranks_and_pairs(reader):
    e = embed_faces([person(1), person(2), BLANK, person(3), person(1, 163, 148)], reader); r = np.stack([embed_reference(person(k), reader) for k in (1, 2, 3)])
    m = similarity_matrix(e, r); owner = np.array([0, 1, 1, 2, 0]); genuine, impostor = split_pairs(m, owner)
    assert m.shape == (5, 3) and np.allclose(genuine[[0, 1, 3]], 1, atol=1e-6) and np.isnan(genuine[2]) and np.isnan(impostor[2])
    assert np.isclose(impostor[0], (m[0, 1] + m[0, 2])/2) and list(rank_one(m, owner)[:4]) == [True, True, False, True]
    assert not rank_one(m, [1, 0, 0, 0, 1]).any()
    for bad in ([0, 1], [0, 1, 2, 3, 0], [-1]*5):
        with pytest.raises(ArgumentError): split_pairs(m, bad)

def test_ties_are_not_wins(): assert not rank_one(np.ones((2, 4)), [0, 1]).any()

def test_threshold():
    s = np.arange(1000)/1000; assert threshold_at(s, .1) == s[-101] and (s > threshold_at(s, .1)).sum() == 100 and (s > threshold_at(s, 1e-3)).sum() == 1 and (s > threshold_at(s, 1e-5)).sum() == 0
    assert true_accept_rate([.9995, .5, np.nan, .9999], s, 1e-3) == .5
    for bad in ([], [np.nan]):
        with pytest.raises(ArgumentError): threshold_at(bad)
    for far in (0, 1, -.1):
        with pytest.raises(ArgumentError): threshold_at(s, far)

@given(st.integers(2, 300), st.floats(.01, .5))
def test_no_more_strangers_than_asked(n, far): s = np.random.default_rng(n).normal(size=n); assert (s > threshold_at(s, far)).mean() <= far

def test_intervals_cover():
    rng = np.random.default_rng(0); hits = sum(abs(m - 3) <= h for m, h, _ in (mean_interval(rng.normal(3, 2, 40)) for _ in range(600)))/600; assert .91 < hits < .975
    covered = [low <= .9 <= high for _, low, high in (share_interval(rng.random(60) < .9) for _ in range(600))]; assert .9 < np.mean(covered) < .985

def test_groups_make_intervals_honest():
    rng = np.random.default_rng(1); people = rng.normal(0, 1, 20); v = np.repeat(people, 50) + rng.normal(0, .1, 1000); g = np.repeat(np.arange(20), 50)
    m, half, n = mean_interval(v, g); assert n == 20 and abs(m - people.mean()) < .05 and half > 4*mean_interval(v)[1]

def test_intervals_of_little():
    assert mean_interval([1., np.nan, 3.])[2] == 2 and mean_interval([1., np.nan, 3.])[0] == 2 and np.isnan(mean_interval([])[0]) and np.isnan(mean_interval([1.])[1])
    assert share_interval([True]*10)[2] == 1 and .6 < share_interval([True]*10)[1] < .8 and np.isnan(share_interval([])[0]) and mean_interval([np.nan]*3, [0, 0, 1])[2] == 0

def test_the_tiny_judge_knows_people(tmp_path):
    "As the command line calls it: a Face of the shipped pack, pictures, nothing else."
    from faceid_nb.tiny.people import render, sample_people
    crowd = sample_people(12, seed=78); first, second = ([p.image for p in render(crowd, seed=s, size=64, hat=None)] for s in (1, 2))
    reader = FaceReader('tiny', providers='cpu'); face = reader.best(first[0]); s = identity_similarity(face, second + [Image.new('RGB', (64, 64), (90, 90, 90))])
    assert s.shape == (13,) and s[0] == np.nanmax(s) and s[0] > .5 and np.nanmean(s[1:]) < .3 and np.isnan(s[-1])
    np.testing.assert_allclose(identity_similarity(first[0], second), s[:-1], atol=1e-6)
    assert abs(identity_similarity(face, second, judge=False)[0] - face.similarity(reader.best(second[0]))) < 1e-6
