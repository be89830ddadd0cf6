"The command line: first with stand-ins for the model, quick and exact; then for real, as a user would call it."
import functools, io, json, math, os, re, signal, subprocess, sys, time, types
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
        model = model or Model()
        values = iter(likeness or np.arange(50)/100 + .5)
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


def test_without_a_judge_the_steering_recogniser_scores(photo, tmp_path, stand_in, monkeypatch, capsys):
    "Found out before anything is generated: a missing pack must not cost the pictures."
    stand_in()
    def missing(reader): raise WeightsMissingError('There is no judge', 'none', 'Get one')
    def score(reference, images, judge, reader):
        assert judge is False
        return np.full(len(images), .3)
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
    (tmp_path/'lab'/'method'/'00_errors.ipynb').unlink()
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
            try:
                assert json.load(ask(f'?token={token}'))['type'] == 'notebook'
                break
            except urllib.error.URLError as e:
                if isinstance(e, urllib.error.HTTPError) or time.monotonic() > end: raise
                time.sleep(.2)
        with pytest.raises(urllib.error.HTTPError) as e: ask()
        assert e.value.code == 403
    finally:
        server.terminate()
        server.wait(30)


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
    for word in ('portrait', 'sweep', 'benchmark', 'demo', 'lab', 'doctor', 'exit codes'): assert word in out


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
    p = subprocess.Popen([sys.executable, '-c', source, str(ROOT/'tests'/'support'), str(photo), str(tmp_path/'out')], env=environment(), stderr=subprocess.PIPE, text=True)
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


def test_doctor_is_content(capsys):
    assert run('doctor') == 0
    out = capsys.readouterr().out
    assert 'tiny-faceid' in out and 'CPUExecutionProvider' in out and 'The tiny models run here' in out


# -- sweep and benchmark

@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    "Photographs: me.png and you.png with a face, wall.png without; and a folder of three people."
    from faceid_nb.tiny.people import render, sample_people
    root = tmp_path_factory.mktemp('drawn')
    for k, p in enumerate(render(sample_people(3, seed=12), seed=1, size=128, glasses=False, hat=None)):
        p.image.save(root/('me.png', 'you.png', 'third.png')[k])
        (root/'people'/f'p{k}').mkdir(parents=True)
        p.image.save(root/'people'/f'p{k}'/'a.png')
    for k, p in enumerate(render(sample_people(3, seed=12), seed=2, size=128, hat=None)): p.image.save(root/'people'/f'p{k}'/'b.png')
    Image.new('RGB', (128, 128), 'gray').save(root/'wall.png')
    return root


PROMPT = 'photo of a person in a red shirt, blue background'

def asked(*args): return cli.grid(cli.make_parser().parse_args(['sweep', *map(str, args)]))


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True), st.sampled_from([',', ', ', ' ,']))
def test_lists_are_read(values, comma):
    assert cli.several(cli.number(int, 0, 2**63 - 1))(comma.join(map(str, values))) == values


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=4, unique=True))
def test_lists_of_numbers_are_read_exactly(values): assert cli.several(cli.number(float, -10, 10))(','.join(map(repr, values))) == values


@pytest.mark.parametrize('bad', ['', ',', '1,', '1,,2', '1;2', '1,x', '1,nan', '1,inf', '1,99', '1,1', '1,1.0'])
def test_bad_lists(bad):
    with pytest.raises(cli.argparse.ArgumentTypeError): cli.several(cli.number(float, 0, 10))(bad)


@pytest.mark.parametrize('bad', [['sweep'], ['sweep', 'a.png'], ['sweep', '--prompt', 'x'], ['sweep', 'a.png', '--prompt', 'x', '--scale', '0.5,'], ['sweep', 'a.png', '--prompt', 'x', '--seed', '1,1'],
                                 ['sweep', 'a.png', '--prompt', 'x', '--seed', '-1'], ['sweep', 'a.png', '--prompt', 'x', '--steps', '0'], ['sweep', 'a.png', '--prompt', 'x', '--processes', '0'], ['sweep', 'a.png', '--prompt', 'x', '--model', 'a,'],
                                 ['benchmark'], ['benchmark', 'people', '--samples', '0'], ['benchmark', 'people', '--seed', '1,2'], ['benchmark', 'people', '--batch', '0']])
def test_bad_arguments_of_grids_end_with_2(bad, capsys):
    with pytest.raises(SystemExit) as e: cli.main(bad)
    err = capsys.readouterr().err
    assert e.value.code == 2 and f'usage: faceid-nb {bad[0]}' in err and err.strip().split('\n')[-1].startswith(f'faceid-nb {bad[0]}: error: ')


