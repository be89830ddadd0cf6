"From a picture to a Face: the ladder, the choice, packs that are missing or broken, means, identity files."
import io
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, strategies as st
from insightface.app import FaceAnalysis
from PIL import Image
from safetensors.numpy import save

from faceid_nb.errors import (ArgumentError, CheckpointError, FaceChoiceError, ImageError, NoFaceError,
                              PackMissingError)
from faceid_nb.face import (Detector, Embedder, Face, FaceReader, agreement, choose_face, draw_faces,
                            load_face, mean_face, save_face, thick_enough)
from faceid_nb.images import read_image
from faceid_nb.packs import PACK_SUMS, PACKS, check_pack, download_pack, pack_folder
from faceid_nb.tiny.people import render, sample_people
from helpers_face import FakeDetector, export, fake_photo, helpful, make_judge, make_pack
from helpers_pictures import EXACT, GREYS, PHOTO, RGB

THREE = fake_photo([(100, 100, 10, 1), (380, 300, 20, 2), (560, 120, 12, 3)], (640, 480))
CLOSE = fake_photo([(80, 80, 80, 1)], (160, 160))
SIZES = (640, 320, 160, 1280)


@pytest.fixture(scope='session')
def root(tmp_path_factory): return make_pack(tmp_path_factory.mktemp('packs'))


@pytest.fixture(scope='session')
def reader(root): return FaceReader('fake', root, providers='cpu', det_sizes=SIZES)


# --- every way to store a picture
def test_all_ways_to_store_colour_give_the_same_embedding(reader):
    first, *rest = [reader.best(EXACT[k]).embedding for k in EXACT]
    assert all(np.array_equal(first, e) for e in rest)


def test_all_ways_to_store_grey_give_the_same_embedding(reader):
    points = np.array([[10, 10], [60, 10], [35, 40], [15, 60], [55, 60.]])
    first, *rest = [reader.embedder.embed([read_image(GREYS[k])], [points]) for k in GREYS]
    assert all(np.array_equal(first, e) for e in rest)


