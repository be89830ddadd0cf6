"The doctor: what is here, what is missing, and a look that falls over is a finding."
import pytest
from faceid_nb import doctor
from faceid_nb.errors import PackMissingError
from helpers_cli import run


def test_the_doctor_finds_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, 'TINY', tmp_path)
    assert run('doctor') == 1
    out = capsys.readouterr().out
    for words in ('missing tiny pack', '-> ', 'Python 3.', 'non-commercial'): assert words in out


def test_a_broken_face_pack_is_found(monkeypatch):
    def check_pack(name): raise PackMissingError('broken', 'half of it', 'install it')
    monkeypatch.setattr('faceid_nb.packs.check_pack', check_pack)
    findings = list(doctor.look_at_tiny())
    assert [f.state for f in findings] == ['missing'] and findings[0].what == 'tiny pack: models/tiny'


def test_the_doctor_is_content(capsys):
    assert run('doctor') == 0
    out = capsys.readouterr().out
    for words in ('tiny-faceid', 'CPUExecutionProvider', 'The tiny models run here'): assert words in out


def test_two_onnx_wheels(monkeypatch):
    monkeypatch.setattr(doctor, 'installed', lambda name: '1.0' if name.startswith('onnxruntime') else None)
    warned = [f for f in doctor.look_at_onnx() if f.state == 'warn' and 'share one folder' in f.what]
    assert warned and 'onnxruntime-gpu' in warned[0].advice


def test_two_opencv_wheels(monkeypatch):
    versions = {'opencv-python': '4.9', 'opencv-contrib-python': '4.10'}
    monkeypatch.setattr(doctor, 'installed', versions.get)
    warned = [f for f in doctor.look_at_opencv() if f.state == 'warn']
    assert warned and 'pip uninstall -y opencv-python opencv-contrib-python' in warned[0].advice


def test_a_look_that_falls_over_is_a_finding():
    def look_at_rocks(): raise OSError('broken')
    assert doctor.examined(look_at_rocks) == [('missing', 'rocks: OSError: broken',
                                               'install the package again')]


@pytest.mark.parametrize('finding, text', [
    (doctor.Finding('ok', 'torch 2'), 'ok      torch 2'),
    (doctor.Finding('missing', 'a file', 'get it'), 'missing a file\n        -> get it'),
])
def test_a_finding_in_words(finding, text):
    assert str(finding) == text


def test_a_user_without_a_home(monkeypatch):
    import pwd
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', '~/.cache/huggingface/hub')
    findings = doctor.examined(doctor.look_at_weights)
    assert {f.state for f in findings} == {'ok', 'note'}
    assert all('HOME is not set' in f.what and 'Set HOME' in f.advice for f in findings[1:])
