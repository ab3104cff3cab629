"""What a run is worth: every metric, text from a prompt, tables, a picture.

    python evaluate_gpt2.py                       the newest run: tables, texts, eval.json
    python evaluate_gpt2.py --run tiny --precision int4   a run, rebuilt from its backups in int4
    python evaluate_gpt2.py sample "The people of" --watch     write text
    python evaluate_gpt2.py sample "The ____ of the ____ is"   fill in blanks
    python evaluate_gpt2.py compare tiny other    evaluated runs side by side
    python evaluate_gpt2.py plot tiny other       a picture: losses, exits, memory
    python evaluate_gpt2.py precision             the newest run in every storage
    python evaluate_gpt2.py export tiny-gpt2      the last exit as a Hugging Face GPT-2

A run is named by its folder's name in checkpoints/, or by a path. Weights in Hugging Face's layout
are evaluated as a run of zero steps (data/README.md, Others' weights).

Read from top to bottom:

1. `nelbo_12`, `nelbo`, `left_to_right`   metrics, all by `model.score`
2. `prompt_ids`, `write`                  a prompt in, text out
3. `report`, `compare`, `precision_table` tables
4. `plot`                                 a picture of three panels
5. `main`                                 the commands

All figures are in nats per token unless a name says otherwise.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

import lora
import quant
from data_loader import (Parser, Run, UserError, load_tokens, one_line_errors, tokenizer,
                         validation_rows, write_json, write_tokenizer)
from model import GPT, exit_of, noise_of_rows, pick_device, sample, score, usable
from train_gpt2_fusion import (MIB, fusion_schedule, keep_freed_memory, kind_of_run, load_run,
                               memory, perplexity, print_stages, print_table, stages_of)

ROWS = 100  # validation rows scored by default
DRAWS = 2  # a bidirectional model is scored on DRAWS / m draws of masks
REPLICATES = 8  # independent estimates behind the standard error of the continuous NELBO
WINDOW = 4  # tokens that are written together by confidence, unless another number is given
PLOT_ROWS = 16  # rows behind each point of the picture of cross-entropy over mask fraction

# ---------------------------------------------------------------------------------------------
# 1. Metrics


def progress(items, what):
    """Yield the items; say on stderr how far it is, on a terminal, else once a minute."""
    items, said, live = [*items], time.monotonic(), sys.stderr and sys.stderr.isatty()
    for number, item in enumerate(items):
        if live or time.monotonic() - said > 60:
            said = time.monotonic()
            text = f"{what} {number + 1} of {len(items)} "
            print(text, end="\r" if live else "\n", file=sys.stderr, flush=True)
        yield item
    if live:
        print(end="\033[K", file=sys.stderr, flush=True)


def standard_error(by_row):
    """Of the mean over rows (R,): how far other rows of this text would lie. None for one row."""
    return float(by_row.std() / math.sqrt(len(by_row))) if len(by_row) > 1 else None


def score_at(model, rows, m, exit_k, noise):
    """`score` of rows (R, T) at one mask fraction, the mean over draws of masks.

    One draw where every position is scored, else DRAWS / m, rounded up, so that masks come over
    each position DRAWS times. The draws shift `noise` (R, T) round by equal parts of 1: each is
    uniform by itself, and together they mask every position about equally often, which leaves far
    less variance.
    """
    one = m == 1 or model.config.attention_mode == "causal"
    n = 1 if one else math.ceil(DRAWS / m)
    fractions = torch.full((len(rows),), m)
    scores = [score(model, rows, fractions, exit_k, (noise + i / n) % 1) for i in range(n)]
    return tuple(torch.stack(part).mean(0) for part in zip(*scores))


def nelbo_12(model, rows, seed):
    """The bound over the time steps: sum over i of (m_i - m_{i-1}) CE(m_i), m_0 = 0, last m = 1.

    Each CE(m) is read at the exit that owns m. The term at m = 1 (all masked) is part of it.

    Returns:
        the bound of each row, (R,), in nats per token, and a list of {mask_fraction, block,
        cross_entropy, stderr, accuracy}, one per time step and one for m = 1.
    """
    steps = sorted({*model.config.time_step_mask_fractions, 1.0})
    noise = noise_of_rows(len(rows), rows.size(1), seed)
    table, bound, low = [], torch.zeros(len(rows), dtype=torch.float64), 0.0
    for m in progress(steps, "time step"):
        exit_k = exit_of(m, model)
        ce, accuracy = score_at(model, rows, m, exit_k, noise)
        table.append({"mask_fraction": m, "block": exit_k,
                      "cross_entropy": ce.mean().item(), "stderr": standard_error(ce),
                      "accuracy": accuracy.mean().item()})  # fmt: skip
        bound += (m - low) * ce
        low = m
    return bound, table


def nelbo(model, rows, seed):
    """The continuous-time bound, the integral of CE(m) over (0, 1], by independent replicates on
    the same rows. -> (REPLICATES, R) nats per token

    Causal models: m stratified over the rows. Others: see `bidirectional_nelbo`. Each m is read at
    the exit that owns it.
    """
    n_rows, seq_len = rows.shape
    causal = model.config.attention_mode == "causal"
    estimates = []
    for replicate in progress(range(REPLICATES), "replicate"):
        rng = np.random.default_rng([seed, 1 + replicate])
        noise = noise_of_rows(n_rows, seq_len, seed, 1 + replicate)
        # One number of [0, 1) for each row, one in each n_rows-th of it.
        strata = torch.from_numpy((rng.permutation(n_rows) + rng.random(n_rows)) / n_rows)
        if causal:
            m = 1 - strata  # in (0, 1]
            estimates.append(score_at_owners(model, rows, m, m, noise))
        else:
            estimates.append(bidirectional_nelbo(model, rows, strata, noise, rng))
    return torch.stack(estimates)


def bidirectional_nelbo(model, rows, strata, noise, rng):
    """An unbiased estimate of the integral of CE(m) for each row of a bidirectional model.

    Drawing m and then masks has infinite variance (a few masks, divided by a small m). With N = T-1
    and L(S) the summed loss on the masked set S, l = |S|:

        integral of CE(m) dm = sum over S of L(S) / N * integral of m^(l-1) (1-m)^(N-l) dm
                             = sum over S of L(S) / N * B(l, N-l+1),    B(l, N-l+1) C(N, l) = 1/l
                             = mean over l = 1..N and over the C(N, l) sets of L(S) / l

    So: draw l uniformly, l positions, and take their mean loss. The exit that S belongs to depends
    on m, whose density given l is that integrand: Beta(l, N-l+1).

    Args:
        strata: (R,) in [0, 1), from which l comes; noise: (R, T) from U[0, 1), which orders the
            positions, and is written over.

    Returns:
        (R,) nats per token.
    """
    n = rows.size(1) - 1  # N
    masked = (strata * n).long() + 1  # l of each row, 1..N
    m = torch.from_numpy(rng.beta(masked, n - masked + 1))
    # Replaced by its rank / N, exactly l numbers of a row are below (l - 1/2) / N.
    noise[:, 0] = 2.0
    noise = noise.argsort(1).argsort(1) / n
    threshold = (masked - 0.5) / n
    ce = score_at_owners(model, rows, m, threshold, noise)  # L(S) / (N threshold)
    return ce * threshold * n / masked


def score_at_owners(model, rows, m, threshold, noise):
    """`score` of rows (R, T) masked where noise < threshold (R,), at the exits that own m (R,)."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    owners = torch.tensor([exit_of(value, model) for value in m.tolist()])
    for exit_k in owners.unique().tolist():
        pick = owners == exit_k
        total[pick], _ = score(model, rows[pick], threshold[pick].float(), exit_k, noise[pick])
    return total


