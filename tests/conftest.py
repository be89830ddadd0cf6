"What all tests share: where things are, an offline environment, and a copy of the project to run notebooks in."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

from hypothesis import settings
settings.register_profile('calm', deadline=None)  # a busy machine is not a bug
settings.load_profile('calm')

ROOT = Path(__file__).parents[1]
OFFLINE = dict(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', DISABLE_TELEMETRY='1', MPLBACKEND='agg',
               TOKENIZERS_PARALLELISM='false')
os.environ.update(OFFLINE)
if 'PYTEST_XDIST_WORKER' in os.environ:   # several workers share the cores: more threads than that wait for each other
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)))))
sys.path.insert(0, str(ROOT/'tests'/'support'/'offline'))
import sitecustomize  # noqa: E402  (here too a connection fails; a machine may have loaded its own sitecustomize)
if not hasattr(sitecustomize, 'connect'):
    import runpy
    runpy.run_path(str(ROOT/'tests'/'support'/'offline'/'sitecustomize.py'))


def notebooks(root=ROOT):
    "Every notebook, in reading order."
    found = [p for p in (root/'nbs').rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(root).parts)]
    return sorted(found, key=lambda p: (len(p.relative_to(root).parts), str(p)))


def modules(root=ROOT):
    "The dotted name of every exported module."
    files = sorted(p.relative_to(root) for p in (root/'faceid_nb').rglob('*.py') if '__pycache__' not in p.parts)
    return ['.'.join(p.with_suffix('').parts).removesuffix('.__init__') for p in files]


def copy_project(to, root=ROOT):
    "Notebooks, settings and modules copied; tests and weights linked: notebooks may write there without touching the checkout."
    to.mkdir(parents=True, exist_ok=True)
    skip = shutil.ignore_patterns('.*', '__pycache__', 'weights', '_proc', '_docs')
    for name in ('nbs', 'faceid_nb'): shutil.copytree(root/name, to/name, ignore=skip)
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'constraints.txt'):
        if (root/name).exists(): shutil.copy(root/name, to/name)
    (to/'tests').symlink_to(root/'tests')
    if (root/'faceid_nb'/'weights').exists(): (to/'faceid_nb'/'weights').symlink_to(root/'faceid_nb'/'weights')
    return to


def environment(**more):
    "Variables of a child process: offline, and this checkout first on the path."
    path = os.pathsep.join([str(ROOT/'tests'/'support'/'offline'), str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return {**os.environ, **OFFLINE, 'PYTHONPATH': path, **more}


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture(scope='session')
def project(tmp_path_factory): return copy_project(tmp_path_factory.mktemp('project')/'copy')


@pytest.fixture
def fresh():
    "Run Python source in a fresh process, offline; returns what it printed."
    def run(source, *args, cwd=ROOT, timeout=120, check=True):
        r = subprocess.run([sys.executable, '-c', source, *map(str, args)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
        if check: assert r.returncode == 0, r.stderr[-3000:]
        return r.stdout if check else r
    return run


def pytest_collection_modifyitems(items):
    "Whole notebooks last: what breaks in a second should be heard first."
    items.sort(key=lambda item: 'test_notebooks' in str(item.path))
