"The process that runs cases, one line of JSON for each beginning and each end."
import faulthandler
import importlib
import json
import os
import resource
import sys
import time
import traceback

ROOM = 4 << 30   # address space beyond what is there at first: what asks for more gets a MemoryError


def find(spec):
    "A family by 'module:Class'."
    module, _, name = spec.partition(':')
    return getattr(importlib.import_module(module), name)


def status(key):
    "A line of /proc/self/status in bytes; 0 where there is none."
    try:
        with open('/proc/self/status') as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f'{key}:'))
    except (OSError, StopIteration): return 0


def forget_peak():
    "From here the peak of memory is counted anew."
    try:
        with open('/proc/self/clear_refs', 'w') as file: file.write('5')
    except OSError: pass


def limit():
    "No core files, no file over a gigabyte, and no more address space than ROOM."
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    size = status('VmSize')
    if size: resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))


def run_case(family, i):
    "Generator: what case i is, then how it ended."
    kind, act = family.draw(i)
    yield dict(i=i, kind=kind)
    forget_peak()
    began, fault = time.perf_counter(), ''
    try: end = act()
    except BaseException as error:
        end, fault = f'{type(error).__name__}: {str(error)[:200]}', traceback.format_exc()
    seconds, peak = time.perf_counter() - began, status('VmHWM')
    if family.memory and peak > family.memory and not fault:
        end = fault = f'{peak/2**30:.1f} GiB of memory'
    yield dict(i=i, kind=kind, end=end, seconds=seconds, peak=peak, fault=fault)


def work(spec, seed, first, last, out):
    "Run the cases first to last; `out` is an open text file."
    faulthandler.enable()
    family = find(spec)(seed)
    def say(**what): print(json.dumps(what), file=out, flush=True)
    if family.memory: limit()
    say(ready=True)
    try:
        for i in range(first, last):
            for report in run_case(family, i): say(**report)
            if report["fault"]: break   # the next case begins in a fresh process
    finally: family.close()


def main(argv):
    spec, seed, first, last, fd = argv
    with os.fdopen(int(fd), 'w') as out: work(spec, int(seed), int(first), int(last), out)
    sys.stdout.flush()
    os._exit(0)   # torch takes a second to clear up
