"The studio: rules, one worker, stop, errors, code and restored settings, without a browser."
import io, math, os, sys, threading, time
import numpy as np, pytest
from PIL import Image
from traitlets import TraitError
from faceid_nb import studio as S
from faceid_nb.errors import ArgumentError
from faceid_nb.studio import RANGES, Settings, Studio, Worker

def png(image): b = io.BytesIO(); image.save(b, 'PNG'); return b.getvalue()

@pytest.fixture(scope='module')
def photo():
    from faceid_nb.tiny.people import render, sample_people
    return png(render(sample_people(1, 7), seed=1, size=160, hat=None, glasses=0)[0].image)

@pytest.fixture(scope='module')
def two():
    from faceid_nb.tiny.people import render, sample_people
    a, b = (p.image for p in render(sample_people(2, 7), seed=1, size=160, hat=None, glasses=0)); both = Image.new('RGB', (320, 160)); both.paste(a, (0, 0)); both.paste(b.resize((120, 120)), (180, 20)); return png(both)

@pytest.fixture(scope='module')
def shared():
    "A studio that has loaded its model once; each test gets it empty."
    s = Studio(model='tiny-faceid', num_samples=1, num_inference_steps=2); yield s; s.close()

@pytest.fixture
def studio(shared, photo):
    shared.worker.wait(30); shared.unobserve_all(); shared.photographs, shared.portraits, shared.preview = [], [], []
    shared.model, shared.prompt, shared.negative_prompt, shared.num_samples, shared.seed, shared.seed_locked, shared.num_inference_steps, shared.scale, shared.preview_every = 'tiny-faceid', 'photo of a person, smiling', '', 1, 0, True, 2, 1., 5
    shared.add(photo, 'me.png'); return shared

def made(studio): assert studio.generate(), studio.error; assert studio.worker.wait(120); return studio.portraits

# the worker

def test_one_thing_at_a_time_and_again_afterwards():
    w, gate = Worker(), threading.Event(); assert w.start(lambda: gate.wait(5)) and w.busy and not w.start(lambda: None); gate.set(); assert w.wait(5) and not w.busy and w.start(lambda: None) and w.wait(5)

@pytest.mark.parametrize('error, said', [(ArgumentError('It is wrong', 'this', 'Do that'), 'It is wrong. this. Do that.'), (ValueError('x' * 999), 'ValueError: xxx'), (MemoryError(), 'not enough memory'), (RuntimeError('CUDA out of memory. Tried'), 'not enough memory')])
def test_errors_become_values_and_go_away(error, said):
    def fail(): raise error
    w = Worker(); w.start(fail); w.wait(5); assert said in w.error and len(w.error) < 400 and not w.busy; w.start(lambda: None); w.wait(5); assert w.error == ''

def test_stop_returns_at_once():
    w = Worker(); w.start(lambda: w.stopping.wait(5)); t = time.time(); w.stop(); assert time.time() - t < .1 and w.wait(2); w.start(lambda: None); assert w.wait(2)

# rules

