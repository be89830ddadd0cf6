"Every variant under its official name, from a folder: the original's numbers through `load` and `FaceID.generate`, and what does not fit refused."
import shutil
import pytest, torch
import goldens_build as gold
from faceid_nb import models as M
from faceid_nb.errors import ArgumentError, BaseModelError, VariantError, WeightsMissingError
from faceid_nb.plus import StructureEncoder

NAMES = {'faceid_scale1.0': 'sd15-faceid', 'faceid_scale0.6': 'sd15-faceid', 'faceid_scale0.0': 'sd15-faceid', 'faceid_pair': 'sd15-faceid', 'faceid_separate_lora': 'sd15-faceid-lora', 'plus': 'sd15-plus',
         **{f'plusv2_s{s}': 'sd15-plusv2' for s in ('0.0', '0.5', '1.0', '1.5')}, 'sdxl': 'sdxl-faceid', 'plusv2_sdxl_s0.3': 'sdxl-plusv2', 'plusv2_sdxl_s1.0': 'sdxl-plusv2', 'portrait': 'sd15-portrait'}


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
    monkeypatch.setattr('faceid_nb.face.FaceReader', Reader); monkeypatch.setattr(M, '_told', set())


def load(name, folder, pipe=None): return M.load(name, folder=folder, device='cpu', base=pipe or gold.pipeline('sdxl' if 'sdxl' in name else 'sd'), download=False)


@pytest.mark.parametrize('case', NAMES)
def test_the_originals_numbers(folder, case):
    spec, want = gold.case(case), gold.expected()[case]; call = dict(spec['call']); embeds, face_image = gold.inputs(case); n = call.pop('num_samples')
    me = load(NAMES[case], folder); noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(call.pop('seed')))   # the original draws the batch's noise at once
    faces = [list(e) for e in embeds] if embeds.ndim == 3 else embeds
    if face_image is not None: call['structure'] = me.encoder([face_image])
    call.pop('shortcut', None)
    got = torch.stack([torch.as_tensor(x) for x in me.generate(faces, call.pop('prompt'), num_samples=n, seed=0, latents=noise, **call)])
    assert got.shape == want.shape and (got - want).abs().max() < gold.TOLERANCE


def test_every_golden_case_has_a_name(): assert set(NAMES) == set(gold.CASES) - {'faceid_safetensors'}


def test_a_row_reads_its_own_structure(folder):
    me = load('sd15-plusv2', folder); embeds, face = gold.inputs('plusv2_s1.0'); two = me.encoder([face, face.rotate(180)])
    how = dict(num_samples=1, num_inference_steps=1, width=16, height=16, output_type='latent', seed=0)
    make = lambda **kw: torch.stack([torch.as_tensor(x) for x in me.generate(torch.cat([embeds, embeds]), 'a man', **how, **kw)])
    both = make(structure=two); assert (both[0] - both[1]).abs().max() > 1e-3
    assert (make(structure=two[:1])[1] - both[0]).abs().max() < 1e-4
    assert (make(structure=two, batch_size=1) - both).abs().max() < 1e-4
    flat = make(structure=two, s_scale=0.); assert (flat[0] - flat[1]).abs().max() < 1e-4      # weight 0: nothing of the picture is left
    mixed = make(structure=two, s_scale=[0., 1.]); assert (mixed[0] - flat[0]).abs().max() < 1e-4 and (mixed[1] - both[1]).abs().max() < 1e-4


def test_the_structure_comes_with_the_face(folder):
    from faceid_nb.face import Face
    import numpy as np
    from faceid_nb.align import ARCFACE_TEMPLATE
    me = load('sd15-plus', folder); image = gold.inputs('plus')[1]; embedding = gold.inputs('plus')[0][0].numpy()
    face = Face(embedding=embedding, landmarks=ARCFACE_TEMPLATE*2, image=np.asarray(image))
    how = dict(num_samples=1, num_inference_steps=1, width=16, height=16, output_type='latent', seed=0)
    a, b = (torch.as_tensor(me.generate(f, 'a', **how, **kw)[0]) for f, kw in ((face, {}), (torch.as_tensor(embedding), dict(structure=me.encoder([face.crop(224)])))))
    assert (a - b).abs().max() < 1e-5
    with pytest.raises(ArgumentError, match='no picture to read'): me.generate(torch.as_tensor(embedding), 'a', **how)
    with pytest.raises(ArgumentError, match='3 structures for 1'): me.generate(face, 'a', structure=me.encoder([image]*3), **how)
    me.encoder = None
    with pytest.raises(ArgumentError, match='no image encoder'): me.generate(face, 'a', **how)


def test_structure_is_refused_where_there_is_none(folder):
    with pytest.raises(ArgumentError, match='embedding only'): load('sd15-faceid', folder).generate(gold.inputs('plus')[0], 'a', structure=torch.zeros(1, 17, 96))


@pytest.mark.parametrize('name, kind', [('sd15-faceid', 'sdxl'), ('sd15-plusv2', 'sdxl'), ('sdxl-faceid', 'sd'), ('sdxl-plusv2', 'sd')])
def test_a_checkpoint_for_the_other_base_is_refused(folder, name, kind):
    pipe = gold.pipeline(kind); processors, before = dict(pipe.unet.attn_processors), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(BaseModelError): load(name, folder, pipe)
    assert pipe.unet.attn_processors == processors and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_an_encoder_of_another_width_is_refused(folder, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    shutil.copy(folder/'ip-adapter-faceid-plus_sd15.bin', tmp_path)
    CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=28)).save_pretrained(tmp_path/'image_encoder')
    with pytest.raises(BaseModelError, match='64 wide.*96 wide'): load('sd15-plus', tmp_path)
    (tmp_path/'image_encoder'/'config.json').write_text('{}'); (tmp_path/'image_encoder'/'model.safetensors').write_bytes(b'<html>')
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
    for sdxl in (False, True): assert ('XL' in type(M.load_pipeline(tmp_path, sdxl=sdxl)).__name__) is (kind == 'sdxl')


def test_pixels_are_what_clip_asks_for():
    from PIL import Image
    import numpy as np
    e = StructureEncoder(gold.image_encoder()); red = Image.new('RGB', (224, 224), (255, 0, 0))
    mean, sd = np.array([.48145466, .4578275, .40821073]), np.array([.26862954, .26130258, .27577711])
    assert np.allclose(e.pixels([red])[0, :, 100, 100].numpy(), (np.array([1., 0, 0]) - mean)/sd, atol=1e-4)
    assert e([red, red]).shape == (2, 17, 96) and e.nobody().shape == (1, 17, 96)


def test_nobody_is_looked_at_once(monkeypatch):
    e = StructureEncoder(gold.image_encoder()); looked = []; states = StructureEncoder.states
    monkeypatch.setattr(StructureEncoder, 'states', lambda self, x: looked.append(1) or states(self, x))
    assert torch.equal(e.nobody(), e.nobody()) and len(looked) == 1
