"The views without a browser: what is linked, what is shown, what is let go of. Each trap that was met has its test."
import io, re, threading
import ipywidgets as W, numpy as np, pytest
from ipywidgets.widgets import widget
from PIL import Image
from conftest import ROOT
from faceid_nb import dashboard as D
from faceid_nb.studio import Portrait, Studio

ALL = dict(Portrait=D.PortraitPanel, Structure=D.GridPanel, Similarity=D.ComparisonPanel, Attention=D.AttentionPanel)
alive = lambda: len(widget._instances)

def png(image):
    b = io.BytesIO()
    image.save(b, 'PNG')
    return b.getvalue()
def tree(w):
    yield w
    yield from (x for c in getattr(w, 'children', ()) for x in tree(c))
def shown(w): return w.layout.display != 'none'
def click(tile): tile._handle_custom_msg({}, [])
def caption(tiles): return [t.caption for t in tiles]

@pytest.fixture(scope='module')
def photo():
    from faceid_nb.tiny.people import render, sample_people
    return png(render(sample_people(1, 7), seed=1, size=160, hat=None, glasses=0)[0].image)

@pytest.fixture(scope='module')
def kept():
    s = Studio()
    yield s
    s.close()

@pytest.fixture
def board(kept, photo, tmp_path):
    "All dashboards on a studio that has its model already."
    kept.worker.wait(30)
    kept.photographs, kept.portraits, kept.compared, kept.note, kept.worker.error = [], [], [], '', ''
    for k, v in dict(model='tiny-faceid', prompt='photo of a person', num_samples=2, num_inference_steps=2, seed=0, scale=1., side_by_side=False, best_first=False, folder=str(tmp_path), preview_every=1).items(): setattr(kept, k, v)
    b = D.Board(ALL, kept)
    b.controls.drop._handle_custom_msg(dict(name='me.png'), [memoryview(photo)])
    assert len(kept.photographs) == 1
    yield b
    b.close()

def finish(board):
    assert board.studio.worker.wait(60)
    assert board.studio.error == '', board.studio.error

# the widgets of our own

def test_a_tile_shows_small_pictures_as_they_are_and_large_ones_smaller():
    small, large = Image.new('RGB', (64, 64), 'red'), Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 600, 3), dtype=np.uint8))
    a, b = D.Tile(small, side=96), D.Tile(large, side=200)
    assert a.image[:4] == b'\x89PNG' and Image.open(io.BytesIO(a.image)).size == (64, 64)
    seen = Image.open(io.BytesIO(b.image))
    assert seen.format == 'JPEG' and seen.size == (267, 400) and large.size == (600, 900)
    a.show(None)
    assert a.image == b''
    assert not a.clickable and D.Tile(on_click=lambda: 0).clickable
    D.close_all(a)
    D.close_all(b)

@pytest.mark.parametrize('kind', [D.Tile, D.Drop, D.Code])
def test_no_trait_of_ours_hides_one_of_the_widgets(kind):
    "A trait called tooltip broke the view in the browser, and nowhere else."
    assert not {k for k in vars(kind) if not k.startswith('_')} & set(W.DOMWidget.class_trait_names())

def test_files_reach_python_and_problems_too():
    got, told = [], []
    d = D.Drop(lambda *f: got.append(f), told.append)
    d._handle_custom_msg(dict(name='a.png'), [memoryview(b'abc')])
    d._handle_custom_msg(dict(problem='too large'), [])
    assert got == [('a.png', b'abc')] and told == ['too large']
    D.close_all(d)

# traps

def test_nothing_is_written_into_outputs():
    source = (ROOT/'faceid_nb'/'dashboard.py').read_text(encoding='utf-8')
    assert not re.search(r'\bOutput\(|interactive_output|\bprint\(|clear_output', source) and not re.search(r'import .*(ipywidgets|anywidget)', (ROOT/'faceid_nb'/'studio.py').read_text(encoding='utf-8'))

