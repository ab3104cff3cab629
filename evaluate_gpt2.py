"""Every metric, sampling, and the report of a run.

    python evaluate_gpt2.py                       the newest run
    python evaluate_gpt2.py --run tiny            a run by name
    python evaluate_gpt2.py --precision int4      the same run, rebuilt from its backups in int4
    python evaluate_gpt2.py --precision all       a table of every storage
    python evaluate_gpt2.py --compare tiny other  runs side by side
    python evaluate_gpt2.py --prompt "The people of" --full
    python evaluate_gpt2.py --run tiny --export tiny-gpt2     the last exit as a Hugging Face GPT-2
    python evaluate_gpt2.py --run tiny-gpt2 --precision all   such weights in every storage

Read from top to bottom: `load_run` (a run rebuilt from disk), `score` (the one primitive that all
metrics use), the metrics (`nelbo_12`, `nelbo`, `left_to_right`, `unigram_entropy`), `memory`,
sampling, and the report. All figures are in nats per token unless a name says otherwise.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import lora
import quant
from data_loader import (DataConfig, UserError, load_tokens, one_line_errors, token_bytes,
                         tokenizer, validation_rows, write_atomically)
from model import (GPT, ModelConfig, autocast, block_of, compute_type, corrupt, diffusion_loss,
                   read_pretrained, reverse_step, sample_tokens)

ROWS = 100  # validation rows scored by default
REPLICATES = 8  # independent estimates behind the standard error of the continuous NELBO
MIB = 2**20

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

    config = json.loads(path.read_text())
    model = {key: tuples(value) for key, value in config["model"].items()}
    training = {key: tuples(value) for key, value in config["training"].items()}
    return ModelConfig(**model), training, DataConfig(**config["data"])


def read_metrics(folder, event=None):
    """The lines of a run's metrics.jsonl, as dicts; only those of one event if it is given."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def load_run(folder, precision=None, device="cpu", resume=False):
    """Rebuild a run's model from disk: the one place that does, for evaluation and --resume.

    Finished blocks come from their backups and are stored in `precision` (None: the run's own
    quantization_type); the block in training, if there is one, and what plain QLoRA trained, from
    checkpoint.pt in fp32.

    Args:
        folder: checkpoints/<run_id>. precision: one of quant.KINDS or None.
        resume: also return the state that training goes on from.

    Returns:
        model, or (model, state) with resume; state is None where no stage is under way.

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
def score(model, rows, mask_fraction, block, noise, batch_size=20):
    """Each row's estimate of CE(m) and its accuracy, read at exit `block`.

    Args:
        rows: text, (R, T). mask_fraction: m of each row, (R,). noise: (R, T) from U[0, 1).

    Returns:
        cross-entropy (R,) in nats per masked token, accuracy (R,) in [0, 1]; float64.
    """
    device = model.wte.weight.device
    ce, accuracy = [], []
    for i in range(0, len(rows), batch_size):
        part = slice(i, i + batch_size)
        x_0, m = rows[part].to(device), mask_fraction[part].to(device)
        x_t, mask = corrupt(x_0, m, noise[part].to(device), model.config.mask_id)
        _, by_row, hit = diffusion_loss(model, x_0, x_t, mask, m, block)
        ce.append(by_row.cpu().double())
        accuracy.append(hit.cpu().double())
    return torch.cat(ce), torch.cat(accuracy)


def exit_of(mask_fraction, model):
    """The exit that owns a mask fraction, or the last one built where that does not exist yet."""
    return min(block_of(mask_fraction, model.config), model.blocks - 1)


def nelbo_12(model, rows, seed):
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
        ce, accuracy = score(model, rows, torch.full((len(rows),), m), block, noise)
        layers = (block + 1) * model.config.block_size
        table.append({"mask_fraction": m, "block": block, "layers": layers,
                      "cross_entropy": ce.mean().item(), "accuracy": accuracy.mean().item()})
        bound += (m - low) * table[-1]["cross_entropy"]
        low = m
    return bound, table


def nelbo(model, rows, seed, replicates=REPLICATES):
    """The continuous-time bound, the integral of CE(m) over (0, 1], and its standard error.

    Causal: m stratified over the rows. Bidirectional: sum over masked tokens / m has infinite
    variance near 0, so the number l of masked tokens is stratified over 1..N (N = T-1),
    m ~ Beta(l, N-l+1) names the exit, and l positions chosen at random are scored by their mean:
    the same integral. The standard error is over independent replicates on the same rows.

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
            ce, _ = score(model, rows[pick], scored_m[pick].float(), block, noise[pick])
            total[pick] = ce if scored_m is m else ce * scored_m[pick] * n / masked[pick]
        estimates.append(total.mean().item())
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / math.sqrt(replicates))


