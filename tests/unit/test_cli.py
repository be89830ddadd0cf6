"""The command line: first with stand-ins for the model, quick and exact; then for real, as a user would
call it."""
import io
import json
import math
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings

import numpy as np
import pytest
from conftest import ROOT, environment
from faceid_nb import cli
from faceid_nb.errors import NoFaceError, WeightsMissingError
from faceid_nb.measure import FLATTERS
from faceid_nb.together import Together
from faceid_nb.tiny.people import render, sample_people
from helpers_cli import CLI, Judge, Model, one_line, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture
def photo(tmp_path):
    path = tmp_path/'me.jpg'
    Image.new('RGB', (200, 120), 'orange').save(path)
    return path


@pytest.fixture
def stand_in(monkeypatch):
    "Put a model in place; likenesses 0.5, 0.51, ... unless given."
    def place(model=None, likeness=None, warning=''):
        model = model or Model()
        judge = Judge(np.arange(50)/100 + .5 if likeness is None else likeness, warning)
        monkeypatch.setattr('faceid_nb.models.load', lambda name, device=None, **k: model)
        monkeypatch.setattr('faceid_nb.measure.as_judge', lambda *a, **k: judge)
        return model
    return place


# -- portrait

@pytest.fixture
def three(photo, tmp_path, stand_in, capsys):
    "Three pictures of one run: the model, the folder, what was printed."
    model, out = stand_in(), tmp_path/'out'
    code = run('portrait', photo, 'eine Bärin', '--out', out, '--samples', 3, '--seed', 5, '--scale', .7,
               '--steps', 4, '--negative-prompt', 'blurry', '--guidance-scale', 3, '--batch', 2)
    assert code == 0
    return model, out, capsys.readouterr()


def test_portrait_writes_pictures_and_a_sheet(three):
    _, out, _ = three
    assert sorted(p.name for p in out.iterdir()) == ['0001.png', '0002.png', '0003.png', 'sheet-0001.png']
    assert Image.open(out/'0003.png').getpixel((9, 9)) == (7, 100, 50)


def test_pictures_know_how_they_were_made(three):
    _, out, _ = three
    text = Image.open(out/'0002.png').text
    assert text['Description'] == 'eine Bärin' and text['Software'].startswith('faceid_nb ')
    assert json.loads(text['faceid_nb']) == dict(
        prompt='eine Bärin', seed=6, photo='me.jpg', face='largest', likeness=.51)


def test_the_model_is_asked_for_what_was_typed(three):
    model, _, _ = three
    assert [(a['seed'], a['num_samples']) for a in model.asked] == [(5, 2), (7, 1)]
    assert model.asked[0] == dict(face=model.reader.faces[0], prompt='eine Bärin', num_samples=2, seed=5,
                                  scale=.7, num_inference_steps=4, guidance_scale=3.,
                                  negative_prompt='blurry')


def test_a_table_ends_the_run(three):
    _, _, printed = three
    assert 'chatter' not in printed.out and 'mean likeness 0.510 over 3 of 3' in printed.out
    for word in ('0001.png', '0.520', 'sheet-0001.png'): assert word in printed.out


def test_portrait_is_a_function(photo, tmp_path, stand_in):
    model = stand_in()
    assert cli.portrait(photo, 'a', samples=1, steps=2, out=tmp_path/'out') == 0
    assert model.asked[0]['num_inference_steps'] == 2 and (tmp_path/'out'/'0001.png').exists()


def test_nothing_is_overwritten(photo, tmp_path, stand_in):
    stand_in()
    out = tmp_path/'out'
    run('portrait', photo, 'a', '--out', out, '--samples', 2)
    (out/'0009.png').write_bytes(b'mine')
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    run('portrait', photo, 'a', '--out', out, '--samples', 2)
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    assert {n: after[n] for n in before} == before
    assert sorted(set(after) - set(before)) == ['0010.png', '0011.png', 'sheet-0002.png']


