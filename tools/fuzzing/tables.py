"Tables of tensors that no training wrote."
import json
import struct

import torch

from .archives import GIB

TYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64,
         torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]


def entry(rng, state):
    "A table in the state and a key of it."
    part = rng.choice([t for t in state.values() if isinstance(t, dict) and t] or [state])
    return part, rng.choice(list(part))


def retype(rng, state):
    part, key = entry(rng, state)
    part[key] = part[key].to(rng.choice(TYPES))


def retype_all(rng, state):
    dtype = rng.choice(TYPES)
    for part in state.values(): part.update({k: t.to(dtype) for k, t in part.items()})


def reshape(rng, state):
    "A tensor of other sizes."
    part, key = entry(rng, state)
    t = part[key]
    part[key] = rng.choice([
        t.flatten(), t[None], t[..., None], t[:0], t[:1], t[..., :0], t[..., :1], t.flatten()[0], t.T, t[:-1],
        torch.cat([t, t]), t.flatten()[:1].expand(1, 1, 1, 1), torch.zeros(0), torch.zeros(0, 0)])


def swell(rng, state):
    "A tensor that is a single number, and pretends to be terabytes."
    part, key = entry(rng, state)
    sizes = rng.choice([(1 << 20, 1 << 20), (1 << 34,), (1 << 40,), (64, 1 << 33)])
    part[key] = torch.ones(()).expand(sizes)


def share(rng, state):
    "Many names for one storage, read again and again."
    part, _ = entry(rng, state)
    big = torch.zeros(1 << 18)
    for k in range(4000): part[f'{1000 + k}.to_k_ip.weight'] = big.view(512, 512)


def unusual(rng, state):
    "A tensor of another kind: sparse, on no device, quantised, nested, a parameter, not in order."
    part, key = entry(rng, state)
    t = part[key]
    part[key] = rng.choice([
        lambda: t.to_sparse(), lambda: t.to('meta'), lambda: torch.nn.Parameter(t), lambda: t.flip(0).T.T,
        lambda: torch.quantize_per_tensor(t, .1, 0, torch.qint8), lambda: t.requires_grad_(),
        lambda: torch.nested.nested_tensor([t, t]), lambda: t.to_sparse_csr() if t.ndim == 2 else t,
        lambda: torch.nn.Buffer(t), lambda: t.clone().view(torch.int32), lambda: t.conj().neg()])()


def poison(rng, state):
    "A number that is none."
    part, key = entry(rng, state)
    part[key] = t = part[key].clone()
    t.flatten()[rng.randrange(t.numel())] = rng.choice([float('nan'), float('inf'), -float('inf'), 3e38])


def lose(rng, state):
    part, key = entry(rng, state)
    del part[key]


def lose_many(rng, state):
    part, _ = entry(rng, state)
    for key in list(part):
        if rng.random() < .5: del part[key]


NAMES = ['', '.', '..', 'weight', '-1.to_k_ip.weight', f'{"9"*30}.to_k_ip.weight', '1.to_k_ip.weight\n',
         '\u0661.to_k_ip.weight', 'layers.x.0.weight', 'perceiver_resampler.layers.99999999.0.norm1.weight',
         'perceiver_resampler.layers.-1.0.norm1.weight', 'perceiver_resampler.', 'latents',
         '../../etc/passwd', 'perceiver_resampler.layers.', 'proj_in.weight', 'x'*100_000, '\ud7ff\u0000',
         'to_k_ip', '0.to_q_lora.down.weight', 'lora_unet_down_blocks_0.alpha',
         'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.alpha']


def rename(rng, state):
    part, key = entry(rng, state)
    other = entry(rng, state)[1]
    near = str(other), str(key)[:-1], str(key).upper(), f'{key}.weight', str(key).replace('1', '0')
    name = rng.choice([*NAMES, *near])
    part[name] = part.pop(key)


def other_key(rng, state):
    "A name that is no text."
    part, key = entry(rng, state)
    part[rng.choice([1, None, (1, 2), b'weight', 1.5, True])] = part.pop(key)


def other_value(rng, state):
    part, key = entry(rng, state)
    part[key] = rng.choice([None, 1, 1.5, 'x', [part[key]], {}, {'a': part[key]}, (), [], float('nan')])