@pytest.mark.parametrize('name', RANGES)
def test_ranges(name):
    low, high = RANGES[name]; s, kind = Settings(), type(getattr(Settings(), name))
    for value in (low, high): s.set_trait(name, kind(value)); assert getattr(s, name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(TraitError, match=f'{name} is from'): s.set_trait(name, kind(value))
    assert getattr(s, name) == high

def test_a_model_that_is_none():
    with pytest.raises(TraitError, match='tiny-faceid'): Settings(model='tiny-x')

def test_what_is_asked_fits_the_variant():
    assert 's_scale' in Settings(model='tiny-plusv2').asked() and 's_scale' not in Settings(model='tiny-plus').asked() and Settings(model='sdxl-plusv2').has_structure and Settings(model='tiny-portrait').several
    assert 'negative_prompt' not in Settings().asked() and Settings(negative_prompt='x').asked()['negative_prompt'] == 'x'

def test_no_widgets_are_imported(fresh): assert fresh('import faceid_nb.studio, sys; print([m for m in sys.modules if m.split(".")[0] in ("ipywidgets", "anywidget", "diffusers", "insightface")])').strip() == '[]'

# photographs

def test_faces_are_found_and_chosen(studio, two):
    heard = []; studio.observe(lambda c: heard.append(1), 'photographs'); p = studio.add(two, 'two.png'); assert len(p.faces) == 2 and p.chosen == 0 and p.faces[0].size > p.faces[1].size and len(studio.photographs) == 2
    studio.choose(p, 1); assert p.face is p.faces[1] and len(heard) == 2; studio.choose(p, 2); assert p.chosen == 1 and 'no face 2' in studio.error; studio.choose(p, -1); assert p.chosen == 1
    studio.remove(p); assert [q.name for q in studio.photographs] == ['me.png']

@pytest.mark.parametrize('bad, said', [(png(Image.new('RGB', (64, 64), 'blue')), "No face was found in 'bad.png'"), (b'x', 'not a picture'), ('/no/such/file.png', 'file.png')])
def test_bad_photographs_are_said_and_not_kept(studio, bad, said): assert studio.add(bad, 'bad.png') is None and said in studio.error and len(studio.photographs) == 1

def test_what_is_missing(studio, photo):
    studio.photographs = []; assert not studio.generate() and 'Add a photograph' in studio.error and not studio.busy
    studio.add(photo); assert studio.error == '' and studio.photographs[0].name == 'photograph 1'; studio.prompt = '  '; assert not studio.generate() and 'prompt' in studio.error

# generating

def test_progress_preview_and_portraits(studio):
    from faceid_nb.measure import identity_similarity
    heard = []; studio.observe(lambda c: heard.append((c.name, c.new)), ['step', 'status', 'preview', 'portraits', 'seconds_left']); studio.num_samples, studio.num_inference_steps, studio.preview_every = 2, 4, 2; portraits = made(studio)
    assert [v for n, v in heard if n == 'step' and v] == [1, 2, 3, 4] and [len(v) for n, v in heard if n == 'preview'][:1] == [2] and studio.preview == [] and studio.error == ''
    assert [p.settings['seed'] for p in portraits] == [0, 1] and all(-1 < p.likeness < 1 and p.distance >= 0 for p in portraits); assert abs(portraits[1].likeness - identity_similarity(studio.photographs[0].face, portraits[1].image)[0]) < 1e-5
    left = [v for n, v in heard if n == 'seconds_left']; assert left[-1] == 0 and all(v >= 0 for v in left if not math.isnan(v)) and studio.status.startswith('2 made in'); assert 'cpu' in studio.device or 'cuda' in studio.device
    more = made(studio); assert len(more) == 4 and more[2] is portraits[0]

def test_stop_in_the_middle_and_go_on(studio):
    studio.num_inference_steps = 200; studio.generate()
    while studio.step < 2 and studio.busy: time.sleep(.005)
    t = time.time(); studio.stop(); assert time.time() - t < .1 and studio.worker.wait(20) and 2 <= studio.step < 190 and studio.status == 'stopped' and studio.portraits == [] and studio.error == ''
    studio.num_inference_steps = 2; assert len(made(studio)) == 1

def test_stop_before_the_first_step(studio, monkeypatch):
    import faceid_nb.models as models
    studio._faceid, load = None, models.load
    def slow(name, **more): studio.stop(); return load(name, **more)
    monkeypatch.setattr(models, 'load', slow); studio.generate(); assert studio.worker.wait(60) and studio.status == 'stopped' and studio.step == 0 and studio.portraits == []

def test_controls_are_alive_while_it_works(studio):
    studio.num_inference_steps = 200; studio.generate(); slowest = 0
    for k in range(20): t = time.time(); studio.scale = k/20; slowest = max(slowest, time.time() - t); time.sleep(.01)
    assert slowest < .1 and studio.busy; studio.stop(); assert studio.worker.wait(20)

def test_a_generation_that_fails(studio, monkeypatch):
    made(studio); monkeypatch.setattr(studio._faceid, 'generate', lambda *a, **k: (_ for _ in ()).throw(RuntimeError('CUDA out of memory'))); studio.generate(); assert studio.worker.wait(20) and 'not enough memory' in studio.error and len(studio.portraits) == 1
    monkeypatch.undo(); assert len(made(studio)) == 2 and studio.error == ''

def test_the_model_changes_and_is_let_go(studio):
    made(studio); first = studio._faceid; made(studio); assert studio._faceid is first; studio.model = 'tiny-portrait'; made(studio); assert studio._faceid is not first and studio._faceid.name == 'tiny-portrait' and studio.portraits[0].settings['model'] == 'tiny-portrait'
    s = Studio(); s.close(); assert s._faceid is None

def test_a_seed_that_is_not_locked_is_drawn(studio): studio.seed_locked = False; made(studio); a = studio.seed; made(studio); assert a != studio.seed and studio.portraits[0].settings['seed'] == studio.seed and studio.portraits[1].settings['seed'] == a

# code, files

@pytest.mark.parametrize('model, photographs', [('tiny-faceid', 1), ('tiny-faceid', 2), ('tiny-portrait', 1), ('tiny-portrait', 2)])
def test_the_code_makes_the_same_picture(studio, photo, two, model, photographs, tmp_path, monkeypatch):
    studio.model, studio.negative_prompt, studio.scale = model, "it's \"quoted\"", .8; (tmp_path/'me.png').write_bytes(photo); (tmp_path/'two.png').write_bytes(two)
    if photographs == 2: studio.choose(studio.add(two, 'two.png'), 1)
    portrait = made(studio)[0]; code = studio.code(portrait); studio.scale = .1; assert studio.code(portrait) == code != studio.code()
    monkeypatch.chdir(tmp_path); names = {}; exec(code, names); assert abs(np.asarray(names['picture'], np.float32) - np.asarray(portrait.image, np.float32)).max() <= 2

def test_saved_and_restored(studio, tmp_path, photo):
    studio.prompt, studio.scale, studio.num_samples = 'photo of a person, frowning', .7, 2; p = made(studio)[1]; a, b = studio.save(p, tmp_path), studio.save(p, tmp_path); assert a != b and a.is_file() and b.is_file()
    other = Studio(); assert other.restore(a) and (other.model, other.prompt, other.scale, other.num_inference_steps, other.seed, other.num_samples) == ('tiny-faceid', 'photo of a person, frowning', .7, 2, 1, 1) and other.error == ''
    assert other.restore(a.read_bytes()); before = other.asked()
    for bad in (photo, b'x', tmp_path/'none.png'): assert not other.restore(bad) and other.error and other.asked() == before

def test_what_a_file_says_is_checked(studio, tmp_path):
    p = made(studio)[0]
    for wrong in (dict(scale=99.), dict(model='x'), dict(prompt=3)):
        p.settings = dict(p.settings, **wrong); other = Studio(scale=.3); assert not other.restore(studio.save(p, tmp_path)) and other.error and other.scale == .3 and other.model == 'tiny-plusv2'; p.settings = dict(p.settings, scale=1., model='tiny-faceid', prompt='x')
