"""The adapter on whole pipelines: golden cases, rows, guidance, restoring."""
import itertools
import pytest, torch
from diffusers import (ControlNetModel, SemanticStableDiffusionPipeline, StableDiffusionControlNetPipeline,
                       StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
                       StableDiffusionInstructPix2PixPipeline, StableDiffusionPAGPipeline,
                       StableDiffusionPanoramaPipeline, StableDiffusionPipeline, StableDiffusionSAGPipeline,
                       UNet2DConditionModel)
from transformers import CLIPImageProcessor
import goldens_build as G
from faceid_nb import checkpoint as C
from faceid_nb.adapter import FaceIDAdapter, face_embeddings
from faceid_nb.errors import ArgumentError, BaseModelError, GuidanceError, LoRAError
from faceid_nb.face import Face
from faceid_nb.lora import LoRA


@pytest.fixture(scope='module')
def pipe(): return G.pipeline('sd')
@pytest.fixture(scope='module')
def pipe_xl(): return G.pipeline('sdxl')

def structure_of(image):
    "The states of a crop, and of an empty picture, the way the original makes them."
    x = CLIPImageProcessor()(image, return_tensors='pt').pixel_values
    encoder = G.image_encoder()
    with torch.no_grad():
        own, nobody = (encoder(t, output_hidden_states=True).hidden_states[-2]
                       for t in (x, torch.zeros_like(x)))
    return dict(structure=own, negative_structure=nobody)


def golden_adapter(case, folder):
    "Read from files, as somebody would who has them."
    lora = case['lora'] and G.write_checkpoint(case['lora'], folder)
    variant = None
    if case['face_image']: variant = 'plusv2' if case['call'].get('shortcut') else 'plus'
    return FaceIDAdapter.from_file(G.write_checkpoint(case['checkpoint'], folder), lora=lora, variant=variant)


def run_golden(pipe, name, folder):
    "One golden case through attach and condition, the way FaceID.generate does it: the largest difference"
    case = G.case(name)
    call = {'guidance_scale': 7.5, **case['call']}
    embeds, image = G.inputs(name)
    n, k = (1 if embeds.ndim == 3 else len(embeds)), call.pop('num_samples')
    call.pop('shortcut', None)
    knobs = {knob: call.pop(knob) for knob in ('scale', 's_scale') if knob in call}
    if image: knobs |= structure_of(image)
    prompts = dict(prompt=[call.pop('prompt')] * n, negative_prompt=[call.pop('negative_prompt')] * n)
    g = torch.Generator('cpu').manual_seed(call.pop('seed'))
    adapter = golden_adapter(case, folder).attach(pipe)
    try:
        with adapter.condition(embeds, num_images_per_prompt=k, **knobs):
            out = pipe(**prompts, num_images_per_prompt=k, generator=g, **call).images
    finally: adapter.detach()
    return dist(out, G.expected()[name])


SD = [n for n, c in G.CASES.items() if c['pipeline'] == 'sd']
@pytest.mark.parametrize('name', SD)
def test_golden_sd(pipe, tmp_path, name): assert run_golden(pipe, name, tmp_path) < G.TOLERANCE
@pytest.mark.parametrize('name', [n for n in G.CASES if n not in SD])
def test_golden_sdxl(pipe_xl, tmp_path, name): assert run_golden(pipe_xl, name, tmp_path) < G.TOLERANCE

# --- whole pipelines

E = torch.nn.functional.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
CKPT = 'ip-adapter-faceid_sd15.bin'
def gens(*seeds): return [torch.Generator().manual_seed(s) for s in seeds]
SMALL = dict(width=32, height=32, output_type='latent')


def draw(pipe, prompts, seeds, gs=7.5, steps=2, k=1, **kw):
    return pipe(prompts, generator=gens(*seeds), num_inference_steps=steps, guidance_scale=gs,
                num_images_per_prompt=k, **SMALL, **kw).images


def dist(a, b): return (a - b).abs().max().item()
def snapshot(unet):
    weights = {k: v.detach().clone() for k, v in unet.named_parameters()}
    return weights, dict(unet.attn_processors), len(unet._forward_pre_hooks)


def same(unet, snap):
    state, procs, hooks = snap
    now = dict(unet.named_parameters())
    weights = now.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in now.items())
    no_hooks = len(unet._forward_pre_hooks) == hooks and not any(m._forward_hooks for m in unet.modules())
    return weights and procs == dict(unet.attn_processors) and no_hooks

@pytest.fixture
def adapter(pipe):
    a = FaceIDAdapter.from_state(**G.state(CKPT))
    yield a
    a.detach()

