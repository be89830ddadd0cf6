"""Decoupled attention: equal to diffusers' at random shapes, rows of a batch, constants of a generation."""
import itertools
from types import SimpleNamespace
import pytest, torch
from hypothesis import given, settings, strategies as st
from diffusers.models.attention_processor import (
    Attention, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0, SlicedAttnProcessor)
from faceid_nb.attention import (
    DecoupledAttention, Share, attend, attention_weights, check_processor, cross_attention_layers,
    split_heads)
from faceid_nb.errors import ArgumentError, GuidanceError
from faceid_nb.guidance import Caller, guidance_rows
import goldens_build as G

quick = settings(max_examples=25, deadline=None)
def close(a, b, tol=1e-5): assert (a - b).abs().max().item() < tol

def layer(heads=2, c=8, d=12, seed=0):
    torch.manual_seed(seed)
    return Attention(query_dim=heads * c, cross_attention_dim=d, heads=heads, dim_head=c).eval()

shapes = dict(
    heads=st.integers(1, 4), c=st.sampled_from([4, 8]), d=st.sampled_from([6, 16]),
    N=st.integers(1, 9), L=st.integers(1, 7), T=st.integers(1, 6), B=st.integers(1, 4),
    scale=st.floats(-1, 2, width=32), seed=st.integers(0, 999))

@quick
@given(**shapes, sdpa=st.booleans())
@torch.no_grad()
def test_equals_diffusers_processor(*, heads, c, d, N, L, T, B, scale, seed, sdpa):
    attn = layer(heads, c, d, seed)
    x, text, face = torch.randn(B, N, heads * c), torch.randn(B, L, d), torch.randn(B, T, d)
    kind = IPAdapterAttnProcessor2_0 if sdpa else IPAdapterAttnProcessor
    theirs = kind(heads * c, d, num_tokens=(T,), scale=[scale])
    ours = DecoupledAttention(attn.processor, sdpa)
    k, v = (split_heads(w(face), heads) for w in (theirs.to_k_ip[0], theirs.to_v_ip[0]))
    ours.shares = [Share(k, v * scale)]
    close(ours(attn, x, text), theirs(attn, x, (text, [face[:, None]])))

@quick
@given(**shapes)
def test_attend_both_ways(*, heads, c, d, N, L, T, B, scale, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, heads, N, c), torch.randn(B, heads, L, c), torch.randn(B, heads, L, c)
    mask = torch.randn(B, heads, 1, L)
    for m in (None, mask):
        close(attend(q, k, v, m, True), attend(q, k, v, m, False))
        close(attention_weights(q, k, m).sum(-1), torch.ones(B, heads, N))

@pytest.mark.parametrize('usual', [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)])
@torch.no_grad()
def test_without_identity_the_usual_processor_runs_bit_for_bit(usual):
    attn = layer()
    x, text = torch.randn(2, 5, 16), torch.randn(2, 3, 12)
    attn.set_processor(usual)
    bare = attn(x, text)
    attn.set_processor(DecoupledAttention(usual))
    assert torch.equal(bare, attn(x, text))

@torch.no_grad()
def test_text_mask():
    attn = layer()
    x, text = torch.randn(2, 5, 16), torch.randn(2, 3, 12)
    mask = torch.tensor([[0., 0., -1e4], [0., 0., 0.]])[:, None]
    p = DecoupledAttention(attn.processor)
    p.shares = [Share(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8))]
    close(p(attn, x, text, mask), attn(x, text, mask))
    p = DecoupledAttention(attn.processor, sdpa=False)
    p.shares = [Share(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8))]
    close(p(attn, x, text, mask), attn(x, text, mask))

@torch.no_grad()
def test_text_constants_are_kept_and_noticed_when_they_change():
    attn = layer()
    x, text = torch.randn(1, 5, 16), torch.randn(1, 3, 12)
    p = DecoupledAttention(attn.processor)
    p.shares = [Share(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))]
    calls = []
    attn.to_k.register_forward_hook(lambda *a: calls.append(1))
    p(attn, x, text)
    p(attn, x, text)
    assert len(calls) == 1
    other = torch.randn(1, 3, 12)
    close(p(attn, x, other), attn(x, other))
    n = len(calls)
    # in place: noticed
    other.mul_(3)
    close(p(attn, x, other), attn(x, other))
    assert len(calls) == n + 2
    p.clear()
    assert p.prompt.text is None

