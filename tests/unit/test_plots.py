"""Figures: every picture and number stands where it belongs, no text covers another, a missing cell shows,
and nothing is left in pyplot."""
import io, re
from itertools import chain, combinations, product
import matplotlib, numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from faceid_nb import plots as P
from faceid_nb.errors import ArgumentError, ImageError
from faceid_nb.measure import mean_interval

GREY = tuple(round(255*v) for v in to_rgb(P._GREY))
def flat(colour, size=(64, 64)): return Image.new('RGB', size, colour)
def colour_of(k): return (40 + 3*k, 200 - 2*k, (53*k) % 251)

def sweep(people=('Ada', 'Ben', 'Cleo'), scales=(.4, .8, 1.2), s_scales=(0., .5, 1.), seeds=(3, 4)):
    "A table of flat pictures, one colour a row."
    t = pd.DataFrame(product(people, scales, s_scales, seeds), columns=['face', 'scale', 's_scale', 'seed'])
    rng = np.random.default_rng(0)
    n = len(t)
    t['likeness'] = .2 + .3*t.scale - .02*t.s_scale + rng.normal(0, .05, n)
    t['distance'] = .2 - .08*t.s_scale + rng.normal(0, .01, n)
    t['adherence'] = 1 - .4*t.scale + rng.normal(0, .05, n)
    t['state'], t['error'], t['image'] = 'done', None, [flat(colour_of(k)) for k in range(n)]
    return t

@pytest.fixture
def table(): return sweep()

@pytest.fixture
def one(table): return table[(table.face == 'Ben') & (table.scale == .8)]

def pixels(figure): return np.asarray(Image.open(io.BytesIO(figure._repr_png_())).convert('RGB')).astype(int)

def place(image, colour, tolerance=0):
    "(left, top, right, bottom) of the only block of a colour."
    ys, xs = np.nonzero((abs(image - np.array(colour)) <= tolerance).all(-1))
    assert len(xs), f'{colour} is not drawn'
    box = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    assert len(xs) >= .95*(box[2] - box[0])*(box[3] - box[1])
    return box

def drawn_texts(figure):
    "[(text, (left, top, right, bottom) in pixels, points)] of every text that is really drawn."
    found, usual = [], Text.draw
    def draw(self, renderer, *args, **more):
        if self.get_visible() and self.get_text().strip():
            assert self.get_text().count('$') < 2 or not self.get_parse_math()
            b = Text.get_window_extent(self, renderer)
            found.append((self.get_text(), (b.x0, renderer.height - b.y1, b.x1, renderer.height - b.y0),
                          self.get_fontsize()))
        return usual(self, renderer, *args, **more)
    Text.draw = draw
    try: figure._repr_png_()
    finally: Text.draw = usual
    return found

def overlap(a, b): return min(a[2], b[2]) - max(a[0], b[0]) > .5 and min(a[3], b[3]) - max(a[1], b[1]) > .5

def check_layout(figure, widest=512):
    "Text inside the figure, of readable size, clear of all other text and of photographs; returns the texts."
    image, texts = pixels(figure), drawn_texts(figure)
    height, width = image.shape[:2]
    assert width <= widest and texts
    for text, box, size in texts:
        assert (box[0] >= 0 and box[1] >= 0 and box[2] <= width
                and box[3] <= height), f'{text!r} leaves the figure'
        assert size*figure.dpi/100 >= 6, f'{text!r} is too small'
    for (a, x, _), (b, y, _) in combinations(texts, 2): assert not overlap(x, y), f'{a!r} overlaps {b!r}'
    boxes = [ax.get_window_extent() for ax in figure.axes if ax.images and ax.images[0].get_array().ndim == 3]
    boxes = [(b.x0, height - b.y1, b.x1, height - b.y0) for b in boxes]
    for a, b in combinations(boxes, 2): assert not overlap(a, b)
    for box in boxes:
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= width + .01 and box[3] <= height + .01
        for text, at, _ in texts: assert not overlap(box, at), f'{text!r} covers a picture'
    return texts


# -- all figures

