"Downloads: the official names from a server on this machine that speaks the hub's protocol, and everything that can go wrong on the way."
import errno, hashlib, io, json, os, resource, subprocess, sys, zipfile
import pytest
import goldens_build as gold
from conftest import ROOT
from faceid_nb import packs as F
from faceid_nb.errors import PackMissingError, WeightsMissingError
from hub_server import Hub
from faceid_nb.models import CONFIGS, HUB, MODELS, VIT_H, load
from test_models import single_file

ALONE = ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_TOKEN', 'HF_ENDPOINT', 'HF_HOME')
START = '''
import json, os, sys, resource
from faceid_nb.models import load, find_file, HUB
from faceid_nb.errors import FaceIDError
def attempt(f):
    try: return dict(ok=str(f()))
    except FaceIDError as e: return dict(error=type(e).__name__, says=str(e))
'''
END = '\nsys.stdout.flush(); sys.stderr.flush(); os._exit(0)      # torch takes a second to clear up'


def child(code, hub, home, **more):
    "Run code in a fresh process whose hub is the server; what it prints last, as JSON."
    env = {k: v for k, v in os.environ.items() if k not in ALONE} | dict(HF_ENDPOINT=hub if isinstance(hub, str) else hub.url, HF_HOME=str(home), PYTHONPATH=f"{ROOT/'tests'/'support'/'offline'}{os.pathsep}{ROOT}", HF_HUB_DISABLE_TELEMETRY='1', **more)
    r = subprocess.run([sys.executable, '-c', START + code + END], env=env, capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1]), r.stderr


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
    return {HUB: f/'faceid', VIT_H: f/'vit', MODELS['sd15-faceid'].base: f/'sd', MODELS['sdxl-faceid'].base: f/'xl', MODELS['sd15-faceid'].vae: f/'vae'}


@pytest.fixture
def hub(repos):
    with Hub(repos) as h: yield h


ONE = "print(json.dumps(attempt(lambda: find_file('ip-adapter-faceid_sd15.bin', HUB))))"


