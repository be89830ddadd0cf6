"Downloads: the official names from a server on this machine that speaks the hub's protocol, and everything that can go wrong on the way."
import json, os, subprocess, sys
import pytest
import goldens_build as gold
from conftest import ROOT
from hub_server import Hub
from faceid_nb.models import HUB, MODELS, VIT_H

ALONE = ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_TOKEN', 'HF_ENDPOINT', 'HF_HOME')
START = '''
import json, os, sys, resource
import faceid_nb.face
class Reader:
    name = 'buffalo_l'
    def __init__(self, *a, **k): pass
faceid_nb.face.FaceReader = Reader
from faceid_nb.models import load, find_file, HUB
from faceid_nb.errors import FaceIDError
def attempt(f):
    try: return dict(ok=str(f()))
    except FaceIDError as e: return dict(error=type(e).__name__, says=str(e))
'''


def child(code, hub, home, **more):
    "Run code in a fresh process whose hub is the server; what it prints last, as JSON."
    env = {k: v for k, v in os.environ.items() if k not in ALONE} | dict(HF_ENDPOINT=hub if isinstance(hub, str) else hub.url, HF_HOME=str(home), PYTHONPATH=f"{ROOT/'tests'/'offline'}{os.pathsep}{ROOT}", HF_HUB_DISABLE_TELEMETRY='1', **more)
    r = subprocess.run([sys.executable, '-c', START + code], env=env, capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1]), r.stderr


def blobs(home): return [p for p in home.rglob('blobs/*') if p.is_file()]


@pytest.fixture(scope='module')
def repos(tmp_path_factory):
    f = tmp_path_factory.mktemp('hub'); (f/'faceid').mkdir()
    for name in gold.SPEC['checkpoints']: gold.write_checkpoint(name, f/'faceid')
    gold.image_encoder().save_pretrained(f/'vit'); sd, xl = gold.pipeline('sd'), gold.pipeline('sdxl')
    sd.save_pretrained(f/'sd'); xl.save_pretrained(f/'xl'); sd.vae.save_pretrained(f/'vae')
    return {HUB: f/'faceid', VIT_H: f/'vit', MODELS['sd15-faceid'].base: f/'sd', MODELS['sdxl-faceid'].base: f/'xl', MODELS['sd15-faceid'].vae: f/'vae'}


@pytest.fixture
def hub(repos):
    with Hub(repos) as h: yield h


ONE = "print(json.dumps(attempt(lambda: find_file('ip-adapter-faceid_sd15.bin', HUB))))"


def test_names_download_load_and_generate(hub, tmp_path):
    code = '''
import torch
def go(name, **kw):
    me = load(name, device='cpu'); me.pipe.set_progress_bar_config(disable=True)
    if me.encoder: kw['structure'] = me.encoder.nobody()
    return [type(me.pipe).__name__, type(me.pipe.scheduler).__name__, me.adapter.variant, len(me.generate(torch.eye(512)[:1], 'a man', num_samples=2, num_inference_steps=1, width=16, height=16, **kw))]
print(json.dumps({n: go(n) for n in ('sd15-plusv2', 'sd15-faceid-lora', 'sdxl-plusv2')}))
'''
    found, err = child(code, hub, tmp_path)
    assert found == {'sd15-plusv2': ['StableDiffusionPipeline', 'DDIMScheduler', 'plusv2', 2], 'sd15-faceid-lora': ['StableDiffusionPipeline', 'DDIMScheduler', 'faceid', 2], 'sdxl-plusv2': ['StableDiffusionXLPipeline', 'DDIMScheduler', 'plusv2', 2]}
    assert err.count('non-commercial research only') == 2     # once for each base
    fetched = {p for m, p, _ in hub.asked if m == 'GET' and p.startswith(HUB)}
    assert {p.rsplit('/', 1)[1] for p in fetched} == {'ip-adapter-faceid-plusv2_sd15.bin', 'ip-adapter-faceid_sd15.bin', 'ip-adapter-faceid_sd15_lora.safetensors', 'ip-adapter-faceid-plusv2_sdxl.bin'}   # nothing else
    before = len(hub.asked); again, _ = child(code, hub, tmp_path, HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
    assert again == found and len(hub.asked) == before         # offline, from the cache


def test_an_interrupted_transfer_goes_on(hub, tmp_path):
    big = hub.repos[HUB]/'big.bin'; big.write_bytes(os.urandom(24_000_000)); cut = [1]      # the client writes 10 MB at a time
    hub.faults.append(lambda path, method: ('cut', 15_000_000) if method == 'GET' and path.endswith('big.bin') and cut and cut.pop() else None)
    code = "print(json.dumps(attempt(lambda: find_file('big.bin', HUB))))"
    try:
        found, _ = child(code, hub, tmp_path)
        if 'error' in found:      # the client gave up: the next call goes on
            assert found['error'] == 'WeightsMissingError' and 'what has arrived is kept' in found['says']; found, _ = child(code, hub, tmp_path)
        assert 'ok' in found and [r for m, p, r in hub.asked if m == 'GET' and r and int(r[6:].split('-')[0]) >= 10_000_000], hub.asked
        assert [b.read_bytes() for b in blobs(tmp_path)] == [big.read_bytes()]
    finally: big.unlink()


def test_a_damaged_download_is_refused_and_removed(hub, tmp_path):
    wrong = [1]
    hub.faults.append(lambda path, method: ('wrong',) if method == 'GET' and path.endswith('.bin') and wrong and wrong.pop() else None)
    found, _ = child(ONE, hub, tmp_path)
    assert found['error'] == 'CheckpointError' and 'SHA-256' in found['says'] and not blobs(tmp_path)
    assert 'ok' in child(ONE, hub, tmp_path)[0]


@pytest.mark.parametrize('fault, says', [(404, 'hub'), (401, 'log in')])
def test_answers_that_are_no_file(hub, tmp_path, fault, says):
    hub.faults.append(lambda path, method: fault if path.endswith('.bin') else None)
    found, _ = child(ONE, hub, tmp_path)
    assert found['error'] == 'WeightsMissingError' and says in found['says'] and "load('tiny-faceid')" in found['says'] and not blobs(tmp_path)


def test_a_file_that_the_hub_does_not_have(hub, tmp_path):
    found, _ = child("print(json.dumps([attempt(lambda: find_file('ip-adapter-faceid_sd99.bin', HUB)), attempt(lambda: find_file('x.bin', 'nobody/nothing'))]))", hub, tmp_path)
    assert all(f['error'] == 'WeightsMissingError' and 'the hub does not have it' in f['says'] for f in found) and not blobs(tmp_path)


def test_a_token_opens_the_door(repos, tmp_path):
    with Hub(repos, token='hf_secret') as hub:
        found, err = child(ONE, hub, tmp_path)
        assert found['error'] == 'WeightsMissingError' and 'HF_TOKEN' in found['says']
        assert 'ok' in child(ONE, hub, tmp_path, HF_TOKEN='hf_secret')[0]


def test_a_full_disk(hub, tmp_path):
    found, _ = child("resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n" + ONE, hub, tmp_path)
    assert found['error'] == 'WeightsMissingError' and 'the disk does not take it' in found['says'] and not [b for b in blobs(tmp_path) if not b.name.endswith('.incomplete')]
    assert 'ok' in child(ONE, hub, tmp_path)[0]


def test_no_network(tmp_path):
    found, _ = child(ONE, 'http://127.0.0.1:9', tmp_path)
    assert found['error'] == 'WeightsMissingError' and 'cannot be reached' in found['says'] and not blobs(tmp_path)
