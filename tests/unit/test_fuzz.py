"A slice of tools/fuzz, and that it finds what it looks for. The whole: `tools/fuzz all`."
import sys

import pytest
from conftest import ROOT
from fuzzing import command
from fuzzing.cycles import Cycles
from fuzzing.family import RIGHT
from fuzzing.pictures import Pictures
from fuzzing.watch import outcomes

posix = pytest.mark.skipif(sys.platform != 'linux', reason='memory and processes are read from /proc')
pytestmark = posix


@pytest.fixture(scope='module', params=[('checkpoints', 200), ('pictures', 200), ('downloads', 2)],
                ids=['checkpoints', 'pictures', 'downloads'])
def found(request):
    name, n = request.param
    return list(outcomes(command.FAMILIES[name][0], 7, 0, n)), n


def test_every_case_of_a_slice_ends_well(found):
    assert [(o.i, o.kind, o.end) for o in found[0] if o.fault] == [] and len(found[0]) == found[1]


def test_a_slice_has_right_results_among_its_errors(found):
    assert RIGHT in {o.end for o in found[0]}


def test_cycles_of_attach_and_detach():
    family = Cycles()
    assert {family.draw(i)[1]() for i in range(15)} == {RIGHT}
    family.close()


READERS = [('running_reader', 2, 'code ran'), ('careless_reader', 6, ''),
           ('lenient_reader', 12, 'another picture')]


@pytest.mark.parametrize('reader, n, says', READERS)
def test_a_broken_reader_is_found(reader, n, says):
    found = list(outcomes(f'helpers_fuzz:{reader}', 7, 0, n))
    faults = [o for o in found if o.fault]
    assert faults and any(says in o.end for o in faults)


@pytest.fixture(scope='module')
def deeds(): return {o.i: o for o in outcomes('helpers_fuzz:Misbehaving', 0, 0, 7)}


@pytest.mark.parametrize('i, says', [
    (1, 'the process ended with -11'),
    (2, 'no answer for 2 s'),
    (3, 'GiB of memory'),
    (4, "KeyError: 'raw'"),
    (5, 'Fault: wrong'),
])
def test_what_must_not_happen_is_reported(deeds, i, says): assert says in deeds[i].end and deeds[i].fault


def test_the_cases_behind_it_are_run_all_the_same(deeds):
    assert len(deeds) == 7 and deeds[0].end == deeds[6].end == RIGHT


def test_a_case_is_the_same_again():
    one, two = Pictures(3), Pictures(3)
    assert [one.draw(i)[1].args[0] for i in range(20)] == [two.draw(i)[1].args[0] for i in range(20)]
    for family in (one, two): family.close()


def test_another_seed_is_another_case():
    one, two = Pictures(3), Pictures(4)
    assert [one.draw(i)[1].args[0] for i in range(5)] != [two.draw(i)[1].args[0] for i in range(5)]
    for family in (one, two): family.close()


@pytest.fixture
def misbehaving(monkeypatch):
    monkeypatch.setitem(command.FAMILIES, 'stops', ('helpers_fuzz:Misbehaving', 7, 'deeds'))


def test_the_command_says_how_a_fault_is_repeated(misbehaving, capsys):
    assert command.main(['stops', '--seed', '3', '--first', '4', '--n', '2']) == 1
    assert 'tools/fuzz stops --seed 3 --case 5' in capsys.readouterr().out


def test_the_command_counts(misbehaving, capsys):
    assert command.main(['stops', '--case', '0']) == 0
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith('all')][0]
    assert last.split()[1:5] == ['1', '1', '0', '0']


def test_the_command_is_executable_and_explains_itself(fresh):
    out = fresh(f'''
import runpy, sys
sys.argv = ['fuzz', '--help']
runpy.run_path({str(ROOT/'tools'/'fuzz')!r}, run_name='__main__')
''', check=False).stdout
    assert all(name in out for name in command.FAMILIES) and (ROOT/'tools'/'fuzz').stat().st_mode & 0o111
