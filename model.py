"""GPT-2 as a mask-diffusion model: the network, the masking schedule, the loss, one reverse step.

Read from top to bottom (`ModelConfig`, the sizes, stands in data_loader.py):

1. `Attention`, `MLP`, `Layer`, `GPT`   the network of Radford et al. 2019, with one exit per block
2. `block_of`, `time_steps_of`, `corrupt`   the forward process q(x_t | x_0, m)
3. `token_weights`, `diffusion_loss`        the objective; `tied_cross_entropy` makes it fast
4. `sample_tokens`, `reverse_step`, `confident_step`   the reverse process p(x_s | x_t)
5. `read_pretrained`, `fetch_gpt2`          GPT-2 weights in and out

Letters in the shape comments: B rows, T positions (seq_len at most), d = d_model, V = rows of the
embedding (vocab_size + 1 rounded up to a multiple of 64), N = any number of scored positions.

Masked diffusion follows Sahoo et al. 2024 (MDLM, arXiv 2406.07524) and Shi et al. 2024 (MD4,
arXiv 2406.04329); keeping GPT-2's shift follows Gong et al. 2024 (DiffuGPT, arXiv 2410.17891).
"""

import contextlib
import http.client
import json
import math
import os
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_loader import (DTYPES, ModelConfig, UserError, read_tensors, write_json,
                         write_tensors)

# ---------------------------------------------------------------------------------------------
# 1. The network


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1), causal or bidirectional."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.causal = config.attention_mode == "causal"
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model)
        self.c_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x):  # (B, T, d) -> (B, T, d)
        B, T, d = x.shape
        q, k, v = (
            part.view(B, T, self.n_heads, d // self.n_heads).transpose(1, 2)
            for part in self.c_attn(x).split(d, dim=2)
        )  # each (B, n_heads, T, head_dim)
        y = attend(q, k, v, self.causal, self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))  # (B, T, d)


def attend(q, k, v, causal, dropout):
    """softmax(q k^T / sqrt(head_dim)) v; q, k, v and the result are (B, n_heads, T, head_dim)."""
    T = q.size(-2)
    if q.is_cuda or T > 512:  # the fused kernel stores no (T, T) scores
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    # On a CPU that multiplies in bf16 the plain formula takes half the time of the fused kernel at
    # T = 256; on one that does not, in fp32, 1.1 to 1.9 times as long.
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, n_heads, T, T)
    if causal:
        scores = scores + scores.new_full((T, T), -torch.inf).triu(1)
    p = torch.softmax(scores, -1, dtype=scores.dtype)  # (B, n_heads, T, T)
    return F.dropout(p, dropout) @ v  # (B, n_heads, T, head_dim)


