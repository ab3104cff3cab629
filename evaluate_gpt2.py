"""Every metric, sampling, and the report of a run.

    python evaluate_gpt2.py                       the newest run
    python evaluate_gpt2.py --run tiny            a run by name
    python evaluate_gpt2.py --precision int4      the same run, rebuilt from its backups in int4
    python evaluate_gpt2.py --precision all       a table of every storage
    python evaluate_gpt2.py --full                every validation row instead of 100
    python evaluate_gpt2.py --compare tiny other  runs side by side
    python evaluate_gpt2.py --plot                pictures of a run, or of those to compare
    python evaluate_gpt2.py --prompt "The people of" --watch      only a sample
    python evaluate_gpt2.py --prompt "The ____ of the ____ is"    blanks filled in
    python evaluate_gpt2.py --run tiny --export tiny-gpt2     the last exit as a Hugging Face GPT-2
    python evaluate_gpt2.py --run tiny-gpt2 --precision all   such weights in every storage

Read from top to bottom: `load_run` (a run rebuilt from disk), `score` (the one primitive that all
metrics use), the metrics (`nelbo_12`, `nelbo`, `left_to_right`, `unigram_entropy`), `memory`,
sampling, the report, the pictures. All figures are in nats per token unless a name says otherwise.
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

import lora
import quant
from data_loader import (DataConfig, UserError, load_tokens, one_line_errors, token_bytes,
                         tokenizer, validation_rows, write_atomically)
from model import (GPT, ModelConfig, autocast, block_of, compute_type, confident_step, corrupt,
                   diffusion_loss, read_pretrained, reverse_step, sample_tokens)

ROWS = 100  # validation rows scored by default
REPLICATES = 8  # independent estimates behind the standard error of the continuous NELBO
PLOT_ROWS = 16  # rows behind each point of the picture of cross-entropy over mask fraction
MIB = 2**20

# The keys of `training:` without which a run can be neither rebuilt nor described.
NEEDED = {"mode", "fusion_mode", "time_step_masking", "quantization_type", "qlora_enabled",
          "qlora_rank", "qlora_alpha", "qlora_dropout", "compute_type", "seed"}

# ---------------------------------------------------------------------------------------------
# A run on disk: checkpoints/<run_id>/ with config.json, metrics.jsonl, checkpoint.pt, backup/


def newest_run(folder="checkpoints"):
    """The run folder whose metrics were written last. UserError where there is none."""
    runs = sorted(Path(folder).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"no run in {folder}/; train one first: python train_gpt2_fusion.py")
    return runs[-1].parent


def is_pretrained(path):
    """Whether a path is not a run but a file or folder in Hugging Face's GPT-2 layout."""
    names = ("model.safetensors", "pytorch_model.bin")
    return path.suffix in (".safetensors", ".bin") or any((path / n).is_file() for n in names)


def read_config(folder):
    """A run's configuration: (ModelConfig, dict of `training:`, DataConfig).

    Pretrained weights get what an evaluation needs: one block, rows of at most 256 tokens, and the
    text that data/ holds.
    """
    if is_pretrained(Path(folder)):
        try:
            model, _ = read_pretrained(folder)
        except ValueError as error:
            raise UserError(str(error)) from None
        model = replace(model, seq_len=min(model.seq_len, ModelConfig.seq_len))
        meta = Path(DataConfig.folder) / "meta.json"
        text = json.loads(meta.read_text()) if meta.exists() else asdict(DataConfig())
        training = {"seed": 0, "compute_type": "auto", "time_step_masking": False}
        return model, training, DataConfig(text["source"], text["num_examples"])
    path = Path(folder) / "config.json"
    if not path.exists():
        have = sorted(path.parent.name for path in Path(folder).parent.glob("*/config.json"))
        raise UserError(f"no run {Path(folder).name!r}; there are: {', '.join(have) or 'none'}")

    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    try:
        config = json.loads(path.read_text())
        model, training, data = (
            {key: tuples(value) for key, value in config[section].items()}
            for section in ("model", "training", "data")
        )
        missing = sorted(NEEDED - training.keys())
        if missing:
            raise ValueError(f"training has no {', '.join(missing)}")
        return ModelConfig(**model), training, DataConfig(**data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or of another version of this code ({error}); "
                        "restore it, or train the run again") from None


def defaults_used(folder):
    """Keys that a run's config.json does not have, as it is older; their defaults are used."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return [f"{section}.{field.name}={field.default!r}"
            for section, kind in (("model", ModelConfig), ("data", DataConfig))
            for field in fields(kind) if field.name not in config[section]]


def read_metrics(folder, event=None):
    """The lines of a run's metrics.jsonl, as dicts; only those of one event if it is given."""
    path, lines = Path(folder) / "metrics.jsonl", []
    whole = path.read_bytes().split(b"\n")[:-1]  # a kill may leave half a line
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            if event in (None, line["event"]):
                lines.append(line)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: line {number} is damaged; delete that line") from None
    return lines


