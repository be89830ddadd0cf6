"""The benchmark: statistics over people, the photographs' own numbers beside them, nothing made twice.
Most of it with a painter in place of the diffusion."""
import concurrent.futures as cf, math, re, shutil
from itertools import chain, takewhile
import numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from PIL import Image
from faceid_nb import benchmark as B
from faceid_nb.benchmark import PULID_PROMPT, TINY_PROMPT, benchmark, benchmark_table, name_people
from faceid_nb.errors import ArgumentError, FaceIDError, ImageError, PackMissingError
from faceid_nb.measure import (Calibration, calibrate, detection_rate, identity_similarity, prompt_adherence,
                               structure_distance)
from faceid_nb.models import TINY, load
from faceid_nb.tiny.people import render, sample_people

N = 4
STUDENT = 3.182446305   # t of 3 degrees of freedom at .975
WALL = Image.new('RGB', (128, 128), (60, 90, 150))
people_drawn = sample_people(N, 4242)


def shots(seed, size=128, **kw):
    return [p.image for p in render(people_drawn, seed=seed, size=size, hat=None, **kw)]


class Painter:
    """Knows the people by their photograph and paints what it likes: another view, a blend with somebody,
    the photograph again, or a wall."""
    def __init__(self, model, name='painter'):
        self.model, self.name, self.origin, self.calls = model, name, None, []
        self.known = {np.asarray(p).tobytes(): i for i, p in enumerate(PHOTOS[0])}
    def __getattr__(self, name): return getattr(self.model, name)
    def paint(self, i, seed):
        if (i, seed) == (0, 1): return WALL
        if (i, seed) == (1, 1): return PHOTOS[0][1]
        someone = people_drawn[i].blend(people_drawn[(i + 1) % N], (.1, .5, .3)[seed % 3])
        return render([someone], seed=50 + i + 10*seed, size=64, hat=None, shirt='red',
                      background='blue' if i % 2 else 'white', expression='smiling')[0].image
    def generate(self, face, prompt, *, num_samples, seed, on_step=None, **kw):
        self.calls.append([(self.known[f.image.tobytes()], s) for f, s in zip(face, seed)])
        out = [self.paint(*c) for c in self.calls[-1]]
        for image in out: image.info = {}
        return [i.copy() for i in out]
    def made(self): return sorted(chain.from_iterable(self.calls))


PHOTOS = [shots(11), shots(12), shots(13)]


@pytest.fixture(scope='module')
def model(): return load('tiny-faceid', device='cpu')


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    root = tmp_path_factory.mktemp('album')
    for i in range(N):
        for k in range(3 if i else 2):   # the first person has one photograph less
            (root/f'p{i}').mkdir(exist_ok=True)
            PHOTOS[k][i].save(root/f'p{i}'/f'{k}.png')
    (root/'notes.txt').write_text('no picture')
    (root/'.hidden').mkdir()
    PHOTOS[0][0].save(root/'.hidden'/'a.png')
    return root


@pytest.fixture(scope='module')
def run(model, album, tmp_path_factory):
    out = tmp_path_factory.mktemp('results')
    painter = Painter(model)
    return benchmark(painter, album, out, num_samples=3, progress=False), painter, out


def wilson(k, n):
    "Written otherwise than in the module: the roots of (p - x)^2 = z^2 x (1 - x)/n."
    z2 = 1.96**2
    low, high = sorted(np.roots([1 + z2/n, -(2*k/n + z2/n), (k/n)**2]).real)
    return low, high


# -- the numbers

def test_the_row_is_what_the_pictures_say(run):
    r, _, _ = run
    t, row = r.pictures, r.rows.iloc[0]
    assert len(t) == 3*N
    assert len(r.rows) == 1
    assert list(t.seed) == [0, 1, 2]*N
    assert row.people == N
    assert row.pictures == 3*N
    assert row.failed == 0
    assert t.likeness.isna().sum() == 1 and t.adherence.notna().all()
    for k in ('likeness', 'other', 'adherence', 'distance'):
        means = np.array([np.nanmean(t[k][t.person == p]) for p in sorted(set(t.person))])
        assert math.isclose(row[k], means.mean())
        assert math.isclose(row[f'{k}_half'], STUDENT*means.std(ddof=1)/2, rel_tol=1e-9)
        # over people, not over pictures
        assert not math.isclose(row[k], np.nanmean(t[k])) or k == 'adherence'
    k = int(t.likeness.notna().sum())
    assert row.found == k/len(t)
    assert np.allclose((row.found_low, row.found_high), wilson(k, len(t)), atol=1e-9)
    found = t[t.likeness.notna()]
    assert row.copies == sum(found.likeness > r.calibration.copy_line)/len(found) == 1/len(found)
    assert row['share'] == row.likeness/r.photographs['likeness']
    assert bool(t.copied[(t.person == 'p1') & (t.seed == 1)].iloc[0])