def condition(layers=3, steps=4, rows=2, N=16, T=4, seed=0):
    "What `adapter.condition(record=True)` leaves, without torch."
    rng = np.random.default_rng(seed)
    paths = [f'down_blocks.{k}.attentions.0.transformer_blocks.1.attn2'
             for k in range(layers - 1)] + ['mid_block.attentions.0.transformer_blocks.0.attn2']
    def shares():
        w = rng.random((rows, N, T))
        return w/w.sum(-1, keepdims=True)
    class Recorded:
        def __init__(self): self.maps = {p: [shares() for _ in range(steps)] for p in paths}
        def attention_maps(self, size, layers=None, steps=slice(None)):
            side = round(N**.5)
            def one(w):
                return np.kron(w.transpose(0, 2, 1).reshape(rows, T, side, side),
                               np.ones((size[0]//side, size[1]//side)))
            chosen = chain.from_iterable(self.maps[p][steps] for p in layers or self.maps)
            return np.mean([one(w) for w in chosen], 0)
    return Recorded()

FIGURES = dict(grid=lambda t: P.structure_grid(t[(t.face == 'Ben') & (t.scale == .8)],
                                               reference=flat('red', (300, 300))),
               people=lambda t: P.structure_grid(t[(t.seed == 3) & (t.s_scale == 0)], 'face', 'scale',
                                                 {'Ada': flat('red'), 'Cleo': flat('blue')}),
               sheet=lambda t: P.all_pictures(t),
               similarity=lambda t: P.similarity_heatmap(np.random.default_rng(0).random((12, 12))),
               knobs=lambda t: P.knob_heatmap(t), curves=lambda t: P.curves(t, lines='s_scale', ceiling=.8),
               trade_off=lambda t: P.trade_off(t, by=('scale', 's_scale'), chosen=dict(scale=.8, s_scale=.5)),
               attention=lambda t: P.attention_maps(condition(), flat('white')),
               tokens=lambda t: P.attention_maps(condition(), flat('white', (64, 96)), 'token', 'layer',
                                                 row=1))

@pytest.mark.parametrize('name', FIGURES)
def test_every_figure(name, table):
    import matplotlib.pyplot as plt
    before = table.copy(deep=True)
    figure = FIGURES[name](table)
    pd.testing.assert_frame_equal(table, before)
    assert plt.get_fignums() == [] and isinstance(figure, matplotlib.figure.Figure)
    check_layout(figure)
    wide = FIGURES['grid'](table) if name == 'grid' else figure
    assert abs(pixels(wide).shape[1] - wide.get_figwidth()*100) <= 1

def nasty():
    t = sweep(('a_person with $quite$ a long name^2', '$B_1$', 'Ünï çödé'), (.1 + .2, 1/3, 2.),
              (0., .5, None))
    t['prompt'] = ['photo of a person, ' + 'very '*20 + 'far away', 'short'][0]
    t.loc[::4, ['likeness', 'distance']] = np.nan
    t.loc[5, ['state', 'error', 'image']] = 'failed', 'RuntimeError: ' + 'x'*400 + '\nsecond line $y$', None
    return t.sample(frac=1, random_state=0)

@pytest.mark.parametrize('draw',
                         [lambda t: P.structure_grid(t[(t.seed == 3) & (t.s_scale == 0)], 'scale', 'face',
                                                     flat('red')),
                          lambda t: P.structure_grid(t[(t.seed == 3) & (t.s_scale == 0)], 'face', 'scale'),
                          lambda t: P.all_pictures(t, 6),
                          lambda t: P.all_pictures(t.head(3), caption=('prompt', 'likeness')), P.knob_heatmap,
                          lambda t: P.knob_heatmap(t, 'face', 'scale', 'distance'),
                          lambda t: P.curves(t, 'face', lines='scale',
                                             ceiling={'likeness': .7, 'adherence': .5}),
                          lambda t: P.curves(t, lines='face'), lambda t: P.trade_off(t, by='face'),
                          lambda t: P.trade_off(t, 'distance', 'adherence', ('face', 'scale', 's_scale'),
                                                None),
                          lambda t: P.curves(t, y=['likeness', 'distance', 'adherence', 'seed', 'scale'])])
def test_awkward_tables(draw): check_layout(draw(nasty()))

def test_a_text_with_dollars_is_no_formula(one):
    t = one.assign(seed=['a$x_1$b' if s == 3 else 'c' for s in one.seed])
    assert 'seed a$x_1$b' in [x[0].replace('\n', ' ') for x in drawn_texts(P.structure_grid(t))]

@pytest.mark.parametrize('style', ['default', 'dark_background'])
def test_text_can_be_told_from_its_ground(style, one):
    with matplotlib.style.context(style):
        figures = [P.structure_grid(one), P.curves(one, x='s_scale'), P.similarity_heatmap(np.eye(3))]
    for figure in figures:
        ground = np.array(to_rgb(figure.get_facecolor()[:3]))
        outside = [t for t in figure.findobj(Text) if t.get_text() and t.axes is None]
        assert outside and all(abs(np.array(to_rgb(t.get_color())) - ground).max() > .5 for t in outside)

# pictures grow to 1.5 inches, no further
def test_a_wider_figure(one):
    assert pixels(P.structure_grid(one, width=3.2)).shape[1] == 320
    assert pixels(P.structure_grid(one)).shape[1] < 512

@pytest.mark.parametrize('draw, kind', [('grid', 'image/jpeg'), ('knobs', 'image/png'),
                                        ('curves', 'image/png')])
def test_a_cell_shows_a_figure_once(draw, kind, table, monkeypatch):
    import IPython.display
    from IPython.core.formatters import DisplayFormatter
    shown = []
    monkeypatch.setattr(IPython.display, 'display', lambda data, raw: shown.append(data))
    figure = FIGURES[draw](table)
    assert DisplayFormatter().format(figure) == ({}, {})
    assert len(shown) == 1
    assert set(shown[0]) == {kind, 'text/plain'}
    image = Image.open(io.BytesIO(shown[0][kind]))
    whole = pixels(figure)
    assert image.size == whole.shape[1::-1]
    assert abs(np.asarray(image.convert('RGB')).astype(int) - whole).mean() < 3

def test_the_import_is_light(fresh):
    out = fresh('''
import sys, faceid_nb.plots as P
heavy = 'torch pandas cv2 matplotlib.pyplot IPython onnxruntime'.split()
print([m for m in heavy if m in sys.modules])
P.trade_off(dict(adherence=[.1, .2], likeness=[.2, .1], scale=[1, 2]))
P.structure_grid(dict(seed=[1], s_scale=[1], image=[None]))
print([m for m in ('torch', 'matplotlib.pyplot') if m in sys.modules])
''')
    assert out == '[]\n[]\n'


# -- texts and tables

@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=0x17f), max_size=80), st.floats(.3, 2),
       st.integers(1, 5))
def test_wrapped_text_fits(text, width, most):
    lines = P._wrap(text, width, most)
    whole = P._wrap(text, width)
    def squeeze(s): return re.sub(r'[ \t\r\f\v\n]+', '', s)
    assert all(P._inches(l) <= width for l in lines + whole)
    assert len(lines) <= most
    assert squeeze(''.join(whole)) == squeeze(text)
    if len(whole) > most:
        assert lines[-1].endswith('…') and squeeze(''.join(whole)).startswith(squeeze(''.join(lines))[:-1])
    else: assert lines == whole

def test_levels_and_labels():
    t = pd.DataFrame(dict(a=[.3, .1 + .2, 2, None], b=['x', 'b', 'x', None], c=[True, False, True, True],
                          d=[[1], [1], {}, 5], e=[2**31, 2**31 + 1, 7, 7]))
    assert P._levels(t, 'a') == [.3, 2., None]
    assert P._levels(t, 'b') == ['x', 'b', None]
    assert P._levels(t, 'c') == [False, True]
    assert P._levels(t, 'd') == ['[1]', '{}', 5]
    assert P._levels(t, 'e') == [7, 2**31, 2**31 + 1]
    assert [P._label(v) for v in (.5, 1., 2147483647., 1/3, np.float32(.1), None, np.nan, 'Ada', np.int64(3),
                                  1e-9, pd.NA)] == ['0.5', '1', '2147483647', '0.3333', '0.1', '–', '–',
                                                    'Ada', '3', '1e-09', '–']

@pytest.mark.parametrize('draw', [P.structure_grid, P.knob_heatmap, P.curves, P.trade_off, P.all_pictures])
def test_wrong_tables(draw):
    for wrong, message in ((5, 'not a table'), (sweep().iloc[:0], 'no rows'),
                           (dict(other=[1]), 'no column .* it has other')):
        with pytest.raises(ArgumentError, match=message): draw(wrong)

@pytest.mark.parametrize('as_other', [lambda t: t.to_dict('list'), lambda t: t.to_dict('records'),
                                      lambda t: t.set_index(pd.Index(range(7, 7 + len(t)))),
                                      lambda t: t.astype(dict(scale=object))])
def test_tables_of_other_kinds(table, as_other):
    table = table.head(12)
    for draw in (P.knob_heatmap, P.all_pictures):
        assert (pixels(draw(as_other(table))) == pixels(draw(table))).all()

def test_columns_that_hold_no_numbers(table):
    for draw in (P.knob_heatmap, P.curves, P.trade_off):
        with pytest.raises(ArgumentError, match="'likeness' must hold numbers"):
            draw(table.assign(likeness='high'))


# -- the grid

BOTH_WAYS = [('seed', 's_scale'), ('s_scale', 'seed')]

def placed(one, rows, columns):
    "Where a grid has its pictures {(row, column): box}, its photograph, and its texts."
    figure = P.structure_grid(one.sample(frac=1, random_state=1), rows, columns, reference=flat('red'))
    image = pixels(figure)
    boxes = {(r[rows], r[columns]): place(image, r.image.getpixel((0, 0))) for _, r in one.iterrows()}
    return boxes, place(image, (255, 0, 0)), drawn_texts(figure)

