"""How weights are stored in memory: fp32, fp16, int4 or nf4.

A frozen weight is kept as codes and turned into the compute type for each product. The 4-bit kinds
cut each row of W (out, in) into groups of 64 and give every group its own scale:

    int4  4.5 bits/weight    w ~ scale * code + zero, code in 0..15, scale and zero in fp16
    nf4   4.127 bits/weight  w ~ absmax * LEVELS[code]: each of the 16 levels stands for an equal
                             share of a Gaussian, and absmax itself is stored in 8 bits (QLoRA,
                             arXiv 2305.14314, section 3: NormalFloat and double quantization)

Read from top to bottom: `QuantTensor` and its `dequantize`, `quantize`, `QuantLinear` (and
`_Product`, where a weight is expanded for the forward and again for the backward pass),
`freeze_block`.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data_loader import UserError
from model import product_dtype

KINDS = {"fp32": 4, "fp16": 2, "int4": 4.5 / 8, "nf4": 4.127 / 8}  # bytes of a weight

# QLoRA, appendix E: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
ABSMAX_GROUP = 256  # absmax values that share one fp32 scale in the double quantization
FLOAT8_MAX = 448.0  # of float8_e4m3fn


@dataclass(frozen=True)
class QuantTensor:
    """A weight of `shape` (out, in) as stored: codes, and the scales that give them a meaning.

    `tensors` holds, by kind:
        fp32, fp16   {kind: (out, in)}. Named after the kind, so that a strict load_state_dict
                     refuses to cast one into the other
        int4         codes (out, padded_in / 2) uint8; scale, zero (out, n_groups) fp16
        nf4          codes the same; absmax_codes (out, n_groups) uint8 (bits of a float8_e4m3fn),
                     absmax_scale (ceil(out * n_groups / 256),) fp32, absmax_center () fp32
    Byte j of a row holds code 2j in its low four bits and code 2j + 1 in its high four.
    """

    kind: str
    shape: tuple
    group_size: int
    tensors: dict

    @property
    def nbytes(self):
        """Bytes held: codes, scales and the padding of the last group in each row."""
        return sum(t.nbytes for t in self.tensors.values())

    def dequantize(self, dtype=torch.float32):
        """The dense weight (out, in) in `dtype`; read only, as it may be the storage itself."""
        if self.kind in ("fp32", "fp16"):
            weight = self.tensors[self.kind]
            if weight.device.type == "cpu" and dtype == torch.bfloat16:
                weight = weight.float()  # torch's direct fp16 -> bf16 is 4 times slower
            return weight.to(dtype)
        codes = self.tensors["codes"]
        # One look-up gives two neighbouring weights, moved as a single integer.
        pairs = _pair_table(self.kind, dtype, codes.device)
        weight = pairs.index_select(0, codes.flatten().int()).view(dtype)
        weight = weight.view(self.shape[0], -1, self.group_size)  # (out, n_groups, group_size)
        if self.kind == "int4":
            weight.mul_(self.tensors["scale"].to(dtype)[..., None])
            weight.add_(self.tensors["zero"].to(dtype)[..., None])
        else:
            weight.mul_(_absmax(self.tensors).to(dtype)[..., None])
        return weight.view(self.shape[0], -1)[:, : self.shape[1]]  # (out, in)


def quantize(weight, kind, group_size=64):
    """Store `weight` (out, in) as `kind`; groups of `group_size` (even) run along the input.

    Codes are chosen against the scales as stored, after their own rounding. A row that is no
    multiple of the group is padded by repeating its last weight. fp16 scales have an absolute
    floor: int4 weights of tiny groups (range below 1e-6) are off by up to 5e-7. The work is done on
    the CPU, as a GPU's division may differ in the last bit: what is stored is the same everywhere.
    ValueError where the weight is not finite, or too large for the kind.
    """
    if kind not in KINDS:
        raise ValueError(f"quantization_type {kind!r}: choose one of {', '.join(KINDS)}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"a weight has shape (out, in), not {tuple(weight.shape)}")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size {group_size}: two codes share a byte, so it must be even")
    device, weight = weight.device, weight.detach().float().cpu()
    shape = tuple(weight.shape)
    n_bad = weight.numel() - int(torch.isfinite(weight).sum())
    if n_bad:
        raise ValueError(f"weight {shape} has {n_bad} values that are not finite")
    group_size = min(group_size, shape[1] + shape[1] % 2)
    if kind in ("fp32", "fp16"):
        dtype = torch.float32 if kind == "fp32" else torch.float16
        tensors = {kind: weight.to(dtype, copy=True).contiguous()}
    else:
        padded = F.pad(weight, (0, -shape[1] % group_size), mode="replicate")
        groups = padded.reshape(shape[0], -1, group_size)  # (out, n_groups, group_size)
        codes, tensors = _to_int4(groups) if kind == "int4" else _to_nf4(groups)
        codes = codes.to(torch.uint8).view(shape[0], -1)  # (out, padded_in)
        tensors = {"codes": codes[:, 0::2] | (codes[:, 1::2] << 4), **tensors}
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    stored = QuantTensor(kind, shape, group_size, tensors)
    if not torch.isfinite(stored.dequantize()).all():
        largest = float(weight.abs().max())
        raise ValueError(f"weight {shape} has values up to {largest:.3g}, too large for {kind}")
    return stored


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
    tensors = {"absmax_codes": codes.view(absmax.shape), "absmax_scale": scale}
    tensors["absmax_center"] = center
    stored = _absmax(tensors).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    levels = torch.tensor(NF4_LEVELS)
    return torch.bucketize(groups / stored, (levels[1:] + levels[:-1]) / 2), tensors


def _absmax(tensors):
    """Undo the double quantization: the (out, n_groups) fp32 scales of an nf4 weight."""
    codes = tensors["absmax_codes"].view(torch.float8_e4m3fn).float()
    scale = tensors["absmax_scale"].repeat_interleave(ABSMAX_GROUP)[: codes.numel()]
    # A group far below the center may come out just under zero, which would flip its signs.
    return (codes * scale.view(codes.shape) + tensors["absmax_center"]).clamp(min=0)


@functools.lru_cache
def _pair_table(kind, dtype, device):
    """For each of the 256 bytes its two levels in `dtype`, seen as one integer: (256,)."""
    levels = torch.tensor(NF4_LEVELS) if kind == "nf4" else torch.arange(16.0)
    byte = torch.arange(256)
    pairs = levels[torch.stack([byte & 15, byte >> 4], dim=1)].to(dtype)  # (256, 2)
    both = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    return pairs.view(both).flatten().to(device)


class _Product(torch.autograd.Function):
    """x W^T + b, with W made from its codes in forward and once more in backward.

    The graph holds the codes, which the layer owns anyway: no dense weight, and no x, since a
    frozen weight needs no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.weight, ctx.dtype, ctx.x_dtype = weight, dtype, x.dtype
        bias = None if bias is None else bias.to(dtype)
        return F.linear(x.to(dtype), weight.dequantize(dtype), bias)  # (..., out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x = grad.to(ctx.dtype) @ ctx.weight.dequantize(ctx.dtype)  # (..., in)
        return grad_x.to(ctx.x_dtype), None, None, None