class MLP(nn.Module):
    """Two linears with GPT-2's tanh approximation of GELU between them."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.c_proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x):  # (B, T, d) -> (B, T, d)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Layer(nn.Module):
    """One pre-LayerNorm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, d) -> (B, T, d)
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2 with an exit after every block.

    Args:
        config: ModelConfig.
        blocks: how many blocks to build now (None: all). Training begins with none and calls
            `grow()` at each stage, so that blocks not yet reached are not in memory.
    """

    def __init__(self, config, blocks=None):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = "none"
        self.head_weight = None  # wte in the compute type, where evaluation has converted it once
        self.wte = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.seq_len, config.d_model)
        self.mask_row = None  # see `add_mask_row`
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList()  # layers
        self.exit_norms = nn.ModuleList()  # exit k reads through exit_norms[k]
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for _ in range(config.total_blocks if blocks is None else blocks):
            self.grow()

    @property
    def blocks(self):
        """Number of blocks that have been built."""
        return len(self.exit_norms)

    def grow(self):
        """Append one block: its layers, freshly initialized, and its exit norm.

        Linears start as in GPT-2: normal, std 0.02, and 0.02 / sqrt(2 n_layers) where a linear
        writes into the residual stream. The new exit norm starts as a copy of the one before it.
        """
        if self.blocks == self.config.total_blocks:
            raise ValueError(f"all {self.blocks} blocks exist already")
        for _ in range(self.config.block_size):
            layer = Layer(self.config)
            for name, weight in layer.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layers))
                elif weight.dim() == 2:
                    nn.init.normal_(weight, std=0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(weight)
            self.h.append(layer.to(self.wte.weight.device))
        norm = nn.LayerNorm(self.config.d_model).to(self.wte.weight.device)
        if self.blocks:
            norm.load_state_dict(self.exit_norms[-1].state_dict())
        self.exit_norms.append(norm)

    def add_mask_row(self):
        """Make the row of [MASK], (d,), a parameter of its own beside the frozen embedding.

        Plain QLoRA trains it, as pretrained weights have no such row.
        """
        row = self.wte.weight[self.config.mask_id].detach()
        self.mask_row = nn.Parameter(row.float().clone())

    def block_parameters(self, block):
        """{name: parameter} of a block: its layers, its exit norm, at block 0 the embeddings.

        This is what a backup holds, beside the adapters that the block's exit has on earlier
        blocks. Linears that are stored already (quant.py) have no parameters and are left out.
        """
        size = self.config.block_size
        prefixes = [f"h.{i}." for i in range(block * size, (block + 1) * size)]
        prefixes += [f"exit_norms.{block}."] + (["wte.", "wpe."] if block == 0 else [])
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(tuple(prefixes)) and "lora_" not in name
        }

    def hidden(self, idx, block=None):
        """Hidden states read at an exit.

        Args:
            idx: token ids, (B, T), T <= seq_len.
            block: the exit to read (None: the last block built). Only layers up to that block run.

        Returns:
            (B, T, d); position i-1 holds the prediction of token i (GPT-2's shift).
        """
        block = self.blocks - 1 if block is None else block
        if not 0 <= block < self.blocks:
            raise ValueError(f"exit {block} does not exist; {self.blocks} blocks are built")
        if idx.size(1) > self.config.seq_len:
            raise ValueError(f"{idx.size(1)} positions, but seq_len is {self.config.seq_len}")
        for module in self.modules():
            if hasattr(module, "active_exit"):  # adapters act only when their own exit is read
                module.active_exit = block
        # Frozen embeddings may be stored in fp16; the residual stream is fp32 all the same.
        x = F.embedding(idx, self.wte.weight).float()  # (B, T, d)
        if self.mask_row is not None:
            x = torch.where((idx == self.config.mask_id)[..., None], self.mask_row, x)  # (B, T, d)
        x = self.dropout(x + self.wpe.weight[: idx.size(1)].float())  # (B, T, d)
        for layer in self.h[: (block + 1) * self.config.block_size]:
            if torch.is_grad_enabled() and self.recomputes(layer):
                x = checkpoint(layer, x, use_reentrant=False)  # (B, T, d)
            else:
                x = layer(x)  # (B, T, d)
        return self.exit_norms[block](x)  # (B, T, d)

    def recomputes(self, layer):
        """Whether the backward pass computes a layer's activations anew instead of keeping them."""
        frozen = not layer.ln_1.weight.requires_grad  # under adapters; without any, none are kept
        return self.gradient_checkpointing == "all" or (
            self.gradient_checkpointing == "frozen" and frozen)  # fmt: skip

    def head(self, hidden):
        """Logits of hidden states through the tied head: (..., d) -> (..., V).

        Ids from vocab_size up ([MASK] and the padding rows) get -inf: they are never predicted.
        """
        dtype = product_dtype(hidden)
        logits = F.linear(hidden.to(dtype), self.tied_weight().to(dtype))  # (..., V)
        c = self.config
        not_text = torch.arange(c.vocab_size, c.padded_vocab_size, device=logits.device)
        return logits.index_fill(-1, not_text, -torch.inf)

    def tied_weight(self):
        """The embedding as the head's matrix, (V, d)."""
        return self.wte.weight if self.head_weight is None else self.head_weight

    def forward(self, idx, block=None):
        """Logits (B, T, V) of token ids (B, T), read at exit `block` (None: the last)."""
        return self.head(self.hidden(idx, block))

    @classmethod
    def from_pretrained(cls, path, config=None, cache="data"):
        """A GPT with the weights of `path`; arguments, result and errors as in `read_pretrained`.

        config None: one block that owns every layer and every mask fraction.
        """
        config, tensors = read_pretrained(path, config, cache)
        model = cls(config)
        for block in range(config.total_blocks):
            model.fill_from(tensors, block)
        return model

    @torch.no_grad()
    def fill_from(self, tensors, block):
        """Fill a new block with the tensors of `read_pretrained`.

        Its exit norm starts as GPT-2's final norm; at block 0 the embeddings are filled too. The
        rows that GPT-2 does not have, [MASK] and padding, start as the mean of the text's rows.
        """
        n_text = self.config.vocab_size
        for name, parameter in self.block_parameters(block).items():
            if name == "wte.weight":
                parameter[:n_text] = tensors[name]
                parameter[n_text:] = parameter[:n_text].mean(0)
            else:
                parameter.copy_(tensors[name.replace(f"exit_norms.{block}.", "ln_f.")])

    def save_pretrained(self, path, exit_k=None, dtype=torch.float32):
        """Write exit `exit_k` (None: the last built) as a GPT-2 in Hugging Face's layout.

        Makes path/config.json and path/model.safetensors: the layers up to the exit, quantized ones
        dequantized, its norm as ln_f, and the text's rows of the embedding. The layout has no place
        for earlier exits, [MASK] or bidirectional attention. dtype: fp32, fp16 or bf16.

        UserError for adapters that are not merged, attention that is not causal, and weights that
        are not finite in `dtype`.
        """
        config, exit_k = self.config, self.blocks - 1 if exit_k is None else exit_k
        if not 0 <= exit_k < self.blocks:
            raise UserError(f"exit {exit_k} does not exist; {self.blocks} blocks are built")
        if any(hasattr(module, "active_exit") for module in self.modules()):
            raise UserError("merge the adapters first: lora.merge(model, exit).save_pretrained()")
        if config.attention_mode != "causal":
            raise UserError(f"this layout is for causal attention, not {config.attention_mode}")
        n_layers, tensors = (exit_k + 1) * config.block_size, {}
        for name, shape in pretrained_shapes(config, n_layers).items():
            where, _, part = name.rpartition(".")
            module = self.exit_norms[exit_k] if where == "ln_f" else self.get_submodule(where)
            quantized = part == "weight" and hasattr(module, "dequantize")
            tensor = module.dequantize() if quantized else getattr(module, part).detach()
            tensor = (tensor.t() if name.startswith("h.") else tensor[: shape[0]]).to(dtype)
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} has values that are not finite in {dtype}")
            tensors["transformer." + name] = tensor
        sizes = {theirs: getattr(config, ours) for theirs, ours in PRETRAINED_SIZES.items()}
        description = PRETRAINED_FIXED | sizes | {"n_layer": n_layers}
        description["architectures"] = ["GPT2LMHeadModel"]
        description |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        description |= dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1)
        folder = Path(path)
        write_tensors(folder / "model.safetensors", tensors, sealed=False)
        write_json(folder / "config.json", description)


