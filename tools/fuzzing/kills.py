"kill -9 at random moments: nothing finished is lost, nothing is done twice wrong, the next run goes on."
import contextlib
import json
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .family import RIGHT, Family, Fault

ROOT = Path(__file__).resolve().parents[2]


class Forked:
    "A copy of this process that runs `work(say)`; what it says arrives as lines of JSON."
    def __init__(self, work):
        self.reads, writes = os.pipe()
        self.pid = os.fork()
        if not self.pid: self.be_child(work, writes)
        os.close(writes)
    def be_child(self, work, writes):
        out, code = os.fdopen(writes, 'w'), 0
        try: work(lambda what: print(json.dumps(what), file=out, flush=True))
        except BaseException:
            traceback.print_exc()
            code = 1
        out.flush()
        os._exit(code)
    def wait(self, seconds):
        "Let it run so long at most. Returns whether it ended."
        return bool(wait_for_end(self.reads, seconds))
    def kill(self):
        with contextlib.suppress(ProcessLookupError): os.kill(self.pid, signal.SIGKILL)
    def close(self, patience=100):
        "(what it said, its exit status), after its end. Raises Fault where it does not end."
        said = read_to_end(self.reads, patience)
        if said is None: self.kill()
        _, status = os.waitpid(self.pid, 0)
        if said is None: raise Fault(f'it did not end in {patience} s')
        # the last line may be cut off by the kill
        lines = said.decode().split('\n')[:-1]
        return [json.loads(line) for line in lines], status


def wait_for_end(reads, seconds):
    "Whether a pipe is closed within so many seconds; what is in it stays there."
    end = time.monotonic() + seconds
    poll = select.poll()
    poll.register(reads, select.POLLHUP)
    while (left := end - time.monotonic()) > 0:
        if any(event & select.POLLHUP for _, event in poll.poll(1000*left)): return True
    return False


def read_to_end(reads, patience):
    "All that is in a pipe; None where it is not closed in time."
    end, said = time.monotonic() + patience, b''
    while select.select([reads], [], [], max(0, end - time.monotonic()))[0]:
        more = os.read(reads, 1 << 16)
        if not more:
            os.close(reads)
            return said
        said += more
    os.close(reads)
    return None


def run_and_kill(work, seconds):
    "What a process said that was killed after so many seconds, unless it was through."
    process = Forked(work)
    process.wait(seconds)
    process.kill()
    return process.close()[0]


def finish(work):
    "What a process said that ran to its end. Raises Fault where it failed."
    said, status = Forked(work).close()
    if status: raise Fault(f'the next run failed: status {status}')
    return said


class Kills(Family):
    patience, memory = 150, None

    def moment(self, rng):
        "When to kill: somewhere in a whole run."
        return rng.uniform(0, 1.05*self.whole)

    def place(self, i):
        folder = self.folder/str(i)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def draw(self, i):
        rng = self.random(i)
        return self.kind, partial(self.killed, self.place(i), rng)

    def pictures_of(self, cells): return self.helpers.arrays(self.helpers.in_order(cells))

    def killed(self, folder, rng):
        try: self.one(folder, self.moment(rng))
        finally: shutil.rmtree(folder, ignore_errors=True)
        return RIGHT


class Sweeps(Kills):
    "A sweep with a model that costs nothing, so that most of its time is writing."
    n, kind, cells = 50, 'sweep', 24

    def __init__(self, seed=0):
        super().__init__(seed)
        import helpers_sweep
        self.helpers = helpers_sweep
        began = time.perf_counter()
        finish(partial(self.work, self.place('warm')))
        self.whole = time.perf_counter() - began
        self.clean = self.pictures_of(self.work(self.place('clean'), lambda key: None))

    def sweep(self, model): return self.helpers.fast_sweep(dict(seed=range(self.cells)), model)

    def work(self, folder, say):
        made = []
        for cell in self.sweep(self.helpers.FakeModel(pause=.01)).run(folder, batch_size=3, progress=False):
            made.append(cell)
            say(cell.key)
        return made

    def one(self, folder, moment):
        said = run_and_kill(partial(self.work, folder), moment)
        there = self.rows_of(folder)
        if not set(said) <= there: raise Fault(f'{len(set(said) - there)} finished cells were lost')
        for file in self.helpers.pictures(folder): Image.open(file).load()
        model = self.helpers.FakeModel()
        made = self.helpers.run(self.sweep(model), folder)
        if {c.key for c in made if c.kept} != there: raise Fault('other cells were kept than were there')
        made_again = sum(model.sizes)
        if made_again != self.cells - len(there): raise Fault(f'{made_again} cells were made again')
        counts = len(made), len(self.rows_of(folder)), len(self.helpers.pictures(folder))
        if set(counts) != {self.cells}: raise Fault(f'cells, rows, pictures: {counts}')
        if not np.array_equal(self.pictures_of(made), self.clean): raise Fault('another picture')

    def rows_of(self, folder):
        "The keys of the table; none where it was not made yet."
        if not (folder/'cells.sqlite').exists(): return set()
        with contextlib.closing(sqlite3.connect(folder/'cells.sqlite')) as db:
            if not db.execute("SELECT name FROM sqlite_master WHERE name = 'cells'").fetchall(): return set()
            return {row[0] for row in db.execute('SELECT key FROM cells')}


