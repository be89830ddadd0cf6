"""The drop-in classes: the original's arguments, the original's latents."""
import inspect, re
import pytest, torch
import goldens_build as gold
from faceid_nb import ip_adapter_faceid as together, ip_adapter_faceid_separate as separate
from faceid_nb.errors import ArgumentError, BaseModelError, CheckpointError, VariantError

SD = [n for n in gold.CASES if n.startswith('faceid') and n != 'faceid_separate_lora']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('golden')
    return lambda name: folder / name if (folder / name).exists() else gold.write_checkpoint(name, folder)


@pytest.mark.parametrize('name', SD)
def test_golden(files, name):
    case = gold.case(name); want = gold.expected()[name]
    model = together.IPAdapterFaceID(gold.pipeline('sd'), files(case['checkpoint']), 'cpu', **case['init'])
    got = torch.as_tensor(model.generate(gold.inputs(name)[0], **case['call']))
    assert got.shape == want.shape and (got - want).abs().max() < gold.TOLERANCE < want.abs().mean() / 1000


def test_golden_separate_lora(files):
    pytest.importorskip('peft')
    case = gold.case('faceid_separate_lora'); want = gold.expected()[case['name']]
    pipe = gold.pipeline('sd'); pipe.load_lora_weights(files(case['lora'])); pipe.fuse_lora()
    got = separate.IPAdapterFaceID(pipe, files(case['checkpoint']), 'cpu').generate(gold.inputs(case['name'])[0], **case['call'])
    assert (torch.as_tensor(got) - want).abs().max() < gold.TOLERANCE


def test_arguments_are_the_originals():
    names = lambda f: [p for p in inspect.signature(f).parameters if p != 'self']
    assert names(together.IPAdapterFaceID.__init__) == ['sd_pipe', 'ip_ckpt', 'device', 'lora_rank', 'num_tokens', 'torch_dtype']
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
    pipe = gold.pipeline('sd'); before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}; processors = dict(pipe.unet.attn_processors)
    with pytest.raises(ArgumentError, match='contradicts'): together.IPAdapterFaceID(pipe, files('ip-adapter-faceid_sd15.bin'), 'cpu', **given)
    assert pipe.unet.attn_processors == processors and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


@pytest.mark.parametrize('kind, name, error, says', [('sd', 'ip-adapter-faceid-plus_sd15.bin', VariantError, 'plus'), ('sd', 'ip-adapter-faceid_sdxl.bin', BaseModelError, 'wide'),
                                                    ('sd', 'ip-adapter-faceid_sd15_lora.safetensors', CheckpointError, 'is a LoRA')])
def test_wrong_file_leaves_the_pipeline(files, kind, name, error, says):
    pipe = gold.pipeline(kind); processors = dict(pipe.unet.attn_processors); before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
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
    def spy(**kw): seen.update(kw); return type('R', (), {'images': []})
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
    pipe = gold.pipeline('sd'); before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    separate.IPAdapterFaceID(pipe, files('ip-adapter-faceid_sd15.bin'), 'cpu')
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_card_import_names():
    from faceid_nb.ip_adapter_faceid import IPAdapterFaceID
    from faceid_nb.ip_adapter_faceid_separate import IPAdapterFaceID as Separate
    assert IPAdapterFaceID is not Separate


def test_image_embeds(model):
    tokens, nobody = model.get_image_embeds(torch.eye(512)[:2])
    assert tokens.shape == nobody.shape == (2, 4, 64) and not torch.equal(tokens, nobody)
