"""The training loop: pairs, drop-outs, loss, the merged LoRA, resuming, files, photographs, errors."""
import warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
import helpers_pack as P
from faceid_nb import train as T
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.checkpoint import read_checkpoint
from faceid_nb.lora import lora_from_checkpoint, read_lora
from faceid_nb.errors import ArgumentError, CheckpointError, NoFaceError

warnings.filterwarnings('ignore', message='.*have one picture only')
SMALL = dict(rank=4, batch=4, lr=1e-2, warmup=1, gauge=4, mixed_precision='no', log_every=1)

@pytest.fixture(scope='module')
def pipe(): return P.pipeline()

@pytest.fixture(scope='module')
def table(pipe):
    g = torch.Generator().manual_seed(0)
    person = torch.arange(12).repeat_interleave(3)
    ids = T.caption_ids(pipe.tokenizer, [f'person {i}' for i in range(36)])
    return T.LatentTable(torch.randn(36, 8, 16, 16, generator=g).half(), torch.stack([ids, ids]), torch.randn(36, 512, generator=g), person, torch.tensor([[.2, .2, .8, .8]]).expand(36, 4), torch.rand(36, 5, 2), held=4)

# --- pairs

@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 2**31))
def test_a_partner_is_another_picture_of_the_same_person(person, seed):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        groups = T.Groups(person)
    person = torch.tensor(person)
    i = torch.arange(len(person)).repeat(20)
    j = groups.partner(i, torch.rand(len(i), generator=torch.Generator().manual_seed(seed)))
    assert (person[i] == person[j]).all()
    alone = (person[:, None] == person).sum(1) == 1
    assert ((i == j) == alone[i]).all()

def test_all_other_pictures_are_equally_likely_partners():
    groups = T.Groups([7, 3, 7, 7, 3, 7])
    j = groups.partner(torch.zeros(3000, dtype=torch.long), torch.linspace(0, 1, 3000))
    assert j.bincount(minlength=6).tolist()[1] == 0 and all(abs(int((j == k).sum()) - 1000) < 5 for k in (2, 3, 5))

def test_held_out_people_are_not_drawn(table):
    i = torch.cat([i for (i, u), _ in zip(T.Draws(table.groups.rows, 50, 3), range(20))])
    assert set(i.tolist()) <= set(range(24)) and table.groups.held.tolist() == list(range(24, 36))
    with pytest.raises(ArgumentError, match='held out'): T.Groups([0, 0, 1, 1], held=2)

def test_people_with_one_picture_are_announced():
    with pytest.warns(UserWarning, match='1 of 2 people'): T.Groups([0, 0, 1])

def test_a_table_lends_embeddings_of_pictures_without_latents():
    rows = torch.tensor([1, 3, 4])
    t = T.LatentTable(torch.arange(3.).view(3, 1, 1, 1), torch.arange(3).view(1, 3, 1), torch.eye(6), [0, 0, 0, 1, 1, 1], rows=rows)
    assert t.groups.rows.tolist() == [1, 3, 4]
    b = t[rows, torch.tensor([[0., 0.], [.9, 0.], [.2, .9]])]
    assert b['latents'].flatten().tolist() == [0, 1, 2] and b['own'].argmax(1).tolist() == [1, 3, 4] and b['embeds'].argmax(1).tolist() == [2, 5, 5]

def test_a_table_of_unequal_parts_is_refused():
    z, ids, e = torch.zeros(3, 1, 2, 2), torch.zeros(1, 3, 4), torch.zeros(3, 512)
    for change in (dict(ids=ids[:, :2]), dict(embeds=e[:2]), dict(person=[0, 0]), dict(boxes=torch.zeros(2, 4))):
        with pytest.raises(ArgumentError): T.LatentTable(**dict(dict(latents=z, ids=ids, embeds=e, person=[0, 0, 0]), **change))

def test_draws_start_anywhere():
    rows = torch.arange(100)
    take = lambda d, n: [next(d) for _ in range(n)]
    whole, later = take(iter(T.Draws(rows, 5, 1)), 6), take(iter(T.Draws(rows, 5, 1, start=4)), 2)
    assert all(torch.equal(a, b) for x, y in zip(whole[4:], later) for a, b in zip(x, y)) and not torch.equal(whole[0][0], whole[1][0])
    two = [take(iter(T.Draws(rows, 5, 1, stride=2, offset=k)), 3) for k in (0, 1)]   # two processes share the steps out
    assert torch.equal(two[0][1][0], whole[2][0]) and torch.equal(two[1][1][0], whole[3][0])