@pytest.mark.parametrize('rows, columns', BOTH_WAYS)
def test_each_picture_in_its_place(one, rows, columns):
    boxes, photo, _ = placed(one, rows, columns)
    assert len({(b[2] - b[0], b[3] - b[1]) for b in [*boxes.values(), photo]}) <= 4
    assert all(abs((b[2] - b[0]) - (b[3] - b[1])) <= 1 for b in boxes.values())
    for a, b in combinations(boxes, 2):
        (la, ta, ra, ba), (lb, tb, *_) = boxes[a], boxes[b]
        assert (abs(ta - tb) <= 1) == (a[0] == b[0]) and (abs(la - lb) <= 1) == (a[1] == b[1])
        if a[0] < b[0]: assert ba < tb
        if a[1] < b[1]: assert ra < lb
    assert all(photo[2] < b[0] for b in boxes.values())
    assert abs(photo[1] - min(b[1] for b in boxes.values())) <= 1

@pytest.mark.parametrize('rows, columns', BOTH_WAYS)
def test_numbers_stand_below_their_picture(one, rows, columns):
    boxes, _, texts = placed(one, rows, columns)
    for _, r in one.iterrows():
        left, _, right, bottom = boxes[r[rows], r[columns]]
        below = [t for t, b, _ in texts if left <= (b[0] + b[2])/2 <= right and 0 <= b[1] - bottom < 6]
        assert below == [f'{r.likeness:.2f} / {r.distance:.2f}']

@pytest.mark.parametrize('rows, columns', BOTH_WAYS)
def test_heads_stand_over_columns_and_beside_rows(one, rows, columns):
    boxes, photo, texts = placed(one, rows, columns)
    heads = {t: b for t, b, _ in texts}
    for v in one[columns].unique():
        b = heads[f'{columns} {P._label(v)}']
        assert all(boxes[k][0] < (b[0] + b[2])/2 < boxes[k][2] and b[3] <= boxes[k][1]
                   for k in boxes if k[1] == v)
    for v in one[rows].unique():
        b = heads[f'{rows} {P._label(v)}']
        assert all(boxes[k][1] < (b[1] + b[3])/2 < boxes[k][3] and photo[2] <= b[0] and b[2] <= boxes[k][0]
                   for k in boxes if k[0] == v)
    assert 'photograph' in heads and any('likeness / structure distance' in t for t in heads)

def test_a_photograph_for_every_row(table):
    t = table[(table.seed == 3) & (table.s_scale == 0)]
    image = pixels(P.structure_grid(t, 'face', 'scale', {'Cleo': flat('red'), 'Ada': flat('blue')}))
    def row(name): return place(image, t[t.face == name].iloc[0].image.getpixel((0, 0)))
    for name, colour in (('Ada', (0, 0, 255)), ('Cleo', (255, 0, 0))):
        assert abs(place(image, colour)[1] - row(name)[1]) <= 1
    class Face: image = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    assert place(pixels(P.structure_grid(t, 'face', 'scale', Face())),
                 (255, 0, 0))[1] == place(image, (0, 0, 255))[1]

def test_small_pictures_are_not_smoothed_and_large_ones_are(one):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (60, 60, 3), np.uint8)
    stripes = np.zeros((1000, 1000, 3), np.uint8)
    stripes[::2] = 255
    t = one.iloc[:2].assign(seed=[1, 2], s_scale=0., image=[Image.fromarray(small), Image.fromarray(stripes)],
                            likeness=np.nan, distance=np.nan)
    figure = P.structure_grid(t)
    image = pixels(figure)
    boxes = [ax.get_window_extent() for ax in figure.axes]
    top, bottom = (
        image[image.shape[0] - int(b.y1) + 2:image.shape[0] - int(b.y0) - 2, int(b.x0) + 2:int(b.x1) - 2]
        for b in boxes)
    assert {tuple(p) for p in top.reshape(-1, 3)} <= {tuple(p) for p in small.reshape(-1, 3).astype(int)}
    assert abs(bottom - 127).max() < 40

def test_tall_pictures_keep_their_shape(one):
    image = pixels(
        P.structure_grid(one.assign(image=[flat(colour_of(k), (60, 90)) for k in range(len(one))])))
    b, square = place(image, colour_of(0)), pixels(P.structure_grid(one))
    assert abs((b[3] - b[1])/(b[2] - b[0]) - 1.5) < .05
    assert image.shape[1] == square.shape[1]
    assert image.shape[0] > square.shape[0] + 60
    sheet = pixels(P.all_pictures(one.assign(image=[flat(colour_of(k), (90, 60)) for k in range(len(one))])))
    b = place(sheet, colour_of(0))
    assert b[0] < 10 and b[1] < 10

def with_gaps(one, folder):
    "A grid that lacks five of six pictures, each for another reason; and which row is kept."
    flat((9, 8, 7)).save(folder/'kept.png')
    t = one.copy().astype(dict(image=object))
    def row(seed, s): return t.index[(t.seed == seed) & (t.s_scale == s)][0]
    t.loc[row(3, 0.), ['image', 'state', 'error']] = None, 'failed', 'out of memory'
    t.at[row(3, .5), 'image'] = None
    t.at[row(3, 1.), 'image'] = str(folder/'kept.png')
    t.at[row(4, 0.), 'image'] = folder/'no.png'
    t.loc[row(4, .5), ['image', 'state']] = None, 'waiting'
    return t.drop(row(4, 1.)), one.loc[row(3, 1.)]

def test_missing_cells_are_grey_and_say_why(one, tmp_path):
    t, kept = with_gaps(one, tmp_path)
    figure = P.structure_grid(t)
    image = pixels(figure)
    place(image, (9, 8, 7))
    texts = check_layout(figure)
    empty = [ax for ax in figure.axes if not ax.images]
    grey = [g.get_window_extent() for g in chain.from_iterable(ax.patches for ax in empty)]
    seen = {}
    for b in grey:
        x0, x1, y0, y1 = b.x0, b.x1, image.shape[0] - b.y1, image.shape[0] - b.y0
        assert (image[int(y0) + 2, int(x0) + 2] == GREY).all()
        assert (image[int(y1) - 3, int(x1) - 3] == GREY).all()
        across = [(t, u, d) for t, (l, u, r, d), _ in texts if x0 <= l and r <= x1]
        inside = [t.replace('\n', ' ') for t, u, d in across if y0 <= u and d <= y1]
        seen[round(y0), round(x0)] = ' '.join(inside)
        assert not [t for t, u, _ in across if 0 <= u - y1 < 6]
    reasons = [seen[k] for k in sorted(seen)]
    assert reasons[:2] == ['out of memory', 'no picture']
    assert 'There is no' in reasons[2]
    assert reasons[3:] == ['waiting', 'not made']
    numbers = [t for t, *_ in texts if ' / ' in t and 'below' not in t]
    assert numbers == [f'{kept.likeness:.2f} / {kept.distance:.2f}']

