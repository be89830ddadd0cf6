"""PlusV2: one pass through the resampler serves all weights, and in the pack that ships the weight turns the photograph's mood up."""
import pytest
import torch
import goldens_build as G
from faceid_nb.adapter import FaceIDAdapter, structure_sweep
from faceid_nb.errors import ArgumentError, VariantError
from faceid_nb.models import TINY, load


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
    assert swept.shape == alone.shape == (4, 4, 64) and (swept - alone).abs().max() < 1e-5 and (swept[0] - swept[3]).abs().max() > 1e-2


def test_a_sweep_needs_plusv2_and_one_crop(adapter):
    plus = FaceIDAdapter.from_state(**adapter.state_dict(), variant='plus')
    with pytest.raises(VariantError, match='plus'): structure_sweep(plus, torch.ones(512), torch.zeros(1, 9, 32), [1])
    for states in (None, torch.zeros(2, 9, 32)):
        with pytest.raises(ArgumentError, match='one crop'): structure_sweep(adapter, torch.ones(512), states, [1])


def test_the_packs_structure_is_the_photographs():
    from faceid_nb.measure import identity_similarity
    from faceid_nb.tiny.scenes import as_tensor, load_reader, read_scenes
    from faceid_nb.tiny.people import EXPRESSIONS, render, sample_people
    model = load('tiny-plusv2', device='cpu')
    model.pipe.set_progress_bar_config(disable=True)
    moods = ['surprised', 'smiling', 'frowning', 'surprised']
    faces = [model.reader.best(p.image) for p in render(sample_people(4, seed=5), seed=9, size=256, yaw=0., expression=moods, glasses=0, hat=None)]
    made = model.generate(faces, 'photo of a person in a red shirt, gray background', num_samples=2, seed=3, s_scale=[0., 1.5]*4, num_inference_steps=12)
    seen = read_scenes(as_tensor(made), load_reader(TINY/'reader.safetensors'))['expression'].view(4, 2)
    right = (seen == torch.tensor([EXPRESSIONS.index(m) for m in moods])[:, None]).sum(0)
    assert right[1] > right[0] and right[1] >= 3
    assert sum(identity_similarity(f, made[2*k:2*k + 2], reader=model.reader).mean() for k, f in enumerate(faces))/4 > .3


# --- lessons for a resampler

def test_shapes_of_faces_do_not_change_with_place_size_and_tilt():
    from faceid_nb.tiny.lessons import face_shapes
    g = torch.Generator().manual_seed(0)
    p = torch.as_tensor([[20., 25], [42, 26], [31, 37], [24, 46], [39, 47]]) + torch.randn(300, 5, 2, generator=g)
    s = face_shapes(p)
    assert s.shape == (300, 4) and float(s.mean(0).abs().max()) < 1e-3 and float((s.std(0) - 1).abs().max()) < .01 and float((torch.corrcoef(s.T) - torch.eye(4)).abs().max()) < 1e-3
    turn = torch.randn(300, generator=g)*.3
    c, n = turn.cos(), turn.sin()
    moved = p @ torch.stack([torch.stack([c, -n], 1), torch.stack([n, c], 1)], 1)*(1 + torch.rand(300, 1, 1, generator=g)) + 9*torch.randn(300, 1, 2, generator=g)
    assert float((face_shapes(moved).abs() - s.abs()).abs().max()) < .02
    # a turn of the head moves the nose
    nose = p.clone()
    nose[:, 2, 0] += 4*torch.arange(300)/300
    assert max(abs(float(torch.corrcoef(torch.stack([v, torch.arange(300.)]))[0, 1])) for v in face_shapes(nose).T) > .6 > .3 > max(abs(float(torch.corrcoef(torch.stack([v, torch.arange(300.)]))[0, 1])) for v in s.T)


@pytest.mark.parametrize('shortcut', [True, False])
def test_a_resampler_learns_its_lesson(shortcut):
    "Numbers that only the crop holds are to be found in the tokens afterwards, beside the person; nothing else has learnt."
    from faceid_nb.projection import PlusProjection
    from faceid_nb.tiny.lessons import lesson_goal, teach_resampler
    torch.manual_seed(0)
    n = 400
    net = PlusProjection(64, clip_embeddings_dim=32, shortcut=shortcut)
    scores = torch.randn(n, 2)
    from faceid_nb.train import _quiet
    net.load_state_dict(_quiet(net.state_dict(), not shortcut), strict=False)      # as `grow` begins
    states = torch.randn(1, 9, 32) + .3*torch.randn(n, 9, 32)
    states[:, 0, :2] += scores
    class Table:
        groups = type('G', (), dict(rows=torch.arange(n - 100)))()
        def __getitem__(self, at): return dict(embeds=E[at[0]], crops=at[0])
    class Encoder:
        def normalised(self, crops): return crops
        def states(self, rows): return states[rows]
    E = torch.nn.functional.normalize(torch.randn(n, 512), dim=1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    goal = lesson_goal(net, scores)
    rows = torch.arange(n - 100, n)
    figures = list(teach_resampler(net, Table(), Encoder(), goal, steps=200 if shortcut else 1000, batch=32))
    assert [f['lesson'] for f in figures][:4] == [50, 100, 150, 200] and figures[-1]['error'] < figures[0]['error'] and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if not k.startswith('perceiver'))
    with torch.no_grad():
        x, r = net.parts(E[rows], states[rows])
        wanted = goal(rows, E[rows])
        person = (.6 if shortcut else 1.6)*x
        said, asked = (r - person).flatten(), (wanted - person).flatten()
    assert float(torch.corrcoef(torch.stack([said, asked]))[0, 1]) > .8 and float((wanted - person).norm()) > 0
    assert abs(float((r*x).sum()/(x*x).sum()) - (.6 if shortcut else 1.6)) < .15