def test_nothing_is_fetched_or_written(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    reader.read(PHOTO)
    assert not list(tmp_path.iterdir())


# --- the reader
@pytest.fixture(scope='module')
def face(reader): return reader.best(PHOTO)


def test_an_embedding(face):
    assert face.embedding.dtype == np.float32 and face.embedding.shape == (512,)
    assert abs(np.linalg.norm(face.embedding) - 1) < 1e-6
    assert np.allclose(face.raw_embedding/np.linalg.norm(face.raw_embedding), face.embedding, atol=1e-7)


def test_where_a_face_is(face):
    assert face.landmarks.shape == (5, 2) and face.box.shape == (4,) and .5 <= face.score <= 1
    assert face.pack == 'fake' and face.found == 1 and 'one of 1' in repr(face)


def test_a_crop(face):
    assert np.array_equal(face.image, PHOTO) and face.crop().mode == 'RGB'
    assert face.crop().size == (224, 224) and face.crop(112).size == (112, 112)


def test_equals_insightface(reader, root):
    app = FaceAnalysis(str(root/'models'/'fake'), allowed_modules=['detection', 'recognition'],
                       providers=['CPUExecutionProvider'])
    app.prepare(0, det_size=(640, 640))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = app.get(np.ascontiguousarray(THREE[..., ::-1]))
    ours = reader.read(THREE)
    assert len(ours) == len(theirs) == 3
    for t in theirs:
        o = min(ours, key=lambda o: abs(o.box - t.bbox).max())
        assert abs(o.box - t.bbox).max() == 0 and abs(o.landmarks - t.kps).max() == 0
        assert abs(o.embedding - t.normed_embedding).max() < 1e-6


def test_colour_order_reaches_the_networks(reader, face):
    "Magenta read as BGR is still magenta, so recolour: only the right order finds the same embedding."
    assert face.similarity(reader.best(PHOTO[..., ::-1])) < .99


# --- the ladder
@pytest.mark.parametrize('mark, rung', [(20, '640'), (48, '320'), (90, '160')])
def test_ladder(reader, mark, rung):
    assert reader.best(fake_photo([(160, 150, mark, 1)])).rung.startswith(rung)


def test_a_face_of_ordinary_size_needs_no_second_look(reader):
    assert reader.best(PHOTO).rung == '640'


def test_a_face_that_fills_the_picture_needs_a_frame(reader):
    assert reader.best(CLOSE).rung.endswith('padded')


def test_small_faces_in_a_large_picture(reader):
    far = fake_photo([(500, 500, 10, 1), (900, 300, 10, 2)], (1300, 1000))
    assert {f.rung for f in reader.read(far)} == {'1280'}


class Scripted:
    "A detector that answers by the width of the picture it is shown."
    corners = np.array([[0, 0], [9, 0], [5, 5], [1, 9], [8, 9]])

    def __init__(self, answers): self.answers, self.asked = answers, []

    def detect(self, image, input_size):
        self.asked.append(image.shape[1])
        boxes = np.array(self.answers.get(image.shape[1], []), np.float32).reshape(-1, 5)
        points = [box[:2] + self.corners for box in boxes]
        return boxes, np.array(points, np.float32).reshape(-1, 5, 2)


NOBODY = np.zeros((100, 100, 3), np.uint8)


@pytest.mark.parametrize('first, second, trusted', [
    ([10, 10, 60, 60, .9], [30, 30, 120, 120, .95], True),     # half a face, large: the frame shows the whole
    ([40, 40, 60, 60, .6], [30, 30, 120, 120, .95], True),     # small and unsure
    ([10, 10, 60, 60, .9], [30, 30, 90, 90, .95], False),      # the second look shows no close-up
    ([10, 10, 60, 60, .9], [30, 30, 120, 120, .7], False),     # the second look is less sure
    ([10, 10, 60, 60, .9], [], False)])
def test_a_second_look_at_close_ups(first, second, trusted):
    d = Detector(Scripted({100: first, 150: second}), (64,))
    boxes, points, rung = d.detect(NOBODY)
    assert d.model.asked == [100, 150] and rung == ('64, close-up' if trusted else '64')
    assert np.allclose(boxes[0], np.subtract(second, [25]*4 + [0]) if trusted else first)
    assert np.allclose(points[0, 0], boxes[0, :2])


CROWD = [[5, 5, 90, 90, .95], [10, 10, 30, 30, .9], [60, 10, 80, 30, .85]]


def test_a_crowd_is_not_taken_for_one_giant_face():
    d = Detector(Scripted({100: CROWD, 150: [30, 30, 120, 120, .99]}), (64,))
    boxes, _, rung = d.detect(NOBODY)
    assert rung == '64' and np.allclose(boxes, CROWD)


def test_parts_of_a_close_up_are_no_crowd():
    unsure = [CROWD[0], CROWD[1], [60, 10, 80, 30, .55]]
    d = Detector(Scripted({100: unsure, 150: [30, 30, 120, 120, .99]}), (64,))
    assert d.detect(NOBODY)[2] == '64, close-up'


@pytest.mark.parametrize('shape', [(3, 2000), (2000, 3), (1, 5000), (20, 4000), (1, 1)])
def test_thin_pictures_have_no_face(reader, shape):
    assert reader.read(np.full((*shape, 3), 128, np.uint8)) == []


def test_black_below_a_thin_picture_moves_nothing():
    banner = np.arange(3*2000*3, dtype=np.uint32).astype(np.uint8).reshape(3, 2000, 3)
    thick = thick_enough(banner, 320)
    assert np.array_equal(thick[:3], banner) and thick.shape == (7, 2000, 3) and not thick[3:].any()


@pytest.mark.parametrize('sizes', [640, (640, 640), [640.], np.array([640])], ids=range(4))
def test_sizes_of_the_detector(sizes): assert Detector(None, sizes).sizes == (640,)


@pytest.mark.parametrize('sizes', [0, (500,), (100, 320), (), 'large', -32, (None,)], ids=range(7))
def test_sizes_that_no_detector_has(sizes):
    with pytest.raises(ArgumentError, match='multiples of 32'): Detector(None, sizes)


@pytest.mark.parametrize('name', ['faces [v2]', 'what?', 'a*b', "it's", 'größe 写真'])
def test_any_name_of_a_folder(root, tmp_path, name):
    shutil.copytree(root/'models'/'fake', tmp_path/name/'models'/'fake')
    photo = fake_photo([(160, 150, 20, 1)])
    one, other = (FaceReader('fake', r, 'cpu', SIZES).best(photo) for r in (root, tmp_path/name))
    assert np.array_equal(one.embedding, other.embedding)


def test_brackets_and_no_detector(root, tmp_path):
    shutil.copytree(root/'models'/'fake', tmp_path/'[1]')
    (tmp_path/'[1]'/'det.onnx').write_bytes((tmp_path/'[1]'/'rec.onnx').read_bytes())
    with pytest.raises(PackMissingError, match='none of its files is a detector'): FaceReader(tmp_path/'[1]')


def test_no_second_look_at_ordinary_faces():
    d = Detector(Scripted({100: [10, 10, 50, 54, .85], 150: [30, 30, 120, 120, .99]}), (64,))
    assert d.detect(NOBODY)[2] == '64' and d.model.asked == [100]


@pytest.mark.parametrize('x, y', [(80, 80), (90, 70)])
def test_padded_coordinates_are_those_of_the_picture(reader, x, y):
    f = reader.best(fake_photo([(x, y, 80, 1)], (160, 160)))
    assert 'padded' in f.rung
    assert abs(f.landmarks[2] - [x, y]).max() < 70 and abs(f.centre - [x, y]).max() < 70


@pytest.fixture
def asked(reader, monkeypatch):
    "The sizes that the detector is asked for."
    sizes, detect = [], reader.detector.model.detect
    def noted(image, input_size=None):
        sizes.append(input_size)
        return detect(image, input_size=input_size)
    monkeypatch.setattr(reader.detector.model, 'detect', noted)
    return sizes


def test_ladder_stops_at_the_first_success(reader, asked):
    reader.read(PHOTO)
    assert set(asked) == {(640, 640)}


def test_ladder_goes_on_where_nobody_is(reader, asked):
    reader.read(np.zeros((64, 64, 3), np.uint8))
    assert asked == [(s, s) for s in (640, 320, 160, 640, 320, 160)]


# --- no face, and which face
WALL = np.full((50, 70, 3), 128, np.uint8)


@pytest.fixture
def wall(tmp_path):
    Image.fromarray(WALL).save(tmp_path/'wall.png')
    return tmp_path/'wall.png'


def test_nobody_is_an_empty_list(reader): assert reader.read(WALL) == []


def pixels_of(path): return WALL


def open_file(path): return io.BytesIO(path.read_bytes())


@pytest.mark.parametrize('source, name', [(pixels_of, 'the picture'), (open_file, 'the picture'),
                                          (Path, 'wall.png'), (str, 'wall.png')])
def test_no_face(reader, wall, source, name):
    with pytest.raises(NoFaceError) as e: reader.best(source(wall))
    assert helpful(e, name, '70 x 50', '640, 320').exit_code == 2


def test_order(reader):
    faces = reader.read(THREE)
    assert len(faces) == 3 and all(f.found == 3 for f in faces)
    assert sorted(-f.size for f in faces) == [-f.size for f in faces]


@pytest.mark.parametrize('which, x', [('largest', 380), ('left', 100), ('right', 560), ('center', 380),
                                      (0, 380)])
def test_choice(reader, which, x): assert abs(reader.best(THREE, which).centre[0] - x) < 40


def test_choice_by_number(reader):
    faces = reader.read(THREE)
    assert reader.best(THREE, 'smallest').size == faces[-1].size
    assert reader.best(THREE, np.int64(2)).centre[0] == faces[2].centre[0]


def test_the_only_one(reader): assert reader.best(PHOTO, 'only').found == 1


@pytest.mark.parametrize('which', [3, -1, 'only', 'middle', None, 1.0, True, ('left',)])
def test_impossible_choices(reader, which):
    with pytest.raises(FaceChoiceError) as e: reader.best(THREE, which)
    assert helpful(e, '3 found').exit_code == 2


def test_choice_of_nothing():
    with pytest.raises(NoFaceError): choose_face([])


def test_a_face_is_its_own_best(reader, face): assert reader.best(face) is face


# --- many pictures, odd networks
def test_batch_equals_single(reader):
    pictures = [PHOTO, np.zeros((40, 60, 3), np.uint8), THREE, RGB, EXACT['webp']]
    rows = reader.read_batch(pictures)
    assert [len(r) for r in rows] == [1, 0, 3, 1, 1]
    for row, picture in zip(rows, pictures):
        for a, b in zip(row, reader.read(picture)):
            assert abs(a.embedding - b.embedding).max() < 1e-6 and np.array_equal(a.box, b.box)


def test_an_empty_batch(reader): assert reader.read_batch([]) == []


def test_recogniser_without_a_batch_axis(reader, tmp_path):
    r = FaceReader('one', make_pack(tmp_path, 'one', batch=False), providers='cpu', det_sizes=SIZES)
    pairs = zip(r.read(THREE), reader.read(THREE))
    assert [abs(a.embedding - b.embedding).max() < 1e-6 for a, b in pairs] == [True]*3


@pytest.mark.parametrize('bad', ['missing.jpg', b'', 'https://x.y/z.jpg'])
def test_bad_pictures(reader, bad):
    with pytest.raises(ImageError): reader.read(bad)


def test_degenerate_detections_are_dropped(reader, monkeypatch):
    detect = reader.detector.model.detect
    def broken(image, input_size=None):
        boxes, points = detect(image, input_size=input_size)
        if len(boxes) == 3: points[0], points[1, 2] = 7., np.nan
        return boxes, points
    monkeypatch.setattr(reader.detector.model, 'detect', broken)
    assert len(reader.read(THREE)) == 1


def test_silent_and_pickles(root, capfd, face):
    r = FaceReader('fake', root, providers='cpu', det_sizes=SIZES)
    copy = pickle.loads(pickle.dumps(r))
    assert capfd.readouterr().out == ''
    assert np.array_equal(r.best(PHOTO).embedding, copy.best(PHOTO).embedding)


def test_the_provider_is_the_one_in_use(reader):
    assert reader.provider == 'CPUExecutionProvider' and reader.providers['detection'] in repr(reader)


CUDA = 'CUDAExecutionProvider' in onnxruntime.get_available_providers()


@pytest.mark.skipif(CUDA, reason='a machine with CUDA')
def test_warns_when_cuda_is_not_in_use(root):
    with pytest.warns(UserWarning, match='not on CUDA'): r = FaceReader('fake', root, providers='cuda')
    assert r.provider == 'CPUExecutionProvider'


def test_no_warning_where_no_gpu_was_asked_for(root):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        FaceReader('fake', root, providers='cpu')


def test_folder_in_the_working_directory_does_not_win(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'fake').mkdir()
    assert FaceReader('fake', root, providers='cpu').folder == root/'models'/'fake'


@pytest.mark.parametrize('kind', [Path, str])
def test_path_of_a_pack(root, kind):
    assert FaceReader(kind(root/'models'/'fake'), providers='cpu').name == 'fake'


# --- pictures with boxes
def test_draw_faces(reader):
    faces = reader.read(THREE)
    drawn = draw_faces(THREE, faces)
    assert drawn.size == (640, 480) and (np.asarray(drawn) != THREE).any()
    assert np.array_equal(THREE, faces[0].image)


def test_drawing_nobody(): assert np.array_equal(np.asarray(draw_faces(PHOTO, [])), PHOTO)


def test_drawing_a_face_that_reaches_over_the_edge(reader):
    assert draw_faces(CLOSE, reader.read(CLOSE)).size == (160, 160)


# --- packs
@pytest.mark.parametrize('name', ['buffalo_l', 'antelopev2', 'mine'])
@pytest.mark.parametrize('find', [FaceReader, check_pack])
def test_missing_pack_without_network(name, find, tmp_path):
    with pytest.raises(PackMissingError) as e: find(name, tmp_path)
    e = helpful(e, tmp_path/'models'/name, 'non-commercial')
    assert e.exit_code == 1 and isinstance(e, FileNotFoundError) and not list(tmp_path.iterdir())
    if name in PACKS: assert all(word in str(e) for word in (*PACKS[name][:2], 'download_pack'))


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr('faceid_nb.packs.fetch', lambda *a: pytest.fail('a download was tried'))


def test_missing_pack_does_not_ask_the_network(tmp_path, monkeypatch, no_download):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(PackMissingError): FaceReader()
    (tmp_path/'.insightface'/'models'/'buffalo_l').mkdir(parents=True)
    with pytest.raises(PackMissingError) as e: FaceReader()
    helpful(e, 'no .onnx file')


@pytest.mark.parametrize('det, rec, word', [('det.onnx', None, 'det.onnx'), (None, 'rec.onnx', 'rec.onnx')])
def test_half_a_pack(tmp_path, det, rec, word):
    root = make_pack(tmp_path, 'half', det=det, rec=rec)
    with pytest.raises(PackMissingError) as e: FaceReader('half', root, providers='cpu')
    helpful(e, word)


def refused(root, name):
    "What is said of a pack."
    with pytest.raises(PackMissingError) as e: FaceReader(name, root, providers='cpu')
    return e


def test_a_pack_without_a_detector(tmp_path):
    root = make_pack(tmp_path, 'two', det=None)
    make_judge(root/'models'/'two'/'other.onnx')
    helpful(refused(root, 'two'), 'detector')


def test_a_pack_without_a_recogniser(tmp_path):
    root = make_pack(tmp_path, 'dets', rec=None)
    export(FakeDetector(), root/'models'/'dets'/'other.onnx', 160, 'size')
    helpful(refused(root, 'dets'), 'recogniser')


def test_a_detector_without_landmarks(tmp_path):
    root = make_pack(tmp_path, 'nokps', det=None)
    export(FakeDetector(6), root/'models'/'nokps'/'det.onnx', 160, 'size')
    helpful(refused(root, 'nokps'), 'landmarks')


SPOIL = dict(half=lambda d: d[:len(d)//2], html=lambda d: b'<!DOCTYPE html>', zeros=lambda d: b'\0'*len(d),
             empty=lambda d: b'')


@pytest.mark.parametrize('how', SPOIL)
@pytest.mark.parametrize('which', ['det.onnx', 'rec.onnx'])
def test_damaged_pack(root, tmp_path, how, which):
    folder = tmp_path/'models'/'bad'
    shutil.copytree(root/'models'/'fake', folder)
    (folder/which).write_bytes(SPOIL[how]((folder/which).read_bytes()))
    helpful(refused(tmp_path, 'bad'), folder)


def test_nested_archive(root, tmp_path):
    shutil.copytree(root/'models'/'fake', tmp_path/'models'/'antelopev2'/'antelopev2')
    assert FaceReader('antelopev2', tmp_path, providers='cpu').name == 'antelopev2'


def test_tiny_lies_in_the_package():
    assert pack_folder('tiny').parts[-5:] == ('faceid_nb', 'weights', 'tiny', 'models', 'tiny')


def test_failed_download_leaves_nothing(tmp_path):
    # the tests have no network
    with pytest.raises(PackMissingError) as e: FaceReader('buffalo_l', tmp_path, download=True)
    helpful(e, 'download failed')
    assert not [p for p in tmp_path.rglob('*') if p.is_file() or p.name == 'buffalo_l']


def test_download_is_from_insightfaces_release(tmp_path, root, monkeypatch):
    def fetch(url, part):
        assert url == 'https://github.com/deepinsight/insightface/releases/download/model-zoo/buffalo_l.zip'
        shutil.move(shutil.make_archive(str(tmp_path/'a'), 'zip', root/'models'/'fake'), part)
    monkeypatch.setattr('faceid_nb.packs.fetch', fetch)
    monkeypatch.delitem(PACK_SUMS, 'buffalo_l')
    monkeypatch.delenv('FACEID_NB_PACK_URL', raising=False)
    r = FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)
    assert r.name == 'buffalo_l' and [p.name for p in (tmp_path/'models').iterdir()] == ['buffalo_l']


def test_a_pack_that_is_there_is_not_fetched(root, tmp_path, no_download):
    shutil.copytree(root/'models'/'fake', tmp_path/'models'/'buffalo_l')
    FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)


