"The boards without a browser: what is linked, shown and let go of. Each trap that was met has its test."
import re
import threading

import ipywidgets as W
import pytest
from conftest import ROOT
from helpers_dashboard import alive, buttons, captions, click, point, shown, tree, watchers
from helpers_studio import drawn, empty, finish, png, raising, run, two_faces
from PIL import Image

from faceid_nb import dashboard as D
from faceid_nb import panels as P
from faceid_nb import studio as S
from faceid_nb.studio import Portrait, Studio
from faceid_nb.cells import Cell

CONTROLS = (W.Button, W.ToggleButton, W.Dropdown, W.Checkbox, W.Text, W.Textarea, W.IntSlider, W.FloatSlider,
            W.SelectionSlider, W.BoundedIntText)


@pytest.fixture(scope='module')
def photo(): return png(drawn(1)[0])


@pytest.fixture(scope='module')
def kept():
    studio = Studio()
    yield studio
    studio.close()


@pytest.fixture
def board(kept, photo, tmp_path):
    "All dashboards on a studio that has its model already."
    empty(kept, tmp_path)
    kept.settings.take(dict(prompt='photo of a person', num_samples=2))
    kept.progress.preview_every = 1
    board = D.Board(D.PANELS, kept)
    board.controls.people.drop._handle_custom_msg(dict(name='me.png'), [memoryview(photo)])
    assert len(kept.people.photographs) == 1
    yield board
    board.close()


def picture(): return Image.new('RGB', (8, 8))


# traps

@pytest.mark.parametrize('module', ['widgets', 'panels', 'dashboard'])
def test_nothing_is_written_into_outputs(module):
    source = (ROOT/'faceid_nb'/f'{module}.py').read_text(encoding='utf-8')
    assert not re.search(r'\bOutput\(|interactive_output|\bprint\(|clear_output', source)


@pytest.mark.parametrize('module', ['preview', 'studio', 'experiments'])
def test_what_thinks_imports_no_widgets(module):
    source = (ROOT/'faceid_nb'/f'{module}.py').read_text(encoding='utf-8')
    assert not re.search(r'import .*(ipywidgets|anywidget)|from .*widgets? import', source)


def test_controls_say_what_they_are(board):
    found = [w for w in tree(board) if isinstance(w, CONTROLS)]
    assert len(found) > 30
    for w in found: assert w.tooltip and (w.description or w.tooltip), w


def test_controls_act_when_they_are_let_go(board):
    cheap = W.SelectionSlider, W.BoundedIntText
    for w in tree(board):
        if not isinstance(w, CONTROLS) or isinstance(w, cheap): continue
        if w is board.panels['Attention'].step: continue
        assert not getattr(w, 'continuous_update', False), w


def test_a_handler_that_raises_says_so(board, monkeypatch):
    gallery = board.studio.gallery
    monkeypatch.setattr(gallery, 'save', raising(OSError('No space left on device')))
    gallery.portraits = [Portrait(picture(), dict(seed=0), .5)]
    buttons(board.panels['Portrait'].gallery)['save'].click()
    assert 'No space left' in board.studio.worker.error
    assert 'role="alert"' in board.status.wrong.value and 'No space left' in board.status.wrong.value


def test_an_error_is_escaped_and_goes_away(board):
    board.studio.worker.error = '<b>&'
    assert '&lt;b&gt;&amp;' in board.status.wrong.value
    board.studio.worker.error = ''
    assert board.status.wrong.value == ''


def test_a_view_that_fails_while_the_worker_reports_does_not_end_the_work(board, monkeypatch):
    monkeypatch.setattr(P, 'PortraitBox', raising(ZeroDivisionError('division by zero')))
    board.studio.generate()
    assert board.studio.worker.wait(60) and not board.studio.worker.busy
    assert len(board.studio.gallery.portraits) == 2 and 'division by zero' in board.studio.worker.error


# controls

