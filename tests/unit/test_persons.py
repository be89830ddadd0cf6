"One door for photographs, faces, vectors and lists of them."
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import helpers_pack as H
from faceid_nb.errors import ArgumentError, ImageError, NoFaceError
from faceid_nb.face import Face, mean_face
from faceid_nb.persons import (Person, as_people, as_person, as_vectors, blend, digest, is_vector,
                               name_array, name_face)

E = H.embedding(0, 4).numpy()


class Reader:
    "Finds the same person on every photograph but one, and counts how often it is asked."
    name, asked = 'tiny', 0

    def best(self, image, which='largest'):
        self.asked += 1
        if isinstance(image, str) and image == 'nobody.jpg': raise NoFaceError('No face was found')
        return Face(E[{'largest': 0, 'left': 1}[which]], pack='tiny')


def face(k, pack='tiny', **more): return Face(E[k], pack=pack, **more)


def find(source, **more): return as_person(source, Reader(), **more)


# --- one person
@pytest.mark.parametrize('source', ['a.jpg', b'bytes', Image.new('RGB', (9, 9)), io.BytesIO(b'file'),
                                    np.zeros((9, 9, 3), np.uint8)], ids=range(5))
def test_a_photograph_is_read(source):
    person = find(source)
    assert np.array_equal(person.embedding(), E[0]) and person.pack == 'tiny' and len(person.faces) == 1


def test_which_face_of_a_photograph(): assert np.array_equal(find('a.jpg', which='left').embedding(), E[1])


@pytest.mark.parametrize('vector', [E[1], E[1:2], E[1].astype(np.float64), E[1].tolist(),
                                    tuple(E[1].tolist()), torch.tensor(E[1]),
                                    torch.tensor(E[1]).double()], ids=range(7))
def test_a_vector_is_itself(vector):
    person = find(vector)
    assert person.faces == () and person.vectors.shape == (1, 512) and person.vectors.dtype == np.float32
    assert np.array_equal(person.embedding(), E[1])


def test_a_vector_keeps_its_length(): assert np.array_equal(find(3*E[1]).embedding(), 3*E[1])


def test_a_tensor_with_gradients_is_a_vector():
    assert np.array_equal(find(torch.tensor(E[1], requires_grad=True)).embedding(), E[1])


def test_a_face_is_kept():
    f = face(2)
    assert find(f).faces == (f,) and np.array_equal(find(f).embedding(), f.embedding)


def test_a_person_is_kept():
    person = find(face(2))
    assert find(person) is person


def test_a_grey_picture_as_wide_as_an_embedding_is_a_picture():
    assert np.array_equal(find(np.zeros((300, 512), np.uint8)).embedding(), E[0])


@pytest.mark.parametrize('rows', [np.eye(512)[:3], np.eye(512)[:1]*np.array([[0], [0], [1]])])
def test_rows_of_unit_length_are_embeddings_though_nothing_is_negative(rows):
    assert is_vector(rows) and is_vector(torch.tensor(rows)) and not is_vector(.5*rows)


def test_a_list_is_one_person():
    faces = [face(0), face(1)]
    person = find(faces)
    assert person.faces == tuple(faces) and person.embeddings().shape == (2, 512)


def test_a_list_of_vectors_is_one_person():
    person = find([E[0], E[1].tolist(), torch.tensor(E[2])])
    assert person.faces == () and np.array_equal(person.embeddings(), E[:3])


def test_several_vectors_are_one_person(): assert np.array_equal(find(E).embeddings(), E)


def test_photographs_and_vectors_keep_their_places():
    person = find([E[3], 'a.jpg', face(2), find(E[1])])
    assert np.array_equal(person.embeddings(), E[[3, 0, 2, 1]]) and len(person) == len(person.faces) == 4


# --- several people
def test_a_list_has_an_entry_a_person():
    people = as_people(['a.jpg', E[1], face(2), ['a.jpg', E[3]]], Reader())
    assert [len(p) for p in people] == [1, 1, 1, 2] and np.array_equal(people[2].embedding(), E[2])