@pytest.mark.parametrize('name', ['tiny', 'nobody'])
def test_packs_that_cannot_be_downloaded(tmp_path, name):
    with pytest.raises(ArgumentError): download_pack(name, tmp_path)


def test_checksums_are_of_known_packs():
    assert set(PACK_SUMS) <= set(PACKS) and all(len(v) == 64 for v in PACK_SUMS.values())


# --- a recogniser alone
def test_embedder(face, tmp_path):
    judge = Embedder(make_judge(tmp_path/'judge'/'rec.onnx'), 'cpu')
    a = judge.embed([PHOTO], [face.landmarks])
    b = judge.embed([np.asarray(face.crop(112))])
    assert judge.name == 'judge' and a.shape == (1, 512) and a.dtype == np.float32 and abs(a - b).max() < 1e-4
    assert judge.embed([]).shape == (0, 512) and judge.embed([face.crop(112)]*5, batch=2).shape == (5, 512)


def test_no_recogniser(tmp_path):
    (tmp_path/'bad.onnx').write_bytes(b'html')
    for name in ('nothing.onnx', 'bad.onnx'):
        with pytest.raises(PackMissingError): Embedder(tmp_path/name)


def test_a_detector_is_no_recogniser(tmp_path):
    path = export(FakeDetector(), tmp_path/'det.onnx', 160, 'size')
    with pytest.raises(PackMissingError) as e: Embedder(path)
    helpful(e, 'not a face recogniser')


