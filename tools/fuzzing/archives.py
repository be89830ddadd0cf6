"Archives and pickles that no honest program writes."
import io
import os
import pickle
import pickletools
import posix
import struct
import subprocess
import zipfile
import zlib
from collections import OrderedDict
from functools import cache

import torch

GIB = 1 << 30


@cache
def deflated_zeros(size):
    "So many zero bytes, deflated: one block of a megabyte again and again."
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    block = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return start + block*((size >> 20) - 1) + squeeze.flush()


def archive(members):
    "A ZIP archive of {name: (method, what is stored, size that it claims, its CRC)}."
    body, directory = b'', b''
    for name, (method, stored, size, crc) in members.items():
        sizes = len(stored), min(size, 2**32 - 1), len(name), 0
        fields = struct.pack('<HHHHIIIHH', 20, 0, method, 0, crc, *sizes)
        offset, name = len(body), name.encode()
        body += b'PK\3\4' + fields + name + stored
        rest = struct.pack('<HHHII', 0, 0, 0, 0, offset)
        directory += b'PK\1\2' + struct.pack('<H', 20) + fields + rest + name
    n = len(members)
    end = struct.pack('<HHHHIIH', 0, 0, n, n, len(directory), len(body), 0)
    return body + directory + b'PK\5\6' + end


def members_of(data):
    "{name: bytes} of an archive."
    with zipfile.ZipFile(io.BytesIO(data)) as z: return {name: z.read(name) for name in z.namelist()}


def zipped(members, packed=()):
    "Bytes of an archive of {name: bytes}; those in `packed` are compressed."
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for name, data in members.items():
            z.writestr(name, data, zipfile.ZIP_DEFLATED if name in packed else zipfile.ZIP_STORED)
    return out.getvalue()


def swap_member(data, end, change):
    "An archive with one member changed and its sums right again."
    members = members_of(data)
    name = next(name for name in members if name.endswith(end))
    return zipped({**members, name: change(members[name])})


def saved(state, legacy=False):
    "What torch.save writes."
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


class Call:
    "Pickles as a call of a function."
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call


class Built(Call):
    "Pickles as a call, and a state that is given to what it returns."
    def __init__(self, function, state, *arguments): self.call = function, arguments, state


def calls(marker):
    "Calls that leave a file behind if anybody makes them, or take all memory, by name."
    write = f'open({str(marker)!r}, "w")'
    touch = f'touch {marker}'
    return dict(
        system=Call(os.system, touch), posix=Call(posix.system, touch), popen=Call(os.popen, touch),
        exec=Call(exec, write), eval=Call(eval, write), open=Call(open, str(marker), 'w'),
        run=Call(subprocess.run, ['touch', str(marker)]),
        spawn=Call(subprocess.Popen, ['touch', str(marker)]),
        loads=Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        load=Call(torch.load, str(marker)), getattr=Call(getattr, 'a', 'join'),
        bytes=Call(bytearray, 1 << 40), ordered=Built(OrderedDict, Call(os.system, touch)))


INTEGERS = {'BININT', 'BININT1', 'BININT2'}


def positions(data, names):
    "[(where an opcode begins, where the next one does)] of a pickle."
    found = [(op.name, at) for op, _, at in pickletools.genops(data)] + [('', len(data))]
    return [(at, after) for (name, at), (_, after) in zip(found, found[1:]) if name in names]


def lie(rng, data):
    "A pickle with one of its numbers another: sizes, strides, offsets."
    at, after = rng.choice(positions(data, INTEGERS))
    value = rng.choice([0, -1, 3, 1 << 20, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63)])
    longest = pickle.dumps(value, 2)[2:-1]
    return data[:at] + longest + data[after:]


def swap_opcode(rng, data):
    "A pickle in which one operation is another."
    at, _ = rng.choice(positions(data, {op.name for op in pickletools.opcodes}))
    code = rng.choice(pickletools.opcodes).code.encode('latin1')
    return data[:at] + code + data[at + 1:]


OTHER_GLOBALS = (
    'os system', 'builtins exec', 'torch LongStorage', 'torch FloatTensor', 'collections Counter',
    'torch Size', 'builtins bytearray', 'torch BFloat16Storage', 'torch._utils _rebuild_sparse_tensor',
    'torch._utils _rebuild_meta_tensor_no_storage', 'torch._utils _rebuild_parameter',
    'torch._utils _rebuild_qtensor')


def other_global(rng, data):
    "A pickle that asks for another name."
    at, after = rng.choice(positions(data, {'GLOBAL'}))
    name = rng.choice(OTHER_GLOBALS).replace(' ', '\n')
    return data[:at] + b'c' + name.encode() + b'\n' + data[after:]


def overlapped(data):
    "An archive whose directory names one member many times: little on the disk, much in memory."
    members = members_of(data)
    out = io.BytesIO(zipped(members))
    with zipfile.ZipFile(out, 'a') as z:
        first = max(z.infolist(), key=lambda info: info.file_size)
        for k in range(500):
            info = zipfile.ZipInfo(f'{first.filename}{k}')
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = first.file_size
            z.filelist.append(info)
        z._didModify = True
    return out.getvalue()


def rezipped(rng, data):
    "An archive with other members, or with the same in another way."
    members = members_of(data)
    name = rng.choice(list(members))
    without = {k: v for k, v in members.items() if k != name}
    ways = [overlapped(data), zipped(members, [name]), zipped(members, list(members)), zipped(without),
            zipped({}), zipped({**members, '../../ran': b'x', '/tmp/ran': b'x'}), b'PK\3\4' + bytes(100),
            zipped({k.partition('/')[2]: v for k, v in members.items()}),
            zipped({**members, name: members[name][:-4]})]
    return rng.choice(ways)


def lie_in_old(rng, state):
    "A file in the old layout, in which a size lies: the fourth pickle holds what was saved."
    data = saved(state, legacy=True)
    file = io.BytesIO(data)
    for _ in range(3): list(pickletools.genops(file))
    start = file.tell()
    list(pickletools.genops(file))
    end = file.tell()
    return data[:start] + lie(rng, data[start:end]) + data[end:]


def bomb(rng, data):
    "An archive with a member that is 3 GiB of zeros when it is unpacked."
    members = {name: (0, part, len(part), zlib.crc32(part)) for name, part in members_of(data).items()}
    name = rng.choice(list(members))
    claimed = rng.choice([3*GIB, 3*GIB, members[name][2]])
    members[name] = 8, deflated_zeros(3*GIB), claimed, 0
    return archive(members)