def test_what_has_several_values_is_an_axis(drawn):
    s = asked(drawn/'me.png', '--prompt', 'a', '--model', 'tiny-plusv2,tiny-faceid', '--s-scale', '0,.5', '--scale', '.7', '--seed', '3,1234567,1234568', '--steps', '4', '--guidance-scale', '2,3', '--negative-prompt', 'n')
    assert {k: list(v.values()) for k, v in s.axes.items()} == dict(model=['tiny-plusv2', 'tiny-faceid'], guidance_scale=[2., 3.], s_scale=[0., .5], seed=[3, 1234567, 1234568]) and list(s.axes)[-1] == 'seed'
    a = s.cells[4].arguments
    assert len(s) == 24 and (a['scale'], a['num_inference_steps'], a['prompt'], a['negative_prompt'], a['face'], a['s_scale'], a['seed']) == (.7, 4, 'a', 'n', str(drawn/'me.png'), .5, 1234567)
    one = asked(drawn/'me.png', '--prompt', 'a')
    a = one.cells[0].arguments
    assert len(one) == 1 and (a['model'], a['seed'], a['scale'], a['s_scale'], a['num_inference_steps'], a['guidance_scale'], a['negative_prompt']) == ('tiny-plusv2', 0, 1., 1., 30, 7.5, None)
    two = asked(drawn/'me.png', drawn/'you.png', '--prompt', 'a', '--prompt', 'b', '--model', 'tiny-faceid', '--device', 'cpu')
    assert two.load == dict(device='cpu')
    assert [(c.parameters['face'], c.parameters['prompt'], c.parameters['model']) for c in two.cells] == [(f, p, 'tiny-faceid') for f in ('me', 'you') for p in 'ab']


def test_photographs_of_one_name(drawn, tmp_path):
    (tmp_path/'me.png').write_bytes((drawn/'you.png').read_bytes())
    s = asked(drawn/'me.png', tmp_path/'me.png', '--prompt', 'a')
    assert [c.parameters['face'] for c in s.cells] == [str(drawn/'me.png'), str(tmp_path/'me.png')]


@pytest.mark.parametrize('arguments, says', [
    (lambda d: [d/'me.png', d/'me.png', '--prompt', 'a'], 'given twice'), (lambda d: [d/'me.png', '--prompt', 'a', '--prompt', 'a'], 'more than once'), (lambda d: [d/'me.png', '--prompt', 'a', '--model', 'tiny-nothing'], 'no model'),
    (lambda d: [d/'me.png', d/'nowhere.png', '--prompt', 'a'], 'nowhere.png'), (lambda d: [d/'me.png', d, '--prompt', 'a'], 'is a folder')], ids='twice prompt model nowhere folder'.split())
def test_bad_input_of_a_sweep(arguments, says, drawn, tmp_path, capsys):
    assert run('sweep', *arguments(drawn), '--out', tmp_path/'out') == 2
    assert says in one_line(capsys) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('words', [('sweep', 'me.png', '--prompt', 'a'), ('benchmark', 'people')])
def test_out_of_a_grid_is_a_file(words, drawn, tmp_path, capsys):
    (tmp_path/'out').write_text('mine')
    assert run(words[0], drawn/words[1], *words[2:], '--out', tmp_path/'out') == 2
    assert 'must name a folder' in one_line(capsys) and (tmp_path/'out').read_text() == 'mine'


def table_of(text):
    "{column: texts} of the printed table."
    lines = text.split('\n')
    i = next(i for i, l in enumerate(lines) if l.endswith('state'))
    head = re.split(r'\s{2,}', lines[i].strip())
    rows = []
    for l in lines[i + 1:]:
        if 'pictures are in' in l: break
        rows.append(re.split(r'\s{2,}', l.strip()))
    assert all(len(r) == len(head) for r in rows)
    return {h: [r[k] for r in rows] for k, h in enumerate(head)}