def test_no_face_is_said(one):
    t = one.copy()
    t.loc[t.index[0], ['likeness', 'distance']] = np.nan
    t.loc[t.index[1], 'distance'] = np.nan
    texts = [x[0] for x in drawn_texts(P.structure_grid(t))]
    assert 'no face' in texts and f'{t.likeness.iloc[1]:.2f} / –' in texts
    texts = [x[0]
             for x in drawn_texts(P.structure_grid(
                 one.drop(columns=['likeness', 'distance', 'state', 'error'])))]
    assert not [x for x in texts if 'face' in x or '/' in x]

def test_crowded_cells_are_refused(table, one):
    with pytest.raises(ArgumentError, match=r'^3 pictures fall into the cell seed 3, s_scale 0\. scale also '
                       r'varies\. Choose one value first, such as table\[table\.scale == 0\.4\]'):
        P.structure_grid(table[table.face == 'Ada'])
    with pytest.raises(ArgumentError, match='face and scale also vary'): P.structure_grid(table)
    with pytest.raises(ArgumentError, match='the same row twice'): P.structure_grid(pd.concat([one, one]))
    with pytest.raises(ArgumentError, match='two arguments'): P.structure_grid(one, 'seed', 'seed')
    with pytest.raises(ArgumentError, match="no column 'image'"): P.structure_grid(one.drop(columns='image'))

@pytest.mark.parametrize('photo', ['nowhere.png', type('Face', (), dict(image=None))()])
def test_a_reference_that_cannot_be_drawn(one, photo):
    with pytest.raises(ImageError, match='reference'): P.structure_grid(one, reference=photo)

def test_many_columns_grow_the_figure():
    t = sweep(('Ada',), (1.,), tuple(np.linspace(0, 1.5, 14)), (3,))
    figure = P.structure_grid(t, reference=flat('red'))
    check_layout(figure, 2000)
    image = pixels(figure)
    b = place(image, colour_of(13))
    assert b[2] - b[0] >= 60 and image.shape[1] > 900


# -- the contact sheet

def test_contact_sheet_keeps_the_order_of_the_table(table):
    t = table.sample(13, random_state=0)
    figure = P.all_pictures(t, 5)
    image, texts = pixels(figure), check_layout(figure)
    boxes = [place(image, p.getpixel((0, 0))) for p in t.image]
    assert all((a[0] < b[0] and abs(a[1] - b[1]) <= 1) if (k + 1) % 5 else (b[1] > a[3] and b[0] < 20)
               for k, (a, b) in enumerate(zip(boxes, boxes[1:])))
    for (_, r), (left, _, right, bottom) in zip(t.iterrows(), boxes):
        text = ' '.join(x for x, b, _ in texts if left <= (b[0] + b[2])/2 <= right and 0 <= b[1] - bottom < 6)
        assert re.split(r'\s*[\n,]\s*', text.replace('\xa0',
                                                     ' ')) == [f'{r.likeness:.2f}', f'face {r.face}',
                                                               f'scale {r.scale:g}', f's_scale {r.s_scale:g}',
                                                               f'seed {r.seed}']

def test_what_a_sweep_notes_is_no_argument(one):
    "The columns of `Sweep.table` that differ from picture to picture without being asked for."
    t = one.assign(number=range(len(one)), key=[f'{k:064x}' for k in range(len(one))], judge='judge',
                   device='cpu', made=np.arange(len(one)) + .5, seconds=.1, error='')
    assert P._varying(t) == ['s_scale', 'seed']
    assert (pixels(P.all_pictures(t)) == pixels(P.all_pictures(one))).all()
    assert (pixels(P.structure_grid(t)) == pixels(P.structure_grid(one))).all()
    with pytest.raises(ArgumentError, match='they are the same row twice'):
        P.structure_grid(pd.concat([t, t.assign(number=9, key='x', made=0.)]))

def test_captions_of_ones_own(table):
    t = table.head(4)
    def words(**how): return [x[0].replace('\xa0', ' ') for x in drawn_texts(P.all_pictures(t, **how))]
    assert [f'number {k}' for k in t.index] == words(
        caption=lambda r: f"number {list(t.likeness).index(r['likeness'])}")
    assert words(caption='seed') == ['seed 3', 'seed 4', 'seed 3', 'seed 4']
    assert (sorted(words(caption=('adherence', 'seed')))
            == sorted([f'{a:.2f}\nseed {s}' for a, s in zip(t.adherence,
                                                            t.seed)] + [
                                                                'below each picture: prompt adherence']))
    assert all(x.count('\n') < 2 for x in words(caption=lambda r: 'word '*40, lines=2))
    assert words(caption=lambda r: '') == []
    assert len(words(columns=100)) == 5
    assert pixels(P.all_pictures(t, 100)).shape[1] <= 512
    for wrong in (dict(columns=0), dict(caption='beauty')):
        with pytest.raises(ArgumentError): P.all_pictures(t, **wrong)


# -- heat maps

def cell_colours(figure, n, m):
    "Colours of the cells of a heat map, taken near their upper left corners."
    b, image = figure.axes[0].get_window_extent(), pixels(figure)
    h = image.shape[0]
    def at(r, c): return (int(h - b.y1 + (r + .14)*b.height/n), int(b.x0 + (c + .07)*b.width/m))
    return np.array([[image[at(r, c)] for c in range(m)] for r in range(n)])

def light(colours): return colours @ np.array([.2126, .7152, .0722])

def test_colours_follow_the_values():
    values = np.random.default_rng(0).permutation(30).reshape(5, 6)/30 - .3
    figure = P.similarity_heatmap(values)
    colours = light(cell_colours(figure, 5, 6))
    assert (np.diff(colours.ravel()[values.ravel().argsort()]) > 0).all()
    texts = {t: b for t, b, _ in check_layout(figure)}
    b, h = figure.axes[0].get_window_extent(), pixels(figure).shape[0]
    for (r, c), v in np.ndenumerate(values):
        box = texts[f'{v:.2f}'.replace('-0.00', '0.00')]
        assert int(((box[0] + box[2])/2 - b.x0)/b.width*6) == c
        assert int(((box[1] + box[3])/2 - (h - b.y1))/b.height*5) == r
    # one value is the middle of the colours
    a = cell_colours(P.similarity_heatmap(np.array([[.2, .4]]), limits=(0, 1)), 1, 2)
    assert (a != cell_colours(P.similarity_heatmap(np.array([[.2, .4]])), 1, 2)).any()
    assert abs(cell_colours(P.similarity_heatmap(np.full((2, 2), .5), owner=False), 2,
                            2) - [33, 144, 140]).max() < 4

def test_numbers_can_be_read_on_every_colour():
    figure = P.similarity_heatmap(np.linspace(0, 1, 10)[None])
    texts = figure.axes[0].texts
    ground = cell_colours(figure, 1, 10)[0]/255
    assert len(texts) == 10
    assert all(abs(light(np.array(to_rgb(t.get_color()))) - light(g)) > .3 for t, g in zip(texts, ground))

