"Sweeps: every cell once, in batches that change nothing, whatever dies in the middle."
import concurrent.futures as cf
import itertools
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import helpers_sweep
import numpy as np
import pytest
from helpers_sweep import AXES, FACE, FakeModel, arrays, fast_sweep, in_order, names, pictures, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faceid_nb import models, work
from faceid_nb.cells import read_table
from faceid_nb.errors import FaceIDError
from faceid_nb.measure import identity_similarity, prompt_adherence, structure_distance
from faceid_nb.sweep import Answers, Search, Sweep, find_settings
from faceid_nb.tiny.people import render, sample_people

# running

def test_every_cell_once(tmp_path):
    first = run(fast_sweep(AXES), tmp_path, batch_size=4)
    assert sorted(names(first)) == sorted(itertools.product([0, .5, 1], [0, 1, 2]))
    assert not any(c.kept for c in first) and all(c.state == 'done' for c in first)
    assert len(pictures(tmp_path)) == 9 and not list(tmp_path.rglob('*.part*'))


def test_again_for_nothing(tmp_path):
    m = FakeModel()
    first = in_order(run(fast_sweep(AXES, m), tmp_path, batch_size=4))
    made = len(m.sizes)
    again = in_order(run(fast_sweep(AXES, m), tmp_path))
    assert len(m.sizes) == made and all(c.kept for c in again)
    assert np.array_equal(arrays(first), arrays(again))
    assert [c.adherence for c in first] == [c.adherence for c in again]


def test_a_larger_grid_makes_what_is_missing(tmp_path):
    run(fast_sweep(AXES), tmp_path)
    more = run(fast_sweep(dict(s_scale=[0, 2], seed=[0, 1, 2, 3])), tmp_path)
    assert sum(c.kept for c in more) == 3 and len(pictures(tmp_path)) == 14


def lose_picture(folder, cell): cell.file.unlink()


def lose_row(folder, cell):
    with sqlite3.connect(folder/'cells.sqlite') as db:
        db.execute('DELETE FROM cells WHERE key = ?', (cell.key,))


@pytest.mark.parametrize('damage', [lose_picture, lose_row])
def test_what_is_lost_is_made_again(tmp_path, damage):
    m = FakeModel()
    lost = run(fast_sweep(AXES, m), tmp_path)[4]
    m.sizes.clear()
    damage(tmp_path, lost)
    again = run(fast_sweep(AXES, m), tmp_path)
    assert m.sizes == [1] and [x.key for x in again if not x.kept] == [lost.key]
    assert len(pictures(tmp_path)) == len(read_table(tmp_path)) == 9


def test_the_same_picture_twice_is_made_once(tmp_path):
    m = FakeModel()
    sweep = Sweep(m, dict(face=dict(one=FACE, two=FACE.copy()), seed=[0, 1]), scorer=False)
    made = run(sweep, tmp_path)
    assert len(made) == 2 == sum(m.sizes)
    assert all(c.state == 'done' and c.image is not None for c in sweep.cells)


def test_some_cells_only(tmp_path):
    m = FakeModel()
    sweep = fast_sweep(AXES, m)
    some = [c for c in sweep.cells if c.parameters['seed'] == 1]
    assert names(run(sweep, tmp_path, cells=some)) == [(0, 1), (.5, 1), (1, 1)] and sum(m.sizes) == 3


# stopping

def test_stop_ends_it_and_keeps_what_is_done(tmp_path):
    sweep, got = fast_sweep(dict(seed=range(40)), FakeModel(pause=.05)), []
    for c in sweep.run(tmp_path, batch_size=2, progress=False):
        got.append(c)
        if len(got) == 4: sweep.stop()
    assert len(got) == 4 == len(read_table(tmp_path))
    rest = run(sweep, tmp_path, batch_size=8)
    assert len(rest) == 40 and sum(c.kept for c in rest) == 4


def test_stop_is_heard_in_the_middle_of_a_batch(tmp_path):
    m = FakeModel(pause=.05)
    sweep = fast_sweep(dict(seed=range(100)), m)
    threading.Timer(.3, sweep.stop).start()
    began = time.time()
    assert run(sweep, tmp_path, batch_size=100) == [] and time.time() - began < 3 and m.sizes == [100]
    assert len(run(fast_sweep(dict(seed=range(4))), tmp_path)) == 4


