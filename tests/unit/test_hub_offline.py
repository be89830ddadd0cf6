"""Without a hub: what is said, what is checked, which device, and libraries that are quiet inside and as
they were outside."""
import errno
import hashlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from faceid_nb import hub
from faceid_nb.errors import CheckpointError, WeightsMissingError
from transformers.utils import logging as transformers_logging


class Answer(Exception):
    "An exception of a client, with the status that it was answered."
    def __init__(self, status): self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize('e, found, do', [
    (Answer(401), 'asks who you are', 'hf auth login'),
    (Answer(403), 'asks who you are', 'https://huggingface.co/a/b'),
    (OSError(errno.ENOSPC, 'No space'), 'the disk does not take it: No space', 'HF_HOME'),
    (ConnectionError('no route'), 'cannot be reached', 'Connect once'),
    (ValueError('odd\nmore'), 'ValueError: odd', 'what has arrived is kept'),
])
def test_each_cause_has_its_remedy(e, found, do):
    error = hub.missing('it', 'a/b', e, looked='the folder does not hold it')
    assert isinstance(error, WeightsMissingError) and found in error.found and do in error.do
    assert error.found.startswith('the folder does not hold it; ') and "load('tiny-faceid')" in error.do


def test_what_may_not_be_downloaded_is_not_blamed_on_the_network():
    error = hub.missing('it', 'a/b', ConnectionError(), download=False)
    assert error.found == 'not in the cache, and download=False' and 'Allow download=True' in error.do


def cached(folder, sent, arrived):
    "A file as the hub's cache keeps it: a link to a blob under the sum of what was sent."
    blob = folder/hashlib.sha256(sent).hexdigest()
    blob.write_bytes(arrived)
    (folder/'model.bin').symlink_to(blob)
    return folder/'model.bin'


def test_a_sum_that_agrees(tmp_path):
    path = cached(tmp_path, b'weights', b'weights')
    assert hub.check_sum(path) == path and path.read_bytes() == b'weights'


def test_a_sum_that_does_not_agree(tmp_path):
    path = cached(tmp_path, b'weights', b'heights')
    with pytest.raises(CheckpointError, match='SHA-256'): hub.check_sum(path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_stored_under_its_sum(tmp_path):
    (tmp_path/'model.bin').write_bytes(b'anything')
    assert hub.check_sum(tmp_path/'model.bin') == tmp_path/'model.bin'


@pytest.mark.parametrize('kind, fast', [
    (dict(amx_bf16=True), True),
    (dict(avx512_bf16=True), True),
    (dict(avx2=True), False),
])
def test_a_cpu_is_asked_for_bfloat16(kind, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: kind, raising=False)
    assert hub.has_bf16() is fast


def state():
    return [(log.is_progress_bar_enabled(), log.get_verbosity())
            for log in (diffusers_logging, transformers_logging)]


@pytest.mark.parametrize('on, notes', [(True, True), (True, False), (False, True)])
def test_quiet_inside_and_as_it_was_outside(on, notes):
    before = state()
    with pytest.raises(KeyboardInterrupt):
        with hub.no_bars(on, notes):
            inside = state()
            raise KeyboardInterrupt
    assert state() == before
    assert [bars for bars, _ in inside] == [b and not on for b, _ in before]
    assert [level for _, level in inside] == [40 if notes else level for _, level in before]


def test_one_at_a_time():
    inside, most = [], []
    @hub.one_at_a_time
    def work(name):
        inside.append(name)
        most.append(len(inside))
        time.sleep(.02)
        inside.remove(name)
    threads = [threading.Thread(target=work, args=(name,)) for name in 'abc']
    for t in threads: t.start()
    for t in threads: t.join(9)
    assert most == [1, 1, 1]
