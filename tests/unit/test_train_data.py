"What a training reads: pairs, batches, photographs, drop-outs."
import warnings
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
import helpers_pack as P
from helpers_train import Reader, latent_table, quietly, random_crops, seeded, table_with
from faceid_nb import train_data as D
from faceid_nb.align import ARCFACE_TEMPLATE, norm_crop
from faceid_nb.errors import ArgumentError, NoFaceError
from faceid_nb.images import read_image

warnings.filterwarnings('ignore', message='.*have one picture only')


@pytest.fixture(scope='module')
def pipe(): return P.pipeline()


@pytest.fixture(scope='module')
def table(pipe): return latent_table(pipe)


# --- pairs

@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 2**31))
def test_a_partner_is_another_picture_of_the_same_person(person, seed):
    with quietly(): groups = D.Groups(person)
    person = torch.tensor(person)
    i = torch.arange(len(person)).repeat(20)
    j = groups.partner(i, torch.rand(len(i), generator=seeded(seed)))
    assert (person[i] == person[j]).all()
    alone = (person[:, None] == person).sum(1) == 1
    assert ((i == j) == alone[i]).all()


def test_all_other_pictures_are_equally_likely_partners():
    groups = D.Groups([7, 3, 7, 7, 3, 7])
    j = groups.partner(torch.zeros(3000, dtype=torch.long), torch.linspace(0, 1, 3000))
    assert j.bincount(minlength=6).tolist()[1] == 0
    assert all(abs(int((j == k).sum()) - 1000) < 5 for k in (2, 3, 5))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 6), st.integers(0, 2**31))
def test_several_partners_are_others_and_differ_where_they_can(person, k, seed):
    with quietly(): groups = D.Groups(person)
    person = torch.tensor(person)
    i = torch.arange(len(person))
    j = groups.partner(i, torch.rand(len(i), generator=seeded(seed)), k)
    assert j.shape == (len(i), k) and (person[j] == person[:, None]).all()
    for row, me in zip(j.tolist(), i.tolist()):
        others = int((person == person[me]).sum()) - 1
        assert (me not in row) == (others > 0) and len(set(row)) == max(1, min(k, others))


def test_held_out_people_are_not_drawn(table):
    draws = iter(D.Draws(table.groups.rows, 50, 3))
    drawn = torch.cat([next(draws)[0] for _ in range(20)])
    assert set(drawn.tolist()) <= set(range(24)) and table.groups.held.tolist() == list(range(24, 36))


def test_somebody_must_be_left_to_train_on():
    with pytest.raises(ArgumentError, match='held out'): D.Groups([0, 0, 1, 1], held=2)


def test_people_with_one_picture_are_announced():
    with pytest.warns(UserWarning, match='1 of 2 people'): D.Groups([0, 0, 1])


# --- batches

def test_a_table_lends_embeddings_of_pictures_without_latents():
    rows = torch.tensor([1, 3, 4])
    latents, ids = torch.arange(3.).view(3, 1, 1, 1), torch.arange(3).view(1, 3, 1)
    t = D.LatentTable(latents, ids, torch.eye(6), [0, 0, 0, 1, 1, 1], rows=rows)
    assert t.groups.rows.tolist() == [1, 3, 4]
    b = t[rows, torch.tensor([[0., 0.], [.9, 0.], [.2, .9]])]
    assert b['latents'].flatten().tolist() == [0, 1, 2]
    assert b['own'].argmax(1).tolist() == [1, 3, 4] and b['embeds'].argmax(1).tolist() == [2, 5, 5]


def test_a_table_of_unequal_parts_is_refused():
    z, ids, e = torch.zeros(3, 1, 2, 2), torch.zeros(1, 3, 4), torch.zeros(3, 512)
    fine = dict(latents=z, ids=ids, embeds=e, person=[0, 0, 0])
    for change in (
            dict(ids=ids[:, :2]), dict(embeds=e[:2]), dict(person=[0, 0]), dict(boxes=torch.zeros(2, 4))):
        with pytest.raises(ArgumentError, match='rows'): D.LatentTable(**{**fine, **change})


def test_rows_outside_the_embeddings_are_refused():
    z, ids, e = torch.zeros(3, 1, 2, 2), torch.zeros(1, 3, 4), torch.zeros(4, 512)
    with pytest.raises(ArgumentError, match='rows point outside'):
        D.LatentTable(z, ids, e, [0, 0, 0, 0], rows=torch.tensor([0, 1, 4]))