LINKED = [   # part of the studio, trait, place of the widget, two other values
    ('settings', 'prompt', 'wishes.prompt', 'a', 'c'),
    ('settings', 'negative_prompt', 'wishes.negative', 'b', 'd'),
    ('settings', 'seed', 'wishes.seed', 5, 6),
    ('settings', 'seed_locked', 'wishes.lock', False, True),
    ('settings', 'model', 'model.choice', 'tiny-portrait', 'tiny-plus'),
    ('people', 'side_by_side', 'people.apart', True, False),
    ('engine', 'download', 'model.download', True, False),
    ('settings', 'scale', 'wishes.knobs.scale', 1.5, .5),
    ('settings', 's_scale', 'wishes.knobs.s_scale', 1.5, .5),
    ('settings', 'num_samples', 'wishes.knobs.num_samples', 3, 4),
    ('settings', 'num_inference_steps', 'wishes.knobs.num_inference_steps', 4, 5),
    ('settings', 'guidance_scale', 'wishes.knobs.guidance_scale', 1.5, .5),
]


def widget_at(controls, place):
    found = controls
    for name in place.split('.'): found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


@pytest.mark.parametrize('part, name, place, one, other', LINKED)
def test_controls_and_studio_are_linked_both_ways(board, part, name, place, one, other):
    owner, widget = getattr(board.studio, part), widget_at(board.controls, place)
    setattr(owner, name, one)
    assert widget.value == one
    widget.value = other
    assert getattr(owner, name) == other


def test_every_knob_is_linked():
    assert {name for _, name, place, *_ in LINKED if 'knobs' in place} == set(P.KNOBS)


def test_everything_a_studio_is_asked_has_a_control(board):
    asked = {name for name in S.arguments_of(S.Settings(negative_prompt='x'))} | {'model', 'seed_locked'}
    assert asked == {name for part, name, *_ in LINKED if part == 'settings'}


def visibility(controls):
    "Which of four are shown: structure, number of photographs, download, whether each is another person."
    people = controls.people
    found = controls.wishes.knobs['s_scale'], people.used, controls.model.download, people.apart
    return tuple(map(shown, found))


@pytest.mark.parametrize('model, photographs, side_by_side, expected', [
    ('tiny-faceid', 1, False, (False, False, False, False)),
    ('tiny-plusv2', 1, False, (True, False, False, False)),
    ('tiny-portrait', 2, False, (False, True, False, True)),
    ('tiny-portrait', 2, True, (False, False, False, True)),
    ('sd15-plusv2', 2, True, (True, False, True, True)),
])
def test_only_what_the_variant_has_is_shown(board, photo, model, photographs, side_by_side, expected):
    for k in range(photographs - 1): board.studio.entrance.add(photo, f'{k}.png')
    board.studio.settings.model, board.studio.people.side_by_side = model, side_by_side
    assert visibility(board.controls) == expected


def test_as_many_photographs_can_be_read_as_there_are(board, photo):
    board.studio.entrance.add(photo, 'b.png')
    assert board.controls.people.used.max == 2


def test_a_model_says_what_it_needs(board):
    board.studio.settings.model = 'sd15-plusv2'
    about = board.controls.model.about.value
    assert 'download of 4.7 GB' in about and 'non-commercial' in about


def test_models_are_listed_with_what_must_be_fetched(board):
    options = board.controls.model.choice.options
    assert options[0][1] == 'tiny-faceid'
    for label, name in options: assert ('(download)' in label) != name.startswith('tiny')


# photographs

@pytest.fixture
def views(board):
    "The views of two photographs; there are two faces on the second."
    S.receive(board.studio, 'two.png', png(two_faces()))
    return board.controls.people.photos.views


def test_photographs_are_drawn(views):
    assert [view.tile.alt for view in views] == ['me.png, one face', 'two.png, 2 faces']
    assert not views[0].tile.clickable and views[1].tile.clickable


def test_a_face_is_chosen_by_its_number(views):
    views[1].choice.value = 1
    assert views[1].photo.chosen == 1 and views[1].choice.value == 1


def test_a_face_is_chosen_by_a_click(views, board):
    for place, face in (((.8, .5), 1), ((.2, .5), 0)):
        point(views[1].tile, *place)
        assert views[1].photo.chosen == face == views[1].choice.value
    assert board.controls.people.photos.views == views, 'the same views as before'


def test_a_photograph_is_removed(views, board):
    buttons(views[0])['remove'].click()
    assert [p.name for p in board.studio.people.photographs] == ['two.png']
    assert len(board.controls.people.photos.views) == 1