def test_stop_is_heard_while_the_photographs_are_read(tmp_path, monkeypatch):
    m = FakeModel(steps=2)
    sweep = fast_sweep(dict(seed=range(6)), m)
    def read(model, cells, which='largest'):
        sweep.stop()
        return cells, []
    monkeypatch.setattr('faceid_nb.work.read_faces', read)
    assert run(sweep, tmp_path, batch_size=2) == [] and m.sizes == [2]


def test_a_sweep_tells_its_steps_without_a_bar(tmp_path):
    sweep, seen = Sweep(FakeModel(steps=3), dict(seed=[0, 1, 2, 3]), dict(face=FACE)), []
    done = run(sweep, tmp_path, batch_size=2, on_step=lambda s: seen.append((s.done, s.total)))
    assert len(done) == 4 and seen == [(1, 3), (2, 3), (3, 3)]*2


def test_a_sweep_is_stopped_from_a_step(tmp_path):
    sweep = Sweep(FakeModel(steps=3), dict(seed=[4, 5, 6, 7]), dict(face=FACE))
    assert run(sweep, tmp_path, batch_size=2, on_step=lambda s: s.done == 2 and sweep.stop()) == []


PROGRAM = f'''
import sys
sys.path.insert(0, {os.path.dirname(helpers_sweep.__file__)!r})
from helpers_sweep import *
sweep = fast_sweep(dict(seed=range(24)), FakeModel(pause=.01))
for c in sweep.run(sys.argv[1], batch_size=3, progress=False): print(c.key, flush=True)
'''


