"""Which row has which argument: one a call, one a face, one a picture, one a network; a row's own goes with
it into every batch. The oracle is the row alone."""
import numpy as np
import pytest
import torch
from diffusers import (ControlNetModel, StableDiffusionAdapterPipeline, StableDiffusionControlNetPipeline,
                       StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, T2IAdapter)
from diffusers.callbacks import (IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SDCFGCutoffCallback,
                                 SDXLCFGCutoffCallback)
from PIL import Image

import goldens_build as gold
import helpers_pack as H
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.errors import ArgumentError
from faceid_nb.faceid import FaceID
from faceid_nb.rowwise import count_entries, put_together, tell_apart

E = H.embedding(0, 4)
FAST = dict(num_inference_steps=2, seed=1)
RED, BLUE = (Image.new('RGB', (64, 64), colour) for colour in ((200, 30, 30), (30, 30, 200)))


def with_random_weights(pipe):
    pipe.set_progress_bar_config(disable=True)
    return FaceID(pipe, FaceIDAdapter.from_state(**H.adapter_state(pipe.unet), variant='faceid'))


def dressed(cls, **parts):
    "A random pipeline of another kind, with our adapter."
    pipe = H.pipeline()
    kept = {k: v for k, v in pipe.components.items() if k not in ('image_encoder', 'safety_checker')}
    return with_random_weights(cls(**kept | parts, safety_checker=None, requires_safety_checker=False))


def pixels(images): return np.stack([np.asarray(i, int) for i in images])


def far(a, b): return np.abs(pixels(a) - pixels(b)).max()


def control_net(seed):
    unet = H.pipeline().unet
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96))
    for p in net.parameters(): p.data += .1*torch.randn_like(p)   # its last layers are zero at first
    return net.eval()


def t2i_adapter(seed):
    torch.manual_seed(seed)
    return T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=4).eval()


@pytest.fixture(scope='module')
def me(): return with_random_weights(H.pipeline())


@pytest.fixture(scope='module')
def repainter(): return dressed(StableDiffusionImg2ImgPipeline)


@pytest.fixture(scope='module')
def xl():
    pipe = gold.pipeline('sdxl')
    return FaceID(pipe, FaceIDAdapter.new(pipe.unet, 'faceid', 4, 4))


# --- the rule
@pytest.mark.parametrize('name, value, count', [
    ('image', RED, None), ('image', [RED], 1), ('image', (RED, BLUE), 2),
    ('image', torch.zeros(3, 8, 8), None), ('image', torch.zeros(3, 3, 8, 8), 3),
    ('image', np.zeros((8, 8, 3)), None), ('latents', torch.zeros(4, 8, 8), None),
    ('mask_image', np.zeros((8, 8)), None), ('mask_image', np.zeros((8, 8, 1)), None),
    ('mask_image', torch.zeros(1, 8, 8), 1), ('prompt_2', 'ab', None),
    ('prompt_embeds', torch.zeros(7, 8), None),
    ('prompt_embeds', torch.zeros(2, 7, 8), 2), ('pooled_prompt_embeds', torch.zeros(2, 8), 2)])
def test_how_many_there_are(name, value, count): assert count_entries(name, value) == count


def test_a_list_of_batches_of_one_becomes_a_batch():
    assert put_together('latents', [torch.zeros(1, 4, 8, 8), torch.zeros(4, 8, 8)]).shape == (2, 4, 8, 8)


def test_pictures_of_other_sizes_stay_a_list():
    assert len(put_together('image', [np.zeros((8, 8, 3)), np.zeros((9, 8, 3))])) == 2


def test_what_is_no_row_s_own_is_left_alone(me):
    more = dict(timesteps=[3, 2], cross_attention_kwargs={}, sigmas=None)
    assert tell_apart(me.pipe, more, 2, 1).part(0, 1) == more


# --- pictures
IMG2IMG = dict(prompt='a', strength=.5, num_inference_steps=4)


def as_tensor(images): return torch.stack([torch.tensor(np.asarray(i)/127.5 - 1).permute(2, 0, 1).float()
                                          for i in images])


@pytest.fixture(scope='module')
def each_alone(repainter):
    "Two faces over two starting pictures, two samples of each, one by one."
    made = []
    for face, image in zip(E[:2], (RED, BLUE)):
        for seed in (1, 2): made += repainter.generate(face, image=image, num_samples=1, seed=seed, **IMG2IMG)
    return made


@pytest.mark.parametrize('given', [
    [RED, BLUE], (RED, BLUE), [RED, RED, BLUE, BLUE], as_tensor([RED, BLUE]),
    np.stack([np.asarray(i, np.float32)/255 for i in (RED, BLUE)])],
    ids='list tuple each tensor array'.split())