def test_what_is_around_a_face_is_square(views):
    face = P.around_face(views[1].photo.faces[1])
    assert face.width < 160 and abs(face.width - face.height) <= .15*face.width


# portraits

@pytest.fixture
def portraits(board):
    "The panel after a generation of two."
    panel = board.panels['Portrait']
    panel.go.click()
    finish(board.studio)
    return panel


def test_before_the_first_portrait_there_is_a_hint(board):
    panel = board.panels['Portrait']
    assert shown(panel.hint) and panel.stop.disabled and not panel.go.disabled


def test_previews_are_shown_in_the_same_tiles(board):
    panel, heard = board.panels['Portrait'], []
    panel.preview.observe(lambda change: heard.append(len(change.new)), 'children')
    panel.go.click()
    finish(board.studio)
    assert heard == [2, 0] and panel.preview.children == ()


def test_while_it_works_only_stop_can_be_pressed(board):
    panel, other, seen = board.panels['Portrait'], board.panels['Structure'], []
    def note(change): seen.append((panel.go.disabled, panel.stop.disabled, other.go.disabled))
    board.studio.progress.observe(note, 'step')
    panel.go.click()
    finish(board.studio)
    assert seen[-1] == (True, False, True)
    assert not panel.go.disabled and panel.stop.disabled


def test_portraits_are_shown_with_their_likeness(portraits, board):
    boxes = portraits.gallery.boxes.children
    assert len(boxes) == 2 and not shown(portraits.hint) and not shown(portraits.gallery.more)
    assert re.match(r'likeness -?0\.\d\d\nseed 0, me.png', boxes[0].tile.caption)
    assert 'portrait of me.png' in boxes[0].tile.alt


def test_the_status_says_what_was_done_and_where(portraits, board):
    machine = board.status.machine.value
    assert 'made in' in board.status.told.value
    assert 'memory' in machine and 'ExecutionProvider' in machine


@pytest.fixture
def compared(portraits):
    "The panel with both portraits beside the photograph."
    for box in portraits.gallery.boxes.children: click(box.tile)
    return portraits


def test_portraits_are_put_beside_the_photograph(compared, board):
    gallery = board.studio.gallery
    assert compared.gallery.boxes.children[0].tile.chosen and gallery.compared == gallery.portraits
    assert len(compared.beside.children[0].children) == 3 and 'seed' in compared.beside.children[1].value


def test_a_second_click_takes_a_portrait_away(compared):
    tile = compared.gallery.boxes.children[0].tile
    click(tile)
    assert not tile.chosen and len(compared.beside.children[0].children) == 2


def test_the_comparison_is_put_away(compared, board):
    buttons(compared.beside)['put away'].click()
    assert compared.beside.children == () and board.studio.gallery.compared == []


def test_a_portrait_shows_its_code(portraits):
    buttons(portraits.gallery.boxes.children[1])['code'].click()
    assert 'seed=1' in portraits.code.text


def test_a_portrait_is_saved(portraits, board):
    buttons(portraits.gallery.boxes.children[1])['save'].click()
    assert 'saved as' in board.status.note.value


def test_a_portrait_is_kept_and_the_others_cleared_away(portraits, board):
    buttons(portraits.gallery.boxes.children[1])['keep'].value = True
    portraits.forget.click()
    assert len(portraits.gallery.boxes.children) == 1 == len(board.studio.gallery.portraits)


@pytest.fixture
def thirty(board):
    "The gallery's view of thirty portraits, each better than the one before."
    board.studio.gallery.portraits = [Portrait(picture(), dict(seed=i), i/100) for i in range(30)]
    return board.panels['Portrait'].gallery


def test_a_gallery_shows_the_newest(thirty): assert len(thirty.boxes.children) == 24 and shown(thirty.more)


def test_a_gallery_grows_on_request(thirty):
    thirty.more.click()
    assert len(thirty.boxes.children) == 30 and not shown(thirty.more)


def test_a_gallery_is_ordered_and_keeps_its_boxes(thirty, board):
    tenth = thirty.boxes.children[10]
    board.panels['Portrait'].best.value = True
    boxes = thirty.boxes.children
    assert [box.portrait.settings['seed'] for box in boxes] == list(range(29, 5, -1))
    assert any(box is tenth for box in boxes)


# the grid