def compute_type(device, name="auto"):
    """The type in which matrix products run (weights stay as they are stored). -> torch.dtype

    auto: bf16 where the hardware multiplies it natively, else fp16 on CUDA and fp32 elsewhere (a
    CPU without bf16 units emulates it, slower than fp32).
    """
    if name == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp16"
    elif name == "auto":
        units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = any(units.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device, dtype):
    """Context in which torch runs matrix products in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def product_dtype(x):
    """The type in which a matrix product of `x` runs: autocast's where it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


# ---------------------------------------------------------------------------------------------
# 2. The forward process: masking


def block_of(mask_fraction, config):
    """The block whose band (low, high] holds `mask_fraction`; each m in (0, 1] has exactly one."""
    for block, (low, high) in enumerate(config.block_mask_ranges):
        if low < mask_fraction <= high:
            return block
    raise ValueError(f"mask fraction {mask_fraction} is outside (0, 1]")


def time_steps_of(block, config):
    """The time steps (mask fractions) that fall into a block's band, ascending."""
    low, high = config.block_mask_ranges[block]
    return tuple(m for m in config.time_step_mask_fractions if low < m <= high)


def stratified(time_steps, n_rows, offset):
    """Mask fractions of a batch: row r takes time step (r + offset) mod n. -> (n_rows,)

    Dealt out in turn instead of drawn one by one, so that a batch holds the noise levels as equally
    as it can: the mean over rows has less variance (Kingma et al. 2021, appendix I.1).
    """
    return torch.tensor([time_steps[(r + offset) % len(time_steps)] for r in range(n_rows)])


