"The drop-in classes: the original's arguments, the original's latents."
import inspect
from types import SimpleNamespace

import pytest
import torch
from PIL import ImageOps
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import goldens_build as gold
from faceid_nb import ip_adapter_faceid as together, ip_adapter_faceid_separate as separate
from faceid_nb.encoder import StructureEncoder
from faceid_nb.errors import ArgumentError, BaseModelError, CheckpointError, VariantError

MODULES = dict(ip_adapter_faceid=together, ip_adapter_faceid_separate=separate)
ALL = [n for n in gold.CASES if n != 'faceid_separate_lora']
PLUS = [n for n in gold.CASES if 'plus' in n]
FAST = dict(num_inference_steps=1, width=16, height=16, output_type='latent')
EYE = torch.eye(512)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('golden')
    return lambda name: folder / name if (folder / name).exists() else gold.write_checkpoint(name, folder)


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    "The golden image encoder as a folder, as the original takes it."
    folder = tmp_path_factory.mktemp('encoder')
    gold.image_encoder().save_pretrained(folder)
    return str(folder)


def made_for(name, files, encoder):
    "The class of a golden case, made as the original was, and what comes first in its `generate`."
    case, (embeds, face_image) = gold.case(name), gold.inputs(name)
    module, cls = case['reference'].split('.')
    cls = getattr(MODULES[module], cls)
    pipe, path = gold.pipeline(case['pipeline']), files(case['checkpoint'])
    if face_image is None: return cls(pipe, path, 'cpu', **case['init']), (embeds,)
    return cls(pipe, encoder, path, 'cpu', **case['init']), (face_image, embeds)


def latents(model, *given, **call): return torch.as_tensor(model.generate(*given, **call))


def far(a, b): return (a - b).abs().max()


class Kept:
    "A UNet's weights and processors, to be compared later."
    def __init__(self, unet):
        self.unet, self.processors = unet, dict(unet.attn_processors)
        self.weights = {k: v.detach().clone() for k, v in unet.named_parameters()}

    @property
    def same_weights(self):
        return all(torch.equal(v, self.weights[k]) for k, v in self.unet.named_parameters())

    @property
    def same(self): return self.unet.attn_processors == self.processors and self.same_weights


# --- the original's latents
@pytest.mark.parametrize('name', ALL)
def test_golden(files, encoder, name):
    want = gold.expected()[name]
    model, given = made_for(name, files, encoder)
    got = latents(model, *given, **gold.case(name)['call'])
    assert got.shape == want.shape and far(got, want) < gold.TOLERANCE < want.abs().mean() / 1000


@pytest.fixture(params=PLUS)
def plus_case(request, files, encoder):
    "(latents of the original, model, what is given, the call without its shortcut, whether it is PlusV2)"
    name = request.param
    call = {k: v for k, v in gold.case(name)['call'].items() if k != 'shortcut'}
    return gold.expected()[name], *made_for(name, files, encoder), call, 'v2' in name


def test_plus_goes_by_the_file_name(plus_case):
    want, model, given, call, v2 = plus_case
    assert far(latents(model, *given, **call), want) < gold.TOLERANCE


def test_the_callers_word_counts_more_and_is_forgotten_again(plus_case):
    want, model, given, call, v2 = plus_case
    assert far(latents(model, *given, **call, shortcut=not v2), want) > 1e-2
    assert model.adapter.net.image_proj.shortcut is model.shortcut
    assert far(latents(model, *given, **call), want) < gold.TOLERANCE


@pytest.mark.parametrize('cls, kind, file, shortcut', [
    ('IPAdapterFaceIDPlus', 'sd', 'ip-adapter-faceid-plusv2_sd15.bin', False),
    ('IPAdapterFaceIDPlusXL', 'sdxl', 'ip-adapter-faceid-plusv2_sdxl.bin', True)])
def test_a_name_that_does_not_say_gives_the_originals_default(tmp_path, encoder, cls, kind, file, shortcut):
    path = gold.write_checkpoint(file, tmp_path).rename(tmp_path/'mine.bin')
    assert getattr(together, cls)(gold.pipeline(kind), encoder, path, 'cpu').shortcut is shortcut