@pytest.fixture
def grid(board):
    "The panel of the structure, set to two scales and two seeds."
    panel = board.panels['Structure']
    panel.fields.columns.value = 'scale'
    panel.fields.values['scales'].value, panel.fields.values['seeds'].value = '0.5, 1', '0, 1'
    return panel


def test_values_are_entered(grid):
    assert grid.grid.scales == [.5, 1.] and grid.grid.seeds == [0, 1]


def test_only_values_of_the_axes_are_shown(grid):
    values = grid.fields.values
    assert {name for name, field in values.items() if shown(field)} == {'scales', 'seeds'}


def test_values_that_are_wrong_are_said(grid, board):
    grid.fields.values['seeds'].value = 'x'
    assert 'seed takes numbers' in board.studio.worker.error


@pytest.fixture
def half(grid, board):
    "The grid stopped while its second row was at work; which tiles were dim at each preview."
    dim = []
    def note(change):
        if change.new: dim.append([tile.dim for tile in grid.table.tiles])
        if 2 in change.new: board.studio.worker.stop()
    grid.grid.observe(note, 'previews')
    grid.go.click()
    assert board.studio.worker.wait(60)
    grid.grid.unobserve(note, 'previews')
    return grid, dim


def test_cells_at_work_are_dim(half): assert [True, True, False, False] in half[1]


def test_cells_that_were_stopped_wait_again(half):
    tiles = half[0].table.tiles
    assert captions(tiles)[2:] == ['waiting']*2 and not any(t.image or t.dim for t in tiles[2:])


def test_cells_that_are_done_show_their_numbers(half):
    tile = half[0].table.tiles[0]
    assert tile.image and re.match(r'-?0\.\d\d / 0\.\d\d|no face', tile.caption)


def test_a_stopped_grid_is_resumed(half, board):
    panel = half[0]
    assert panel.go.description == 'Resume'
    panel.go.click()
    finish(board.studio)
    assert panel.go.description == 'Fill the grid' and not any(t.dim for t in panel.table.tiles)
    assert all(cell.state == 'done' for cell in panel.grid.cells)


@pytest.fixture
def filled(grid, board):
    grid.grid.scales = [1.]
    grid.grid.run()
    finish(board.studio)
    return grid


def test_curves_of_a_grid_are_drawn(filled):
    curves = filled.figures.curves
    assert shown(curves) and curves.image[:4] == b'\x89PNG'


def test_a_cell_is_enlarged(filled):
    click(filled.table.tiles[1])
    assert [tile.chosen for tile in filled.table.tiles] == [False, True]
    tiles = filled.large.children[0].children
    assert [tile.side for tile in tiles] == [220, 220] and 'structure distance' in tiles[1].caption


def test_an_enlarged_cell_shows_its_code(filled):
    click(filled.table.tiles[1])
    buttons(filled.large)['code'].click()
    assert 'seed=1' in filled.code.text


def test_an_enlarged_cell_is_saved(filled, tmp_path):
    click(filled.table.tiles[1])
    buttons(filled.large)['save'].click()
    assert list(tmp_path.glob('*.png'))


def test_an_enlarged_cell_is_put_away(filled):
    click(filled.table.tiles[1])
    filled.code.text = 'code'
    buttons(filled.large)['close'].click()
    assert filled.large.children == () and filled.code.text == ''
    assert not any(tile.chosen for tile in filled.table.tiles)


def test_a_grid_is_exported(filled, board, tmp_path):
    filled.out.click()
    assert 'written: ' in board.studio.worker.note and (tmp_path/'grid_0001.csv').exists()


def test_a_failed_cell_says_why(filled, board, monkeypatch):
    monkeypatch.setattr(board.studio.engine.faceid, 'generate', raising(MemoryError()))
    filled.grid.seeds = [7]
    run(filled.grid.run, board.studio)
    tile = filled.table.tiles[0]
    assert tile.caption == 'failed' and 'MemoryError' in tile.tip
    assert '1 of 1 cells could not be made' in board.studio.worker.error


def test_a_failed_cell_is_not_enlarged(filled):
    filled.grid.cells = [Cell(0, 'key', {}, state='failed', error='wrong'), *filled.grid.cells[1:]]
    filled.grid.chosen = 0
    assert filled.large.children == ()


# likeness

