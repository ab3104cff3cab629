"""GPT-2 as a mask-diffusion model: the network, the masking, the loss, the way back to text.

Read from top to bottom:

1. `Attention`, `MLP`, `Layer`, `GPT`      the network of Radford et al. 2019, one exit per block
2. `stratified`, `corrupt`                 the forward process q(x_t | x_0, m)
3. `token_weights`, `diffusion_loss`, `score`   the objective; `tied_cross_entropy` makes it fast
4. `reverse_step`, `confident_step`, `sample`   the reverse process p(x_s | x_t)
5. `read_pretrained`, `fetch_gpt2`         GPT-2 weights in (out: `GPT.save_pretrained`)
6. `pick_device`, `compute_type`           where and in which type products run

Letters in the shape comments: B rows, T positions (seq_len at most), d = d_model, V = rows of the
embedding (vocab_size + 1 rounded up to a multiple of 64), N = any number of scored positions.

Masked diffusion follows Sahoo et al. 2024 (MDLM, arXiv 2406.07524) and Shi et al. 2024 (MD4,
arXiv 2406.04329); keeping GPT-2's shift follows Gong et al. 2024 (DiffuGPT, arXiv 2410.17891).
"""

import functools
import itertools
import json
import math
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_loader import (GPT2_VOCAB_SIZE, UserError, load_config, read_tensors, write_json,
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
        config: Config.
        blocks: how many blocks to build now (None: all). Training begins with none and calls
            `grow()` at each stage, so that blocks not yet reached are not in memory.
    """

    def __init__(self, config, blocks=None):
        super().__init__()
        self.config = config
        self.head_weight = None  # wte in the compute type, where quant.expand has converted it once
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

    def exit_or_last(self, exit_k):
        """`exit_k`, or the last exit built for None. UserError if it does not exist."""
        exit_k = self.blocks - 1 if exit_k is None else exit_k
        if not 0 <= exit_k < self.blocks:
            raise UserError(f"exit {exit_k} does not exist; there are 0 to {self.blocks - 1}")
        return exit_k

    def choose_adapters(self, exit_k):
        """Let the adapters of exit `exit_k` act, and no others (`LoRALinear.forward`).

        The choice holds until the next one, and a layer that is recomputed in the backward pass
        reads it again. So a loss over two exits at once would go wrong here: each exit needs its
        own forward and backward pass.
        """
        for module in self.modules():
            if hasattr(module, "active_exit"):
                module.active_exit = exit_k

    def hidden(self, idx, exit_k=None):
        """Hidden states read at an exit.

        Args:
            idx: token ids, (B, T), T <= seq_len.
            exit_k: the exit to read (None: the last one). Only the layers up to its block run.

        Returns:
            (B, T, d); position i-1 holds the prediction of token i (GPT-2's shift).
        """
        exit_k = self.exit_or_last(exit_k)
        if idx.size(1) > self.config.seq_len:
            raise UserError(f"{idx.size(1)} positions, but seq_len is {self.config.seq_len}")
        self.choose_adapters(exit_k)
        # Frozen embeddings may be stored in fp16; the residual stream is fp32 all the same.
        x = F.embedding(idx, self.wte.weight).float()  # (B, T, d)
        if self.mask_row is not None:
            x = torch.where((idx == self.config.mask_id)[..., None], self.mask_row, x)  # (B, T, d)
        x = self.dropout(x + self.wpe.weight[: idx.size(1)].float())  # (B, T, d)
        drops = self.config.dropout + self.config.qlora_dropout > 0  # recompute with the same draws
        for layer in self.h[: (exit_k + 1) * self.config.block_size]:
            if torch.is_grad_enabled() and self.recomputes(layer):
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=drops)  # (B, T, d)
            else:
                x = layer(x)  # (B, T, d)
        return self.exit_norms[exit_k](x)  # (B, T, d)

    def recomputes(self, layer):
        """Whether the backward pass computes a layer's activations anew instead of keeping them."""
        frozen = not layer.ln_1.weight.requires_grad  # matters under adapters only
        mode = self.config.gradient_checkpointing
        if mode == "auto":
            mode = "none" if self.wte.weight.is_cuda else "frozen"
        return mode == "all" or (mode == "frozen" and frozen)

    def head(self, hidden):
        """Logits of hidden states through the tied head: (..., d) -> (..., V).

        Ids from vocab_size up ([MASK] and the padding rows) get -inf: they are never predicted.
        """
        dtype = product_dtype(hidden)
        logits = F.linear(hidden.to(dtype), self.tied_weight().to(dtype))  # (..., V)
        logits[..., self.config.vocab_size :] = -torch.inf
        return logits

    def tied_weight(self):
        """The embedding as the head's matrix, (V, d)."""
        return self.wte.weight if self.head_weight is None else self.head_weight

    def forward(self, idx, exit_k=None):
        """Logits (B, T, V) of token ids (B, T), read at exit `exit_k` (None: the last)."""
        return self.head(self.hidden(idx, exit_k))

    @classmethod
    def from_pretrained(cls, folder):
        """A GPT with the weights of a folder in Hugging Face's GPT-2 layout, as one block that owns
        every layer and every mask fraction."""
        model = cls(load_config().replace(mode="standard", **read_sizes(folder)))
        model.load_state_dict(read_pretrained(folder, model.config))
        return model

    def save_pretrained(self, folder, exit_k=None, dtype=torch.float32):
        """Write exit `exit_k` (None: the last built) as a GPT-2 in Hugging Face's layout.

        Makes folder/config.json and folder/model.safetensors: the layers up to the exit, its norm
        as ln_f, and the text's rows of the embedding. The layout has no place for earlier exits,
        [MASK] or bidirectional attention. The model must be plain: `lora.merge` makes one.

        UserError for attention that is not causal, and weights that are not finite in `dtype`.
        """
        config, exit_k = self.config, self.exit_or_last(exit_k)
        if config.attention_mode != "causal":
            raise UserError(f"this layout is for causal attention, not {config.attention_mode}")
        n_layers, ours, tensors = (exit_k + 1) * config.block_size, self.state_dict(), {}
        for name, shape in pretrained_shapes(config, n_layers).items():
            tensor = ours[name.replace("ln_f.", f"exit_norms.{exit_k}.")]
            tensor = (tensor.t() if name.startswith("h.") else tensor[: shape[0]]).to(dtype)
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} has values that are not finite in {dtype}")
            tensors["transformer." + name] = tensor
        sizes = {theirs: getattr(config, ours) for theirs, ours in PRETRAINED_SIZES.items()}
        description = PRETRAINED_FIXED | sizes | {"n_layer": n_layers}
        description["architectures"] = ["GPT2LMHeadModel"]
        description |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        description |= dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1)
        write_tensors(Path(folder) / "model.safetensors", tensors, sealed=False)
        write_json(Path(folder) / "config.json", description)