def left_to_right(model, rows, exit_k):
    """CE(0) of an exit, the exact left-to-right loss of each row, (R,), of a causal model."""
    return score(model, rows, torch.zeros(len(rows)), exit_k, torch.ones(rows.shape))[0]


def losses_by_row(model, rows):
    """What a model is judged by: {nelbo_12, left_to_right_<k>: (R,)}, and `nelbo_12`'s table.

    No bound if it never saw masks, no left to right if it is bidirectional.
    """
    config, losses, table = model.config, {}, []
    if config.time_step_masking:
        losses["nelbo_12"], table = nelbo_12(model, rows, config.seed)
    if config.attention_mode == "causal":
        exits = progress(range(model.blocks), "exit")
        losses |= {f"left_to_right_{k}": left_to_right(model, rows, k) for k in exits}
    return losses, table


def best_exit(losses):
    """The name of the best left_to_right_<k> in {name: nats}; None where there is none."""
    exits = [name for name in losses if name.startswith("left_to_right")]
    return min(exits, key=losses.get, default=None)


def unigram(train_tokens, rows):
    """What a model that ignores context gets: cross-entropy under the token frequencies of the
    training text (one added to every count), of each row, (R,), in nats per token."""
    counts = np.bincount(train_tokens, minlength=int(rows.max()) + 1) + 1.0
    return torch.from_numpy(-np.log(counts / counts.sum())[rows[:, 1:].numpy()].mean(1))


