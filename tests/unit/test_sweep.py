"Sweeps: every cell once, in batches that change nothing, whatever dies in the middle."
import concurrent.futures as cf, itertools, json, math, multiprocessing, os, signal, sqlite3, subprocess, sys, threading, time
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from faceid_nb import sweep as S
from faceid_nb.errors import ArgumentError, FaceIDError
from faceid_nb.faceid import read_record
from faceid_nb.sweep import Sweep, batches, find_settings, identify, read_table, weights_hash
import helpers_sweep
from helpers_sweep import FACE, FakeModel, fast_sweep

AXES = dict(s_scale=[0, .5, 1], seed=[0, 1, 2])

def names(cells): return [(c.parameters['s_scale'], c.parameters['seed']) for c in cells]
def pictures(folder): return sorted(p for p in (folder/'pictures').glob('*.png') if p.name[0] != '.')   # a killed process may leave half a file, under a hidden name
def arrays(cells): return np.stack([np.asarray(c.image, np.float32) for c in cells])

# names of cells

def test_the_same_cell_has_the_same_name_whatever_the_spelling():
    key = lambda axes, fixed={}: {c.key for c in Sweep(FakeModel(), axes, dict(face=FACE, **fixed)).cells}
    a = key(dict(scale=[1]), dict(seed=0, prompt=None))
    assert a == key(dict(seed=[0])) == key(dict(scale=[np.float32(1)])) == key(dict(num_inference_steps=(30,))) == key(dict(s_scale={'one': 1}))
    assert key(dict(scale=[.5, 1])) == key(dict(scale=[1., .5])) and a < key(dict(scale=[.5, 1]))
    others = [key(dict(seed=[0]), {k: v}) for k, v in dict(prompt='x', negative_prompt='y', scale=.9, s_scale=0, num_inference_steps=5, guidance_scale=3, start=.2, which='left').items()]
    others += [{c.key for c in Sweep(FakeModel(weight=2), dict(seed=[0]), dict(face=FACE)).cells}, {c.key for c in Sweep(FakeModel(), dict(seed=[0]), dict(face=FACE + 1)).cells}]
    assert len(set.union(a, *others)) == 1 + len(others)

def test_photographs_enter_with_their_contents(tmp_path):
    a, b = tmp_path/'a.png', tmp_path/'b.png'
    Image.new('RGB', (8, 8), 'red').save(a)
    b.write_bytes(a.read_bytes())
    key = lambda photo: Sweep(FakeModel(), dict(seed=[0]), dict(face=photo)).cells[0].key
    assert key(a) == key(str(b)) == key(a.read_bytes()) != key([a])
    before = key(a)
    Image.new('RGB', (8, 8), 'blue').save(a)
    assert key(a) != before
    with pytest.raises(ArgumentError, match='no photograph gone.png'): key(tmp_path/'gone.png')
    axis = Sweep(FakeModel(), dict(face=[a, b]))
    assert [c.parameters['face'] for c in axis.cells] == ['a', 'b']

def test_what_identifies_a_value():
    x = np.arange(6, dtype=np.float32)
    assert identify(x) == identify(torch.arange(6.)) != identify(x[::-1]) and identify(x) != identify(x.reshape(2, 3))
    assert identify({'b': 1, 2: (1, None)}) == {'b': 1, '2': [1, None]} and identify(True) is True
    with pytest.raises(ArgumentError, match='cannot name'): identify(object())

def test_weights_by_name_file_and_tensor(tmp_path):
    from faceid_nb.models import TINY, load
    assert weights_hash('tiny-faceid') != weights_hash('tiny-faceid-lora') and weights_hash('tiny-faceid') == weights_hash(SimpleNamespace(origin=dict(name='tiny-faceid')))
    for p in TINY.iterdir(): (tmp_path/p.name).symlink_to(p)
    same = weights_hash('tiny-faceid', folder=tmp_path)
    assert same == weights_hash('tiny-faceid')
    import shutil
    (tmp_path/'sd').unlink()
    shutil.copytree(TINY/'sd', tmp_path/'sd')
    file = tmp_path/'sd'/'unet'/'diffusion_pytorch_model.safetensors'
    b = bytearray(file.read_bytes())
    b[-1] ^= 1
    file.write_bytes(b)
    assert weights_hash('tiny-faceid', folder=tmp_path) != same
    assert weights_hash(FakeModel()) == weights_hash(FakeModel()) != weights_hash(FakeModel(weight=2))

