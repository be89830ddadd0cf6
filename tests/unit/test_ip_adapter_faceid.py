"""The drop-in classes: the original's arguments, the original's latents."""
import inspect
import pytest, torch
import goldens_build as gold
from faceid_nb import ip_adapter_faceid as together, ip_adapter_faceid_separate as separate
from faceid_nb.errors import ArgumentError, BaseModelError, CheckpointError, VariantError

from faceid_nb.encoder import StructureEncoder

ALL = [n for n in gold.CASES if n != 'faceid_separate_lora']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('golden')
    return lambda name: folder / name if (folder / name).exists() else gold.write_checkpoint(name, folder)


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    "The golden image encoder as a folder, as the original takes it."
    folder = tmp_path_factory.mktemp('encoder')
    gold.image_encoder().save_pretrained(folder)
    return folder


def made_for(name, files, encoder):
    "The class of a golden case, made as the original was, and the arguments that come first in its `generate`."
    case = gold.case(name)
    module, cls = case['reference'].split('.')
    cls = getattr({'ip_adapter_faceid': together, 'ip_adapter_faceid_separate': separate}[module], cls)
    embeds, face_image = gold.inputs(name)
    pipe, path = gold.pipeline(case['pipeline']), files(case['checkpoint'])
    if face_image is None: return cls(pipe, path, 'cpu', **case['init']), (embeds,)
    return cls(pipe, str(encoder), path, 'cpu', **case['init']), (face_image, embeds)


@pytest.mark.parametrize('name', ALL)
def test_golden(files, encoder, name):
    want = gold.expected()[name]
    model, first = made_for(name, files, encoder)
    got = torch.as_tensor(model.generate(*first, **gold.case(name)['call']))
    assert got.shape == want.shape and (got - want).abs().max() < gold.TOLERANCE < want.abs().mean() / 1000


@pytest.mark.parametrize('name', [n for n in gold.CASES if 'plus' in n])
def test_plus_goes_by_the_file_name_and_by_the_callers_word(files, encoder, name):
    want = gold.expected()[name]
    model, first = made_for(name, files, encoder)
    call = {k: v for k, v in gold.case(name)['call'].items() if k != 'shortcut'}
    assert (torch.as_tensor(model.generate(*first, **call)) - want).abs().max() < gold.TOLERANCE                           # the file's name says which
    other = torch.as_tensor(model.generate(*first, **call, shortcut='v2' not in name))
    assert (other - want).abs().max() > 1e-2
    assert model.adapter.net.image_proj.shortcut is model.shortcut                                                         # the adapter is as it was
    assert (torch.as_tensor(model.generate(*first, **call)) - want).abs().max() < gold.TOLERANCE                           # and the word is forgotten again


@pytest.mark.parametrize('cls, shortcut', [('IPAdapterFaceIDPlus', False), ('IPAdapterFaceIDPlusXL', True)])
def test_a_name_that_does_not_say_gives_the_originals_default(tmp_path, encoder, cls, shortcut):
    sd, name = ('sdxl', 'ip-adapter-faceid-plusv2_sdxl.bin') if shortcut else ('sd', 'ip-adapter-faceid-plusv2_sd15.bin')
    path = gold.write_checkpoint(name, tmp_path).rename(tmp_path/'mine.bin')
    assert getattr(together, cls)(gold.pipeline(sd), str(encoder), path, 'cpu').shortcut is shortcut


def test_plus_rows_stand_for_themselves(files, encoder):
    from PIL import ImageOps
    model, (face, embeds) = made_for('plusv2_s1.0', files, encoder)
    two = torch.cat([embeds, embeds.roll(7, 1)])
    faces = [face, ImageOps.mirror(face)]
    call = dict(num_inference_steps=2, width=16, height=16, output_type='latent')
    both = torch.as_tensor(model.generate(faces, two, prompt=['a man', 'a woman'], num_samples=1, seed=[3, 4], s_scale=[.5, 1.5], **call))
    for i in (0, 1):
        alone = torch.as_tensor(model.generate(faces[i], two[i:i + 1], prompt=['a man', 'a woman'][i], num_samples=1, seed=[3 + i], s_scale=[.5, 1.5][i], **call))
        assert (both[i] - alone[0]).abs().max() < 1e-4
    crossed = torch.as_tensor(model.generate(faces[::-1], two, prompt=['a man', 'a woman'], num_samples=1, seed=[3, 4], s_scale=[.5, 1.5], **call))
    assert all((crossed[i] - both[i]).abs().max() > 1e-3 for i in (0, 1))    # each read its own picture


def test_separate_plus_ignores_the_lora_inside(files, encoder):
    name = 'ip-adapter-faceid-plusv2_sd15.bin'
    pipe = gold.pipeline('sd')
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    model = separate.IPAdapterFaceIDPlus(pipe, str(encoder), files(name), 'cpu')
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items()) and model.shortcut
    face, embeds = gold.inputs('plusv2_s1.0')[::-1]
    assert len(model.generate(face, embeds, num_samples=3, num_inference_steps=1, width=16, height=16)) == 3