def test_golden_separate_lora(files):
    pytest.importorskip('peft')
    case = gold.case('faceid_separate_lora')
    pipe = gold.pipeline('sd')
    pipe.load_lora_weights(files(case['lora']))
    pipe.fuse_lora()
    model = separate.IPAdapterFaceID(pipe, files(case['checkpoint']), 'cpu')
    got = latents(model, gold.inputs(case['name'])[0], **case['call'])
    assert far(got, gold.expected()[case['name']]) < gold.TOLERANCE


# --- rows
@pytest.fixture(scope='module')
def two_plus(files, encoder):
    "A PlusV2 model, two faces and their embeddings."
    model, (face, embeds) = made_for('plusv2_s1.0', files, encoder)
    return model, [face, ImageOps.mirror(face)], torch.cat([embeds, embeds.roll(7, 1)])


PAIR = dict(num_inference_steps=2, width=16, height=16, output_type='latent', num_samples=1)
BOTH = dict(prompt=['a man', 'a woman'], seed=[3, 4], s_scale=[.5, 1.5])


@pytest.mark.parametrize('i', [0, 1])
def test_plus_rows_stand_for_themselves(two_plus, i):
    model, faces, two = two_plus
    both = latents(model, faces, two, **PAIR, **BOTH)
    own = dict(prompt=BOTH['prompt'][i], seed=[BOTH['seed'][i]], s_scale=BOTH['s_scale'][i])
    assert far(both[i], latents(model, faces[i], two[i:i + 1], **PAIR, **own)[0]) < 1e-4


def test_plus_rows_read_their_own_pictures(two_plus):
    model, faces, two = two_plus
    both, crossed = (latents(model, f, two, **PAIR, **BOTH) for f in (faces, faces[::-1]))
    assert all(far(a, b) > 1e-3 for a, b in zip(both, crossed))


@pytest.fixture(scope='module')
def model(files):
    return together.IPAdapterFaceID(gold.pipeline('sd'), files('ip-adapter-faceid_sd15.bin'), 'cpu')


@pytest.fixture(scope='module')
def two():
    "Two embeddings of nobody."
    e = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(e, dim=1)


@pytest.fixture(scope='module')
def batch(model, two):
    return latents(model, two, prompt=['a man', 'a woman'], num_samples=2, seed=[1, 2, 3, 4], **FAST)


@pytest.mark.parametrize('row, face, prompt', [
    (0, 0, 'a man'), (1, 0, 'a man'), (2, 1, 'a woman'), (3, 1, 'a woman')])
def test_order_and_seed_lists(model, two, batch, row, face, prompt):
    alone = latents(model, two[face:face + 1], prompt=prompt, num_samples=1, seed=[1 + row], **FAST)
    assert far(batch[row], alone[0]) < 1e-4


def test_rows_differ(batch): assert len({tuple(b.flatten().tolist()) for b in batch}) == 4


def test_guidance_off(model):
    off = dict(num_samples=1, seed=0, guidance_scale=1.0, **FAST)
    assert far(*(latents(model, EYE[:1], scale=s, **off) for s in (0., 1.))) > 1e-3


# --- arguments
INIT = ['sd_pipe', 'ip_ckpt', 'device', 'lora_rank', 'num_tokens', 'torch_dtype']
PLUS_INIT = ['sd_pipe', 'image_encoder_path', 'ip_ckpt', 'device', 'lora_rank', 'num_tokens', 'torch_dtype']
CALL = dict(faceid_embeds=None, prompt=None, negative_prompt=None, scale=1.0, num_samples=4, seed=None,
            guidance_scale=7.5, num_inference_steps=30)
PLUS_CALL = dict(face_image=None, **CALL, s_scale=1.0, shortcut=None)


def names(f): return [p for p in inspect.signature(f).parameters if p != 'self']


def defaults(f):
    parameters = inspect.signature(f).parameters.items()
    return {name: p.default for name, p in parameters if p.default is not inspect._empty}


