"""Downloads: the official names from a server on this machine that speaks the hub's protocol, and
everything that can go wrong on the way."""
import json
import os
import subprocess
import sys

import goldens_build as gold
import pytest
import torch
from conftest import ROOT
from faceid_nb.errors import WeightsMissingError
from faceid_nb.hub import HUB, find_file, find_variant, plain_defaults
from faceid_nb.models import CONFIGS, MODELS, VIT_H
from helpers_archive import archive
from hub_server import Hub
from test_models import single_file

ALONE = ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_TOKEN', 'HF_ENDPOINT', 'HF_HOME')
START = '''
import json, os, sys, resource
from faceid_nb.hub import HUB, find_file
from faceid_nb.models import load
from faceid_nb.errors import FaceIDError
def attempt(f):
    try: return dict(ok=str(f()))
    except FaceIDError as e: return dict(error=type(e).__name__, says=str(e))
'''
END = '\nsys.stdout.flush(); sys.stderr.flush(); os._exit(0)      # torch takes a second to clear up'


def child(code, hub, home, **more):
    "Run code in a fresh process whose hub is the server; what it prints last, as JSON."
    path = os.pathsep.join(map(str, (ROOT/'tests'/'support'/'offline', ROOT)))
    address = hub if isinstance(hub, str) else hub.url
    env = {k: v for k, v in os.environ.items() if k not in ALONE}
    env |= dict(HF_ENDPOINT=address, HF_HOME=str(home), PYTHONPATH=path, HF_HUB_DISABLE_TELEMETRY='1', **more)
    words = [sys.executable, '-c', START + code + END]
    r = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1]), r.stderr


def gets(path, method, end): return method == 'GET' and path.endswith(end)


def blobs(home): return [p for p in home.rglob('blobs/*') if p.is_file()]


@pytest.fixture(scope='module')
def repos(tmp_path_factory):
    f = tmp_path_factory.mktemp('hub')
    (f/'faceid').mkdir()
    for name in gold.SPEC['checkpoints']: gold.write_checkpoint(name, f/'faceid')
    gold.image_encoder().save_pretrained(f/'vit')
    sd, xl = gold.pipeline('sd'), gold.pipeline('sdxl')
    sd.save_pretrained(f/'sd')
    xl.save_pretrained(f/'xl')
    sd.vae.save_pretrained(f/'vae')
    sd15, sdxl = MODELS['sd15-faceid'], MODELS['sdxl-faceid']
    return {HUB: f/'faceid', VIT_H: f/'vit', sd15.base: f/'sd', sd15.vae: f/'vae', sdxl.base: f/'xl'}


@pytest.fixture
def hub(repos):
    with Hub(repos) as h: yield h


ONE = "print(json.dumps(attempt(lambda: find_file('ip-adapter-faceid_sd15.bin', HUB))))"
TWO = '''
calls = ('ip-adapter-faceid_sd99.bin', HUB), ('x.bin', 'nobody/nothing')
print(json.dumps([attempt(lambda: find_file(*call)) for call in calls]))
'''
# the hub's client tries again and again, after longer and longer pauses
HURRY = 'import time; time.sleep = lambda seconds: None\n'


GENERATE = '''
import torch
from faceid_nb.packs import PACK_SUMS
PACK_SUMS.clear()      # the archive holds the tiny pack
def go(name, **more):
    me = load(name, device='cpu')
    me.pipe.set_progress_bar_config(disable=True)
    if me.encoder: more['structure'] = me.encoder.nobody()
    more |= dict(num_samples=2, num_inference_steps=1, width=16, height=16)
    made = me.generate(torch.eye(512)[:1], 'a man', **more)
    kinds = type(me.pipe).__name__, type(me.pipe.scheduler).__name__
    return [me.reader.name, *kinds, me.adapter.variant, len(made)]
print(json.dumps({n: go(n) for n in ('sd15-plusv2', 'sd15-faceid-lora', 'sdxl-plusv2')}))
'''
MADE = {
    'sd15-plusv2': ['buffalo_l', 'StableDiffusionPipeline', 'DDIMScheduler', 'plusv2', 2],
    'sd15-faceid-lora': ['buffalo_l', 'StableDiffusionPipeline', 'DDIMScheduler', 'faceid', 2],
    'sdxl-plusv2': ['buffalo_l', 'StableDiffusionXLPipeline', 'DDIMScheduler', 'plusv2', 2],
}
CHECKPOINTS = {'ip-adapter-faceid-plusv2_sd15.bin', 'ip-adapter-faceid_sd15.bin',
               'ip-adapter-faceid_sd15_lora.safetensors', 'ip-adapter-faceid-plusv2_sdxl.bin',}


