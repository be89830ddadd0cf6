"Children that run cases: what they report, and what they cannot report themselves, a crash or a hang."
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .child import find

COMMAND = Path(__file__).resolve().parents[1]/'fuzz'
START = 180   # seconds that a child may take before its first case


@dataclass
class Outcome:
    "What became of a case."
    i: int
    kind: str         # of the mutation
    end: str          # 'right', the name of an error of ours, or what went wrong
    seconds: float
    peak: int = 0     # bytes that the process held at most
    fault: str = ''   # the traceback, where it did not end well


class Silent(Exception):
    "A child that said nothing for too long."


class Child:
    "A process that runs the cases first to last."
    def __init__(self, spec, seed, first, last):
        self.log = tempfile.TemporaryFile('w+')
        self.reads, writes = os.pipe()
        command = [sys.executable, str(COMMAND), '_work', spec, *map(str, (seed, first, last, writes))]
        paths = os.pathsep.join(p for p in sys.path if p)
        how = dict(pass_fds=[writes], stdout=self.log, stderr=self.log, start_new_session=True)
        self.process = subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': paths}, **how)
        os.close(writes)
        self.rest = b''
    def read(self, patience):
        "The next report; None where the child ended. Raises Silent."
        end = time.monotonic() + patience
        while b'\n' not in self.rest:
            if not select.select([self.reads], [], [], max(0, end - time.monotonic()))[0]: raise Silent
            more = os.read(self.reads, 1 << 16)
            if not more: return None
            self.rest += more
        line, _, self.rest = self.rest.partition(b'\n')
        return json.loads(line)
    def close(self):
        "End it and whatever it started. Returns how it ended and the last words of its log."
        if self.log.closed: return self.process.returncode, ''
        try: self.process.wait(1)   # behind the end of its reports it is about to end by itself
        except subprocess.TimeoutExpired: pass
        try: os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        os.close(self.reads)
        self.log.seek(0)
        with self.log: return self.process.wait(), self.log.read()[-3000:]


def lost(child, i, kind, seconds, silent):
    "The outcome of the case that a child hung or died in."
    code, log = child.close()
    end = f'no answer for {seconds:.0f} s' if silent else f'the process ended with {code}'
    return Outcome(i, kind, end, seconds, fault=f'{end}\n{log}')


def follow(child, patience, at, last):
    "Outcomes of a child's cases from `at` on; the last one may be that it hung or died."
    kind, began, wait, ready = '?', time.monotonic(), START, False
    while at < last:
        silent, report = False, None
        try: report = child.read(wait)
        except Silent: silent = True
        if report is None:
            outcome = lost(child, at, kind, time.monotonic() - began, silent)
            if not ready: raise RuntimeError(f'no case could begin: {outcome.fault}')
            yield outcome
            return
        ready, kind, began, wait = True, report.get('kind', '?'), time.monotonic(), patience
        if 'end' not in report: continue
        yield Outcome(**report)
        if report['fault']: break
        at, kind, wait = at + 1, '?', START
    child.close()


def outcomes(spec, seed, first, n, minutes=None):
    "Outcomes of n cases, in as many processes as it takes; fewer where the time is over."
    patience, at, last = find(spec).patience, first, first + n
    end = time.monotonic() + 60*minutes if minutes else float('inf')
    while at < last and time.monotonic() < end:
        child = Child(spec, seed, at, last)
        try:
            for outcome in follow(child, patience, at, last):
                at = outcome.i + 1
                yield outcome
                if time.monotonic() > end: break
        finally: child.close()