def test_attach_and_detach_restore_bit_for_bit(pipe, adapter):
    snap, bare = snapshot(pipe.unet), draw(pipe, ['a'], [1])
    for kw in (dict(), dict(fold=False), dict(sdpa=False), dict(lora_weight=.5)):
        adapter.attach(pipe, **kw)
        assert adapter.attached and not same(pipe.unet, snap)
        with adapter.condition(E[0]): assert dist(draw(pipe, ['a'], [1]), bare) > .01
        adapter.detach()
        assert same(pipe.unet, snap) and not adapter.attached
    assert torch.equal(draw(pipe, ['a'], [1]), bare)
    adapter.detach()   # twice is fine

def two(pipe): return draw(pipe, ['a', 'b'], [1, 2])


def test_off_is_the_bare_pipeline(pipe, adapter):
    bare = two(pipe)
    adapter.attach(pipe, lora_weight=0)
    assert torch.equal(two(pipe), bare)                                      # attached, no condition
    with adapter.condition(E[:2], scale=0): assert torch.equal(two(pipe), bare)
    adapter.lora_weight = 1
    folded = two(pipe)
    assert dist(folded, bare) > .01
    with adapter.condition(E[:2]): assert dist(two(pipe), folded) > .01
    assert torch.equal(two(pipe), folded)                                    # the block leaves nothing behind
    with adapter.condition(E[:2], layers={'down': 0, 'mid': 0, 'up': 0}): assert dist(two(pipe),
                                                                                      folded) < 1e-4


@pytest.mark.parametrize('knobs', [
    dict(start=0, end=1), dict(layers={}), dict(layers={'down': 1., 'mid': 1, 'up': 1}), dict(record=True),
    dict(negative=torch.zeros(1, 512)), dict(guidance=2), dict(scale=[1, 1])])
def test_neutral_knobs_are_exactly_neutral(pipe, adapter, knobs):
    adapter.attach(pipe)
    with adapter.condition(E[:2]): full = two(pipe)
    with adapter.condition(E[:2], **knobs): assert torch.equal(two(pipe), full)


@pytest.mark.parametrize('gs', [7.5, 1.0])
def test_every_row_stands_for_itself(pipe, adapter, gs):
    adapter.attach(pipe)
    prompts, seeds, scale = ['a', 'bb', 'c c'], [1, 2, 3], [.3, 1., 1.7]
    with adapter.condition(E[:3], scale=scale): batch = draw(pipe, prompts, seeds, gs)
    for i in range(3):
        with adapter.condition(E[i], scale=scale[i]): alone = draw(pipe, [prompts[i]], [seeds[i]], gs)
        assert dist(alone, batch[i:i + 1]) < G.TOLERANCE
    assert min(dist(a, b) for a, b in itertools.combinations(batch, 2)) > .1

