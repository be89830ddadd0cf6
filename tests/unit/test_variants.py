"""Every variant under its official name, from a folder: the original's numbers through `load` and
`FaceID.generate`, and what does not fit refused."""
import copy
import shutil
import pytest, torch
import goldens_build as gold
from faceid_nb import models as M
from faceid_nb.errors import ArgumentError, BaseModelError, VariantError, WeightsMissingError
from faceid_nb.encoder import StructureEncoder

NAMES = {'faceid_scale1.0': 'sd15-faceid', 'faceid_scale0.6': 'sd15-faceid', 'faceid_scale0.0': 'sd15-faceid',
         'faceid_pair': 'sd15-faceid', 'faceid_separate_lora': 'sd15-faceid-lora', 'plus': 'sd15-plus',
         **{f'plusv2_s{s}': 'sd15-plusv2' for s in ('0.0', '0.5', '1.0', '1.5')}, 'sdxl': 'sdxl-faceid',
         'plusv2_sdxl_s0.3': 'sdxl-plusv2', 'plusv2_sdxl_s1.0': 'sdxl-plusv2', 'portrait': 'sd15-portrait'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "All golden checkpoints and the image encoder, as somebody would keep the official ones."
    f = tmp_path_factory.mktemp('official')
    for name in gold.SPEC['checkpoints']: gold.write_checkpoint(name, f)
    gold.image_encoder().save_pretrained(f/'image_encoder')
    return f


@pytest.fixture(autouse=True)
def no_pack(monkeypatch):
    class Reader:
        name = 'buffalo_l'
        def __init__(self, name, root=None, providers=None): pass
    monkeypatch.setattr('faceid_nb.face.FaceReader', Reader)
    monkeypatch.setattr(M, '_told', set())


def load(name, folder, pipe=None):
    return M.load(name, folder=folder, device='cpu',
                  base=pipe or gold.pipeline('sdxl' if 'sdxl' in name else 'sd'), download=False)


@pytest.mark.parametrize('case', NAMES)
def test_the_originals_numbers(folder, case):
    spec, want = gold.case(case), gold.expected()[case]
    call = dict(spec['call'])
    embeds, face_image = gold.inputs(case)
    n = call.pop('num_samples')
    # the original draws the batch's noise at once
    me = load(NAMES[case], folder)
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(call.pop('seed')))
    faces = [list(e) for e in embeds] if embeds.ndim == 3 else embeds
    if face_image is not None: call['structure'] = me.encoder([face_image])
    call.pop('shortcut', None)
    got = torch.stack([torch.as_tensor(x) for x in me.generate(faces, call.pop('prompt'), num_samples=n,
                                                               seed=0, latents=noise, **call)])
    assert got.shape == want.shape and (got - want).abs().max() < gold.TOLERANCE


def test_every_golden_case_has_a_name(): assert set(NAMES) == set(gold.CASES) - {'faceid_safetensors'}


def test_a_row_reads_its_own_structure(folder):
    me = load('sd15-plusv2', folder)
    embeds, face = gold.inputs('plusv2_s1.0')
    two = me.encoder([face, face.rotate(180)])
    how = dict(num_samples=1, num_inference_steps=1, width=16, height=16, output_type='latent', seed=0)
    def make(**kw):
        return torch.stack([torch.as_tensor(x) for x in me.generate(torch.cat([embeds, embeds]), 'a man',
                                                                    **how, **kw)])
    both = make(structure=two)
    assert (both[0] - both[1]).abs().max() > 1e-3
    assert (make(structure=two[:1])[1] - both[0]).abs().max() < 1e-4
    assert (make(structure=two, batch_size=1) - both).abs().max() < 1e-4
    # weight 0: nothing of the picture is left
    flat = make(structure=two, s_scale=0.)
    assert (flat[0] - flat[1]).abs().max() < 1e-4
    mixed = make(structure=two, s_scale=[0., 1.])
    assert (mixed[0] - flat[0]).abs().max() < 1e-4 and (mixed[1] - both[1]).abs().max() < 1e-4


