"Stop, pressed at random moments of a generation: heard within two steps, and the next run is right."
import threading
import time
from functools import partial

import numpy as np
import torch

from .family import RIGHT, Family, Fault

STEPS, HEARD = 8, 2   # of a generation, and how many may follow the button


class Stops(Family):
    n, patience, memory = 200, 60, None
    def __init__(self, seed=0):
        super().__init__(seed)
        from faceid_nb.models import load
        from faceid_nb.tiny.people import render, sample_people
        torch.set_num_threads(1)
        self.model = load('tiny-faceid', device='cpu')
        self.model.pipe.set_progress_bar_config(disable=True)
        self.photo = render(sample_people(1, 3), seed=1, size=128)[0].image
        self.right = self.make(num_samples=1)
        began = time.perf_counter()
        self.make()
        self.whole = time.perf_counter() - began

    def make(self, on_step=None, num_samples=2):
        how = dict(num_samples=num_samples, batch_size=1, seed=5, num_inference_steps=STEPS, on_step=on_step)
        return [np.asarray(image) for image in self.model.generate(self.photo, 'photo of a person', **how)]

    def draw(self, i):
        rng = self.random(i)
        return 'stop', partial(self.stopped, rng.uniform(0, self.whole))

    def stopped(self, moment):
        seen, pressed, made = [], [], []
        def press():
            pressed.append(len(seen))
            self.model.stop()
        thread = threading.Thread(target=lambda: made.append(self.make(seen.append)))
        thread.start()
        time.sleep(moment)
        running = thread.is_alive()
        press()
        thread.join(self.patience/2)
        if thread.is_alive(): raise Fault('it does not end')
        late = len(seen) - pressed[0]
        if running and late > HEARD: raise Fault(f'{late} steps after the button, and {pressed[0]} before')
        if running and not self.model.stopped and len(made[0]) < 2: raise Fault('stopped, and nobody says so')
        self.check_next()
        return RIGHT

    def check_next(self):
        again = self.make(num_samples=1)
        if len(again) == 1 and np.array_equal(again[0], self.right[0]): return
        raise Fault('the next picture is another')