@pytest.mark.parametrize('gs', [7.5, 1.0])
def test_several_pictures_per_prompt(pipe, adapter, gs):
    adapter.attach(pipe)
    def four(scale):
        with adapter.condition(E[:2], num_images_per_prompt=2, scale=scale):
            return draw(pipe, ['a', 'b'], [1, 2, 3, 4], gs, k=2)
    batch = four([0.5, 1.5])
    assert torch.equal(batch, four([.5, .5, 1.5, 1.5]))
    for i in range(4):   # all of the first face, then all of the second
        with adapter.condition(E[i // 2], scale=[.5, 1.5][i // 2]): alone = draw(pipe, ['ab'[i // 2]],
                                                                                 [i + 1], gs)
        assert dist(alone, batch[i:i + 1]) < G.TOLERANCE

@pytest.mark.parametrize('gs', [7.5, 1.0])
def test_one_face_serves_all_samples(pipe, adapter, gs):
    adapter.attach(pipe)
    with adapter.condition(E[0]):
        for n in (1, 2, 3):   # several generations in one block, other layouts
            batch = draw(pipe, ['a'] * n, range(n), gs)
            assert dist(batch[-1:], draw(pipe, ['a'], [n - 1], gs)) < G.TOLERANCE

def test_two_generations_in_one_block_of_equal_size_but_other_layout(pipe, adapter):
    adapter.attach(pipe)
    with adapter.condition(E[0]):
        draw(pipe, ['a'], [1], 7.5)                         # two rows: nobody's and one sample
        both = draw(pipe, ['a', 'b'], [1, 2], 1.0)          # two rows: two samples
    with adapter.condition(E[0]): assert dist(draw(pipe, ['a'], [1], 1.0), both[:1]) < G.TOLERANCE

def test_same_prompt_same_seed_without_guidance(pipe, adapter):
    "The rows look like the halves of guidance; the pipeline says that they are none."
    adapter.attach(pipe)
    with adapter.condition(E[0]): both = draw(pipe, ['a', 'b'], [1, 1], 1.0)
    with adapter.condition(E[0]): alone = draw(pipe, ['b'], [1], 1.0)
    assert dist(alone, both[1:]) < G.TOLERANCE


def test_a_sibling_speaks_for_itself(pipe, adapter):
    "The pipeline that was attached ran last without guidance; another one on the same UNet has it."
    sibling = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    adapter.attach(pipe)
    with adapter.condition(E[0]): want = draw(pipe, ['a'], [1])
    with adapter.condition(E[0]): draw(pipe, ['a'], [1], 1.)
    with adapter.condition(E[0]): assert torch.equal(draw(sibling, ['a'], [1]), want)


def test_halves_that_a_hook_made_unequal(pipe, adapter):
    "The pipeline says that it guides: its word counts more than the look of the batch."
    adapter.attach(pipe)
    def shift(unet, args, kwargs):
        x = args[0].clone()
        x[1] += .1
        return (x, *args[1:]), kwargs
    hook = pipe.unet.register_forward_pre_hook(shift, with_kwargs=True, prepend=True)
    with adapter.condition(E[0]) as c: draw(pipe, ['a'], [1])
    hook.remove()
    assert c.reads.tolist() == [False, True]


def test_runs_once_a_condition(pipe, adapter):
    "A loop of one's own: without prompt, then with; the same as both in one batch."
    adapter.attach(pipe)
    g = torch.Generator().manual_seed(0)
    x, words = torch.randn(1, 4, 8, 8, generator=g), torch.randn(2, 77, 64, generator=g)
    def run(x, text): return pipe.unet(x, 500, encoder_hidden_states=text).sample
    with torch.no_grad(), adapter.condition(E[0]): want = run(x.repeat(2, 1, 1, 1), words)
    with torch.no_grad(), adapter.condition(E[0], guidance=1) as c:
        with c.unconditional(): nobody = run(x, words[:1])
        someone = run(x, words[1:])
    assert dist(torch.cat([nobody, someone]), want) < 1e-5


def test_self_attention_guidance(pipe, adapter):
    "It runs the UNet a second time for the rows without prompt, which read nobody."
    sag = other_pipeline(StableDiffusionSAGPipeline, pipe)
    adapter.attach(pipe)
    seen = []
    with adapter.condition(E[0]) as c:
        hook = pipe.unet.register_forward_hook(lambda *a: seen.append(c.reads.tolist()))
        sag('a', num_inference_steps=1, sag_scale=.7, width=64, height=64, output_type='latent')
        hook.remove()
    assert seen == [[False, True], [False]]


def test_panorama_has_its_views_side_by_side(pipe, adapter):
    wide = other_pipeline(StableDiffusionPanoramaPipeline, pipe)
    adapter.attach(pipe)
    size = dict(width=576, height=512, view_batch_size=2)           # two views, one run
    with adapter.condition(E[0]) as c: wide('a', num_inference_steps=1, output_type='latent', **size)
    assert c.reads.tolist() == [False, True]*2


def test_a_pipeline_with_ways_of_its_own_is_refused(pipe, adapter):
    edits = other_pipeline(SemanticStableDiffusionPipeline, pipe)
    adapter.attach(pipe)
    with adapter.condition(E[0]), pytest.raises(GuidanceError, match='way of its own'):
        edits('a', editing_prompt='b', num_inference_steps=1, **SMALL)


@pytest.mark.parametrize('guidance_scale, rows', [(7.5, [False, True, True]), (1., [True, True])])
def test_perturbed_attention_guidance(pipe, adapter, guidance_scale, rows):
    p = other_pipeline(StableDiffusionPAGPipeline, pipe, pag_applied_layers=['mid'])
    adapter.attach(pipe)
    usual = dict(pipe.unet.attn_processors)
    with adapter.condition(E[0]) as c: p('a', num_inference_steps=2, guidance_scale=guidance_scale, **SMALL)
    assert c.reads.tolist() == rows
    assert pipe.unet.attn_processors == usual

@pytest.mark.parametrize('faces,prompts,k', [(2, 3, 1), (3, 2, 1), (2, 2, 3), (2, 1, 1)])
def test_wrong_number_of_faces(pipe, adapter, faces, prompts, k):
    adapter.attach(pipe)
    with adapter.condition(E[:faces]), pytest.raises(GuidanceError):
        draw(pipe, ['a'] * prompts, range(prompts * k), k=k)
    with adapter.condition(E[0]): draw(pipe, ['a'], [1])   # and the next one works

def test_negative_face(pipe, adapter):
    adapter.attach(pipe)
    with adapter.condition(E[:2]): plain = draw(pipe, ['a', 'b'], [1, 2])
    with adapter.condition(E[:2], negative=E[2]): one = draw(pipe, ['a', 'b'], [1, 2])
    with adapter.condition(E[:2], negative=E[2:]): two = draw(pipe, ['a', 'b'], [1, 2])
    assert dist(one, plain) > .01 and dist(one[0], two[0]) < G.TOLERANCE and dist(one[1], two[1]) > .01

KNOBS = dict(full={}, first=dict(end=.5), last=dict(start=.5), never=dict(start=.9995, end=1),
             down=dict(layers={'down': 0}), one=dict(layers={'up_blocks.1.attentions.2': .3, 'up': 1}))


def test_start_end_and_layers(pipe, adapter):
    adapter.attach(pipe)
    out = {}
    for name, knobs in KNOBS.items():
        with adapter.condition(E[0], **knobs): out[name] = draw(pipe, ['a'], [1], steps=4)
    for a, b in itertools.combinations(out, 2): assert dist(out[a], out[b]) > 1e-3, (a, b)
    assert torch.equal(out['never'], draw(pipe, ['a'], [1], steps=4))


def test_record(pipe, adapter):
    adapter.attach(pipe)
    with adapter.condition(E[:2], record=True) as c: draw(pipe, ['a', 'b'], [1, 2], steps=3)
    assert set(c.maps) == set(adapter.at.layers.cross) and all(len(steps) == 3 for steps in c.maps.values())
    for w in itertools.chain(*c.maps.values()):
        assert w.shape[0] == 2 and w.shape[2] == 4 and (w.sum(-1) - 1).abs().max() < 1e-5
    pictures = c.attention_maps(size=(32, 32))
    assert pictures.shape == (2, 4, 32, 32) and (pictures.sum(1) - 1).abs().max() < 1e-4

def test_exception_inside_restores(pipe, adapter):
    snap = snapshot(pipe.unet)
    adapter.attach(pipe)
    folded = draw(pipe, ['a'], [1])
    with pytest.raises(ZeroDivisionError):
        with adapter.condition(E[0]): draw(pipe, ['a'], [1], callback_on_step_end=lambda *a: 1 / 0)
    assert torch.equal(draw(pipe, ['a'], [1]), folded)
    adapter.detach()
    assert same(pipe.unet, snap)

@pytest.mark.parametrize('where', ['register_forward_pre_hook', 'weigh'])
@pytest.mark.parametrize('fold', [True, False])
def test_exception_while_attaching_restores(pipe, adapter, monkeypatch, where, fold):
    snap = snapshot(pipe.unet)
    owner = {'weigh': LoRA, 'register_forward_pre_hook': type(pipe.unet)}[where]
    real = getattr(owner, where)
    def broken(self, *a, **k):
        real(self, *a, **k) if where != 'register_forward_pre_hook' else None
        raise MemoryError
    monkeypatch.setattr(owner, where, broken)
    with pytest.raises(MemoryError): adapter.attach(pipe, fold=fold)
    assert same(pipe.unet, snap) and not adapter.attached
    monkeypatch.undo()
    adapter.attach(pipe)

def test_attaching_another_adapter_replaces_the_first(pipe, adapter):
    snap = snapshot(pipe.unet)
    other = FaceIDAdapter.from_state(**G.state('ip-adapter-faceid_sd15.safetensors'))
    other.attach(pipe)
    with other.condition(E[0]): alone = draw(pipe, ['a'], [1])
    adapter.attach(pipe)
    other.attach(pipe)
    assert not adapter.attached
    with other.condition(E[0]): assert torch.equal(draw(pipe, ['a'], [1]), alone)
    with pytest.raises(ArgumentError, match='not attached'): adapter.condition(E[0])
    with other.condition(E[0]), pytest.raises(ArgumentError, match='in use'): adapter.attach(pipe)
    # moving to another UNet leaves the first clean
    second = G.unet()
    other.attach(second)
    assert same(pipe.unet, snap)
    other.detach()

def test_a_condition_from_before_detaching_is_refused(pipe, adapter):
    c = adapter.attach(pipe).condition(E[0])
    adapter.detach()
    with pytest.raises(ArgumentError, match='detached'): c.__enter__()

def test_attention_slicing_afterwards(pipe, adapter):
    adapter.attach(pipe)
    with adapter.condition(E[0]): want = draw(pipe, ['a'], [1])
    pipe.enable_attention_slicing(1)                 # diffusers puts its own processors in
    with adapter.condition(E[0]): assert dist(draw(pipe, ['a'], [1]), want) < G.TOLERANCE
    adapter.detach()
    assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {'SlicedAttnProcessor'}
    pipe.disable_attention_slicing()

def test_wrong_base_model_touches_nothing(pipe, pipe_xl):
    for p, name in ((pipe, 'ip-adapter-faceid_sdxl.bin'), (pipe_xl, CKPT)):
        snap = snapshot(p.unet)
        with pytest.raises(BaseModelError): FaceIDAdapter.from_state(**G.state(name)).attach(p)
        assert same(p.unet, snap)
    s = G.state(CKPT)
    s['ip_adapter'].pop('11.to_k_ip.weight')
    s['ip_adapter'].pop('11.to_v_ip.weight')
    snap = snapshot(pipe.unet)
    with pytest.raises(BaseModelError): FaceIDAdapter.from_state(**s).attach(pipe)
    layer = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
    lora = {f'{layer}.down': torch.zeros(2, 7), f'{layer}.up': torch.zeros(32, 2)}
    with pytest.raises(LoRAError): FaceIDAdapter.from_state(**G.state(CKPT), lora=lora).attach(pipe)
    assert same(pipe.unet, snap)

def load_in_diffusers(pipe, state):
    copy = {part: {k: t.clone() for k, t in tensors.items()} for part, tensors in state.items()}
    pipe.load_ip_adapter(copy, subfolder=None, weight_name=None, image_encoder_folder=None)


def test_foreign_adapter_is_refused(pipe, adapter):
    load_in_diffusers(pipe, G.state('ip-adapter-faceid-portrait_sd15.bin'))
    try:
        with pytest.raises(ArgumentError, match='unload_ip_adapter'): adapter.attach(pipe)
    finally: pipe.unload_ip_adapter()
    adapter.attach(pipe)

@pytest.mark.parametrize('kw,word', [
    (dict(scale=float('nan')), 'finite'), (dict(scale=[1, 2, 3]), '3 values'),
    (dict(start=.6, end=.4), 'start'),
    (dict(end=2), 'start'), (dict(layers={'nowhere': 1}), 'nowhere'), (dict(negative=E[:3]), 'negative')])
def test_bad_knobs(pipe, adapter, kw, word):
    adapter.attach(pipe)
    with pytest.raises(ArgumentError, match=word): adapter.condition(E[:2], **kw)

@pytest.mark.parametrize('faces', [
    torch.zeros(2, 511), torch.zeros(1, 2, 512), torch.full((1, 512), float('nan')), [], torch.tensor(1.)])
def test_bad_faces(pipe, adapter, faces):
    adapter.attach(pipe)
    with pytest.raises(ArgumentError): adapter.condition(faces)

def face(e): return Face(e.numpy())


WAYS = [E[:2].numpy(), list(E[:2]), [face(E[0]), face(E[1])], [E[0].numpy(), face(E[1])],
        (E[0].double(), E[1].tolist())]


@pytest.mark.parametrize('faces', WAYS)
def test_every_way_to_say_whose_face(faces):
    assert dist(face_embeddings(faces), face_embeddings(E[:2])) < 1e-6


def test_one_face_is_a_table_of_one():
    assert face_embeddings(face(E[0])).shape == face_embeddings(E[0]).shape == (1, 512)


def test_several_photographs_of_one_person():
    two = face_embeddings([[face(E[0]), E[1]], face(E[2])])
    assert dist(two[0], torch.nn.functional.normalize(E[0] + E[1], dim=0)) < 1e-6 and dist(two[1], E[2]) == 0
    assert face_embeddings([E[0], E[1]], several=True).shape == (1, 2, 512)


@pytest.mark.parametrize('faces', [25*E[:1], [25*E[0]], 25*E[0].numpy()], ids=range(3))
def test_a_raw_embedding_where_a_unit_one_is_read(faces):
    with pytest.raises(ArgumentError, match='length 1.*25.0.*normed_embedding'): face_embeddings(faces)


@pytest.mark.parametrize('length', [0, .7, .999, 2])
def test_mixtures_of_unit_embeddings_are_read_as_they_are(length):
    assert torch.equal(face_embeddings(length*E), length*E)


def test_a_grey_picture_of_floats_is_no_table_of_embeddings():
    with pytest.raises(ArgumentError, match='like a grey picture'): face_embeddings(torch.rand(300, 512))
    assert face_embeddings([[E[0], E[1]], [E[2], E[3]]], several=True).shape == (2, 2, 512)

# --- training

def train_step(unet, a, embeds):
    "One forward and backward: the noise, and the gradients of all parameters"
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(3, 4, 8, 8, generator=g), torch.randn(3, 7, 64, generator=g)
    t = torch.tensor([10, 500, 900])
    for p in a.parameters(): p.grad = None
    with a.condition(embeds): y = unet(x, t, encoder_hidden_states=text).sample
    y.square().mean().backward()
    return y, [p.grad for p in a.parameters()]


def test_training_gradients(pipe):
    unet = pipe.unet
    snap = snapshot(unet)
    a = FaceIDAdapter.new(unet, rank=4, seed=3)
    embeds = E[:3].clone()
    embeds[1] = 0
    out = {}
    for sdpa in (None, False):
        a.attach(unet, fold=False, sdpa=sdpa)
        out[sdpa] = train_step(unet, a, embeds)
        assert all(p.grad is not None and p.dtype == torch.float32 for p in a.parameters())
        assert sum(float(p.grad.abs().sum()) > 0 for p in a.parameters()) > len(a.parameters()) / 2
    assert dist(out[None][0], out[False][0]) < 1e-5 and max(map(dist, out[None][1], out[False][1])) < 1e-5
    a.detach()
    assert same(unet, snap)


def test_a_fresh_lora_does_nothing(pipe):
    unet, x, text = pipe.unet, torch.randn(3, 4, 8, 8), torch.randn(3, 7, 64)
    bare = unet(x, 500, encoder_hidden_states=text).sample
    a = FaceIDAdapter.new(unet, rank=4, seed=3).attach(unet, fold=False)
    assert dist(unet(x, 500, encoder_hidden_states=text).sample, bare) < 1e-5
    a.detach()


def test_a_seed_makes_the_same_adapter(pipe):
    a, b = (FaceIDAdapter.new(pipe.unet, rank=4, seed=3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_training_rows_and_checkpointing(pipe):
    unet = pipe.unet
    a = FaceIDAdapter.new(unet, rank=2).attach(unet, fold=False)
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 7, 64)
    def step(e, rows=slice(None)):
        for p in a.parameters(): p.grad = None
        with a.condition(e[rows]): y = unet(x[rows], t[rows], encoder_hidden_states=text[rows]).sample
        y.sum(0).square().mean().backward()
        return y.detach(), [p.grad.clone() for p in a.parameters()]
    y, grads = step(E[:2])
    alone, _ = step(E[:2], slice(1, 2))
    assert dist(y[1:], alone) < 1e-5
    unet.enable_gradient_checkpointing()
    unet.train()
    try: again, grads2 = step(E[:2])
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    assert dist(y, again) < 1e-6 and max(map(dist, grads, grads2)) < 1e-6
    with torch.no_grad(): assert torch.isfinite(unet(x, t, encoder_hidden_states=text).sample).all()
    assert all(not p.shares
               for p in a.at.layers.processors.values())     # the next plain forward let the graph go
    a.detach()

def test_what_is_trained_beside_is_what_folds(pipe, tmp_path):
    unet = pipe.unet
    a = FaceIDAdapter.new(unet, rank=3)
    with torch.no_grad():
        for p in a.parameters(): p.add_(torch.randn(p.shape,
                                                    generator=torch.Generator().manual_seed(1)) * .05)
    a.attach(pipe, fold=False)
    with a.condition(E[0]): beside = draw(pipe, ['a'], [1])
    a.detach()
    for name in ('a.safetensors', 'a.bin'):
        b = FaceIDAdapter.from_file(a.save(tmp_path / name)).attach(pipe)
        with b.condition(E[0]): assert dist(draw(pipe, ['a'], [1]), beside) < G.TOLERANCE
        b.detach()
    s = a.state_dict()
    assert set(s) == {'image_proj', 'ip_adapter'} and set(s['ip_adapter']) == set(G.state(CKPT)['ip_adapter'])

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    unet = G.unet().to(dtype)
    snap = snapshot(unet)
    a = FaceIDAdapter.from_state(**G.state(CKPT)).attach(unet)
    x, text = torch.randn(4, 4, 8, 8, dtype=dtype), torch.randn(4, 7, 64, dtype=dtype)
    full = G.unet()
    b = FaceIDAdapter.from_state(**G.state(CKPT)).attach(full)
    with torch.no_grad():
        with a.condition(E): y = unet(x, 500, encoder_hidden_states=text).sample
        with b.condition(E): z = full(x.float(), 500, encoder_hidden_states=text.float()).sample
    assert y.dtype == dtype and dist(y.float(), z) < .15
    a.detach()
    assert same(unet, snap)

def test_channels_last_and_autocast():
    unet = G.unet().to(memory_format=torch.channels_last)
    a = FaceIDAdapter.from_state(**G.state(CKPT)).attach(unet)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 64)
    with torch.no_grad(), a.condition(E[:2]):
        y = unet(x.to(memory_format=torch.channels_last), 500, encoder_hidden_states=text).sample
        with torch.autocast('cpu', torch.bfloat16): z = unet(x, 500, encoder_hidden_states=text).sample
    assert dist(y, z.float()) < .15

# --- other pipelines on the same UNet, and diffusers' own loader

def other_pipeline(cls, pipe, **more):
    "Another pipeline around the same parts."
    parts = {k: v for k, v in pipe.components.items() if k != 'image_encoder'}
    p = cls(**{**parts, **more}, requires_safety_checker=False)
    p.set_progress_bar_config(disable=True)
    return p


def control_net(unet):
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    control.controlnet_down_blocks[0].weight.data.fill_(.1)
    return dict(controlnet=control)


@pytest.mark.parametrize('cls, parts, inputs', [
    (StableDiffusionImg2ImgPipeline, None, dict(strength=.8)),
    (StableDiffusionInpaintPipeline, None, dict(mask_image=torch.ones(1, 1, 32, 32), width=32, height=32)),
    (StableDiffusionControlNetPipeline, control_net, dict(width=32, height=32))])
def test_other_pipelines_on_the_same_unet(pipe, adapter, cls, parts, inputs):
    p = other_pipeline(cls, pipe, **(parts(pipe.unet) if parts else {}))
    adapter.attach(pipe)
    inputs = {'image': torch.rand(1, 3, 32, 32), **inputs}
    def go(prompts, seeds):
        own = {k: v.expand(len(prompts), -1, -1, -1) if torch.is_tensor(v) else v for k, v in inputs.items()}
        return p(prompts, generator=gens(*seeds), num_inference_steps=3, output_type='latent', **own).images
    bare = go(['a', 'b'], [1, 2])
    with adapter.condition(E[:2]): both = go(['a', 'b'], [1, 2])
    with adapter.condition(E[1]): one = go(['b'], [2])
    assert dist(both, bare) > .01 and dist(both[1:], one) < G.TOLERANCE


def golden_unet(**changes):
    return G.fill_(UNet2DConditionModel(**{**G.SPEC['configs']['unet_sd'], **changes}), 5).eval()


def test_instruct_pix2pix_has_three_parts():
    torch.manual_seed(0)
    p = other_pipeline(StableDiffusionInstructPix2PixPipeline, G.pipeline('sd'),
                       unet=golden_unet(in_channels=8))
    adapter = FaceIDAdapter.from_state(**G.state(CKPT)).attach(p)
    image = torch.rand(1, 3, 32, 32)
    def go(prompts, seeds):
        return p(prompts, image=image.expand(len(prompts), -1, -1, -1), generator=gens(*seeds),
                 num_inference_steps=2, output_type='latent').images
    with adapter.condition(E[:2]) as c:
        both = go(['a', 'b'], [1, 2])
        assert c.reads.tolist() == [True] * 2 + [False] * 4
    with adapter.condition(E[1]): assert dist(go(['b'], [2]), both[1:]) < G.TOLERANCE


def test_bases_with_more_latent_channels():
    """Eight channels in and out are a wide latent, not InstructPix2Pix; all eight tell whether halves are
    equal."""
    unet = golden_unet(in_channels=8, out_channels=8)
    a = FaceIDAdapter.from_state(**G.state(CKPT)).attach(unet)
    torch.manual_seed(0)
    text = torch.randn(6, 7, 64)
    def reads(n, x):
        with torch.no_grad(), a.condition(E[:n]) as c:
            unet(x, 500, encoder_hidden_states=text[:len(x)])
            return c.reads.tolist()
    x = torch.randn(3, 8, 8, 8)
    assert reads(1, x) == [True] * 3 and reads(3, x.repeat(2, 1, 1, 1)) == [False] * 3 + [True] * 3
    with pytest.raises(GuidanceError): reads(1, x[:1].repeat(3, 1, 1, 1))
    y = x[:1].repeat(2, 1, 1, 1)
    y[1, 5:] += 1
    assert reads(1, y) == [True, True]

def random_unet(pick):
    "A UNet of random shape."
    downs = pick(('CrossAttnDownBlock2D', 'DownBlock2D'), ('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'))
    return dict(block_out_channels=pick((16, 32), (32, 64), (32, 32)), layers_per_block=pick(1, 2),
                attention_head_dim=pick(4, 8), down_block_types=downs,
                up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), use_linear_projection=pick(True, False))