def corrupt(x_0, mask_fraction, uniform, mask_id):
    """q(x_t | x_0, m): each position i >= 1 becomes [MASK] independently with probability m.

    Args:
        x_0: text, (B, T).
        mask_fraction: m of each row, (B,).
        uniform: numbers drawn from U[0, 1), (B, T).

    Returns:
        x_t (B, T) and the mask (B, T), True where a token was replaced. Position 0 never is.
    """
    mask = uniform < mask_fraction[:, None]  # (B, T)
    mask[:, 0] = False
    return x_0.masked_fill(mask, mask_id), mask


# ---------------------------------------------------------------------------------------------
# 3. The objective

# Why CE(m) bounds the likelihood. Let m rise from 0 to 1 while tokens are masked, and go back: from
# m to m - dm a masked token is revealed with probability dm / m, and to reveal token i as it was
# costs -log p(x_i | x_m). The costs of all steps bound -log p(x) (the ELBO; MDLM, eq. 8 to 10):
#
#     -log p(x) <= integral of  1/m E[sum over masked i of -log p(x_i | x_m)]  dm
#                = (T-1) integral of CE(m) dm,    CE(m) = E[that sum] / (m (T-1)).
#
# That is where 1/m comes from: m (T-1) is how many masks there are on average. In finitely many
# steps m_i -> m_(i-1) each mask is revealed with probability (m_i - m_(i-1)) / m_i, hence
# NELBO_12 = sum of (m_i - m_(i-1)) CE(m_i) per token, from m_0 = 0 to a last step at m = 1.
# (Token 0 is given, so it is a bound on -log p(x_1 .. x_(T-1) | x_0): T-1 tokens.)


def token_weights(mask, mask_fraction, causal):
    """Weight of each predicted position, so that a weighted sum of cross-entropies is CE(m).

    A bidirectional model needs the definition as it stands: masked positions, divided by m (T-1).
    In a causal one the hidden state i-1 never sees whether i is masked, and that is independent of
    what it does see: E[masked_i * -log p_i] = m E[-log p_i]. So m cancels, and all T-1 positions
    may be scored: the same expectation with less variance (Rao-Blackwell). m = 0 (no masks) exists
    for causal models only and is the ordinary next-token loss. Both divide by a constant, the
    expected number of masks or of scored tokens, never by the number drawn.

    Args:
        mask: (B, T), mask_fraction: (B,).

    Returns:
        (B, T-1): weights of the predictions of tokens 1 .. T-1.
    """
    n = mask.size(1) - 1
    if causal:
        return torch.full(mask[:, 1:].shape, 1.0 / n, device=mask.device)
    return mask[:, 1:] / (mask_fraction[:, None] * n)


def diffusion_loss(model, x_0, x_t, mask, mask_fraction, block, rows=None):
    """The stage loss: mean over rows of the estimate of CE(m), read at exit `block`.

    A plain mean: the weights m_i - m_(i-1) of the bound are left to the evaluation. Every time step
    of the stage counts alike, also the lightly masked ones, which teach most.

    Args:
        x_0, x_t, mask: (B, T) from `corrupt`; mask_fraction: (B,).
        rows: number to divide by (None: B). With micro-batches, the rows of all of them, so that
            their losses and gradients add up.

    Returns:
        loss in nats (scalar); each row's own estimate of CE(m), (B,), detached; and each row's
        share of scored tokens that were predicted right, (B,), where no gradient is wanted.
    """
    causal = model.config.attention_mode == "causal"
    hidden = model.hidden(x_t, block)[:, :-1]  # (B, T-1, d): the shift
    weights = token_weights(mask, mask_fraction, causal)  # (B, T-1)
    scored = None if causal else mask[:, 1:]  # (B, T-1); None: every position
    rows = rows or len(x_0)
    loss, ce, hit = tied_cross_entropy(model, hidden, x_0[:, 1:], weights / rows, scored)
    n_scored = mask.size(1) - 1 if causal else scored.sum(1).clamp(min=1)  # of each row
    return loss, (ce * weights).sum(1), hit.sum(1) / n_scored