def test_pictures_are_compared_with_the_given_photograph_and_with_the_others(run, album, model):
    r, _, out = run
    reader = model.reader
    for _, c in r.pictures.iterrows():
        given, *others = [Image.open(p) for p in sorted((album/c.person).iterdir())]
        picture = [Image.open(out/c.file)]
        assert np.allclose(c.likeness, identity_similarity(given, picture, reader=reader)[0], atol=1e-5,
                           equal_nan=True)
        assert np.allclose(c.other,
                           np.mean([identity_similarity(o, picture, reader=reader)[0] for o in others]),
                           atol=1e-5, equal_nan=True)
        assert np.allclose(c.distance, structure_distance(given, picture, reader)[0], atol=1e-5,
                           equal_nan=True)
        assert c.adherence == prompt_adherence(TINY_PROMPT, picture)[0]
        assert c.file == 'pictures/' + (out/c.file).name
    assert repr(r) == 'Benchmark(painter; 12 pictures of 4 people)'
    assert r.judge == 'judge'
    assert r.settings['prompt'] == TINY_PROMPT


def test_the_photographs_beside(run, album, model):
    "Each but the first against the first; means over people again."
    r, *_ = run
    per = []
    for p in sorted(d for d in album.iterdir() if d.name[0] == 'p'):
        given, *others = sorted(p.iterdir())
        per.append((identity_similarity(given, others, reader=model.reader),
                    structure_distance(given, others, model.reader)))
    for k, j in (('likeness', 0), ('distance', 1)):
        means = np.array([v[j].mean() for v in per])
        assert math.isclose(r.photographs[k], means.mean(), rel_tol=1e-6)
        assert math.isclose(r.photographs[f'{k}_half'], STUDENT*means.std(ddof=1)/2, rel_tol=1e-6)
    assert r.photographs['pictures'] == 1 + 2*(N - 1)
    assert r.photographs['people'] == N
    assert r.photographs['found'] == 1
    assert math.isnan(r.photographs['adherence'])
    c = calibrate([sorted(d.iterdir()) for d in sorted(album.iterdir()) if d.name[0] == 'p'], model.reader)
    for mine, theirs in ((r.calibration.genuine, c.genuine), (r.calibration.impostor, c.impostor)):
        np.testing.assert_allclose(np.sort(mine), np.sort(theirs), atol=1e-5)
    assert len(c.genuine) == 1 + 3*(N - 1)
    assert r.photographs['copies'] == np.mean(np.concatenate([v[0] for v in per]) > c.copy_line)


@given(st.lists(st.lists(st.one_of(st.just(math.nan), st.floats(-1, 1)), min_size=1, max_size=5), min_size=1,
                max_size=6))
def test_one_talkative_person_does_not_count_more(values):
    rows = []
    for i, person in enumerate(values):
        for v in person: rows.append(dict(person=i, likeness=v, other=v, adherence=v, distance=v))
    t = pd.DataFrame(rows).assign(state='done', copied=False)
    row = B.summarise(t)
    means = [np.nanmean(p) for p in values if not all(map(math.isnan, p))]
    assert row['people'] == len(values)
    assert row['pictures'] == sum(map(len, values))
    assert math.isclose(row['found'], detection_rate(sum(values, [])), abs_tol=1e-12)
    if not means: assert math.isnan(row['likeness'])
    else: assert math.isclose(row['likeness'], np.mean(means), abs_tol=1e-12)
    if len(means) < 2: assert math.isnan(row['likeness_half'])


def test_what_failed_is_counted_apart():
    t = pd.DataFrame([dict(person='a', likeness=.5, other=.4, adherence=1., distance=.1, state='done',
                           copied=True), dict(person='b', likeness=math.nan, other=math.nan,
                                              adherence=math.nan, distance=math.nan, state='failed',
                                              copied=False)])
    row = B.summarise(t)
    assert (row['people'], row['pictures'], row['failed'], row['found'], row['copies'],
            row['likeness']) == (1, 1, 1, 1, 1, .5)


# -- who, and what with

