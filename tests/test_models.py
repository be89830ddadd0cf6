"""Names to files: a whole pack loads from a folder; what is missing or does not fit is said, and nothing is changed or downloaded."""
import shutil
import numpy as np, pytest, torch
import helpers_pack as H
from faceid_nb import models as M
from faceid_nb.errors import ArgumentError, BaseModelError, CheckpointError, LoRAError, PackMissingError, VariantError, WeightsMissingError


@pytest.fixture(scope='module')
def pack(tmp_path_factory): return H.pack(tmp_path_factory.mktemp('pack') / 'tiny')


@pytest.fixture
def copy(pack, tmp_path):  # links, so that a test may break one file
    shutil.copytree(pack, tmp_path / 'copy', copy_function=lambda a, b: __import__('os').link(a, b))
    return tmp_path / 'copy'


def quiet(me): me.pipe.set_progress_bar_config(disable=True); return me
def load(name, folder, **kw): return quiet(M.load(name, folder=folder, device='cpu', **kw))


def test_a_pack_loads(pack):
    me = load('tiny-faceid', pack)
    assert (me.name, me.negative_prompt, me.reader.name, me.adapter.variant) == ('tiny-faceid', '', 'tiny', 'faceid') and me.pipe.dtype == torch.float32 and me.adapter.at.lora
    c = me.pipe.scheduler.config
    assert type(me.pipe.scheduler).__name__ == 'DDIMScheduler' and {k: c[k] for k in M.DDIM} == M.DDIM
    images = me.generate(H.embedding(), 'a man', num_samples=2, seed=0, num_inference_steps=2)
    assert [i.size for i in images] == [(64, 64)] * 2 and images[0].info['faceid_nb']['model'] == 'tiny-faceid'


def test_a_photograph_goes_through(pack):
    from helpers_face import fake_photo
    me = load('tiny-faceid', pack)
    a = me.generate(fake_photo([(160, 160, 16, 3)]), 'a', num_samples=1, seed=0, num_inference_steps=1)
    b = me.generate(me.reader.best(fake_photo([(160, 160, 16, 3)])), 'a', num_samples=1, seed=0, num_inference_steps=1)
    assert np.array_equal(a[0], b[0])


def test_separate_lora_is_the_one_used(pack):
    a, b = load('tiny-faceid', pack), load('tiny-faceid-lora', pack)
    p = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
    inside, beside = (H.adapter_state(H.pipeline().unet, seed=s)['ip_adapter'] for s in (0, 1))
    plain = H.pipeline().unet.get_submodule(p).weight
    for me, ip in ((a, inside), (b, beside)):
        assert torch.allclose(me.pipe.unet.get_submodule(p).weight, plain + ip['0.to_q_lora.up.weight'] @ ip['0.to_q_lora.down.weight'], atol=1e-5)


def test_names(): assert {'tiny-faceid', 'tiny-faceid-lora', 'sd15-faceid', 'sd15-faceid-lora'} <= set(M.MODELS)
def test_unknown_name():
    with pytest.raises(ArgumentError, match='tiny-faceid'): M.load('tiny-faceidv3')


@pytest.mark.parametrize('device, says', [('cuda:99', 'not here'), ('gpu', 'no device'), ('mps:3', 'not here')])
def test_devices(device, says):
    with pytest.raises(ArgumentError, match=says): M.choose_device(device)


def test_dtypes(monkeypatch):
    assert M.choose_device('cpu') == (torch.device('cpu'), torch.float32) and M.choose_device('cpu', 'bfloat16')[1] == torch.bfloat16
    with pytest.raises(ArgumentError, match='float32, float16'): M.choose_device('cpu', 'int8')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True); monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert M.choose_device() == (torch.device('cuda'), torch.float16) and M.choose_device('cuda:1')[0].index == 1
    with pytest.raises(ArgumentError): M.choose_device('cuda:2')


# --- what is missing or wrong
@pytest.mark.parametrize('gone, error', [('models', PackMissingError), ('models/tiny/det.onnx', PackMissingError), ('ip-adapter-faceid_sd15.safetensors', WeightsMissingError), ('ip-adapter-faceid_sd15_lora.safetensors', WeightsMissingError), ('sd', WeightsMissingError), ('sd/model_index.json', BaseModelError)])
def test_missing_parts(copy, monkeypatch, gone, error):
    monkeypatch.setattr(M, 'TINY', copy)
    (shutil.rmtree if (copy / gone).is_dir() else lambda p: p.unlink())(copy / gone)
    with pytest.raises(error) as e: M.load('tiny-faceid-lora', device='cpu', folder=copy if gone != 'models' else None)
    assert e.value.do and isinstance(e.value, (WeightsMissingError, BaseModelError))


BAD = {'page': (lambda p: p.write_bytes(b'<!doctype html>'), CheckpointError, 'web page'), 'cut': (lambda p: p.write_bytes(p.read_bytes()[:5000]), CheckpointError, 'cut off'), 'pointer': (lambda p: p.write_bytes(b'version https://git-lfs.github.com/spec/v1\nsize 5\n'), CheckpointError, 'git-lfs')}


