"Likeness: rows stand for themselves, no face is nan, the judge is another network, statistics are right."
import numpy as np
import pytest
from faceid_nb import measure as M
from faceid_nb.errors import ArgumentError, ImageError, NoFaceError, PackMissingError
from faceid_nb.face import Embedder, Face, FaceReader, load_face, mean_face, save_face
from faceid_nb.measure import (Judge, detection_rate, embed_faces, embed_reference, find_judge,
                               identity_similarity, mean_interval, rank_one, share_interval,
                               similarity_matrix, split_pairs, threshold_at, true_accept_rate)
from faceid_nb.persons import as_person
from faceid_nb.tiny.people import render, sample_people
from helpers_face import fake_photo, make_judge, make_pack
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

BLANK = np.full((320, 320, 3), 120, np.uint8)


def person(seed, x=160, y=150):
    return fake_photo([(x, y, 20, seed)])


def close(a, b, atol=1e-6):
    np.testing.assert_allclose(a, b, atol=atol)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = make_pack(tmp_path_factory.mktemp('packs'))
    make_judge(root/'models'/'judge'/'rec.onnx')
    return root


@pytest.fixture(scope='module')
def reader(root): return FaceReader('fake', root, providers='cpu', det_sizes=(640,))


@pytest.fixture
def lonely(tmp_path):
    "A reader whose pack has no judge beside it."
    return FaceReader('fake', make_pack(tmp_path/'lonely'), providers='cpu')


@pytest.fixture
def looked(reader, monkeypatch):
    "How often the detector looked at a picture."
    looked, detect = [], reader.detector.detect
    monkeypatch.setattr(reader.detector, 'detect', lambda image: looked.append(1) or detect(image))
    return looked


# -- cosines

def test_cosines_and_nan(reader):
    pictures = [person(1), person(2), BLANK, Image.fromarray(person(1))]
    s = identity_similarity(person(1), pictures, reader=reader)
    assert s.shape == (4,) and s.dtype == np.float64
    assert abs(s[0] - 1) < 1e-6 and s[0] == s[3] and s[1] < .9 and np.isnan(s[2])
    assert detection_rate(s) == .75


def test_detection_rate_of_little():
    assert np.isnan(detection_rate([])) and detection_rate([np.nan]) == 0


@pytest.mark.parametrize('judge', [True, False])
def test_rows_stand_for_themselves(reader, judge):
    pictures = [person(1), BLANK, person(2), person(3, 170, 140)]
    many = identity_similarity(person(1), pictures, judge, reader)
    close(many, np.concatenate([identity_similarity(person(1), [p], judge, reader) for p in pictures]))


@pytest.mark.parametrize('one', ['array', 'PIL', 'path', 'text', 'bytes'])
def test_one_picture_is_a_list_of_one(one, reader, tmp_path):
    path = tmp_path/'p.png'
    image = Image.fromarray(person(1))
    image.save(path)
    one = dict(array=person(1), PIL=image, path=path, text=str(path), bytes=path.read_bytes())[one]
    close(identity_similarity(person(1), one, reader=reader), [1])


def test_many_pictures_in_an_array_and_none(reader):
    assert identity_similarity(person(1), np.stack([person(1), person(2)]), reader=reader).shape == (2,)
    assert identity_similarity(person(1), [], reader=reader).shape == (0,)


def test_which_face_counts(reader):
    two = fake_photo([(100, 200, 10, 1), (380, 300, 20, 2)], (640, 480))
    f = reader.best(two, 'left')
    left, largest = (identity_similarity(f, [two], reader=reader, which=w)[0] for w in ('left', 'largest'))
    assert abs(left - 1) < 1e-6 and largest < .9


# -- who judges

def test_the_judge_is_another_network(reader):
    pictures = [person(2), person(3)]
    ours, other = (identity_similarity(person(1), pictures, j, reader) for j in (False, True))
    assert abs(ours - other).min() > 1e-3
    f, g = reader.best(person(1)), reader.best(person(2))
    assert abs(ours[0] - f.similarity(g)) < 1e-6
    close(identity_similarity(person(1), pictures, reader, reader), ours)