# What follows in this section is there for speed and memory; the mathematics is above.


def tied_cross_entropy(model, hidden, targets, weights, scored=None):
    """sum of weights * (-log softmax(hidden W^T)[targets]), W the tied head, without its logits.

    Args:
        hidden: (B, S, d); targets: (B, S) ids below vocab_size; weights: (B, S), 0 where not
            scored; scored: (B, S) bool, where the head is needed at all (None: everywhere).

    Returns:
        loss, differentiable in hidden and W; the cross-entropies in nats (B, S), detached, 0 where
        not scored; and, where no gradient is wanted, 1.0 where the target was the likeliest token.
    """
    W = model.tied_weight()
    flat = [hidden.flatten(0, 1), targets.flatten(), weights.flatten()]  # (B S, ...)
    if scored is not None:
        index = scored.flatten().nonzero().squeeze(1)  # (N,)
        n = len(index)
        # Matrix libraries prepare a kernel for every size that they meet, and keep hundreds of
        # them: the number of masks is rounded up to a multiple of 64, with positions of weight 0.
        index = F.pad(index, (0, -n % 64))
        flat = [part[index] for part in flat]
        flat[2][n:] = 0
    learning = torch.is_grad_enabled()
    need_h, need_W = learning and hidden.requires_grad, learning and W.requires_grad
    loss, ce, hit = _ChunkedCrossEntropy.apply(*flat, W, model.config.vocab_size, need_h, need_W)
    if scored is None:
        return loss, ce.view(targets.shape), hit.float().view(targets.shape)
    ce, hit = (torch.zeros_like(weights).masked_scatter(scored, part[:n].float())
               for part in (ce, hit))  # fmt: skip
    return loss, ce, hit