def test_sweep_for_real(drawn, tmp_path, capsys):
    "Three photographs, one without a face; two weights of the structure. Then again with a seed more."
    import pandas as pd
    out = tmp_path/'out'
    arguments = ['sweep', drawn/'me.png', drawn/'wall.png', drawn/'you.png', '--prompt', PROMPT, '--s-scale', '0,1.5', '--steps', '3', '--guidance-scale', '3', '--out', out]
    assert run(*arguments, '--seed', '7') == 0
    printed = capsys.readouterr()
    t = table_of(printed.out)
    assert 'it/s' not in printed.err and 'Traceback' not in printed.err
    assert list(t) == ['photograph', 's_scale', 'likeness', 'distance', 'adherence', 'state'] and t['photograph'] == ['me']*2 + ['wall']*2 + ['you']*2 and t['s_scale'] == ['0', '1.5']*3
    assert t['state'] == ['done', 'done', 'failed', 'failed', 'done', 'done'] and t['likeness'][2] == '-' and '4 of 6 pictures' in printed.out and '2 failed' in printed.out
    assert printed.out.count(f"No face was found in '{drawn/'wall.png'}'") == 1 and 'failed: photograph wall, s_scale 0 and 1 more: No face' in printed.out
    csv = pd.read_csv(out/'table.csv')
    assert len(csv) == 6 and list(csv.state) == t['state'] and str(out) not in (out/'table.csv').read_text()
    for i in (0, 1, 4, 5):
        assert t['likeness'][i] == cli.shown(csv.likeness[i]) and t['distance'][i] == ('-' if math.isnan(csv.distance[i]) else f'{csv.distance[i]:.3f}') and t['adherence'][i] == f'{csv.adherence[i]:.3f}'
        assert Image.open(out/csv.image[i]).size == (64, 64)
    for name, photo, first in (('sheet-0001.png', 'me.png', 0), ('sheet-0002.png', 'you.png', 4)):   # none for the wall
        sheet = Image.open(out/name)
        assert json.loads(sheet.text['faceid_nb']) == dict(photo=photo, prompt=PROMPT)
        x = np.array(sheet.convert('RGB'))[12:204]
        assert np.array_equal(x[:, 12:204], np.array(cli.fit(Image.open(drawn/photo), 192))) and np.array_equal(x[:, 216:408], np.array(cli.fit(Image.open(out/csv.image[first]), 192)))
    assert not (out/'sheet-0003.png').exists() and sorted(p.name for p in out.iterdir() if 'cells' not in p.name) == ['pictures', 'sheet-0001.png', 'sheet-0002.png', 'table.csv']
    before = {p: p.stat().st_mtime_ns for p in (out/'pictures').iterdir()}
    assert len(before) == 4
    assert run(*arguments, '--seed', '7,8', '--quiet') == 0
    text = capsys.readouterr().out
    t = table_of(text)
    assert t['state'] == ['there already', 'done']*2 + ['failed']*4 + ['there already', 'done']*2 and '4 of them from before' in text
    assert all(p.stat().st_mtime_ns == m for p, m in before.items()) and len(list((out/'pictures').iterdir())) == 8 and len(pd.read_csv(out/'table.csv')) == 12


def test_all_failed(drawn, tmp_path, capsys):
    assert run('sweep', drawn/'wall.png', '--prompt', PROMPT, '--steps', '2', '--out', tmp_path/'out') == 1
    out = capsys.readouterr().out
    assert table_of(out)['state'] == ['failed'] and 'failed: seed 0: No face' in out and not list((tmp_path/'out').glob('sheet*')) and (tmp_path/'out'/'table.csv').is_file()


def test_ctrl_c_in_a_sweep_keeps_what_is_finished(drawn, tmp_path, monkeypatch, capsys):
    from faceid_nb.faceid import FaceID
    whole, calls = FaceID.generate, []
    @functools.wraps(whole)
    def stop(self, *a, **k):
        calls.append(len(k['seed']))
        if len(calls) == 2: raise KeyboardInterrupt
        return whole(self, *a, **k)
    monkeypatch.setattr(FaceID, 'generate', stop)
    out = tmp_path/'out'
    arguments = ['sweep', drawn/'me.png', '--prompt', PROMPT, '--prompt', 'photo of a person', '--seed', '0,1', '--steps', '2', '--batch', '2', '--out', out]
    assert run(*arguments) == 130
    printed = capsys.readouterr()
    t = table_of(printed.out)
    assert t['prompt'] == ['1', '1'] and t['state'] == ['done']*2 and '2 of 4 pictures' in printed.out and 'stopped' in printed.err and calls == [2, 2]
    assert f'prompt 1: {PROMPT}' in printed.out and 'prompt 2: photo of a person' in printed.out
    assert (out/'sheet-0001.png').is_file() and len((out/'table.csv').read_text().split('\n')) == 4
    assert run(*arguments) == 0 and calls == [2, 2, 2] and table_of(capsys.readouterr().out)['state'] == ['there already']*2 + ['done']*2


def test_a_long_sheet_ends(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, 'SHEET', 2)
    assert run('sweep', drawn/'me.png', '--prompt', PROMPT, '--seed', '0,1,2', '--steps', '2', '--out', tmp_path/'out') == 0
    assert '(the first 2 of 3)' in capsys.readouterr().out and Image.open(tmp_path/'out'/'sheet-0001.png').width == 3*204 + 12