# what is refused

@pytest.mark.parametrize('axes, fixed, words', [
    (dict(s_scales=[0]), {}, "no argument 's_scales'.*s_scale"), (dict(scale=[]), {}, 'is empty'), (dict(scale=.5), {}, 'must be a list'), (dict(prompt='a text'), {}, 'must be a list'),
    (dict(seed=[1, 1]), {}, 'more than once'), (dict(num_samples=[4]), {}, 'one picture'), (dict(seed=[0]), dict(num_samples=4), 'one picture'), (dict(seed=[0]), dict(batch_size=4), 'no argument'),
    (dict(seed=[0]), dict(seed=1), 'given twice'), (dict(scale=['much']), {}, 'scale must be a number'), (dict(scale=[math.nan]), {}, 'scale must be a number'), ({}, {}, 'needs an axis'), (dict(seed=[None]), {}, 'seed must be a number')])
def test_refused(axes, fixed, words):
    with pytest.raises(ArgumentError, match=words): Sweep(FakeModel(), axes, dict(face=FACE) | fixed)

def test_large_seeds_differ(): assert len(Sweep(FakeModel(), dict(seed=[1234567, 1234568, 2**40]), dict(face=FACE))) == 3

def test_faces_are_remembered_by_pack_and_contents_and_not_for_ever():
    class Reader:
        def __init__(self, folder): self.folder, self.read = folder, []
        def best(self, photo, which):
            self.read.append((photo, which))
            return f'{self.folder} {photo} {which}'
    S._faces.clear()
    a, b = Reader('a'), Reader('b')
    for r in (a, b, a): assert S._read_face(r, b'1', 'largest') == (f'{r.folder} {b"1"} largest', '')
    assert len(a.read) == 1 == len(b.read) and S._read_face(a, b'1', 'left')[0].endswith('left') and S._read_face(a, [b'1', b'2'], 'left')[0][1].startswith("a b'2'")
    for k in range(200): S._read_face(a, str(k).encode(), 'largest')
    assert len(S._faces) == S._MANY
    S._faces.clear()

def test_no_face_no_model_and_bad_folders(tmp_path):
    with pytest.raises(ArgumentError, match='No face'): Sweep(FakeModel(), dict(seed=[0]))
    with pytest.raises(ArgumentError, match='No model'): Sweep(None, dict(seed=[0]), dict(face=FACE))
    with pytest.raises(ArgumentError, match="no model 'tiny-x'"): Sweep('tiny-x', dict(seed=[0]), dict(face=FACE))
    with pytest.raises(ArgumentError, match='given twice'): Sweep(FakeModel(), dict(model=['tiny-plus']), dict(face=FACE))
    (tmp_path/'file').write_text('x')
    with pytest.raises(ArgumentError, match='is a file'): list(fast_sweep(AXES).run(tmp_path/'file'))
    (tmp_path/'bad').mkdir()
    (tmp_path/'bad'/'cells.sqlite').write_bytes(b'not a database at all, but long enough to be read as one' * 40)
    with pytest.raises(ArgumentError, match='not a table of cells'): list(fast_sweep(AXES).run(tmp_path/'bad'))
    with pytest.raises(ArgumentError, match='no results'): read_table(tmp_path/'nowhere')
    assert not (tmp_path/'nowhere').exists()
    for size in (0, 1.5, -1):
        with pytest.raises(ArgumentError, match='batch_size'): list(fast_sweep(AXES).run(tmp_path/'x', batch_size=size))

# batches

