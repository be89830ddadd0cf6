"What all tests share: where things are, an offline environment, a copy of the project to run notebooks in."
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile('calm', deadline=None)  # a busy machine is not a bug
settings.load_profile('calm')

ROOT = Path(__file__).parents[1]
WITHOUT_NETWORK = ROOT/'tests'/'support'/'offline'
OFFLINE = dict(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1',
               DISABLE_TELEMETRY='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false')
COPIED = 'settings.ini setup.py pyproject.toml README.md LICENSE constraints.txt MANIFEST.in'.split()

os.environ.update(OFFLINE)
# several workers share the cores: more threads than that wait for each other
if 'PYTEST_XDIST_WORKER' in os.environ:
    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//workers)))
sys.path.insert(0, str(WITHOUT_NETWORK))
import sitecustomize  # noqa: E402 - here too a connection fails

if not hasattr(sitecustomize, 'connect'):   # the machine had loaded a sitecustomize of its own
    runpy.run_path(str(WITHOUT_NETWORK/'sitecustomize.py'))


def notebooks(root=ROOT):
    "Every notebook, in reading order."
    def hidden(path): return any(part.startswith(('.', '_')) for part in path.relative_to(root).parts)
    found = [path for path in (root/'nbs').rglob('*.ipynb') if not hidden(path)]
    return sorted(found, key=lambda path: (len(path.relative_to(root).parts), str(path)))


def modules(root=ROOT):
    "The dotted name of every exported module."
    paths = [p.relative_to(root) for p in (root/'faceid_nb').rglob('*.py') if '__pycache__' not in p.parts]
    return ['.'.join(path.with_suffix('').parts).removesuffix('.__init__') for path in sorted(paths)]


def copy_project(to, root=ROOT):
    "Notebooks, settings and modules copied, tests and weights linked: a notebook may write there."
    to.mkdir(parents=True, exist_ok=True)
    skip = shutil.ignore_patterns('.*', '__pycache__', 'weights', '_proc', '_docs')
    for name in ('nbs', 'faceid_nb'): shutil.copytree(root/name, to/name, ignore=skip)
    for name in COPIED:
        if (root/name).exists(): shutil.copy(root/name, to/name)
    (to/'tests').symlink_to(root/'tests')
    weights = root/'faceid_nb'/'weights'
    if weights.exists(): (to/'faceid_nb'/'weights').symlink_to(weights)
    return to


def environment(**more):
    "Variables of a child process: offline, and this checkout first on the path."
    path = [str(WITHOUT_NETWORK), str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, **OFFLINE, 'PYTHONPATH': os.pathsep.join(path), **more}


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture(scope='session')
def project(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('project')/'copy')


@pytest.fixture
def fresh():
    "Run Python source in a fresh process, offline; returns what it printed."
    def run(source, *arguments, cwd=ROOT, timeout=120, check=True):
        command = [sys.executable, '-c', source, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment(), timeout=timeout, capture_output=True,
                              text=True)
        if check: assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout if check else done
    return run


def pytest_collection_modifyitems(items):
    "Whole notebooks last: what breaks in a second should be heard first."
    items.sort(key=lambda item: 'test_notebooks' in str(item.path))
