"What a picture depends on: every change of a loaded model is named, and cells and workers hear of it."
import concurrent.futures as cf

import pytest
import torch
from diffusers import EulerDiscreteScheduler

import helpers_pack as H
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.cells import weights_hash
from faceid_nb.errors import ArgumentError
from faceid_nb.facts import sample_tensors
from faceid_nb.faceid import FaceID
from faceid_nb.models import load
from faceid_nb.sweep import Sweep

FACE = H.embedding(0)
CALL = dict(face=FACE, prompt='a', num_inference_steps=1)


@pytest.fixture
def tiny(): return load('tiny-faceid', device='cpu')


def other_scheduler(m): m.pipe.scheduler = EulerDiscreteScheduler.from_config(m.pipe.scheduler.config)


def other_settings(m): m.pipe.scheduler.register_to_config(set_alpha_to_one=True)


def other_lora_weight(m): m.adapter.lora_weight = .5


def free_u(m): m.pipe.enable_freeu(.9, .2, 1.2, 1.4)


def other_vae(m): next(m.pipe.vae.parameters()).data += .01


def other_words(m): m.pipe.tokenizer.add_tokens('<me>')


def other_negative_prompt(m): m.negative_prompt = 'ugly'


def fused_lora(m):
    "As peft leaves a weight that something was fused into."
    layer = m.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    with torch.no_grad(): layer.weight += .01*torch.randn_like(layer.weight)


def loaded_lora(m):
    pytest.importorskip('peft')
    from peft import LoraConfig
    m.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=['to_q']), 'mine')


CHANGES = [(other_scheduler, 'scheduler'), (other_settings, 'scheduler'), (other_lora_weight, 'LoRA weight'),
           (free_u, 'FreeU'), (other_vae, 'vae'), (other_words, 'tokenizer'),
           (other_negative_prompt, 'negative prompt'), (fused_lora, 'unet'), (loaded_lora, 'unet')]


@pytest.mark.parametrize('change, name', CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_a_change_is_named_and_makes_other_cells(tiny, change, name):
    before = weights_hash(tiny)
    assert tiny.changes() == [] and before == weights_hash('tiny-faceid')
    change(tiny)
    assert name in tiny.changes() and weights_hash(tiny) != before


def test_a_user_s_lora_counts_with_its_weight(tiny):
    pytest.importorskip('peft')
    loaded_lora(tiny)
    before = weights_hash(tiny)
    tiny.pipe.unet.set_adapters(['mine'], [.5])
    assert weights_hash(tiny) != before


def test_what_is_taken_back_is_no_change(tiny):
    for weight in (.5, 1.): tiny.adapter.lora_weight = weight
    tiny.generate(FACE, 'a', num_samples=1, num_inference_steps=1)
    tiny.adapter.detach()
    tiny.attach()
    assert tiny.changes() == []


def test_a_sweep_goes_on_with_new_cells_after_a_change(tiny, tmp_path):
    def cell(): return list(Sweep(tiny, dict(seed=[0]), CALL, measure=False).run(tmp_path, progress=False))[0]
    first = cell()
    other_scheduler(tiny)
    second = cell()
    assert not second.kept and second.key != first.key and cell().kept
    assert second.image.info['faceid_nb']['scheduler'] == 'EulerDiscreteScheduler'


def test_a_sweep_that_was_made_before_a_change_refuses(tiny, tmp_path):
    sweep = Sweep(tiny, dict(seed=[0]), CALL, measure=False)
    other_scheduler(tiny)
    with pytest.raises(ArgumentError, match='changed since this sweep was made.*another scheduler'):
        list(sweep.run(tmp_path, progress=False))


def test_workers_do_not_draw_with_another_model(tiny, tmp_path):
    other_scheduler(tiny)
    sweep = Sweep(tiny, dict(seed=[0]), CALL, measure=False)
    with cf.ThreadPoolExecutor(1) as pool, pytest.raises(ArgumentError, match='worker.*another scheduler'):
        list(sweep.run(tmp_path, pool, progress=False))


def by_hand():
    pipe = H.pipeline()
    return FaceID(pipe, FaceIDAdapter.from_state(**H.adapter_state(pipe.unet), variant='faceid'))


@pytest.mark.parametrize('change', [other_scheduler, other_lora_weight, free_u, other_vae])
def test_a_model_put_together_by_hand(change):
    m = by_hand()
    before = weights_hash(m)
    assert before == weights_hash(by_hand()) and m.changes() == []
    change(m)
    assert weights_hash(m) != before


def test_a_sample_sees_names_shapes_and_numbers():
    a = torch.arange(1000.)
    others = [{'v': a}, {'w': a[:999]}, {'w': a + 1}, {'w': a.view(10, 100)}, {'w': {'w': a}}]
    assert len({sample_tensors(state) for state in [{'w': a}, *others]}) == 6