@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from('ab'), st.sampled_from([10, 20]), st.sampled_from([0, 1]), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 9))
def test_batches_hold_every_cell_once_and_share_what_they_must(rows, size):
    faces = dict(a=np.zeros(512), b=np.ones(512))
    cells = [S.Cell(i, str(i), {}, dict(model='m', face=faces[f], prompt=str(k), negative_prompt=None, seed=k, scale=k, s_scale=0, num_inference_steps=n, start=s)) for i, (f, n, s, k) in enumerate(rows)]
    out = batches(cells, size)
    assert sorted(c.number for *_, part in out for c in part) == list(range(len(rows)))
    for model, shared, part in out:
        assert 1 <= len(part) <= size and {(c.arguments['num_inference_steps'], c.arguments['start']) for c in part} == {(shared['num_inference_steps'], shared['start'])} and not {'face', 'seed', 'scale', 's_scale', 'prompt', 'model'} & set(shared)
    kinds = {(n, s) for _, n, s, _ in rows}
    assert len(out) <= sum(-(-sum(r[1:3] == k for r in rows) // size) for k in kinds)
    for k in kinds:   # a face is not come back to
        order = [rows[c.number][0] for _, shared, part in out if (shared['num_inference_steps'], shared['start']) == k for c in part]
        assert len(list(itertools.groupby(order))) == len(set(order))

def test_rows_of_the_fake_model_come_in_batches(tmp_path):
    m = FakeModel()
    list(fast_sweep(AXES, m).run(tmp_path, batch_size=4, progress=False))
    assert m.sizes == [4, 4, 1]

# running

def test_every_cell_once_and_again_for_nothing(tmp_path):
    m = FakeModel()
    sweep = fast_sweep(AXES, m)
    first = list(sweep.run(tmp_path, batch_size=4, progress=False))
    assert sorted(names(first)) == sorted(itertools.product([0, .5, 1], [0, 1, 2])) and not any(c.kept for c in first) and all(c.state == 'done' for c in first)
    assert len(pictures(tmp_path)) == 9 and not list(tmp_path.rglob('*.part*'))
    made, again = len(m.sizes), list(fast_sweep(AXES, m).run(tmp_path, progress=False))
    assert len(m.sizes) == made and all(c.kept for c in again)
    a, b = ({n: c for n, c in zip(names(x), x)} for x in (first, again))
    assert np.array_equal(arrays(a.values()), arrays(b[k] for k in a)) and all(a[k].adherence == b[k].adherence for k in a)
    more = list(fast_sweep(dict(s_scale=[0, 2], seed=[0, 1, 2, 3]), m).run(tmp_path, progress=False))
    assert sum(c.kept for c in more) == 3 and len(pictures(tmp_path)) == 14

def test_yielded_means_kept(tmp_path):
    run = fast_sweep(AXES).run(tmp_path, batch_size=2, progress=False)
    c = next(run)
    with sqlite3.connect(tmp_path/'cells.sqlite') as db: assert (c.key,) in db.execute('SELECT key FROM cells').fetchall()
    record = read_record(c.file)
    assert record['cell'] == dict(key=c.key, parameters=c.parameters) and record['adherence'] == c.adherence and 'likeness' not in record
    run.close()
    assert len(read_table(tmp_path)) == 2

@pytest.mark.parametrize('damage', ['picture', 'row'])
def test_what_is_lost_is_made_again(tmp_path, damage):
    m = FakeModel()
    done = list(fast_sweep(AXES, m).run(tmp_path, progress=False))
    m.sizes.clear()
    c = done[4]
    if damage == 'picture': c.file.unlink()
    else:
        with sqlite3.connect(tmp_path/'cells.sqlite') as db: db.execute('DELETE FROM cells WHERE key = ?', (c.key,))
    again = list(fast_sweep(AXES, m).run(tmp_path, progress=False))
    assert m.sizes == [1] and [x.key for x in again if not x.kept] == [c.key] and len(pictures(tmp_path)) == len(read_table(tmp_path)) == 9

def test_the_same_picture_twice_is_made_once(tmp_path):
    m = FakeModel()
    sweep = Sweep(m, dict(face=dict(one=FACE, two=FACE.copy()), seed=[0, 1]), scorer=False)
    made = list(sweep.run(tmp_path, progress=False))
    assert len(made) == 2 == sum(m.sizes) and all(c.state == 'done' and c.image is not None for c in sweep.cells)

def test_some_cells_only(tmp_path):
    m = FakeModel()
    sweep = fast_sweep(AXES, m)
    some = [c for c in sweep.cells if c.parameters['seed'] == 1]
    assert names(sweep.run(tmp_path, cells=some, progress=False)) == [(0, 1), (.5, 1), (1, 1)] and sum(m.sizes) == 3

def test_table(tmp_path):
    sweep = fast_sweep(AXES, FakeModel(bad=lambda face, seed, s: seed == 2))
    list(sweep.run(tmp_path, progress=False))
    t = sweep.table(tmp_path)
    assert list(zip(t.s_scale, t.seed)) == names(sweep.cells) and list(t.columns[:3]) == ['number', 'model', 'prompt'] and {'likeness', 'distance', 'adherence', 'seconds', 'state', 'error', 'image', 'face', 'judge', 'device', 'key'} <= set(t)
    assert t.likeness.isna().all() and t.likeness.dtype == float and (t.image.isna() == (t.seed == 2)).all() and all(p.is_file() for p in t.image.dropna()) and (t.state == ['done', 'done', 'failed']*3).all()
    assert (t[t.seed < 2].adherence == [c.adherence for c in sweep.cells if c.parameters['seed'] < 2]).all() and len(read_table(tmp_path)) == 9

# what goes wrong

@pytest.mark.parametrize('error', [torch.OutOfMemoryError('x'), RuntimeError('CUDA out of memory. Tried'), MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_short_memory_halves_and_is_remembered(tmp_path, error):
    m = FakeModel(room=2, error=error)
    made = list(fast_sweep(dict(seed=range(20)), m).run(tmp_path, batch_size=8, progress=False))
    assert len(made) == 20 and all(c.state == 'done' for c in made) and m.sizes[:3] == [8, 4, 2] and set(m.sizes[2:]) == {2}
    alone = list(fast_sweep(dict(seed=range(20))).run(tmp_path/'alone', batch_size=1, progress=False))
    assert np.array_equal(arrays(sorted(made, key=lambda c: c.number)), arrays(alone))

def test_not_even_one_fits(tmp_path):
    made = list(fast_sweep(dict(seed=range(3)), FakeModel(room=0, error=MemoryError())).run(tmp_path, progress=False))
    assert [c.state for c in made] == ['failed']*3 and 'MemoryError' in made[0].error

def test_one_bad_cell_fails_alone_and_is_tried_again(tmp_path):
    m = FakeModel(bad=lambda face, seed, s: seed == 5)
    made = list(fast_sweep(dict(seed=range(16)), m).run(tmp_path, batch_size=16, progress=False))
    assert [c.parameters['seed'] for c in made if c.state == 'failed'] == [5] and len(made) == 16 and 'ValueError: seed 5' in next(c.error for c in made if c.error)
    assert m.sizes[0] == 16 and len(m.sizes) <= 9 and len(pictures(tmp_path)) == 15
    good = FakeModel()
    again = list(fast_sweep(dict(seed=range(16)), good).run(tmp_path, progress=False))
    assert good.sizes == [1] and [c.state for c in again] == ['done']*16 and all(not c.error for c in again) and (read_table(tmp_path).state == 'done').all()

def test_a_size_that_was_too_large_for_a_bad_cell_is_not_remembered(tmp_path):
    m = FakeModel(bad=lambda face, seed, s: seed == 0)
    list(fast_sweep(dict(seed=range(16)), m).run(tmp_path, batch_size=8, progress=False))
    assert m.sizes[-1] == 8

def test_stop_ends_it_and_keeps_what_is_done(tmp_path):
    m = FakeModel(pause=.05)
    sweep = fast_sweep(dict(seed=range(40)), m)
    got = []
    for c in sweep.run(tmp_path, batch_size=2, progress=False):
        got.append(c)
        if len(got) == 4: sweep.stop()
    assert len(got) == 4 == len(read_table(tmp_path))
    rest = list(sweep.run(tmp_path, batch_size=8, progress=False))
    assert len(rest) == 40 and sum(c.kept for c in rest) == 4

def test_stop_is_heard_in_the_middle_of_a_batch(tmp_path):
    m = FakeModel(pause=.05)
    sweep = fast_sweep(dict(seed=range(100)), m)
    threading.Timer(.3, sweep.stop).start()
    began = time.time()
    assert list(sweep.run(tmp_path, batch_size=100, progress=False)) == [] and time.time() - began < 3 and m.sizes == [100]
    assert len(list(fast_sweep(dict(seed=range(4))).run(tmp_path, progress=False))) == 4

@pytest.mark.parametrize('after', [1, 7, 18])
def test_kill_nine(tmp_path, after):
    "A process is killed with so many pictures there; nothing is lost, doubled or half."
    code = f"import sys; sys.path.insert(0, {str(os.path.dirname(helpers_sweep.__file__))!r}); from helpers_sweep import *; [print(c.key, flush=True) for c in fast_sweep(dict(seed=range(24)), FakeModel(pause=.01)).run(sys.argv[1], batch_size=3, progress=False)]"
    p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    said = []
    while len(pictures(tmp_path)) < after and p.poll() is None: time.sleep(.001)
    os.kill(p.pid, signal.SIGKILL)
    said = p.communicate()[0].split()
    assert p.returncode == -signal.SIGKILL
    there = {r[0] for r in sqlite3.connect(tmp_path/'cells.sqlite').execute('SELECT key FROM cells')}
    assert set(said) <= there and len(said) == len(set(said))
    for f in pictures(tmp_path): Image.open(f).load()
    m = FakeModel()
    made = list(fast_sweep(dict(seed=range(24)), m).run(tmp_path, progress=False))
    assert {c.key for c in made if c.kept} == there and sum(m.sizes) == 24 - len(there) and len({c.key for c in made}) == 24
    assert len(read_table(tmp_path)) == len(pictures(tmp_path)) == 24
    clean = list(fast_sweep(dict(seed=range(24))).run(tmp_path/'clean', progress=False))
    assert np.array_equal(arrays(sorted(made, key=lambda c: c.number)), arrays(clean))

# the tiny pack

@pytest.fixture(scope='module')
def tiny():
    from faceid_nb.models import load
    model = load('tiny-plusv2', device='cpu')
    model.pipe.set_progress_bar_config(disable=True)
    return model

@pytest.fixture(scope='module')
def people():
    from faceid_nb.tiny.people import render, sample_people
    return {f'p{i}': p.image for i, p in enumerate(render(sample_people(2, 201), seed=202, size=96, hat=None))}

@pytest.fixture(scope='module')
def real_axes(people): return dict(face=people, s_scale=[0, 1], seed=[0, 1])
STEPS = dict(prompt='photo of a person in a red shirt, blue background', num_inference_steps=3)

@pytest.fixture(scope='module')
def alone(tiny, real_axes, tmp_path_factory): return list(Sweep(tiny, real_axes, STEPS).run(tmp_path_factory.mktemp('alone'), batch_size=1, progress=False))

def test_a_picture_does_not_depend_on_its_neighbours(tiny, real_axes, alone, tmp_path):
    together = sorted(Sweep(tiny, real_axes, STEPS).run(tmp_path, batch_size=8, progress=False), key=lambda c: c.number)
    assert [c.key for c in together] == [c.key for c in alone]
    assert abs(arrays(together) - arrays(alone)).max() <= 2 and len({a.tobytes() for a in arrays(alone)}) == 8
    for k in ('likeness', 'distance', 'adherence'): np.testing.assert_allclose([getattr(c, k) for c in together], [getattr(c, k) for c in alone], atol=.02)
    c = alone[6]
    one = tiny.generate(real_axes['face']['p1'], num_samples=1, seed=c.parameters['seed'], s_scale=c.parameters['s_scale'], **STEPS)[0]
    assert abs(np.asarray(one, np.float32) - np.asarray(c.image, np.float32)).max() <= 2

def test_measured_as_by_hand(tiny, real_axes, alone):
    from faceid_nb.measure import identity_similarity, prompt_adherence, structure_distance
    for c in alone[::3]:
        face = tiny.reader.best(real_axes['face'][c.parameters['face']])
        assert abs(c.likeness - identity_similarity(face, c.image, reader=tiny.reader)[0]) < 1e-5 and abs(c.distance - structure_distance(face, c.image, tiny.reader)[0]) < 1e-5 and c.adherence == prompt_adherence(STEPS['prompt'], c.image)[0] and c.judge == 'judge'

def test_a_prompt_with_a_label_is_scored_by_its_words(tmp_path):
    said = []
    def score(prompts, images):
        said.extend(prompts)
        return np.zeros(len(images))
    texts = dict(short='a red shirt', long='a blue shirt, smiling')
    made = list(Sweep(FakeModel(), dict(prompt=texts, seed=[0, 1]), dict(face=FACE), scorer=score).run(tmp_path, progress=False))
    assert sorted(said) == sorted(list(texts.values())*2) and {c.parameters['prompt'] for c in made} == set(texts)

def test_one_pass_through_the_resampler_serves_all_weights(tiny, people):
    seen, looked, proj, encoder = [], [], tiny.adapter.net.image_proj, tiny.encoder
    hook = proj.perceiver_resampler.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    hook2 = encoder.model.register_forward_hook(lambda m, i, o: looked.append(len(o.hidden_states[-1])))
    try: many = [tiny.generate([f for f in map(tiny.reader.best, people.values()) for _ in range(4)], num_samples=1, seed=0, s_scale=[0, .5, 1, 1.5]*2, **STEPS)]
    finally:
        hook.remove()
        hook2.remove()
    assert max(seen) == 2 and max(looked) == 2 and len(many[0]) == 8

def test_a_face_that_is_none_and_one_that_is_an_embedding(tiny, people, tmp_path):
    face = tiny.reader.best(people['p0'])
    wall = Image.new('RGB', (96, 96), (90, 120, 150))
    sweep = Sweep(tiny, dict(face=dict(wall=wall, gone=tmp_path/'gone.png', her=people['p0'])), STEPS) if (tmp_path/'gone.png').write_bytes(b'no picture') else None
    made = {c.parameters['face']: c for c in sweep.run(tmp_path/'out', progress=False)}
    assert {k: c.state for k, c in made.items()} == dict(wall='failed', gone='failed', her='done') and 'No face was found' in made['wall'].error and made['her'].likeness > -1
    from faceid_nb.models import load
    bare = list(Sweep('tiny-faceid', dict(seed=[0]), dict(face=face.embedding, **STEPS)).run(tmp_path/'bare', progress=False))[0]
    assert bare.state == 'done' and math.isnan(bare.likeness) and bare.judge == '' and bare.adherence >= 0

def test_models_are_an_axis(people, tmp_path):
    made = list(Sweep(None, dict(model=['tiny-faceid', 'tiny-plus'], seed=[0]), dict(face=people['p0'], **STEPS)).run(tmp_path, progress=False))
    assert [c.parameters['model'] for c in made] == ['tiny-faceid', 'tiny-plus'] and all(c.state == 'done' for c in made)
    assert abs(arrays(made)[0] - arrays(made)[1]).max() > 20

def spawn(n=2): return cf.ProcessPoolExecutor(n, mp_context=multiprocessing.get_context('spawn'))

def same(made, alone, folder):
    made = {c.key: c for c in made}
    assert len(made) == len(alone) == len(read_table(folder)) == len(pictures(folder)) and {c.state for c in made.values()} == {'done'}
    assert abs(arrays(made[c.key] for c in alone) - arrays(alone)).max() <= 2
    np.testing.assert_allclose([made[c.key].likeness for c in alone], [c.likeness for c in alone], atol=.02)

def test_processes_and_one_killed_in_the_middle(real_axes, alone, tmp_path):
    pools = []
    def pool():
        pools.append(spawn())
        return pools[-1]
    run = Sweep('tiny-plusv2', real_axes, STEPS, load=dict(device='cpu')).run(tmp_path, executor=pool, batch_size=1, progress=False)
    made = [next(run)]
    os.kill(next(iter(pools[0]._processes)), signal.SIGKILL)
    made += list(run)
    assert len(pools) == 2
    same(made, alone, tmp_path)

def test_a_broken_executor_says_so_and_the_next_run_goes_on(real_axes, alone, tmp_path, tiny):
    with spawn(1) as pool:
        run = Sweep(tiny, real_axes, STEPS).run(tmp_path, executor=pool, batch_size=2, progress=False)
        first = next(run)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        with pytest.raises(FaceIDError, match='worker process died.*Run again'): list(run)
    kept = len(read_table(tmp_path))
    assert 1 <= kept < 8
    made = list(Sweep(tiny, real_axes, STEPS).run(tmp_path, progress=False))
    assert sum(c.kept for c in made) == kept
    same(made, alone, tmp_path)

def test_threads_share_one_model(real_axes, alone, tmp_path, monkeypatch):
    import faceid_nb.models as models
    S._load.cache_clear()
    loads, load = [], models.load
    monkeypatch.setattr(models, 'load', lambda **k: loads.append(k) or time.sleep(.2) or load(**k))
    with cf.ThreadPoolExecutor(3) as pool: same(list(Sweep('tiny-plusv2', real_axes, STEPS, load=dict(device='cpu')).run(tmp_path, executor=pool, batch_size=2, progress=False)), alone, tmp_path)
    assert loads == [dict(name='tiny-plusv2', device='cpu')]

def test_dask_and_one_worker_killed_in_the_middle(real_axes, alone, tmp_path, monkeypatch):
    distributed = pytest.importorskip('distributed')
    monkeypatch.chdir(tmp_path)
    with distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None, host='127.0.0.1', silence_logs=50) as cluster, distributed.Client(cluster) as client:
        run = Sweep('tiny-plusv2', real_axes, STEPS, load=dict(device='cpu')).run(tmp_path/'out', executor=client.get_executor(), batch_size=1, progress=False)
        made = [next(run)]
        pids = client.run(os.getpid)
        assert len(pids) == 2
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        made += list(run)
        same(made, alone, tmp_path/'out')

def test_a_model_put_together_by_hand_stays_here(tmp_path):
    with cf.ThreadPoolExecutor(1) as pool, pytest.raises(ArgumentError, match='put together by hand'): list(fast_sweep(AXES).run(tmp_path, executor=pool, progress=False))

class Lost(cf.Executor):
    "Loses the first `n` batches that it is given."
    def __init__(self, n): self.n, self.given = n, 0
    def submit(self, f, *a, **k):
        out, self.given = cf.Future(), self.given + 1
        if self.given <= self.n: out.set_exception(OSError('the network is gone'))
        else:
            try: out.set_result(f(*a, **k))
            except Exception as e: out.set_exception(e)
        return out

def test_a_lost_batch_is_given_out_again_but_not_for_ever(tmp_path, people):
    sweep = lambda: Sweep('tiny-faceid', dict(seed=[0, 1]), dict(face=people['p0'], **STEPS | dict(num_inference_steps=1)), load=dict(device='cpu'), measure=False)
    e = Lost(2)
    made = list(sweep().run(tmp_path/'a', executor=e, batch_size=2, progress=False))
    assert [c.state for c in made] == ['done']*2 and e.given == 3
    e = Lost(9)
    made = list(sweep().run(tmp_path/'b', executor=e, batch_size=2, progress=False))
    assert [c.state for c in made] == ['failed']*2 and e.given == 3 and 'three workers: OSError: the network is gone' in made[0].error

# looking for a setting

@settings(max_examples=40)
@given(st.data())
def test_the_search_finds_what_the_grid_has(data):
    import tempfile
    scales = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=12)))
    s_scales = sorted(data.draw(st.sets(st.integers(0, 3), min_size=1, max_size=3)))
    wanted = data.draw(st.integers(-1, 11))/10
    like = {s: sorted(data.draw(st.lists(st.integers(0, 10), min_size=len(scales), max_size=len(scales)))) for s in s_scales}   # rises with scale
    adhere = {s: sorted(data.draw(st.lists(st.integers(0, 10), min_size=len(scales), max_size=len(scales))), reverse=True) for s in s_scales}   # falls
    def measured(model, cells, *_):
        for c in cells:
            k = scales.index(c.parameters['scale'])
            c.likeness, c.adherence = like[c.parameters['s_scale']][k]/10, adhere[c.parameters['s_scale']][k]/10
    before = S._measure
    S._measure = measured
    try: found = find_settings(FakeModel(), FACE, 'x', wanted, scales=scales, s_scales=s_scales, seeds=[0, 1], progress=False, num_inference_steps=1)
    finally: S._measure = before
    good = [(adhere[s][k]/10, -a, s) for s in s_scales for k, a in enumerate(scales) if like[s][k]/10 >= wanted]
    assert found.reached == bool(good) and found.pictures <= 2*len(s_scales)*(3 + math.ceil(math.log2(len(scales))))
    if good: assert found.adherence == max(good)[0] and found.likeness >= wanted and like[found.s_scale][scales.index(found.scale)]/10 == found.likeness
    else: assert found.likeness == max(like[s][-1] for s in s_scales)/10
    assert len(found.table)*2 == found.pictures

