"One photograph in every form that a user might have it in, exact and grey."
import io

import numpy as np
import torch
from PIL import Image

from helpers_face import fake_photo

PHOTO = fake_photo([(160, 150, 20, 1)])
RGB = Image.fromarray(PHOTO)
GREY = np.asarray(RGB.convert('L'))
OPAQUE = np.full(PHOTO.shape[:2], 255, np.uint8)


def saved(image, fmt='PNG', **more):
    "The bytes of a picture file."
    file = io.BytesIO()
    image.save(file, format=fmt, **more)
    return file.getvalue()


FILES = dict(rgb=saved(RGB), rgba=saved(RGB.convert('RGBA')), cmyk=saved(RGB.convert('CMYK'), 'TIFF'),
             bmp=saved(RGB, 'BMP'), webp=saved(RGB, 'WEBP', lossless=True))
PICTURES = dict(pil=RGB, pil_rgba=RGB.convert('RGBA'), pil_cmyk=RGB.convert('CMYK'))
ARRAYS = dict(array=PHOTO, rgba_array=np.dstack([PHOTO, OPAQUE]), uint16=PHOTO.astype(np.uint16)*257,
              int64=PHOTO.astype(int), float=PHOTO/255, float255=PHOTO.astype(np.float32),
              float16=(PHOTO/255).astype(np.float16), strided=PHOTO[::-1][::-1],
              fortran=np.asfortranarray(PHOTO), listed=PHOTO.tolist(), tensor=torch.from_numpy(PHOTO))
EXACT = FILES | PICTURES | ARRAYS

GREY_8, GREY_16 = Image.fromarray(GREY), Image.fromarray(GREY.astype(np.uint16)*257)
GREY_F, GREY_F1 = Image.fromarray(GREY.astype(np.float32)), Image.fromarray((GREY/255).astype(np.float32))
GREYS = dict(
    l=saved(GREY_8), la=saved(GREY_8.convert('LA')), p=saved(GREY_8.convert('P')),
    i16=saved(GREY_16), i16tiff=saved(GREY_16, 'TIFF'), f=saved(GREY_F, 'TIFF'), f1=GREY_F1,
    i=Image.fromarray(GREY.astype(np.int32)*257), i8=Image.fromarray(GREY.astype(np.int32)),
    hw=GREY, hw1=GREY[..., None], la_array=np.dstack([GREY, OPAQUE]))
