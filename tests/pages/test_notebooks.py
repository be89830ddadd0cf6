"Every notebook runs from a restart, on a CPU, without a network, in a bounded time."
import time

import nbformat
import pytest
from conftest import ROOT, environment, notebooks
from nbclient import NotebookClient

LIMIT = 420   # seconds for a notebook on a slow, busy machine; they are written for less than 60
# notebook: number of cells that may say `#| eval: false` (they need a GPU or the official weights)
FLAGGED = {}
NAMES = [str(path.relative_to(ROOT/'nbs')) for path in notebooks()]


def is_flagged(cell):
    lines = [line.replace(' ', '') for line in cell.source.split('\n')]
    return cell.cell_type == 'code' and '#|eval:false' in lines


def tables(nb):
    "The Markdown that code cells show."
    outputs = [cell.outputs for cell in nb.cells if cell.cell_type == 'code' and not is_flagged(cell)]
    return [[o.data['text/markdown'] for o in shown if 'text/markdown' in o.get('data', {})]
            for shown in outputs]


def execute(nb, folder):
    "Run all cells that are not flagged, within `LIMIT`."
    end = time.monotonic() + LIMIT
    client = NotebookClient(
        nb, timeout_func=lambda cell: max(1, int(end - time.monotonic())), kernel_name='python3',
        shutdown_kernel='immediate',   # a polite end frees all memory first: a second a notebook
        resources={'metadata': {'path': str(folder)}})
    client.execute()


@pytest.mark.parametrize('name', NAMES)
def test_runs(project, name, monkeypatch):
    for key, value in environment().items(): monkeypatch.setenv(key, value)
    path = project/'nbs'/name
    nb = nbformat.read(path, 4)
    stored = tables(nb)
    nb.cells = [cell for cell in nb.cells if not is_flagged(cell)]
    execute(nb, path.parent)
    if name == 'index.ipynb':
        assert tables(nb) == stored, 'a table is out of date: run index.ipynb, then tools/make_readme.py'


def test_cells_that_do_not_run_are_listed():
    counts = {name: sum(map(is_flagged, nbformat.read(ROOT/'nbs'/name, 4).cells)) for name in NAMES}
    assert {name: count for name, count in counts.items() if count} == FLAGGED