CHUNK = 512  # positions whose logits exist at one time
SLICE = 8192  # rows of W in one product: libraries copy a factor, and a share of grad_W exists


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy over the vocabulary, chunk by chunk, gradients formed on the way.

    With p = softmax(h W^T): d CE / d logits = p - onehot(target). Doing this in the forward pass
    means that no (N, V) tensor is ever stored, and the backward pass only scales by its input.
    """

    @staticmethod
    def forward(ctx, hidden, targets, weights, weight, vocab_size, need_h, need_W):
        dtype = product_dtype(hidden)
        h, W = hidden.to(dtype), weight.to(dtype)  # (N, d), (V, d)
        ce = torch.empty(len(h), device=h.device)  # (N,)
        hit = torch.zeros(len(h), dtype=torch.bool, device=h.device)  # (N,)
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_W = None
        # For grad_W: weights are about 1 / N, which fp16 would lose; divided out as it is summed.
        scale = 2.0 ** len(h).bit_length()
        buffer = h.new_empty(min(CHUNK, len(h)), len(W))  # one chunk's logits, then softmax
        slices = [slice(j, j + SLICE) for j in range(0, len(W), SLICE)]
        for i in range(0, len(h), CHUNK):
            part = slice(i, i + CHUNK)
            h_part, target = h[part], targets[part, None]  # (chunk, d), (chunk, 1)
            logits = buffer[: len(h_part)]  # (chunk, V)
            for rows in slices:
                torch.mm(h_part, W[rows].T, out=logits[:, rows])
            logits[:, vocab_size:] = -torch.inf
            gap = logits.amax(-1, keepdim=True).float() - logits.gather(1, target).float()
            if not (need_h or need_W):
                # argmax over bf16 takes half as long as the product; few rows can be hits at all.
                best = (gap == 0).squeeze(1).nonzero().squeeze(1)  # where the target is a maximum
                hit[i + best] = logits[best].argmax(-1) == targets[i + best]
            p = torch.softmax(logits, -1, out=logits)  # (chunk, V)
            # -log p[target] by way of the largest p, which cannot underflow.
            ce[part] = (gap - p.amax(-1, keepdim=True).float().log()).squeeze(1)
            if need_h or need_W:
                # now d CE / d logits (scatter_ would copy all of a bf16 p into fp32)
                p[torch.arange(len(p), device=p.device), target.squeeze(1)] -= 1
            # The weights (1e-4) go on the small factor: p times them would vanish in fp16.
            if need_h:
                summed = sum((p[:, rows] @ W[rows]).to(grad_h.dtype) for rows in slices)
                grad_h[part] = summed * weights[part, None]  # (chunk, d)
            if need_W:
                scaled = h_part * (weights[part, None] * scale).to(dtype)  # (chunk, d)
                grad_W = torch.zeros_like(weight) if grad_W is None else grad_W
                for rows in slices:
                    grad_W[rows].add_(p[:, rows].T @ scaled, alpha=1 / scale)
        ctx.save_for_backward(grad_h, grad_W)
        ctx.mark_non_differentiable(ce, hit)
        return (ce * weights).sum(), ce, hit

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad_h, grad_W = ctx.saved_tensors
        grad_h = None if grad_h is None else grad_h * grad_loss
        grad_W = None if grad_W is None else grad_W.mul_(grad_loss)
        return grad_h, None, None, grad_W, None, None, None


# ---------------------------------------------------------------------------------------------
# 4. The reverse process: one step


def sample_tokens(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw a token from each row of logits (N, V) -> (N,). temperature < 1e-6 takes the likeliest.

    top_p keeps the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020).
    """
    if temperature < 1e-6:  # the division below would overflow
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)  # (N, V)
    if top_p == 1:
        return torch.multinomial(p, 1, generator=generator).squeeze(-1)
    u = torch.rand(len(p), 1, generator=generator, device=p.device)
    ranked, order = p.topk(min(8192, p.size(-1)))  # a full sort takes four times as long
    token = _draw_nucleus(ranked, order, top_p, u)
    short = ranked.sum(-1) < top_p  # rows so flat that they need the full sort
    if short.any():
        token[short] = _draw_nucleus(*p[short].sort(-1, descending=True), top_p, u[short])
    return token


def _draw_nucleus(ranked, order, top_p, u):
    """Tokens (N,) by inverse transform of u (N, 1), of probabilities `ranked` from the largest."""
    reached = ranked.cumsum(-1)  # (N, V), or fewer columns
    kept = ((reached - ranked < top_p) & (ranked > 0)).sum(-1, keepdim=True)  # (N, 1), at least 1
    drawn = torch.searchsorted(reached, u * reached.gather(-1, kept - 1), right=True)  # (N, 1)
    return order.gather(-1, drawn.minimum(kept - 1)).squeeze(-1)


def masks_before(end, x_t, config):
    """Where ids (B, T) are [MASK], left of position `end` (None: anywhere). -> (B, T), bool"""
    masked = x_t == config.mask_id
    if end is not None:
        masked[:, end:] = False
    return masked


@torch.no_grad()
def reverse_step(model, x_t, m_t, m_s, block, end=None, temperature=1.0, top_p=1.0,
                 generator=None):  # fmt: skip
    """One ancestral step of p(x_s | x_t), from mask fraction m_t down to m_s < m_t.

    Each [MASK] stays with probability m_s / m_t and is otherwise replaced by a draw from the
    model's prediction at exit `block` (MDLM, eq. 7). Which positions are revealed does not depend
    on the prediction, so the head runs at those positions only. Revealed tokens never change.

    Args:
        x_t: (B, T); position 0 is context and must not be [MASK].
        end: positions from here on stay as they are (None: none).

    Returns:
        x_s: (B, T).
    """
    masked = masks_before(end, x_t, model.config)  # (B, T)
    draw = torch.rand(x_t.shape, generator=generator, device=x_t.device)
    reveal = masked & (draw >= m_s / m_t)  # (B, T)
    x_s = x_t.clone()
    if reveal.any():
        hidden = model.hidden(x_t, block)[:, :-1][reveal[:, 1:]]  # (N, d): the shift
        x_s[reveal] = sample_tokens(model.head(hidden), temperature, top_p, generator)
    return x_s