@pytest.mark.parametrize('cls, expected', [
    (together.IPAdapterFaceID, INIT), (together.IPAdapterFaceIDXL, INIT),
    (together.IPAdapterFaceIDPlus, PLUS_INIT), (together.IPAdapterFaceIDPlusXL, PLUS_INIT),
    (separate.IPAdapterFaceID, ['sd_pipe', 'ip_ckpt', 'device', 'num_tokens', 'n_cond', 'torch_dtype']),
    (separate.IPAdapterFaceIDPlus,
     ['sd_pipe', 'image_encoder_path', 'ip_ckpt', 'device', 'num_tokens', 'torch_dtype'])])
def test_constructors_are_the_originals(cls, expected): assert names(cls.__init__) == expected


@pytest.mark.parametrize('cls, expected', [
    (together.IPAdapterFaceID, CALL), (separate.IPAdapterFaceID, CALL),
    (together.IPAdapterFaceIDPlus, PLUS_CALL), (together.IPAdapterFaceIDPlusXL, PLUS_CALL),
    (separate.IPAdapterFaceIDPlus, PLUS_CALL)])
def test_calls_are_the_originals(cls, expected):
    assert defaults(cls.generate) == expected and names(cls.generate) == [*expected, 'kwargs']


def test_defaults_are_the_cards(model, monkeypatch):
    seen = {}
    def spy(**given):
        seen.update(given)
        return SimpleNamespace(images=[])
    monkeypatch.setattr(model, 'pipe', spy)
    model.generate(EYE[:2])
    negative = 'monochrome, lowres, bad anatomy, worst quality, low quality'
    assert seen['prompt'] == ['best quality, high quality'] * 2 and seen['negative_prompt'] == [negative] * 2
    assert seen['num_images_per_prompt'] == 4 and seen['generator'] is None
    assert (seen['guidance_scale'], seen['num_inference_steps']) == (7.5, 30)


def test_two_modules_have_two_classes():
    assert together.IPAdapterFaceID is not separate.IPAdapterFaceID


def test_numbers_from_the_file(model): assert (model.lora_rank, model.num_tokens) == (8, 4)


def test_image_embeds(model):
    tokens, nobody = model.get_image_embeds(EYE[:2])
    assert tokens.shape == nobody.shape == (2, 4, 64) and not torch.equal(tokens, nobody)


# --- refusals
@pytest.mark.parametrize('given', [dict(lora_rank=128), dict(num_tokens=16), dict(lora_rank=0)])
def test_contradictions(files, given):
    pipe = gold.pipeline('sd')
    before = Kept(pipe.unet)
    with pytest.raises(ArgumentError, match='contradicts'):
        together.IPAdapterFaceID(pipe, files('ip-adapter-faceid_sd15.bin'), 'cpu', **given)
    assert before.same


@pytest.mark.parametrize('name, error, says', [
    ('ip-adapter-faceid-plus_sd15.bin', VariantError, 'plus'),
    ('ip-adapter-faceid_sdxl.bin', BaseModelError, 'wide'),
    ('ip-adapter-faceid_sd15_lora.safetensors', CheckpointError, 'is a LoRA')])
def test_wrong_file_leaves_the_pipeline(files, name, error, says):
    pipe = gold.pipeline('sd')
    before = Kept(pipe.unet)
    with pytest.raises(error, match=says): together.IPAdapterFaceID(pipe, files(name), 'cpu')
    assert before.same


@pytest.mark.parametrize('given, says', [
    (dict(), 'faceid_embeds'),
    (dict(faceid_embeds=EYE[:2], prompt=['a', 'b', 'c']), '3 texts in prompt for 2'),
    (dict(faceid_embeds=torch.zeros(1, 100)), '512'),
    (dict(faceid_embeds=EYE[:1], negative_prompt=['a', 'b']), 'negative_prompt'),
    (dict(faceid_embeds=torch.full((1, 512), float('nan'))), 'finite')], ids=range(5))
def test_bad_arguments(model, given, says):
    with pytest.raises(ArgumentError, match=says): model.generate(**FAST, **given)