class Trainings(Kills):
    "A short training that saves after each step."
    n, kind, steps = 20, 'training', 12
    file = 'ip-adapter-faceid_sd15.safetensors'

    def __init__(self, seed=0):
        super().__init__(seed)
        import helpers_pack
        import helpers_train
        import torch
        torch.set_num_threads(1)
        self.train, self.pipe = helpers_train, helpers_pack.pipeline()
        self.table = helpers_train.latent_table(self.pipe)
        folder, began = self.place('clean'), time.perf_counter()
        finish(partial(self.work, folder))
        self.whole, self.clean = time.perf_counter() - began, self.adapter_in(folder)

    def work(self, folder, say):
        how = dict(self.train.SMALL, steps=self.steps, save_every=0, resume=True, gauge_every=1000)
        with self.train.quietly():
            for figures in self.train.train(self.pipe, self.table, folder, **how): say(figures['step'])

    def adapter_in(self, folder):
        from safetensors.torch import load_file
        return load_file(folder/self.file)

    def one(self, folder, moment):
        said = run_and_kill(partial(self.work, folder), moment)
        again = finish(partial(self.work, folder))
        # a step is told before it is saved: the one before it was
        if said and again[0] < said[-1]: raise Fault(f'after step {said[-1]} it went on with {again[0]}')
        if again[-1] != self.steps: raise Fault(f'it ended at step {again[-1]}')
        made = self.adapter_in(folder)
        same = made.keys() == self.clean.keys() and all(made[k].equal(t) for k, t in self.clean.items())
        if not same: raise Fault('another adapter than without the kill')
        lines = (folder/'log.jsonl').read_text().splitlines()
        noted = {json.loads(line)['step'] for line in lines}
        if noted != set(range(1, self.steps + 1)): raise Fault('the log has gaps')


DOWNLOAD = '''
import os, sys, time
if {pack}:
    from faceid_nb import packs
    packs.PACK_SUMS.clear()
    import insightface.utils.storage, requests
    print('go', flush=True)
    print(packs.download_pack('buffalo_l', {folder!r}), flush=True)
else:
    import huggingface_hub
    from faceid_nb.hub import find_file
    print('go', flush=True)
    print(find_file('weights.bin', 'a/b', cache_dir={folder!r}), flush=True)
os._exit(0)
'''


ONLINE = 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_TOKEN'   # what a download must not see