# --- the question

@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(0, 2**31))
def test_error_of_noise_over_alpha_is_error_of_velocity(t, seed):
    g = torch.Generator().manual_seed(seed)
    z, wrong = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, 4, 4, generator=g)
    alpha_bar = (1 - torch.linspace(.00085**.5, .012**.5, 1000)**2).cumprod(0)
    x, t, noise = T.add_noise(z, alpha_bar, g, t=torch.full((2,), t))
    a = alpha_bar[t].view(-1, 1, 1, 1)
    assert torch.allclose(x, a.sqrt()*z + (1 - a).sqrt()*noise)
    e, w = T.target_and_weight(x, noise, t, alpha_bar, cap=1e9)
    v, one = T.target_and_weight(x, noise, t, alpha_bar, 'v_prediction')
    assert torch.allclose(v, a.sqrt()*noise - (1 - a).sqrt()*z, atol=2e-4)
    p = torch.ones(2, 1, 4, 4)
    assert float(T.weighted_error(wrong, e, w, p)) == pytest.approx(float(T.weighted_error((wrong - (1 - a).sqrt()*x)/a.sqrt(), v, one, p)), rel=2e-3)

def test_weight_is_capped_and_unknown_predictions_are_refused():
    alpha_bar = torch.tensor([.9, .001])
    t = torch.tensor([0, 1])
    x = torch.zeros(2, 1, 1, 1)
    assert T.target_and_weight(x, x, t, alpha_bar, cap=20.)[1].flatten().tolist() == pytest.approx([1/.9, 20.])
    assert T.target_and_weight(x, x, t, alpha_bar, cap=1.)[1].flatten().tolist() == [1., 1.]
    with pytest.raises(ArgumentError, match="'sample'"): T.target_and_weight(x, x, t, alpha_bar, 'sample')

def test_face_map_weighs_the_face():
    m = T.face_map(torch.tensor([[.25, 0., .75, .5], [0., 0., 0., 0.]]), 4, 4, 3.)
    assert m[0, 0].tolist() == [[1, 3, 3, 1], [1, 3, 3, 1], [1, 1, 1, 1], [1, 1, 1, 1]] and (m[1] == 1).all()

@settings(deadline=None, max_examples=25)
@given(st.tuples(*[st.floats(0, .3)]*3))
def test_drop_out_gives_four_kinds_of_rows(drop):
    u = (torch.arange(10000) + .5)/10000
    ids, e = T.drop_out(torch.ones(10000, 2), torch.ones(10000, 1), torch.zeros(2), u, drop)
    caption, face = ids[:, 0] > 0, e[:, 0] > 0
    share = lambda m: float(m.float().mean())
    found = share(~caption & face), share(caption & ~face), share(~caption & ~face)
    assert found == pytest.approx(drop, abs=5e-4) and set(e.unique().tolist()) <= {0., 1.}

# --- the merged LoRA

def gradients(pipe, merge, checkpointing=False, dtype=torch.float32):
    unet = pipe.unet
    adapter = FaceIDAdapter.from_state(**P.adapter_state(unet, seed=3))
    unet.requires_grad_(False)
    adapter.attach(unet, fold=False, sdpa=False)
    g = torch.Generator().manual_seed(5)
    x, text, e = (torch.randn(*s, generator=g) for s in ((2, 8, 16, 16), (2, 6, 128), (2, 512)))
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    try:
        with adapter.condition(torch.nn.functional.normalize(e, dim=1), guidance=1), T.MergedLoRA(adapter.at.lora) if merge else T.nothing():
            y = unet(x, torch.tensor([20, 800]), text).sample
            y.pow(2).mean().backward()
        return y.detach(), {k: p.grad for k, p in adapter.net.named_parameters()}
    finally:
        adapter.detach()
        unet.disable_gradient_checkpointing()
        unet.eval()

def test_merged_lora_is_the_lora_beside(pipe):
    (y, a), (z, b) = gradients(pipe, False), gradients(pipe, True)
    assert float((y - z).abs().max()) < 1e-4*float(y.abs().max())
    assert all(float(a[k].abs().max()) > 0 for k in a) and all(float((a[k] - b[k]).abs().max()) < 1e-3*float(a[k].abs().max()) for k in a)
    assert not any('forward' in m.__dict__ or m._forward_hooks for m in pipe.unet.modules())