# ---------------------------------------------------------------------------------------------
# 2. The forward process: masking


def stratified(time_steps, n_rows, offset):
    """Mask fractions of a batch: row r takes time step (r + offset) mod n. -> (n_rows,)

    Dealt out in turn instead of drawn one by one, so that a batch holds the noise levels as equally
    as it can: the mean over rows has less variance (Kingma et al. 2021, appendix I.1).
    """
    return torch.tensor([time_steps[(r + offset) % len(time_steps)] for r in range(n_rows)])


def corrupt(x_0, mask_fraction, noise, mask_id):
    """q(x_t | x_0, m): each position i >= 1 becomes [MASK] independently with probability m.

    Args:
        x_0: text, (B, T).
        mask_fraction: m of each row, (B,).
        noise: numbers drawn from U[0, 1), (B, T).

    Returns:
        x_t (B, T) and the mask (B, T), True where a token was replaced. Position 0 never is.
    """
    mask = noise < mask_fraction[:, None]  # (B, T)
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
    """Weight of each predicted position: the weighted sum of cross-entropies estimates CE(m).

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


def diffusion_loss(model, x_0, x_t, mask, mask_fraction, exit_k, rows=None, n_masked=None):
    """The stage loss: mean over rows of the estimate of CE(m), read at exit `exit_k`.

    A plain mean: the weights m_i - m_(i-1) of the bound are left to the evaluation. Every time step
    of the stage counts alike, also the lightly masked ones, which teach most. Products run in
    config.compute_type.

    Args:
        x_0, x_t, mask: (B, T) from `corrupt`; mask_fraction: (B,).
        rows: number to divide by (None: B). With micro-batches, the rows of all of them, so that
            their losses and gradients add up.
        n_masked: masks behind position 0, if known: a GPU need not be waited for to count them.

    Returns:
        loss in nats (scalar); each row's own estimate of CE(m), (B,), detached; and each row's
        share of scored tokens that were predicted right, (B,), 0 where a gradient is wanted.
    """
    causal = model.config.attention_mode == "causal"
    with autocast(model):
        hidden = model.hidden(x_t, exit_k)[:, :-1]  # (B, T-1, d): the shift
        weights = token_weights(mask, mask_fraction, causal)  # (B, T-1)
        scored = None if causal else mask[:, 1:]  # (B, T-1); None: every position
        rows = rows or len(x_0)
        target = x_0[:, 1:]  # (B, T-1)
        loss, ce, hit = tied_cross_entropy(model, hidden, target, weights / rows, scored, n_masked)
    n_scored = mask.size(1) - 1 if causal else scored.sum(1).clamp(min=1)  # of each row
    return loss, (ce * weights).sum(1), hit.sum(1) / n_scored


def noise_of_rows(n_rows, seq_len, seed, tag=0):
    """Uniform numbers (n_rows, seq_len), a function of (seed, tag, row) alone."""
    noise = [np.random.default_rng([seed, tag, row]).random(seq_len) for row in range(n_rows)]
    return torch.from_numpy(np.stack(noise)).float()


@torch.no_grad()
def score(model, rows, mask_fraction, exit_k, noise, batch_size=None):
    """Each row's estimate of CE(m) and its accuracy, read at exit `exit_k`: behind every metric.

    One row at a time, unless `batch_size` says otherwise: the shapes of the products, and so the
    last digits of a row's figures, then never depend on the rows beside it. On a GPU, which one
    row leaves idle, 16 at a time, and last digits may differ.

    Args:
        rows: text, (R, T). mask_fraction: m of each row, (R,). noise: (R, T) from U[0, 1).

    Returns:
        CE estimates (R,) in nats per token, accuracy (R,) in [0, 1]; float64.
    """
    device = model.wte.weight.device
    batch_size = batch_size or (16 if device.type == "cuda" else 1)
    ce, accuracy = [], []
    for x_0, m, u in zip(*(t.split(batch_size) for t in (rows, mask_fraction, noise))):
        x_0, m = x_0.to(device), m.to(device)  # (batch_size, T), (batch_size,)
        x_t, mask = corrupt(x_0, m, u.to(device), model.config.mask_id)
        _, by_row, hit = diffusion_loss(model, x_0, x_t, mask, m, exit_k)
        ce.append(by_row)
        accuracy.append(hit)
    return torch.cat(ce).cpu().double(), torch.cat(accuracy).cpu().double()


# What follows in this section is there for speed and memory; the mathematics is above.


def tied_cross_entropy(model, hidden, targets, weights, scored=None, n_scored=None):
    """sum of weights * (-log softmax(hidden W^T)[targets]), W the tied head, without its logits.

    Args:
        hidden: (B, S, d); targets: (B, S) ids below vocab_size; weights: (B, S), 0 where not
            scored; scored: (B, S) bool, where the head is needed at all (None: everywhere);
            n_scored: how many that are, if known.

    Returns:
        loss, differentiable in hidden and W; the cross-entropies in nats (B, S), detached, 0 where
        not scored; and, where no gradient is wanted, 1.0 where the target was the likeliest token.
    """
    W = model.tied_weight()
    flat = [hidden.flatten(0, 1), targets.flatten(), weights.flatten()]  # (B S, ...)
    if scored is not None:
        n = int(scored.sum()) if n_scored is None else n_scored
        index = scored.flatten().nonzero_static(size=n).squeeze(1)  # (N,)
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


CHUNK = 512  # positions whose logits exist at one time; 2048 on a GPU, which wants few launches
SLICE = 8192  # rows of W in one product on a CPU, whose libraries copy a factor. Elsewhere all at
# once: mps, before macOS 15, gets a product into some of a tensor's columns wrong.


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy over the vocabulary, chunk by chunk, gradients formed on the way.

    With p = softmax(h W^T): d CE / d logits = p - onehot(target). Doing this in the forward pass
    means that no (N, V) tensor is ever stored, and the backward pass only scales by its input.
    """

    @staticmethod
    def forward(ctx, hidden, targets, weights, head, vocab_size, need_h, need_W):
        dtype = product_dtype(hidden)
        h, W = hidden.to(dtype), head.to(dtype)  # (N, d), (V, d)
        ce = torch.empty(len(h), device=h.device)  # (N,)
        hit = torch.zeros(len(h), dtype=torch.bool, device=h.device)  # (N,)
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_W = None
        # For grad_W: weights are about 1 / N, which fp16 would lose; divided out as it is summed.
        scale = 2.0 ** len(h).bit_length()
        chunk, width = (CHUNK, SLICE) if h.is_cpu else (2048, len(W))
        buffer = h.new_empty(min(chunk, len(h)), len(W))  # one chunk's logits, then softmax
        slices = [slice(j, j + width) for j in range(0, len(W), width)]
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
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
                grad_W = torch.zeros_like(head) if grad_W is None else grad_W
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
# 4. The reverse process


