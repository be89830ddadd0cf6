"""The adapter on whole pipelines: golden cases, rows, guidance, restoring."""
import pytest, torch
from hypothesis import given, settings, strategies as st
import goldens_build as G
from faceid_nb.adapter import FaceIDAdapter, blend, face_embeddings
from faceid_nb.errors import ArgumentError, BaseModelError, GuidanceError, LoRAError

@pytest.fixture(scope='module')
def pipe(): return G.pipeline('sd')
@pytest.fixture(scope='module')
def pipe_xl(): return G.pipeline('sdxl')

def run_golden(pipe, name, folder, **kwargs):
    "One golden case through attach and condition, the way FaceID.generate does it: (largest difference, latents)"
    c = G.case(name)
    call = dict(c['call'])
    embeds, image = G.inputs(name)
    n, k = (1 if embeds.ndim == 3 else len(embeds)), call.pop('num_samples')
    lora = c['lora'] and G.write_checkpoint(c['lora'], folder)
    variant = 'plusv2' if call.pop('shortcut', False) else 'plus' if image else None
    adapter = FaceIDAdapter.from_file(G.write_checkpoint(c['checkpoint'], folder), lora=lora, variant=variant).attach(pipe)
    knobs = {k_: call.pop(k_) for k_ in ('scale', 's_scale') if k_ in call}
    if image:
        from transformers import CLIPImageProcessor
        x = CLIPImageProcessor()(image, return_tensors='pt').pixel_values
        enc = G.image_encoder()
        with torch.no_grad(): knobs |= dict(structure=enc(x, output_hidden_states=True).hidden_states[-2],
                                            negative_structure=enc(torch.zeros_like(x), output_hidden_states=True).hidden_states[-2])
    g = torch.Generator('cpu').manual_seed(call.pop('seed'))
    call.setdefault('guidance_scale', 7.5)
    prompts = [[call.pop(p)] * n for p in ('prompt', 'negative_prompt')]
    try:
        with adapter.condition(embeds, num_images_per_prompt=k, **knobs, **kwargs):
            out = pipe(prompts[0], negative_prompt=prompts[1], num_images_per_prompt=k, generator=g, **call).images
    finally: adapter.detach()
    return (out - G.expected()[name]).abs().max().item(), out

SD = [n for n, c in G.CASES.items() if c['pipeline'] == 'sd']
@pytest.mark.parametrize('name', SD)
def test_golden_sd(pipe, tmp_path, name): assert run_golden(pipe, name, tmp_path)[0] < G.TOLERANCE
@pytest.mark.parametrize('name', [n for n in G.CASES if n not in SD])
def test_golden_sdxl(pipe_xl, tmp_path, name): assert run_golden(pipe_xl, name, tmp_path)[0] < G.TOLERANCE

# --- whole pipelines

E = torch.nn.functional.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
CKPT = 'ip-adapter-faceid_sd15.bin'
def gens(*seeds): return [torch.Generator().manual_seed(s) for s in seeds]
def draw(pipe, prompts, seeds, gs=7.5, steps=2, k=1, **kw):
    return pipe(prompts, generator=gens(*seeds), num_inference_steps=steps, width=32, height=32, output_type='latent', guidance_scale=gs, num_images_per_prompt=k, **kw).images
def dist(a, b): return (a - b).abs().max().item()
def snapshot(unet): return {k: v.clone() for k, v in unet.state_dict().items()}, dict(unet.attn_processors), len(unet._forward_pre_hooks)
def same(unet, snap):
    state, procs, hooks = snap
    return (all(torch.equal(v, state[k]) for k, v in unet.state_dict().items()) and len(state) == len(unet.state_dict())
            and procs == dict(unet.attn_processors) and len(unet._forward_pre_hooks) == hooks and not any(m._forward_hooks for m in unet.modules()))

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

