"From a file to a Face: every kind of picture, every kind of bad picture, packs that are missing or broken, the ladder, the choice, identity files."
import io, os, pickle, warnings
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from faceid_nb import face as F
from faceid_nb.errors import (ArgumentError, CheckpointError, FaceChoiceError, FaceIDError, ImageError, NoFaceError, PackMissingError)
from faceid_nb.face import (PACKS, PACK_SUMS, Embedder, Face, FaceReader, check_pack, choose_face, download_pack, draw_faces, load_face, mean_face, pack_folder,
                            read_image, save_face)
from helpers_face import FakeDetector, export, fake_photo, make_judge, make_pack

PHOTO = fake_photo([(160, 150, 20, 1)])
THREE = fake_photo([(100, 100, 10, 1), (380, 300, 20, 2), (560, 120, 12, 3)], (640, 480))
SIZES = (640, 320, 160, 1280)

@pytest.fixture(scope='session')
def root(tmp_path_factory): return make_pack(tmp_path_factory.mktemp('packs'))

@pytest.fixture(scope='session')
def reader(root): return FaceReader('fake', root, providers='cpu', det_sizes=SIZES)

def saved(image, fmt, **kw):
    b = io.BytesIO()
    image.save(b, format=fmt, **kw)
    return b.getvalue()
RGB = Image.fromarray(PHOTO)
GREY = np.asarray(RGB.convert('L'))

def helpful(e, *words):
    "An error of ours whose parts are all there and which names what it should."
    e = e.value
    assert isinstance(e, FaceIDError) and e.wrong and e.do, repr(e)
    for w in words: assert str(w) in str(e), f'{w!r} not in {e}'
    return e

# pictures that are read -------------------------------------------------------------------------------------------------------------

def orientation(tag):
    "The photograph stored so that the tag turns it upright again."
    T = Image.Transpose
    undo = {1: [], 2: [T.FLIP_LEFT_RIGHT], 3: [T.ROTATE_180], 4: [T.FLIP_TOP_BOTTOM], 5: [T.TRANSPOSE], 6: [T.ROTATE_90], 7: [T.TRANSVERSE], 8: [T.ROTATE_270]}
    image = RGB
    for t in undo[tag]: image = image.transpose(t)
    exif = Image.Exif()
    exif[0x0112] = tag
    return image, exif

@pytest.mark.parametrize('tag', range(1, 9))
@pytest.mark.parametrize('fmt', ['TIFF', 'PNG'])
def test_exif_orientation(tag, fmt):
    image, exif = orientation(tag)
    assert np.array_equal(read_image(saved(image, fmt, exif=exif)), PHOTO)

def test_exif_of_a_pil_picture_and_no_second_turn():
    image, exif = orientation(6)
    opened = Image.open(io.BytesIO(saved(image, 'PNG', exif=exif)))
    assert np.array_equal(read_image(opened), PHOTO) and np.array_equal(read_image(opened), PHOTO)

def test_broken_exif_is_no_reason_to_refuse():
    data = bytearray(saved(RGB, 'JPEG', exif=orientation(3)[1]))
    at = data.find(b'Exif\0\0') + 6
    data[at:at + 8] = b'\xff'*8
    assert read_image(bytes(data)).shape == PHOTO.shape

EXACT = dict(rgb=saved(RGB, 'PNG'), rgba=saved(RGB.convert('RGBA'), 'PNG'), cmyk=saved(RGB.convert('CMYK'), 'TIFF'), bmp=saved(RGB, 'BMP'),
             webp=saved(RGB, 'WEBP', lossless=True), pil=RGB, pil_rgba=RGB.convert('RGBA'), pil_cmyk=RGB.convert('CMYK'), array=PHOTO, rgba_array=np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)]),
             uint16=PHOTO.astype(np.uint16)*257, int64=PHOTO.astype(int), float=PHOTO/255, float255=PHOTO.astype(np.float32), float16=(PHOTO/255).astype(np.float16),
             strided=PHOTO[::-1][::-1], fortran=np.asfortranarray(PHOTO), listed=PHOTO.tolist())
