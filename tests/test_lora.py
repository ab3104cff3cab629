"""Adapters, on a small stand-in with GPT's layout: model.h[i].attn, .mlp and model.config."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lora
import quant

D = 64


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(D)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x):
        q, k, v = self.attn["c_attn"](self.ln(x)).split(D, dim=-1)
        x = x + self.attn["c_proj"](torch.tanh(q * k) + v)
        return x + self.mlp["c_proj"](torch.relu(self.mlp["c_fc"](x)))


class Model(nn.Module):
    """Six layers in three blocks; like GPT, forward(x, block) activates the exit."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(block_size=2, total_blocks=3, n_layers=6, mask_id=5)
        self.wte = nn.Embedding(6, D)
        self.h = nn.ModuleList([Layer() for _ in range(6)])

    def forward(self, x, block=2):
        for module in self.modules():
            if hasattr(module, "active_exit"):
                module.active_exit = block
        for layer in self.h[: 2 * (block + 1)]:
            x = layer(x)
        return x


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(11))


def randomize(parameters, seed, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(size * torch.randn(p.shape, generator=generator))


def frozen_model(kind):
    model = Model()
    if kind is not None:
        quant.convert_(model.h[:4], kind)
    return model


@pytest.mark.parametrize("kind", [None, *quant.KINDS])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_new_adapter_is_the_identity(kind, autocast):
    model = frozen_model(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = [model(X, k) for k in range(3)]
        parameters = lora.add_adapters(model, 2, rank=8, alpha=16, dropout=0.1)
        model.eval()
        after = [model(X, k) for k in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert len(parameters) == 2 * 4 * 4  # A and B, four linears, four layers before exit 2
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    assert sum(p.numel() for p in parameters) == 4 * 8 * (D + 3 * D + D + D + D + 4 * D + 4 * D + D)
    A = model.h[0].attn["c_attn"].lora_A["2"].detach()
    assert A.abs().max() <= 1 / math.sqrt(D)
    assert float(A.std()) == pytest.approx(1 / math.sqrt(3 * D), rel=0.1)  # of a uniform variable


@pytest.mark.parametrize("kind", [None, "fp16", "int4"])
def test_exits_are_independent_bit_for_bit(kind):
    model = frozen_model(kind)
    zero = model(X, 0)
    first = lora.add_adapters(model, 1, rank=4, alpha=8)
    drawn = first[0].detach().clone()
    randomize(first, 1)
    one = model(X, 1)
    assert torch.equal(model(X, 0), zero)
    second = lora.add_adapters(model, 2, rank=4, alpha=8, seed=0)
    assert not torch.equal(drawn, second[0])  # the same seed, another exit
    plain = model(X, 2)
    randomize(second, 2)
    assert torch.equal(model(X, 0), zero)
    assert torch.equal(model(X, 1), one)
    assert not torch.equal(model(X, 2), plain)
    randomize(first, 3)
    two = model(X, 2)
    randomize(first, 4)
    assert torch.equal(model(X, 2), two)


def test_adapters_are_a_function_of_the_seed():
    drawn = [lora.add_adapters(Model(), 2, 4, 8, seed=seed) for seed in (5, 5, 6)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1]))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    model = Model()
    assert lora.add_adapters(model, 0, 4, 8) == []
    model.wte.half()
    assert len(lora.add_adapters(model, 0, 4, 8, plain=True)) == 2 * 4 * 6  # plain QLoRA: all
    assert model.mask_row.dtype == torch.float32
    assert torch.equal(model.mask_row, model.wte.weight[5].float())
    assert len(lora.adapter_parameters(model, 0)) == 2 * 4 * 6 + 1  # and the [MASK] row
    with pytest.raises(ValueError, match="exit 0 has an adapter"):
        lora.add_adapters(model, 0, 4, 8, plain=True)
    with pytest.raises(ValueError, match="another rank"):
        lora.add_adapters(model, 1, 2, 8)


@pytest.mark.parametrize("kind", [None, *quant.KINDS])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_formula_and_who_gets_a_gradient(kind, autocast):
    torch.manual_seed(12)
    base = nn.Linear(D, 24)
    base = base if kind is None else quant.QuantLinear.from_linear(base, kind)
    layer = lora.LoRALinear(base, rank=4, alpha=12)
    layer.add(1)
    randomize(layer.lora_B.parameters(), 5)
    layer.active_exit = 1
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
        out = base(x)
    correction = 12 / 4 * (x @ layer.lora_A["1"].T) @ layer.lora_B["1"].T
    assert y.dtype == out.dtype == (torch.bfloat16 if autocast else torch.float32)
    # one unit in the last place of bf16 is 2**-7 of the sum, 2**-8 on average
    tolerance = 2e-2 if autocast else 1e-6
    torch.testing.assert_close(y.float(), out.float() + correction, atol=tolerance, rtol=tolerance)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    for p in (layer.lora_A["1"], layer.lora_B["1"]):
        assert p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0


def test_gradcheck_in_float64():
    torch.manual_seed(13)
    base = quant.QuantLinear.from_linear(nn.Linear(7, 5), "int4")
    layer = lora.LoRALinear(base, rank=2, alpha=4)
    layer.add(0)
    layer.active_exit = 0
    A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 7), (5, 2)))
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def f(x, A, B):
        names = {"lora_A.0": A, "lora_B.0": B}
        return torch.func.functional_call(layer, names, (x,))

    assert torch.autograd.gradcheck(f, (x, A, B))