def test_nan_is_hatched():
    values = np.array([[.1, np.nan], [.5, .9]])
    figure = P.similarity_heatmap(values, owner=False)
    colours = cell_colours(figure, 2, 2)
    assert np.ptp(colours[0, 1]) == 0
    assert 100 < colours[0, 1, 0] < 250
    assert all(np.ptp(c) > 20 for c in (colours[0, 0], colours[1, 0], colours[1, 1]))
    # hatching
    b = figure.axes[0].get_window_extent()
    image = pixels(figure)
    h = image.shape[0]
    inside = image[int(h - b.y1) + 2:int(h - b.y1 + b.height/2) - 2, int(b.x0 + b.width/2) + 2:int(b.x1) - 2]
    assert len({tuple(p) for p in inside[:4].reshape(-1, 3)}) > 3
    texts = [t for t, *_ in check_layout(figure)]
    assert 'nan' in texts
    assert any('no face' in t for t in texts)
    assert not any('no face' in t for t, *_ in drawn_texts(P.similarity_heatmap(np.eye(2))))
    check_layout(P.similarity_heatmap(np.full((2, 2), np.nan)))

def test_what_was_not_made_is_empty(table):
    t = table[~((table.scale == .4) & (table.s_scale == 0))].copy()
    t.loc[(t.scale == .8) & (t.s_scale == .5), 'likeness'] = np.nan
    figure = P.knob_heatmap(t)
    colours = cell_colours(figure, 3, 3)
    assert (colours[0, 0] == 255).all() and np.ptp(colours[1, 1]) == 0 and (colours[1, 1] < 250).all()
    texts = [x for x, *_ in check_layout(figure)]
    assert texts.count('nan') == 1
    of_the_bar = {l.get_text() for l in figure.axes[1].get_yticklabels()}
    assert sum(bool(re.fullmatch(r'-?\d\.\d\d', x)) for x in texts if x not in of_the_bar) >= 7

def frames(figure):
    return sorted({(round(p.get_y() + .5), round(p.get_x() + .5))
                   for p in figure.axes[0].patches if not p.get_fill()})

def test_the_own_person_is_framed():
    values = np.random.default_rng(0).random((4, 2))
    assert frames(P.similarity_heatmap(values, owner=[0, 1, 1, 0])) == [(0, 0), (1, 1), (2, 1), (3, 0)]
    assert frames(P.similarity_heatmap(values)) == []
    assert frames(P.similarity_heatmap(values[:2])) == [(0, 0), (1, 1)]
    assert frames(P.similarity_heatmap(values[:2], owner=False)) == []
    figure = P.similarity_heatmap(np.zeros((2, 2)))
    b = figure.axes[0].get_window_extent()
    image = pixels(figure)
    h = image.shape[0]
    edge = light(image[int(h - b.y1 + b.height/4), int(b.x0) - 2:int(b.x0) + 3])
    assert edge.max() > 200 and edge.min() < 40
    for wrong in (True, [0, 1], [0, 1, 2, 0], [0, -1, 1, 0], [0, .5, 1, 0]):
        with pytest.raises(ArgumentError, match='owner'): P.similarity_heatmap(values, owner=wrong)
    for wrong in (np.zeros(3), np.zeros((0, 2))):
        with pytest.raises(ArgumentError, match='numbers'): P.similarity_heatmap(wrong)
    with pytest.raises(ArgumentError, match='limits'): P.similarity_heatmap(values, limits=(1, 0))
    with pytest.raises(ArgumentError, match='labels'): P.similarity_heatmap(values, rows=['a'])

def test_long_labels_are_cut(table):
    long = ['one ' + 'very '*20 + 'long', 'another ' + 'x'*90, 'short']
    check_layout(P.similarity_heatmap(np.eye(3), long, long))
    check_layout(P.curves(table.assign(prompt=[long[k % 3] for k in range(len(table))]), lines='prompt',
                          ceiling=.5))

def test_labels_of_a_matrix():
    values = np.arange(6.).reshape(2, 3)
    def words(*a, **k): return [t for t, *_ in check_layout(P.similarity_heatmap(*a, **k))]
    assert {'Ada', 'Ben', 'x', 'y', 'z', 'who',
            'whom'} <= set(words(pd.DataFrame(values, ['Ada', 'Ben'], list('xyz')), sides=('who', 'whom')))
    assert {'p', 'q', '0', '1', '2'} <= set(words(values, rows='pq'))
    assert '2' in words(values)

@pytest.mark.parametrize('n', [1, 15, 40, 150])
def test_heat_maps_of_any_size(n):
    figure = P.similarity_heatmap(np.random.default_rng(0).random((n, n)),
                                  columns=[f'somebody {k}' for k in range(n)])
    texts = [t for t, *_ in check_layout(figure, 512 if n < 150 else 999)]
    assert ('somebody 0' in texts) and (len(figure.axes[0].texts) == (n*n if n <= 15 else 0))

def test_knob_heatmap_is_a_mean_over_people(table):
    t = pd.DataFrame(dict(scale=1., s_scale=1., face=['Ada']*9 + ['Ben'], likeness=[0.]*8 + [np.nan] + [1.]))
    def words(*a, **k): return [x for x, *_ in drawn_texts(P.knob_heatmap(*a, **k))]
    assert '0.50\n9 of 10' in words(t)
    assert '0.11\n9 of 10' in words(t, group=None)
    assert '0.11\n9 of 10' in words(t.drop(columns='face'))
    assert any("'9 of 10'" in x.replace('\n', ' ') for x in words(t))
    texts = words(table)
    grid = table.groupby(['scale', 's_scale', 'face']).likeness.mean().groupby(['scale', 's_scale']).mean()
    assert [x.get_text() for x in P.knob_heatmap(table).axes[0].texts] == [f'{v:.2f}' for v in grid]
    assert {'0.4', '0.8', '1.2', '0', '0.5', '1'} <= set(texts)
    assert (a := P.knob_heatmap(table).axes[0]).get_ylabel() == 'scale'
    assert a.get_xlabel() == 's_scale'
    assert [x.get_text() for x in a.get_yticklabels()] == ['0.4', '0.8', '1.2']
    assert any('54 pictures of 3 faces' in x for x in texts)
    assert ([x.get_text() for x in P.knob_heatmap(table, 's_scale', 'scale',
                                                  'distance').axes[0].texts]
            == [f'{v:.2f}' for v in table.groupby(['s_scale', 'scale']).distance.mean()])
    for wrong in (dict(rows='s_scale'), dict(value='beauty'), dict(rows='beauty')):
        with pytest.raises(ArgumentError): P.knob_heatmap(table, **wrong)


# -- curves

def bars(container):
    "x, mean and half interval of an errorbar."
    line, _, (segments,) = container.lines
    return np.c_[line.get_xydata(), [(s[1, 1] - s[0, 1])/2 if len(s) else np.nan
                                     for s in segments.get_segments()]]