def load_run(folder, precision=None, device="cpu", resume=False):
    """Rebuild a run's model from disk: the one place that does, for evaluation and --resume.

    Finished blocks come from their backups and are stored in `precision` (None: the run's own
    quantization_type); what is still in training (a block; in `fusion_mode: trainable` all of them)
    and what plain QLoRA trained, from checkpoint.pt in fp32.

    Args:
        folder: checkpoints/<run_id>. precision: one of quant.KINDS or None.
        resume: also return the state that training goes on from.

    Returns:
        model, or (model, state) with resume; state is None where there is no checkpoint.pt yet, and
        a finished run's says so.

    Raises:
        UserError for a run without weights or an unfinished run's `precision`;
        quant.DamagedFile for a damaged backup or checkpoint.
    """
    folder = Path(folder)
    config, training, _ = read_config(folder)
    if is_pretrained(folder):
        model = GPT.from_pretrained(folder, config)
        try:
            quant.freeze_block(model, 0, precision or "fp32")
        except ValueError as error:
            raise UserError(f"{folder}: {error}") from None
        return model.to(device)
    kind = precision or training["quantization_type"]
    checkpoint = folder / "checkpoint.pt"
    state = quant.load_file(checkpoint) if checkpoint.exists() else None
    if precision and not (state and state["finished"]):
        raise UserError(f"run {folder.name} has not ended; finish it with --resume before asking "
                        f"for a precision")
    model = GPT(config, blocks=0)
    block = 0
    while (folder / "backup" / f"block_{block}.pt").exists():
        if state and not state["finished"] and block >= state["backed_up"]:
            break  # written just before a stop that lost the checkpoint after it
        model.grow()
        load_blocks(model, [block], quant.read_backup(folder / "backup", block), block, training)
        quant.freeze_block(model, block, kind)
        block += 1
    if state and (state["blocks"] > block or state["weights"]):
        while model.blocks < state["blocks"]:
            model.grow()
        unfinished = range(block, state["blocks"])
        load_blocks(model, unfinished, state.pop("weights"), state["block"], training)
    if not model.blocks and not resume:
        raise UserError(f"{folder} holds no trained block yet; continue it with --resume")
    model.to(device)
    return (model, state) if resume else model


def load_blocks(model, blocks, state, exit, training):
    """Fill blocks from a backup's or checkpoint's tensors, and the adapters of `exit` if it has
    any. Strict: UserError names the first tensor that is missing, left over or of another shape."""
    if any("lora_" in name for name in state):
        rank, alpha, dropout = (training[f"qlora_{key}"] for key in ("rank", "alpha", "dropout"))
        lora.add_adapters(model, exit, rank, alpha, dropout, plain="mask_row" in state)
    own = lora.adapter_state(model, exit)
    for block in blocks:
        own |= model.block_parameters(block)
    for name in sorted(own.keys() | state.keys()):
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise UserError(f"the saved tensors do not fit config.json: {name}")
        own[name].data.copy_(state[name])


# ---------------------------------------------------------------------------------------------
# Metrics


def row_noise(n_rows, seq_len, seed, tag):
    """Uniform numbers (n_rows, seq_len), a function of (seed, tag, row) alone."""
    noise = [np.random.default_rng([seed, tag, row]).random(seq_len) for row in range(n_rows)]
    return torch.from_numpy(np.stack(noise)).float()


@torch.no_grad()
def score(model, rows, mask_fraction, block, noise, tick=lambda n: None, batch_size=1):
    """Each row's estimate of CE(m) and its accuracy, read at exit `block`.

    One row at a time, unless `batch_size` says otherwise: the shapes of the products, and so the
    last digits of a row's figures, then never depend on the rows beside it.

    Args:
        rows: text, (R, T). mask_fraction: m of each row, (R,). noise: (R, T) from U[0, 1).
        tick: called with the number of rows just scored, to show progress.

    Returns:
        cross-entropy (R,) in nats per masked token, accuracy (R,) in [0, 1]; float64.
    """
    device = model.wte.weight.device
    ce, accuracy = [], []
    for x_0, m, uniform in zip(*(t.split(batch_size) for t in (rows, mask_fraction, noise))):
        x_0, m = x_0.to(device), m.to(device)  # (batch_size, T), (batch_size,)
        x_t, mask = corrupt(x_0, m, uniform.to(device), model.config.mask_id)
        _, by_row, hit = diffusion_loss(model, x_0, x_t, mask, m, block)
        ce.append(by_row)
        accuracy.append(hit)
        tick(len(x_0))
    return torch.cat(ce).cpu().double(), torch.cat(accuracy).cpu().double()


def expand(model, dtype):
    """A copy of a model for many passes over single rows, with the same figures to the last bit.

    Stored linears become dense ones in the compute type `dtype` and the head's weight is converted
    once: four-bit codes save memory in training, but every pass would expand them again.
    """
    model = copy.deepcopy(model).eval()
    for name, module in [*model.named_modules()]:
        if isinstance(module, quant.QuantLinear):
            dense = torch.nn.Linear(1, 1).requires_grad_(False)
            dense.weight.data, dense.bias.data = module.dequantize(dtype), module.bias.to(dtype)
            model.set_submodule(name, dense)
    model.head_weight = model.wte.weight.detach().to(dtype)
    return model


def progress(total):
    """A tick(n) that counts rows up to `total` on stderr: in place on a terminal, else a line a
    minute, so that short evaluations say nothing."""
    done, start = 0, time.monotonic()
    said, live = start, sys.stderr.isatty()

    def tick(n):
        nonlocal done, said
        done, now = done + n, time.monotonic()
        if live and done == total:
            print(end="\r\033[K", file=sys.stderr, flush=True)
        elif now - said >= (0.5 if live else 60):
            said = now
            text = f"scored {done:,} of {total:,} rows, {now - start:.0f} s"
            print(text, end="\r" if live else "\n", file=sys.stderr, flush=True)

    return tick


def exit_of(mask_fraction, model):
    """The exit that owns a mask fraction, or the last one built where that does not exist yet."""
    return min(block_of(mask_fraction, model.config), model.blocks - 1)


def nelbo_12(model, rows, seed, tick=lambda n: None):
    """The bound over the time steps: sum over i of (m_i - m_{i-1}) CE(m_i), m_0 = 0, last m = 1.

    Each CE(m) is read at the exit that owns m. The term at m = 1 (all masked) is part of it.

    Returns:
        the bound in nats per token, and a list of {mask_fraction, block, layers, cross_entropy,
        accuracy}, one per time step and one for m = 1.
    """
    steps = [*model.config.time_step_mask_fractions]
    steps += [] if steps[-1] == 1 else [1.0]
    noise = row_noise(len(rows), rows.size(1), seed, tag=0)
    table, bound, low = [], 0.0, 0.0
    for m in steps:
        block = exit_of(m, model)
        ce, accuracy = score(model, rows, torch.full((len(rows),), m), block, noise, tick)
        layers = (block + 1) * model.config.block_size
        table.append({"mask_fraction": m, "block": block, "layers": layers,
                      "cross_entropy": ce.mean().item(), "accuracy": accuracy.mean().item()})
        bound += (m - low) * table[-1]["cross_entropy"]
        low = m
    return bound, table


