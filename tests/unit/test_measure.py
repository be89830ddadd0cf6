"Likeness: rows stand for themselves, missing faces are nan, the judge is another network, and the statistics are right."
import numpy as np, pytest
from hypothesis import given, strategies as st
from PIL import Image
from faceid_nb import measure as M
from faceid_nb.errors import ArgumentError, FaceIDError, ImageError, NoFaceError, PackMissingError
from faceid_nb.face import Embedder, FaceReader, load_face, mean_face, save_face
from faceid_nb.measure import (detection_rate, embed_faces, embed_reference, find_judge, identity_similarity, mean_interval, rank_one, share_interval,
                               similarity_matrix, split_pairs, threshold_at, true_accept_rate)
from helpers_face import fake_photo, make_judge, make_pack

person = lambda seed, x=160, y=150: fake_photo([(x, y, 20, seed)])
BLANK = np.full((320, 320, 3), 120, np.uint8)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = make_pack(tmp_path_factory.mktemp('packs'))
    make_judge(root/'models'/'judge'/'rec.onnx')
    return root

@pytest.fixture(scope='module')
def reader(root): return FaceReader('fake', root, providers='cpu', det_sizes=(640,))

def test_cosines_and_nan(reader):
    s = identity_similarity(person(1), [person(1), person(2), BLANK, Image.fromarray(person(1))], reader=reader)
    assert s.shape == (4,) and s.dtype == np.float64 and abs(s[0] - 1) < 1e-6 and s[0] == s[3] and s[1] < .9 and np.isnan(s[2])
    assert detection_rate(s) == .75 and np.isnan(detection_rate([])) and detection_rate([np.nan]) == 0

@pytest.mark.parametrize('judge', [True, False])
def test_rows_stand_for_themselves(reader, judge):
    pictures = [person(1), BLANK, person(2), person(3, 170, 140)]
    many = identity_similarity(person(1), pictures, judge, reader)
    alone = np.concatenate([identity_similarity(person(1), [p], judge, reader) for p in pictures])
    np.testing.assert_allclose(many, alone, atol=1e-6)

def test_the_judge_is_another_network(reader, root):
    ours, other = (identity_similarity(person(1), [person(2), person(3)], j, reader) for j in (False, True))
    assert abs(ours - other).min() > 1e-3
    f, g = reader.best(person(1)), reader.best(person(2))
    assert abs(ours[0] - f.similarity(g)) < 1e-6
    file = root/'models'/'judge'/'rec.onnx'
    for judge in (file, str(file), Embedder(file, 'cpu')): np.testing.assert_allclose(identity_similarity(person(1), [person(2), person(3)], judge, reader), other, atol=1e-6)
    assert find_judge(reader).name == 'judge' and find_judge(reader) is find_judge(reader)
    np.testing.assert_allclose(identity_similarity(person(1), [person(2), person(3)], reader, reader), ours, atol=1e-6)

def test_references_of_every_kind(reader, tmp_path):
    a, b = person(1), person(1, 163, 148)
    pictures = [person(1, 166, 152), person(4)]
    f, g = reader.best(a), reader.best(b)
    one = identity_similarity(a, pictures, reader=reader)
    np.testing.assert_allclose(identity_similarity(f, pictures, reader=reader), one, atol=1e-6)
    both = identity_similarity([a, b], pictures, reader=reader)
    np.testing.assert_allclose(identity_similarity([f, g], pictures, reader=reader), both, atol=1e-6)
    np.testing.assert_allclose(identity_similarity(mean_face([f, g]), pictures, reader=reader), both, atol=1e-6)
    assert abs(both - one).max() > 1e-4
    kept = load_face(save_face(f, tmp_path/'f.safetensors', crop=True))
    assert abs(identity_similarity(kept, pictures, reader=reader) - one).max() < .1
    bare = load_face(save_face(f, tmp_path/'g.safetensors'))
    np.testing.assert_allclose(identity_similarity(bare, pictures, False, reader), identity_similarity(a, pictures, False, reader), atol=1e-6)
    with pytest.raises(ArgumentError, match='without a picture'): identity_similarity(bare, pictures, reader=reader)

