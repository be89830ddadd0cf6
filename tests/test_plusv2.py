"""PlusV2: one pass through the resampler serves all weights, and in the pack that ships the weight turns the photograph's mood up."""
import pytest
import torch
import goldens_build as G
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.errors import ArgumentError, VariantError
from faceid_nb.models import TINY, load
from faceid_nb.plusv2 import structure_sweep


@pytest.fixture(scope='module')
def adapter():
    a = FaceIDAdapter.new(G.pipeline('sd').unet, 'plusv2', rank=2, clip_embeddings_dim=32); G.fill_(a.net, 3); return a


def test_a_sweep_is_its_values_one_by_one(adapter):
    g = torch.Generator().manual_seed(0); e, states, values = torch.randn(512, generator=g), torch.randn(1, 9, 32, generator=g), [0., .3, 1., 2.]; passes = []
    hook = adapter.net.image_proj.perceiver_resampler.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad(): swept = structure_sweep(adapter, e, states, values)
    assert len(passes) == 1; hook.remove()
    with torch.no_grad(): alone = torch.cat([adapter.tokens(e[None], states, s) for s in values])
    assert swept.shape == alone.shape == (4, 4, 64) and (swept - alone).abs().max() < 1e-5 and (swept[0] - swept[3]).abs().max() > 1e-2


def test_a_sweep_needs_plusv2_and_one_crop(adapter):
    plus = FaceIDAdapter.from_state(**adapter.state_dict(), variant='plus')
    with pytest.raises(VariantError, match='plus'): structure_sweep(plus, torch.ones(512), torch.zeros(1, 9, 32), [1])
    for states in (None, torch.zeros(2, 9, 32)):
        with pytest.raises(ArgumentError, match='one crop'): structure_sweep(adapter, torch.ones(512), states, [1])


def test_the_packs_structure_is_the_photographs():
    from faceid_nb.measure import identity_similarity
    from faceid_nb.tiny.adapters import as_tensor, load_reader, read_scenes
    from faceid_nb.tiny.people import EXPRESSIONS, render, sample_people
    model = load('tiny-plusv2', device='cpu'); model.pipe.set_progress_bar_config(disable=True); moods = ['surprised', 'smiling', 'frowning', 'surprised']
    faces = [model.reader.best(p.image) for p in render(sample_people(4, seed=5), seed=9, size=256, yaw=0., expression=moods, glasses=0, hat=None)]
    made = model.generate(faces, 'photo of a person in a red shirt, gray background', num_samples=2, seed=3, s_scale=[0., 1.5]*4, num_inference_steps=12)
    seen = read_scenes(as_tensor(made), load_reader(TINY/'reader.safetensors'))['expression'].view(4, 2); right = (seen == torch.tensor([EXPRESSIONS.index(m) for m in moods])[:, None]).sum(0)
    assert right[1] > right[0] and right[1] >= 3
    assert sum(identity_similarity(f, made[2*k:2*k + 2], reader=model.reader).mean() for k, f in enumerate(faces))/4 > .3