GREYS = dict(l=saved(Image.fromarray(GREY), 'PNG'), la=saved(Image.fromarray(GREY).convert('LA'), 'PNG'), i16=saved(Image.fromarray(GREY.astype(np.uint16)*257), 'PNG'),
             i16tiff=saved(Image.fromarray(GREY.astype(np.uint16)*257), 'TIFF'), i=Image.fromarray(GREY.astype(np.int32)*257), i8=Image.fromarray(GREY.astype(np.int32)), f=saved(Image.fromarray(GREY.astype(np.float32)), 'TIFF'),
             f1=Image.fromarray((GREY/255).astype(np.float32)), p=saved(Image.fromarray(GREY).convert('P'), 'PNG'), hw=GREY, hw1=GREY[..., None], la_array=np.dstack([GREY, np.full(GREY.shape, 255, np.uint8)]))

@pytest.mark.parametrize('kind', EXACT)
def test_every_way_to_store_colour_gives_the_same_pixels(kind):
    a = read_image(EXACT[kind])
    assert a.dtype == np.uint8 and a.flags.c_contiguous and np.array_equal(a, PHOTO)

@pytest.mark.parametrize('kind', GREYS)
def test_every_way_to_store_grey(kind):
    a = read_image(GREYS[kind])
    assert a.dtype == np.uint8 and a.shape == PHOTO.shape and np.array_equal(a, np.stack([GREY]*3, -1))

def test_one_bit_and_odd_modes():
    assert set(np.unique(read_image(RGB.convert('1')))) == {0, 255} and set(np.unique(read_image(GREY > 99))) == {0, 255}
    for mode in ('YCbCr', 'HSV', 'RGBX', 'RGBa', 'La', 'PA'):
        image = RGB.convert('LA').convert(mode) if mode in ('La', 'PA') else RGB.convert('RGBA').convert(mode) if mode == 'RGBa' else RGB.convert(mode)
        assert read_image(image).shape == PHOTO.shape

def test_transparency_lies_on_white():
    a = np.dstack([PHOTO, np.zeros(PHOTO.shape[:2], np.uint8)])
    assert (read_image(a) == 255).all()
    a[..., 3] = 51
    expected = np.rint(PHOTO*.2 + 255*.8)
    assert abs(read_image(saved(Image.fromarray(a), 'PNG')).astype(int) - expected).max() <= 1
    p = RGB.quantize(16)
    p.info['transparency'] = p.getpixel((0, 0))
    assert (read_image(saved(p, 'PNG', transparency=p.getpixel((0, 0))))[0, 0] == 255).all()

def test_all_modes_give_the_same_embedding(reader):
    first, *rest = [reader.best(EXACT[k]).embedding for k in EXACT]
    assert all(np.array_equal(first, e) for e in rest)
    first, *rest = [reader.embedder.embed([read_image(GREYS[k])], [np.array([[10, 10], [60, 10], [35, 40], [15, 60], [55, 60.]])]) for k in GREYS]
    assert all(np.array_equal(first, e) for e in rest)

def test_every_source(tmp_path):
    data = EXACT['rgb']
    path = tmp_path/'a picture with ünïcode.png'
    path.write_bytes(data)
    with open(path, 'rb') as f: assert np.array_equal(read_image(f), PHOTO)
    for source in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)): assert np.array_equal(read_image(source), PHOTO)

def test_tensors_count_as_arrays():
    import torch
    assert np.array_equal(read_image(torch.from_numpy(PHOTO)), PHOTO)

def test_red_is_red_and_the_input_is_untouched(tmp_path):
    red = np.zeros((9, 9, 3), np.uint8)
    red[..., 0] = 200
    before = red.copy()
    assert np.array_equal(read_image(saved(Image.fromarray(red), 'PNG'))[0, 0], [200, 0, 0])
    out = read_image(red)
    out[:] = 1
    rgba = Image.fromarray(red).convert('RGBA')
    read_image(rgba)
    assert rgba.mode == 'RGBA' and np.array_equal(before[..., 1:], np.zeros((9, 9, 2)))

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([None, 1, 2, 3, 4]), st.sampled_from(['uint8', 'uint16', 'float32', 'bool']))
def test_any_size_and_type(h, w, channels, dtype):
    a = read_image(np.ones((h, w) if channels is None else (h, w, channels), dtype))
    assert a.shape == (h, w, 3) and a.dtype == np.uint8

# pictures that are refused ---------------------------------------------------------------------------------------------------------