def test_ctrl_c_keeps_what_is_finished(photo, tmp_path, stand_in, capsys):
    stand_in(Model(stop_at=(2, 1)))
    out = tmp_path/'out'
    assert run('portrait', photo, 'a', '--out', out, '--steps', 3, '--batch', 1) == 130
    assert sorted(p.name for p in out.iterdir()) == ['0001.png', '0002.png', 'sheet-0001.png']
    for p in out.iterdir(): Image.open(p).load()
    assert 'kept' in capsys.readouterr().err


def test_a_picture_without_a_face_is_said(photo, tmp_path, stand_in, capsys):
    stand_in(likeness=[.4, math.nan])
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 2) == 0
    out = capsys.readouterr().out
    assert 'no face' in out and 'mean likeness 0.400 over 1 of 2' in out
    assert json.loads(Image.open(tmp_path/'out'/'0002.png').text['faceid_nb'])['likeness'] is None


def test_without_a_judge_the_steering_recogniser_scores(photo, tmp_path, stand_in, capsys):
    stand_in(warning=f'{FLATTERS} Get one')
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 1) == 0
    assert 'flatters. Get one' in capsys.readouterr().err


def test_a_missing_judge_is_found_out_before_anything_is_generated(photo, tmp_path, stand_in, monkeypatch):
    model = stand_in()
    def as_judge(judge=True, reader=None, face=None, needed=True):
        assert not needed and not model.asked
        return Judge([.3])
    monkeypatch.setattr('faceid_nb.measure.as_judge', as_judge)
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 1) == 0


def test_several_faces_are_said_and_chosen(photo, tmp_path, stand_in, capsys):
    model = stand_in(Model(faces=3))
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 1, '--face', 2) == 0
    assert model.asked[0]['face'].number == 2
    assert "3 faces in me.jpg; took '2'" in capsys.readouterr().err


def test_a_face_that_is_not_there(photo, tmp_path, stand_in):
    stand_in(Model(faces=3))
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 1, '--face', 3) == 2


# -- bad input: exit code, one line, no traceback, no file

def jpeg():
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, 'JPEG')
    return out.getvalue()


BAD = dict(empty=b'', text=b'not a picture', truncated=jpeg()[:400])


@pytest.mark.parametrize('what', ['missing', 'folder', *BAD])
def test_bad_photographs(what, tmp_path, stand_in, capsys):
    stand_in()
    bad = tmp_path if what == 'folder' else tmp_path/f'{what}.jpg'
    if what in BAD: bad.write_bytes(BAD[what])
    assert run('portrait', bad, 'a', '--out', tmp_path/'out') == 2
    one_line(capsys)
    assert not (tmp_path/'out').exists()


ERRORS = [
    (NoFaceError('No face', 'none', 'try'), 2),
    (WeightsMissingError('No weights', 'there', 'get them'), 1),
    (RuntimeError('a\nb'), 1),
    (PermissionError(13, 'Permission denied', 'x.png'), 1),
    (ImportError('libGL.so.1: cannot open shared object file'), 1),
]


@pytest.mark.parametrize('error, code', ERRORS)
def test_errors_get_a_code_and_one_line(error, code, photo, tmp_path, monkeypatch, capsys):
    def load(*a, **k): raise error
    monkeypatch.setattr('faceid_nb.models.load', load)
    assert run('portrait', photo, 'a', '--out', tmp_path/'out') == code
    line = one_line(capsys)
    if isinstance(error, ImportError): assert 'libgl1' in line
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('error, code', ERRORS)
def test_debug_shows_the_traceback(error, code, photo, tmp_path, monkeypatch, capsys):
    def load(*a, **k): raise error
    monkeypatch.setattr('faceid_nb.models.load', load)
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--debug') == code
    assert 'Traceback' in capsys.readouterr().err


def test_out_is_a_file(photo, tmp_path, stand_in, capsys):
    stand_in()
    assert run('portrait', photo, 'a', '--out', photo) == 2
    one_line(capsys)


@pytest.mark.parametrize('bad', [
    'portrait', 'portrait a.jpg', 'dance', '', 'portrait a b --samples 0', 'portrait a b --steps 1.5',
    'portrait a b --scale nan', 'portrait a b --scale inf', 'portrait a b --seed -1', 'lab --port 0'])
