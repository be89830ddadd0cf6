"Checkpoints, LoRA files and trainings that were changed: refused by name, or read, attached and taken off."
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import goldens_build as golden
import torch
from faceid_nb.adapter import FaceIDAdapter
from faceid_nb.checkpoint import VARIANTS, read_checkpoint, save_checkpoint
from faceid_nb.train import Steps, read_steps, write_steps
from safetensors.torch import save

from . import archives, tables
from .family import Family, Fault, end_of
from .mutate import bytes_changed

STARTS = {'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'subprocess.Popen', 'pty.spawn'}
started = []   # programs that this process began, or wanted to


def listen(event, arguments):
    if event in STARTS: started.append((event, str(arguments)[:200]))


def narrow(state, hidden=8):
    "A checkpoint with a small projection: the same names, a hundredth of the bytes."
    proj = dict(state['image_proj'])
    if 'proj.0.weight' in proj:
        for key in ('proj.0.weight', 'proj.0.bias'): proj[key] = proj[key][:hidden].clone()
        proj['proj.2.weight'] = proj['proj.2.weight'][:, :hidden].clone()
    return dict(image_proj=proj, ip_adapter=dict(state['ip_adapter']))


def subjects():
    "{name of a file: (what it is, its tensors)}"
    names = [n for n in golden.SPEC['checkpoints'] if 'sd15' in n]
    found = {}
    for name in names:
        state = golden.state(name)
        stem = name.partition('.')[0]
        found[stem] = ('lora', state['lora']) if 'lora' in state else ('checkpoint', narrow(state))
    return found


class Base:
    "A UNet, and whether it is as it was."
    def __init__(self):
        self.unet = golden.unet('sd')
        self.state = {k: v.clone() for k, v in self.unet.state_dict().items()}
        self.marks = self.look()
    def look(self):
        "What hangs on it."
        u = self.unet
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in u.modules()]
        return sorted(vars(u)), hooks, [type(p).__name__ for p in u.attn_processors.values()]
    def check(self):
        "Raise Fault where anything is left on it."
        if self.look() != self.marks: raise Fault('something was left on the UNet')
        now = self.unet.state_dict()
        wrong = [k for k, v in self.state.items() if k not in now or not torch.equal(v, now[k])]
        if wrong or len(now) != len(self.state): raise Fault(f'the UNet is another: {wrong[:3]}')


class Training:
    "What `read_steps` goes on with, and whether it is as it was."
    recipe = SimpleNamespace(ema=.99, lr=1e-3, weight_decay=0., seed=3)
    def __init__(self):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        accelerator = SimpleNamespace(device=torch.device('cpu'), prepare=lambda *parts: parts)
        self.steps = Steps(net, list(net.parameters()), accelerator, self.recipe)
        net(torch.ones(1, 3)).sum().backward()
        self.steps.opt.step()
        self.steps.average.add(1)
    def written(self, path):
        write_steps(self.steps, path)
        return torch.load(path, weights_only=True)
    def look(self):
        "Every number of it, as text."
        s, average = self.steps, self.steps.average
        numbers = s.number, s.spent, s.seed
        tensors = [t.tolist() for t in (*s.params, *average.mean)]
        return repr((numbers, tensors, s.opt.state_dict()))
    def step(self):
        "One step more: what was read must serve for that."
        s = self.steps
        s.opt.step()
        s.number += 1
        s.average.add(s.number)


def written(rng, state, legacy, role):
    "A changed state as a file of PyTorch's, which does not write everything."
    while True:
        new = tables.changed(rng, state)
        try: return archives.saved(new['one'] if role == 'lora' else new, legacy)
        except (RuntimeError, ValueError, TypeError, KeyError): continue


