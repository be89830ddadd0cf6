"Three widgets and a view, without a browser. Each trap that was met has its test."
import io

import ipywidgets as W
import numpy as np
import pytest
from helpers_dashboard import alive
from PIL import Image

from faceid_nb import widgets as V
from faceid_nb.studio import Studio


@pytest.fixture
def small(): return Image.new('RGB', (64, 64), 'red')


@pytest.fixture
def large():
    pixels = np.random.default_rng(0).integers(0, 255, (900, 600, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def keep():
    "Widgets that are closed after the test."
    kept = []
    def remember(widget):
        kept.append(widget)
        return widget
    yield remember
    for widget in kept: V.close_all(widget)


# tiles

def test_a_tile_shows_a_small_picture_as_it_is(keep, small):
    data = keep(V.Tile(small, side=96)).image
    assert data[:4] == b'\x89PNG' and Image.open(io.BytesIO(data)).size == (64, 64)


def test_a_tile_shows_a_large_picture_smaller(keep, large):
    seen = Image.open(io.BytesIO(keep(V.Tile(large, side=200)).image))
    assert seen.format == 'JPEG' and seen.size == (267, 400)


def test_a_picture_that_is_shown_stays_as_it_is(keep, large):
    keep(V.Tile(large, side=200))
    assert large.size == (600, 900)


def test_a_tile_is_emptied(keep, small):
    tile = keep(V.Tile(small))
    tile.show(None)
    assert tile.image == b''


def test_a_tile_can_be_clicked_where_somebody_listens(keep):
    assert not keep(V.Tile()).clickable and keep(V.Tile(on_click=print)).clickable


def test_a_tile_tells_the_place_of_a_click(keep):
    places = []
    tile = keep(V.Tile(on_point=lambda *place: places.append(place)))
    tile._handle_custom_msg(dict(x=.2, y=.5), [])
    assert places == [(.2, .5)]


@pytest.mark.parametrize('kind', [V.Tile, V.Drop, V.Code])
def test_no_trait_of_ours_hides_one_of_the_widgets(kind):
    "A trait called tooltip broke the view in the browser, and nowhere else."
    ours = {name for name in vars(kind) if not name.startswith('_')}
    assert not ours & set(W.DOMWidget.class_trait_names())


# files

def test_files_reach_python(keep):
    got, told = [], []
    drop = keep(V.Drop(lambda *file: got.append(file), told.append))
    drop._handle_custom_msg(dict(name='a.png'), [memoryview(b'abc')])
    assert got == [('a.png', b'abc')] and told == []


def test_problems_reach_python(keep):
    got, told = [], []
    drop = keep(V.Drop(lambda *file: got.append(file), told.append))
    drop._handle_custom_msg(dict(problem='too large'), [])
    assert told == ['too large'] and got == []


# HTML

def test_what_is_said_is_escaped():
    assert V.say('<b>&', 'alert', 'alert') == '<div class="faceid-alert" role="alert">&lt;b&gt;&amp;</div>'


def test_nothing_is_said_without_a_frame(): assert V.say('', 'alert') == ''


# views

def test_a_box_closes_what_it_lets_go(small):
    before = alive()
    box = W.HBox([V.Tile(small), W.Button()])
    stays = box.children[0]
    V.replace(box, [stays])
    assert alive() == before + 2 + 2 and box.children == (stays,), 'box and tile, each with its layout'
    V.close_all(box)
    assert alive() == before


@pytest.fixture
def view():
    view = V.View(Studio())
    yield view
    V.close_all(view)


def test_a_watcher_that_fails_leaves_the_others_be(view):
    worker, seen = view.studio.worker, []
    view.watch(worker, ['busy'], lambda: worker.busy and 1/0)
    view.watch(worker, ['busy'], lambda: seen.append(worker.busy))
    worker.busy = True
    assert 'division by zero' in worker.error and seen == [False, True]


def test_a_closed_view_hears_nothing(view):
    worker, seen = view.studio.worker, []
    view.watch(worker, ['busy'], lambda: seen.append(worker.busy))
    view.close()
    worker.busy = True
    assert seen == [False]


def test_a_linked_trait_and_its_widget_are_the_same(view):
    settings, slider = view.studio.settings, W.FloatSlider(max=2)
    view.link(settings, 'scale', slider)
    settings.scale = .5
    assert slider.value == .5
    slider.value = .7
    assert settings.scale == .7


def test_a_handler_that_raises_says_so(view):
    field = W.Text()
    view.hear(field, lambda value: 1/0)
    field.value = 'x'
    assert view.studio.worker.error == 'division by zero'
