"""What an adapter keeps on a device: beside the plain pipeline only the keys and values of the loop."""
import gc
import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import goldens_build as G
from faceid_nb import lora as lora_module
from faceid_nb.adapter import Attachment, FaceIDAdapter
from faceid_nb.attention import cross_attention_layers
from faceid_nb.encoder import StructureEncoder
from faceid_nb.lora import LoRA

SD15 = dict(sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280))
SDXL = dict(
    sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
    attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'), addition_time_embed_dim=256,
    addition_embed_type='text_time', projection_class_embeddings_input_dim=2816)


def imagined(config):
    "A UNet of a real shape in float16 on a GPU that is only imagined: shapes and devices, no numbers."
    with torch.device('meta'): unet = UNet2DConditionModel(**config)
    for module in unet.modules():
        for name, p in module._parameters.items():
            if p is None: continue
            weight = torch.empty(p.shape, dtype=torch.float16, device='cuda')
            module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
    return unet


def bytes_on_device():
    "Of every storage on the imagined GPU that is alive."
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), FakeTensor) and t.device.type == 'cuda']
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive}
    return sum(storages.values())


def official_lora(unet, rank):
    halves = {}
    for path, attn, _ in cross_attention_layers(unet):
        linears = {'to_q': attn.to_q, 'to_k': attn.to_k, 'to_v': attn.to_v, 'to_out.0': attn.to_out[0]}
        for name, linear in linears.items():
            halves[f'{path}.{name}.down'] = torch.zeros(rank, linear.in_features)
            halves[f'{path}.{name}.up'] = torch.zeros(linear.out_features, rank)
    return halves


@pytest.mark.parametrize('config, gigabytes, rank', [(SD15, 1.6, 128), (SDXL, 4.7, 128)])
def test_attached_not_one_byte_more(monkeypatch, config, gigabytes, rank):
    # there are no numbers to take the sums of
    monkeypatch.setattr(lora_module, 'fingerprint', lambda w: 0)
    with FakeTensorMode(), torch.no_grad():
        unet = imagined(config)
        plain = bytes_on_device()
        assert abs(plain/2**30 - gigabytes) < .2
        lora = LoRA(unet, official_lora(unet, rank))
        assert bytes_on_device() == plain
        lora.weigh(.5)
        assert bytes_on_device() == plain
        lora.undo()
        assert bytes_on_device() == plain


@pytest.fixture
def small():
    "A UNet, an adapter attached to it, and how much memory the tensors take that are alive."
    unet = G.unet()
    adapter = FaceIDAdapter.from_state(**G.state('ip-adapter-faceid_sd15.bin')).attach(unet)
    def taken():
        gc.collect()
        alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive}.values())
    return unet, adapter, taken


def size(tensors): return sum(t.untyped_storage().nbytes() for t in tensors)


def test_in_the_loop_keys_and_values_only(small):
    unet, adapter, taken = small
    x, words = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 64)
    face = torch.nn.functional.normalize(torch.ones(1, 512), dim=-1)
    with torch.no_grad(), adapter.condition(face, guidance=2) as c:
        before = taken()
        unet(x, 5, words)
        prompts = [p.prompt.kv for p in adapter.at.layers.processors.values()]
        shares = itertools.chain(*c.kv.values())
        kept = [c.reads, *itertools.chain(*((s.k, s.v) for s in shares), *prompts)]
        assert taken() - before <= size(kept) + 4096     # and a few small tables of rows


def test_after_the_loop_nothing_is_left(small):
    unet, adapter, taken = small
    face = torch.nn.functional.normalize(torch.ones(1, 512), dim=-1)
    def run():
        with torch.no_grad(), adapter.condition(face, guidance=2):
            unet(torch.zeros(2, 4, 8, 8), 5, torch.zeros(2, 77, 64))
    run()
    before = taken()
    for _ in range(3): run()
    assert taken() == before and isinstance(adapter.at, Attachment)


def test_the_image_encoder_is_on_the_device_only_while_it_reads(monkeypatch):
    encoder, moved = StructureEncoder(G.image_encoder(), 'cpu'), []
    encoder.device = 'the GPU'
    monkeypatch.setattr(encoder.model, 'to', lambda where: moved.append(str(where)))
    monkeypatch.setattr(encoder, 'states', lambda pixels: moved.append('read'))
    encoder.nobody()
    assert moved == ['the GPU', 'read', 'cpu']