def test_bad_arguments_end_with_2(bad, capsys):
    with pytest.raises(SystemExit) as e: cli.main(bad.split())
    assert e.value.code == 2 and 'usage:' in capsys.readouterr().err


# -- quiet

def test_libraries_are_quiet_and_then_as_they_were(capsys):
    with cli.quiet_models():
        print('chatter')
        warnings.warn('unheard', stacklevel=1)
    print('speech')
    printed = capsys.readouterr()
    assert printed.out == 'speech\n' and printed.err == ''


def test_debug_lets_libraries_speak(capsys):
    with cli.quiet_models(False): print('chatter')
    assert capsys.readouterr().out == 'chatter\n'


# -- argument types

@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True),
       st.sampled_from([',', ', ', ' ,']))
def test_lists_are_read(values, comma):
    assert cli.several(cli.number(int, 0, 2**63 - 1))(comma.join(map(str, values))) == values


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=4, unique=True))
def test_lists_of_numbers_are_read_exactly(values):
    assert cli.several(cli.number(float, -10, 10))(','.join(map(repr, values))) == values


@pytest.mark.parametrize('bad', ['', ',', '1,', '1,,2', '1;2', '1,x', '1,nan', '1,inf', '1,99', '1,1',
                                 '1,1.0'])
def test_bad_lists(bad):
    with pytest.raises(cli.argparse.ArgumentTypeError): cli.several(cli.number(float, 0, 10))(bad)


# -- lab

def test_lab_copies_once_and_keeps_changes(tmp_path):
    lab = tmp_path/'lab'
    new, old = cli.copy_notebooks(lab)
    assert new > 3 and old == 0 and (lab/'index.ipynb').exists() and (lab/'tiny'/'people.ipynb').exists()
    (lab/'index.ipynb').write_text('mine')
    (lab/'method'/'00_errors.ipynb').unlink()
    assert cli.copy_notebooks(lab) == (1, new - 1)
    assert (lab/'index.ipynb').read_text() == 'mine'


def test_lab_stays_on_this_machine(tmp_path):
    command = cli.lab_command(tmp_path, port=9999, browser=False)
    for part in ('--ServerApp.ip=127.0.0.1', '--no-browser', '--ServerApp.port=9999'): assert part in command
    assert not any('token' in c or 'password' in c for c in command)  # Jupyter's own token stays in force


@pytest.fixture
def server(tmp_path):
    "JupyterLab as `faceid-nb lab` starts it: its address and its token."
    folders = {f'{name}_DIR': str(tmp_path/name)
               for name in ('JUPYTER_CONFIG', 'JUPYTER_DATA', 'JUPYTER_RUNTIME')}
    process = subprocess.Popen(
        [*CLI, 'lab', tmp_path/'lab', '--no-browser'], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=environment(IPYTHONDIR=str(tmp_path/'ipython'), **folders))
    try:
        end = time.monotonic() + 60
        for line in process.stderr:
            url = re.search(r'(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)', line)
            if url or time.monotonic() > end: break
        yield url.groups()
    finally:
        process.terminate()
        process.wait(30)


def ask(base, query='', patience=60):
    "What the server says about index.ipynb: the address is printed a moment before it listens."
    end = time.monotonic() + patience
    while True:
        try: return json.load(urllib.request.urlopen(f'{base}/api/contents/index.ipynb{query}', timeout=20))
        except urllib.error.URLError as e:
            if isinstance(e, urllib.error.HTTPError) or time.monotonic() > end: raise
            time.sleep(.2)


def test_lab_answers_with_a_token(server):
    "The real server: serves the copy with the token, and refuses without it."
    base, token = server
    assert ask(base, f'?token={token}')['type'] == 'notebook'
    with pytest.raises(urllib.error.HTTPError) as e: ask(base)
    assert e.value.code == 403


# -- as a process