def nelbo(model, rows, seed, replicates=REPLICATES, tick=lambda n: None):
    """The continuous-time bound, the integral of CE(m) over (0, 1], and its standard error.

    Causal: m stratified over the rows. Bidirectional: sum over masked tokens / m has infinite
    variance near 0, so the number l of masked tokens is stratified over 1..N (N = T-1),
    m ~ Beta(l, N-l+1) names the exit, and l positions chosen at random are scored by their mean:
    the same integral, as C(N, l) times the integral of m^(l-1) (1-m)^(N-l) is 1 / l, so that every
    l counts 1 / N. The standard error is over independent replicates on the same rows.

    Returns:
        (mean, standard error of the mean) in nats per token.
    """
    n_rows, seq_len = rows.shape
    n = seq_len - 1
    estimates = []
    for replicate in range(replicates):
        rng = np.random.default_rng([seed, 1 + replicate])
        noise = row_noise(n_rows, seq_len, seed, 1 + replicate)
        strata = torch.from_numpy((rng.permutation(n_rows) + rng.random(n_rows)) / n_rows)
        if model.config.attention_mode == "causal":
            m = scored_m = 1 - strata  # in (0, 1]
        else:
            masked = (strata * n).long() + 1  # l of each row, 1..N
            m = torch.from_numpy(rng.beta(masked, n - masked + 1))
            # Replaced by its rank / N, exactly l numbers of a row are below (l - 1/2) / N.
            noise[:, 0] = 2.0
            noise = noise.argsort(1).argsort(1) / n
            scored_m = (masked - 0.5) / n
        total = torch.zeros(n_rows, dtype=torch.float64)
        owners = torch.tensor([exit_of(value, model) for value in m.tolist()])
        for block in owners.unique().tolist():
            pick = owners == block
            m_pick = scored_m[pick].float()
            ce, _ = score(model, rows[pick], m_pick, block, noise[pick], tick)
            total[pick] = ce if scored_m is m else ce * scored_m[pick] * n / masked[pick]
        estimates.append(total.mean().item())
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / math.sqrt(replicates))


def left_to_right(model, rows, tick=lambda n: None):
    """CE(0) of every exit: a causal model's exact left-to-right loss. None if bidirectional."""
    if model.config.attention_mode != "causal":
        return None
    zeros, noise = torch.zeros(len(rows)), torch.ones(rows.shape)
    scores = [score(model, rows, zeros, block, noise, tick) for block in range(model.blocks)]
    return [ce.mean().item() for ce, _ in scores]


def unigram_entropy(train_tokens, tokens, vocab_size):
    """What a model that ignores context gets on `tokens`: cross-entropy under the token
    frequencies of the training text (one added to every count), in nats per token."""
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[np.asarray(tokens).ravel()].mean())


def units_of(rows, encoding):
    """Bytes and words of the predicted part of `rows`: (bytes per token, words per token)."""
    predicted = rows[:, 1:].numpy()
    texts = (encoding.decode(row.tolist()).replace("<|endoftext|>", " ") for row in predicted)
    words = sum(len(text.split()) for text in texts)
    return token_bytes(encoding)[predicted].sum() / predicted.size, words / predicted.size


def evaluate(model, rows, seed, compute="auto"):
    """All metrics of a model on validation rows (R, T), products in `compute` (see gpt2.yaml).

    Returns:
        dict with nelbo_12, nelbo, nelbo_stderr, left_to_right (list, or None if bidirectional),
        time_steps (list), rows (the number of rows).
    """
    device = model.wte.weight.device
    dtype = compute_type(device, compute)
    model = expand(model, dtype)
    steps = {*model.config.time_step_mask_fractions, 1.0}
    exits = model.blocks if model.config.attention_mode == "causal" else 0
    tick = progress((len(steps) + REPLICATES + exits) * len(rows))
    with autocast(device, dtype):
        bound, table = nelbo_12(model, rows, seed, tick)
        mean, stderr = nelbo(model, rows, seed, tick=tick)
        exits = left_to_right(model, rows, tick)
    return {"nelbo_12": bound, "nelbo": mean, "nelbo_stderr": stderr, "left_to_right": exits,
            "time_steps": table, "rows": len(rows)}


def memory(model, optimizer=None):
    """Bytes that training holds, by kind, counted from the tensors themselves.

    Returns:
        dict of trainable, frozen, adapters, embeddings (weights), gradients, optimizer, total.
    """
    held = Counter(trainable=0, frozen=0, adapters=0, embeddings=0, gradients=0, optimizer=0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name:
            kind = "adapters"
        elif name.startswith(("wte.", "wpe.")):
            kind = "embeddings"
        else:
            kind = "trainable" if tensor.requires_grad else "frozen"
        held[kind] += tensor.nbytes
        held["gradients"] += tensor.nbytes if tensor.requires_grad and optimizer else 0
    if optimizer:
        states = optimizer.state.values()
        held["optimizer"] = sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))
    return dict(held, total=sum(held.values()))


def memory_mib(device, reset=False):
    """Memory in use now and its peak since the last reset: (MiB, MiB).

    CUDA: what torch's allocator holds. Linux: the process's resident memory, whose peak the kernel
    resets on request. macOS: resident memory as `ps` tells it; the peak is the largest one read.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return now / MIB, peak / MIB
    status = Path("/proc/self/status")
    if status.exists():
        if reset:
            with contextlib.suppress(OSError):  # where it may not, the peak is the process's own
                Path("/proc/self/clear_refs").write_text("5")
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    ps = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True)
    now = int(ps.stdout) / 1024
    memory_mib.peak = now if reset else max(now, memory_mib.peak)
    return now, memory_mib.peak


def keep_freed_memory(return_now=False):
    """Let glibc keep what a step frees, for the next step to use again.

    By default it gives every large tensor back to the kernel and gets it anew, page by page and
    zeroed, which costs a step of GPT-2 Small on a CPU 17 to 29 % (tests/benchmark.py has rows with
    and without). return_now: give back all that is free now. Does nothing where there is no glibc.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never cut back ...
        if return_now:
            libc.malloc_trim(0)  # ... but here