@pytest.mark.parametrize('make', [
    lambda f: f,
    str,
    lambda f: Embedder(f, 'cpu'),
    lambda f: Judge.find(f, 'tiny'),
], ids=['path', 'text', 'Embedder', 'Judge'])
def test_a_judge_of_every_kind(make, reader, root):
    pictures = [person(2), person(3)]
    judge = make(root/'models'/'judge'/'rec.onnx')
    want = identity_similarity(person(1), pictures, True, reader)
    close(identity_similarity(person(1), pictures, judge, reader), want)


def test_a_judge_is_found_once(reader):
    assert find_judge(reader).name == 'judge' and find_judge(reader) is find_judge(reader)


def test_a_judge_says_who_it_is(reader):
    second, steering = Judge.find(True, reader), Judge.find(False, reader)
    assert (second.name, second.steers, second.warning) == ('judge', False, '')
    assert (steering.name, steering.steers) == ('steering recogniser', True)
    assert 'flatters' in steering.warning


def test_a_judge_stays_who_it_is(reader):
    judge = Judge.find(True, reader)
    assert Judge.find(judge) is judge is Judge.find(judge, reader)


def test_a_judge_finds_embeds_and_compares(reader):
    judge, pictures = Judge.find(True, reader), [person(1, 166, 152), BLANK, person(4)]
    assert [f is None for f in judge.faces(pictures)] == [False, True, False]
    np.testing.assert_array_equal(judge.embed(pictures), embed_faces(pictures, reader))
    np.testing.assert_array_equal(judge.similarity(person(1), pictures),
                                  identity_similarity(person(1), pictures, reader=reader))


@pytest.mark.parametrize('judge', [3, object(), {}])
def test_no_judge_at_all(judge, reader):
    with pytest.raises(ArgumentError): identity_similarity(person(1), [person(1)], judge, reader)


def test_a_pack_without_a_judge(lonely):
    with pytest.raises(PackMissingError) as e: identity_similarity(person(1), [person(1)], reader=lonely)
    assert 'judge=False' in str(e.value) and 'antelopev2' in str(e.value)
    assert identity_similarity(person(1), [person(1)], False, lonely).shape == (1,)


def test_where_no_judge_is_needed_the_steering_recogniser_scores(lonely):
    judge = Judge.find(True, lonely, needed=False)
    assert judge.steers and judge.warning == f'{M.FLATTERS} {judge.advice}' and 'antelopev2' in judge.advice


# -- references

PICTURES = person(1, 166, 152), person(4)


def test_a_reference_may_be_a_photograph_or_a_face(reader):
    one = identity_similarity(person(1), PICTURES, reader=reader)
    face = reader.best(person(1))
    close(identity_similarity(face, PICTURES, reader=reader), one)
    close(identity_similarity(as_person(face), PICTURES, reader=reader), one)


def test_several_photographs_of_one_person(reader):
    a, b = person(1), person(1, 163, 148)
    f, g = reader.best(a), reader.best(b)
    both = identity_similarity([a, b], PICTURES, reader=reader)
    for reference in ([f, g], mean_face([f, g]), as_person([f, g])):
        close(identity_similarity(reference, PICTURES, reader=reader), both)
    assert abs(both - identity_similarity(a, PICTURES, reader=reader)).max() > 1e-4


def test_an_identity_file_with_its_crop(reader, tmp_path):
    face = reader.best(person(1))
    kept = load_face(save_face(face, tmp_path/'f.safetensors', crop=True))
    one = identity_similarity(face, PICTURES, reader=reader)
    assert abs(identity_similarity(kept, PICTURES, reader=reader) - one).max() < .1


def test_an_identity_file_without_a_picture(reader, tmp_path):
    bare = load_face(save_face(reader.best(person(1)), tmp_path/'g.safetensors'))
    want = identity_similarity(person(1), PICTURES, False, reader)
    close(identity_similarity(bare, PICTURES, False, reader), want)
    with pytest.raises(ArgumentError, match='without a picture'):
        identity_similarity(bare, PICTURES, reader=reader)


def test_a_reference_without_a_face(reader):
    with pytest.raises(NoFaceError): identity_similarity(BLANK, [person(1)], reader=reader)


def test_a_picture_that_is_not_there(reader):
    with pytest.raises(ImageError): identity_similarity(person(1), ['nowhere.png'], reader=reader)