def test_a_flat_folder(model, tmp_path):
    for i in range(N): PHOTOS[0][i].save(tmp_path/f'{"abcd"[i]}.png')
    (tmp_path/'notes.txt').write_text('')
    painter = Painter(model)
    r = benchmark(painter, tmp_path, tmp_path/'results', num_samples=2, progress=False)
    assert sorted(set(r.pictures.person)) == ['a.png', 'b.png', 'c.png', 'd.png']
    assert r.photographs is None
    assert r.calibration is None
    row = r.rows.iloc[0]
    assert math.isnan(row['share']) and math.isnan(row.copies) and math.isnan(row.other) and row.likeness > .3
    text = benchmark_table(r)
    assert 'No person has two photographs' in text and 'other photographs*' not in text
    # results inside the folder are nobody
    Image.new('RGB', (9, 9)).save(tmp_path/'results'/'sheet-0001.png')
    assert list(name_people(tmp_path)) == ['a.png', 'b.png', 'c.png', 'd.png']
    assert benchmark(painter, tmp_path, tmp_path/'results', num_samples=2, progress=False).pictures.kept.all()


def test_people_from_anything(album, tmp_path):
    assert ({n: [f.name for f in p] for n, p in name_people(album).items()}
            == {f'p{i}': [f'{k}.png' for k in range(3 if i else 2)] for i in range(N)})
    assert name_people(str(album)) == name_people(album)
    a, b = album/'p0'/'0.png', album/'p1'/'1.png'
    assert name_people([a, b]) == {'0': [a], '1': [b]}
    assert name_people([[a, b], [b]]) == {'person 0': [a, b], 'person 1': [b]}
    assert name_people(dict(Ada=a, Ben=[b, a])) == {'Ada': [a], 'Ben': [b, a]}
    assert [len(p) for p in name_people([PHOTOS[0][0], np.asarray(PHOTOS[0][1])]).values()] == [1, 1]


@pytest.mark.parametrize('people, says', [(lambda d: d/'nowhere', 'No such folder'),
                                          (lambda d: d/'one'/'a.png', 'It is a file'),
                                          (lambda d: d/'empty', '0 of them, 0 photographs'),
                                          (lambda d: d/'one', '1 of them, 1 photographs'),
                                          (lambda d: d/'mixed', 'beside them'), (lambda d: [], 'two people'),
                                          (lambda d: dict(a=d/'one'/'a.png', b=[]), 'no photograph of b'),
                                          (lambda d: dict(a=d/'one'/'a.png'), '1 of them'),
                                          (lambda d: [d/'one'/'a.png']*2, 'more than once')],
                         ids='nowhere file empty one mixed none nobody single twice'.split())
def test_bad_people(people, says, tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'one').mkdir()
    PHOTOS[0][0].save(tmp_path/'one'/'a.png')
    for f in ('mixed/a.png', 'mixed/b/c.png', 'mixed/d/e.png'):
        (tmp_path/f).parent.mkdir(exist_ok=True, parents=True)
        PHOTOS[0][0].save(tmp_path/f)
    with pytest.raises(ArgumentError, match=says):
        benchmark('tiny-faceid', people(tmp_path), tmp_path/'out', progress=False)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('models, more, error, says',
                         [('tiny-faceId', {}, ArgumentError, "no model 'tiny-faceId'"),
                          (['tiny-faceid', 'sd15-faceid'], {}, ArgumentError, 'different packs'),
                          ([], {}, ArgumentError, 'no model to measure'),
                          (['tiny-faceid']*2, {}, ArgumentError, 'more than once'),
                          ('tiny-faceid', dict(num_samples=0), ArgumentError, 'num_samples must be 1'),
                          ('tiny-faceid', dict(s_scales=1), ArgumentError, "no argument 's_scales'"),
                          ('tiny-faceid', dict(scale=[.5, 1]), ArgumentError, 'scale must be a number')])
def test_bad_arguments(models, more, error, says, album, tmp_path):
    with pytest.raises(error, match=says): benchmark(models, album, tmp_path/'out', progress=False, **more)
    assert not (tmp_path/'out').exists()


def test_a_broken_photograph_is_said_before_anything_is_made(model, album, tmp_path):
    painter = Painter(model)
    bad = tmp_path/'bad.png'
    bad.write_bytes(b'not a picture')
    with pytest.raises(ImageError, match='bad.png'):
        benchmark(painter, dict(a=[PHOTOS[0][0], bad], b=PHOTOS[0][1]), tmp_path/'out', progress=False)
    assert not painter.calls