def test_names_download_load_and_generate(hub, tmp_path):
    hub.packs['buffalo_l.zip'] = archive()
    here = dict(HOME=str(tmp_path), FACEID_NB_PACK_URL=hub.pack_url)
    code = '''
import torch
from faceid_nb.face import PACK_SUMS
PACK_SUMS.clear()      # the archive holds the tiny pack
def go(name, **kw):
    me = load(name, device='cpu'); me.pipe.set_progress_bar_config(disable=True)
    if me.encoder: kw['structure'] = me.encoder.nobody()
    return [me.reader.name, type(me.pipe).__name__, type(me.pipe.scheduler).__name__, me.adapter.variant, len(me.generate(torch.eye(512)[:1], 'a man', num_samples=2, num_inference_steps=1, width=16, height=16, **kw))]
print(json.dumps({n: go(n) for n in ('sd15-plusv2', 'sd15-faceid-lora', 'sdxl-plusv2')}))
'''
    found, err = child(code, hub, tmp_path, **here)
    assert found == {'sd15-plusv2': ['buffalo_l', 'StableDiffusionPipeline', 'DDIMScheduler', 'plusv2', 2], 'sd15-faceid-lora': ['buffalo_l', 'StableDiffusionPipeline', 'DDIMScheduler', 'faceid', 2], 'sdxl-plusv2': ['buffalo_l', 'StableDiffusionXLPipeline', 'DDIMScheduler', 'plusv2', 2]}
    assert err.count('non-commercial research only') == 3     # once for the pack, once for each base
    assert [p for m, p, _ in hub.asked if p.startswith('packs')] == ['packs/buffalo_l.zip'] == [p for m, p, _ in hub.asked][:1]     # the face pack first
    fetched = {p for m, p, _ in hub.asked if m == 'GET' and p.startswith(HUB)}
    assert {p.rsplit('/', 1)[1] for p in fetched} == {'ip-adapter-faceid-plusv2_sd15.bin', 'ip-adapter-faceid_sd15.bin', 'ip-adapter-faceid_sd15_lora.safetensors', 'ip-adapter-faceid-plusv2_sdxl.bin'}   # nothing else
    before = len(hub.asked)
    again, _ = child(code, hub, tmp_path, HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', **here)
    assert again == found and len(hub.asked) == before         # offline, from the cache


def test_a_single_file_gets_its_configuration_once(hub, repos, tmp_path):
    file = single_file(gold.pipeline('sd'), tmp_path/'mine.safetensors')
    hub.repos = {**repos, CONFIGS[False]: repos[MODELS['sd15-faceid'].base]}
    code = f"""
from faceid_nb.models import load_pipeline
print(json.dumps([attempt(lambda: type(load_pipeline({str(file)!r}, download=d)).__name__) for d in (False, True, False)]))
"""
    found, _ = child(code, hub, tmp_path)
    assert found[0]['error'] == 'WeightsMissingError' and 'download=False' in found[0]['says'] and [f.get('ok') for f in found[1:]] == ['StableDiffusionPipeline']*2
    fetched = [p.split('/', 4)[4] for m, p, _ in hub.asked if m == 'GET' and '/resolve/' in p]
    assert 'unet/config.json' in fetched and not [f for f in fetched if f.endswith(('.safetensors', '.bin'))] and len(fetched) == len(set(fetched))   # no weights, nothing twice


def test_an_interrupted_transfer_goes_on(hub, tmp_path):
    # the client writes 10 MB at a time
    big = hub.repos[HUB]/'big.bin'
    big.write_bytes(os.urandom(24_000_000))
    cut = [1]
    hub.faults.append(lambda path, method: ('cut', 15_000_000) if method == 'GET' and path.endswith('big.bin') and cut and cut.pop() else None)
    code = "print(json.dumps(attempt(lambda: find_file('big.bin', HUB))))"
    try:
        found, _ = child(code, hub, tmp_path)
        if 'error' in found:      # the client gave up: the next call goes on
            assert found['error'] == 'WeightsMissingError' and 'what has arrived is kept' in found['says']
            found, _ = child(code, hub, tmp_path)
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
    found, _ = child("import time; time.sleep = lambda seconds: None     # the hub's client tries again and again, after longer and longer pauses\n" + ONE, 'http://127.0.0.1:9', tmp_path)
    assert found['error'] == 'WeightsMissingError' and 'cannot be reached' in found['says'] and not blobs(tmp_path)


# --- the face pack: a zip, from a mirror on this machine
NETWORKS = {p.name: p.read_bytes() for p in (ROOT/'faceid_nb'/'weights'/'tiny'/'models'/'tiny').glob('*.onnx')}


def archive(files=NETWORKS):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z:
        for name, data in files.items(): z.writestr(name, data)
    return b.getvalue()


@pytest.fixture
def mirror(monkeypatch):
    with Hub({}) as h:
        h.packs['buffalo_l.zip'] = archive()
        monkeypatch.setenv('FACEID_NB_PACK_URL', h.pack_url)
        monkeypatch.delitem(F.PACK_SUMS, 'buffalo_l')
        yield h


def names(root): return sorted(str(p.relative_to(root)) for p in root.rglob('*') if p.is_file())
WHOLE = ['models/buffalo_l/det.onnx', 'models/buffalo_l/rec.onnx']
PART = ['models/buffalo_l.zip.part']


def refused(root, *words):
    with pytest.raises(PackMissingError) as e: F.download_pack('buffalo_l', root)
    assert all(w in str(e.value) for w in words) and str(root/'models'/'buffalo_l') in str(e.value) and e.value.do, e.value
    assert {p.name for p in (root/'models').iterdir()} <= {'buffalo_l.zip.part'}         # no half pack, no folder left over


def test_a_pack_downloads_once_and_says_the_licence_once(mirror, tmp_path, capsys):
    r = F.FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)
    assert r.name == 'buffalo_l' and names(tmp_path) == WHOLE and all((r.folder/n).read_bytes() == d for n, d in NETWORKS.items())
    assert (r.folder.stat().st_mode & 0o777) == (tmp_path/'models').stat().st_mode & 0o777   # others may read it as far as the umask lets them
    F.FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)
    assert len(mirror.asked) == 1 and capsys.readouterr().err.count('non-commercial research only') == 1


@pytest.mark.parametrize('ranges', [True, False])
def test_an_interrupted_pack_goes_on(mirror, tmp_path, monkeypatch, ranges):
    # zipfile would overlook rubbish before an archive
    cut = [1]
    whole = mirror.packs['buffalo_l.zip']
    monkeypatch.setitem(F.PACK_SUMS, 'buffalo_l', hashlib.sha256(whole).hexdigest())
    mirror.faults.append(lambda path, method: ('cut', 3_500_000) if cut and cut.pop() else None if ranges else ('whole',))
    refused(tmp_path, 'broke off after 3.', 'what has arrived is kept')
    assert names(tmp_path) == PART
    have = (tmp_path/PART[0]).stat().st_size
    assert 3_000_000 < have <= 3_500_000 and (tmp_path/PART[0]).read_bytes() == whole[:have]
    F.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE and mirror.asked[-1][2] == f'bytes={have}-' and (tmp_path/WHOLE[0]).read_bytes() == NETWORKS['det.onnx']


