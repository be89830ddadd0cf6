"""Identity -> tokens: equality with diffusers at random shapes, and what the classes promise."""
import pytest, torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings, strategies as st
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection
from faceid_nb.errors import CheckpointError, VariantError
from faceid_nb.projection import FacePerceiverResampler, MLPProjection, PlusProjection, projection_from_state
import goldens_build as G

quick = settings(max_examples=20, deadline=None)
def close(a, b, tol=1e-5): assert (a - b).abs().max().item() < tol

@quick
@given(d=st.sampled_from([8, 64, 96]), width=st.sampled_from([16, 512]), tokens=st.integers(1, 16),
       n=st.integers(1, 5), seed=st.integers(0, 99))
def test_mlp_equals_diffusers(d, width, tokens, n, seed):
    torch.manual_seed(seed)
    ours, theirs = MLPProjection(d, width, tokens), IPAdapterFaceIDImageProjection(width, d, 2, tokens)
    renamed = {k.replace('proj.0', 'ff.net.0.proj').replace('proj.2', 'ff.net.2'): v
               for k, v in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    x = torch.randn(n, width)
    assert ours(x).shape == (n, tokens, d)
    close(ours(x), theirs(x))

@pytest.mark.parametrize('name,shortcut',
                         [('plus_sd15', False), ('plusv2_sd15', True), ('plusv2_sdxl', True)])
def test_plus_equals_diffusers(name, shortcut):
    "Through diffusers' own conversion of the official layout."
    state = G.state(f'ip-adapter-faceid-{name}.bin')['image_proj']
    convert = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers
    theirs = convert(None, dict(state), low_cpu_mem_usage=False)
    theirs.shortcut, theirs.shortcut_scale = shortcut, 0.7
    ours = projection_from_state(state, shortcut)
    x, clip = torch.nn.functional.normalize(torch.randn(3, 512), dim=-1), torch.randn(3, 17, 96)
    theirs.clip_embeds = clip[:, None]
    close(ours(x, clip, 0.7), theirs(x), 2e-5)

@quick
@given(s=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_s_scale_is_a_line_and_a_row_stands_for_itself(s, seed):
    torch.manual_seed(seed)
    p, n = PlusProjection(64, clip_embeddings_dim=24, depth=2), len(s)
    x, clip = torch.randn(n, 512), torch.randn(n, 5, 24)
    out = p(x, clip, torch.tensor(s))
    a, r = p.parts(x, clip)
    for i in range(n):
        close(out[i], a[i] + s[i] * r[i])
        close(out[i:i + 1], p(x[i:i + 1], clip[i:i + 1], s[i]))
    p.shortcut = False
    assert torch.equal(p(x, clip, 5.), p(x, clip, 0.))  # Plus has no such weight

def test_photographs_of_one_person_are_laid_end_to_end():
    p = MLPProjection(32, 512, 16)
    x = torch.randn(2, 5, 512)
    close(p(x), torch.cat([p(x[:, i]) for i in range(5)], 1))
    assert p(x).shape == (2, 80, 32)

def test_perceiver_weights_sum_to_one_and_explain_the_output():
    attn = FacePerceiverResampler(64, 1, 64, None, 24).layers[0][0]
    x, latents = torch.randn(2, 7, 64), torch.randn(2, 4, 64)
    out, w = attn(x, latents, need_weights=True)
    assert w.shape == (2, 1, 4, 11)
    close(w.sum(-1), torch.ones(2, 1, 4))
    v = attn.to_kv(torch.cat([attn.norm1(x), attn.norm2(latents)], 1)).chunk(2, -1)[1]
    close(out, attn.to_out(w[:, 0] @ v))
    assert torch.equal(out, attn(x, latents))

@pytest.mark.parametrize('name', [n for n in G.SPEC['checkpoints'] if 'lora' not in n])
def test_from_state_reads_every_official_layout(name):
    state = G.state(name)['image_proj']
    p = projection_from_state({k: v.half() for k, v in state.items()}, shortcut=True)
    assert p.num_tokens == (16 if 'portrait' in name else 4) and p.norm.weight.dtype == torch.float32
    assert set(p.state_dict()) == set(state)

def test_plus_or_plusv2_has_to_be_said():
    plus = G.state('ip-adapter-faceid-plus_sd15.bin')['image_proj']
    with pytest.raises(VariantError, match="variant='plus'"): projection_from_state(plus)


def test_from_state_errors():
    mlp = G.state('ip-adapter-faceid_sd15.bin')['image_proj']
    for gone in mlp:
        rest = {k: v for k, v in mlp.items() if k != gone}
        with pytest.raises(CheckpointError): projection_from_state(rest)
    shorter = {**mlp, 'proj.2.weight': mlp['proj.2.weight'][:-1]}
    with pytest.raises(CheckpointError): projection_from_state(shorter)
    with pytest.raises(CheckpointError): projection_from_state({'proj.weight': torch.zeros(2, 2)})