def test_the_prompt_and_the_scorer_fit_the_model(album, tmp_path, monkeypatch):
    asked = []
    def stop(model, axes, fixed, **kw):
        asked.append((fixed['prompt'], kw['scorer']))
        raise InterruptedError
    monkeypatch.setattr(B, 'Sweep', stop)
    for name, more in (('sd15-plusv2', {}), ('tiny-plusv2', {}),
                       ('tiny-plusv2', dict(prompt='mine', scorer=False)),
                       ('sdxl-faceid', dict(prompt='mine'))):
        with pytest.raises(InterruptedError): benchmark(name, album, tmp_path, **more)
    assert asked == [(PULID_PROMPT, None), (TINY_PROMPT, 'tiny'), ('mine', False), ('mine', None)]
    assert PULID_PROMPT == 'portrait, color, cinematic, in garden, soft light, detailed face'


# -- nothing twice, nothing lost

def test_again_makes_nothing_anew(run, model, album, tmp_path):
    r, _, out = run
    out = shutil.copytree(out, tmp_path/'copy')
    painter = Painter(model)
    files = {p: p.stat().st_mtime_ns for p in (out/'pictures').iterdir()}
    again = benchmark(painter, album, out, num_samples=3, progress=False)
    assert not painter.calls
    assert again.pictures.kept.all()
    assert not r.pictures.kept.any()
    assert again.rows.equals(r.rows)
    assert {p: p.stat().st_mtime_ns for p in (out/'pictures').iterdir()} == files and len(files) == 3*N
    assert benchmark(painter, album, out, num_samples=4, progress=False).pictures.kept.sum() == 3*N
    assert painter.made() == [(i, 3) for i in range(N)]


def test_a_killed_run_goes_on(run, model, album, tmp_path):
    r, *_ = run
    painter = Painter(model)
    whole = painter.generate
    def stop(*args, **kw):
        if painter.calls: raise KeyboardInterrupt
        return whole(*args, **kw)
    painter.generate = stop
    with pytest.raises(KeyboardInterrupt):
        benchmark(painter, album, tmp_path, num_samples=3, batch_size=5, progress=False)
    assert len(painter.made()) == 5 and not list(tmp_path.glob('benchmark.*'))
    painter.generate = whole
    done = benchmark(painter, album, tmp_path, num_samples=3, batch_size=5, progress=False)
    assert len(painter.made()) == len(set(painter.made())) == 3*N and done.pictures.kept.sum() == 5
    np.testing.assert_allclose(done.rows.drop(columns='model').astype(float),
                               r.rows.drop(columns='model').astype(float), atol=1e-6)


def test_the_first_seed_and_large_ones(model, album, tmp_path, monkeypatch):
    painter = Painter(model)
    monkeypatch.setattr(painter, 'paint', lambda i, seed: PHOTOS[1][i])
    r = benchmark(painter, album, tmp_path, num_samples=2, seed=12345678, progress=False)
    assert {s for _, s in painter.made()} == {12345678, 12345679} == set(r.pictures.seed)


def test_a_judge_who_comes_later_looks_at_the_pictures_again(run, model, tmp_path, monkeypatch):
    "The first run has no second recogniser and says so; the second has, and makes no picture."
    flat = {f'p{i}': p for i, p in enumerate(PHOTOS[0])}
    painter = Painter(model)
    missing = []
    def lonely(reader, providers=None):
        missing.append(1)
        raise PackMissingError('none', 'none', 'none')
    with monkeypatch.context() as m:
        m.setattr('faceid_nb.measure.find_judge', lonely)
        first = benchmark(painter, flat, tmp_path, num_samples=3, progress=False)
    assert missing
    assert first.judge == 'steering recogniser'
    assert '**which also steers' in benchmark_table(first)
    calls = len(painter.calls)
    second = benchmark(painter, flat, tmp_path, num_samples=3, progress=False)
    assert len(painter.calls) == calls
    assert second.judge == 'judge'
    assert 'no part in the generation' in benchmark_table(second)
    np.testing.assert_allclose(second.pictures.likeness, run[0].pictures.likeness, atol=1e-5)
    assert abs(first.pictures.likeness - second.pictures.likeness).max() > .01


