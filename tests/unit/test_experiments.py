"Grid, comparison, weights and attention, without a browser."
import gc
import weakref

import numpy as np
import pytest
from helpers_studio import drawn, empty, executed, largest_difference, made, png, run, two_faces
from PIL import Image
from traitlets import TraitError

from faceid_nb import experiments as E
from faceid_nb.errors import ArgumentError
from faceid_nb.measure import identity_similarity
from faceid_nb.studio import Studio
from faceid_nb.cells import read_table


@pytest.fixture(scope='module')
def photo(): return png(drawn(1)[0])


@pytest.fixture(scope='module')
def shared():
    studio = Studio(model='tiny-faceid', num_samples=1, num_inference_steps=2)
    yield studio
    studio.close()


@pytest.fixture
def studio(shared, photo, tmp_path):
    empty(shared, tmp_path)
    shared.entrance.add(photo, 'me.png')
    return shared


def stop_when(condition, owner, name, studio):
    "Stop the work as soon as a trait's new value fulfils a condition."
    def changed(change):
        if condition(change.new): studio.worker.stop()
    owner.observe(changed, name)


# values

@pytest.mark.parametrize('name, text, said', [
    ('seeds', '0, 1.5', 'seed takes numbers'),
    ('seeds', '', 'at least one seed'),
    ('scales', '1, 1', 'none twice'),
    ('s_scales', '0, 9', 's_scale is from 0 to 3'),
    ('scales', 'x', 'scale takes numbers'),
])
def test_values_that_are_wrong_are_said_and_not_taken(grid, name, text, said):
    before = getattr(grid, name)
    assert not grid.enter(name, text)
    assert said in grid.studio.worker.error and getattr(grid, name) == before


def test_values_that_are_right_take_the_error_away(grid):
    grid.studio.worker.error = 'wrong'
    assert grid.enter('seeds', ' 3;4, ') and grid.seeds == [3, 4] and grid.studio.worker.error == ''


@pytest.mark.parametrize('name', ['rows', 'columns'])
def test_axes_are_checked(grid, name):
    with pytest.raises(TraitError, match=f'{name} is .* or '): grid.set_trait(name, 'prompt')


def test_rows_and_columns_differ(grid):
    grid.rows = grid.columns = 'scale'
    assert not grid.run() and 'both the scale' in grid.studio.worker.error


def test_a_structure_weight_needs_a_structure(grid):
    grid.columns = 's_scale'
    assert not grid.run() and 'tiny-faceid has no structure weight' in grid.studio.worker.error
    assert not grid.studio.worker.busy


# the grid

@pytest.fixture
def grid(studio): return E.Grid(studio, rows='seed', columns='scale', seeds=[0, 1], scales=[.5, 1.])


@pytest.fixture
def stopped(grid):
    "A grid of which the first row is made: (grid, states when the cells came, numbers that arrived)."
    states, arrived = [], []
    grid.observe(lambda change: states.append([cell.state for cell in change.new]), 'cells')
    grid.observe(lambda change: change.new >= 0 and arrived.append(change.new), 'arrived')
    stop_when(lambda number: number == 0, grid, 'arrived', grid.studio)
    assert 'to go' in run(grid.run, grid.studio)
    grid.unobserve_all()
    return grid, states, arrived


def test_cells_wait_before_they_are_made(stopped): assert stopped[1] == [['waiting']*4]


def test_a_stopped_grid_keeps_what_arrived(stopped):
    grid, _, arrived = stopped
    progress = grid.studio.progress
    assert arrived == [0, 1] and grid.unfinished == 2 and (progress.step, progress.steps) == (4, 8)


def test_a_grid_goes_on_where_it_was_stopped(stopped):
    grid = stopped[0]
    assert run(grid.run, grid.studio) == '4 cells, 2 of them from an earlier run'
    assert [cell.kept for cell in grid.cells] == [True, True, False, False]
    assert grid.studio.progress.step == grid.studio.progress.steps