def left_to_right(model, rows):
    """CE(0) of every exit: a causal model's exact left-to-right loss. None if bidirectional."""
    if model.config.attention_mode != "causal":
        return None
    zeros, noise = torch.zeros(len(rows)), torch.ones(rows.shape)
    scores = [score(model, rows, zeros, block, noise) for block in range(model.blocks)]
    return [ce.mean().item() for ce, _ in scores]


def unigram_entropy(train_tokens, tokens, vocab_size):
    """What a model that ignores context gets on `tokens`: cross-entropy under the token
    frequencies of the training text (one added to every count), in nats per token."""
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[np.asarray(tokens).ravel()].mean())


def units_of(rows, encoding):
    """Bytes and words of the predicted part of `rows`: (bytes per token, words per token)."""
    predicted = rows[:, 1:].numpy()
    words = sum(len(encoding.decode(row.tolist()).split()) for row in predicted)
    return token_bytes(encoding)[predicted].sum() / predicted.size, words / predicted.size


def evaluate(model, rows, seed, compute="auto"):
    """All metrics of a model on validation rows (R, T), products in `compute` (see gpt2.yaml).

    Returns:
        dict with nelbo_12, nelbo, nelbo_stderr, left_to_right (list, or None if bidirectional),
        time_steps (list), rows (the number of rows).
    """
    model.eval()
    device = model.wte.weight.device
    with autocast(device, compute_type(device, compute)):
        bound, table = nelbo_12(model, rows, seed)
        mean, stderr = nelbo(model, rows, seed)
        exits = left_to_right(model, rows)
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
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    ps = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True)
    now = int(ps.stdout) / 1024
    memory_mib.peak = now if reset else max(now, memory_mib.peak)
    return now, memory_mib.peak


# ---------------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def sample(model, prompt, length, seed=0, temperature=1.0, top_p=0.95, time_steps=None):
    """Write text by running the mask diffusion backwards, with depth by noise.

    Begins with `prompt` and [MASK] everywhere else, and walks the time steps down; at each one
    only the blocks up to the owner of that mask fraction run.

    Args:
        prompt: token ids, at least one (<|endoftext|> for none). length: positions in all.
        time_steps: ascending mask fractions (None: the model's own 12).

    Returns:
        (length,) token ids without any [MASK], and the number of layer evaluations.
    """
    config = model.config
    steps = [0.0, *(time_steps or config.time_step_mask_fractions)]
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    x = torch.full((1, length), config.mask_id, device=model.wte.weight.device)  # (1, length)
    x[0, : len(prompt)] = torch.tensor(prompt)
    layers = 0
    for m_t, m_s in zip(steps[:0:-1], steps[-2::-1]):
        block = exit_of(m_t, model)
        x = reverse_step(model, x, m_t, m_s, block, temperature, top_p, generator)
        layers += (block + 1) * config.block_size
    return x[0], layers