def test_controls_act_when_they_are_let_go_and_say_what_they_are(board):
    found = [w for w in tree(board) if isinstance(w, (W.Button, W.ToggleButton, W.Dropdown, W.Checkbox, W.Text, W.Textarea, W.IntSlider, W.FloatSlider, W.SelectionSlider, W.BoundedIntText))]
    assert len(found) > 30
    for w in found: assert (w.description or w.tooltip) and w.tooltip, w
    for w in found: assert not getattr(w, 'continuous_update', False) or isinstance(w, (W.SelectionSlider, W.BoundedIntText)) or w in (board.panels['Attention'].step,), w

def test_a_handler_that_raises_says_so(board, monkeypatch):
    panel = board.panels['Portrait']
    monkeypatch.setattr(board.studio, 'save', lambda p: (_ for _ in ()).throw(OSError('No space left on device')))
    board.studio.portraits = [Portrait(Image.new('RGB', (8, 8)), dict(seed=0), .5)]
    next(w for w in tree(panel.gallery) if getattr(w, 'description', '') == 'save').click()
    assert 'No space left' in board.studio.error and 'role="alert"' in board.status.wrong.value and 'No space left' in board.status.wrong.value
    board.studio.worker.error = '<b>&'
    assert '&lt;b&gt;&amp;' in board.status.wrong.value
    board.studio.worker.error = ''
    assert board.status.wrong.value == ''

def test_a_view_that_fails_while_the_worker_reports_does_not_end_the_work(board, monkeypatch):
    monkeypatch.setattr(board.panels['Portrait'], '_box', lambda p: 1/0)
    board.studio.generate()
    assert board.studio.worker.wait(60) and not board.studio.busy and len(board.studio.portraits) == 2 and 'division by zero' in board.studio.error

def test_a_watcher_that_fails_leaves_the_others_be():
    s, seen = Studio(), []
    v = D.View(s)
    v.watch(s.worker, ['busy'], lambda: s.worker.busy and 1/0)
    v.watch(s.worker, ['busy'], lambda: seen.append(s.worker.busy))
    s.worker.busy = True
    assert 'division by zero' in s.error and seen == [False, True]
    v.close()
    s.worker.busy = False
    assert seen == [False, True]

# what a view shows and does

def test_controls_and_studio_are_linked_both_ways(board):
    s, c = board.studio, board.controls
    for name, w in dict(prompt=c.prompt, negative_prompt=c.negative, seed=c.seed, seed_locked=c.lock, model=c.model, side_by_side=c.apart, download=c.download, **c.knobs).items():
        value = dict(model='tiny-portrait', prompt='a', negative_prompt='b', seed=5, num_samples=3, num_inference_steps=4).get(name, not getattr(s, name) if isinstance(getattr(s, name), bool) else 1.5)
        setattr(s, name, value)
        assert w.value == value, name
        other = {'a': 'c', 'b': 'd', 'tiny-portrait': 'tiny-plus'}.get(value, not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else .5)
        w.value = other
        assert getattr(s, name) == other, name
    s.seed_locked, s.download, s.guidance_scale, s.negative_prompt = True, False, 7.5, ''

def test_only_what_the_variant_has_is_shown(board, photo):
    s, c = board.studio, board.controls
    see = lambda: (shown(c.knobs['s_scale']), shown(c.used), shown(c.download), shown(c.apart))
    assert see() == (False, False, False, False)
    s.model = 'tiny-plusv2'
    assert see() == (True, False, False, False)
    s.add(photo, 'b.png')
    s.model = 'tiny-portrait'
    assert see() == (False, True, False, True) and c.used.max == 2
    s.side_by_side = True
    assert not shown(c.used)
    s.model = 'sd15-plusv2'
    assert see() == (True, False, True, True) and 'download of 4.7 GB' in c.about.value and 'non-commercial' in c.about.value
    s.num_photographs = 0
    assert [v for _, v in c.model.options][:1] == ['tiny-faceid'] and all(('(download)' in label) != name.startswith('tiny') for label, name in c.model.options)

