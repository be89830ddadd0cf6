"""FaceID: rows that stand for themselves, stopping, streaming, records, and refusals that leave the pipeline as it was."""
import json, os, threading, time
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
import helpers_pack as H
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.errors import ArgumentError, NoFaceError
from faceid_nb.face import Face
from faceid_nb.faceid import FaceID, clean_latents, find_people, pair_rows, read_record, save_png, step_by_step

FAST = dict(num_inference_steps=2)


@pytest.fixture(scope='module')
def me():
    pipe = H.pipeline()
    return FaceID(pipe, FaceIDAdapter.from_state(**H.adapter_state(pipe.unet), variant='faceid'), name='random', negative_prompt='ugly')


E = H.embedding(0, 4)
pixels = lambda images: np.stack([np.asarray(i, int) for i in images])
far = lambda a, b: np.abs(pixels(a) - pixels(b)).max()


# --- rows
@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 5), k=st.integers(1, 4), one_face=st.booleans(), one_prompt=st.booleans(), seed=st.integers(0, 2**40), per=st.sampled_from(['one', 'face', 'picture']))
def test_rows(n, k, one_face, one_prompt, seed, per):
    faces, prompts = [f'f{i}' for i in range(1 if one_face else n)], [f'p{i}' for i in range(1 if one_prompt else n)]
    m = max(len(faces), len(prompts))
    scale = {'one': .5, 'face': [i / 10 for i in range(m)], 'picture': [i / 100 for i in range(m * k)]}[per]
    rows = pair_rows(faces, prompts, 'neg', k, seed, scale)
    assert len(rows) == m * k
    for i, r in enumerate(rows):
        assert (r.person, r.sample, r.seed) == (i // k, i % k, seed + i % k)
        assert r.face == faces[0 if one_face else i // k] and r.prompt == prompts[0 if one_prompt else i // k] and r.negative_prompt == 'neg'
        if len({m, m * k, 1}) == 3: assert r.scale == {'one': .5, 'face': i // k / 10, 'picture': i / 100}[per]


def test_seeds():
    seeds = lambda s, n=2, k=2: [r.seed for r in pair_rows(list('ab')[:n], 'x', num_samples=k, seed=s)]
    assert seeds(7) == [7, 8, 7, 8] and seeds([7, 20]) == [7, 8, 20, 21] and seeds([1, 5, 9, 2]) == [1, 5, 9, 2] and seeds(np.int64(3)) == [3, 4, 3, 4]
    assert seeds([4], 1, 3) == [4, 5, 6]
    assert len({seeds(None)[0] for _ in range(8)}) > 1


@pytest.mark.parametrize('kw, says', [(dict(faces=[]), 'No face'), (dict(num_samples=0), 'num_samples'), (dict(num_samples=1.5), 'num_samples'), (dict(faces=list('abc'), prompt=list('xy')), '2 prompts and 3 faces'),
                                      (dict(prompt=[]), 'prompt'), (dict(prompt=[1]), 'prompt'), (dict(prompt=5), 'prompt|iterable'), (dict(scale=[1, 2, 3]), 'scale has 3'), (dict(scale=float('nan')), 'finite'), (dict(s_scale=float('inf')), 'finite'),
                                      (dict(seed=-1), 'negative'), (dict(seed=[1, 2, 3]), 'seed has 3'), (dict(negative_prompt=['a', 'b', 'c']), 'negative_prompt has 3')])
def test_rows_refused(kw, says):
    with pytest.raises((ArgumentError, TypeError), match=says): pair_rows(**{**dict(faces=['a', 'b'], prompt='x', num_samples=2), **kw})


# --- one row, alone and in any company
@pytest.mark.parametrize('guidance', [7.5, 1.0])
def test_a_picture_is_the_same_alone_and_in_any_batch(me, guidance):
    prompts, scales = ['a man', 'a woman, much longer prompt', '', 'x'], [.3, 0., 1.2, 1.]
    batch = me.generate(E, prompts, num_samples=2, seed=5, scale=scales, guidance_scale=guidance, **FAST)
    assert len({i.tobytes() for i in batch}) == 8
    for size in (1, 3, 8):
        assert far(batch, me.generate(E, prompts, num_samples=2, seed=5, scale=scales, guidance_scale=guidance, batch_size=size, **FAST)) <= 1
    for i in (0, 3):
        alone = me.generate(E[i], prompts[i], num_samples=2, seed=5, scale=scales[i], guidance_scale=guidance, **FAST)
        assert far(alone, batch[2 * i:2 * i + 2]) <= 1
    second = me.generate(E[1], prompts[1], num_samples=1, seed=6, scale=scales[1], guidance_scale=guidance, **FAST)
    assert far(second, batch[3:4]) <= 1


def test_everything_matters(me):
    base = dict(face=E[0], prompt='a', num_samples=1, seed=1, scale=1., **FAST)
    one = me.generate(**base)
    for change in (dict(face=E[1]), dict(prompt='b'), dict(seed=2), dict(scale=.5), dict(guidance_scale=3.), dict(negative_prompt='z'), dict(num_inference_steps=3), dict(start=.5), dict(layers={'up': 0})):
        assert far(one, me.generate(**{**base, **change})) > 0, change
    assert far(one, me.generate(**base)) == 0


def test_scale_per_picture(me):
    a = me.generate(E[:2], 'a', num_samples=2, seed=[3, 3, 3, 3], scale=[0., 1., 0., 1.], **FAST)
    assert far(a[0:1], a[2:3]) <= 1 and far(a[1:2], a[3:4]) > 1 and far(a[0:1], a[1:2]) > 1  # at 0 nobody's identity is read


def test_several_photographs_of_one_person(me):
    mean = torch.nn.functional.normalize(E[0] + E[1], dim=0)
    got = me.generate([[E[0], E[1]], E[2]], 'a', num_samples=1, seed=1, **FAST)
    assert len(got) == 2 and far(got[:1], me.generate(mean, 'a', num_samples=1, seed=1, **FAST)) <= 1


def test_other_outputs(me):
    latents = me.generate(E[:2], 'a', num_samples=2, seed=1, output_type='latent', **FAST)
    assert len(latents) == 4 and latents[0].shape == (8, 16, 16)
    assert me.generate(E[0], 'a', num_samples=1, width=48, height=64, **FAST)[0].size == (48, 64)
    assert me.generate(E[0], num_samples=1, **FAST)[0].info['faceid_nb']['prompt'] == 'best quality, high quality'


def test_pipelines_that_take_pictures(me):
    from diffusers import StableDiffusionImg2ImgPipeline
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(me.pipe)
    pipe.set_progress_bar_config(disable=True)
    other = FaceID(pipe, FaceIDAdapter.from_state(**H.adapter_state(pipe.unet), variant='faceid'))
    image = Image.new('RGB', (64, 64), 'red')
    blue = Image.new('RGB', (64, 64), 'blue')
    both = other.generate(E[:2], 'a', num_samples=1, seed=1, image=[image, blue], strength=.5, num_inference_steps=4)
    one = other.generate(E[:2], 'a', num_samples=1, seed=1, image=[image, blue], strength=.5, num_inference_steps=4, batch_size=1)
    assert far(both, one) <= 1
    assert far(both[:1], other.generate(E[0], 'a', num_samples=1, seed=1, image=image, strength=.5, num_inference_steps=4)) <= 1
    before = me.generate(E[0], 'a', num_samples=1, seed=1, **FAST)  # the first one takes the shared UNet back
    assert far(before, me.generate(E[0], 'a', num_samples=1, seed=1, **FAST)) == 0


# --- progress, streaming, stopping
def test_steps_and_callbacks(me):
    steps, theirs = [], []
    def callback(pipe, i, t, tensors):
        theirs.append(i)
        return tensors
    images = me.generate(E[:3], 'a', num_samples=1, seed=1, batch_size=2, on_step=steps.append, callback_on_step_end=callback, num_inference_steps=3)
    assert [s.done for s in steps] == [1, 2, 3, 3, 4, 5, 6, 6] and all(s.total == 6 for s in steps) and theirs == [0, 1, 2] * 2
    assert [len(s.images) for s in steps] == [0, 0, 0, 2, 2, 2, 2, 3] and steps[-1].images == images and len(steps[4].rows) == 1
    assert steps[0].latents.shape == (2, 8, 16, 16) and len(steps[0].preview()) == 2 and steps[-1].preview() == []


def test_last_preview_is_the_picture(me):
    steps = []
    images = me.generate(E[:2], 'a', num_samples=1, seed=1, on_step=steps.append, num_inference_steps=4)
    assert far(steps[3].preview(), images) <= 40  # clean latents, not the sampler's last ones, which keep a trace of noise


@pytest.mark.parametrize('final_one', [False, True])
def test_clean_latents_are_exact(final_one):
    from diffusers import DDIMScheduler
    s = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=final_one, steps_offset=1)
    s.set_timesteps(5)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    for i, t in enumerate(s.timesteps):
        out = s.step(torch.randn_like(x), t, x)
        assert (clean_latents(s, i, x, out.prev_sample) - out.pred_original_sample).abs().max() < 1e-5 * out.pred_original_sample.abs().max()
        x = out.prev_sample
    assert clean_latents(object(), 0, x, x) is x and clean_latents(s, 0, None, x) is x


def test_stream_is_generate(me):
    want = me.generate(E[:3], 'a', num_samples=1, seed=1, batch_size=2, **FAST)
    steps = list(me.stream(E[:3], 'a', num_samples=1, seed=1, batch_size=2, **FAST))
    assert far(steps[-1].images, want) == 0 and [s.done for s in steps] == [1, 2, 2, 3, 4, 4]


def test_stream_waits_for_its_reader(me):
    work = []
    def callback(pipe, i, t, tensors):
        work.append(i)
        return tensors
    stream = me.stream(E[0], 'a', num_samples=1, seed=1, num_inference_steps=5, callback_on_step_end=callback)
    next(stream)
    time.sleep(.3)
    assert work == [0]
    next(stream)
    assert work == [0, 1]
    stream.close()


def test_leaving_a_stream_frees_the_pipeline(me):
    work = []
    def callback(pipe, i, t, tensors):
        work.append(i)
        return tensors
    for step in me.stream(E[0], 'a', num_samples=1, seed=1, num_inference_steps=50, callback_on_step_end=callback):
        if step.done == 2: break
    del step  # nobody holds the generator any more
    assert len(work) <= 3 and me.adapter.at.active is None and not [t for t in threading.enumerate() if t.name == 'faceid_nb stream']
    assert len(me.generate(E[0], 'a', num_samples=1, **FAST)) == 1


def test_stop_keeps_what_is_finished(me):
    def on_step(step):
        if step.done == 3: me.stop()
    seen = []
    images = me.generate(E, 'a', num_samples=1, seed=1, batch_size=1, on_step=lambda s: (seen.append(s.done), on_step(s)), num_inference_steps=2)
    assert len(images) == 1 and me.stopped and max(seen) == 3 and me.adapter.at.active is None
    assert far(images, me.generate(E[0], 'a', num_samples=1, seed=1, num_inference_steps=2)) <= 1 and not me.stopped


def test_stop_from_another_thread(me):
    got, begun = [], threading.Event()
    thread = threading.Thread(target=lambda: got.append(me.generate(E[0], 'a', num_samples=1, num_inference_steps=900, on_step=lambda s: begun.set())))
    thread.start()
    assert begun.wait(60)
    with pytest.raises(ArgumentError, match='already generating'): me.generate(E[0], 'a', **FAST)
    me.stop()
    thread.join(60)
    assert not thread.is_alive() and got == [[]]
    assert len(me.generate(E[0], 'a', num_samples=1, **FAST)) == 1


def test_errors_come_through_a_stream(me):
    with pytest.raises(ArgumentError, match='scale has 3'): list(me.stream(E[:2], 'a', scale=[1, 2, 3]))
    with pytest.raises(ZeroDivisionError): list(step_by_step(lambda on_step: 1 / 0, threading.Event()))
    assert len(me.generate(E[0], 'a', num_samples=1, **FAST)) == 1


def test_an_error_in_the_middle_leaves_the_pipeline(me):
    want = me.generate(E[0], 'a', num_samples=1, seed=1, **FAST)
    def fail(pipe, i, t, tensors): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): me.generate(E[1], 'b', num_samples=2, callback_on_step_end=fail, **FAST)
    assert me.adapter.at.active is None and far(want, me.generate(E[0], 'a', num_samples=1, seed=1, **FAST)) == 0
    with pytest.raises(ArgumentError, match='Perhaps num_inference_steps'): me.generate(E[0], 'a', num_inference_step=1)
    with pytest.raises(ArgumentError, match='Use num_samples'): me.generate(E[0], 'a', num_images_per_prompt=2, **FAST)
    with pytest.raises(ArgumentError, match='num_inference_steps'): me.generate(E[0], 'a', num_inference_steps=0)
    with pytest.raises(ArgumentError): me.generate(E[0], 'a', start=.9, end=.1, **FAST)
    assert far(want, me.generate(E[0], 'a', num_samples=1, seed=1, **FAST)) == 0


# --- whose face
class Reader:
    name = 'tiny'
    def best(self, image, which='largest'):
        if isinstance(image, str) and image == 'nobody.jpg': raise NoFaceError('No face was found in nobody.jpg')
        return Face(E[{'largest': 0, 'left': 1}[which]].numpy(), pack='tiny')


def test_people_in_every_form():
    find = lambda f, **kw: find_people(f, Reader(), 512, **kw)
    same = lambda got, want: torch.equal(torch.as_tensor(got), torch.as_tensor(want))
    assert same(find('a.jpg')[0].embedding, E[0]) and same(find('a.jpg', which='left')[0].embedding, E[1])
    assert same(find(Image.new('RGB', (9, 9)))[0].embedding, E[0]) and same(find(np.zeros((9, 9, 3), np.uint8))[0].embedding, E[0])
    assert same(find(E[1])[0], E[1]) and len(find(E)) == 4 and same(find(E.numpy())[2], E[2]) and same(find(E[:1].double())[0], E[0])
    many = find(['a.jpg', E[1], Face(E[2].numpy(), pack='tiny'), ['a.jpg', E[3]]])
    assert len(many) == 4 and same(many[2].embedding, E[2]) and len(many[3]) == 2
    assert same(find(np.zeros((300, 512), np.uint8))[0].embedding, E[0])  # a grey picture as wide as an embedding is a picture
    with pytest.raises(ArgumentError, match='another recogniser'): find(Face(E[2].numpy(), pack='judge'))
    with pytest.raises(NoFaceError): find(['a.jpg', 'nobody.jpg'])
    with pytest.raises(ArgumentError, match='no face reader'): find_people('a.jpg')


# --- records
def test_records(me, tmp_path):
    images = me.generate(E[:2], ['a', 'ü "q"\n二'], num_samples=2, seed=4, scale=[.5, 1.], guidance_scale=3., width=48, eta=0., **FAST)
    r = images[3].info['faceid_nb']
    assert {k: r[k] for k in ('model', 'prompt', 'negative_prompt', 'seed', 'scale', 'steps', 'guidance_scale', 'person', 'sample', 'width', 'scheduler')} == dict(
        model='random', prompt='ü "q"\n二', negative_prompt='ugly', seed=5, scale=1., steps=2, guidance_scale=3., person=1, sample=1, width=48, scheduler='DDIMScheduler')
    path = save_png(images[3], tmp_path / 'new' / 'p.png', likeness=.5)
    assert read_record(path) == {**r, 'likeness': .5} and np.array_equal(np.asarray(Image.open(path)), np.asarray(images[3])) and os.listdir(tmp_path / 'new') == ['p.png']
    again = me.generate(E[1], r['prompt'], num_samples=1, seed=r['seed'], scale=r['scale'], guidance_scale=3., width=r['width'], **FAST)
    assert far(again, images[3:]) <= 1
    Image.new('RGB', (4, 4)).save(tmp_path / 'bare.png')
    assert read_record(tmp_path / 'bare.png') == {}


def test_record_holds_no_face(me):
    text = json.dumps(me.generate(E[0], 'a', num_samples=1, **FAST)[0].info)
    assert 'embedding' not in text and len(text) < 600


def test_save_is_all_or_nothing(me, tmp_path):
    image = me.generate(E[0], 'a', num_samples=1, **FAST)[0]
    save_png(image, tmp_path / 'p.png')
    before = (tmp_path / 'p.png').read_bytes()
    with pytest.raises(TypeError): save_png(image, tmp_path / 'p.png', likeness=object())
    class Broken(Image.Image):
        info = {}
        def save(self, path, *a, **k):
            open(path, 'wb').write(b'half')
            raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'): save_png(Broken(), tmp_path / 'p.png')
    assert (tmp_path / 'p.png').read_bytes() == before and os.listdir(tmp_path) == ['p.png']


def test_describes_itself(me): assert repr(me) == 'FaceID(random: StableDiffusionPipeline on cpu, float32)'