PNG, JPEG = EXACT['rgb'], saved(RGB, 'JPEG')
BAD_BYTES = {'empty': (b'', 'empty (0 bytes)'), 'html': (b'<!DOCTYPE html><html><body>404', 'HTML'), 'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git-lfs'),
             'heic': (b'\0\0\0\x18ftypheic' + b'\0'*64, 'heic'), 'pdf': (b'%PDF-1.7', 'PDF'), 'text': (b'hello', 'hello'), 'pickle': (pickle.dumps([1]), 'checkpoint'),
             'svg': (b'<svg xmlns=""/>', 'SVG'), 'noise': (bytes(range(200, 250)), 'not a picture'), 'header only': (PNG[:20], ''), 'magic only': (b'\x89PNG\r\n\x1a\n', ''), 'jpeg magic': (b'\xff\xd8\xff', '')}

@pytest.mark.parametrize('kind', BAD_BYTES)
@pytest.mark.parametrize('way', ['file', 'bytes', 'open'])
def test_not_a_picture(tmp_path, kind, way):
    data, word = BAD_BYTES[kind]
    path = tmp_path/'photo.jpg'
    path.write_bytes(data)
    with pytest.raises(ImageError) as e: read_image(dict(file=path, bytes=data, open=io.BytesIO(data))[way])
    assert helpful(e, word).exit_code == 2

@pytest.mark.parametrize('data', [PNG, JPEG, saved(RGB, 'WEBP'), saved(RGB, 'TIFF'), saved(RGB, 'BMP')], ids=['png', 'jpeg', 'webp', 'tiff', 'bmp'])
@pytest.mark.parametrize('share', [.3, .6, .9])
def test_truncated(data, share):
    with pytest.raises(ImageError) as e: read_image(data[:int(len(data)*share)])
    helpful(e)

def test_damaged_in_the_middle():
    data = bytearray(PNG)
    data[len(data)//2:len(data)//2 + 50] = b'\0'*50
    with pytest.raises(ImageError): read_image(bytes(data))

@pytest.mark.parametrize('url', ['http://a.b/c.jpg', 'https://a.b/c.jpg', 'HTTPS://A.B', 'ftp://a/b.png', 's3://x/y', 'data:image/png;base64,AAAA', ' https://a'])
def test_addresses_are_refused(url):
    with pytest.raises(ImageError) as e: read_image(url)
    helpful(e, 'Download it')

@pytest.mark.parametrize('path', ['nowhere.jpg', 'no/such/folder/x.png', '', 'x'*5000, 'a\0b', Path('missing.png')])
def test_no_file(path):
    with pytest.raises(ImageError) as e: read_image(path)
    helpful(e)

def test_a_folder_and_a_forbidden_file(tmp_path, monkeypatch):
    with pytest.raises(ImageError) as e: read_image(tmp_path)
    helpful(e, 'folder')
    path = tmp_path/'x.png'
    path.write_bytes(PNG)
    def refuse(self): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    with pytest.raises(ImageError) as e: read_image(path)
    helpful(e, 'Permission denied')

def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ImageError) as e: read_image(PNG)
    helpful(e, 'too large')

@pytest.mark.parametrize('value', [None, 3, object(), {}, np.zeros(5), np.zeros((4, 4, 5)), np.zeros((0, 5, 3)), np.zeros((5, 0, 3)), np.zeros((3, 64, 64)), np.zeros((2, 4, 4, 3)), [], [[1], [1, 2]],
    np.full((4, 4), np.nan), np.full((4, 4), np.inf), np.full((4, 4), -1), np.full((4, 4), 256.), np.full((4, 4), 70000), np.zeros((4, 4), complex), np.full((4, 4), 'a'), io.StringIO('text')], ids=lambda v: str(v) if isinstance(v, (int, list, type(None))) else f'{type(v).__name__}{getattr(v, "shape", "")}')
def test_values_that_are_no_picture(value):
    with pytest.raises(ImageError) as e: read_image(value)
    helpful(e)

def test_channels_first_is_said():
    with pytest.raises(ImageError, match='transpose'): read_image(PHOTO.transpose(2, 0, 1))

def test_a_closed_file():
    f = io.BytesIO(PNG)
    f.close()
    with pytest.raises(ImageError): read_image(f)