def kill_after(pictures_there, folder):
    "Run the program until so many pictures are there, then kill it: the keys that it had said."
    p = subprocess.Popen([sys.executable, '-c', PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True)
    while len(pictures(folder)) < pictures_there and p.poll() is None: time.sleep(.001)
    os.kill(p.pid, signal.SIGKILL)
    said = p.communicate()[0].split()
    assert p.returncode == -signal.SIGKILL
    return said


@pytest.mark.parametrize('after', [1, 7, 18])
def test_kill_nine(tmp_path, after):
    "A process is killed with so many pictures there; nothing is lost, doubled or half."
    said = kill_after(after, tmp_path)
    with sqlite3.connect(tmp_path/'cells.sqlite') as db:
        there = {r[0] for r in db.execute('SELECT key FROM cells')}
    assert set(said) <= there and len(said) == len(set(said))
    for f in pictures(tmp_path): Image.open(f).load()
    m = FakeModel()
    made = run(fast_sweep(dict(seed=range(24)), m), tmp_path)
    assert {c.key for c in made if c.kept} == there and sum(m.sizes) == 24 - len(there)
    assert len({c.key for c in made}) == len(read_table(tmp_path)) == len(pictures(tmp_path)) == 24
    clean = run(fast_sweep(dict(seed=range(24))), tmp_path/'clean')
    assert np.array_equal(arrays(in_order(made)), arrays(clean))


# the tiny pack

STEPS = dict(prompt='photo of a person in a red shirt, blue background', num_inference_steps=3)
CPU = dict(device='cpu')


@pytest.fixture(scope='module')
def tiny():
    model = models.load('tiny-plusv2', device='cpu')
    model.pipe.set_progress_bar_config(disable=True)
    return model


@pytest.fixture(scope='module')
def people():
    drawn = render(sample_people(2, 201), seed=202, size=96, hat=None)
    return {f'p{i}': p.image for i, p in enumerate(drawn)}


@pytest.fixture(scope='module')
def real_axes(people): return dict(face=people, s_scale=[0, 1], seed=[0, 1])


@pytest.fixture(scope='module')
def alone(tiny, real_axes, tmp_path_factory):
    return run(Sweep(tiny, real_axes, STEPS), tmp_path_factory.mktemp('alone'), batch_size=1)


@pytest.fixture(scope='module')
def together(tiny, real_axes, tmp_path_factory):
    return in_order(run(Sweep(tiny, real_axes, STEPS), tmp_path_factory.mktemp('together'), batch_size=8))


def test_a_picture_does_not_depend_on_its_neighbours(together, alone):
    assert [c.key for c in together] == [c.key for c in alone]
    assert abs(arrays(together) - arrays(alone)).max() <= 2 and len({a.tobytes() for a in arrays(alone)}) == 8


@pytest.mark.parametrize('score', ['likeness', 'distance', 'adherence'])
def test_a_score_does_not_depend_on_its_neighbours(together, alone, score):
    a, b = ([getattr(c, score) for c in cells] for cells in (together, alone))
    np.testing.assert_allclose(a, b, atol=.02)


def test_a_cell_is_what_a_call_of_its_own_makes(tiny, real_axes, alone):
    c = alone[6]
    own = {k: c.parameters[k] for k in ('seed', 's_scale')}
    one = tiny.generate(real_axes['face']['p1'], num_samples=1, **own, **STEPS)[0]
    assert abs(np.asarray(one, np.float32) - np.asarray(c.image, np.float32)).max() <= 2


def test_measured_as_by_hand(tiny, real_axes, alone):
    for c in alone[::3]:
        face = tiny.reader.best(real_axes['face'][c.parameters['face']])
        assert abs(c.likeness - identity_similarity(face, c.image, reader=tiny.reader)[0]) < 1e-5
        assert abs(c.distance - structure_distance(face, c.image, tiny.reader)[0]) < 1e-5
        assert c.adherence == prompt_adherence(STEPS['prompt'], c.image)[0] and c.judge == 'judge'


def test_a_prompt_with_a_label_is_scored_by_its_words(tmp_path):
    said = []
    def score(prompts, images):
        said.extend(prompts)
        return np.zeros(len(images))
    texts = dict(short='a red shirt', long='a blue shirt, smiling')
    sweep = Sweep(FakeModel(), dict(prompt=texts, seed=[0, 1]), dict(face=FACE), scorer=score)
    made = run(sweep, tmp_path)
    assert sorted(said) == sorted(list(texts.values())*2)
    assert {c.parameters['prompt'] for c in made} == set(texts)


def test_one_pass_through_the_resampler_serves_all_weights(tiny, people):
    read, looked = [], []
    resampler, encoder = tiny.adapter.net.image_proj.perceiver_resampler, tiny.encoder.model
    hooks = [resampler.register_forward_hook(lambda m, i, o: read.append(len(o))),
             encoder.register_forward_hook(lambda m, i, o: looked.append(len(o.hidden_states[-1])))]
    faces = [tiny.reader.best(p) for p in people.values()]
    rows = [faces[0]]*4 + [faces[1]]*4
    try: many = tiny.generate(rows, num_samples=1, seed=0, s_scale=[0, .5, 1, 1.5]*2, **STEPS)
    finally:
        for h in hooks: h.remove()
    assert max(read) == 2 and max(looked) == 2 and len(many) == 8


def test_a_face_that_is_none_fails_alone(tiny, people, tmp_path):
    (tmp_path/'gone.png').write_bytes(b'no picture')
    wall = Image.new('RGB', (96, 96), (90, 120, 150))
    faces = dict(wall=wall, gone=tmp_path/'gone.png', her=people['p0'])
    made = {c.parameters['face']: c for c in run(Sweep(tiny, dict(face=faces), STEPS), tmp_path/'out')}
    assert {k: c.state for k, c in made.items()} == dict(wall='failed', gone='failed', her='done')
    assert 'No face was found' in made['wall'].error and made['her'].likeness > -1


def test_an_embedding_has_no_likeness_to_be_measured(tiny, people, tmp_path):
    face = tiny.reader.best(people['p0'])
    bare, = run(Sweep('tiny-faceid', dict(seed=[0]), dict(face=face.embedding, **STEPS)), tmp_path)
    assert bare.state == 'done' and math.isnan(bare.likeness) and bare.judge == '' and bare.adherence >= 0


def test_models_are_an_axis(people, tmp_path):
    axes = dict(model=['tiny-faceid', 'tiny-plus'], seed=[0])
    made = run(Sweep(None, axes, dict(face=people['p0'], **STEPS)), tmp_path)
    assert [c.parameters['model'] for c in made] == ['tiny-faceid', 'tiny-plus']
    assert all(c.state == 'done' for c in made) and abs(arrays(made)[0] - arrays(made)[1]).max() > 20


# elsewhere

def spawn(n=2): return cf.ProcessPoolExecutor(n, mp_context=multiprocessing.get_context('spawn'))


def kill_one(pool): os.kill(next(iter(pool._processes)), signal.SIGKILL)


def check_same(made, alone, folder):
    made = {c.key: c for c in made}
    assert len(made) == len(alone) == len(read_table(folder)) == len(pictures(folder))
    assert {c.state for c in made.values()} == {'done'}
    assert abs(arrays(made[c.key] for c in alone) - arrays(alone)).max() <= 2
    np.testing.assert_allclose([made[c.key].likeness for c in alone], [c.likeness for c in alone], atol=.02)


def test_processes_and_one_killed_in_the_middle(real_axes, alone, tmp_path):
    pools = []
    def pool():
        pools.append(spawn())
        return pools[-1]
    sweep = Sweep('tiny-plusv2', real_axes, STEPS, load=CPU)
    going = sweep.run(tmp_path, executor=pool, batch_size=1, progress=False)
    made = [next(going)]
    kill_one(pools[0])
    made += list(going)
    assert len(pools) == 2
    check_same(made, alone, tmp_path)


def test_a_broken_executor_says_so_and_the_next_run_goes_on(real_axes, alone, tmp_path, tiny):
    with spawn(1) as pool:
        going = Sweep(tiny, real_axes, STEPS).run(tmp_path, executor=pool, batch_size=2, progress=False)
        next(going)
        kill_one(pool)
        with pytest.raises(FaceIDError, match='worker process died.*Run again'): list(going)
    kept = len(read_table(tmp_path))
    made = run(Sweep(tiny, real_axes, STEPS), tmp_path)
    assert 1 <= kept < 8 and sum(c.kept for c in made) == kept
    check_same(made, alone, tmp_path)


def test_threads_share_one_model(real_axes, alone, tmp_path, monkeypatch):
    work._load.cache_clear()
    loads, load = [], models.load
    def slow_load(**arguments):
        loads.append(arguments)
        time.sleep(.2)
        return load(**arguments)
    monkeypatch.setattr(models, 'load', slow_load)
    sweep = Sweep('tiny-plusv2', real_axes, STEPS, load=CPU)
    with cf.ThreadPoolExecutor(3) as pool: made = run(sweep, tmp_path, executor=pool, batch_size=2)
    check_same(made, alone, tmp_path)
    assert loads == [dict(name='tiny-plusv2', device='cpu')]


def test_dask_and_one_worker_killed_in_the_middle(real_axes, alone, tmp_path, monkeypatch):
    distributed = pytest.importorskip('distributed')
    monkeypatch.chdir(tmp_path)
    how = dict(threads_per_worker=1, processes=True, dashboard_address=None)
    how |= dict(host='127.0.0.1', silence_logs=50)
    with distributed.LocalCluster(2, **how) as cluster, distributed.Client(cluster) as client:
        sweep = Sweep('tiny-plusv2', real_axes, STEPS, load=CPU)
        going = sweep.run(tmp_path/'out', executor=client.get_executor(), batch_size=1, progress=False)
        made = [next(going)]
        pids = client.run(os.getpid)
        assert len(pids) == 2
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        made += list(going)
        check_same(made, alone, tmp_path/'out')


# looking for a setting

def measured_as(monkeypatch, say):
    "Cells get the (likeness, adherence) that `say(parameters)` has for them."
    def measure(model, cells, scoring):
        for c in cells: c.likeness, c.adherence = say(c.parameters)
    monkeypatch.setattr(work, 'measure_cells', measure)


@st.composite
def landscapes(draw):
    "(scales, s_scales, {(s_scale, scale): likeness, which rises with scale}, {...: adherence, which falls})"
    scales = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=12)))
    s_scales = sorted(draw(st.sets(st.integers(0, 3), min_size=1, max_size=3)))
    tenths = st.lists(st.integers(0, 10), min_size=len(scales), max_size=len(scales))
    like, adhere = {}, {}
    for s in s_scales:
        like |= {(s, k): x/10 for k, x in zip(scales, sorted(draw(tenths)))}
        adhere |= {(s, k): x/10 for k, x in zip(scales, sorted(draw(tenths), reverse=True))}
    return scales, s_scales, like, adhere