def test_scores_come_with_their_pictures(table):
    scores = torch.randn(36, 3, generator=seeded(3))
    data = table_with(table, crops=random_crops(), scores=scores)
    i = data.groups.rows[:5]
    assert torch.equal(data[i, torch.rand(5, 2)]['scores'], scores[i])


def test_several_embeddings_are_of_other_photographs(table):
    b = table_with(table, several=2)[torch.tensor([0, 5]), torch.tensor([[0., 0.], [.9, 0.]])]
    assert b['embeds'].shape == (2, 2, 512)
    assert all(not torch.allclose(b['embeds'][r, j], b['own'][r]) for r, j in np.ndindex(2, 2))
    assert not torch.allclose(b['embeds'][0, 0], b['embeds'][0, 1])


def take(draws, n):
    draws = iter(draws)
    return [next(draws) for _ in range(n)]


def test_draws_start_anywhere():
    rows = torch.arange(100)
    whole, later = take(D.Draws(rows, 5, 1), 6), take(D.Draws(rows, 5, 1, start=4), 2)
    for x, y in zip(whole[4:], later): assert all(torch.equal(a, b) for a, b in zip(x, y))
    assert not torch.equal(whole[0][0], whole[1][0])


def test_two_processes_share_the_steps_out():
    rows = torch.arange(100)
    whole = take(D.Draws(rows, 5, 1), 6)
    two = [take(D.Draws(rows, 5, 1, stride=2, offset=k), 3) for k in (0, 1)]
    assert torch.equal(two[0][1][0], whole[2][0]) and torch.equal(two[1][1][0], whole[3][0])


@settings(deadline=None, max_examples=25)
@given(st.tuples(*[st.floats(0, .3)]*3))
def test_drop_out_gives_four_kinds_of_rows(drop):
    u = (torch.arange(10000) + .5)/10000
    ids, e = D.drop_out(torch.ones(10000, 2), torch.ones(10000, 1), torch.zeros(2), u, drop)
    caption, face = ids[:, 0] > 0, e[:, 0] > 0
    found = [float(kind.float().mean()) for kind in (~caption & face, caption & ~face, ~caption & ~face)]
    assert tuple(found) == pytest.approx(drop, abs=5e-4) and set(e.unique().tolist()) <= {0., 1.}


# --- photographs

@pytest.fixture
def folder(tmp_path):
    for person, shades in dict(ada=(10, 20, 30), grace=(40, 50), nobody=(0,)).items():
        (tmp_path/'photos'/person).mkdir(parents=True)
        for s in shades: Image.new('RGB', (96, 64), (s, s, s)).save(tmp_path/'photos'/person/f'{s}.png')
    (tmp_path/'photos'/'ada'/'10.txt').write_text('ada smiling\n')
    (tmp_path/'photos'/'notes').mkdir()
    return tmp_path/'photos'


def test_photographs_without_a_face_are_left_out_and_counted(pipe, folder):
    with pytest.warns(UserWarning, match='1 of 6 photographs show no face'):
        data = D.PhotoFolder(folder, pipe.tokenizer, Reader(), 64)
    assert len(data) == 5 and data.captions == ['ada smiling'] + ['photo of a person']*4


def test_a_batch_of_photographs(pipe, folder):
    with quietly(): data = D.PhotoFolder(folder, pipe.tokenizer, Reader(), 64)
    b = data[torch.tensor([0, 4]), torch.tensor([[.1, 0], [.9, 0]])]
    assert b['pixels'].shape == (2, 3, 64, 64) and b['own'].argmax(1).tolist() == [10, 50]
    assert b['embeds'].argmax(1).tolist()[1] == 40 and b['embeds'].argmax(1).tolist()[0] in (20, 30)
    assert float(b['pixels'][0].mean()) == pytest.approx(10/127.5 - 1, abs=.01)
    assert b['boxes'][0].tolist() == pytest.approx([(.4*96 - 16)/64, .3, (.6*96 - 16)/64, .6])
    assert b['landmarks'].shape == (2, 5, 2)


def test_faces_are_read_once(pipe, folder, tmp_path):
    reader = Reader()
    with quietly(): D.PhotoFolder(folder, pipe.tokenizer, reader, 64, tmp_path/'cache.pt')
    assert reader.read == 6
    with quietly(): D.PhotoFolder(folder, pipe.tokenizer, reader, 64, tmp_path/'cache.pt')
    assert reader.read == 6  # remembered, also that there was no face