@pytest.mark.parametrize('file', ['ip-adapter-faceid_sd15.safetensors', 'ip-adapter-faceid_sd15_lora.safetensors'])
@pytest.mark.parametrize('what', BAD)
def test_broken_files(copy, file, what):
    damage, error, says = BAD[what]
    data = (copy / file).read_bytes(); (copy / file).unlink(); (copy / file).write_bytes(data)  # a copy of its own
    damage(copy / file)
    pipe = H.pipeline(); processors = dict(pipe.unet.attn_processors); before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(error, match=says): M.load('tiny-faceid-lora', folder=copy, device='cpu', base=pipe)
    assert pipe.unet.attn_processors == processors and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def other_lora(folder, make):
    from faceid_nb.checkpoint import lora_from_checkpoint, save_lora
    unet = H.pipeline().unet
    path = folder / 'ip-adapter-faceid_sd15_lora.safetensors'; path.unlink()
    save_lora(make(lora_from_checkpoint(H.adapter_state(unet)['ip_adapter'], list(unet.attn_processors))), path)


@pytest.mark.parametrize('make', [lambda l: {k.replace('down_blocks.0', 'down_blocks.3'): t for k, t in l.items()}, lambda l: {k: torch.cat([t, t], int(k.endswith('down'))) for k, t in l.items()}])
def test_lora_of_another_model(copy, make):
    other_lora(copy, make)
    pipe = H.pipeline(); before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(LoRAError, match='another base model'): M.load('tiny-faceid-lora', folder=copy, device='cpu', base=pipe)
    assert pipe.unet.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_checkpoint_of_another_variant(copy):
    path = copy / 'ip-adapter-faceid_sd15.safetensors'; path.unlink()
    from faceid_nb.checkpoint import save_checkpoint
    save_checkpoint(H.adapter_state(H.pipeline().unet, tokens=16, rank=0), path)
    with pytest.raises(VariantError, match='portrait'): M.load('tiny-faceid', folder=copy, device='cpu')


def test_base_models(pack, tmp_path):
    with pytest.raises(BaseModelError, match='128'): M.load('tiny-faceid', folder=pack, device='cpu', base=H.pipeline(words=64))
    with pytest.raises(WeightsMissingError, match='is not there'): M.load('tiny-faceid', folder=pack, device='cpu', base=tmp_path / 'nothing')
    (tmp_path / 'x').mkdir(); (tmp_path / 'x' / 'model_index.json').write_text('{}')
    with pytest.raises(BaseModelError, match='cannot be loaded'): M.load('tiny-faceid', folder=pack, device='cpu', base=tmp_path / 'x')
    (tmp_path / 'y.safetensors').write_bytes(b'junk')
    with pytest.raises(BaseModelError, match='cannot be loaded'): M.load('tiny-faceid', folder=pack, device='cpu', base=tmp_path / 'y.safetensors')
    H.pipeline(seed=5).save_pretrained(tmp_path / 'other')
    me = load('tiny-faceid', pack, base=tmp_path / 'other')
    assert me.adapter.at.unet is me.pipe.unet and torch.equal(me.pipe.vae.decoder.conv_in.weight, H.pipeline(seed=5).vae.decoder.conv_in.weight)


def test_a_pipeline_keeps_its_scheduler(pack):
    from diffusers import EulerDiscreteScheduler
    pipe = H.pipeline(); pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    me = load('tiny-faceid', pack, base=pipe)
    assert me.pipe is pipe and type(me.pipe.scheduler) is EulerDiscreteScheduler


# --- the hub, which is out of reach here
@pytest.fixture
def reader(monkeypatch):
    class Reader:
        name = 'buffalo_l'
        def __init__(self, name, root=None, providers=None): pass
    monkeypatch.setattr('faceid_nb.face.FaceReader', Reader)


@pytest.mark.parametrize('download', [False, True])
def test_official_weights_offline(reader, tmp_path, download):
    with pytest.raises(WeightsMissingError, match='huggingface.co/h94/IP-Adapter-FaceID') as e: M.load('sd15-faceid', device='cpu', cache_dir=tmp_path, download=download)
    assert 'folder=' in e.value.do and "load('tiny-faceid')" in e.value.do


def test_official_names_from_a_folder(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(M, '_told', set())
    from faceid_nb.checkpoint import save_checkpoint
    pipe = H.pipeline(); save_checkpoint(H.adapter_state(pipe.unet), tmp_path / 'ip-adapter-faceid_sd15.bin')
    with pytest.raises(WeightsMissingError, match='_lora.safetensors is not on'): M.load('sd15-faceid-lora', folder=tmp_path, device='cpu', base=pipe, download=False)
    me = M.load('sd15-faceid', folder=tmp_path, device='cpu', base=pipe)
    assert me.negative_prompt == M.CARD_NEGATIVE
    M.load('sd15-faceid', folder=tmp_path, device='cpu', base=pipe)
    assert capsys.readouterr().err.count('non-commercial research only') == 1
    with pytest.raises(WeightsMissingError, match='VAE stabilityai/sd-vae-ft-mse'): M.load('sd15-faceid', folder=tmp_path, device='cpu', cache_dir=tmp_path / 'c', download=False)
    with pytest.raises(WeightsMissingError, match='base model some/repo'): M.load('sd15-faceid', folder=tmp_path, device='cpu', base='some/repo', cache_dir=tmp_path / 'c', download=False)


def test_missing_face_pack_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(PackMissingError, match='buffalo_l'): M.load('sd15-faceid', device='cpu')


def test_hub_files_are_the_cards(monkeypatch, tmp_path):
    asked = []
    def download(repo, file, cache_dir=None, local_files_only=None): asked.append((repo, file, local_files_only)); return str(tmp_path / file)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    assert M.find_file('ip-adapter-faceid_sd15.bin', M.HUB) == tmp_path / 'ip-adapter-faceid_sd15.bin'
    assert asked == [('h94/IP-Adapter-FaceID', 'ip-adapter-faceid_sd15.bin', False)]