def test_the_structure_comes_with_the_face(folder):
    from faceid_nb.face import Face
    import numpy as np
    from faceid_nb.align import ARCFACE_TEMPLATE
    me = load('sd15-plus', folder)
    image = gold.inputs('plus')[1]
    embedding = gold.inputs('plus')[0][0].numpy()
    face = Face(embedding=embedding, landmarks=ARCFACE_TEMPLATE*2, image=np.asarray(image))
    how = dict(num_samples=1, num_inference_steps=1, width=16, height=16, output_type='latent', seed=0)
    a, b = (torch.as_tensor(me.generate(f, 'a', **how, **kw)[0])
            for f, kw in ((face, {}), (torch.as_tensor(embedding),
                                       dict(structure=me.encoder([face.crop(224)])))))
    assert (a - b).abs().max() < 1e-5
    with pytest.raises(ArgumentError, match='no picture to read'):
        me.generate(torch.as_tensor(embedding), 'a', **how)
    with pytest.raises(ArgumentError, match='3 structures for 1'):
        me.generate(face, 'a', structure=me.encoder([image]*3), **how)
    me.encoder = None
    with pytest.raises(ArgumentError, match='no image encoder'): me.generate(face, 'a', **how)


def test_structure_is_refused_where_there_is_none(folder):
    with pytest.raises(ArgumentError, match='embedding only'):
        load('sd15-faceid', folder).generate(gold.inputs('plus')[0], 'a', structure=torch.zeros(1, 17, 96))


@pytest.mark.parametrize('name, kind', [('sd15-faceid', 'sdxl'), ('sd15-plusv2', 'sdxl'),
                                        ('sdxl-faceid', 'sd'), ('sdxl-plusv2', 'sd')])
def test_a_checkpoint_for_the_other_base_is_refused(folder, name, kind):
    pipe = gold.pipeline(kind)
    processors = dict(pipe.unet.attn_processors)
    before = {k: v.detach().clone() for k, v in pipe.unet.named_parameters()}
    with pytest.raises(BaseModelError): load(name, folder, pipe)
    assert pipe.unet.attn_processors == processors
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.named_parameters())


def test_an_encoder_of_another_width_is_refused(folder, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    shutil.copy(folder/'ip-adapter-faceid-plus_sd15.bin', tmp_path)
    CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                                   num_attention_heads=2, image_size=56,
                                                   patch_size=28)).save_pretrained(tmp_path/'image_encoder')
    with pytest.raises(BaseModelError, match='64 wide.*96 wide'): load('sd15-plus', tmp_path)
    (tmp_path/'image_encoder'/'config.json').write_text('{}')
    (tmp_path/'image_encoder'/'model.safetensors').write_bytes(b'<html>')
    with pytest.raises(BaseModelError, match='not a CLIP vision model'): load('sd15-plus', tmp_path)
    shutil.rmtree(tmp_path/'image_encoder')
    with pytest.raises(WeightsMissingError, match='image encoder laion'): load('sd15-plus', tmp_path)


def test_a_plus_file_under_the_other_name_is_refused(folder, tmp_path):
    shutil.copy(folder/'ip-adapter-faceid_sd15.bin', tmp_path/'ip-adapter-faceid-plus_sd15.bin')
    with pytest.raises(VariantError, match='not a plus'): load('sd15-plus', tmp_path)


@pytest.mark.parametrize('kind', ['sd', 'sdxl'])
def test_a_folder_says_itself_which_base_it_is(tmp_path, kind):
    gold.pipeline(kind).save_pretrained(tmp_path)
    assert M.is_sdxl(tmp_path) is (kind == 'sdxl')
    for sdxl in (False, True):
        assert ('XL' in type(M.load_pipeline(tmp_path, sdxl=sdxl)).__name__) is (kind == 'sdxl')


