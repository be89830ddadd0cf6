"""Folding and unfolding: bit for bit, whatever happens in between."""
import copy
from itertools import product
import pytest, torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, inject_adapter_in_model
from faceid_nb.checkpoint import read_tensors
from faceid_nb.errors import LoRAError
from faceid_nb.lora import (Folded, LoRA, can_fold, folded, lora_from_checkpoint, lora_pairs,
                            normal_lora, read_lora, save_lora)
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


def snapshot(net): return {k: v.detach().clone() for k, v in net.named_parameters()}


def same(net, snap): return all(torch.equal(v, snap[k]) for k, v in net.named_parameters())


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

def a_file(change=lambda t: t):
    "{name: tensor} of a LoRA of one layer."
    path = 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q'
    down, up = torch.randn(2, 6, generator=seeded(0)), torch.randn(6, 2, generator=seeded(1))
    return {f'{path}.lora_A.weight': down, f'{path}.lora_B.weight': change(up),
            f'{path}.alpha': torch.tensor(1.)}

def seeded(seed): return torch.Generator().manual_seed(seed)

@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_read(dtype):
    made, plain = (normal_lora(a_file(c)) for c in (lambda t: t.to(dtype), lambda t: t.to(dtype).float()))
    assert made.keys() == plain.keys() and all(torch.equal(made[k], plain[k]) for k in plain)

@pytest.mark.parametrize('change, word', [
    (lambda t: t.to(torch.complex64), 'not a floating'), (lambda t: t.to(torch.int8), 'not a floating'),
    (lambda t: (t*float('nan')).to(torch.float8_e4m3fn), 'not finite')])
def test_numbers_that_are_none_are_refused(change, word):
    with pytest.raises(LoRAError, match=word): normal_lora(a_file(change))

def break_weighing(monkeypatch):
    "Two layers are changed, then there is no memory left."
    calls, real = [], Folded.weigh
    def third(self, weight):
        calls.append(1)
        if len(calls) == 3: raise MemoryError('no memory left')
        real(self, weight)
    monkeypatch.setattr(Folded, 'weigh', third)


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


def test_offloaded_after_it_runs_beside(offload):
    "What accelerate keeps is the state dict, and that is plain."
    net, lora, x, bare, want = offload
    l = LoRA(net, lora)
    cpu_offload(net, torch.device('cpu'))
    l.settle()
    assert not inside(l) and close(net(x), want)


def test_offloaded_after_it_can_be_taken_off(offload):
    net, lora, x, bare, want = offload
    before = snapshot(net)
    l = LoRA(net, lora)
    cpu_offload(net, torch.device('cpu'))
    l.undo()
    assert torch.equal(net(x), bare)
    remove_hook_from_submodules(net)
    assert same(net, before)


def test_offloaded_with_the_lora_in_it_is_refused_before_anything_is_lost(offload):
    net, lora, x, bare, want = offload
    l = LoRA(net, lora)
    kept = {k: v.detach().clone() for k, v in net.named_parameters()}
    cpu_offload(net, torch.device('cpu'), state_dict=kept)
    for change in (l.undo, lambda: l.weigh(.5)):
        with pytest.raises(LoRAError, match='offloaded after'): change()
    assert close(net(x), want)


# --- what others do to a folded weight

@pytest.fixture
def owned():
    "A wide net, what it was, a LoRA on it, and somebody's style for its first layer."
    torch.manual_seed(0)
    net = Net(64, 48)
    before = snapshot(net)
    return net, before, LoRA(net, lora_of(net, 2)), .1*torch.randn(48, 64)


def test_a_style_fused_meanwhile_stays(owned):
    net, before, l, style = owned
    net.a.weight.data += style
    l.weigh(.3).undo()
    assert (net.a.weight - before['a.weight'] - style).abs().max() < 1e-5
    assert torch.equal(net.b.weight, before['b.weight'])


def test_a_style_fused_in_some_places_leaves_the_others_bit_for_bit(owned):
    net, before, l, style = owned
    net.a.weight.data[:3] += style[:3]
    l.undo()
    assert torch.equal(net.a.weight[3:], before['a.weight'][3:])


def test_a_style_fused_at_weight_zero_stays(owned):
    net, before, l, style = owned
    l.weigh(0.)
    net.a.weight.data += style
    l.undo()
    assert torch.equal(net.a.weight, before['a.weight'] + style)


@pytest.mark.parametrize('put', [
    lambda net, w: net.load_state_dict(net.state_dict() | {'a.weight': w}),
    lambda net, w: net.a.weight.data.copy_(w),
    lambda net, w: setattr(net.a.weight, 'data', w),
    lambda net, w: setattr(net.a, 'weight', nn.Parameter(w))])
def test_another_weight_in_its_place_stays(owned, put):
    net, before, l, style = owned
    w = before['a.weight'] + style
    put(net, w.clone())
    l.undo()
    assert torch.equal(net.a.weight, w)


def test_another_weight_gets_the_lora_on_settling(owned):
    net, before, l, style = owned
    change = net.a.weight.detach() - before['a.weight']
    net.a.weight.data.copy_(before['a.weight'] + style)
    l.settle()
    assert (net.a.weight - before['a.weight'] - style - change).abs().max() < 1e-5


def test_half_of_the_change_is_refused(owned):
    net, before, l, style = owned
    net.a.weight.data = (net.a.weight.data + before['a.weight'])/2
    with pytest.raises(LoRAError, match='50%'): l.undo()