def test_gradient_checkpointing_changes_nothing(pipe):
    (y, a), (z, b) = gradients(pipe, True), gradients(pipe, True, checkpointing=True)
    assert torch.allclose(y, z, atol=1e-5) and all(torch.allclose(a[k], b[k], atol=1e-6, rtol=1e-3) for k in a)

# --- the loop

def run(pipe, table, out=None, stop=None, **more):
    figures = []
    for f in T.train(pipe, table, out, **{**SMALL, **more}):
        figures.append(f)
        if f['step'] == stop: break
    return figures

def test_training_lowers_the_loss_and_leaves_the_base_alone(pipe, table, monkeypatch):
    monkeypatch.setattr(T, 'step_generator', lambda seed, step, what=0: torch.Generator().manual_seed(seed))   # the same batch and noise at every step
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    processors = dict(pipe.unet.attn_processors)
    raw = []
    figures = run(pipe, table, steps=8, lr=3e-3, watch=lambda trainer: raw.append(1) or {}, gauge_every=4)
    assert figures[-1]['loss'] < figures[2]['loss'] < figures[0]['loss'] and len(raw) == 2
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items()) and processors == dict(pipe.unet.attn_processors)
    assert not pipe.unet._forward_pre_hooks and not pipe.unet.training and {'right', 'wrong', 'none'} <= set(figures[-1])

def test_files_load_as_what_was_trained(pipe, table, tmp_path):
    adapter = run(pipe, table, tmp_path, steps=3)[-1]['adapter']
    again = FaceIDAdapter.from_file(tmp_path/'ip-adapter-faceid_sd15.safetensors')
    for part, tensors in adapter.state_dict().items():
        assert set(tensors) == set(again.state_dict()[part]) and all(torch.equal(v, again.state_dict()[part][k]) for k, v in tensors.items())
    fresh = FaceIDAdapter.new(pipe.unet, rank=4).state_dict()
    assert all(not torch.equal(v, fresh[part][k]) for part, tensors in adapter.state_dict().items() for k, v in tensors.items())   # everything learnt
    c = read_checkpoint(tmp_path/'ip-adapter-faceid_sd15.safetensors')
    assert (c.variant, c.num_tokens, c.lora_rank) == ('faceid', 4, 4)
    inside = lora_from_checkpoint(c.ip_adapter, list(pipe.unet.attn_processors))
    beside = read_lora(tmp_path/'ip-adapter-faceid_sd15_lora.safetensors')
    assert set(inside) == set(beside) and all(torch.equal(v, beside[k]) for k, v in inside.items())
    again.attach(pipe)   # and works folded
    with torch.no_grad(), again.condition(torch.ones(1, 512)/512**.5): y = pipe('a', num_inference_steps=1, output_type='latent').images
    again.detach()
    assert torch.isfinite(y).all()

def test_half_precision_files(pipe, tmp_path):
    adapter = FaceIDAdapter.new(pipe.unet, rank=4)
    files = T.write_adapter(adapter, pipe.unet, tmp_path, dtype=torch.float16)
    assert [f.name for f in files] == ['ip-adapter-faceid_sd15.safetensors', 'ip-adapter-faceid_sd15_lora.safetensors']
    assert {v.dtype for v in read_checkpoint(files[0]).ip_adapter.values()} == {torch.float16}
    assert [f.name for f in T.write_adapter(FaceIDAdapter.new(pipe.unet, rank=0), pipe.unet, tmp_path, 'x')] == ['x.safetensors']

@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_resumed_run_ends_where_the_whole_one_does(pipe, table, tmp_path, accumulate):
    whole = run(pipe, table, steps=4, accumulate=accumulate)[-1]['adapter']
    run(pipe, table, tmp_path, stop=3, steps=4, accumulate=accumulate, save_every=-1)
    last = run(pipe, table, tmp_path, steps=4, resume=True, accumulate=accumulate)
    assert [f['step'] for f in last][0] <= 3 + 1 and last[-1]['step'] == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), last[-1]['adapter'].parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters(), run(pipe, table, steps=4, seed=1)[-1]['adapter'].parameters()))

