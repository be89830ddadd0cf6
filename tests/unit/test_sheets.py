"Sheets and tables: pictures of any size in their places, columns that line up."
import io
import math

import numpy as np
import pytest
from faceid_nb import sheets
from PIL import Image


@pytest.mark.parametrize('size', [(64, 64), (512, 512), (50, 100), (1000, 10), (192, 192), (1, 1)])
def test_fit_fills_a_square(size):
    square = sheets.fit(Image.new('RGB', size, 'red'), 192)
    assert square.size == (192, 192) and square.getpixel((96, 96)) == (255, 0, 0)


def test_fit_leaves_white_beside_a_narrow_picture():
    assert sheets.fit(Image.new('RGB', (50, 100), 'red'), 192).getpixel((0, 96)) == (255, 255, 255)


def test_small_pictures_are_enlarged_by_whole_pixels():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    enlarged = np.array(noise).repeat(3, 0).repeat(3, 1)
    assert np.array_equal(np.array(sheets.fit(noise, 192)), enlarged)


@pytest.mark.parametrize('n', [1, 4, 5, 9])
def test_sheet_shows_the_photograph_first(n):
    colours = [(20*i, 200, 10) for i in range(n)]
    pictures = [Image.new('RGB', (64, 64), c) for c in colours]
    sheet = sheets.contact_sheet(Image.new('RGB', (300, 300), 'orange'), pictures, ['x']*n, 'a title '*40)
    places = [(12 + i % 5*204 + 96, 12 + i//5*226 + 96) for i in range(n + 1)]
    assert [sheet.getpixel(p) for p in places] == [(255, 165, 0), *colours]


def test_a_long_caption_makes_room():
    layouts = [sheets.Layout(['photograph', 'a' + '\na'*k], 128, 2) for k in range(3)]
    heights = [layout.size[1] for layout in layouts]
    assert np.diff(heights).tolist() == [sheets.LINE]*2 and len({layout.size[0] for layout in layouts}) == 1


def test_a_table_of_texts_and_numbers(capsys):
    head, rows = ['photograph', 'scale', 'likeness'], [
        ['a', '0.5', 'no face'],
        ['a long name', '1', '0.512'],
        ['b', '-10', '-'],
    ]
    sheets.print_table(head, rows)
    assert capsys.readouterr().out == (
        'photograph   scale  likeness\n'
        'a              0.5   no face\n'
        'a long name      1     0.512\n'
        'b              -10         -\n')


def test_a_likeness_in_words():
    assert [sheets.shown(x) for x in (.5123, math.nan)] == ['0.512', 'no face']


# -- other scripts

TEXTS = dict(german='größer, schöner', russian='Привет, мир', arabic='صورة شخص', greek='Φωτογραφία')


@pytest.mark.parametrize('script', TEXTS)
def test_a_font_that_has_the_letters(script):
    font = sheets.font_for(TEXTS[script])
    assert not sheets.lacks(font, TEXTS[script]) and sheets.readable(TEXTS[script], font) == TEXTS[script]


def test_pillows_own_font_where_it_will_do():
    assert sheets.font_for('photo of a person').getname() == sheets.open_font().getname()


def test_letters_that_no_font_has_are_numbers(monkeypatch):
    monkeypatch.setattr(sheets, 'font_files', lambda: ())
    assert sheets.readable('a 写 b', sheets.font_for('a 写 b')) == 'a [U+5199] b'


def test_a_file_that_is_no_font_is_passed_over(tmp_path, monkeypatch):
    (tmp_path/'a.ttf').write_bytes(b'no font')
    monkeypatch.setattr(sheets, 'font_files', lambda: (tmp_path/'a.ttf',))
    assert sheets.font_for('größer').getname() == sheets.open_font().getname()


@pytest.mark.parametrize('text', ['写真'*60, 'a '*200, 'word'*99, 'ä'*300], ids=range(4))
def test_no_line_of_a_title_is_wider_than_the_sheet(text):
    font = sheets.font_for(text)
    layout = sheets.Layout(['x'], 192, 5, sheets.readable(text, font), font)
    assert layout.title and max(map(font.getlength, layout.title)) <= layout.width - 2*sheets.GAP


def test_no_letter_of_a_title_is_lost():
    lines = sheets.wrap_to('one two ' + 'three'*40 + ' four', sheets.open_font(), 200)
    assert ''.join(lines).replace(' ', '') == 'onetwo' + 'three'*40 + 'four'


def test_a_sheet_in_another_script_is_not_that_of_boxes():
    def draw(text): return np.array(sheets.contact_sheet(Image.new('RGB', (9, 9)), [], [], text))
    assert not np.array_equal(draw('Привет'), draw('Приввт'))


# -- consoles

@pytest.mark.parametrize('encoding, shown', [
    ('cp1252', 'größer \\u5199'), ('ascii', 'gr\\xf6\\xdfer \\u5199'), ('utf-8', 'größer 写')])
def test_a_console_that_lacks_letters(encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    sheets.put('größer 写', stream=stream)
    assert stream.buffer.getvalue().decode(encoding) == shown + '\n'


def test_a_stream_without_an_encoding(capsys):
    class Stream(io.StringIO): encoding = None
    stream = Stream()
    sheets.put('写', 1, stream=stream)
    assert stream.getvalue() == '写 1\n'
