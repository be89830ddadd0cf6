"""The official sizes: checkpoints with the keys and shapes of the official files on the official UNets,
Stable Diffusion 1.5 with numbers, SDXL by shapes alone.

Marked `slow`: about half a minute and 6 GB of memory, so they run with the others; a machine with less memory
skips the one that needs it.
`pytest -m 'not slow'` leaves them out, `pytest -m slow` runs nothing else.
The weights are random; what is official is every name, every shape and, where it is known, the size of the
file.
"""
from functools import cache
from itertools import chain, product
import psutil, pytest, torch
from diffusers import UNet2DConditionModel
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.checkpoint import check_fits, check_state, read_checkpoint
from faceid_nb.errors import BaseModelError, LoRAError
from faceid_nb.lora import lora_from_checkpoint, lora_pairs, read_lora
from faceid_nb.encoder import StructureEncoder

pytestmark = pytest.mark.slow

# unet/config.json of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0, without what says nothing about
# shapes
SD15 = dict(sample_size=64, in_channels=4, out_channels=4, center_input_sample=False, flip_sin_to_cos=True,
            freq_shift=0, layers_per_block=2, block_out_channels=[320, 640, 1280, 1280],
            down_block_types=['CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D',
                              'DownBlock2D'], up_block_types=['UpBlock2D', 'CrossAttnUpBlock2D',
                                                              'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'],
            cross_attention_dim=768, attention_head_dim=8, downsample_padding=1, mid_block_scale_factor=1,
            act_fn='silu', norm_num_groups=32, norm_eps=1e-5)
