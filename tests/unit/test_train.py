"The training loop: the merged LoRA, what is learnt, resuming, files, variants, the command."
import warnings
from contextlib import nullcontext
import numpy as np
import pytest
import torch
from PIL import Image
import goldens_build as gold
import helpers_pack as P
from helpers_train import SMALL, Reader, latent_table, quietly, random_crops, run, seeded, table_with
from faceid_nb import train as T, train_data
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.checkpoint import read_checkpoint
from faceid_nb.encoder import StructureEncoder
from faceid_nb.errors import ArgumentError, CheckpointError
from faceid_nb.lora import lora_from_checkpoint, read_lora

warnings.filterwarnings('ignore', message='.*have one picture only')
FILE = 'ip-adapter-faceid_sd15.safetensors'


@pytest.fixture(scope='module')
def pipe(): return P.pipeline()


@pytest.fixture(scope='module')
def table(pipe): return latent_table(pipe)


@pytest.fixture(scope='module')
def encoder(): return StructureEncoder(gold.image_encoder())


# --- the merged LoRA

def gradients(pipe, merge, checkpointing=False):
    "What the UNet says, and {name: gradient}."
    unet = pipe.unet
    adapter = FaceIDAdapter.from_state(**P.adapter_state(unet, seed=3))
    unet.requires_grad_(False)
    adapter.attach(unet, fold=False, sdpa=False)
    g = seeded(5)
    x, text, e = (torch.randn(*s, generator=g) for s in ((2, 8, 16, 16), (2, 6, 128), (2, 512)))
    e = torch.nn.functional.normalize(e, dim=1)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    merged = T.MergedLoRA(adapter.at.lora) if merge else nullcontext()
    try:
        with adapter.condition(e, guidance=1), merged:
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
    assert all(float(a[k].abs().max()) > 0 for k in a)
    assert all(float((a[k] - b[k]).abs().max()) < 1e-3*float(a[k].abs().max()) for k in a)
    assert not any('forward' in m.__dict__ or m._forward_hooks for m in pipe.unet.modules())


def test_gradient_checkpointing_changes_nothing(pipe):
    (y, a), (z, b) = gradients(pipe, True), gradients(pipe, True, checkpointing=True)
    assert torch.allclose(y, z, atol=1e-5)
    assert all(torch.allclose(a[k], b[k], atol=1e-6, rtol=1e-3) for k in a)


# --- the loop

def test_training_lowers_the_loss_and_leaves_the_base_alone(pipe, table, monkeypatch):
    # the same batch and noise at every step
    for room in (T, train_data):
        monkeypatch.setattr(room, 'step_generator', lambda seed, step, what=0: seeded(seed))
    before = {k: v.detach().clone() for k, v in pipe.unet.named_parameters()}
    processors, seen = dict(pipe.unet.attn_processors), []
    figures = run(pipe, table, steps=8, lr=3e-3, watch=lambda trainer: seen.append(1) or {}, gauge_every=4)
    assert figures[-1]['loss'] < figures[2]['loss'] < figures[0]['loss'] and len(seen) == 2
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.named_parameters())
    assert processors == dict(pipe.unet.attn_processors)
    assert not pipe.unet._forward_pre_hooks and not pipe.unet.training
    assert {'right', 'wrong', 'none'} <= set(figures[-1])


def test_files_load_as_what_was_trained(pipe, table, tmp_path):
    adapter = run(pipe, table, tmp_path, steps=3)[-1]['adapter']
    again = FaceIDAdapter.from_file(tmp_path/FILE).state_dict()
    fresh = FaceIDAdapter.new(pipe.unet, rank=4).state_dict()
    for part, tensors in adapter.state_dict().items():
        assert set(tensors) == set(again[part])
        assert all(torch.equal(v, again[part][k]) for k, v in tensors.items())
        assert all(not torch.equal(v, fresh[part][k]) for k, v in tensors.items())  # everything learnt


def test_the_lora_is_in_the_file_and_beside_it(pipe, table, tmp_path):
    run(pipe, table, tmp_path, steps=3)
    c = read_checkpoint(tmp_path/FILE)
    assert (c.variant, c.num_tokens, c.lora_rank) == ('faceid', 4, 4)
    inside = lora_from_checkpoint(c.ip_adapter, list(pipe.unet.attn_processors))
    beside = read_lora(tmp_path/'ip-adapter-faceid_sd15_lora.safetensors')
    assert set(inside) == set(beside) and all(torch.equal(v, beside[k]) for k, v in inside.items())


def test_what_was_trained_works_folded(pipe, table, tmp_path):
    run(pipe, table, tmp_path, steps=3)
    again = FaceIDAdapter.from_file(tmp_path/FILE).attach(pipe)
    with torch.no_grad(), again.condition(torch.ones(1, 512)/512**.5):
        y = pipe('a', num_inference_steps=1, output_type='latent').images
    again.detach()
    assert torch.isfinite(y).all()