@pytest.mark.parametrize('width', [64, 128])
def test_an_encoder_of_another_width_is_refused(files, width):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    small = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=28))
    pipe = gold.pipeline('sd')
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(BaseModelError, match=f'{width} wide.*96 wide'): together.IPAdapterFaceIDPlus(pipe, StructureEncoder(small), files('ip-adapter-faceid-plus_sd15.bin'), 'cpu')
    assert pipe.unet.attn_processors == processors


def test_plus_wants_both_the_face_and_its_picture(files, encoder):
    model, (face, embeds) = made_for('plus', files, encoder)
    with pytest.raises(ArgumentError, match='face_image is None'): model.generate(faceid_embeds=embeds, prompt='a man')
    with pytest.raises(ArgumentError, match='faceid_embeds is None'): model.generate(face_image=face, prompt='a man')
    with pytest.raises(ArgumentError, match='2 pictures for 1'): model.generate([face, face], embeds, prompt='a man')


def test_golden_separate_lora(files):
    pytest.importorskip('peft')
    case = gold.case('faceid_separate_lora')
    want = gold.expected()[case['name']]
    pipe = gold.pipeline('sd')
    pipe.load_lora_weights(files(case['lora']))
    pipe.fuse_lora()
    got = separate.IPAdapterFaceID(pipe, files(case['checkpoint']), 'cpu').generate(gold.inputs(case['name'])[0], **case['call'])
    assert (torch.as_tensor(got) - want).abs().max() < gold.TOLERANCE


def test_arguments_are_the_originals():
    names = lambda f: [p for p in inspect.signature(f).parameters if p != 'self']
    assert names(together.IPAdapterFaceID.__init__) == ['sd_pipe', 'ip_ckpt', 'device', 'lora_rank', 'num_tokens', 'torch_dtype']
    assert names(together.IPAdapterFaceIDXL.__init__) == names(together.IPAdapterFaceID.__init__)
    for cls in (together.IPAdapterFaceIDPlus, together.IPAdapterFaceIDPlusXL): assert names(cls.__init__) == ['sd_pipe', 'image_encoder_path', 'ip_ckpt', 'device', 'lora_rank', 'num_tokens', 'torch_dtype']
    assert names(separate.IPAdapterFaceIDPlus.__init__) == ['sd_pipe', 'image_encoder_path', 'ip_ckpt', 'device', 'num_tokens', 'torch_dtype']
    for cls in (together.IPAdapterFaceIDPlus, together.IPAdapterFaceIDPlusXL, separate.IPAdapterFaceIDPlus):
        p = inspect.signature(cls.generate).parameters
        assert {k: v.default for k, v in p.items() if v.default is not inspect._empty} == dict(face_image=None, faceid_embeds=None, prompt=None, negative_prompt=None, scale=1.0, num_samples=4, seed=None, guidance_scale=7.5, num_inference_steps=30, s_scale=1.0, shortcut=None)
        assert names(cls.generate)[-1] == 'kwargs'
    assert names(separate.IPAdapterFaceID.__init__) == ['sd_pipe', 'ip_ckpt', 'device', 'num_tokens', 'n_cond', 'torch_dtype']
    for cls in (together.IPAdapterFaceID, separate.IPAdapterFaceID):
        p = inspect.signature(cls.generate).parameters
        assert {k: v.default for k, v in p.items() if v.default is not inspect._empty} == dict(faceid_embeds=None, prompt=None, negative_prompt=None, scale=1.0, num_samples=4, seed=None, guidance_scale=7.5, num_inference_steps=30)
        assert names(cls.generate)[-1] == 'kwargs'


FAST = dict(num_inference_steps=1, width=16, height=16, output_type='latent')


@pytest.fixture(scope='module')
def model(files): return together.IPAdapterFaceID(gold.pipeline('sd'), files('ip-adapter-faceid_sd15.bin'), 'cpu')


def test_numbers_from_the_file(model): assert (model.lora_rank, model.num_tokens) == (8, 4)


@pytest.mark.parametrize('given', [dict(lora_rank=128), dict(num_tokens=16), dict(lora_rank=0)])
def test_contradictions(files, given):
    pipe = gold.pipeline('sd')
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(ArgumentError, match='contradicts'): together.IPAdapterFaceID(pipe, files('ip-adapter-faceid_sd15.bin'), 'cpu', **given)
    assert pipe.unet.attn_processors == processors and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


@pytest.mark.parametrize('kind, name, error, says', [('sd', 'ip-adapter-faceid-plus_sd15.bin', VariantError, 'plus'), ('sd', 'ip-adapter-faceid_sdxl.bin', BaseModelError, 'wide'),
                                                    ('sd', 'ip-adapter-faceid_sd15_lora.safetensors', CheckpointError, 'is a LoRA')])
