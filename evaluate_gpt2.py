"""A run's folder, every metric, sampling, tables and pictures.

    python evaluate_gpt2.py                       the newest run: tables, a sample, eval.json
    python evaluate_gpt2.py --run tiny --precision int4   a run, rebuilt from its backups in int4
    python evaluate_gpt2.py sample "The people of" --watch     write text
    python evaluate_gpt2.py sample "The ____ of the ____ is"   fill in blanks
    python evaluate_gpt2.py compare tiny other    evaluated runs side by side
    python evaluate_gpt2.py plot tiny other       pictures
    python evaluate_gpt2.py precision             the newest run in every storage
    python evaluate_gpt2.py export tiny-gpt2      the last exit as a Hugging Face GPT-2

A run is named by its folder's name in checkpoints/, or by a path; weights in Hugging Face's GPT-2
layout are a run too, of zero steps. `COMMAND --help` has the options of each command.

Read from top to bottom:

1. `Run`             a run on disk: configuration, metrics, backups, checkpoint, evaluation
2. `score`           the one primitive that all metrics use; `nelbo_12`, `nelbo`, `left_to_right`
3. `pick_device`, `memory`   the machine: devices, what training holds, what the process takes
4. `sample`          text, in every order
5. `report`, `compare`, `precision_table`   tables, by one `print_table`
6. `plot`            pictures
7. `main`            the commands

All figures are in nats per token unless a name says otherwise.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

import lora
import quant
from data_loader import (KEYS_OF_THE_NETWORK, Parser, UserError, load_config, load_tokens,
                         one_line_errors, read_tensors, token_bytes, tokenizer, user_path,
                         validation_rows, write_json, write_tensors)
from model import (GPT, autocast, block_of, compute_type, confident_step, corrupt, diffusion_loss,
                   read_pretrained, reverse_step)

ROWS = 100  # validation rows scored by default
DRAWS = 2  # of masks at mask fraction m: this over m, where only masked positions are scored
REPLICATES = 8  # independent estimates behind the standard error of the continuous NELBO
WINDOW = 4  # tokens that are written together by confidence, unless another number is given
PLOT_ROWS = 16  # rows behind each point of the picture of cross-entropy over mask fraction
MIB = 2**20

# ---------------------------------------------------------------------------------------------
# 1. A run


@dataclass
class State:
    """Where a run stands: what a checkpoint says beside its tensors."""

    stage: int = 0  # in training; the number of stages when all are done
    step: int = 0  # steps done in that stage
    finished: bool = False
    blocks: int = 0  # that exist
    backups: list = field(default_factory=list)  # seals of the backups of blocks 0, 1, ...
    metrics_bytes: int = 0  # size of metrics.jsonl
    scaler: dict = field(default_factory=dict)  # of the loss, with fp16 products
    seconds: float = 0.0  # training time of the stage so far, validation and saving left out
    peak_mib: float = 0.0


class Run:
    """A run's folder, and the only place that knows what is in it.

        config.json                    gpt2.yaml as it was used, and the sha256 of the tokens
        metrics.jsonl                  a line for the plan, each logged step, validation and stage
        backup/block_<k>.safetensors   block k in full precision, from before it was converted
        checkpoint.safetensors         what is in no backup: weights in training, optimizer, state
        eval.json                      the evaluation

    Weights in Hugging Face's GPT-2 layout, a folder or a file, are a run of zero steps: one block,
    trained without masks.
    """

    def __init__(self, path):
        path = user_path(path)
        self.weights = path if is_pretrained(path) else None
        self.folder = path.parent if path.is_file() else path
        self.name = path.name
        if self.weights:
            self.config, self.tokens_sha256 = pretrained_config(path), None
            return
        file = self.folder / "config.json"
        if self.has_checkpoint(path) and not file.exists():
            raise UserError(f"{file} is missing, though there is a checkpoint; restore it, or "
                            f"train anew with --overwrite (the old run is moved aside)")
        if not file.exists():
            have = sorted(file.parent.name for file in path.parent.glob("*/config.json"))
            raise UserError(f"no run {self.name!r}; there are: {', '.join(have) or 'none'}")
        try:
            tree = json.loads(file.read_bytes())
            self.tokens_sha256 = str(tree.pop("tokens_sha256"))
            self.config = load_config(stored=(file, tree))
        except (AttributeError, KeyError, RecursionError, TypeError, UserError,
                ValueError) as error:
            raise UserError(f"{file} is damaged or of another version of this code ({error}); "
                            "restore it, or train the run again") from None

    @classmethod
    def named(cls, name):
        """The run of a name in checkpoints/ or of a path; None: the one with the newest metrics."""
        if name is None:
            files = sorted(runs_folder().glob("*/metrics.jsonl"), key=lambda f: f.stat().st_mtime)
            if not files:
                raise UserError(f"no run in {runs_folder()}/; train one first: python "
                                f"train_gpt2_fusion.py")
            return cls(files[-1].parent)
        path = user_path(name)
        if path.is_file() and (path.parent / "metrics.jsonl").is_file():  # a file of a run
            path = path.parent
        if not str(name).strip():
            raise UserError("name a run, or leave --run out for the newest")
        is_one = is_pretrained(path) or (path / "config.json").is_file()
        return cls(path if is_one else runs_folder() / name)

    def __str__(self):
        """How to name the run on a command line."""
        path = self.weights or self.folder
        return shlex.quote(self.name if path.parent == runs_folder() else str(path))

    @classmethod
    def start(cls, folder, config, tokens_sha256):
        """A new run in `folder`, where at most the beginning of one is that was never saved."""
        (Path(folder) / "metrics.jsonl").unlink(missing_ok=True)
        write_json(Path(folder) / "config.json", config.tree() | {"tokens_sha256": tokens_sha256})
        return cls(folder)

    @staticmethod
    def has_checkpoint(folder):
        """Whether a folder holds a run that can be gone on with."""
        return (Path(folder) / "checkpoint.safetensors").exists()

    @staticmethod
    def lock(folder):
        """Claim a run's folder for this process, until it ends or closes the file returned."""
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
        try:
            lock_file(file)
        except OSError:
            raise UserError(f"run {folder.name} is being trained by another process") from None
        return file

    def tokens(self):
        """Train and val tokens. UserError where the text is no longer that of the training."""
        train, val, digest = load_tokens(self.config.data, self.config.model.vocab_size)
        if self.tokens_sha256 not in (None, digest):
            raise UserError(f"the text {self.config.data.source} has changed since run {self.name} "
                            f"was begun; put the old one back, or train another run")
        self.tokens_sha256 = digest  # pretrained weights come without
        return train, val

    def record(self, event, **values):
        """Append a line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "ab") as file:
                file.write((json.dumps({"event": event, **values}) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def cut_metrics(self, size):
        """Cut metrics.jsonl back to the `size` bytes that a checkpoint counts on."""
        path = self.folder / "metrics.jsonl"
        if not path.exists() or path.stat().st_size < size:
            raise UserError(f"{path} is shorter than the checkpoint says; restore it, or train the "
                            f"run again with --overwrite")
        os.truncate(path, size)

    def metrics(self, event=None):
        """The lines of metrics.jsonl, as dicts; only those of one event if it is given."""
        path, lines = self.folder / "metrics.jsonl", []
        whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else ()
        for number, text in enumerate(whole, 1):  # a kill may leave half a line, the last
            try:
                line = json.loads(text)
                if event in (None, line["event"]):
                    lines.append(line)
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}: line {number} is damaged; restore it") from None
        return lines

    def back_up(self, model, block, step):
        """Write a block's weights, and its exit's adapters, as they are. -> the file's seal"""
        tensors = model.block_parameters(block) | lora.adapter_parameters(model, block)
        facts = {"block": block, "step": step, "config": self.config.tree()}
        return write_tensors(self.folder / "backup" / f"block_{block}.safetensors", tensors, facts)

    def save(self, model, optimizer, state):
        """Write the checkpoint: what resuming needs beside the backups.

        Args:
            optimizer: None at a stage's start and at the end of the run.
            state: State; blocks and metrics_bytes are filled in here.
        """
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for block in range(len(state.backups), model.blocks):
            tensors |= model.block_parameters(block)
        for name, p in model.named_parameters() if optimizer else ():
            kept = optimizer.state.get(p, {})
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in kept.items()}
        metrics = self.folder / "metrics.jsonl"
        with open(metrics, "ab") as file:
            os.fsync(file.fileno())  # the lines must be on disk before what counts them
            state.metrics_bytes, state.blocks = file.tell(), model.blocks
        (self.folder / "eval.json").unlink(missing_ok=True)  # it was of the model before this
        write_tensors(self.folder / "checkpoint.safetensors", tensors, asdict(state))

    def state(self):
        """The State of the last checkpoint; None where there is none yet."""
        return self._checkpoint()[0] if self.has_checkpoint(self.folder) else None

    def _checkpoint(self):
        """What checkpoint.safetensors holds: (State, tensors)."""
        path = self.folder / "checkpoint.safetensors"
        tensors, facts, _ = read_tensors(path)
        try:
            return State(**facts), tensors
        except TypeError as error:
            raise UserError(f"{path} is of another version of this code ({error}); train the run "
                            f"again") from None

    def resume(self, device="cpu", precision=None):
        """Rebuild the run as of its last checkpoint: the one place that reads its weights.

        Finished blocks come from their backups and are stored in `precision` (None: the run's own
        quantization_type), all else from the checkpoint, in fp32.

        Returns:
            model, State, {name: optimizer tensor}; three None where there is no checkpoint yet.
        """
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return None, None, None
        state, tensors = self._checkpoint()
        kind = precision or self.config.training.quantization_type
        model = GPT(self.config.model, blocks=0)
        for block, seal in enumerate(state.backups):
            backup = self.folder / "backup" / f"block_{block}.safetensors"
            if not backup.exists():
                raise UserError(f"{backup} is missing; put a copy back, or train the run again")
            stored, facts, found = read_tensors(backup)
            if found != seal:
                raise UserError(f"{backup} is not the one that {path} counts on; put that back")
            self._check_config(facts["config"])
            model.grow()
            self._fill(model, stored, [block], backup)
            quant.freeze_block(model, block, kind)
        unfinished = range(model.blocks, state.blocks)
        for _ in unfinished:
            model.grow()
        optimizer = {name.removeprefix("optimizer."): tensors.pop(name)
                     for name in [*tensors] if name.startswith("optimizer.")}  # fmt: skip
        self._fill(model, tensors, unfinished, path)
        return model.to(device), state, optimizer

    def _check_config(self, trained):
        """UserError where a key that changes figures is no longer what a block was trained with."""
        for section, entries in json.loads(json.dumps(self.config.tree())).items():
            for key, value in entries.items():
                matters = section == "model" or key in (*KEYS_OF_THE_NETWORK, "seed")
                if matters or key.startswith("qlora_"):
                    if trained[section][key] != value:
                        raise UserError(f"{self.folder / 'config.json'} has been changed: "
                                        f"{section}.{key} was {trained[section][key]!r} and is "
                                        f"now {value!r}; put the old one back")

    def _fill(self, model, tensors, blocks, path):
        """Fill `blocks` from tensors by name, adapters and [MASK] row too where there are any.

        UserError names the first tensor that is missing, unknown or of another shape.
        """
        training = self.config.training
        adapted = {}  # exit -> layers
        for name in tensors:
            if ".lora_" in name:
                _, layer, *_, exit_k = name.split(".")
                adapted.setdefault(int(exit_k), set()).add(int(layer))
        for exit_k, layers in adapted.items():
            lora.add_adapters(model, exit_k, sorted(layers), training.qlora_rank,
                              training.qlora_alpha, training.qlora_dropout)
        if "mask_row" in tensors:
            model.add_mask_row()
        parameters = dict(model.named_parameters())
        needed = [name for block in blocks for name in model.block_parameters(block)]
        needed += [name for exit_k in adapted for name in lora.adapter_parameters(model, exit_k)]
        for name in dict.fromkeys([*needed, *tensors]):
            shape = getattr(tensors.get(name), "shape", None)
            if shape is None or name not in parameters or parameters[name].shape != shape:
                raise UserError(f"{path} does not fit config.json: {name}")
            parameters[name].data.copy_(tensors[name])

    def load(self, precision=None, device="cpu"):
        """The run's model for evaluation, with finished blocks stored in `precision`.

        Pretrained weights are stored in fp32 unless it is given. UserError for a run without
        weights and for an unfinished run's `precision`.
        """
        if self.weights:
            model = GPT.from_pretrained(self.weights, self.config.model)
            quant.freeze_block(model, 0, precision or self.config.training.quantization_type)
            return model.to(device)
        model, state, _ = self.resume(device, precision)
        if model is None:
            raise UserError(f"run {self.name} has no checkpoint yet; go on with --resume")
        if precision and not state.finished:
            raise UserError(f"run {self.name} has not ended; finish it with --resume before asking "
                            f"for a precision")
        return model

    def evaluation(self):
        """What eval.json holds. UserError where it is missing or damaged."""
        path = self.folder / "eval.json"
        again = f"python evaluate_gpt2.py --run {self}"
        if not path.exists():
            raise UserError(f"{path} is missing; {again}")
        with contextlib.suppress(AttributeError, ValueError):
            result = json.loads(path.read_bytes())
            if EVALUATION_KEYS <= result.keys():
                return result
        raise UserError(f"{path} is damaged or of another version; {again}")