def test_pixels_are_what_clip_asks_for():
    from PIL import Image
    import numpy as np
    e = StructureEncoder(gold.image_encoder())
    red = Image.new('RGB', (224, 224), (255, 0, 0))
    mean, sd = np.array([.48145466, .4578275, .40821073]), np.array([.26862954, .26130258, .27577711])
    assert np.allclose(e.pixels([red])[0, :, 100, 100].numpy(), (np.array([1., 0, 0]) - mean)/sd, atol=1e-4)
    assert e([red, red]).shape == (2, 17, 96) and e.nobody().shape == (1, 17, 96)


def test_nobody_is_looked_at_once(monkeypatch):
    e = StructureEncoder(gold.image_encoder())
    looked = []
    states = StructureEncoder.states
    monkeypatch.setattr(StructureEncoder, 'states', lambda self, x: looked.append(1) or states(self, x))
    assert torch.equal(e.nobody(), e.nobody()) and len(looked) == 1


# --- row by row against diffusers' own projections and processors, on a bare UNet of random shape
KINDS = ['faceid', 'plus', 'plusv2', 'portrait', 'unnormalised']


def raw_projection(d, seed, tokens=16, dim=64):
    "The projection of ip-adapter-faceid-portrait_sdxl_unnorm.bin: its names, smaller; heads are 64 wide."
    from faceid_nb.projection import FacePerceiverResampler
    return gold.fill_({'latents': torch.zeros(1, tokens, dim),
                       **{k: torch.zeros_like(v)
                          for k, v in FacePerceiverResampler(dim, 4, 64, dim//64, 512,
                                                             d).state_dict().items()}}, seed)


def random_case(kind, base, seed):
    "A UNet and a checkpoint without LoRA that fits it, and a function that picks at random."
    from diffusers import UNet2DConditionModel
    from faceid_nb.adapter import FaceIDAdapter
    r = torch.Generator().manual_seed(seed)
    def pick(*xs): return xs[int(torch.randint(len(xs), (), generator=r))]
    unet = gold.fill_(UNet2DConditionModel(**{**gold.SPEC['configs'][f'unet_{base}'],
                                              'layers_per_block': pick(1, 2),
                                              'block_out_channels': pick((16, 32), (32, 64))}), seed).eval()
    variant = 'portrait' if kind == 'unnormalised' else kind
    tokens = pick(8, 16) if variant == 'portrait' else 4
    a = FaceIDAdapter.new(unet, variant, tokens, 0, seed, clip_embeddings_dim=pick(48, 96))
    gold.fill_(a.net, 20 + seed)
    if kind == 'unnormalised':
        a = FaceIDAdapter.from_state(raw_projection(unet.config.cross_attention_dim, seed, tokens,
                                                    pick(64, 128)), a.state_dict()['ip_adapter'])
    return unet, a, pick


def in_diffusers(unet, adapter, scale):
    "A copy of the UNet with the same weights in diffusers' own processors."
    theirs = copy.deepcopy(unet)
    theirs._load_ip_adapter_weights([adapter.state_dict()], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, 'scale'): processor.scale = [scale]
    return theirs

class Drawer:
    "Normal numbers from one seed."
    def __init__(self, seed): self.generator = torch.Generator().manual_seed(seed)
    def __call__(self, *shape): return torch.randn(shape, generator=self.generator)


def tell_structure(theirs, states, s_scale, shortcut):
    "What diffusers wants poked into its projection for Plus."
    projection = theirs.encoder_hid_proj.image_projection_layers[0]
    projection.shortcut, projection.shortcut_scale, projection.clip_embeds = shortcut, s_scale, states


