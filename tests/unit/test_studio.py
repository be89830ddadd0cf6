"The studio: rules, one worker, stop, errors, code and restored settings, without a browser."
import io, math, threading, time
import numpy as np, pytest
from PIL import Image
from traitlets import TraitError
from faceid_nb import studio as S
from faceid_nb.errors import ArgumentError
from faceid_nb.studio import RANGES, Settings, Studio, Worker

def png(image):
    b = io.BytesIO()
    image.save(b, 'PNG')
    return b.getvalue()

@pytest.fixture(scope='module')
def photo():
    from faceid_nb.tiny.people import render, sample_people
    return png(render(sample_people(1, 7), seed=1, size=160, hat=None, glasses=0)[0].image)

@pytest.fixture(scope='module')
def two():
    from faceid_nb.tiny.people import render, sample_people
    a, b = (p.image for p in render(sample_people(2, 7), seed=1, size=160, hat=None, glasses=0))
    both = Image.new('RGB', (320, 160))
    both.paste(a, (0, 0))
    both.paste(b.resize((120, 120)), (180, 20))
    return png(both)

@pytest.fixture(scope='module')
def shared():
    "A studio that has loaded its model once; each test gets it empty."
    s = Studio(model='tiny-faceid', num_samples=1, num_inference_steps=2)
    yield s
    s.close()

@pytest.fixture
def studio(shared, photo):
    shared.worker.wait(30)
    shared.unobserve_all()
    shared.photographs, shared.portraits, shared.preview = [], [], []
    shared.model, shared.prompt, shared.negative_prompt, shared.num_samples, shared.seed, shared.seed_locked, shared.num_inference_steps, shared.scale, shared.preview_every = 'tiny-faceid', 'photo of a person, smiling', '', 1, 0, True, 2, 1., 5
    shared.note, shared.best_first, shared.side_by_side, shared.num_photographs, shared.compared, shared.folder, shared.download = '', False, False, 0, [], 'portraits', False
    shared.add(photo, 'me.png')
    return shared

def made(studio):
    assert studio.generate(), studio.error
    assert studio.worker.wait(120)
    return studio.portraits

# the worker

def test_one_thing_at_a_time_and_again_afterwards():
    w, gate = Worker(), threading.Event()
    assert w.start(lambda: gate.wait(5)) and w.busy and not w.start(lambda: None)
    gate.set()
    assert w.wait(5) and not w.busy and w.start(lambda: None) and w.wait(5)

@pytest.mark.parametrize('error, said', [(ArgumentError('It is wrong', 'this', 'Do that'), 'It is wrong. this. Do that.'), (ValueError('x' * 999), 'ValueError: xxx'), (MemoryError(), 'not enough memory'), (RuntimeError('CUDA out of memory. Tried'), 'not enough memory')])
def test_errors_become_values_and_go_away(error, said):
    def fail(): raise error
    w = Worker()
    w.start(fail)
    w.wait(5)
    assert said in w.error and len(w.error) < 400 and not w.busy
    w.start(lambda: None)
    w.wait(5)
    assert w.error == ''

def test_stop_returns_at_once():
    w = Worker()
    w.start(lambda: w.stopping.wait(5))
    t = time.time()
    w.stop()
    assert time.time() - t < .1 and w.wait(2)
    w.start(lambda: None)
    assert w.wait(2)

# rules