@pytest.mark.parametrize('size', [None, 1, 3])
def test_every_face_is_drawn_over_its_own_picture(repainter, each_alone, given, size):
    made = repainter.generate(E[:2], image=given, num_samples=2, seed=1, batch_size=size, **IMG2IMG)
    assert far(made, each_alone) <= 2


def test_three_pictures_for_four_rows_are_refused(repainter):
    with pytest.raises(ArgumentError, match='image has 3 values'):
        repainter.generate(E[:2], image=[RED, BLUE, RED], num_samples=2, **IMG2IMG)


def test_masks_belong_to_rows_as_well():
    parts = gold.pipeline('sd').components
    del parts['image_encoder']
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    painter = FaceID(pipe, FaceIDAdapter.new(pipe.unet, 'faceid', 4, 4))
    left, right = Image.new('L', (64, 64)), Image.new('L', (64, 64))
    left.paste(255, (0, 0, 32, 64))
    right.paste(255, (32, 0, 64, 64))
    call = dict(prompt='a', num_samples=2, num_inference_steps=3, seed=1)
    both = painter.generate(E[:2], image=RED, mask_image=(left, right), **call)
    assert far(both[2:], painter.generate(E[1], image=RED, mask_image=right, **call)) <= 2
    last = painter.generate(E[1], image=RED, mask_image=right, **call | dict(seed=2, num_samples=1))
    assert far(both[3:], last) <= 2


def test_latents_of_a_face(me):
    latents = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    both = me.generate(E[:2], 'a', num_samples=2, latents=latents, batch_size=3, **FAST)
    assert far(both[2:], me.generate(E[1], 'a', num_samples=2, latents=latents[1:], **FAST)) <= 1
    assert far(both[2:3], me.generate(E[1], 'a', num_samples=1, latents=latents[1], **FAST)) <= 1


# --- texts
@pytest.mark.parametrize('given, second', [('a hat', 'a hat'), (['a hat', 'a scarf'], 'a scarf')])
def test_the_second_prompt_of_sdxl(xl, given, second):
    call = dict(prompt='a', output_type='latent', width=32, height=32, **FAST)
    both = xl.generate(E[:2], prompt_2=given, negative_prompt_2=given, num_samples=2, batch_size=3, **call)
    alone = xl.generate(E[1], prompt_2=second, negative_prompt_2=second, num_samples=2, **call)
    assert (torch.stack(both[2:]) - torch.stack(alone)).abs().max() < 1e-3


def test_states_stand_for_texts(me):
    pipe, texts = me.pipe, ['a man', 'a woman']
    with torch.no_grad(): states, nothing = pipe.encode_prompt(texts, 'cpu', 1, True, ['ugly', 'dark'])
    call = dict(num_samples=2, batch_size=3, **FAST)
    made = me.generate(E[:2], prompt_embeds=states, negative_prompt_embeds=nothing, **call)
    assert far(made, me.generate(E[:2], texts, negative_prompt=['ugly', 'dark'], **call)) <= 1


@pytest.mark.parametrize('name', ['prompt', 'negative_prompt'])
def test_a_text_and_its_states_are_too_much(me, name):
    with pytest.raises(ArgumentError, match=f'{name} and {name}_embeds are both given'):
        me.generate(E[0], **{name: 'a', f'{name}_embeds': torch.zeros(1, 48, 128)}, **FAST)


def test_states_of_sdxl(xl):
    with torch.no_grad(): states = xl.pipe.encode_prompt('a', device='cpu', negative_prompt='b')
    names = [f'{kind}prompt_embeds' for kind in ('', 'negative_', 'pooled_', 'negative_pooled_')]
    call = dict(num_samples=2, output_type='latent', width=32, height=32, **FAST)
    made = xl.generate(E[0], **dict(zip(names, states)), **call)
    wanted = xl.generate(E[0], 'a', negative_prompt='b', **call)
    assert (torch.stack(made) - torch.stack(wanted)).abs().max() < 1e-3


# --- networks
@pytest.fixture(scope='module')
def two_nets():
    return dressed(StableDiffusionControlNetPipeline, controlnet=[control_net(1), control_net(2)])


@pytest.mark.parametrize('size', [None, 1, 2])
@pytest.mark.parametrize('given', [[RED, BLUE], (RED, BLUE), [[RED, BLUE]]])
def test_two_nets_have_a_picture_each_in_every_batch(two_nets, size, given):
    call = dict(prompt='a', image=[RED, BLUE], **FAST)
    alone = [two_nets.generate(E[0], num_samples=1, **call | dict(seed=s))[0] for s in (1, 2, 3)]
    made = two_nets.generate(E[0], num_samples=3, batch_size=size, **call | dict(image=given))
    assert far(made, alone) <= 2