def test_a_search_does_not_give_up_where_the_largest_scale_spoils_the_pictures(monkeypatch):
    like = {1.: .1, 2.: .5, 3.: .7, 4.: .6, 5.: .4, 6.: .2}
    def measured(model, cells, *_):
        for c in cells: c.likeness, c.adherence = like[c.parameters['scale']], 1/c.parameters['scale']
    monkeypatch.setattr(S, '_measure', measured)
    ask = lambda wanted: find_settings(FakeModel(), FACE, 'x', wanted, scales=list(like), s_scales=[1], seeds=[0], progress=False)
    assert ask(.45).scale == 2 and ask(.55).scale == 3 and not ask(.95).reached and ask(.15).pictures <= 4

@pytest.mark.parametrize('after', [1, 3, 5, 9])
def test_a_search_can_be_stopped_and_goes_on(after, tmp_path):
    stop, seen = threading.Event(), []
    def on_step(step):
        seen.append(step.done)
        if len(seen) == after: stop.set()
    ask = lambda **more: find_settings(FakeModel(steps=2), FACE, 'x', .5, scales=[1, 2, 3], s_scales=[0, 1], seeds=[0, 1], folder=tmp_path, progress=False, judge=False, **more)
    assert ask(stop=stop, on_step=on_step) is None or len(seen) < after
    made = len(list((tmp_path/'pictures').glob('*.png')))
    found = ask()
    assert found.pictures >= made and found.pictures <= 12

