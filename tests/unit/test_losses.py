"What an error costs: noise and its weight, the gauge, likeness and structure as losses."
import pytest
import torch
from hypothesis import given, settings, strategies as st
import helpers_pack as P
from helpers_train import seeded
from faceid_nb import losses as L
from faceid_nb.errors import ArgumentError


@pytest.fixture(scope='module')
def pipe(): return P.pipeline()


# --- the question

@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(0, 2**31))
def test_error_of_noise_over_alpha_is_error_of_velocity(t, seed):
    g = seeded(seed)
    z, wrong = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, 4, 4, generator=g)
    alpha_bar = (1 - torch.linspace(.00085**.5, .012**.5, 1000)**2).cumprod(0)
    x, t, noise = L.add_noise(z, alpha_bar, g, t=torch.full((2,), t))
    a = alpha_bar[t].view(-1, 1, 1, 1)
    assert torch.allclose(x, a.sqrt()*z + (1 - a).sqrt()*noise)
    e, w = L.target_and_weight(x, noise, t, alpha_bar, cap=1e9)
    v, one = L.target_and_weight(x, noise, t, alpha_bar, 'v_prediction')
    assert torch.allclose(v, a.sqrt()*noise - (1 - a).sqrt()*z, atol=2e-4)
    p = torch.ones(2, 1, 4, 4)
    wrong_v = (wrong - (1 - a).sqrt()*x)/a.sqrt()
    of_noise, of_velocity = L.weighted_error(wrong, e, w, p), L.weighted_error(wrong_v, v, one, p)
    assert float(of_noise) == pytest.approx(float(of_velocity), rel=2e-3)


def test_weight_is_capped():
    alpha_bar, t, x = torch.tensor([.9, .001]), torch.tensor([0, 1]), torch.zeros(2, 1, 1, 1)
    def weights(cap): return L.target_and_weight(x, x, t, alpha_bar, cap=cap)[1].flatten().tolist()
    assert weights(20.) == pytest.approx([1/.9, 20.]) and weights(1.) == [1., 1.]


def test_unknown_predictions_are_refused():
    x = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ArgumentError, match="'sample'"):
        L.target_and_weight(x, x, torch.tensor([0, 1]), torch.tensor([.9, .001]), 'sample')


