"Prompt adherence: what a prompt names, what is to be seen, and CLIP's cosine equal to CLIP's own."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faceid_nb import adherence as A
from faceid_nb.errors import ArgumentError, WeightsMissingError
from faceid_nb.tiny.people import render, sample_people
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

ASKED = 'person in a red shirt, smiling, blue background, wearing glasses'
TEXTS = ['a red shirt', 'blue shirt', 'a red shirt', 'a', 'blue']


@pytest.mark.parametrize('prompt, wanted', [
    ('photo of a person in a red shirt, smiling, blue background', dict(shirt=0, expression=1, background=1)),
    ('a person wearing glasses, Grey background', dict(glasses=1, background=9)),
    ('a man, beach background', {}),
    ('sunglasses, redshirt, reds shirt, a tired shirt, red shirts', {}),
    ('PINK SHIRT, frowning, wearing a red hat', dict(shirt=8, expression=3)),
    ('', {}),
])
def test_what_a_prompt_names(prompt, wanted):
    assert A.wanted(prompt) == wanted == A.SceneScorer.wanted(prompt)


# -- the reader of scenes

def drawn(**scene):
    return render(sample_people(1, 5), seed=6, size=128, hat=None, **scene)[0].image


@pytest.fixture(scope='module')
def pair():
    "A picture that shows all of what is asked for, and one that shows nothing of it."
    return [drawn(shirt='red', background='blue', expression='smiling', glasses=1),
            drawn(shirt='green', background='white', expression='neutral', glasses=0)]


@pytest.mark.parametrize('prompts, shares', [
    (ASKED, [1, 0]),
    ([ASKED, 'a white background'], [1, 1]),
    ('red shirt, white background', [.5, .5]),
])
def test_adherence_counts_what_is_to_be_seen(prompts, shares, pair):
    np.testing.assert_allclose(A.prompt_adherence(prompts, pair), shares)


def test_a_prompt_that_names_nothing_has_no_score(pair):
    assert np.isnan(A.prompt_adherence('a person', pair[0])).all()


def test_no_pictures():
    assert A.prompt_adherence('x', []).shape == (0,)


def test_a_function_may_score(pair):
    def score(texts, images): return np.array([float(t)*i.shape[0] for t, i in zip(texts, images)])
    assert A.prompt_adherence(['1', '2'], pair, score).tolist() == [128, 256]


def test_prompts_must_match_the_pictures(pair):
    with pytest.raises(ArgumentError, match='3 prompts for 1'): A.prompt_adherence(['x']*3, pair[0])


def test_one_picture_is_a_list_of_one(pair):
    kinds = ('a.png', b'', pair[0], pair, np.zeros((5, 8, 8, 3)), ())
    assert [len(A.as_list(x)) for x in kinds] == [1, 1, 1, 2, 5, 0]


# -- CLIP

def word_tokenizer():
    words = ['<pad>', '<start>', '<end>', 'a', 'red', 'blue', 'shirt']
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<pad>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token='<pad>', bos_token='<start>', eos_token='<end>', model_max_length=8)


class Processor:
    "What transformers' CLIPProcessor does, for a tokenizer of seven words."
    def __init__(self):
        self.tokenizer = word_tokenizer()
        self.pictures = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    def __call__(self, text=None, images=None, **_):
        if text is None: return self.pictures(images=images, return_tensors='pt')
        return self.tokenizer(text, return_tensors='pt', padding=True, truncation=True)


@pytest.fixture(scope='module')
def clip():
    "A CLIP model of random weights."
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokens = dict(vocab_size=7, max_position_embeddings=8, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    vision = dict(image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=size | tokens, vision_config=size | vision, projection_dim=12))
    return A.Clip(model, Processor())


def clip_itself(clip, text, image):
    "The cosine that the model's own forward gives, before its scale."
    ids = clip.processor(text=[text])
    pixels = clip.processor(images=[image]).pixel_values
    with torch.no_grad():
        out = clip.model(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=pixels)
        return float(out.logits_per_image/clip.model.logit_scale.exp())


def test_clip_scores_equal_clip_itself(clip):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 48, 3), np.uint8) for _ in TEXTS]
    scorer = A.ClipScorer.__new__(A.ClipScorer)
    scorer.clip = clip
    got = scorer(TEXTS, images, batch_size=2)
    np.testing.assert_allclose(got, [clip_itself(clip, t, i) for t, i in zip(TEXTS, images)], atol=1e-5)
    assert len(set(got.round(6))) == 5


def test_clip_that_is_not_here_says_so():
    blank = np.full((320, 320, 3), 120, np.uint8)
    with pytest.raises(WeightsMissingError, match='CLIP model'):
        A.prompt_adherence('x', blank, 'openai/no-such-clip')


@pytest.mark.parametrize('model, scorer', [
    ('tiny-plus', 'tiny'),
    (SimpleNamespace(name='tiny-sdxl-faceid'), 'tiny'),
    ('sd15-plusv2', 'openai/clip-vit-large-patch14'),
    (SimpleNamespace(name='mine'), 'openai/clip-vit-large-patch14'),
])
def test_who_measures_adherence(model, scorer):
    assert A.find_scorer(model) == scorer
