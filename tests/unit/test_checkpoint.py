"""Checkpoints: the official layouts read back to the bit, hostile and broken files refused by name,
nothing half written."""
import importlib.util, json, os, pickle
from itertools import product
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save_file
from faceid_nb import checkpoint as C, convert as V, lora as L
from faceid_nb.errors import (ArgumentError, BaseModelError, CheckpointError, LoRAError,
                              UnsafeCheckpointError, VariantError)

GOLD = Path(__file__).parents[1] / 'goldens'
cases = json.loads((GOLD / 'cases.json').read_text())
_spec = importlib.util.spec_from_file_location('golden_fill', GOLD / 'fill.py')
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)
VARIANT = {'ip-adapter-faceid_sd15.bin': 'faceid', 'ip-adapter-faceid_sd15.safetensors': 'faceid',
           'ip-adapter-faceid_sdxl.bin': 'faceid', 'ip-adapter-faceid-plus_sd15.bin': 'plus',
           'ip-adapter-faceid-plusv2_sd15.bin': 'plusv2', 'ip-adapter-faceid-plusv2_sdxl.bin': 'plusv2',
           'ip-adapter-faceid-portrait_sd15.bin': 'portrait'}


def official(name):
    "A checkpoint of the goldens: official names and shapes, reproducible weights."
    spec = cases['checkpoints'][name]
    return {part: fill.fill_({k: torch.zeros(shape) for k, shape in spec[part].items()}, spec['seed'])
            for part in spec if part != 'seed'}


def flat(state):
    "{'image_proj.proj.0.weight': ...}: the sections in the names."
    out = {}
    for section, tensors in state.items(): out |= {f'{section}.{k}': t for k, t in tensors.items()}
    return out


def write(state, path):
    "Written as the releases are, without our own code."
    if path.suffix == '.bin': torch.save(state, path)
    else: save_file(flat(state), path)
    return path


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def good(tmp_path):
    return write(official('ip-adapter-faceid_sd15.bin'), tmp_path / 'ip-adapter-faceid_sd15.bin')


@pytest.mark.parametrize('name', VARIANT)
def test_official_layouts(tmp_path, name):
    state = official(name)
    c = C.read_checkpoint(write(state, tmp_path / name))
    spec = cases['checkpoints'][name]
    words = spec['image_proj']['norm.weight'][0]
    assert (c.variant, c.cross_attention_dim, c.embedding_dim) == (VARIANT[name], words, 512)
    assert (c.num_tokens == spec['image_proj']['proj.2.weight'][0] // words
            == (16 if 'portrait' in name else 4))
    assert c.lora_rank == (0 if 'portrait' in name else 8)
    assert c.layers == sorted({int(k.split('.')[0]) for k in spec['ip_adapter'] if '_ip' in k})
    assert same(c.image_proj, state['image_proj']) and same(c.ip_adapter, state['ip_adapter'])
    assert VARIANT[name] in repr(c) and 'proj.0.weight' in C.tree(c)


@pytest.mark.parametrize('width, base', [(768, 'sd15'), (2048, 'sdxl'), (1024, 'sd21'), (128, '128 wide')])
def test_base_by_width(width, base): assert C.check_state(tiny(width=width)).base == base


def tiny(width=8, tokens=4, rank=2, layers=4, embed=16, perceiver=False, dtype=torch.float32, inner=8):
    "The smallest state in the official layout, any shape."
    def r(*s): return torch.randn(s).to(dtype)
    proj = {'proj.0.weight': r(embed * 2, embed), 'proj.0.bias': r(embed * 2),
            'proj.2.weight': r(tokens * width, embed * 2), 'proj.2.bias': r(tokens * width),
            'norm.weight': r(width), 'norm.bias': r(width)}
    if perceiver: proj['perceiver_resampler.latents'] = r(1, 4, width)
    ip = {}
    for i in range(layers):
        words = width if i % 2 else inner
        for p, n in dict(q=inner, k=words, v=words, out=inner).items():
            if rank:
                ip |= {f'{i}.to_{p}_lora.down.weight': r(rank, n),
                       f'{i}.to_{p}_lora.up.weight': r(inner, rank)}
        if i % 2: ip |= {f'{i}.to_k_ip.weight': r(inner, width), f'{i}.to_v_ip.weight': r(inner, width)}
    return {'image_proj': proj, 'ip_adapter': ip}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 40), tokens=st.integers(1, 20), rank=st.integers(0, 9), layers=st.integers(2, 9),
       embed=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
       suffix=st.sampled_from(['.bin', '.safetensors']))