def test_another_type_comes_back_in_it(owned):
    net, before, l, style = owned
    net.half()
    l.undo()
    assert all(torch.equal(v, before[k].half()) for k, v in net.named_parameters())


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda net: copy.deepcopy(net.a)])
def test_a_deep_copy_is_plain(owned, copied):
    net, before, l, style = owned
    other = copied(net)
    assert torch.equal(getattr(other, 'a', other).weight, before['a.weight'])


def test_a_deep_copy_runs_saves_and_is_its_own(owned):
    net, before, l, style = owned
    other = copy.deepcopy(net)
    other.a.weight.data += 1
    l.undo()
    assert torch.equal(other.state_dict()['a.weight'], before['a.weight'] + 1)


def test_a_deep_copy_beside_is_plain(owned):
    net, before, l, style = owned
    l.undo()
    x, bare = torch.randn(2, 64), None
    bare = net(x)
    LoRA(net, lora_of(net, 2, conv=False), fold=False)
    assert not torch.equal(net(x), bare)
    assert torch.equal(copy.deepcopy(net)(x), bare)


def test_a_pickle_is_refused(owned, tmp_path):
    net, before, l, style = owned
    with pytest.raises(LoRAError, match='save_pretrained'): torch.save(net, tmp_path/'net.pt')


def test_a_state_dict_is_plain(owned):
    net, before, l, style = owned
    assert all(torch.equal(w, before[k]) for k, w in net.state_dict().items())


def test_a_state_dict_holds_what_was_fused_meanwhile(owned):
    net, before, l, style = owned
    net.a.weight.data += style
    assert (net.state_dict()['a.weight'] - before['a.weight'] - style).abs().max() < 1e-5


def test_undo_leaves_no_hook(owned):
    net, before, l, style = owned
    l.undo()
    assert not any(m._state_dict_hooks for m in net.modules())


def test_a_layer_replaced_meanwhile_is_refused(owned):
    net, before, l, style = owned
    net.a = nn.Linear(64, 48)
    with pytest.raises(LoRAError, match='another layer by now'): l.undo()
    assert not torch.equal(net.b.weight, before['b.weight'])


@pytest.mark.parametrize('cut', range(1, 6))
def test_an_interrupted_undo_is_finished_by_the_next(owned, monkeypatch, cut):
    net, before, l, style = owned
    calls, real = [], Folded.touched
    def interrupted(self):
        calls.append(1)
        if len(calls) == cut: raise KeyboardInterrupt
        return real(self)
    monkeypatch.setattr(Folded, 'touched', interrupted)
    try: l.undo()
    except KeyboardInterrupt: l.undo()
    assert same(net, before)


def test_a_dora_of_somebody_reads_the_plain_weight():
    "It weighs a layer by the norm of its weight: nothing may be folded into that."
    net = Net(64, 48)
    inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=['a'], init_lora_weights=False),
                            net)
    x = torch.randn(3, 64)
    dora = net.a(x)
    pair = {'a.down': torch.randn(2, 64), 'a.up': torch.randn(48, 2)}
    LoRA(net, pair)
    assert close(net.a(x), dora + x @ pair['a.down'].T @ pair['a.up'].T)


def test_a_dora_that_comes_later_is_noticed():
    torch.manual_seed(0)
    net = Net(64, 48)
    pair = {'a.down': torch.randn(2, 64), 'a.up': torch.randn(48, 2)}
    l = LoRA(net, pair)
    inject_adapter_in_model(LoraConfig(r=2, use_dora=True, target_modules=['a'], init_lora_weights=False),
                            net)
    l.settle()
    assert not inside(l)


def group_offload(net, **how):
    from diffusers.hooks import apply_group_offloading
    here = torch.device('cpu')
    apply_group_offloading(net, here, here, offload_type='leaf_level', **how)


def test_group_offload_before_runs_beside(offload):
    net, lora, x, bare, want = offload
    group_offload(net)
    l = LoRA(net, lora)
    assert not inside(l) and close(net(x), want)


def test_group_offload_to_disk_after_refuses_to_be_undone(offload, tmp_path):
    "The disk has the folded weights, and would bring them back."
    net, lora, x, bare, want = offload
    l = LoRA(net, lora)
    group_offload(net, offload_to_disk_path=str(tmp_path))
    with pytest.raises(LoRAError, match='offloaded after'): l.undo()


@pytest.fixture
def saved(tmp_path):
    "(a pipeline, a LoRA for it, its file)"
    pipe = G.pipeline('sd')
    inside = G.state('ip-adapter-faceid_sd15.bin')['ip_adapter']
    lora = lora_from_checkpoint(inside, list(pipe.unet.attn_processors))
    return pipe, lora, save_lora(lora, tmp_path/'mine.safetensors')


def test_a_saved_lora_has_the_names_that_comfyui_looks_for(saved):
    pipe, lora, path = saved
    names = {'lora_unet_' + key.rpartition('.')[0].replace('.', '_') for key in lora}
    halves = ('alpha', 'lora_down.weight', 'lora_up.weight')
    assert set(read_tensors(path)[0]) == {'.'.join(pair) for pair in product(names, halves)}


def test_diffusers_loads_a_saved_lora_whole(saved):
    pipe, lora, path = saved
    pipe.load_lora_weights(path)
    for where in {key.rpartition('.')[0] for key in lora}:
        delta = pipe.unet.get_submodule(where).get_delta_weight('default_0')
        assert (delta - lora[f'{where}.up'] @ lora[f'{where}.down']).abs().max() < 1e-5


def test_a_saved_lora_is_read_again_bit_for_bit(saved):
    pipe, lora, path = saved
    back = read_lora(path)
    assert back.keys() == lora.keys() and all(torch.equal(back[k], lora[k]) for k in lora)