def test_two_nets_and_pictures_of_every_face(two_nets):
    call = dict(prompt='a', num_samples=1, **FAST)
    both = two_nets.generate(E[:2], image=[[RED, BLUE], [BLUE, RED]], **call)
    assert far(both[1:], two_nets.generate(E[1], image=[BLUE, RED], **call)) <= 2
    assert far(both[1:], two_nets.generate(E[1], image=[RED, BLUE], **call)) > 2


@pytest.mark.parametrize('given, says', [([RED], '1 entries for 2'), (RED, 'list with one for each'),
                                         ([[RED], [BLUE]], 'does not fit')])
def test_two_nets_refuse_what_does_not_fit(two_nets, given, says):
    with pytest.raises(ArgumentError, match=says): two_nets.generate(E[0], 'a', image=given, **FAST)


def test_one_net_and_a_picture_of_every_face():
    net = dressed(StableDiffusionControlNetPipeline, controlnet=control_net(1))
    call = dict(prompt='a', num_samples=2, **FAST)
    both = net.generate(E[:2], image=[RED, BLUE], **call)
    assert far(both[2:], net.generate(E[1], image=BLUE, **call)) <= 2


@pytest.mark.parametrize('seeds, image, weight', [([1], RED, 1.), ([1, 2], [RED, BLUE], [.5, .5])])
def test_t2i_adapters_in_every_batch(seeds, image, weight):
    adapters = [t2i_adapter(s) for s in seeds]
    sketcher = dressed(StableDiffusionAdapterPipeline, adapter=adapters if len(seeds) > 1 else adapters[0])
    call = dict(prompt='a', image=image, adapter_conditioning_scale=weight, num_samples=3, **FAST)
    steps = []
    made = sketcher.generate(E[0], on_step=steps.append, **call)
    assert far(made, sketcher.generate(E[0], batch_size=1, **call)) <= 2 and len(made) == 3
    assert [s.done for s in steps] == [1, 2, 2]


def test_an_older_pipeline_is_stopped_as_well():
    sketcher, heard = dressed(StableDiffusionAdapterPipeline, adapter=t2i_adapter(1)), []
    def callback(i, t, latents):
        heard.append(i)
        sketcher.stop()
    call = dict(image=RED, num_inference_steps=9, callback=callback)
    assert sketcher.generate(E[0], 'a', num_samples=1, **call) == [] and heard == [0] and sketcher.stopped


# --- callbacks
def chosen(names):
    "The documented callback that ends guidance, with the tensors that a caller chooses."
    def cut(pipe, i, t, tensors):
        assert set(tensors) == set(names)
        if i != 2: return {}
        pipe._guidance_scale = 0.
        return {n: tensors[n].chunk(2)[-1] for n in names}
    return dict(callback_on_step_end=cut, callback_on_step_end_tensor_inputs=names)


SD_TENSORS, XL_TENSORS = ['prompt_embeds'], ['prompt_embeds', 'add_text_embeds', 'add_time_ids']


def theirs(cls): return dict(callback_on_step_end=MultiPipelineCallbacks([cls(None, cutoff_step_index=2)]))


@pytest.mark.parametrize('end', [chosen(SD_TENSORS), theirs(SDCFGCutoffCallback)], ids=['own', 'objects'])
def test_guidance_that_ends(me, end):
    call = dict(prompt='a', num_samples=2, seed=1, num_inference_steps=5)
    both = me.generate(E[:2], **call, **end)
    assert far(both[2:], me.generate(E[1], **call, **chosen(SD_TENSORS))) <= 1
    assert far(both, me.generate(E[:2], **call)) > 1


@pytest.mark.parametrize('end', [chosen(XL_TENSORS), theirs(SDXLCFGCutoffCallback)], ids=['own', 'objects'])
def test_guidance_that_ends_in_sdxl(xl, end):
    call = dict(prompt='a', seed=1, num_inference_steps=5, output_type='latent', width=32, height=32)
    both = xl.generate(E[:2], num_samples=2, **call, **end)
    alone = xl.generate(E[1], num_samples=2, **call, **chosen(XL_TENSORS))
    assert (torch.stack(both[2:]) - torch.stack(alone)).abs().max() < 1e-3


def test_a_callback_may_change_the_latents(me):
    def blank(pipe, i, t, tensors): return dict(latents=torch.zeros_like(tensors['latents']))
    made = me.generate(E[:2], 'a', num_samples=1, callback_on_step_end=blank, **FAST)
    assert far(made[:1], made[1:]) <= 1