@pytest.mark.parametrize('seed', range(4))
def test_differential_against_diffusers(seed):
    "A random UNet, checkpoint and batch: diffusers' own loader (peft LoRA beside) makes the same pictures."
    r = torch.Generator().manual_seed(seed)
    def pick(*xs): return xs[int(torch.randint(len(xs), (), generator=r))]
    sd = G.pipeline('sd')
    unet = UNet2DConditionModel(**{**G.SPEC['configs']['unet_sd'], **random_unet(pick)})
    sd.register_modules(unet=G.fill_(unet, 10 + seed).eval())
    a = FaceIDAdapter.new(sd.unet, rank=pick(2, 8), num_tokens=4, seed=seed)
    G.fill_(a.net, 20 + seed)
    scale, gs, e = pick(.4, 1., 1.6), pick(1.0, 5.0), E[seed:seed + 1]
    a.attach(sd)
    with a.condition(e, scale=scale): ours = draw(sd, ['a b'], [1, 2], gs, k=2)
    a.detach()
    load_in_diffusers(sd, a.state_dict())
    sd.set_ip_adapter_scale(scale)
    stack = torch.stack([torch.zeros_like(e), e]) if gs > 1 else e[None]
    theirs = draw(sd, ['a b'], [1, 2], gs, k=2, ip_adapter_image_embeds=[stack])
    assert dist(ours, theirs) < G.TOLERANCE


