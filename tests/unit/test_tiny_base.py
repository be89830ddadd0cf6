"""The base pipeline of the tiny pack: its parts start where they should, learn, resume, and the trained ones meet their gates."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from faceid_nb.tiny import base as B, people as P
from faceid_nb.models import TINY


@pytest.fixture(scope='module')
def photos(): return P.photographs(8, 4, seed=3, batch=32, compiled=False, progress=False)


def test_every_word_is_one_token_and_every_text_encodes():
    tokenizer = B.new_tokenizer()
    assert all(len(tokenizer.tokenize(w)) == 1 for w in P.vocabulary())
    for text in ('an astronaut, Łódź 東京 🙂', 'photo of a woman in a red shirt', ''):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1] or tokenizer.unk_token == tokenizer.eos_token
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(' ', '') == text.replace(' ', '').lower()
    assert B.caption_ids(tokenizer, ['a red hat', 'word '*200]).shape == (2, B.LENGTH)


def test_the_encoder_starts_as_the_linear_code(photos):
    x = photos['images'].float()/127.5 - 1
    vae = B.start_from_components(B.new_autoencoder(), x)
    mean, components, sd = B.patch_components(x)
    linear = torch.einsum('kc,bchw->bkhw', components, F.pixel_unshuffle(x, 4) - mean.view(1, 48, 1, 1))/sd[:B.LATENTS].sqrt().view(1, -1, 1, 1)
    with torch.no_grad(): z = vae.encode(x).latent_dist.mean
    assert (z - linear).abs().max() < .05*linear.abs().max()


def test_latents_become_standard_and_pictures_stay(photos):
    torch.manual_seed(0)
    x = photos['images'].float()/127.5 - 1
    vae = B.start_from_components(B.new_autoencoder(), x)
    with torch.no_grad(): before = vae.decode(vae.encode(x).latent_dist.mean).sample
    B.normalise_latents(vae, photos['images'])
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        after = vae.decode(z).sample
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert (after - before).abs().max() < 1e-3


def _toy(steps, folder, resume=False, every=1e9):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    target = torch.tensor([[1., -2., .5]])
    def loss(step):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 3, generator=g)
        return (model(x) - x @ target.T).pow(2).mean(), {}
    figures = list(B.fit(model, loss, steps=steps, lr=.1, ema=.5, warmup=1, checkpoint=folder/'toy.ckpt', resume=resume, every=every, log_every=10))
    return model, figures


def test_fit_learns_and_tells(tmp_path):
    model, figures = _toy(100, tmp_path)
    assert (model.weight.detach() - torch.tensor([[1., -2., .5]])).abs().max() < .05
    assert [f['step'] for f in figures] == list(range(10, 101, 10)) and figures[-1]['loss'] < figures[0]['loss']


def test_fit_goes_on_where_it_was_stopped(tmp_path):
    whole, _ = _toy(60, tmp_path)
    (tmp_path/'toy.ckpt').unlink()
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    target = torch.tensor([[1., -2., .5]])
    def loss(step):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 3, generator=g)
        return (model(x) - x @ target.T).pow(2).mean(), {}
    arguments = dict(steps=60, lr=.1, ema=.5, warmup=1, checkpoint=tmp_path/'toy.ckpt', every=-1., log_every=10)
    for f in B.fit(model, loss, **arguments):
        if f['step'] == 30: break  # killed here: the last checkpoint is a step old
    again = nn.Linear(3, 1)
    model = again
    list(B.fit(again, loss, resume=True, **arguments))
    assert torch.allclose(again.weight, whole.weight, atol=1e-6)


def test_a_pipeline_is_trained_and_saved(photos, tmp_path, monkeypatch):
    vae = B.start_from_components(B.new_autoencoder(), photos['images'].float()/127.5 - 1)
    B.normalise_latents(vae, photos['images'])
    vae.save_pretrained(tmp_path/'vae')
    tokenizer = B.new_tokenizer()
    data = B.prepare(photos, vae, tokenizer)
    assert data['latents'].shape == (32, B.LATENTS, 16, 16) and data['ids'].shape == (2, 32, B.LENGTH) and data['latents'].isfinite().all()
    figures = list(B.train_diffusion(data, tokenizer, tmp_path, minutes=None, steps=2, batch=4, log_every=1))
    assert all(np.isfinite(f['loss']) for f in figures)
    B.save_pipeline(tmp_path, tmp_path/'sd')
    assert not [f for f in (tmp_path/'sd').rglob('*.json') if str(tmp_path) in f.read_text()]
    from faceid_nb.models import load_pipeline
    pipe = load_pipeline(tmp_path/'sd')
    pipe.set_progress_bar_config(disable=True)
    images = B.sample(pipe, ['a red shirt', 'Zebra?'], steps=2)
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()


def test_a_unet_ships_in_eight_bits(tmp_path, capsys):
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file
    from faceid_nb.errors import WeightsMissingError
    tiny = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'), cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4, layers_per_block=1)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**tiny)
    unet.save_pretrained(tmp_path/'p'/'unet', max_shard_size='40KB')
    before = sum(f.stat().st_size for f in (tmp_path/'p'/'unet').glob('*.safetensors'))
    assert len(list((tmp_path/'p'/'unet').glob('*.safetensors'))) > 1
    B.main(['--part', 'ship', '--out', str(tmp_path/'p')])
    file, = (tmp_path/'p'/'unet').glob('*.safetensors')
    assert not list(tmp_path.rglob('*.index.json')) and not list(tmp_path.rglob('*.part')) and file.stat().st_size < .5*before
    assert {v.dtype for v in load_file(file).values() if v.ndim > 1} == {torch.float8_e4m3fn} and {v.dtype for v in load_file(file).values() if v.ndim < 2} == {torch.float32}
    for dtype in (torch.float32, torch.float16):
        again = UNet2DConditionModel.from_pretrained(tmp_path/'p'/'unet', torch_dtype=dtype)
        assert {p.dtype for p in again.parameters()} == {dtype}
        for a, b in zip(unet.parameters(), again.parameters()): assert ((a - b).abs() <= (a.abs()/16).clamp(min=2**-10) + 1e-9 if a.ndim > 1 else (a - b.float()).abs() <= a.abs()/1000).all()
    once = file.read_bytes()
    B.ship_unet(tmp_path/'p'/'unet')
    assert load_file(file).keys() and file.read_bytes() == once
    with pytest.raises(WeightsMissingError): B.ship_unet(tmp_path)


def test_training_goes_on_from_a_pipeline(photos, tmp_path):
    vae = B.start_from_components(B.new_autoencoder(), photos['images'].float()/127.5 - 1)
    vae.save_pretrained(tmp_path/'vae')
    tokenizer = B.new_tokenizer()
    data = B.prepare(photos, vae, tokenizer)
    def train(out, **more):
        (tmp_path/out).mkdir()
        list(B.train_diffusion(data, tokenizer, tmp_path/out, minutes=None, steps=1, batch=4, **more))
        return {part: torch.cat([p.flatten() for p in cls.from_pretrained(tmp_path/out/part).parameters()]) for part, cls in KINDS.items()}
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel
    KINDS = dict(unet=UNet2DConditionModel, text_encoder=CLIPTextModel)
    first = train('first', seed=1)
    again, fresh = train('again', seed=2, init=tmp_path/'first', lr=1e-9), train('fresh', seed=2, lr=1e-9)
    for part in KINDS: assert (again[part] - first[part]).abs().max() < 1e-5 < (fresh[part] - first[part]).abs().max()


needs_pack = pytest.mark.skipif(not (TINY/'sd').exists(), reason='the tiny pack is not trained yet')


@needs_pack
def test_the_packs_autoencoder_keeps_pictures_of_people_it_never_saw():
    from diffusers import AutoencoderKL
    x = torch.stack([torch.from_numpy(np.asarray(p.image).copy()).permute(2, 0, 1)/255 for p in P.render(P.sample_people(40, 77), seed=77)])
    vae = AutoencoderKL.from_pretrained(TINY/'sd'/'vae', torch_dtype=torch.float32)
    with torch.no_grad():
        z = vae.encode(x*2 - 1).latent_dist.mean*vae.config.scaling_factor
        y = (vae.decode(z/vae.config.scaling_factor).sample/2 + .5).clamp(0, 1)
    assert B.psnr(x, y) > 30 and .9 < z.std() < 1.1


@needs_pack
def test_the_packs_scheduler_is_the_model_cards():
    import json
    saved = json.loads((TINY/'sd'/'scheduler'/'scheduler_config.json').read_text())
    assert {k: saved[k] for k in ('beta_start', 'beta_end', 'beta_schedule', 'prediction_type')} == dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', prediction_type='epsilon')


@needs_pack
def test_the_pack_paints_the_shirt_and_the_background_that_were_asked_for():
    from faceid_nb.models import load_pipeline
    pipe = load_pipeline(TINY/'sd')
    pipe.set_progress_bar_config(disable=True)
    colours = ['red', 'green', 'blue', 'yellow', 'white', 'purple']
    pairs = [(a, b) for a, b in zip(colours, colours[2:] + colours[:2])]
    images = B.sample(pipe, [f'photo of a person in a {a} shirt, neutral, {b} background' for a, b in pairs], steps=15)
    palette = torch.tensor(list(P.COLOURS.values()))
    nearest = lambda patch: list(P.COLOURS)[int((patch.flatten(1).median(1)[0] - palette).pow(2).sum(1).argmin())]
    right = [(nearest(i[:, 59:64, 24:40]) == a) + (nearest(i[:, 2:16, 1:6]) == b) for i, (a, b) in zip(images, pairs)]
    assert sum(right) >= 11, [(a, b, r) for (a, b), r in zip(pairs, right)]
