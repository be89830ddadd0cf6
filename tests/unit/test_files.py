"""The disk: whole files or none, nothing written over, pictures with their record, one reader of folders
of people."""
import io
import json

import numpy as np
import pytest
from faceid_nb import files
from faceid_nb.errors import ArgumentError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

# -- whole or not at all


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    with files.atomic(tmp_path/'new'/'a.bin') as part:
        part.write_bytes(b'whole')
        assert not (tmp_path/'new'/'a.bin').exists() and part.suffix == '.bin'
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['a.bin']


def test_a_failed_block_leaves_what_was_there(tmp_path):
    (tmp_path/'a.txt').write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with files.atomic(tmp_path/'a.txt') as part:
            part.write_text('half')
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt'] and (tmp_path/'a.txt').read_text() == 'old'


# -- never over another

@given(st.lists(st.integers(1, 30), unique=True, max_size=6), st.integers(1, 4))
def test_numbers_go_on(tmp_path_factory, taken, n):
    folder = tmp_path_factory.mktemp('numbers')
    for t in taken: (folder/f'{t:04d}.png').write_bytes(b'old')
    made = [files.write_new(b'new', folder) for _ in range(n)]
    assert [int(p.stem) for p in made] == [max(taken, default=0) + 1 + i for i in range(n)]
    assert all((folder/f'{t:04d}.png').read_bytes() == b'old' for t in taken)


def test_a_name_taken_meanwhile_is_left_alone(tmp_path, monkeypatch):
    (tmp_path/'0001.png').write_bytes(b'other process')
    monkeypatch.setattr(files.Path, 'iterdir', lambda self: iter(()))
    assert files.write_new(b'new', tmp_path).name == '0002.png'
    assert (tmp_path/'0001.png').read_bytes() == b'other process'


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(TypeError): files.write_new('text, not bytes', tmp_path)
    assert not list(tmp_path.iterdir())


def test_numbers_of_another_name_do_not_count(tmp_path):
    (tmp_path/'0007.png').touch()
    assert files.write_new(b'', tmp_path, 'sheet-{:04d}.png').name == 'sheet-0001.png'


def test_a_free_stem_is_free_for_all(tmp_path):
    for name in ('grid_0001.png', 'grid_0002_curves.csv'): (tmp_path/name).touch()
    assert files.free_name(tmp_path, 'grid') == 'grid_0003'
    assert files.free_name(tmp_path/'new', 'a') == 'a_0001'


# -- records

@pytest.fixture
def picture():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    image.info['faceid_nb'] = dict(prompt='eine Bärin', seed=3)
    return image


def test_a_record_comes_back(picture, tmp_path):
    path = files.save_png(picture, tmp_path/'a.png', likeness=.5)
    assert files.read_record(path) == dict(prompt='eine Bärin', seed=3, likeness=.5)
    assert np.array_equal(np.array(Image.open(path)), np.array(picture))


def test_a_picture_without_a_record(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path/'a.png')
    assert files.read_record(tmp_path/'a.png') == {}


def test_a_record_that_cannot_be_written_leaves_no_file(picture, tmp_path):
    with pytest.raises(TypeError): files.save_png(picture, tmp_path/'a.png', likeness=object())
    assert not list(tmp_path.iterdir())


def test_bytes_carry_what_viewers_show(picture, tmp_path):
    (tmp_path/'a.png').write_bytes(files.png_bytes(picture, seed=4))
    text = Image.open(tmp_path/'a.png').text
    assert text['Description'] == 'eine Bärin' and text['Software'].startswith('faceid_nb ')
    assert json.loads(text['faceid_nb']) == dict(prompt='eine Bärin', seed=4)


# -- folders of people