def test_compiled_unet():
    pipe = G.pipeline('sd')
    adapter = FaceIDAdapter.from_state(**G.state(CKPT)).attach(pipe)
    with adapter.condition(E[:2]): want = draw(pipe, ['a', 'b'], [1, 2])
    base = draw(pipe, ['a', 'b'], [1, 2])
    pipe.unet = torch.compile(pipe.unet, backend='eager')
    for _ in range(2):
        with adapter.condition(E[:2]): assert dist(draw(pipe, ['a', 'b'], [1, 2]), want) < G.TOLERANCE
        assert dist(draw(pipe, ['a', 'b'], [1, 2]), base) < G.TOLERANCE
    adapter.detach().attach(pipe)
    with adapter.condition(E[:2]): assert dist(draw(pipe, ['a', 'b'], [1, 2]), want) < G.TOLERANCE

# --- where there is a GPU

def on_the_gpu(pipe, adapter, how):
    "Bring a pipeline there in one of many ways, the adapter on it."
    dtype = getattr(torch, how, None)
    if how == 'moved after attaching': adapter.attach(pipe)
    if how == 'model offload': pipe.enable_model_cpu_offload()
    elif how == 'sequential offload': pipe.enable_sequential_cpu_offload()
    else: pipe.to('cuda', dtype if isinstance(dtype, torch.dtype) else torch.float32)
    if how == 'channels_last': pipe.unet.to(memory_format=torch.channels_last)
    if not adapter.attached: adapter.attach(pipe)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('how', ['float32', 'float16', 'bfloat16', 'channels_last', 'model offload',
                                 'sequential offload', 'moved after attaching'])