def test_a_checkpoint_of_another_training_is_refused(pipe, table, tmp_path):
    run(pipe, table, tmp_path, steps=1)
    with pytest.raises(CheckpointError, match='another training'): run(pipe, table, tmp_path, steps=2, resume=True, rank=8)
    (tmp_path/'adapter.ckpt').write_bytes(b'cut off')
    with pytest.raises(CheckpointError, match='cannot be read'): run(pipe, table, tmp_path, steps=2, resume=True)
    assert not pipe.unet._forward_pre_hooks   # and the UNet is free again

def test_closing_the_generator_takes_the_adapter_off(pipe, table):
    figures = T.train(pipe, table, steps=50, **SMALL)
    next(figures)
    assert pipe.unet._forward_pre_hooks
    figures.close()
    assert not pipe.unet._forward_pre_hooks and not any(m._forward_hooks for m in pipe.unet.modules())

def test_minutes_end_a_run(pipe, table): assert run(pipe, table, minutes=1e-6)[-1]['step'] <= 1

def test_bf16_runs(pipe, table): assert np.isfinite(run(pipe, table, steps=2, mixed_precision='no', checkpointing=True)[-1]['loss'])

def test_every_row_without_identity_reads_the_zero_embedding(pipe, table):
    run = T.Trainer(pipe, table, **{k: v for k, v in SMALL.items() if k != 'log_every'}, drop=(0., .999, 0.))
    seen = []
    try:
        condition = run.adapter.condition
        run.adapter.condition = lambda e, **k: (seen.append(e.clone()), condition(e, **k))[1]
        run.learn(run.batches(), 1e-3)
    finally:
        del run.adapter.condition
        run.close()
    assert float(seen[0].abs().max()) == 0

@pytest.mark.parametrize('bad', [dict(batch=0), dict(lr=0), dict(rank=-1), dict(ema=1.), dict(high=1.5), dict(drop=(.5, .5, .5)), dict(drop=(.1, .1))])
def test_arguments_out_of_range(pipe, table, bad):
    with pytest.raises(ArgumentError, match=next(iter(bad))): run(pipe, table, steps=1, **bad)
def test_length_must_be_said(pipe, table):
    with pytest.raises(ArgumentError, match='length of the training'): run(pipe, table)

# --- the gauge, likeness

def test_gauge_tells_readers_from_the_blind():
    z, e = torch.randn(6, 2, 4, 4), torch.nn.functional.normalize(torch.randn(6, 512), dim=1)
    alpha_bar = torch.linspace(.999, .005, 1000)
    gauge = T.Gauge(dict(latents=z, embeds=e, boxes=torch.tensor([[0., 0., .5, 1.]]).expand(6, 4)), torch.zeros(6, 1, 1), alpha_bar)
    blind = gauge(lambda x, t, text, e: torch.zeros_like(x))
    assert blind['right'] == blind['wrong'] == blind['none'] > 0
    noise = gauge.target
    reads = gauge(lambda x, t, text, e_: noise + 10*(e_ - e).norm(dim=1).view(-1, 1, 1, 1))
    assert reads['right'] < 1e-9 < min(reads['wrong'], reads['none'])
    # errors off the face do not count
    elsewhere = torch.zeros_like(noise)
    elsewhere[..., 2:] = 5
    assert gauge(lambda *a: noise + elsewhere)['right'] < 1e-9

def test_likeness_loss_pulls_towards_the_person(pipe):
    torch.manual_seed(0)
    alpha_bar, vae = pipe.scheduler.alphas_cumprod, pipe.vae.requires_grad_(False)
    W = torch.randn(512, 3*64*64)
    recogniser = lambda pictures, landmarks: (pictures*float(landmarks.max() > 1)).flatten(1) @ W.T   # landmarks must come in pixels
    said = torch.randn(3, 8, 16, 16, requires_grad=True)
    x = torch.randn(3, 8, 16, 16)
    batch = dict(own=torch.randn(3, 512), landmarks=torch.rand(3, 5, 2))
    loss = T.likeness_loss(said, x, torch.tensor([10, 900, 250]), batch, alpha_bar, vae, recogniser)
    loss.backward()
    assert 0 < float(loss.detach()) < 2 and (said.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True]
    assert float(T.likeness_loss(said, x, torch.tensor([900]*3), batch, alpha_bar, vae, recogniser)) == 0

def test_identity_loss_in_the_loop(pipe, table):
    W = torch.randn(512, 3*64*64)/100
    f = run(pipe, table, steps=2, batch=8, identity=lambda x, l: x.flatten(1) @ W.T)
    assert np.isfinite(f[-1]['unlike'])

