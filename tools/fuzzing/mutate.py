"Bytes that were changed: what a bad disk, a broken line and somebody who means harm make of a file."
import struct

NUMBERS = (0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0xffffffff, 1 << 40, 2**63 - 1, 2**64 - 1)


def place(rng, data):
    "Where to strike: headers at the front and directories at the end more often than their share."
    near = min(len(data), 4096)
    start = rng.choice([0, 0, len(data) - near, rng.randrange(len(data))])
    return min(len(data) - 1, start + rng.randrange(near))


def flip(rng, data):
    for _ in range(rng.choice([1, 1, 4, 64])): data[place(rng, data)] ^= 1 << rng.randrange(8)


def overwrite(rng, data):
    at, n = place(rng, data), rng.choice([1, 4, 100, 5000])
    data[at:at + n] = rng.randbytes(len(data[at:at + n]))


def blank(rng, data):
    at, n = place(rng, data), rng.choice([1, 16, 512, 100_000])
    data[at:at + n] = bytes([rng.choice([0, 255])])*len(data[at:at + n])


def number(rng, data):
    "A size that lies."
    at, form = place(rng, data), rng.choice(['<H', '>H', '<I', '>I', '<Q', '>Q'])
    value = rng.choice(NUMBERS) & (1 << 8*struct.calcsize(form)) - 1
    part = struct.pack(form, value)[:len(data) - at]
    data[at:at + len(part)] = part


def cut(rng, data): del data[rng.choice([place(rng, data), rng.randrange(len(data))]):]


def drop(rng, data):
    at = place(rng, data)
    del data[at:at + rng.choice([1, 7, 512, 20_000])]


def insert(rng, data):
    at = place(rng, data)
    data[at:at] = rng.randbytes(rng.choice([1, 7, 512]))


def double(rng, data):
    at, n = place(rng, data), rng.choice([8, 256, 4096])
    data[at:at] = data[at:at + n]


def move(rng, data):
    "One part of the file over another."
    a, b, n = place(rng, data), place(rng, data), rng.choice([4, 64, 1024])
    part = data[a:a + n][:len(data) - b]
    data[b:b + len(part)] = part


def append(rng, data): data += rng.choice([rng.randbytes(100), bytes(100_000), bytes(data)])


WAYS = (flip, overwrite, blank, number, cut, drop, insert, double, move, append)


def bytes_changed(rng, data):
    "A copy of some bytes, changed in one to three ways."
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if data: rng.choice(WAYS)(rng, data)
    return bytes(data)
