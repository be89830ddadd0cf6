"Every notebook runs from a restart, on a CPU, without a network, in a bounded time."
import time
import nbformat, pytest
from nbclient import NotebookClient
from conftest import ROOT, environment, notebooks

LIMIT = 420   # seconds for a whole notebook on a slow, busy machine with two cores; they are written for less than 60
FLAGGED = {}  # notebook: number of cells that may say `#| eval: false` (they need a GPU or the official weights)


def flagged(cell): return cell.cell_type == 'code' and any(l.replace(' ', '') == '#|eval:false' for l in cell.source.split('\n'))
def names(): return [str(p.relative_to(ROOT/'nbs')) for p in notebooks()]
def words(cell): return [o.data['text/markdown'] for o in cell.outputs if 'text/markdown' in o.get('data', {})]


@pytest.mark.parametrize('name', names())
def test_runs(project, name, monkeypatch):
    for key, value in environment().items(): monkeypatch.setenv(key, value)
    path = project/'nbs'/name
    nb = nbformat.read(path, 4)
    stored = [words(c) for c in nb.cells if c.cell_type == 'code' and not flagged(c)]
    nb.cells = [c for c in nb.cells if not flagged(c)]
    end = time.monotonic() + LIMIT
    client = NotebookClient(nb, timeout_func=lambda cell: max(1, int(end - time.monotonic())), kernel_name='python3', shutdown_kernel='immediate',   # a polite end frees all memory first: a second a notebook
                            resources={'metadata': {'path': str(path.parent)}})
    client.execute()
    if name == 'index.ipynb':
        made = [words(c) for c in nb.cells if c.cell_type == 'code']
        assert made == stored, 'a table of index.ipynb is out of date: run it again, then tools/make_readme.py'


def test_cells_that_do_not_run_are_listed():
    counts = {name: sum(map(flagged, nbformat.read(ROOT/'nbs'/name, 4).cells)) for name in names()}
    assert {n: c for n, c in counts.items() if c} == FLAGGED
