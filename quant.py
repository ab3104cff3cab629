"""How weights are stored in memory: fp32, fp16, int4 or nf4.

A frozen weight is kept as codes and turned into the compute type for each product. The 4-bit kinds
cut each row of W (out, in) into groups of 64 and give every group its own scale:

    int4  4.5 bits/weight    w ~ scale * code + zero, code in 0..15, scale and zero (the group's
                             smallest weight) in fp16
    nf4   4.127 bits/weight  w ~ absmax * NF4_LEVELS[code]: each of 16 levels stands for an equal
                             share of a Gaussian, and absmax itself is stored in 8 bits (QLoRA,
                             arXiv 2305.14314, section 3: NormalFloat and double quantization)

Read from top to bottom: `quantize`, a weight as codes and scales; `QuantLinear`, which keeps them,
and its `dequantize`; `_Product`, where a weight is expanded for the forward pass and once more for
the backward pass; `freeze_block` and `expand`, which store a model's block and make it dense again.
"""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from data_loader import UserError
from model import compute_type, product_dtype

KINDS = ("fp32", "fp16", "int4", "nf4")
GROUP = 64  # weights of a row that share a scale

# QLoRA, appendix E: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
ABSMAX_GROUP = 256  # absmax values that share one fp32 scale in the double quantization
FLOAT8_MAX = 448.0  # of float8_e4m3fn


def quantize(weight, kind):
    """Store `weight` (out, in) as `kind`. -> {name: tensor}, by kind:

        fp32, fp16   codes (out, in), the weight itself in that type
        int4         codes (out, padded_in / 2) uint8; scale, zero (out, n_groups) fp16
        nf4          codes the same; absmax_codes (out, n_groups) uint8 (bits of a float8_e4m3fn),
                     absmax_scale (ceil(out * n_groups / 256),) fp32, absmax_center () fp32

    Byte j of a row holds code 2j in its low four bits and code 2j + 1 in its high four. Groups run
    along the input; a row that is no multiple of the group is padded by repeating its last weight.
    Codes are chosen against the scales as stored, after their own rounding. fp16 scales have an
    absolute floor: int4 weights of tiny groups (range below 1e-6) are off by up to 5e-7. The work
    is done on the CPU, as a GPU's division may differ in the last bit: what is stored is the same
    everywhere. ValueError where the weight is not finite, or for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"quantization_type {kind!r}: choose one of {', '.join(KINDS)}")
    weight = weight.detach().float().cpu()
    if not torch.isfinite(weight).all():
        raise ValueError(f"weight {tuple(weight.shape)} has values that are not finite")
    if kind in ("fp32", "fp16"):
        dtype = torch.float32 if kind == "fp32" else torch.float16
        return {"codes": weight.to(dtype, copy=True).contiguous()}
    group = group_size(weight.size(1))
    padded = F.pad(weight, (0, -weight.size(1) % group), mode="replicate")
    groups = padded.reshape(len(weight), -1, group)  # (out, n_groups, group)
    codes, scales = _to_int4(groups) if kind == "int4" else _to_nf4(groups)
    codes = codes.to(torch.uint8).view(len(weight), -1)  # (out, padded_in)
    return {"codes": codes[:, 0::2] | (codes[:, 1::2] << 4), **scales}


def group_size(n_inputs):
    """GROUP, or the whole row where it is shorter; even, as two codes share a byte."""
    return min(GROUP, n_inputs + n_inputs % 2)


def _to_int4(groups):
    """Asymmetric: code 0 is the group's smallest weight (`zero`), code 15 its largest."""
    low, high = groups.amin(-1), groups.amax(-1)  # (out, n_groups)
    # 2**-24 is fp16's smallest number: a constant group must not divide by zero.
    scale = ((high - low) / 15).clamp(min=2.0**-24).half()
    zero = low.half()
    codes = (groups - zero.float()[..., None]) / scale.float()[..., None]
    return codes.round().clamp(0, 15), {"scale": scale, "zero": zero}


def _to_nf4(groups):
    """The nearest of the 16 levels, in units of the group's largest magnitude as stored."""
    absmax = groups.abs().amax(-1)  # (out, n_groups)
    # The paper subtracts the mean. The median is as good for Gaussian weights, and one outlying
    # group cannot shift it away from all the others (a weight of 1e6 sigma: 20 dB against 7).
    center = absmax.median()
    deviation = (absmax - center).flatten()
    split = deviation.split(ABSMAX_GROUP)
    scale = torch.stack([part.abs().amax() for part in split]) / FLOAT8_MAX
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # all groups may be equal
    codes = deviation / scale.repeat_interleave(ABSMAX_GROUP)[: len(deviation)]
    codes = codes.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.view(absmax.shape)
    stored = _absmax(codes, scale, center).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    scales = {"absmax_codes": codes, "absmax_scale": scale, "absmax_center": center}
    levels = torch.tensor(NF4_LEVELS)
    return torch.bucketize(groups / stored, (levels[1:] + levels[:-1]) / 2), scales


# What the 256 codes of float8_e4m3fn stand for, for a device that has no such type.
FLOAT8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _absmax(codes, scale, center):
    """Undo the double quantization: the (out, n_groups) fp32 scales of an nf4 weight."""
    if codes.device.type == "mps":
        codes = FLOAT8.to(codes.device)[codes.long()]
    else:
        codes = codes.view(torch.float8_e4m3fn).float()
    scale = scale.repeat_interleave(ABSMAX_GROUP)[: codes.numel()]
    # A group far below the center may come out just under zero, which would flip its signs.
    return (codes * scale.view(codes.shape) + center).clamp(min=0)