# ---------------------------------------------------------------------------------------------
# Sampling


def begin(prompt, length, encoding, config):
    """What sampling starts from: <|endoftext|>, the prompt, and [MASK] where text is to be written.

    Each ____ (four underscores or more) in the prompt is a blank of one token, and then nothing is
    appended. GPT-2's tokens carry their leading space, so text before a blank loses its last ones.

    Args:
        length: tokens to write behind a prompt without blanks (None: 64, or what there is room for)

    Returns:
        (T,) token ids. UserError where they would not fit into the context.
    """
    *before, last = re.split("_{4,}", prompt)
    ids = [encoding.eot_token]
    for text in before:
        ids += [*encoding.encode_ordinary(text.rstrip(" ")), config.mask_id]
    ids += encoding.encode_ordinary(last)
    room = config.seq_len - len(ids)
    if before and length:
        raise UserError("blanks are filled in and nothing is appended: leave --length out")
    least = 0 if before else length or 1
    if room < least:
        raise UserError(f"the prompt has {len(ids) - 1} tokens, for {least} more the context of "
                        f"{config.seq_len} has no room; shorten "
                        + (f"it to {config.seq_len - 1 - least}" if least < config.seq_len - 1 else
                           f"--length to at most {room}"))
    n_masks = 0 if before else length or min(64, room)
    return torch.tensor(ids + [config.mask_id] * n_masks)


@torch.no_grad()
def sample(model, x, seed=0, temperature=1.0, top_p=0.95, steps=None, order="ancestral",
           full_depth=False, watch=lambda m, x: None):
    """Write text at the [MASK]s of `x` by running the mask diffusion backwards.

    Walks the time steps down; at each one only the blocks up to the owner of that mask fraction
    run (depth by noise).

    Args:
        x: (T,) token ids as from `begin`. steps: ascending mask fractions (None: the model's own).
        order: ancestral, or confidence: the surest predictions first, as many as the schedule says.
        full_depth: read the last exit at every step instead.
        watch: called with the mask fraction and the ids (T,), at the start and after each step.

    Returns:
        (T,) token ids without any [MASK], and the number of layer evaluations.
    """
    config, device = model.config, model.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    x = x[None].to(device)  # (1, T)
    n_masks = int((x == config.mask_id).sum())
    steps = [0.0, *(steps or config.time_step_mask_fractions)]
    layers = 0
    watch(1.0, x[0])
    for m_t, m_s in itertools.pairwise(reversed(steps)):
        block = model.blocks - 1 if full_depth else exit_of(m_t, model)
        how = (block, temperature, top_p, generator)
        if order == "confidence":
            x_s = confident_step(model, x, round(m_s * n_masks), *how)
        else:
            x_s = reverse_step(model, x, m_t, m_s, *how)
        # Where a step had nothing to reveal, no layer ran.
        layers += 0 if torch.equal(x_s, x) else (block + 1) * config.block_size
        x = x_s
        watch(m_s, x[0])
    return x[0], layers


@torch.no_grad()
def sample_left_to_right(model, x, block=None, seed=0, temperature=1.0, top_p=0.95):
    """Write the [MASK]s at the end of `x` (T,) one after another from a causal model's exit.

    Returns (T,) token ids and the number of layer evaluations.
    """
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    x = x[None].to(model.wte.weight.device, copy=True)  # (1, T)
    block = model.blocks - 1 if block is None else block
    masks = (x[0] == model.config.mask_id).nonzero().flatten().tolist()
    for i in masks:
        logits = model.head(model.hidden(x[:, :i], block)[:, -1])  # (1, V)
        x[0, i] = sample_tokens(logits, temperature, top_p, generator)
    return x[0], len(masks) * (block + 1) * model.config.block_size


# Colours of the 256-colour cube from red to blue, one per time step.
RAMP = (196, 202, 208, 214, 220, 190, 118, 48, 51, 45, 33, 63)


def watcher(encoding, mask_id):
    """watch(m, x) for `sample`. On a terminal the text is redrawn in place, each token in the
    colour of the step that revealed it; elsewhere every time step is one plain line."""
    live = sys.stdout.isatty()
    step, n_lines, born = 0, 0, {}

    def watch(m, x):
        nonlocal step, n_lines
        for position, token in enumerate(x.tolist()):
            if token != mask_id:
                born.setdefault(position, step)
        cells = []  # (character, ANSI code of its colour)
        for when, run in itertools.groupby(range(1, len(x)), born.get):
            ids = x[list(run)].tolist()
            text = "░" * len(ids) if when is None else encoding.decode(ids)
            # Masks dim, the prompt plain.
            code = {None: "2", 0: "0"}.get(when, f"38;5;{RAMP[((when or 1) - 1) % len(RAMP)]}")
            cells += [(c if c.isprintable() else " ", code) for c in text]
        step += 1
        if not live:
            print(f"m {m:.2f}  " + "".join(character for character, _ in cells), flush=True)
            return
        width = shutil.get_terminal_size().columns
        lines = [cells[i : i + width] for i in range(0, len(cells), width)]
        up = f"\033[{n_lines}A" if n_lines else ""
        drawn = ("".join(f"\033[0;{code}m{c}" for c, code in line) for line in lines)
        print(f"{up}\r\033[J" + "\033[0m\n".join(drawn) + "\033[0m", flush=True)
        n_lines = len(lines)
        time.sleep(0.3)

    return watch


def even_steps(n):
    """n mask fractions evenly spaced over (0, 1]; None for n None."""
    return n and [(i + 1) / n for i in range(n)]