@pytest.mark.parametrize('width', [64, 128])
def test_an_encoder_of_another_width_is_refused(files, width):
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=2, image_size=56, patch_size=28)
    small = StructureEncoder(CLIPVisionModelWithProjection(config))
    pipe = gold.pipeline('sd')
    before = Kept(pipe.unet)
    with pytest.raises(BaseModelError, match=f'{width} wide.*96 wide'):
        together.IPAdapterFaceIDPlus(pipe, small, files('ip-adapter-faceid-plus_sd15.bin'), 'cpu')
    assert before.same


@pytest.mark.parametrize('pictures, people, says', [
    (0, 1, 'face_image is None'), (1, 0, 'faceid_embeds is None'), (2, 1, '2 pictures for 1')])
def test_plus_wants_both_the_face_and_its_picture(files, encoder, pictures, people, says):
    model, (face, embeds) = made_for('plus', files, encoder)
    given = dict(face_image=[None, face, [face, face]][pictures], faceid_embeds=embeds if people else None)
    with pytest.raises(ArgumentError, match=says): model.generate(**given, prompt='a man')


def test_plus_reads_its_file_once(files, encoder, monkeypatch):
    reads, read = [], together.read_checkpoint
    def noted(*given):
        reads.append(given)
        return read(*given)
    monkeypatch.setattr(together, 'read_checkpoint', noted)
    path = files('ip-adapter-faceid-plusv2_sd15.bin')
    together.IPAdapterFaceIDPlus(gold.pipeline('sd'), encoder, path, 'cpu')
    assert len(reads) == 1


@pytest.mark.parametrize('file, given, error', [
    ('ip-adapter-faceid-plusv2_sd15.bin', dict(lora_rank=128), ArgumentError),
    ('ip-adapter-faceid_sd15.bin', {}, VariantError)])
def test_the_cheap_checks_come_first(files, encoder, monkeypatch, file, given, error):
    def load(*given, **more): pytest.fail('the encoder was loaded')
    monkeypatch.setattr(StructureEncoder, 'from_pretrained', load)
    with pytest.raises(error, match='contradicts' if given else None):
        together.IPAdapterFaceIDPlus(gold.pipeline('sd'), encoder, files(file), 'cpu', **given)


# --- the second module
def test_separate_makes_as_many_as_asked(files):
    m = separate.IPAdapterFaceID(gold.pipeline('sd'), files('ip-adapter-faceid_sd15.bin'), 'cpu')
    assert m.adapter.lora_weight == 0 and len(m.generate(EYE[:1], num_samples=4, **FAST)) == 4


def test_separate_leaves_weights_alone(files):
    pipe = gold.pipeline('sd')
    before = Kept(pipe.unet)
    separate.IPAdapterFaceID(pipe, files('ip-adapter-faceid_sd15.bin'), 'cpu')
    assert before.same_weights


def test_separate_plus_ignores_the_lora_inside(files, encoder):
    pipe = gold.pipeline('sd')
    before = Kept(pipe.unet)
    model = separate.IPAdapterFaceIDPlus(pipe, encoder, files('ip-adapter-faceid-plusv2_sd15.bin'), 'cpu')
    assert before.same_weights and model.shortcut
    embeds, face = gold.inputs('plusv2_s1.0')
    assert len(model.generate(face, embeds, num_samples=3, num_inference_steps=1, width=16, height=16)) == 3


def test_separate_counts_the_photographs(files):
    path = files(gold.case('portrait')['checkpoint'])
    m = separate.IPAdapterFaceID(gold.pipeline('sd'), path, 'cpu', n_cond=5)
    with pytest.raises(ArgumentError, match='n_cond=5 contradicts'): m.generate(EYE[:3][None], **FAST)


# --- what the original's objects have, and what it runs
@pytest.mark.parametrize('name', ['set_scale', 'image_proj_model', 'torch_dtype', 'device', 'ip_ckpt', 'pipe',
                                  'num_tokens', 'lora_rank', 'init_proj', 'set_ip_adapter',
                                  'load_ip_adapter'])
def test_what_an_instance_has(model, name): assert getattr(model, name) is not None


