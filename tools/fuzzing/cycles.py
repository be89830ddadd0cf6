"Attach, condition, detach, again and again: bit for bit what it was, and no memory more."
from functools import partial

import torch
from faceid_nb.adapter import FaceIDAdapter

from .checkpoints import Base, narrow
from .child import status
from .family import RIGHT, Family, Fault

SETTLED, ROOM = 100, 24 << 20   # the cycle from which memory is watched, and how much it may grow

KINDS = 'folded', 'beside', 'two adapters', 'an error', 'unused'


class Cycles(Family):
    n = 1000
    def __init__(self, seed=0):
        super().__init__(seed)
        import goldens_build as golden
        torch.set_num_threads(1)
        self.base, self.held, self.done = Base(), 0, 0
        state = narrow(golden.state('ip-adapter-faceid_sd15.bin'))
        self.adapters = [FaceIDAdapter.from_state(**state) for _ in range(2)]
        self.text, self.latents = torch.ones(2, 7, 64), torch.ones(2, 4, 16, 16)
        self.plain = self.look()

    def draw(self, i):
        rng = self.random(i)
        kind = rng.choice(KINDS)
        return kind, partial(self.cycle, kind, rng, i)

    def cycle(self, kind, rng, i):
        adapter = self.adapters[0]
        adapter.attach(self.base.unet, fold=kind != 'beside', lora_weight=rng.choice([1., .5, 0.]))
        if kind == 'two adapters': self.use(self.adapters[1].attach(self.base.unet))
        elif kind == 'an error': self.fail(adapter)
        elif kind != 'unused': self.use(adapter)
        for a in self.adapters: a.detach()
        self.base.check()
        if i % 50 == 0 and not torch.equal(self.look(), self.plain): raise Fault('the UNet answers otherwise')
        self.watch()
        return RIGHT

    def look(self):
        with torch.no_grad(): return self.base.unet(self.latents, 500, self.text).sample

    def use(self, adapter):
        with torch.no_grad(), adapter.condition(torch.eye(512)[:1], guidance=2): self.look()

    def fail(self, adapter):
        "The block ends in an exception, and nothing of it stays."
        try:
            with adapter.condition(torch.eye(512)[:1], guidance=2): raise KeyboardInterrupt
        except KeyboardInterrupt: pass

    def watch(self):
        "Raise Fault where memory grows."
        self.done += 1
        if self.done == SETTLED: self.held = status('VmRSS')
        grown = status('VmRSS') - self.held
        if self.done <= SETTLED or grown <= ROOM: return
        raise Fault(f'{grown/2**20:.0f} MiB more after {self.done} cycles')