def test_a_finished_grid_has_its_numbers(grid):
    run(grid.run, grid.studio)
    assert sorted(grid.table()['seed']) == [0, 0, 1, 1]
    assert all(-1 < cell.likeness < 1 for cell in grid.cells)


@pytest.fixture
def numbered(grid, monkeypatch):
    "A grid whose previews are pictures of one pixel: its red is the place in the batch."
    made(grid.studio)
    grid.studio.progress.preview_every = 1
    def show(latents): return [Image.new('RGB', (1, 1), (i, 0, 0)) for i in range(len(latents))]
    monkeypatch.setattr(grid.studio.engine, 'previewer', show)
    return grid


def reds(pictures): return {number: picture.getpixel((0, 0))[0] for number, picture in pictures.items()}


def test_previews_of_a_grid_belong_to_their_cells(numbered):
    heard = []
    numbered.observe(lambda change: heard.append(reds(change.new)), 'previews')
    run(numbered.run, numbered.studio)
    assert {0: 0, 1: 1} in heard and {2: 0, 3: 1} in heard and numbered.previews == {}


def test_previews_of_a_stopped_grid_go_away(numbered):
    stop_when(lambda previews: 2 in previews, numbered, 'previews', numbered.studio)
    assert '2 cells to go' in run(numbered.run, numbered.studio) and numbered.previews == {}


def test_progress_of_a_grid_goes_by_steps_and_never_back(grid):
    grid.studio.settings.num_inference_steps, heard = 3, []
    grid.studio.progress.observe(lambda change: heard.append(change.new), 'step')
    run(grid.run, grid.studio)
    assert [step for step in heard if step] == [2, 4, 6, 8, 10, 12]


def test_cells_that_fail_are_said(grid, monkeypatch):
    made(grid.studio)
    faceid = grid.studio.engine.faceid
    generate = faceid.generate
    def fail_at_one(*args, **more):
        if set(more['seed']) == {0}: return generate(*args, **more)
        raise ValueError('a bad seed')
    monkeypatch.setattr(faceid, 'generate', fail_at_one)
    run(grid.run, grid.studio)
    assert '2 of 4 cells could not be made. ValueError: a bad seed' in grid.studio.worker.error
    assert [cell.state for cell in grid.cells] == ['done', 'done', 'failed', 'failed']


def test_nothing_is_exported_where_nothing_was_made(grid):
    assert grid.export() == [] and 'nothing to export' in grid.studio.worker.error


def test_a_grid_is_exported_under_free_names(grid, tmp_path):
    run(grid.run, grid.studio)
    for number in ('0001', '0002'):
        assert [p.name for p in grid.export()] == [f'grid_{number}.png', f'grid_{number}_curves.png']
    assert (tmp_path/'grid_0001.csv').read_text().count('\n') == 5
    with Image.open(tmp_path/'grid_0001.png') as image: assert image.width > image.height


def test_a_cell_is_a_portrait(grid):
    run(grid.run, grid.studio)
    portrait = grid.portrait(2)
    assert (portrait.settings['seed'], portrait.settings['scale'], portrait.sitter.name) == (1, .5, 'me.png')
    assert 's_scale' not in portrait.settings


def test_the_code_of_a_cell_makes_its_picture(grid, photo, tmp_path, monkeypatch):
    run(grid.run, grid.studio)
    grid.studio.people.photographs = []
    (tmp_path/'me.png').write_bytes(photo)
    monkeypatch.chdir(tmp_path)
    portrait = grid.portrait(2)
    assert largest_difference(executed(portrait.python)['picture'], portrait.image) <= 2


# likeness

@pytest.fixture
def comparison(studio): return E.Comparison(studio, seeds=[0, 1])


@pytest.fixture
def crowd(comparison):
    "Two photographs: 'me.png', and the second face of 'two.png'."
    studio = comparison.studio
    studio.people.choose(studio.entrance.add(png(two_faces()), 'two.png'), 1)
    return comparison


def test_one_person_is_compared_with_himself(comparison):
    assert 'add people' in run(comparison.run, comparison.studio) and comparison.owner == [0, 0]