def sample_text(model, encoding, training, prompt="", length=None, left_to_right=None, steps=None,
                watch=False, say=print, **how):
    """One sample as text, in the way the run was trained: by diffusion, or left to right.

    left_to_right: the exit to read (-1: the last), or None. watch: print every time step.
    how: seed, temperature, top_p, order, as for `sample`.
    """
    config, x = model.config, begin(prompt, length, encoding, model.config)
    causal, masked = config.attention_mode == "causal", training["time_step_masking"]
    blanks = re.search("_{4,}", prompt)
    if left_to_right is None and not (masked or blanks or steps or watch or "order" in how):
        left_to_right = -1
    if left_to_right is not None:
        if not causal or blanks or watch or steps or "order" in how:
            raise UserError("left to right needs a causal model and a prompt without blanks, and "
                            "has no --order, --steps or --watch")
    elif not masked:
        say("note: trained without masks: [MASK] is new to this model")
    if blanks and causal:
        say("note: a causal model sees only what stands left of a blank")
    device = model.wte.weight.device
    dtype = compute_type(device, training["compute_type"])
    model = expand(model, dtype)
    with autocast(device, dtype):
        if left_to_right is not None:
            ids, _ = sample_left_to_right(model, x, left_to_right % model.blocks, **how)
        else:
            show = {"watch": watcher(encoding, config.mask_id)} if watch else {}
            ids, _ = sample(model, x, steps=even_steps(steps), **show, **how)
    return encoding.decode(ids[1:].tolist())


# ---------------------------------------------------------------------------------------------
# The report


def report(folder, model, full=False, precision=None, say=print):
    """Evaluate a run and print its tables and one sample.

    Args:
        folder: checkpoints/<run_id>; model: from `load_run`.
        full: score every validation row instead of ROWS of them.

    Returns:
        the dict that eval.json holds (its keys are listed in README.md, section Monitoring).
    """
    config, training, data = read_config(folder)
    tokens = load_tokens(data, "val", config.vocab_size)
    encoding = tokenizer(config.vocab_size, data.folder)
    rows = validation_rows(tokens, config.seq_len, None if full else ROWS)
    stages = read_metrics(folder, "stage")  # damage is told now, not after minutes of scoring
    result = evaluate(model, rows, training["seed"], training["compute_type"])
    train_tokens = load_tokens(data, "train", config.vocab_size)
    bytes_per_token, words_per_token = units_of(rows, encoding)
    best = result["left_to_right"] and min(result["left_to_right"])
    result |= {
        "unigram": unigram_entropy(train_tokens, rows[:, 1:], config.vocab_size),
        "bits_per_byte": {
            "nelbo": result["nelbo"] / math.log(2) / bytes_per_token,
            "left_to_right": best and best / math.log(2) / bytes_per_token,
        },
        "perplexity": math.exp(result["nelbo"]),
        "perplexity_per_word": math.exp(min(result["nelbo"] / words_per_token, 700)),
        "precision": precision or training["quantization_type"],
        "memory": {"weights": memory(model), "stages": stages},
        "train_seconds": sum(stage["seconds"] for stage in stages),
        "train_tokens": sum(stage["tokens"] for stage in stages),
        "config": {"model": asdict(config), "training": training, "data": asdict(data)},
    }
    if model.blocks < config.total_blocks:
        say(f"\nnote: training has not ended; only exits 0 to {model.blocks - 1} exist, and the "
            f"heavier mask fractions are read at the last of them")
    print_report(folder, result, say)
    say("\nsample:")
    say(sample_text(model, encoding, training, seed=training["seed"]).strip())
    return result


def print_report(folder, result, say=print):
    """The tables of an evaluation, for people."""
    training = result["config"]["training"]
    name = f'{Path(folder).name} ({training["mode"]}'
    name += f', {training["fusion_mode"]})' if training["mode"] == "fused" else ")"
    say(f'\n{name}, weights in {result["precision"]}, {result["rows"]} validation rows')
    say("\nmask fraction  block  layers  cross-entropy  accuracy")
    for step in result["time_steps"]:
        say(f'{step["mask_fraction"]:13.2f}  {step["block"]:5d}  {step["layers"]:6d}  '
            f'{step["cross_entropy"]:13.3f}  {step["accuracy"]:8.1%}')
    lines = [("bound over the time steps (NELBO_12)", result["nelbo_12"])]
    lines.append((f'continuous bound (NELBO), +- {result["nelbo_stderr"]:.4f}', result["nelbo"]))
    for block, ce in enumerate(result["left_to_right"] or []):
        lines.append((f"left to right, exit {block}", ce))
    lines.append(("what ignoring the context gets (unigram)", result["unigram"]))
    say(f'\n{"":40s}  nats/token  perplexity')
    for label, nats in lines:
        say(f"{label:40s}  {nats:10.3f}  {math.exp(nats):10.1f}")
    if result["left_to_right"] is None:
        say("left to right is not defined for a bidirectional model")
    if not training["time_step_masking"]:
        say("trained without masks: [MASK] is new to it, so only left to right is its own ground")
    bits = result["bits_per_byte"]
    say(f'bits per byte: {bits["nelbo"]:.3f} by the continuous bound'
        + (f', {bits["left_to_right"]:.3f} left to right' if bits["left_to_right"] else ""))
    held = result["memory"]["weights"]
    parts = ", ".join(f"{kind} {held[kind] / MIB:.1f}" for kind in held
                      if held[kind] and kind != "total")
    say(f'weights {held["total"] / MIB:.1f} MiB: {parts}')
    stages = result["memory"]["stages"]
    if not stages:
        return
    say("\ntraining by stage; memory in MiB; `all` is what is held, in brackets by mode standard;")
    say("`peak` is the whole process, activations and libraries included (on a GPU: its tensors)")
    say("stage  block  steps  seconds  tokens/s  weights  gradients  optimizer  all (std)     peak")
    for s in stages:
        mib = {kind: value / MIB for kind, value in s["held"].items()}
        weights = mib["total"] - mib["gradients"] - mib["optimizer"]
        say(f'{s["stage"] + 1:5d}  {s["block"]:5d}  {s["step"]:5d}  {s["seconds"]:7.0f}  '
            f'{s["tokens"] / s["seconds"]:8,.0f}  {weights:7.1f}  {mib["gradients"]:9.1f}  '
            f'{mib["optimizer"]:9.1f}  {mib["total"]:5.0f} ({s["standard_bytes"] / MIB:.0f})'
            f'  {s["peak_mib"]:6.0f}')
    say(f'whole run: {result["train_seconds"]:.0f} s of training, at most '
        f'{max(s["held"]["total"] for s in stages) / MIB:.0f} MiB held, peak '
        f'{max(s["peak_mib"] for s in stages):.0f} MiB')