def test_the_rest_of_another_archive_is_not_glued_on(mirror, tmp_path):
    (tmp_path/'models').mkdir()
    (tmp_path/PART[0]).write_bytes(bytes(1_000_000))
    refused(tmp_path, 'is not the pack')
    assert names(tmp_path) == []
    (tmp_path/PART[0]).write_bytes(bytes(20_000_000))      # longer than the archive: the server has nothing there
    F.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE


def test_a_pack_with_another_checksum_is_refused(mirror, tmp_path, monkeypatch):
    monkeypatch.setitem(F.PACK_SUMS, 'buffalo_l', '80ffe37d8a59' + '0'*52)
    refused(tmp_path, 'SHA-256', '80ffe37d8a59', 'was removed')
    assert names(tmp_path) == []


BROKEN = {'a web page': (b'<!doctype html><title>Sign in</title>', "begins with b'<!doctype"), 'zeros': (bytes(100_000), 'is not the pack'), 'the first half': (archive()[:5_000_000], 'is not the pack'),
          'a flipped bit': ((d := bytearray(archive()), d.__setitem__(2_000_000, d[2_000_000] ^ 1), bytes(d))[2], 'CRC'), 'one network': (archive({'det.onnx': NETWORKS['det.onnx']}), 'it holds det.onnx'), 'other things': (archive({'a.txt': b'a'}), 'it holds a.txt')}


@pytest.mark.parametrize('what', BROKEN)
def test_broken_packs(mirror, tmp_path, what):
    good, (mirror.packs['buffalo_l.zip'], says) = mirror.packs['buffalo_l.zip'], BROKEN[what]
    refused(tmp_path, says)
    assert names(tmp_path) == []
    mirror.packs['buffalo_l.zip'] = good
    F.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE


def test_names_in_a_pack_do_not_lead_out_of_it(mirror, tmp_path):
    mirror.packs['buffalo_l.zip'] = archive({'../../det.onnx': NETWORKS['det.onnx'], '/tmp/buffalo_l/rec.onnx': NETWORKS['rec.onnx'], '../evil.sh': b'rm'})
    F.download_pack('buffalo_l', tmp_path/'in')
    assert names(tmp_path) == ['in/' + n for n in WHOLE]


@pytest.mark.parametrize('status', [404, 403, 503])
def test_a_mirror_that_says_no(mirror, tmp_path, status):
    mirror.faults.append(lambda path, method: status)
    refused(tmp_path, f'answers {status}', 'det_10g.onnx')
    assert names(tmp_path) == []


def test_a_pack_on_a_full_disk(mirror, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, before[1]))
    try: refused(tmp_path, 'the disk does not take it', 'root=')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []                            # what had arrived is not left to fill the disk
    F.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE


def test_a_disk_that_fills_up_while_unpacking(mirror, tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(F.shutil, 'copyfileobj', full)
        refused(tmp_path, 'the disk does not take it')
    assert names(tmp_path) == [] and not list((tmp_path/'models').iterdir())


def test_no_network_for_a_pack(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEID_NB_PACK_URL', 'http://127.0.0.1:9')
    refused(tmp_path, 'cannot be reached', 'buffalo_l', "FaceReader('tiny')")
    assert names(tmp_path) == []


def test_half_a_pack_of_somebody_else_is_left_alone(mirror, tmp_path):
    (tmp_path/'models'/'buffalo_l').mkdir(parents=True)
    (tmp_path/'models'/'buffalo_l'/'notes.txt').write_text('mine')
    with pytest.raises(PackMissingError, match='not whole'): F.download_pack('buffalo_l', tmp_path)
    assert not mirror.asked and names(tmp_path) == ['models/buffalo_l/notes.txt']


def test_load_fetches_the_pack_only_where_it_may(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    ask = lambda **kw: load('sd15-faceid', device='cpu', **kw)
    with pytest.raises(PackMissingError, match='download_pack'): ask()                      # HF_HUB_OFFLINE, as in all tests
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    with pytest.raises(PackMissingError, match='download_pack'): ask(download=False)
    assert not mirror.asked and names(tmp_path) == []
    def no_hub(file, *a): raise WeightsMissingError(file)
    monkeypatch.setattr('faceid_nb.models.find_file', no_hub)
    with pytest.raises(WeightsMissingError, match='ip-adapter-faceid_sd15.bin'): ask()     # the pack comes before the rest
    assert len(mirror.asked) == 1 and names(tmp_path) == ['.insightface/' + n for n in WHOLE]