class QuantLinear(nn.Module):
    """A frozen nn.Linear that keeps codes and scales (buffers) and no dense weight.

    The product runs in the compute type: autocast's where it is on, else x's own.
    """

    def __init__(self, weight, bias=None):
        """weight: a QuantTensor (out, in); bias: fp32 (out,) or None."""
        super().__init__()
        self.kind, self.group_size = weight.kind, weight.group_size
        self.out_features, self.in_features = weight.shape
        self.tensor_names = tuple(weight.tensors)
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def from_linear(cls, linear, kind, group_size=64):
        """Quantize an nn.Linear. ValueError as in `quantize`, and for a bias that is not finite."""
        if linear.bias is not None and not torch.isfinite(linear.bias).all():
            raise ValueError(f"bias {tuple(linear.bias.shape)} has values that are not finite")
        return cls(quantize(linear.weight, kind, group_size), linear.bias)

    @property
    def weight(self):
        """The QuantTensor over this layer's buffers (no copy)."""
        tensors = {name: self._buffers[name] for name in self.tensor_names}
        shape = (self.out_features, self.in_features)
        return QuantTensor(self.kind, shape, self.group_size, tensors)

    def dequantize(self, dtype=torch.float32):
        return self.weight.dequantize(dtype)

    def forward(self, x):
        """x (..., in) -> (..., out) in the compute type."""
        return _Product.apply(x, self.weight, self.bias, product_dtype(x))


def dense(weight, bias):
    """A frozen nn.Linear that holds these tensors."""
    linear = nn.Linear(*reversed(weight.shape), device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def convert_(module, kind):
    """Freeze `module` in place and store every nn.Linear inside it as `kind`. Returns the module.

    LayerNorms and biases stay fp32. ValueError names a layer that cannot be stored, and leaves the
    module as it was.
    """
    stored = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            try:
                stored[name] = QuantLinear.from_linear(child, kind)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    for name, layer in stored.items():
        module.set_submodule(name, layer)
    return module.requires_grad_(False)


def freeze_block(model, block, kind):
    """Convert a finished block of a model.GPT in place: its linears to `kind`, the rest frozen.

    With block 0 the embeddings go too: fp16, or fp32 where `kind` is fp32. UserError where weights
    are too large for `kind`.
    """
    size = model.config.block_size
    for layer in model.h[block * size : (block + 1) * size]:
        try:
            convert_(layer, kind).eval()
        except ValueError as error:
            raise UserError(f"block {block}: {error}; choose another storage") from None
    model.exit_norms[block].requires_grad_(False)
    if block == 0:
        for embedding in (model.wte, model.wpe):
            weight = embedding.weight.detach()
            weight = weight if kind == "fp32" else weight.half()
            if not torch.isfinite(weight).all():
                raise UserError("the embeddings have values too large for fp16; choose fp32")
            embedding.weight = nn.Parameter(weight, requires_grad=False)