@torch.no_grad()
def confident_step(model, x_t, n_left, block, end=None, temperature=1.0, top_p=1.0,
                   generator=None):  # fmt: skip
    """One step by confidence (MaskGIT, Chang et al. 2022): the surest predictions are revealed.

    Every [MASK] gets a draw; the n_left draws that the model itself finds least likely stay [MASK].
    Revealed tokens never change. Not the reverse process of the bound: likelier, less varied text.

    Args:
        x_t: (B, T), at least n_left [MASK] in each row; position 0 must not be [MASK].
        end: positions from here on stay as they are, and do not count (None: none).

    Returns:
        x_s: (B, T) with n_left [MASK] in each row.
    """
    masked = masks_before(end, x_t, model.config)  # (B, T)
    x_s = x_t.clone()
    if (masked.sum(1) == n_left).all():
        return x_s
    logits = model.head(model.hidden(x_t, block)[:, :-1][masked[:, 1:]]).float()  # (N, V)
    x_s[masked] = sample_tokens(logits, temperature, top_p, generator)
    drawn = logits.gather(1, x_s[masked][:, None]).squeeze(1) - logits.logsumexp(1)  # log p, (N,)
    surety = torch.full(x_t.shape, torch.inf, device=x_t.device)
    surety[masked] = drawn  # (B, T)
    return x_s.scatter(1, surety.topk(n_left, largest=False).indices, model.config.mask_id)


# ---------------------------------------------------------------------------------------------
# 5. GPT-2 weights in and out

# Keys of Hugging Face's config.json: the sizes {theirs: ours}, and what this network does one way.
PRETRAINED_SIZES = {
    "vocab_size": "vocab_size", "n_embd": "d_model", "n_layer": "n_layers", "n_head": "n_heads",
    "n_positions": "seq_len",
}  # fmt: skip
PRETRAINED_FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}  # fmt: skip
GPT2_URL = "https://huggingface.co/openai-community/gpt2/resolve/main/"


def read_pretrained(path, config=None, cache="data"):
    """Weights in Hugging Face's GPT-2 layout, mapped from their file. -> (ModelConfig, tensors)

    Args:
        path: a folder with config.json and model.safetensors or pytorch_model.bin; or one of these
            two files, config.json beside it; or `gpt2`, which is downloaded into cache/gpt2.
        config: the ModelConfig to fill. Its sizes must be the file's; a position table longer than
            its seq_len is cropped. None: one block that owns every layer and the band (0, 1].

    Returns:
        the config, and {name: tensor} for `GPT.fill_from`: our names and shapes, so linears are
        (out, in), with `ln_f.` for the final norm; in the type in which they are stored.

    UserError or OSError (no such file, no network), in one line that names the file.
    """
    path = Path(fetch_gpt2(cache) if str(path) == "gpt2" and not Path("gpt2").exists() else path)
    files = [path, path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no model.safetensors or pytorch_model.bin here; set "
                                "model.init_from to a folder that has one, to gpt2 or to scratch")
    found = _read_description(file.with_name("config.json"), config)
    stored = read_torch(file) if file.suffix == ".bin" else read_tensors(file, sealed=False)[0]
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in stored.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # the causal mask, as a buffer
    }
    head = tensors.pop("lm_head.weight", None)  # in some files, though it is the embedding
    shapes = pretrained_shapes(found, found.n_layers)
    wrong = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - shapes.keys()]
    for name in shapes.keys() & tensors.keys():
        dtype, shape = tensors[name].dtype, tuple(tensors[name].shape)
        if shape != shapes[name] or not dtype.is_floating_point:
            wrong.append(f"{name} is {dtype} {shape}, not float {shapes[name]}")
        elif not torch.isfinite(tensors[name]).all():
            wrong.append(f"{name} has values that are not finite")
    if not wrong and head is not None and not torch.equal(head, tensors["wte.weight"]):
        wrong = ["lm_head.weight is not wte.weight (only a tied head is supported)"]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{file}: {'; '.join(sorted(wrong)[:5])}{more}")
    config = config or found
    tensors["wpe.weight"] = tensors["wpe.weight"][: config.seq_len]
    return config, {n: t.t() if n.startswith("h.") else t for n, t in tensors.items()}