def test_the_callback_of_diffusers_own_adapters_is_refused(me):
    cut = MultiPipelineCallbacks([IPAdapterScaleCutoffCallback(.5)])
    with pytest.raises(ArgumentError, match='IPAdapterScaleCutoffCallback.*end=.5'):
        me.generate(E[0], 'a', callback_on_step_end=cut, **FAST)


def test_a_result_as_a_tuple(me):
    call = dict(prompt='a', num_samples=2, **FAST)
    assert far(me.generate(E[0], return_dict=False, **call), me.generate(E[0], **call)) == 0


def test_arguments_of_attention_reach_it(me):
    call = dict(prompt='a', num_samples=1, **FAST)
    given = me.generate(E[0], cross_attention_kwargs=dict(scale=1.), **call)
    assert far(given, me.generate(E[0], **call)) == 0


# --- whom the unconditional rows read
def test_a_negative_face_of_every_person(me):
    call = dict(prompt='a', num_samples=2, **FAST)
    both = me.generate(E[:2], negative=E[2:], batch_size=3, **call)
    assert far(both[2:], me.generate(E[1], negative=E[3], **call)) <= 1
    assert far(both[:2], me.generate(E[0], negative=E[3], **call)) > 1


# --- Portrait
@pytest.fixture(scope='module')
def portraits():
    pipe = H.pipeline()
    state = H.adapter_state(pipe.unet, tokens=16, rank=0)
    return FaceID(pipe, FaceIDAdapter.from_state(**state, variant='portrait'))


def test_portraits_of_three_photographs_and_of_one(portraits):
    call = dict(prompt='a', num_samples=2, **FAST)
    both = portraits.generate([list(E[:3]), [E[3]]], **call)
    alone = portraits.generate([list(E[:3])], **call) + portraits.generate([[E[3]]], **call)
    assert far(both, alone) <= 1


def test_the_table_of_the_model_card(portraits):
    call = dict(prompt='a', num_samples=1, **FAST)
    assert far(portraits.generate(E[None, :3], **call), portraits.generate([list(E[:3])], **call)) == 0


def test_a_table_of_photographs_for_other_variants(me):
    call = dict(prompt='a', num_samples=1, **FAST)
    assert far(me.generate(E.view(2, 2, 512), **call), me.generate([list(E[:2]), list(E[2:])], **call)) == 0


# --- numbers
@pytest.mark.parametrize('seed', [5, 5., np.int64(5), np.array(5), torch.tensor(5), [5], torch.tensor([5])])
def test_a_seed_of_any_kind(me, seed):
    made = me.generate(E[0], 'a', num_samples=2, num_inference_steps=1, seed=seed)
    assert [i.info['faceid_nb']['seed'] for i in made] == [5, 6]


@pytest.mark.parametrize('wrong, says', [
    (dict(seed='42'), "seed must be a whole number.*It is '42'.*not a text"),
    (dict(seed=1.5), 'whole number'),
    (dict(seed=2**63 - 1), 'Seeds end at'), (dict(batch_size=-1), 'batch_size must be a whole number from 1'),
    (dict(batch_size=0), 'batch_size'), (dict(scale=None), 'scale must be finite numbers'),
    (dict(scale='0.5'), 'scale'), (dict(num_inference_steps='2'), 'num_inference_steps must be a whole'),
    (dict(num_inference_steps=2.5), 'num_inference_steps'), (dict(num_samples=0), 'num_samples'),
    (dict(num_samples=None), 'num_samples'), (dict(guidance_scale=None), 'guidance_scale must be'),
    (dict(guidance_scale='7.5'), 'guidance_scale must be')])
def test_numbers_refused(me, wrong, says):
    call = dict(num_samples=2, **FAST) | wrong
    with pytest.raises(ArgumentError, match=says): me.generate(E[0], 'a', **call)


def test_steps_may_be_a_float(me):
    call = dict(prompt='a', num_samples=1, seed=1)
    two, float_two = (me.generate(E[0], num_inference_steps=n, **call) for n in (2, 2.))
    assert far(two, float_two) == 0


def test_another_unet_in_the_pipeline_is_attached_and_keeps_the_weight(me):
    pipe = H.pipeline()
    mine = with_random_weights(pipe)
    mine.adapter.lora_weight = .5
    call = dict(prompt='a', num_samples=1, **FAST)
    before = mine.generate(E[0], **call)
    pipe.unet = H.pipeline().unet   # the same weights in another object
    assert far(before, mine.generate(E[0], **call)) <= 1 and mine.adapter.lora_weight == .5
