"How the house is written, held by ruff and by tools/style.py."
import subprocess
import sys

import pytest
import style
from conftest import ROOT

FILES = [str(path.relative_to(ROOT)) for path in style.house()]
NOTEBOOKS = [name for name in FILES if name.endswith('.ipynb')]


def test_ruff_is_silent():
    command = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '.']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def test_no_file_is_exempted_from_the_rules():
    "Two reasons only: nbdev's own index, and what is no source."
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    assert 'per-file-ignores' not in text and '\nignore' not in text
    assert 'extend-exclude = ["faceid_nb/_modidx.py", "_proc"]' in text


@pytest.mark.parametrize('name', FILES)
def test_file_keeps_the_rules(name):
    assert list(style.breaches(ROOT/name)) == []


def test_the_pages_as_a_whole():
    found = style.figures([ROOT/name for name in NOTEBOOKS])
    assert found['cells with a line over 100, %'] < 5
    assert int(found['tokens a function'].split(' / ')[1]) < 160


@pytest.mark.parametrize('source, breach', [
    ('a = 1; b = 2', '1 semicolons'),
    ('x'*111, '111 characters'),
    ('x = a if b else c if d else e', 'a conditional inside a conditional'),
    ('f = lambda x: x', 'a lambda with a name'),
    ('[x for y in z for x in y]', 'a comprehension with two fors'),
    ('def f():\n' + '    a(b, c)\n'*80, 'f has'),
    ('#| export\n' + 'a = 1\n'*31, 'an exported cell of 32 lines'),
])
def test_a_breach_is_seen(source, breach):
    assert any(line.startswith(breach) for line in style.cell_breaches(source, True, True))


def test_strings_and_comments_hold_no_statements():
    assert list(style.cell_breaches("a = 'b; c'  # d; e", True, True)) == []