# --- identities
def unit(seed):
    v = np.random.default_rng(seed).normal(size=512)
    return Face((v/np.linalg.norm(v)).astype(np.float32), pack='fake', raw_embedding=(3*v).astype(np.float32))


def test_similarity(reader, face):
    other = reader.best(fake_photo([(160, 150, 20, 7)]))
    assert abs(face.similarity(face) - 1) < 1e-6 and face.similarity(other) < .9
    assert abs(face.similarity(other) - other.similarity(face)) < 1e-7


def test_packs_do_not_compare(face):
    with pytest.raises(ArgumentError) as e: face.similarity(Face(face.embedding, pack='buffalo_l'))
    helpful(e, 'buffalo_l', 'fake')


@given(st.integers(1, 6), st.integers(0, 99))
def test_mean(n, seed):
    faces = [unit(seed + i) for i in range(n)]
    m = mean_face(faces)
    assert m.embedding.dtype == np.float32 and abs(np.linalg.norm(m.embedding) - 1) < 1e-6
    assert m.sources == tuple(faces)
    v = np.mean([f.embedding.astype(float) for f in faces], 0)
    assert np.abs(m.embedding - v/np.linalg.norm(v)).max() < 1e-6
    assert np.abs(m.raw_embedding - np.mean([f.raw_embedding for f in faces], 0)).max() < 1e-5
    one = mean_face(faces, [1.] + [0.]*(n - 1))
    assert np.abs(one.embedding - faces[0].embedding).max() < 1e-6


