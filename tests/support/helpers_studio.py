"For tests of studio, experiments and dashboards: photographs, a studio that is emptied, waiting for work."
import io

import numpy as np
from PIL import Image


def png(image):
    data = io.BytesIO()
    image.save(data, 'PNG')
    return data.getvalue()


def drawn(count, size=160):
    "Pictures of the same drawn people every time."
    from faceid_nb.tiny.people import render, sample_people
    return [p.image for p in render(sample_people(count, 7), seed=1, size=size, hat=None, glasses=0)]


def two_faces():
    "One picture: a large face at the left, a smaller one at the right."
    left, right = drawn(2)
    both = Image.new('RGB', (320, 160))
    both.paste(left, (0, 0))
    both.paste(right.resize((120, 120)), (180, 20))
    return both


def raising(error):
    "A function that takes anything and raises."
    def fail(*args, **more): raise error
    return fail


def empty(studio, folder='portraits'):
    "A studio as it was when it was new, but with the model that it has loaded."
    studio.worker.wait(30)
    parts = studio.worker, studio.settings, studio.people, studio.gallery, studio.progress, studio.engine
    for part in parts: part.unobserve_all()
    studio.settings.take(dict(model='tiny-faceid', prompt='photo of a person, smiling', negative_prompt='',
                              num_samples=1, seed=0, seed_locked=True, num_inference_steps=2,
                              scale=1., s_scale=1., guidance_scale=7.5))
    people, gallery = studio.people, studio.gallery
    people.photographs, people.side_by_side, people.num_photographs = [], False, 0
    gallery.portraits, gallery.compared, gallery.best_first, gallery.save_all = [], [], False, False
    gallery.folder, gallery.most = str(folder), 400
    studio.progress.preview, studio.progress.preview_every = [], 5
    studio.engine.download, studio.worker.error, studio.worker.note = False, '', ''


def finish(studio, seconds=60):
    "Wait for the work, which must not have failed. Returns the status."
    assert studio.worker.wait(seconds)
    assert studio.worker.error == '', studio.worker.error
    return studio.progress.status


def made(studio):
    "Make portraits, and whatever else is in the gallery."
    assert studio.generate(), studio.worker.error
    assert studio.worker.wait(120)
    return studio.gallery.portraits


def run(begin, studio, seconds=60):
    "Begin an experiment and wait: the status."
    assert begin(), studio.worker.error
    assert studio.worker.wait(seconds)
    return studio.progress.status


def largest_difference(a, b): return abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()


def executed(code):
    "The names that a piece of Python makes."
    names = {}
    exec(code, names)
    return names