def test_curves_are_means_over_people(table):
    t = table.drop(table.index[[0, 7, 20]])
    figure = P.curves(t, ceiling=.8)
    assert [ax.get_title() for ax in figure.axes] == ['likeness', 'structure distance', 'prompt adherence']
    for ax, y in zip(figure.axes, ('likeness', 'distance', 'adherence')):
        (container,) = ax.containers
        wanted = [(s, *mean_interval(p[y], p.face)[:2]) for s, p in t.groupby('scale')]
        np.testing.assert_allclose(bars(container), wanted, rtol=1e-9)
        assert ax.get_xlabel() == 'scale'
    assert [l.get_ydata()[0] for l in figure.axes[0].lines if l.get_linestyle() == '--'] == [.8]
    assert not any(l.get_linestyle() == '--' for l in chain.from_iterable(ax.lines for ax in figure.axes[1:]))
    (container,) = P.curves(t, y='likeness', group=None).axes[0].containers
    np.testing.assert_allclose(bars(container),
                               [(s, *mean_interval(p.likeness)[:2]) for s, p in t.groupby('scale')])
    assert any('51 pictures of 3 faces' in x for x, *_ in check_layout(figure))
    assert any(x.endswith('51 pictures') for x, *_ in drawn_texts(P.curves(t, group=None)))

def test_lines_can_be_told_apart(table):
    figure = P.curves(table, lines='s_scale', ceiling={'distance': .1})
    ax = figure.axes[0]
    assert [c.get_label() for c in ax.containers] == ['s_scale 0', 's_scale 0.5', 's_scale 1']
    assert (len({c.lines[0].get_color() for c in ax.containers}) == 3
            == len({c.lines[0].get_marker() for c in ax.containers}))
    for c, (_, part) in zip(ax.containers, table.groupby('s_scale')):
        np.testing.assert_allclose(bars(c)[:, 1], part.groupby('scale').likeness.mean())
    assert [l.get_text() for l in figure.legends[0].get_texts()] == ['s_scale 0', 's_scale 0.5', 's_scale 1',
                                                                     'two photographs']
    assert not P.curves(table).legends
    many = sweep(('Ada',), (1., 2.), tuple(range(10)), (3,))
    looks = [(c.lines[0].get_color(), c.lines[0].get_linestyle())
             for c in P.curves(many, y='likeness', lines='s_scale').axes[0].containers]
    assert len(set(looks)) == 10
    check_layout(figure := P.curves(sweep(('Ada',), (1., 2.), tuple(range(24)), (3,)), lines='s_scale',
                                    ceiling=.9))
    assert figure.axes[0].get_window_extent().height > 90

def test_colours_are_told_apart_by_all_eyes():
    """Simulated colour blindness (Machado's matrices): the first five colours stay different, and no two
    have one marker."""
    eyes = [np.eye(3),
            np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216],
                      [-.003882, -.048116, 1.051998]]),
            np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413],
                      [-.011820, .042940, .968881]])]
    def linear(c): return np.where(c <= .04045, c/12.92, ((c + .055)/1.055)**2.4)
    colours = np.array([linear(np.array(to_rgb(c))) for c in P.COLOURS[:5]])
    for eye in eyes:
        seen = (colours @ eye.T).clip(0, 1)**(1/2.2)
        assert min(np.abs(a - b).max() for a, b in combinations(seen, 2)) > .1
    assert len(set(P._MARKERS)) == len(P.COLOURS) == len(set(P.COLOURS)) == 7

def test_gaps_and_single_people(table):
    t = table.copy()
    t.loc[t.scale == .8, 'likeness'] = np.nan
    (c,) = (figure := P.curves(t)).axes[0].containers
    assert np.isnan(c.lines[0].get_ydata()[1])
    assert len(c.lines[0].get_ydata()) == 3
    assert any('of 3 faces, 18 of them without a number' in x for x, *_ in check_layout(figure))
    (c,) = P.curves(table[table.face == 'Ada']).axes[0].containers
    line, _, (segments,) = c.lines
    assert all(not len(s) or np.isnan(s).any() or s[0, 1] == s[1, 1] for s in segments.get_segments())
    assert len(P.curves(table.drop(columns=['distance', 'adherence'])).axes) == 1
    assert len(P.curves(table, y=['likeness', 'distance', 'adherence', 'seed']).axes) == 4
    with pytest.raises(ArgumentError, match='None of the results'): P.curves(table, y='beauty')
    with pytest.raises(ArgumentError, match="no column 'model'"): P.curves(table, lines='model')

def test_ticks(table):
    def ticks(**how):
        return [x.get_text() for x in P.curves(table, y='likeness', **how).axes[0].get_xticklabels()]
    assert ticks() == ['0.4', '0.8', '1.2'] and ticks(x='face') == ['Ada', 'Ben', 'Cleo']
    figure = P.curves(table, 'face', 'likeness', lines='scale')
    at = [c.lines[0].get_xydata() for c in figure.axes[0].containers]
    assert {c.lines[0].get_linestyle() for c in figure.axes[0].containers} == {'None'}
    assert [list(np.round(a[:, 0]).astype(int)) for a in at] == [[0, 1, 2]]*3
    assert len({a[0, 0] for a in at}) == 3
    np.testing.assert_allclose(at[1],
                               [(k, v)
                                for k, v in enumerate(
                                    table[table.scale == .8].groupby('face').likeness.mean())])
    assert P.curves(table, y='likeness').axes[0].containers[0].lines[0].get_linestyle() == '-'
    close = sweep(('Ada',), tuple(np.linspace(.1, .2, 40)), (0.,), (3,))
    check_layout(P.curves(close))
    check_layout(P.curves(sweep(scales=(1.,))))


# -- the front

def brute(points):
    ok = [not any(np.isnan(v) for v in p) for p in points]
    def beats(a, b): return all(x >= y for x, y in zip(a, b)) and any(x > y for x, y in zip(a, b))
    return [o and not any(p and beats(q, point) for q, p in zip(points, ok)) for point, o in zip(points, ok)]

@given(st.integers(1,
                   3).flatmap(
                       lambda d: st.lists(
                           st.tuples(*[st.sampled_from([-1., 0., .5, 2., np.nan, np.inf, -np.inf])]*d),
                           min_size=1, max_size=12)))
def test_pareto_front(points):
    front = P.pareto_front(points)
    assert front.dtype == bool and front.tolist() == brute(points)
    assert front.any() or np.isnan(points).any(1).all()

def test_pareto_ties_and_shapes():
    assert P.pareto_front([(1, 1), (1, 1), (0, 2), (1, 0)]).tolist() == [True, True, True, False]
    assert P.pareto_front(np.zeros((0, 2))).shape == (0,)
    for wrong in ([1, 2], np.zeros((2, 0)), np.zeros((2, 2, 2))):
        with pytest.raises(ArgumentError, match='Points'): P.pareto_front(wrong)

def named(figure):
    return sorted(t.get_text().replace('\n', ' ').replace('\xa0', ' ') for t in figure.axes[0].texts)

def setting(scale, s_scale): return f'scale {scale:g}, s_scale {s_scale:g}'