@pytest.fixture
def likeness(board):
    "The panel of the similarity, set to two scales and a seed."
    board.studio.settings.prompt = 'photo of a person, smiling'   # whose adherence can be read
    panel = board.panels['Similarity']
    panel.values['scales'].value, panel.values['seeds'].value = '0.5, 1', '0'
    return panel


@pytest.fixture
def surveyed(likeness, board):
    likeness.survey.click()
    finish(board.studio)
    return likeness


def drawn_figures(panel): return {name for name, tile in panel.figures.tiles.items() if shown(tile)}


def test_a_structure_weight_is_asked_where_there_is_one(likeness, board):
    assert not shown(likeness.values['s_scales'])
    board.studio.settings.model = 'tiny-plusv2'
    assert shown(likeness.values['s_scales'])


def test_people_and_weights_have_the_same_seeds(likeness):
    assert likeness.comparison.seeds == likeness.weights.seeds == [0]


def test_a_matrix_is_drawn(likeness, board):
    likeness.people.click()
    finish(board.studio)
    assert drawn_figures(likeness) == {'matrix'} and not shown(likeness.choice.pick)


def test_a_survey_is_drawn(surveyed):
    assert drawn_figures(surveyed) == {'curves', 'trade'}
    assert [pair for _, pair in surveyed.choice.pick.options] == [(.5, 1.), (1., 1.)]


def test_weights_are_picked(surveyed):
    pick, trade = surveyed.choice.pick, surveyed.figures.tiles['trade']
    pick.value = (.5, 1.)
    before = trade.image
    assert surveyed.weights.chosen == (.5, 1.) and len(surveyed.choice.pictures.children) == 1
    pick.value = (1., 1.)
    assert trade.image != before


def test_weights_are_used(surveyed, board):
    surveyed.choice.pick.value = (.5, 1.)
    surveyed.choice.use.click()
    assert board.studio.settings.scale == .5


def test_weights_are_searched(likeness, board):
    likeness.target.value = 0.
    likeness.search.click()
    finish(board.studio)
    assert likeness.weights.found is not None and 'a likeness of 0.00 is' in board.status.told.value


def test_weights_that_were_found_are_the_chosen_ones(likeness, board):
    likeness.target.value = 0.
    likeness.search.click()
    finish(board.studio)
    found = likeness.weights.found
    assert likeness.weights.chosen == (found.scale, found.s_scale) == likeness.choice.pick.value


def test_figures_are_exported(surveyed, board):
    surveyed.out.click()
    assert 'written: ' in board.studio.worker.note


# attention

@pytest.fixture
def attention(board):
    panel = board.panels['Attention']
    panel.go.click()
    finish(board.studio)
    return panel


def test_attention_is_shown_for_every_token(attention):
    assert captions(attention.maps.maps.children) == ['picture', *(f'token {k}' for k in range(1, 5))]
    assert len(attention.layer.options) == 8 and attention.step.max == 2


def test_attention_follows_its_layer(attention):
    tiles = attention.maps.maps.children
    before, attention.layer.value = tiles[1].image, attention.layer.options[2]
    assert attention.attention.layer == attention.layer.options[2] and tiles[1].image != before
    assert attention.maps.maps.children == tiles


def test_attention_follows_its_step(attention):
    tile = attention.maps.maps.children[1]
    before, attention.step.value = tile.image, 1
    assert attention.attention.step == 1 and tile.image != before
    assert 'step 1' in attention.maps.legend.value


# letting go

@pytest.fixture
def busy(photo):
    "A board that has things to let go of and is at work until it is told to stop."
    board = D.Board(D.PANELS)
    studio, gallery = board.studio, board.studio.gallery
    S.receive(studio, 'me.png', photo)
    sitter = S.Sitter(tuple(studio.people.photographs))
    gallery.portraits = [Portrait(picture(), dict(seed=0), .5, sitter=sitter)]
    gallery.compare(gallery.portraits[0])
    studio.worker.start(lambda: studio.worker.stopping.wait(20))
    studio.engine.faceid = object()
    return board


def test_a_board_that_is_closed_leaves_no_widget(photo, request):
    before = alive()
    board = request.getfixturevalue('busy')
    assert alive() > before + 100
    board.close()
    assert alive() == before and not any(b is board for _, _, b in D._boards)


