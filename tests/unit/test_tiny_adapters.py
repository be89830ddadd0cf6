"The training of the pack's adapters: its table, what it begins with, what ships, its commands."
import json
import random
import pytest
import torch
import torch.nn.functional as F
import goldens_build as gold
import helpers_pack as P
from helpers_tiny import drawn_photos, write_parts
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.checkpoint import read_checkpoint
from faceid_nb.errors import ArgumentError, WeightsMissingError
from faceid_nb.hub import TINY
from faceid_nb.tiny import adapters as A
from faceid_nb.tiny import people as drawn
from faceid_nb.tiny.base import new_tokenizer
from faceid_nb.tiny.crops import aligned
from faceid_nb.train_data import LatentTable, caption_ids

SMALL = dict(batch=4, held=2, mixed_precision='no')


@pytest.fixture(scope='module')
def photos(): return drawn_photos()


def test_word_by_word_is_the_tokenizer(photos):
    people = drawn.take(photos['identities'], photos['person'])
    texts = drawn.captions(people, photos['scenes'], random.Random(0)) + ['', 'a '*90]
    for tokenizer in (new_tokenizer(), P.pipeline().tokenizer):
        assert torch.equal(A.word_ids(tokenizer, texts), caption_ids(tokenizer, texts))


def test_table_of_half_the_photographs(photos, tmp_path):
    rows = write_parts(tmp_path, photos)
    t = A.training_table(tmp_path, P.pipeline().tokenizer, held=2)
    assert isinstance(t, LatentTable)
    assert len(t) == 24
    assert set(t.groups.rows.tolist()) == set(rows.tolist()[:20])
    i = t.groups.rows[:6]
    b = t[i, torch.rand(6, 2)]
    assert torch.allclose(b['boxes'], photos['boxes'][i]/64)
    assert torch.allclose(b['landmarks'], photos['landmarks'][i]/64)
    assert b['ids'].dtype == torch.long


def test_parts_that_are_missing_or_do_not_fit(photos, tmp_path):
    with pytest.raises(WeightsMissingError, match='--part photos'): A.training_table(tmp_path, None)
    write_parts(tmp_path, photos, torch.zeros(10, 512))
    with pytest.raises(ArgumentError, match='10 embeddings'): A.training_table(tmp_path, None)


def test_train_command_says_that_nobody_is_left(photos, tmp_path, capsys):
    write_parts(tmp_path, photos)
    where = ['--parts', str(tmp_path), '--out', str(tmp_path/'out')]
    how = ['--steps', '2', '--batch', '4', '--rank', '4', '--gauge-every', '1']
    assert A.main(['train', *where, *how]) == 2     # nobody left to train on
    assert 'held out' in capsys.readouterr().err


def test_a_training_writes_its_log_and_files(photos, tmp_path):
    write_parts(tmp_path, photos)
    *_, f = A.train_tiny(tmp_path, tmp_path/'out', steps=2, rank=4, **SMALL)
    log = [json.loads(line) for line in (tmp_path/'out'/'log.jsonl').read_text().splitlines()]
    assert f['step'] == 2
    assert log[-1]['step'] == 2
    assert {'right', 'wrong', 'none'} <= set(log[-1])
    assert (tmp_path/'out'/'ip-adapter-faceid_sd15_lora.safetensors').exists()


def test_training_goes_on_from_a_checkpoint(photos, tmp_path):
    write_parts(tmp_path, photos)
    def train(out, **more):
        "The first weight of the LoRA after one step."
        list(A.train_tiny(tmp_path, tmp_path/out, steps=1, rank=4, **SMALL, **more))
        layers = read_checkpoint(tmp_path/out/'ip-adapter-faceid_sd15.safetensors').ip_adapter
        return layers['1.to_q_lora.down.weight']
    first = train('first', seed=1)
    file = tmp_path/'first'/'ip-adapter-faceid_sd15.safetensors'
    again, fresh = train('again', seed=2, init=file, lr=1e-9), train('fresh', seed=2, lr=1e-9)
    assert (again - first).abs().max() < 1e-5 < (fresh - first).abs().max()


@pytest.mark.parametrize('variant, more', [('plusv2', dict(rank=4)),
                                           ('portrait', dict(rank=0, num_tokens=16, several=3))])
def test_other_variants_train_on_the_same_parts(photos, tmp_path, variant, more):
    write_parts(tmp_path, photos)
    gold.image_encoder().save_pretrained(tmp_path/'eye')
    if 'plus' in variant: more = more | dict(encoder=tmp_path/'eye')
    *_, f = A.train_tiny(tmp_path, tmp_path/'out', steps=2, variant=variant, **SMALL, **more)
    assert f['adapter'].variant == variant
    assert (tmp_path/'out'/f'ip-adapter-faceid-{variant}_sd15.safetensors').exists()


def test_a_table_lends_crops_and_several_embeddings(photos, tmp_path):
    write_parts(tmp_path, photos)
    t = A.training_table(tmp_path, P.pipeline().tokenizer, held=2, crops=True, several=3)
    i = t.groups.rows[:3]
    b = t[i, torch.rand(3, 2)]
    assert b['embeds'].shape == (3, 3, 512)
    assert torch.equal(b['crops'], aligned(photos)[i])