def test_help_is_quick_and_light(fresh):
    out = fresh('''
import sys
from faceid_nb.cli import main
try: main(['--help'])
except SystemExit as e: print('code', e.code)
print([m for m in ('torch', 'numpy', 'PIL', 'cv2', 'diffusers') if m in sys.modules])
''')
    assert out.endswith('code 0\n[]\n')
    for word in ('portrait', 'sweep', 'benchmark', 'demo', 'lab', 'doctor', 'exit codes'): assert word in out


SLOW = '''
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background children ignore SIGINT
sys.path.insert(0, sys.argv[1])
import faceid_nb.models, faceid_nb.measure
from helpers_cli import Judge, Model
model = Model()
def slow(*a, **k):
    print('ready', file=sys.stderr, flush=True)
    time.sleep(60)
model.generate = slow
faceid_nb.models.load = lambda *a, **k: model
faceid_nb.measure.as_judge = lambda *a, **k: Judge([])
from faceid_nb.cli import main
sys.exit(main(['portrait', sys.argv[2], 'a', '--quiet', '--out', sys.argv[3]]))
'''


def test_ctrl_c_for_real(photo, tmp_path):
    "A signal in the middle of a run ends the process with 130 and one line."
    words = [sys.executable, '-c', SLOW, str(ROOT/'tests'/'support'), str(photo), str(tmp_path/'out')]
    p = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    for line in p.stderr:
        if 'ready' in line: break
    p.send_signal(signal.SIGINT)
    err = p.stderr.read()
    assert p.wait(30) == 130 and 'Traceback' not in err and 'stopped' in err
    assert not (tmp_path/'out').exists()


def test_a_worker_ends_silently_on_ctrl_c():
    source = '''
import os, signal, time
from faceid_nb.cli import in_worker
in_worker()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(9)
'''
    r = subprocess.run([sys.executable, '-c', source], env=environment(), capture_output=True, text=True,
                       timeout=60)
    assert r.returncode == 130 and r.stderr == r.stdout == ''


# -- for real, with the weights that ship

@pytest.fixture(scope='module')
def demonstration(tmp_path_factory):
    "The README's first command, after its installation: its folder, what it printed, how long it took."
    folder, start = tmp_path_factory.mktemp('demo'), time.monotonic()
    r = subprocess.run([*CLI, 'demo'], cwd=folder, env=environment(), capture_output=True, text=True,
                       timeout=300)
    assert r.returncode == 0, r.stderr
    return folder/'faceid-demo', r, time.monotonic() - start


def test_demo_makes_a_photograph_four_pictures_and_a_sheet(demonstration):
    out, r, seconds = demonstration
    pictures = ['0001.png', '0002.png', '0003.png', '0004.png']
    assert sorted(p.name for p in out.iterdir()) == [*pictures, 'photograph-0001.jpg', 'sheet-0001.png']
    assert Image.open(out/'photograph-0001.jpg').size == (512, 512)
    assert seconds < 180  # under a minute on an idle machine; a busy one is given three times as long


def test_demo_looks_like_the_person(demonstration):
    out, r, _ = demonstration
    records = [json.loads(Image.open(out/f'{i:04d}.png').text['faceid_nb']) for i in range(1, 5)]
    likeness = [record['likeness'] for record in records]
    assert sum(x is not None and x > .2 for x in likeness) >= 3, likeness  # strangers score about 0
    assert 'mean likeness' in r.stdout


def test_demo_is_quiet(demonstration):
    _, r, _ = demonstration
    assert 'warn' not in r.stderr.lower() and 'Traceback' not in r.stderr


def test_portrait_for_real_again_gives_the_same_picture(tmp_path):
    photo = tmp_path/'p.png'
    render(sample_people(1, seed=5), size=256, glasses=False)[0].image.save(photo)
    arguments = ['portrait', photo, 'photo of a person', '--steps', 6, '--out', tmp_path/'out', '--quiet']
    assert run(*arguments, '--samples', 3) == 0
    assert run(*arguments, '--samples', 1, '--seed', 2) == 0
    third, again = (np.array(Image.open(tmp_path/'out'/n), int) for n in ('0003.png', '0004.png'))
    assert abs(third - again).max() <= 1  # one row of a batch, and the same row alone


