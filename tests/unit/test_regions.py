"""Regions: masks, and several people in one picture against diffusers' own masks."""
import numpy as np
import pytest
import torch
from PIL import Image

import goldens_build as G
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.errors import ArgumentError, NoFaceError
from faceid_nb.faceid import FaceID
from faceid_nb.regions import (
    GRID, SIDES, Where, box_mask, face_boxes, layout_regions, picture_mask, region_mask)

E = torch.nn.functional.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
CKPT = 'ip-adapter-faceid_sd15.bin'
HALVES = ['left', 'right']


def dist(a, b): return (a - b).abs().max().item()


def draw(pipe, seeds=(1,), gs=7.5, side=32, prompts=None, **more):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    size = dict(width=side, height=side) if isinstance(side, int) else dict(width=side[0], height=side[1])
    return pipe(prompts or ['a']*len(seeds), generator=generators, num_inference_steps=2, guidance_scale=gs,
                output_type='latent', **size, **more).images


@pytest.fixture(scope='module')
def pipe(): return G.pipeline('sd')


@pytest.fixture
def adapter(pipe):
    a = FaceIDAdapter.from_state(**G.state(CKPT))
    yield a.attach(pipe)
    a.detach()


# --- masks

def test_halves_add_up_to_one_however_soft():
    for feather in (0, .1, .7):
        both = box_mask(SIDES['left'], feather) + box_mask(SIDES['right'], feather)
        assert dist(both, torch.ones(GRID, GRID)) == 0


@pytest.mark.parametrize('mask', [np.eye(8) > 0, np.eye(8), np.uint8(255*np.eye(8)), torch.eye(8),
                                  Image.fromarray(np.uint8(255*np.eye(8)))])
def test_a_mask_in_any_form(mask):
    assert torch.equal(picture_mask(mask), picture_mask(np.eye(8, dtype=np.float32)))


def test_a_soft_mask_keeps_its_mean():
    middle = np.zeros((64, 64))
    middle[16:48, 16:48] = 1
    soft = picture_mask(middle, .2)
    assert abs(soft.mean() - .25) < .01 and 0 < soft[GRID//4 - 10, GRID//2] < 1


NO_REGIONS = ['middle', (0, 0, 64, 64), (.5, 0, .4, 1), np.zeros(4), np.full((4, 4), -1.)]


@pytest.mark.parametrize('region', NO_REGIONS)
def test_what_is_no_region_is_refused(region):
    with pytest.raises(ArgumentError): region_mask(region)


@pytest.mark.parametrize('size', [(64, 64), (8, 8), (5, 9), (9, 5), (300, 4)])
def test_a_region_keeps_its_share_on_every_grid(size):
    masks = region_mask((.2, .1, .7, .8), .1)[None]
    h, w = size
    on_grid = Where(masks, size)(h*w)
    assert on_grid.shape == (1, h*w) and abs(on_grid.mean() - masks.mean()) < .02


def test_boxes_of_faces_do_not_overlap():
    a, b, c = face_boxes([(0, 0, 20, 20), (18, 4, 38, 24), (50, 0, 60, 20)], 64, 32)
    assert a[2] <= b[0] < b[2] <= c[0] and all(0 <= x <= 1 for x in (*a, *b, *c))


class TwoFaces:
    "A reader that finds a small face at the right, larger ones at the left and in the middle."
    @property
    def detector(self): return self
    def detect(self, image):
        return np.array([[40, 10, 60, 40, .9], [5, 10, 25, 40, .8], [30, 0, 34, 4, .7]]), None, ''


def test_a_layout_gives_the_largest_faces_from_left_to_right():
    left, right = layout_regions(Image.new('RGB', (64, 64)), TwoFaces(), 2)
    assert left[0] < left[2] <= right[0] and right[2] > .9
    with pytest.raises(NoFaceError): layout_regions(Image.new('RGB', (64, 64)), TwoFaces(), 4)


# --- in a picture

@pytest.mark.parametrize('kind, file', [('sd', CKPT), ('sdxl', 'ip-adapter-faceid_sdxl.bin')])
def test_two_people_as_with_diffusers_masks(kind, file):
    pipe = G.pipeline(kind)
    adapter = FaceIDAdapter.from_state(**G.state(file)).attach(pipe)
    with adapter.condition(E[:2], regions=HALVES, feather=0, scale=[.7, 1.1]): ours = draw(pipe)
    with adapter.condition(E[:1]): alone = draw(pipe)
    state = {k: dict(v) for k, v in adapter.state_dict().items()}
    adapter.detach()
    pipe.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.set_ip_adapter_scale([[.7, 1.1]])
    two = E[None, :2]
    masks = torch.zeros(1, 2, 256, 256)   # theirs are sampled: far from an edge every sample is 0 or 1
    masks[0, 0, :, :128], masks[0, 1, :, 128:] = 1, 1
    theirs = draw(pipe, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(two), two])],
                  cross_attention_kwargs=dict(ip_adapter_masks=[masks]))
    assert dist(ours, theirs) < G.TOLERANCE < dist(ours, alone)/10