def test_half_precision_files(pipe, tmp_path):
    files = T.write_adapter(FaceIDAdapter.new(pipe.unet, rank=4), pipe.unet, tmp_path, dtype=torch.float16)
    assert [f.name for f in files] == [FILE, 'ip-adapter-faceid_sd15_lora.safetensors']
    assert {v.dtype for v in read_checkpoint(files[0]).ip_adapter.values()} == {torch.float16}


def test_without_a_lora_there_is_one_file(pipe, tmp_path):
    files = T.write_adapter(FaceIDAdapter.new(pipe.unet, rank=0), pipe.unet, tmp_path, 'x')
    assert [f.name for f in files] == ['x.safetensors']


def same(a, b): return [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())]


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_resumed_run_ends_where_the_whole_one_does(pipe, table, tmp_path, accumulate):
    whole = run(pipe, table, steps=4, accumulate=accumulate)[-1]['adapter']
    run(pipe, table, tmp_path, stop=3, steps=4, accumulate=accumulate, save_every=-1)
    last = run(pipe, table, tmp_path, steps=4, resume=True, accumulate=accumulate)
    assert last[0]['step'] <= 3 + 1 and last[-1]['step'] == 4
    assert all(same(whole, last[-1]['adapter']))
    assert not any(same(whole, run(pipe, table, steps=4, seed=1)[-1]['adapter']))


def test_a_checkpoint_of_another_training_is_refused(pipe, table, tmp_path):
    run(pipe, table, tmp_path, steps=1)
    with pytest.raises(CheckpointError, match='another training'):
        run(pipe, table, tmp_path, steps=2, resume=True, rank=8)
    (tmp_path/'adapter.ckpt').write_bytes(b'cut off')
    with pytest.raises(CheckpointError, match='cannot be read'):
        run(pipe, table, tmp_path, steps=2, resume=True)
    assert not pipe.unet._forward_pre_hooks   # and the UNet is free again


@pytest.mark.parametrize('change', [
    lambda t: t[:1].expand_as(t),        # one memory for all its numbers
    lambda t: t.to(torch.float8_e5m2),   # no arithmetic of its own
], ids=['shared', 'float8'])
def test_numbers_in_unusual_memory_are_gone_on_with(pipe, table, tmp_path, change):
    run(pipe, table, tmp_path, steps=1)
    old = torch.load(tmp_path/'adapter.ckpt', weights_only=True)
    k = next(k for k, t in enumerate(old['mean']) if t.ndim == 1)
    old['mean'][k], one = change(old['mean'][k]), old['opt']['state'][k]
    one.update({name: change(one[name]) for name in ('exp_avg', 'exp_avg_sq')})
    torch.save(old, tmp_path/'adapter.ckpt')
    assert run(pipe, table, tmp_path, steps=3, resume=True)[-1]['step'] == 3


def test_closing_the_generator_takes_the_adapter_off(pipe, table):
    figures = T.train(pipe, table, steps=50, **SMALL)
    next(figures)
    assert pipe.unet._forward_pre_hooks
    figures.close()
    assert not pipe.unet._forward_pre_hooks and not any(m._forward_hooks for m in pipe.unet.modules())


def test_minutes_end_a_run(pipe, table): assert run(pipe, table, minutes=1e-6)[-1]['step'] <= 1


def test_checkpointing_runs(pipe, table):
    assert np.isfinite(run(pipe, table, steps=2, checkpointing=True)[-1]['loss'])


def test_a_recipe_and_its_fields_by_name_are_the_same(pipe, table):
    fields = {k: v for k, v in SMALL.items() if k != 'log_every'}
    *_, a = T.train(pipe, table, recipe=T.Recipe(**fields), steps=2)
    *_, b = T.train(pipe, table, steps=2, **fields)
    assert all(same(a['adapter'], b['adapter']))


def test_every_row_without_identity_reads_the_zero_embedding(pipe, table):
    fields = {k: v for k, v in SMALL.items() if k != 'log_every'}
    trainer, seen = T.Trainer(pipe, table, T.Recipe(**fields, drop=(0., .999, 0.))), []
    condition = trainer.adapter.condition
    def watched(e, **knobs):
        seen.append(e.clone())
        return condition(e, **knobs)
    try:
        trainer.adapter.condition = watched
        trainer.steps.take(trainer.lesson, T.batches_of(trainer), 1e-3)
    finally:
        del trainer.adapter.condition
        trainer.close()
    assert float(seen[0].abs().max()) == 0


BAD = [
    dict(batch=0), dict(lr=0), dict(rank=-1), dict(ema=1.), dict(high=1.5), dict(structure_drop=1.),
    dict(drop=(.5, .5, .5)), dict(drop=(.1, .1))]


@pytest.mark.parametrize('bad', BAD)
def test_arguments_out_of_range(pipe, table, bad):
    with pytest.raises(ArgumentError, match=next(iter(bad))): run(pipe, table, steps=1, **bad)


def test_length_must_be_said(pipe, table):
    with pytest.raises(ArgumentError, match='length of the training'): run(pipe, table)


def test_identity_loss_in_the_loop(pipe, table):
    W = torch.randn(512, 3*64*64)/100
    f = run(pipe, table, steps=2, batch=8, identity=lambda x, l: x.flatten(1) @ W.T)
    assert np.isfinite(f[-1]['unlike'])