def test_one_picture_is_a_list_of_one(reader, tmp_path):
    path = tmp_path/'p.png'
    Image.fromarray(person(1)).save(path)
    for one in (person(1), Image.fromarray(person(1)), path, str(path), path.read_bytes()): assert abs(identity_similarity(person(1), one, reader=reader) - 1).max() < 1e-6
    assert identity_similarity(person(1), np.stack([person(1), person(2)]), reader=reader).shape == (2,) and identity_similarity(person(1), [], reader=reader).shape == (0,)

def test_which_face_counts(reader):
    two = fake_photo([(100, 200, 10, 1), (380, 300, 20, 2)], (640, 480))
    f = reader.best(two, 'left')
    left, largest = (identity_similarity(f, [two], reader=reader, which=w)[0] for w in ('left', 'largest'))
    assert abs(left - 1) < 1e-6 and largest < .9

def test_errors(reader, tmp_path):
    with pytest.raises(NoFaceError): identity_similarity(BLANK, [person(1)], reader=reader)
    with pytest.raises(ImageError): identity_similarity(person(1), ['nowhere.png'], reader=reader)
    for judge in (3, 'x' and object(), {}):
        with pytest.raises(ArgumentError): identity_similarity(person(1), [person(1)], judge, reader)
    with pytest.raises(ArgumentError): embed_reference([], reader)
    lonely = FaceReader('fake', make_pack(tmp_path), providers='cpu')
    with pytest.raises(PackMissingError) as e: identity_similarity(person(1), [person(1)], reader=lonely)
    assert 'judge=False' in str(e.value) and 'antelopev2' in str(e.value)
    assert identity_similarity(person(1), [person(1)], False, lonely).shape == (1,)

def test_matrix_ranks_and_pairs(reader):
    e = embed_faces([person(1), person(2), BLANK, person(3), person(1, 163, 148)], reader)
    r = np.stack([embed_reference(person(k), reader) for k in (1, 2, 3)])
    m = similarity_matrix(e, r)
    owner = np.array([0, 1, 1, 2, 0])
    genuine, impostor = split_pairs(m, owner)
    assert m.shape == (5, 3) and np.allclose(genuine[[0, 1, 3]], 1, atol=1e-6) and np.isnan(genuine[2]) and np.isnan(impostor[2])
    assert np.isclose(impostor[0], (m[0, 1] + m[0, 2])/2) and list(rank_one(m, owner)[:4]) == [True, True, False, True]
    assert not rank_one(m, [1, 0, 0, 0, 1]).any()
    for bad in ([0, 1], [0, 1, 2, 3, 0], [-1]*5):
        with pytest.raises(ArgumentError): split_pairs(m, bad)

def test_ties_are_not_wins(): assert not rank_one(np.ones((2, 4)), [0, 1]).any()

def test_threshold():
    s = np.arange(1000)/1000
    assert threshold_at(s, .1) == s[-101] and (s > threshold_at(s, .1)).sum() == 100 and (s > threshold_at(s, 1e-3)).sum() == 1 and (s > threshold_at(s, 1e-5)).sum() == 0
    assert true_accept_rate([.9995, .5, np.nan, .9999], s, 1e-3) == .5
    for bad in ([], [np.nan]):
        with pytest.raises(ArgumentError): threshold_at(bad)
    for far in (0, 1, -.1):
        with pytest.raises(ArgumentError): threshold_at(s, far)

@given(st.integers(2, 300), st.floats(.01, .5))
def test_no_more_strangers_than_asked(n, far):
    s = np.random.default_rng(n).normal(size=n)
    assert (s > threshold_at(s, far)).mean() <= far

def test_intervals_cover():
    rng = np.random.default_rng(0)
    hits = sum(abs(m - 3) <= h for m, h, _ in (mean_interval(rng.normal(3, 2, 40)) for _ in range(600)))/600
    assert .91 < hits < .975
    covered = [low <= .9 <= high for _, low, high in (share_interval(rng.random(60) < .9) for _ in range(600))]
    assert .9 < np.mean(covered) < .985