def test_a_sweep_tells_its_steps_without_a_bar_and_is_stopped_from_one(tmp_path):
    sweep, seen = Sweep(FakeModel(steps=3), dict(seed=[0, 1, 2, 3]), dict(face=FACE)), []
    done = list(sweep.run(tmp_path, progress=False, batch_size=2, on_step=lambda s: seen.append((s.done, s.total))))
    assert len(done) == 4 and seen == [(1, 3), (2, 3), (3, 3)]*2
    other = Sweep(FakeModel(steps=3), dict(seed=[4, 5, 6, 7]), dict(face=FACE))
    assert list(other.run(tmp_path, progress=False, batch_size=2, on_step=lambda s: s.done == 2 and other.stop())) == []

def test_a_search_counts_a_missing_face_as_nothing(monkeypatch):
    def measured(model, cells, *_):
        for c in cells: c.likeness = math.nan if c.parameters['seed'] else .9
    monkeypatch.setattr(S, '_measure', measured)
    found = find_settings(FakeModel(), FACE, 'x', .5, scales=[1], s_scales=[1], seeds=[0, 1], progress=False)
    assert not found.reached and found.likeness == .45

def test_a_search_in_which_nothing_can_be_made_says_why():
    with pytest.raises(FaceIDError, match='No picture could be made.*seed'): find_settings(FakeModel(bad=lambda *_: True), FACE, 'x', .5, progress=False)