def circle(rng, state):
    "A table that holds itself."
    part, key = entry(rng, state)
    part[rng.choice([key, 'image_proj'])] = rng.choice([part, state])


def trade(rng, state):
    "Two tensors have each other's name."
    (a, k), (b, m) = entry(rng, state), entry(rng, state)
    a[k], b[m] = b[m], a[k]


def more_sections(rng, state):
    name = rng.choice(['optimizer', 'image_proj.', 'step', 'lora', 1])
    state[name] = rng.choice([{}, 1, torch.ones(2), None])


CHANGES = (retype, retype_all, reshape, swell, share, unusual, poison, lose, lose_many, rename, other_key,
           other_value, circle, trade, more_sections)
PLAIN = (retype, reshape, poison, lose, lose_many, rename, trade)   # what a .safetensors file can hold


def changed(rng, state, changes=CHANGES):
    "A copy of {section: {name: tensor}}, changed in one or two ways."
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}
    for _ in range(rng.choice([1, 1, 2])):
        # after one change the next may find nothing that it knows
        try: rng.choice(changes)(rng, state)
        except (AttributeError, RuntimeError, TypeError, ValueError, IndexError): continue
    return state


# the header of a .safetensors file

DTYPES = ['F64', 'F32', 'F16', 'BF16', 'I64', 'U8', 'BOOL', 'F8_E4M3', 'F4', 'F6_E2M3', 'F8_E8M0', 'C64', '',
          'X', None, 7]
ABOUT = [{}, {'a': 1}, {'a': None}, [], 'x',
         *({'faceid_variant': v} for v in ('x', 'plus', 'faceid', 'portrait'))]


def lie_in_header(rng, header):
    "One entry that is not as it was written."
    key = rng.choice([k for k in header if k != '__metadata__'])
    e = header[key]
    a, b = e['data_offsets']
    shapes = [], [0, *e['shape']], e['shape'][::-1], [1 << 62, 1 << 62], [-1], [1 << 40], ['4']
    offsets = [a, b + 4], [b, a], [0, b - a], [a + 4, b + 4], [-4, b], [a, 1 << 63]
    way = rng.randrange(20)
    if way < 3: e['dtype'] = rng.choice(DTYPES)
    elif way < 9: e['shape'] = rng.choice(shapes)
    elif way < 15: e['data_offsets'] = rng.choice(offsets)
    elif way < 16: e.pop(rng.choice(list(e)))
    elif way < 18: header[rng.choice(NAMES)] = header.pop(key)
    else: header['__metadata__'] = rng.choice(ABOUT)


def headed(header, body, size=None):
    "A .safetensors file of a header (a table, or bytes) and tensors."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if size is None else size) + text + body


def header_changed(rng, data):
    "A .safetensors file whose header lies."
    n = struct.unpack('<Q', data[:8])[0]
    header, body = json.loads(data[8:8 + n]), data[8 + n:]
    for _ in range(rng.choice([1, 1, 2])):
        try: lie_in_header(rng, header)
        except (KeyError, ValueError, TypeError): continue
    text = json.dumps(header).encode()
    strange = [text[:-1], text[:len(text)//2], b'{' + b'"a":{'*50_000, b'[]', b'{}', text*2,
               b'{"a":' + b'1'*100_000 + b'}',
               text.replace(b'"', b"'"), b'{' + b' '*1000, text[:-1] + b',' + text[1:]]
    if rng.random() < .2: return headed(rng.choice(strange), body)
    size = rng.choice([None]*9 + [0, 1, n - 1, n + 1, 99_999_999, GIB, 1 << 63])
    return headed(text, body, size)


def read_independently(data):
    "{name: tensor} of a .safetensors file, from its header alone."
    n = struct.unpack('<Q', data[:8])[0]
    kinds = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                 F8_E4M3=torch.float8_e4m3fn)
    found, body = {}, bytearray(data[8 + n:])
    for key, e in json.loads(data[8:8 + n]).items():
        if key == '__metadata__': continue
        a, b = e['data_offsets']
        found[key] = torch.frombuffer(body[a:b], dtype=kinds[e['dtype']]).reshape(e['shape'])
    return found
