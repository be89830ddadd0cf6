"""Others change what the adapter is attached to: LoRAs, weights, copies, processors, another UNet, an
interruption."""
import copy
import threading
import warnings

import pytest
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.models.attention_processor import AttnAddedKVProcessor
from torch import nn

import goldens_build as G
from faceid_nb.adapter import FaceIDAdapter, layer_size
from faceid_nb.errors import ArgumentError, FaceIDError, LoRAError, NotDrawnWarning
from faceid_nb.lora import Folded

CKPT = 'ip-adapter-faceid_sd15.bin'
PATH = 'down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k'
E = nn.functional.normalize(torch.randn(2, 512, generator=torch.Generator().manual_seed(0)), dim=-1)


def run(unet, n=1):
    "One step of the UNet."
    g = torch.Generator().manual_seed(n)
    x, words = torch.randn(n, 4, 8, 8, generator=g), torch.randn(n, 77, 64, generator=g)
    with torch.no_grad(): return unet(x, 500, encoder_hidden_states=words).sample


def draw(pipe, steps=2, **more):
    g = torch.Generator().manual_seed(1)
    return pipe('a', generator=g, num_inference_steps=steps, width=32, height=32, output_type='latent',
                **more).images


def face(adapter, pipe, **more):
    with adapter.condition(E[0]): return draw(pipe, **more)


def apart(a, b): return (a - b).abs().max().item()