def test_somebody_without_a_face(run, model, album, tmp_path):
    painter = Painter(model)
    people = dict(name_people(album), wall=[WALL, PHOTOS[1][0]])
    r = benchmark(painter, people, tmp_path, num_samples=3, progress=False)
    row = r.rows.iloc[0]
    assert row.failed == 3
    assert row.people == N
    assert row.pictures == 3*N
    assert 'wall: No face was found' in benchmark_table(r)
    assert 'could not be made: 3.' in benchmark_table(r)
    for k in ('likeness', 'likeness_half', 'found', 'other', 'adherence', 'distance', 'share'):
        assert math.isclose(row[k], run[0].rows.iloc[0][k], rel_tol=1e-5), k
    assert r.photographs['people'] == N
    with pytest.raises(FaceIDError, match='No picture could be made') as e:
        benchmark(painter, dict(a=WALL, b=Image.new('RGB', (99, 99))), tmp_path/'none', progress=False)
    assert e.value.exit_code == 1
    assert 'No face was found' in str(e.value)
    assert not list((tmp_path/'none').glob('benchmark.*'))


def test_a_photograph_without_a_face_among_others(run, model, album, tmp_path):
    "It says nothing and takes nothing away; it shows in the photographs' own row."
    people = name_people(album)
    people['p2'] = [*people['p2'], WALL]
    r = benchmark(Painter(model), people, tmp_path, num_samples=3, progress=False)
    assert math.isclose(r.photographs['likeness'], run[0].photographs['likeness'], rel_tol=1e-6)
    assert r.photographs['found'] == 1 - 1/r.photographs['pictures']
    assert len(r.calibration.genuine) == len(run[0].calibration.genuine)
    np.testing.assert_allclose(r.pictures.other, run[0].pictures.other, atol=1e-6)


# -- what is written

def parse(text):
    "The table of a Markdown text: {column: [cells]}."
    lines = [l for l in text.split('\n') if l.startswith('|')]
    head, _, *rows = [[c.strip() for c in l.strip('|').split('|')] for l in lines]
    assert len({len(r) for r in (head, *rows)}) == 1
    return {c: [r[i] for r in rows] for i, c in enumerate(head)}


def numbers(cell): return [float(x) for x in re.findall(r'-?\d+(?:\.\d+)?', cell)]


def known(*values):
    "The values up to the first that is not known."
    return [*takewhile(lambda v: not math.isnan(v), values)]


def a_benchmark(made, real):
    "A result with these rows; `real`: with photographs and a calibration."
    cal = Calibration(np.linspace(.5, 1, 200), np.linspace(-1, .3, 50)) if real else None
    return B.Benchmark(pd.DataFrame(made), pd.DataFrame(columns=['state', 'person', 'error']),
                       made[0] if real else None, cal, dict(prompt='x', seed=3), 'judge', False)


def check_row(t, i, m):
    "Row `i` of a parsed table says the numbers of `m`."
    for column, key in (('likeness', 'likeness'), ('other photograph', 'other'), ('prompt', 'adherence'),
                        ('structure', 'distance')):
        want = known(m[key], m[f'{key}_half'])
        got = numbers(t[column][i])
        assert len(got) == len(want) and np.allclose(got, want, atol=5.01e-4), (column, m)
    for column, key in (("of the photographs'", 'share'), ('copies', 'copies')):
        assert np.allclose(numbers(t[column][i]), [] if math.isnan(m[key]) else [100*m[key]], atol=.0501)
    assert numbers(t['face found'][i]) == ([50, 25, 75] if m['pictures'] else [])
    assert (t['people'][i], t['pictures'][i]) == (str(m['people']), str(m['pictures']))


value = st.one_of(st.just(math.nan), st.floats(-1, 1))
share = st.one_of(st.just(math.nan), st.floats(0, 2))

@given(st.lists(st.tuples(value, value, value, value, share, share, st.integers(0, 9)), min_size=1,
                max_size=4), st.booleans())
def test_markdown_parses_back(rows, real):
    made = [dict(model=f'a|{i}', likeness=a, likeness_half=abs(b), other=b, other_half=abs(c), adherence=c,
                 adherence_half=.1, distance=d, distance_half=math.nan, found=.5, found_low=.25,
                 found_high=.75, copies=s, people=n, pictures=2*n, failed=0, share=t)
            for i, (a, b, c, d, s, t, n) in enumerate(rows)]
    r = a_benchmark(made, real)
    t = parse(benchmark_table(r))
    assert t['model'] == [f'a/{i}' for i in range(len(rows))] + ['*other photographs*']*real
    for i, m in enumerate(made): check_row(t, i, m)
    assert 'official weights' not in benchmark_table(r) and 'too few' not in benchmark_table(r)