def test_no_reference(reader):
    with pytest.raises(ArgumentError): embed_reference([], reader)


def test_the_tiny_judge_knows_people():
    "As the command line calls it: a Face of the shipped pack, pictures, nothing else."
    crowd = sample_people(12, seed=78)
    first, second = ([p.image for p in render(crowd, seed=s, size=64, hat=None)] for s in (1, 2))
    reader = FaceReader('tiny', providers='cpu')
    face = reader.best(first[0])
    s = identity_similarity(face, second + [Image.new('RGB', (64, 64), (90, 90, 90))])
    assert s.shape == (13,) and s[0] == np.nanmax(s) and s[0] > .5
    assert np.nanmean(s[1:]) < .3 and np.isnan(s[-1])
    close(identity_similarity(first[0], second), s[:-1])
    steering = identity_similarity(face, second, judge=False)[0]
    assert abs(steering - face.similarity(reader.best(second[0]))) < 1e-6


# -- numbers for many people

def test_matrix_ranks_and_pairs(reader):
    e = embed_faces([person(1), person(2), BLANK, person(3), person(1, 163, 148)], reader)
    m = similarity_matrix(e, np.stack([embed_reference(person(k), reader) for k in (1, 2, 3)]))
    owner = np.array([0, 1, 1, 2, 0])
    genuine, impostor = split_pairs(m, owner)
    assert m.shape == (5, 3) and np.isnan(genuine[2]) and np.isnan(impostor[2])
    close(genuine[[0, 1, 3]], [1, 1, 1])
    assert np.isclose(impostor[0], (m[0, 1] + m[0, 2])/2)
    assert list(rank_one(m, owner)[:4]) == [True, True, False, True]
    assert not rank_one(m, [1, 0, 0, 0, 1]).any()


@pytest.mark.parametrize('owner', [[0, 1], [0, 1, 2, 3, 0], [-1]*5])
def test_owners_must_be_columns(owner):
    with pytest.raises(ArgumentError): split_pairs(np.zeros((5, 3)), owner)


def test_ties_are_not_wins():
    assert not rank_one(np.ones((2, 4)), [0, 1]).any()


def test_threshold():
    s = np.arange(1000)/1000
    assert threshold_at(s, .1) == s[-101]
    above = [int((s > threshold_at(s, far)).sum()) for far in (.1, 1e-3, 1e-5)]
    assert above == [100, 1, 0]
    assert true_accept_rate([.9995, .5, np.nan, .9999], s, 1e-3) == .5


@pytest.mark.parametrize('cosines, far', [
    ([], .1),
    ([np.nan], .1),
    ([.1, .2], 0),
    ([.1, .2], 1),
    ([.1, .2], -.1),
])
def test_no_threshold(cosines, far):
    with pytest.raises(ArgumentError): threshold_at(cosines, far)


@given(st.integers(2, 300), st.floats(.01, .5))
def test_no_more_strangers_than_asked(n, far):
    s = np.random.default_rng(n).normal(size=n)
    assert (s > threshold_at(s, far)).mean() <= far


# -- intervals

@pytest.mark.parametrize('n', [2, 3, 5, 40])
def test_intervals_of_means_cover(n):
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(3, 2, n)) for _ in range(2000)]
    assert .935 < np.mean([abs(m - 3) <= half for m, half, _ in intervals]) < .965


def test_intervals_are_students():
    assert mean_interval([1., 3.])[1] == pytest.approx(12.7062, abs=1e-4)
    assert mean_interval([1., 2., 3.])[1] == pytest.approx(4.30265/np.sqrt(3), abs=1e-4)


def test_intervals_of_shares_cover():
    rng = np.random.default_rng(0)
    intervals = [share_interval(rng.random(60) < .9) for _ in range(600)]
    assert .9 < np.mean([low <= .9 <= high for _, low, high in intervals]) < .985


def test_groups_make_intervals_honest():
    rng = np.random.default_rng(1)
    people = rng.normal(0, 1, 20)
    v = np.repeat(people, 50) + rng.normal(0, .1, 1000)
    m, half, n = mean_interval(v, np.repeat(np.arange(20), 50))
    assert n == 20 and abs(m - people.mean()) < .05 and half > 4*mean_interval(v)[1]