def test_neutral_knobs_are_exactly_neutral(pipe, adapter):
    bare = draw(pipe, ['a', 'b'], [1, 2])
    adapter.attach(pipe, lora_weight=0)
    assert torch.equal(draw(pipe, ['a', 'b'], [1, 2]), bare)                                     # attached, no condition
    with adapter.condition(E[:2], scale=0): assert torch.equal(draw(pipe, ['a', 'b'], [1, 2]), bare)
    adapter.lora_weight = 1
    folded = draw(pipe, ['a', 'b'], [1, 2])
    assert dist(folded, bare) > .01
    with adapter.condition(E[:2]): full = draw(pipe, ['a', 'b'], [1, 2])
    assert dist(full, folded) > .01
    assert torch.equal(draw(pipe, ['a', 'b'], [1, 2]), folded)                                   # the block leaves nothing behind
    zeros = torch.zeros(1, 512)
    for kw in (dict(start=0, end=1), dict(layers={}), dict(layers={'down': 1., 'mid': 1, 'up': 1}), dict(record=True), dict(negative=zeros), dict(guidance=2), dict(scale=[1, 1])):
        with adapter.condition(E[:2], **kw): assert torch.equal(draw(pipe, ['a', 'b'], [1, 2]), full), kw
    with adapter.condition(E[:2], layers={'down': 0, 'mid': 0, 'up': 0}): assert dist(draw(pipe, ['a', 'b'], [1, 2]), folded) < 1e-4

@pytest.mark.parametrize('gs', [7.5, 1.0])
def test_every_row_stands_for_itself(pipe, adapter, gs):
    adapter.attach(pipe)
    prompts, seeds, scale = ['a', 'bb', 'c c'], [1, 2, 3], [.3, 1., 1.7]
    with adapter.condition(E[:3], scale=scale): batch = draw(pipe, prompts, seeds, gs)
    for i in range(3):
        with adapter.condition(E[i], scale=scale[i]): alone = draw(pipe, [prompts[i]], [seeds[i]], gs)
        assert dist(alone, batch[i:i + 1]) < G.TOLERANCE
    assert min(dist(batch[i], batch[j]) for i in range(3) for j in range(i)) > .1