A = unit(0)
OPPOSITE, ELSEWHERE = Face(-A.embedding, pack='fake'), Face(A.embedding, pack='x')


@pytest.mark.parametrize('faces, weights', [
    ([], None), ([A, OPPOSITE], None), ([A, ELSEWHERE], None), ([A], [0]), ([A], [-1.]), ([A], [1, 2]),
    ([A], [np.nan])], ids=range(7))
def test_bad_means(faces, weights):
    with pytest.raises(ArgumentError) as e: mean_face(faces, weights)
    helpful(e)


def test_agreement_finds_the_odd_one():
    a, b, c, d = agreement([A, A, A.embedding, unit(1)])
    assert a == pytest.approx(b) == pytest.approx(c) and d < .2 < .6 < a


def test_one_photograph_agrees_with_nobody():
    with pytest.raises(ArgumentError) as e: agreement([A])
    helpful(e, '1 was given')


# --- identity files
def test_save_and_load(face, tmp_path):
    path = save_face(face, tmp_path/'me.safetensors')
    g = load_face(path)
    assert np.array_equal(face.embedding, g.embedding) and np.array_equal(face.raw_embedding, g.raw_embedding)
    assert (g.pack, g.score, g.image) == (face.pack, face.score, None)
    assert abs(face.similarity(g) - 1) < 1e-6 and [p.name for p in tmp_path.iterdir()] == ['me.safetensors']