def test_nothing_is_fetched_or_written(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    reader.read(PHOTO)
    read_image(PNG)
    assert not list(tmp_path.iterdir())

# the reader ------------------------------------------------------------------------------------------------------------------------

def test_a_face(reader):
    f = reader.best(PHOTO)
    assert f.embedding.dtype == np.float32 and f.embedding.shape == (512,) and abs(np.linalg.norm(f.embedding) - 1) < 1e-6
    assert f.landmarks.shape == (5, 2) and f.box.shape == (4,) and .5 <= f.score <= 1 and f.pack == 'fake' and f.found == 1
    assert np.array_equal(f.image, PHOTO) and f.crop().size == (224, 224) and f.crop().mode == 'RGB' and f.crop(112).size == (112, 112)
    assert np.allclose(f.raw_embedding/np.linalg.norm(f.raw_embedding), f.embedding, atol=1e-7) and 'one of 1' in repr(f)

def test_equals_insightface(reader, root):
    from insightface.app import FaceAnalysis
    app = FaceAnalysis(str(root/'models'/'fake'), allowed_modules=['detection', 'recognition'], providers=['CPUExecutionProvider'])
    app.prepare(0, det_size=(640, 640))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = app.get(np.ascontiguousarray(THREE[..., ::-1]))
    ours = reader.read(THREE)
    assert len(ours) == len(theirs) == 3
    for t in theirs:
        o = min(ours, key=lambda o: abs(o.box - t.bbox).max())
        assert abs(o.box - t.bbox).max() == 0 and abs(o.landmarks - t.kps).max() == 0 and abs(o.embedding - t.normed_embedding).max() < 1e-6

def test_colour_order_reaches_the_networks(reader):
    "Magenta read as BGR is still magenta, so recolour: only the right order finds the same embedding."
    swapped = PHOTO[..., ::-1]
    assert reader.best(PHOTO).similarity(reader.best(swapped)) < .99

def test_ladder(reader):
    rungs = {m: reader.best(fake_photo([(160, 150, m, 1)])).rung for m in (20, 48, 90)}
    assert rungs[20] == '640' and rungs[48].startswith('320') and rungs[90].startswith('160')
    close = fake_photo([(80, 80, 80, 1)], (160, 160))
    assert reader.best(close).rung.endswith('padded')
    far = fake_photo([(500, 500, 10, 1), (900, 300, 10, 2)], (1300, 1000))
    assert {f.rung for f in reader.read(far)} == {'1280'}

class Scripted:
    "A detector that answers by the width of the picture it is shown."
    def __init__(self, answers): self.answers, self.asked = answers, []
    def detect(self, image, input_size):
        self.asked.append(image.shape[1])
        boxes = np.array(self.answers.get(image.shape[1], []), np.float32).reshape(-1, 5)
        return boxes, np.stack([b[:2] + np.array([[0, 0], [9, 0], [5, 5], [1, 9], [8, 9]]) for b in boxes]).astype(np.float32) if len(boxes) else np.empty((0, 5, 2), np.float32)

@pytest.mark.parametrize('first, second, trusted', [
    ([10, 10, 60, 60, .9], [30, 30, 120, 120, .95], True),     # half a face, large: the frame shows the whole
    ([40, 40, 60, 60, .6], [30, 30, 120, 120, .95], True),     # small and unsure
    ([10, 10, 60, 60, .9], [30, 30, 90, 90, .95], False),      # the second look shows no close-up
    ([10, 10, 60, 60, .9], [30, 30, 120, 120, .7], False),     # the second look is less sure
    ([10, 10, 60, 60, .9], [], False)])
def test_a_second_look_at_close_ups(first, second, trusted):
    d = F.Detector(Scripted({100: first, 150: second}), (64,))
    boxes, points, rung = d.detect(np.zeros((100, 100, 3), np.uint8))
    assert d.model.asked == [100, 150] and rung == ('64, close-up' if trusted else '64')
    assert np.allclose(boxes[0], np.subtract(second, [25]*4 + [0]) if trusted else first) and np.allclose(points[0, 0], boxes[0, :2])

def test_no_second_look_at_ordinary_faces():
    d = F.Detector(Scripted({100: [10, 10, 50, 54, .85], 150: [30, 30, 120, 120, .99]}), (64,))
    assert d.detect(np.zeros((100, 100, 3), np.uint8))[2] == '64' and d.model.asked == [100]

def test_padded_coordinates_are_those_of_the_picture(reader):
    for x, y in ((80, 80), (90, 70)):
        f = reader.best(fake_photo([(x, y, 80, 1)], (160, 160)))
        assert 'padded' in f.rung
        assert abs(f.landmarks[2] - [x, y]).max() < 70 and abs(f.centre - [x, y]).max() < 70

def test_ladder_stops_at_the_first_success(reader, monkeypatch):
    asked = []
    detect = reader.detector.model.detect
    monkeypatch.setattr(reader.detector.model, 'detect', lambda *a, input_size=None, **k: asked.append(input_size) or detect(*a, input_size=input_size, **k))
    reader.read(PHOTO)
    assert set(asked) == {(640, 640)}
    asked.clear()
    reader.read(np.zeros((64, 64, 3), np.uint8))
    assert asked == [(s, s) for s in (640, 320, 160, 640, 320, 160)]

def test_no_face(reader, tmp_path):
    blank = np.full((50, 70, 3), 128, np.uint8)
    assert reader.read(blank) == []
    path = tmp_path/'wall.png'
    Image.fromarray(blank).save(path)
    for source, name in ((blank, 'the picture'), (path, 'wall.png'), (str(path), 'wall.png'), (open(path, 'rb'), 'the picture')):
        with pytest.raises(NoFaceError) as e: reader.best(source)
        assert helpful(e, name, '70 x 50', '640, 320').exit_code == 2

def test_order_and_choice(reader):
    faces = reader.read(THREE)
    assert len(faces) == 3 and all(f.found == 3 for f in faces) and sorted((-f.size for f in faces)) == [-f.size for f in faces]
    x = lambda which: reader.best(THREE, which).centre[0]
    assert abs(x('largest') - 380) < 40 and abs(x('left') - 100) < 40 and abs(x('right') - 560) < 40 and abs(x('center') - 380) < 40
    assert x(0) == x('largest') and reader.best(THREE, 'smallest').size == faces[-1].size and np.int64(2) and x(np.int64(2)) == faces[2].centre[0]
    assert reader.best(PHOTO, 'only').found == 1

@pytest.mark.parametrize('which', [3, -1, 'only', 'middle', None, 1.0, True, ('left',)])
def test_impossible_choices(reader, which):
    with pytest.raises(FaceChoiceError) as e: reader.best(THREE, which)
    assert helpful(e, '3 found').exit_code == 2

def test_choice_of_nothing():
    with pytest.raises(NoFaceError): choose_face([])

def test_a_face_is_its_own_best(reader):
    f = reader.best(PHOTO)
    assert reader.best(f) is f

def test_batch_equals_single(reader):
    pictures = [PHOTO, np.zeros((40, 60, 3), np.uint8), THREE, RGB, EXACT['webp']]
    rows = reader.read_batch(pictures)
    assert [len(r) for r in rows] == [1, 0, 3, 1, 1]
    for r, p in zip(rows, pictures):
        for a, b in zip(r, reader.read(p)): assert abs(a.embedding - b.embedding).max() < 1e-6 and np.array_equal(a.box, b.box)
    assert reader.read_batch([]) == []

def test_recogniser_without_a_batch_axis(reader, tmp_path):
    r = FaceReader('one', make_pack(tmp_path, 'one', batch=False), providers='cpu', det_sizes=SIZES)
    assert [abs(a.embedding - b.embedding).max() < 1e-6 for a, b in zip(r.read(THREE), reader.read(THREE))] == [True]*3

def test_bad_pictures_name_themselves_in_read(reader):
    for bad in ('missing.jpg', b'', 'https://x.y/z.jpg'):
        with pytest.raises(ImageError): reader.read(bad)

def test_degenerate_detections_are_dropped(reader, monkeypatch):
    detect = reader.detector.model.detect
    def broken(image, input_size=None):
        boxes, points = detect(image, input_size=input_size)
        if len(boxes) == 3:
            points[0] = 7.
            points[1, 2] = np.nan
        return boxes, points
    monkeypatch.setattr(reader.detector.model, 'detect', broken)
    assert len(reader.read(THREE)) == 1

def test_silent_and_pickles(root, capfd):
    r = FaceReader('fake', root, providers='cpu', det_sizes=SIZES)
    copy = pickle.loads(pickle.dumps(r))
    assert capfd.readouterr().out == '' and np.array_equal(r.best(PHOTO).embedding, copy.best(PHOTO).embedding)
    assert r.provider == 'CPUExecutionProvider' and r.providers['detection'] in repr(r)

def test_warns_when_cuda_is_not_in_use(root):
    import onnxruntime
    if 'CUDAExecutionProvider' in onnxruntime.get_available_providers(): pytest.skip('a machine with CUDA')
    with pytest.warns(UserWarning, match='not on CUDA'): r = FaceReader('fake', root, providers='cuda')
    assert r.provider == 'CPUExecutionProvider'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        FaceReader('fake', root, providers='cpu')

def test_folder_in_the_working_directory_does_not_win(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'fake').mkdir()
    assert FaceReader('fake', root, providers='cpu').folder == root/'models'/'fake'

def test_path_of_a_pack(root):
    for name in (root/'models'/'fake', str(root/'models'/'fake')): assert FaceReader(name, providers='cpu').name == 'fake'

def test_draw_faces(reader):
    faces = reader.read(THREE)
    d = draw_faces(THREE, faces)
    assert d.size == (640, 480) and (np.asarray(d) != THREE).any() and np.array_equal(THREE, faces[0].image)
    assert np.array_equal(np.asarray(draw_faces(PHOTO, [])), PHOTO)
    draw_faces(fake_photo([(80, 80, 80, 1)], (160, 160)), reader.read(fake_photo([(80, 80, 80, 1)], (160, 160))))

# packs -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['buffalo_l', 'antelopev2', 'mine'])
def test_missing_pack_without_network(name, tmp_path):
    for make in (lambda: FaceReader(name, tmp_path), lambda: check_pack(name, tmp_path)):
        with pytest.raises(PackMissingError) as e: make()
        e = helpful(e, tmp_path/'models'/name, 'non-commercial')
        assert e.exit_code == 1 and isinstance(e, FileNotFoundError)
        if name in PACKS: assert PACKS[name][0] in str(e) and PACKS[name][1] in str(e) and 'download_pack' in str(e)
    assert not list(tmp_path.iterdir())

def test_missing_pack_does_not_ask_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr('faceid_nb.packs.fetch', lambda *a: pytest.fail('a download was tried'))
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(PackMissingError): FaceReader()
    (tmp_path/'.insightface'/'models'/'buffalo_l').mkdir(parents=True)
    with pytest.raises(PackMissingError) as e: FaceReader()
    helpful(e, 'no .onnx file')

@pytest.mark.parametrize('det, rec, word', [('det.onnx', None, 'det.onnx'), (None, 'rec.onnx', 'rec.onnx')])
def test_half_a_pack(tmp_path, det, rec, word):
    with pytest.raises(PackMissingError) as e: FaceReader('half', make_pack(tmp_path, 'half', det=det, rec=rec), providers='cpu')
    helpful(e, word)

def test_packs_without_a_task(tmp_path):
    r = make_pack(tmp_path, 'two', det=None)
    make_judge(r/'models'/'two'/'other.onnx')
    with pytest.raises(PackMissingError) as e: FaceReader('two', r, providers='cpu')
    helpful(e, 'detector')
    r = make_pack(tmp_path, 'dets', rec=None)
    export(FakeDetector(), r/'models'/'dets'/'other.onnx', 160, 'size')
    with pytest.raises(PackMissingError) as e: FaceReader('dets', r, providers='cpu')
    helpful(e, 'recogniser')
    r = make_pack(tmp_path, 'nokps', det=None)
    export(FakeDetector(6), r/'models'/'nokps'/'det.onnx', 160, 'size')
    with pytest.raises(PackMissingError) as e: FaceReader('nokps', r, providers='cpu')
    helpful(e, 'landmarks')

@pytest.mark.parametrize('spoil', [lambda d: d[:len(d)//2], lambda d: b'<!DOCTYPE html>', lambda d: b'\0'*len(d), lambda d: b''])
@pytest.mark.parametrize('which', ['det.onnx', 'rec.onnx'])
def test_damaged_pack(root, tmp_path, spoil, which):
    folder = tmp_path/'models'/'bad'
    folder.mkdir(parents=True)
    for n in ('det.onnx', 'rec.onnx'):
        data = (root/'models'/'fake'/n).read_bytes()
        (folder/n).write_bytes(spoil(data) if n == which else data)
    with pytest.raises(PackMissingError) as e: FaceReader('bad', tmp_path, providers='cpu')
    helpful(e, folder)

def test_nested_archive(root, tmp_path):
    import shutil
    shutil.copytree(root/'models'/'fake', tmp_path/'models'/'antelopev2'/'antelopev2')
    assert FaceReader('antelopev2', tmp_path, providers='cpu').name == 'antelopev2'

def test_tiny_lies_in_the_package(): assert pack_folder('tiny').parts[-5:] == ('faceid_nb', 'weights', 'tiny', 'models', 'tiny')

def test_failed_download_leaves_nothing(tmp_path):
    with pytest.raises(PackMissingError) as e: FaceReader('buffalo_l', tmp_path, download=True)  # the tests have no network
    helpful(e, 'download failed')
    assert not [p for p in tmp_path.rglob('*') if p.is_file() or p.name == 'buffalo_l']

def test_download_is_from_insightfaces_release(tmp_path, root, monkeypatch):
    import shutil
    def fetch(url, part):
        assert url == 'https://github.com/deepinsight/insightface/releases/download/model-zoo/buffalo_l.zip'
        shutil.move(shutil.make_archive(str(tmp_path/'a'), 'zip', root/'models'/'fake'), part)
    monkeypatch.setattr('faceid_nb.packs.fetch', fetch)
    monkeypatch.delitem(PACK_SUMS, 'buffalo_l')
    monkeypatch.delenv('FACEID_NB_PACK_URL', raising=False)
    r = FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)
    assert r.name == 'buffalo_l' and [p.name for p in (tmp_path/'models').iterdir()] == ['buffalo_l']
    monkeypatch.setattr('faceid_nb.packs.fetch', lambda *a: pytest.fail('again'))
    FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)

def test_packs_that_cannot_be_downloaded(tmp_path):
    for name in ('tiny', 'nobody'):
        with pytest.raises(ArgumentError): download_pack(name, tmp_path)
    assert set(PACK_SUMS) <= set(PACKS) and all(len(v) == 64 for v in PACK_SUMS.values())

def test_embedder(reader, tmp_path):
    judge = Embedder(make_judge(tmp_path/'judge'/'rec.onnx'), 'cpu')
    f = reader.best(PHOTO)
    a = judge.embed([PHOTO], [f.landmarks])
    b = judge.embed([np.asarray(f.crop(112))])
    assert judge.name == 'judge' and a.shape == (1, 512) and a.dtype == np.float32 and abs(a - b).max() < 1e-4
    assert judge.embed([]).shape == (0, 512) and judge.embed([f.crop(112)]*5, batch=2).shape == (5, 512)
    with pytest.raises(PackMissingError): Embedder(tmp_path/'nothing.onnx')
    (tmp_path/'bad.onnx').write_bytes(b'html')
    with pytest.raises(PackMissingError): Embedder(tmp_path/'bad.onnx')
    with pytest.raises(PackMissingError) as e: Embedder(export(FakeDetector(), tmp_path/'det.onnx', 160, 'size'))
    helpful(e, 'not a face recogniser')

# identities ------------------------------------------------------------------------------------------------------------------------

def unit(seed):
    v = np.random.default_rng(seed).normal(size=512)
    return Face((v/np.linalg.norm(v)).astype(np.float32), pack='fake', raw_embedding=(3*v).astype(np.float32))

def test_similarity(reader):
    a, b = reader.best(PHOTO), reader.best(fake_photo([(160, 150, 20, 7)]))
    assert abs(a.similarity(a) - 1) < 1e-6 and abs(a.similarity(b) - b.similarity(a)) < 1e-7 and a.similarity(b) < .9
    with pytest.raises(ArgumentError) as e: a.similarity(Face(b.embedding, pack='buffalo_l'))
    helpful(e, 'buffalo_l', 'fake')

@given(st.integers(1, 6), st.integers(0, 99))
def test_mean(n, seed):
    faces = [unit(seed + i) for i in range(n)]
    m = mean_face(faces)
    assert m.embedding.dtype == np.float32 and abs(np.linalg.norm(m.embedding) - 1) < 1e-6 and m.sources == tuple(faces)
    v = np.mean([f.embedding.astype(float) for f in faces], 0)
    assert np.abs(m.embedding - v/np.linalg.norm(v)).max() < 1e-6
    assert np.abs(m.raw_embedding - np.mean([f.raw_embedding for f in faces], 0)).max() < 1e-5
    one = mean_face(faces, [1.] + [0.]*(n - 1))
    assert np.abs(one.embedding - faces[0].embedding).max() < 1e-6

def test_bad_means(reader):
    a = unit(0)
    for faces, weights in (([], None), ([a, Face(-a.embedding, pack='fake')], None), ([a, Face(a.embedding, pack='x')], None), ([a], [0]), ([a], [-1.]), ([a], [1, 2]), ([a], [np.nan])):
        with pytest.raises(ArgumentError) as e: mean_face(faces, weights)
        helpful(e)

def test_save_and_load(reader, tmp_path):
    f = reader.best(PHOTO)
    path = save_face(f, tmp_path/'me.safetensors')
    g = load_face(path)
    assert np.array_equal(f.embedding, g.embedding) and np.array_equal(f.raw_embedding, g.raw_embedding) and (g.pack, g.score, g.image) == (f.pack, f.score, None)
    assert abs(f.similarity(g) - 1) < 1e-6 and [p.name for p in tmp_path.iterdir()] == ['me.safetensors']
    with pytest.raises(ImageError) as e: g.crop()
    helpful(e, 'crop=True')
    h = load_face(save_face(f, path, crop=True))
    assert np.array_equal(np.asarray(h.crop(224)), np.asarray(f.crop(224)))
    assert len([p for p in tmp_path.iterdir()]) == 1 and abs(np.asarray(h.crop(112)).astype(int) - np.asarray(f.crop(112))).mean() < 6
    with pytest.raises(ImageError): save_face(g, tmp_path/'x.safetensors', crop=True)
    with pytest.raises(ArgumentError): save_face(f, tmp_path/'no'/'x.safetensors')
    assert [p.name for p in tmp_path.iterdir()] == ['me.safetensors']

def test_half_a_save_leaves_the_old_file(reader, tmp_path, monkeypatch):
    path = save_face(reader.best(PHOTO), tmp_path/'me.safetensors')
    before = path.read_bytes()
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError): save_face(reader.best(fake_photo([(160, 150, 20, 9)])), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

def test_bad_identity_files(tmp_path):
    from safetensors.numpy import save
    good = dict(format='faceid_nb face 1')
    e = unit(0).embedding
    bad = dict(empty=b'', html=b'<html>', pickle=pickle.dumps(1), other=save(dict(x=e)), short=save(dict(embedding=e[:100]), good), long=save(dict(embedding=2*e), good), nan=save(dict(embedding=e*np.float32('nan')), good), unnamed=save(dict(embedding=e)))
    for name, data in bad.items():
        path = tmp_path/name
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as err: load_face(path)
        helpful(err, name)
    with pytest.raises(CheckpointError): load_face(tmp_path/'none')

# the pack that ships ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def tiny(): return FaceReader('tiny', providers='cpu')

@pytest.mark.parametrize('size', [64, 256])
def test_tiny_pack_reads_drawn_people(tiny, size):
    from faceid_nb.tiny.people import render, sample_people
    crowd = sample_people(24, seed=77)
    photos = [render(crowd, seed=s, size=size, hat=None) for s in (1, 2)]
    one, two = (tiny.read_batch([p.image for p in row]) for row in photos)
    ok = [i for i in range(24) if one[i] and two[i]]
    assert len(ok) >= 23 and tiny.provider == 'CPUExecutionProvider' and one[ok[0]][0].pack == 'tiny'
    error = [np.linalg.norm(one[i][0].landmarks - photos[0][i].landmarks, axis=1).mean()/np.linalg.norm(np.diff(photos[0][i].landmarks[:2], axis=0)) for i in ok]
    assert np.mean(error) < .08
    cos = np.array([[one[i][0].similarity(two[j][0]) for j in ok] for i in ok])
    own = np.diag(cos)
    others = cos[~np.eye(len(ok), dtype=bool)]
    assert own.mean() > .6 and abs(others.mean()) < .15 and (cos.argmax(1) == np.arange(len(ok))).mean() >= .9

def test_tiny_pack_sees_nobody_where_nobody_is(tiny):
    for colour in ((110, 160, 220), (0, 0, 0), (250, 250, 250), (200, 30, 30)): assert tiny.read(Image.new('RGB', (64, 64), colour)) == []