def test_a_structure_loss_where_it_has_a_weight(photos, tmp_path):
    write_parts(tmp_path, photos)
    gold.image_encoder().save_pretrained(tmp_path/'eye')
    how = dict(steps=2, rank=4, variant='plusv2', encoder=tmp_path/'eye', high=1.)
    def train(**more): return list(A.train_tiny(tmp_path, tmp_path/'out', **SMALL, **how, **more))
    figures = train(structure_weight=.1, reader_steps=3)
    assert [f['reader_step'] for f in figures if 'reader_step' in f][-1] == 3
    assert 'amiss' in figures[-1]
    assert 'amiss' not in train()[-1]


def test_what_ships_weighs_structure_in_another_unit(tmp_path):
    file = TINY/'ip-adapter-faceid-plusv2_sd15.safetensors'
    assert A.main(['ship', '--checkpoint', str(file), '--gain', '.4', '--out', str(tmp_path)]) == 0
    old, new = (FaceIDAdapter.from_file(f).to(torch.float32) for f in (file, tmp_path/file.name))
    g = torch.Generator().manual_seed(0)
    e = F.normalize(torch.randn(2, 512, generator=g), dim=1)
    states = torch.randn(2, 65, old.structure_width, generator=g)
    with torch.no_grad():
        a, b, far = old.tokens(e, states, .4), new.tokens(e, states, 1.), old.tokens(e, states, 1.)
        assert torch.allclose(a, b, atol=5e-3)
        assert (far - b).abs().max() > .1
        assert torch.equal(old.tokens(e, states, 0.), new.tokens(e, states, 0.))


def test_only_plusv2_has_a_unit_of_structure(tmp_path, capsys):
    file = TINY/'ip-adapter-faceid_sd15.safetensors'
    assert A.main(['ship', '--checkpoint', str(file), '--gain', '.4', '--out', str(tmp_path)]) == 2
    assert 'Only PlusV2' in capsys.readouterr().err


def test_levels_are_read_off_the_command_line():
    assert A.arguments(['evaluate', '--levels', '0,.5,1']).levels == [0., .5, 1.]
    assert A.arguments(['photos']).levels is None


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    assert A.main(['evaluate', '--folder', str(tmp_path)]) == 1
    assert 'reader' in capsys.readouterr().err


def test_train_says_what_is_missing(tmp_path, capsys):
    assert A.main(['train', '--parts', str(tmp_path), '--out', str(tmp_path/'o'), '--steps', '1']) == 1
    assert 'base model' in capsys.readouterr().err


def test_captions_keep_all_but_the_mood():
    texts = [f'photo of a woman in a red shirt, {m}, beach background, wearing glasses'
             for m in drawn.EXPRESSIONS]*50
    bare = A.unsaid(texts, random.Random(0), 1.)
    assert set(bare) == {'photo of a woman in a red shirt, beach background, wearing glasses'}
    # 15% of 200
    kept = sum(a == b for a, b in zip(texts, A.unsaid(texts, random.Random(0))))
    assert 10 < kept < 55
    assert A.unsaid(texts, random.Random(0), 0.) == texts


def test_only_structure_is_taught_with_silent_captions(tmp_path, photos):
    "The same photographs with and without crops: other captions, and crops of the very pictures."
    pipe = P.pipeline()
    torch.save(photos, tmp_path/'photos.pt')
    torch.save(dict(latents=torch.zeros(48, 8, 16, 16), boxes=photos['boxes']), tmp_path/'latents.pt')
    torch.save(torch.randn(48, 512), tmp_path/'embeds.pt')
    plain, crops = (A.training_table(tmp_path, pipe.tokenizer, held=4, crops=c) for c in (False, True))
    assert plain.crops is None
    assert crops.crops.shape == (48, 3, 64, 64)
    assert not torch.equal(plain.ids, crops.ids)
    assert A.captioned(tmp_path, pipe.tokenizer)['ids'].shape == plain.ids.shape


def test_start_from_goes_on(tmp_path):
    unet = P.pipeline().unet
    a = FaceIDAdapter.new(unet, rank=4)
    file = a.save(tmp_path/'ip-adapter-faceid_sd15.safetensors')
    same, was = A.start_from(file, unet, 'faceid', 4, 4).state_dict(), a.state_dict()
    for part in was:
        for k, t in was[part].items(): assert torch.equal(same[part][k], t)


def test_start_from_grows_where_another_variant_is_wanted(tmp_path):
    unet = P.pipeline().unet
    a = FaceIDAdapter.new(unet, rank=4)
    file = a.save(tmp_path/'ip-adapter-faceid_sd15.safetensors')
    other = A.start_from(file, unet, 'plusv2', 4, 2, width=32)
    assert (other.variant, other.structure_width) == ('plusv2', 32)
    new, old = (x.state_dict()['image_proj']['proj.0.weight'] for x in (other, a))
    assert torch.equal(new, old)