def test_folders_without_photographs(pipe, tmp_path):
    with pytest.raises(ArgumentError, match='no folder'): D.photo_files(tmp_path/'none')
    with pytest.raises(ArgumentError, match='no pictures at all'): D.photo_files(tmp_path)
    Image.new('RGB', (8, 8)).save(tmp_path/'a.jpg')
    with pytest.raises(ArgumentError, match='1 pictures lie in it directly'): D.photo_files(tmp_path)
    (tmp_path/'x').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'x'/'a.jpg')
    with pytest.raises(NoFaceError, match='any photograph'): D.PhotoFolder(tmp_path, pipe.tokenizer, Reader())


def test_what_a_mac_leaves_behind_is_nobody(folder):
    (folder/'__MACOSX').mkdir()
    for name in ('__MACOSX/a.png', 'ada/._10.png'): Image.new('RGB', (8, 8)).save(folder/name)
    found = D.photo_files(folder)
    assert set(found) == {'ada', 'grace', 'nobody'} and len(found['ada']) == 3


@given(st.integers(1, 400), st.integers(1, 400), st.floats(-50, 450), st.floats(-50, 450), st.floats(1, 200))
def test_square_lies_in_the_picture_and_shows_the_face(w, h, x, y, side):
    x0, y0, x1, y1 = D.square((w, h), (x, y, x + side, y + side))
    assert [x1 - x0, y1 - y0] == pytest.approx([min(w, h)]*2)
    assert 0 <= x0 and 0 <= y0 and x1 <= w and y1 <= h
    cx, cy = x + side/2, y + side/2
    if 0 <= cx <= w and 0 <= cy <= h: assert x0 - .51 <= cx <= x1 + .51 and y0 - .51 <= cy <= y1 + .51


def test_crops_of_a_folder_are_aligned_faces(pipe, folder):
    with quietly(): data = D.PhotoFolder(folder, pipe.tokenizer, Reader(), 64, crops=True, several=2)
    for face in data.faces: face['landmarks'] = torch.from_numpy(ARCFACE_TEMPLATE*np.float32(.5))
    b = data[torch.tensor([4, 0]), torch.zeros(2, 2)]
    assert b['crops'].shape == (2, 3, 224, 224) and b['embeds'].shape == (2, 2, 512)
    want = norm_crop(read_image(data.files[4]), data.faces[4]['landmarks'].numpy(), 224)
    assert np.array_equal(b['crops'][0].permute(1, 2, 0).numpy(), want)


# --- a folder from somebody's computer

def test_a_damaged_picture_is_left_out_and_named(pipe, folder):
    (folder/'ada'/'10.png').write_bytes(b'\x89PNG\r\n\x1a\n and nothing more')
    reader = Reader()
    with pytest.warns(UserWarning, match='1 of 6 pictures cannot be read.*10.png: '):
        data = D.PhotoFolder(folder, pipe.tokenizer, reader, 64)
    assert '10.png' not in [f.name for f in data.files] and len(data) > 1


def test_a_damaged_picture_does_not_count_as_one_without_a_face(folder):
    files = [folder/'ada'/name for name in ('10.png', '2.png')]
    faces = [None, dict(a=1), False]
    with pytest.warns(UserWarning) as said: D.with_a_face([*files, files[0]], faces, folder)
    assert [str(w.message)[:40] for w in said] == ['1 of 3 photographs show no face and are ']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'latin-1'])
def test_a_caption_in_any_encoding(encoding, tmp_path):
    (tmp_path/'a.txt').write_bytes('ein schöner Mann'.encode(encoding))
    with quietly(): assert D.captions_of([tmp_path/'a.jpg'], 'else') == ['ein schöner Mann']


def test_a_guessed_encoding_is_said(tmp_path):
    (tmp_path/'a.txt').write_bytes('schön'.encode('latin-1'))
    with pytest.warns(UserWarning, match='1 of 2 captions are not UTF-8.*cp1252.*a.txt'):
        D.captions_of([tmp_path/'a.jpg', tmp_path/'b.jpg'], 'else')


def test_a_caption_whose_name_ends_in_capitals(tmp_path):
    (tmp_path/'A.TXT').write_text('a man')
    assert D.caption_of(tmp_path/'A.JPG', 'else') == 'a man'