# ---------------------------------------------------------------------------------------------
# 2. A prompt in, text out


def prompt_ids(prompt, length, config):
    """What sampling starts from: <|endoftext|>, the prompt, and [MASK] where text is to be written.

    The prompt becomes what training read: its white space single spaces, <|endoftext|> one token.
    Each ____ (four underscores or more) in the prompt is a blank of one token, and then nothing is
    appended. GPT-2's tokens carry their leading space, so text before a blank loses its last one.

    Args:
        length: tokens to write behind a prompt without blanks (None: 64, or what there is room for)

    Returns:
        (1, T) token ids. UserError where they would not fit into the context.
    """
    encoding = tokenizer(config.vocab_size)
    *before, last = re.split("_{4,}", " ".join(prompt.split()))
    ids = [encoding.eot_token]
    for text in before:
        ids += [*encoding.encode(text.rstrip(" "), allowed_special="all"), config.mask_id]
    ids += encoding.encode(last, allowed_special="all")
    room = config.seq_len - len(ids)
    n_masks = 0 if before else length or max(1, min(64, room))
    if n_masks > room:
        raise UserError(f"the prompt ({len(ids) - 1} tokens) and what is to be written ({n_masks}) "
                        f"must be at most {config.seq_len - 1} tokens together")
    return torch.tensor([ids + [config.mask_id] * n_masks])


def write(model, prompt="", length=None, order=None, window=None, watch=False, **how):
    """One sample as text.

    Args:
        order, window: as for `sample`; None: the way the run was trained, by diffusion (by
            confidence, WINDOW tokens at a time) or left to right; ancestral: the whole text.
        watch: show every step but the last.
        how: exit_k, steps, temperature, top_p, seed, as for `sample`.
    """
    config = model.config
    encoding, causal = tokenizer(config.vocab_size), config.attention_mode == "causal"
    order = order or ("confidence" if config.time_step_masking else "left-to-right")
    if order == "confidence":
        window = window or WINDOW
    if order == "left-to-right" and not causal:
        raise UserError("left to right needs a causal model")

    def show(x):
        ids = x[0, 1:].tolist()
        runs = itertools.groupby(ids, lambda token: token == config.mask_id)
        text = "".join("░" * len([*run]) if masked else encoding.decode([*run])
                       for masked, run in runs)
        clear, left = "\033[2J\033[H" if sys.stdout.isatty() else "", ids.count(config.mask_id)
        line = f"{left:3d} masked  {' '.join(text.split())}\n" if left else ""  # 0: it is returned
        print(clear + line, end="", flush=True)
        time.sleep(0.1 if clear else 0)

    x = prompt_ids(prompt, length, config)
    ids = sample(quant.expand(model), x, order, window, watch=show if watch else lambda x: None,
                 **how)
    return encoding.decode(ids[0, 1:].tolist())


# ---------------------------------------------------------------------------------------------
# 3. Tables