def sample_tokens(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw a token from each row of logits (N, V) -> (N,). temperature < 1e-6 takes the likeliest.

    top_p keeps the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020).
    """
    if temperature < 1e-6:  # the division below would overflow
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)  # (N, V)
    u = torch.rand(len(p), 1, generator=generator, device=p.device)
    ranked, order = p.topk(p.size(-1))  # (N, V), the largest first
    reached = ranked.cumsum(-1)  # (N, V)
    kept = ((reached - ranked < top_p) & (ranked > 0)).sum(-1, keepdim=True)  # (N, 1), 1 or more
    # Inverse transform: the first token at which the sum passes u times the sum of what is kept.
    drawn = torch.searchsorted(reached, u * reached.gather(-1, kept - 1), right=True)  # (N, 1)
    return order.gather(-1, drawn.minimum(kept - 1)).squeeze(-1)


def masks_before(end, x_t, config):
    """Where ids (B, T) are [MASK], left of position `end` (None: anywhere). -> (B, T), bool"""
    masked = x_t == config.mask_id
    if end is not None:
        masked[:, end:] = False
    return masked


@torch.no_grad()
def reverse_step(model, x_t, m_t, m_s, exit_k, end=None, temperature=1.0, top_p=1.0,
                 generator=None):  # fmt: skip
    """One ancestral step of p(x_s | x_t), from mask fraction m_t down to m_s < m_t.

    Each [MASK] stays with probability m_s / m_t and is otherwise replaced by a draw from the
    model's prediction at exit `exit_k` (MDLM, eq. 7). Which positions are revealed does not depend
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
        hidden = model.hidden(x_t, exit_k)[:, :-1][reveal[:, 1:]]  # (N, d): the shift
        x_s[reveal] = sample_tokens(model.head(hidden), temperature, top_p, generator)
    return x_s