# --- structure as a loss

@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_the_right_answer_means_the_clean_picture(pipe, prediction):
    alpha_bar = pipe.scheduler.alphas_cumprod
    z = torch.randn(5, 8, 16, 16)
    x, t, noise = T.add_noise(z, alpha_bar, torch.Generator().manual_seed(0), t=torch.tensor([0, 300, 600, 900, 999]))
    a = alpha_bar[t].view(-1, 1, 1, 1)
    said = noise if prediction == 'epsilon' else a.sqrt()*noise - (1 - a).sqrt()*z
    assert torch.allclose(T.estimate(said, x, t, alpha_bar, prediction), z, atol=2e-5)

def test_structure_loss_asks_where_noise_is_strong_and_the_crop_was_shown(pipe):
    torch.manual_seed(0)
    alpha_bar, W = pipe.scheduler.alphas_cumprod, torch.randn(8*16*16, 3)/30
    reader = lambda z: z.flatten(1) @ W
    z, t = torch.randn(4, 8, 16, 16), torch.tensor([950, 950, 599, 600])
    x, _, noise = T.add_noise(z, alpha_bar, torch.Generator().manual_seed(0), t=t)
    batch = dict(scores=reader(z))
    shown = torch.tensor([1., 0, 1, 1])
    said = (noise + .01*torch.randn_like(noise)).requires_grad_()
    T.structure_loss(said, x, t, batch, alpha_bar, reader, shown).backward()
    assert (said.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, False, True]
    assert float(T.structure_loss(noise, x, t, batch, alpha_bar, reader, shown)) < 1e-3 < float(T.structure_loss(noise, x, t, dict(scores=reader(z).roll(1, 0)), alpha_bar, reader, shown))
    assert float(T.structure_loss(noise, x, t, batch, alpha_bar, reader, torch.zeros(4))) == 0 == float(T.structure_loss(noise, x, t, batch, alpha_bar, reader, shown, above=951))

@pytest.mark.parametrize('high', [0., .5, 1.])
def test_more_rows_with_strong_noise(pipe, high):
    # of a logistic normal, and of an even draw
    z = torch.zeros(4000, 1, 1, 1)
    _, t, _ = T.add_noise(z, pipe.scheduler.alphas_cumprod, torch.Generator().manual_seed(0), high=high)
    usual = .6*.343 + .4*.4
    assert float((t >= 600).float().mean()) == pytest.approx(high + (1 - high)*usual, abs=.03) and int(t.max()) < 1000

# --- photographs

class Reader:
    "Finds a face in the middle of every picture that is not black."
    name, read = 'stand-in', 0
    def best(self, image, which='largest'):
        self.read += 1
        if image.max() == 0: raise NoFaceError('No face was found')
        h, w, _ = image.shape
        e = np.zeros(512, np.float32)
        e[int(image[0, 0, 0])] = 1
        return SimpleNamespace(embedding=e, box=np.array([.4*w, .3*h, .6*w, .6*h], np.float32), landmarks=np.array([[.45*w, .4*h]]*5, np.float32))

@pytest.fixture
def folder(tmp_path):
    for person, shades in dict(ada=(10, 20, 30), grace=(40, 50), nobody=(0,)).items():
        (tmp_path/'photos'/person).mkdir(parents=True)
        for s in shades: Image.new('RGB', (96, 64), (s, s, s)).save(tmp_path/'photos'/person/f'{s}.png')
    (tmp_path/'photos'/'ada'/'10.txt').write_text('ada smiling\n')
    (tmp_path/'photos'/'notes').mkdir()
    return tmp_path/'photos'