def one_call(width, base, draw, B, parts):
    "function(unet, more of added_cond_kwargs): its prediction for `parts` copies of B random latents."
    x, text, rows = draw(B, 4, 8, 8), draw(2*B, 7, width), parts*B
    more = dict(text_embeds=draw(rows, 64), time_ids=draw(rows, 6)) if base == 'sdxl' else {}
    def run(net, **added):
        return net(x.repeat(parts, 1, 1, 1), 500, encoder_hidden_states=text[:rows],
                   added_cond_kwargs={**more, **added}).sample
    return run


def largest(a, b): return (a - b).abs().max().item()


def differ(kind, base, seed):
    "The largest differences between ours and diffusers' predictions, and between ours and those for nobody."
    unet, a, pick = random_case(kind, base, seed)
    draw = Drawer(seed)
    B = pick(1, 2, 3)
    k = pick(1, 2, 3, 5, 7) if a.variant == 'portrait' else 1
    cfg, L, scale = pick(True, False), pick(5, 17), pick(.4, 1., 1.6)
    e = draw(B, k, 512)*(1 if a.raw else 512**-.5)
    clip, none, s = (draw(B, L, a.structure_width or 1), draw(1, L, a.structure_width or 1),
                     2*torch.rand(B, generator=draw.generator))
    parts = 1 + cfg
    rows, run = parts*B, one_call(unet.config.cross_attention_dim, base, draw, B, parts)
    seen = dict(structure=clip, negative_structure=none, s_scale=s) if a.structure_width else {}
    theirs = in_diffusers(unet, a, scale)
    both = torch.cat([torch.zeros_like(e), e])[-rows:]
    if a.structure_width:
        states = torch.cat([none.expand(B, -1, -1), clip])[-rows:, None]
        tell_structure(theirs, states, s.repeat(parts)[:, None, None], kind == 'plusv2')
    a.attach(unet)
    faces = e if a.variant == 'portrait' else e[:, 0]
    with torch.no_grad():
        with a.condition(faces, scale=scale, guidance=parts, **seen): ours = run(unet)
        expected = run(theirs, image_embeds=[both[:, :, None] if a.raw else both])
        return largest(ours, expected), largest(ours, run(unet))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('base', ['sd', 'sdxl'])
@pytest.mark.parametrize('kind', KINDS)
def test_rows_as_diffusers_computes_them(kind, base, seed):
    apart, effect = differ(kind, base, seed)
    assert apart < 2e-5 and effect > 1e-2


# --- the unnormalised Portrait: `Face.raw_embedding` goes in
@pytest.fixture(scope='module')
def unnormalised(tmp_path_factory):
    f = tmp_path_factory.mktemp('unnorm')/'ip-adapter-faceid-portrait_sdxl_unnorm.bin'
    c = gold.state('ip-adapter-faceid_sdxl.bin')
    torch.save({'image_proj': raw_projection(128, 7),
                'ip_adapter': {k: v for k, v in c['ip_adapter'].items() if '_ip.' in k}}, f)
    return f


def person(seed, length=20.):
    from faceid_nb.face import Face
    v = torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(seed)), dim=0)
    return Face(v.numpy(), raw_embedding=None if length is None else (length*v).numpy())


def test_unnormalised_reads_the_raw_embedding(unnormalised):
    from faceid_nb.adapter import FaceIDAdapter
    from faceid_nb.faceid import FaceID
    pipe = gold.pipeline('sdxl')
    a = FaceIDAdapter.from_file(unnormalised)
    assert (a.variant, a.raw, a.num_tokens) == ('portrait', True, 16)
    me = FaceID(pipe, a)
    how = dict(num_samples=1, num_inference_steps=1, width=16, height=16, output_type='latent', seed=0)
    def make(*faces): return torch.as_tensor(me.generate([list(faces)], 'a', **how)[0])
    two = make(person(1), person(2))
    raws = [torch.as_tensor(person(i).raw_embedding) for i in (1, 2)]
    assert torch.equal(two, make(*raws))
    assert (two - make(*(r/4 for r in raws))).abs().max() > 1e-3
    assert (two - make(person(1))).abs().max() > 1e-3
    with pytest.raises(ArgumentError, match='came without|only has the unit'): make(person(1, None))
    with pytest.raises(ArgumentError, match='length 1'): make(torch.as_tensor(person(1).embedding))
    with pytest.raises(ArgumentError, match='length 1'):
        a.condition([person(1)], negative=torch.as_tensor(person(2).embedding))
    with pytest.raises(BaseModelError): FaceIDAdapter.from_file(unnormalised).attach(gold.pipeline('sd'))


