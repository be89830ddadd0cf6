"""Names to files: a whole pack loads from a folder; what is missing or does not fit is said, and nothing
is changed or downloaded."""
import re, shutil
import numpy as np, pytest, torch
import goldens_build as gold
import helpers_pack as H
from faceid_nb import models as M
from faceid_nb.errors import (ArgumentError, BaseModelError, CheckpointError, LoRAError, PackMissingError,
                              VariantError, WeightsMissingError)


@pytest.fixture(scope='module')
def pack(tmp_path_factory): return H.pack(tmp_path_factory.mktemp('pack') / 'tiny')


@pytest.fixture
def copy(pack, tmp_path):  # links, so that a test may break one file
    shutil.copytree(pack, tmp_path / 'copy', copy_function=lambda a, b: __import__('os').link(a, b))
    return tmp_path / 'copy'


def quiet(me):
    me.pipe.set_progress_bar_config(disable=True)
    return me
def load(name, folder, **kw): return quiet(M.load(name, folder=folder, device='cpu', **kw))


def test_a_pack_loads(pack):
    me = load('tiny-faceid', pack)
    assert (me.name, me.negative_prompt, me.reader.name,
            me.adapter.variant) == ('tiny-faceid', '', 'tiny', 'faceid')
    assert me.pipe.dtype == torch.float32
    assert me.adapter.at.lora
    c = me.pipe.scheduler.config
    assert type(me.pipe.scheduler).__name__ == 'DDIMScheduler' and {k: c[k] for k in M.DDIM} == M.DDIM
    images = me.generate(H.embedding(), 'a man', num_samples=2, seed=0, num_inference_steps=2)
    assert [i.size for i in images] == [(64, 64)] * 2
    assert images[0].info['faceid_nb']['model'] == 'tiny-faceid'


def test_a_photograph_goes_through(pack):
    from helpers_face import fake_photo
    me = load('tiny-faceid', pack)
    a = me.generate(fake_photo([(160, 160, 16, 3)]), 'a', num_samples=1, seed=0, num_inference_steps=1)
    b = me.generate(me.reader.best(fake_photo([(160, 160, 16, 3)])), 'a', num_samples=1, seed=0,
                    num_inference_steps=1)
    assert np.array_equal(a[0], b[0])


def test_separate_lora_is_the_one_used(pack):
    a, b = load('tiny-faceid', pack), load('tiny-faceid-lora', pack)
    p = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
    inside, beside = (H.adapter_state(H.pipeline().unet, seed=s)['ip_adapter'] for s in (0, 1))
    plain = H.pipeline().unet.get_submodule(p).weight
    for me, ip in ((a, inside), (b, beside)):
        assert torch.allclose(me.pipe.unet.get_submodule(p).weight,
                              plain + ip['0.to_q_lora.up.weight'] @ ip['0.to_q_lora.down.weight'], atol=1e-5)


def test_names():
    assert {'tiny-faceid', 'tiny-faceid-lora', 'sd15-faceid', 'sd15-faceid-lora'} <= set(M.MODELS)
def test_unknown_name():
    with pytest.raises(ArgumentError, match='tiny-faceid'): M.load('tiny-faceidv3')


@pytest.mark.parametrize('device, says', [('cuda:99', 'not here'), ('gpu', 'no device'),
                                          ('mps:3', 'not here')])
def test_devices(device, says):
    with pytest.raises(ArgumentError, match=says): M.choose_device(device)


def test_dtypes(monkeypatch):
    assert M.choose_device('cpu') == (torch.device('cpu'), torch.float32)
    assert M.choose_device('cpu', 'bfloat16')[1] == torch.bfloat16
    with pytest.raises(ArgumentError, match='float32, float16'): M.choose_device('cpu', 'int8')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert M.choose_device() == (torch.device('cuda'), torch.float16)
    assert M.choose_device('cuda:1')[0].index == 1
    with pytest.raises(ArgumentError): M.choose_device('cuda:2')