def lay_out(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()
    return folder


def names_in(people): return {who: [p.name for p in photos] for who, photos in people.items()}


def test_people_are_folders_with_photographs(tmp_path):
    lay_out(tmp_path, 'b/1.PNG', 'b/2.PNG', 'a/2.jpeg', 'a/1.webp', 'a/notes.txt', 'empty/x.txt',
            'readme.png')
    assert names_in(files.people_in(tmp_path)) == dict(a=['1.webp', '2.jpeg'], b=['1.PNG', '2.PNG'])


def test_what_other_programs_leave_is_nobody(tmp_path):
    lay_out(tmp_path, 'a/1.jpg', 'a/._1.jpg', 'a/Thumbs.db', 'a/.thumbnails/1.png', '.thumbnails/1.png',
            '__MACOSX/a/1.jpg', '__MACOSX/1.jpg', '@eaDir/1.jpg', '._b.jpg')
    assert names_in(files.people_in(tmp_path, loose=True)) == dict(a=['1.jpg'])


def test_results_are_nobody(tmp_path):
    lay_out(tmp_path, 'a/1.jpg', 'out/cells.sqlite', 'out/sheet-0001.png')
    assert list(files.people_in(tmp_path)) == ['a']


def test_loose_photographs_are_people_where_they_may_be(tmp_path):
    lay_out(tmp_path, 'a.jpg', 'b.png')
    assert files.people_in(tmp_path) == {}
    assert names_in(files.people_in(tmp_path, loose=True)) == {'a.jpg': ['a.jpg'], 'b.png': ['b.png']}


def test_folders_and_loose_photographs_are_asked_about(tmp_path):
    lay_out(tmp_path, 'a/1.jpg', 'b.png')
    with pytest.raises(ArgumentError, match='beside them'): files.people_in(tmp_path, loose=True)


@pytest.mark.parametrize('name, found', [('nowhere', 'No such folder'), ('file', 'It is a file')])
def test_no_folder(name, found, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(ArgumentError, match=found): files.people_in(tmp_path/name)


@pytest.mark.parametrize('kind', ['jfif', 'gif', 'heic', 'AVIF'])
def test_kinds_that_not_every_pillow_reads_are_not_passed_over(kind, tmp_path):
    lay_out(tmp_path, f'a/1.{kind}')
    assert names_in(files.people_in(tmp_path)) == dict(a=[f'1.{kind}'])


def test_brackets_in_a_stem(tmp_path):
    (tmp_path/'grid[1]_0001.png').touch()
    assert files.free_name(tmp_path, 'grid[1]') == 'grid[1]_0002'


# -- paths

@pytest.fixture
def homeless(monkeypatch):
    "A user without HOME and without an account."
    import pwd
    def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(pwd, 'getpwuid', unknown)


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/somewhere')
    assert str(files.as_path('~/a/b.jpg')) == '/somewhere/a/b.jpg' and str(files.as_path('~')) == '/somewhere'


@pytest.mark.parametrize('path', ['~draft.jpg', 'a/~/b', './~', '/x/~y', 'a~'])
def test_a_wave_elsewhere_is_a_letter(path): assert files.as_path(path) == files.Path(path)


@pytest.mark.parametrize('path', ['~', '~/a.jpg'])
def test_no_home_is_said(homeless, path):
    with pytest.raises(ArgumentError, match='none is known.*HOME is not set'): files.as_path(path)


WRITERS = dict(new=lambda path: files.write_new(b'x', path.rsplit('/', 1)[0]),
               png=lambda path: files.save_png(Image.new('RGB', (2, 2)), path),
               stem=lambda path: files.free_name(path.rsplit('/', 1)[0], 'a'))


@pytest.mark.parametrize('writer', WRITERS)
def test_nothing_is_written_into_a_folder_called_wave(writer, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    WRITERS[writer]('~/out/a.png')
    assert [p.name for p in tmp_path.iterdir()] == ['home'] and (tmp_path/'home'/'out').is_dir()


# -- texts of others

ENCODINGS = 'utf-8 utf-8-sig utf-16 utf-16-le utf-16-be latin-1 cp1252'.split()


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_a_text_in_any_encoding(encoding, tmp_path):
    (tmp_path/'a.txt').write_bytes('ein schöner Mann, 70 Jahre\n'.encode(encoding))
    assert files.read_text(tmp_path/'a.txt')[0] == 'ein schöner Mann, 70 Jahre'


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path/'a.txt').write_bytes(b'\x81\x8d\x8f')
    with pytest.raises(ArgumentError, match='a.txt.*is not a text'): files.read_text(tmp_path/'a.txt')


def test_letters_that_are_no_letters_do_not_cost_the_picture(picture):
    picture.info['faceid_nb']['prompt'] = 'a \udcff b'
    assert Image.open(io.BytesIO(files.png_bytes(picture))).text['Description'] == 'a ? b'


def test_broken_pictures_are_counted_and_named():
    broken = {f'{k}.jpg': 'it is empty' for k in range(7)}
    with pytest.warns(UserWarning, match='7 of 900.*0.jpg: it is empty;.*and 2 more'):
        files.warn_of_broken(broken, 900)


def test_a_record_is_read_from_a_path_and_from_an_open_file(tmp_path):
    image = Image.new('RGB', (8, 8))
    image.info['faceid_nb'] = {'seed': 3}
    path = files.save_png(image, tmp_path/'a.png')
    assert files.read_record(path) == files.read_record(io.BytesIO(path.read_bytes())) == {'seed': 3}
