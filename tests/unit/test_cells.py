"What a cell is called, what is refused, and the shelf."
import math
import shutil
import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from helpers_sweep import AXES, FACE, FakeModel, fast_sweep, names, run

from faceid_nb.cells import identify, read_table, scoring_name, weights_hash
from faceid_nb.errors import ArgumentError
from faceid_nb.files import read_record
from faceid_nb.models import TINY
from faceid_nb.sweep import Sweep

# names of cells

def keys(axes, model=None, face=FACE, **fixed):
    return {c.key for c in Sweep(model or FakeModel(), axes, dict(face=face, **fixed)).cells}


@pytest.mark.parametrize('axes', [
    dict(seed=[0]), dict(scale=[np.float32(1)]), dict(num_inference_steps=(30,)), dict(s_scale={'one': 1})])
def test_the_same_cell_has_the_same_name_whatever_the_spelling(axes):
    assert keys(axes) == keys(dict(scale=[1]), seed=0, prompt=None)


def test_the_order_of_an_axis_is_not_part_of_a_name():
    assert keys(dict(scale=[.5, 1])) == keys(dict(scale=[1., .5]))
    assert keys(dict(scale=[1])) < keys(dict(scale=[.5, 1]))


def test_every_argument_the_weights_and_the_face_are_part_of_a_name():
    changes = dict(prompt='x', negative_prompt='y', scale=.9, s_scale=0, num_inference_steps=5,
                   guidance_scale=3, start=.2, which='left')
    others = [keys(dict(seed=[0]), **{k: v}) for k, v in changes.items()]
    others += [keys(dict(seed=[0]), FakeModel(weight=2)), keys(dict(seed=[0]), face=FACE + 1)]
    assert len(set.union(keys(dict(seed=[0])), *others)) == 1 + len(others)


def photo_key(photo): return Sweep(FakeModel(), dict(seed=[0]), dict(face=photo)).cells[0].key


@pytest.fixture
def red(tmp_path):
    Image.new('RGB', (8, 8), 'red').save(tmp_path/'a.png')
    (tmp_path/'b.png').write_bytes((tmp_path/'a.png').read_bytes())
    return tmp_path/'a.png'


def test_photographs_enter_with_their_contents(red):
    same = red, str(red.with_name('b.png')), red.read_bytes()
    assert len(set(map(photo_key, same))) == 1 and photo_key([red]) != photo_key(red)


def test_a_file_with_other_contents_is_another_photograph(red):
    before = photo_key(red)
    Image.new('RGB', (8, 8), 'blue').save(red)
    assert photo_key(red) != before


def test_a_photograph_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match='no photograph gone.png'): photo_key(tmp_path/'gone.png')


def test_photographs_of_an_axis_are_called_by_their_files(red):
    axis = Sweep(FakeModel(), dict(face=[red, red.with_name('b.png')]))
    assert [c.parameters['face'] for c in axis.cells] == ['a', 'b']


def test_what_identifies_an_array():
    x = np.arange(6, dtype=np.float32)
    assert identify(x) == identify(torch.arange(6.)) != identify(x[::-1])
    assert identify(x) != identify(x.reshape(2, 3))


def test_what_identifies_plain_values():
    assert identify({'b': 1, 2: (1, None)}) == {'b': 1, '2': [1, None]} and identify(True) is True
    with pytest.raises(ArgumentError, match='cannot name'): identify(object())


# weights

def test_a_name_and_a_model_that_was_loaded_by_it_have_the_same_weights():
    loaded = SimpleNamespace(origin=dict(name='tiny-faceid'), changes=list)
    assert weights_hash('tiny-faceid') == weights_hash(loaded)
    assert weights_hash('tiny-faceid') != weights_hash('tiny-faceid-lora')


def test_weights_are_the_files_contents(tmp_path):
    for p in TINY.iterdir(): (tmp_path/p.name).symlink_to(p)
    assert weights_hash('tiny-faceid', folder=tmp_path) == weights_hash('tiny-faceid')


def test_one_other_bit_in_a_file_makes_other_weights(tmp_path):
    for p in TINY.iterdir():
        if p.name != 'sd': (tmp_path/p.name).symlink_to(p)
    shutil.copytree(TINY/'sd', tmp_path/'sd')
    file = tmp_path/'sd'/'unet'/'diffusion_pytorch_model.safetensors'
    b = bytearray(file.read_bytes())
    b[-1] ^= 1
    file.write_bytes(b)
    assert weights_hash('tiny-faceid', folder=tmp_path) != weights_hash('tiny-faceid')


def test_weights_of_a_model_without_files_are_its_tensors():
    assert weights_hash(FakeModel()) == weights_hash(FakeModel()) != weights_hash(FakeModel(weight=2))


# what is refused

@pytest.mark.parametrize('axes, fixed, words', [
    (dict(s_scales=[0]), {}, "no argument 's_scales'.*s_scale"),
    (dict(scale=[]), {}, 'is empty'),
    (dict(scale=.5), {}, 'must be a list'),
    (dict(prompt='a text'), {}, 'must be a list'),
    (dict(seed=[1, 1]), {}, 'more than once'),
    (dict(num_samples=[4]), {}, 'one picture'),
    (dict(seed=[0]), dict(num_samples=4), 'one picture'),
    (dict(seed=[0]), dict(batch_size=4), 'no argument'),
    (dict(seed=[0]), dict(seed=1), 'given twice'),
    (dict(scale=['much']), {}, 'scale must be a number'),
    (dict(scale=[math.nan]), {}, 'scale must be a number'),
    (dict(seed=[math.inf]), {}, 'seed must be a number'),
    ({}, {}, 'needs an axis'),
    (dict(seed=[None]), {}, 'seed must be a number')])