def test_any_shape_comes_back(tmp_path, width, tokens, rank, layers, embed, dtype, suffix):
    state = tiny(width, tokens, rank, layers, embed, dtype=dtype)
    other = {'.bin': '.safetensors', '.safetensors': '.bin'}[suffix]
    C.save_checkpoint(state, tmp_path / f'a{suffix}')
    V.convert(tmp_path / f'a{suffix}', tmp_path / f'b{other}')
    V.convert(tmp_path / f'b{other}', tmp_path / f'c{suffix}')
    for name in (f'a{suffix}', f'b{other}', f'c{suffix}'):
        c = C.read_checkpoint(tmp_path / name)
        assert (c.num_tokens, c.cross_attention_dim, c.embedding_dim,
                c.lora_rank) == (tokens, width, embed, rank)
        assert same(c.image_proj, state['image_proj']) and same(c.ip_adapter, state['ip_adapter'])
        assert c.variant == ('portrait' if tokens > 4 and not rank else 'faceid')


def test_content_decides_not_the_suffix(tmp_path, good):
    good.rename(tmp_path / 'a.safetensors')
    assert C.read_checkpoint(tmp_path / 'a.safetensors').num_tokens == 4
    save_file(flat(tiny()), tmp_path / 'b.bin')
    assert C.read_checkpoint(tmp_path / 'b.bin').embedding_dim == 16
    torch.save(flat(tiny()), tmp_path / 'flat.pt')
    assert C.read_checkpoint(tmp_path / 'flat.pt').lora_rank == 2


# --- variants
@pytest.mark.parametrize('name, said, want',
                         [('a.bin', 'plus', 'plus'), ('a.bin', 'plusv2', 'plusv2'),
                          ('x-plusv2_sd15.bin', None, 'plusv2'), ('x-plus-v2.bin', None, 'plusv2'),
                          ('x-plus_sd15.bin', None, 'plus'), ('x-plus_sd15.bin', 'plusv2', 'plusv2'),
                          ('a.bin', None, None), ('a.bin', 'faceid', None), ('a.bin', 'portrait', None)])
def test_plus_or_plusv2_is_never_guessed(name, said, want):
    if want: assert C.check_state(tiny(perceiver=True), said, name).variant == want
    else:
        with pytest.raises(VariantError, match='[Pp]lus'): C.check_state(tiny(perceiver=True), said, name)


@pytest.mark.parametrize('kw, said', [({}, 'portrait'), ({}, 'plus'), (dict(rank=0, tokens=16), 'faceid'),
                                      (dict(rank=0, tokens=16), 'plusv2'), (dict(perceiver=True), 'faceid')])
def test_another_variant_than_asked(tmp_path, kw, said):
    path = write(tiny(**kw), tmp_path / 'mine.bin')
    with pytest.raises(VariantError, match=said): C.read_checkpoint(path, said)


def test_unknown_variant():
    with pytest.raises(ArgumentError, match='faceid, plus'): C.check_state(tiny(), 'faceidv3')