def test_groups_make_intervals_honest():
    rng = np.random.default_rng(1)
    people = rng.normal(0, 1, 20)
    v = np.repeat(people, 50) + rng.normal(0, .1, 1000)
    g = np.repeat(np.arange(20), 50)
    m, half, n = mean_interval(v, g)
    assert n == 20 and abs(m - people.mean()) < .05 and half > 4*mean_interval(v)[1]

def test_intervals_of_little():
    assert mean_interval([1., np.nan, 3.])[2] == 2 and mean_interval([1., np.nan, 3.])[0] == 2 and np.isnan(mean_interval([])[0]) and np.isnan(mean_interval([1.])[1])
    assert share_interval([True]*10)[2] == 1 and .6 < share_interval([True]*10)[1] < .8 and np.isnan(share_interval([])[0]) and mean_interval([np.nan]*3, [0, 0, 1])[2] == 0

def test_the_tiny_judge_knows_people(tmp_path):
    "As the command line calls it: a Face of the shipped pack, pictures, nothing else."
    from faceid_nb.tiny.people import render, sample_people
    crowd = sample_people(12, seed=78)
    first, second = ([p.image for p in render(crowd, seed=s, size=64, hat=None)] for s in (1, 2))
    reader = FaceReader('tiny', providers='cpu')
    face = reader.best(first[0])
    s = identity_similarity(face, second + [Image.new('RGB', (64, 64), (90, 90, 90))])
    assert s.shape == (13,) and s[0] == np.nanmax(s) and s[0] > .5 and np.nanmean(s[1:]) < .3 and np.isnan(s[-1])
    np.testing.assert_allclose(identity_similarity(first[0], second), s[:-1], atol=1e-6)
    assert abs(identity_similarity(face, second, judge=False)[0] - face.similarity(reader.best(second[0]))) < 1e-6


# ---- faces found once, calibration, prompts, everything at once

def test_a_face_is_looked_for_once(reader, monkeypatch):
    pictures = [person(1), BLANK, person(2, 170, 140), None]
    looked, detect = [], reader.detector.detect
    monkeypatch.setattr(reader.detector, 'detect', lambda image: looked.append(1) or detect(image))
    faces = M.find_faces(pictures, reader)
    assert [f is None for f in faces] == [False, True, False, True] and len(looked) == 3 and faces[0].image is not None and faces[0].embedding is None
    again = M.find_faces(faces, reader)
    assert again[0] is faces[0] and len(looked) == 3
    for judge in (True, False): np.testing.assert_array_equal(embed_faces(faces, reader, judge), embed_faces(pictures, reader, judge))
    looked.clear()
    goal = reader.best(person(1))
    looked.clear()
    M.structure_distance(goal, faces, reader), identity_similarity(goal, faces, reader=reader)
    assert not looked
    np.testing.assert_array_equal(M.structure_distance(goal, faces, reader), M.structure_distance(goal, pictures, reader))

def test_calibration_against_every_pair_by_hand(reader):
    people = [[person(i, 160 + 3*k, 150 - 2*k) for k in range(2 + i % 2)] for i in range(1, 5)]
    c = M.calibrate(people, reader)
    e = [embed_faces(p, reader) for p in people]
    same = [float(a[i] @ a[j]) for a in e for i in range(len(a)) for j in range(i)]
    other = [float(x @ y) for i, a in enumerate(e) for b in e[:i] for x in a for y in b]
    np.testing.assert_allclose(np.sort(c.genuine), np.sort(same))
    np.testing.assert_allclose(np.sort(c.impostor), np.sort(other))
    assert c.ceiling == np.mean(same) or abs(c.ceiling - np.mean(same)) < 1e-12
    assert c.copy_line <= max(same) + 1e-12
    blank = M.calibrate([p + [BLANK] for p in people], reader)
    np.testing.assert_allclose(np.sort(blank.genuine), np.sort(same))
    with pytest.raises(ArgumentError, match='two people'): M.calibrate(people[:1], reader)
    with pytest.raises(ArgumentError, match='two people'): M.calibrate([p[:1] for p in people], reader)