def test_one_person_in_two_photographs_owns_no_column(crowd):
    assert 'compared with 2 photographs' in run(crowd.run, crowd.studio)
    assert crowd.owner is None and crowd.matrix.shape == (2, 2)
    assert list(crowd.matrix.columns) == ['me.png', 'two.png']


def test_everybody_is_compared_with_everybody(crowd):
    crowd.studio.people.side_by_side = True
    run(crowd.run, crowd.studio)
    assert crowd.matrix.shape == (4, 2) and crowd.owner == [0, 0, 1, 1]
    assert list(crowd.matrix.index) == ['me.png, 0', 'me.png, 1', 'two.png, 0', 'two.png, 1']


def test_a_likeness_of_the_matrix_is_the_judges(crowd, tmp_path):
    crowd.studio.people.side_by_side = True
    run(crowd.run, crowd.studio)
    table = read_table(tmp_path/'sweeps')
    row = table[(table.face == 'two.png') & (table.seed == 1)].iloc[0]
    expected = identity_similarity(crowd.studio.people.photographs[0].face, row.image)[0]
    assert abs(crowd.matrix.loc['two.png, 1', 'me.png'] - expected) < 1e-5


LIKENESS = {.25: .2, .5: .4, 1.: .6}   # of a scale


@pytest.fixture
def weights(studio, monkeypatch):
    "Weights whose likeness is known: it is not measured."
    def measured(model, cells, *more):
        for cell in cells:
            cell.likeness, cell.distance = LIKENESS[cell.parameters['scale']], .1
            cell.adherence = 1 - cell.likeness
    monkeypatch.setattr('faceid_nb.work.measure_cells', measured)
    return E.Weights(studio, scales=list(LIKENESS), seeds=[0], target=.35)


def test_nothing_is_used_that_was_not_chosen(weights):
    assert not weights.use() and 'Nothing is chosen' in weights.studio.worker.error


def test_no_figure_is_exported_where_nothing_was_made(weights):
    assert E.export_likeness(E.Comparison(weights.studio), weights) == []
    assert 'nothing to export' in weights.studio.worker.error


def test_a_search_finds_the_weights(weights):
    said = 'a likeness of 0.35 is reached at scale 0.5: likeness 0.40, prompt adherence 0.60'
    assert said in run(weights.search, weights.studio)
    assert weights.chosen == (.5, 1.) and weights.found.reached and 1 < len(weights.table) <= 3


def test_the_weights_that_were_found_are_used(weights):
    run(weights.search, weights.studio)
    assert weights.use() and weights.studio.settings.scale == .5


def test_a_survey_asks_for_every_weight(weights):
    assert '3 pictures surveyed' in run(weights.survey, weights.studio)
    assert sorted(weights.table['scale']) == list(LIKENESS) and weights.by == ('scale',)


def test_a_likeness_that_is_not_reached(weights):
    weights.target = .9
    assert 'not reached; nearest at scale 1' in run(weights.search, weights.studio)


def test_figures_of_the_weights_are_exported(weights, tmp_path):
    run(weights.survey, weights.studio)
    names = [path.name for path in E.export_likeness(E.Comparison(weights.studio), weights)]
    assert names == ['weights_0001_trade_off.png', 'weights_0001_curves.png']
    assert (tmp_path/'weights_0001_trade_off.csv').exists()


def test_a_target_is_a_cosine(weights):
    with pytest.raises(TraitError, match='from -1 to 1'): weights.target = 2


@pytest.mark.parametrize('verb, said', [('search', 'stopped'), ('survey', 'to go')])
def test_search_and_survey_are_stopped(weights, verb, said):
    studio = weights.studio
    weights.seeds, studio.settings.num_inference_steps = list(range(40)), 50
    stop_when(lambda step: step > 1, studio.progress, 'step', studio)
    assert said in run(getattr(weights, verb), studio, 20)