def traded(table, x, sign):
    "The axes of a trade-off, the means of its settings, and which of them nothing beats."
    by = ['scale', 's_scale']
    figure = P.trade_off(table, x, by=tuple(by), chosen=dict(s_scale=.5, scale=1.2))
    means = table.groupby([*by, 'face'])[[x, 'likeness']].mean().groupby(by).mean()
    return figure.axes[0], means, brute((means*[sign, 1]).values)

@pytest.mark.parametrize('x, sign', [('adherence', 1), ('distance', -1)])
def test_trade_off_draws_settings_and_front(table, x, sign):
    ax, means, front = traded(table, x, sign)
    assert 1 <= sum(front) < len(front)
    lines = {c.get_label(): c.lines[0].get_xydata() for c in ax.containers}
    np.testing.assert_allclose(sorted(lines['none is better in both'].tolist()),
                               sorted(means[front].values.tolist()))
    np.testing.assert_allclose(sorted(lines['another is better in both'].tolist()),
                               sorted(means[~np.array(front)].values.tolist()))
    (ring,) = [l for l in ax.lines if l.get_label() == 'chosen']
    np.testing.assert_allclose(ring.get_xydata(), [means.loc[(1.2, .5)].values])
    (joined,) = [l.get_xydata() for l in ax.lines if l.get_linestyle() == ':']
    assert (np.diff(joined[:, 0]) >= 0).all() and len(joined) == sum(front)

@pytest.mark.parametrize('x, sign', [('adherence', 1), ('distance', -1)])
def test_trade_off_names_the_front_and_the_chosen(table, x, sign):
    ax, means, front = traded(table, x, sign)
    best = {setting(*at) for at, f in zip(means.index, front) if f}
    assert named(ax.figure) == sorted(best | {setting(1.2, .5)})
    assert ('less is better' in ax.get_xlabel()) == (sign < 0)
    check_layout(ax.figure)

@pytest.mark.parametrize('x, sign', [('adherence', 1), ('distance', -1)])
def test_a_name_stands_nearest_to_its_own_point(table, x, sign):
    ax, means, _ = traded(table, x, sign)
    check_layout(ax.figure)
    for text in ax.texts:
        b = Text.get_window_extent(text)   # without the line that leads to its point
        at = ax.transData.transform(means.values)
        gap = np.hypot(np.maximum(np.maximum(b.x0 - at[:, 0], at[:, 0] - b.x1), 0),
                       np.maximum(np.maximum(b.y0 - at[:, 1], at[:, 1] - b.y1), 0))
        assert gap.min() > 2
        names = [setting(*at) for at in means.index]
        own = names.index(text.get_text().replace('\n', ' ').replace('\xa0', ' '))
        assert gap[own] < 150 and text.xy == pytest.approx(tuple(means.values[own]))

def test_trade_off_intervals_and_gaps(table):
    t = table.copy()
    t.loc[t.scale == .8, 'adherence'] = np.nan
    figure = P.trade_off(t)
    (c,) = figure.axes[0].containers
    assert len(c.lines[0].get_xydata()) == 2
    assert any('54 pictures of 3 faces, 18 of them without a number; 1 of 3 settings' in x.replace('\n', ' ')
               for x, *_ in check_layout(figure))
    assert named(figure) == ['scale 0.4', 'scale 1.2']
    settings = [part for _, part in t[t.scale != .8].groupby('scale')]
    for drawn, column in zip(c.lines[2], ('adherence', 'likeness')):
        halves = [(s[1] - s[0]).max()/2 for s in drawn.get_segments()]
        np.testing.assert_allclose(halves, [mean_interval(part[column], part.face)[1] for part in settings])
    check_layout(P.trade_off(t.assign(likeness=np.nan)))
    assert named(P.trade_off(table, chosen=1.2)) == ['scale 0.4', 'scale 0.8', 'scale 1.2']
    for wrong in (.7, dict(scale=.7), dict(seed=3)):
        with pytest.raises(ArgumentError, match='chosen setting is not in the table.*scale 0.4'):
            P.trade_off(table, chosen=wrong)
    with pytest.raises(ArgumentError, match='scale 0.4, seed 3; '):
        P.trade_off(table, by=('scale', 'seed'), chosen=.4)

def test_crowded_labels_do_not_touch():
    t = sweep(('Ada',), tuple(np.linspace(0, 1, 12)), (0.,), (3,))
    t['adherence'] = np.linspace(.5, .52, 12)
    t['likeness'] = np.linspace(.52, .5, 12)
    figure = P.trade_off(t)
    check_layout(figure)
    assert len(named(figure)) >= 9


# -- attention

def tiles(figure):
    "Middle colours of a grid of maps, row by row, without the picture and the bar."
    image = pixels(figure)
    h = image.shape[0]
    return [[image[int(h - b.y1) + 4:int(h - b.y0) - 4, int(b.x0) + 4:int(b.x1) - 4]]
            for b in (ax.get_window_extent() for ax in figure.axes[1:-1])]

def test_attention_is_drawn_where_it_is():
    c = condition(1, 1, 1)
    maps = np.full((1, 16, 4), .1)
    maps[0, 1, 2], maps[0, 14, 2] = .9, .5
    c.maps = {k: [maps] for k in c.maps}
    figure = P.attention_maps(c, flat('gray'), token=2)
    check_layout(figure)
    tile = light(tiles(figure)[0][0])
    h, w = tile.shape
    def cell(r, k): return tile[int((r + .5)*h/4), int((k + .5)*w/4)]
    assert cell(0, 1) > cell(3, 2) > cell(0, 0) and abs(cell(0, 0) - cell(2, 2)) < 1
    # the least and the most are the ends of the scale
    for at, share in ((cell(0, 1), 1.), (cell(0, 0), 0.), (cell(3, 2), .5)):
        assert abs(at - light(255*.7*np.array(matplotlib.colormaps['viridis'](share)[:3]) + .3*128)) < 2
    other = light(tiles(P.attention_maps(c, flat('gray'), token=1))[0][0])
    assert np.ptp(other) < 2

@pytest.mark.parametrize('rows, columns, shape',
                         [('layer', 'step', (3, 4)), ('token', 'step', (4, 4)), ('step', 'token', (4, 4)),
                          ('layer', 'token', (3, 4))])
def test_attention_of_every_axis(rows, columns, shape, monkeypatch):
    c = condition()
    seen = {}
    monkeypatch.setattr(P, '_overlay',
                        lambda maps, image, down, across, note, width: seen.update(maps=maps, down=down,
                                                                                   across=across, note=note))
    P.attention_maps(c, flat('white'), rows, columns, row=1, token=2)
    # (layer, step, token, 4, 4)
    every = np.array([[w[1].T.reshape(4, 4, 4) for w in c.maps[p]] for p in c.maps])
    order = dict(layer=0, step=1, token=2)
    if 'token' not in (rows, columns): every = every[:, :, [2]]
    rest = tuple(order[k] for k in ('layer', 'step', 'token') if k not in (rows, columns))
    wanted = every.mean(rest)
    wanted = wanted if order[rows] < order[columns] else wanted.swapaxes(0, 1)
    assert seen['maps'].shape == (*shape, 64, 64)
    np.testing.assert_allclose(seen['maps'][..., 8::16, 8::16], wanted)
    names = dict(layer=['down 0.0.1', 'down 1.0.1', 'mid 0.0'], step=[f'step {k}' for k in range(1, 5)],
                 token=[f'token {k}' for k in range(1, 5)])
    assert seen['down'] == names[rows]
    assert seen['across'] == names[columns]
    assert ('token 3' in seen['note']) == ('token' not in (rows, columns))

