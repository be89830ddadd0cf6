"The command line: first with stand-ins for the model, quick and exact; then for real, as a user would call it."
import io, json, math, os, signal, subprocess, sys, time, types
import numpy as np, pytest
from hypothesis import given, strategies as st
from PIL import Image
from conftest import ROOT, environment
from faceid_nb import cli
from faceid_nb.errors import FaceChoiceError, FaceIDError, ImageError, NoFaceError, WeightsMissingError

CLI = [sys.executable, '-c', 'import sys; from faceid_nb.cli import main; sys.exit(main())']


class Reader:
    "Finds as many faces as it was told."
    def __init__(self, faces=1):
        picture = np.full((120, 200, 3), 99, np.uint8)
        self.faces = [types.SimpleNamespace(box=np.array([10*i, 5, 10*i + 8, 13.]), number=i, found=faces, image=picture) for i in range(faces)]
    def best(self, image, which='largest'):
        if not self.faces: raise NoFaceError('No face was found', 'every size was tried', 'Use another picture')
        if isinstance(which, int):
            if not 0 <= which < len(self.faces): raise FaceChoiceError('No such face', f'{len(self.faces)} faces', 'Count from 0')
            return self.faces[which]
        return self.faces[0]


class Model:
    "Makes a plain picture in the colour of its seed, and remembers what it was asked."
    def __init__(self, faces=1, stop_at=None):
        self.reader, self.asked, self.stop_at = Reader(faces), [], stop_at
        self.pipe = types.SimpleNamespace(set_progress_bar_config=lambda **k: None, device=types.SimpleNamespace(type='cpu'))
    def generate(self, face, prompt, *, on_step, **kw):
        self.asked.append(dict(face=face, prompt=prompt, **kw))
        print('chatter of a library')
        for i in range(kw['num_inference_steps']):
            if self.stop_at == (kw['seed'], i): raise KeyboardInterrupt
            on_step(types.SimpleNamespace(done=i + 1, total=kw['num_inference_steps']))
        made = [Image.new('RGB', (64, 64), ((kw['seed'] + k) % 256, 100, 50)) for k in range(kw['num_samples'])]
        for k, image in enumerate(made): image.info['faceid_nb'] = dict(prompt=prompt, seed=kw['seed'] + k)
        return made


@pytest.fixture
def photo(tmp_path):
    path = tmp_path/'me.jpg'
    Image.new('RGB', (200, 120), 'orange').save(path)
    return path


@pytest.fixture
def stand_in(monkeypatch):
    "Put a model in place; likenesses 0.5, 0.6, ... unless given."
    def place(model=None, likeness=None):
        model = model or Model(); values = iter(likeness or np.arange(50)/100 + .5)
        monkeypatch.setattr('faceid_nb.models.load', lambda name, device=None, **k: model)
        monkeypatch.setattr('faceid_nb.measure.identity_similarity', lambda reference, images, judge=True, reader=None: np.array([next(values) for _ in images]))
        monkeypatch.setattr('faceid_nb.measure.find_judge', lambda reader: 'judge')
        return model
    return place


def run(*args): return cli.main([str(a) for a in args])


# -- portrait

def test_portrait_writes_pictures_parameters_and_a_sheet(photo, tmp_path, stand_in, capsys):
    model, out = stand_in(), tmp_path/'out'
    code = run('portrait', photo, 'eine Bärin', '--out', out, '--samples', 3, '--seed', 5, '--scale', .7, '--steps', 4, '--negative-prompt', 'blurry',
               '--guidance-scale', 3, '--batch', 2)
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == ['0001.png', '0002.png', '0003.png', 'sheet-0001.png']
    text = Image.open(out/'0002.png').text
    assert text['Description'] == 'eine Bärin' and text['Software'].startswith('faceid_nb ')
    assert json.loads(text['faceid_nb']) == dict(prompt='eine Bärin', seed=6, photo='me.jpg', face='largest', likeness=.51)
    assert [(a['seed'], a['num_samples']) for a in model.asked] == [(5, 2), (7, 1)]
    assert model.asked[0] == dict(face=model.reader.faces[0], prompt='eine Bärin', num_samples=2, seed=5, scale=.7, num_inference_steps=4, guidance_scale=3., negative_prompt='blurry')
    assert Image.open(out/'0003.png').getpixel((9, 9)) == (7, 100, 50)
    printed = capsys.readouterr()
    assert 'chatter' not in printed.out and 'mean likeness 0.510 over 3 of 3' in printed.out
    for word in ('0001.png', '0.520', 'sheet-0001.png'): assert word in printed.out


