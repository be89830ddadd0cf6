"JavaScript and CSS: named by path, in the wheel and in the source archive."
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, environment

from faceid_nb import widgets
from faceid_nb.widgets import STATIC

FILES = sorted(path.name for path in STATIC.iterdir())
WIDGETS = [widgets.Tile, widgets.Drop, widgets.Code, widgets.Styles]
PACKING = 'setup.py settings.ini pyproject.toml MANIFEST.in README.md LICENSE constraints.txt'.split()


@pytest.fixture(scope='module')
def light(tmp_path_factory):
    "The project without weights and with one page: enough to be packed."
    copy = tmp_path_factory.mktemp('light')
    for name in PACKING: shutil.copy(ROOT/name, copy/name)
    heavy = shutil.ignore_patterns('weights', '__pycache__')
    shutil.copytree(ROOT/'faceid_nb', copy/'faceid_nb', ignore=heavy)
    (copy/'nbs').mkdir()
    shutil.copy(ROOT/'nbs'/'studio'/'42_widgets.ipynb', copy/'nbs')
    return copy


def packed(folder, kind):
    "Build a wheel or an sdist by setuptools: the path of the archive."
    source = f'from setuptools.build_meta import build_{kind}; print(build_{kind}("dist"))'
    run = subprocess.run([sys.executable, '-c', source], cwd=folder, env=environment(), capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder/'dist'/run.stdout.split()[-1]


def test_there_are_such_files():
    assert {'tile.js', 'tile.css', 'drop.js', 'drop.css', 'code.js', 'code.css', 'board.css'} <= set(FILES)


def test_they_are_in_the_wheel(light):
    with zipfile.ZipFile(packed(light, 'wheel')) as wheel: names = set(wheel.namelist())
    assert {f'faceid_nb/static/{name}' for name in FILES} <= names


def test_they_are_in_the_source_archive(light):
    with tarfile.open(packed(light, 'sdist')) as archive: paths = archive.getnames()
    names = {path.partition('/')[2] for path in paths}
    assert {f'faceid_nb/static/{name}' for name in FILES} <= names


@pytest.mark.parametrize('kind', WIDGETS)
def test_a_widget_reads_its_files(kind):
    widget = kind(print) if kind is widgets.Drop else kind()
    stem = 'board' if kind is widgets.Styles else kind.__name__.lower()
    assert str(widget._esm) == (STATIC/f'{stem}.js').read_text(encoding='utf-8')
    assert str(widget._css) == (STATIC/f'{stem}.css').read_text(encoding='utf-8')
    widgets.close_all(widget)


@pytest.mark.parametrize('module', ['widgets', 'panels', 'dashboard'])
def test_no_style_stands_in_html(module):
    source = (ROOT/'faceid_nb'/f'{module}.py').read_text(encoding='utf-8')
    assert not re.search(r'<[a-z]+[^>\n]*\bstyle=|<style', source)


@pytest.mark.parametrize('name', [name for name in FILES if name.endswith('.css')])
def test_every_rule_is_ours(name):
    "A rule of ours must not reach what is not ours."
    text = re.sub(r'/\*.*?\*/', '', (STATIC/name).read_text(encoding='utf-8'), flags=re.S)
    selectors = re.findall(r'([^{}]+)\{', text)
    every = ','.join(selectors).split(',')
    assert selectors and all('.faceid-' in selector for selector in every)