def test_figures_of_both_weights_and_of_people_are_exported(studio):
    studio.settings.model = 'tiny-plusv2'
    comparison = E.Comparison(studio, seeds=[0])
    weights = E.Weights(studio, scales=[.5, 1.], s_scales=[0., 1.], seeds=[0])
    for begin in (weights.survey, comparison.run): run(begin, studio)
    assert weights.by == ('scale', 's_scale') and len(weights.table) == 4
    stems = 'similarity_0001', 'weights_0001_trade_off', 'weights_0001_curves', 'weights_0001_likeness'
    assert [p.name for p in E.export_likeness(comparison, weights)] == [f'{stem}.png' for stem in stems]


# attention

@pytest.fixture
def attention(studio):
    "Attention of one picture of three steps."
    studio.settings.num_inference_steps = 3
    attention = E.Attention(studio)
    assert run(attention.run, studio) == '7 layers, 3 steps, 4 tokens'
    return attention


def maps_of(attention, layer, steps):
    path = list(attention.record.maps)[layer]
    return attention.record.attention_maps((64, 64), [path], steps)[0].numpy()


def test_without_a_picture_there_is_no_attention(studio):
    with pytest.raises(ArgumentError, match='nothing was made'): E.Attention(studio).shares()


def test_layers_are_listed(attention):
    assert attention.layers[0] == 'all' and len(attention.layers) == 8 and attention.image.size == (64, 64)


def test_shares_are_one_together(attention):
    shares = attention.shares()
    assert shares.shape == (4, 64, 64) and abs(shares.sum(0) - 1).max() < 1e-4


def test_a_layer_and_a_step_are_chosen(attention):
    attention.layer, attention.step = attention.layers[3], 2
    assert np.array_equal(attention.shares(), maps_of(attention, 2, slice(1, 2)))


def test_step_none_is_the_mean_of_all(attention):
    attention.layer, attention.step = attention.layers[3], 0
    each = [maps_of(attention, 2, slice(i, i + 1)) for i in range(3)]
    assert np.allclose(attention.shares(), np.mean(each, 0), atol=1e-6)


def test_overlays_say_their_limits(attention):
    pictures, shares = attention.overlays(), attention.shares()
    assert len(pictures) == 4 and pictures[0].size == (64, 64)
    assert attention.limits == (pytest.approx(shares.min()), pytest.approx(shares.max()))


def test_the_record_holds_no_model(attention):
    assert attention.record.at is None and attention.record.tokens is None


def test_recording_does_not_change_the_picture(attention):
    assert largest_difference(attention.image, made(attention.studio)[0].image) <= 2
    assert 'record' not in attention.image.info['faceid_nb']


def test_a_step_that_is_no_longer_there_is_the_last(attention):
    attention.step, attention.studio.settings.num_inference_steps = 3, 2
    run(attention.run, attention.studio)
    assert attention.steps == 2 and attention.step == 2


def test_without_a_scale_there_is_no_attention(attention):
    attention.studio.settings.scale = 0.
    run(attention.run, attention.studio, 20)
    assert 'the scale is 0' in attention.studio.worker.error


# all of them

def test_nothing_begins_while_something_is_at_work(studio):
    studio.worker.busy = True
    try:
        grid, comparison, attention = E.Grid(studio), E.Comparison(studio), E.Attention(studio)
        begins = grid.run, comparison.run, E.Weights(studio).survey, attention.run
        assert [begin() for begin in begins] == [False]*4 and not studio.worker.error
    finally: studio.worker.busy = False


def test_the_model_is_let_go_whatever_was_made_with_it(studio):
    studio.settings.model = 'tiny-plusv2'
    made(studio)
    one = dict(scales=[1.], s_scales=[1.], seeds=[0])
    grid, weights = E.Grid(studio, seeds=[0], s_scales=[0., 1.]), E.Weights(studio, target=0., **one)
    comparison, attention = E.Comparison(studio, seeds=[0]), E.Attention(studio)
    for begin in (grid.run, comparison.run, weights.survey, weights.search, attention.run): run(begin, studio)
    faceid = studio.engine.faceid
    parts = [weakref.ref(x) for x in (faceid, faceid.pipe.unet, faceid.pipe.vae, faceid.adapter.net)]
    del faceid
    assert grid.cells and studio.release()
    gc.collect()
    assert [part() is None for part in parts] == [True]*4