def signal_to_noise(linears, exact):
    """Power of the exact layers' weights over that of the stored ones' error: dB, None if exact."""
    signal = sum(x.dequantize().square().sum().item() for x in exact)
    noise = sum((x.dequantize() - y.dequantize()).square().sum().item()
                for x, y in zip(exact, linears))
    return 10 * math.log10(signal / noise) if noise else None


def precision_table(folder, device, full=False):
    """A run, or pretrained weights, in every storage: {kind: figures}, printed as a table.

    fp32 is the reference. What was trained without masks is judged left to right.
    """
    config, training, data = read_config(folder)
    tokens = load_tokens(data, "val", config.vocab_size)
    rows = validation_rows(tokens, config.seq_len, None if full else ROWS)
    table = {}
    print(f"{Path(folder).name}, {len(rows)} validation rows\n")
    masked = training["time_step_masking"]
    name = "NELBO_12" if masked else "best l2r"
    print(f"storage  layers MiB  bits/weight     dB  all MiB  {name}  perplexity   to fp32  "
          "left to right (l2r), exits 0, 1, ...")
    for kind in quant.KINDS:
        model = load_run(folder, kind, device).eval()
        linears = [m for m in model.modules() if isinstance(m, quant.QuantLinear)]
        stored = sum(linear.nbytes for linear in linears)
        count = sum(linear.in_features * linear.out_features for linear in linears)
        exact = linears if kind == "fp32" else exact  # fp32 is the first of quant.KINDS
        db = signal_to_noise(linears, exact)
        held = memory(model)["total"]
        dtype = compute_type(device, training["compute_type"])
        model = expand(model, dtype)
        with autocast(device, dtype):
            exits = left_to_right(model, rows)
            bound = nelbo_12(model, rows, training["seed"])[0] if masked else None
        nats = bound if masked else min(exits)
        reference = nats if kind == "fp32" else reference
        table[kind] = {"linear_bytes": stored, "bits_per_weight": 8 * stored / count,
                       "signal_to_noise_db": db, "bytes": held,
                       "nelbo_12": bound, "left_to_right": exits, "to_fp32": nats - reference}
        print(f"{kind:7s}  {stored / MIB:10.1f}  {8 * stored / count:11.3f}  "
              f"{f'{db:.2f}' if db else 'exact':>5s}  "
              f'{table[kind]["bytes"] / MIB:7.1f}  {nats:8.4f}  {math.exp(nats):10.1f}  '
              f'{round(nats - reference, 4) + 0.0:+8.4f}  '
              + " ".join(f"{ce:.4f}" for ce in exits or []), flush=True)
    return table


def kind_of_run(config, training):
    """A few words on how a run was trained."""
    fused = training["mode"] == "fused"
    if not fused and training["qlora_enabled"] and config.init_from != "scratch":
        return "plain QLoRA"
    if not training["time_step_masking"]:
        return "next-token"
    return f'fused, {training["fusion_mode"]}' if fused else "end-to-end diffusion"


def read_evaluation(folder):
    """A run's eval.json. UserError where it is missing or damaged."""
    path = Path(folder) / "eval.json"
    again = f"python evaluate_gpt2.py --run {path.parent.name}"
    if not path.exists():
        raise UserError(f"{path} is missing; {again}")
    with contextlib.suppress(AttributeError, ValueError):
        result = json.loads(path.read_text())
        if {"nelbo_12", "nelbo", "left_to_right", "bits_per_byte", "memory", "train_tokens",
            "train_seconds", "rows"} <= result.keys():
            return result
    raise UserError(f"{path} is damaged or of another version; {again}")


def compare(folders):
    """Print evaluated runs side by side. UserError for one that has no whole eval.json."""
    def column(value, width, digits):
        return f'{"-" if value is None else format(value, f",.{digits}f"):>{width}s}'

    runs = [(Path(folder), *read_config(folder), read_evaluation(folder)) for folder in folders]
    print(f'{"":54s}MiB{"":23s}left to right  bits per byte')
    print("run               trained                seconds      tokens   held   peak  "
          "NELBO_12   NELBO    best exit  bound    l. to r.")
    scored = set()
    for folder, config, training, data, result in runs:
        text = json.loads((folder / "config.json").read_text()).get("tokens_sha256")
        scored.add((text, config.vocab_size, config.seq_len, result["rows"], data.num_examples))
        stages, bits = result["memory"]["stages"], result["bits_per_byte"]
        held = max((stage["held"]["total"] / MIB for stage in stages), default=None)
        peak = max((stage["peak_mib"] for stage in stages), default=None)
        # [MASK] is new to a model trained without it: its bound says nothing.
        bound = bool(training["time_step_masking"]) or None
        best = result["left_to_right"] and min(result["left_to_right"])
        print(f'{folder.name:16s}  {kind_of_run(config, training):20s}'
              + column(result["train_seconds"], 10, 0) + column(result["train_tokens"], 12, 0)
              + column(held, 7, 0) + column(peak, 7, 0)
              + column(bound and result["nelbo_12"], 10, 3)
              + column(bound and result["nelbo"], 8, 3) + column(best, 13, 3)
              + column(bound and bits["nelbo"], 7, 3) + column(bits["left_to_right"], 12, 3))
    if len(scored) > 1:
        print("note: these runs were scored on different rows or vocabularies: only their bits per "
              "byte can be compared")


