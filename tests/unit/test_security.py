"What a checkpoint, a library or a command may not do behind a user's back."
import ast
import re

import pytest
from conftest import ROOT, modules
from packaging.requirements import Requirement
from packaging.version import Version

MODULES = [name for name in modules() if (ROOT/(name.replace('.', '/') + '.py')).exists()]
UNPICKLERS = {'pickle', 'cPickle', 'dill', 'joblib', 'cloudpickle', 'shelve', 'marshal'}


def tree_of(name):
    return ast.parse((ROOT/(name.replace('.', '/') + '.py')).read_text(encoding='utf-8'))


def calls(tree, owner, attribute):
    "Calls of `owner.attribute(...)`."
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute): continue
        if node.func.attr == attribute and getattr(node.func.value, 'id', '') == owner: yield node


def keyword(call, name):
    return next((k.value for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize('name', MODULES)
def test_torch_load_takes_weights_only(name):
    for call in calls(tree_of(name), 'torch', 'load'):
        value = keyword(call, 'weights_only')
        assert isinstance(value, ast.Constant) and value.value is True, f'line {call.lineno}'


@pytest.mark.parametrize('name', MODULES)
def test_numpy_load_takes_no_pickle(name):
    for call in calls(tree_of(name), 'np', 'load'):
        value = keyword(call, 'allow_pickle')
        assert value is None or value.value is False, f'line {call.lineno}'


@pytest.mark.parametrize('name', MODULES)
def test_nothing_unpickles(name):
    for node in ast.walk(tree_of(name)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom): names = [node.module or '']
        assert not {n.split('.')[0] for n in names} & UNPICKLERS


def test_torch_is_new_enough_for_weights_only():
    "Below 2.10 `weights_only=True` could be made to run code (CVE-2025-32434, CVE-2026-24747)."
    settings = (ROOT/'settings.ini').read_text(encoding='utf-8')
    wanted = [Requirement(r) for r in re.search(r'^requirements = (.+)$', settings, flags=re.M)[1].split()]
    torch = next(r for r in wanted if r.name == 'torch')
    assert not any(torch.specifier.contains(v) for v in ('2.4.0', '2.5.1', '2.9.1'))
    assert torch.specifier.contains('2.10.0')
    import torch as installed
    assert Version(installed.__version__).release >= (2, 10)


WATCHED = '''
import os, socket, sys, tempfile
from pathlib import Path
home = Path(os.environ['HOME'])
asked = []
def watch(event, arguments):
    if event == 'socket.connect': asked.append(arguments[1])
    if event == 'socket.getaddrinfo': asked.append(arguments[0])
sys.addaudithook(watch)
'''


def strangers(asked):
    local = ('127.', '::1', 'localhost', '/')
    return [a for a in asked if not str(a[0] if isinstance(a, tuple) else a).startswith(local)]


@pytest.mark.parametrize('what', ["""
from faceid_nb.face import FaceReader
from faceid_nb.tiny.people import render, sample_people
FaceReader('tiny').best(render(sample_people(1, 3), seed=1, size=256)[0].image)
""", """
from faceid_nb.cli import main
main(['doctor'])
"""], ids=['reading a face', 'doctor'])
def test_no_word_goes_out_and_no_file_appears(fresh, tmp_path, monkeypatch, what):
    "ONNX Runtime's official wheels report home unless they are told not to before they are imported."
    for name in ('HOME', 'XDG_CACHE_HOME', 'XDG_CONFIG_HOME', 'XDG_DATA_HOME', 'TMPDIR'):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv('ORT_DISABLE_TELEMETRY', raising=False)
    out = fresh(WATCHED + what + '''
import onnxruntime
print('\\nasked:', asked)
print('telemetry off:', os.environ.get('ORT_DISABLE_TELEMETRY'))
''', cwd=tmp_path)
    said = dict(line.split(': ', 1) for line in out.splitlines() if line.startswith(('asked', 'telemetry')))
    assert strangers(ast.literal_eval(said['asked'])) == []
    assert said['telemetry off'] == '1'
    assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


DOORS = ['faceid_nb.face', 'faceid_nb.doctor', 'faceid_nb.measure', 'faceid_nb.models']


@pytest.mark.parametrize('door', DOORS)
def test_telemetry_is_off_before_onnxruntime_is_imported(fresh, monkeypatch, door):
    monkeypatch.delenv('ORT_DISABLE_TELEMETRY', raising=False)
    out = fresh(f'''
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ('onnxruntime', 'insightface'): print(name, os.environ.get('ORT_DISABLE_TELEMETRY'))
sys.meta_path.insert(0, Watch())
import {door}
import onnxruntime
''')
    assert out.splitlines()[0].split()[1] == '1'
