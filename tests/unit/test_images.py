"Every kind of picture is read as the same pixels, and every kind of bad picture is said to be one."
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from faceid_nb.errors import ImageError
from faceid_nb.images import read_image
from helpers_face import helpful
from helpers_pictures import EXACT, GREY, GREYS, OPAQUE, PHOTO, RGB, saved


# --- turned upright
T = Image.Transpose
UNDO = {1: [], 2: [T.FLIP_LEFT_RIGHT], 3: [T.ROTATE_180], 4: [T.FLIP_TOP_BOTTOM], 5: [T.TRANSPOSE],
        6: [T.ROTATE_90], 7: [T.TRANSVERSE], 8: [T.ROTATE_270]}


def orientation(tag):
    "The photograph stored so that the tag turns it upright again."
    image, exif = RGB, Image.Exif()
    for turn in UNDO[tag]: image = image.transpose(turn)
    exif[0x0112] = tag
    return image, exif


@pytest.mark.parametrize('tag', UNDO)
@pytest.mark.parametrize('fmt', ['TIFF', 'PNG'])
def test_exif_orientation(tag, fmt):
    image, exif = orientation(tag)
    assert np.array_equal(read_image(saved(image, fmt, exif=exif)), PHOTO)


def test_exif_of_a_pil_picture_and_no_second_turn():
    image, exif = orientation(6)
    opened = Image.open(io.BytesIO(saved(image, exif=exif)))
    assert np.array_equal(read_image(opened), PHOTO) and np.array_equal(read_image(opened), PHOTO)


def test_broken_exif_is_no_reason_to_refuse():
    data = bytearray(saved(RGB, 'JPEG', exif=orientation(3)[1]))
    at = data.find(b'Exif\0\0') + 6
    data[at:at + 8] = b'\xff'*8
    assert read_image(bytes(data)).shape == PHOTO.shape


# --- every way to store it
@pytest.mark.parametrize('kind', EXACT)
def test_every_way_to_store_colour_gives_the_same_pixels(kind):
    a = read_image(EXACT[kind])
    assert a.dtype == np.uint8 and a.flags.c_contiguous and np.array_equal(a, PHOTO)


@pytest.mark.parametrize('kind', GREYS)
def test_every_way_to_store_grey(kind):
    a = read_image(GREYS[kind])
    assert a.dtype == np.uint8 and a.shape == PHOTO.shape and np.array_equal(a, np.stack([GREY]*3, -1))


def test_one_bit():
    assert set(np.unique(read_image(RGB.convert('1')))) == {0, 255}
    assert set(np.unique(read_image(GREY > 99))) == {0, 255}


@pytest.mark.parametrize('first, mode', [('RGB', 'YCbCr'), ('RGB', 'HSV'), ('RGB', 'RGBX'), ('RGBA', 'RGBa'),
                                         ('LA', 'La'), ('LA', 'PA')])
def test_odd_modes(first, mode):
    assert read_image(RGB.convert(first).convert(mode)).shape == PHOTO.shape


def test_full_transparency_is_white():
    assert (read_image(np.dstack([PHOTO, np.zeros_like(OPAQUE)])) == 255).all()


def test_transparency_lies_on_white():
    a = np.dstack([PHOTO, np.full_like(OPAQUE, 51)])
    expected = np.rint(PHOTO*.2 + 255*.8)
    assert abs(read_image(saved(Image.fromarray(a))).astype(int) - expected).max() <= 1


def test_a_transparent_colour_of_a_palette_is_white():
    p = RGB.quantize(16)
    colour = p.info['transparency'] = p.getpixel((0, 0))
    assert (read_image(saved(p, transparency=colour))[0, 0] == 255).all()


@pytest.fixture
def path(tmp_path):
    path = tmp_path/'a picture with ünïcode.png'
    path.write_bytes(EXACT['rgb'])
    return path


SOURCES = dict(path=Path, text=str, bytes=Path.read_bytes, bytearray=lambda p: bytearray(p.read_bytes()),
               memoryview=lambda p: memoryview(p.read_bytes()), file=lambda p: io.BytesIO(p.read_bytes()))


@pytest.mark.parametrize('kind', SOURCES)
def test_every_source(path, kind): assert np.array_equal(read_image(SOURCES[kind](path)), PHOTO)


def test_an_open_file(path):
    with open(path, 'rb') as f: assert np.array_equal(read_image(f), PHOTO)


RED = np.zeros((9, 9, 3), np.uint8)
RED[..., 0] = 200


def test_red_is_red():
    assert np.array_equal(read_image(saved(Image.fromarray(RED)))[0, 0], [200, 0, 0])


def test_the_input_is_untouched():
    given, rgba = RED.copy(), Image.fromarray(RED).convert('RGBA')
    read_image(given)[:] = 1
    read_image(rgba)
    assert np.array_equal(given, RED) and rgba.mode == 'RGBA'


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([None, 1, 2, 3, 4]),
       st.sampled_from(['uint8', 'uint16', 'float32', 'bool']))
def test_any_size_and_type(h, w, channels, dtype):
    a = read_image(np.ones((h, w) if channels is None else (h, w, channels), dtype))
    assert a.shape == (h, w, 3) and a.dtype == np.uint8