class Downloads(Kills):
    "A checkpoint from the hub, or a face pack, from a slow server on this machine."
    n, pause = 20, .004

    def __init__(self, seed=0):
        super().__init__(seed)
        from helpers_archive import archive
        from hub_server import Hub
        repo = self.folder/'repo'
        repo.mkdir()
        self.data = np.random.default_rng(0).bytes(3 << 20)
        (repo/'weights.bin').write_bytes(self.data)
        self.hub = Hub({'a/b': repo})
        self.hub.packs['buffalo_l.zip'] = archive()
        self.hub.faults.append(self.slow)
        self.whole = .6

    def slow(self, path, method): return ('slow', self.pause) if method == 'GET' else None

    def draw(self, i):
        rng = self.random(i)
        self.kind = rng.choice(['download', 'download', 'face pack'])
        return self.kind, partial(self.killed, self.place(i), rng)

    def start(self, folder):
        code = DOWNLOAD.format(pack=self.kind == 'face pack', folder=str(folder))
        address = dict(HF_ENDPOINT=self.hub.url, FACEID_NB_PACK_URL=self.hub.pack_url)
        env = {k: v for k, v in os.environ.items() if k not in ONLINE}
        env |= address | dict(HF_HOME=str(folder/'hf'), PYTHONPATH=str(ROOT), HF_HUB_DISABLE_TELEMETRY='1')
        how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        process = subprocess.Popen([sys.executable, '-c', code], **how)
        if process.stdout.readline() != 'go\n': raise Fault(process.communicate()[1][-1500:])
        return process

    def one(self, folder, moment):
        process = self.start(folder)
        with contextlib.suppress(subprocess.TimeoutExpired): process.wait(moment)
        process.kill()
        process.communicate()
        self.check_whole(folder, 'after the kill')
        process = self.start(folder)
        out, errors = process.communicate(timeout=100)
        if process.returncode: raise Fault(f'the next run failed: {errors[-1500:]}')
        if not self.check_whole(folder, 'after the next run'): raise Fault(f'nothing has arrived: {out}')

    def check_whole(self, folder, when):
        "Whether it is there; raises Fault where half of it is."
        if self.kind == 'face pack': return self.check_networks(folder, when)
        there = [f for f in folder.rglob('snapshots/*/weights.bin')]
        for file in there:
            if file.read_bytes() != self.data: raise Fault(f'half a file {when}')
        return there

    def check_networks(self, folder, when):
        "A pack lies in HOME: its folder is there with all networks, or not at all."
        there = [f for f in folder.rglob('*/buffalo_l') if f.is_dir()]
        for pack in there:
            if len(list(pack.glob('*.onnx'))) < 2: raise Fault(f'half a pack {when}')
        return there

    def close(self):
        self.hub.close()
        super().close()


class Workers(Kills):
    "A sweep on two Dask workers, one of which is killed."
    n, kind = 10, 'Dask worker'

    def __init__(self, seed=0):
        super().__init__(seed)
        import distributed
        import helpers_sweep
        from faceid_nb.sweep import Sweep
        from faceid_nb.tiny.people import render, sample_people
        self.helpers, self.Sweep = helpers_sweep, Sweep
        self.face = render(sample_people(1, 3), seed=1, size=128)[0].image
        how = dict(threads_per_worker=1, processes=True, dashboard_address=None)
        how |= dict(host='127.0.0.1', silence_logs=50)
        self.cluster = distributed.LocalCluster(2, **how)
        self.client = distributed.Client(self.cluster)
        self.clean = self.pictures_of(helpers_sweep.run(self.sweep(), self.place('clean')))
        began = time.perf_counter()
        for _ in range(2): helpers_sweep.run(self.sweep(), self.place('warm'), **self.there())
        self.whole = (time.perf_counter() - began)/2

    def sweep(self):
        axes = dict(seed=range(8))
        fixed = dict(face=self.face, prompt='photo of a person', num_inference_steps=3)
        return self.Sweep('tiny-faceid', axes, fixed, load=dict(device='cpu'))

    def there(self): return dict(executor=self.client.get_executor(), batch_size=1)

    def one(self, folder, moment):
        timer = threading.Timer(moment, os.kill, (self.workers()[0], signal.SIGKILL))
        timer.start()
        made = self.helpers.run(self.sweep(), folder, **self.there())
        timer.join()
        if {c.state for c in made} != {'done'}: raise Fault([c.error for c in made if c.error][0])
        keys = {c.key for c in made}
        files = self.helpers.pictures(folder)
        if not len(made) == len(keys) == len(files) == 8: raise Fault(f'{len(made)} cells')
        worst = abs(self.pictures_of(made) - self.clean).max()
        if worst > 2: raise Fault(f'another picture: {worst}')

    def workers(self):
        "The processes of both workers, once the one that was killed last has been replaced."
        end = time.monotonic() + 60
        while time.monotonic() < end:
            self.client.wait_for_workers(2, timeout=60)
            # the scheduler may not have noticed yet that one is dead
            try: pids = sorted(self.client.run(os.getpid).values())
            except OSError: pids = []
            if len(pids) == 2: return pids
            time.sleep(.2)
        raise Fault('no second worker came')

    def close(self):
        self.client.close()
        self.cluster.close()
        super().close()