EVALUATION_KEYS = {"nelbo_12", "nelbo_12_stderr", "nelbo", "nelbo_stderr", "left_to_right",
                   "left_to_right_stderr", "by_row", "time_steps", "unigram", "bits_per_byte",
                   "tokens_sha256", "memory", "train_seconds", "train_tokens", "rows", "config"}


@functools.cache
def runs_folder():
    """Where a run is looked for by its name."""
    return user_path(load_config().training.folder)


def lock_file(file):
    """Lock an open file for this process alone. OSError if another process has done so."""
    with contextlib.suppress(ImportError):
        import fcntl  # Linux, macOS

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.suppress(ImportError):
        import msvcrt  # Windows

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def is_pretrained(path):
    """Whether a path is not a run but a file or folder in Hugging Face's GPT-2 layout."""
    if path.is_file():
        return path.suffix in (".safetensors", ".bin")
    return any((path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))


def pretrained_config(path):
    """What an evaluation of pretrained weights needs: gpt2.yaml, but with their sizes."""
    found, _ = read_pretrained(path)
    defaults = load_config()
    model = {key: getattr(found, key) for key in ("vocab_size", "d_model", "n_layers", "n_heads")}
    model["seq_len"] = min(found.seq_len, defaults.model.seq_len)
    tree = defaults.tree()
    tree["model"] |= model | {"init_from": str(path)}
    tree["training"] |= {"mode": "standard", "time_step_masking": False,
                         "quantization_type": "fp32", "qlora_enabled": False}
    return load_config(stored=(path, tree))