@torch.compiler.assume_constant_result  # torch.compile takes the table as it is
def _pair_table(kind, dtype, device):
    """For each of the 256 bytes its two levels in `dtype`, seen as one integer: (256,)."""
    return _make_pair_table(kind, dtype, device)


@functools.lru_cache
def _make_pair_table(kind, dtype, device):
    levels = torch.tensor(NF4_LEVELS) if kind == "nf4" else torch.arange(16.0)
    byte = torch.arange(256)
    pairs = levels[torch.stack([byte & 15, byte >> 4], dim=1)].to(dtype)  # (256, 2)
    both = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    return pairs.view(both).flatten().to(device)


class _Product(torch.autograd.Function):
    """x W^T + b, with W made from its codes in forward and once more in backward.

    The graph holds the layer, which the model owns anyway: no dense weight, and no x, since a
    frozen weight needs no gradient.
    """

    @staticmethod
    def forward(ctx, x, layer, dtype):
        ctx.layer, ctx.dtype, ctx.x_dtype = layer, dtype, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x.to(dtype), layer.dequantize(dtype), bias)  # (..., out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x = grad.to(ctx.dtype) @ ctx.layer.dequantize(ctx.dtype)  # (..., in)
        return grad_x.to(ctx.x_dtype), None, None


class QuantLinear(nn.Module):
    """A frozen nn.Linear whose weight is stored as `kind`: codes and scales (see `quantize`) as
    buffers, the bias in fp32, and no dense weight.

    The product runs in the compute type: autocast's where it is on, else x's own. ValueError where
    the linear is not finite, or its weights are too large for the kind.
    """

    def __init__(self, linear, kind):
        super().__init__()
        self.kind = kind
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in quantize(linear.weight, kind).items():
            self.register_buffer(name, tensor.to(linear.weight.device))
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        if not all(t.isfinite().all() for t in (self.dequantize(), *self.buffers())):
            largest = float(linear.weight.detach().abs().max())
            raise ValueError(f"weights up to {largest:.3g} do not fit into {kind}, or the bias is "
                             "not finite")

    @property
    def nbytes(self):
        """Bytes of the weight as held: codes, scales, and the padding of each row's last group."""
        return sum(buffer.nbytes for name, buffer in self.named_buffers() if name != "bias")

    def dequantize(self, dtype=torch.float32):
        """The dense weight (out, in) in `dtype`; read only, as it may be the storage itself."""
        if self.kind in ("fp32", "fp16"):
            weight = self.codes
            if weight.device.type == "cpu" and dtype == torch.bfloat16:
                weight = weight.float()  # torch's direct fp16 -> bf16 is 4 times slower
            return weight.to(dtype)
        # One look-up gives two neighbouring weights, moved as a single integer.
        pairs = _pair_table(self.kind, dtype, self.codes.device)
        weight = pairs.index_select(0, self.codes.flatten().int()).view(dtype)
        weight = weight.view(self.out_features, -1, group_size(self.in_features))
        if self.kind == "int4":  # (out, n_groups, group)
            weight.mul_(self.scale.to(dtype)[..., None])
            weight.add_(self.zero.to(dtype)[..., None])
        else:
            absmax = _absmax(self.absmax_codes, self.absmax_scale, self.absmax_center)
            weight.mul_(absmax.to(dtype)[..., None])
        return weight.view(self.out_features, -1)[:, : self.in_features]  # (out, in)

    def forward(self, x):
        """x (..., in) -> (..., out) in the compute type."""
        return _Product.apply(x, self, product_dtype(x))


def freeze_block(model, block, kind):
    """Convert a finished block of a model.GPT in place: its linears to `kind`, the rest frozen.

    LayerNorms and biases stay fp32. With block 0 the embeddings go too: fp16, or fp32 where `kind`
    is fp32. UserError names a layer that is not finite or too large for `kind`.
    """
    size = model.config.block_size
    for i in range(block * size, (block + 1) * size):
        for name, child in [*model.h[i].named_modules()]:
            if isinstance(child, nn.Linear):
                try:
                    model.h[i].set_submodule(name, QuantLinear(child, kind))
                except ValueError as error:
                    raise UserError(f"h.{i}.{name}: {error}; begin again with another "
                                    "quantization_type") from None
        model.h[i].requires_grad_(False).eval()
    model.exit_norms[block].requires_grad_(False)
    if block == 0:
        for embedding in (model.wte, model.wpe):
            embedding.requires_grad_(False).to(torch.float32 if kind == "fp32" else torch.float16)
            if not embedding.weight.isfinite().all():
                raise UserError("the embeddings have values too large for fp16; choose fp32")


def expand(model, dtype=None):
    """A copy of a model for many passes over single rows, with the same figures to the last bit.

    Stored linears become dense ones in `dtype` (None: the model's compute type) and the head's
    weight is converted once: codes save memory, but every pass would expand them again.
    """
    dtype = dtype or compute_type(model.wte.weight.device, model.config.compute_type)
    model = copy.deepcopy(model).eval()
    for name, module in [*model.named_modules()]:
        if isinstance(module, QuantLinear):
            model.set_submodule(name, dense(module.dequantize(dtype), module.bias.to(dtype)))
    model.head_weight = model.wte.weight.detach().to(dtype)
    return model


def dense(weight, bias):
    """A frozen nn.Linear that holds these tensors."""
    linear = nn.Linear(*reversed(weight.shape), device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
