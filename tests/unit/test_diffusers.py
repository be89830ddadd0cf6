"""Every variant that diffusers knows, loaded there and here from one file: the same tensors and pictures."""
import pytest
import torch
from diffusers import UNet2DConditionModel
import goldens_build as G
from faceid_nb import checkpoint as C, convert as V
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.errors import BaseModelError, CheckpointError, LoRAError

pytestmark = pytest.mark.filterwarnings('ignore')
VARIANTS = ['faceid', 'plus', 'plusv2', 'portrait']
STEM = dict(faceid='', plus='-plus', plusv2='-plusv2', portrait='-portrait')


def random_adapter(unet, variant, seed):
    "A random checkpoint that fits this UNet; every tensor matters."
    tokens, rank = (16, 0) if variant == 'portrait' else (4, 4)
    a = FaceIDAdapter.new(unet, variant, tokens, rank, seed, clip_embeddings_dim=96)
    G.fill_(a.net, 20 + seed)
    return a


def random_pipeline(base, seed):
    "A pipeline with a UNet of random shape."
    r = torch.Generator().manual_seed(seed)
    def pick(*xs): return xs[int(torch.randint(len(xs), (), generator=r))]
    pipe = G.pipeline(base)
    spec = {**G.SPEC['configs'][f'unet_{base}'], 'layers_per_block': pick(1, 2)}
    if base == 'sd': spec |= dict(block_out_channels=pick((16, 32), (32, 64)), attention_head_dim=pick(4, 8))
    pipe.register_modules(unet=G.fill_(UNet2DConditionModel(**spec), 10 + seed).eval())
    return pipe, pick


def draw(pipe, prompts, seeds, guidance, k=1, **more):
    with torch.no_grad():
        return pipe(prompts, num_inference_steps=2, guidance_scale=guidance, num_images_per_prompt=k,
                    width=32, height=32, output_type='latent',
                    generator=[torch.Generator().manual_seed(s) for s in seeds], **more).images


def same_tensors(a, b): return a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


def same(a, b):
    return same_tensors(a.image_proj, b.image_proj) and same_tensors(a.ip_adapter, b.ip_adapter)


