"For tests of the views without a browser: what is on a board, and clicks on it."
from ipywidgets.widgets import widget


def alive():
    "How many widgets this process keeps."
    return len(widget._instances)


def tree(box):
    "A widget and everything in it."
    yield box
    for child in getattr(box, 'children', ()): yield from tree(child)


def shown(box): return box.layout.display != 'none'


def click(tile): tile._handle_custom_msg({}, [])


def point(tile, x, y): tile._handle_custom_msg(dict(x=x, y=y), [])


def captions(tiles): return [tile.caption for tile in tiles]


def buttons(box):
    "{description: button} of everything in a box that has one."
    return {w.description: w for w in tree(box) if hasattr(w, 'description')}


def watchers(studio):
    "How many functions listen to the traits of a studio."
    total = 0
    for part in (studio.settings, studio.people, studio.gallery, studio.engine, studio.machine,
                 studio.progress, studio.worker):
        for kinds in part._trait_notifiers.values(): total += sum(map(len, kinds.values()))
    return total