def test_means_of_little():
    assert mean_interval([1., np.nan, 3.])[2] == 2 and mean_interval([1., np.nan, 3.])[0] == 2
    assert np.isnan(mean_interval([])[0]) and np.isnan(mean_interval([1.])[1])
    assert mean_interval([np.nan]*3, [0, 0, 1])[2] == 0


def test_shares_of_little():
    _, low, high = share_interval([True]*10)
    assert high == 1 and .6 < low < .8 and np.isnan(share_interval([])[0])


# -- faces found once

def test_a_face_is_looked_for_once(reader, looked):
    faces = M.find_faces([person(1), BLANK, person(2, 170, 140), None], reader)
    assert [f is None for f in faces] == [False, True, False, True] and len(looked) == 3
    assert faces[0].image is not None and faces[0].embedding is None
    again = M.find_faces(faces, reader)
    assert again[0] is faces[0] and len(looked) == 3


@pytest.mark.parametrize('judge', [True, False])
def test_faces_stand_for_their_pictures(judge, reader):
    pictures = [person(1), BLANK, person(2, 170, 140), None]
    faces = M.find_faces(pictures, reader)
    np.testing.assert_array_equal(embed_faces(faces, reader, judge), embed_faces(pictures, reader, judge))


def test_measuring_found_faces_looks_at_nothing(reader, looked):
    pictures = [person(1), BLANK, person(2, 170, 140), None]
    goal, faces = reader.best(person(1)), M.find_faces(pictures, reader)
    looked.clear()
    distance = M.structure_distance(goal, faces, reader)
    identity_similarity(goal, faces, reader=reader)
    assert not looked
    np.testing.assert_array_equal(distance, M.structure_distance(goal, pictures, reader))


# -- calibration

@pytest.fixture(scope='module')
def album(): return [[person(i, 160 + 3*k, 150 - 2*k) for k in range(2 + i % 2)] for i in range(1, 5)]


def pairs(embedded):
    "Cosines of two photographs of one person, and of two people, one by one."
    same, other = [], []
    for i, a in enumerate(embedded):
        for k, x in enumerate(a):
            same += [float(x @ y) for y in a[:k]]
            for b in embedded[:i]: other += [float(x @ y) for y in b]
    return np.sort(same), np.sort(other)


def test_calibration_against_every_pair_by_hand(reader, album):
    c = M.calibrate(album, reader)
    same, other = pairs([embed_faces(photos, reader) for photos in album])
    close(np.sort(c.genuine), same)
    close(np.sort(c.impostor), other)
    assert abs(c.ceiling - same.mean()) < 1e-12 and c.copy_line <= same.max() + 1e-12


def test_calibration_leaves_out_photographs_without_a_face(reader, album):
    blank = M.calibrate([photos + [BLANK] for photos in album], reader)
    close(np.sort(blank.genuine), np.sort(M.calibrate(album, reader).genuine))


@pytest.mark.parametrize('few', [lambda album: album[:1], lambda album: [photos[:1] for photos in album]],
                         ids=['one person', 'one photograph each'])
def test_too_few_for_a_calibration(few, reader, album):
    with pytest.raises(ArgumentError, match='two people'): M.calibrate(few(album), reader)


@pytest.fixture
def lines(): return M.Calibration(np.linspace(.5, .9, 101), np.linspace(-.3, .3, 1001))


def test_the_lines_of_a_calibration(lines):
    assert abs(lines.ceiling - .7) < 1e-12 and abs(lines.copy_line - .896) < 1e-9
    assert .29 < lines.threshold <= .3
    assert lines.copies([.1, .89, .9, np.nan, .99]).tolist() == [False, False, True, False, True]
    assert '101 genuine pairs, 1001 of strangers' in repr(lines)


@pytest.mark.parametrize('x, words', [
    (.1, 'could be anybody'),
    (.6, 'the same person'),
    (.95, 'a copy'),
    (np.nan, 'no face'),
    (.6, 'higher than 100.0% of strangers and 25% of genuine'),
])
def test_what_a_calibration_says(x, words, lines):
    assert words in lines.read(x)


def test_calibration_from_a_folder(tmp_path, reader):
    for who in ('b', 'a'):
        (tmp_path/who).mkdir()
        for k in (2, 1): Image.fromarray(person(ord(who), 160 + 3*k)).save(tmp_path/who/f'{k}.PNG')
    assert len(M.calibrate(tmp_path, reader).genuine) == 2