def report(run, device, kind=None, full=False):
    """Evaluate a run: write its figures to eval.json (eval_<kind>.json), print them and texts.

    Args:
        kind: rebuild the run in this storage; full: score every row instead of ROWS of them.
    """
    model, state, _ = load_run(run, device, kind)
    config, stages = state.config, stages_of(run)
    train, val, digest = load_tokens(config, state.tokens_sha256)
    rows = validation_rows(val, config.seq_len, None if full else ROWS)
    fast = quant.expand(model)
    by_row, time_steps = losses_by_row(fast, rows)
    errors = {name: standard_error(values) for name, values in by_row.items()}
    if config.time_step_masking:
        estimates = nelbo(fast, rows, config.seed)  # (replicates, R)
        by_row = {"nelbo_12": by_row["nelbo_12"], "nelbo": estimates.mean(0)} | by_row
        errors["nelbo"] = standard_error(estimates.mean(1))
    by_row["unigram"] = unigram(train, rows)
    ids, encoding = rows[:, 1:].flatten().tolist(), tokenizer(config.vocab_size)
    text = encoding.decode_bytes([token for token in ids if token != encoding.eot_token])
    bytes_per_token = len(text) / len(ids)  # <|endoftext|> has none
    losses = {name: {"nats_per_token": values.mean().item(), "stderr": errors.get(name),
                     "perplexity": perplexity(values.mean().item()),
                     "bits_per_byte": values.mean().item() / math.log(2) / bytes_per_token,
                     "by_row": values.tolist()} for name, values in by_row.items()}
    result = {"losses": losses, "time_steps": time_steps, "rows": len(rows), "stages": stages,
              "tokens_sha256": digest, "config": vars(config)}  # fmt: skip
    path = run.folder / (f"eval_{kind}.json" if kind else "eval.json")
    try:
        write_json(path, result)
    finally:  # in a place to read from only, too
        print_report(run, model, state, kind or config.quantization_type, result)
        print_texts(model, val, best_exit({name: loss["nats_per_token"]
                                           for name, loss in losses.items()}))
    print(f"\nwritten to {path}")


def print_report(run, model, state, storage, result):
    """Print what `report` found: `result` is what eval.json holds."""
    config = state.config
    print(f"\n{run.name}: {kind_of_run(config)}, finished blocks in {storage}, "
          f"{memory(model)['weights_mib']:.1f} MiB; {result['rows']} validation rows of "
          f"{config.source}, context {config.seq_len}\n")
    if not state.finished:
        print(f"training has not ended (--resume {run} goes on): {model.blocks} of "
              f"{config.total_blocks} exits are there\n")
    if result["time_steps"]:
        print_table({"mask_fraction": ".2f", "block": "d", "cross_entropy": ".3f", "stderr": ".3f",
                     "accuracy": ".1%"}, result["time_steps"])  # fmt: skip
        print()
    print_table({"loss": "", "nats_per_token": ".3f", "stderr": ".3f", "perplexity": ".1f",
                 "bits_per_byte": ".3f"},
                [{"loss": name} | loss for name, loss in result["losses"].items()])
    print("nelbo_12: bound over the time steps; nelbo: over all mask fractions; left_to_right_k: "
          "the next\ntoken at exit k; unigram: ignoring the context. stderr is over the rows, "
          "neighbours in a text,\nso that it may be twice as large (nelbo: over draws of masks)\n")
    print_stages(run)


def print_texts(model, val, best):
    """Print what the model writes, left to right at exit `best` too, and a validation passage."""

    def show(how, text):
        print(f"\n{how}:\n"
              f"{textwrap.fill(text, 100, initial_indent='  ', subsequent_indent='  ')}")

    seed = model.config.seed
    if model.config.time_step_masking:
        show(f"written by diffusion, in windows of {WINDOW} tokens, the surest first",
             write(model, order="confidence", seed=seed))
    if best:
        exit_k = int(best.rpartition("_")[2])
        show(f"written left to right, from exit {exit_k}",
             write(model, order="left-to-right", exit_k=exit_k, seed=seed))
    encoding = tokenizer(model.config.vocab_size)
    passage = itertools.takewhile(lambda token: token != encoding.eot_token, val[:64].tolist())
    show("real text, from validation", encoding.decode([*passage]))


def evaluation(run):
    """What a run's eval.json holds. UserError where it is missing or damaged."""
    path = run.folder / "eval.json"
    try:
        result = json.loads(path.read_bytes())
        return {key: result[key] for key in ("losses", "time_steps", "rows", "stages", "config",
                                             "tokens_sha256")}  # fmt: skip
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        again = f"python evaluate_gpt2.py --run {run}"
        raise UserError(f"{path} is missing or damaged: evaluate first, {again}") from None