def test_photographs(pipe, folder, tmp_path):
    reader = Reader()
    with pytest.warns(UserWarning, match='1 of 6 photographs show no face'): data = T.PhotoFolder(folder, pipe.tokenizer, reader, 64, tmp_path/'cache.pt')
    assert len(data) == 5 and data.captions == ['ada smiling'] + ['photo of a person']*4 and reader.read == 6
    b = data[torch.tensor([0, 4]), torch.tensor([[.1, 0], [.9, 0]])]
    assert b['pixels'].shape == (2, 3, 64, 64) and b['own'].argmax(1).tolist() == [10, 50] and b['embeds'].argmax(1).tolist()[1] == 40 and b['embeds'].argmax(1).tolist()[0] in (20, 30)
    assert float(b['pixels'][0].mean()) == pytest.approx(10/127.5 - 1, abs=.01)
    assert b['boxes'][0].tolist() == pytest.approx([(.4*96 - 16)/64, .3, (.6*96 - 16)/64, .6]) and b['landmarks'].shape == (2, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        T.PhotoFolder(folder, pipe.tokenizer, reader, 64, tmp_path/'cache.pt')
    assert reader.read == 6   # remembered, also that there was no face

def test_photographs_train(pipe, folder):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        data = T.PhotoFolder(folder, pipe.tokenizer, Reader(), 64)
    assert np.isfinite(run(pipe, data, steps=2, gauge=0)[-1]['loss'])

def test_folders_without_photographs(pipe, tmp_path):
    with pytest.raises(ArgumentError, match='no folder'): T.photo_files(tmp_path/'none')
    with pytest.raises(ArgumentError, match='no pictures at all'): T.photo_files(tmp_path)
    Image.new('RGB', (8, 8)).save(tmp_path/'a.jpg')
    with pytest.raises(ArgumentError, match='1 pictures lie in it directly'): T.photo_files(tmp_path)
    (tmp_path/'x').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'x'/'a.jpg')
    with pytest.raises(NoFaceError, match='any photograph'): T.PhotoFolder(tmp_path, pipe.tokenizer, Reader())

@given(st.integers(1, 400), st.integers(1, 400), st.floats(-50, 450), st.floats(-50, 450), st.floats(1, 200))
def test_square_lies_in_the_picture_and_shows_the_face(w, h, x, y, side):
    x0, y0, x1, y1 = T.square((w, h), (x, y, x + side, y + side))
    assert x1 - x0 == y1 - y0 == min(w, h) and 0 <= x0 and 0 <= y0 and x1 <= w and y1 <= h
    cx, cy = x + side/2, y + side/2
    if 0 <= cx <= w and 0 <= cy <= h: assert x0 - .51 <= cx <= x1 + .51 and y0 - .51 <= cy <= y1 + .51

def test_command_says_what_is_wrong(tmp_path, capsys):
    assert T.main(['--base', 'tiny', '--data', str(tmp_path/'none'), '--out', str(tmp_path/'out'), '--steps', '1']) == 2 and 'no folder' in capsys.readouterr().err
    assert T.main(['--base', 'tiny', '--data', str(tmp_path), '--out', str(tmp_path/'out')]) == 2 and 'length of the training' in capsys.readouterr().err
    (tmp_path/'p').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'p'/'a.png')
    assert T.main(['--base', str(tmp_path/'nowhere'), '--data', str(tmp_path), '--out', str(tmp_path/'out'), '--steps', '1']) in (1, 2) and 'nowhere' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()

# --- Plus and Portrait

@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 2**31))
def test_several_partners_are_others_and_differ_where_they_can(person, k, seed):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        groups = T.Groups(person)
    person = torch.tensor(person)
    i = torch.arange(len(person))
    j = groups.partner(i, torch.rand(len(i), generator=torch.Generator().manual_seed(seed)), k)
    assert j.shape == (len(i), k) and (person[j] == person[:, None]).all()
    for row, me in zip(j.tolist(), i.tolist()):
        others = int((person == person[me]).sum()) - 1
        assert (me not in row) == (others > 0) and len(set(row)) == max(1, min(k, others))

@pytest.fixture(scope='module')
def encoder():
    import goldens_build as gold
    from faceid_nb.encoder import StructureEncoder
    return StructureEncoder(gold.image_encoder())

def more(table, **kw):
    return T.LatentTable(table.latents, table.ids, table.embeds, table.groups.group, table.boxes, table.landmarks, held=4, **kw)

@pytest.mark.parametrize('variant', ['plus', 'plusv2'])
def test_plus_learns_from_the_picture_too(pipe, table, encoder, tmp_path, variant):
    data = more(table, crops=torch.randint(0, 256, (36, 3, 56, 56), generator=torch.Generator().manual_seed(2)).byte())
    adapter = FaceIDAdapter.new(pipe.unet, variant, rank=4, clip_embeddings_dim=96)
    start = {k: p.detach().clone() for k, p in adapter.net.named_parameters()}
    figures = run(pipe, data, out=tmp_path, steps=3, adapter=adapter, encoder=encoder, structure_drop=.4)
    assert np.isfinite([f['loss'] for f in figures]).all() and {'right', 'wrong', 'none'} <= set(figures[-1])
    moved = {k for k, p in figures[-1]['adapter'].net.named_parameters() if not torch.equal(p, start[k])}
    assert {k for k in start if 'perceiver_resampler' in k and 'weight' in k} <= moved
    assert not any(p.requires_grad for p in encoder.model.parameters())
    c = read_checkpoint(tmp_path/f'ip-adapter-faceid-{variant}_sd15.safetensors')
    assert c.variant == variant and c.lora_rank == 4

