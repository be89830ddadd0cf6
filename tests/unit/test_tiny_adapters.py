"""The tiny adapter's evaluation: questions, readings, intervals, likeness; its commands on random weights."""
import json, math
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
import helpers_pack as P
from faceid_nb.errors import ArgumentError, WeightsMissingError
from faceid_nb.tiny import adapters as A, people as drawn
from faceid_nb.tiny import evaluate as V, lessons as L, scenes as S
from faceid_nb.measure import mean_interval, share_interval
from faceid_nb.train import LatentTable

@pytest.fixture(scope='module')
def photos():
    g = torch.Generator().manual_seed(3)
    n = 48
    person = torch.arange(n//2).repeat_interleave(2)
    p, s = drawn.sample_identities(n//2, g), drawn.sample_scenes(n, g)
    images, landmarks, boxes = drawn.draw(drawn.take(p, person), s)
    return dict(images=(images*255).round().byte(), landmarks=landmarks, boxes=boxes, person=person,
                identities=p, scenes=s)

def test_colours_are_read_off_renders(photos):
    x = photos['images'].float()/255
    shirt, background = S.read_colours(x)
    plain = photos['scenes']['scene'] == 0
    assert (shirt == photos['scenes']['shirt']).float().mean() > .97
    assert (background == photos['scenes']['background'])[plain].float().mean() > .97

def test_questions_say_what_they_ask():
    texts, wanted = S.questions(64, 1)
    colours = list(drawn.COLOURS)
    for k, t in enumerate(texts):
        assert f"{colours[wanted['shirt'][k]]} shirt" in t
        assert f"{colours[wanted['background'][k]]} background" in t
        assert drawn.EXPRESSIONS[wanted['expression'][k]] in t
        assert ('glasses' in t) == bool(wanted['glasses'][k])
    assert texts == S.questions(64, 1)[0] != S.questions(64, 2)[0] and wanted['glasses'].float().mean() == .25
    # glasses go with no mood
    assert all((wanted['glasses'][wanted['expression'] == m]).float().mean() == .25 for m in range(4))

def test_prompts_are_in_the_vocabulary():
    known = set(drawn.vocabulary())
    assert all(w.strip(',') in known for t in S.questions(40)[0] for w in t.split())

@given(st.integers(1, 200), st.data())
def test_wilson_lies_within_bounds(n, data):
    k = data.draw(st.integers(0, n))
    p, low, high = share_interval(torch.tensor([1]*k + [0]*(n - k)))
    assert p == pytest.approx(k/n) and 0 <= low <= p + 1e-9 and p - 1e-9 <= high <= 1 and high - low > 0
    # its definition
    z = 1.96
    assert all(abs(abs(k/n - q) - z*math.sqrt(q*(1 - q)/n)) < 1e-6 for q in (low, high) if 0 < q < 1)

def test_intervals_count_people_not_pictures():
    v = torch.randn(40, generator=torch.Generator().manual_seed(0))
    m, h = V.over_people(v)
    assert (m, h) == pytest.approx(mean_interval(v)[:2], rel=1e-5)
    assert V.over_people(v[:, None].expand(40, 9)) == pytest.approx((m, h), rel=1e-5)
    w = v.clone()
    w[3] = float('nan')
    assert V.over_people(w) == pytest.approx(V.over_people(v[torch.arange(40) != 3]), rel=1e-5)

def test_likeness_knows_its_own():
    e = F.normalize(torch.randn(20, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    genuine, impostor, right = V.likeness(torch.stack([e, e.roll(1, 0)], 1), e)
    assert torch.allclose(genuine[:, 0], torch.ones(20)) and right[:, 0].all() and not right[:, 1].any()
    assert torch.allclose(impostor[:, 0], ((e @ e.T).sum(1) - 1)/19, atol=1e-5)
    lost = e[:, None].clone()
    lost[4] = float('nan')
    genuine, impostor, right = V.likeness(lost, e)
    assert genuine[4].isnan().all() and impostor[4].isnan().all() and int(right.sum()) == 19

def test_rank_is_among_sixteen():
    # looks most like itself, next like somebody 20 places off
    e = torch.eye(40, 512)
    near = F.normalize(e + .9*e.roll(-20, 0) + .5*e.roll(20, 0), dim=1)[:, None]
    assert V.likeness(near, e)[2].all()
    off = F.normalize(.5*e + e.roll(-20, 0), dim=1)[:, None]
    assert V.likeness(off, e)[2].all() and not V.likeness(off, e, among=40)[2].any()

def test_evaluated_people_are_not_training_people():
    assert V.HELD_OUT < drawn.TRAINING_SEEDS
    a, b = V.photographs_of(3)
    assert a[0].size == (256, 256) and b[0].size == (64, 64) and len(a) == len(b) == 3
    assert np.array_equal(np.asarray(a[0]), np.asarray(V.photographs_of(3)[0][0]))

def test_reader_learns_and_is_saved(photos, tmp_path):
    *_, last = S.train_reader(photos, steps=12, batch=16)
    reader = last['reader']
    S.save_reader(reader, tmp_path/'r.safetensors')
    again = S.load_reader(tmp_path/'r.safetensors')
    x = photos['images'][:6].float()/255
    a, b = S.read_scenes(x, reader), S.read_scenes(x, again)
    assert torch.allclose(a['yaw'], b['yaw'], atol=5e-3)
    assert (tmp_path/'r.safetensors').stat().st_size < 1e6
    assert set(a) == {'shirt', 'background', 'expression', 'glasses', 'yaw'}
    with pytest.raises(WeightsMissingError, match='adapters reader'): S.load_reader(tmp_path/'none')

def test_word_by_word_is_the_tokenizer(photos):
    from faceid_nb.tiny.base import new_tokenizer
    from faceid_nb.train import caption_ids
    texts = drawn.captions(drawn.take(photos['identities'], photos['person']), photos['scenes'],
                           __import__('random').Random(0)) + ['', 'a ' * 90]
    for tokenizer in (new_tokenizer(), P.pipeline().tokenizer):
        assert torch.equal(A.word_ids(tokenizer, texts), caption_ids(tokenizer, texts))

def parts(folder, photos, embeds=None):
    "A folder of parts whose latents are of every second photograph."
    rows = torch.tensor([4*k + j for k in range(12) for j in (0, 1)])
    person = photos['person']//2
    g = torch.Generator().manual_seed(0)
    pipe = P.pipeline()
    from faceid_nb.train import caption_ids
    torch.save({**photos, 'person': person}, folder/'photos.pt')
    torch.save(torch.randn(48, 512, generator=g) if embeds is None else embeds, folder/'embeds.pt')
    torch.save(dict(latents=torch.randn(24, 8, 16, 16, generator=g).half(),
                    ids=caption_ids(pipe.tokenizer, ['a']*24)[None].short(), boxes=photos['boxes'][rows],
                    person=person[rows], rows=rows), folder/'latents.pt')
    return rows

def test_table_of_half_the_photographs(photos, tmp_path):
    rows = parts(tmp_path, photos)
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
    parts(tmp_path, photos, torch.zeros(10, 512))
    with pytest.raises(ArgumentError, match='10 embeddings'): A.training_table(tmp_path, None)

def test_train_command(photos, tmp_path, capsys):
    parts(tmp_path, photos)
    P.pipeline().save_pretrained(tmp_path/'sd')
    # nobody left to train on
    assert A.main(['train', '--parts', str(tmp_path), '--out', str(tmp_path/'out'), '--steps', '2', '--batch',
                   '4', '--rank', '4', '--gauge-every', '1']) == 2
    assert 'held out' in capsys.readouterr().err
    for f in A.train_tiny(tmp_path, tmp_path/'out', steps=2, batch=4, rank=4, held=2, mixed_precision='no'):
        pass
    log = [json.loads(l) for l in (tmp_path/'out'/'log.jsonl').read_text().splitlines()]
    assert f['step'] == 2
    assert log[-1]['step'] == 2
    assert {'right', 'wrong', 'none'} <= set(log[-1])
    assert (tmp_path/'out'/'ip-adapter-faceid_sd15_lora.safetensors').exists()

def test_training_goes_on_from_a_checkpoint(photos, tmp_path):
    parts(tmp_path, photos)
    P.pipeline().save_pretrained(tmp_path/'sd')
    from faceid_nb.checkpoint import read_checkpoint
    def train(out, **more):
        return (list(A.train_tiny(tmp_path, tmp_path/out, steps=1, batch=4, rank=4, held=2,
                                  mixed_precision='no', **more))
                and read_checkpoint(
                    tmp_path/out/'ip-adapter-faceid_sd15.safetensors').ip_adapter['1.to_q_lora.down.weight'])
    first = train('first', seed=1)
    file = tmp_path/'first'/'ip-adapter-faceid_sd15.safetensors'
    assert (train('again', seed=2, init=file,
                  lr=1e-9) - first).abs().max() < 1e-5 < (train('fresh', seed=2, lr=1e-9) - first).abs().max()

@pytest.mark.parametrize('variant, more', [('plusv2', dict(rank=4)),
                                           ('portrait', dict(rank=0, num_tokens=16, several=3))])
def test_other_variants_train_on_the_same_parts(photos, tmp_path, variant, more):
    import goldens_build as gold
    rows = parts(tmp_path, photos)
    P.pipeline().save_pretrained(tmp_path/'sd')
    gold.image_encoder().save_pretrained(tmp_path/'eye')
    if 'plus' in variant: more = more | dict(encoder=tmp_path/'eye')
    for f in A.train_tiny(tmp_path, tmp_path/'out', steps=2, batch=4, held=2, mixed_precision='no',
                          variant=variant, **more):
        pass
    assert f['adapter'].variant == variant
    assert (tmp_path/'out'/f'ip-adapter-faceid-{variant}_sd15.safetensors').exists()
    t = A.training_table(tmp_path, P.pipeline().tokenizer, held=2, crops=True, several=3)
    i = t.groups.rows[:3]
    b = t[i, torch.rand(3, 2)]
    assert b['embeds'].shape == (3, 3, 512) and torch.equal(b['crops'], A.aligned(photos)[i])

def test_a_structure_reader_reads_latents(photos):
    "Pose that lies in the latents is read there, on people held out; rows without latents are left alone."
    g = torch.Generator().manual_seed(0)
    n = 400
    scores = torch.randn(2*n, 2, generator=g)
    z = torch.randn(n, 8, 16, 16, generator=g)*.3
    z[:, :2] += scores[::2, :, None, None]
    table = LatentTable(z, torch.zeros(1, n, 5), torch.randn(2*n, 512, generator=g),
                        torch.arange(n).repeat_interleave(2), rows=torch.arange(0, 2*n, 2), scores=scores,
                        held=100)
    *_, last = L.train_structure_reader(table, steps=60, batch=32, log_every=30)
    assert last['clear'] > .8
    assert last['vague'] > .6
    assert not any(p.requires_grad for p in last['reader'].parameters())
    assert last['reader_step'] == 60
    assert S.correlation(last['reader'](z)[:, 0].detach(), scores[::2, 0])[0] > .8
    assert not torch.equal(L.vague(z, g), z)

def test_structure_loss_by_command(photos, tmp_path):
    import goldens_build as gold
    parts(tmp_path, photos)
    P.pipeline().save_pretrained(tmp_path/'sd')
    gold.image_encoder().save_pretrained(tmp_path/'eye')
    def train(**more):
        return list(A.train_tiny(tmp_path, tmp_path/'out', steps=2, batch=4, rank=4, held=2,
                                 mixed_precision='no', variant='plusv2', encoder=tmp_path/'eye', high=1.,
                                 **more))
    figures = train(structure_weight=.1, reader_steps=3)
    assert [f['reader_step'] for f in figures if 'reader_step' in f][-1] == 3
    assert 'amiss' in figures[-1]
    assert 'amiss' not in train()[-1]

def test_what_ships_weighs_structure_in_another_unit(tmp_path, capsys):
    from faceid_nb.adapter import FaceIDAdapter
    from faceid_nb.models import TINY
    file = TINY/'ip-adapter-faceid-plusv2_sd15.safetensors'
    assert A.main(['ship', '--checkpoint', str(file), '--gain', '.4', '--out', str(tmp_path)]) == 0
    old, new = (FaceIDAdapter.from_file(f).to(torch.float32) for f in (file, tmp_path/file.name))
    g = torch.Generator().manual_seed(0)
    e, states = torch.nn.functional.normalize(torch.randn(2, 512, generator=g),
                                              dim=1), torch.randn(2, 65, old.structure_width, generator=g)
    with torch.no_grad():
        a, b, far = old.tokens(e, states, .4), new.tokens(e, states, 1.), old.tokens(e, states, 1.)
        assert torch.allclose(a, b, atol=5e-3) and (far - b).abs().max() > .1
    with torch.no_grad(): assert torch.equal(old.tokens(e, states, 0.), new.tokens(e, states, 0.))
    assert A.main(['ship', '--checkpoint', str(TINY/'ip-adapter-faceid_sd15.safetensors'), '--gain', '.4',
                   '--out', str(tmp_path)]) == 2
    assert 'Only PlusV2' in capsys.readouterr().err

def test_levels_are_read_off_the_command_line():
    assert A.arguments(['evaluate', '--levels', '0,.5,1']).levels == [0., .5, 1.]
    assert A.arguments(['photos']).levels is None

def test_commands_say_what_is_missing(tmp_path, capsys):
    assert A.main(['evaluate', '--folder', str(tmp_path)]) == 1 and 'reader' in capsys.readouterr().err
    assert A.main(['train', '--parts', str(tmp_path), '--out', str(tmp_path/'o'), '--steps', '1']) == 1
    assert 'base model' in capsys.readouterr().err

class Stub:
    "A reader that sees a face in every picture but plain ones: in the middle, where the renderer puts it."
    name = 'tiny'
    detector = property(lambda self: self)
    def detect(self, image):
        h, w, _ = image.shape
        points = np.array([[.38, .5], [.62, .5], [.5, .58], [.42, .68], [.58, .68]], np.float32)*[w, h]
        return (np.zeros((0, 5)), np.zeros((0, 5, 2)),
                '') if image.std((0, 1)).max() < 1e-3 else (np.array([[.2*w, .2*h, .8*w, .9*h, 1]]),
                                                            points[None].astype(np.float32), '128')
    def best(self, image, which='largest'):
        return torch.from_numpy(np.resize(np.asarray(image)[::7, ::7].astype(np.float32).flatten(), 512) + 1)

@pytest.fixture(scope='module')
def judged(tmp_path_factory):
    from helpers_face import make_judge
    file = tmp_path_factory.mktemp('judge')/'rec.onnx'
    make_judge(file)
    return V.TinyJudge(Stub(), file)

def test_evaluation_on_random_weights(judged):
    from faceid_nb.adapter import FaceIDAdapter
    from faceid_nb.faceid import FaceID
    pipe = P.pipeline()
    f = FaceID(pipe, FaceIDAdapter.from_state(**P.adapter_state(pipe.unet)), judged.reader)
    table, pictures = V.evaluate(f, judged, S.SceneReader().eval(), people=3, each=2, scales=(0., 1.),
                                 num_inference_steps=2)
    assert [r['scale'] for r in table['rows']] == [0., 1.] and len(pictures['made'][1.]) == 6
    text = V.show_table(json.loads(json.dumps(table)))
    assert text.count('\n') == 4 and 'rank-1 of 16' in text
    assert V.scale_sheet(pictures, 2).size == (3*64, 3*64 + 16)
    row, images = V.evaluate_base(pipe, S.SceneReader().eval(), judged, n=4, num_inference_steps=2)
    assert len(images) == 4 and set(drawn.EXPRESSIONS) <= set(row) and 'found' in V.show_base(row)

def test_judge_gives_nan_without_a_face(judged):
    e = judged([Image.new('RGB', (64, 64), (10, 200, 10)), *V.photographs_of(2)[0]])
    assert e.shape == (3, 512)
    assert e[0].isnan().all()
    assert torch.allclose(e[1:].norm(dim=1), torch.ones(2), atol=1e-5)
    assert not torch.allclose(e[1], e[2])

def test_a_probe_looks_with_the_averaged_weights(photos, judged, tmp_path):
    from faceid_nb.train import train
    parts(tmp_path, photos)
    pipe = P.pipeline()
    probe = V.Probe(None, people=2, steps=1, judge=judged)
    for f in train(pipe, A.training_table(tmp_path, pipe.tokenizer, held=2), steps=1, batch=4, rank=4,
                   gauge=0, mixed_precision='no', watch=probe):
        pass
    assert {'gap', 'rank1', 'found'} <= set(f) and f['found'] == 1 and not pipe.unet._forward_pre_hooks


# --- structure, several photographs, starting from what is known

def test_captions_keep_all_but_the_mood():
    import random
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

@given(st.integers(5, 60), st.floats(-.95, .95), st.integers(0, 99))
def test_correlation_is_pearsons_with_fishers_interval(n, r, seed):
    g = np.random.default_rng(seed)
    a = g.normal(size=n)
    b = r*a + (1 - r*r)**.5*g.normal(size=n)
    b[0] = np.nan
    got, low, high = S.correlation(a, b)
    assert got == pytest.approx(np.corrcoef(a[1:], b[1:])[0, 1], abs=1e-9) and low < got < high
    assert math.atanh(high) - math.atanh(low) == pytest.approx(2*1.96/math.sqrt(n - 4), rel=1e-6)

def test_start_from_goes_on_or_grows(tmp_path):
    from faceid_nb.adapter import FaceIDAdapter
    unet = P.pipeline().unet
    a = FaceIDAdapter.new(unet, rank=4)
    file = a.save(tmp_path/'ip-adapter-faceid_sd15.safetensors')
    same, was = A.start_from(file, unet, 'faceid', 4, 4).state_dict(), a.state_dict()
    assert all(torch.equal(same[part][k], t) for part in was for k, t in was[part].items())
    other = A.start_from(file, unet, 'plusv2', 4, 2, width=32)
    assert (other.variant, other.structure_width) == ('plusv2', 32)
    assert torch.equal(other.state_dict()['image_proj']['proj.0.weight'],
                       a.state_dict()['image_proj']['proj.0.weight'])

@pytest.fixture(scope='module')
def tiny():
    from faceid_nb.models import TINY, load
    faceid = load('tiny-plusv2', device='cpu')
    faceid.pipe.set_progress_bar_config(disable=True)
    return faceid, V.TinyJudge(faceid.reader,
                               TINY/'models'/'judge'/'rec.onnx'), S.load_reader(TINY/'reader.safetensors')

def test_structure_is_evaluated(tiny):
    table, pictures = V.evaluate_structure(*tiny, people=4, each=1, s_scales=(0., 1.5), num_inference_steps=8)
    assert [r['s_scale'] for r in table['rows']] == [0., 1.5]
    assert {k: len(v) for k, v in pictures['made'].items()} == {0.: 4, 1.5: 4}
    assert all(0 < r['distance'][0] < .5 and -1 <= r['yaw'][1] <= r['yaw'][0] <= r['yaw'][2] <= 1
               for r in table['rows'])
    assert np.abs(np.array(pictures['made'][0.][0],
                           float) - np.array(pictures['made'][1.5][0], float)).mean() > 1
    text = V.show_structure(table)
    assert len(text.splitlines()) == 4 and f"{table['rows'][1]['mood'][0]:.2f} [" in text
    json.dumps(table)

def test_photographs_are_counted(tiny):
    table, pictures = V.evaluate_photos(*tiny, people=3, each=1, counts=(1, 3), num_inference_steps=6)
    assert [r['photos'] for r in table['rows']] == [1, 3]
    assert table['rows'][0]['gain'][0] == 0
    assert len(table['rows'][1]['person']) == 3
    assert table['rows'][1]['gain'][0] == pytest.approx(
        np.nanmean(np.subtract(table['rows'][1]['person'], table['rows'][0]['person'])), abs=1e-6)
    V.show_photos(table)