def test_files(run):
    r, _, out = run
    text = (out/'benchmark.md').read_text(encoding='utf-8')
    assert text == benchmark_table(r) == r._repr_markdown_()
    assert 'say nothing about the official weights' in text
    assert "'photo of a person in a red shirt" in text
    assert 'too few' in text
    assert 'num_samples 3, seed 0, num_inference_steps 30, guidance_scale 7.5, scale 1.0, s_scale 1.0' in text
    np.testing.assert_allclose(pd.read_csv(out/'benchmark.csv').drop(columns='model').astype(float),
                               r.rows.drop(columns='model').astype(float), rtol=1e-12)
    t = pd.read_csv(out/'pictures.csv')
    np.testing.assert_allclose(t.likeness, r.pictures.likeness, rtol=1e-12)
    assert all((out/f).is_file() for f in t.file) and str(out) not in (out/'pictures.csv').read_text()


def test_a_file_is_there_as_a_whole_or_as_it_was(run, model, album, monkeypatch):
    _, _, out = run
    before = (out/'benchmark.md').read_bytes()
    write = type(out).write_text
    def half(self, text, **kw):
        write(self, text[:50], **kw)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(type(out), 'write_text', half)
    with pytest.raises(OSError): benchmark(Painter(model), album, out, num_samples=1, progress=False)
    assert (out/'benchmark.md').read_bytes() == before and not [p for p in out.iterdir() if 'part' in p.name]


# -- for real

def test_names_and_an_executor(album, tmp_path):
    """Two named models with few steps, here and on an executor: the same numbers; the labels of a
    dictionary; one worker loads by name."""
    few = dict(num_samples=1, num_inference_steps=2, progress=False)
    people = dict(list(name_people(album).items())[:2])
    here = benchmark(['tiny-faceid', 'tiny-portrait'], people, tmp_path/'here', **few)
    sent = []
    class Pool(cf.ThreadPoolExecutor):
        def submit(self, *args):
            sent.append(args)
            return super().submit(*args)
    with Pool(1) as pool:
        there = benchmark({'F': 'tiny-faceid', 'P': 'tiny-portrait'}, people, tmp_path/'there', executor=pool,
                          batch_size=1, load=dict(device='cpu'), **few)
    assert len(sent) == 4
    assert list(here.rows.model) == ['tiny-faceid', 'tiny-portrait']
    assert list(there.rows.model) == ['F', 'P']
    assert list(there.pictures.model) == ['F', 'F', 'P', 'P']
    np.testing.assert_allclose(here.pictures[['likeness', 'distance', 'adherence']],
                               there.pictures[['likeness', 'distance', 'adherence']], atol=.02)
    assert here.pictures.likeness[0] != here.pictures.likeness[2]


def test_the_reader_of_a_name_is_the_one_that_the_model_would_have(model, tmp_path):
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'tiny').symlink_to(TINY/'models'/'tiny')
    assert B.find_reader(model, {}) is model.reader
    assert B.find_reader('tiny-portrait', {}).folder == TINY/'models'/'tiny'
    assert B.find_reader('tiny-portrait', dict(folder=tmp_path)).folder == tmp_path/'models'/'tiny'
    assert B.find_reader('tiny-portrait', dict(folder=tmp_path/'models',
                                               providers=['cpu'])).folder == TINY/'models'/'tiny'


def test_damaged_photographs_in_a_folder_are_left_out_and_noted(model, album, tmp_path):
    folder = shutil.copytree(album, tmp_path/'album')
    (folder/'p0'/'9.jpg').write_bytes(b'\xff\xd8\xff')
    with pytest.warns(UserWarning, match='cannot be read'):
        result = benchmark(Painter(model), folder, tmp_path/'out', num_samples=1, progress=False)
    assert len(result.broken) == 1 and 'p0' in str(list(result.broken)[0])
    assert re.search('Photographs left out, 1, .*9.jpg: ', benchmark_table(result))


def test_who_has_damaged_photographs_only_is_left_out(album, tmp_path):
    folder = shutil.copytree(album, tmp_path/'album')
    (folder/'empty').mkdir()
    (folder/'empty'/'1.png').write_bytes(b'')
    left, broken = B.leave_out_damaged(name_people(folder), named=False)
    assert sorted(left) == [f'p{i}' for i in range(N)] and list(broken.values()) == ['it is empty (0 bytes)']
