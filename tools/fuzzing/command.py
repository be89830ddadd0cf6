"The command: `tools/fuzz FAMILY` runs its cases, prints what is at fault and a table."
import argparse
import statistics
import sys
import time
from collections import Counter

from . import child
from .family import RIGHT
from .watch import outcomes

FAMILIES = {   # name: (family, cases of a whole run, what they are)
    'checkpoints': ('fuzzing.checkpoints:Checkpoints', 10_000, 'changed checkpoints, LoRA files, trainings'),
    'pictures': ('fuzzing.pictures:Pictures', 5000, 'JPEG, PNG, WebP, TIFF, BMP and GIF files, changed'),
    'sweeps': ('fuzzing.kills:Sweeps', 50, 'kill -9 in a sweep'),
    'trainings': ('fuzzing.kills:Trainings', 20, 'kill -9 in a training'),
    'downloads': ('fuzzing.kills:Downloads', 20, 'kill -9 in a download'),
    'workers': ('fuzzing.kills:Workers', 10, 'kill -9 of a Dask worker'),
    'cycles': ('fuzzing.cycles:Cycles', 1000, 'attach, condition, detach'),
    'stops': ('fuzzing.stops:Stops', 200, 'stop pressed in a generation'),
}
GROUPS = dict(kills=['sweeps', 'trainings', 'downloads', 'workers'], all=list(FAMILIES))


def parser():
    about = 'Hostile and broken input: each case ends right, in an error of faceid_nb, or is a fault.'
    names = '\n'.join(f'  {name:12} {what} ({n:,})' for name, (_, n, what) in FAMILIES.items())
    names += '\n  kills        the four of them that kill\n  all          everything'
    how = dict(epilog=f'families:\n{names}', formatter_class=argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser('tools/fuzz', description=about, **how)
    p.add_argument('family', choices=[*FAMILIES, *GROUPS], metavar='FAMILY')
    p.add_argument('--n', type=int, help='cases; the number in brackets by default')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--first', type=int, default=0, metavar='INDEX', help='the first case')
    p.add_argument('--case', type=int, metavar='INDEX', help='this one alone: a fault is repeated so')
    p.add_argument('--minutes', type=float, help='at most, for each family')
    return p


def tell(name, seed, outcome):
    "A fault, and how it is repeated."
    print(f'\nFAULT in {outcome.kind}: {outcome.end}')
    print(f'  tools/fuzz {name} --seed {seed} --case {outcome.i}')
    for line in outcome.fault.strip().splitlines()[-12:]: print(f'  | {line}')
    print(flush=True)


def row(name, found):
    "A row of the table."
    ends = Counter(o.end for o in found if not o.fault)
    seconds = [o.seconds for o in found] or [0]
    peak = max([o.peak for o in found], default=0)/2**30
    refused = sum(n for end, n in ends.items() if end != RIGHT)
    counts = f'{len(found):7,} {ends[RIGHT]:7,} {refused:8,} {sum(bool(o.fault) for o in found):7,}'
    return f'{name:24} {counts} {statistics.median(seconds):9.3f} {max(seconds):8.2f} {peak:6.2f}'


def table(found):
    "Counts and seconds of a family, by kind and in all."
    titles = zip(('cases', 'right', 'refused', 'faults', 'median s', 'most s', 'GiB'), (7, 7, 8, 7, 9, 8, 6))
    lines = [' '.join(['', *(f'{title:>{width}}' for title, width in titles)]).rjust(83)]
    for kind in sorted({o.kind for o in found}): lines.append(row(kind, [o for o in found if o.kind == kind]))
    lines.append(row('all', found))
    errors = Counter(o.end for o in found if not o.fault and o.end != RIGHT)
    if errors: lines.append('refused by ' + ', '.join(f'{name} {n:,}' for name, n in errors.most_common()))
    return '\n'.join(lines)


def run(name, args):
    "One family: its outcomes."
    spec, whole, what = FAMILIES[name]
    first, n = args.first, whole if args.n is None else args.n
    if args.case is not None: first, n = args.case, 1
    print(f'{name}: {what}; seed {args.seed}, cases {first} to {first + n - 1}', flush=True)
    began, found = time.monotonic(), []
    for outcome in outcomes(spec, args.seed, first, n, args.minutes):
        found.append(outcome)
        if outcome.fault: tell(name, args.seed, outcome)
    print(table(found))
    print(f'{time.monotonic() - began:.0f} s\n', flush=True)
    return found


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['_work']: return child.main(argv[1:])
    args = parser().parse_args(argv)
    names, faults = GROUPS.get(args.family, [args.family]), 0
    for name in names: faults += sum(bool(o.fault) for o in run(name, args))
    return int(bool(faults))
