"The official networks on the meta device, which stores no numbers: their shapes say how large they are."
from functools import lru_cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig,
                          CLIPVisionModelWithProjection)

WIDTHS = dict(sd=768, sdxl=2048)   # of the text that the UNet reads


def numbers(part): return sum(p.numel() for p in part.parameters())


def count(*parts):
    "Millions of numbers."
    return sum(map(numbers, parts))/1e6


def text_config(width, layers, heads, **more):
    return CLIPTextConfig(hidden_size=width, intermediate_size=4*width, num_hidden_layers=layers,
                          num_attention_heads=heads, **more)


def _vae():
    return AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4,
                         block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)


def _unet_xl():
    return UNet2DConditionModel(
        cross_attention_dim=WIDTHS['sdxl'], attention_head_dim=(5, 10, 20),
        block_out_channels=(320, 640, 1280),
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
        addition_embed_type='text_time', addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816)


@lru_cache
def networks():
    "Every network by its name."
    vision = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                              num_attention_heads=16, patch_size=14, projection_dim=1024)
    with torch.device('meta'):
        return dict(
            vae=_vae(),
            sd=UNet2DConditionModel(cross_attention_dim=WIDTHS['sd'], attention_head_dim=8),
            sdxl=_unet_xl(),
            text=CLIPTextModel(text_config(768, 12, 12)),
            large_text=CLIPTextModelWithProjection(text_config(1280, 32, 20, projection_dim=1280)),
            words=CLIPTextModelWithProjection(text_config(1024, 24, 16, projection_dim=1024)),
            eye=CLIPVisionModelWithProjection(vision))


def attention(unet):
    "{name of a processor: its attention layer}."
    return {n: unet.get_submodule(n.removesuffix('.processor')) for n in unet.attn_processors}


def identity_layers(kind):
    "Millions of numbers of the K and V of the identity tokens."
    layers, width = attention(networks()[kind]), WIDTHS[kind]
    return sum(2*layer.inner_dim*width for name, layer in layers.items() if 'attn2' in name)/1e6


def lora_layers(kind, rank=128):
    layers = attention(networks()[kind]).values()
    return sum(rank*(2*a.query_dim + 2*a.cross_attention_dim + 4*a.inner_dim) for a in layers)/1e6


def projection(kind, tokens):
    "Millions of numbers of the MLP from an embedding to tokens, with its norm."
    width = WIDTHS[kind]
    return (512*1024 + 1024 + 1024*tokens*width + tokens*width + 2*width)/1e6


def plus_projection(kind):
    from faceid_nb.projection import PlusProjection
    with torch.device('meta'):
        return count(PlusProjection(WIDTHS[kind], clip_embeddings_dim=1280, num_tokens=4))