def test_everywhere_is_the_picture_without_regions(pipe, adapter):
    with adapter.condition(E[:1]): plain = draw(pipe)
    with adapter.condition(E[:1], regions=['everywhere']): same = draw(pipe)
    assert torch.equal(plain, same)


def test_the_other_half_belongs_to_the_other(pipe, adapter):
    "Without a neighbour the layers of the left half read nobody: the same picture as at scale 0 for them."
    with adapter.condition(E[:2], regions=HALVES, scale=[1, 0]): a = draw(pipe)
    with adapter.condition(E[:1], regions=['left']): b = draw(pipe)
    with adapter.condition(E[[0, 2]], regions=HALVES, scale=[1, 0]): c = draw(pipe)
    assert dist(a, b) < 1e-4 and dist(a, c) == 0


@pytest.mark.parametrize('gs', [1., 7.5])
def test_a_row_alone_is_the_row_in_a_batch(pipe, adapter, gs):
    faces = E[[0, 1, 2, 3]]                  # the first person's two pictures, then the second's
    places = [['left', 'top'], ['right', 'bottom']]
    with adapter.condition(faces, regions=places, scale=[1, .5, .8, 1.2]): batch = draw(pipe, (1, 2), gs)
    for i, own in enumerate(('left right', 'top bottom')):
        scale = [[1, .8], [.5, 1.2]][i]
        with adapter.condition(faces[[i, i + 2]], regions=own.split(), scale=scale):
            one = draw(pipe, (1 + i,), gs)
        assert dist(one, batch[i:i+1]) < 1e-4


def test_a_wide_picture(pipe, adapter):
    with adapter.condition(E[:2], regions=HALVES): a = draw(pipe, side=(64, 32))
    with adapter.condition(E[:2], regions=HALVES[::-1]): b = draw(pipe, side=(64, 32))
    assert torch.isfinite(a).all() and dist(a, b) > .01


def test_samples_share_the_people(pipe, adapter):
    with adapter.condition(E[:2], regions=HALVES, num_images_per_prompt=2): batch = draw(pipe, (1, 2))
    with adapter.condition(E[:2], regions=HALVES): one = draw(pipe, (2,))
    assert dist(batch[1:], one) < 1e-4


def test_recorded_attention_of_two(pipe, adapter):
    with adapter.condition(E[:2], regions=HALVES, record=True) as c: draw(pipe)
    maps = c.attention_maps((8, 8))
    assert maps.shape == (1, 8, 8, 8) and abs(maps.sum(1).mean() - 2) < 1e-4


WRONG = [(3, HALVES), (1, HALVES), (2, 'left'), (4, [['left']*3, 'right'])]


@pytest.mark.parametrize('faces, regions', WRONG)
def test_what_does_not_pair_up_is_refused(adapter, faces, regions):
    with pytest.raises(ArgumentError): adapter.condition(E[:faces], regions=regions)


def test_detach_after_regions(pipe, adapter):
    before = G.unet('sd').state_dict()
    with adapter.condition(E[:2], regions=HALVES): draw(pipe)
    adapter.detach()
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


# --- through generate

SMALL = dict(num_inference_steps=2, width=32, height=32, output_type='latent')


@pytest.fixture
def model(pipe, adapter): return FaceID(pipe, adapter)


def stack(images): return torch.stack([torch.as_tensor(i) for i in images])


def test_generate_puts_both_into_every_picture(pipe, adapter, model):
    made = stack(model.generate(E[:2], 'a', regions=HALVES, num_samples=2, seed=1, scale=[.5, 1.], **SMALL))
    with adapter.condition(E[:2], regions=HALVES, num_images_per_prompt=2, scale=[.5, 1.]):
        direct = draw(pipe, (1, 2))
    assert made.shape == direct.shape and dist(made, direct) < 1e-4


def test_generate_in_batches_of_one(model):
    ask = dict(prompt=['a', 'b'], regions=HALVES, num_samples=2, seed=1, **SMALL)
    whole, one_by_one = (stack(model.generate(E[:2], batch_size=b, **ask)) for b in (None, 1))
    assert whole.shape[0] == 4 and dist(whole, one_by_one) < 1e-4


def test_a_negative_face_a_person(model):
    ask = dict(prompt='a', regions=HALVES, num_samples=1, seed=1, **SMALL)
    both = model.generate(E[:2], negative=E[2:4], **ask)
    assert dist(stack(both), stack(model.generate(E[:2], negative=E[[3, 2]], **ask))) > .01


def test_the_record_says_where_and_how_strong(model):
    picture = model.generate(E[:2], 'a', regions=['left', (.5, 0, 1, 1)], scale=[.5, 1.], num_samples=1,
                             **SMALL | dict(output_type='pil'))[0]
    noted = picture.info['faceid_nb']
    assert noted['regions'] == ['left', [.5, 0, 1, 1]] and noted['scale'] == [.5, 1.]


@pytest.mark.parametrize('faces, regions', [(3, HALVES), (1, HALVES)])
def test_generate_refuses_what_does_not_pair_up(model, faces, regions):
    with pytest.raises(ArgumentError, match='regions for'):
        model.generate(E[:faces], 'a', regions=regions, **SMALL)