def test_our_safetensors_remember_the_variant(tmp_path):
    C.save_checkpoint(tiny(perceiver=True), tmp_path / 'mine.safetensors', variant='plusv2')
    assert C.read_checkpoint(tmp_path / 'mine.safetensors').variant == 'plusv2'
    with pytest.raises(VariantError, match='saved as plusv2'):
        C.read_checkpoint(tmp_path / 'mine.safetensors', 'plus')
    with pytest.raises(VariantError): C.save_checkpoint(tiny(perceiver=True), tmp_path / 'mine2.safetensors')
    assert not (tmp_path / 'mine2.safetensors').exists()


# --- bad files
class Payload:
    def __init__(self, *what): self.what = what
    def __reduce__(self): return self.what


@pytest.mark.parametrize('protocol', [2, 4, 5])
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize('call', ['os', 'eval', 'torch'])
@pytest.mark.filterwarnings('ignore')
def test_pickle_with_code_does_not_run(tmp_path, protocol, form, call):
    mark = tmp_path / 'ran'
    code = {'os': (os.system, (f'touch {mark}',)), 'eval': (eval, (f'open({str(mark)!r}, "w")',)),
            'torch': (torch.save, (1, str(mark)))}[call]
    bad = dict(tiny(), extra=Payload(*code))
    path = tmp_path / 'ip-adapter-faceid_sd15.bin'
    if form == 'pickle': path.write_bytes(pickle.dumps(Payload(*code), protocol))
    else: torch.save(bad, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == 'zip')
    for read in (C.read_checkpoint, L.read_lora):
        with pytest.raises(UnsafeCheckpointError, match='asks for') as e: read(path)
        assert not mark.exists() and e.value.exit_code == 2
    if form == 'pickle': pickle.loads(path.read_bytes())
    else: torch.load(path, weights_only=False)
    assert mark.exists()  # it would have run


def nan_state():
    s = tiny()
    s['ip_adapter']['1.to_v_ip.weight'][0, 0] = float('inf')
    return s
def without(part, key):
    s = tiny()
    del s[part][key]
    return s
def with_(part, key, t):
    s = tiny()
    s[part][key] = t
    return s


BROKEN = {'web page': (b'<!DOCTYPE html><html>', 'web page'),
          'web page after a blank': (b'\n <HTML lang=en>', 'web page'),
          'json': (b'{"error":"Repository not found"}', 'web page'),
          'git-lfs': (b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 96740574\n',
                      '96740574'), 'empty': (b'', 'empty'),
          'noise': (bytes(range(1, 90)), 'not a checkpoint'), 'text': (b'hello', 'not a checkpoint'),
          'header only': (b'PK\x03\x04', 'cut off'), 'pickle begun': (b'\x80\x02}q\x00', 'cut off'),
          'not a dict': ([torch.zeros(2)], 'list'), 'no sections': ({'a': torch.zeros(2)}, 'laid out'),
          'nothing': ({}, 'laid out'),
          'a LoRA': ({'unet.down_blocks.0.attn.to_q.lora_A.weight': torch.zeros(2, 2)}, 'is a LoRA'),
          'a training state': ({'adapter_modules.1.to_k_ip.weight': torch.zeros(2, 2)}, 'raw training state'),
          'a model': ({'model.diffusion_model.x': torch.zeros(2)}, 'whole diffusion model'),
          'one section': ({'image_proj.proj.0.weight': torch.zeros(2)}, 'laid out'),
          'infinite': (nan_state, r'ip_adapter\.1\.to_v_ip\.weight has numbers that are not finite'),
          'no norm': (lambda: without('image_proj', 'norm.bias'), r'no norm\.bias'),
          'half a pair': (lambda: without('ip_adapter', '1.to_v_ip.weight'), r'1\.to_v_ip'),
          'half a LoRA': (lambda: without('ip_adapter', '0.to_q_lora.up.weight'), r'0\.to_q_lora\.up'),
          'unknown layer': (lambda: with_('ip_adapter', '1.to_w_ip.weight', torch.zeros(8, 8)), 'to_w_ip'),
          'integers': (lambda: with_('image_proj', 'norm.bias', torch.zeros(8, dtype=torch.int64)), 'int64'),
          'not a tensor': (lambda: with_('image_proj', 'norm.bias', 3), 'int'),
          'two widths': (lambda: with_('ip_adapter', '1.to_k_ip.weight', torch.zeros(8, 9)), 'wrong shape'),
          'odd rows': (lambda: with_('image_proj', 'proj.2.weight', torch.zeros(33, 32)), 'wrong shape'),
          'two ranks': (lambda: with_('ip_adapter', '0.to_q_lora.down.weight', torch.zeros(3, 8)),
                        'several ranks'),
          'no layers': (lambda: {'image_proj': tiny()['image_proj'], 'ip_adapter': {}},
                        'conditions no layer'),
          'plain IP-Adapter': ({'image_proj': {'proj.weight': torch.zeros(2, 2)},
                                'ip_adapter': {'1.to_k_ip.weight': torch.zeros(2, 2)}}, 'not FaceID'),}


