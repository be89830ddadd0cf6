"The reader of scenes: colours, questions, what it learns, how it is kept, and correlation."
import math
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from helpers_tiny import drawn_photos
from faceid_nb.errors import WeightsMissingError
from faceid_nb.tiny import people as drawn
from faceid_nb.tiny import scenes as S


@pytest.fixture(scope='module')
def photos(): return drawn_photos()


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


def test_questions_repeat_and_glasses_go_with_no_mood():
    texts, wanted = S.questions(64, 1)
    assert texts == S.questions(64, 1)[0] != S.questions(64, 2)[0]
    assert wanted['glasses'].float().mean() == .25
    for mood in range(4): assert wanted['glasses'][wanted['expression'] == mood].float().mean() == .25


def test_prompts_are_in_the_vocabulary():
    known = set(drawn.vocabulary())
    words = ' '.join(S.questions(40)[0]).replace(',', '').split()
    assert set(words) <= known


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


def test_a_reader_that_is_missing_can_be_made(tmp_path):
    with pytest.raises(WeightsMissingError, match='adapters reader'): S.load_reader(tmp_path/'none')


@given(st.integers(5, 60), st.floats(-.95, .95), st.integers(0, 99))
def test_correlation_is_pearsons_with_fishers_interval(n, r, seed):
    g = np.random.default_rng(seed)
    a = g.normal(size=n)
    b = r*a + (1 - r*r)**.5*g.normal(size=n)
    b[0] = np.nan
    got, low, high = S.correlation(a, b)
    assert got == pytest.approx(np.corrcoef(a[1:], b[1:])[0, 1], abs=1e-9)
    assert low < got < high
    assert math.atanh(high) - math.atanh(low) == pytest.approx(2*1.96/math.sqrt(n - 4), rel=1e-6)