class Case:
    "A random question to both: who, how strong, how many pictures; drawn by our adapter or by theirs."
    def __init__(self, variant, guidance, seed, pick):
        self.variant, self.guidance = variant, guidance
        self.k, self.scale, self.s_scale = pick(1, 2), pick(.4, 1., 1.6), pick(.3, 1., 1.5)
        photos = pick(1, 2, 3, 5) if variant == 'portrait' else 1
        g = torch.Generator().manual_seed(seed)
        self.embeds = torch.nn.functional.normalize(torch.randn(photos, 512, generator=g), dim=1)
        self.states, self.nobody = torch.randn(1, 17, 96, generator=g), torch.randn(1, 17, 96, generator=g)

    def draw(self, pipe, **more):
        return draw(pipe, ['a b'], list(range(3, 3 + self.k)), self.guidance, self.k, **more)

    def ours(self, pipe, adapter):
        knobs = dict(scale=self.scale, num_images_per_prompt=self.k)
        if 'plus' in self.variant:
            knobs |= dict(structure=self.states, negative_structure=self.nobody, s_scale=self.s_scale)
        faces = self.embeds[None] if self.variant == 'portrait' else self.embeds
        adapter.attach(pipe)
        with adapter.condition(faces, **knobs): made = self.draw(pipe)
        adapter.detach()
        return made

    def theirs(self, pipe, file):
        pipe.load_ip_adapter(str(file.parent), subfolder='', weight_name=file.name, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(self.scale)
        guided = self.guidance > 1
        if 'plus' in self.variant:
            proj = pipe.unet.encoder_hid_proj.image_projection_layers[0]
            proj.shortcut, proj.shortcut_scale = self.variant == 'plusv2', self.s_scale
            # diffusers repeats the embeddings for a prompt's pictures, the states are the caller's business
            states = (self.nobody, self.states) if guided else (self.states,)
            proj.clip_embeds = torch.cat([s.repeat(self.k, 1, 1) for s in states])[:, None]
        e = self.embeds
        stack = torch.stack([torch.zeros_like(e), e]) if guided else e[None]
        return self.draw(pipe, ip_adapter_image_embeds=[stack])


@pytest.mark.parametrize('base, guidance, seed', [('sd', 1., 0), ('sd', 5., 1), ('sdxl', 5., 2)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_same_pictures(tmp_path, variant, base, guidance, seed):
    pipe, pick = random_pipeline(base, seed)
    case = Case(variant, guidance, seed, pick)
    adapter = random_adapter(pipe.unet, variant, seed)
    ours, bare = case.ours(pipe, adapter), case.draw(pipe)
    file = adapter.save(tmp_path/f'ip-adapter-faceid{STEM[variant]}_x.safetensors')
    theirs = case.theirs(pipe, file)
    assert (ours - theirs).abs().max() < G.TOLERANCE < (ours - bare).abs().max()/10
    check_held(pipe.unet, C.read_checkpoint(file), variant)


def check_held(unet, checkpoint, variant):
    "What lies in the UNet now is what we say lies there, and it leads back to the file, bit for bit."
    names, held = list(unet.attn_processors), unet.state_dict()
    said = V.to_diffusers(checkpoint, names)
    assert all(torch.equal(held[n], t) for n, t in said.items())
    assert {n for n in held if '_ip.' in n or 'encoder_hid' in n or 'lora_' in n} == set(said)
    back = V.from_diffusers(held, names, variant)
    assert back.variant == variant and same(back, checkpoint)


@pytest.mark.parametrize('variant', VARIANTS)
def test_round_trips(tmp_path, variant):
    unet = G.pipeline('sd').unet
    names = list(unet.attn_processors)
    a = random_adapter(unet, variant, 5)
    first = C.read_checkpoint(a.save(tmp_path/f'ip-adapter-faceid{STEM[variant]}_sd15.bin'))
    V.convert(first.path, tmp_path/'b.safetensors', variant)
    V.convert(tmp_path/'b.safetensors', tmp_path/f'c{STEM[variant]}.bin')
    assert same(first, C.read_checkpoint(tmp_path/f'c{STEM[variant]}.bin', variant))
    assert same(first, V.from_diffusers(V.to_diffusers(first, names), names, variant))
    if variant == 'portrait':
        with pytest.raises(LoRAError, match='no LoRA inside'):
            V.split_lora(first.path, tmp_path/'d.safetensors', tmp_path/'l.safetensors', names)
        return
    bare, lora = V.split_lora(first.path, tmp_path/'d.safetensors', tmp_path/'l.safetensors', names)
    c = C.read_checkpoint(bare)
    assert c.lora_rank == 0 and c.variant == variant
    assert same(first, C.read_checkpoint(V.join_lora(bare, lora, tmp_path/'e.safetensors', names)))
    with pytest.raises(LoRAError, match='already'):
        V.join_lora(first.path, lora, tmp_path/'f.safetensors', names)


def test_a_unet_without_an_adapter():
    unet = G.pipeline('sd').unet
    with pytest.raises(CheckpointError, match='No FaceID adapter'):
        V.from_diffusers(unet.state_dict(), list(unet.attn_processors))


def test_names_of_another_unet_and_two_adapters_are_refused():
    unet = G.pipeline('sd').unet
    names = list(unet.attn_processors)
    state = random_adapter(unet, 'faceid', 5).state_dict()
    held = V.to_diffusers(C.check_state(state), names)
    with pytest.raises(BaseModelError, match='another UNet'): V.from_diffusers(held, names[:2])
    with pytest.raises(CheckpointError, match='2 adapters'):
        V.from_diffusers(held | {k.replace('layers.0.', 'layers.1.', 1): t
                                 for k, t in held.items() if 'hid_proj' in k}, names)


@pytest.mark.parametrize('photos', [1, 2, 3, 5, 7])
@pytest.mark.parametrize('base, tokens', [('sd', 16), ('sd', 8), ('sdxl', 16)])
def test_portrait_takes_any_number_of_photographs(base, tokens, photos):
    pipe = G.pipeline(base)
    a = FaceIDAdapter.new(pipe.unet, 'portrait', tokens, 0)
    G.fill_(a.net, 3)
    e = torch.randn(1, photos, 512)
    assert a.tokens(e).shape == (1, photos*tokens, pipe.unet.config.cross_attention_dim)
    one_by_one = torch.cat([a.tokens(e[:, k]) for k in range(photos)], 1)
    assert (a.tokens(e) - one_by_one).abs().max() < 1e-5


def test_an_unnormalised_checkpoint_reads_raw_embeddings(tmp_path):
    """An MLP trained so says it in its file's name; the official file, a resampler with learnt queries,
    also in its tensors (test_variants)."""
    from faceid_nb.errors import ArgumentError
    from faceid_nb.face import Face
    pipe = G.pipeline('sdxl')
    a = random_adapter(pipe.unet, 'portrait', 4)
    unit = torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(0)), dim=0)
    face = Face(unit.numpy(), raw_embedding=(22*unit).numpy())
    made = {}
    for name in ('ip-adapter-faceid-portrait_sdxl.bin', 'ip-adapter-faceid-portrait_sdxl_unnorm.bin'):
        adapter = FaceIDAdapter.from_file(a.save(tmp_path/name)).attach(pipe)
        with adapter.condition([[face, face]]) as c: made[name] = c.tokens
        adapter.detach()
    one, raw = made.values()
    assert torch.equal(one, a.tokens(unit.expand(1, 2, -1)))
    assert torch.equal(raw, a.tokens(22*unit.expand(1, 2, -1)))
    assert not torch.equal(one, raw)
    adapter = FaceIDAdapter.from_file(tmp_path/'ip-adapter-faceid-portrait_sdxl_unnorm.bin').attach(pipe)
    with pytest.raises(ArgumentError, match='before normalisation'): adapter.condition(Face(unit.numpy()))
    adapter.detach()


@pytest.mark.parametrize('name', ['sd15-portrait-v11', 'sdxl-portrait', 'sdxl-portrait-unnorm'])
def test_the_other_portraits_have_names(name, tmp_path):
    from faceid_nb.models import MODELS
    m = MODELS[name]
    assert m.variant == 'portrait' and m.checkpoint.startswith('ip-adapter-faceid-portrait')
    pipe = G.pipeline('sdxl' if name.startswith('sdxl') else 'sd')
    file = random_adapter(pipe.unet, 'portrait', 1).save(tmp_path/m.checkpoint)
    a = FaceIDAdapter.from_file(file)
    assert (a.variant, a.num_tokens, a.raw) == ('portrait', 16, 'unnorm' in name)