def test_cuda(how):
    cpu = G.pipeline('sd')
    a = FaceIDAdapter.from_state(**G.state(CKPT)).attach(cpu)
    with a.condition(E[:2]): want = draw(cpu, ['a', 'b'], [1, 2])
    pipe, adapter = G.pipeline('sd'), FaceIDAdapter.from_state(**G.state(CKPT))
    on_the_gpu(pipe, adapter, how)
    with adapter.condition(E[:2]): got = draw(pipe, ['a', 'b'], [1, 2]).float().cpu()
    assert dist(got, want) < (1. if how in ('float16', 'bfloat16') else .05)
    adapter.detach()
    assert torch.isfinite(draw(pipe, ['a'], [1])).all()


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('faces', [[], [[]], ([torch.ones(512)], [])])
def test_a_person_without_a_photograph_is_said_so(faces, several):
    with pytest.raises(ArgumentError, match='without a photograph'): face_embeddings(faces, several=several)


def test_a_checkpoint_is_checked_once(tmp_path, pipe, monkeypatch):
    "Reading makes a `Checkpoint`, the proof of being checked; the adapter does not check the numbers again."
    path, calls, real = G.write_checkpoint(CKPT, tmp_path), [], C.check_tensors
    monkeypatch.setattr(C, 'check_tensors', lambda *a: calls.append(1) or real(*a))
    FaceIDAdapter.from_file(path).attach(pipe).detach()
    assert len(calls) == 1