@pytest.mark.parametrize('name', RANGES)
def test_ranges(name):
    low, high = RANGES[name]
    s, kind = Settings(), type(getattr(Settings(), name))
    for value in (low, high):
        s.set_trait(name, kind(value))
        assert getattr(s, name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(TraitError, match=f'{name} is from'): s.set_trait(name, kind(value))
    assert getattr(s, name) == high

def test_a_model_that_is_none():
    with pytest.raises(TraitError, match='tiny-faceid'): Settings(model='tiny-x')

def test_what_is_asked_fits_the_variant():
    assert 's_scale' in Settings(model='tiny-plusv2').asked() and 's_scale' not in Settings(model='tiny-plus').asked() and Settings(model='sdxl-plusv2').has_structure and Settings(model='tiny-portrait').several
    assert 'negative_prompt' not in Settings().asked() and Settings(negative_prompt='x').asked()['negative_prompt'] == 'x'

def test_no_widgets_are_imported(fresh): assert fresh('import faceid_nb.studio, sys; print([m for m in sys.modules if m.split(".")[0] in ("ipywidgets", "anywidget", "diffusers", "insightface")])').strip() == '[]'

# photographs

def test_faces_are_found_and_chosen(studio, two):
    heard = []
    studio.observe(lambda c: heard.append(1), 'photographs')
    p = studio.add(two, 'two.png')
    assert len(p.faces) == 2 and p.chosen == 0 and p.faces[0].size > p.faces[1].size and len(studio.photographs) == 2
    studio.choose(p, 1)
    assert p.face is p.faces[1] and len(heard) == 2
    studio.choose(p, 2)
    assert p.chosen == 1 and 'no face 2' in studio.error
    studio.choose(p, -1)
    assert p.chosen == 1
    studio.remove(p)
    assert [q.name for q in studio.photographs] == ['me.png']

@pytest.mark.parametrize('bad, said', [(png(Image.new('RGB', (64, 64), 'blue')), "No face was found in 'bad.png'"), (png(Image.new('RGB', (64, 64), 'red')), 'Real people need a model such as sd15-plusv2'), (b'x', 'not a picture'), ('/no/such/file.png', 'file.png')])
def test_bad_photographs_are_said_and_not_kept(studio, bad, said): assert studio.add(bad, 'bad.png') is None and said in studio.error and len(studio.photographs) == 1

def test_what_is_missing(studio, photo):
    studio.photographs = []
    assert not studio.generate() and 'Add a photograph' in studio.error and not studio.busy
    studio.add(photo)
    assert studio.error == '' and studio.photographs[0].name == 'photograph 1'
    studio.prompt = '  '
    assert not studio.generate() and 'prompt' in studio.error

# generating

def test_progress_preview_and_portraits(studio):
    from faceid_nb.measure import identity_similarity
    heard = []
    studio.observe(lambda c: heard.append((c.name, c.new)), ['step', 'status', 'preview', 'portraits', 'seconds_left'])
    studio.num_samples, studio.num_inference_steps, studio.preview_every = 2, 4, 2
    portraits = made(studio)
    assert [v for n, v in heard if n == 'step' and v] == [1, 2, 3, 4] and [len(v) for n, v in heard if n == 'preview'] == [2, 2, 0] and studio.preview == [] and studio.error == ''
    assert [p.settings['seed'] for p in portraits] == [0, 1] and all(-1 < p.likeness < 1 and p.distance >= 0 for p in portraits)
    assert abs(portraits[1].likeness - identity_similarity(studio.photographs[0].face, portraits[1].image)[0]) < 1e-5
    left = [v for n, v in heard if n == 'seconds_left']
    assert left[-1] == 0 and all(v >= 0 for v in left if not math.isnan(v)) and studio.status.startswith('2 made in')
    assert 'cpu' in studio.device or 'cuda' in studio.device
    more = made(studio)
    assert len(more) == 4 and more[2] is portraits[0]

def test_stop_in_the_middle_and_go_on(studio):
    studio.num_inference_steps = 200
    studio.generate()
    while studio.step < 2 and studio.busy: time.sleep(.005)
    t = time.time()
    studio.stop()
    assert time.time() - t < .1 and studio.worker.wait(20) and 2 <= studio.step < 190 and studio.status == 'stopped' and studio.portraits == [] and studio.error == ''
    studio.num_inference_steps = 2
    assert len(made(studio)) == 1

def test_stop_before_the_first_step(studio, monkeypatch):
    import faceid_nb.models as models
    studio._faceid, load = None, models.load
    def slow(name, **more):
        studio.stop()
        return load(name, **more)
    monkeypatch.setattr(models, 'load', slow)
    studio.generate()
    assert studio.worker.wait(60) and studio.status == 'stopped' and studio.step == 0 and studio.portraits == []

def test_controls_are_alive_while_it_works(studio):
    studio.num_inference_steps = 200
    studio.generate()
    slowest = 0
    for k in range(20):
        t = time.time()
        studio.scale = k/20
        slowest = max(slowest, time.time() - t)
        time.sleep(.01)
    assert slowest < .1 and studio.busy
    studio.prompt = ''
    assert not studio.generate() and not S.Comparison(studio).compare() and not studio.error
    studio.stop()
    assert studio.worker.wait(20)

def test_a_generation_that_fails(studio, monkeypatch):
    made(studio)
    monkeypatch.setattr(studio._faceid, 'generate', lambda *a, **k: (_ for _ in ()).throw(RuntimeError('CUDA out of memory')))
    studio.generate()
    assert studio.worker.wait(20) and 'not enough memory' in studio.error and len(studio.portraits) == 1
    monkeypatch.undo()
    assert len(made(studio)) == 2 and studio.error == ''

def test_the_model_changes_and_is_let_go(studio):
    made(studio)
    first = studio._faceid
    made(studio)
    assert studio._faceid is first
    studio.model = 'tiny-portrait'
    made(studio)
    assert studio._faceid is not first and studio._faceid.name == 'tiny-portrait' and studio.portraits[0].settings['model'] == 'tiny-portrait'
    s = Studio()
    s.close()
    assert s._faceid is None

def test_a_seed_that_is_not_locked_is_drawn(studio):
    studio.seed_locked = False
    made(studio)
    a = studio.seed
    made(studio)
    assert a != studio.seed and studio.portraits[0].settings['seed'] == studio.seed and studio.portraits[1].settings['seed'] == a

# code, files

@pytest.mark.parametrize('model, photographs', [('tiny-faceid', 1), ('tiny-faceid', 2), ('tiny-portrait', 1), ('tiny-portrait', 2)])
def test_the_code_makes_the_same_picture(studio, photo, two, model, photographs, tmp_path, monkeypatch):
    studio.model, studio.negative_prompt, studio.scale = model, "it's \"quoted\"", .8
    (tmp_path/'me.png').write_bytes(photo)
    (tmp_path/'two.png').write_bytes(two)
    if photographs == 2: studio.choose(studio.add(two, 'two.png'), 1)
    portrait = made(studio)[0]
    code = studio.code(portrait)
    studio.scale = .1
    assert studio.code(portrait) == code != studio.code()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert abs(np.asarray(names['picture'], np.float32) - np.asarray(portrait.image, np.float32)).max() <= 2

def test_saved_and_restored(studio, tmp_path, photo):
    studio.prompt, studio.scale, studio.num_samples = 'photo of a person, frowning', .7, 2
    p = made(studio)[1]
    a, b = studio.save(p, tmp_path), studio.save(p, tmp_path)
    assert a != b and a.is_file() and b.is_file()
    other = Studio()
    assert other.restore(a) and (other.model, other.prompt, other.scale, other.num_inference_steps, other.seed, other.num_samples) == ('tiny-faceid', 'photo of a person, frowning', .7, 2, 1, 1) and other.error == ''
    assert other.restore(a.read_bytes())
    before = other.asked()
    for bad in (photo, b'x', tmp_path/'none.png'): assert not other.restore(bad) and other.error and other.asked() == before

def test_what_a_file_says_is_checked(studio, tmp_path):
    p = made(studio)[0]
    for wrong in (dict(scale=99.), dict(model='x'), dict(prompt=3)):
        p.settings = dict(p.settings, **wrong)
        other = Studio(scale=.3)
        assert not other.restore(studio.save(p, tmp_path)) and other.error and other.scale == .3 and other.model == 'tiny-plusv2'
        p.settings = dict(p.settings, scale=1., model='tiny-faceid', prompt='x')

# what a model needs

def test_sizes_follow_from_the_shapes():
    "The networks are built on the meta device, which stores no numbers."
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection
    count = lambda *parts: sum(p.numel() for m in parts for p in m.parameters())/1e6
    with torch.device('meta'):
        blocks = lambda kind: dict(down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
        vae, small = AutoencoderKL(**blocks(0)), CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        large = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280))
        words = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=1024))
        eye = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, projection_dim=1024))
        sd = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        xl = UNet2DConditionModel(cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280), down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type='text_time', addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    assert S.MILLIONS['sd'] == round(count(sd, vae, small)) and S.MILLIONS['sdxl'] == round(count(xl, vae, small, large)) and S.MILLIONS['vae'] == round(count(vae)) and S.MILLIONS['encoder'] == round(count(eye, words))
    for kind, unet, d in (('sd', sd, 768), ('sdxl', xl, 2048)):
        inner = {n: unet.get_submodule(n.removesuffix('.processor')) for n in unet.attn_processors}
        ip = sum(2*a.inner_dim*d for n, a in inner.items() if 'attn2' in n)/1e6
        lora = sum(128*(2*a.query_dim + 2*a.cross_attention_dim + 4*a.inner_dim) for a in inner.values())/1e6
        proj = lambda tokens: (512*1024 + 1024 + 1024*tokens*d + tokens*d + 2*d)/1e6
        assert S.MILLIONS[kind, 'faceid'] == round(ip + lora + proj(4)) and S.MILLIONS[kind, 'portrait'] == round(ip + proj(16)), kind
        from faceid_nb.projection import PlusProjection
        with torch.device('meta'): plus = PlusProjection(d, clip_embeddings_dim=1280, num_tokens=4)
        assert S.MILLIONS[kind, 'plusv2'] == round(ip + lora + count(plus)), kind
    assert S.MILLIONS['lora'] == round(sum(128*(2*a.query_dim + 2*a.cross_attention_dim + 4*a.inner_dim) for n in sd.attn_processors for a in [sd.get_submodule(n.removesuffix('.processor'))])/1e6)