@pytest.mark.parametrize('folder, found', [('a', 'No folder with'), ('gone', 'No such folder')])
def test_a_folder_without_people(folder, found, tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'1.png').write_bytes(b'')
    with pytest.raises(ArgumentError, match=found): M.calibrate(tmp_path/folder)


# -- everything at once

FOUR = person(1, 166, 152), BLANK, person(4), person(2, 170, 140)


def score(texts, images):
    return np.array([ord(t) + i.mean() for t, i in zip(texts, images)])


def test_everything_at_once_equals_one_by_one(reader):
    her = reader.best(person(1))
    found = M.measure_pictures(her, FOUR, list('abcd'), reader=reader, scorer=score)
    close(found['likeness'], identity_similarity(her, FOUR, reader=reader))
    close(found['distance'], M.structure_distance(her, FOUR, reader))
    close(found['adherence'], score('abcd', FOUR))


def test_every_picture_may_have_a_reference_of_its_own(reader):
    her, him = reader.best(person(1)), person(2)
    found = M.measure_pictures([her, her, him, him], FOUR, reader=reader, each=True)
    assert set(found) == {'likeness', 'distance'}
    for k, who in ((slice(2), her), (slice(2, 4), him)):
        close(found['likeness'][k], identity_similarity(who, FOUR[k], reader=reader))
        close(found['distance'][k], M.structure_distance(who, FOUR[k], reader))


def test_several_photographs_at_once(reader):
    both = [person(1), person(1, 163, 148)]
    want = identity_similarity(both, FOUR, reader=reader)
    close(M.measure_pictures(both, FOUR, reader=reader)['likeness'], want)
    close(M.measure_pictures(as_person(both, reader), FOUR, reader=reader)['likeness'], want)


def test_a_mean_at_once(reader):
    mean = mean_face([reader.best(p) for p in (person(1), person(1, 163, 148))])
    found = M.measure_pictures(mean, FOUR, reader=reader)
    close(found['likeness'], identity_similarity(mean, FOUR, reader=reader))
    assert np.isfinite(found['distance'][[0, 2, 3]]).all()


def test_an_embedding_alone_has_no_structure(reader):
    her = reader.best(person(1))
    bare = M.measure_pictures(Face(her.embedding, pack=her.pack), FOUR, judge=False, reader=reader)
    close(bare['likeness'], identity_similarity(her, FOUR, False, reader))
    assert np.isnan(bare['distance']).all()


def test_references_must_match_the_pictures(reader):
    with pytest.raises(ArgumentError, match='2 references for 4'):
        M.measure_pictures([person(1), person(2)], FOUR, reader=reader, each=True)


def test_every_picture_is_looked_at_once(reader, looked):
    her = reader.best(person(1))
    looked.clear()
    M.measure_pictures(her, FOUR, reader=reader)
    assert len(looked) == 4


def test_nothing_to_measure(reader):
    assert M.measure_pictures(person(1), [], reader=reader)['likeness'].shape == (0,)


# -- damaged files

@pytest.fixture
def photographs(tmp_path):
    "A folder of two people with two photographs each, and a damaged one."
    for i, name in enumerate('ab'):
        (tmp_path/name).mkdir()
        for k in range(2): Image.fromarray(person(i, 150 + 10*k)).save(tmp_path/name/f'{k}.png')
    (tmp_path/'a'/'2.jpg').write_bytes(b'\xff\xd8\xff')
    return tmp_path


def test_a_damaged_file_among_thousands_is_named(photographs, reader):
    with pytest.warns(UserWarning, match=r'1 of 5 pictures cannot be read.*2.jpg: '):
        damaged = M.calibrate(photographs, reader)
    (photographs/'a'/'2.jpg').unlink()
    whole = M.calibrate(photographs, reader)
    close(damaged.genuine, whole.genuine)
    close(damaged.impostor, whole.impostor)


def test_a_damaged_file_that_was_named_is_an_error(photographs, reader):
    named = [[photographs/'a'/'2.jpg', photographs/'a'/'0.png'], [photographs/'b'/'0.png']]
    with pytest.raises(ImageError, match='2.jpg'): M.calibrate(named, reader)
