"""PlusV2: one pass through the resampler serves all weights, and the pack's weight turns the mood up."""
from types import SimpleNamespace
import pytest
import torch
import goldens_build as G
from faceid_nb.adapter import FaceIDAdapter, structure_sweep
from faceid_nb.errors import ArgumentError, VariantError
from faceid_nb.grow import quiet_resampler
from faceid_nb.hub import TINY
from faceid_nb.measure import identity_similarity
from faceid_nb.models import load
from faceid_nb.projection import PlusProjection
from faceid_nb.tiny.lessons import face_shapes, lesson_goal, teach_resampler
from faceid_nb.tiny.people import EXPRESSIONS, render, sample_people
from faceid_nb.tiny.scenes import as_tensor, load_reader, read_scenes


@pytest.fixture(scope='module')
def adapter():
    a = FaceIDAdapter.new(G.pipeline('sd').unet, 'plusv2', rank=2, clip_embeddings_dim=32)
    G.fill_(a.net, 3)
    return a


def test_a_sweep_is_its_values_one_by_one(adapter):
    g = torch.Generator().manual_seed(0)
    e, states, values = torch.randn(512, generator=g), torch.randn(1, 9, 32, generator=g), [0., .3, 1., 2.]
    passes = []
    hook = adapter.net.image_proj.perceiver_resampler.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad(): swept = structure_sweep(adapter, e, states, values)
    assert len(passes) == 1
    hook.remove()
    with torch.no_grad(): alone = torch.cat([adapter.tokens(e[None], states, s) for s in values])
    assert swept.shape == alone.shape == (4, 4, 64)
    assert (swept - alone).abs().max() < 1e-5
    assert (swept[0] - swept[3]).abs().max() > 1e-2


def test_a_sweep_needs_plusv2_and_one_crop(adapter):
    plus = FaceIDAdapter.from_state(**adapter.state_dict(), variant='plus')
    with pytest.raises(VariantError, match='plus'):
        structure_sweep(plus, torch.ones(512), torch.zeros(1, 9, 32), [1])
    for states in (None, torch.zeros(2, 9, 32)):
        with pytest.raises(ArgumentError, match='one crop'):
            structure_sweep(adapter, torch.ones(512), states, [1])


def test_the_packs_structure_is_the_photographs():
    model = load('tiny-plusv2', device='cpu')
    model.pipe.set_progress_bar_config(disable=True)
    moods = ['surprised', 'smiling', 'frowning', 'surprised']
    photos = render(sample_people(4, seed=5), seed=9, size=256, yaw=0., expression=moods, glasses=0, hat=None)
    faces = [model.reader.best(p.image) for p in photos]
    prompt = 'photo of a person in a red shirt, gray background'
    made = model.generate(faces, prompt, num_samples=2, seed=3, s_scale=[0., 1.5]*4, num_inference_steps=12)
    seen = read_scenes(as_tensor(made), load_reader(TINY/'reader.safetensors'))['expression'].view(4, 2)
    right = (seen == torch.tensor([EXPRESSIONS.index(m) for m in moods])[:, None]).sum(0)
    assert right[1] > right[0] and right[1] >= 3
    pairs = zip(faces, (made[2*k:2*k + 2] for k in range(4)))
    likeness = [identity_similarity(f, two, reader=model.reader).mean() for f, two in pairs]
    assert sum(likeness)/4 > .3


# --- lessons for a resampler

POINTS = [[20., 25], [42, 26], [31, 37], [24, 46], [39, 47]]


def random_points(g): return torch.as_tensor(POINTS) + torch.randn(300, 5, 2, generator=g)


def moved(points, g):
    "Turned, enlarged and put somewhere else."
    turn = torch.randn(300, generator=g)*.3
    c, n = turn.cos(), turn.sin()
    rotation = torch.stack([torch.stack([c, -n], 1), torch.stack([n, c], 1)], 1)
    size = 1 + torch.rand(300, 1, 1, generator=g)
    return points @ rotation*size + 9*torch.randn(300, 1, 2, generator=g)


def most_correlated(shapes):
    "The largest correlation of a shape with the number of its face."
    order = torch.arange(300.)
    return max(abs(float(torch.corrcoef(torch.stack([v, order]))[0, 1])) for v in shapes.T)


def test_shapes_of_faces_are_four_unit_numbers():
    s = face_shapes(random_points(torch.Generator().manual_seed(0)))
    assert s.shape == (300, 4)
    assert float(s.mean(0).abs().max()) < 1e-3
    assert float((s.std(0) - 1).abs().max()) < .01
    assert float((torch.corrcoef(s.T) - torch.eye(4)).abs().max()) < 1e-3


def test_shapes_of_faces_do_not_change_with_place_size_and_tilt():
    g = torch.Generator().manual_seed(0)
    p = random_points(g)
    assert float((face_shapes(moved(p, g)).abs() - face_shapes(p).abs()).abs().max()) < .02


def test_a_turn_of_the_head_moves_the_nose():
    p = random_points(torch.Generator().manual_seed(0))
    nose = p.clone()
    nose[:, 2, 0] += 4*torch.arange(300)/300
    assert most_correlated(face_shapes(nose)) > .6 > .3 > most_correlated(face_shapes(p))


N = 400


class Crops:
    "Two numbers a person that only the crop holds; a table of people and an encoder that reads their crops."
    def __init__(self):
        self.scores = torch.randn(N, 2)
        self.crops = torch.randn(1, 9, 32) + .3*torch.randn(N, 9, 32)
        self.crops[:, 0, :2] += self.scores
        self.embeds = torch.nn.functional.normalize(torch.randn(N, 512), dim=1)
        self.groups = SimpleNamespace(rows=torch.arange(N - 100))      # the last hundred are not taught
    def __getitem__(self, at): return dict(embeds=self.embeds[at[0]], crops=at[0])
    def normalised(self, crops): return crops
    def states(self, rows): return self.crops[rows]


@pytest.mark.parametrize('shortcut, steps, share', [(True, 200, .6), (False, 1000, 1.6)])
def test_a_resampler_learns_its_lesson(shortcut, steps, share):
    "What only the crop holds is in the tokens afterwards, beside the person; nothing else has learnt."
    torch.manual_seed(0)
    net, people = PlusProjection(64, clip_embeddings_dim=32, shortcut=shortcut), Crops()
    net.load_state_dict(quiet_resampler(net.state_dict(), not shortcut), strict=False)      # as `grow` begins
    before = {k: v.clone() for k, v in net.state_dict().items()}
    goal, rows = lesson_goal(net, people.scores), torch.arange(N - 100, N)
    figures = list(teach_resampler(net, people, people, goal, steps=steps, batch=32))
    assert [f['lesson'] for f in figures][:4] == [50, 100, 150, 200]
    assert figures[-1]['error'] < figures[0]['error']
    assert all(p.requires_grad for p in net.parameters())
    rest = {k: v for k, v in net.state_dict().items() if not k.startswith('perceiver')}
    assert all(torch.equal(v, before[k]) for k, v in rest.items())
    with torch.no_grad():
        x, r = net.parts(people.embeds[rows], people.crops[rows])
        wanted = goal(rows, people.embeds[rows])
    person = share*x
    said, asked = (r - person).flatten(), (wanted - person).flatten()
    assert float(torch.corrcoef(torch.stack([said, asked]))[0, 1]) > .8
    assert float((wanted - person).norm()) > 0
    assert abs(float((r*x).sum()/(x*x).sum()) - share) < .15
