"""Weights as codes, against their formulas, measured noise and the dense layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import toy_config
from torch import nn

import quant
from data_loader import UserError
from model import GPT
from quant import KINDS, QuantLinear, quantize

EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def snr_db(weight, back):
    """Signal to noise of a weight that was stored and read back, in dB."""
    weight, back = weight.double(), back.double()
    return 10 * math.log10(weight.square().sum() / (weight - back).square().sum())


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_codes_unpack_to_the_levels_they_were_packed_from(kind):
    """Rebuild every weight from its code by the formula, in float64; odd sizes too."""
    shapes = [(1, 1), (3, 5), (2, 64), (7, 65), (5, 127), (4, 200), (300, 70)]
    for shape, group_size in [(shape, size) for shape in shapes for size in (2, 32, 64)]:
        weight = normal(*shape, seed=1)
        stored = quantize(weight, kind, group_size)
        byte = stored.tensors["codes"].long()
        codes = torch.empty(byte.shape[0], 2 * byte.shape[1], dtype=torch.long)
        codes[:, 0::2], codes[:, 1::2] = byte % 16, byte // 16
        group = torch.arange(codes.shape[1]) // stored.group_size
        if kind == "int4":
            scale, zero = (stored.tensors[n].double()[:, group] for n in ("scale", "zero"))
            expected = scale * codes + zero
        else:
            absmax = quant._absmax(stored.tensors).double()[:, group]
            expected = absmax * torch.tensor(quant.NF4_LEVELS).double()[codes]
        back = stored.dequantize(torch.float64)
        assert back.shape == shape
        assert torch.equal(back, expected[:, : shape[1]])
        if kind == "int4":  # half a step, and fp16's rounding of the scale (2**-11) over 15 steps
            bound = 0.52 * scale[:, : shape[1]] + 2e-3
            assert ((weight.double() - back).abs() <= bound).all()


def test_every_code_survives_in_both_halves_of_a_byte():
    """A row with all 256 pairs of codes, on the exact grid, comes back exactly."""
    pairs = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    weight = torch.cat([torch.tensor([0.0, 15.0]), pairs.flatten()])[None]
    assert torch.equal(quantize(weight, "int4", 1024).dequantize(), weight)
    levels = torch.tensor(quant.NF4_LEVELS)[pairs.long()].flatten()[None]
    assert torch.equal(quantize(levels, "nf4", 1024).dequantize(), levels)


# Measured over 12 seeds at this size (mean, standard deviation): int4 20.953 +- 0.012 dB, nf4
# 20.727 +- 0.009. Straight to bf16 (8 bits) costs another 0.026 +- 0.001 and 0.008 +- 0.001.
@pytest.mark.parametrize("kind, least", [("int4", 20.91), ("nf4", 20.69)])
def test_signal_to_noise_on_gaussian_weights(kind, least):
    weight = 0.02 * normal(768, 768, seed=3)
    stored = quantize(weight, kind)
    assert least < snr_db(weight, stored.dequantize()) < least + 0.08
    assert snr_db(weight, stored.dequantize(torch.bfloat16)) > least - 0.03


def test_bytes_are_counted_as_they_are_held():
    weight = normal(768, 3072)
    bits = {kind: 8 * quantize(weight, kind).nbytes / weight.numel() for kind in KINDS}
    assert (bits["fp32"], bits["fp16"], bits["int4"]) == (32, 16, 4.5)
    # 4 + 8 / 64 + 32 / (64 * 256), and one fp32 center for the whole matrix
    assert bits["nf4"] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / (768 * 3072), abs=1e-9)
    for kind in KINDS:
        linear = nn.Linear(70, 9)
        layer = QuantLinear.from_linear(linear, kind)
        buffers = [b for name, b in layer.named_buffers() if name != "bias"]
        held = sum(b.numel() * b.element_size() for b in buffers)
        assert layer.weight.nbytes == quantize(linear.weight, kind).nbytes == held
        # No buffer is a view into something larger, and none shares the linear's weight.
        assert sum(b.untyped_storage().nbytes() for b in buffers) == held
        assert linear.weight.data_ptr() not in [b.data_ptr() for b in buffers]
        assert not list(layer.parameters())


@EACH_KIND
def test_zero_and_constant_groups(kind):
    weight = normal(4, 256, seed=4)
    weight[0] = 0
    weight[1, 64:128] = 0
    weight[2, :64] = 0.375
    weight[3, :64] = -0.7
    back = quantize(weight, kind).dequantize()
    assert (back[0] == 0).all() and (back[1, 64:128] == 0).all()
    # nf4 keeps a constant to 8 bits of absmax: float8's step is 1/16 of the distance to the center
    tolerance = 0.2 if kind == "nf4" else 1e-3
    assert (back[2, :64] - 0.375).abs().max() < tolerance
    assert (back[3, :64] + 0.7).abs().max() < tolerance
    for value in (0.0, -0.0, 0.375, -3.0, 1e-3):
        constant = torch.full((3, 100), value)
        stored = quantize(constant, kind)
        assert kind != "int4" or (stored.tensors["scale"] > 0).all()  # 0 / 0 has no code
        torch.testing.assert_close(stored.dequantize(), constant, rtol=1e-3, atol=0)


def test_tiny_weights():
    weight = normal(8, 128, seed=5)
    for scale in (1e-6, 1e-8, 1e-30, 1e-44):
        small = weight * scale
        for kind in KINDS:
            error = (quantize(small, kind).dequantize() - small).abs().max()
            # fp16 has nothing below 2**-24, which int4's scale and zero inherit (docstring)
            floor = {"fp32": 0, "fp16": 2.0**-25, "int4": 5e-7, "nf4": 1.2e-38}[kind]
            relative = 0.17 if kind == "nf4" else 0  # half of its widest gap, and absmax's rounding
            assert error <= floor + relative * small.abs().max(), (kind, scale)
    assert snr_db(weight * 1e-30, quantize(weight * 1e-30, "nf4").dequantize()) > 20


def test_small_groups_beside_large_ones_keep_their_signs():
    """nf4 stores absmax by its distance to a center, rounded: it must not come out below zero."""
    for largest in torch.linspace(3, 12, 50):
        weight = normal(8, 256, seed=4)
        weight[0, :64] *= 1e-3
        weight[1, 0] = largest
        assert (quantize(weight, "nf4").dequantize() * weight >= 0).all(), largest


def test_one_outlier_leaves_the_other_groups_alone():
    """Over 12 seeds: int4 20.97 +- 0.05 dB, nf4 20.74 +- 0.05 and, at 1e6, 19.77 +- 0.09. Had its
    center been the mean, 1e6 would leave 7 dB."""
    for kind, value, least in (("int4", 1e4, 20.75), ("nf4", 1e4, 20.5), ("nf4", 1e6, 19)):
        weight = normal(64, 256, seed=6)
        weight[3, 70] = value
        rest = [i for i in range(64) if i != 3]
        assert snr_db(weight[rest], quantize(weight, kind).dequantize()[rest]) > least, kind


def test_huge_weights_are_kept_or_refused_by_name():
    weight = normal(4, 64, seed=10) * 1e5
    for kind in ("fp16", "int4"):
        with pytest.raises(ValueError, match=f"too large for {kind}"):
            quantize(weight, kind)
    # Over 12 seeds 20.96 +- 0.23 dB.
    assert snr_db(weight * 1e30, quantize(weight * 1e30, "nf4").dequantize()) > 20
    with pytest.raises(ValueError, match="too large for int4"):
        quantize(torch.tensor([[-3.4e38, 3.4e38], [1.0, 2.0]]), "int4")
    assert (quantize(torch.full((1, 64), 65504.0), "int4").dequantize() == 65504).all()


@EACH_KIND
def test_non_finite_weights_are_refused_and_the_layer_is_named(kind):
    for value in (math.nan, math.inf, -math.inf):
        module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))
        module[1][0].weight.data[1, 2] = value
        with pytest.raises(ValueError, match=r"1\.0: weight \(4, 8\) has 1 values"):
            quant.convert_(module, kind)
        assert isinstance(module[0], nn.Linear)  # nothing was converted
        module[1][0].weight.data.zero_()
        module[1][0].bias.data[0] = value
        with pytest.raises(ValueError, match=r"1\.0: bias \(4,\)"):
            quant.convert_(module, kind)


def test_bad_arguments():
    with pytest.raises(ValueError, match="int8.*choose one of fp32, fp16, int4, nf4"):
        quantize(torch.zeros(2, 2), "int8")
    with pytest.raises(ValueError, match="group_size 5"):
        quantize(torch.zeros(2, 2), "int4", 5)
    for shape in ((2,), (0, 2)):
        with pytest.raises(ValueError, match="shape"):
            quantize(torch.zeros(shape), "int4")


@EACH_KIND
def test_gradient_equals_the_dense_layers_in_float64(kind):
    torch.manual_seed(7)
    for bias in (True, False):
        layer = QuantLinear.from_linear(nn.Linear(13, 6, bias=bias), kind, group_size=4)
        x = torch.randn(2, 3, 13, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))
        dense = layer.dequantize(torch.float64)
        expected = F.linear(x, dense, layer.bias.double() if bias else None)
        assert torch.equal(layer(x), expected)
        grad = torch.randn_like(expected)
        torch.testing.assert_close(torch.autograd.grad(layer(x), x, grad)[0], grad @ dense)


@EACH_KIND
def test_the_compute_type_is_autocasts_or_that_of_x(kind):
    torch.manual_seed(8)
    linear = nn.Linear(128, 32)
    layer = QuantLinear.from_linear(linear, kind)
    x = torch.randn(4, 128, requires_grad=True)
    # Largest difference in bf16 over 12 seeds, int4: 0.010 on average, 0.013 at most.
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-6)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, reference = layer(x), F.linear(x, layer.dequantize(), linear.bias)
        assert y.dtype == reference.dtype == dtype
        torch.testing.assert_close(y, reference, atol=tolerance, rtol=1e-2)
        x.grad = None
        y.float().square().sum().backward()
        assert x.grad.dtype == torch.float32
        exact = 2 * y.detach().float() @ layer.dequantize()
        assert (x.grad - exact).norm() < tolerance * exact.norm()


@EACH_KIND
def test_the_graph_keeps_neither_dense_weight_nor_input(kind):
    """Walk the whole graph behind y: no tensor in it but the layer's own buffers."""
    layer = QuantLinear.from_linear(nn.Linear(128, 64), kind)
    x = torch.randn(16, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert saved == []
    own = {b.data_ptr() for b in layer.buffers()}
    function = y.grad_fn
    while type(function).__name__ != "_ProductBackward":  # reshapes in front of it
        function = function.next_functions[0][0]
    assert not any(isinstance(v, torch.Tensor) for v in vars(function).values())
    assert {t.data_ptr() for t in function.weight.tensors.values()} <= own


@EACH_KIND
def test_convert_freezes_and_state_dict_round_trips(kind):
    torch.manual_seed(9)

    def module():
        inner = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 10))
        return nn.Sequential(inner, nn.Linear(10, 3, bias=False))

    first, second = quant.convert_(module(), kind), quant.convert_(module(), kind)
    assert sum(isinstance(m, QuantLinear) for m in first.modules()) == 3
    assert not any(isinstance(m, nn.Linear) for m in first.modules())
    assert not any(p.requires_grad for p in first.parameters())
    assert first[0][0].weight.dtype == torch.float32
    x = torch.randn(2, 10)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    for other in KINDS:
        if other != kind:  # never cast one into the other
            with pytest.raises(RuntimeError, match="state_dict"):
                quant.convert_(module(), other).load_state_dict(first.state_dict())