# --- what is missing or wrong
@pytest.mark.parametrize('gone, error', [('models', PackMissingError),
                                         ('models/tiny/det.onnx', PackMissingError),
                                         ('ip-adapter-faceid_sd15.safetensors', WeightsMissingError),
                                         ('ip-adapter-faceid_sd15_lora.safetensors', WeightsMissingError),
                                         ('sd', WeightsMissingError),
                                         ('sd/model_index.json', BaseModelError)])
def test_missing_parts(copy, monkeypatch, gone, error):
    monkeypatch.setattr(M, 'TINY', copy)
    (shutil.rmtree if (copy / gone).is_dir() else lambda p: p.unlink())(copy / gone)
    with pytest.raises(error) as e:
        M.load('tiny-faceid-lora', device='cpu', folder=copy if gone != 'models' else None)
    assert e.value.do and isinstance(e.value, (WeightsMissingError, BaseModelError))


BAD = {'page': (lambda p: p.write_bytes(b'<!doctype html>'), CheckpointError, 'web page'),
       'cut': (lambda p: p.write_bytes(p.read_bytes()[:5000]), CheckpointError, 'cut off'),
       'pointer': (lambda p: p.write_bytes(b'version https://git-lfs.github.com/spec/v1\nsize 5\n'),
                   CheckpointError, 'git-lfs')}


@pytest.mark.parametrize('file', ['ip-adapter-faceid_sd15.safetensors',
                                  'ip-adapter-faceid_sd15_lora.safetensors'])
@pytest.mark.parametrize('what', BAD)
def test_broken_files(copy, file, what):
    damage, error, says = BAD[what]
    # a copy of its own
    data = (copy / file).read_bytes()
    (copy / file).unlink()
    (copy / file).write_bytes(data)
    damage(copy / file)
    pipe = H.pipeline()
    processors = dict(pipe.unet.attn_processors)
    before = {k: v.detach().clone() for k, v in pipe.unet.named_parameters()}
    with pytest.raises(error, match=says): M.load('tiny-faceid-lora', folder=copy, device='cpu', base=pipe)
    assert pipe.unet.attn_processors == processors
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.named_parameters())


def other_lora(folder, make):
    from faceid_nb.lora import lora_from_checkpoint, save_lora
    unet = H.pipeline().unet
    path = folder / 'ip-adapter-faceid_sd15_lora.safetensors'
    path.unlink()
    save_lora(make(lora_from_checkpoint(H.adapter_state(unet)['ip_adapter'], list(unet.attn_processors))),
              path)


@pytest.mark.parametrize('make',
                         [lambda l: {k.replace('down_blocks.0', 'down_blocks.3'): t for k, t in l.items()},
                          lambda l: {k: torch.cat([t, t], int(k.endswith('down'))) for k, t in l.items()}])
def test_lora_of_another_model(copy, make):
    other_lora(copy, make)
    pipe = H.pipeline()
    before = {k: v.detach().clone() for k, v in pipe.unet.named_parameters()}
    with pytest.raises(LoRAError, match='another base model'):
        M.load('tiny-faceid-lora', folder=copy, device='cpu', base=pipe)
    assert dict(pipe.unet.named_parameters()).keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.named_parameters())


def test_checkpoint_of_another_variant(copy):
    path = copy / 'ip-adapter-faceid_sd15.safetensors'
    path.unlink()
    from faceid_nb.checkpoint import save_checkpoint
    save_checkpoint(H.adapter_state(H.pipeline().unet, tokens=16, rank=0), path)
    with pytest.raises(VariantError, match='portrait'): M.load('tiny-faceid', folder=copy, device='cpu')


