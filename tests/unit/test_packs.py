"Face packs come from a mirror on this machine: once, whole, checked, and whatever can go wrong on the way."
import errno
import hashlib
import resource

import pytest
from faceid_nb import packs as P
from faceid_nb.errors import PackMissingError, WeightsMissingError
from faceid_nb.face import FaceReader
from faceid_nb.models import load
from helpers_archive import NETWORKS, archive
from hub_server import Hub


@pytest.fixture
def mirror(monkeypatch):
    with Hub({}) as h:
        h.packs['buffalo_l.zip'] = archive()
        monkeypatch.setenv('FACEID_NB_PACK_URL', h.pack_url)
        monkeypatch.delitem(P.PACK_SUMS, 'buffalo_l')
        yield h


def names(root): return sorted(str(p.relative_to(root)) for p in root.rglob('*') if p.is_file())
WHOLE = ['models/buffalo_l/det.onnx', 'models/buffalo_l/rec.onnx']
PART = ['models/buffalo_l.zip.part']


def refused(root, *words):
    with pytest.raises(PackMissingError) as e: P.download_pack('buffalo_l', root)
    for word in (*words, str(root/'models'/'buffalo_l')): assert word in str(e.value)
    assert e.value.do
    # no half pack, no folder left over
    assert {p.name for p in (root/'models').iterdir()} <= {'buffalo_l.zip.part'}


def test_a_pack_downloads_once_and_says_the_licence_once(mirror, tmp_path, capsys):
    r = FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)
    assert r.name == 'buffalo_l'
    assert names(tmp_path) == WHOLE
    assert all((r.folder/n).read_bytes() == d for n, d in NETWORKS.items())
    # others may read it as far as the umask lets them
    assert (r.folder.stat().st_mode & 0o777) == (tmp_path/'models').stat().st_mode & 0o777
    FaceReader('buffalo_l', tmp_path, providers='cpu', download=True)
    assert len(mirror.asked) == 1 and capsys.readouterr().err.count('non-commercial research only') == 1


@pytest.mark.parametrize('ranges', [True, False])
def test_an_interrupted_pack_goes_on(mirror, tmp_path, monkeypatch, ranges):
    # zipfile would overlook rubbish before an archive
    cut = [1]
    whole = mirror.packs['buffalo_l.zip']
    monkeypatch.setitem(P.PACK_SUMS, 'buffalo_l', hashlib.sha256(whole).hexdigest())
    later = None if ranges else ('whole',)
    mirror.faults.append(lambda path, method: ('cut', 3_500_000) if cut and cut.pop() else later)
    refused(tmp_path, 'broke off after 3.', 'what has arrived is kept')
    assert names(tmp_path) == PART
    have = (tmp_path/PART[0]).stat().st_size
    assert 3_000_000 < have <= 3_500_000 and (tmp_path/PART[0]).read_bytes() == whole[:have]
    P.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE
    assert mirror.asked[-1][2] == f'bytes={have}-'
    assert (tmp_path/WHOLE[0]).read_bytes() == NETWORKS['det.onnx']


def test_the_rest_of_another_archive_is_not_glued_on(mirror, tmp_path):
    (tmp_path/'models').mkdir()
    (tmp_path/PART[0]).write_bytes(bytes(1_000_000))
    refused(tmp_path, 'is not the pack')
    assert names(tmp_path) == []
    # longer than the archive: the server has nothing there
    (tmp_path/PART[0]).write_bytes(bytes(20_000_000))
    P.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE


def test_a_pack_with_another_checksum_is_refused(mirror, tmp_path, monkeypatch):
    monkeypatch.setitem(P.PACK_SUMS, 'buffalo_l', '80ffe37d8a59' + '0'*52)
    refused(tmp_path, 'SHA-256', '80ffe37d8a59', 'was removed')
    assert names(tmp_path) == []


def flipped(data, at=2_000_000):
    "One bit is another."
    data = bytearray(data)
    data[at] ^= 1
    return bytes(data)


BROKEN = {
    'a web page': (b'<!doctype html><title>Sign in</title>', "begins with b'<!doctype"),
    'zeros': (bytes(100_000), 'is not the pack'),
    'the first half': (archive()[:5_000_000], 'is not the pack'),
    'a flipped bit': (flipped(archive()), 'CRC'),
    'one network': (archive({'det.onnx': NETWORKS['det.onnx']}), 'it holds det.onnx'),
    'other things': (archive({'a.txt': b'a'}), 'it holds a.txt'),
}


@pytest.mark.parametrize('what', BROKEN)
def test_broken_packs(mirror, tmp_path, what):
    good, (mirror.packs['buffalo_l.zip'], says) = mirror.packs['buffalo_l.zip'], BROKEN[what]
    refused(tmp_path, says)
    assert names(tmp_path) == []
    mirror.packs['buffalo_l.zip'] = good
    P.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE


def test_names_in_a_pack_do_not_lead_out_of_it(mirror, tmp_path):
    mirror.packs['buffalo_l.zip'] = archive({
        '../../det.onnx': NETWORKS['det.onnx'],
        '/tmp/buffalo_l/rec.onnx': NETWORKS['rec.onnx'],
        '../evil.sh': b'rm',
    })
    P.download_pack('buffalo_l', tmp_path/'in')
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
    P.download_pack('buffalo_l', tmp_path)
    assert names(tmp_path) == WHOLE


def test_a_disk_that_fills_up_while_unpacking(mirror, tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(P.shutil, 'copyfileobj', full)
        refused(tmp_path, 'the disk does not take it')
    assert names(tmp_path) == [] and not list((tmp_path/'models').iterdir())


def test_no_network_for_a_pack(tmp_path, monkeypatch):
    monkeypatch.setenv('FACEID_NB_PACK_URL', 'http://127.0.0.1:9')
    refused(tmp_path, 'cannot be reached', 'buffalo_l', "FaceReader('tiny')")
    assert names(tmp_path) == []


def test_half_a_pack_of_somebody_else_is_left_alone(mirror, tmp_path):
    (tmp_path/'models'/'buffalo_l').mkdir(parents=True)
    (tmp_path/'models'/'buffalo_l'/'notes.txt').write_text('mine')
    with pytest.raises(PackMissingError, match='not whole'): P.download_pack('buffalo_l', tmp_path)
    assert not mirror.asked and names(tmp_path) == ['models/buffalo_l/notes.txt']


def test_load_fetches_the_pack_only_where_it_may(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    def ask(**kw): return load('sd15-faceid', device='cpu', **kw)
    with pytest.raises(PackMissingError, match='download_pack'): ask()  # HF_HUB_OFFLINE, as in all tests
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    with pytest.raises(PackMissingError, match='download_pack'): ask(download=False)
    assert not mirror.asked and names(tmp_path) == []
    def no_hub(file, *a): raise WeightsMissingError(file)
    monkeypatch.setattr('faceid_nb.models.find_file', no_hub)
    # the pack comes before the rest
    with pytest.raises(WeightsMissingError, match='ip-adapter-faceid_sd15.bin'): ask()
    assert len(mirror.asked) == 1 and names(tmp_path) == ['.insightface/' + n for n in WHOLE]


def test_without_a_home_the_place_is_said(monkeypatch):
    import pwd
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)
    with pytest.raises(PackMissingError, match='HOME is not set.*root='): P.check_pack('buffalo_l')
