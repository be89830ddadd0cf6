"""Rebuild the models and checkpoint files of the golden cases (tests/goldens) from their configs and seeds.

`pipeline('sd')`, `pipeline('sdxl')`, `image_encoder()`, `write_checkpoint(name, folder)`, `case(name)`,
`inputs()`.
Nothing is trained: every weight comes from goldens/fill.py, by tensor name.
"""
import json, sys
from functools import cache
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parents[1] / 'goldens'
sys.path.insert(0, str(HERE))
from fill import fill_  # noqa: E402

SPEC = json.loads((HERE / 'cases.json').read_text())
CASES = {c['name']: c for c in SPEC['cases']}
TOLERANCE = 2e-4  # largest absolute difference; the latents' mean magnitude is 4 to 8

@cache
def expected(): return load_file(HERE / 'expected.safetensors')
def case(name): return CASES[name]
def inputs(name):
    "Face embeddings of a case, and its face image (PIL) or None."
    from PIL import Image
    c = CASES[name]
    image = c['face_image']
    return expected()[c['embeds']], image and Image.fromarray(expected()[image].numpy())

def byte_characters():
    """The 256 printable characters that stand for the 256 bytes in CLIP's and GPT-2's tokenizers, in their
    order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]

def tokenizer():
    "CLIP's byte-level tokenizer without any merge: 514 words."
    from transformers import CLIPTokenizer
    words = byte_characters()
    words += [w + '</w>' for w in words] + ['<|startoftext|>', '<|endoftext|>']
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)

def _model(cls, config, seed):
    torch.manual_seed(0)
    return fill_(cls(**SPEC['configs'][config]) if not isinstance(cls,
                                                                  tuple)
                 else cls[0](cls[1](**SPEC['configs'][config])), SPEC['seeds'][seed]).eval()

def unet(kind='sd', seed=None):
    from diffusers import UNet2DConditionModel
    return _model(UNet2DConditionModel, f'unet_{kind}', seed or f'unet_{kind}')

def scheduler():
    from diffusers import DDIMScheduler
    return DDIMScheduler(**SPEC['configs']['scheduler'])

def pipeline(kind='sd'):
    "A fresh golden pipeline, 'sd' or 'sdxl'."
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    vae = _model(AutoencoderKL, 'vae', 'vae')
    if kind == 'sd':
        pipe = StableDiffusionPipeline(vae=vae,
                                       text_encoder=_model((CLIPTextModel, CLIPTextConfig), 'text_sd',
                                                           'text_sd'), tokenizer=tokenizer(), unet=unet('sd'),
                                       scheduler=scheduler(), safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)
    else:
        pipe = StableDiffusionXLPipeline(vae=vae,
                                         text_encoder=_model((CLIPTextModel, CLIPTextConfig), 'text_sdxl',
                                                             'text_sdxl'),
                                         text_encoder_2=_model((CLIPTextModelWithProjection, CLIPTextConfig),
                                                               'text_sdxl', 'text_sdxl_2'),
                                         tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=unet('sdxl'),
                                         scheduler=scheduler(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def image_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    return _model((CLIPVisionModelWithProjection, CLIPVisionConfig), 'image_encoder', 'image_encoder')

def state(name):
    """Tensors of a golden checkpoint: {'image_proj': {...}, 'ip_adapter': {...}} or, for the LoRA file,
    {'lora': {...}}."""
    spec = SPEC['checkpoints'][name]
    return {section: fill_({k: torch.zeros(shape) for k, shape in tensors.items()}, spec['seed'])
            for section, tensors in spec.items() if section != 'seed'}

def flat(state):
    "Both sections in one table."
    out = {}
    for section, tensors in state.items(): out |= {f'{section}.{key}': t for key, t in tensors.items()}
    return out

def write_checkpoint(name, folder):
    "Write a golden checkpoint file in its official format into `folder`; its path."
    path = Path(folder) / name
    s = state(name)
    if path.suffix == '.bin': torch.save(s, path)
    else: save_file(s['lora'] if 'lora' in s else flat(s), path)
    return path