def test_base_models(pack, tmp_path):
    with pytest.raises(BaseModelError, match='128'):
        M.load('tiny-faceid', folder=pack, device='cpu', base=H.pipeline(words=64))
    with pytest.raises(WeightsMissingError, match='is not there'):
        M.load('tiny-faceid', folder=pack, device='cpu', base=tmp_path / 'nothing')
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'model_index.json').write_text('{}')
    with pytest.raises(BaseModelError, match='cannot be loaded'):
        M.load('tiny-faceid', folder=pack, device='cpu', base=tmp_path / 'x')
    (tmp_path / 'y.safetensors').write_bytes(b'junk')
    with pytest.raises(BaseModelError, match='cannot be loaded'):
        M.load('tiny-faceid', folder=pack, device='cpu', base=tmp_path / 'y.safetensors')
    H.pipeline(seed=5).save_pretrained(tmp_path / 'other')
    me = load('tiny-faceid', pack, base=tmp_path / 'other')
    assert me.adapter.at.unet is me.pipe.unet
    assert torch.equal(me.pipe.vae.decoder.conv_in.weight, H.pipeline(seed=5).vae.decoder.conv_in.weight)


def test_a_pipeline_keeps_its_scheduler(pack):
    from diffusers import EulerDiscreteScheduler
    pipe = H.pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
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
    with pytest.raises(WeightsMissingError, match='huggingface.co/h94/IP-Adapter-FaceID') as e:
        M.load('sd15-faceid', device='cpu', cache_dir=tmp_path, download=download)
    assert 'folder=' in e.value.do and "load('tiny-faceid')" in e.value.do