def test_a_file_without_a_crop(face, tmp_path):
    g = load_face(save_face(face, tmp_path/'me.safetensors'))
    with pytest.raises(ImageError) as e: g.crop()
    helpful(e, 'crop=True')
    with pytest.raises(ImageError): save_face(g, tmp_path/'x.safetensors', crop=True)
    assert [p.name for p in tmp_path.iterdir()] == ['me.safetensors']


def test_a_file_with_a_crop(face, tmp_path):
    h = load_face(save_face(face, tmp_path/'me.safetensors', crop=True))
    assert np.array_equal(np.asarray(h.crop(224)), np.asarray(face.crop(224)))
    assert abs(np.asarray(h.crop(112)).astype(int) - np.asarray(face.crop(112))).mean() < 6
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_needs_its_folder(face, tmp_path):
    with pytest.raises(ArgumentError): save_face(face, tmp_path/'no'/'x.safetensors')
    assert not list(tmp_path.iterdir())


def test_half_a_save_leaves_the_old_file(reader, face, tmp_path, monkeypatch):
    path = save_face(face, tmp_path/'me.safetensors')
    before = path.read_bytes()
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError): save_face(reader.best(fake_photo([(160, 150, 20, 9)])), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


GOOD, E = dict(format='faceid_nb face 1'), A.embedding
BAD = dict(empty=b'', html=b'<html>', pickle=pickle.dumps(1), other=save(dict(x=E)),
           short=save(dict(embedding=E[:100]), GOOD), long=save(dict(embedding=2*E), GOOD),
           nan=save(dict(embedding=E*np.float32('nan')), GOOD), unnamed=save(dict(embedding=E)))


@pytest.mark.parametrize('name', BAD)
def test_bad_identity_files(tmp_path, name):
    path = tmp_path/name
    path.write_bytes(BAD[name])
    with pytest.raises(CheckpointError) as e: load_face(path)
    helpful(e, name)


def test_no_identity_file(tmp_path):
    with pytest.raises(CheckpointError): load_face(tmp_path/'none')


# --- the pack that ships
@pytest.fixture(scope='session')
def tiny(): return FaceReader('tiny', providers='cpu')


def eye_error(face, photo):
    "How far the landmarks lie from the true ones, in distances of the eyes."
    eyes = np.linalg.norm(np.diff(photo.landmarks[:2], axis=0))
    return np.linalg.norm(face.landmarks - photo.landmarks, axis=1).mean()/eyes


@pytest.mark.parametrize('size', [64, 256])
def test_tiny_pack_reads_drawn_people(tiny, size):
    crowd = sample_people(24, seed=77)
    photos, others = (render(crowd, seed=s, size=size, hat=None) for s in (1, 2))
    one, two = (tiny.read_batch([p.image for p in row]) for row in (photos, others))
    ok = [i for i in range(24) if one[i] and two[i]]
    assert len(ok) >= 23 and tiny.provider == 'CPUExecutionProvider' and one[ok[0]][0].pack == 'tiny'
    assert np.mean([eye_error(one[i][0], photos[i]) for i in ok]) < .08
    cos = np.array([[one[i][0].similarity(two[j][0]) for j in ok] for i in ok])
    own, strangers = np.diag(cos), cos[~np.eye(len(ok), dtype=bool)]
    assert own.mean() > .6 and abs(strangers.mean()) < .15
    assert (cos.argmax(1) == np.arange(len(ok))).mean() >= .9


@pytest.mark.parametrize('colour', [(110, 160, 220), (0, 0, 0), (250, 250, 250), (200, 30, 30)])
def test_tiny_pack_sees_nobody_where_nobody_is(tiny, colour):
    assert tiny.read(Image.new('RGB', (64, 64), colour)) == []