@pytest.fixture(scope='module')
def loaded(repos, tmp_path_factory):
    "Three models were loaded: (hub, a function that does it again offline, what was made, what was said)."
    home = tmp_path_factory.mktemp('home')
    with Hub(repos) as hub:
        hub.packs['buffalo_l.zip'] = archive()
        here = dict(HOME=str(home), FACEID_NB_PACK_URL=hub.pack_url)
        made, said = child(GENERATE, hub, home, **here)
        def again():
            return child(GENERATE, hub, home, HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', **here)[0]
        yield hub, again, made, said


def test_names_download_load_and_generate(loaded):
    _, _, made, said = loaded
    assert made == MADE
    assert said.count('non-commercial research only') == 3     # once for the pack, once for each base


def test_the_face_pack_comes_first(loaded):
    paths = [path for _, path, _ in loaded[0].asked]
    assert [p for p in paths if p.startswith('packs')] == ['packs/buffalo_l.zip'] == paths[:1]


def test_nothing_else_is_fetched(loaded):
    fetched = {path.rsplit('/', 1)[1] for method, path, _ in loaded[0].asked if method == 'GET'
               and path.startswith(HUB)}
    assert fetched == CHECKPOINTS


def test_offline_it_comes_from_the_cache(loaded):
    hub, again, made, _ = loaded
    before = len(hub.asked)
    assert again() == made and len(hub.asked) == before


def test_a_single_file_gets_its_configuration_once(hub, repos, tmp_path):
    file = single_file(gold.pipeline('sd'), tmp_path/'mine.safetensors')
    hub.repos = {**repos, CONFIGS[False]: repos[MODELS['sd15-faceid'].base]}
    code = f"""
from faceid_nb.models import load_pipeline
def kind(download): return type(load_pipeline({str(file)!r}, download=download)).__name__
print(json.dumps([attempt(lambda: kind(download)) for download in (False, True, False)]))
"""
    found, _ = child(code, hub, tmp_path)
    assert found[0]['error'] == 'WeightsMissingError' and 'download=False' in found[0]['says']
    assert [f.get('ok') for f in found[1:]] == ['StableDiffusionPipeline']*2
    fetched = [p.split('/', 4)[4] for m, p, _ in hub.asked if m == 'GET' and '/resolve/' in p]
    assert 'unet/config.json' in fetched and len(fetched) == len(set(fetched))         # nothing twice
    assert not [f for f in fetched if f.endswith(('.safetensors', '.bin'))]            # no weights


def test_an_interrupted_transfer_goes_on(hub, tmp_path):
    # the client writes 10 MB at a time
    big = hub.repos[HUB]/'big.bin'
    big.write_bytes(os.urandom(24_000_000))
    cut = [1]
    hub.faults.append(lambda path, method: ('cut',
                                            15_000_000) if gets(path, method,
                                                                'big.bin') and cut and cut.pop() else None)
    code = "print(json.dumps(attempt(lambda: find_file('big.bin', HUB))))"
    try:
        found, _ = child(code, hub, tmp_path)
        if 'error' in found:      # the client gave up: the next call goes on
            assert found['error'] == 'WeightsMissingError' and 'what has arrived is kept' in found['says']
            found, _ = child(code, hub, tmp_path)
        starts = [int(r[6:].split('-')[0]) for m, p, r in hub.asked if m == 'GET' and r]
        assert 'ok' in found and max(starts) >= 10_000_000, hub.asked
        assert [b.read_bytes() for b in blobs(tmp_path)] == [big.read_bytes()]
    finally: big.unlink()


def test_a_damaged_download_is_refused_and_removed(hub, tmp_path):
    wrong = [1]
    hub.faults.append(lambda path, method: ('wrong',) if gets(path, method,
                                                              '.bin') and wrong and wrong.pop() else None)
    found, _ = child(ONE, hub, tmp_path)
    assert found['error'] == 'CheckpointError' and 'SHA-256' in found['says'] and not blobs(tmp_path)
    assert 'ok' in child(ONE, hub, tmp_path)[0]


@pytest.mark.parametrize('fault, says', [(404, 'hub'), (401, 'log in')])
def test_answers_that_are_no_file(hub, tmp_path, fault, says):
    hub.faults.append(lambda path, method: fault if path.endswith('.bin') else None)
    found, _ = child(ONE, hub, tmp_path)
    assert found['error'] == 'WeightsMissingError'
    assert says in found['says']
    assert "load('tiny-faceid')" in found['says']
    assert not blobs(tmp_path)


def test_a_file_that_the_hub_does_not_have(hub, tmp_path):
    found, _ = child(TWO, hub, tmp_path)
    assert all(f['error'] == 'WeightsMissingError' and 'the hub does not have it' in f['says'] for f in found)
    assert not blobs(tmp_path)


def test_a_token_opens_the_door(repos, tmp_path):
    with Hub(repos, token='hf_secret') as hub:
        found, err = child(ONE, hub, tmp_path)
        assert found['error'] == 'WeightsMissingError' and 'HF_TOKEN' in found['says']
        assert 'ok' in child(ONE, hub, tmp_path, HF_TOKEN='hf_secret')[0]


def test_a_full_disk(hub, tmp_path):
    found, _ = child("resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n" + ONE, hub, tmp_path)
    assert found['error'] == 'WeightsMissingError'
    assert 'the disk does not take it' in found['says']
    assert not [b for b in blobs(tmp_path) if not b.name.endswith('.incomplete')]
    assert 'ok' in child(ONE, hub, tmp_path)[0]


def test_no_network(tmp_path):
    found, _ = child(HURRY + ONE, 'http://127.0.0.1:9', tmp_path)
    assert found['error'] == 'WeightsMissingError'
    assert 'cannot be reached' in found['says']
    assert not blobs(tmp_path)


def test_no_place_for_downloads_is_said(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', '~/.cache/huggingface/hub')
    with pytest.raises(WeightsMissingError, match='no place.*HF_HOME'): find_file('a.bin', 'some/repo')


# --- torch's defaults

def test_defaults_are_put_back():
    torch.set_default_dtype(torch.float64)
    try:
        with plain_defaults(): assert torch.zeros(1).dtype == torch.float32
        assert torch.zeros(1).dtype == torch.float64
    finally: torch.set_default_dtype(torch.float32)


@pytest.fixture
def weights(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path/name).parent.mkdir(exist_ok=True)
            (tmp_path/name).touch()
        return tmp_path
    return put


FP16 = 'unet/diffusion_pytorch_model.fp16.safetensors', 'text_encoder/model.fp16.safetensors'
PLAIN = 'unet/diffusion_pytorch_model.safetensors', 'text_encoder/model.bin'


@pytest.mark.parametrize('names, variant', [
    (FP16, 'fp16'), (PLAIN, None), (FP16 + PLAIN, None), (FP16[:1] + PLAIN[1:], 'fp16'), ((), None),
    (('unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors',), 'fp16'),
    (('unet/diffusion_pytorch_model-00001-of-00002.safetensors',), None)], ids=range(7))
def test_weights_of_a_variant(names, variant, weights): assert find_variant(weights(*names)) == variant
