"""Every block of code on the model card, called as it is called there: `ip_adapter` is `faceid_nb`, the paths
are the tiny pack's, and the sizes are its 64 pixels."""
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from insightface.app import FaceAnalysis
from insightface.utils import face_align

from faceid_nb.face import FaceReader
from faceid_nb.hub import TINY
from faceid_nb.ip_adapter_faceid import (IPAdapterFaceID, IPAdapterFaceIDPlus, IPAdapterFaceIDPlusXL,
                                         IPAdapterFaceIDXL)
from faceid_nb.ip_adapter_faceid_separate import IPAdapterFaceID as SeparateFaceID
from faceid_nb.measure import identity_similarity
from faceid_nb.models import load
from faceid_nb.tiny.people import render, sample_people

pytestmark = pytest.mark.filterwarnings('ignore')
BASE, XL, DEVICE, SIZE = str(TINY/'sd'), str(TINY/'sdxl'), 'cpu', 64
PROMPT = 'photo of a woman in a red shirt, beach background'
NEGATIVE = 'monochrome, lowres, bad anatomy, worst quality, low quality, blurry'
CALL = dict(prompt=PROMPT, negative_prompt=NEGATIVE, width=SIZE, height=SIZE, num_inference_steps=30,
            seed=2023)
SCHEDULER = dict(  # as on the card
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear',
    clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Five photographs of one person as files."
    folder, person = tmp_path_factory.mktemp('photographs'), sample_people(1, seed=17)
    files = [folder/f'{k}.jpg' for k in range(5)]
    for k, file in enumerate(files):
        shot = render(person, seed=60 + k, size=256, glasses=0, hat=None)[0]
        shot.image.save(file, quality=95)
    return [str(f) for f in files]


@pytest.fixture(scope='module')
def app():
    app = FaceAnalysis(name='tiny', root=str(TINY), providers=['CPUExecutionProvider'])
    app.prepare(ctx_id=0, det_size=(640, 640))
    return app


@pytest.fixture(scope='module')
def faceid_embeds(photographs, app):
    "The card's first block."
    image = cv2.imread(photographs[0])
    faces = app.get(image)
    return torch.from_numpy(faces[0].normed_embedding).unsqueeze(0)


@pytest.fixture(scope='module')
def face_image(photographs, app):
    "The card's block for Plus: the aligned crop, which OpenCV has in BGR."
    image = cv2.imread(photographs[0])
    faces = app.get(image)
    return face_align.norm_crop(image, landmark=faces[0].kps, image_size=224)


@pytest.fixture
def pipe():
    vae = AutoencoderKL.from_pretrained(f'{BASE}/vae').to(dtype=torch.float32)
    return StableDiffusionPipeline.from_pretrained(
        BASE, torch_dtype=torch.float32, scheduler=DDIMScheduler(**SCHEDULER), vae=vae,
        feature_extractor=None, safety_checker=None)


@pytest.fixture
def pipe_xl():
    return StableDiffusionXLPipeline.from_pretrained(
        XL, torch_dtype=torch.float32, scheduler=DDIMScheduler(**SCHEDULER), add_watermarker=False)


def needs(*parts):
    "Skips where the pack does not hold these yet."
    gone = [p for p in parts if not (TINY/p).exists()]
    return pytest.mark.skipif(bool(gone), reason=f'the tiny pack has no {", ".join(gone)} yet')


def looks_right(images, photograph, n=4, above=.3):
    "n different pictures of the tiny pack's size, in which the judge knows the person."
    assert len(images) == n and len({i.tobytes() for i in images}) == n
    assert all(isinstance(i, Image.Image) and i.size == (SIZE, SIZE) for i in images)
    likeness = identity_similarity(photograph, images, reader=FaceReader('tiny', TINY, 'cpu'))
    assert np.nanmean(likeness) > above, likeness


@pytest.fixture(scope='module')
def face(photographs): return FaceReader('tiny', TINY, 'cpu').best(photographs[0])


def test_the_embedding_is_the_readers(face, faceid_embeds):
    assert faceid_embeds.shape == (1, 512)
    assert float(faceid_embeds[0] @ torch.as_tensor(face.embedding)) > .999


def test_the_crop_is_the_readers(face, face_image):
    assert np.abs(face_image[:, :, ::-1].astype(int) - np.asarray(face.crop(224)).astype(int)).mean() < 1


def test_faceid(photographs, faceid_embeds, pipe):
    ip_model = IPAdapterFaceID(pipe, str(TINY/'ip-adapter-faceid_sd15.safetensors'), DEVICE)
    images = ip_model.generate(faceid_embeds=faceid_embeds, num_samples=4, **CALL)
    looks_right(images, photographs[0])


def test_faceid_with_the_separate_lora(photographs, faceid_embeds, pipe):
    pipe.load_lora_weights(str(TINY/'ip-adapter-faceid_sd15_lora.safetensors'))
    pipe.fuse_lora()
    ip_model = SeparateFaceID(pipe, str(TINY/'ip-adapter-faceid_sd15.safetensors'), DEVICE)
    images = ip_model.generate(faceid_embeds=faceid_embeds, num_samples=4, **CALL)
    looks_right(images, photographs[0])


@needs('sdxl', 'ip-adapter-faceid_sdxl.safetensors')
def test_faceid_sdxl(photographs, faceid_embeds, pipe_xl):
    ip_model = IPAdapterFaceIDXL(pipe_xl, str(TINY/'ip-adapter-faceid_sdxl.safetensors'), DEVICE)
    images = ip_model.generate(faceid_embeds=faceid_embeds, num_samples=2, guidance_scale=7.5, **CALL)
    looks_right(images, photographs[0], 2)


PLUS = [pytest.param(f'ip-adapter-faceid-{name}_sd15.safetensors', v2, id=name,
                     marks=needs(f'ip-adapter-faceid-{name}_sd15.safetensors'))
        for name, v2 in (('plus', False), ('plusv2', True))]


@pytest.mark.parametrize('file, v2', PLUS)
def test_plus(photographs, faceid_embeds, face_image, pipe, file, v2):
    ip_model = IPAdapterFaceIDPlus(pipe, str(TINY/'image_encoder'), str(TINY/file), DEVICE)
    images = ip_model.generate(face_image=face_image, faceid_embeds=faceid_embeds, shortcut=v2, s_scale=1.0,
                               num_samples=4, **CALL)
    looks_right(images, photographs[0])


@needs('sdxl', 'ip-adapter-faceid-plusv2_sdxl.safetensors')
def test_plusv2_sdxl(photographs, faceid_embeds, face_image, pipe_xl):
    ip_ckpt = str(TINY/'ip-adapter-faceid-plusv2_sdxl.safetensors')
    ip_model = IPAdapterFaceIDPlusXL(pipe_xl, str(TINY/'image_encoder'), ip_ckpt, DEVICE)
    images = ip_model.generate(face_image=face_image, faceid_embeds=faceid_embeds, shortcut=True, s_scale=1.0,
                               num_samples=2, guidance_scale=7.5, **CALL)
    looks_right(images, photographs[0], 2)


@needs('ip-adapter-faceid-portrait_sd15.safetensors')
def test_portrait(photographs, app, pipe):
    faceid_embeds = []
    for file in photographs:
        faces = app.get(cv2.imread(file))
        faceid_embeds.append(torch.from_numpy(faces[0].normed_embedding).unsqueeze(0).unsqueeze(0))
    faceid_embeds = torch.cat(faceid_embeds, dim=1)
    n_cond = faceid_embeds.shape[1]
    assert faceid_embeds.shape == (1, 5, 512)
    ip_ckpt = str(TINY/'ip-adapter-faceid-portrait_sd15.safetensors')
    ip_model = SeparateFaceID(pipe, ip_ckpt, DEVICE, num_tokens=16, n_cond=n_cond)
    images = ip_model.generate(faceid_embeds=faceid_embeds, num_samples=4, **CALL)
    looks_right(images, photographs[0])


@needs('ip-adapter-faceid-portrait_sd15.safetensors')
def test_portrait_of_one_photograph_by_name(face):
    "A single face, with several pictures of it, is one person in one photograph, not several of one."
    model = load('tiny-portrait', device='cpu')
    model.pipe.set_progress_bar_config(disable=True)
    call = dict(prompt='photo of a person in a red shirt', num_samples=2, seed=3, num_inference_steps=4)
    a, b = (model.generate(f, **call) for f in (face, [[face]]))
    assert len(a) == 2 and [i.tobytes() for i in a] == [i.tobytes() for i in b]