# ---------------------------------------------------------------------------------------------
# 2. Metrics


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
        CE estimates (R,) in nats per token, accuracy (R,) in [0, 1]; float64.
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
            dense = quant.dense(module.dequantize(dtype), module.bias.to(dtype))
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


def standard_error(by_row):
    """Of the mean over rows (R,): how far other rows of this text would lie. None for one row."""
    return float(by_row.std() / math.sqrt(len(by_row))) if len(by_row) > 1 else None


def draws_of_masks(m, config):
    """How many draws of masks an estimate of CE(m) is the mean of: one where every position is
    scored, else DRAWS / m, rounded up, so that masks come over each position DRAWS times."""
    one = m == 1 or config.attention_mode == "causal"
    return 1 if one else math.ceil(DRAWS / m)


def score_at(model, rows, m, block, noise, tick=lambda n: None):
    """`score` of rows (R, T) at one mask fraction, the mean over its draws of masks.

    The draws shift `noise` (R, T) round by equal parts of 1: each is uniform by itself, and
    together they mask every position about equally often, which leaves far less variance.
    """
    n = draws_of_masks(m, model.config)
    fractions = torch.full((len(rows),), m)
    scores = [score(model, rows, fractions, block, (noise + i / n) % 1, tick) for i in range(n)]
    return tuple(torch.stack(part).mean(0) for part in zip(*scores))


def nelbo_12(model, rows, seed, tick=lambda n: None):
    """The bound over the time steps: sum over i of (m_i - m_{i-1}) CE(m_i), m_0 = 0, last m = 1.

    Each CE(m) is read at the exit that owns m. The term at m = 1 (all masked) is part of it.

    Returns:
        the bound of each row, (R,), in nats per token, and a list of {mask_fraction, block, layers,
        cross_entropy, stderr, accuracy}, one per time step and one for m = 1.
    """
    steps = sorted({*model.config.time_step_mask_fractions, 1.0})
    noise = row_noise(len(rows), rows.size(1), seed, tag=0)
    table, bound, low = [], torch.zeros(len(rows), dtype=torch.float64), 0.0
    for m in steps:
        block = exit_of(m, model)
        ce, accuracy = score_at(model, rows, m, block, noise, tick)
        layers = (block + 1) * model.config.block_size
        table.append({"mask_fraction": m, "block": block, "layers": layers,
                      "cross_entropy": ce.mean().item(), "stderr": standard_error(ce),
                      "accuracy": accuracy.mean().item()})  # fmt: skip
        bound += (m - low) * ce
        low = m
    return bound, table


def nelbo(model, rows, seed, replicates=REPLICATES, tick=lambda n: None):
    """The continuous-time bound, the integral of CE(m) over (0, 1], and its standard error.

    Causal models: m stratified over the rows. Bidirectional ones: see `both_ways`. Each m is read
    at the exit that owns it; the error is over independent replicates on the same rows.

    Returns:
        (mean, standard error of the mean) in nats per token.
    """
    n_rows, seq_len = rows.shape
    causal = model.config.attention_mode == "causal"
    estimates = []
    for replicate in range(replicates):
        rng = np.random.default_rng([seed, 1 + replicate])
        noise = row_noise(n_rows, seq_len, seed, 1 + replicate)
        # One number of [0, 1) for each row, one in each n_rows-th of it.
        strata = torch.from_numpy((rng.permutation(n_rows) + rng.random(n_rows)) / n_rows)
        if causal:
            m = 1 - strata  # in (0, 1]
            by_row = score_at_owners(model, rows, m, m, noise, tick)
        else:
            by_row = both_ways(model, rows, strata, noise, rng, tick)
        estimates.append(by_row.mean().item())
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / math.sqrt(replicates))


def both_ways(model, rows, strata, noise, rng, tick):
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
            positions.

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
    ce = score_at_owners(model, rows, m, threshold, noise, tick)  # L(S) / (N threshold)
    return ce * threshold * n / masked


def score_at_owners(model, rows, m, threshold, noise, tick):
    """`score` of rows (R, T) masked where noise < threshold (R,), at the exits that own m (R,)."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    owners = torch.tensor([exit_of(value, model) for value in m.tolist()])
    for block in owners.unique().tolist():
        pick = owners == block
        total[pick], _ = score(model, rows[pick], threshold[pick].float(), block, noise[pick], tick)
    return total


def left_to_right(model, rows, tick=lambda n: None):
    """CE(0) of every exit, the exact left-to-right loss of each row: (exits, R). None if the model
    is bidirectional."""
    if model.config.attention_mode != "causal":
        return None
    zeros, noise = torch.zeros(len(rows)), torch.ones(rows.shape)
    scores = [score(model, rows, zeros, block, noise, tick) for block in range(model.blocks)]
    return torch.stack([ce for ce, _ in scores])


def unigram_entropy(train_tokens, tokens, vocab_size):
    """What a model that ignores context gets on `tokens`: cross-entropy under the token
    frequencies of the training text (one added to every count), in nats per token."""
    counts = np.bincount(train_tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[np.asarray(tokens).ravel()].mean())


def perplexity(nats):
    """exp of a loss, as far as a float reaches."""
    return math.exp(min(nats, 700))


def evaluate(model, rows, seed, compute="auto"):
    """All metrics of a model on validation rows (R, T), products in `compute` (see gpt2.yaml).

    Returns:
        dict with nelbo_12, nelbo, left_to_right (list, or None if bidirectional), time_steps
        (list), rows (the number of rows); nelbo_stderr is over draws of masks on the same rows,
        the other standard errors over the rows; by_row holds what they come from.
    """
    device = model.wte.weight.device
    dtype = compute_type(device, compute)
    model = expand(model, dtype)
    steps = {*model.config.time_step_mask_fractions, 1.0}
    passes = REPLICATES + sum(draws_of_masks(m, model.config) for m in steps)
    passes += model.blocks if model.config.attention_mode == "causal" else 0
    tick = progress(passes * len(rows))
    with autocast(device, dtype):
        bound, table = nelbo_12(model, rows, seed, tick)
        mean, stderr = nelbo(model, rows, seed, tick=tick)
        exits = left_to_right(model, rows, tick)
    causal = exits is not None
    return {"nelbo_12": bound.mean().item(), "nelbo_12_stderr": standard_error(bound),
            "nelbo": mean, "nelbo_stderr": stderr,
            "left_to_right": exits.mean(1).tolist() if causal else None,
            "left_to_right_stderr": [*map(standard_error, exits)] if causal else None,
            "time_steps": table, "rows": len(rows),
            "by_row": {"nelbo_12": bound.tolist(),
                       "left_to_right": exits.tolist() if causal else None}}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# 3. The machine


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


def memory(model, optimizer=None):
    """What training holds, in MiB by kind, counted from the tensors themselves.

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
    held["total"] = sum(held.values())
    return {kind: size / MIB for kind, size in held.items()}


