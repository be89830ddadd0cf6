"`faceid-nb sweep` and `faceid-nb benchmark`: what is asked for, what is printed, what is kept."
import functools
import json
import math
import re
import sys
import types

import numpy as np
import pandas as pd
import pytest
from faceid_nb import cli, sheets
from faceid_nb.faceid import FaceID
from faceid_nb.tiny.people import render, sample_people
from helpers_cli import one_line, run
from PIL import Image

PROMPT = 'photo of a person in a red shirt, blue background'


@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    "Photographs: me.png and you.png with a face, wall.png without; and a folder of three people."
    root, crowd = tmp_path_factory.mktemp('drawn'), sample_people(3, seed=12)
    for k, p in enumerate(render(crowd, seed=1, size=128, glasses=False, hat=None)):
        (root/'people'/f'p{k}').mkdir(parents=True)
        p.image.save(root/('me.png', 'you.png', 'third.png')[k])
        p.image.save(root/'people'/f'p{k}'/'a.png')
    for k, p in enumerate(render(crowd, seed=2, size=128, hat=None)):
        p.image.save(root/'people'/f'p{k}'/'b.png')
    Image.new('RGB', (128, 128), 'gray').save(root/'wall.png')
    return root


def table_of(text):
    "{column: texts} of the printed table."
    lines = text.split('\n')
    i = next(i for i, line in enumerate(lines) if line.endswith('state'))
    j = next(j for j, line in enumerate(lines) if 'pictures are in' in line)
    head, *rows = [re.split(r'\s{2,}', line.strip()) for line in lines[i:j]]
    assert all(len(r) == len(head) for r in rows)
    return {h: [r[k] for r in rows] for k, h in enumerate(head)}


# -- what is asked for

@pytest.mark.parametrize('bad', ['sweep', 'sweep a.png', 'sweep --prompt x',
                                 'sweep a.png --prompt x --scale 0.5,', 'sweep a.png --prompt x --seed 1,1',
                                 'sweep a.png --prompt x --seed -1', 'sweep a.png --prompt x --steps 0',
                                 'sweep a.png --prompt x --processes 0', 'sweep a.png --prompt x --model a,',
                                 'benchmark', 'benchmark people --samples 0', 'benchmark people --seed 1,2',
                                 'benchmark people --batch 0'])
