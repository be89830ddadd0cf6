"Batches, memory, faces that are remembered, and batches that are lost on an executor."
import concurrent.futures as cf
import itertools

import numpy as np
import pytest
import torch
from helpers_sweep import AXES, FakeModel, arrays, fast_sweep, in_order, pictures, run
from hypothesis import given, settings
from hypothesis import strategies as st

from faceid_nb.cells import Cell, read_table
from faceid_nb.errors import ArgumentError
from faceid_nb.sweep import Sweep
from faceid_nb.tiny.people import render, sample_people
from faceid_nb.work import FaceMemory, Parts, batches, default_batch

# batches

ROWS = st.tuples(st.sampled_from('ab'), st.sampled_from([10, 20]), st.sampled_from([0, 1]), st.integers(0, 3))
FACES = dict(a=np.zeros(512), b=np.ones(512))


def cell(i, face, steps, start, k):
    rowwise = dict(face=FACES[face], prompt=str(k), negative_prompt=None, seed=k, scale=k, s_scale=0)
    return Cell(i, str(i), {}, dict(rowwise, model='m', num_inference_steps=steps, start=start))


def kind(arguments): return arguments['num_inference_steps'], arguments['start']


@settings(max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=40), st.integers(1, 9))
def test_batches_hold_every_cell_once_and_share_what_they_must(rows, size):
    out = batches([cell(i, *row) for i, row in enumerate(rows)], size)
    every = itertools.chain.from_iterable(b.cells for b in out)
    assert sorted(c.number for c in every) == list(range(len(rows)))
    for b in out:
        assert 1 <= len(b.cells) <= size
        assert {kind(c.arguments) for c in b.cells} == {kind(b.shared)}
        assert not {'face', 'seed', 'scale', 's_scale', 'prompt', 'model'} & set(b.shared)