def test_what_an_instance_of_plus_has(files, encoder):
    model, (face, _) = made_for('plus', files, encoder)
    assert model.image_encoder_path == encoder and model.torch_dtype == torch.float32
    assert model.clip_image_processor(images=face, return_tensors='pt').pixel_values.shape[:2] == (1, 3)


def test_a_scale_that_is_set_gives_way_to_that_of_generate(model, two):
    before = latents(model, two[:1], num_samples=1, seed=1, **FAST)
    model.set_scale(.1)
    assert far(before, latents(model, two[:1], num_samples=1, seed=1, **FAST)) == 0 and model.scale == 1.


def test_another_checkpoint_is_read_again(files, two):
    m = together.IPAdapterFaceID(gold.pipeline('sd'), files('ip-adapter-faceid_sd15.bin'), 'cpu')
    before = latents(m, two[:1], num_samples=1, seed=1, **FAST)
    m.load_ip_adapter()
    assert far(before, latents(m, two[:1], num_samples=1, seed=1, **FAST)) == 0


def test_one_vector_is_one_person(model, two):
    call = dict(num_samples=2, seed=1, **FAST)
    assert far(latents(model, two[0], **call), latents(model, two[:1], **call)) == 0


@pytest.mark.parametrize('more, says', [
    (dict(num_images_per_prompt=2), 'num_images_per_prompt is not taken here.*Use num_samples'),
    (dict(generator=None), 'Use seed'), (dict(num_samples=0), 'num_samples must be a whole number from 1')])
def test_arguments_with_another_name(model, more, says):
    with pytest.raises(ArgumentError, match=says): model.generate(EYE[:1], **FAST | more)


MODULE = pytest.mark.parametrize('module', [together, separate])


@MODULE
def test_xl_has_the_originals_order_and_guidance(files, module):
    m = module.IPAdapterFaceIDXL(gold.pipeline('sdxl'), files('ip-adapter-faceid_sdxl.bin'), 'cpu')
    order = ['faceid_embeds', 'prompt', 'negative_prompt', 'scale', 'num_samples', 'seed']
    order.append('num_inference_steps')
    assert names(m.generate) == [*order, 'kwargs']
    call = dict(width=16, height=16, output_type='latent')
    short = latents(m, EYE[:1], 'a', 'b', 1., 1, 3, 2, **call)
    assert far(short, latents(m, EYE[:1], 'a', 'b', 1., 1, 3, 2, guidance_scale=5., **call)) == 0


def test_the_second_module_has_plus_for_xl(files, encoder):
    path = files('ip-adapter-faceid-plusv2_sdxl.bin')
    m = separate.IPAdapterFaceIDPlusXL(gold.pipeline('sdxl'), encoder, path, 'cpu')
    assert m.shortcut and m.adapter.lora_weight == 0


@pytest.fixture(scope='module')
def apart(files):
    return separate.IPAdapterFaceID(gold.pipeline('sd'), files('ip-adapter-faceid_sd15.bin'), 'cpu', 4, 2)


def test_four_tokens_of_each_photograph(apart, two):
    "The original's tokens side by side: as a Portrait of the same projection has them."
    tokens, nobody = apart.get_image_embeds(two[None])
    singles = torch.cat([apart.get_image_embeds(e)[0] for e in two], 1)
    assert tokens.shape == nobody.shape == (1, 8, 64) and far(tokens, singles) < 1e-6
    both = latents(apart, two[None], num_samples=1, seed=1, **FAST)
    assert far(both, latents(apart, two[:1], num_samples=1, seed=1, **FAST)) > 1e-3
    assert far(both, latents(apart, two.flip(0)[None], num_samples=1, seed=1, **FAST)) < 1e-4


def test_a_picture_of_each_prompt(apart, two):
    call = dict(FAST, negative_prompt='b')
    both = latents(apart, two[:1], ['a man', 'a woman'], num_samples=2, seed=[1, 2], **call)
    assert len(both) == 2
    assert far(both[1], latents(apart, two[:1], 'a woman', num_samples=1, seed=[2], **call)[0]) < 1e-4
