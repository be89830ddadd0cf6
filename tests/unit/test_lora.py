"""Folding and unfolding: bit for bit, whatever happens in between."""
import copy
import pytest, torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, inject_adapter_in_model
from faceid_nb.errors import LoRAError
from faceid_nb.lora import Folded, LoRA, can_fold, folded, lora_from_checkpoint, lora_pairs, read_lora
import goldens_build as G

quick = settings(max_examples=25, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

class Net(nn.Module):
    def __init__(self, i=6, o=5, dtype=torch.float32):
        super().__init__()
        self.a, self.b = nn.Linear(i, o, dtype=dtype), nn.Linear(o, i, bias=False, dtype=dtype)
        self.to_out = nn.ModuleList([nn.Linear(i, i, dtype=dtype), nn.Dropout(0.)])
        self.conv = nn.Conv2d(3, 4, 3, dtype=dtype)
    def forward(self, x): return self.to_out[0](self.b(self.a(x)))

def lora_of(net, r, seed=0, conv=True):
    g = torch.Generator().manual_seed(seed)
    def rand(*shape): return torch.randn(*shape, generator=g)
    (o, i) = net.a.weight.shape
    lora = {'a.down': rand(r, i), 'a.up': rand(o, r), 'b.down': rand(r, o), 'b.up': rand(i, r),
            'to_out.0.down': rand(r, i), 'to_out.0.up': rand(i, r)}
    return lora | ({'conv.down': rand(r, 3, 3, 3), 'conv.up': rand(4, r, 1, 1)} if conv else {})


def snapshot(net): return {k: v.clone() for k, v in net.state_dict().items()}


def same(net, snap): return all(torch.equal(v, snap[k]) for k, v in net.state_dict().items())


def inside(lora): return {path for path, part in lora.parts.items() if isinstance(part, Folded)}


@quick
@given(r=st.integers(1, 4), w=st.floats(-2, 2, width=32), seed=st.integers(0, 99),
       dtype=st.sampled_from(DTYPES))
def test_undo_is_exact(r, w, seed, dtype):
    torch.manual_seed(seed)
    net = Net(dtype=dtype)
    before, ids = snapshot(net), [id(p) for p in net.parameters()]
    l = LoRA(net, lora_of(net, r, seed), w)
    if abs(w) > .1: assert not same(net, before)
    l.weigh(0)
    assert same(net, before)
    l.weigh(w).undo()
    assert same(net, before) and ids == [id(p) for p in net.parameters()] and not net.a._forward_hooks

@quick
@given(r=st.integers(1, 4), w=st.floats(-2, 2, width=32), seed=st.integers(0, 99))
@torch.no_grad()
def test_beside_equals_folded(r, w, seed):
    torch.manual_seed(seed)
    net = Net()
    lora = lora_of(net, r, seed, conv=False)
    x = torch.randn(3, 6)
    a = LoRA(net, lora, w)
    y = net(x)
    a.undo()
    b = LoRA(net, lora, w, fold=False)
    z = net(x)
    b.undo()
    assert (y - z).abs().max() < 1e-4 * (1 + y.abs().max()) and not net.a._forward_hooks

def test_weighing_starts_from_the_original_each_time():
    net = Net()
    before = snapshot(net)
    l = LoRA(net, lora_of(net, 2))
    for w in torch.linspace(-3, 3, 50): l.weigh(float(w))
    l.weigh(1.)
    assert torch.equal(net.a.weight, folded(before['a.weight'], l.pairs['a'][1], l.pairs['a'][2]))

def test_convolution():
    net = Net()
    before = net.conv.weight.clone()
    lora = lora_of(net, 2)
    LoRA(net, lora, .5)
    x = torch.randn(1, 3, 6, 6)
    delta = nn.functional.conv2d(nn.functional.conv2d(x, lora['conv.down']), lora['conv.up'])
    assert (net.conv(x) - nn.functional.conv2d(x, before, net.conv.bias) - .5 * delta).abs().max() < 1e-4

def test_moves_between_attach_and_undo():
    net = Net()
    twin = copy.deepcopy(net).to(torch.float16)
    l = LoRA(net, lora_of(net, 2))
    net.to(torch.float16)
    l.undo()
    assert same(net, snapshot(twin))

def test_gradients_reach_only_the_lora():
    net = Net().requires_grad_(False)
    lora = {k: nn.Parameter(v) for k, v in lora_of(net, 2, conv=False).items()}
    LoRA(net, lora, fold=False)
    net(torch.randn(2, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.values())

class Quantised(nn.Linear):
    "A layer with whole numbers for weights, as quantisation libraries have."
    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.bias = layer.bias
        self.step = layer.weight.abs().max() / 127
        self.weight = nn.Parameter((layer.weight / self.step).round().to(torch.int8), requires_grad=False)
    def forward(self, x): return nn.functional.linear(x, self.weight.float() * self.step, self.bias)

@torch.no_grad()
def test_a_quantised_layer_keeps_its_numbers_and_the_lora_runs_beside():
    net = Net()
    lora = lora_of(net, 2, conv=False)
    x = torch.randn(3, 6)
    l = LoRA(net, lora)
    y = net(x)
    l.undo()
    net.a = Quantised(net.a)
    before = net.a.weight.clone()
    assert not can_fold(net.a)
    l = LoRA(net, lora)
    assert len(l.hooks) == 1 and inside(l) == {'b', 'to_out.0'}
    assert torch.equal(net.a.weight, before) and (net(x) - y).abs().max() < .5
    l.undo()
    assert not net.a._forward_hooks

def test_layers_that_peft_wrapped():
    net = Net()
    plain = copy.deepcopy(net)
    before = snapshot(net)
    net = inject_adapter_in_model(LoraConfig(target_modules=['a'], r=2), net)
    lora = lora_of(plain, 2)
    l = LoRA(net, lora)
    assert torch.equal(net.a.base_layer.weight, folded(before['a.weight'], lora['a.down'], lora['a.up']))
    l.undo()
    assert torch.equal(net.a.base_layer.weight, before['a.weight'])

@pytest.mark.parametrize('change,word', [
    (lambda l: l.pop('b.up'), 'incomplete'),
    (lambda l: l.pop('b.down'), 'incomplete'),
    (lambda l: l.update({'b.down': l['b.down'][:, :-1]}), 'does not fit'),
    (lambda l: l.update({'b.up': l['b.up'][:-1]}), 'does not fit'),
    (lambda l: l.update({'b.down': l['b.down'][:1]}), 'does not fit'),
    (lambda l: l.update({'c.down': l['b.down'], 'c.up': l['b.up']}), 'no such layer')])
def test_errors_leave_the_model_alone(change, word):
    net = Net()
    before = snapshot(net)
    lora = lora_of(net, 2)
    change(lora)
    with pytest.raises(LoRAError, match=word): LoRA(net, lora)
    assert same(net, before) and not net.a._forward_hooks

def break_weighing(monkeypatch):
    "Two layers are changed, then there is no memory left."
    def fail(self, weight):
        for path, (layer, down, up) in list(self.pairs.items())[:2]: layer.weight.data = layer.weight.data + 1
        raise MemoryError('no memory left')
    monkeypatch.setattr(LoRA, 'weigh', fail)


def break_the_third_hook(monkeypatch):
    calls, real = [], nn.Linear.register_forward_hook
    def third(self, *a, **k):
        calls.append(1)
        if len(calls) == 3: raise MemoryError('no memory left')
        return real(self, *a, **k)
    monkeypatch.setattr(nn.Linear, 'register_forward_hook', third)


@pytest.mark.parametrize('fold, break_it', [(True, break_weighing), (False, break_the_third_hook)])
def test_an_exception_half_way_is_undone(monkeypatch, fold, break_it):
    net = Net()
    before = snapshot(net)
    break_it(monkeypatch)
    with pytest.raises(MemoryError): LoRA(net, lora_of(net, 2, conv=False), fold=fold)
    assert same(net, before) and not any(m._forward_hooks for m in net.modules())


def test_official_file_names_meet_the_unet(tmp_path):
    unet = G.unet()
    names = list(unet.attn_processors)
    separate = read_lora(G.write_checkpoint('ip-adapter-faceid_sd15_lora.safetensors', tmp_path))
    inside = lora_from_checkpoint(G.state('ip-adapter-faceid_sd15.bin')['ip_adapter'], names)
    assert set(separate) == set(inside) and len(lora_pairs(unet, inside)) == 4 * len(names)

@pytest.fixture
def offload():
    "A net, its LoRA, an input, the bare output, and the output with the LoRA folded in."
    net = Net()
    lora, x = lora_of(net, 2, conv=False), torch.randn(3, 6)
    bare = net(x)
    l = LoRA(net, lora)
    with_lora = net(x)
    l.undo()
    return net, lora, x, bare, with_lora


def close(a, b): return (a - b).abs().max() < 1e-4 * (1 + b.abs().max())


def test_offloaded_before_it_runs_beside(offload):
    net, lora, x, bare, want = offload
    cpu_offload(net, torch.device('cpu'))
    assert net.a.weight.is_meta
    l = LoRA(net, lora)
    assert not inside(l) and close(net(x), want)
    l.undo()
    assert (net(x) - bare).abs().max() < 1e-6


def test_offloaded_after_it_is_a_clear_error_never_half(offload):
    net, lora, x, bare, want = offload
    before = snapshot(net)
    l = LoRA(net, lora)
    cpu_offload(net, torch.device('cpu'))
    for change in (l.undo, lambda: l.weigh(.5)):
        with pytest.raises(LoRAError, match='remove_all_hooks'): change()
    assert close(net(x), want)
    remove_hook_from_submodules(net)
    l.undo()
    assert same(net, before)