def memory_mib(device, reset=False):
    """Memory in use now and its peak since the last reset, in MiB; (None, None) where unknown.

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
    try:
        ps = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True)
        now = int(ps.stdout) / 1024
    except (OSError, ValueError):  # no ps, or one without these options (Git Bash on Windows)
        return None, None
    memory_mib.peak = now if reset else max(now, memory_mib.peak)
    return now, memory_mib.peak


memory_mib.peak = 0.0  # where `ps` tells it


def keep_freed_memory(return_now=False):
    """Let glibc keep what a step frees, for the next step to use again.

    By default it gives every large tensor back to the kernel and gets it anew, page by page and
    zeroed, which costs a step of GPT-2 Small on a CPU 3 to 6 % (tests/benchmark.py has rows with
    and without). return_now: give back all that is free now. Does nothing where there is no glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc: macOS, Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never cut back ...
        if return_now:
            libc.malloc_trim(0)  # ... but here


# ---------------------------------------------------------------------------------------------
# 4. Sampling


def begin(prompt, length, encoding, config):
    """What sampling starts from: <|endoftext|>, the prompt, and [MASK] where text is to be written.

    Each ____ (four underscores or more) in the prompt is a blank of one token, and then nothing is
    appended. GPT-2's tokens carry their leading space, so text before a blank loses its last ones.

    Args:
        length: tokens to write behind a prompt without blanks (None: 64, or what there is room for)

    Returns:
        (1, T) token ids. UserError where they would not fit into the context.
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
        raise UserError(f"the prompt ({len(ids) - 1} tokens) and what is to be written ({least}) "
                        f"must be at most {config.seq_len - 1} tokens together")
    n_masks = 0 if before else length or min(64, room)
    return torch.tensor([ids + [config.mask_id] * n_masks])


@torch.no_grad()
def sample(model, x, order="ancestral", window=None, exit_k=None, steps=None, temperature=1.0,
           top_p=0.95, seed=0, watch=lambda x: None):  # fmt: skip
    """Write text at the [MASK]s of `x`, a window of them after another from left to right, each
    window by the whole reverse process (LLaDA, arXiv 2502.09992, section 2.4).

    Args:
        x: (B, T) token ids as from `begin`, with [MASK] at the same places in every row.
        order: within a window: ancestral (the reverse process of the bound) or confidence (the
            surest predictions first, as many as the schedule says). left-to-right: windows of one
            token in one step.
        window: number of [MASK]s written together (None: all of them, which is plain diffusion).
        exit_k: the exit to read. None: depth by noise, at each mask fraction of the window only the
            blocks up to its owner run; left to right, the last exit.
        steps: number of even time steps (None: the model's own). Not used left to right.
        watch: called with the ids (B, T), at the start and after each step that revealed some.

    Returns:
        (B, T) token ids without any [MASK], and the layer evaluations that each row needed, (B,).
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
    layers = torch.zeros(len(x), dtype=torch.long)
    watch(x)
    for places in masks.split(window or max(1, len(masks))):
        end = int(places[-1]) + 1 if len(places) else 0
        # A causal model need not be shown what stands right of the window.
        seen = x[:, :end] if config.attention_mode == "causal" else x
        for m_t, m_s in itertools.pairwise(reversed([0.0, *fractions])):
            block = exit_of(m_t, model) if exit_k is None else exit_k
            if order == "ancestral":
                x_s = reverse_step(model, seen, m_t, m_s, block, end, **draw)
            else:
                n_left = round(m_s * len(places))
                x_s = confident_step(model, seen, n_left, block, end, **draw)
            changed = (x_s != seen).any(1)  # where a step had nothing to reveal, no layer ran
            layers += changed.cpu() * (block + 1) * config.block_size
            seen.copy_(x_s)  # into x
            if changed.any():
                watch(x)
    return x, layers


# Colours of the 256-colour cube, from red to blue.
RAMP = (196, 202, 208, 214, 220, 190, 118, 48, 51, 45, 33, 63)


class Watcher:
    """What `sample` calls with the ids (1, T) after each step: shows the text, if `show`, and keeps
    it in `frames`, for `write_gif`.

    A token's colour says when it was revealed, from red for the first to blue for the last. On a
    terminal the text is redrawn in place, as far as the window reaches; elsewhere every step is
    one plain line.
    """

    def __init__(self, encoding, mask_id, show=True):
        self.encoding, self.mask_id, self.show = encoding, mask_id, show
        self.born = {}  # position -> index into RAMP, None for the prompt
        self.frames = []  # (heading, cells); a cell is (character, colour)
        self.n_lines = 0

    def __call__(self, x):
        ids = x[0].tolist()
        masked = ids.count(self.mask_id)
        if not self.frames:
            self.total = masked
            colour = None
        else:
            colour = (len(RAMP) * (self.total - masked) - 1) // self.total
        for position, token in enumerate(ids):
            if token != self.mask_id:
                self.born.setdefault(position, colour)
        cells = []
        colours = {position: self.born.get(position, "masked") for position in range(1, len(ids))}
        for colour, run in itertools.groupby(colours, colours.get):
            part = [ids[position] for position in run]
            text = "░" * len(part) if colour == "masked" else self.encoding.decode(part)
            cells += [(c if c.isprintable() else " ", colour) for c in text]
        self.frames.append((f"{masked} of {self.total} tokens are [MASK]", cells))
        if self.show and sys.stdout.isatty():
            self.redraw()
        elif self.show:
            print(f"{masked:3d}  " + "".join(character for character, _ in cells), flush=True)

    def redraw(self):
        """Draw the last frame over the one before."""
        heading, cells = self.frames[-1]
        width, height = shutil.get_terminal_size()
        lines = wrapped(cells, width - 1)[: height - 2]
        up = f"\033[{self.n_lines}A" if self.n_lines else ""
        drawn = [f"{heading}; red: revealed first, blue: last"[:width]]
        drawn += ["".join(f"\033[0;{ansi(colour)}m{c}" for c, colour in line) for line in lines]
        print(f"{up}\r\033[J" + "\033[0m\n".join(drawn) + "\033[0m", flush=True)
        self.n_lines = len(drawn)
        time.sleep(0.3)


def ansi(colour):
    """A cell's colour for a terminal: masks dim, the prompt plain."""
    return {None: "0", "masked": "2"}.get(colour) or f"38;5;{RAMP[colour]}"


def wrapped(cells, width):
    """Cells (character, colour) as lines of at most `width` columns, broken at spaces if possible;
    Chinese characters and their like take two columns."""
    lines, line, columns = [], [], 0
    for cell in cells:
        size = 2 if unicodedata.east_asian_width(cell[0]) in "WF" else 1
        if columns + size > width:
            spaces = [i for i, (character, _) in enumerate(line) if character == " "]
            cut = spaces[-1] + 1 if spaces and len(line) - spaces[-1] < width // 2 else len(line)
            lines.append(line[:cut])
            line = line[cut:]
            columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c, _ in line)
        line.append(cell)
        columns += size
    return [*lines, line]


