"""What stands on disk: files that prove themselves, configuration, runs, text -> batches.

    python data_loader.py --prepare                             the built-in corpus, 10,000 passages
    python data_loader.py --prepare data.source=my_text.txt     your own text

Read from top to bottom:

1. `UserError`, `one_line_errors`                  mistakes end in one line
2. `write_file`, `write_tensors`, `read_tensors`   the one writer, the one tensor file
3. `Config`, `load_config`                         gpt2.yaml, presets, overrides
4. `Run`                                           the files of a run
5. `tokenizer`                                     the first ranks of GPT-2's byte-pair encoding
6. `read_examples`, `load_tokens`                  a text, and its tokens in the data folder
7. `training_rows`, `validation_rows`              batches
8. `main`                                          `--prepare`
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import json
import math
import mmap
import os
import re
import secrets
import shlex
import sys
from pathlib import Path

import numpy as np
import tiktoken
import torch
import yaml
from tiktoken_ext.openai_public import r50k_pat_str

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------
# 1. Errors


class UserError(Exception):
    """A mistake that a user can mend; its text is one line that says what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def one_line_errors(main):
    """Decorate a script's main(argv): UserError and OSError become one line and status 2, Ctrl-C
    one line and status 130."""

    @functools.wraps(main)
    def guarded(argv=None):
        with contextlib.suppress(AttributeError):  # what a console cannot encode is replaced
            sys.stdout.reconfigure(errors="replace")
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        except (UserError, OSError) as error:
            named = getattr(error, "filename", None)
            text = f"{named}: {error.strerror}" if named else str(error)
            print("error:", " ".join(text.split()), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded


# ---------------------------------------------------------------------------------------------
# 2. Files


def write_file(path, pieces, sealed=False):
    """Write a file so that `path` is at every moment the old file or the whole new one.

    It is written aside, hashed on the way, synced, read back from the disk and compared by its
    hash, and only then given its name.

    Args:
        pieces: what to write, an iterable of bytes or uint8 arrays.
        sealed: add the sha256 of everything before it as the last 32 bytes.

    Returns:
        the sha256 of `pieces`, as hex. OSError names the path (a full disk too).
    """
    path = Path(path).resolve()  # a link stays one, and what it leads to is written
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    whole = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            for piece in pieces:
                whole.update(piece)
                file.write(piece)
            seal = whole.digest()
            if sealed:
                whole.update(seal)
                file.write(seal)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # read it back from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with open(aside, "rb") as file:
            if hashlib.file_digest(file, "sha256").digest() != whole.digest():
                raise UserError(f"{path}: what was written does not read back; is the disk sound?")
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, unless writing failed
            aside.unlink()
    with contextlib.suppress(AttributeError, OSError):  # where a folder can be synced: the name
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    return seal.hex()


def to_json(value, **how):
    """JSON that every reader takes: a number that is not finite becomes null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, **how)


def write_json(path, value):
    """Write `value` as JSON through `write_file`."""
    write_file(path, [to_json(value, indent=1).encode()])


# Of safetensors: dtype in the header -> torch.dtype.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def write_tensors(path, tensors, facts=None, sealed=True):
    """Write {name: tensor} and `facts` (what JSON can hold) as a safetensors file.

    That is 8 bytes of length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, and the
    data. Sealed, the last tensor, `sha256`, is the hash of every byte before it, so that one
    changed byte anywhere is found. The facts stand in the header's __metadata__, as JSON.

    Returns:
        the seal, as hex.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, edge = {"__metadata__": {"format": "pt", "facts": json.dumps(facts or {})}}, 0
    seal = {"sha256": torch.zeros(32, dtype=torch.uint8)} if sealed else {}
    for name, tensor in (tensors | seal).items():
        offsets = [edge, edge := edge + tensor.nbytes]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": offsets}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned

    def pieces():
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            yield tensor.detach().cpu().flatten().view(torch.uint8).numpy()

    return write_file(path, pieces(), sealed)


def read_tensors(path, sealed=True):
    """Read what `write_tensors` wrote or, not sealed, anyone's safetensors file.

    Tensors are views of the mapped file; only what is not aligned is copied. Nothing is executed,
    and torch itself refuses a view that does not fit.

    Returns:
        tensors, facts, seal (the last two None if not sealed). UserError where it is damaged.
    """
    with open(path, "rb") as file:  # opened once: a new file of this name is not mixed with it
        empty = os.fstat(file.fileno()).st_size == 0
        mapped = bytearray(8) if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    data, facts, seal = torch.frombuffer(mapped, dtype=torch.uint8), None, None
    if sealed:
        seal = hashlib.sha256(data[:-32].numpy()).hexdigest()
        if seal != data[-32:].numpy().tobytes().hex():
            raise UserError(f"{path} is damaged; README.md, Troubleshooting, says what to do")
    tensors = {}
    try:
        start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        header = json.loads(data[8:start].numpy().tobytes())
        metadata = header.pop("__metadata__", None)
        if sealed:
            facts = json.loads(metadata["facts"])
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            if not 0 <= first <= end <= len(data) - start:  # a slice would be cut to fit
                raise ValueError(f"{name:.80} reaches beyond the file")
            part, dtype = data[start + first : start + end], DTYPES[entry["dtype"]]
            if part.storage_offset() % dtype.itemsize:  # torch cannot view what is not aligned
                part = part.clone()
            tensors[name] = part.view(dtype).view(entry["shape"])
    except (AttributeError, ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        raise UserError(f"{path}: truncated, or not safetensors ({error!r:.200})") from None
    tensors.pop("sha256", None)
    return tensors, facts, seal


def read_text(path):
    """A UTF-8 file as str, without byte-order mark. UserError if it is binary or not UTF-8."""
    data = Path(path).read_bytes()
    try:
        if b"\0" in data:
            raise ValueError(f"binary, a NUL at position {data.index(0)}")
        return data.decode("utf-8").removeprefix("\ufeff")
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{path}: not a UTF-8 text ({error}); save it as one") from error


# ---------------------------------------------------------------------------------------------
# 3. Configuration: gpt2.yaml explains every key, and is the only place of types and defaults

DEFAULTS = ROOT / "gpt2.yaml"

CHOICES = {
    "attention_mode": ("causal", "bidirectional"),
    "mode": ("fused", "standard"),
    "fusion_mode": ("frozen", "trainable"),
    "quantization_type": ("fp32", "fp16", "int4", "nf4"),
    "gradient_checkpointing": ("auto", "frozen", "none", "all"),
    "compute_type": ("auto", "fp32", "bf16", "fp16"),
    "moments": ("bf16", "fp32"),
    "compile": ("auto", "true", "false"),
    "time_step_masking": (True, False),
    "qlora_enabled": (True, False),
}
RANGES = {  # from, to; both are allowed
    "vocab_size": (2, 10**6), "d_model": (1, 10**6), "n_layers": (1, 10**6), "n_heads": (1, 10**6),
    "seq_len": (2, 10**6), "dropout": (0, 0.999), "total_blocks": (1, 10**6),
    "block_size": (1, 10**6), "qlora_rank": (1, 10**6), "qlora_alpha": (1e-9, 1e9),
    "qlora_dropout": (0, 0.999), "qlora_lr": (1e-12, 1e3), "lr": (1e-12, 1e3),
    "lr_min_share": (0, 1), "warmup_steps": (0, 10**9), "weight_decay": (0, 1e3),
    "beta2": (0, 0.999999), "grad_clip": (1e-9, 1e9), "batch_size": (1, 10**6),
    "gradient_accumulation": (1, 10**6), "max_steps": (0, 10**9), "log_interval": (1, 10**9),
    "eval_interval": (1, 10**9), "eval_rows": (1, 10**9), "checkpoint_interval": (1, 10**9),
    "checkpoint_seconds": (0, 10**9), "seed": (0, 2**53), "num_examples": (10, 10**9),
}  # fmt: skip


TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
         list: "a list of numbers"}  # fmt: skip


class Config:
    """Every key of gpt2.yaml as an attribute: `config.lr`, `config.d_model`. Lists are tuples.

    Args:
        values: {key: value}, all of them. In mode standard one block owns all layers and every
            mask fraction, whatever they say of blocks.

    UserError, in one line, for a value of another type, out of its range, or that does not go with
    the others.
    """

    def __init__(self, values):
        sections, defaults = known_keys()
        differ = sorted(values.keys() ^ defaults.keys())
        if differ:
            raise UserError(f"a run of another version of this code ({differ[0]}); train it again")
        for key, value in values.items():
            try:
                setattr(self, key, typed(value, defaults[key]))
            except (OverflowError, TypeError):
                like = defaults[key]
                kind = TYPES.get(type(like), "of the default's type")
                raise UserError(f"{sections[key]}.{key} must be {kind} (gpt2.yaml has {like}), not "
                                f"{value!r}") from None
        if self.mode == "standard":
            self.total_blocks, self.block_size = 1, self.n_layers
            self.block_mask_ranges = ((0.0, 1.0),)
        try:
            for fault in self.faults():
                raise UserError(fault)
        except TypeError as error:  # values are of their defaults' types, so that it is these
            raise UserError(f"{DEFAULTS}: a value is of another type than the code needs ({error})"
                            ) from None  # fmt: skip

    def __getattr__(self, key):  # called where there is no such attribute
        if key.startswith("__"):  # copy.deepcopy asks
            raise AttributeError(key)
        raise UserError(f"{DEFAULTS} has no key {key}, which the code needs: put it back")

    def replace(self, **changes):
        """A Config with some keys changed."""
        return Config(vars(self) | changes)

    @property
    def mask_id(self):
        """Id of [MASK]: the first id after the text's vocabulary."""
        return self.vocab_size

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: vocab_size + 1 ([MASK]) rounded up to a multiple of 64."""
        return -(-(self.vocab_size + 1) // 64) * 64

    def block_of(self, mask_fraction):
        """The block whose band (low, high] holds m; each m in (0, 1] has exactly one."""
        for block, (low, high) in enumerate(self.block_mask_ranges):
            if low < mask_fraction <= high:
                return block
        raise ValueError(f"mask fraction {mask_fraction} is outside (0, 1]")

    def time_steps_of(self, block):
        """The time steps (mask fractions) that fall into a block's band, ascending."""
        return tuple(m for m in self.time_step_mask_fractions if self.block_of(m) == block)

    def faults(self):
        """What is wrong with the values, in words, the first thing first."""
        for key, names in CHOICES.items():
            if getattr(self, key) not in names:
                yield f"{key} must be {' or '.join(map(str, names))}, not {getattr(self, key)!r}"
        for key, (low, high) in RANGES.items():
            value = getattr(self, key)
            if type(value) not in (int, float) or not low <= value <= high:
                yield f"{key} must be from {low:g} to {high:g}, not {value!r}"
        if not re.fullmatch(r"[^-./\\=\0][^/\\=\0]*", self.run_id):
            yield f"run_id must be a plain folder name, not {self.run_id!r}"
        if self.d_model % self.n_heads:
            yield f"n_heads {self.n_heads} does not divide d_model {self.d_model}"
        if self.moments == "bf16" and self.beta2 > 0.99:
            yield f"moments=bf16 needs beta2 of 0.99 or less, not {self.beta2:g}; or moments=fp32"
        if self.total_blocks * self.block_size != self.n_layers:
            yield (f"total_blocks {self.total_blocks} x block_size {self.block_size} must equal "
                   f"n_layers {self.n_layers}")
        if min(self.block_steps, default=0) <= 0:
            yield f"block_steps must be above 0, not {self.block_steps}"
        if self.mode == "fused" and len(self.block_steps) != self.total_blocks:
            yield f"block_steps needs one share for each of the {self.total_blocks} blocks"
        steps, bands = self.time_step_mask_fractions, self.block_mask_ranges
        if not steps or list(steps) != sorted({*steps}) or steps[0] <= 0 or steps[-1] > 1:
            yield f"time_step_mask_fractions must be ascending numbers in (0, 1], not {steps}"
        # Sorted by noise, the bands must tile (0, 1]; which block owns which is free.
        edges = [edge for band in sorted(bands) for edge in band]
        if len(bands) != self.total_blocks or {*map(len, bands)} != {2}:
            yield f"block_mask_ranges needs one [low, high] for each of {self.total_blocks} blocks"
        if [0.0, *edges[1::2]] != [*edges[::2], 1.0]:
            yield f"block_mask_ranges must cover (0, 1] without hole or overlap, not {bands}"
        for block, (low, high) in enumerate(bands):
            if not self.time_steps_of(block):
                yield f"time_step_mask_fractions has none in ({low}, {high}] of block_mask_ranges"
        if not self.time_step_masking and self.attention_mode != "causal":
            yield "time_step_masking false (next-token training) needs attention_mode causal"


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that takes for a number only what is written in decimal, and else for text all but
    true, false and null. YAML 1.1, which PyYAML implements, reads 1:30 as 90, 010 as 8, 1_000 as
    1000, no as false, 2026-01-01 as a date, and 6e-4 as text."""

    yaml_implicit_resolvers = {}


for kind, pattern in {
    "null": "|~|null|Null|NULL",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
}.items():
    pattern = re.compile(rf"({pattern})\Z")
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", pattern, None)


def parse_yaml(text, where):
    """Parsed yaml; UserError names the place of a fault."""
    try:
        return yaml.load(text, YamlLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {getattr(error, 'problem', None) or error}") from error


def read_yaml(path):
    """A config file as [(section, key, value), ...] and {preset: the same}, or a UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file: name one with --config")

    def entries(tree):
        # `compile` is a text, as auto is one; to yaml true and false are none.
        return [(section, str(key), str(value).lower() if key == "compile" else value)
                for section, keys in tree.items() for key, value in keys.items()]  # fmt: skip

    tree = parse_yaml(read_text(path), path)
    try:
        presets = tree.pop("presets", {})
        return entries(tree), {str(name): entries(preset) for name, preset in presets.items()}
    except (AttributeError, TypeError):
        raise UserError(f"{path}: write `section:` and, below it, `key: value`") from None


@functools.cache
def known_keys():
    """From gpt2.yaml: ({key: section}, {key: default})."""
    entries, _ = read_yaml(DEFAULTS)
    return ({key: section for section, key, _ in entries},
            {key: value for _, key, value in entries})  # fmt: skip


def typed(value, like):
    """`value` in the type of the default `like`; TypeError or OverflowError where it does not fit.

    An int will do for a float; a bool is no number, and nan and inf are none either.
    """
    if isinstance(like, list) and isinstance(value, (list, tuple)):
        return tuple(typed(item, like[0]) for item in value)
    if type(like) is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not type(like) or isinstance(like, (float, list)):
        raise TypeError
    return value


def load_config(path=DEFAULTS, preset=None, overrides=(), stored=None):
    """gpt2.yaml, on top of it another file, a preset, and the command line's overrides. -> Config

    Args:
        path: a yaml file of model, training, data, presets; what it does not say stays as it is.
        overrides: "section.key=value" (or "key=value"), the value being yaml; they win.
        stored: {key: value} to start from instead of gpt2.yaml: a run's own configuration.

    UserError names the key that is wrong, and the nearest one that there is.
    """
    sections, defaults = known_keys()
    entries, presets = read_yaml(path)  # [(section, key, value), ...], what comes later wins
    presets = read_yaml(DEFAULTS)[1] | presets
    if preset is not None and preset not in presets:
        raise UserError(f"{path}: unknown preset {preset}: there are {', '.join(presets)}")
    entries = [] if stored and path == DEFAULTS else entries
    entries += presets[preset] if preset else []
    for override in overrides:
        name, equals, text = override.partition("=")
        section, _, key = name.rpartition(".")
        if not equals:
            raise UserError(f"{override}: write section.key=value, or --preset NAME")
        is_text = isinstance(defaults.get(key), str)
        entries.append((section, key, text if is_text else parse_yaml(text, override)))
    values = dict(stored or defaults)
    for section, key, value in entries:
        if key not in sections or section not in ("", sections[key]):
            nearest = difflib.get_close_matches(key, sections, 1, cutoff=0)[0]
            wrong = f"{section}.{key}".lstrip(".")
            raise UserError(f"no key {wrong}: did you mean {sections[nearest]}.{nearest}? "
                            "gpt2.yaml explains every key")
        values[key] = value
    return Config(values)


# ---------------------------------------------------------------------------------------------
# 4. A run


class Run:
    """The files of a run, below checkpoints/:

        checkpoint.safetensors         configuration, state, and what is in no backup: weights in
                                       training, the optimizer
        backup/block_<k>.safetensors   block k in full precision, from before it was converted
        metrics.jsonl                  a line for each logged step, validation and stage
        eval.json                      the evaluation

    What stands in the first two is the business of train_gpt2_fusion.py.
    """

    def __init__(self, folder):
        self.folder = Path(os.path.expanduser(folder))
        self.name = self.folder.name
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.metrics_file = self.folder / "metrics.jsonl"

    def __str__(self):
        """How to name the run on a command line."""
        in_place = self.folder.parent == Path(load_config().folder)
        return shlex.quote(self.name if in_place else str(self.folder))

    @classmethod
    def named(cls, name=None):
        """The run of a path, or of a name in checkpoints/; None: that with the newest metrics."""
        runs = Path(load_config().folder)
        if name is None:
            files = sorted(runs.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
            if not files:
                raise UserError(f"no run in {runs}/; train one: python train_gpt2_fusion.py")
            return cls(files[-1].parent)
        for run in (cls(name), cls(runs / name)):
            if run.checkpoint.exists():
                return run
        there = sorted(file.parent.name for file in runs.glob("*/checkpoint.safetensors"))
        raise UserError(f"no run {name!r}; there are: {', '.join(there) or 'none'}")

    def backup(self, block):
        """The file of a block's full-precision weights."""
        return self.folder / "backup" / f"block_{block}.safetensors"

    def lock(self):
        """Claim the run for this process, until it ends or closes the file returned: metrics.jsonl.

        UserError where another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.metrics_file, "ab")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"run {self.name} is being trained by another process") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        for path in self.folder.rglob(".*.tmp"):
            path.unlink()  # left by a process that was killed while it wrote
        return file

    def record(self, event, **values):
        """Append a line to metrics.jsonl."""
        with open(self.metrics_file, "ab") as file:
            file.write((to_json({"event": event, **values}) + "\n").encode())

    def cut_metrics(self, size):
        """Cut metrics.jsonl back to the `size` bytes that a checkpoint counts on."""
        if self.metrics_file.stat().st_size < size:
            raise UserError(f"{self.metrics_file} has lost lines; restore it, or use --overwrite")
        os.truncate(self.metrics_file, size)

    def metrics(self, event, *keys):
        """The lines of one event in metrics.jsonl, as dicts. UserError where one lacks a key."""
        whole = self.metrics_file.read_bytes().split(b"\n")[:-1]  # a kill may leave half a line
        try:
            lines = [line for line in map(json.loads, whole) if line["event"] == event]
            if not all(key in line for line in lines for key in keys):
                raise KeyError(f"{event} without {' or '.join(keys)}")
            return lines
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.metrics_file} is damaged ({error!r}); restore it") from None


# ---------------------------------------------------------------------------------------------
# 5. The vocabulary

CORPUS = ROOT / "data" / "english_10k.jsonl"
CORPUS_SHA256 = "6170a8207e9c9a7ec25824bf7f047bf728e2e3670fc06ddf8aae55768955d5cd"
MERGES = ROOT / "data" / "vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_VOCAB_SIZE = 50_257
END = "<|endoftext|>"  # separates examples: our tokens, and many a text that others made


def read_committed(path, sha256):
    """The bytes of a file of this repository. UserError if they are not what was committed."""
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is missing or damaged (its sha256 differs): git checkout {path}")
    return data


def gpt2_vocabulary(vocab_size):
    """What vocab.bpe says of the first vocab_size - 1 ranks: {character: the byte it stands for},
    the merges, each the two tokens that become one, and all tokens, in the order of their ranks.

    Bytes with a printable character come first, the others are written as chr(256 + i).
    """
    lines = read_committed(MERGES, MERGES_SHA256).decode("utf-8").splitlines()
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    merges = lines[1 : vocab_size - 256]
    return byte_of, merges, [*byte_of, *(merge.replace(" ", "") for merge in merges)]


@functools.lru_cache
def tokenizer(vocab_size):
    """The first vocab_size - 1 ranks of GPT-2's BPE, then <|endoftext|> as id vocab_size - 1.

    Merges are ordered and the 256 bytes come first, so every prefix of them is a lossless BPE.
    Encode text with `encode_ordinary` or, where <|endoftext|> in it is that id, with `encode` and
    allowed_special="all". UserError unless 257 <= vocab_size <= 50257.

    Another tokenizer goes here: an object with eot_token = vocab_size - 1, encode,
    encode_ordinary_batch, decode and decode_bytes, and ids below 65,536. Change what
    stands under "merges" in `load_tokens` with it, so that no tokens of the old one are used, and
    what `write_tokenizer` writes.
    """
    if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
        raise UserError(f"model.vocab_size must be from 257 to {GPT2_VOCAB_SIZE}, not {vocab_size}")
    byte_of, _, tokens = gpt2_vocabulary(vocab_size)
    ranks = {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(f"gpt2_{vocab_size}", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={END: vocab_size - 1})


def write_tokenizer(folder, vocab_size):
    """Write `tokenizer(vocab_size)` as the files that transformers' GPT2Tokenizer reads."""
    _, merges, tokens = gpt2_vocabulary(vocab_size)
    write_json(folder / "vocab.json", {token: rank for rank, token in enumerate([*tokens, END])})
    write_file(folder / "merges.txt", ["\n".join(["#version: 0.2", *merges, ""]).encode()])
    write_json(folder / "tokenizer_config.json",
               {"tokenizer_class": "GPT2Tokenizer", "clean_up_tokenization_spaces": False})


# ---------------------------------------------------------------------------------------------
# 6. Text and its tokens


def source_files(source):
    """The files of data.source, in a fixed order. UserError if there are none.

    In a folder what begins with a dot is left out: copies that editors and systems keep there.
    """
    if source == "sotu":
        read_committed(CORPUS, CORPUS_SHA256)
        return [CORPUS]
    source = Path(os.path.expanduser(source))
    files = [source]
    if source.is_dir():
        files = sorted(file for file in source.rglob("*.*") if file.suffix.lower() == ".txt"
                       and "/." not in f"/{file.relative_to(source).as_posix()}")  # fmt: skip
    if not files or not all(file.is_file() for file in files):
        what = "holds no .txt" if source.exists() else "no such file"
        raise UserError(f"data.source={source}: {what}; give a .txt, a .jsonl, a folder of .txt, "
                        "or sotu")
    return files


def read_file(path):
    """The examples of a file: [(text, split), ...]; where it does not say, the split is None.

    Of a .jsonl each line, {"text": ..., "split": ...}; of any other file what <|endoftext|>
    separates, else each paragraph, else each line: the first of them that gives ten. Wherever
    <|endoftext|> stands, it ends an example. White space becomes single spaces.
    """
    text = read_text(path)
    examples = []
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            try:
                record = json.loads(line) if line.strip() else {"text": ""}
                parts, split = record["text"].encode().decode().split(END), record.get("split")
            except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
                split = "?"
            if split not in ("train", "val", None):
                raise UserError(f'{path}: line {number} must hold a "text" and, if you like, a '
                                '"split" of train or val')
            examples += [(part, split) for part in parts]
    else:
        for or_else in ("", r"|\n\s*\n", r"|\r|\n"):
            parts = re.split(re.escape(END) + or_else, text)
            parts = [part for part in parts if re.search(r"\S", part)]
            if len(parts) >= 10:
                break
        examples = [(part, None) for part in parts]
    examples = [(" ".join(text.split()), split) for text, split in examples]
    return [(text, split) for text, split in examples if text]


def read_examples(source, num_examples):
    """{"train": [text, ...], "val": [...]} of data.source: nine in ten, one in ten.

    What says its split keeps it. Of the others a tenth validates, taken from the end of each file
    (of many files with fewer than ten examples, from some). Of more than num_examples that many are
    used, spread evenly.
    """
    examples, count = {"train": [], "val": []}, 0
    for path in source_files(source):
        found = read_file(path)
        for text, split in found:
            if split:
                examples[split].append(text)
        texts = [text for text, split in found if not split]
        n_val = (count + len(texts)) // 10 - count // 10  # a tenth of all, whatever a file holds
        count += len(texts)
        examples["train"] += texts[: len(texts) - n_val]
        examples["val"] += texts[len(texts) - n_val :]
    if not all(examples.values()):
        raise UserError(f"data.source={source} is too short: give 10 paragraphs or lines, or more")
    for split, most in (("train", num_examples - num_examples // 10), ("val", num_examples // 10)):
        texts = examples[split]
        n = min(most, len(texts))
        examples[split] = [texts[i * len(texts) // n] for i in range(n)]
    return examples


def load_tokens(config, expected=None, rows=None):
    """The tokens of a text: train and val, each uint16 (n_tokens,), and their sha256.

    Every example is followed by <|endoftext|>. They are kept in config.token_folder, in a file that
    names the text and the vocabulary it was made from, and is made again where these differ or it
    is damaged. UserError where the sha256 is not the `expected` one: the text of a run has changed;
    and for a new text that is too short for one step of `rows` rows, or to validate on.
    """
    sums = hashlib.sha256()
    for path in source_files(config.source):
        sums.update(hashlib.sha256(path.read_bytes()).digest())
    made_from = {"text": config.source, "text_sha256": sums.hexdigest(), "merges": MERGES_SHA256,
                 "vocab_size": config.vocab_size, "num_examples": config.num_examples}  # fmt: skip
    path = Path(os.path.expanduser(config.token_folder)) / f"tokens_{config.vocab_size}.safetensors"
    tokens, facts = {}, None
    with contextlib.suppress(FileNotFoundError, UserError):
        tokens, facts, _ = read_tensors(path)
    if facts != made_from:
        for split, texts in read_examples(config.source, config.num_examples).items():
            ids = tokenizer(config.vocab_size).encode_ordinary_batch(texts)
            ids = [np.array([*row, config.vocab_size - 1], np.uint16) for row in ids]
            tokens[split] = torch.from_numpy(np.concatenate(ids))
        if rows:  # UserError: too short; said before the tokens of another text are replaced
            training_rows(tokens["train"].numpy(), config.seq_len, rows, 0, 0, 0)
            validation_rows(tokens["val"].numpy(), config.seq_len)
        write_tensors(path, tokens, made_from)
        sizes = " + ".join(f"{len(part):,}" for part in tokens.values())
        print(f"{path}: {sizes} tokens of {config.source}, to train and to validate", flush=True)
    train, val = tokens["train"].numpy(), tokens["val"].numpy()
    digest = hashlib.sha256(train)
    digest.update(val)
    if expected not in (None, digest.hexdigest()):
        raise UserError(f"the text {config.source} has changed since the run began; put it back")
    return train, val, digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# 7. Batches

# A row is seq_len = T consecutive tokens. Position 0 is context only and T - 1 are predicted, so
# the next row starts on the last token of this one: each token is predicted once.


def rows_in(n_tokens, seq_len):
    """Training rows in an epoch; the same for every shift of the windows."""
    return max(0, (n_tokens - seq_len + 1) // (seq_len - 1))


@functools.lru_cache(maxsize=4)
def epoch_starts(n_tokens, seq_len, seed, stage, epoch):
    """Where the rows of an epoch start, shuffled, (n_rows,) int64."""
    rng = np.random.default_rng([seed, stage, epoch])
    shift = rng.integers(seq_len - 1)  # so that the cuts differ between epochs
    return rng.permutation(rows_in(n_tokens, seq_len)) * (seq_len - 1) + shift


def training_rows(tokens, seq_len, batch_size, seed, stage, step):
    """The global batch of a step, LongTensor (batch_size, seq_len): pure in its arguments.

    Epochs without replacement; a batch may straddle two. Consecutive steps, whatever the batch
    size, walk the same sequence of rows. UserError if an epoch has fewer rows than a batch.

    Args:
        batch_size: rows of the whole step, all micro-batches and processes together.
    """
    n_rows = rows_in(len(tokens), seq_len)
    if n_rows < batch_size:
        raise UserError(f"the training text has {n_rows} rows of {seq_len} tokens, a step takes "
                        f"{batch_size}: give more, or lower training.batch_size or model.seq_len")
    starts = [epoch_starts(len(tokens), seq_len, seed, stage, i // n_rows)[i % n_rows]
              for i in range(step * batch_size, (step + 1) * batch_size)]  # fmt: skip
    index = np.array(starts)[:, None] + np.arange(seq_len)  # (batch_size, seq_len)
    return torch.from_numpy(tokens[index].astype(np.int64))


def validation_rows(tokens, seq_len, count=None):
    """`count` rows spread evenly over the text (None: all), LongTensor (count, seq_len).

    No token is predicted twice. A count above what there is means all. UserError if none fits.
    """
    n_rows = (len(tokens) - 1) // (seq_len - 1)
    if n_rows < 1:
        raise UserError(f"the validation text is shorter than model.seq_len={seq_len}: give more "
                        "text, or lower it")
    count = n_rows if count is None else min(count, n_rows)
    starts = np.arange(count) * n_rows // count * (seq_len - 1)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len)].astype(np.int64))


# ---------------------------------------------------------------------------------------------
# 8. The command line


@one_line_errors
def main(argv):
    parser = Parser(description="Make the token files of gpt2.yaml and of each of its presets.")
    parser.add_argument("--prepare", action="store_true", required=True,
                        help="do it, where they are not there yet")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="a key of "
                        "gpt2.yaml, e.g. data.source=my_text.txt")
    args = parser.parse_intermixed_args(argv)
    configs = [load_config(preset=preset, overrides=args.overrides)
               for preset in (None, *read_yaml(DEFAULTS)[1])]  # fmt: skip
    by_size = {config.vocab_size: config for config in configs}  # a file for each
    for config in by_size.values():
        load_tokens(config)
    print(f"tokens of {config.source} are in {config.token_folder}, for vocabularies of "
          f"{', '.join(map(str, by_size))}")


if __name__ == "__main__":
    sys.exit(main())