def test_attention_of_a_choice(monkeypatch):
    c = condition(9, 30)
    seen = {}
    monkeypatch.setattr(P, '_overlay',
                        lambda maps, image, down, across, note, width: seen.update(maps=maps, down=down,
                                                                                   across=across))
    P.attention_maps(c, flat('white'), most=4)
    assert seen['across'] == ['step 1', 'step 11', 'step 20', 'step 30'] and len(seen['down']) == 4
    paths = list(c.maps)[:2]
    P.attention_maps(c, flat('white'), layers=paths, steps=[29, 3])
    np.testing.assert_allclose(seen['maps'][1, 0, 8::16, 8::16], c.maps[paths[1]][29][0, :, 0].reshape(4, 4))
    assert seen['across'] == ['step 30', 'step 4']
    P.attention_maps(c, flat('white'), 'token', 'step', layers=paths, tokens=[3], steps=[5])
    np.testing.assert_allclose(seen['maps'][0, 0, 8::16, 8::16],
                               np.mean([c.maps[p][5][0, :, 3] for p in paths], 0).reshape(4, 4))

def test_attention_of_what_is_no_axis_is_a_mean_of_all(monkeypatch):
    c = condition(9, 3)
    seen = {}
    monkeypatch.setattr(P, '_overlay', lambda maps, *_: seen.update(maps=maps))
    P.attention_maps(c, flat('white'), 'token', 'step', most=2)
    assert seen['maps'].shape[:2] == (2, 2)
    np.testing.assert_allclose(seen['maps'][0, 0, 8::16, 8::16],
                               np.mean([c.maps[p][0][0, :, 0] for p in c.maps], 0).reshape(4, 4))

def test_attention_errors():
    c = condition()
    nothing = condition()
    nothing.maps = {}
    for how, message in ((dict(rows='step'), 'two of'), (dict(rows='head'), 'two of'),
                         (dict(row=2), 'no such picture'), (dict(row=-1), 'no such picture'),
                         (dict(token=4), 'no such token'), (dict(layers=['up']), 'no such layer'),
                         (dict(steps=[9]), 'no such step'), (dict(steps=[]), 'no such step')):
        with pytest.raises(ArgumentError, match=message): P.attention_maps(c, flat('white'), **how)
    with pytest.raises(ArgumentError, match='record=True'): P.attention_maps(nothing, flat('white'))
    with pytest.raises(ImageError): P.attention_maps(c, 'nowhere.png')


# -- files

def test_export_of_a_picture_and_its_table(table, tmp_path):
    t = table.assign(path=[f'out/{k}.png' for k in table.index],
                     mixed=[flat('red') if k % 2 else f'{k}.png' for k in table.index])
    figure = P.knob_heatmap(t)
    size = pixels(figure).shape
    png = P.export_figure(figure, tmp_path/'new folder'/'a.PNG', t, dpi=150)
    image = Image.open(png)
    assert png == tmp_path/'new folder'/'a.PNG'
    assert image.format == 'PNG'
    assert abs(image.width - 1.5*size[1]) <= 1
    assert pixels(figure).shape == size
    back = pd.read_csv(png.with_suffix('.csv'))
    assert list(back.columns) == [c for c in t.columns if c != 'image']
    assert (back.path == t.path).all()
    assert back.mixed[0] == '0.png'
    assert back.mixed.isna()[1]
    np.testing.assert_allclose(back.likeness, table.likeness, rtol=1e-12)
    assert isinstance(t.image[0], Image.Image) and isinstance(t.mixed[1], Image.Image)

def test_export_of_a_pdf(table, tmp_path):
    pdf = P.export_figure(FIGURES['grid'](table), str(tmp_path/'b.pdf')).read_bytes()
    assert pdf.startswith(b'%PDF')
    assert pdf.count(b'/Type /Page\n') + pdf.count(b'/Type /Page ') == 1
    assert b'/FontFile2' in pdf
    assert b'CreationDate' not in pdf
    assert not (tmp_path/'b.csv').exists()
    assert pdf == P.export_figure(FIGURES['grid'](table), tmp_path/'c.pdf').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.pdf', 'c.pdf']

def test_export_keeps_an_index_that_says_something(table, tmp_path):
    figure = P.knob_heatmap(table)
    matrix = pd.DataFrame([[1., .5]], ['Ada'], ['Ada', 'Ben'])
    P.export_figure(figure, tmp_path/'m.png', matrix)
    assert (tmp_path/'m.csv').read_text() == ',Ada,Ben\nAda,1.0,0.5\n'
    P.export_figure(figure, tmp_path/'m.png', pd.DataFrame(dict(a=[1, 2]))[1:])
    assert (tmp_path/'m.csv').read_text() == 'a\n2\n'
    P.export_figure(figure, tmp_path/'m.png', pd.DataFrame(dict(a=[1], seed=[3])).set_index('seed'))
    assert (tmp_path/'m.csv').read_text() == 'seed,a\n3,1\n'

def test_export_is_not_changed_by_a_style(table, tmp_path):
    figure = P.knob_heatmap(table)
    size = pixels(figure).shape
    with matplotlib.rc_context({'savefig.bbox': 'tight'}):
        P.export_figure(figure, tmp_path/'t.png', dpi=100)
        assert Image.open(tmp_path/'t.png').size == size[1::-1]

def test_pictures_of_a_pdf_stay_their_pixels(one, tmp_path):
    "The small pictures are in the file at their own size: 64 x 64, six times."
    pdf = P.export_figure(P.structure_grid(one), tmp_path/'a.pdf').read_bytes()
    assert len(re.findall(rb'/Height 64\b', pdf)) == 6 == len(re.findall(rb'/Width 64\b', pdf))

def test_export_is_all_or_nothing(table, tmp_path, monkeypatch):
    figure = P.knob_heatmap(table)
    for name in ('a.svg', 'a.jpg', 'a', 'a.csv'):
        with pytest.raises(ArgumentError, match='Cannot write a figure called a'):
            P.export_figure(figure, tmp_path/name, table)
    assert not list(tmp_path.iterdir())
    P.export_figure(figure, tmp_path/'a.png', table)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def broken(self, path, **how):
        open(path, 'wb').write(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', broken)
    with pytest.raises(OSError):
        P.export_figure(P.knob_heatmap(table, value='distance'), tmp_path/'a.png', table)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    monkeypatch.undo()
    monkeypatch.setattr(P.Drawing, 'savefig', broken)
    with pytest.raises(OSError):
        P.export_figure(P.knob_heatmap(table, value='distance'), tmp_path/'a.png', table)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
