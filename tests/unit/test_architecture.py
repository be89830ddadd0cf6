"The rooms of the house: which module may know which."
import ast
from functools import cache

import pytest
from conftest import ROOT, modules

# what measuring and drawing may use; the rest trains
TINY_ROOMS = {'faceid_nb.tiny.people', 'faceid_nb.tiny.scenes'}
VIEWS = {'faceid_nb.widgets', 'faceid_nb.panels', 'faceid_nb.dashboard'}
STUDIO = VIEWS | {'faceid_nb.preview', 'faceid_nb.studio', 'faceid_nb.experiments'}
WIDGETS = {'ipywidgets', 'anywidget'}
DEVELOPMENT = {'nbdev', 'fastcore', 'execnb', 'pytest', 'ruff'}
PACKAGES = {'faceid_nb', 'faceid_nb.tiny'}
MODULES = [name for name in modules() if name not in PACKAGES and not name.endswith('_modidx')]


def file_of(name):
    return ROOT/(name.replace('.', '/') + '.py')


@cache
def imports(name):
    "Every import of a module, also inside functions: [(module, name or None)], absolute."
    found, package = [], name.split('.')[:-1]
    for node in ast.walk(ast.parse(file_of(name).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): found += [(alias.name, None) for alias in node.names]
        if not isinstance(node, ast.ImportFrom): continue
        base = package[:len(package) - node.level + 1] if node.level else []
        origin = '.'.join([*base, *filter(None, [node.module])])
        found += [(origin, alias.name) for alias in node.names]
    return found


@cache
def rooms_of(name):
    "The modules of ours that a module imports."
    asked = {origin for origin, _ in imports(name)} | {f'{origin}.{part}' for origin, part in imports(name)}
    return asked & set(MODULES) - {name}


def circle(start):
    "A way from a module back to itself, or []."
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop()
        for room in rooms_of(way[-1]):
            if room == start: return [*way, start]
            if room not in seen: ways.append([*way, room])
            seen.add(room)
    return []


@pytest.mark.parametrize('name', MODULES)
def test_no_circles(name):
    assert circle(name) == []


@pytest.mark.parametrize('name', [m for m in MODULES if not m.startswith('faceid_nb.tiny.')])
def test_nothing_outside_tiny_imports_a_training_room(name):
    assert {room for room in rooms_of(name) if room.startswith('faceid_nb.tiny.')} <= TINY_ROOMS


@pytest.mark.parametrize('name', sorted(TINY_ROOMS))
def test_what_may_be_imported_does_not_train(name):
    assert {room for room in rooms_of(name) if room.startswith('faceid_nb.tiny.')} <= TINY_ROOMS


@pytest.mark.parametrize('name', [m for m in MODULES if m not in VIEWS])
def test_only_views_know_widgets(name):
    assert not {origin.split('.')[0] for origin, _ in imports(name)} & WIDGETS


@pytest.mark.parametrize('name', [m for m in MODULES if m not in STUDIO])
def test_only_the_studio_knows_traits(name):
    assert 'traitlets' not in {origin.split('.')[0] for origin, _ in imports(name)}


@pytest.mark.parametrize('name', MODULES)
def test_no_module_needs_a_development_tool(name):
    assert not {origin.split('.')[0] for origin, _ in imports(name)} & DEVELOPMENT


@pytest.mark.parametrize('name', [m for m in MODULES if m not in STUDIO and m != 'faceid_nb.cli'])
def test_science_and_use_do_not_know_the_studio(name):
    assert not rooms_of(name) & STUDIO


@pytest.mark.parametrize('name', sorted(STUDIO))
def test_the_studio_does_not_know_the_command_line(name):
    assert 'faceid_nb.cli' not in rooms_of(name)


@pytest.mark.parametrize('name', MODULES)
def test_no_private_name_crosses_a_room(name):
    ours = [(origin, part) for origin, part in imports(name) if origin.split('.')[0] == 'faceid_nb']
    names = [part for _, part in ours if part and part != '__version__']
    assert [part for part in names if part.startswith('_')] == []


@pytest.mark.parametrize('name', MODULES)
def test_no_private_attribute_of_another_room_is_used(name):
    "`module._name`, where the module was imported as a whole."
    tree = ast.parse(file_of(name).read_text(encoding='utf-8'))
    whole = {part for origin, part in imports(name) if f'{origin}.{part}' in MODULES}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith('_')]
    owners = [getattr(node.value, 'id', '') for node in used if node.attr != '__version__']
    assert not whole & set(owners)


def test_a_circle_is_seen(monkeypatch):
    rooms = {'a': {'b'}, 'b': {'c'}, 'c': {'a'}, 'd': {'a'}}
    monkeypatch.setitem(globals(), 'rooms_of', rooms.__getitem__)
    assert circle('a') == ['a', 'b', 'c', 'a'] and circle('d') == []