def sample_text(model, training, prompt="", length=None, order=None, window=None, watch=None,
                **how):  # fmt: skip
    """One sample as text.

    Args:
        order, window: as for `sample`; None: the way the run was trained, by diffusion (by
            confidence, WINDOW tokens at a time) or left to right; ancestral: the whole text.
        watch: a Watcher. how: exit_k, steps, temperature, top_p, seed, as for `sample`.
    """
    config, masked = model.config, training.time_step_masking
    encoding, causal = tokenizer(config.vocab_size), config.attention_mode == "causal"
    x = begin(prompt, length, encoding, config)
    order = order or ("confidence" if masked else "left-to-right")
    if order == "confidence":
        window = window or WINDOW
    if order == "left-to-right" and (not causal or window or how.get("steps")):
        raise UserError("left to right needs a causal model, and has no windows or time steps")
    if how.get("exit_k") is not None and how["exit_k"] >= model.blocks:
        raise UserError(f"exit {how['exit_k']} does not exist; there are 0 to {model.blocks - 1}")
    if order != "left-to-right" and not masked:
        print("note: trained without masks: [MASK] is new to this model")
    if re.search("_{4,}", prompt) and causal:
        print("note: a causal model sees only what stands left of a blank")
    dtype = compute_type(model.wte.weight.device, training.compute_type)
    model = expand(model, dtype)
    with autocast(model.wte.weight.device, dtype):
        ids, _ = sample(model, x, order, window, watch=watch or (lambda x: None), **how)
    return encoding.decode(ids[0, 1:].tolist())


# ---------------------------------------------------------------------------------------------
# 5. Tables


def cell(value, spec):
    """A value as text: "-" for None, a list as its items."""
    if isinstance(value, list):
        return " ".join(cell(item, spec) for item in value)
    return "-" if value is None else format(value, spec)