# ---------------------------------------------------------------------------------------------
# Pictures


def plot(folders, target, device):
    """Write loss.png, cross_entropy.png and memory.png of one or more runs into folder `target`.

    The cross-entropies are computed here: every exit at every time step, on PLOT_ROWS rows.
    UserError without matplotlib, the one optional package.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 13, "axes.grid": True, "grid.alpha": 0.3,
                         "axes.axisbelow": True, "savefig.dpi": 110, "figure.figsize": (9, 5.5),
                         "figure.constrained_layout.use": True, "legend.frameon": False})
    Path(target).mkdir(parents=True, exist_ok=True)
    pictures = (("loss", plot_loss), ("cross_entropy", plot_cross_entropy),
                ("memory", plot_memory))
    for name, draw in pictures:
        figure, axes = plt.subplots()
        draw(axes, [Path(folder) for folder in folders], device)
        figure.savefig(Path(target) / f"{name}.png")
        plt.close(figure)
        print(f"written to {Path(target) / name}.png")


def plot_loss(axes, folders, device):
    """Training loss over steps, dashed the validation loss of the stage's own time steps; a dotted
    line where a stage begins, named if there is one run."""
    for index, folder in enumerate(folders):
        done, colour = 0, f"C{index}"
        metrics = read_metrics(folder)
        for stage in [line for line in metrics if line["event"] == "plan"][-1]["stages"]:
            for event, loss, style in (("step", "loss", {"linewidth": 1, "alpha": 0.5}),
                                       ("validation", "cross_entropy", {"linestyle": "--"})):
                lines = [line for line in metrics
                         if line["event"] == event and line["stage"] == stage["index"]]
                named = event == "step" and not stage["index"]
                axes.plot([done + line["step"] for line in lines], [line[loss] for line in lines],
                          color=colour, label=folder.name if named else None, marker=".",
                          markevery=max(1, len(lines) // 30), **style)
            if len(folders) == 1 or stage["index"]:
                axes.axvline(done, color=colour, linestyle=":")
            if len(folders) == 1:
                m = stage["time_steps"]
                axes.text(done, 1.01, f' stage {stage["index"] + 1}: m {m[0]:g} to {m[-1]:g}',
                          transform=axes.get_xaxis_transform(), fontsize=11)
            done += stage["steps"]
    axes.set(xlabel="step", ylabel="nats per scored token; dashed: validation")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=11)


def plot_cross_entropy(axes, folders, device):
    """CE(m) of every exit, also outside its own band; solid where the exit owns m."""
    for index, folder in enumerate(folders):
        config, training, data = read_config(folder)
        dtype = compute_type(device, training["compute_type"])
        model = expand(load_run(folder, device=device), dtype)
        tokens = load_tokens(data, "val", config.vocab_size)
        rows = validation_rows(tokens, config.seq_len, PLOT_ROWS)
        noise = row_noise(len(rows), config.seq_len, training["seed"], tag=0)
        steps = sorted({*config.time_step_mask_fractions, 1.0})
        steps = [0.0] * (config.attention_mode == "causal") + steps
        for block in range(model.blocks):
            with autocast(device, dtype):
                ce = [score(model, rows, torch.full((len(rows),), m), block, noise)[0].mean()
                      for m in steps]
            own = [m > 0 and exit_of(m, model) == block for m in steps]
            colour = f"C{index if len(folders) > 1 else block}"
            axes.plot(steps, ce, color=colour, linestyle=(0, (4, 1 + block)), linewidth=1)
            axes.plot(*zip(*[point for point, mine in zip(zip(steps, ce), own) if mine]),
                      color=colour, marker="os^Dv"[block % 5],
                      label=f"{folder.name}, exit {block}" if model.blocks > 1 else folder.name)
    axes.set(xlabel="mask fraction m (0: left to right)", ylabel="CE(m), nats per masked token")
    axes.set_title(f"{PLOT_ROWS} validation rows; marked where the exit owns m", fontsize=12)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=11)


def plot_memory(axes, folders, device):
    """What training holds at each stage, in bars; a line at what `mode: standard` would hold."""
    labels, top = [], 0
    for folder in folders:
        first = len(labels)
        stages = read_metrics(folder, "stage")
        for stage in stages:
            held = {kind: value / MIB for kind, value in stage["held"].items()}
            parts = {"gradients": held["gradients"], "optimizer": held["optimizer"]}
            parts = {"weights": held["total"] - sum(parts.values())} | parts
            bottom = 0
            for colour, (kind, value) in enumerate(parts.items()):
                axes.bar(len(labels), value, 0.6, bottom, color=f"C{colour}",
                         label=None if labels else kind)
                bottom += value
            labels.append(f'{folder.name}\nstage {stage["stage"] + 1}')
            top = max(top, bottom, stage["standard_bytes"] / MIB)
        if stages:
            axes.hlines(stages[0]["standard_bytes"] / MIB, first - 0.45, len(labels) - 0.55,
                        "black", "dashed", label=None if first else "mode: standard")
    axes.set_xticks(range(len(labels)), labels, fontsize=11)
    axes.set(ylabel="held by training, MiB", ylim=(0, 1.05 * top or 1))
    axes.grid(axis="x", visible=False)
    axes.figure.legend(loc="outside lower center", ncols=4)


# ---------------------------------------------------------------------------------------------
# The command


def export(folder, target, precision=None):
    """Write a run's last exit, adapters merged, in Hugging Face's GPT-2 layout. UserError where
    the layout cannot hold it, or `target` holds something already."""
    if precision == "all" or (Path(target) / "config.json").exists():
        raise UserError(f"--export writes one precision, into a new folder; {target} holds a model "
                        f"or run already, or --precision is all")
    model = load_run(folder, precision)
    exit, dtype = model.blocks - 1, torch.float16 if precision == "fp16" else torch.float32
    try:
        lora.merge(model, exit).save_pretrained(target, dtype=dtype)
    except ValueError as error:
        raise UserError(f"cannot export {folder}: {error}") from None
    lost = f"exits 0 to {exit - 1} and the [MASK] row" if exit else "the [MASK] row"
    print(f"exit {exit} of {folder} written to {target}; lost: {lost}, so it is an ordinary GPT-2")


def pick_device(name):
    """torch.device for `device:` in gpt2.yaml; auto takes CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    try:
        if there.get(name.split(":")[0]):
            device = torch.device(name)
            if device.type != "cuda" or (device.index or 0) < torch.cuda.device_count():
                return device
    except RuntimeError:  # cpu:x
        pass
    raise UserError(f"device {name!r} is unknown or not available here; use auto, cpu, cuda or mps")