def test_where_structure_is_dropped_the_crop_does_not_matter(pipe, table, encoder):
    crops = torch.randint(0, 256, (36, 3, 56, 56), generator=torch.Generator().manual_seed(2)).byte()
    losses = lambda variant, crops, drop: [f['loss'] for f in run(pipe, more(table, crops=crops), steps=2, variant=variant, encoder=encoder, structure_drop=drop, gauge=0)]
    for variant in ('plus', 'plusv2'):
        assert losses(variant, crops, .999) == losses(variant, 255 - crops, .999)
        assert losses(variant, crops, 0.) != losses(variant, 255 - crops, 0.)

def test_structure_loss_in_the_loop(pipe, table, encoder):
    crops = torch.randint(0, 256, (36, 3, 56, 56), generator=torch.Generator().manual_seed(2)).byte()
    scores, W = torch.randn(36, 3, generator=torch.Generator().manual_seed(3)), torch.randn(8*16*16, 3)/30
    data = more(table, crops=crops, scores=scores)
    i = data.groups.rows[:5]
    assert torch.equal(data[i, torch.rand(5, 2)]['scores'], scores[i])
    how = dict(steps=2, variant='plusv2', encoder=encoder, gauge=0, high=1.)
    reader = lambda z: z.flatten(1) @ W
    figures = run(pipe, data, structure=reader, **how)
    assert all(f['amiss'] > 0 for f in figures)
    # it takes part in what is learnt
    w = lambda f: f[-1]['adapter'].net.image_proj.norm.weight.detach()
    assert not torch.equal(w(figures), w(run(pipe, data, **how)))
    # strong noise by the same seed is another question
    first = lambda **more: run(pipe, data, **how | more)[0]['loss']
    assert first() != first(high=0.)
    with pytest.raises(ArgumentError, match='no scores'): next(T.train(pipe, more(table, crops=crops), structure=reader, **SMALL | how))

def test_plus_without_an_encoder_is_refused(pipe, table):
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(ArgumentError, match='no image encoder'): next(T.train(pipe, table, steps=1, variant='plusv2', **SMALL))
    assert pipe.unet.attn_processors == processors

def test_portrait_learns_from_several_photographs(pipe, table, tmp_path):
    data = more(table, several=2)
    i = torch.tensor([0, 5])
    b = data[i, torch.tensor([[0., 0.], [.9, 0.]])]
    assert b['embeds'].shape == (2, 2, 512) and all(not torch.allclose(b['embeds'][r, j], b['own'][r]) for r in (0, 1) for j in (0, 1)) and not torch.allclose(b['embeds'][0, 0], b['embeds'][0, 1])
    figures = run(pipe, data, out=tmp_path, steps=2, variant='portrait', **{**SMALL, 'rank': 0, 'num_tokens': 16})
    c = read_checkpoint(tmp_path/'ip-adapter-faceid-portrait_sd15.safetensors')
    assert (c.variant, c.num_tokens, c.lora_rank) == ('portrait', 16, 0) and np.isfinite(figures[-1]['loss'])
    assert not list(tmp_path.glob('*_lora.safetensors'))

def test_crops_of_a_folder_are_aligned_faces(pipe, folder):
    from faceid_nb.align import ARCFACE_TEMPLATE, norm_crop
    from faceid_nb.face import read_image
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        data = T.PhotoFolder(folder, pipe.tokenizer, Reader(), 64, crops=True, several=2)
    for face in data.faces: face['landmarks'] = torch.from_numpy(ARCFACE_TEMPLATE*np.float32(.5))
    b = data[torch.tensor([4, 0]), torch.zeros(2, 2)]
    assert b['crops'].shape == (2, 3, 224, 224) and b['embeds'].shape == (2, 2, 512)
    assert np.array_equal(b['crops'][0].permute(1, 2, 0).numpy(), norm_crop(read_image(data.files[4]), data.faces[4]['landmarks'].numpy(), 224))
