"""Adapters: a low-rank correction to a frozen linear layer, one for each exit (LoRA, 2106.09685).

    W x  becomes  W x + (alpha / rank) B A x,    A (rank, in), B (out, rank)

A starts random and B zero, so a new adapter changes nothing (LoRA, section 4.1). With W in four
bits this is QLoRA (arXiv 2305.14314, equation 5). Adapters k belong to exit k: they are trained
with block k and act only while exit k is read, so that no later stage changes an earlier exit.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import product_dtype
from quant import QuantLinear, dense, expand


class LoRALinear(nn.Module):
    """A frozen linear layer and, for each exit that has one, a pair (A, B).

    base: nn.Linear or QuantLinear, frozen here; rank; alpha: the correction is scaled by
    alpha / rank; dropout: on the adapter's input. `active_exit` says whose adapters act;
    `GPT.choose_adapters` sets it. Where that exit has none, the output is base(x), bit for bit.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank}: an adapter needs at least 1")
        self.base = base.requires_grad_(False)
        self.rank, self.scale = rank, alpha / rank
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.ParameterDict()  # {exit_k: (rank, in)}
        self.lora_B = nn.ParameterDict()  # {exit_k: (out, rank)}
        self.active_exit = None

    def add(self, exit_k, generator=None):
        """Give `exit_k` an adapter, fp32; A is drawn on the CPU, the same for every device."""
        if str(exit_k) in self.lora_A:
            raise ValueError(f"exit {exit_k} has an adapter here already")
        device = next(t for t in (*self.base.parameters(), *self.base.buffers())).device
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_ with a = sqrt(5)
        A = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(self.out_features, self.rank)
        self.lora_A[str(exit_k)] = nn.Parameter(A.to(device))
        self.lora_B[str(exit_k)] = nn.Parameter(B.to(device))

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        key = str(self.active_exit)
        if key not in self.lora_A:
            return self.base(x)
        x = x.to(product_dtype(x))  # once, for both products
        A, B = self.lora_A[key].to(x.dtype), self.lora_B[key].to(x.dtype)
        # Scaled where the tensor is small. Adding in place is not allowed: base(x) may be a view
        # made inside QuantLinear's autograd function.
        return self.base(x) + F.linear(F.linear(self.dropout(x), A) * self.scale, B)


def add_adapters(model, exit_k, layers):
    """Put an adapter for `exit_k` on every linear of some layers (their numbers).

    Rank, alpha and dropout are those of model.config, the A a function of its seed and the exit;
    all is fp32 and trainable.
    """
    config = model.config
    generator = torch.Generator().manual_seed(1000 * config.seed + exit_k)
    for i in layers:
        for name, module in [*model.h[i].named_modules()]:
            if isinstance(module, (nn.Linear, QuantLinear)) and not name.endswith(".base"):
                module = LoRALinear(module, config.qlora_rank, config.qlora_alpha,
                                    config.qlora_dropout).train(model.training)
                model.h[i].set_submodule(name, module)
            if isinstance(module, LoRALinear):
                module.add(exit_k, generator)


def adapter_parameters(model, exit_k):
    """{name: parameter} of the adapters of `exit_k`."""
    ends = (f".lora_A.{exit_k}", f".lora_B.{exit_k}")
    return {name: p for name, p in model.named_parameters() if name.endswith(ends)}


def merge(model, exit_k):
    """A plain copy of `model` for reading `exit_k`, every linear dense in fp32: W, and where that
    exit has an adapter W + (alpha / rank) B A. (loralib merges in eval(); this never does.)"""
    key, merged = str(exit_k), expand(model, torch.float32)
    for name, module in [*merged.named_modules()]:
        if isinstance(module, LoRALinear):
            weight = module.base.weight
            if key in module.lora_A:
                weight = weight + module.scale * (module.lora_B[key] @ module.lora_A[key])
            merged.set_submodule(name, dense(weight, module.base.bias))
    return merged