@pytest.mark.parametrize('table', [E, torch.tensor(E), torch.tensor(E).double()])
def test_a_table_has_a_row_a_person(table):
    people = as_people(table)
    assert len(people) == 4 and all(np.array_equal(p.embedding(), e) for p, e in zip(people, E))


@pytest.mark.parametrize('source', ['a.jpg', face(0), E[0], E[:1], E[0].tolist(), Person((face(0),))],
                         ids=range(6))
def test_one_source_is_one_person(source):
    people = as_people(source, Reader())
    assert len(people) == 1 and np.array_equal(people[0].embedding(), E[0])


def test_nobody_is_an_empty_list(): assert as_people([], Reader()) == []


def test_a_photograph_that_stands_twice_is_read_once():
    reader, photo = Reader(), Image.new('RGB', (9, 9))
    a, b, c = as_people([photo, photo, Image.new('RGB', (9, 9))], reader)
    assert reader.asked == 2 and a is b and a is not c


# --- who is refused
STRANGER = face(2, 'judge')


@pytest.mark.parametrize('source', [STRANGER, [face(0), STRANGER], Person((STRANGER,))], ids=range(3))
def test_a_face_of_another_recogniser(source):
    with pytest.raises(ArgumentError, match="another recogniser.*'judge', not 'tiny'"): find(source)


def test_a_face_of_another_recogniser_where_only_the_picture_counts():
    alone, among_people = find(STRANGER, same_pack=False), as_people([STRANGER], Reader(), same_pack=False)[0]
    assert alone.pack == among_people.pack == 'judge'


def test_without_a_reader_or_a_pack_nothing_is_known():
    assert as_person(face(2, 'judge')).pack == 'judge' and find(face(2, '')).pack == ''


def test_nobody_on_a_photograph():
    with pytest.raises(NoFaceError): as_people(['a.jpg', 'nobody.jpg'], Reader())


@pytest.mark.parametrize('source', ['a.jpg', ['a.jpg'], np.zeros((9, 9, 3), np.uint8)], ids=range(3))
def test_a_photograph_without_a_reader(source):
    with pytest.raises(ArgumentError, match='no face reader'): as_person(source)


@pytest.mark.parametrize('source', [np.zeros(100, np.float32), torch.zeros(1, 100)], ids=range(2))
def test_a_vector_of_another_width_without_a_reader(source):
    with pytest.raises(ArgumentError, match=r'\(n, 512\).*100'): as_person(source)


def test_a_vector_of_the_width_that_is_asked_for():
    assert as_person(np.zeros(64), width=64).embedding().shape == (64,)


@pytest.mark.parametrize('source', [[], (), [[]], [E[0], []]], ids=range(4))
def test_an_empty_list_is_no_person(source):
    with pytest.raises(ArgumentError, match='without a photograph'): find(source)


# --- embeddings
def test_several_photographs_give_their_unit_mean():
    faces = [face(k) for k in range(3)]
    got = find(faces).embedding()
    assert got.dtype == np.float32 and abs(np.linalg.norm(got) - 1) < 1e-6
    assert np.abs(got - mean_face(faces).embedding).max() < 1e-7


def test_raw_embeddings():
    faces = [face(k, raw_embedding=(k + 2)*E[k]) for k in range(2)]
    assert np.array_equal(find(faces).embeddings(raw=True), [2*E[0], 3*E[1]])
    assert np.abs(find(faces).embedding(raw=True) - mean_face(faces).raw_embedding).max() < 1e-6
    assert np.array_equal(find(faces[0]).embedding(raw=True), 2*E[0])


def test_a_vector_is_its_own_raw_embedding():
    person = find([3*E[0], face(1, raw_embedding=2*E[1])])
    assert np.array_equal(person.embeddings(raw=True), [3*E[0], 2*E[1]])


def test_a_face_without_its_raw_embedding():
    with pytest.raises(ArgumentError, match='before normalisation'): find(face(0)).embedding(raw=True)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(.01, 5), min_size=1, max_size=4))