def compare(runs):
    """Print evaluated runs side by side, and paired row by row with the first."""
    results, table = [evaluation(run) for run in runs], []
    for run, result in zip(runs, results):
        nats, bits = ({name: loss[unit] for name, loss in result["losses"].items()}
                      for unit in ("nats_per_token", "bits_per_byte"))
        best, stages = best_exit(nats), result["stages"]
        result["losses"]["left_to_right"] = result["losses"].get(best)  # None: bidirectional
        table.append({
            "run": run.name, "nelbo_12": nats.get("nelbo_12"), "nelbo": nats.get("nelbo"),
            "left_to_right": nats.get(best), "bits_nelbo": bits.get("nelbo"),
            "bits_left_to_right": bits.get(best),
            "seconds": sum(stage["seconds"] for stage in stages),
            "tokens": sum(stage["tokens"] for stage in stages),
            "peak_mib": max((stage["peak_mib"] or 0 for stage in stages), default=0) or None,
        })  # fmt: skip
    print_table({"run": "", "seconds": ",.0f", "tokens": ",", "peak_mib": ",.0f",
                 "nelbo_12": ".3f", "nelbo": ".3f", "left_to_right": ".3f", "bits_nelbo": ".3f",
                 "bits_left_to_right": ".3f"}, table)
    print("left_to_right is that of the best exit; bits are per byte of text")
    scored = {(result["tokens_sha256"], result["config"]["seq_len"], result["rows"])
              for result in results}
    if len(scored) > 1:
        print("these runs were scored on other rows, texts or vocabularies: at most bits per byte "
              "compare")
        return
    table = []
    for run, result in zip(runs[1:], results[1:]):
        for loss in ("nelbo_12", "left_to_right"):
            pair = [one["losses"].get(loss) for one in (result, results[0])]
            steps = [one["config"]["time_step_mask_fractions"] for one in (result, results[0])]
            # Bounds over other time steps are other bounds.
            if None not in pair and (loss != "nelbo_12" or steps[0] == steps[1]):
                difference = torch.tensor(pair[0]["by_row"]) - torch.tensor(pair[1]["by_row"])
                table.append({"run": run.name, "loss": loss, "stderr": standard_error(difference),
                              "difference": difference.mean().item()})  # fmt: skip
    if table:
        print(f"\ndifference to {runs[0].name}, row by row (another seed would differ too)")
        print_table({"run": "", "loss": "", "difference": "+.3f", "stderr": ".3f"}, table)


def precision_table(run, device):
    """A run in every storage: a list of dicts, printed as a table. fp32 is the reference."""
    table = []
    for kind in quant.KINDS:  # fp32 is the first
        model, state, _ = load_run(run, device, kind)
        if not table:
            val = load_tokens(state.config, state.tokens_sha256)[1]
            rows = validation_rows(val, state.config.seq_len, ROWS)
            exact = [m for m in model.modules() if isinstance(m, quant.QuantLinear)]
        linears = [m for m in model.modules() if isinstance(m, quant.QuantLinear)]
        stored = sum(linear.nbytes for linear in linears)
        count = sum(linear.in_features * linear.out_features for linear in linears)
        losses, _ = losses_by_row(quant.expand(model), rows)
        row = {"storage": kind, "layers_mib": stored / MIB, "bits_per_weight": 8 * stored / count,
               "signal_to_noise_db": signal_to_noise(linears, exact)}  # fmt: skip
        row |= {name: values.mean().item() for name, values in losses.items()}
        table.append(row)
        row["to_fp32"] = row[next(iter(losses))] - table[0][next(iter(losses))]
    columns = {"storage": "", "layers_mib": ".1f", "bits_per_weight": ".3f",
               "signal_to_noise_db": ".2f"}  # fmt: skip
    print(f"{run.name}, {len(rows)} validation rows; to_fp32: {next(iter(losses))} minus that in "
          "fp32\n")
    print_table(columns | dict.fromkeys(losses, ".4f") | {"to_fp32": "+z.4f"}, table)
    return table


def signal_to_noise(linears, exact):
    """Power of the exact layers' weights over that of the stored ones' error: dB, None if exact."""
    signal = sum(x.dequantize().square().sum().item() for x in exact)
    noise = sum((x.dequantize() - y.dequantize()).square().sum().item()
                for x, y in zip(exact, linears))
    return 10 * math.log10(signal / noise) if noise else None


# ---------------------------------------------------------------------------------------------
# 4. A picture


