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
STORED = pytest.mark.parametrize("kind", [None, *quant.KINDS])  # None: as nn.Linear


def toy_model(kind=None, **changes):
    torch.manual_seed(0)
    small = {"qlora_rank": 4, "qlora_alpha": 8.0}
    model = GPT(toy_config(d_model=D, n_layers=6, block_size=2, **small | changes))
    for layer in model.h.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # larger than GPT-2's, so that the layers have a say
    for block in (0, 1) if kind else ():
        quant.freeze_block(model, block, kind)
    return model


def randomize(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = 0.02 * torch.randn(p.shape, generator=generator)
    return parameters


def adapt(model, exit_k):
    lora.add_adapters(model, exit_k, range(2 * exit_k))  # as if trained
    return randomize(lora.adapter_parameters(model, exit_k).values(), exit_k)


def read(model):
    """What each exit computes."""
    with torch.no_grad():
        return [model.hidden(IDX, exit_k) for exit_k in range(3)]


@STORED
def test_a_new_adapter_is_the_identity(kind):
    for autocast in (False, True):
        model = toy_model(kind, qlora_rank=8, qlora_alpha=16.0, qlora_dropout=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = read(model)
            lora.add_adapters(model, 2, range(4))
            assert all(map(torch.equal, before, read(model)))
    parameters = lora.adapter_parameters(model, 2).values()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    assert sum(p.numel() for p in parameters) == 4 * 8 * (D + 3 * D + D + D + D + 4 * D + 4 * D + D)
    assert not any("lora_" in name for name in model.block_parameters(0))
    A = math.sqrt(D) * model.h[0].attn.c_attn.lora_A["2"].detach()  # uniform in [-1, 1]
    assert A.abs().max() <= 1 and float(A.std()) == pytest.approx(1 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("kind", [None, "fp16", "int4"])
def test_exits_are_independent_bit_for_bit(kind):
    model = toy_model(kind)
    plain = read(model)
    first = adapt(model, 1)
    one = read(model)
    assert [*map(torch.equal, one, plain)] == [True, False, True]
    adapt(model, 2)
    both = read(model)
    assert [*map(torch.equal, both, one)] == [True, True, False]
    randomize(first, 3)
    assert [*map(torch.equal, read(model), both)] == [True, False, True]


def test_two_mistakes_are_refused():
    model = toy_model()
    lora.add_adapters(model, 1, [1, 4])
    with pytest.raises(ValueError, match="exit 1 has an adapter"):
        lora.add_adapters(model, 1, [1])
    with pytest.raises(ValueError, match="rank 0"):
        lora.LoRALinear(nn.Linear(2, 2), 0, 1)


@STORED
def test_the_formula_its_gradients_and_dropout_on_the_adapter_alone(kind):
    torch.manual_seed(12)
    base = nn.Linear(D, 24)
    base = base if kind is None else quant.QuantLinear(base, kind)
    layer = lora.LoRALinear(base, rank=4, alpha=12, dropout=0.5).eval()
    layer.add(1)
    A, B = layer.lora_A["1"], layer.lora_B["1"]
    B.data.normal_(std=0.02)
    assert torch.equal(layer(X), base(X))  # none acts
    layer.active_exit = 1
    # one unit in the last place of bf16 is 2**-7 of the sum, 2**-8 on average
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-6)):
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, out = layer(x), base(x)
        expected = out.float() + 12 / 4 * (x @ A.T) @ B.T
        assert y.dtype == out.dtype == dtype and (expected - out).std() > 0.03
        ours = torch.autograd.grad(y.float().square().sum(), (x, A, B))
        theirs = torch.autograd.grad(expected.square().sum(), (x, A, B))
        for a, b in ((y.float(), expected), *zip(ours, theirs)):
            assert a.dtype == torch.float32 and (a - b).norm() < tolerance * b.norm()
    assert not any(p.requires_grad for p in base.parameters())
    assert not torch.equal(layer.train()(X), layer(X))
    B.data.zero_()
    assert torch.equal(layer(X), base(X))


@STORED
def test_merge_equals_the_adapters(kind):
    model = toy_model(kind).eval()
    adapt(model, 1)
    adapt(model, 2)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for exit_k, expected in enumerate(read(model)):
        merged = lora.merge(model, exit_k)
        assert not {lora.LoRALinear, quant.QuantLinear} & {type(m) for m in merged.modules()}
        got = read(merged)
        torch.testing.assert_close(got[exit_k], expected, atol=2e-5, rtol=1e-5)
        other = 1 if exit_k == 2 else 2  # its adapters are gone
        assert not torch.equal(got[other], read(model)[other])
    for name, tensor in model.train().eval().state_dict().items():
        assert torch.equal(tensor, state.pop(name))  # a copy, no side effect