def test_refused(axes, fixed, words):
    with pytest.raises(ArgumentError, match=words): Sweep(FakeModel(), axes, dict(face=FACE) | fixed)


def test_large_seeds_differ():
    assert len(keys(dict(seed=[1234567, 1234568, 2**40]))) == 3


@pytest.mark.parametrize('model, axes, fixed, words', [
    (FakeModel(), dict(seed=[0]), {}, 'No face'),
    (None, dict(seed=[0]), dict(face=FACE), 'No model'),
    ('tiny-x', dict(seed=[0]), dict(face=FACE), "no model 'tiny-x'"),
    (FakeModel(), dict(model=['tiny-plus']), dict(face=FACE), 'given twice')])
def test_no_face_and_no_model(model, axes, fixed, words):
    with pytest.raises(ArgumentError, match=words): Sweep(model, axes, fixed)


# the shelf

def test_a_file_is_no_folder(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(ArgumentError, match='is a file'): run(fast_sweep(AXES), tmp_path/'file')


def test_something_else_that_is_called_like_the_table(tmp_path):
    (tmp_path/'cells.sqlite').write_bytes(b'not a database at all, but long enough to be read as one' * 40)
    with pytest.raises(ArgumentError, match='not a table of cells'): run(fast_sweep(AXES), tmp_path)


def test_reading_makes_no_folder(tmp_path):
    with pytest.raises(ArgumentError, match='no results'): read_table(tmp_path/'nowhere')
    assert not (tmp_path/'nowhere').exists()


def test_yielded_means_kept(tmp_path):
    going = fast_sweep(AXES).run(tmp_path, batch_size=2, progress=False)
    c = next(going)
    with sqlite3.connect(tmp_path/'cells.sqlite') as db: rows = db.execute('SELECT key FROM cells').fetchall()
    going.close()
    assert (c.key,) in rows and len(read_table(tmp_path)) == 2


def test_a_picture_says_itself_what_it_is(tmp_path):
    c = run(fast_sweep(AXES), tmp_path)[0]
    record = read_record(c.file)
    assert record['cell'] == dict(key=c.key, parameters=c.parameters)
    assert record['adherence'] == c.adherence and 'likeness' not in record


@pytest.fixture(scope='module')
def partly_failed(tmp_path_factory):
    "(a sweep whose seed 2 cannot be made, its table, how many rows its folder has)"
    folder = tmp_path_factory.mktemp('table')
    sweep = fast_sweep(AXES, FakeModel(bad=lambda face, seed, s: seed == 2))
    run(sweep, folder)
    return sweep, sweep.table(folder), len(read_table(folder))


def test_a_table_has_a_row_a_cell_in_the_grids_order(partly_failed):
    sweep, t, rows = partly_failed
    assert list(zip(t.s_scale, t.seed)) == names(sweep.cells) and rows == 9


def test_the_columns_of_a_table(partly_failed):
    _, t, _ = partly_failed
    wanted = 'likeness distance adherence seconds state error image face judge device key'
    assert list(t.columns[:3]) == ['number', 'model', 'prompt'] and set(wanted.split()) <= set(t)


def test_a_table_says_what_is_not_there(partly_failed):
    _, t, _ = partly_failed
    assert t.likeness.isna().all() and t.likeness.dtype == float
    assert (t.image.isna() == (t.seed == 2)).all() and all(p.is_file() for p in t.image.dropna())
    assert (t.state == ['done', 'done', 'failed']*3).all()


def test_a_table_has_the_cells_scores(partly_failed):
    sweep, t, _ = partly_failed
    assert (t[t.seed < 2].adherence == [c.adherence for c in sweep.cells if c.parameters['seed'] < 2]).all()


# what else makes a picture or a score

@pytest.mark.parametrize('how', [
    dict(judge=False), dict(scorer=len), dict(scorer=False), dict(measure=False)])
def test_who_scores_is_part_of_a_name(how):
    def key(**how): return Sweep(FakeModel(), dict(seed=[0]), dict(face=FACE), **how).cells[0].key
    assert key(**how) == key(**how) != key()


def test_a_file_of_a_judge_counts_by_its_contents(tmp_path):
    (tmp_path/'judge.onnx').write_bytes(b'1')
    before = scoring_name(judge=tmp_path/'judge.onnx')
    (tmp_path/'judge.onnx').write_bytes(b'12')
    assert scoring_name(judge=tmp_path/'judge.onnx') != before


@pytest.mark.parametrize('kind', ['np', 'pt', 'latent'])
def test_arrays_are_refused_before_anything_is_made(tmp_path, kind):
    m = FakeModel()
    for axes, fixed in ((dict(seed=[0]), dict(output_type=kind)), (dict(output_type=['pil', kind]), {})):
        with pytest.raises(ArgumentError, match='A cell of a sweep is a picture'):
            Sweep(m, axes, dict(face=FACE) | fixed)
    assert not m.sizes


def test_a_row_without_a_picture_is_made_again(tmp_path):
    "As older versions left it behind for output_type='np'."
    run(fast_sweep(AXES), tmp_path)
    with sqlite3.connect(tmp_path/'cells.sqlite') as db: db.execute('UPDATE cells SET file = NULL')
    assert not any(c.kept for c in run(fast_sweep(AXES), tmp_path))


def test_home_is_known(tmp_path, monkeypatch, red):
    monkeypatch.setenv('HOME', str(red.parent))
    assert photo_key('~/a.png') == photo_key(red)
    made = run(fast_sweep(AXES), '~/out')
    assert made[0].file.is_relative_to(red.parent/'out') and len(read_table('~/out')) == len(made)