def plot(runs, path, device):
    """Write a picture of runs: losses over steps, every exit at every mask fraction, memory held.

    The cross-entropies are computed here, on PLOT_ROWS rows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    if not os.access(path.parent, os.W_OK):  # said now, not when all is computed
        raise UserError(f"{path.parent} cannot be written to; choose a file by --to")
    figure = Figure(figsize=(18, 5.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for index, run in enumerate(runs):
        model, state, _ = load_run(run, device)
        plot_loss(axes[0], run, state.config, f"C{index}")
        plot_exits(axes[1], run, model, state, None if len(runs) == 1 else f"C{index}")
        plot_memory(axes[2], run, state.config)
    axes[0].set(xlabel="step", ylabel="nats per scored token; dashed: validation",
                title="training loss; dotted: a stage begins")
    axes[1].set(xlabel="mask fraction m (0: left to right)", ylabel="CE(m), nats per token",
                title=f"every exit, {PLOT_ROWS} rows; marked where it owns m")
    axes[2].set(ylabel="MiB", title="held by training; line: all layers at once, moments in fp32")
    axes[2].tick_params(axis="x", labelrotation=30)
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=110)
    print(f"written to {path}")


def plot_loss(axes, run, config, colour):
    """Training loss, and dashed the validation loss, of a run's stages one after another."""
    done = 0
    for stage in fusion_schedule(config):
        for event, key, style in (("step", "loss", "-"), ("validation", "cross_entropy", "--")):
            lines = [line for line in run.metrics(event, "stage", "step", key)
                     if line["stage"] == stage.block]  # fmt: skip
            axes.plot([done + line["step"] for line in lines], [line[key] for line in lines],
                      style, color=colour, alpha=0.7, marker="." if len(lines) == 1 else None,
                      label=None if done or event != "step" else run.name)  # fmt: skip
        axes.axvline(done, color=colour, linestyle=":")
        done += stage.steps


def plot_exits(axes, run, model, state, colour):
    """CE(m) of every exit, also outside its own band; marked, with errors, where it owns m."""
    config, model = state.config, quant.expand(model)
    val = load_tokens(config, state.tokens_sha256)[1]
    rows = validation_rows(val, config.seq_len, PLOT_ROWS)
    noise = noise_of_rows(len(rows), config.seq_len, config.seed)
    steps = [0.0] * (config.attention_mode == "causal")
    steps += sorted({*config.time_step_mask_fractions, 1.0}) if config.time_step_masking else []
    for exit_k in range(model.blocks):
        by_row = [score_at(model, rows, m, exit_k, noise)[0] for m in steps]
        ce, line = [values.mean().item() for values in by_row], colour or f"C{exit_k}"
        label = f"exit {exit_k}" if not colour else None if exit_k else run.name
        axes.plot(steps, ce, "--", color=line, linewidth=1, label=label)
        own = [(m, mean, standard_error(values) or 0) for m, mean, values in zip(steps, ce, by_row)
               if m == 0 or exit_of(m, model) == exit_k]  # fmt: skip
        axes.errorbar(*zip(*own), color=line, fmt="os^Dv"[exit_k % 5], capsize=3)


def plot_memory(axes, run, config):
    """What each stage holds, in bars; a line at what all layers at once hold, moments in fp32."""
    with torch.device("meta"):
        standard = 16 * sum(p.numel() for p in GPT(config).parameters()) / MIB
    for stage in stages_of(run):
        name, bottom = f"{run.name} {stage['stage']}", 0.0
        for colour, kind in enumerate(("weights", "gradients", "optimizer")):
            height = stage[f"{kind}_mib"]
            named = kind in axes.get_legend_handles_labels()[1]
            axes.bar(name, height, 0.6, bottom, color=f"C{colour}", label=None if named else kind)
            bottom += height
        axes.plot([name], [standard], "_k", markersize=40)


# ---------------------------------------------------------------------------------------------
# 5. The commands


def export(run, folder, exit_k=None, kind=None):
    """Write an exit of a run (None: the last), adapters merged, in Hugging Face's GPT-2 layout,
    with its tokenizer."""
    folder = Path(os.path.expanduser(folder))
    if (folder / "config.json").exists() or (folder / "model.safetensors").exists():
        raise UserError(f"{folder} holds a model already; name a new folder")
    model, _, _ = load_run(run, kind=kind)
    exit_k = model.exit_or_last(exit_k)
    dtype = torch.float16 if kind == "fp16" else torch.float32
    lora.merge(model, exit_k).save_pretrained(folder, exit_k, dtype)
    write_tokenizer(folder, model.config.vocab_size)
    print(f"exit {exit_k} of {run.name} written to {folder}: an ordinary GPT-2, without [MASK] and "
          "without the other exits")