def test_photographs_are_drawn_chosen_and_removed(board):
    from faceid_nb.tiny.people import render, sample_people
    a, b = (p.image for p in render(sample_people(2, 7), seed=1, size=160, hat=None, glasses=0))
    two = Image.new('RGB', (320, 160))
    two.paste(a, (0, 0))
    two.paste(b.resize((120, 120)), (180, 20))
    s, c = board.studio, board.controls
    s.receive('two.png', png(two))
    assert len(c.photos.children) == 2 and c.photos.children[1].children[0].alt == 'two.png, 2 faces'
    c.photos.children[1].children[1].value = 1
    assert s.photographs[1].chosen == 1 and c.photos.children[1].children[1].value == 1
    point = lambda x, y: c.photos.children[1].children[0]._handle_custom_msg(dict(x=x, y=y), [])
    point(.2, .5)
    assert s.photographs[1].chosen == 0 == c.photos.children[1].children[1].value
    kept = c.photos.children
    point(.8, .5)
    assert s.photographs[1].chosen == 1 == c.photos.children[1].children[1].value and c.photos.children == kept and not c.photos.children[0].children[0].clickable
    c.photos.children[0].children[-1].click()
    assert [p.name for p in s.photographs] == ['two.png'] and len(c.photos.children) == 1
    face = D.look_at(s.photographs[0].face)
    assert face.width < 160 and abs(face.width - face.height) <= .15*face.width

def test_portraits_previews_and_buttons(board):
    s, p = board.studio, board.panels['Portrait']
    assert shown(p.hint) and p.stop.disabled and not p.go.disabled
    heard = []
    p.preview.observe(lambda c: heard.append(len(c.new)), 'children')
    busy = []
    s.observe(lambda c: busy.append((p.go.disabled, p.stop.disabled, board.panels['Structure'].go.disabled)), 'step')
    p.go.click()
    finish(board)
    assert heard == [2, 0], 'previews are shown in the same tiles'
    assert p.preview.children == () and busy[-1] == (True, False, True) and not p.go.disabled and p.stop.disabled and not shown(p.hint) and len(p.gallery.children) == 2 and not shown(p.more)
    tile = p.gallery.children[0].children[0]
    assert re.match(r'likeness -?0\.\d\d\nseed 0, me.png', tile.caption) and 'portrait of me.png' in tile.alt and 'made in' in board.status.told.value and 'memory' in board.status.machine.value and 'ExecutionProvider' in board.status.machine.value
    click(tile)
    click(p.gallery.children[1].children[0])
    assert tile.chosen and [len(b.children) for b in p.beside.children[:1]] == [3] and 'seed' in p.beside.children[1].value and s.compared == s.portraits
    click(tile)
    assert not tile.chosen and len(p.beside.children[0].children) == 2
    p.beside.children[2].click()
    assert p.beside.children == () and s.compared == []
    buttons = {w.description: w for w in tree(p.gallery.children[1]) if hasattr(w, 'description')}
    buttons['code'].click()
    assert 'seed=1' in p.code.text
    buttons['save'].click()
    assert 'saved as' in board.status.note.value
    buttons['keep'].value = True
    p.forget.click()
    assert len(p.gallery.children) == 1 == len(s.portraits)

def test_the_gallery_is_ordered_and_grows_on_request(board):
    s, p = board.studio, board.panels['Portrait']
    s.portraits = [Portrait(Image.new('RGB', (8, 8)), dict(seed=i), i/100) for i in range(30)]
    assert len(p.gallery.children) == 24 and shown(p.more)
    boxes = list(p.gallery.children)
    p.best.value = True
    assert [b.portrait.settings['seed'] for b in p.gallery.children] == list(range(29, 5, -1)) and any(b is boxes[10] for b in p.gallery.children)
    p.more.click()
    assert len(p.gallery.children) == 30 and not shown(p.more)
    s.best_first = False

def test_the_grid_fills_and_a_cell_is_enlarged(board):
    g = board.panels['Structure']
    g.columns.value, g.values['scales'].value, g.values['seeds'].value = 'scale', '0.5, 1', '0, 1, 2'
    assert g.grid.scales == [.5, 1.] and g.grid.seeds == [0, 1, 2] and not shown(g.values['s_scales'])
    g.values['seeds'].value = 'x'
    assert 'seed takes numbers' in board.studio.error
    g.values['seeds'].value = '0, 1'
    words, dim = [], []
    g.grid.observe(lambda c: words.append(caption(g.tiles)), 'arrived')
    g.grid.observe(lambda c: c.new and dim.append([t.dim for t in g.tiles]), 'previews')
    g.grid.observe(lambda c: 2 in c.new and board.studio.stop(), 'previews')
    g.go.click()
    assert board.studio.worker.wait(60)
    assert g.go.description == 'Resume' and caption(g.tiles)[2:] == ['waiting']*2 and not any(t.image or t.dim for t in g.tiles[2:]) and g.tiles[0].image and [True, True, False, False] in dim and re.match(r'-?0\.\d\d / 0\.\d\d|no face', g.tiles[0].caption)
    g.grid.unobserve_all()
    g.go.click()
    finish(board)
    assert g.go.description == 'Fill the grid' and not any(t.dim for t in g.tiles) and all(c.state == 'done' for c in g.grid.cells) and shown(g.curves) and g.curves.image[:4] == b'\x89PNG'