def test_bad_arguments_of_grids_end_with_2(bad, capsys):
    command, *_ = bad.split()
    with pytest.raises(SystemExit) as e: cli.main(bad.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and f'usage: faceid-nb {command}' in err
    assert err.strip().split('\n')[-1].startswith(f'faceid-nb {command}: error: ')


@pytest.fixture
def asked(monkeypatch):
    "The `Sweep` that a command asks for; nothing is run."
    caught = []
    def remember(sweep, *args):
        caught.append(sweep)
        return iter(())
    monkeypatch.setattr('faceid_nb.sweep.Sweep.run', remember)
    def ask(*words):
        assert run('sweep', *words) == 0
        return caught[-1]
    return ask


def test_what_has_several_values_is_an_axis(drawn, asked):
    s = asked(drawn/'me.png', '--prompt', 'a', '--model', 'tiny-plusv2,tiny-faceid', '--s-scale', '0,.5',
              '--scale', '.7', '--seed', '3,1234567,1234568', '--steps', '4', '--guidance-scale', '2,3',
              '--negative-prompt', 'n')
    assert {k: list(v.values()) for k, v in s.axes.items()} == dict(model=['tiny-plusv2', 'tiny-faceid'],
                                                                    guidance_scale=[2., 3.], s_scale=[0., .5],
                                                                    seed=[3, 1234567, 1234568])
    assert list(s.axes)[-1] == 'seed' and len(s) == 24
    said = {k: s.cells[4].arguments[k] for k in ('scale', 'num_inference_steps', 'prompt', 'negative_prompt',
                                                 'face', 's_scale', 'seed')}
    assert said == dict(scale=.7, num_inference_steps=4, prompt='a', negative_prompt='n',
                        face=str(drawn/'me.png'), s_scale=.5, seed=1234567)


def test_what_is_not_said_has_its_default(drawn, asked):
    one = asked(drawn/'me.png', '--prompt', 'a')
    defaults = dict(model='tiny-plusv2', seed=0, scale=1., s_scale=1., num_inference_steps=30,
                    guidance_scale=7.5, negative_prompt=None)
    assert len(one) == 1 and {k: one.cells[0].arguments[k] for k in defaults} == defaults


def test_photographs_and_prompts_are_axes(drawn, asked):
    two = asked(drawn/'me.png', drawn/'you.png', '--prompt', 'a', '--prompt', 'b', '--model', 'tiny-faceid',
                '--device', 'cpu')
    assert two.load == dict(device='cpu')
    cells = [tuple(c.parameters[k] for k in ('face', 'prompt', 'model')) for c in two.cells]
    assert cells == [('me', 'a', 'tiny-faceid'), ('me', 'b', 'tiny-faceid'),
                     ('you', 'a', 'tiny-faceid'), ('you', 'b', 'tiny-faceid')]


def test_photographs_of_one_name(drawn, tmp_path, asked):
    (tmp_path/'me.png').write_bytes((drawn/'you.png').read_bytes())
    s = asked(drawn/'me.png', tmp_path/'me.png', '--prompt', 'a')
    assert [c.parameters['face'] for c in s.cells] == [str(drawn/'me.png'), str(tmp_path/'me.png')]


@pytest.mark.parametrize('words, says', [
    ('me.png me.png --prompt a', 'given twice'),
    ('me.png --prompt a --prompt a', 'more than once'),
    ('me.png --prompt a --model tiny-nothing', 'no model'),
    ('me.png nowhere.png --prompt a', 'nowhere.png'),
    ('me.png people --prompt a', 'is a folder'),
])
def test_bad_input_of_a_sweep(words, says, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(drawn)
    assert run('sweep', *words.split(), '--out', tmp_path/'out') == 2
    assert says in one_line(capsys) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('words', ['sweep me.png --prompt a', 'benchmark people'])
def test_out_of_a_grid_is_a_file(words, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(drawn)
    (tmp_path/'out').write_text('mine')
    assert run(*words.split(), '--out', tmp_path/'out') == 2
    assert 'must name a folder' in one_line(capsys) and (tmp_path/'out').read_text() == 'mine'


def test_a_pool_of_fresh_processes():
    pool = cli.executor(3)()
    try:
        assert pool._max_workers == 3 and pool._mp_context.get_start_method() == 'spawn'
        assert pool._initializer is cli.in_worker
    finally: pool.shutdown()


def test_no_pool_unless_asked_for():
    assert cli.executor(None) is None


@pytest.mark.parametrize('tty, quiet, bar', [(True, False, True), (False, False, False), (True, True, False)])
def test_a_bar_for_a_terminal_only(tty, quiet, bar, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', types.SimpleNamespace(isatty=lambda: tty))
    assert cli.with_bar(quiet) is bar


# -- a sweep for real: three photographs, one without a face; two weights of the structure

@pytest.fixture(scope='module')
def swept(drawn, tmp_path_factory):
    "Runs that sweep, with the seeds that it is given: (folder, run)."
    out = tmp_path_factory.mktemp('swept')/'out'
    photos = [drawn/'me.png', drawn/'wall.png', drawn/'you.png']
    def again(*words):
        return run('sweep', *photos, '--prompt', PROMPT, '--s-scale', '0,1.5', '--steps', 3,
                   '--guidance-scale', 3, '--out', out, *words)
    return out, again


@pytest.fixture
def first(swept, capsys):
    "The table and the text after seed 7."
    out, again = swept
    assert again('--seed', 7) == 0
    printed = capsys.readouterr()
    assert 'it/s' not in printed.err and 'Traceback' not in printed.err
    return table_of(printed.out), printed.out


def test_the_table_names_what_varies(first):
    table, text = first
    assert list(table) == ['photograph', 's_scale', 'likeness', 'distance', 'adherence', 'state']
    assert table['photograph'] == ['me', 'me', 'wall', 'wall', 'you', 'you']
    assert table['s_scale'] == ['0', '1.5']*3
    assert table['likeness'][2] == '-' and '4 of 6 pictures' in text and '2 failed' in text


def test_an_error_is_said_once(first, drawn):
    _, text = first
    assert text.count(f"No face was found in '{drawn/'wall.png'}'") == 1
    assert 'failed: photograph wall, s_scale 0 and 1 more: No face' in text


def test_table_csv_has_all_digits(first, swept):
    (table, _), (out, _) = first, swept
    csv = pd.read_csv(out/'table.csv')
    assert len(csv) == 6 and str(out) not in (out/'table.csv').read_text()
    for i in (0, 1, 4, 5):
        row = csv.iloc[i]
        assert table['likeness'][i] == sheets.shown(row.likeness)
        assert table['distance'][i] == ('-' if math.isnan(row.distance) else f'{row.distance:.3f}')
        assert table['adherence'][i] == f'{row.adherence:.3f}' and Image.open(out/row.image).size == (64, 64)


@pytest.mark.parametrize('name, photo, row',
                         [('sheet-0001.png', 'me.png', 0), ('sheet-0002.png', 'you.png', 4)])
def test_a_sheet_for_each_photograph(name, photo, row, first, swept, drawn):
    out, _ = swept
    sheet, picture = Image.open(out/name), out/pd.read_csv(out/'table.csv').image[row]
    assert json.loads(sheet.text['faceid_nb']) == dict(photo=photo, prompt=PROMPT)
    x = np.array(sheet.convert('RGB'))[12:204]
    assert np.array_equal(x[:, 12:204], np.array(sheets.fit(Image.open(drawn/photo), 192)))
    assert np.array_equal(x[:, 216:408], np.array(sheets.fit(Image.open(picture), 192)))


def test_a_longer_list_adds_to_the_folder(first, swept, capsys):
    "After all of the above, which look at six cells."
    out, again = swept
    before = {p: p.stat().st_mtime_ns for p in (out/'pictures').iterdir()}
    assert len(before) == 4
    assert again('--seed', '7,8', '--quiet') == 0
    text = capsys.readouterr().out
    done = ['there already', 'done']*2
    assert table_of(text)['state'] == [*done, *['failed']*4, *done] and '4 of them from before' in text
    assert all(p.stat().st_mtime_ns == m for p, m in before.items())
    assert len(list((out/'pictures').iterdir())) == 8 and len(pd.read_csv(out/'table.csv')) == 12


def test_states_and_files_of_a_fresh_sweep(drawn, tmp_path, capsys):
    out = tmp_path/'out'
    assert run('sweep', drawn/'me.png', drawn/'wall.png', '--prompt', PROMPT, '--steps', 2, '--out', out) == 0
    assert table_of(capsys.readouterr().out)['state'] == ['done', 'failed']
    assert list(pd.read_csv(out/'table.csv').state) == ['done', 'failed']
    names = sorted(p.name for p in out.iterdir() if 'cells' not in p.name)   # no sheet for the wall
    assert names == ['pictures', 'sheet-0001.png', 'table.csv']


def test_all_failed(drawn, tmp_path, capsys):
    assert run('sweep', drawn/'wall.png', '--prompt', PROMPT, '--steps', 2, '--out', tmp_path/'out') == 1
    out = capsys.readouterr().out
    assert table_of(out)['state'] == ['failed'] and 'failed: seed 0: No face' in out
    assert not list((tmp_path/'out').glob('sheet*')) and (tmp_path/'out'/'table.csv').is_file()


@pytest.fixture
def stopping(monkeypatch):
    "Ctrl-C in the second call of `generate`; how many pictures each call made."
    whole, calls = FaceID.generate, []
    @functools.wraps(whole)
    def stop(self, *a, **k):
        calls.append(len(k['seed']))
        if len(calls) == 2: raise KeyboardInterrupt
        return whole(self, *a, **k)
    monkeypatch.setattr(FaceID, 'generate', stop)
    return calls


def test_ctrl_c_in_a_sweep_keeps_what_is_finished(drawn, tmp_path, stopping, capsys):
    out = tmp_path/'out'
    words = ['sweep', drawn/'me.png', '--prompt', PROMPT, '--prompt', 'photo of a person', '--seed', '0,1',
             '--steps', 2, '--batch', 2, '--out', out]
    assert run(*words) == 130
    printed = capsys.readouterr()
    table = table_of(printed.out)
    assert table['prompt'] == ['1', '1'] and table['state'] == ['done']*2 and stopping == [2, 2]
    assert '2 of 4 pictures' in printed.out and 'stopped' in printed.err
    assert f'prompt 1: {PROMPT}' in printed.out and 'prompt 2: photo of a person' in printed.out
    assert (out/'sheet-0001.png').is_file() and len((out/'table.csv').read_text().split('\n')) == 4
    assert run(*words) == 0 and stopping == [2, 2, 2]
    assert table_of(capsys.readouterr().out)['state'] == ['there already']*2 + ['done']*2


def test_a_long_sheet_ends(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, 'SHEET', 2)
    words = ['--prompt', PROMPT, '--seed', '0,1,2', '--steps', 2, '--out', tmp_path/'out']
    assert run('sweep', drawn/'me.png', *words) == 0
    assert '(the first 2 of 3)' in capsys.readouterr().out
    assert Image.open(tmp_path/'out'/'sheet-0001.png').width == 3*204 + 12


def test_processes_make_the_same_pictures(drawn, tmp_path):
    made = {}
    for name, more in dict(here=[], other=['--processes', 1]).items():
        words = ['--prompt', PROMPT, '--seed', '0,1', '--steps', 2, '--out', tmp_path/name]
        assert run('sweep', drawn/'me.png', *words, *more) == 0
        made[name] = [np.array(Image.open(p), int) for p in sorted((tmp_path/name/'pictures').iterdir())]
    assert all(abs(a - b).max() <= 2 for a, b in zip(made['here'], made['other'], strict=True))


# -- benchmark

def test_benchmark_passes_everything_on(tmp_path, monkeypatch, capsys):
    asked = {}
    def stand_in(models, people, out, **more):
        asked.update(more, models=models, people=people, out=out)
        return 'result'
    monkeypatch.setattr('faceid_nb.benchmark.benchmark', stand_in)
    monkeypatch.setattr('faceid_nb.benchmark.benchmark_table', lambda r: f'| table of {r} |')
    words = ['--model', 'tiny-faceid,tiny-plus', '--samples', 3, '--seed', 5, '--prompt', 'p',
             '--steps', 6, '--scale', .8,
             '--guidance-scale', 2, '--batch', 7, '--device', 'cpu', '--out', tmp_path/'o']
    assert run('benchmark', 'people', *words) == 0
    assert asked == dict(models=['tiny-faceid', 'tiny-plus'], people='people', out=tmp_path/'o',
                         num_samples=3, seed=5, prompt='p',
                         num_inference_steps=6, scale=.8, guidance_scale=2., batch_size=7,
                         load=dict(device='cpu'), executor=None, progress=False)
    out = capsys.readouterr().out
    assert '| table of result |' in out and 'benchmark.md' in out


def test_benchmark_for_real(drawn, tmp_path, capsys):
    out = tmp_path/'out'
    words = ['benchmark', drawn/'people', '--model', 'tiny-faceid', '--samples', 1, '--steps', 2, '--out',
             out]
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert text.startswith('| model | likeness') and (out/'benchmark.md').read_text().strip() in text
    assert '| 3 | 3 |' in text and 'other photographs' in text
    before = sorted(p.stat().st_mtime_ns for p in (out/'pictures').iterdir())
    assert run(*words) == 0 and capsys.readouterr().out == text
    assert sorted(p.stat().st_mtime_ns for p in (out/'pictures').iterdir()) == before


@pytest.mark.parametrize('folder, says', [
    ('nowhere', 'No such folder'),
    ('people/p0/a.png', 'It is a file'),
    ('one', 'two people'),
])
def test_bad_people(folder, says, drawn, tmp_path, capsys):
    where = drawn/folder
    if folder == 'one':
        where = tmp_path/'one'
        where.mkdir()
        (where/'a.png').write_bytes((drawn/'me.png').read_bytes())
    assert run('benchmark', where, '--out', tmp_path/'out') == 2
    assert says in one_line(capsys) and not (tmp_path/'out').exists()