def test_dropout_acts_on_the_adapter_alone():
    layer = lora.LoRALinear(nn.Linear(D, D), rank=4, alpha=4, dropout=0.5)
    layer.add(0)
    assert torch.equal(layer(X), layer.base(X))
    layer.active_exit = 0
    randomize(layer.lora_B.parameters(), 6)
    assert not torch.equal(layer(X), layer(X))
    layer.eval()
    assert torch.equal(layer(X), layer(X))


@pytest.mark.parametrize("base_kind", [None, "fp16", "int4"])
def test_merge_equals_the_adapters(base_kind):
    model = frozen_model(base_kind).eval()
    for exit in (1, 2):
        randomize(lora.add_adapters(model, exit, rank=4, alpha=8), exit)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for exit in range(3):
        expected = model(X, exit)
        merged = lora.merge(model, exit)
        assert not any(isinstance(m, lora.LoRALinear) for m in merged.modules())
        torch.testing.assert_close(merged(X, exit), expected, atol=2e-5, rtol=1e-5)
        if exit == 0:
            assert torch.equal(merged(X, exit), expected)  # no adapters: base, unchanged
        else:
            assert type(merged.h[0].mlp["c_fc"]) is nn.Linear
    after = model.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)  # a copy, no side effect
    model.eval()
    model.train()
    assert any(isinstance(m, lora.LoRALinear) for m in model.modules())


def test_merging_into_a_low_bit_kind_moves_the_outputs_by_a_known_amount():
    """Relative change of exit 2's output. Over 8 seeds of the adapters, base int4: fp32 2.7e-7 +-
    1e-8, fp16 2.05e-4 +- 1e-5, int4 0.048 +- 0.004 (on the grid the base had already), nf4 0.105
    +- 0.004 (on another)."""
    model = frozen_model("int4").eval()
    randomize(lora.add_adapters(model, 2, rank=4, alpha=8), 2)
    bounds = {"fp32": (0, 1e-6), "fp16": (1.4e-4, 2.7e-4)}
    bounds |= {"int4": (0.028, 0.068), "nf4": (0.08, 0.13)}
    for kind, (least, most) in bounds.items():
        merged = lora.merge(model, 2, kind)
        assert merged.h[3].mlp["c_proj"].kind == kind
        with torch.no_grad():
            expected = model(X, 2)
            change = (merged(X, 2) - expected).norm() / expected.norm()
        assert least <= change <= most, kind


def test_the_state_is_only_the_adapters():
    model = frozen_model("nf4")
    for exit in (1, 2):
        randomize(lora.add_adapters(model, exit, rank=4, alpha=8), exit)
    state = lora.adapter_state(model, 2)
    assert len(state) == 32
    assert all(name.endswith((".lora_A.2", ".lora_B.2")) for name in state)
    assert sum(t.nbytes for t in state.values()) == 4 * 4 * 4 * 16 * D
    before = [model(X, k) for k in range(3)]
    for tensor in state.values():  # views: the state is the adapters, not a copy of them
        tensor.zero_()
    after = [model(X, k) for k in range(3)]
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, True, False]


def test_convert_reaches_the_base_inside_an_adapter():
    model = Model()
    randomize(lora.add_adapters(model, 1, rank=4, alpha=8), 1)
    expected = model(X, 1)
    quant.convert_(model.h[:2], "fp32")
    assert isinstance(model.h[0].mlp["c_fc"].base, quant.QuantLinear)
    torch.testing.assert_close(model(X, 1), expected)