@pytest.mark.parametrize('suffix', ['.bin', '.safetensors'])
def test_unnormalised_is_saved_as_it_came(unnormalised, tmp_path, suffix):
    from faceid_nb.adapter import FaceIDAdapter
    from faceid_nb.checkpoint import read_checkpoint
    was, now = (read_checkpoint(unnormalised),
                read_checkpoint(FaceIDAdapter.from_file(unnormalised).save(tmp_path/f'mine{suffix}')))
    assert now.raw
    assert now.variant == 'portrait'
    for part in ('image_proj', 'ip_adapter'):
        assert all(torch.equal(t, getattr(was, part)[k]) for k, t in getattr(now, part).items())


@pytest.mark.parametrize('name', ['ip-adapter-faceid-portrait-v11_sd15.bin',
                                  'ip-adapter-faceid-portrait_sd15.safetensors'])
def test_portrait_v11_is_laid_out_as_the_first(name, tmp_path):
    from safetensors.torch import save_file
    from faceid_nb.adapter import FaceIDAdapter
    state = gold.state('ip-adapter-faceid-portrait_sd15.bin')
    if name.endswith('.bin'): torch.save(state, tmp_path/name)
    else:
        named = [{f'{part}.{k}': t for k, t in tensors.items()} for part, tensors in state.items()]
        save_file(named[0] | named[1], tmp_path/name)
    a = FaceIDAdapter.from_file(tmp_path/name)
    assert (a.variant, a.num_tokens, a.raw, a.structure_width) == ('portrait', 16, False, None)


# -- what an adapter has to know of its base, and how far photographs of one person agree

def test_facts_of_both_families():
    from faceid_nb.attention import base_facts
    sd, xl = base_facts(gold.pipeline('sd')), base_facts(gold.pipeline('sdxl'))
    assert (sd['text encoders'], xl['text encoders']) == (1, 2)
    assert sd['also told to the UNet'] == 'nothing'
    assert xl['also told to the UNet'] == 'text_time'
    for f, pipe in ((sd, gold.pipeline('sd')), (xl, gold.pipeline('sdxl'))):
        names = [n for n, _ in pipe.unet.named_modules() if n.endswith(('attn1', 'attn2'))]
        assert f['attention layers'] == len(names)
        assert f['of which read words'] == sum(n.endswith('attn2') for n in names)
        assert f['width of a word'] == pipe.unet.config.cross_attention_dim
        assert abs(f['parameters (million)'] - sum(p.numel() for p in pipe.unet.parameters())/1e6) <= .05


def test_agreement_is_the_mean_cosine_with_the_others():
    import numpy as np
    from faceid_nb.errors import ArgumentError
    from faceid_nb.face import agreement
    rng = np.random.default_rng(0)
    e = rng.normal(size=(4, 512))
    unit = e/np.linalg.norm(e, axis=1, keepdims=True)
    want = [np.mean([unit[i] @ unit[j] for j in range(4) if j != i]) for i in range(4)]
    assert np.allclose(agreement(e), want) and np.allclose(agreement(3*e), want)
    person = rng.normal(size=512)
    five = np.stack([person + .5*rng.normal(size=512) for _ in range(4)] + [rng.normal(size=512)])
    assert agreement(five).argmin() == 4 and agreement(five)[4] < .2 < agreement(five)[:4].min()
    with pytest.raises(ArgumentError, match='nothing to agree'): agreement(e[:1])