def test_a_cell_is_enlarged_saved_and_put_away(board, tmp_path):
    g = board.panels['Structure']
    g.columns.value, g.grid.scales, g.grid.seeds = 'scale', [1.], [0, 1]
    g.grid.run()
    finish(board)
    click(g.tiles[1])
    assert [t.chosen for t in g.tiles] == [False, True] and [t.side for t in g.large.children[0].children] == [220, 220] and 'structure distance' in g.large.children[0].children[1].caption
    buttons = {w.description: w for w in g.large.children[1].children}
    buttons['code'].click()
    assert 'seed=1' in g.code.text
    buttons['save'].click()
    assert list(tmp_path.glob('*.png'))
    buttons['close'].click()
    assert g.large.children == () and g.code.text == '' and not any(t.chosen for t in g.tiles)
    g.out.click()
    assert 'written: ' in board.studio.note and (tmp_path/'grid_0001.csv').exists()

def test_a_failed_cell_says_why(board, monkeypatch):
    g = board.panels['Structure']
    g.columns.value, g.grid.scales, g.grid.seeds = 'scale', [1.], [0]
    board.studio.generate()
    finish(board)
    monkeypatch.setattr(board.studio._faceid, 'generate', lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    g.grid.run()
    board.studio.worker.wait(60)
    assert caption(g.tiles) == ['failed'] and 'MemoryError' in g.tiles[0].tip and '1 of 1 cells could not be made' in board.studio.error
    click(g.tiles[0])
    assert g.large.children == ()

def test_likeness_is_drawn_and_weights_are_used(board):
    p, s = board.panels['Similarity'], board.studio
    s.prompt = 'photo of a person, smiling'
    assert not shown(p.values['s_scales'])
    p.values['scales'].value, p.values['seeds'].value = '0.5, 1', '0'
    p.people.click()
    finish(board)
    assert shown(p.figures['matrix']) and not shown(p.pick)
    p.survey.click()
    finish(board)
    assert shown(p.figures['curves']) and shown(p.figures['trade']) and not shown(p.figures['surface']) and [v for _, v in p.pick.options] == [(.5, 1.), (1., 1.)]
    p.pick.value = (.5, 1.)
    before = p.figures['trade'].image
    assert p.comparison.chosen == (.5, 1.) and len(p.pictures.children) == 1
    p.pick.value = (1., 1.)
    assert p.figures['trade'].image != before
    p.pick.value = (.5, 1.)
    p.use.click()
    assert s.scale == .5
    p.target.value = -.5 + .5
    p.search.click()
    finish(board)
    assert p.comparison.found is not None and 'a likeness of 0.00 is' in board.status.told.value
    p.out.click()
    assert 'written: ' in s.note
    s.scale = 1.
    s.model = 'tiny-plusv2'
    assert shown(p.values['s_scales'])

def test_attention_follows_its_sliders(board):
    p, a = board.panels['Attention'], board.panels['Attention'].attention
    p.go.click()
    finish(board)
    tiles = p.maps.children
    assert caption(tiles) == ['picture', 'token 1', 'token 2', 'token 3', 'token 4'] and len(p.layer.options) == 8 and p.step.max == 2
    before = tiles[1].image
    p.layer.value = p.layer.options[2]
    assert a.layer == p.layer.options[2] and tiles[1].image != before and p.maps.children == tiles
    before = tiles[1].image
    p.step.value = 1
    assert a.step == 1 and tiles[1].image != before and 'step 1' in p.legend.value

# letting go

def test_a_board_that_is_closed_leaves_nothing(photo):
    before, threads = alive(), threading.active_count()
    b = D.Board(ALL)
    s = b.studio
    s.receive('me.png', photo)
    s.portraits = [Portrait(Image.new('RGB', (8, 8)), dict(seed=0), .5, face=s.photographs[0].face)]
    s.compare(s.portraits[0])
    assert alive() > before + 100
    ended = []
    s.worker.start(lambda: (s.worker.stopping.wait(20), ended.append(1)))
    s._faceid = object()
    b.close()
    assert ended == [1] and s._faceid is None and not s.busy and alive() == before and threading.active_count() <= threads and not any(x is b for _, _, x in D._boards)

def test_a_studio_of_the_callers_own_lives_on(photo):
    s = Studio()
    s._faceid = mark = object()
    count = lambda: sum(len(h) for kinds in s._trait_notifiers.values() for h in kinds.values()) + sum(len(h) for kinds in s.worker._trait_notifiers.values() for h in kinds.values())
    before, b = None, None
    before = count()
    b = D.Board(ALL, s)
    assert count() > before + 20
    b.close()
    assert count() == before and s._faceid is mark
    s._faceid = None

def test_a_cell_run_again_closes_its_old_board(monkeypatch):
    closed = []
    monkeypatch.setattr(D.Board, 'close', lambda self, close=D.Board.close: (self.closed or closed.append(id(self)), close(self)))
    now = []
    monkeypatch.setattr(D, 'this_cell', lambda: now[-1])
    before = alive()
    now.append(('a', '1'))
    one, two = D.portrait_dashboard(), D.attention_dashboard()
    now.append(('b', '2'))
    three = D.structure_dashboard()
    assert closed == []
    now.append(('a', '3'))
    four = D.similarity_dashboard()
    assert closed == [id(one), id(two)]
    now.append((None, None))
    five = D.portrait_dashboard()
    six = D.portrait_dashboard()
    assert closed == [id(one), id(two)]
    for b in (three, four, five, six): b.close()
    assert alive() == before and D._boards == []

def test_outside_a_notebook_there_is_no_cell(): assert D.this_cell() == (None, None)

def test_a_hundred_runs_do_not_grow(board, monkeypatch, capsys):
    from faceid_nb import measure
    s, p = board.studio, board.panels['Portrait']
    s.generate()
    finish(board)
    picture = s.portraits[0].image
    monkeypatch.setattr(s._faceid, 'generate', lambda faces, num_samples, seed, **k: [_noted(picture, seed + i) for i in range(num_samples)])
    monkeypatch.setattr(measure, 'measure_pictures', lambda faces, images, *a, **k: dict(likeness=[.5]*len(images), distance=[.1]*len(images)))
    s.most, sizes = 30, []
    capsys.readouterr()
    for i in range(100):
        p.go.click()
        finish(board)
        s.compare(s.portraits[0])
        s.compared = []
        if i in (30, 99): sizes.append((alive(), threading.active_count(), len(s.portraits), len(p.gallery.children)))
    assert sizes[0] == sizes[1] and sizes[1][2] <= 32 and capsys.readouterr() == ('', '')
    s.most = 400

def _noted(image, seed):
    image = image.copy()
    image.info['faceid_nb'] = dict(image.info.get('faceid_nb', {}), seed=seed, person=0)
    return image

def test_the_one_line_calls():
    for call, names in ((D.portrait_dashboard, ['Portrait']), (D.structure_dashboard, ['Structure']), (D.similarity_dashboard, ['Similarity']), (D.attention_dashboard, ['Attention']), (D.studio, list(ALL))):
        b = call(folder='elsewhere')
        assert list(b.panels) == names and 'elsewhere' in b.status.machine.value and all(p.studio is b.studio for p in b.panels.values())
        b.close()

def test_a_process_ends_quietly_with_a_board_open(fresh):
    r = fresh('from faceid_nb.dashboard import studio\nboard = studio()\nprint("up")', check=False)
    assert r.stdout.strip() == 'up' and r.returncode == 0 and 'Exception' not in r.stderr and 'Error' not in r.stderr, r.stderr[-600:]