def test_face_map_weighs_the_face():
    m = L.face_map(torch.tensor([[.25, 0., .75, .5], [0., 0., 0., 0.]]), 4, 4, 3.)
    assert m[0, 0].tolist() == [[1, 3, 3, 1], [1, 3, 3, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert (m[1] == 1).all()


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_the_right_answer_means_the_clean_picture(pipe, prediction):
    alpha_bar, z = pipe.scheduler.alphas_cumprod, torch.randn(5, 8, 16, 16)
    x, t, noise = L.add_noise(z, alpha_bar, seeded(0), t=torch.tensor([0, 300, 600, 900, 999]))
    a = alpha_bar[t].view(-1, 1, 1, 1)
    said = noise if prediction == 'epsilon' else a.sqrt()*noise - (1 - a).sqrt()*z
    assert torch.allclose(L.estimate(said, x, t, alpha_bar, prediction), z, atol=2e-5)


@pytest.mark.parametrize('high', [0., .5, 1.])
def test_more_rows_with_strong_noise(pipe, high):
    z = torch.zeros(4000, 1, 1, 1)
    _, t, _ = L.add_noise(z, pipe.scheduler.alphas_cumprod, seeded(0), high=high)
    usual = .6*.343 + .4*.4  # of a logistic normal, and of an even draw
    assert float((t >= 600).float().mean()) == pytest.approx(high + (1 - high)*usual, abs=.03)
    assert int(t.max()) < 1000


def test_a_question_is_made_of_its_pieces(pipe):
    loss = L.NoiseLoss(pipe.scheduler.alphas_cumprod, face=2., offset=0., cap=5.)
    z, boxes = torch.randn(3, 8, 16, 16), torch.tensor([[0., 0., .5, 1.]]).expand(3, 4)
    q = loss.ask(z, seeded(1), boxes)
    x, t, noise = L.add_noise(z, loss.alpha_bar, seeded(1), 0.)
    assert torch.equal(q.x, x) and torch.equal(q.t, t) and torch.equal(q.target, noise)
    said = torch.randn(3, 8, 16, 16)
    _, weight = L.target_and_weight(x, noise, t, loss.alpha_bar, cap=5.)
    want = L.weighted_error(said, noise, weight, L.face_map(boxes, 16, 16, 2.))
    assert torch.equal(loss(said, q), want)


# --- the gauge

@pytest.fixture
def gauge():
    z, e = torch.randn(6, 2, 4, 4), torch.nn.functional.normalize(torch.randn(6, 512), dim=1)
    batch = dict(latents=z, embeds=e, boxes=torch.tensor([[0., 0., .5, 1.]]).expand(6, 4))
    return L.Gauge(batch, torch.zeros(6, 1, 1), torch.linspace(.999, .005, 1000))


def test_the_blind_read_nobody(gauge):
    blind = gauge(lambda x, t, text, e: torch.zeros_like(x))
    assert blind['right'] == blind['wrong'] == blind['none'] > 0


def test_gauge_tells_readers_from_the_blind(gauge):
    def reads(x, t, text, e):
        away = (e - gauge.embeds).norm(dim=1).view(-1, 1, 1, 1)
        return gauge.question.target + 10*away
    found = gauge(reads)
    assert found['right'] < 1e-9 < min(found['wrong'], found['none'])


def test_errors_off_the_face_do_not_count(gauge):
    elsewhere = torch.zeros_like(gauge.question.target)
    elsewhere[..., 2:] = 5
    assert gauge(lambda *a: gauge.question.target + elsewhere)['right'] < 1e-9


# --- likeness and structure

def question(x, t): return L.Question(x, t, None, None, None)


def test_likeness_loss_pulls_towards_the_person(pipe):
    torch.manual_seed(0)
    W = torch.randn(512, 3*64*64)
    def recogniser(pictures, landmarks):  # landmarks must come in pixels
        return (pictures*float(landmarks.max() > 1)).flatten(1) @ W.T
    asked = L.NoiseLoss(pipe.scheduler.alphas_cumprod)
    unlike = L.IdentityLoss(recogniser, pipe.vae.requires_grad_(False), asked)
    said = torch.randn(3, 8, 16, 16, requires_grad=True)
    x = torch.randn(3, 8, 16, 16)
    batch = dict(own=torch.randn(3, 512), landmarks=torch.rand(3, 5, 2))
    loss = unlike(said, question(x, torch.tensor([10, 900, 250])), batch)
    loss.backward()
    assert 0 < float(loss.detach()) < 2
    assert (said.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True]
    assert float(unlike(said, question(x, torch.tensor([900]*3)), batch)) == 0


def test_structure_loss_asks_where_noise_is_strong_and_the_crop_was_shown(pipe):
    torch.manual_seed(0)
    W = torch.randn(8*16*16, 3)/30
    def reader(z): return z.flatten(1) @ W
    asked = L.NoiseLoss(pipe.scheduler.alphas_cumprod)
    amiss = L.StructureLoss(reader, asked)
    z, t = torch.randn(4, 8, 16, 16), torch.tensor([950, 950, 599, 600])
    q = asked.ask(z, seeded(0), t=t)
    batch, shown = dict(scores=reader(z)), torch.tensor([1., 0, 1, 1])
    said = (q.target + .01*torch.randn_like(q.target)).requires_grad_()
    amiss(said, q, batch, shown).backward()
    assert (said.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, False, True]
    others = dict(scores=reader(z).roll(1, 0))
    assert float(amiss(q.target, q, batch, shown)) < 1e-3 < float(amiss(q.target, q, others, shown))
    assert float(amiss(q.target, q, batch, torch.zeros(4))) == 0
    assert float(L.StructureLoss(reader, asked, above=951)(q.target, q, batch, shown)) == 0