@pytest.mark.parametrize('gs', [7.5, 1.0])
def test_several_pictures_per_prompt(pipe, adapter, gs):
    adapter.attach(pipe)
    with adapter.condition(E[:2], num_images_per_prompt=2, scale=[0.5, 1.5]): batch = draw(pipe, ['a', 'b'], [1, 2, 3, 4], gs, k=2)
    with adapter.condition(E[:2], num_images_per_prompt=2, scale=[.5, .5, 1.5, 1.5]): assert torch.equal(batch, draw(pipe, ['a', 'b'], [1, 2, 3, 4], gs, k=2))
    for i in range(4):   # all of the first face, then all of the second
        with adapter.condition(E[i // 2], scale=[.5, 1.5][i // 2]): assert dist(draw(pipe, ['ab'[i // 2]], [i + 1], gs), batch[i:i + 1]) < G.TOLERANCE

@pytest.mark.parametrize('gs', [7.5, 1.0])
def test_one_face_serves_all_samples(pipe, adapter, gs):
    adapter.attach(pipe)
    with adapter.condition(E[0]):
        for n in (1, 2, 3): 
            batch = draw(pipe, ['a'] * n, range(n), gs)
            assert dist(batch[-1:], draw(pipe, ['a'], [n - 1], gs)) < G.TOLERANCE   # two generations in one block, other layouts

def test_two_generations_in_one_block_of_equal_size_but_other_layout(pipe, adapter):
    adapter.attach(pipe)
    with adapter.condition(E[0]):
        draw(pipe, ['a'], [1], 7.5)                         # two rows: nobody's and one sample
        both = draw(pipe, ['a', 'b'], [1, 2], 1.0)          # two rows: two samples
    with adapter.condition(E[0]): assert dist(draw(pipe, ['a'], [1], 1.0), both[:1]) < G.TOLERANCE

def test_same_prompt_same_seed_without_guidance_is_asked_about(pipe, adapter):
    adapter.attach(pipe)
    draw(pipe, ['a'], [1], 1.0)                      # the pipeline now says: no guidance
    with adapter.condition(E[0]), pytest.raises(GuidanceError, match='guidance=1'): draw(pipe, ['a', 'b'], [1, 1], 1.0)
    with adapter.condition(E[0], guidance=1): both = draw(pipe, ['a', 'b'], [1, 1], 1.0)
    with adapter.condition(E[0]): assert dist(draw(pipe, ['b'], [1], 1.0), both[1:]) < G.TOLERANCE

@pytest.mark.parametrize('faces,prompts,k', [(2, 3, 1), (3, 2, 1), (2, 2, 3), (2, 1, 1)])
def test_wrong_number_of_faces(pipe, adapter, faces, prompts, k):
    adapter.attach(pipe)
    with adapter.condition(E[:faces]), pytest.raises(GuidanceError): draw(pipe, ['a'] * prompts, range(prompts * k), k=k)
    with adapter.condition(E[0]): draw(pipe, ['a'], [1])   # and the next one works

def test_negative_face(pipe, adapter):
    adapter.attach(pipe)
    with adapter.condition(E[:2]): plain = draw(pipe, ['a', 'b'], [1, 2])
    with adapter.condition(E[:2], negative=E[2]): one = draw(pipe, ['a', 'b'], [1, 2])
    with adapter.condition(E[:2], negative=E[2:]): two = draw(pipe, ['a', 'b'], [1, 2])
    assert dist(one, plain) > .01 and dist(one[0], two[0]) < G.TOLERANCE and dist(one[1], two[1]) > .01

def test_start_end_and_layers(pipe, adapter):
    adapter.attach(pipe)
    out = {}
    for name, kw in dict(full={}, first=dict(end=.5), last=dict(start=.5), never=dict(start=.9995, end=1), down=dict(layers={'down': 0}),
                         one=dict(layers={'up_blocks.1.attentions.2': .3, 'up': 1})).items():
        with adapter.condition(E[0], **kw): out[name] = draw(pipe, ['a'], [1], steps=4)
    names = list(out)
    for i, a in enumerate(names):
        for b in names[:i]: assert dist(out[a], out[b]) > 1e-3, (a, b)
    assert torch.equal(out['never'], draw(pipe, ['a'], [1], steps=4))

def test_record(pipe, adapter):
    adapter.attach(pipe)
    with adapter.condition(E[:2], record=True) as c: draw(pipe, ['a', 'b'], [1, 2], steps=3)
    assert set(c.maps) == set(adapter.at.cross) and all(len(steps) == 3 for steps in c.maps.values())
    assert all(w.shape[0] == 2 and w.shape[2] == 4 and (w.sum(-1) - 1).abs().max() < 1e-5 for steps in c.maps.values() for w in steps)
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

@pytest.mark.parametrize('where', ['install', 'register_forward_pre_hook', 'weigh'])
@pytest.mark.parametrize('fold', [True, False])
def test_exception_while_attaching_restores(pipe, adapter, monkeypatch, where, fold):
    from faceid_nb.adapter import Attachment
    from faceid_nb.lora import LoRA
    snap = snapshot(pipe.unet)
    owner = {'install': Attachment, 'weigh': LoRA, 'register_forward_pre_hook': type(pipe.unet)}[where]
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
    lora = {'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.down': torch.zeros(2, 7), 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.up': torch.zeros(32, 2)}
    with pytest.raises(LoRAError): FaceIDAdapter.from_state(**G.state(CKPT), lora=lora).attach(pipe)
    assert same(pipe.unet, snap)

def test_foreign_adapter_is_refused(pipe, adapter):
    pipe.load_ip_adapter({k: dict(v) for k, v in G.state('ip-adapter-faceid-portrait_sd15.bin').items()}, subfolder=None, weight_name=None, image_encoder_folder=None)
    try:
        with pytest.raises(ArgumentError, match='unload_ip_adapter'): adapter.attach(pipe)
    finally: pipe.unload_ip_adapter()
    adapter.attach(pipe)

@pytest.mark.parametrize('kw,word', [(dict(scale=float('nan')), 'finite'), (dict(scale=[1, 2, 3]), '3 values'), (dict(start=.6, end=.4), 'start'), (dict(end=2), 'start'),
                                     (dict(layers={'nowhere': 1}), 'nowhere'), (dict(negative=E[:3]), 'negative')])
def test_bad_knobs(pipe, adapter, kw, word):
    adapter.attach(pipe)
    with pytest.raises(ArgumentError, match=word): adapter.condition(E[:2], **kw)

@pytest.mark.parametrize('faces', [torch.zeros(2, 511), torch.zeros(1, 2, 512), torch.full((1, 512), float('nan')), [], torch.tensor(1.)])
def test_bad_faces(pipe, adapter, faces):
    adapter.attach(pipe)
    with pytest.raises(ArgumentError): adapter.condition(faces)

class Face:
    def __init__(self, e): self.embedding = e.numpy()

def test_every_way_to_say_whose_face():
    a = face_embeddings(E[:2])
    for same_ in (E[:2].numpy(), list(E[:2]), [Face(E[0]), Face(E[1])], [E[0].numpy(), Face(E[1])], (E[0].double(), E[1].tolist())): assert dist(face_embeddings(same_), a) < 1e-6
    assert face_embeddings(Face(E[0])).shape == face_embeddings(E[0]).shape == (1, 512)
    two = face_embeddings([[Face(E[0]), E[1]], Face(E[2])])
    assert dist(two[0], torch.nn.functional.normalize(E[0] + E[1], dim=0)) < 1e-6 and dist(two[1], E[2]) == 0
    assert face_embeddings([E[0], E[1]], several=True).shape == (1, 2, 512) and face_embeddings([[E[0], E[1]], [E[2], E[3]]], several=True).shape == (2, 2, 512)

@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(.01, 5), min_size=1, max_size=4))
def test_blend_is_a_unit_vector_between(w):
    b = blend(E[:len(w)], w)
    assert abs(b.norm() - 1) < 1e-5
    assert dist(b, blend(E[:len(w)], [3 * x for x in w])) < 1e-5

# --- training

def test_training_gradients(pipe):
    unet = pipe.unet
    snap = snapshot(unet)
    a = FaceIDAdapter.new(unet, rank=4, seed=3)
    torch.manual_seed(0)
    x, t, text, e = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900]), torch.randn(3, 7, 64), E[:3].clone()
    e[1] = 0
    bare = unet(x, t, encoder_hidden_states=text).sample
    out = {}
    for sdpa in (None, False):
        a.attach(unet, fold=False, sdpa=sdpa)
        assert dist(unet(x, t, encoder_hidden_states=text).sample, bare) < 1e-5             # the fresh LoRA does nothing
        with a.condition(e): y = unet(x, t, encoder_hidden_states=text).sample
        for p in a.parameters(): p.grad = None
        y.square().mean().backward()
        out[sdpa] = y, [p.grad for p in a.parameters()]
        assert all(p.grad is not None and p.dtype == torch.float32 for p in a.parameters())
        assert sum(float(p.grad.abs().sum()) > 0 for p in a.parameters()) > len(a.parameters()) / 2
    assert dist(out[None][0], out[False][0]) < 1e-5 and max(map(dist, out[None][1], out[False][1])) < 1e-5
    a.detach()
    assert same(unet, snap)
    b = FaceIDAdapter.new(unet, rank=4, seed=3)
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
    assert all(p.kv is None for p in a.at.processors.values())     # the next plain forward let the graph go
    a.detach()