def search_in(landscape, wanted):
    scales, s_scales, like, adhere = landscape
    def say(p): return like[p['s_scale'], p['scale']], adhere[p['s_scale'], p['scale']]
    how = dict(scales=scales, s_scales=s_scales, seeds=[0, 1], progress=False, num_inference_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        measured_as(patch, say)
        return find_settings(FakeModel(), FACE, 'x', wanted, **how)


@settings(max_examples=40)
@given(landscapes(), st.integers(-1, 11))
def test_the_search_finds_what_the_grid_has(landscape, tenths):
    scales, s_scales, like, adhere = landscape
    wanted = tenths/10
    found = search_in(landscape, wanted)
    good = {at: adhere[at] for at in like if like[at] >= wanted}
    assert found.reached == bool(good) and len(found.table)*2 == found.pictures
    assert found.pictures <= 2*len(s_scales)*(3 + math.ceil(math.log2(len(scales))))
    if good:
        assert found.adherence == max(good.values()) and found.likeness >= wanted
        assert like[found.s_scale, found.scale] == found.likeness
    else: assert found.likeness == max(like[s, scales[-1]] for s in s_scales)


LIKE = {1.: .1, 2.: .5, 3.: .7, 4.: .6, 5.: .4, 6.: .2}


@pytest.mark.parametrize('wanted, scale', [(.45, 2), (.55, 3)])
def test_a_search_does_not_give_up_where_the_largest_scale_spoils_the_pictures(monkeypatch, wanted, scale):
    measured_as(monkeypatch, lambda p: (LIKE[p['scale']], 1/p['scale']))
    how = dict(scales=list(LIKE), s_scales=[1], seeds=[0], progress=False)
    assert find_settings(FakeModel(), FACE, 'x', wanted, **how).scale == scale


def test_a_search_gives_up_in_the_end(monkeypatch):
    measured_as(monkeypatch, lambda p: (LIKE[p['scale']], 1/p['scale']))
    how = dict(scales=list(LIKE), s_scales=[1], seeds=[0], progress=False)
    assert not find_settings(FakeModel(), FACE, 'x', .95, **how).reached
    assert find_settings(FakeModel(), FACE, 'x', .15, **how).pictures <= 4


def setting(cell): return cell.parameters['s_scale'], cell.parameters['scale']


def test_every_halving_makes_the_spans_smaller(tmp_path):
    "What is asked for, round by round, of a likeness that is the scale itself."
    class Grid:
        stopped, rounds = False, []
        sweep = Sweep(FakeModel(), dict(s_scale=[0, 1], scale=[.25, .5, .75, 1], seed=[0]), dict(face=FACE))
        def __call__(self, settings):
            self.rounds.append(sorted(settings))
            for c in self.sweep.cells: c.likeness = c.parameters['scale']
            return [c for c in self.sweep.cells if setting(c) in settings]
    search = Search(Grid(), .6)
    while search.halve(): pass
    assert search.span == {0: (2, 2), 1: (2, 2)}
    rounds = [r for r in Grid.rounds if r]
    assert rounds == [[(0., 1.), (1., 1.)], [(0., .5), (1., .5)], [(0., .75), (1., .75)]]


@pytest.mark.parametrize('after', [1, 3, 5, 9])
def test_a_search_can_be_stopped_and_goes_on(after, tmp_path):
    stop, seen = threading.Event(), []
    def on_step(step):
        seen.append(step.done)
        if len(seen) == after: stop.set()
    how = dict(scales=[1, 2, 3], s_scales=[0, 1], seeds=[0, 1], folder=tmp_path, progress=False, judge=False)
    first = find_settings(FakeModel(steps=2), FACE, 'x', .5, stop=stop, on_step=on_step, **how)
    assert first is None or len(seen) < after
    made = len(pictures(tmp_path))
    assert made <= find_settings(FakeModel(steps=2), FACE, 'x', .5, **how).pictures <= 12


def test_a_search_counts_a_missing_face_as_nothing(monkeypatch):
    measured_as(monkeypatch, lambda p: (math.nan if p['seed'] else .9, math.nan))
    found = find_settings(FakeModel(), FACE, 'x', .5, scales=[1], s_scales=[1], seeds=[0, 1], progress=False)
    assert not found.reached and found.likeness == .45


def test_answers_without_any_adherence_say_nan():
    answers = Answers()
    answers.add([c for c in fast_sweep(dict(seed=[0])).cells])
    assert answers.table().adherence.isna().all() and (answers.table().likeness == 0).all()


def test_a_search_in_which_nothing_can_be_made_says_why():
    with pytest.raises(FaceIDError, match='No picture could be made.*seed'):
        find_settings(FakeModel(bad=lambda *_: True), FACE, 'x', .5, progress=False)