class Checkpoints(Family):
    n = 10_000
    def __init__(self, seed=0):
        super().__init__(seed)
        torch.set_num_threads(1)
        self.base, self.subjects, self.marker = Base(), subjects(), self.folder/'ran'
        state = self.subjects['ip-adapter-faceid_sd15'][1]
        self.good = save_checkpoint(state, self.folder/'good.safetensors', 'faceid')
        self.training = Training().written(self.folder/'adapter.ckpt')
        sys.addaudithook(listen)
        self.kinds = dict(bytes=self.some_bytes, header=self.header, tensors=self.tensors, pickle=self.pickle,
                          code=self.code, archive=self.archive, bomb=self.bomb, training=self.a_training)

    def draw(self, i):
        rng = self.random(i)
        kind = rng.choices(list(self.kinds), [20, 20, 25, 12, 8, 4, 1, 10])[0]
        stem = rng.choice(list(self.subjects))
        path, act = self.kinds[kind](rng, stem)
        return kind, partial(self.judged, path, act)

    # what is drawn: (path, act)

    def file(self, name, data, role):
        path = self.folder/name
        path.write_bytes(data)
        return path, partial(self.use_lora if role == 'lora' else self.use, path)

    def form(self, rng, state, stem):
        "A state as one of three kinds of file: (name, bytes)."
        suffix = rng.choice(['.bin', '.pt', '.safetensors'])
        if suffix != '.safetensors': return f'{stem}{suffix}', archives.saved(state, suffix == '.pt')
        flat = golden.flat(state) if 'ip_adapter' in state else state
        return f'{stem}{suffix}', save(flat)

    def some_bytes(self, rng, stem):
        role, state = self.subjects[stem]
        name, data = self.form(rng, state, stem)
        return self.file(name, bytes_changed(rng, data), role)

    def header(self, rng, stem):
        role, state = self.subjects[stem]
        data = tables.header_changed(rng, save(golden.flat(state) if role == 'checkpoint' else state))
        path, act = self.file(f'{stem}.safetensors', data, role)
        if role == 'checkpoint': act = partial(self.use, path, data)
        return path, act

    def tensors(self, rng, stem):
        role, state = self.subjects[stem]
        plain, legacy = rng.random() < .3, rng.random() < .3
        if role == 'lora': state = dict(one=state)
        if not plain: return self.file(f'{stem}.bin', written(rng, state, legacy, role), role)
        new = tables.changed(rng, state, tables.PLAIN)
        flat = new['one'] if role == 'lora' else golden.flat(new)
        data = save({k: t.contiguous().clone() for k, t in flat.items()})
        return self.file(f'{stem}.safetensors', data, role)

    def pickle(self, rng, stem):
        role, state = self.subjects[stem]
        if rng.random() < .1: return self.file(f'{stem}.bin', archives.lie_in_old(rng, state), role)
        ways = [archives.lie, archives.swap_opcode, archives.other_global, bytes_changed]
        way = partial(rng.choice(ways), rng)
        return self.file(f'{stem}.bin', archives.swap_member(archives.saved(state), '/data.pkl', way), role)

    def code(self, rng, stem):
        role, state = self.subjects[stem]
        evil = rng.choice(list(archives.calls(self.marker).values()))
        state = {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}
        part, key = tables.entry(rng, state)
        where = rng.randrange(4)
        if where == 0: state = evil
        elif where == 1: part[key] = evil
        elif where == 2: part['more'] = [part[key], {'a': evil}]
        else: state = {**state, 'zzz': evil}
        dump = rng.choice([archives.saved, partial(archives.saved, legacy=True),
                           partial(pickle.dumps, protocol=2), partial(pickle.dumps, protocol=4)])
        return self.file(f'{stem}.bin', dump(state), role)

    def archive(self, rng, stem):
        role, state = self.subjects[stem]
        return self.file(f'{stem}.bin', archives.rezipped(rng, archives.saved(state)), role)

    def bomb(self, rng, stem):
        role, state = self.subjects[stem]
        return self.file(f'{stem}.bin', archives.bomb(rng, archives.saved(state)), role)

    def a_training(self, rng, stem):
        "adapter.ckpt, to go on from."
        data, path = archives.saved(self.training), self.folder/'adapter.ckpt'
        ways = [partial(bytes_changed, rng, data), partial(archives.bomb, rng, data),
                lambda: archives.swap_member(data, '/data.pkl', partial(archives.lie, rng)),
                lambda: archives.saved(training_changed(rng, self.training))]
        path.write_bytes(rng.choices(ways, [20, 1, 10, 80])[0]())
        return path, partial(self.go_on, path)

    # what is done with it

    def use(self, path, data=None):
        "Read, attach, make tokens, take off."
        weights = FaceIDAdapter.from_file(path)
        if data is not None: self.compare(read_checkpoint(path), data)
        if weights.variant not in VARIANTS: raise Fault(f'a variant {weights.variant}')
        weights.attach(self.base.unet)
        try: self.tokens(weights)
        finally: weights.detach()

    def use_lora(self, path):
        FaceIDAdapter.from_file(self.good, lora=path).attach(self.base.unet).detach()

    def tokens(self, adapter):
        width = adapter.weights.embedding_dim
        structure = {}
        if adapter.weights.structure_width:
            states = torch.zeros(1, 5, adapter.weights.structure_width)
            structure = dict(structure=states, negative_structure=states)
        embedding = torch.zeros(1, width)
        embedding[0, 0] = 1.
        with adapter.condition(embedding, **structure) as c: shape = tuple(c.tokens.shape)
        width = self.base.unet.config.cross_attention_dim
        if shape[0] != 1 or shape[-1] != width: raise Fault(f'tokens {shape}')

    def compare(self, checkpoint, data):
        "What was read against another reader."
        mine = golden.flat(dict(image_proj=checkpoint.image_proj, ip_adapter=checkpoint.ip_adapter))
        theirs = tables.read_independently(data)
        if mine.keys() != theirs.keys(): raise Fault('other names than in the file')
        wrong = [k for k, t in mine.items() if not torch.equal(t.float(), theirs[k].float())]
        if wrong: raise Fault(f'other numbers than in the file: {wrong[:3]}')

    def go_on(self, path):
        training = Training()
        before = training.look()
        try: read_steps(training.steps, path)
        except BaseException:
            if training.look() != before: raise Fault('half a checkpoint was taken over') from None
            raise
        training.step()

    def judged(self, path, act):
        "How it ended; nothing ran and nothing is left, however that was."
        started.clear()
        try: return end_of(act)
        finally:
            path.unlink(missing_ok=True)
            if started or self.marker.exists(): raise Fault(f'code ran: {started}')
            self.base.check()


def training_changed(rng, state):
    "A training's checkpoint with an entry that is missing, of another kind, or of another size."
    state = {**state, 'opt': {**state['opt'], 'state': dict(state['opt']['state'])}}
    where = rng.choice([state, state, state['opt'], state['opt']['state']])
    key = rng.choice(list(where))
    value = where[key]
    wrong = [None, 'x', -1, float('nan'), [], {}, torch.ones(2), 1 << 70, 1.5]
    way = rng.randrange(5)
    if way == 0: del where[key]
    elif way == 1 and isinstance(value, list): where[key] = value[:-1]
    elif way == 2 and isinstance(value, list): where[key] = [torch.full((3, 3), float('nan')), *value[1:]]
    elif way == 3 and isinstance(value, list) and torch.is_tensor(value[0]):
        where[key] = [value[0]*float('nan'), *value[1:]]
    else: where[key] = rng.choice(wrong)
    return state