def test_what_is_here_and_what_is_not(tmp_path):
    assert S.parts_needed('tiny-plusv2') == [] and S.describe_model('tiny-plusv2').startswith('on this machine. Licence: Apache')
    parts = S.parts_needed('sd15-plusv2', tmp_path)
    assert [p.what for p in parts] == ['base model', 'FaceID', 'VAE', 'encoder', 'face pack'] and not any(p.here for p in parts) and 'download of 4.7 GB or more' in S.describe_model('sd15-plusv2', tmp_path) and 'non-commercial' in S.describe_model('sd15-plusv2', tmp_path)
    assert 'LoRA' in [p.what for p in S.parts_needed('sd15-faceid-lora', tmp_path)] and S.size_of(999) == '999 MB' and S.size_of(1000) == '1.0 GB'
    repo = tmp_path/'models--h94--IP-Adapter-FaceID'
    (repo/'snapshots'/'a').mkdir(parents=True)
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text('a')
    (repo/'snapshots'/'a'/'ip-adapter-faceid-plusv2_sd15.bin').write_text('x')
    assert [p.what for p in S.parts_needed('sd15-plusv2', tmp_path) if p.here] == ['FaceID'] and 'download of 4.5 GB' in S.describe_model('sd15-plusv2', tmp_path)