def test_what_a_calibration_says():
    c = M.Calibration(np.linspace(.5, .9, 101), np.linspace(-.3, .3, 1001))
    assert abs(c.ceiling - .7) < 1e-12 and abs(c.copy_line - .896) < 1e-9 and .29 < c.threshold <= .3
    assert c.copies([.1, .89, .9, np.nan, .99]).tolist() == [False, False, True, False, True]
    for x, words in ((.1, 'could be anybody'), (.6, 'the same person'), (.95, 'a copy'), (np.nan, 'no face')): assert words in c.read(x)
    assert 'higher than 100.0% of strangers and 25% of genuine' in c.read(.6) and '101 genuine pairs, 1001 of strangers' in repr(c)

def test_a_folder_of_people(tmp_path, reader):
    for who in ('b', 'a'):
        (tmp_path/who).mkdir()
        for k in (2, 1): Image.fromarray(person(ord(who), 160 + 3*k)).save(tmp_path/who/f'{k}.PNG')
        (tmp_path/who/'notes.txt').write_text('x')
    (tmp_path/'empty').mkdir()
    (tmp_path/'readme.png').write_bytes(b'')
    assert [[f.relative_to(tmp_path).as_posix() for f in p] for p in M.photographs_in(tmp_path)] == [['a/1.PNG', 'a/2.PNG'], ['b/1.PNG', 'b/2.PNG']] and len(M.calibrate(tmp_path, reader).genuine) == 2
    for folder, found in ((tmp_path/'a', 'No folder with'), (tmp_path/'gone', 'No such folder')):
        with pytest.raises(ArgumentError, match=found): M.photographs_in(folder)

@pytest.mark.parametrize('prompt, wanted', [('photo of a person in a red shirt, smiling, blue background', dict(shirt=0, expression=1, background=1)), ('a person wearing glasses, Grey background', dict(glasses=1, background=9)),
    ('a man, beach background', {}), ('sunglasses, redshirt, reds shirt, a tired shirt, red shirts', {}), ('PINK SHIRT, frowning, wearing a red hat', dict(shirt=8, expression=3)), ('', {})])
def test_what_a_prompt_names(prompt, wanted): assert M.SceneScorer.wanted(prompt) == wanted

def test_adherence_counts_what_is_to_be_seen():
    from faceid_nb.tiny.people import render, sample_people
    photo = lambda **kw: render(sample_people(1, 5), seed=6, size=128, hat=None, **kw)[0].image
    a = photo(shirt='red', background='blue', expression='smiling', glasses=1)
    b = photo(shirt='green', background='white', expression='neutral', glasses=0)
    asked = 'person in a red shirt, smiling, blue background, wearing glasses'
    np.testing.assert_allclose(M.prompt_adherence(asked, [a, b]), [1, 0])
    np.testing.assert_allclose(M.prompt_adherence([asked, 'a white background'], [a, b]), [1, 1])
    np.testing.assert_allclose(M.prompt_adherence('red shirt, white background', [a, b]), [.5, .5])
    assert np.isnan(M.prompt_adherence('a person', a)).all() and M.prompt_adherence('x', []).shape == (0,)
    assert M.prompt_adherence(['1', '2'], [a, b], lambda texts, images: np.array([float(t)*i.shape[0] for t, i in zip(texts, images)])).tolist() == [128, 256]
    with pytest.raises(ArgumentError, match='3 prompts for 1'): M.prompt_adherence(['x']*3, a)

@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "A CLIP model of random weights, saved as the hub has it."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast
    words = ['<pad>', '<start>', '<end>', 'a', 'red', 'blue', 'shirt']
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<pad>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', bos_token='<start>', eos_token='<end>', model_max_length=8)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=dict(vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8, eos_token_id=2, pad_token_id=0, bos_token_id=1),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8), projection_dim=12))
    folder = tmp_path_factory.mktemp('clip')
    model.save_pretrained(folder)
    t.save_pretrained(folder)
    CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)).save_pretrained(folder)
    return folder, model.eval(), t

