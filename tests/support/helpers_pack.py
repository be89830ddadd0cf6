"""A pack in the tiny pack's layout with random weights: the shapes of the real one, none of its skill.
For tests that need no likeness.

`pack(folder)` writes sd/, the two checkpoint files and, where the fake face pack is at hand, models/;
a second call finds it done. `pipeline()` is the random pipeline alone, `adapter_state(unet)` a random
checkpoint for it.
"""
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import goldens_build as gold
from faceid_nb.checkpoint import save_checkpoint
from faceid_nb.lora import lora_from_checkpoint, save_lora
from helpers_face import make_judge, make_pack

WORDS, TOKENS, RANK = 128, 4, 8


def random_vae():
    return AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=('DownEncoderBlock2D',) * 3,
        up_block_types=('UpDecoderBlock2D',) * 3, latent_channels=8, norm_num_groups=4, sample_size=64)


def random_unet(words):
    return UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
        cross_attention_dim=words, attention_head_dim=4, norm_num_groups=8)


def random_text_encoder(words):
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=514, hidden_size=words, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=48, projection_dim=64, bos_token_id=512, eos_token_id=513, pad_token_id=513))


def pipeline(seed=0, words=WORDS):
    "Stable-Diffusion-shaped: 64 x 64 pixels, VAE f=4 with 8 channels, 48 text tokens, the card's DDIM."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, unet, text = random_vae(), random_unet(words), random_text_encoder(words)
    tokenizer = gold.tokenizer()
    tokenizer.model_max_length = 48
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=gold.scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Draws:
    "Random tensors, one after the other, as loud as a layer's weights."
    def __init__(self, seed): self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape): return torch.randn(shape, generator=self.generator) * shape[-1] ** -.5


def lora_of(draw, i, attn, rank):
    "A random LoRA for the four linear layers of attention layer i."
    words = attn.cross_attention_dim
    inputs = dict(q=attn.query_dim, k=words, v=words, out=attn.inner_dim)
    layers = {}
    for part, n in inputs.items():
        layers[f'{i}.to_{part}_lora.down.weight'] = draw(rank, n)
        layers[f'{i}.to_{part}_lora.up.weight'] = .3 * draw(attn.inner_dim, rank)
    return layers


def adapter_state(unet, tokens=TOKENS, rank=RANK, seed=0):
    "A random checkpoint in the official layout that fits `unet`; every tensor matters (nothing is zero)."
    draw, words = Draws(seed), unet.config.cross_attention_dim
    proj = {'proj.0.weight': draw(1024, 512) * 15, 'proj.0.bias': draw(1024),
            'proj.2.weight': draw(tokens * words, 1024), 'proj.2.bias': draw(tokens * words),
            'norm.weight': torch.ones(words), 'norm.bias': torch.zeros(words)}
    layers = {}
    for i, name in enumerate(unet.attn_processors):
        attn = unet.get_submodule(name.removesuffix('.processor'))
        if rank: layers |= lora_of(draw, i, attn, rank)
        if 'attn2' not in name: continue
        for part in ('to_k_ip', 'to_v_ip'): layers[f'{i}.{part}.weight'] = draw(attn.inner_dim, words)
    return {'image_proj': proj, 'ip_adapter': layers}


def pack(folder, faces=True):
    "Write the pack into `folder`; the folder."
    folder = Path(folder)
    if (folder / 'done').exists(): return folder
    pipe = pipeline()
    pipe.save_pretrained(folder / 'sd')
    save_checkpoint(adapter_state(pipe.unet), folder / 'ip-adapter-faceid_sd15.safetensors')
    # another LoRA than the one inside: a test can tell which was used
    other = adapter_state(pipe.unet, seed=1)['ip_adapter']
    lora = lora_from_checkpoint(other, list(pipe.unet.attn_processors))
    save_lora(lora, folder / 'ip-adapter-faceid_sd15_lora.safetensors')
    if faces:
        make_pack(folder, 'tiny')
        make_judge(folder / 'models' / 'judge' / 'rec.onnx')
    (folder / 'done').touch()
    return folder


def embedding(seed=0, n=None):
    "A unit face embedding (512,), or n of them (n, 512), that belong to nobody."
    e = torch.randn((n or 1, 512), generator=torch.Generator().manual_seed(seed))
    e = torch.nn.functional.normalize(e, dim=-1)
    return e if n else e[0]