@EACH_KIND
def test_a_finished_block_of_a_gpt_is_frozen_and_the_others_train_on(kind):
    torch.manual_seed(10)
    model, plain = GPT(toy_config()).train(), GPT(toy_config())
    plain.load_state_dict(model.state_dict())
    quant.freeze_block(model, 0, kind)
    embeddings = torch.float32 if kind == "fp32" else torch.float16
    assert model.wte.weight.dtype == model.wpe.weight.dtype == embeddings
    assert model.h[0].mlp.c_fc.kind == kind and not model.h[0].training
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == set(plain.block_parameters(1)) | set(plain.block_parameters(2))
    assert model.h[1].training
    idx = torch.arange(16)[None]
    error = (model(idx) - plain(idx))[..., :257].abs().max()
    # Logits of deviation 0.12. Over 8 seeds: fp16 1.4e-4 +- 2e-5, int4 and nf4 0.013 +- 0.0015.
    least, most = {"fp32": (0, 0), "fp16": (1e-5, 3e-4)}.get(kind, (0.005, 0.02))
    assert least <= error <= most
    quant.freeze_block(model, 1, kind)
    assert model.wte.weight.dtype == embeddings and model.h[2].mlp.c_fc.weight.requires_grad


def test_embeddings_too_large_for_fp16_are_refused():
    model = GPT(toy_config())
    model.wte.weight.data[3, 2] = 1e5
    with pytest.raises(UserError, match="embeddings have values too large"):
        quant.freeze_block(model, 0, "int4")