def test_clip_scores_equal_clip_itself(clip):
    import torch
    from transformers import CLIPImageProcessor
    folder, model, tokenizer = clip
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 48, 3), np.uint8) for _ in range(5)]
    texts = ['a red shirt', 'blue shirt', 'a red shirt', 'a', 'blue']
    class Processor:
        def __call__(self, text=None, images=None, return_tensors=None, **k):
            return tokenizer(text, return_tensors='pt', padding=True, truncation=True) if text is not None else CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))(images=images, return_tensors='pt')
    scorer = M.ClipScorer.__new__(M.ClipScorer)
    scorer.model, scorer.processor, scorer.device = model, Processor(), torch.device('cpu')
    got = scorer(texts, images, batch_size=2)
    for k in range(5):
        ids, px = tokenizer([texts[k]], return_tensors='pt'), Processor()(images=[images[k]]).pixel_values
        with torch.no_grad(): want = model(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=px).logits_per_image/model.logit_scale.exp()
        assert abs(got[k] - float(want)) < 1e-5
    assert len(set(got.round(6))) == 5

def test_clip_that_is_not_here_says_so(tmp_path):
    from faceid_nb.errors import WeightsMissingError
    with pytest.raises(WeightsMissingError, match='CLIP model'): M.prompt_adherence('x', BLANK, 'openai/no-such-clip')

def test_everything_at_once_equals_one_by_one(reader, monkeypatch):
    pictures = [person(1, 166, 152), BLANK, person(4), person(2, 170, 140)]
    her, him = reader.best(person(1)), person(2)
    prompts = list('abcd')
    score = lambda texts, images: np.array([ord(t) + i.mean() for t, i in zip(texts, images)])
    all_ = M.measure_pictures(her, pictures, prompts, reader=reader, scorer=score)
    np.testing.assert_allclose(all_['likeness'], identity_similarity(her, pictures, reader=reader))
    np.testing.assert_allclose(all_['distance'], M.structure_distance(her, pictures, reader))
    np.testing.assert_allclose(all_['adherence'], score(prompts, pictures))
    each = M.measure_pictures([her, her, him, him], pictures, reader=reader, each=True)
    assert set(each) == {'likeness', 'distance'}
    np.testing.assert_allclose(each['likeness'], [*identity_similarity(her, pictures[:2], reader=reader), *identity_similarity(him, pictures[2:], reader=reader)])
    np.testing.assert_allclose(each['distance'], [*M.structure_distance(her, pictures[:2], reader), *M.structure_distance(him, pictures[2:], reader)])
    both = [person(1), person(1, 163, 148)]
    np.testing.assert_allclose(M.measure_pictures(both, pictures, reader=reader)['likeness'], identity_similarity(both, pictures, reader=reader))
    mean = mean_face([reader.best(p) for p in both])
    found = M.measure_pictures(mean, pictures, reader=reader)
    np.testing.assert_allclose(found['likeness'], identity_similarity(mean, pictures, reader=reader))
    assert np.isfinite(found['distance'][[0, 2, 3]]).all()
    from faceid_nb.face import Face
    bare = M.measure_pictures(Face(her.embedding, pack=her.pack), pictures, judge=False, reader=reader)
    np.testing.assert_allclose(bare['likeness'], identity_similarity(her, pictures, False, reader))
    assert np.isnan(bare['distance']).all()
    with pytest.raises(ArgumentError, match='2 references for 4'): M.measure_pictures([her, him], pictures, reader=reader, each=True)
    looked, detect = [], reader.detector.detect
    monkeypatch.setattr(reader.detector, 'detect', lambda image: looked.append(1) or detect(image))
    M.measure_pictures(her, pictures, reader=reader)
    assert len(looked) == 4
    assert M.measure_pictures(her, [], reader=reader)['likeness'].shape == (0,)

def test_who_measures_adherence():
    from types import SimpleNamespace
    assert M.find_scorer('tiny-plus') == 'tiny' == M.find_scorer(SimpleNamespace(name='tiny-sdxl-faceid')) and 'clip' in M.find_scorer('sd15-plusv2') == M.find_scorer(SimpleNamespace(name='mine'))