def pretrained_shapes(config, n_layers):
    """{name: shape} of a file in Hugging Face's layout, where linears are stored as (in, out)."""
    with torch.device("meta"):
        layer = {name: tuple(p.shape)[::-1] for name, p in Layer(config).named_parameters()}
    d = config.d_model
    shapes = {"wte.weight": (config.vocab_size, d), "wpe.weight": (config.seq_len, d)}
    shapes |= {f"h.{i}.{name}": shape for i in range(n_layers) for name, shape in layer.items()}
    return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


def _read_description(path, config=None):
    """The one-block ModelConfig of a config.json. UserError unless it agrees with `config`."""
    try:
        description = json.loads(path.read_bytes())
        for key, value in PRETRAINED_FIXED.items():
            if description.get(key, value) != value:
                raise ValueError(f"{key} {description[key]!r} is not supported, only {value!r}")
        sizes = {ours: description.get(theirs) for theirs, ours in PRETRAINED_SIZES.items()}
        if not all(type(size) is int and size < 2**20 for size in sizes.values()):
            raise ValueError(f"{', '.join(PRETRAINED_SIZES)} must all be there, as whole numbers "
                             "below 2^20")
        found = ModelConfig(
            **sizes, attention_mode="causal", dropout=0.0, init_from=str(path.parent),
            total_blocks=1, block_size=sizes["n_layers"], block_mask_ranges=((0.0, 1.0),),
            time_step_mask_fractions=(1.0,),
        )  # fmt: skip
    except (AttributeError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not the config.json of a GPT-2: {error}") from None
    differ = [
        f"model.{ours}={size} (not {getattr(config, ours)})"
        for ours, size in sizes.items()
        if config and size != getattr(config, ours)
        and not (ours == "seq_len" and size > config.seq_len)  # a longer table is cropped
    ]  # fmt: skip
    if differ:
        raise UserError(f"{path}: to start from these weights, set {', '.join(differ)}")
    return found


def read_torch(path):
    """{name: tensor} of a pytorch_model.bin, on the CPU, mapped where it is a zip archive.

    Nothing in it is executed. UserError for anything but tensors by name.
    """
    try:
        with open(path, "rb") as file:
            mapped = file.read(2) == b"PK"  # older files are plain pickles
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        for name, tensor in tensors.items():
            if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)
                    and tensor.layout == torch.strided and tensor.dtype in DTYPES.values()
                    and not (tensor.is_meta or tensor.is_nested)):  # fmt: skip
                raise ValueError(f"{name!r} is not the name of a dense tensor")
    except Exception as error:  # torch raises many kinds; all mean that this is no such file
        reason = (str(error).strip() or repr(error)).splitlines()[0].partition(" (1)")[0]
        raise UserError(f"{path}: refused, not plain tensors ({reason})") from None
    return dict(tensors)


def fetch_gpt2(cache):
    """Download the 124M weights into cache/gpt2, unless they are there. -> the folder

    A file gets its name when it is complete and readable. OSError where there is no network.
    """
    folder = Path(cache) / "gpt2"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        partial = folder / f"{name}.part"
        try:
            if not (folder / name).exists():
                urllib.request.urlretrieve(GPT2_URL + name, partial)
                if name == "config.json":
                    _read_description(partial)
                else:
                    read_tensors(partial, sealed=False)
                os.replace(partial, folder / name)
        except (OSError, UserError, http.client.HTTPException) as error:
            raise OSError(f"cannot download GPT-2's {name} ({error}); put it into {folder} "
                          "yourself, or set model.init_from to a folder that has it") from None
    return folder
