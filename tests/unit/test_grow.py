"Adapters that start from what another variant knows, training on SDXL, precision by what the machine can."
import copy
import numpy as np
import pytest
import torch
import goldens_build as G
from helpers_train import run as train_shortly
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.align import crop_template
from faceid_nb.errors import ArgumentError
from faceid_nb.face import Face
from faceid_nb.grow import cut_lora, grow, widen_resampler
from faceid_nb.hub import TINY, has_bf16
from faceid_nb.measure import structure_distance
from faceid_nb.models import load_pipeline
from faceid_nb.projection import PlusProjection
from faceid_nb.tiny import sdxl as X
from faceid_nb.train_data import LatentTable, caption_ids, encode_sdxl

pytestmark = pytest.mark.filterwarnings('ignore')
E = torch.nn.functional.normalize(torch.randn(2, 512, generator=torch.Generator().manual_seed(5)), dim=1)
STATES = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope='module')
def known():
    "A FaceID with everything learnt, on the golden UNet."
    unet = G.pipeline('sd').unet
    a = FaceIDAdapter.new(unet, 'faceid', 4, 8)
    G.fill_(a.net, 7)
    with torch.no_grad():
        # so that a resampler's tenth stays small beside it
        for p in a.net.ip_adapter.parameters(): p.mul_(.3)
    return unet, a


def run(unet, adapter, lora=1., **more):
    "What the UNet says with this adapter on it."
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 7, 64, generator=g)
    adapter.attach(unet, lora_weight=lora)
    if adapter.structure_width: more |= dict(structure=STATES, negative_structure=STATES[:1])
    with torch.no_grad(), adapter.condition(E, guidance=1, **more):
        y = unet(x, 500, text).sample
    adapter.detach()
    return y


def far(a, b): return float((a - b).norm()/b.norm())


GROWN = [
    ('faceid', 4, 8, {}, 2e-3),
    ('faceid', 4, 16, {}, 2e-3),
    ('portrait', 8, 0, {}, 2e-2),
    ('plus', 4, 8, {}, .1),
    ('plusv2', 4, 8, dict(s_scale=0.), 2e-2),
]


@pytest.mark.parametrize('variant, tokens, rank, more, less', GROWN)
def test_a_grown_adapter_says_what_the_known_one_says(known, variant, tokens, rank, more, less):
    unet, a = known
    said = run(unet, a, 1. if rank else 0.)
    grown = grow(a, unet, unet, variant, tokens, rank, clip_embeddings_dim=32)
    fresh = FaceIDAdapter.new(unet, variant, tokens, rank, 0, 32)
    assert grown.variant == variant and grown.num_tokens == tokens
    assert far(run(unet, grown, **more), said) < less < far(run(unet, fresh, **more), said)/3


def test_a_lora_is_cut_to_the_nearest_of_its_rank():
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 20, generator=g), torch.randn(12, 8, generator=g)
    full = up @ down
    s = torch.linalg.svdvals(full)
    for rank in (2, 8, 11):
        d, u = cut_lora(down, up, torch.zeros(rank, 25))
        assert d.shape == (rank, 25) and u.shape == (12, rank) and not d[:, 20:].any()
        lost = float((u @ d[:, :20] - full).norm())
        assert abs(lost - float(s[rank:].norm())) < 1e-3      # Eckart and Young


def test_repeated_tokens_do_not_stay_alike(known):
    unet, a = known
    t = grow(a, unet, unet, 'portrait', 16, 0).tokens(E)
    assert t.shape[1] == 16
    assert all(float((t[:, k] - t[:, k + 4]).abs().mean()) > 1e-3 for k in range(12))


def test_a_trained_resampler_grows_into_a_wider_one():
    torch.manual_seed(0)
    a, b, fresh = (PlusProjection(d, clip_embeddings_dim=32) for d in (64, 128, 128))
    x = torch.randn(2, 4, 64)
    x = (x - x.mean(-1, keepdim=True))/x.std(-1, keepdim=True)
    wide = torch.nn.functional.pad(x, (0, 64))
    b.load_state_dict(widen_resampler(a.state_dict(), b.state_dict()), strict=False)
    with torch.no_grad():
        known = a.perceiver_resampler(x, STATES).flatten()
        grown, other = (p.perceiver_resampler(wide, STATES)[..., :64].flatten() for p in (b, fresh))
    likeness = [float(torch.cosine_similarity(said, known, dim=0)) for said in (grown, other)]
    assert likeness[0] > .9 > .5 > abs(likeness[1])


def test_what_cannot_be_grown_is_refused():
    unet = G.pipeline('sd').unet
    a = FaceIDAdapter.new(unet, 'plusv2', rank=2, clip_embeddings_dim=32)
    with pytest.raises(ArgumentError, match='different widths'):
        grow(a, unet, unet, 'plusv2', clip_embeddings_dim=48)
    a.weights.raw = True
    with pytest.raises(ArgumentError, match='unnormalised'): grow(a, unet, unet, 'faceid')