def number(kind, low, high=10**9):
    """For argparse: an int or float from `low` to `high`."""

    def checked(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)

    checked.__name__ = kind.__name__  # for argparse's own message
    return checked


def parse(argv):
    """The command line; `report` where no command is named."""
    parser = Parser(description="Evaluate runs. Without a command: report.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, does, *options):
        sub = commands.add_parser(name, help=does, description=does)
        for option in options:
            sub.add_argument(option, **OPTIONS[option])
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")

    command("report", "evaluate a run: tables, texts, eval.json", "--run", "--precision", "--full")
    command("sample", "write text", "prompt", "--run", "--order", "--window", "--exit", "--length",
            "--steps", "--temperature", "--top-p", "--seed", "--watch")
    command("compare", "evaluated runs side by side", "runs")
    command("plot", "a picture of runs", "runs", "--to")
    command("precision", "a run in every storage, side by side", "--run")
    command("export", "write an exit, adapters merged, as a Hugging Face GPT-2", "folder", "--run",
            "--exit", "--precision")
    if argv[:1] not in (["-h"], ["--help"], *([name] for name in commands.choices)):
        argv = ["report", *argv]
    return parser.parse_args(argv)


OPTIONS = {
    "folder": {"metavar": "FOLDER", "help": "where to write it"},
    "runs": {"nargs": "+", "metavar": "RUN", "help": "names in checkpoints/, or paths"},
    "prompt": {"nargs": "?", "default": "", "help": "text to go on from; each ____ in it is a blank"
               " of one token to fill in"},
    "--run": {"help": "a name in checkpoints/ or a path; default: the newest"},
    "--precision": {"dest": "kind", "choices": quant.KINDS,
                    "help": "rebuild the run in this storage"},
    "--full": {"action": "store_true", "help": f"score every validation row, not {ROWS}"},
    "--to": {"metavar": "PNG", "help": "default: plot.png in the first run's folder"},
    "--exit": {"dest": "exit_k", "type": number(int, 0), "metavar": "K",
               "help": "default: the last; sample: by noise"},
    "--order": {"choices": ("ancestral", "confidence", "left-to-right"),
                "help": "default: the way the run was trained"},
    "--window": {"type": number(int, 1), "metavar": "N", "help": "tokens written together "
                 f"(confidence: {WINDOW}; ancestral: all; left to right: always 1)"},
    "--length": {"type": number(int, 1), "metavar": "N", "help": "tokens to write (64; into blanks:"
                 " always one each)"},
    "--steps": {"type": number(int, 1), "metavar": "N", "help": "even time steps (the run's own; "
                "left to right: always 1)"},
    "--temperature": {"type": number(float, 0), "default": 1.0, "metavar": "X",
                      "help": "0: the likeliest (1)"},
    "--top-p": {"type": number(float, 1e-6, 1), "default": 0.95, "metavar": "P",
                "help": "share of probability kept (0.95)"},
    "--seed": {"type": number(int, 0, 2**63 - 1), "default": 0, "metavar": "N",
               "help": "another one, another text (0)"},
    "--watch": {"action": "store_true", "help": "show every step"},
}  # fmt: skip


@one_line_errors
def main(argv):
    args = parse(argv)
    device = usable(pick_device(args.device))
    keep_freed_memory()
    if args.command in ("compare", "plot"):
        runs = [Run.named(name) for name in args.runs]
    else:
        run = Run.named(args.run)
    if args.command == "report":
        report(run, device, args.kind, args.full)
    elif args.command == "sample":
        model, _, _ = load_run(run, device)
        how = {key: value for key, value in vars(args).items()
               if key not in ("command", "run", "device")}  # fmt: skip
        print(write(model, **how).strip())
    elif args.command == "compare":
        compare(runs)
    elif args.command == "plot":
        plot(runs, Path(os.path.expanduser(args.to or runs[0].folder / "plot.png")), device)
    elif args.command == "precision":
        path, table = run.folder / "precision.json", precision_table(run, device)
        write_json(path, table)
        print(f"\nwritten to {path}")
    else:
        export(run, args.folder, args.exit_k, args.kind)


if __name__ == "__main__":
    sys.exit(main())