def test_nothing_is_overwritten(photo, tmp_path, stand_in):
    stand_in(); out = tmp_path/'out'
    run('portrait', photo, 'a', '--out', out, '--samples', 2)
    (out/'0009.png').write_bytes(b'mine')
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    run('portrait', photo, 'a', '--out', out, '--samples', 2)
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    assert {n: after[n] for n in before} == before
    assert sorted(set(after) - set(before)) == ['0010.png', '0011.png', 'sheet-0002.png']


def test_ctrl_c_keeps_what_is_finished(photo, tmp_path, stand_in, capsys):
    stand_in(Model(stop_at=(2, 1))); out = tmp_path/'out'
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


def test_without_a_judge_the_steering_recogniser_scores(photo, tmp_path, stand_in, monkeypatch, capsys):
    "Found out before anything is generated: a missing pack must not cost the pictures."
    stand_in()
    def missing(reader): raise WeightsMissingError('There is no judge', 'none', 'Get one')
    def score(reference, images, judge, reader): assert judge is False; return np.full(len(images), .3)
    monkeypatch.setattr('faceid_nb.measure.find_judge', missing)
    monkeypatch.setattr('faceid_nb.measure.identity_similarity', score)
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 1) == 0
    assert 'flatters. Get one' in capsys.readouterr().err


def test_several_faces_are_said_and_chosen(photo, tmp_path, stand_in, capsys):
    model = stand_in(Model(faces=3))
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 1, '--face', 2) == 0
    assert model.asked[0]['face'].number == 2 and "3 faces in me.jpg; took '2'" in capsys.readouterr().err
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--samples', 1, '--face', 3) == 2


# -- bad input: exit code, one line, no traceback, no file

@pytest.mark.parametrize('make, code', [
    (lambda p: p/'missing.jpg', 2),
    (lambda p: p, 2),
    (lambda p: (p/'empty.jpg', (p/'empty.jpg').write_bytes(b''))[0], 2),
    (lambda p: (p/'notes.jpg', (p/'notes.jpg').write_text('not a picture'))[0], 2),
    (lambda p: (p/'half.jpg', (p/'half.jpg').write_bytes(jpeg()[:400]))[0], 2),
], ids='missing folder empty text truncated'.split())
def test_bad_photographs(make, code, tmp_path, stand_in, capsys):
    stand_in()
    assert run('portrait', make(tmp_path), 'a', '--out', tmp_path/'out') == code
    one_line(capsys)
    assert not (tmp_path/'out').exists()


def jpeg():
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(out, 'JPEG')
    return out.getvalue()


def one_line(capsys):
    printed = capsys.readouterr()
    assert printed.out == '' and printed.err.startswith('faceid-nb: ') and printed.err.count('\n') == 1
    assert 'Traceback' not in printed.err and len(printed.err) > 30
    return printed.err


@pytest.mark.parametrize('error, code', [
    (NoFaceError('No face', 'none', 'try'), 2), (WeightsMissingError('No weights', 'there', 'get them'), 1), (RuntimeError('a\nb'), 1),
    (PermissionError(13, 'Permission denied', 'x.png'), 1), (ImportError('libGL.so.1: cannot open shared object file'), 1)])
def test_errors_get_a_code_and_one_line(error, code, photo, tmp_path, monkeypatch, capsys):
    def load(*a, **k): raise error
    monkeypatch.setattr('faceid_nb.models.load', load)
    assert run('portrait', photo, 'a', '--out', tmp_path/'out') == code
    line = one_line(capsys)
    if isinstance(error, ImportError): assert 'libgl1' in line
    assert run('portrait', photo, 'a', '--out', tmp_path/'out', '--debug') == code
    assert 'Traceback' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()


def test_out_is_a_file(photo, tmp_path, stand_in, capsys):
    stand_in()
    assert run('portrait', photo, 'a', '--out', photo) == 2
    one_line(capsys)


@pytest.mark.parametrize('bad', [['portrait'], ['portrait', 'a.jpg'], ['dance'], [], ['portrait', 'a', 'b', '--samples', '0'], ['portrait', 'a', 'b', '--steps', '1.5'],
                                 ['portrait', 'a', 'b', '--scale', 'nan'], ['portrait', 'a', 'b', '--scale', 'inf'], ['portrait', 'a', 'b', '--seed', '-1'], ['lab', '--port', '0']])
def test_bad_arguments_end_with_2(bad, capsys):
    with pytest.raises(SystemExit) as e: cli.main(bad)
    assert e.value.code == 2 and 'usage:' in capsys.readouterr().err