def test_no_face_for_real(tmp_path, capsys):
    Image.new('RGB', (300, 200), 'gray').save(tmp_path/'p.png')
    assert run('portrait', tmp_path/'p.png', 'photo of a person', '--out', tmp_path/'out', '--quiet') == 2
    assert 'No face' in one_line(capsys) and not (tmp_path/'out').exists()


# -- prompts and consoles

LONG = 'photo of a person ' + 'with glasses, '*20 + 'at the very end'


def test_what_is_not_read_of_a_prompt_is_said(capsys):
    cli.say_cut(cli.find_tokenizers('tiny-faceid'), 'photo of a person', LONG, LONG, None)
    said = capsys.readouterr().err
    assert said.count('too long') == 1 and 'at the very end' in said and 'photo of' not in said


def test_a_prompt_that_just_fits_is_read_whole():
    tokenizer, = cli.find_tokenizers('tiny-faceid')
    fits = ' '.join(['a']*(tokenizer.model_max_length - 2))
    assert cli.part_not_read(tokenizer, fits) == '' and cli.part_not_read(tokenizer, fits + ' b') == 'b'


def test_a_console_that_lacks_a_letter_costs_no_table(photo, tmp_path, stand_in, monkeypatch):
    stand_in()
    console = io.TextIOWrapper(io.BytesIO(), 'cp1252')
    monkeypatch.setattr('sys.stdout', console)
    assert run('portrait', photo, 'a', '--samples', 1, '--steps', 1, '--out', tmp_path/'写真') == 0
    assert b'\\u5199' in console.buffer.getvalue()


def test_out_in_the_home_folder(photo, tmp_path, stand_in, monkeypatch):
    stand_in()
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    assert run('portrait', photo, 'a', '--samples', 1, '--steps', 1, '--out', '~/out') == 0
    assert (tmp_path/'home'/'out'/'0001.png').exists() and not (tmp_path/'~').exists()


# -- together

@pytest.fixture
def two_people(photo, tmp_path, stand_in, monkeypatch, capsys):
    "What `together` made of two people: the exit code, the model, what it printed."
    monkeypatch.setattr('faceid_nb.together.likeness_together',
                        lambda people, made, places, judge: Together(np.tile([[.5, .1], [.2, .4]],
                                                                             (len(made), 1, 1))))
    model = stand_in()
    code = run('together', 'two people', '--person', photo, 'left', '--person', photo, '.5,0,1,1', '--out',
               tmp_path/'out', '--samples', 2, '--steps', 2, '--size', '128x64', '--feather', 0)
    return code, model, capsys.readouterr().out


def test_together_asks_for_both_in_one_picture(two_people):
    code, model, _ = two_people
    asked = model.asked[0]
    assert code == 0 and len(asked['face']) == 2 and asked['regions'] == ['left', (.5, 0, 1, 1)]
    assert (asked['width'], asked['height'], asked['feather']) == (128, 64, 0)


def test_together_notes_each_likeness_and_reports_the_worst(two_people, tmp_path):
    from faceid_nb.files import read_record
    noted = read_record(tmp_path/'out'/'0001.png')
    assert noted['of_each'] == [.5, .4] and noted['likeness'] == .4
    assert '0.400' in two_people[2]


@pytest.mark.parametrize('wrong, word', [(['--person', 'PHOTO', 'nowhere'], 'no region'),
                                         (['--person', 'PHOTO', '0,0,2,1'], 'shares of the picture'),
                                         (['--person', 'PHOTO', '0,x'], 'four numbers'),
                                         (['--person', 'PHOTO', 'left', '--size', '64'], 'WIDTHxHEIGHT')])
def test_together_refuses_on_one_line(photo, stand_in, capsys, wrong, word):
    stand_in()
    code = run('together', 'two people', *(photo if w == 'PHOTO' else w for w in wrong))
    assert code == 2 and word in one_line(capsys)
