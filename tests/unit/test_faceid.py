"FaceID: rows that stand for themselves, stopping, streaming, records; a refusal leaves the pipeline alone."
import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from hypothesis import given, settings, strategies as st
from PIL import Image

import helpers_pack as H
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.errors import ArgumentError
from faceid_nb.face import Face
from faceid_nb.faceid import FaceID, clean_latents, pair_rows, step_by_step
from faceid_nb.files import read_record, save_png
from faceid_nb.hub import DDIM

FAST = dict(num_inference_steps=2)
E = H.embedding(0, 4)


def with_random_weights(pipe, **more):
    adapter = FaceIDAdapter.from_state(**H.adapter_state(pipe.unet), variant='faceid')
    return FaceID(pipe, adapter, **more)


@pytest.fixture(scope='module')
def me(): return with_random_weights(H.pipeline(), name='random', negative_prompt='ugly')


def pixels(images): return np.stack([np.asarray(i, int) for i in images])


def far(a, b): return np.abs(pixels(a) - pixels(b)).max()


# --- rows
@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 5), k=st.integers(1, 4), one_face=st.booleans(), one_prompt=st.booleans(),
       seed=st.integers(0, 2**40), per=st.sampled_from(['one', 'face', 'picture']))
def test_rows(n, k, one_face, one_prompt, seed, per):
    faces = [f'f{i}' for i in range(1 if one_face else n)]
    prompts = [f'p{i}' for i in range(1 if one_prompt else n)]
    m = max(len(faces), len(prompts))
    scale = {'one': .5, 'face': [i / 10 for i in range(m)], 'picture': [i / 100 for i in range(m * k)]}[per]
    rows = pair_rows(faces, prompts, 'neg', k, seed, scale)
    assert len(rows) == m * k
    for i, r in enumerate(rows):
        assert (r.person, r.sample, r.seed) == (i // k, i % k, seed + i % k)
        assert r.face == faces[0 if one_face else i // k] and r.prompt == prompts[0 if one_prompt else i // k]
        assert r.negative_prompt == 'neg'
        if len({m, m * k, 1}) < 3: continue  # which of the three it is cannot be told
        assert r.scale == {'one': .5, 'face': i // k / 10, 'picture': i / 100}[per]


@pytest.mark.parametrize('seed, n, k, expected', [
    (7, 2, 2, [7, 8, 7, 8]), ([7, 20], 2, 2, [7, 8, 20, 21]), ([1, 5, 9, 2], 2, 2, [1, 5, 9, 2]),
    (np.int64(3), 2, 2, [3, 4, 3, 4]), ([4], 1, 3, [4, 5, 6])])
def test_seeds(seed, n, k, expected):
    assert [r.seed for r in pair_rows(list('ab')[:n], 'x', num_samples=k, seed=seed)] == expected


def test_seeds_are_drawn_where_none_is_given():
    assert len({pair_rows(['a'], 'x')[0].seed for _ in range(8)}) > 1


@pytest.mark.parametrize('wrong, says', [
    (dict(faces=[]), 'No face'), (dict(num_samples=0), 'num_samples'), (dict(num_samples=1.5), 'num_samples'),
    (dict(faces=list('abc'), prompt=list('xy')), '2 prompts and 3 faces'), (dict(prompt=[]), 'prompt'),
    (dict(prompt=[1]), 'prompt'), (dict(prompt=5), 'prompt|iterable'), (dict(scale=[1, 2, 3]), 'scale has 3'),
    (dict(scale=float('nan')), 'finite'), (dict(s_scale=float('inf')), 'finite'), (dict(seed=-1), 'negative'),
    (dict(seed=[1, 2, 3]), 'seed has 3'), (dict(negative_prompt=['a', 'b', 'c']), 'negative_prompt has 3')])
def test_rows_refused(wrong, says):
    given = dict(faces=['a', 'b'], prompt='x', num_samples=2) | wrong
    with pytest.raises((ArgumentError, TypeError), match=says): pair_rows(**given)


# --- one row, alone and in any company
@pytest.mark.parametrize('guidance', [7.5, 1.0])
def test_a_picture_is_the_same_alone_and_in_any_batch(me, guidance):
    prompts, scales = ['a man', 'a woman, much longer prompt', '', 'x'], [.3, 0., 1.2, 1.]
    call = dict(guidance_scale=guidance, **FAST)
    batch = me.generate(E, prompts, num_samples=2, seed=5, scale=scales, **call)
    assert len({i.tobytes() for i in batch}) == 8
    for size in (1, 3, 8):
        split = me.generate(E, prompts, num_samples=2, seed=5, scale=scales, batch_size=size, **call)
        assert far(batch, split) <= 1
    for i in (0, 3):
        alone = me.generate(E[i], prompts[i], num_samples=2, seed=5, scale=scales[i], **call)
        assert far(alone, batch[2 * i:2 * i + 2]) <= 1
    second = me.generate(E[1], prompts[1], num_samples=1, seed=6, scale=scales[1], **call)
    assert far(second, batch[3:4]) <= 1


BASE = dict(face=E[0], prompt='a', num_samples=1, seed=1, scale=1., **FAST)
CHANGES = [dict(face=E[1]), dict(prompt='b'), dict(seed=2), dict(scale=.5), dict(guidance_scale=3.),
           dict(negative_prompt='z'), dict(num_inference_steps=3), dict(start=.5), dict(layers={'up': 0})]


@pytest.fixture(scope='module')
def base_picture(me): return me.generate(**BASE)


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: ' '.join(change))
def test_everything_matters(me, base_picture, change):
    assert far(base_picture, me.generate(**BASE | change)) > 0


def test_the_same_call_gives_the_same_picture(me, base_picture):
    assert far(base_picture, me.generate(**BASE)) == 0


def test_scale_per_picture(me):
    a = me.generate(E[:2], 'a', num_samples=2, seed=[3, 3, 3, 3], scale=[0., 1., 0., 1.], **FAST)
    assert far(a[0:1], a[2:3]) <= 1 and far(a[1:2], a[3:4]) > 1   # at 0 nobody's identity is read
    assert far(a[0:1], a[1:2]) > 1


def test_several_photographs_of_one_person(me):
    mean = torch.nn.functional.normalize(E[0] + E[1], dim=0)
    got = me.generate([[E[0], E[1]], E[2]], 'a', num_samples=1, seed=1, **FAST)
    assert len(got) == 2 and far(got[:1], me.generate(mean, 'a', num_samples=1, seed=1, **FAST)) <= 1


def test_latents(me):
    latents = me.generate(E[:2], 'a', num_samples=2, seed=1, output_type='latent', **FAST)
    assert len(latents) == 4 and latents[0].shape == (8, 16, 16)


def test_another_size(me):
    assert me.generate(E[0], 'a', num_samples=1, width=48, height=64, **FAST)[0].size == (48, 64)


def test_the_default_prompt_is_the_originals(me):
    image = me.generate(E[0], num_samples=1, **FAST)[0]
    assert image.info['faceid_nb']['prompt'] == 'best quality, high quality'


@pytest.fixture
def repainter(me):
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(me.pipe)
    pipe.set_progress_bar_config(disable=True)
    return with_random_weights(pipe)


def test_pipelines_that_take_pictures(me, repainter):
    red, blue = (Image.new('RGB', (64, 64), colour) for colour in ('red', 'blue'))
    call = dict(prompt='a', num_samples=1, seed=1, strength=.5, num_inference_steps=4)
    both = repainter.generate(E[:2], image=[red, blue], **call)
    assert far(both, repainter.generate(E[:2], image=[red, blue], batch_size=1, **call)) <= 1
    assert far(both[:1], repainter.generate(E[0], image=red, **call)) <= 1


def test_the_first_pipeline_takes_a_shared_unet_back(me, repainter):
    call = dict(face=E[0], prompt='a', num_samples=1, seed=1, **FAST)
    repainter.generate(**call | dict(image=Image.new('RGB', (64, 64), 'red')))
    before = me.generate(**call)
    assert far(before, me.generate(**call)) == 0


# --- progress, streaming, stopping
class Heard:
    "A pipeline's callback that notes its steps."
    def __init__(self): self.steps = []

    def __call__(self, pipe, i, t, tensors):
        self.steps.append(i)
        return tensors


def test_steps_and_callbacks(me):
    steps, theirs = [], Heard()
    images = me.generate(E[:3], 'a', num_samples=1, seed=1, batch_size=2, on_step=steps.append,
                         callback_on_step_end=theirs, num_inference_steps=3)
    assert [s.done for s in steps] == [1, 2, 3, 3, 4, 5, 6, 6] and all(s.total == 6 for s in steps)
    assert theirs.steps == [0, 1, 2] * 2
    assert [len(s.images) for s in steps] == [0, 0, 0, 2, 2, 2, 2, 3] and steps[-1].images == images
    assert len(steps[4].rows) == 1 and steps[0].latents.shape == (2, 8, 16, 16)
    assert len(steps[0].preview()) == 2 and steps[-1].preview() == []


def test_last_preview_is_the_picture(me):
    steps = []
    images = me.generate(E[:2], 'a', num_samples=1, seed=1, on_step=steps.append, num_inference_steps=4)
    # clean latents, not the sampler's last ones, which keep a trace of noise
    assert far(steps[3].preview(), images) <= 40


@pytest.mark.parametrize('final_one', [False, True])
def test_clean_latents_are_exact(final_one):
    s = DDIMScheduler(**DDIM | dict(set_alpha_to_one=final_one))
    s.set_timesteps(5)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    for i, t in enumerate(s.timesteps):
        out = s.step(torch.randn_like(x), t, x)
        error = clean_latents(s, i, x, out.prev_sample) - out.pred_original_sample
        assert error.abs().max() < 1e-5 * out.pred_original_sample.abs().max()
        x = out.prev_sample


def test_where_clean_latents_are_not_known():
    x = torch.zeros(1)
    assert clean_latents(object(), 0, x, x) is x and clean_latents(DDIMScheduler(), 0, None, x) is x


def test_stream_is_generate(me):
    call = dict(num_samples=1, seed=1, batch_size=2, **FAST)
    steps = list(me.stream(E[:3], 'a', **call))
    assert far(steps[-1].images, me.generate(E[:3], 'a', **call)) == 0
    assert [s.done for s in steps] == [1, 2, 2, 3, 4, 4]


def test_stream_waits_for_its_reader(me):
    heard = Heard()
    stream = me.stream(E[0], 'a', num_samples=1, seed=1, num_inference_steps=5, callback_on_step_end=heard)
    next(stream)
    time.sleep(.3)
    assert heard.steps == [0]
    next(stream)
    assert heard.steps == [0, 1]
    stream.close()


def test_leaving_a_stream_frees_the_pipeline(me):
    heard = Heard()
    call = dict(num_samples=1, seed=1, num_inference_steps=50, callback_on_step_end=heard)
    for step in me.stream(E[0], 'a', **call):
        if step.done == 2: break
    del step  # nobody holds the generator any more
    assert len(heard.steps) <= 3 and me.adapter.at.active is None
    assert not [t for t in threading.enumerate() if t.name == 'faceid_nb stream']
    assert len(me.generate(E[0], 'a', num_samples=1, **FAST)) == 1


def test_stop_keeps_what_is_finished(me):
    seen = []
    def on_step(step):
        seen.append(step.done)
        if step.done == 3: me.stop()
    call = dict(prompt='a', num_samples=1, seed=1, num_inference_steps=2)
    images = me.generate(E, batch_size=1, on_step=on_step, **call)
    assert len(images) == 1 and me.stopped and max(seen) == 3 and me.adapter.at.active is None
    assert far(images, me.generate(E[0], **call)) <= 1 and not me.stopped


def test_stop_from_another_thread(me):
    got, begun = [], threading.Event()
    def work():
        call = dict(num_samples=1, num_inference_steps=900, on_step=lambda step: begun.set())
        got.append(me.generate(E[0], 'a', **call))
    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    with pytest.raises(ArgumentError, match='already generating'): me.generate(E[0], 'a', **FAST)
    me.stop()
    thread.join(60)
    assert not thread.is_alive() and got == [[]]
    assert len(me.generate(E[0], 'a', num_samples=1, **FAST)) == 1


class Slow:
    "A reader of photographs who takes his time: `meanwhile` is called."
    folder, name = None, 'slow'

    def __init__(self, meanwhile): self.meanwhile = meanwhile

    def best(self, photo, which='largest'):
        self.meanwhile()
        return Face(np.asarray(E[0]))


@pytest.fixture
def photograph(): return Image.new('RGB', (8, 8))


def test_stop_is_heard_while_a_photograph_is_read(me, monkeypatch, photograph):
    seen = []
    monkeypatch.setattr(me, 'reader', Slow(me.stop))
    assert me.generate(photograph, 'a', on_step=seen.append, **FAST) == [] and me.stopped and not seen
    monkeypatch.setattr(me, 'reader', Slow(lambda: None))
    assert len(me.generate(photograph, 'a', num_samples=1, **FAST)) == 1 and not me.stopped


def test_a_second_call_leaves_the_stop_of_the_first(me, monkeypatch, photograph):
    def meanwhile():
        me.stop()
        with pytest.raises(ArgumentError, match='already generating'): me.generate(E[0], 'a', **FAST)
    monkeypatch.setattr(me, 'reader', Slow(meanwhile))
    assert me.generate(photograph, 'a', **FAST) == [] and me.stopped


def test_stop_between_two_batches_begins_no_other(me):
    seen = []
    def on_step(step):
        seen.append(step.done)
        if step.images: me.stop()
    assert len(me.generate(E[:2], 'a', num_samples=1, batch_size=1, on_step=on_step, **FAST)) == 1
    assert seen == [1, 2, 2]   # the last one tells of the picture


def test_the_end_of_a_stream_stops_nobody_else():
    stop = threading.Event()
    def work(on_step): on_step(1)
    assert list(step_by_step(work, stop)) == [1] and not stop.is_set()
    with pytest.raises(ZeroDivisionError): list(step_by_step(lambda on_step: 1 / 0, stop))
    assert not stop.is_set()


def test_errors_come_through_a_stream(me):
    with pytest.raises(ArgumentError, match='scale has 3'): list(me.stream(E[:2], 'a', scale=[1, 2, 3]))
    with pytest.raises(ZeroDivisionError): list(step_by_step(lambda on_step: 1 / 0, threading.Event()))
    assert len(me.generate(E[0], 'a', num_samples=1, **FAST)) == 1


def test_an_error_in_the_middle_leaves_the_pipeline(me, base_picture):
    def fail(pipe, i, t, tensors): raise KeyboardInterrupt
    call = dict(num_samples=2, callback_on_step_end=fail, **FAST)
    with pytest.raises(KeyboardInterrupt): me.generate(E[1], 'b', **call)
    assert me.adapter.at.active is None and far(base_picture, me.generate(**BASE)) == 0


@pytest.mark.parametrize('wrong, says', [
    (dict(num_inference_step=1), 'Perhaps num_inference_steps'),
    (dict(num_images_per_prompt=2), 'Use num_samples'),
    (dict(num_inference_steps=0), 'num_inference_steps'), (dict(start=.9, end=.1), 'in order')])
def test_a_refusal_leaves_the_pipeline(me, base_picture, wrong, says):
    with pytest.raises(ArgumentError, match=says): me.generate(E[0], 'a', **FAST | wrong)
    assert far(base_picture, me.generate(**BASE)) == 0


def test_a_photograph_without_a_reader(me):
    with pytest.raises(ArgumentError, match='no face reader'): me.generate('a.jpg', 'a', **FAST)


# --- records
@pytest.fixture(scope='module')
def recorded(me):
    call = dict(num_samples=2, seed=4, scale=[.5, 1.], guidance_scale=3., width=48, eta=0., **FAST)
    return me.generate(E[:2], ['a', 'ü "q"\n二'], **call)


def test_records(recorded):
    r = recorded[3].info['faceid_nb']
    expected = dict(model='random', prompt='ü "q"\n二', negative_prompt='ugly', seed=5, scale=1., steps=2,
                    guidance_scale=3., person=1, sample=1, width=48, scheduler='DDIMScheduler')
    assert {k: r[k] for k in expected} == expected


def test_a_record_survives_its_file(recorded, tmp_path):
    path = save_png(recorded[3], tmp_path / 'new' / 'p.png', likeness=.5)
    assert read_record(path) == {**recorded[3].info['faceid_nb'], 'likeness': .5}
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(recorded[3]))
    assert os.listdir(tmp_path / 'new') == ['p.png']


def test_a_record_makes_the_picture_again(me, recorded):
    r = recorded[3].info['faceid_nb']
    again = me.generate(E[1], r['prompt'], num_samples=1, seed=r['seed'], scale=r['scale'],
                        guidance_scale=3., width=r['width'], **FAST)
    assert far(again, recorded[3:]) <= 1


def test_a_picture_of_somebody_else_has_no_record(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'bare.png')
    assert read_record(tmp_path / 'bare.png') == {}


def test_record_holds_no_face(me):
    text = json.dumps(me.generate(E[0], 'a', num_samples=1, **FAST)[0].info)
    assert 'embedding' not in text and len(text) < 600


class Broken(Image.Image):
    "A picture that fills the disk."
    info = {}

    def save(self, path, *a, **k):
        with open(path, 'wb') as f: f.write(b'half')
        raise OSError('disk full')


def test_save_is_all_or_nothing(recorded, tmp_path):
    save_png(recorded[0], tmp_path / 'p.png')
    before = (tmp_path / 'p.png').read_bytes()
    with pytest.raises(TypeError): save_png(recorded[0], tmp_path / 'p.png', likeness=object())
    with pytest.raises(OSError, match='disk full'): save_png(Broken(), tmp_path / 'p.png')
    assert (tmp_path / 'p.png').read_bytes() == before and os.listdir(tmp_path) == ['p.png']


def test_describes_itself(me):
    assert repr(me) == 'FaceID(random: StableDiffusionPipeline on cpu, float32)'
