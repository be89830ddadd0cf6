"""Likeness of the face in every region to every person."""
from types import SimpleNamespace

import numpy as np
import pytest

from faceid_nb.measure import Judge
from faceid_nb.regions import region_mask
from faceid_nb.together import Together, faces_by_region, likeness_together, region_of

HALVES = ['left', 'right']
SIDES = [region_mask(side) for side in HALVES]


class Colours:
    "Finds the squares of a picture; who somebody is, is the colour of their square."
    name, detector = 'tiny', property(lambda self: self)
    def __init__(self, boxes): self.boxes = boxes
    def detect(self, image):
        boxes = np.array([[*b, .9] for b in self.boxes], float).reshape(-1, 5)
        return boxes, np.zeros((len(boxes), 5, 2)), ''
    def best(self, image, which='largest'): raise AssertionError


class Reads:
    "Where the middle of a face is in the picture gives its embedding: left (1, 0 ...), right (0, 1 ...)."
    def embed(self, images, landmarks): return np.eye(2, 512)[[int(i[0, 0, 0]) for i in images]]


def judge_of(boxes):
    reader = Colours(boxes)
    reader.embedder = None
    return Judge(reader, Reads())


def test_a_face_belongs_to_the_region_at_its_middle():
    assert [region_of((x, 0, x + 10, 9), SIDES, 64, 64) for x in (0, 20, 40)] == [0, 0, 1]
    assert region_of((0, 0, 9, 9), [region_mask('center')], 64, 64) is None


def test_the_largest_face_of_a_region_counts():
    judge = judge_of([(2, 2, 8, 8), (10, 10, 30, 30), (40, 10, 44, 14)])
    left, right = faces_by_region(np.zeros((64, 64, 3), np.uint8), SIDES, judge)
    assert left.box[0] == 10 and right.box[0] == 40


def test_an_empty_region_is_nan_and_not_apart():
    image = np.zeros((64, 64, 3), np.uint8)
    people = [SimpleNamespace(), SimpleNamespace()]
    judge = judge_of([(10, 10, 30, 30)])
    object.__setattr__(judge, 'embed_person', lambda p: np.eye(2, 512)[people.index(p)])
    found = likeness_together(people, [image], HALVES, judge)
    assert found.own[0, 0] == 1 and np.isnan(found.own[0, 1]) and not found.apart[0]


@pytest.mark.parametrize('table, apart', [([[.6, .1], [.0, .5]], True), ([[.1, .6], [.5, .0]], False),
                                          ([[.6, .7], [.0, .5]], False)])
def test_an_exchange_is_seen(table, apart):
    assert Together(np.array([table])).apart[0] == apart


def test_other_is_the_nearest_of_several():
    three = Together(np.array([[[.9, .1, .3], [.2, .8, .4], [0, .5, .7]]]))
    assert np.allclose(three.own, [[.9, .8, .7]]) and np.allclose(three.other, [[.3, .4, .5]])