SDXL = dict(sample_size=128, in_channels=4, out_channels=4, center_input_sample=False, flip_sin_to_cos=True,
            freq_shift=0, layers_per_block=2, block_out_channels=[320, 640, 1280],
            down_block_types=['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
            up_block_types=['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
            transformer_layers_per_block=[1, 2, 10], cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
            use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816, downsample_padding=1, mid_block_scale_factor=1,
            act_fn='silu', norm_num_groups=32, norm_eps=1e-5)
VIT_H = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
             image_size=224, patch_size=14, projection_dim=1024, hidden_act='gelu')
BIG_G = VIT_H | dict(hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, projection_dim=1280)

# the transformer blocks in the order of the checkpoints, down, up, middle: width and path; a block has a
# self-attention and a cross-attention
def blocks(of):
    found = []
    for place, width, attentions, depth in of:
        for a, t in product(range(attentions), range(depth)):
            found.append((width, f'{place}.attentions.{a}.transformer_blocks.{t}'))
    return found
BLOCKS = {768: blocks([('down_blocks.0', 320, 2, 1), ('down_blocks.1', 640, 2, 1),
                       ('down_blocks.2', 1280, 2, 1), ('up_blocks.1', 1280, 3, 1), ('up_blocks.2', 640, 3, 1),
                       ('up_blocks.3', 320, 3, 1), ('mid_block', 1280, 1, 1)]),
          2048: blocks([('down_blocks.1', 640, 2, 2), ('down_blocks.2', 1280, 2, 10),
                        ('up_blocks.0', 1280, 3, 10), ('up_blocks.1', 640, 3, 2),
                        ('mid_block', 1280, 1, 10)])}
UNETS = {768: SD15, 2048: SDXL}
RANK = 128
# bytes of the official files, which are float16
MB = {('faceid', 768): 96_740_574, ('plusv2', 768): 156_558_509}


def shapes(variant, words):
    "{section: {name: shape}} of an official file, written from its structure, not from a UNet."
    tokens = 16 if variant == 'portrait' else 4
    proj = {'proj.0.weight': (1024, 512), 'proj.0.bias': (1024,), 'proj.2.weight': (tokens*words, 1024),
            'proj.2.bias': (tokens*words,), 'norm.weight': (words,), 'norm.bias': (words,)}
    if 'plus' in variant:
        r = {'proj_in.weight': (words, 1280), 'proj_in.bias': (words,), 'proj_out.weight': (words, words),
             'proj_out.bias': (words,), 'norm_out.weight': (words,), 'norm_out.bias': (words,)}
        for i in range(4):
            for norm in ('0.norm1', '0.norm2', '1.0'):
                r |= {f'layers.{i}.{norm}.weight': (words,), f'layers.{i}.{norm}.bias': (words,)}
            r |= {f'layers.{i}.0.to_q.weight': (words, words), f'layers.{i}.0.to_kv.weight': (2*words, words),
                  f'layers.{i}.0.to_out.weight': (words, words), f'layers.{i}.1.1.weight': (4*words, words),
                  f'layers.{i}.1.3.weight': (words, 4*words)}
        proj |= {f'perceiver_resampler.{k}': s for k, s in r.items()}
    layers = {}
    for i, ((width, _), _) in enumerate(product(BLOCKS[words], range(2))):
        for part, inputs in dict(q=width, k=words if i % 2 else width, v=words if i % 2 else width,
                                 out=width).items():
            if variant != 'portrait':
                layers |= {f'{i}.to_{part}_lora.down.weight': (RANK, inputs),
                           f'{i}.to_{part}_lora.up.weight': (width, RANK)}
        if i % 2: layers |= {f'{i}.to_k_ip.weight': (width, words), f'{i}.to_v_ip.weight': (width, words)}
    return {'image_proj': proj, 'ip_adapter': layers}


@cache
def pool(): return torch.randn(40_000_000, generator=torch.Generator().manual_seed(0))


def numbers(shape, name, dtype=torch.float16):
    """Numbers that are quickly had: a piece of one long random row, which one the name says; scaled by the
    inputs so that nothing explodes."""
    n = torch.Size(shape).numel()
    start = sum(map(ord, name))*7919 % (len(pool()) - n)
    return (pool()[start:start + n]*(.5*shape[-1]**-.5 if len(shape) > 1 else .1)).to(dtype).reshape(shape)


def state(variant, words, dtype=torch.float16):
    return {part: {k: numbers(s, k, dtype) for k, s in tensors.items()}
            for part, tensors in shapes(variant, words).items()}


def meta_unet(words):
    with torch.device('meta'): return UNet2DConditionModel(**UNETS[words]).requires_grad_(False).eval()


def weight(name, p, into):
    """A UNet's parameter of this name: the same numbers whenever they are asked for, so that none need be
    kept to compare with."""
    n = p.numel()
    start = sum(map(ord, name))*7919 % (len(pool()) - n)
    torch.mul(pool()[start:start + n], .5*p[0].numel()**-.5 if p.ndim > 1 else .1,
              out=(t := into.view(-1)[:n]))
    return (t.add_(1) if 'norm' in name and name.endswith('weight') else t).view(p.shape)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('full')


def test_the_unets_are_the_official_ones():
    for words, millions in ((768, 859.52), (2048, 2567.46)):
        unet = meta_unet(words)
        assert round(sum(p.numel() for p in unet.parameters())/1e6, 2) == millions
        named = [f'{path}.attn{k}.processor' for (_, path), k in product(BLOCKS[words], (1, 2))]
        assert list(unet.attn_processors) == named
    assert [len(BLOCKS[w]) for w in (768, 2048)] == [16, 70]


@pytest.mark.parametrize('variant', ['faceid', 'plusv2'])
def test_the_file_is_as_large_as_the_official_one(folder, variant):
    path = folder/f'ip-adapter-{"" if variant == "faceid" else "faceid-"}{variant}_sd15.bin'
    torch.save(state(variant, 768), path)
    # of the zip's own bookkeeping; one more row would be larger
    assert abs(path.stat().st_size - MB[variant, 768]) < 100_000
    c = read_checkpoint(path)
    assert (c.variant, c.num_tokens, c.lora_rank, c.cross_attention_dim,
            c.base) == (variant, 4, 128, 768, 'sd15')
    assert c.layers == list(range(1, 32, 2))
    assert {int(k.split('.')[0]) for k in c.ip_adapter if 'lora' in k} == set(range(32))


def filled_unet():
    "The whole UNet of Stable Diffusion 1.5, with numbers."
    unet = meta_unet(768).to_empty(device='cpu')
    for name, p in unet.named_parameters(): weight(name, p, into=p.data)
    return unet


def plusv2_file(folder):
    path = folder/'ip-adapter-faceid-plusv2_sd15.bin'
    if not path.exists(): torch.save(state('plusv2', 768), path)
    return path


def inputs_of_a_step():
    "Latents, words, a face of length one, and the states of a crop."
    draw, shapes = torch.Generator().manual_seed(1), ((1, 4, 16, 16), (1, 77, 768), (1, 512), (1, 257, 1280))
    x, text, face, clip = (torch.randn(shape, generator=draw) for shape in shapes)
    return x, text, torch.nn.functional.normalize(face, dim=-1), clip


def check_weights(unet):
    "Every weight is the one that `filled_unet` set."
    room = torch.empty(max(p.numel() for p in unet.parameters()))
    assert all(torch.equal(p, weight(name, p, into=room)) for name, p in unet.named_parameters())


def test_one_step_of_stable_diffusion_15(folder):
    free = psutil.virtual_memory().available/1e9
    if free < 6: pytest.skip(f'the full UNet in float32 needs 6 GB of memory, {free:.1f} are free')
    unet, path = filled_unet(), plusv2_file(folder)
    processors, (x, text, face, clip) = dict(unet.attn_processors), inputs_of_a_step()
    @torch.no_grad()
    def step(): return unet(x, 500, encoder_hidden_states=text).sample
    def change(a, b): return ((a - b).abs().max()/bare.std()).item()
    bare = step()
    assert torch.isfinite(bare).all() and bare.std() > 1e-3
    adapter = FaceIDAdapter.from_file(path).attach(unet)
    folded = step()
    with adapter.condition(face, structure=clip, guidance=1) as c:
        shown = step()
        assert len(c.kv) == 16
        shares = chain(*c.kv.values())
        assert {tuple(s.k.shape) for s in shares} == {(1, 8, 4, w//8) for w in (320, 640, 1280)}
    assert torch.isfinite(shown).all()
    assert change(folded, bare) > 1e-3
    assert change(shown, folded) > 1e-3
    assert torch.equal(step(), folded)
    adapter.detach()
    assert torch.equal(step(), bare)
    assert unet.attn_processors == processors
    check_weights(unet)


# SDXL has PlusV2 only
@pytest.mark.parametrize('variant, words',
                         [vw for vw in product(('faceid', 'plus', 'plusv2', 'portrait'), UNETS)
                          if vw != ('plus', 2048)])
def test_every_tensor_finds_its_layer(words, variant):
    s = state(variant, words)
    unet = meta_unet(words)
    c = check_state(s, variant)
    assert (c.variant, c.num_tokens, c.lora_rank, c.cross_attention_dim,
            c.base) == (variant, 16 if variant == 'portrait' else 4, 0 if variant == 'portrait' else 128,
                        words, {768: 'sd15', 2048: 'sdxl'}[words])
    assert len(c.layers) == len(BLOCKS[words]) and c.embedding_dim == 512
    check_fits(c, unet)
    lora = lora_from_checkpoint(c.ip_adapter, list(unet.attn_processors))
    pairs = lora_pairs(unet, lora)
    layers = product(BLOCKS[words], (1, 2), ('to_q', 'to_k', 'to_v', 'to_out.0'))
    every = {f'{path}.attn{k}.{part}' for (_, path), k, part in layers}
    assert set(pairs) == (every if variant != 'portrait' else set())
    assert 2*len(pairs) + 2*len(c.layers) == len(c.ip_adapter)        # nothing is left over
    for path, (layer, down, up) in pairs.items(): assert layer.weight.shape == (len(up), down.shape[1])


@pytest.mark.parametrize('variant', ['plusv2', 'portrait'])      # FaceID's tensors are among PlusV2's
def test_one_step_of_sdxl_by_shapes(variant):
    unet = meta_unet(2048)
    processors = dict(unet.attn_processors)
    s = state(variant, 2048)
    adapter = FaceIDAdapter.from_state(s['image_proj'], s['ip_adapter'], variant).attach(unet)
    del s
    def empty(*shape): return torch.empty(shape, device='meta')
    unit = torch.nn.functional.normalize(torch.ones(1, 512), dim=-1)
    with adapter.condition([[unit[0]]*2] if variant == 'portrait' else unit,
                           structure=torch.ones(1, 257, 1280) if 'plus' in variant else None,
                           guidance=1) as c, torch.no_grad():
        out = unet(empty(1, 4, 128, 128), 500, encoder_hidden_states=empty(1, 77, 2048),
                   added_cond_kwargs=dict(text_embeds=empty(1, 1280), time_ids=empty(1, 6))).sample
        assert out.shape == (1, 4, 128, 128) and len(c.kv) == 70
        tokens, shares = 32 if variant == 'portrait' else 4, chain(*c.kv.values())
        assert {tuple(s.k.shape) for s in shares} == {(1, heads, tokens, 64) for heads in (10, 20)}
    adapter.detach()
    assert unet.attn_processors == processors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize('words, other, fits', [(768, 2048, 'Stable Diffusion 1.x'), (2048, 768, 'SDXL')])
def test_the_other_base_model_is_refused(words, other, fits):
    unet = meta_unet(other)
    processors = dict(unet.attn_processors)
    s = state('portrait' if words == 2048 else 'faceid', words)
    with pytest.raises(BaseModelError, match=f'tokens are {words} wide, the words of this UNet {other}') as e:
        FaceIDAdapter.from_state(**s).attach(unet)
    assert e.value.do.endswith(fits)
    assert {768: 'Stable Diffusion 1.x', 2048: 'SDXL'}[other] in e.value.found
    assert unet.attn_processors == processors
    lora = {f'{path}.attn1.to_q.down': torch.zeros(RANK, w) for w, path in BLOCKS[words]}
    lora |= {f'{path}.attn1.to_q.up': torch.zeros(w, RANK) for w, path in BLOCKS[words]}
    with pytest.raises(LoRAError, match='another base model'): lora_pairs(unet, lora)


def test_one_wrong_number_is_found():
    s, unet = state('faceid', 768), meta_unet(768)
    for key, bad in (('31.to_k_ip.weight', (640, 768)), ('30.to_q_lora.up.weight', (640, 128)),
                     ('0.to_out_lora.down.weight', (128, 640))):
        t = {**s['ip_adapter'], key: torch.zeros(bad)}
        with pytest.raises(BaseModelError, match=key): check_fits(check_state({**s, 'ip_adapter': t}), unet)
    fewer = {k: t for k, t in s['ip_adapter'].items() if not k.startswith('31.')}
    with pytest.raises(BaseModelError, match='15 layers, this UNet has 16'):
        check_fits(check_state({**s, 'ip_adapter': fewer}), unet)


@pytest.mark.parametrize('words', [768, 2048])
def test_the_separate_lora(folder, words):
    from safetensors.torch import save_file
    flat = {}
    for (w, path), k in product(BLOCKS[words], (1, 2)):
        context = words if k == 2 else w
        for part, inputs in {'to_q': w, 'to_k': context, 'to_v': context, 'to_out.0': w}.items():
            name = f'unet.{path}.attn{k}.{part}'
            flat |= {f'{name}.lora_A.weight': (RANK, inputs), f'{name}.lora_B.weight': (w, RANK)}
    path = folder/f'lora{words}.safetensors'
    save_file({k: numbers(s, k).clone() for k, s in flat.items()}, path)
    if words == 768: assert abs(path.stat().st_size - 51_059_544) < 40_000      # the official file
    assert len(lora_pairs(meta_unet(words), read_lora(path))) == 8*len(BLOCKS[words])


def test_the_image_encoder_is_vit_h():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    with torch.device('meta'):
        right, wrong = (StructureEncoder(CLIPVisionModelWithProjection(CLIPVisionConfig(**c)))
                        for c in (VIT_H, BIG_G))
    s = state('plusv2', 768)
    adapter = FaceIDAdapter.from_state(**s, variant='plusv2')
    assert adapter.structure_width == 1280 and right.check(adapter.structure_width) is right
    assert right.states(torch.empty(2, 3, 224, 224, device='meta')).shape == (2, 257, 1280)
    with pytest.raises(BaseModelError,
                       match=r'1664 wide \(ViT-bigG\).*1280 wide \(ViT-H, laion/CLIP-ViT-H-14'):
        wrong.check(adapter.structure_width)