def test_what_is_trained_beside_is_what_folds(pipe, tmp_path):
    unet = pipe.unet
    a = FaceIDAdapter.new(unet, rank=3)
    with torch.no_grad():
        for p in a.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * .05)
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

def test_img2img_and_inpaint_and_controlnet(pipe, adapter):
    from diffusers import (ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
    parts = {k: v for k, v in pipe.components.items() if k != 'image_encoder'}
    image = torch.rand(1, 3, 32, 32)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    control.controlnet_down_blocks[0].weight.data.fill_(.1)
    adapter.attach(pipe)
    for cls, kw in ((StableDiffusionImg2ImgPipeline, dict(image=image, strength=.8)), (StableDiffusionInpaintPipeline, dict(image=image, mask_image=torch.ones(1, 1, 32, 32), width=32, height=32)),
                    (StableDiffusionControlNetPipeline, dict(image=image, width=32, height=32, controlnet=control))):
        p = cls(**parts, requires_safety_checker=False, **({'controlnet': kw.pop('controlnet')} if 'controlnet' in kw else {}))
        p.set_progress_bar_config(disable=True)
        go = lambda prompts, seeds: p(prompts, generator=gens(*seeds), num_inference_steps=3, output_type='latent', **{k: v.expand(len(prompts), -1, -1, -1) if torch.is_tensor(v) else v for k, v in kw.items()}).images
        bare = go(['a', 'b'], [1, 2])
        with adapter.condition(E[:2]): both = go(['a', 'b'], [1, 2])
        with adapter.condition(E[1]): one = go(['b'], [2])
        assert dist(both, bare) > .01 and dist(both[1:], one) < G.TOLERANCE, cls.__name__

def test_instruct_pix2pix_has_three_parts():
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
    sd = G.pipeline('sd')
    torch.manual_seed(0)
    unet = G.fill_(UNet2DConditionModel(**{**G.SPEC['configs']['unet_sd'], 'in_channels': 8}), 5).eval()
    p = StableDiffusionInstructPix2PixPipeline(**{**{k: v for k, v in sd.components.items() if k != 'image_encoder'}, 'unet': unet}, requires_safety_checker=False)
    p.set_progress_bar_config(disable=True)
    adapter = FaceIDAdapter.from_state(**G.state(CKPT)).attach(p)
    image = torch.rand(1, 3, 32, 32)
    seen = []
    go = lambda prompts, seeds: p(prompts, image=image.expand(len(prompts), -1, -1, -1), generator=gens(*seeds), num_inference_steps=2, output_type='latent').images
    with adapter.condition(E[:2]) as c:
        both = go(['a', 'b'], [1, 2])
        seen = c.reads.tolist()
    assert seen == [True] * 2 + [False] * 4
    with adapter.condition(E[1]): assert dist(go(['b'], [2]), both[1:]) < G.TOLERANCE

def test_bases_with_more_latent_channels():
    "Eight channels in and out are a wide latent, not InstructPix2Pix; and all eight tell whether the halves are equal."
    from diffusers import UNet2DConditionModel
    unet = G.fill_(UNet2DConditionModel(**{**G.SPEC['configs']['unet_sd'], 'in_channels': 8, 'out_channels': 8}), 5).eval()
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

def test_perturbed_attention_guidance_is_refused(pipe, adapter):
    from diffusers import StableDiffusionPAGPipeline
    p = StableDiffusionPAGPipeline(**{k: v for k, v in pipe.components.items() if k != 'image_encoder'}, pag_applied_layers=['mid'], requires_safety_checker=False)
    p.set_progress_bar_config(disable=True)
    adapter.attach(pipe)
    with adapter.condition(E[0]), pytest.raises(GuidanceError, match='Perturbed'):
        p('a', num_inference_steps=2, width=32, height=32, output_type='latent')
    pipe.unet.set_attn_processor({k: v for k, v in pipe.unet.attn_processors.items()})

@pytest.mark.parametrize('seed', range(4))
def test_differential_against_diffusers(seed):
    "A random UNet, a random checkpoint, a random batch: diffusers' own loader (peft LoRA beside, tokens through encoder_hid_proj) makes the same pictures."
    from diffusers import UNet2DConditionModel
    r = torch.Generator().manual_seed(seed)
    pick = lambda *xs: xs[int(torch.randint(len(xs), (), generator=r))]
    d = 64 # the golden text encoder's width
    unet = UNet2DConditionModel(**{**G.SPEC['configs']['unet_sd'], 'block_out_channels': pick((16, 32), (32, 64), (32, 32)), 'layers_per_block': pick(1, 2),
        'attention_head_dim': pick(4, 8), 'down_block_types': pick(('CrossAttnDownBlock2D', 'DownBlock2D'), ('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D')),
        'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'), 'use_linear_projection': pick(True, False)})
    sd = G.pipeline('sd')
    sd.register_modules(unet=G.fill_(unet, 10 + seed).eval())
    a = FaceIDAdapter.new(sd.unet, rank=pick(2, 8), num_tokens=4, seed=seed)
    G.fill_(a.net, 20 + seed)
    scale, gs, e = pick(.4, 1., 1.6), pick(1.0, 5.0), E[seed:seed + 1]
    a.attach(sd)
    with a.condition(e, scale=scale): ours = draw(sd, ['a b'], [1, 2], gs, k=2)
    a.detach()
    state = {k: {n: t.clone() for n, t in v.items()} for k, v in a.state_dict().items()}
    sd.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
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

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('how', ['float32', 'float16', 'bfloat16', 'channels_last', 'model offload', 'sequential offload', 'moved after attaching'])
def test_cuda(how):
    cpu = G.pipeline('sd')
    a = FaceIDAdapter.from_state(**G.state(CKPT)).attach(cpu)
    with a.condition(E[:2]): want = draw(cpu, ['a', 'b'], [1, 2])
    pipe, dtype = G.pipeline('sd'), getattr(torch, how, None)
    adapter = FaceIDAdapter.from_state(**G.state(CKPT))
    if how == 'model offload': pipe.enable_model_cpu_offload()
    elif how == 'sequential offload': pipe.enable_sequential_cpu_offload()
    elif how == 'moved after attaching':
        adapter.attach(pipe)
        pipe.to('cuda')
    else: pipe.to('cuda', dtype if isinstance(dtype, torch.dtype) else torch.float32)
    if how == 'channels_last': pipe.unet.to(memory_format=torch.channels_last)
    if not adapter.attached: adapter.attach(pipe)
    with adapter.condition(E[:2]): got = draw(pipe, ['a', 'b'], [1, 2]).float().cpu()
    assert dist(got, want) < (1. if dtype in (torch.float16, torch.bfloat16) else .05)
    adapter.detach()
    assert torch.isfinite(draw(pipe, ['a'], [1])).all()


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('faces', [[], [[]], ([torch.ones(512)], [])])
def test_a_person_without_a_photograph_is_said_so(faces, several):
    with pytest.raises(ArgumentError, match='without a photograph'): face_embeddings(faces, several=several)