def style(unet, seed=3):
    "Somebody's LoRA for every attention layer, as diffusers loads it."
    g, tensors = torch.Generator().manual_seed(seed), {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(('to_q', 'to_k', 'to_v', 'to_out.0')):
            tensors[f'unet.{name}.lora_A.weight'] = .3*torch.randn(4, layer.in_features, generator=g)
            tensors[f'unet.{name}.lora_B.weight'] = .1*torch.randn(layer.out_features, 4, generator=g)
    return tensors


@pytest.fixture
def pipe():
    p = G.pipeline('sd')
    p.set_progress_bar_config(disable=True)
    return p


@pytest.fixture
def adapter(pipe): return FaceIDAdapter.from_state(**G.state(CKPT)).attach(pipe)


# --- LoRAs and weights of others

@pytest.fixture
def styled(pipe, adapter):
    "(what the style alone draws, after it was fused while the adapter was attached)"
    other = G.pipeline('sd')
    other.set_progress_bar_config(disable=True)
    tensors = style(other.unet)
    for p in (other, pipe):
        p.load_lora_weights(dict(tensors), adapter_name='style')
        p.fuse_lora(adapter_names=['style'])
    return draw(other)


def test_a_fused_style_stays_after_detach(pipe, adapter, styled):
    adapter.detach()
    assert apart(draw(pipe), styled) < 1e-4


def test_a_fused_style_stays_at_another_lora_weight(pipe, adapter, styled):
    adapter.lora_weight = 0.
    assert apart(draw(pipe), styled) < 1e-4


def test_unfused_after_detach_it_is_the_bare_pipeline(pipe, adapter, styled):
    adapter.detach()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert apart(draw(pipe), draw(G.pipeline('sd'))) < 1e-4


def test_loaded_weights_stay_and_get_the_lora(pipe, adapter):
    new = {k: v + .01 for k, v in G.pipeline('sd').unet.state_dict().items()}
    other = G.pipeline('sd')
    other.unet.load_state_dict(new)
    want = face(FaceIDAdapter.from_state(**G.state(CKPT)).attach(other), other)
    pipe.unet.load_state_dict(new)
    assert apart(face(adapter, pipe), want) < 1e-4
    adapter.detach()
    assert all(torch.equal(v, new[k]) for k, v in pipe.unet.named_parameters())


def test_a_saved_pipeline_is_plain(pipe, adapter, tmp_path):
    pipe.unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    plain = dict(G.pipeline('sd').unet.named_parameters())
    assert all(torch.equal(v, plain[k]) for k, v in again.named_parameters())


def test_a_control_net_made_from_it_is_plain(pipe, adapter):
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    name = PATH + '.weight'
    assert torch.equal(dict(control.named_parameters())[name],
                       dict(G.pipeline('sd').unet.named_parameters())[name])


# --- copies

def test_a_copy_of_the_unet_is_plain(pipe, adapter):
    assert torch.equal(run(copy.deepcopy(pipe.unet)), run(G.pipeline('sd').unet))


def test_a_copy_made_in_a_block_draws_no_face(pipe, adapter):
    with adapter.condition(E[0]):
        run(pipe.unet)
        other = copy.deepcopy(pipe.unet)
    assert torch.equal(run(other), run(G.pipeline('sd').unet))


def test_a_copied_adapter_can_be_attached_to_the_copy(pipe, adapter):
    want = face(adapter, pipe)
    pipe2, adapter2 = copy.deepcopy(pipe), copy.deepcopy(adapter)
    assert not adapter2.attached
    assert torch.equal(face(adapter2.attach(pipe2), pipe2), want)


def test_a_pickle_is_refused(pipe, adapter, tmp_path):
    with pytest.raises(LoRAError, match='Detach first'): torch.save(pipe.unet, tmp_path/'unet.pt')


# --- another UNet, processors, fused projections

def test_another_unet_in_the_pipeline_is_refused(pipe, adapter):
    pipe.unet = G.pipeline('sd').unet
    with pytest.raises(ArgumentError, match='pipe.unet was replaced'): adapter.condition(E[0]).__enter__()


def test_attached_again_the_other_unet_draws_the_face(pipe, adapter):
    want, first = face(adapter, pipe), pipe.unet
    pipe.unet = G.pipeline('sd').unet
    assert torch.equal(face(adapter.attach(pipe), pipe), want)
    assert torch.equal(run(first), run(G.pipeline('sd').unet))


def test_idle_nothing_of_ours_is_in_the_layers(pipe, adapter):
    assert dict(pipe.unet.attn_processors).keys() and not any(
        'Decoupled' in type(p).__name__ for p in pipe.unet.attn_processors.values())


@pytest.mark.parametrize('verb', ['set_default_attn_processor'])
def test_idle_processors_may_be_set(pipe, adapter, verb):
    want = face(adapter, pipe)
    getattr(pipe.unet, verb)()
    assert apart(face(adapter, pipe), want) < 1e-4


def test_unload_ip_adapter_while_attached(pipe, adapter):
    want = face(adapter, pipe)
    pipe.unload_ip_adapter()
    assert apart(face(adapter, pipe), want) < 1e-4


def test_slicing_switched_on_inside_a_block_keeps_the_face(pipe, adapter):
    want = face(adapter, pipe)
    with adapter.condition(E[0]):
        pipe.enable_attention_slicing(1)
        assert apart(draw(pipe), want) < 1e-4


def test_strange_processors_put_in_inside_a_block_are_refused(pipe, adapter):
    with adapter.condition(E[0]), pytest.raises(ArgumentError, match='AttnAddedKVProcessor'):
        pipe.unet.set_attn_processor(AttnAddedKVProcessor())
        draw(pipe)


def test_projections_fused_after_attaching(pipe, adapter):
    "Nothing is lost: it is refused as long as there are copies of our weights."
    pipe.fuse_qkv_projections()
    with pytest.raises(ArgumentError, match='unfuse_qkv'): adapter.detach()
    assert adapter.attached
    pipe.unfuse_qkv_projections()
    adapter.detach()
    assert torch.equal(run(pipe.unet), run(G.pipeline('sd').unet))


# --- asked for, and not drawn

def test_a_block_around_another_pipeline_says_so(pipe, adapter):
    other = G.pipeline('sd')
    other.set_progress_bar_config(disable=True)
    with pytest.warns(NotDrawnWarning, match='never ran'):
        with adapter.condition(E[0]): draw(other)


def test_a_block_that_draws_says_nothing(pipe, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        face(adapter, pipe)


def test_an_exception_is_not_followed_by_a_warning(pipe, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter('error', NotDrawnWarning)
        with pytest.raises(ZeroDivisionError), adapter.condition(E[0]): 1/0


def test_masks_of_diffusers_are_refused(pipe, adapter):
    masks = dict(ip_adapter_masks=[torch.ones(1, 1, 8, 8)])
    with pytest.raises(ArgumentError, match='ip_adapter_masks'):
        face(adapter, pipe, cross_attention_kwargs=masks)


def test_picture_embeddings_of_diffusers_are_refused(pipe, adapter):
    with torch.no_grad(), adapter.condition(E[0]), pytest.raises(ArgumentError, match='ip_adapter_image'):
        pipe.unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 77, 64),
                  added_cond_kwargs={'image_embeds': [E[:1]]})


# --- blocks

def test_blocks_left_out_of_order(pipe, adapter):
    one, two = adapter.condition(E[0]), adapter.condition(E[1])
    want = face(adapter, pipe)
    two.__enter__()
    one.__enter__()
    two.__exit__(ValueError, None, None)
    assert torch.equal(draw(pipe), want)
    one.__exit__(None, None, None)
    assert adapter.at.active is None


def test_one_condition_entered_twice(pipe, adapter):
    c = adapter.condition(E[0])
    with c:
        with c: want = draw(pipe)
        assert torch.equal(draw(pipe), want)
    assert adapter.at.active is None


def test_another_thread_is_refused(pipe, adapter):
    said = []
    def other():
        try:
            with adapter.condition(E[1]): said.append('entered')
        except ArgumentError as e: said.append(str(e))
    with adapter.condition(E[0]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        draw(pipe)
    assert 'Another thread' in said[0]


# --- interrupted

@pytest.mark.parametrize('cut', range(1, 40, 3))
def test_an_interrupted_attach_leaves_nothing(pipe, monkeypatch, cut):
    plain, calls, real = G.pipeline('sd').unet, [], Folded.weigh
    def interrupted(self, weight):
        calls.append(1)
        if len(calls) == cut: raise KeyboardInterrupt
        real(self, weight)
    monkeypatch.setattr(Folded, 'weigh', interrupted)
    adapter = FaceIDAdapter.from_state(**G.state(CKPT))
    try: adapter.attach(pipe)
    except KeyboardInterrupt: assert not adapter.attached
    adapter.detach()
    assert torch.equal(run(pipe.unet), run(plain))


@pytest.mark.parametrize('cut', [1, 2, 5, 17])
def test_an_interrupted_detach_is_finished(pipe, adapter, monkeypatch, cut):
    calls, real = [], Folded.undo
    def interrupted(self):
        calls.append(1)
        if len(calls) == cut: raise KeyboardInterrupt
        real(self)
    monkeypatch.setattr(Folded, 'undo', interrupted)
    with pytest.raises(KeyboardInterrupt): adapter.detach()
    assert not adapter.attached
    assert torch.equal(run(pipe.unet), run(G.pipeline('sd').unet))


# --- keys and values of the prompt that are kept for the loop

def during(adapter, pipe, change):
    "A generation with something changed after its first step."
    def callback(pipe, i, t, tensors):
        if i == 0: change()
        return tensors
    return face(adapter, pipe, steps=3, callback_on_step_end=callback)


def without_keeping(monkeypatch):
    from faceid_nb import attention
    monkeypatch.setattr(attention.PromptKeys, '__call__',
                        lambda self, attn, text: attention.text_kv(attn, text))


CHANGES = {'lora_weight': lambda a, p: setattr(a, 'lora_weight', 0.),
           'set_adapters': lambda a, p: p.set_adapters(['style'], [0.]),
           'disable_lora': lambda a, p: p.disable_lora(),
           'fuse_lora': lambda a, p: p.fuse_lora(adapter_names=['style'], lora_scale=2.)}


@pytest.mark.parametrize('name', CHANGES)
def test_prompt_keys_notice_changed_weights(monkeypatch, name):
    made = []
    for kept in (True, False):
        pipe = G.pipeline('sd')
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(style(pipe.unet), adapter_name='style')
        adapter = FaceIDAdapter.from_state(**G.state(CKPT)).attach(pipe)
        if not kept: without_keeping(monkeypatch)
        made.append(during(adapter, pipe, lambda a=adapter, p=pipe: CHANGES[name](a, p)))
    assert apart(*made) < 1e-5


# --- attention maps at every size

def test_every_size_of_a_layer_is_found():
    for h in range(1, 130):
        for w in range(1, 130, 3):
            size = h, w
            for _ in range(4):
                assert layer_size((h, w), size[0]*size[1]) == size
                size = -(-size[0]//2), -(-size[1]//2)


def test_a_layer_of_another_size_is_refused():
    with pytest.raises(FaceIDError, match='7 places'): layer_size((8, 8), 7)


@pytest.mark.parametrize('kind', ['half'])
def test_the_adapter_in_half_precision(pipe, kind):
    adapter = FaceIDAdapter.from_state(**G.state(CKPT)).attach(pipe)
    want = face(adapter, pipe)
    assert apart(face(getattr(adapter.net, kind)() and adapter, pipe), want) < .05


# --- torch.compile

COMPILED = {
    'the UNet': lambda pipe, how: setattr(pipe, 'unet', torch.compile(pipe.unet, **how)),
    'in place': lambda pipe, how: pipe.unet.compile(**how),
    'repeated blocks': lambda pipe, how: pipe.unet.compile_repeated_blocks(**how)}


@pytest.mark.parametrize('form', COMPILED)
def test_compiled_without_a_break(pipe, adapter, form):
    want, bare = face(adapter, pipe), draw(pipe)
    torch._dynamo.reset()
    COMPILED[form](pipe, dict(backend='eager', fullgraph=True))
    assert torch.equal(face(adapter, pipe), want)
    assert torch.equal(draw(pipe), bare)


def test_animate_diff_made_from_it_says_that_no_face_was_drawn(pipe, adapter):
    "It copies the UNet's weights into a model of its own: the plain ones."
    shape = pipe.unet.config
    motion = MotionAdapter(block_out_channels=shape.block_out_channels, motion_num_attention_heads=2,
                           motion_norm_num_groups=8, motion_layers_per_block=shape.layers_per_block)
    unet = UNetMotionModel.from_unet2d(pipe.unet, motion)
    plain = dict(G.pipeline('sd').unet.named_parameters())
    assert torch.equal(dict(unet.named_parameters())[PATH + '.weight'], plain[PATH + '.weight'])


def test_the_cut_off_of_diffusers_own_adapters_is_refused_in_a_bare_pipeline(adapter, pipe):
    cut = IPAdapterScaleCutoffCallback(cutoff_step_ratio=.5)
    with pytest.raises(ArgumentError, match='IPAdapterScaleCutoffCallback'):
        face(adapter, pipe, callback_on_step_end=cut)
    draw(pipe, callback_on_step_end=cut)    # without an identity it is nobody's business