# --- photographs

def test_photographs_train(pipe, tmp_path):
    for person, shades in dict(ada=(10, 20, 30), grace=(40, 50)).items():
        (tmp_path/person).mkdir()
        for s in shades: Image.new('RGB', (96, 64), (s, s, s)).save(tmp_path/person/f'{s}.png')
    with quietly(): data = T.PhotoFolder(tmp_path, pipe.tokenizer, Reader(), 64)
    assert np.isfinite(run(pipe, data, steps=2, gauge=0)[-1]['loss'])


def command(data, out, *more, base='tiny'):
    return T.main(['--base', str(base), '--data', str(data), '--out', str(out), *more])


def test_the_command_wants_a_folder_of_photographs(tmp_path, capsys):
    assert command(tmp_path/'none', tmp_path/'out', '--steps', '1') == 2
    assert 'no folder' in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_the_command_wants_a_length(tmp_path, capsys):
    assert command(tmp_path, tmp_path/'out') == 2
    assert 'length of the training' in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_the_command_wants_a_base(tmp_path, capsys):
    (tmp_path/'p').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'p'/'a.png')
    assert command(tmp_path, tmp_path/'out', '--steps', '1', base=tmp_path/'nowhere') in (1, 2)
    assert 'nowhere' in capsys.readouterr().err and not (tmp_path/'out').exists()


# --- Plus and Portrait

@pytest.mark.parametrize('variant', ['plus', 'plusv2'])
def test_plus_learns_from_the_picture_too(pipe, table, encoder, tmp_path, variant):
    data = table_with(table, crops=random_crops())
    adapter = FaceIDAdapter.new(pipe.unet, variant, rank=4, clip_embeddings_dim=96)
    start = {k: p.detach().clone() for k, p in adapter.net.named_parameters()}
    how = dict(steps=3, adapter=adapter, encoder=encoder, structure_drop=.4)
    figures = run(pipe, data, out=tmp_path, **how)
    assert np.isfinite([f['loss'] for f in figures]).all() and {'right', 'wrong', 'none'} <= set(figures[-1])
    after = figures[-1]['adapter'].net.named_parameters()
    moved = {k for k, p in after if not torch.equal(p, start[k])}
    assert {k for k in start if 'perceiver_resampler' in k and 'weight' in k} <= moved
    assert not any(p.requires_grad for p in encoder.model.parameters())
    c = read_checkpoint(tmp_path/f'ip-adapter-faceid-{variant}_sd15.safetensors')
    assert c.variant == variant and c.lora_rank == 4


@pytest.mark.parametrize('variant', ['plus', 'plusv2'])
def test_where_structure_is_dropped_the_crop_does_not_matter(pipe, table, encoder, variant):
    crops = random_crops()
    def losses(crops, drop):
        how = dict(steps=2, variant=variant, encoder=encoder, structure_drop=drop, gauge=0)
        return [f['loss'] for f in run(pipe, table_with(table, crops=crops), **how)]
    assert losses(crops, .999) == losses(255 - crops, .999)
    assert losses(crops, 0.) != losses(255 - crops, 0.)


@pytest.fixture
def structured(pipe, table, encoder):
    "function(**more) -> figures of a training of PlusV2 on crops with scores."
    scores = torch.randn(36, 3, generator=seeded(3))
    data = table_with(table, crops=random_crops(), scores=scores)
    how = dict(steps=2, variant='plusv2', encoder=encoder, gauge=0, high=1.)
    return lambda **more: run(pipe, data, **{**how, **more})


def channel_sums(latents): return latents[:, :3].sum((2, 3))/30


def test_structure_loss_takes_part_in_what_is_learnt(structured):
    figures = structured(structure=channel_sums)
    assert all(f['amiss'] > 0 for f in figures)
    with_it, without = (f[-1]['adapter'].net.image_proj.norm.weight for f in (figures, structured()))
    assert not torch.equal(with_it, without)


def test_strong_noise_is_another_question(structured):
    assert structured()[0]['loss'] != structured(high=0.)[0]['loss']


def test_structure_loss_wants_scores(pipe, table, encoder):
    data = table_with(table, crops=random_crops())
    with pytest.raises(ArgumentError, match='no scores'):
        run(pipe, data, steps=2, variant='plusv2', encoder=encoder, structure=channel_sums)


def test_plus_without_an_encoder_is_refused(pipe, table):
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(ArgumentError, match='no image encoder'): run(pipe, table, steps=1, variant='plusv2')
    assert pipe.unet.attn_processors == processors


def test_portrait_learns_from_several_photographs(pipe, table, tmp_path):
    how = dict(steps=2, variant='portrait', rank=0, num_tokens=16)
    figures = run(pipe, table_with(table, several=2), out=tmp_path, **how)
    c = read_checkpoint(tmp_path/'ip-adapter-faceid-portrait_sd15.safetensors')
    assert (c.variant, c.num_tokens, c.lora_rank) == ('portrait', 16, 0)
    assert np.isfinite(figures[-1]['loss'])
    assert not list(tmp_path.glob('*_lora.safetensors'))