def test_a_blend_is_a_unit_vector_between(weights):
    b = blend(E[:len(weights)], weights)
    assert abs(np.linalg.norm(b) - 1) < 1e-5
    assert np.abs(b - blend(E[:len(weights)], [3*w for w in weights])).max() < 1e-5


def test_a_person_blends_photographs():
    person = find([face(0), face(1)])
    assert np.abs(person.blend([1, 0]) - E[0]).max() < 1e-6
    assert np.array_equal(person.blend(), person.embedding())


@pytest.mark.parametrize('weights', [[1], [1, 2, 3], [[1, 2]]])
def test_a_weight_for_each(weights):
    with pytest.raises(ArgumentError, match='2 faces'): blend(E[:2], weights)


def test_a_blend_that_cancels():
    with pytest.raises(ArgumentError, match='cancel'): blend([E[0], -E[0]])


# --- crops
def test_a_crop_is_the_first_photographs():
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    points = np.array([[20, 20], [40, 20], [30, 30], [22, 40], [38, 40.]], np.float32)
    first = face(0, image=picture, landmarks=points)
    assert np.array_equal(find([first, face(1)]).crop(112), first.crop(112))
    assert find(first).crop().size == (224, 224)


def test_a_vector_has_no_crop():
    with pytest.raises(ArgumentError, match='no picture.*512 numbers.*structure='): find(E[0]).crop()


def test_a_face_without_a_picture_has_no_crop():
    with pytest.raises(ImageError, match='came without a picture'): find(face(0)).crop()


# --- names
def test_one_photograph_has_the_name_of_its_face(): assert find(face(0)).digest == name_face(face(0))


def test_one_vector_has_the_name_of_its_array(): assert find(E[0]).digest == name_array(E[0])


def test_names_tell_people_apart():
    seen = face(0, image=np.zeros((2, 2, 3)))
    people = [[face(0)], [face(0), face(1)], [face(1), face(0)], E[0], E[:2], seen]
    assert len({find(p).digest for p in people}) == len(people)


def test_a_name_is_of_the_contents():
    assert find([face(0), face(1)]).digest == find([face(0), face(1)]).digest


def test_parts_of_a_digest_are_set_apart():
    assert digest('a', 'bc') != digest('ab', 'c') and len(digest()) == 64


# --- vectors
@pytest.mark.parametrize('x', [E[0], E, torch.tensor(E), E[0].tolist()], ids=range(4))
def test_vectors(x): assert is_vector(x)


@pytest.mark.parametrize('x', [E[0, :100], np.zeros((300, 512), np.uint8), np.zeros((2, 3, 512)),
                               torch.zeros(512, dtype=torch.int64), Image.new('RGB', (512, 512)),
                               'a.jpg', [E[0]]*512, None, face(0)], ids=range(9))
def test_no_vectors(x): assert not is_vector(x)


def test_vectors_are_rows():
    assert as_vectors(E[0]).shape == (1, 512) and as_vectors(torch.tensor(E).half()).shape == (4, 512)
    assert as_vectors(E[0].tolist()).dtype == np.float32


def test_describes_itself():
    assert repr(find([face(0), face(1)])) == 'Person(2 photographs)'
    assert repr(find(E[0])) == 'Person(1 vector)'


# --- a vector or a picture
GREY_PICTURE = np.random.default_rng(0).random((300, 512), np.float32)


@pytest.mark.parametrize('picture', [GREY_PICTURE, 255*GREY_PICTURE, torch.tensor(GREY_PICTURE),
                                     np.zeros((300, 512)), GREY_PICTURE[:2]], ids=range(5))
def test_a_grey_picture_of_floats_is_no_crowd(picture):
    assert [len(p.faces) for p in as_people(picture, Reader())] == [1]


@pytest.mark.parametrize('x', [GREY_PICTURE[0], GREY_PICTURE[:1], np.zeros((1, 512))], ids=range(3))
def test_a_single_row_is_a_vector(x): assert is_vector(x)
