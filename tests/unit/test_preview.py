"Pictures that are not finished: the decoder that is at hand, or a linear map."
import io
import math

import numpy as np
import pytest
import torch
from helpers_studio import drawn, png
from PIL import Image

from faceid_nb import preview as P
from faceid_nb.models import load


@pytest.fixture(scope='module')
def pipe(): return load('tiny-faceid').pipe


@pytest.fixture(scope='module')
def face(): return Image.open(io.BytesIO(png(drawn(1)[0])))


@pytest.fixture(scope='module')
def latents(pipe, face):
    x = torch.as_tensor(np.asarray(face.resize((64, 64)), np.float32)/127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad(): return pipe.vae.encode(x).latent_dist.mean*pipe.vae.config.scaling_factor


@pytest.fixture(scope='module')
def taesd(pipe, tmp_path_factory):
    "Folders of two small decoders: one for the pipeline's latents, one for others."
    from diffusers import AutoencoderTiny
    folder = tmp_path_factory.mktemp('decoders')
    blocks = dict(encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4,
                  num_encoder_blocks=(1,)*4, num_decoder_blocks=(1,)*4)
    for name, channels in (('fits', pipe.vae.config.latent_channels), ('other', 3)):
        AutoencoderTiny(latent_channels=channels, **blocks).save_pretrained(folder/name)
    return folder


def reduced(image): return np.asarray(image.resize((16, 16), Image.Resampling.BOX), float)


def by_decoder(pipe, face, latents): return reduced(P.find_previewer(pipe, face)[0](latents)[0])


def by_map(pipe, face, latents):
    return [np.asarray(i, float) for i in P.find_previewer(pipe, face, 'no/such/folder', 0)[0](latents)]


def test_a_small_vae_decodes_for_itself(pipe, face, latents):
    show, name = P.find_previewer(pipe, face)
    assert name == 'the VAE' and show(latents)[0].size == (64, 64)


def test_without_a_small_decoder_there_is_a_linear_map(pipe, face):
    assert P.find_previewer(pipe, face, 'no/such/folder', 0)[1] == 'a linear map'


def test_a_linear_map_shows_each_of_the_latents(pipe, face, latents):
    seen = by_map(pipe, face, torch.cat([latents, -latents]))
    assert len(seen) == 2 and seen[0].shape == (16, 16, 3)
    assert np.corrcoef(seen[0].ravel(), by_decoder(pipe, face, latents).ravel())[0, 1] > .9


def test_taesd_is_taken_where_it_is(pipe, face, latents, taesd):
    show, name = P.find_previewer(pipe, face, taesd/'fits', 0)
    assert name == 'TAESD' and show(latents)[0].size == (128, 128)


def test_a_decoder_for_other_latents_is_not_taken(pipe, face, taesd):
    assert P.find_previewer(pipe, face, taesd/'other', 0)[1] == 'a linear map'


def test_latents_are_scaled_as_the_vae_says(pipe, face, latents):
    whole, own = by_decoder(pipe, face, latents), pipe.vae.config.scaling_factor
    pipe.vae.register_to_config(scaling_factor=.25*own)
    try: flat, decoded = by_map(pipe, face, latents/4)[0], by_decoder(pipe, face, latents/4)
    finally: pipe.vae.register_to_config(scaling_factor=own)
    assert abs(flat - whole).mean() < 15 and abs(decoded - whole).mean() < 1


def test_a_photograph_that_cannot_be_encoded_gives_no_preview(pipe, face, latents, monkeypatch):
    monkeypatch.setattr(P, 'fit_colours', lambda *a: torch.full((5, 3), math.nan))
    show, name = P.find_previewer(pipe, face, 'no/such/folder', 0)
    assert name == 'none' and show(latents) == []