def print_table(columns, rows, say=print):
    """Print dicts as a table; columns is {key: format}. Text stands left, numbers right."""
    lines = [[*columns]]
    lines += [[cell(row.get(key), spec) for key, spec in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = ["<" if spec in ("", "s") else ">" for spec in columns.values()]
    for line in lines:
        say("  ".join(f"{text:{side}{width}}"
                      for text, side, width in zip(line, sides, widths)).rstrip())  # fmt: skip


def report(run, model, full=False, precision=None, path=None, say=print):
    """Evaluate a run: write its figures to `path`, print tables and a sample.

    Args:
        path: None: eval.json in the run's folder, eval_<precision>.json where that is given.
        model: from `run.load`; full: score every validation row instead of ROWS of them.

    Returns:
        the figures, as eval.json holds them.
    """
    config, training = run.config.model, run.config.training
    train, val = run.tokens()
    rows = validation_rows(val, config.seq_len, None if full else ROWS)
    stages = run.metrics("stage")  # damage is told now, not after minutes of scoring
    result = evaluate(model, rows, training.seed, training.compute_type)
    bytes_per_token = token_bytes(tokenizer(config.vocab_size))[rows[:, 1:]].mean()
    unigram = unigram_entropy(train, rows[:, 1:], config.vocab_size)
    exits = result["left_to_right"] or []
    losses = [("nelbo_12: bound over the time steps", result["nelbo_12"],
               result["nelbo_12_stderr"])]  # fmt: skip
    losses += [(f"nelbo: continuous bound; by the masks drawn +- {result['nelbo_stderr']:.4f}",
                result["nelbo"], None)]  # fmt: skip
    losses += [(f"left to right, exit {k}", nats, result["left_to_right_stderr"][k])
               for k, nats in enumerate(exits)]  # fmt: skip
    losses += [("unigram: what ignoring the context gets", unigram, None)]

    def bits_per_byte(nats):
        return nats / math.log(2) / bytes_per_token

    result |= {
        "unigram": unigram,
        "losses": [{"loss": name, "nats_per_token": nats, "stderr": error,
                    "perplexity": perplexity(nats),
                    "bits_per_byte": bits_per_byte(nats)} for name, nats, error in losses],
        "bits_per_byte": {"nelbo": bits_per_byte(result["nelbo"]),
                          "left_to_right": bits_per_byte(min(exits)) if exits else None},
        "precision": precision or training.quantization_type,
        "tokens_sha256": run.tokens_sha256,
        "memory": {"weights": memory(model), "stages": stages},
        "train_seconds": sum(stage["seconds"] for stage in stages),
        "train_tokens": sum(stage["tokens"] for stage in stages),
        "config": run.config.tree(),
    }  # fmt: skip
    path = path or run.folder / (f"eval_{precision}.json" if precision else "eval.json")
    write_json(path, result)
    if model.blocks < config.total_blocks:
        say(f"\nnote: training has not ended; only exits 0 to {model.blocks - 1} exist, and the "
            f"heavier mask fractions are read at the last of them")
    print_report(run, result, say)
    print_texts(model, training, exits, val, say)
    say(f"\nwritten to {path}")
    return result


STAGE_COLUMNS = {"stage": "d", "steps": "d", "seconds": ".0f", "tokens_per_second": ",.0f",
                 "weights_mib": ".1f", "gradients_mib": ".1f", "optimizer_mib": ".1f",
                 "held_mib": ".0f", "standard_mib": ".0f", "peak_mib": ".0f"}  # fmt: skip


def print_report(run, result, say=print):
    """The tables of an evaluation."""
    training = run.config.training
    say(f"\n{run.name} ({kind_of_run(run.config)}), weights in {result['precision']}, "
        f"{result['memory']['weights']['total']:.1f} MiB; {result['rows']} validation rows of "
        f"{run.config.data.source}\n")
    print_table({"mask_fraction": ".2f", "block": "d", "layers": "d", "cross_entropy": ".3f",
                 "stderr": ".3f", "accuracy": ".1%"}, result["time_steps"], say)  # fmt: skip
    say()
    print_table({"loss": "", "nats_per_token": ".3f", "stderr": ".3f", "perplexity": ".1f",
                 "bits_per_byte": ".3f"}, result["losses"], say)
    say("stderr is over the rows: how far other rows of this text would lie")
    if result["left_to_right"] is None:
        say("left to right is not defined for a bidirectional model")
    if not training.time_step_masking:
        say("trained without masks: [MASK] is new to it, so only left to right is its own ground")
    stages = result["memory"]["stages"]
    if stages:
        say(f"\n{result['train_seconds']:.0f} s of training; MiB held are weights, gradients and "
            "optimizer state, standard what mode standard would hold;\nthe peak is the whole "
            "process, activations and libraries included (on a GPU: its tensors)")
        print_table(STAGE_COLUMNS, stages, say)


def print_texts(model, training, exits, val, say=print):
    """Print what the model writes, and a validation passage, each with how it was made.

    Args:
        exits: losses left to right, empty for a bidirectional model. val: validation tokens.
    """

    def show(how, text):
        say(f"\n{how}:\n{textwrap.fill(text, 100, initial_indent='  ', subsequent_indent='  ')}")

    if training.time_step_masking:
        text = sample_text(model, training, order="confidence", seed=training.seed)
        show(f"written by diffusion, {WINDOW} tokens at a time, the surest first", text)
    if exits:
        best = exits.index(min(exits))
        text = sample_text(model, training, order="left-to-right", exit_k=best, seed=training.seed)
        show(f"written left to right, from exit {best}", text)
    encoding = tokenizer(model.config.vocab_size)
    passage = encoding.decode(val[:64].tolist()).partition("<|endoftext|>")[0]
    show("real text, from validation", passage)


def kind_of_run(config):
    """A few words on how a run was trained."""
    training, fused = config.training, config.training.mode == "fused"
    if not fused and training.qlora_enabled and config.model.init_from != "scratch":
        return "plain QLoRA"
    if not training.time_step_masking:
        return "next-token"
    return f"fused, {training.fusion_mode}" if fused else "end-to-end diffusion"


def compare(runs):
    """Print evaluated runs side by side. UserError for one that has no whole eval.json."""
    rows, texts, scored, unfinished = [], defaultdict(set), set(), []
    results = [run.evaluation() for run in runs]
    for run, result in zip(runs, results):
        model, training = run.config.model, run.config.training
        texts[model.vocab_size].add(result["tokens_sha256"])
        scored.add((model.vocab_size, model.seq_len, result["rows"]))
        if not run.weights and len(result["memory"]["stages"]) < model.total_blocks:
            unfinished.append(run.name)
        stages, exits = result["memory"]["stages"], result["left_to_right"]
        row = {
            "run": run.name, "trained": kind_of_run(run.config),
            "train_seconds": result["train_seconds"], "train_tokens": result["train_tokens"],
            "held_mib": max((stage["held_mib"] for stage in stages), default=None),
            "peak_mib": max((stage["peak_mib"] or 0 for stage in stages), default=0) or None,
            "left_to_right": min(exits) if exits else None,
            "bits_left_to_right": result["bits_per_byte"]["left_to_right"],
        }  # fmt: skip
        if training.time_step_masking:  # else [MASK] is new to it, and its bound says nothing
            row |= {"nelbo_12": result["nelbo_12"], "nelbo": result["nelbo"],
                    "bits_nelbo": result["bits_per_byte"]["nelbo"]}  # fmt: skip
        rows.append(row)
    print_table({"run": "", "trained": "", "train_seconds": ",.0f", "train_tokens": ",",
                 "held_mib": ",.0f", "peak_mib": ",.0f", "nelbo_12": ".3f", "nelbo": ".3f",
                 "left_to_right": ".3f", "bits_nelbo": ".3f", "bits_left_to_right": ".3f"}, rows)
    print("left_to_right is that of the best exit; bits are per byte of text")
    same_text = max(map(len, texts.values())) == 1
    if same_text and len(scored) == 1:
        print_differences(runs, results)
    if unfinished:
        print(f"note: not trained to the end: {', '.join(unfinished)}; seconds and tokens are "
              "those of whole stages")
    if not same_text:
        print("note: these runs were scored on different texts: their figures cannot be compared")
    elif len(scored) > 1:
        print("note: these runs were scored on different rows or vocabularies: only their bits per "
              "byte can be compared, and only if the text is the same")


def print_differences(runs, results):
    """Print how far each run's losses lie from the first one's, paired row by row."""
    first, rows = results[0], []
    for run, result in zip(runs[1:], results[1:]):
        for loss in ("nelbo_12", "left_to_right"):
            pair = [one["by_row"][loss] for one in (result, first)]
            masked = all(one["config"]["training"]["time_step_masking"] for one in (result, first))
            if None in pair or (loss == "nelbo_12" and not masked):
                continue
            if loss == "left_to_right":  # of the best exit
                pair = [min(exits, key=sum) for exits in pair]
            difference = torch.tensor(pair[0]) - torch.tensor(pair[1])
            mean, error = difference.mean().item(), standard_error(difference)
            sure = error is not None and abs(mean) > 2 * error
            rows.append({"run": run.name, "loss": loss, "difference": mean, "stderr": error,
                         "beyond two of them": "yes" if sure else "no"})  # fmt: skip
    if rows:
        print(f"\ndifference to {runs[0].name}, row by row (another seed would differ too)")
        print_table({"run": "", "loss": "", "difference": "+.3f", "stderr": ".3f",
                     "beyond two of them": ""}, rows)  # fmt: skip


def precision_table(run, device, full=False):
    """A run in every storage: a list of dicts, printed as a table.

    fp32 is the reference. What was trained without masks is judged left to right.
    """
    config, training = run.config.model, run.config.training
    rows = validation_rows(run.tokens()[1], config.seq_len, None if full else ROWS)
    masked, table = training.time_step_masking, []
    for kind in quant.KINDS:  # fp32 is the first
        model = run.load(kind, device).eval()
        linears = [m for m in model.modules() if isinstance(m, quant.QuantLinear)]
        if kind == "fp32":
            exact = linears
        stored = sum(linear.weight.nbytes for linear in linears)
        count = sum(linear.in_features * linear.out_features for linear in linears)
        row = {"storage": kind, "layers_mib": stored / MIB, "bits_per_weight": 8 * stored / count,
               "signal_to_noise_db": signal_to_noise(linears, exact),
               "weights_mib": memory(model)["total"]}  # fmt: skip
        dtype = compute_type(device, training.compute_type)
        model = expand(model, dtype)
        with autocast(device, dtype):
            exits = left_to_right(model, rows)
            row["left_to_right"] = exits = None if exits is None else exits.mean(1).tolist()
            bound = nelbo_12(model, rows, training.seed)[0] if masked else None
            row["nelbo_12"] = bound.mean().item() if masked else None
        nats = row["nelbo_12"] if masked else min(exits)
        if kind == "fp32":
            reference = nats
        table.append(row | {"to_fp32": nats - reference, "perplexity": perplexity(nats)})
    print(f"{run.name}, {len(rows)} validation rows; left_to_right: exits 0, 1, ...\n")
    print_table({"storage": "", "layers_mib": ".1f", "bits_per_weight": ".3f",
                 "signal_to_noise_db": ".2f", "weights_mib": ".1f", "nelbo_12": ".4f",
                 "perplexity": ".1f", "to_fp32": "+z.4f", "left_to_right": ".4f"}, table)
    return table


def signal_to_noise(linears, exact):
    """Power of the exact layers' weights over that of the stored ones' error: dB, None if exact."""
    signal = sum(x.dequantize().square().sum().item() for x in exact)
    noise = sum((x.dequantize() - y.dequantize()).square().sum().item()
                for x, y in zip(exact, linears))
    return 10 * math.log10(signal / noise) if noise else None


# ---------------------------------------------------------------------------------------------
# 6. Pictures


def pyplot():
    """matplotlib.pyplot, drawing into files. UserError without it: the one optional package."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(runs, target, device):
    """Write loss.png, cross_entropy.png and memory.png of one or more runs into folder `target`.

    The cross-entropies are computed here: every exit at every time step, on PLOT_ROWS rows.
    """
    plt = pyplot()
    plt.rcParams.update({"font.size": 13, "axes.grid": True, "grid.alpha": 0.3,
                         "axes.axisbelow": True, "savefig.dpi": 110, "figure.figsize": (9, 5.5),
                         "figure.constrained_layout.use": True, "legend.frameon": False})
    target.mkdir(parents=True, exist_ok=True)
    pictures = (("loss", plot_loss), ("cross_entropy", plot_cross_entropy),
                ("memory", plot_memory))
    for name, draw in pictures:
        figure, axes = plt.subplots()
        draw(axes, runs, device)
        figure.savefig(target / f"{name}.png")
        plt.close(figure)
        print(f"written to {target / name}.png")


def plot_loss(axes, runs, device):
    """Training loss over steps, dashed the validation loss of the stage's own time steps; a dotted
    line where a stage begins, named if there is one run."""
    for index, run in enumerate(runs):
        done, colour, metrics = 0, f"C{index}", run.metrics()
        if not run.metrics("plan"):
            raise UserError(f"run {run.name} was not trained here: it has no losses to draw")
        for stage in run.metrics("plan")[-1]["stages"]:
            for event, loss, style in (("step", "loss", {"linewidth": 1, "alpha": 0.5}),
                                       ("validation", "cross_entropy", {"linestyle": "--"})):
                lines = [line for line in metrics
                         if line["event"] == event and line["stage"] == stage["block"]]
                named = event == "step" and not stage["block"]
                axes.plot([done + line["step"] for line in lines], [line[loss] for line in lines],
                          color=colour, label=run.name if named else None, marker=".",
                          markevery=max(1, len(lines) // 30), **style)
            if len(runs) == 1 or stage["block"]:
                axes.axvline(done, color=colour, linestyle=":")
            if len(runs) == 1:
                m = stage["time_steps"]
                axes.text(done, 0.98, f' stage {stage["block"]}: m {m[0]:g} to {m[-1]:g}',
                          transform=axes.get_xaxis_transform(), fontsize=11, rotation=90, va="top")
            done += stage["steps"]
    axes.set(xlabel="step", ylabel="nats per scored token; dashed: validation")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=11)


def plot_cross_entropy(axes, runs, device):
    """CE(m) of every exit, also outside its own band; solid where the exit owns m."""
    for index, run in enumerate(runs):
        config, training = run.config.model, run.config.training
        dtype = compute_type(device, training.compute_type)
        model = expand(run.load(device=device), dtype)
        rows = validation_rows(run.tokens()[1], config.seq_len, PLOT_ROWS)
        noise = row_noise(len(rows), config.seq_len, training.seed, tag=0)
        steps = sorted({*config.time_step_mask_fractions, 1.0})
        steps = [0.0] * (config.attention_mode == "causal") + steps
        for block in range(model.blocks):
            with autocast(device, dtype):
                by_row = [score_at(model, rows, m, block, noise)[0] for m in steps]
            ce = [values.mean().item() for values in by_row]
            errors = [standard_error(values) or 0 for values in by_row]
            colour = f"C{index if len(runs) > 1 else block}"
            axes.plot(steps, ce, color=colour, linestyle=(0, (4, 1 + block)), linewidth=1)
            own = [(m, mean, error) for m, mean, error in zip(steps, ce, errors)
                   if m > 0 and exit_of(m, model) == block]  # fmt: skip
            axes.errorbar(*zip(*own), color=colour, marker="os^Dv"[block % 5], capsize=3,
                          label=f"{run.name}, exit {block}" if model.blocks > 1 else run.name)
    axes.set(xlabel="mask fraction m (0: left to right)", ylabel="CE(m), nats per token")
    axes.set_title(f"{PLOT_ROWS} validation rows, bars: standard error over them; solid where the "
                   "exit owns m",
                   fontsize=12)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=11)


def plot_memory(axes, runs, device):
    """What training holds at each stage, in bars; a line at what `mode: standard` would hold."""
    labels, top = [], 0
    for run in runs:
        first, stages = len(labels), run.metrics("stage")
        for stage in stages:
            bottom = 0
            for colour, kind in enumerate(("weights", "gradients", "optimizer")):
                value = stage[f"{kind}_mib"]
                axes.bar(len(labels), value, 0.6, bottom, color=f"C{colour}",
                         label=None if labels else kind)
                bottom += value
            labels.append(f"{run.name}\nstage {stage['stage']}")
            top = max(top, bottom, stage["standard_mib"])
        if stages:
            axes.hlines(stages[0]["standard_mib"], first - 0.45, len(labels) - 0.55,
                        "black", "dashed", label=None if first else "mode: standard")
    axes.set_xticks(range(len(labels)), labels, fontsize=11)
    axes.set(ylabel="held by training, MiB", ylim=(0, 1.05 * top or 1))
    axes.grid(axis="x", visible=False)
    if labels:
        axes.figure.legend(loc="outside lower center", ncols=4)


def write_gif(frames, path, columns=72):
    """Write a Watcher's frames as a moving picture, in the colours of a terminal."""
    from matplotlib.animation import PillowWriter

    plt = pyplot()
    texts = [(heading, wrapped(cells, columns)) for heading, cells in frames]
    n_lines = 2 + max(len(lines) for _, lines in texts)
    dpi, wide, high = 72, 8, 20  # of a character, in pixels: at 72 dpi they are points
    figure = plt.figure(figsize=((columns + 4) * wide / dpi, (n_lines + 1) * high / dpi),
                        facecolor="#161616")  # fmt: skip

    def put(text, line, column, colour):
        figure.text((column + 2) / (columns + 4), 1 - (line + 1) / (n_lines + 1), text,
                    color=colour, family="DejaVu Sans Mono", size=wide / 0.602)

    writer = PillowWriter(fps=4)
    with writer.saving(figure, path, dpi):
        # The last picture stays for four seconds.
        for heading, lines in texts + [texts[-1]] * 15:
            figure.texts.clear()
            put(heading, 0, 0, "#a0a0a0")
            for number, line in enumerate(lines):
                column = 0
                for colour, run in itertools.groupby(line, lambda cell: cell[1]):
                    text = "".join(character for character, _ in run)
                    put(text, number + 2, column, hex_colour(colour))
                    column += len(text)
            writer.grab_frame(facecolor="#161616")
    plt.close(figure)


def hex_colour(colour):
    """A cell's colour for a picture; see `ansi`."""
    if colour in (None, "masked"):
        return "#f0f0f0" if colour is None else "#606060"
    code, levels = RAMP[colour] - 16, (0, 95, 135, 175, 215, 255)
    return "#" + "".join(f"{levels[code // place % 6]:02x}" for place in (36, 6, 1))


# ---------------------------------------------------------------------------------------------
# 7. The commands


def number(kind, least, most=math.inf):
    """For argparse: a number of the command line, from least to most."""

    def parse(text):
        if not least <= kind(text) <= most:
            rule = f"from {least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text}")
        return kind(text)

    parse.__name__ = kind.__name__
    return parse


def parse(argv):
    """The command line; `report` where no command is named."""
    parser = Parser(description="Evaluate runs.", epilog="Without a command: report. A RUN is a "
                    "name in checkpoints/ or a path, also to weights in Hugging Face's layout.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, does, run=True):
        sub = commands.add_parser(name, help=does, description=does)
        if run:
            sub.add_argument("--run", help="default: the newest")
        if name not in ("compare", "export"):
            sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
        return sub

    sub = command("report", "evaluate a run: tables, a sample, eval.json (what is done by default)")
    sub.add_argument("--precision", choices=quant.KINDS, help="rebuild the run in this storage")
    sub.add_argument("--full", action="store_true", help="score every validation row, not 100")
    sub.add_argument("--json", metavar="PATH", help="where to write the figures")
    sub = command("sample", "write text")
    sub.add_argument("prompt", nargs="?", default="", help="text to go on from; each ____ in it is "
                     "a blank of one token to fill in")
    sub.add_argument("--order", choices=("ancestral", "confidence", "left-to-right"),
                     help="default: confidence, or the way the run was trained")
    sub.add_argument("--window", type=number(int, 1), metavar="N", help=f"tokens written together "
                     f"({WINDOW} by confidence; ancestral: all)")
    sub.add_argument("--exit", dest="exit_k", type=number(int, 0), metavar="K",
                     help="default: by noise; left to right, the last")
    sub.add_argument("--length", type=number(int, 1), metavar="N", help="tokens to write (64)")
    sub.add_argument("--steps", type=number(int, 1, 10_000), metavar="N",
                     help="even time steps (the run's own)")
    sub.add_argument("--temperature", type=number(float, 0, 1e6), default=1.0, metavar="X",
                     help="0: the likeliest (1)")
    sub.add_argument("--top-p", type=number(float, 1e-9, 1), default=0.95, metavar="P",
                     help="share of probability kept (0.95)")
    sub.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N")
    sub.add_argument("--watch", action="store_true", help="show every step")
    sub.add_argument("--gif", metavar="PATH", help="write the steps as a moving picture")
    sub.add_argument("--precision", choices=quant.KINDS, help="rebuild the run in this storage")
    sub = command("compare", "evaluated runs side by side", run=False)
    sub.add_argument("runs", nargs="+", metavar="RUN")
    sub = command("plot", "pictures: loss.png, cross_entropy.png, memory.png", run=False)
    sub.add_argument("runs", nargs="*", metavar="RUN")
    sub.add_argument("--to", metavar="FOLDER", help="default: the first run's")
    sub = command("precision", "a run in every storage, side by side")
    sub.add_argument("--full", action="store_true", help="score every validation row, not 100")
    sub.add_argument("--json", metavar="PATH", help="where to write the figures")
    sub = command("export", "write the last exit, adapters merged, in Hugging Face's GPT-2 layout")
    sub.add_argument("target", metavar="FOLDER")
    sub.add_argument("--exit", dest="exit_k", type=number(int, 0), metavar="K", help="another exit")
    sub.add_argument("--precision", choices=quant.KINDS, help="the values of this storage, as fp32 "
                     "numbers, with fp16 as fp16 (the run's own)")
    if argv[:1] not in (["-h"], ["--help"], *([name] for name in commands.choices)):
        argv = ["report", *argv]
    return parser.parse_args(argv)


def check_target(path):
    """UserError for a --json PATH that cannot be written or would destroy a run: told before
    minutes of scoring, not after."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or a device; give --json the name of a file")
    if path.parent.exists() and not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; give --json another name")
    if path.name in ("config.json", "metrics.jsonl") or path.suffix == ".safetensors":
        raise UserError(f"{path} may be a file of a run; give --json another name")


def export(run, target, precision=None, exit_k=None):
    """Write an exit of a run (None: the last), adapters merged, in Hugging Face's GPT-2 layout.
    UserError where the layout cannot hold it, or `target` holds something already."""
    if not target.strip():
        raise UserError("name a new folder to export to")
    target = user_path(target)
    if any((target / name).exists() for name in ("config.json", "model.safetensors")):
        raise UserError(f"{target} holds a model or run already; name a new folder")
    model = run.load(precision)
    exit_k = model.blocks - 1 if exit_k is None else exit_k
    dtype = torch.float16 if precision == "fp16" else torch.float32
    lora.merge(model, exit_k).save_pretrained(target, exit_k, dtype)
    lost = "the other exits and the [MASK] row" if model.blocks > 1 else "the [MASK] row"
    print(f"exit {exit_k} of {run.name} written to {target}; lost: {lost}, so it is an ordinary "
          f"GPT-2")


def write_text(run, device, args):
    """The command `sample`."""
    how = {key: getattr(args, key) for key in ("prompt", "length", "order", "window", "exit_k",
           "steps", "temperature", "top_p", "seed")}  # fmt: skip
    config, watch = run.config.model, None
    if args.gif:
        pyplot()  # told now, if it is not there
    if args.gif or args.watch:
        watch = Watcher(tokenizer(config.vocab_size), config.mask_id, show=args.watch)
    text = sample_text(run.load(args.precision, device), run.config.training, watch=watch, **how)
    if not args.watch:
        print(text.strip())
    if args.gif:
        write_gif(watch.frames, user_path(args.gif))
        print(f"written to {args.gif}")


@one_line_errors
def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else [str(argument) for argument in argv])
    if args.command == "compare":
        return compare([Run.named(name) for name in args.runs])
    if args.command == "plot":
        runs = [Run.named(name) for name in args.runs or [None]]
        return plot(runs, user_path(args.to or runs[0].folder), pick_device(args.device))
    keep_freed_memory()
    run = Run.named(args.run)
    if args.command == "export":
        return export(run, args.target, args.precision, args.exit_k)
    device = pick_device(args.device)
    if args.command == "sample":
        return write_text(run, device, args)
    path = user_path(args.json) if args.json else None
    if path:
        check_target(path)
    if args.command == "report":
        report(run, run.load(args.precision, device), args.full, args.precision, path)
    else:
        path = path or run.folder / "precision.json"
        write_json(path, precision_table(run, device, args.full))
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(main())