@settings(max_examples=60)
@given(st.lists(ROWS, min_size=1, max_size=40), st.integers(1, 9))
def test_batches_are_as_few_as_can_be_and_no_face_is_come_back_to(rows, size):
    out = batches([cell(i, *row) for i, row in enumerate(rows)], size)
    kinds = {row[1:3] for row in rows}
    assert len(out) <= sum(-(-sum(row[1:3] == k for row in rows)//size) for k in kinds)
    for k in kinds:
        order = list(itertools.chain.from_iterable(b.cells for b in out if kind(b.shared) == k))
        faces = [rows[c.number][0] for c in order]
        assert len(list(itertools.groupby(faces))) == len(set(faces))


def test_rows_of_the_fake_model_come_in_batches(tmp_path):
    m = FakeModel()
    run(fast_sweep(AXES, m), tmp_path, batch_size=4)
    assert m.sizes == [4, 4, 1]


@pytest.mark.parametrize('size', [0, 1.5, -1])
def test_a_batch_size_is_a_whole_number_from_1(tmp_path, size):
    with pytest.raises(ArgumentError, match='batch_size'): run(fast_sweep(AXES), tmp_path, batch_size=size)


def test_the_rule_for_batch_sizes():
    assert default_batch('tiny-plusv2') == 16 and default_batch(FakeModel()) == 1


# memory

SHORT = [torch.OutOfMemoryError('x'), RuntimeError('CUDA out of memory. Tried'), MemoryError(),
         RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize('error', SHORT)
def test_short_memory_halves_and_is_remembered(tmp_path, error):
    m = FakeModel(room=2, error=error)
    made = run(fast_sweep(dict(seed=range(20)), m), tmp_path, batch_size=8)
    assert len(made) == 20 and all(c.state == 'done' for c in made)
    assert m.sizes[:3] == [8, 4, 2] and set(m.sizes[2:]) == {2}
    alone = run(fast_sweep(dict(seed=range(20))), tmp_path/'alone', batch_size=1)
    assert np.array_equal(arrays(in_order(made)), arrays(alone))


def test_not_even_one_fits(tmp_path):
    made = run(fast_sweep(dict(seed=range(3)), FakeModel(room=0, error=MemoryError())), tmp_path)
    assert [c.state for c in made] == ['failed']*3 and 'MemoryError' in made[0].error


def test_one_bad_cell_fails_alone(tmp_path):
    m = FakeModel(bad=lambda face, seed, s: seed == 5)
    made = run(fast_sweep(dict(seed=range(16)), m), tmp_path, batch_size=16)
    assert [c.parameters['seed'] for c in made if c.state == 'failed'] == [5] and len(made) == 16
    assert 'ValueError: seed 5' in next(c.error for c in made if c.error)
    assert m.sizes[0] == 16 and len(m.sizes) <= 9 and len(pictures(tmp_path)) == 15


def test_what_failed_is_tried_again(tmp_path):
    m = FakeModel(bad=lambda face, seed, s: seed == 5)
    run(fast_sweep(dict(seed=range(16)), m), tmp_path, batch_size=16)
    good = FakeModel()
    again = run(fast_sweep(dict(seed=range(16)), good), tmp_path)
    assert good.sizes == [1] and [c.state for c in again] == ['done']*16 and all(not c.error for c in again)
    assert (read_table(tmp_path).state == 'done').all()


def test_a_size_that_was_too_large_for_a_bad_cell_is_not_remembered(tmp_path):
    m = FakeModel(bad=lambda face, seed, s: seed == 0)
    run(fast_sweep(dict(seed=range(16)), m), tmp_path, batch_size=8)
    assert m.sizes[-1] == 8


@pytest.mark.parametrize('too_large, waiting, fits', [
    (True, ['ab', 'cd', 'e'], 2), (False, ['ab', 'cde'], 5)])
def test_halves(too_large, waiting, fits):
    parts = Parts('abcde')
    parts.halve(parts.take(), too_large)
    assert [''.join(p) for p in parts.waiting] == waiting and parts.fits == fits


# faces

class Reader:
    def __init__(self, folder): self.folder, self.seen = folder, []

    def best(self, photo, which):
        self.seen.append((photo, which))
        return f'{self.folder} {photo} {which}'


def test_faces_are_remembered_by_pack_and_contents():
    memory, a, b = FaceMemory(), Reader('a'), Reader('b')
    for r in (a, b, a): assert memory.read(r, b'1', 'largest') == f'{r.folder} {b"1"} largest'
    assert len(a.seen) == 1 == len(b.seen)


def test_another_choice_among_faces_is_another_face():
    memory, a = FaceMemory(), Reader('a')
    memory.read(a, b'1', 'largest')
    assert memory.read(a, b'1', 'left').endswith('left')
    assert memory.read(a, [b'1', b'2'], 'left')[1].startswith("a b'2'")


def test_faces_are_not_remembered_for_ever():
    memory, a = FaceMemory(most=64), Reader('a')
    for k in range(200): memory.read(a, str(k).encode())
    assert len(memory.faces) == 64


# executors

def test_a_model_put_together_by_hand_stays_here(tmp_path):
    with cf.ThreadPoolExecutor(1) as pool, pytest.raises(ArgumentError, match='put together by hand'):
        run(fast_sweep(AXES), tmp_path, executor=pool)


class Lost(cf.Executor):
    "Loses the first `n` batches that it is given."

    def __init__(self, n): self.n, self.given = n, 0

    def submit(self, f, *a, **k):
        out, self.given = cf.Future(), self.given + 1
        try:
            if self.given <= self.n: raise OSError('the network is gone')
            out.set_result(f(*a, **k))
        except Exception as e: out.set_exception(e)
        return out


def two_cells():
    her = render(sample_people(1, 201), seed=202, size=96, hat=None)[0].image
    fixed = dict(face=her, prompt='photo of a person in a red shirt, blue background', num_inference_steps=1)
    return Sweep('tiny-faceid', dict(seed=[0, 1]), fixed, load=dict(device='cpu'), measure=False)


def test_a_lost_batch_is_given_out_again(tmp_path):
    e = Lost(2)
    made = run(two_cells(), tmp_path, executor=e, batch_size=2)
    assert [c.state for c in made] == ['done']*2 and e.given == 3


def test_a_lost_batch_is_not_given_out_for_ever(tmp_path):
    e = Lost(9)
    made = run(two_cells(), tmp_path, executor=e, batch_size=2)
    assert [c.state for c in made] == ['failed']*2 and e.given == 3
    assert 'three workers: OSError: the network is gone' in made[0].error


class Refusing(cf.ThreadPoolExecutor):
    "Is dead when it is first asked, as a pool whose worker was killed between two batches."
    deaths = []

    def submit(self, *args):
        if self.deaths: raise self.deaths.pop()
        return super().submit(*args)


def test_a_batch_that_is_refused_is_not_lost(tmp_path):
    Refusing.deaths = [cf.BrokenExecutor('killed')]
    made = run(two_cells(), tmp_path, executor=lambda: Refusing(1), batch_size=1)
    assert sorted(c.number for c in made) == [0, 1] and {c.state for c in made} == {'done'}