@torch.no_grad()
def sample_left_to_right(model, prompt, length, block=None, seed=0, temperature=1.0, top_p=0.95):
    """Write text one token after another from a causal model's exit. -> (length,) token ids."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    x = torch.tensor([list(prompt)], device=model.wte.weight.device)  # (1, t)
    while x.size(1) < length:
        logits = model.head(model.hidden(x, block)[:, -1])  # (1, V)
        token = sample_tokens(logits, temperature, top_p, generator)  # (1,)
        x = torch.cat([x, token[:, None]], dim=1)
    return x[0]


def sample_text(model, encoding, training, prompt="", length=64, seed=0):
    """One sample as text, in the way the run was trained: by diffusion, or left to right."""
    ids = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    length = min(max(length, len(ids) + 1), model.config.seq_len)
    if len(ids) >= model.config.seq_len:
        raise UserError(f"the prompt has {len(ids) - 1} tokens; shorten it to at most "
                        f"{model.config.seq_len - 2}")
    device = model.wte.weight.device
    with autocast(device, compute_type(device, training["compute_type"])):
        if training["time_step_masking"]:
            ids, _ = sample(model, ids, length, seed)
        else:
            ids = sample_left_to_right(model, ids, length, seed=seed)
    return encoding.decode(ids[1:].tolist())


# ---------------------------------------------------------------------------------------------
# The report


def report(folder, model, full=False, precision=None, prompt="", say=print):
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
    result = evaluate(model, rows, training["seed"], training["compute_type"])
    train_tokens = load_tokens(data, "train", config.vocab_size)
    bytes_per_token, words_per_token = units_of(rows, encoding)
    best = result["left_to_right"] and min(result["left_to_right"])
    stages = read_metrics(folder, "stage")
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
    say(f'\nsample{" of " + repr(prompt) if prompt else ""}:')
    say(sample_text(model, encoding, training, prompt, seed=training["seed"]).strip())
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
    say("`peak` is the whole process, activations and libraries included")
    say("stage  block  steps  seconds  tokens/s  weights  gradients  optimizer  all (std)     peak")
    for s in stages:
        mib = {kind: value / MIB for kind, value in s["held"].items()}
        weights = mib["total"] - mib["gradients"] - mib["optimizer"]
        say(f'{s["stage"] + 1:5d}  {s["block"]:5d}  {s["step"]:5d}  {s["seconds"]:7.0f}  '
            f'{s["tokens"] / s["seconds"]:8,.0f}  {weights:7.1f}  {mib["gradients"]:9.1f}  '
            f'{mib["optimizer"]:9.1f}  {mib["total"]:5.0f} ({s["standard_bytes"] / MIB:.0f})'
            f'  {s["peak_mib"]:6.0f}')
    say(f'whole run: at most {max(s["held"]["total"] for s in stages) / MIB:.0f} MiB held, peak '
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
        with autocast(device, compute_type(device, training["compute_type"])):
            exits = left_to_right(model, rows)
            bound = nelbo_12(model, rows, training["seed"])[0] if masked else None
        nats = bound if masked else min(exits)
        if kind == "fp32":
            exact, reference = linears, nats
        db = signal_to_noise(linears, exact)
        table[kind] = {"linear_bytes": stored, "bits_per_weight": 8 * stored / count,
                       "signal_to_noise_db": db, "bytes": memory(model)["total"],
                       "nelbo_12": bound, "left_to_right": exits, "to_fp32": nats - reference}
        print(f"{kind:7s}  {stored / MIB:10.1f}  {8 * stored / count:11.3f}  "
              f"{f'{db:.2f}' if db else 'exact':>5s}  "
              f'{table[kind]["bytes"] / MIB:7.1f}  {nats:8.4f}  {math.exp(nats):10.1f}  '
              f'{nats - reference:+8.4f}  '
              + " ".join(f"{ce:.4f}" for ce in exits or []), flush=True)
    return table


def compare(folders):
    """Print evaluated runs side by side. UserError for one without eval.json."""
    print("run               mode                  tokens  seconds  peak MiB  NELBO_12   NELBO  "
          "left to right (best exit)")
    for folder in folders:
        _, training, _ = read_config(folder)
        path = Path(folder) / "eval.json"
        if not path.exists():
            raise UserError(f"{path} is missing; python evaluate_gpt2.py --run {path.parent.name}")
        result = json.loads(path.read_text())
        mode = training["mode"] if training["time_step_masking"] else "next-token"
        mode = f'fused, {training["fusion_mode"]}' if mode == "fused" else mode
        peak = max((stage["peak_mib"] for stage in result["memory"]["stages"]), default=math.nan)
        best = min(result["left_to_right"]) if result["left_to_right"] else math.nan
        print(f'{path.parent.name:16s}  {mode:16s}  {result["train_tokens"]:10,}  '
              f'{result["train_seconds"]:7.0f}  {peak:8.0f}  {result["nelbo_12"]:8.3f}  '
              f'{result["nelbo"]:6.3f}  {best:13.3f}')


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
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {name} is not available here; use training.device=cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or mps") from None


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate a run: tables, a sample, eval.json.")
    parser.add_argument("--run", metavar="RUN_ID", help="default: the newest run; with --precision "
                        "all also a path to weights in Hugging Face's GPT-2 layout")
    parser.add_argument("--folder", default="checkpoints", help="where the runs are")
    parser.add_argument("--precision", choices=[*quant.KINDS, "all"],
                        help="rebuild the run in this storage; all: a table of every one")
    parser.add_argument("--export", metavar="FOLDER", help="write the last exit, adapters merged, "
                        "in Hugging Face's GPT-2 layout, fp32 (with --precision fp16: fp16)")
    parser.add_argument("--compare", nargs="+", metavar="RUN_ID", help="runs side by side")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="begin the sample with TEXT")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--full", action="store_true", help="score every validation row")
    parser.add_argument("--json", metavar="PATH", help="where to write the figures")
    args = parser.parse_args(argv)
    if args.compare:
        compare([Path(args.folder) / run for run in args.compare])
        return 0
    folder = Path(args.folder) / args.run if args.run else newest_run(args.folder)
    if args.run and is_pretrained(Path(args.run)):
        folder = Path(args.run)
        if args.precision != "all":
            raise UserError(f"{folder} holds weights, not a run; add --precision all")
    device = pick_device(args.device)
    if args.export:
        export(folder, args.export, args.precision)
        return 0
    if args.precision == "all":
        result = precision_table(folder, device, args.full)
    else:
        model = load_run(folder, args.precision, device)
        result = report(folder, model, args.full, args.precision, args.prompt)
    name = f"eval_{args.precision}.json" if args.precision else "eval.json"
    path = Path(args.json or (folder.parent if folder.is_file() else folder) / name)
    write_atomically(path, json.dumps(result, indent=1).encode())
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