def test_training_keeps_no_constants():
    attn = layer()
    x, text = torch.randn(1, 5, 16), torch.randn(1, 3, 12)
    p = DecoupledAttention(attn.processor)
    kv = torch.randn(2, 1, 2, 4, 8, requires_grad=True)
    p.shares = [Share(*kv)]
    for _ in range(2): p(attn, x, text).sum().backward()
    assert p.prompt.text is None and kv.grad.abs().sum() > 0

@torch.no_grad()
def test_record():
    attn = layer()
    p = DecoupledAttention(attn.processor)
    seen = []
    p.shares, p.record = [Share(torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8))], seen.append
    p(attn, torch.randn(2, 5, 16), torch.randn(2, 3, 12))
    assert seen[0].shape == (2, 5, 4)
    close(seen[0].sum(-1), torch.ones(2, 5))

# --- rows

def guiding(on): return Caller(SimpleNamespace(do_classifier_free_guidance=on))


def rows(*a, **k): return tuple(t.tolist() for t in guidance_rows(*a, **k))

@pytest.mark.parametrize('n,parts', itertools.product(range(1, 6), (1, 2, 3)))
def test_rows_exact(n, parts):
    own = list(range(n))
    reads = {1: [True] * n, 2: [False] * n + [True] * n, 3: [True] * n + [False] * 2 * n}
    want = own * parts, reads[parts]
    assert rows(n * parts, n, three_way=True) == want
    assert rows(n * parts, n, parts, three_way=True) == want

@pytest.mark.parametrize('m,parts', itertools.product(range(1, 7), (1, 2)))
def test_one_identity_serves_any_number_of_samples(m, parts):
    who, reads = rows(m * parts, 1, repeats=lambda p: p == parts)   # the batch has `parts` equal parts
    assert who == [0] * m * parts and reads == ([True] * m if parts == 1 else [False] * m + [True] * m)
    assert rows(m * parts, 1, parts) == (who, reads)

@pytest.mark.parametrize('batch,n,kw', [
    (5, 2, {}), (6, 4, {}), (8, 2, {}), (3, 2, {}), (3, 1, {}), (6, 2, {}),
    (7, 2, dict(parts=2)), (4, 2, dict(parts=1)), (4, 2, dict(parts=4)),
    (4, 2, dict(repeats=lambda p: False)), (2, 2, dict(caller=guiding(True))),
    (4, 2, dict(caller=guiding(False))), (4, 2, dict(parts=(False, True, True)))])
def test_rows_refused(batch, n, kw):
    with pytest.raises(GuidanceError) as e: guidance_rows(batch, n, **kw)
    assert f'{batch} rows' in str(e.value)

def test_rows_believe_the_pipeline():
    assert rows(4, 2, caller=guiding(True), repeats=lambda p: False)[1] == [False, False, True, True]


def test_rows_believe_that_there_is_no_guidance():
    assert rows(2, 1, caller=guiding(False))[1] == [True, True]


def test_rows_as_they_were_declared():
    assert rows(6, 2, (False, True, True))[1] == [False]*2 + [True]*4

# --- the UNet's layers

@pytest.mark.parametrize('kind', ['sd', 'sdxl'])
def test_layers_follow_the_official_numbering(kind):
    unet = G.unet(kind)
    found = cross_attention_layers(unet)
    assert [p + '.processor' for p, _, _ in found] == list(unet.attn_processors)
    name = {'sd': 'ip-adapter-faceid_sd15.bin', 'sdxl': 'ip-adapter-faceid_sdxl.bin'}[kind]
    ip = {int(k.split('.')[0]) for k in G.state(name)['ip_adapter'] if 'to_k_ip' in k}
    assert ip == {i for i, (_, _, cross) in enumerate(found) if cross}

def test_not_a_unet():
    with pytest.raises(ArgumentError, match='Linear'): cross_attention_layers(torch.nn.Linear(1, 1))

@pytest.mark.parametrize('processor,word', [
    (IPAdapterAttnProcessor2_0(8, 8), 'unload_ip_adapter'), (FusedAttnProcessor2_0(), 'unfuse'),
    (object(), 'set_default')])
def test_foreign_processors_are_refused(processor, word):
    with pytest.raises(ArgumentError, match=word): check_processor('mid_block', processor)