def test_nothing_is_fetched_that_was_not_allowed(studio, monkeypatch):
    import faceid_nb.models as models
    asked = []
    monkeypatch.setattr(models, 'load', lambda name, **more: asked.append((name, more)) or (_ for _ in ()).throw(ArgumentError('not here', '', '')))
    studio.model = 'sd15-faceid'
    assert not studio.generate() and '2.7 GB or more would be downloaded. Allow the download' in studio.error and not asked
    studio.download = True
    assert studio.generate() and studio.worker.wait(20) and asked == [('sd15-faceid', dict(download=True))] and 'not here' in studio.error

# previews

def test_a_linear_map_shows_the_latents_and_taesd_is_taken_where_it_is(shared, studio, photo, tmp_path, monkeypatch):
    import torch
    from diffusers import AutoencoderTiny
    made(studio)
    pipe, face = studio._faceid.pipe, Image.open(io.BytesIO(photo))
    x = torch.as_tensor(np.asarray(face.resize((64, 64)), np.float32)/127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad(): latents = pipe.vae.encode(x).latent_dist.mean*pipe.vae.config.scaling_factor
    show, name = S.find_previewer(pipe, face)
    assert name == 'the VAE' and show(latents)[0].size == (64, 64)
    whole = np.asarray(show(latents)[0].resize((16, 16), Image.Resampling.BOX), float)
    flat, name = S.find_previewer(pipe, face, tmp_path/'none', 0)
    assert name == 'a linear map'
    seen = flat(torch.cat([latents, -latents]))
    assert len(seen) == 2 and seen[0].size == (16, 16) and np.corrcoef(np.asarray(seen[0], float).ravel(), whole.ravel())[0, 1] > .9
    for folder, c in ('taesd', latents.shape[1]), ('other', 3): AutoencoderTiny(latent_channels=c, encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4, num_encoder_blocks=(1,)*4, num_decoder_blocks=(1,)*4).save_pretrained(tmp_path/folder)
    assert S.find_previewer(pipe, face, tmp_path/'other', 0)[1] == 'a linear map'
    small, name = S.find_previewer(pipe, face, tmp_path/'taesd', 0)
    assert name == 'TAESD' and small(latents)[0].size == (128, 128)
    pipe.vae.register_to_config(scaling_factor=.25)
    half = np.asarray(S.find_previewer(pipe, face, tmp_path/'none', 0)[0](latents/4)[0], float)
    own = np.asarray(S.find_previewer(pipe, face)[0](latents/4)[0].resize((16, 16), Image.Resampling.BOX), float)
    pipe.vae.register_to_config(scaling_factor=1.)
    assert abs(half - whole).mean() < 15 and abs(own - whole).mean() < 1
    monkeypatch.setattr(S, 'fit_colours', lambda *a: torch.full((5, 3), math.nan))
    none, name = S.find_previewer(pipe, face, tmp_path/'none', 0)
    assert name == 'none' and none(latents) == []

def test_a_preview_that_cannot_be_made_costs_nothing_else(studio, monkeypatch):
    studio._previewer = None
    monkeypatch.setattr(S, 'find_previewer', lambda *a: (_ for _ in ()).throw(RuntimeError('CUDA out of memory')))
    studio.preview_every = 1
    assert len(made(studio)) == 1 and studio.error == '' and studio.preview == []
    studio._previewer = None

# people

def test_files_that_are_dropped(studio, photo, two, tmp_path):
    studio.photographs = []
    studio.receive('a.png', photo)
    assert [p.name for p in studio.photographs] == ['a.png'] and not studio.error
    saved = studio.save(made(studio)[0], tmp_path)
    studio.prompt = 'other'
    studio.receive('b.png', saved.read_bytes())
    assert studio.prompt == 'photo of a person, smiling' and len(studio.photographs) == 1 and 'b.png: settings restored' in studio.note and 'Add the photograph' not in studio.note
    studio.photographs = []
    studio.receive('b.png', saved.read_bytes())
    assert 'Add the photograph' in studio.note
    studio.receive('c.txt', b'hello')
    assert 'not a picture' in studio.error and studio.photographs == []

def test_several_people_get_pictures_of_their_own(studio, two):
    from faceid_nb.measure import identity_similarity
    second = studio.add(two, 'two.png')
    studio.choose(second, 1)
    assert len(studio.people) == 1 and len(studio.people[0]) == 2
    studio.side_by_side, studio.num_samples = True, 2
    portraits = made(studio)
    studio.side_by_side = False
    assert [p.person for p in portraits] == ['me.png']*2 + ['two.png']*2 and [p.settings['seed'] for p in portraits] == [0, 1]*2 and [p.photographs for p in portraits[1:3]] == [(("'me.png'", 0),), (("'two.png'", 1),)] and portraits[2].face is second.face
    for p in portraits: assert abs(p.likeness - identity_similarity(p.face, p.image)[0]) < 1e-5

def test_two_people_in_one_are_pointed_out(studio, photo, two):
    studio.add(photo, 'again.png')
    assert studio.note == ''
    studio.choose(studio.add(two, 'two.png'), 0)
    studio.note = ''
    from_other = studio.photographs[-1].faces[1]
    assert float(from_other.embedding @ studio.photographs[0].face.embedding) < .2
    studio.photographs = []
    studio.add(png(Image.fromarray(from_other.image[:, 170:])), 'b.png')
    studio.add(photo, 'a.png')
    assert 'b.png and a.png look like two people' in studio.note
    studio.note, studio.photographs, studio.side_by_side = '', studio.photographs[:1], True
    studio.add(photo, 'a.png')
    assert studio.note == ''
    studio.side_by_side = False

def test_portrait_reads_as_many_photographs_as_are_wanted(studio, photo):
    studio.add(photo, 'b.png')
    studio.add(photo, 'c.png')
    studio.num_photographs = 2
    assert [len(p) for p in studio.people] == [3]
    studio.model = 'tiny-portrait'
    assert [len(p) for p in studio.people] == [2] and made(studio)[0].person == 'me.png, b.png'
    studio.num_photographs = 0
    assert [len(p) for p in studio.people] == [3]

def test_a_drawn_person_is_another_one_and_has_code(studio, tmp_path, monkeypatch):
    studio.photographs = []
    a = studio.draw_person()
    assert not studio.side_by_side
    b = studio.draw_person()
    assert studio.side_by_side and a.name != b.name and float(a.face.embedding @ b.face.embedding) < .3
    studio.side_by_side = False
    studio.remove(a)
    portrait = made(studio)[0]
    monkeypatch.chdir(tmp_path)
    exec(studio.code(portrait), names := {})
    assert abs(np.asarray(names['picture'], np.float32) - np.asarray(portrait.image, np.float32)).max() <= 2

def test_a_path_is_its_own_code(studio, photo, tmp_path):
    (tmp_path/'x.png').write_bytes(photo)
    studio.photographs = []
    studio.add(tmp_path/'x.png')
    assert studio.photographs[0].name == 'x.png' and repr(str(tmp_path/'x.png')) in studio.code()

def test_code_is_of_the_photographs_that_were_read(studio, photo):
    p = made(studio)[0]
    studio.photographs = []
    assert "read('me.png')[0]" in studio.code(p) and 'photograph.jpg' in studio.code()

def test_a_photograph_is_read_again_by_another_pack(studio, photo):
    from dataclasses import replace
    p = studio.photographs[0]
    right = p.face.embedding
    p.faces = [replace(p.faces[0], pack='other', embedding=-right)]*3
    p.chosen = 2
    made(studio)
    assert p.chosen == 0 and len(p.faces) == 1 and p.face.pack == 'tiny' and float(p.face.embedding @ right) > .99
    p.faces = [replace(p.faces[0], pack='other')]
    p.source = png(Image.new('RGB', (64, 64)))
    studio.generate()
    assert studio.worker.wait(20) and "No face was found in 'me.png'" in studio.error and studio.status == 'failed'

# the gallery

def test_kept_cleared_compared_and_best_first(studio):
    a, b, c = (S.Portrait(None, dict(model='m', seed=s, scale=1.), l, .1) for s, l in ((0, .3), (1, math.nan), (2, .6)))
    studio.portraits = [a, b, c]
    assert studio.shown == [a, b, c]
    studio.best_first = True
    assert studio.shown == [c, a, b]
    studio.best_first = False
    heard = []
    studio.observe(lambda change: heard.append(1), 'portraits')
    studio.keep(b)
    studio.compare(a)
    studio.compare(b)
    studio.compare(b)
    assert studio.compared == [a, b] and heard == [1]
    assert studio.differences() == dict(likeness=[.3, pytest.approx(math.nan, nan_ok=True)], distance=[.1, .1], seed=[0, 1])
    studio.clear()
    assert studio.portraits == [b] and studio.compared == [b]
    studio.compare(b, False)
    assert studio.compared == []

def test_only_so_many_are_remembered_but_all_that_are_kept(studio):
    studio.most = 3
    old = [S.Portrait(None, dict(seed=i), .1, .1) for i in range(6)]
    studio.keep(old[5])
    studio.portraits = old
    made(studio)
    assert len(studio.portraits) == 5 and studio.portraits[1:4] == old[:3] and studio.portraits[4] is old[5]
    studio.most = 400

def test_all_are_saved_if_that_is_wanted(studio, tmp_path):
    studio.folder, studio.save_all, studio.num_samples = str(tmp_path/'new'), True, 2
    made(studio)
    studio.save_all, studio.folder = False, 'portraits'
    assert len(list((tmp_path/'new').glob('*.png'))) == 2

def test_another_seed(studio):
    seeds = {studio.seed}
    [(studio.roll(), seeds.add(studio.seed)) for _ in range(3)]
    assert len(seeds) == 4

def test_a_long_prompt_is_noted(studio):
    studio.prompt = 'photo of a person, ' + 'smiling, '*60
    made(studio)
    assert 'The prompt is long: the model reads its first' in studio.note
    studio.prompt = 'photo of a person'
    made(studio)
    assert studio.note == ''

def test_device_memory_and_provider_are_told(studio):
    made(studio)
    assert studio.provider == 'CPUExecutionProvider' and studio.memory.endswith(' GB') and 0 < float(studio.memory.split()[0]) < float(studio.memory.split()[2]) and studio.device.startswith(str(studio._faceid.pipe.device))
    s = Studio(model='sd15-faceid')
    s.look()
    assert 'buffalo_l is not on this machine' in s.provider or s.provider.endswith('Provider')

def test_memory_is_released_but_not_under_work(studio):
    made(studio)
    studio.num_inference_steps = 200
    studio.generate()
    assert studio.release() is False and studio._faceid is not None
    studio.stop()
    studio.worker.wait(20)
    assert studio.release() and studio._faceid is None and studio._readers == {} and studio._previewer is None
    studio.num_inference_steps = 2
    made(studio)

# the grid

@pytest.fixture
def grid(studio, tmp_path):
    studio.model, studio.folder = 'tiny-faceid', str(tmp_path)
    studio.notify_change(dict(name='x', old=0, new=0, owner=studio, type='change'))
    g = S.Grid(studio, rows='seed', columns='scale', seeds=[0, 1], scales=[.5, 1.])
    yield g
    studio.folder = 'portraits'

def run(thing, begin, seconds=60):
    assert begin(), thing.studio.error
    assert thing.studio.worker.wait(seconds)
    return thing.studio.status

def test_values_of_a_grid_are_checked(grid):
    for name, text, said in (('seeds', '0, 1.5', 'seed takes numbers'), ('seeds', '', 'at least one seed'), ('scales', '1, 1', 'none twice'), ('s_scales', '0, 9', 's_scale is from 0 to 3'), ('scales', 'x', 'scale takes numbers')): assert not grid.enter(name, text) and said in grid.studio.error, name
    assert grid.seeds == [0, 1] and grid.scales == [.5, 1.] and grid.enter('seeds', ' 3;4, ') and grid.seeds == [3, 4] and grid.studio.error == ''
    for name in ('rows', 'columns'):
        with pytest.raises(TraitError, match=f'{name} is .* or '): grid.set_trait(name, 'prompt')
    grid.rows = grid.columns = 'scale'
    assert not grid.run() and 'both the scale' in grid.studio.error
    grid.rows, grid.columns = 'seed', 's_scale'
    assert not grid.run() and 'tiny-faceid has no structure weight' in grid.studio.error and not grid.studio.busy

def test_a_grid_fills_stops_and_goes_on(grid):
    came, before = [], []
    grid.observe(lambda c: before.append([x.state for x in c.new]), 'cells')
    grid.observe(lambda c: c.new >= 0 and came.append(c.new), 'arrived')
    grid.observe(lambda c: len(came) == 1 and grid.studio.stop(), 'arrived')
    assert 'to go' in run(grid, grid.run) and before == [['waiting']*4] and came == [0, 1] and grid.unfinished == 2 and grid.shape == (2, 2) and grid.studio.steps == 2*4 and grid.studio.step == 4
    assert run(grid, grid.run) == '4 cells, 2 of them from an earlier run' and [c.kept for c in grid.cells] == [True, True, False, False] and grid.studio.step == grid.studio.steps and sorted(grid.table()['seed']) == [0, 0, 1, 1] and all(-1 < c.likeness < 1 for c in grid.cells)

def test_previews_of_a_grid_belong_to_their_cells(grid, monkeypatch):
    made(grid.studio)
    grid.studio.preview_every, heard = 1, []
    monkeypatch.setattr(grid.studio, '_previewer', lambda latents: [Image.new('RGB', (1, 1), (i, 0, 0)) for i in range(len(latents))])
    grid.observe(lambda c: heard.append({k: v.getpixel((0, 0))[0] for k, v in c.new.items()}), 'previews')
    run(grid, grid.run)
    assert {0: 0, 1: 1} in heard and {2: 0, 3: 1} in heard and grid.previews == {}
    grid.seeds = [2, 3]
    grid.observe(lambda c: 2 in c.new and grid.studio.stop(), 'previews')
    assert '2 cells to go' in run(grid, grid.run) and grid.previews == {}

def test_progress_of_a_grid_goes_by_steps_and_never_back(grid):
    grid.studio.num_inference_steps, heard = 3, []
    grid.studio.observe(lambda c: heard.append(c.new), 'step')
    run(grid, grid.run)
    assert heard == [2, 4, 6, 8, 10, 12] or heard == [0, 2, 4, 6, 8, 10, 12]

def test_cells_that_fail_are_said(grid, monkeypatch):
    made(grid.studio)
    real = grid.studio._faceid.generate
    monkeypatch.setattr(grid.studio._faceid, 'generate', lambda *a, **k: real(*a, **k) if set(k['seed']) == {0} else (_ for _ in ()).throw(ValueError('a bad seed')))
    run(grid, grid.run)
    assert '2 of 4 cells could not be made. ValueError: a bad seed' in grid.studio.error and [c.state for c in grid.cells] == ['done', 'done', 'failed', 'failed']

def test_a_grid_is_exported_under_free_names(grid, tmp_path):
    assert grid.export() == [] and 'nothing to export' in grid.studio.error
    run(grid, grid.run)
    a, b = grid.export(), grid.export()
    assert [p.name for p in a] == ['grid_0001.png', 'grid_0001_curves.png'] and [p.name for p in b] == ['grid_0002.png', 'grid_0002_curves.png'] and (tmp_path/'grid_0001.csv').read_text().count('\n') == 5
    with Image.open(a[0]) as image: assert image.width > 3*image.height/3

def test_the_code_of_a_cell_makes_its_picture(grid, photo, tmp_path, monkeypatch):
    run(grid, grid.run)
    grid.studio.photographs = []
    (tmp_path/'me.png').write_bytes(photo)
    p = grid.portrait(2)
    monkeypatch.chdir(tmp_path)
    exec(grid.code(2), names := {})
    assert (p.settings['seed'], p.settings['scale'], p.person) == (1, .5, 'me.png') and 's_scale' not in p.settings and abs(np.asarray(names['picture'], np.float32) - np.asarray(p.image, np.float32)).max() <= 2

# likeness

def test_everybody_is_compared_with_everybody(studio, two, tmp_path):
    studio.folder = str(tmp_path)
    c = S.Comparison(studio, seeds=[0, 1])
    assert 'add people' in run(c, c.compare) and c.owner == [0, 0]
    studio.choose(studio.add(two, 'two.png'), 1)
    assert 'compared with 2 photographs' in run(c, c.compare) and c.owner is None and c.matrix.shape == (2, 2) and list(c.matrix.columns) == ['me.png', 'two.png']
    studio.side_by_side = True
    run(c, c.compare)
    assert c.matrix.shape == (4, 2) and c.owner == [0, 0, 1, 1] and list(c.matrix.index) == ['me.png, 0', 'me.png, 1', 'two.png, 0', 'two.png, 1']
    studio.side_by_side = False
    from faceid_nb.measure import identity_similarity
    from faceid_nb.sweep import read_table
    t = read_table(tmp_path/'sweeps')
    row = t[(t.face == 'two.png') & (t.seed == 1)].iloc[0]
    assert abs(c.matrix.loc['two.png, 1', 'me.png'] - identity_similarity(studio.photographs[0].face, row.image)[0]) < 1e-5
    studio.folder = 'portraits'

def test_a_survey_a_search_and_what_is_chosen(studio, tmp_path, monkeypatch):
    from faceid_nb import work
    like = {.25: .2, .5: .4, 1.: .6}
    def measured(model, cells, *_):
        for c in cells: c.likeness, c.distance, c.adherence = like[c.parameters['scale']], .1, 1 - like[c.parameters['scale']]
    monkeypatch.setattr(work, 'measure_cells', measured)
    studio.folder = str(tmp_path)
    c = S.Comparison(studio, scales=list(like), seeds=[0], target=.35)
    assert not c.use() and 'Nothing is chosen' in studio.error and c.export() == []
    assert 'a likeness of 0.35 is reached at scale 0.5: likeness 0.40, prompt adherence 0.60' in run(c, c.search) and c.chosen == (.5, 1.) and c.found.reached and c.use() and studio.scale == .5 and 1 < len(c.table) <= 3
    studio.scale = 1.
    assert '3 pictures surveyed' in run(c, c.survey) and sorted(c.table['scale']) == list(like) and c.by == ('scale',)
    c.target = .9
    assert 'not reached; nearest at scale 1' in run(c, c.search)
    assert [p.name for p in c.export()] == ['weights_0001_trade_off.png', 'weights_0001_curves.png'] and (tmp_path/'weights_0001_trade_off.csv').exists()
    with pytest.raises(TraitError, match='from -1 to 1'): c.target = 2
    c.scales = [.25, .5, 1.]
    c.seeds = list(range(40))
    studio.num_inference_steps = 50
    c.search()
    time.sleep(.3)
    studio.stop()
    assert studio.worker.wait(20) and 'stopped' in studio.status
    c.survey()
    time.sleep(.3)
    studio.stop()
    assert studio.worker.wait(20) and 'to go' in studio.status
    studio.folder = 'portraits'

def test_a_survey_of_both_weights(studio, tmp_path):
    studio.model, studio.folder = 'tiny-plusv2', str(tmp_path)
    c = S.Comparison(studio, scales=[.5, 1.], s_scales=[0., 1.], seeds=[0])
    run(c, c.survey)
    assert c.by == ('scale', 's_scale') and len(c.table) == 4
    run(c, c.compare)
    names = [p.name for p in c.export()]
    assert names == ['similarity_0001.png', 'weights_0001_trade_off.png', 'weights_0001_curves.png', 'weights_0001_likeness.png']
    studio.folder = 'portraits'

# attention

def test_attention_by_layer_and_step(studio):
    a = S.Attention(studio)
    with pytest.raises(ArgumentError, match='nothing was made'): a.shares()
    studio.num_inference_steps = 3
    assert run(a, a.run) == '7 layers, 3 steps, 4 tokens' and a.layers[0] == 'all' and len(a.layers) == 8 and a.image.size == (64, 64)
    shares = a.shares()
    assert shares.shape == (4, 64, 64) and abs(shares.sum(0) - 1).max() < 1e-4
    a.layer, a.step = a.layers[3], 2
    path = list(a.record.maps)[2]
    one = a.record.attention_maps((64, 64), [path], slice(1, 2))[0].numpy()
    assert np.array_equal(a.shares(), one)
    a.step = 0
    assert np.allclose(a.shares(), np.mean([a.record.attention_maps((64, 64), [path], slice(i, i + 1))[0].numpy() for i in range(3)], 0), atol=1e-6)
    pictures = a.overlays()
    assert len(pictures) == 4 and pictures[0].size == (64, 64) and a.limits == (pytest.approx(a.shares().min()), pytest.approx(a.shares().max()))
    assert a.record.at is None and a.record.tokens is None
    picture = a.image
    again = made(studio)[0].image
    assert abs(np.asarray(picture, int) - np.asarray(again, int)).max() <= 2 and 'record' not in picture.info['faceid_nb']
    a.step = 3
    studio.num_inference_steps = 2
    run(a, a.run)
    assert a.steps == 2 and a.step == 2
    studio.scale = 0.
    a.run()
    studio.worker.wait(20)
    assert 'the scale is 0' in studio.error
    studio.scale = 1.

def test_the_model_is_let_go_whatever_was_made_with_it(studio, tmp_path):
    import gc, weakref
    studio.model, studio.folder = 'tiny-plusv2', str(tmp_path)
    made(studio)
    g, c, a = S.Grid(studio, seeds=[0], s_scales=[0., 1.]), S.Comparison(studio, scales=[1.], s_scales=[1.], seeds=[0], target=0.), S.Attention(studio)
    for thing, begin in ((g, g.run), (c, c.compare), (c, c.survey), (c, c.search), (a, a.run)): run(thing, begin)
    parts = [weakref.ref(x) for x in (studio._faceid, studio._faceid.pipe.unet, studio._faceid.pipe.vae, studio._faceid.adapter.net)]
    assert g.cells and studio.release()
    gc.collect()
    studio.folder = 'portraits'
    assert [p() is None for p in parts] == [True]*4

def test_a_face_is_chosen_where_it_is_clicked(studio, two):
    p = studio.add(two, 'two.png')
    studio.choose_at(p, 250, 90)
    assert p.chosen == 1
    studio.choose_at(p, 70, 80)
    assert p.chosen == 0

def test_a_face_pack_is_fetched_for_a_photograph_if_that_is_allowed(studio, photo, monkeypatch, tmp_path):
    import faceid_nb.face as face
    tiny, came = studio._reader(), []
    monkeypatch.setattr(face.FaceReader, '__init__', lambda self, name, **more: (_ for _ in ()).throw(face._missing(name, tmp_path, 'there is no such folder')))
    monkeypatch.setattr(face, 'download_pack', lambda pack: (came.append(pack), studio._readers.update({pack: tiny})))
    studio.model, studio._readers = 'sd15-faceid', {'tiny': tiny}
    assert studio.add(photo, 'b.png') is None and 'Or allow the download' in studio.error and not came and len(studio.photographs) == 1
    studio.download = True
    studio.add(photo, 'b.png')
    assert studio.worker.wait(20) and came == ['buffalo_l'] and [p.name for p in studio.photographs] == ['me.png', 'b.png'] and studio.error == '' and 'b.png is read as soon as' in studio.note
    monkeypatch.setattr(face, 'download_pack', lambda pack: None)
    studio._readers.pop('buffalo_l')
    studio.add(photo, 'c.png')
    assert studio.worker.wait(20) and 'is missing' in studio.error and len(studio.photographs) == 2
    studio._readers = {}

def test_pictures_are_not_lost_when_something_fails_after_them(studio, monkeypatch):
    from faceid_nb import measure, sweep
    with monkeypatch.context() as m:
        m.setattr(measure, 'measure_pictures', lambda *a, **k: (_ for _ in ()).throw(RuntimeError('no measure')))
        portraits = made(studio)
        assert len(portraits) == 1 and math.isnan(portraits[0].likeness) and 'no measure' in studio.error and studio.status == 'failed'
    studio.save_all = True
    with monkeypatch.context() as m:
        m.setattr(studio, 'save', lambda p: (_ for _ in ()).throw(OSError('disk full')))
        assert len(made(studio)) == 2 and 'disk full' in studio.error
    studio.save_all = False
    with monkeypatch.context() as m:
        m.setattr(sweep, 'find_scoring', lambda reader: (False, 'steering recogniser'))
        made(studio)
        assert 'which flatters' in studio.note

def test_a_model_that_cannot_be_loaded_is_said(studio, monkeypatch):
    import faceid_nb.models as models
    monkeypatch.setattr(models, 'load', lambda *a, **k: (_ for _ in ()).throw(ArgumentError('Broken', 'by the test', 'Mend it')))
    studio.release()
    studio.generate()
    assert studio.worker.wait(20) and studio.error == 'Broken. by the test. Mend it.' and studio.status == 'failed' and not studio.busy