# --- pictures that are refused
PNG, JPEG = EXACT['rgb'], saved(RGB, 'JPEG')
BAD_BYTES = {
    'empty': (b'', 'empty (0 bytes)'), 'html': (b'<!DOCTYPE html><html><body>404', 'HTML'),
    'lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git-lfs'),
    'heic': (b'\0\0\0\x18ftypheic' + b'\0'*64, 'heic'), 'pdf': (b'%PDF-1.7', 'PDF'),
    'text': (b'hello', 'hello'),
    'pickle': (pickle.dumps([1]), 'checkpoint'), 'svg': (b'<svg xmlns=""/>', 'SVG'),
    'noise': (bytes(range(200, 250)), 'not a picture'), 'header only': (PNG[:20], ''),
    'magic only': (b'\x89PNG\r\n\x1a\n', ''), 'jpeg magic': (b'\xff\xd8\xff', '')}


@pytest.mark.parametrize('kind', BAD_BYTES)
@pytest.mark.parametrize('way', ['file', 'bytes', 'open'])
def test_not_a_picture(tmp_path, kind, way):
    data, word = BAD_BYTES[kind]
    path = tmp_path/'photo.jpg'
    path.write_bytes(data)
    with pytest.raises(ImageError) as e: read_image(dict(file=path, bytes=data, open=io.BytesIO(data))[way])
    assert helpful(e, word).exit_code == 2


FORMATS = ['PNG', 'JPEG', 'WEBP', 'TIFF', 'BMP']


@pytest.mark.parametrize('fmt', FORMATS)
@pytest.mark.parametrize('share', [.3, .6, .9])
def test_truncated(fmt, share):
    data = saved(RGB, fmt)
    with pytest.raises(ImageError) as e: read_image(data[:int(len(data)*share)])
    helpful(e)


def test_damaged_in_the_middle():
    data = bytearray(PNG)
    data[len(data)//2:len(data)//2 + 50] = b'\0'*50
    with pytest.raises(ImageError): read_image(bytes(data))


@pytest.mark.parametrize('url', [
    'http://a.b/c.jpg', 'https://a.b/c.jpg', 'HTTPS://A.B', 'ftp://a/b.png', 's3://x/y',
    'data:image/png;base64,AAAA', ' https://a'])
def test_addresses_are_refused(url):
    with pytest.raises(ImageError) as e: read_image(url)
    helpful(e, 'Download it')


@pytest.mark.parametrize('path', [
    'nowhere.jpg', 'no/such/folder/x.png', '', 'x'*5000, 'a\0b', Path('missing.png')])
def test_no_file(path):
    with pytest.raises(ImageError) as e: read_image(path)
    helpful(e)


def test_a_folder(tmp_path):
    with pytest.raises(ImageError) as e: read_image(tmp_path)
    helpful(e, 'folder')


def test_a_forbidden_file(path, monkeypatch):
    def refuse(self): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    with pytest.raises(ImageError) as e: read_image(path)
    helpful(e, 'Permission denied')


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ImageError) as e: read_image(PNG)
    helpful(e, 'too large')


NO_PICTURES = [
    None, 3, object(), {}, [], [[1], [1, 2]], io.StringIO('text'), np.zeros(5), np.zeros((4, 4, 5)),
    np.zeros((0, 5, 3)), np.zeros((5, 0, 3)), np.zeros((3, 64, 64)), np.zeros((2, 4, 4, 3)),
    np.full((4, 4), np.nan), np.full((4, 4), np.inf), np.full((4, 4), -1), np.full((4, 4), 256.),
    np.full((4, 4), 70000), np.zeros((4, 4), complex), np.full((4, 4), 'a')]


@pytest.mark.parametrize('value', NO_PICTURES, ids=range(len(NO_PICTURES)))
def test_values_that_are_no_picture(value):
    with pytest.raises(ImageError) as e: read_image(value)
    helpful(e)


def test_channels_first_is_said():
    with pytest.raises(ImageError, match='transpose'): read_image(PHOTO.transpose(2, 0, 1))


def test_a_closed_file():
    f = io.BytesIO(PNG)
    f.close()
    with pytest.raises(ImageError): read_image(f)


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read_image(PNG)
    assert not list(tmp_path.iterdir())


# --- values that may mean two things
def test_a_colour_that_a_file_calls_transparent_is_white():
    spotted = RGB.copy()
    spotted.putpixel((0, 0), (9, 8, 7))
    assert (read_image(saved(spotted, transparency=(9, 8, 7)))[0, 0] == 255).all()


def test_a_grey_that_a_file_calls_transparent_is_white():
    spotted = RGB.convert('L')
    spotted.putpixel((0, 0), 7)
    assert (read_image(saved(spotted, transparency=7))[0, 0] == 255).all()


def test_a_dark_picture_of_16_bits_is_dark():
    dark = Image.fromarray(GREY.astype(np.uint16))
    assert read_image(saved(dark)).max() <= 1


def test_floats_a_little_above_one_are_no_black_picture():
    with pytest.raises(ImageError, match='out of range.*1.01'): read_image(PHOTO/PHOTO.max()*1.01)


@pytest.mark.parametrize('tensor', [torch.tensor(PHOTO/255).bfloat16(),
                                    torch.tensor(PHOTO/255).float().requires_grad_()], ids=range(2))
def test_tensors_that_numpy_does_not_know(tensor):
    assert abs(read_image(tensor).astype(int) - PHOTO).max() <= 1


def test_a_tiff_of_floats_is_named():
    with pytest.raises(ImageError, match='TIFF of a kind'): read_image(b'II*\0' + bytes(60))


@pytest.mark.parametrize('fmt', ['GIF', 'WEBP', 'PNG'])
def test_of_an_animation_the_first_picture(fmt):
    later = RGB.transpose(T.ROTATE_180)
    moving = saved(RGB, fmt, save_all=True, append_images=[later])
    assert abs(read_image(moving).astype(int) - PHOTO).mean() < 9