def test_a_board_that_is_closed_ends_its_work(request):
    threads = threading.active_count()
    board = request.getfixturevalue('busy')
    board.close()
    assert not board.studio.worker.busy and board.studio.engine.faceid is None
    assert threading.active_count() <= threads


def test_a_studio_of_the_callers_own_lives_on():
    studio = Studio()
    studio.engine.faceid = mark = object()
    before, board = watchers(studio), None
    board = D.Board(D.PANELS, studio)
    assert watchers(studio) > before + 20
    board.close()
    assert watchers(studio) == before and studio.engine.faceid is mark
    studio.engine.faceid = None


@pytest.fixture
def cell(monkeypatch):
    "Says in which cell and run boards are made, and closes what is left of them."
    now = [(None, None)]
    monkeypatch.setattr(D, 'this_cell', lambda: now[-1])
    yield lambda *where: now.append(where)
    for _, _, board in list(D._boards): board.close()


def test_a_cell_run_again_closes_its_old_boards(cell):
    cell('a', '1')
    old = D.portrait_dashboard(), D.attention_dashboard()
    assert not any(board.closed for board in old)
    cell('a', '3')
    new = D.similarity_dashboard()
    assert all(board.closed for board in old) and not new.closed


def test_another_cell_closes_no_board(cell):
    cell('a', '1')
    board = D.portrait_dashboard()
    cell('b', '2')
    D.structure_dashboard()
    assert not board.closed


def test_outside_a_notebook_no_board_is_closed(cell):
    boards = D.portrait_dashboard(), D.portrait_dashboard()
    assert not any(board.closed for board in boards)


def test_closed_boards_leave_nothing(cell):
    before = alive()
    cell('a', '1')
    D.portrait_dashboard()
    cell('a', '2')
    D.portrait_dashboard().close()
    assert alive() == before and D._boards == []


def test_outside_a_notebook_there_is_no_cell(): assert D.this_cell() == (None, None)


def noted(image, seed):
    image = image.copy()
    image.info['faceid_nb'] = dict(image.info.get('faceid_nb', {}), seed=seed, person=0)
    return image


@pytest.fixture
def quick(portraits, board, monkeypatch):
    "The portrait panel with a model that returns the same picture, and measures nothing."
    image = board.studio.gallery.portraits[0].image
    def generate(faces, num_samples, seed, **more):
        return [noted(image, seed + i) for i in range(num_samples)]
    def measure(faces, images, *args, **more):
        return dict(likeness=[.5]*len(images), distance=[.1]*len(images))
    monkeypatch.setattr(board.studio.engine.faceid, 'generate', generate)
    monkeypatch.setattr(S, 'measure_pictures', measure)
    return portraits


def test_a_hundred_runs_do_not_grow(quick, board, capsys):
    gallery, sizes = board.studio.gallery, []
    gallery.most = 30
    capsys.readouterr()
    for i in range(100):
        quick.go.click()
        finish(board.studio)
        gallery.compare(gallery.portraits[0])
        gallery.compared = []
        if i not in (30, 99): continue
        boxes = quick.gallery.boxes.children
        sizes.append((alive(), threading.active_count(), len(gallery.portraits), len(boxes)))
    assert sizes[0] == sizes[1] and sizes[1][2] <= 32
    assert capsys.readouterr() == ('', ''), 'nothing is printed'


@pytest.mark.parametrize('call, titles', [
    (D.portrait_dashboard, ['Portrait']),
    (D.structure_dashboard, ['Structure']),
    (D.similarity_dashboard, ['Similarity']),
    (D.attention_dashboard, ['Attention']),
    (D.studio, ['Portrait', 'Structure', 'Similarity', 'Attention']),
])
def test_the_one_line_calls(call, titles):
    board = call(folder='elsewhere')
    try:
        assert list(board.panels) == titles and 'elsewhere' in board.status.machine.value
        assert all(panel.studio is board.studio for panel in board.panels.values())
    finally: board.close()


def test_a_process_ends_quietly_with_a_board_open(fresh):
    done = fresh('from faceid_nb.dashboard import studio\nboard = studio()\nprint("up")', check=False)
    assert done.stdout.strip() == 'up' and done.returncode == 0
    assert 'Exception' not in done.stderr and 'Error' not in done.stderr, done.stderr[-600:]