def test_official_names_from_a_folder(reader, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(M, '_told', set())
    from faceid_nb.checkpoint import save_checkpoint
    pipe = H.pipeline()
    save_checkpoint(H.adapter_state(pipe.unet), tmp_path / 'ip-adapter-faceid_sd15.bin')
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(WeightsMissingError, match='_lora.safetensors is not on') as e:
        M.load('sd15-faceid-lora', folder=tmp_path, device='cpu', base=pipe, download=False)
    assert f'{tmp_path} does not hold it' in e.value.found
    assert 'h94/IP-Adapter-FaceID' in e.value.do
    assert pipe.unet.attn_processors == processors
    me = M.load('sd15-faceid', folder=tmp_path, device='cpu', base=pipe)
    assert me.negative_prompt == M.CARD_NEGATIVE
    M.load('sd15-faceid', folder=tmp_path, device='cpu', base=pipe)
    assert capsys.readouterr().err.count('non-commercial research only') == 1
    with pytest.raises(WeightsMissingError, match='VAE stabilityai/sd-vae-ft-mse'):
        M.load('sd15-faceid', folder=tmp_path, device='cpu', cache_dir=tmp_path / 'c', download=False)
    with pytest.raises(WeightsMissingError, match='base model some/repo'):
        M.load('sd15-faceid', folder=tmp_path, device='cpu', base='some/repo', cache_dir=tmp_path / 'c',
               download=False)


def test_missing_face_pack_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(PackMissingError, match='buffalo_l'): M.load('sd15-faceid', device='cpu')


def test_hub_files_are_the_cards(monkeypatch, tmp_path):
    asked = []
    def download(repo, file, cache_dir=None, local_files_only=None):
        asked.append((repo, file, local_files_only))
        return str(tmp_path / file)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', download)
    assert M.find_file('ip-adapter-faceid_sd15.bin', M.HUB) == tmp_path / 'ip-adapter-faceid_sd15.bin'
    assert asked == [('h94/IP-Adapter-FaceID', 'ip-adapter-faceid_sd15.bin', False)]


# --- a base model in a single file, in the layout that people trade: the golden pipelines, written the other
# way round
def renamed(state, rules, prefix):
    """A state dict under other names: the first pattern that matches at the start of a name is replaced,
    then its parts are."""
    out = {}
    for k, t in state.items():
        for pattern, new in rules:
            if m := re.match(pattern, k):
                k = (new(*map(int, m.groups())) if callable(new) else new) + k[m.end():]
                break
        out[prefix + k] = t
    return out


def ldm_unet(unet):
    n = unet.config.layers_per_block + 1
    crosses = [hasattr(b, 'attentions') for b in unet.up_blocks]
    s = renamed(unet.state_dict(),
                [(r'down_blocks\.(\d)\.resnets\.(\d)', lambda b, j: f'input_blocks.{1 + b*n + j}.0'),
                 (r'down_blocks\.(\d)\.attentions\.(\d)', lambda b, j: f'input_blocks.{1 + b*n + j}.1'),
                 (r'down_blocks\.(\d)\.downsamplers\.0\.conv', lambda b: f'input_blocks.{b*n + n}.0.op'),
                 (r'mid_block\.resnets\.(\d)', lambda j: f'middle_block.{2*j}'),
                 (r'mid_block\.attentions\.0', 'middle_block.1'),
                 (r'up_blocks\.(\d)\.resnets\.(\d)', lambda b, j: f'output_blocks.{b*n + j}.0'),
                 (r'up_blocks\.(\d)\.attentions\.(\d)', lambda b, j: f'output_blocks.{b*n + j}.1'),
                 (r'up_blocks\.(\d)\.upsamplers\.0\.conv',
                  lambda b: f'output_blocks.{b*n + n - 1}.{1 + crosses[b]}.conv'),
                 (r'time_embedding\.linear_(\d)', lambda i: f'time_embed.{2*i - 2}'),
                 (r'add_embedding\.linear_(\d)', lambda i: f'label_emb.0.{2*i - 2}'),
                 (r'conv_in', 'input_blocks.0.0'), (r'conv_norm_out', 'out.0'), (r'conv_out', 'out.2')],
                'model.diffusion_model.')
    parts = dict(norm1='in_layers.0', conv1='in_layers.2', norm2='out_layers.0', conv2='out_layers.3',
                 time_emb_proj='emb_layers.1', conv_shortcut='skip_connection')
    return {re.sub(r'(put_blocks\.\d+\.0|middle_block\.[02])\.(\w+)',
                   lambda m: f'{m[1]}.{parts.get(m[2], m[2])}', k): t for k, t in s.items()}


def ldm_vae(vae):
    n = len(vae.config.block_out_channels) - 1
    out = {}
    for k, t in vae.state_dict().items():
        for a, b in ((r'down_blocks\.(\d)\.resnets', r'down.\1.block'),
                     (r'down_blocks\.(\d)\.downsamplers\.0', r'down.\1.downsample'),
                     (r'up_blocks\.(\d)\.resnets', lambda m: f'up.{n - int(m[1])}.block'),
                     (r'up_blocks\.(\d)\.upsamplers\.0', lambda m: f'up.{n - int(m[1])}.upsample'),
                     (r'mid_block\.resnets\.(\d)', lambda m: f'mid.block_{int(m[1]) + 1}'),
                     (r'mid_block\.attentions\.0', 'mid.attn_1'), ('conv_norm_out', 'norm_out'),
                     ('conv_shortcut', 'nin_shortcut'), ('group_norm', 'norm'), (r'to_out\.0', 'proj_out'),
                     (r'to_([qkv])\.', r'\1.')):
            k = re.sub(a, b, k)
        out['first_stage_model.' + k] = t[..., None, None] if re.search(r'attn_1\.(q|k|v|proj_out)\.weight',
                                                                        k) else t
    return out


def open_clip(encoder):
    "OpenCLIP keeps q, k and v in one matrix and the projection transposed."
    s, out = encoder.state_dict(), {}
    pre = 'text_model.' if any(k.startswith('text_model.') for k in s) else ''
    def layer(i): return f'{pre}encoder.layers.{i}.'
    for i in range(encoder.config.num_hidden_layers):
        for kind in ('weight', 'bias'):
            out[f'transformer.resblocks.{i}.attn.in_proj_{kind}'] = torch.cat(
                [s[f'{layer(i)}self_attn.{p}_proj.{kind}'] for p in 'qkv'])
            for a, b in (('self_attn.out_proj', 'attn.out_proj'), ('layer_norm1', 'ln_1'),
                         ('layer_norm2', 'ln_2'), ('mlp.fc1', 'mlp.c_fc'), ('mlp.fc2', 'mlp.c_proj')):
                out[f'transformer.resblocks.{i}.{b}.{kind}'] = s[f'{layer(i)}{a}.{kind}']
    out |= {'positional_embedding': s[f'{pre}embeddings.position_embedding.weight'],
            'token_embedding.weight': s[f'{pre}embeddings.token_embedding.weight'],
            'text_projection': s['text_projection.weight'].T,
            **{f'ln_final.{k}': s[f'{pre}final_layer_norm.{k}'] for k in ('weight', 'bias')}}
    return {f'conditioner.embedders.1.model.{k}': t for k, t in out.items()}


def single_file(pipe, path):
    "The weights of a pipeline in one file; the path."
    from safetensors.torch import save_file
    xl = hasattr(pipe, 'text_encoder_2')
    words = pipe.text_encoder.state_dict()
    pre = '' if any(k.startswith('text_model.') for k in words) else 'text_model.'
    s = ldm_unet(pipe.unet) | ldm_vae(pipe.vae) | {
        f"{'conditioner.embedders.0' if xl else 'cond_stage_model'}.transformer.{pre}{k}": t
        for k, t in words.items()} | (open_clip(pipe.text_encoder_2) if xl else {})
    save_file({k: t.clone().contiguous() for k, t in s.items()}, path)
    return path


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "kind -> (single file, diffusers folder) of the golden pipelines"
    f = tmp_path_factory.mktemp('single')
    out = {}
    for kind in ('sd', 'sdxl'):
        pipe = gold.pipeline(kind)
        # diffusers tells its two encoders apart by their width: 32 + 96, as 768 + 1280 in the real one
        if kind == 'sdxl':
            from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
            def of(width):
                return CLIPTextConfig(**gold.SPEC['configs']['text_sdxl'] | dict(hidden_size=width))
            pipe.register_modules(text_encoder=CLIPTextModel(of(32)).eval(),
                                  text_encoder_2=CLIPTextModelWithProjection(of(96)).eval())
        pipe.save_pretrained(f/kind)
        out[kind] = single_file(pipe, f/f'{kind}.safetensors'), f/kind
    return out


@pytest.fixture
def configs(files, monkeypatch):
    """In place of the hub, of which `from_single_file` needs the configuration: the golden ones, and a
    list of what was asked for."""
    asked = []
    def snapshot(repo, cache_dir=None, local_files_only=None, **k):
        asked.append((repo, cache_dir, local_files_only))
        return str(files['sdxl' if 'xl' in repo else 'sd'][1])
    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
    return asked


@pytest.mark.parametrize('kind', ['sd', 'sdxl'])
def test_a_single_file_is_the_same_pipeline(files, configs, tmp_path, kind):
    file, folder = files[kind]
    assert M.is_sdxl(file) is (kind == 'sdxl')
    # what the file is it says itself
    one, two = (M.load_pipeline(p, cache_dir=tmp_path, download=False, sdxl=kind != 'sdxl')
                for p in (file, folder))
    assert type(one) is type(two) and configs == [(M.CONFIGS[kind == 'sdxl'], tmp_path, True)]
    for part in ('unet', 'vae', 'text_encoder') + (('text_encoder_2',) if kind == 'sdxl' else ()):
        a, b = (getattr(p, part).state_dict() for p in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items()), part
    assert dict(one.scheduler.config)['set_alpha_to_one'] is False
    assert type(one.scheduler).__name__ == 'DDIMScheduler'
    one.set_progress_bar_config(disable=True)
    two.set_progress_bar_config(disable=True)
    how = dict(num_inference_steps=1, width=16, height=16, output_type='latent')
    assert torch.equal(*(p('a man', generator=torch.Generator().manual_seed(0), **how).images
                         for p in (one, two)))


def test_a_single_file_without_its_configuration(files, tmp_path):
    for download in (False, True):      # never a connection where download is False, and offline here
        with pytest.raises(WeightsMissingError,
                           match='configuration for a single file, stable-diffusion-v1-5'):
            M.load_pipeline(files['sd'][0], cache_dir=tmp_path, download=download)


@pytest.mark.parametrize('form', [0, 1])
@pytest.mark.parametrize('name, kind, widths',
                         [('sd15-faceid', 'sdxl', (64, 128)), ('sdxl-faceid', 'sd', (128, 64))])
def test_a_base_of_the_wrong_family_is_refused(files, configs, reader, tmp_path, name, kind, widths, form):
    wants, has = widths
    gold.write_checkpoint(M.MODELS[name].checkpoint, tmp_path)
    with pytest.raises(BaseModelError, match=f'tokens are {wants} wide, the words of this UNet {has}') as e:
        M.load(name, folder=tmp_path, base=files[kind][form], device='cpu', download=False)
    assert 'Load the base model that the checkpoint was made for' in e.value.do


def test_a_damaged_single_file(files, configs, tmp_path):
    data = files['sd'][0].read_bytes()
    for bad in (data[:len(data)//2], b'<!doctype html>', b''):
        (tmp_path/'bad.safetensors').write_bytes(bad)
        with pytest.raises(BaseModelError, match='cannot be loaded'):
            M.load_pipeline(tmp_path/'bad.safetensors')


def test_threads_load_one_after_the_other(monkeypatch):
    import threading, time
    from faceid_nb import models
    inside, most, find = [0], [0], models.find_parts
    def counted(*a, **k):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(.1)
        inside[0] -= 1
        return find(*a, **k)
    monkeypatch.setattr(models, 'find_parts', counted)
    made = []
    threads = [threading.Thread(target=lambda: made.append(models.load('tiny-faceid', device='cpu')))
               for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert len(made) == 3
    assert most == [1]
    for m in made: assert {p.device.type for p in m.pipe.unet.parameters()} == {'cpu'}
    import torch
    assert torch.nn.Linear(1, 1).weight.device.type == 'cpu'   # torch is as it was


# --- edges of a machine

def test_a_base_with_half_precision_files_only(pack, tmp_path):
    half = M.load_pipeline(pack/'sd', dtype=torch.float16)
    half.save_pretrained(tmp_path, variant='fp16')
    me = load('tiny-faceid', pack, base=tmp_path)
    weight, same = (p.unet.conv_in.weight for p in (me.pipe, half))
    assert me.pipe.dtype == torch.float32 and torch.equal(weight.half(), same)


def test_a_base_in_the_home_folder(pack, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(pack))
    assert load('tiny-faceid', '~', base='~/sd').pipe.dtype == torch.float32


@pytest.fixture
def other_defaults():
    yield torch
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


SOMEBODY = H.embedding()   # before anybody changes a default


def drawn(pack):
    return np.asarray(load('tiny-faceid', pack).generate(SOMEBODY, 'a man', num_samples=1, seed=0,
                                                         num_inference_steps=2)[0])


@pytest.mark.parametrize('change', [lambda t: t.set_default_dtype(torch.float64),
                                    lambda t: t.set_default_dtype(torch.float16),
                                    lambda t: t.set_default_device('meta')], ids=['double', 'half', 'device'])
def test_pictures_do_not_depend_on_torchs_defaults(change, pack, other_defaults):
    expected = drawn(pack)
    change(other_defaults)
    assert np.array_equal(drawn(pack), expected)


@pytest.mark.parametrize('name, n', [('tiny-faceid', 1), ('tiny-sdxl-faceid', 2)])
def test_tokenizers_without_a_model(name, n): assert len(M.read_tokenizers(name)) == n


def test_tokenizers_that_are_not_here(): assert M.read_tokenizers('sd15-faceid', download=False) == []