def test_wrong_file_leaves_the_pipeline(files, kind, name, error, says):
    pipe = gold.pipeline(kind)
    processors = dict(pipe.unet.attn_processors)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(error, match=says): together.IPAdapterFaceID(pipe, files(name), 'cpu')
    assert pipe.unet.attn_processors == processors and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_order_and_seed_lists(model):
    two = torch.nn.functional.normalize(torch.randn(2, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    batch = torch.as_tensor(model.generate(two, prompt=['a man', 'a woman'], num_samples=2, seed=[1, 2, 3, 4], **FAST))
    for row, (face, prompt, seed) in enumerate([(0, 'a man', 1), (0, 'a man', 2), (1, 'a woman', 3), (1, 'a woman', 4)]):
        alone = torch.as_tensor(model.generate(two[face:face + 1], prompt=prompt, num_samples=1, seed=[seed], **FAST))
        assert (batch[row] - alone[0]).abs().max() < 1e-4
    assert len({tuple(b.flatten().tolist()) for b in batch}) == 4


def test_defaults_are_the_cards(model, monkeypatch):
    seen = {}
    def spy(**kw):
        seen.update(kw)
        return type('R', (), {'images': []})
    monkeypatch.setattr(model, 'pipe', spy)
    model.generate(torch.eye(512)[:2])
    assert seen['prompt'] == ['best quality, high quality'] * 2 and seen['num_images_per_prompt'] == 4 and seen['generator'] is None
    assert seen['negative_prompt'] == ['monochrome, lowres, bad anatomy, worst quality, low quality'] * 2 and (seen['guidance_scale'], seen['num_inference_steps']) == (7.5, 30)


@pytest.mark.parametrize('kw, says', [(dict(), 'faceid_embeds'), (dict(faceid_embeds=torch.eye(512)[:2], prompt=['a', 'b', 'c']), '3 texts in prompt for 2'), (dict(faceid_embeds=torch.zeros(1, 100)), '512'),
                                      (dict(faceid_embeds=torch.eye(512)[:1], negative_prompt=['a', 'b']), 'negative_prompt'), (dict(faceid_embeds=torch.full((1, 512), float('nan'))), 'finite')])
def test_bad_arguments(model, kw, says):
    with pytest.raises(ArgumentError, match=says): model.generate(**FAST, **kw)


def test_guidance_off(model):
    e = torch.eye(512)[:1]
    a, b = (torch.as_tensor(model.generate(e, num_samples=1, seed=0, guidance_scale=1.0, scale=s, **FAST)) for s in (0., 1.))
    assert (a - b).abs().max() > 1e-3


def test_separate_makes_as_many_as_asked(files):
    m = separate.IPAdapterFaceID(gold.pipeline('sd'), files('ip-adapter-faceid_sd15.bin'), 'cpu')
    assert m.adapter.lora_weight == 0 and len(m.generate(torch.eye(512)[:1], num_samples=4, **FAST)) == 4


def test_separate_leaves_weights_alone(files):
    pipe = gold.pipeline('sd')
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    separate.IPAdapterFaceID(pipe, files('ip-adapter-faceid_sd15.bin'), 'cpu')
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_card_import_names():
    from faceid_nb.ip_adapter_faceid import IPAdapterFaceID
    from faceid_nb.ip_adapter_faceid_separate import IPAdapterFaceID as Separate
    assert IPAdapterFaceID is not Separate


def test_image_embeds(model):
    tokens, nobody = model.get_image_embeds(torch.eye(512)[:2])
    assert tokens.shape == nobody.shape == (2, 4, 64) and not torch.equal(tokens, nobody)


def test_plus_reads_its_file_once_and_the_cheap_checks_come_first(files, encoder, monkeypatch):
    reads = []
    read = together.read_checkpoint
    monkeypatch.setattr(together, 'read_checkpoint', lambda *a: reads.append(a) or read(*a))
    together.IPAdapterFaceIDPlus(gold.pipeline('sd'), str(encoder), files('ip-adapter-faceid-plusv2_sd15.bin'), 'cpu')
    assert len(reads) == 1
    monkeypatch.setattr(StructureEncoder, 'from_pretrained', lambda *a, **k: pytest.fail('the encoder was loaded'))
    with pytest.raises(ArgumentError, match='contradicts'): together.IPAdapterFaceIDPlus(gold.pipeline('sd'), str(encoder), files('ip-adapter-faceid-plusv2_sd15.bin'), 'cpu', lora_rank=128)
    with pytest.raises(VariantError): together.IPAdapterFaceIDPlus(gold.pipeline('sd'), str(encoder), files('ip-adapter-faceid_sd15.bin'), 'cpu')
