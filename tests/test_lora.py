"""Adapters, on a toy GPT of six layers in three blocks, the first two finished and stored."""

import math

import pytest
import torch
from conftest import toy_config
from torch import nn

import lora
import quant
from model import GPT

D = 64
IDX = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(11))
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(12))
STORED = [None, *quant.KINDS]  # None: as nn.Linear


def toy_model(kind=None):
    torch.manual_seed(0)
    model = GPT(toy_config(d_model=D, n_layers=6, block_size=2))
    for linear in model.h.modules():
        if isinstance(linear, nn.Linear):
            linear.reset_parameters()  # larger than GPT-2's, so that the layers have a say
    if kind is not None:
        quant.convert_(model.h[:4], kind)
    return model


def randomize(parameters, seed, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = size * torch.randn(p.shape, generator=generator)


def adapted(kind=None, exits=(1, 2)):
    """A model whose exits have adapters on all blocks before them, as if trained."""
    model = toy_model(kind).eval()
    for exit_k in exits:
        lora.add_adapters(model, exit_k, range(2 * exit_k), rank=4, alpha=8)
        randomize(lora.adapter_parameters(model, exit_k).values(), exit_k)
    return model


def read(model):
    """What each exit computes."""
    with torch.no_grad():
        return [model.hidden(IDX, exit_k) for exit_k in range(3)]


@pytest.mark.parametrize("kind", STORED)
def test_a_new_adapter_is_the_identity(kind):
    for autocast in (False, True):
        model = toy_model(kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = read(model)
            lora.add_adapters(model, 2, range(4), rank=8, alpha=16, dropout=0.1)
            after = read(model.eval())
        assert all(torch.equal(a, b) for a, b in zip(before, after))
    parameters = lora.adapter_parameters(model, 2).values()
    assert len(parameters) == 2 * 4 * 4  # A and B, four linears, four layers before exit 2
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    assert sum(p.numel() for p in parameters) == 4 * 8 * (D + 3 * D + D + D + D + 4 * D + 4 * D + D)
    A = model.h[0].attn.c_attn.lora_A["2"].detach()
    assert A.abs().max() <= 1 / math.sqrt(D)
    assert float(A.std()) == pytest.approx(1 / math.sqrt(3 * D), rel=0.1)  # of a uniform variable


@pytest.mark.parametrize("kind", [None, "fp16", "int4"])
def test_exits_are_independent_bit_for_bit(kind):
    model = toy_model(kind)
    plain = read(model)
    lora.add_adapters(model, 1, [0, 1], rank=4, alpha=8)
    first = lora.adapter_parameters(model, 1).values()
    randomize(first, 1)
    one = read(model)[1]
    assert torch.equal(read(model)[0], plain[0]) and not torch.equal(one, plain[1])
    assert torch.equal(read(model)[2], plain[2])
    lora.add_adapters(model, 2, range(4), rank=4, alpha=8)
    randomize(lora.adapter_parameters(model, 2).values(), 2)
    both = read(model)
    assert torch.equal(both[0], plain[0]) and torch.equal(both[1], one)
    assert not torch.equal(both[2], plain[2])
    randomize(first, 3)
    assert torch.equal(read(model)[2], both[2])


def test_adapters_are_a_function_of_the_seed_and_the_exit():
    drawn = []
    for seed, exit_k in ((5, 2), (5, 2), (6, 2), (5, 1)):
        model = toy_model()
        torch.manual_seed(len(drawn))  # the global state has no say
        lora.add_adapters(model, exit_k, range(4), 4, 8, seed=seed)
        drawn.append([*lora.adapter_parameters(model, exit_k).values()])
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1]))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[3][0])
    assert not torch.equal(drawn[0][0], drawn[0][8])  # nor are two layers alike