def test_processes(drawn, tmp_path, capsys):
    "N of them, started afresh; and one for real: the same numbers as here."
    args = cli.make_parser().parse_args(['sweep', 'a', '--prompt', 'a', '--processes', '3'])
    pool = cli.executor(args)()
    try: assert pool._max_workers == 3 and pool._mp_context.get_start_method() == 'spawn' and pool._initializer is cli.in_worker
    finally: pool.shutdown()
    assert cli.executor(cli.make_parser().parse_args(['sweep', 'a', '--prompt', 'a'])) is None
    for more in ([], ['--processes', '1']): assert run('sweep', drawn/'me.png', '--prompt', PROMPT, '--seed', '0,1', '--steps', '2', '--out', tmp_path/f'out{len(more)}', *more) == 0
    one, other = (np.array([[Image.open(p) for p in sorted((tmp_path/f'out{n}'/'pictures').iterdir())][k] for k in (0, 1)], int) for n in (0, 2))
    assert abs(one - other).max() <= 2


def test_a_worker_ends_silently_on_ctrl_c():
    r = subprocess.run([sys.executable, '-c', 'import os, signal, time\nfrom faceid_nb.cli import in_worker\nin_worker(); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)'], env=environment(), capture_output=True, text=True, timeout=60)
    assert r.returncode == 130 and r.stderr == r.stdout == ''


def test_a_bar_for_a_terminal_only(monkeypatch):
    args = types.SimpleNamespace(quiet=False)
    for tty in (True, False):
        monkeypatch.setattr(sys, 'stderr', types.SimpleNamespace(isatty=lambda: tty))
        assert cli.with_bar(args) is tty
    monkeypatch.setattr(sys, 'stderr', types.SimpleNamespace(isatty=lambda: True))
    assert not cli.with_bar(types.SimpleNamespace(quiet=True))


def test_a_table_of_texts_and_numbers(capsys):
    cli.print_table(['photograph', 'scale', 'likeness'], [['a', '0.5', 'no face'], ['a long name', '1', '0.512'], ['b', '-10', '-']])
    assert capsys.readouterr().out == 'photograph   scale  likeness\na              0.5   no face\na long name      1     0.512\nb              -10         -\n'


def test_benchmark_passes_everything_on(tmp_path, monkeypatch, capsys):
    asked = {}
    def stand_in(models, people, out, **kw):
        asked.update(kw, models=models, people=people, out=out)
        return 'result'
    monkeypatch.setattr('faceid_nb.benchmark.benchmark', stand_in)
    monkeypatch.setattr('faceid_nb.benchmark.benchmark_table', lambda r: f'| table of {r} |')
    assert run('benchmark', 'people', '--model', 'a,b', '--samples', 3, '--seed', 5, '--prompt', 'p', '--steps', 6, '--scale', .8, '--guidance-scale', 2, '--batch', 7, '--device', 'cpu', '--out', tmp_path/'o') == 0
    assert asked == dict(models=['a', 'b'], people='people', out=str(tmp_path/'o'), num_samples=3, seed=5, prompt='p', num_inference_steps=6, scale=.8, guidance_scale=2., batch_size=7, load=dict(device='cpu'), executor=None, progress=False)
    out = capsys.readouterr().out
    assert '| table of result |' in out and 'benchmark.md' in out


def test_benchmark_for_real(drawn, tmp_path, capsys):
    out = tmp_path/'out'
    arguments = ['benchmark', drawn/'people', '--model', 'tiny-faceid', '--samples', 1, '--steps', 2, '--out', out]
    assert run(*arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith('| model | likeness') and (out/'benchmark.md').read_text().strip() in text and '| 3 | 3 |' in text and 'other photographs' in text
    before = sorted(p.stat().st_mtime_ns for p in (out/'pictures').iterdir())
    assert run(*arguments) == 0 and capsys.readouterr().out == text and sorted(p.stat().st_mtime_ns for p in (out/'pictures').iterdir()) == before


@pytest.mark.parametrize('folder, says', [('nowhere', 'No such folder'), ('people/p0/a.png', 'It is a file'), ('people/p0', 'two people')])
def test_bad_people(folder, says, drawn, tmp_path, capsys):
    if folder == 'people/p0':
        (tmp_path/'one').mkdir()
        (tmp_path/'one'/'a.png').write_bytes((drawn/'me.png').read_bytes())
        where = tmp_path/'one'
    else: where = drawn/folder
    assert run('benchmark', where, '--out', tmp_path/'out') == 2
    assert says in one_line(capsys) and not (tmp_path/'out').exists()
