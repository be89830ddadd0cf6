"A session is kept in the folder, and goes on after a re-run, a restart and a crash."
import json
import subprocess
import sys

import pytest
from conftest import environment
from helpers_studio import drawn, largest_difference, png
from PIL import Image

from faceid_nb import dashboard as D
from faceid_nb import session as N
from faceid_nb.studio import Portrait, Sitter, Studio


@pytest.fixture
def sessions(tmp_path):
    "Opens a session on one folder, as often as it is called; all are closed afterwards."
    opened = []
    def begin(folder=tmp_path):
        opened.append(N.Session(Studio(folder)).open())
        return opened[-1]
    yield begin
    for session in opened: session.close()


@pytest.fixture
def full(sessions):
    "A session with settings, a photograph and two pictures of which one is kept; it is closed."
    session = sessions()
    studio = session.studio
    photo = studio.entrance.add(png(drawn(1)[0]), 'me.png')
    sitter = Sitter((photo,))
    portraits = [Portrait(Image.new('RGB', (8, 8), c), dict(model='tiny-plusv2', seed=s), .5, .1, k, sitter)
                 for s, (c, k) in enumerate([('red', True), ('blue', False)])]
    studio.gallery.remember(portraits)
    studio.settings.take(dict(scale=.4, prompt='somebody "quoted"', seed=9))
    studio.people.side_by_side = True
    session.close()
    return session


def test_nothing_is_noted_before_there_is_something(sessions, tmp_path):
    sessions()
    assert [f.name for f in tmp_path.rglob('*') if f.is_file()] == ['lock']


def test_settings_go_on(full, sessions):
    settings = sessions().studio.settings
    assert (settings.scale, settings.prompt, settings.seed) == (.4, 'somebody "quoted"', 9)


def test_photographs_go_on(full, sessions):
    people = sessions().studio.people
    photo, = people.photographs
    assert photo.name == 'me.png' and len(photo.faces) == 1 and people.side_by_side
    assert photo.python == "model.reader.read('me.png')[0]"


def test_pictures_go_on(full, sessions):
    red, blue = sessions().studio.gallery.portraits
    assert red.image.getpixel((0, 0)) == (255, 0, 0) and (red.kept, blue.kept) == (True, False)
    assert (red.likeness, red.distance, blue.settings['seed']) == (.5, .1, 1)
    assert red.sitter.name == 'me.png' and red.sitter.photographs[0] is blue.sitter.photographs[0]


def test_what_goes_on_is_said(full, sessions):
    session = sessions()
    assert session.studio.worker.note == 'It goes on where it was: 1 photographs, 2 pictures.'
    assert session.studio.worker.error == ''


def test_a_second_board_keeps_a_session_of_its_own(full, sessions):
    first, second = sessions(), sessions()
    assert second.place.name == 'session_2' and second.studio.people.photographs == []
    assert 'Another board is open' in second.studio.worker.note
    second.studio.settings.scale = .9
    assert json.loads((first.place/'session.json').read_text())['settings']['scale'] == .4


def test_a_killed_process_leaves_its_session(tmp_path, sessions):
    source = f'''
import os, signal
from faceid_nb.session import Session
from faceid_nb.studio import Studio
session = Session(Studio({str(tmp_path)!r})).open()
session.studio.entrance.draw_person()
session.studio.settings.scale = .3
os.kill(os.getpid(), signal.SIGKILL)'''
    run = subprocess.run([sys.executable, '-c', source], env=environment(), timeout=120)
    assert run.returncode == -9
    studio = sessions().studio
    assert studio.settings.scale == .3 and [p.name for p in studio.people.photographs] == ['person 24']


def test_a_broken_session_is_put_aside_and_said(full, sessions, tmp_path):
    (full.place/'session.json').write_text('{"settings": ')
    session = sessions()
    assert 'cannot be read' in session.studio.worker.error
    assert (full.place/'broken_0001.json').read_text() == '{"settings": '
    assert len(list((full.place/'pictures').iterdir())) == 2, 'pictures of a broken session stay'


@pytest.mark.parametrize('wrong, said', [
    (dict(settings=dict(scale=99.)), 'scale is from 0 to 2'),
    (dict(portraits=[dict(file='../../x', settings={}, sitter=[], kept=False)]), "names the file '../../x'"),
    (dict(photographs=[dict(file='none', name='a', code='', chosen=0)]), "names the file 'none'"),
    (dict(photographs=[3]), 'int'),
])
def test_what_a_session_says_is_checked(full, sessions, wrong, said):
    path = full.place/'session.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    session = sessions()
    assert said in session.studio.worker.error
    if 'settings' not in wrong: assert session.studio.settings.scale == .4


def test_pictures_that_nobody_names_are_swept_out(full, sessions):
    session = sessions()
    gallery = session.studio.gallery
    gallery.clear()
    assert len(list((full.place/'pictures').iterdir())) == 2, 'until then it can be undone'
    gallery.undo()
    gallery.clear()
    session.close()
    again = sessions()
    assert len(again.studio.gallery.portraits) == 1 == len(list((full.place/'pictures').iterdir()))


def test_a_picture_lies_in_a_file_not_in_memory(sessions):
    gallery = sessions().studio.gallery
    picture = drawn(1)[0]
    gallery.remember([Portrait(picture, dict(seed=0))])
    portrait = gallery.portraits[0]
    assert portrait.picture.parent.name == 'pictures' and largest_difference(portrait.image, picture) == 0


def test_a_board_goes_on_where_an_earlier_one_was(full, tmp_path):
    board = D.portrait_dashboard(folder=tmp_path)
    try:
        assert len(board.panels['Portrait'].gallery.boxes.children) == 2
        assert board.controls.wishes.prompt.value == 'somebody "quoted"'
    finally: board.close()


@pytest.mark.parametrize('own, keep, visited, expected', [
    (True, None, False, True), (True, None, True, False), (True, True, True, True),
    (True, False, False, False), (False, True, False, False)])
def test_strangers_do_not_see_each_others_photographs(monkeypatch, own, keep, visited, expected):
    if visited: monkeypatch.setenv('VOILA_REQUEST_URL', 'http://localhost/')
    assert D.keeps_session(own, keep) is expected