def test_the_layers_are_those_that_are_named():
    model = toy_model()
    lora.add_adapters(model, 0, [1, 4], 4, 8)
    names = lora.adapter_parameters(model, 0)
    assert {name.split(".lora_")[0] for name in names} == {
        f"h.{i}.{linear}" for i in (1, 4)
        for linear in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }  # fmt: skip
    assert not lora.adapter_parameters(model, 1)
    lora.add_adapters(model, 1, [0], 4, 8)  # layer 0 has adapters for exit 1 alone
    lora.add_adapters(model, 10, [0], 4, 8)
    assert len(lora.adapter_parameters(model, 1)) == len(lora.adapter_parameters(model, 0)) / 2 == 8
    with pytest.raises(ValueError, match="exit 0 has an adapter"):
        lora.add_adapters(model, 0, [1], 4, 8)
    for rank, alpha in ((2, 4), (4, 16)):
        with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn: has adapters of another rank"):
            lora.add_adapters(model, 2, [1], rank, alpha)
    with pytest.raises(ValueError, match="rank 0"):
        lora.LoRALinear(nn.Linear(2, 2), 0, 1)


@pytest.mark.parametrize("kind", STORED)
def test_the_formula_and_who_gets_a_gradient(kind):
    torch.manual_seed(12)
    base = nn.Linear(D, 24)
    base = base if kind is None else quant.QuantLinear.from_linear(base, kind)
    layer = lora.LoRALinear(base, rank=4, alpha=12)
    layer.add(1)
    randomize(layer.lora_B.parameters(), 5)
    layer.active_exit = 1
    correction = 12 / 4 * (X @ layer.lora_A["1"].T) @ layer.lora_B["1"].T
    assert correction.std() > 0.03
    # one unit in the last place of bf16 is 2**-7 of the sum, 2**-8 on average
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-6)):
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, out = layer(x), base(x)
        assert y.dtype == out.dtype == dtype
        torch.testing.assert_close(y.float(), out.float() + correction, atol=tolerance,
                                   rtol=tolerance)  # fmt: skip
        layer.zero_grad()
        y.float().square().sum().backward()
        assert x.grad.abs().sum() > 0
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
    assert torch.equal(layer(X), layer(X)) and not torch.equal(layer(X), layer.base(X))


@pytest.mark.parametrize("kind", [None, "fp16", "int4"])
def test_merge_equals_the_adapters(kind):
    model = adapted(kind)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for exit_k, expected in enumerate(read(model)):
        merged = lora.merge(model, exit_k)
        assert not any(isinstance(m, lora.LoRALinear) for m in merged.modules())
        got = read(merged)[exit_k]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        if exit_k == 0:
            assert torch.equal(got, expected)  # no adapters: base, unchanged
        else:
            assert type(merged.h[0].mlp.c_fc) is nn.Linear
        other = 1 if exit_k == 2 else 2  # its adapters are gone
        assert not torch.equal(read(merged)[other], read(model)[other])
    after = model.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)  # a copy, no side effect
    model.train().eval()
    assert any(isinstance(m, lora.LoRALinear) for m in model.modules())


def test_adapters_are_parameters_and_nothing_else():
    model = adapted("nf4")
    state = lora.adapter_parameters(model, 2)
    assert len(state) == 32
    assert all(name.endswith((".lora_A.2", ".lora_B.2")) for name in state)
    assert sum(p.nbytes for p in state.values()) == 4 * 4 * 4 * 16 * D
    assert not any("lora_" in name for k in range(3) for name in model.block_parameters(k))
    before = read(model)
    for parameter in state.values():
        parameter.data.zero_()
    assert [torch.equal(a, b) for a, b in zip(before, read(model))] == [True, True, False]


def test_convert_reaches_the_base_inside_an_adapter():
    model = adapted(None, [1])
    expected = read(model)[1]
    quant.convert_(model.h[:2], "fp32")
    assert isinstance(model.h[0].mlp.c_fc.base, quant.QuantLinear)
    torch.testing.assert_close(read(model)[1], expected)