# -- files and pictures

@given(st.lists(st.integers(1, 30), unique=True, max_size=6), st.integers(1, 4))
def test_numbers_go_on(taken, n):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        for t in taken: (cli.Path(folder)/f'{t:04d}.png').write_bytes(b'old')
        made = [cli.write_new(b'new', folder) for _ in range(n)]
        assert [int(p.stem) for p in made] == [max(taken, default=0) + 1 + i for i in range(n)]
        assert all((cli.Path(folder)/f'{t:04d}.png').read_bytes() == b'old' for t in taken)


def test_a_name_taken_meanwhile_is_left_alone(tmp_path, monkeypatch):
    (tmp_path/'0001.png').write_bytes(b'other process')
    monkeypatch.setattr(cli.Path, 'iterdir', lambda self: iter(()))
    assert cli.write_new(b'new', tmp_path).name == '0002.png'
    assert (tmp_path/'0001.png').read_bytes() == b'other process'


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(TypeError): cli.write_new('text, not bytes', tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('size', [(64, 64), (512, 512), (50, 100), (1000, 10), (192, 192), (1, 1)])
def test_fit_fills_a_square(size):
    square = cli.fit(Image.new('RGB', size, 'red'), 192)
    assert square.size == (192, 192) and square.getpixel((96, 96)) == (255, 0, 0)
    if size == (50, 100): assert square.getpixel((0, 96)) == (255, 255, 255)


def test_small_pictures_are_enlarged_by_whole_pixels():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert np.array_equal(np.array(cli.fit(noise, 192)), np.array(noise).repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize('n', [1, 4, 5, 9])
def test_sheet_shows_the_photograph_first(n):
    colours = [(20*i, 200, 10) for i in range(n)]
    sheet = cli.contact_sheet(Image.new('RGB', (300, 300), 'orange'), [Image.new('RGB', (64, 64), c) for c in colours], ['x']*n, 'a title ' * 40)
    centres = [sheet.getpixel((12 + i % 5*204 + 96, 12 + i//5*226 + 96)) for i in range(n + 1)]
    assert centres == [(255, 165, 0), *colours]


# -- lab and doctor

def test_lab_copies_once_and_keeps_changes(tmp_path):
    new, old = cli.copy_notebooks(tmp_path/'lab')
    assert new > 3 and old == 0 and (tmp_path/'lab'/'index.ipynb').exists() and (tmp_path/'lab'/'tiny'/'people.ipynb').exists()
    (tmp_path/'lab'/'index.ipynb').write_text('mine')
    (tmp_path/'lab'/'00_errors.ipynb').unlink()
    assert cli.copy_notebooks(tmp_path/'lab') == (1, new - 1)
    assert (tmp_path/'lab'/'index.ipynb').read_text() == 'mine'


def test_lab_stays_on_this_machine(tmp_path):
    command = cli.lab_command(tmp_path, port=9999, browser=False)
    assert '--ServerApp.ip=127.0.0.1' in command and '--no-browser' in command and '--ServerApp.port=9999' in command
    assert not any('token' in c or 'password' in c for c in command)  # Jupyter's own token stays in force


def test_lab_answers_with_a_token(tmp_path):
    "The real server: refuses without the token, and serves the copy with it."
    import re, urllib.request, urllib.error
    env = environment(JUPYTER_CONFIG_DIR=str(tmp_path/'c'), JUPYTER_DATA_DIR=str(tmp_path/'d'), JUPYTER_RUNTIME_DIR=str(tmp_path/'r'), IPYTHONDIR=str(tmp_path/'i'))
    server = subprocess.Popen([*CLI, 'lab', tmp_path/'lab', '--no-browser'], env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        end, url = time.monotonic() + 60, None
        for line in server.stderr:
            url = re.search(r'http://127\.0\.0\.1:\d+/lab\?token=(\w+)', line)
            if url or time.monotonic() > end: break
        base, token = url[0].split('/lab')[0], url[1]
        def ask(query=''): return urllib.request.urlopen(f'{base}/api/contents/index.ipynb{query}', timeout=20)
        while True:  # the address is printed a moment before the server listens
            try: assert json.load(ask(f'?token={token}'))['type'] == 'notebook'; break
            except urllib.error.URLError as e:
                if isinstance(e, urllib.error.HTTPError) or time.monotonic() > end: raise
                time.sleep(.2)
        with pytest.raises(urllib.error.HTTPError) as e: ask()
        assert e.value.code == 403
    finally:
        server.terminate(); server.wait(30)


def test_doctor_finds_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr('faceid_nb.models.TINY', tmp_path)
    assert run('doctor') == 1
    out = capsys.readouterr().out
    assert 'missing tiny pack' in out and '-> ' in out and 'Python 3.' in out and 'non-commercial' in out


def test_doctor_sees_two_onnx_wheels(monkeypatch):
    monkeypatch.setattr(cli, 'installed', lambda name: '1.0' if name.startswith('onnxruntime') else None)
    assert any(state == 'warn' and 'share one folder' in what and 'onnxruntime-gpu' in advice for state, what, advice in cli.look_at_onnx())


def test_a_look_that_falls_over_is_a_finding():
    def look_at_rocks(): raise OSError('broken')
    assert cli.examined(look_at_rocks) == [('missing', 'rocks: OSError: broken', 'install the package again')]


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
    for word in ('portrait', 'demo', 'lab', 'doctor', 'exit codes'): assert word in out


def test_ctrl_c_for_real(photo, tmp_path):
    "A signal in the middle of a run ends the process with 130 and one line."
    source = '''
import signal, sys, time, types, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)   # a background shell starts its children with SIGINT ignored
sys.path.insert(0, sys.argv[1])
import faceid_nb.models, faceid_nb.measure
from test_cli import Model
model = Model()
def slow(*a, **k): print('ready', file=sys.stderr, flush=True); time.sleep(60)
model.generate = slow
faceid_nb.models.load = lambda *a, **k: model
faceid_nb.measure.find_judge = lambda reader: False
from faceid_nb.cli import main
sys.exit(main(['portrait', sys.argv[2], 'a', '--quiet', '--out', sys.argv[3]]))
'''
    p = subprocess.Popen([sys.executable, '-c', source, str(ROOT/'tests'), str(photo), str(tmp_path/'out')], env=environment(), stderr=subprocess.PIPE, text=True)
    for line in p.stderr:
        if 'ready' in line: break
    p.send_signal(signal.SIGINT)
    err = p.stderr.read()
    assert p.wait(30) == 130 and 'Traceback' not in err and 'stopped' in err
    assert not (tmp_path/'out').exists()


# -- for real, with the weights that ship


def test_demo_for_real(tmp_path):
    "The README's first command, after its installation: a photograph, four pictures of that person, a sheet; in under a minute on an idle machine."
    start = time.monotonic()
    r = subprocess.run([*CLI, 'demo'], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    assert time.monotonic() - start < 180  # a busy machine is given three times as long
    out = tmp_path/'faceid-demo'
    assert sorted(p.name for p in out.iterdir()) == ['0001.png', '0002.png', '0003.png', '0004.png', 'photograph-0001.jpg', 'sheet-0001.png']
    likeness = [json.loads(Image.open(out/f'{i:04d}.png').text['faceid_nb'])['likeness'] for i in range(1, 5)]
    assert sum(x is not None and x > .2 for x in likeness) >= 3, likeness  # strangers score about 0
    assert Image.open(out/'photograph-0001.jpg').size == (512, 512) and 'mean likeness' in r.stdout
    assert 'warn' not in r.stderr.lower() and 'Traceback' not in r.stderr


def test_portrait_for_real_again_gives_the_same_picture(tmp_path):
    from faceid_nb.tiny.people import render, sample_people
    photo = tmp_path/'p.png'; render(sample_people(1, seed=5), size=256, glasses=False)[0].image.save(photo)
    arguments = ['portrait', photo, 'photo of a person', '--steps', 6, '--out', tmp_path/'out', '--quiet']
    assert run(*arguments, '--samples', 3) == 0
    assert run(*arguments, '--samples', 1, '--seed', 2) == 0
    third, again = (np.array(Image.open(tmp_path/'out'/n), int) for n in ('0003.png', '0004.png'))
    assert abs(third - again).max() <= 1  # one row of a batch, and the same row alone


def test_no_face_for_real(tmp_path, capsys):
    Image.new('RGB', (300, 200), 'gray').save(tmp_path/'p.png')
    assert run('portrait', tmp_path/'p.png', 'photo of a person', '--out', tmp_path/'out', '--quiet') == 2
    assert 'No face' in one_line(capsys) and not (tmp_path/'out').exists()


def test_doctor_is_content(capsys):
    assert run('doctor') == 0
    out = capsys.readouterr().out
    assert 'tiny-faceid' in out and 'CPUExecutionProvider' in out and 'The tiny models run here' in out