@torch.no_grad()
def confident_step(model, x_t, n_left, exit_k, end=None, temperature=1.0, top_p=1.0,
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
    logits = model.head(model.hidden(x_t, exit_k)[:, :-1][masked[:, 1:]]).float()  # (N, V)
    x_s[masked] = sample_tokens(logits, temperature, top_p, generator)
    drawn = logits.gather(1, x_s[masked][:, None]).squeeze(1) - logits.logsumexp(1)  # log p, (N,)
    surety = torch.full(x_t.shape, torch.inf, device=x_t.device)
    surety[masked] = drawn  # (B, T)
    return x_s.scatter(1, surety.topk(n_left, largest=False).indices, model.config.mask_id)


def exit_of(mask_fraction, model):
    """The exit that owns a mask fraction, or the last one built where that does not exist yet."""
    return min(model.config.block_of(mask_fraction), model.blocks - 1)


@torch.no_grad()
def sample(model, x, order="ancestral", window=None, exit_k=None, steps=None, temperature=1.0,
           top_p=0.95, seed=0, watch=lambda x: None):  # fmt: skip
    """Write text at the [MASK]s of `x`, a window of them after another from left to right, each
    window by the whole reverse process (LLaDA, arXiv 2502.09992, section 2.4).

    Args:
        x: (B, T) token ids, with [MASK] at the same places in every row, and not at position 0.
        order: within a window: ancestral (the reverse process; that of the bound where temperature
            and top_p are 1 and `steps` begin at m = 1) or confidence (the surest predictions first,
            as many as the schedule says). left-to-right: windows of one token in one step.
        window: number of [MASK]s written together (None: all of them, which is plain diffusion).
        exit_k: the exit to read. None: depth by noise, at each mask fraction of the window only the
            blocks up to its owner run; left to right, the last exit.
        steps: number of even time steps (None: the model's own). Not used left to right.
        seed: of the draws; a GPU's random numbers are others than a CPU's.
        watch: called with the ids (B, T), at the start and after each step that revealed some.

    Returns:
        (B, T) token ids without any [MASK].
    """
    config, device = model.config, model.wte.weight.device
    fractions = config.time_step_mask_fractions
    if steps is not None:
        fractions = [(i + 1) / steps for i in range(steps)]
    if order == "left-to-right":
        window, fractions = 1, [1.0]
        exit_k = model.blocks - 1 if exit_k is None else exit_k
    draw = {"temperature": temperature, "top_p": top_p,
            "generator": torch.Generator(device).manual_seed(seed)}  # fmt: skip
    x = x.to(device, copy=True)
    masks = (x[0] == config.mask_id).nonzero().flatten()
    watch(x)
    for places in masks.split(window or max(1, len(masks))):
        end = int(places[-1]) + 1 if len(places) else 0
        # A causal model need not be shown what stands right of the window.
        seen = x[:, :end] if config.attention_mode == "causal" else x
        for m_t, m_s in itertools.pairwise(reversed([0.0, *fractions])):
            read = exit_of(m_t, model) if exit_k is None else exit_k
            with autocast(model):
                if order == "ancestral":
                    x_s = reverse_step(model, seen, m_t, m_s, read, end, **draw)
                else:
                    n_left = round(m_s * len(places))
                    x_s = confident_step(model, seen, n_left, read, end, **draw)
            changed = not torch.equal(x_s, seen)
            seen.copy_(x_s)  # into x
            if changed:
                watch(x)
    return x


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


def read_sizes(folder):
    """{our key: size} of the config.json of a GPT-2. UserError for what this network cannot do."""
    path = Path(os.path.expanduser(folder)) / "config.json"
    try:
        description = json.loads(path.read_bytes())
        for key, value in PRETRAINED_FIXED.items():
            if description.get(key, value) != value:
                raise ValueError(f"{key} {description[key]!r} is not supported, only {value!r}")
        return {ours: description[theirs] for theirs, ours in PRETRAINED_SIZES.items()}
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the config.json of a GPT-2: {error!r:.200}") from None


def read_pretrained(folder, config):
    """The weights of a folder in Hugging Face's GPT-2 layout, for a GPT of `config`.

    Args:
        folder: with config.json and model.safetensors; or `gpt2`, which is downloaded.
        config: its sizes must be the folder's; a longer position table is cropped to its seq_len,
            and rows behind GPT-2's vocabulary, padding (50304) or added tokens, are left out.

    Returns:
        {name: tensor} with our names and shapes. Every exit norm is GPT-2's final norm, and the
        rows of the embedding that GPT-2 does not have, [MASK] and padding, are the mean of the
        text's rows.

    UserError or OSError (no such file, no network), in one line that names the file.
    """
    if folder == "gpt2" and not Path("gpt2").exists():
        folder = fetch_gpt2(Path(os.path.expanduser(config.token_folder)) / "gpt2")
    sizes = read_sizes(folder)
    rows, positions = sizes["vocab_size"], sizes["seq_len"]
    for key, most in (("vocab_size", max(config.vocab_size, GPT2_VOCAB_SIZE)),
                      ("seq_len", config.seq_len)):  # fmt: skip
        if type(sizes[key]) is int:
            sizes[key] = min(sizes[key], most)
    differ = [f"model.{key}={size}" for key, size in sizes.items() if size != getattr(config, key)]
    if differ:
        raise UserError(f"to start from the weights in {folder}, set {' '.join(differ)}")
    file = Path(os.path.expanduser(folder)) / "model.safetensors"
    if not file.exists():
        raise UserError(f"{file} is missing; if the weights are sharded, or a .bin, make it with "
                        f"transformers: GPT2LMHeadModel.from_pretrained({str(folder)!r})"
                        ".save_pretrained('joined', max_shard_size='99GB')")
    tensors = {}
    for name, tensor in read_tensors(file, sealed=False)[0].items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, as a buffer
            tensors[name.removeprefix("transformer.")] = tensor
    head = tensors.pop("lm_head.weight", None)  # in some files, though it is the embedding
    shapes = pretrained_shapes(config, config.n_layers)
    shapes |= {"wte.weight": (rows, config.d_model), "wpe.weight": (positions, config.d_model)}
    for name in shapes | tensors:
        tensor, shape = tensors.get(name), shapes.get(name)
        if None in (tensor, shape) or tensor.shape != shape or not tensor.is_floating_point():
            raise UserError(f"{file}: {name} is missing, unknown, or not floats of shape {shape}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{file}: {name} has values that are not finite")
    if head is not None and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{file}: lm_head.weight is not wte.weight (only a tied head is supported)")
    ours = {name: t.t() if name.startswith("h.") else t for name, t in tensors.items()}
    text = ours["wte.weight"][: config.vocab_size].float()  # (vocab_size, d)
    others = text.mean(0).expand(config.padded_vocab_size - len(text), -1)
    ours["wte.weight"] = torch.cat([text, others])  # (V, d)
    ours["wpe.weight"] = ours["wpe.weight"][: config.seq_len]
    for part in ("weight", "bias"):
        norm = ours.pop(f"ln_f.{part}")
        ours |= {f"exit_norms.{k}.{part}": norm for k in range(config.total_blocks)}
    return ours


def pretrained_shapes(config, n_layers):
    """{name: shape} of a file in Hugging Face's layout, where linears are stored as (in, out)."""
    with torch.device("meta"):
        layer = {name: tuple(p.shape)[::-1] for name, p in Layer(config).named_parameters()}
    d = config.d_model
    shapes = {"wte.weight": (config.vocab_size, d), "wpe.weight": (config.seq_len, d)}
    shapes |= {f"h.{i}.{name}": shape for i in range(n_layers) for name, shape in layer.items()}
    return shapes | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


def fetch_gpt2(folder):
    """Download the 124M weights into `folder`, unless they are there. -> the folder"""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        partial = folder / f"{name}.part"
        try:
            if not (folder / name).exists():
                urllib.request.urlretrieve(GPT2_URL + name, partial)
                partial.replace(folder / name)  # complete, or urlretrieve raises
        except OSError as error:
            raise UserError(f"cannot download GPT-2's {name} ({error}); put it into {folder} "
                            "yourself, or set model.init_from to a folder that has it") from None
    return folder


# ---------------------------------------------------------------------------------------------
# 6. The machine


def pick_device(name):
    """torch.device for `device:` in gpt2.yaml; auto takes CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cpu": 1, "cuda": torch.cuda.device_count(),
             "mps": int(torch.backends.mps.is_available())}
    kind, _, index = name.partition(":")
    index = index or "0"
    if not index.isdecimal() or int(index) >= there.get(kind, 0):
        here = ", ".join(kind for kind in there if there[kind])
        raise UserError(f"device {name!r} is unknown or not here; torch sees {here}")
    return torch.device(name)


def usable(device):
    """The device, if torch can compute on it: it sees GPUs, too, that it has no kernels for."""
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        raise UserError(f"torch cannot compute on {device} ({str(error).partition(chr(10))[0]}); "
                        "use training.device=cpu, or for an evaluation --device cpu") from None
    return device


@functools.cache
def compute_type(device, name="auto"):
    """The type in which matrix products run (weights stay as they are stored). -> torch.dtype

    auto: bf16 where the hardware multiplies it natively, else fp16 on CUDA and fp32 elsewhere (a
    CPU without bf16 units emulates it, slower than fp32; on Apple's, which have them, torch is
    slower in bf16 too).
    """
    if name == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp16"
    elif name == "auto":
        units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = any(units.get(unit) for unit in ("avx512_bf16", "amx_bf16"))  # x86
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(model):
    """Context in which torch runs a model's matrix products in its compute type."""
    device = model.wte.weight.device
    dtype = compute_type(device, model.config.compute_type)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def product_dtype(x):
    """The type in which a matrix product of `x` runs: autocast's where it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