@pytest.mark.parametrize('what', BROKEN)
def test_broken(tmp_path, what):
    data, says = BROKEN[what]
    path = tmp_path / 'mine.bin'
    if callable(data): data = data()
    if isinstance(data, bytes): path.write_bytes(data)
    else: torch.save(data, path)
    with pytest.raises(CheckpointError, match=says) as e: C.read_checkpoint(path)
    assert e.value.wrong
    assert 'mine.bin' in e.value.wrong
    assert e.value.do
    assert '\n' not in str(e.value)
    assert str(tmp_path) not in str(e.value)


@pytest.mark.parametrize('suffix', ['.bin', '.safetensors'])
def test_cut_off_anywhere(tmp_path, suffix):
    whole = C.save_checkpoint(tiny(), tmp_path / f'whole{suffix}').read_bytes()
    for n in sorted({1, 5, 9, 40, 500, len(whole) // 2, len(whole) - 30, len(whole) - 1}):
        (tmp_path / f'cut{suffix}').write_bytes(whole[:n])
        with pytest.raises(CheckpointError): C.read_checkpoint(tmp_path / f'cut{suffix}')


def test_missing_and_folder(tmp_path, good):
    with pytest.raises(CheckpointError, match='no file'): C.read_checkpoint(tmp_path / 'absent.bin')
    with pytest.raises(CheckpointError, match='ip-adapter-faceid_sd15.bin'): C.read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match='does not exist'):
        L.read_lora(tmp_path / 'nowhere' / 'lora.bin')


# --- writing
def test_nothing_half_written(tmp_path, good, monkeypatch):
    before = good.read_bytes()
    def fail(*a, **k):
        Path(a[1]).write_bytes(b'half')
        raise OSError('no space left')
    monkeypatch.setattr(C.torch, 'save', fail)
    with pytest.raises(OSError, match='no space'): C.save_checkpoint(tiny(), good)
    assert good.read_bytes() == before and os.listdir(tmp_path) == [good.name]
    with pytest.raises(CheckpointError): C.save_checkpoint(nan_state(), good)
    with pytest.raises(ArgumentError, match='suffix'): C.save_checkpoint(tiny(), tmp_path / 'x.onnx')
    assert good.read_bytes() == before and os.listdir(tmp_path) == [good.name]


def test_replaced_in_one_step(tmp_path, good):
    "Who has the old file open keeps the whole of it."
    before = good.read_bytes()
    with open(good, 'rb') as old:
        head = old.read(10)
        C.save_checkpoint(tiny(), good)
        assert head + old.read() == before != good.read_bytes()


def test_converting_a_bad_file_leaves_nothing(tmp_path):
    (tmp_path / 'page.bin').write_bytes(b'<!doctype html>')
    with pytest.raises(CheckpointError): V.convert(tmp_path / 'page.bin', tmp_path / 'out.safetensors')
    assert os.listdir(tmp_path) == ['page.bin']


def test_saves_parameters_that_share_storage_and_carry_gradients(tmp_path):
    s = tiny()
    big = torch.randn(16, 8)
    s['ip_adapter']['1.to_k_ip.weight'], s['ip_adapter']['1.to_v_ip.weight'] = (torch.nn.Parameter(big[:8]),
                                                                                big[8:].T.contiguous().T)
    for suffix in ('.bin', '.safetensors'):
        c = C.read_checkpoint(C.save_checkpoint(s, tmp_path / f's{suffix}'))
        assert torch.equal(c.ip_adapter['1.to_k_ip.weight'], big[:8])
        assert not c.ip_adapter['1.to_k_ip.weight'].requires_grad


# --- the separate LoRA
PLACES = product(('down_blocks.0', 'up_blocks.3', 'mid_block'), (0, 10), (1, 2),
                 ('to_q', 'to_k', 'to_v', 'to_out.0'))
PATHS = [f'{block}.attentions.{i}.transformer_blocks.0.attn{n}.{part}' for block, i, n, part in PLACES]
DIALECTS = {'peft': lambda p, h: f'unet.{p}.lora_{"AB"[h]}.weight',
            'peft adapter': lambda p, h: f'base_model.model.{p}.lora_{"AB"[h]}.default.weight',
            'bare': lambda p, h: f'{p}.lora_{"AB"[h]}.weight',
            'diffusers': lambda p, h: f'unet.{p}.lora.{["down", "up"][h]}.weight',
            'linear layer': lambda p, h: f'unet.{p}.lora_linear_layer.{["down", "up"][h]}.weight',
            'processor': lambda p, h: 'unet.{}.processor.{}_lora.{}.weight'.format(
                *p.removesuffix('.0').rsplit('.', 1), ['down', 'up'][h]),
            'kohya': lambda p, h: f'lora_unet_{p.replace(".", "_")}.lora_{["down", "up"][h]}.weight'}


@pytest.mark.parametrize('dialect', DIALECTS)
def test_lora_dialects(tmp_path, dialect):
    want = {f'{p}.down': torch.randn(2, 8) for p in PATHS} | {f'{p}.up': torch.randn(8, 2) for p in PATHS}
    save_file({DIALECTS[dialect](*(k.rsplit('.', 1)[0], int(k.endswith('up')))): t for k, t in want.items()},
              tmp_path / 'l.safetensors')
    assert same(L.read_lora(tmp_path / 'l.safetensors'), want)


def test_lora_alpha():
    t = {'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight': torch.ones(4,
                                                                                                         8),
         'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight': torch.ones(8, 4),
         'lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha': torch.tensor(2.)}
    out = L.normal_lora(t)
    p = 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q'
    assert torch.equal(out[f'{p}.up'], torch.full((8, 4), .5))
    assert torch.equal(out[f'{p}.down'], torch.ones(4, 8))
    assert len(out) == 2


def pair(key, down, up): return {f'{key}.lora_A.weight': down, f'{key}.lora_B.weight': up}

@pytest.mark.parametrize('tensors, says', [
    (lambda k: {f'{k}.lora_A.weight': torch.zeros(2, 8)}, 'only its down'),
    (lambda k: pair(k, torch.zeros(2, 8), torch.zeros(8, 3)), 'do not fit'),
    (lambda k: pair(k, torch.zeros(2, 8, 1, 1), torch.zeros(8, 2, 1, 1)), 'do not fit'),
    (lambda k: pair(k, torch.full((2, 8), float('nan')), torch.zeros(8, 2)), 'not finite'),
    (lambda k: {'text_encoder.layers.0.q.lora_A.weight': torch.zeros(2, 8)}, 'text_encoder'),
    (lambda k: {'lora_unet_input_blocks_1_1_proj_in.lora_down.weight': torch.zeros(2, 8)}, 'input_blocks'),
    (lambda k: {'weight': torch.zeros(2)}, 'not a LoRA'),
    (lambda k: {f'image_proj.{k}': torch.zeros(2)}, 'not its separate LoRA'),
    (lambda k: {}, 'no LoRA'), (lambda k: [1], 'list')])
def test_lora_refused(tensors, says):
    with pytest.raises(LoRAError, match=says):
        L.normal_lora(tensors('unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q'))


def test_lora_inside_and_beside(tmp_path):
    names = [f'{p}.processor' for p in ('down_blocks.0.attn1', 'down_blocks.0.attn2', 'mid_block.attn1',
                                        'mid_block.attn2')]
    ip = tiny()['ip_adapter']
    beside = L.lora_from_checkpoint(ip, names)
    assert beside['mid_block.attn2.to_out.0.up'] is ip['3.to_out_lora.up.weight'] and len(beside) == 32
    back = L.lora_into_checkpoint(L.read_lora(L.save_lora(beside, tmp_path / 'l.safetensors')), names)
    assert dict(sorted(back.items())).keys() == {k for k in ip if 'lora' in k}
    assert all(torch.equal(t, ip[k]) for k, t in back.items())
    with pytest.raises(BaseModelError, match='layer 2'): L.lora_from_checkpoint(ip, names[:2])
    with pytest.raises(LoRAError, match='another UNet'): L.lora_into_checkpoint(beside, names[:2])


def test_golden_lora_file(tmp_path):
    t = official('ip-adapter-faceid_sd15_lora.safetensors')['lora']
    save_file(t, tmp_path / 'l.safetensors')
    out = L.read_lora(tmp_path / 'l.safetensors')
    assert len(out) == len(t)
    assert torch.equal(out['down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.up'],
                       t['unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight'])


# --- does it fit
@pytest.fixture(scope='module')
def unets():
    from diffusers import UNet2DConditionModel
    def make(**kw):
        return UNet2DConditionModel(**{k: v for k, v in (cases['configs']['unet_sd'] | kw).items()})
    return dict(right=make(), words=make(cross_attention_dim=32), deep=make(layers_per_block=1),
                wide=make(block_out_channels=[64, 64]))


def test_fits(unets):
    c = C.check_state(official('ip-adapter-faceid_sd15.bin'))
    C.check_fits(c, unets['right'])
    for name, says in dict(words='tokens are 64 wide, the words of this UNet 32', deep='layers',
                           wide='needs').items():
        with pytest.raises(BaseModelError, match=says): C.check_fits(c, unets[name])


def test_fits_portrait_and_sdxl(unets):
    from diffusers import UNet2DConditionModel
    xl = UNet2DConditionModel(**cases['configs']['unet_sdxl'])
    C.check_fits(C.check_state(official('ip-adapter-faceid-portrait_sd15.bin')), unets['right'])
    C.check_fits(C.check_state(official('ip-adapter-faceid_sdxl.bin')), xl)
    for name, unet in (('ip-adapter-faceid_sdxl.bin', unets['right']), ('ip-adapter-faceid_sd15.bin', xl)):
        with pytest.raises(BaseModelError): C.check_fits(C.check_state(official(name)), unet)


# --- the unnormalised Portrait: learnt queries in place of the MLP
def raw(width=512, d=8, dim=64, tokens=16):
    from faceid_nb.projection import FacePerceiverResampler
    torch.manual_seed(0)
    s = tiny(d, rank=0)
    return {**s, 'image_proj': {'latents': torch.randn(1, tokens, dim),
                                **{k: torch.randn_like(v)
                                   for k, v in FacePerceiverResampler(dim, 4, 64, 1, width,
                                                                      d).state_dict().items()}}}


def test_unnormalised_portrait(tmp_path):
    state = raw()
    c = C.read_checkpoint(write(state, tmp_path / 'ip-adapter-faceid-portrait_sdxl_unnorm.bin'))
    assert (c.variant, c.raw, c.num_tokens, c.cross_attention_dim, c.embedding_dim,
            c.lora_rank) == ('portrait', True, 16, 8, 512, 0)
    assert 'unnormalised' in repr(c)
    V.convert(c.path, tmp_path / 'b.safetensors')
    V.convert(tmp_path / 'b.safetensors', tmp_path / 'c.bin')
    again = C.read_checkpoint(tmp_path / 'c.bin')
    assert same(again.image_proj, state['image_proj']) and same(again.ip_adapter, state['ip_adapter'])
    assert not C.check_state(tiny()).raw and not C.check_state(tiny(tokens=16, rank=0)).raw


@pytest.mark.parametrize('change, kind, says',
                         [(lambda s: raw(1280), VariantError, 'reads CLIP images'),
                          (lambda s: s['image_proj'].pop('norm_out.bias'), CheckpointError,
                           'no norm_out.bias'),
                          (lambda s: s['image_proj'].update(latents=torch.zeros(16, 64)), CheckpointError,
                           'latents has the wrong shape'), (lambda s: s['image_proj'].pop('latents'),
                                                            CheckpointError, 'no proj.0.weight')])
def test_not_quite_unnormalised(change, kind, says):
    s = raw()
    other = change(s)
    with pytest.raises(kind, match=says): C.check_state(other if isinstance(other, dict) else s)


@pytest.mark.parametrize('kind', ['unet_sd', 'unet_sdxl'])
def test_unnormalised_portrait_inside_diffusers(kind):
    from diffusers import UNet2DConditionModel
    unet = UNet2DConditionModel(**cases['configs'][kind])
    names = list(unet.attn_processors)
    s = raw(d=unet.config.cross_attention_dim)
    layers = s['ip_adapter'] = {}
    for i, name in enumerate(names):
        if 'attn2' not in name: continue
        width = unet.get_submodule(name.removesuffix('.processor')).inner_dim
        for part in 'kv':
            layers[f'{i}.to_{part}_ip.weight'] = torch.randn(width, unet.config.cross_attention_dim)
    unet._load_ip_adapter_weights([s], low_cpu_mem_usage=False)
    held, c = unet.state_dict(), C.check_state(s)
    said = V.to_diffusers(c, names)
    assert all(torch.equal(held[k], t) for k, t in said.items())
    assert {k for k in held if '_ip.' in k or 'encoder_hid' in k} == set(said)
    back = V.from_diffusers(held, names)
    assert back.raw and same(back.image_proj, s['image_proj']) and same(back.ip_adapter, s['ip_adapter'])


def test_split_keeps_what_is_known(tmp_path):
    "Eight tokens without a LoRA look like a Portrait; and splitting a file over itself loses nothing."
    names = [f'{p}.processor' for p in ('down_blocks.0.attn1', 'down_blocks.0.attn2', 'mid_block.attn1',
                                        'mid_block.attn2')]
    state = tiny(tokens=8)
    f = C.save_checkpoint(state, tmp_path / 'mine.safetensors')
    bare, lora = V.split_lora(f, f, tmp_path / 'mine_lora.safetensors', names)
    c = C.read_checkpoint(bare)
    assert (c.variant, c.lora_rank) == ('faceid', 0)
    whole = C.read_checkpoint(V.join_lora(bare, lora, tmp_path / 'whole.bin', names))
    assert same(whole.image_proj, state['image_proj']) and same(whole.ip_adapter, state['ip_adapter'])


def test_a_raw_training_state_is_called_so_with_what_to_do(tmp_path):
    "With a LoRA among its layers, as the training script of FaceID has it, and the UNet's own tensors."
    names = ('unet.conv_in.weight', 'image_proj_model.norm.weight', 'adapter_modules.0.to_q_lora.down.weight')
    torch.save({n: torch.zeros(2) for n in names}, tmp_path/'pytorch_model.bin')
    with pytest.raises(CheckpointError, match='a raw training state.*Leave out unet.*ip_adapter'):
        C.read_checkpoint(tmp_path/'pytorch_model.bin')