SAMPLING = ("prompt", "length", "steps", "order", "temperature", "top_p", "seed", "left_to_right",
            "watch")

# What an option that evaluates nothing would have to ignore.
WITHOUT = {"compare": ("run", "export", "full", "json", "precision"),
           "plot": ("export", "full", "json", "precision"), "export": ("full", "json")}


def parse(argv):
    """The command line. UserError for numbers out of range, and for what does not go together."""
    parser = argparse.ArgumentParser(description="Evaluate a run: tables, a sample, eval.json.")
    parser.add_argument("--run", metavar="RUN_ID", help="default: the newest run; with --precision "
                        "all also a path to weights in Hugging Face's GPT-2 layout")
    parser.add_argument("--folder", default="checkpoints", help="where the runs are")
    parser.add_argument("--precision", choices=[*quant.KINDS, "all"],
                        help="rebuild the run in this storage; all: a table of every one")
    parser.add_argument("--export", metavar="FOLDER", help="write the last exit, adapters merged, "
                        "in Hugging Face's GPT-2 layout, fp32 (with --precision fp16: fp16)")
    parser.add_argument("--compare", nargs="+", metavar="RUN_ID", help="runs side by side")
    parser.add_argument("--plot", nargs="?", const="", metavar="FOLDER",
                        help="write pictures, of the runs of --compare if given")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--full", action="store_true", help="score every validation row")
    parser.add_argument("--json", metavar="PATH", help="where to write the figures")
    group = parser.add_argument_group("sampling (with one of these nothing is evaluated)")
    group.add_argument("--prompt", metavar="TEXT", help="text to go on from; each ____ in it is a "
                       "blank of one token to fill in")
    group.add_argument("--length", type=int, metavar="N", help="tokens to write (64)")
    group.add_argument("--steps", type=int, metavar="N", help="even time steps (the run's own)")
    group.add_argument("--order", choices=("ancestral", "confidence"))
    group.add_argument("--temperature", type=float, metavar="X", help="0: the likeliest (1)")
    group.add_argument("--top-p", type=float, metavar="P", help="share of probability kept (0.95)")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument("--left-to-right", type=int, nargs="?", const=-1, metavar="EXIT",
                       help="token after token, from this exit of a causal model (the last)")
    group.add_argument("--watch", action="store_true", default=None, help="show every time step")
    args = parser.parse_args(argv)
    check_ranges(args)
    args.how = {key: getattr(args, key) for key in SAMPLING if getattr(args, key) is not None}
    if args.how and (args.precision == "all" or args.compare or args.export or args.full
                     or args.json or args.plot is not None):
        raise UserError("to sample, name one run with --run and one precision, and nothing else")
    for what, unused in WITHOUT.items():
        for name in unused if getattr(args, what) is not None else ():
            if getattr(args, name):
                raise UserError(f"--{name} means nothing to --{what}; leave one of them out")
    return args


def check_ranges(args):
    """UserError for a number of the command line that is out of range."""
    for name, least, most in (("length", 1, math.inf), ("steps", 1, 10_000), ("seed", 0, 2**63 - 1),
                              ("samples", 1, math.inf), ("temperature", 0, 1e6),
                              ("top_p", 1e-9, 1)):
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} must be from {least:g} to {most:g}")


@one_line_errors
def main(argv=None):
    args = parse(argv)
    runs = Path(args.folder)
    folder = runs / args.run if args.run else None
    if args.compare or args.plot is not None:
        folders = [runs / run for run in args.compare or [args.run or newest_run(runs).name]]
        if args.plot is None:
            compare(folders)
        else:
            for folder in folders:
                read_config(folder)  # before anything is computed
            plot(folders, args.plot or folders[0], pick_device(args.device))
        return 0
    keep_freed_memory()
    folder = folder or newest_run(runs)
    if args.run and is_pretrained(Path(args.run)):
        folder = Path(args.run)
        if args.precision != "all":
            raise UserError(f"{folder} holds weights, not a run: all that works on it is "
                            f"--precision all")
    device = pick_device(args.device)
    config, training, data = read_config(folder)
    if args.export:
        export(folder, args.export, args.precision)
        return 0
    for default in [] if is_pretrained(folder) else defaults_used(folder):
        print(f"note: {folder.name} was made before there was {default}, which is taken for it")
    name = f"eval_{args.precision}.json" if args.precision else "eval.json"
    path = Path(args.json or (folder.parent if folder.is_file() else folder) / name)
    path.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of scoring
    if path.is_dir():
        raise UserError(f"{path} is a folder; give --json the name of a file")
    if args.precision == "all":
        result = precision_table(folder, device, args.full)
    else:
        model = load_run(folder, args.precision, device)
        if not -1 <= (args.left_to_right or 0) < model.blocks:
            raise UserError(f"exit {args.left_to_right} does not exist; this run has exits 0 to "
                            f"{model.blocks - 1}")
        if args.how:
            encoding = tokenizer(config.vocab_size, data.folder)
            text = sample_text(model, encoding, training, **args.how)
            if not args.watch:
                print(text.strip())
            return 0
        result = report(folder, model, args.full, args.precision)
    write_atomically(path, json.dumps(result, indent=1).encode())
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
