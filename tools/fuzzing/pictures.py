"Picture files that were changed: a named error, or what a picture is: uint8, (height, width, 3)."
import io
import struct
import warnings
import zlib
from functools import partial

import numpy as np
from faceid_nb.images import read_image
from PIL import Image

from .archives import deflated_zeros
from .family import RIGHT, Family, Fault, end_of
from .mutate import NUMBERS, bytes_changed

SIDE = 48


def scene(mode='RGB'):
    "A picture with edges, slopes and noise."
    y, x = np.mgrid[:SIDE, :SIDE + 16]
    a = np.stack([4*x, 5*y, 255*((x//8 + y//8) % 2)], -1) % 256
    a[10:20, 10:20] = np.random.default_rng(0).integers(0, 256, (10, 10, 3))
    if mode == 'I;16': return Image.fromarray(a[..., 0].astype(np.uint16)*257)
    return Image.fromarray(a.astype(np.uint8)).convert(mode)


def written(kind, mode='RGB', **how):
    "The bytes of a picture file."
    out = io.BytesIO()
    scene(mode).save(out, kind, **how)
    return out.getvalue()


def exif(orientation=6):
    e = Image.Exif()
    e[0x0112] = orientation
    e[0x010e] = 'x'*500
    return e


TIFF_WAYS = ('tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'jpeg', 'tiff_ccitt', 'group4', 'lzma', 'zstd')


def seeds():
    "{name: bytes} of files of every kind."
    gif = dict(save_all=True, append_images=[scene('P').rotate(90), scene('P')])
    files = dict(
        jpeg=written('JPEG'), jpeg_progressive=written('JPEG', progressive=True),
        jpeg_grey=written('JPEG', 'L'), jpeg_cmyk=written('JPEG', 'CMYK'),
        jpeg_exif=written('JPEG', exif=exif()), png=written('PNG'),
        png_alpha=written('PNG', 'RGBA'), png_palette=written('PNG', 'P', transparency=3),
        png_deep=written('PNG', 'I;16'), png_exif=written('PNG', exif=exif(8)), png_1=written('PNG', '1'),
        webp=written('WEBP', exif=exif()), webp_lossless=written('WEBP', 'RGBA', lossless=True),
        webp_moving=written('WEBP', save_all=True, append_images=[scene().rotate(90)]),
        tiff=written('TIFF'), tiff_deep=written('TIFF', 'F'), tiff_palette=written('TIFF', 'P'),
        bmp=written('BMP'), bmp_1=written('BMP', '1'), bmp_alpha=written('BMP', 'RGBA'),
        gif=written('GIF', 'P'), gif_moving=written('GIF', 'P', **gif))
    for way in TIFF_WAYS:
        mode = '1' if way in ('tiff_ccitt', 'group4') else 'RGB'
        try: files[f'tiff_{way}'] = written('TIFF', mode, compression=way)
        except (OSError, ValueError, KeyError, RuntimeError): continue
    return files


# PNG

def chunk(name, data):
    "A part of a PNG, with its size and its sum."
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def chunks(data):
    "[(name, contents)] of a PNG."
    at, found = 8, []
    while at + 8 <= len(data):
        n = struct.unpack('>I', data[at:at + 4])[0]
        found.append((data[at + 4:at + 8], data[at + 8:at + 8 + n]))
        at += 12 + n
    return found


def png_of(parts): return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(name, data) for name, data in parts)


def header_png(rng, parts):
    "An IHDR whose sums are right and whose sizes are not."
    fields = list(struct.unpack('>IIBBBBB', parts[0][1]))
    k = rng.randrange(7)
    fields[k] = rng.choice(NUMBERS) & (0xffffffff if k < 2 else 0xff)
    if rng.random() < .3: fields[1 - (k > 0)] = rng.choice([1, 100_000, 2**31 - 1])
    parts[0] = b'IHDR', struct.pack('>IIBBBBB', *fields)


def png_changed(rng, data):
    "A PNG that is changed behind its check sums."
    parts = chunks(data)
    way = rng.randrange(5)
    if way == 0: header_png(rng, parts)
    elif way == 1: parts.insert(rng.randrange(len(parts)), rng.choice(parts))
    elif way == 2: parts.pop(rng.randrange(len(parts)))
    elif way == 3:
        name = rng.choice([b'zTXt', b'iTXt', b'iCCP'])
        zeros = b'x\x9c' + deflated_zeros(256 << 20)
        body = b'a\0\1\0\0\0' + zeros if name == b'iTXt' else b'a\0\0' + zeros
        parts[1:1] = [(name, body)]*rng.choice([1, 20])
    else:
        k = rng.randrange(len(parts))
        parts[k] = parts[k][0], bytes_changed(rng, parts[k][1] or b'\0')
    return png_of(parts)


# sizes

SIZES = {   # kind: [(where a size stands, how)]; None: at the first such marker
    'bmp': [(18, '<i'), (22, '<i'), (10, '<I'), (28, '<H'), (30, '<I'), (46, '<I')],
    'gif': [(6, '<H'), (8, '<H'), (10, 'B')],
    'webp': [(4, '<I'), (16, '<I'), (24, '<I'), (26, '<H'), (28, '<H')],
}


def jpeg_fields(data):
    "Where the sizes of a JPEG stand."
    at = max(data.find(b'\xff\xc0'), data.find(b'\xff\xc2'))
    return [(at + 5, '>H'), (at + 7, '>H'), (at + 9, 'B'), (at + 2, '>H')] if at > 0 else []


def tiff_fields(data):
    "Where the entries of a TIFF's directory keep their kinds, counts and values."
    start = struct.unpack('<I', data[4:8])[0]
    n = struct.unpack('<H', data[start:start + 2])[0]
    entries = [start + 2 + 12*k for k in range(n)]
    values, counts = [(e + 8, '<I') for e in entries], [(e + 4, '<I') for e in entries]
    return values + counts + [(e + 2, '<H') for e in entries]


def sizes_changed(rng, kind, data):
    "A file whose header lies about its sizes."
    fields = SIZES.get(kind) or (jpeg_fields(data) if kind == 'jpeg' else tiff_fields(data))
    data = bytearray(data)
    for at, form in rng.sample(fields, min(len(fields), rng.choice([1, 2, 2]))):
        room = struct.calcsize(form)
        value = rng.choice([*NUMBERS, 10_000, 14_000, 65_535, 16_383, 30_000]) & (1 << 8*room) - 1
        data[at:at + room] = value.to_bytes(room, 'big' if form[0] == '>' else 'little')
    return bytes(data)


# bombs: files that are right, and huge

def huge_png(side, kind, bits=8):
    "A PNG of nothing but zeros, side x side."
    wide = dict(zip((0, 2, 3, 4, 6), (1, 3, 1, 2, 4)))[kind]*bits//8
    rows = (side*wide + 1)*side
    body = zlib.compressobj(1)
    packed, block = [], bytes(1 << 22)
    for _ in range(rows >> 22): packed.append(body.compress(block))
    packed += [body.compress(bytes(rows & (1 << 22) - 1)), body.flush()]
    parts = [(b'IHDR', struct.pack('>IIBBBBB', side, side, bits, kind, 0, 0, 0))]
    if kind == 3: parts += [(b'PLTE', bytes(768)), (b'tRNS', bytes(256))]
    return png_of([*parts, (b'IDAT', b''.join(packed)), (b'IEND', b'')])


def huge(kind, side, mode='RGB', **how):
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, kind, **how)
    return out.getvalue()


def many_scans(n, side):
    "A progressive JPEG that paints its pixels over again n times."
    out = io.BytesIO()
    Image.new('L', (side, side)).save(out, 'JPEG', progressive=True)
    data = out.getvalue()
    starts = [i for i in range(len(data) - 1) if data[i:i + 2] == b'\xff\xda']
    last = data[starts[-1]:-2]
    return data[:-2] + last*n + b'\xff\xd9'


def eps():
    "A picture that is a program."
    return (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n'
            b'(%pipe%touch /tmp/fuzz-ran) (w) file\nshowpage\n')


def svg(): return b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>'


def bombs():
    "{name: a function that makes it}"
    return {
        'png, 13,000': partial(huge_png, 13_000, 2), 'png, 9,000, alpha': partial(huge_png, 9_000, 6),
        'png, 12,000, alpha': partial(huge_png, 12_000, 6),
        'png, 13,000, palette': partial(huge_png, 13_000, 3),
        'png, 12,000, 16 bits': partial(huge_png, 12_000, 0, 16), 'png, 50,000': partial(huge_png, 50_000, 0),
        'gif, 13,000': partial(huge, 'GIF', 13_000, 'P'),
        'webp, 13,000': partial(huge, 'WEBP', 13_000, method=0),
        'tiff, 12,000': partial(huge, 'TIFF', 12_000, compression='tiff_adobe_deflate'),
        'tiff, 9,900, F': partial(huge, 'TIFF', 9_900, 'F', compression='tiff_adobe_deflate'),
        'tiff, 9,900, I': partial(huge, 'TIFF', 9_900, 'I', compression='tiff_adobe_deflate'),
        'tiff, 9,900, CMYK': partial(huge, 'TIFF', 9_900, 'CMYK', compression='tiff_adobe_deflate'),
        'bmp, 7,000': partial(huge, 'BMP', 7_000, '1'), 'jpeg, 9,900': partial(huge, 'JPEG', 9_900),
        'jpeg, 4,000 scans': partial(many_scans, 4_000, 3_000), 'eps': eps, 'svg': svg,
        'jpeg, 46 scans': partial(many_scans, 40, 9_900), 'jpeg, 11 scans': partial(many_scans, 5, 9_000)}


class Pictures(Family):
    n = 5000
    def __init__(self, seed=0):
        super().__init__(seed)
        warnings.simplefilter('ignore')
        self.files, self.bombs, self.made = seeds(), bombs(), {}
        self.whole = {name: read_image(data) for name, data in self.files.items()}
        self.kinds = dict(bytes=self.some_bytes, cut=self.cut, sizes=self.sizes, chunks=self.some_chunks,
                          bomb=self.bomb, mixed=self.mixed)

    def draw(self, i):
        rng = self.random(i)
        kind = rng.choices(list(self.kinds), [45, 15, 22, 12, 1.5, 4])[0]
        name = rng.choice(list(self.files))
        return kind, self.kinds[kind](rng, name)

    def some_bytes(self, rng, name):
        return partial(self.judged, bytes_changed(rng, self.files[name]), rng.random() < .2)

    def cut(self, rng, name):
        data = self.files[name]
        return partial(self.judged, data[:rng.randrange(len(data))], False, self.whole[name])

    def sizes(self, rng, name):
        kind = name.partition('_')[0]
        if kind == 'png': return self.some_chunks(rng, name)
        return partial(self.judged, sizes_changed(rng, kind, self.files[name]))

    def some_chunks(self, rng, name):
        name = rng.choice([name for name in self.files if name.startswith('png')])
        return partial(self.judged, png_changed(rng, self.files[name]))

    def mixed(self, rng, name):
        "The front of one file and the end of another."
        a, b = self.files[name], self.files[rng.choice(list(self.files))]
        return partial(self.judged, a[:rng.randrange(1, 200)] + b[rng.randrange(200):])

    def bomb(self, rng, name):
        name = rng.choice(list(self.bombs))
        path = self.folder/f'{list(self.bombs).index(name)}.picture'
        if not path.exists(): path.write_bytes(self.bombs[name]())
        return partial(self.judged, path.read_bytes())

    def judged(self, data, from_file=False, whole=None):
        "How reading ends."
        path = self.folder/'it.jpg'
        if from_file: path.write_bytes(data)
        read = {}
        def act(): read['it'] = read_image(path if from_file else data)
        end = end_of(act)
        if end != RIGHT: return end
        a = read['it']
        good = a.dtype == np.uint8 and a.ndim == 3 and a.shape[-1] == 3 and a.size
        if not good: raise Fault(f'{a.dtype} {a.shape}')
        if not a.flags.writeable: raise Fault('the caller may not draw on it')
        if whole is None or np.array_equal(a, whole): return end
        raise Fault('another picture, and nobody says so')