def test_another_variant_does_not_take_over_the_resampler():
    "What Plus's resampler says is the person; PlusV2's only adds to the person."
    unet = G.pipeline('sd').unet
    a = FaceIDAdapter.new(unet, 'plus', rank=2, clip_embeddings_dim=32)
    G.fill_(a.net, 2)
    key = 'perceiver_resampler.layers.0.0.to_q.weight'
    grown = [grow(a, unet, unet, v, rank=2, clip_embeddings_dim=32) for v in ('plus', 'plusv2')]
    was, same, other = (adapter.state_dict()['image_proj'][key] for adapter in (a, *grown))
    assert torch.equal(same, was) and not torch.equal(other, was)


# --- the base in the shape of SDXL

def test_the_sdxl_unet_begins_as_the_old_one():
    sd = load_pipeline(TINY/'sd')
    unet = X.take_over(X.new_unet_sdxl(sd.unet), sd.unet).eval()
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 8, 16, 16, generator=g), torch.randn(2, 9, 128, generator=g)
    extra = torch.zeros(2, 9, 64)
    sizes = torch.tensor([[64., 64, 0, 0, 64, 64]]).expand(2, -1)
    added = dict(text_embeds=torch.randn(2, 64, generator=g), time_ids=sizes)
    with torch.no_grad():
        a = sd.unet(x, 300, text).sample
        b = unet(x, 300, torch.cat([text, extra], -1), added_cond_kwargs=added).sample
    assert far(b, a) < 1e-4


def test_sdxl_text_is_what_the_pipeline_makes():
    # as SDXL's, which fills up with '!'
    pipe = G.pipeline('sdxl')
    pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer_2.pad_token = pipe.tokenizer_2.convert_ids_to_tokens(0)
    assert pipe.tokenizer_2.pad_token_id == 0 != pipe.tokenizer.pad_token_id
    prompts, pad = ['a b', 'b a b a', ''], pipe.tokenizer_2.pad_token_id
    ids = caption_ids(pipe.tokenizer, prompts)
    how = dict(device='cpu', num_images_per_prompt=1, do_classifier_free_guidance=False)
    with torch.no_grad():
        states, added = encode_sdxl(pipe.text_encoder, pipe.text_encoder_2, ids, 32, pad)
        want, _, pooled, _ = pipe.encode_prompt(prompts, **how)
    assert (states - want).abs().max() < 1e-5 and (added['text_embeds'] - pooled).abs().max() < 1e-5
    width = pipe.text_encoder_2.config.projection_dim
    told = pipe._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, width)
    assert torch.equal(added['time_ids'][:1], told)


def test_an_adapter_learns_on_sdxl(tmp_path):
    pipe = G.pipeline('sdxl')
    g = torch.Generator().manual_seed(0)
    person = torch.arange(6).repeat_interleave(2)
    ids = caption_ids(pipe.tokenizer, ['a b']*12)[None]
    latents, embeds = torch.randn(12, 4, 8, 8, generator=g), torch.randn(12, 512, generator=g)
    table = LatentTable(latents, ids, embeds, person, held=2)
    *_, last = train_shortly(pipe, table, tmp_path, steps=3, rank=2, batch=2, gauge=2)
    assert {'loss', 'right', 'wrong'} <= set(last)
    a = FaceIDAdapter.from_file(tmp_path/'ip-adapter-faceid_sdxl.safetensors').attach(pipe)
    before = FaceIDAdapter.new(pipe.unet, rank=2)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), before.parameters()))
    a.detach()


# --- precision

MACHINES = [
    ({}, 'cpu', False),
    (dict(avx2=True), 'cpu', False),
    (dict(avx512_bf16=True), 'cpu', True),
    (dict(amx_bf16=True), 'cpu', True),
    (dict(amx_bf16=True), 'mps', False),
]


@pytest.mark.parametrize('has, device, want', MACHINES)
def test_bf16_only_where_it_is_quick(monkeypatch, has, device, want):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    assert has_bf16(device) is want


# --- structure

def face(points):
    "A face of nobody with these landmarks."
    return Face(np.zeros(512, np.float32), landmarks=np.asarray(points, np.float32), pack='tiny')


def test_structure_distance_is_that_of_aligned_landmarks():
    t = np.asarray(crop_template(112), np.float32)
    turn = np.array([[np.cos(.4), -np.sin(.4)], [np.sin(.4), np.cos(.4)]])
    # place, size and tilt are no structure
    assert structure_distance(face(t), [face(3*t @ turn.T + 20)])[0] < 1e-5
    moved = t.copy()
    moved[2] += [8, 0]
    assert structure_distance(face(t), [face(moved), face(t)])[0] > .05
    back = structure_distance(face(t), face(moved))
    assert structure_distance(face(moved), face(t)) == pytest.approx(back)
