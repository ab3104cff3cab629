"""What is read from disk: files that prove themselves, configuration, runs, text, batches."""

import hashlib
import io
import json
import os
import re
import struct
import sys
from unittest.mock import Mock

import data_loader as d
import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, fails, flip, toy_config
from data_loader import Run, UserError, load_config, load_tokens, read_tensors


def refused(words, function, *arguments, **options):
    """function(...) raises a UserError that holds the words. -> its text"""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert str(words) in str(caught.value), caught.value
    return str(caught.value)


def test_one_line_errors(capsys):
    for error, status, line in (
        (UserError("mend\nthis"), 2, "error: mend this\n"),
        (PermissionError(13, "Permission denied", "a.bin"), 2, "error: a.bin: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        main = d.one_line_errors(Mock(side_effect=error))
        assert main([]) == status and capsys.readouterr().err == line


def test_a_file_is_written_whole_or_the_old_one_stays_alone(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.bin"
    content = b"abc\0\1\2"
    for sealed, end in ((False, b""), (True, hashlib.sha256(content).digest())):
        seal = d.write_file(path, [b"abc", np.arange(3, dtype=np.uint8), b""], sealed)
        assert seal == hashlib.sha256(content).hexdigest()
        assert path.read_bytes() == content + end and os.listdir(path.parent) == ["a.bin"]

    def damaged(change):  # from the sync on, the disk holds other bytes than were written
        return lambda _: [change(aside, 1) for aside in path.parent.glob(".a.bin.*.tmp")]

    full = Mock(side_effect=OSError(28, "No space left on device"))
    for step, failure, error in (
        ("fsync", full, OSError), ("replace", full, OSError),
        ("fsync", Mock(side_effect=KeyboardInterrupt("a.bin")), KeyboardInterrupt),
        ("fsync", damaged(flip), UserError), ("fsync", damaged(os.truncate), UserError),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(error, match="a.bin"):
            patch.setattr(os, step, failure)
            d.write_file(path, [b"new"])
        assert path.read_bytes() == content + end and os.listdir(path.parent) == ["a.bin"]


def test_tensors_and_facts_come_back_bit_for_bit(tmp_path):
    def bits(tensors):
        return {name: (t.dtype, t.shape, t.detach().flatten().view(torch.uint8).tolist())
                for name, t in tensors.items()}  # fmt: skip

    path = tmp_path / "a.safetensors"
    written = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3),
               "t": torch.arange(6.0).view(3, 2).t(),
               "p": torch.nn.Parameter(torch.tensor([1 / 3, -0.0, float("nan")]))}  # fmt: skip
    for kind, dtype in reversed(d.DTYPES.items()):  # what follows a bool is not aligned
        written[kind] = torch.tensor([[200], [0], [77]]).to(dtype)
    facts = {"step": 7, "lr": 3e-4, "name": "naïve 🦉!", "none": [None, float("inf")]}
    seal = d.write_tensors(path, written, facts)
    content = path.read_bytes()
    assert seal == hashlib.sha256(content[:-32]).hexdigest() == content[-32:].hex()
    tensors, *rest = read_tensors(path)
    assert bits(tensors) == bits(written) and rest == [facts, seal]
    tensors["t"].zero_()  # a private mapping: the file stays
    assert path.read_bytes() == content
    # As other readers of safetensors want it: no hole, and the seal is an ordinary tensor.
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    edges = [json.loads(header)[name]["data_offsets"] for name in [*written, "sha256"]]
    assert [start for start, _ in edges] == [0, *(end for _, end in edges[:-1])]
    assert length % 8 == 0 and 8 + length + edges[-1][1] == len(content)
    # Others do not seal, and need not align.
    path.write_bytes(struct.pack("<Q", length + 1) + header + b" " + content[8 + length :])
    tensors, *rest = read_tensors(path, sealed=False)
    assert bits(tensors) == bits(written) and rest == [None, None]


def packed(header=None, data=b"1234", length=None, **fields):
    """The bytes of a safetensors file: this header, or that of one tensor with these fields."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields
    text = json.dumps({"a": entry}).encode() if header is None else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_every_flipped_byte_every_length_and_a_hostile_header_end_in_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    d.write_tensors(path, {"w": torch.ones(2)}, {"step": 3})
    good = path.read_bytes()
    for i in range(len(good)):
        for content in (good[:i], good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :]):
            path.write_bytes(content)
            refused(path, read_tensors, path)
    offsets = ([0, 8], [4, 0], [0.0, 4], [0, 4, 4], [2**63, 2**63 + 4], [-4, 0], [-8, -4], 4, None)
    for content in (
        *[good[:i] for i in range(len(good))], packed(length=10**12), packed(length=2**64 - 1),
        packed(b"{,}"), packed(b'{"\xff\xfe": 1}'), packed(b"[" * 200_000), packed(b"[]"),
        packed(b"3"), packed(b'{"%s": 1}' % (b"a" * 9999)), packed(b'{"a": {}}'),
        packed(dtype="F31"), packed(dtype=["F32"]), packed(shape=[-1, -1]), packed(shape=["1"]),
        packed(shape=[2]), packed(shape=[2**62, 4]), packed(shape=[2], data_offsets=[0, 8]),
        *[packed(data_offsets=pair) for pair in offsets],
    ):  # fmt: skip
        path.write_bytes(content)
        text = refused(path, read_tensors, path, sealed=False)
        assert "\n" not in text and len(text) < len(str(path)) + 260


def load(tmp_path, text, *overrides, **options):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides=overrides, **options)


def changed(config, than):
    """{key: value} of what differs."""
    return dict(vars(config).items() - vars(than).items())


def test_gpt2_yaml_is_the_only_place_of_defaults(tmp_path, monkeypatch):
    config = load_config()
    assert (config.d_model, config.lr, config.block_steps) == (768, 5e-4, (8.0, 1.0, 1.0))
    numbers = {key for key, value in vars(config).items() if type(value) in (int, float)}
    assert numbers == d.RANGES.keys()
    assert [config.replace(vocab_size=n).padded_vocab_size for n in (63, 64)] == [64, 128]
    # A new key is one line there, and its type is that of the value.
    text = (ROOT / "gpt2.yaml").read_text().replace("  lr: 5e-4", "  lr: 6e-4\n  new: 1.5")
    monkeypatch.setattr(d, "DEFAULTS", tmp_path / "mine.yaml")
    monkeypatch.setattr(d, "known_keys", d.known_keys.__wrapped__)  # not what it has cached
    config = load(tmp_path, text, "training.new=2")
    assert (config.lr, config.new, type(config.new)) == (6e-4, 2, float)
    refused("training.new", config.replace, new="x")
    assert load(tmp_path, text.replace("compile: auto", "compile: true")).compile == "true"
    # A key that is not there any more, and values of another type, are named.
    for key in vars(load(tmp_path, text)):
        without = re.sub(rf"^  {key}:", "  other:", text, count=1, flags=re.M)
        refused(key, lambda: getattr(load(tmp_path, without), key))
    for value in ("fast", "", "{a: 1}", "yes", "1:30", "[1]", "2026-01-01"):
        for key in ("lr", "max_steps", "qlora_enabled", "block_steps", "block_mask_ranges"):
            other = re.sub(rf"^  {key}: [^#\n]*", f"  {key}: {value} ", text, count=1, flags=re.M)
            named = "" if "block" in key else key
            refused(named, load, tmp_path, other)
            refused(named, load, tmp_path, other, f"training.{key}=[[0, true]]")


def test_a_file_of_some_keys_a_preset_overrides_and_back_from_json(tmp_path):
    text = """{model: {d_model: 96}, presets: {short: {training: {max_steps: 30, lr: 1E-2}}},
    training: {lr: 6e-4, block_mask_ranges: [[0, 0.5], [0.7, 1], [0.5, 0.7]]}}"""
    bands = ((0.0, 0.5), (0.7, 1.0), (0.5, 0.7))
    mine = load(tmp_path, text)
    assert changed(mine, load_config()) == {"d_model": 96, "lr": 6e-4, "block_mask_ranges": bands}
    config = load(tmp_path, text, "training.lr=1", "dropout=.5", "training.run_id=a: [é",
                  "data.source=6e4", "block_steps=[1.5, 3, 1]", "seed=1", "training.seed=2",
                  preset="short")  # fmt: skip
    assert changed(config, mine) == {
        "max_steps": 30, "lr": 1.0, "dropout": 0.5, "run_id": "a: [é", "source": "6e4",
        "block_steps": (1.5, 3.0, 1.0), "seed": 2}  # fmt: skip
    assert type(mine.lr) is type(config.lr) is float
    tiny = load(tmp_path, text, "mode=standard", preset="tiny")  # of gpt2.yaml, over the file
    assert (tiny.vocab_size, tiny.lr, tiny.block_mask_ranges) == (4096, 1e-3, ((0.0, 1.0),))
    refused("tiny, short", load, tmp_path, text, preset="tini")
    for config in (config, tiny):
        stored = json.loads(json.dumps(vars(config)))
        assert vars(load_config(stored=stored)) == vars(config)
        again = load(tmp_path, "training: {max_steps: 31}", "seed=5", stored=stored)
        assert changed(again, config) == {"max_steps": 31, "seed": 5}
    del stored["lr"]  # which gpt2.yaml does not fill
    refused("lr", load_config, stored=stored)


def test_a_mistake_in_the_configuration_is_named(tmp_path):
    for override in f"""
    data.folder=x data.source training.lr=[1 training.lr= training.lr=true training.lr=.nan
    training.lr=1e999 training.lr={10**400} model.n_layers=12.5 model.n_layers=true model.n_layers=x
    training.time_step_masking=1 training.block_steps=3 training.block_steps=[1,.inf,1]
    training.block_mask_ranges=[0,1] lr=0 vocab_size=1 max_steps=-1 max_steps={10**400} n_layers=7
    n_heads=7 attention_mode=casual quantization_type=int8 run_id=../up run_id=-x run_id=.x run_id=
    block_steps=[1,0,1] block_steps=[] block_steps=[1,1] time_step_mask_fractions=[]
    block_mask_ranges=[[0,.4],[.4,1]] block_mask_ranges=[[0,.4,.5],[.5],[.7,1]]
    block_mask_ranges=[[0,.4],[.5,.7],[.7,1]] block_mask_ranges=[[0,.4],[.3,.7],[.7,1]]
    block_mask_ranges=[[0,.4],[.4,.7],[.7,.9]] block_mask_ranges=[[.1,.4],[.4,.7],[.7,1]]
    block_mask_ranges=[[0,.4],[.4,.4],[.4,1]] time_step_mask_fractions=[.2,.1,.5,.8]
    training.log_interval=010 training.lr=1:30 training.time_step_masking=yes
    training.block_steps=[1:30,1,1]
    time_step_mask_fractions=[.1,.1,.5,.8] time_step_mask_fractions=[0,.1,.5,.8]
    time_step_mask_fractions=[.1,.5,1.5] time_step_mask_fractions=[.1,.8]
    beta2=0.999 moments=fp16 compile=yes checkpoint_seconds=-1
    """.split():
        refused(override.partition("=")[0], load_config, overrides=[override])
    both = "{model: {attention_mode: bidirectional}, training: {time_step_masking: false}}"
    for words, text in (
        ("training.max_steps?", "training: {max_step: 1}"), ("training.lr?", "model: {lr: 1}"),
        ("training.lr?", "trainig: {lr: 1}"), ("training.lr", "training: {lr: '6e-4'}"),
        ("training.run_id", "training: {run_id: 7}"), ("attention_mode", both),
        *[("mine.yaml", text) for text in ("model: [1", "model:\n\td_model: 3", "[a]: 1", "- 1",
                                           "a\0b", "model: 3", "presets: {p: 3}")],
    ):  # fmt: skip
        refused(words, load, tmp_path, text)
    refused("none.yaml", load_config, tmp_path / "none.yaml")


def test_numbers_are_decimal_and_text_is_text(tmp_path):
    """In a file as on the command line, where YAML 1.1 has numbers, dates and truth."""
    for text in "1:30 010 0x10 1_000 yes off 2026-01-01 2026-01-01T00:00:00Z 1e 1.2.3".split():
        assert load(tmp_path, f"training: {{run_id: {text}}}").run_id == text
    assert load(tmp_path, "presets: {100: {training: {lr: 1}}}", preset="100").lr == 1
    for text in "2 +2 2. 2.0 .2e1 02.0 2e0 20E-1".split():
        assert load(tmp_path, f"training: {{lr: {text}}}", f"training.qlora_lr={text}").lr == 2
    assert load(tmp_path, "{training: {qlora_enabled: False}}").qlora_enabled is False
    for text in ("true", "false", "auto"):  # of one key true is a text, there and here
        assert load(tmp_path, f"training: {{compile: {text}}}").compile == text
        assert load(tmp_path, "{}", f"training.compile={text}").compile == text


def test_every_mask_fraction_has_one_owner():
    config = load_config()
    assert [config.block_of(m) for m in (1e-9, 0.4, 0.41, 0.7, 0.71, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert [len(config.time_steps_of(k)) for k in range(3)] == [4, 3, 5]
    turned = config.replace(block_mask_ranges=config.block_mask_ranges[::-1])
    assert turned.block_of(0.4) == 2 and turned.time_steps_of(0) == config.time_steps_of(2)
    ignored = {"total_blocks": 5, "block_size": 9, "block_mask_ranges": [[0.2, 0.3]]}
    standard = config.replace(mode="standard", n_layers=7, **ignored)
    assert (standard.total_blocks, standard.block_size, standard.block_of(1e-9)) == (1, 7, 0)
    assert standard.time_steps_of(0) == config.time_step_mask_fractions


def test_a_run_is_named_by_name_path_or_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("train", Run.named)
    for name, seconds in (("checkpoints/a b", 50), ("checkpoints/c", 30), ("elsewhere/d", 70)):
        run = Run(name)
        d.write_file(run.checkpoint, [b"x"])
        run.record("step")
        os.utime(run.metrics_file, (seconds, seconds))
    for name in ("a b", "checkpoints/a b", tmp_path / "checkpoints" / "a b", None):
        assert Run.named(name).checkpoint.samefile("checkpoints/a b/checkpoint.safetensors")
    assert [str(Run.named(name)) for name in ("a b", "elsewhere/d")] == ["'a b'", "elsewhere/d"]
    refused("a b, c", Run.named, "d")


def test_a_run_that_another_process_trains_is_refused(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    run = Run(tmp_path / "a")
    left = run.folder / "backup" / ".block_0.safetensors.1234.tmp"
    d.write_file(left, [b"x"])
    held = run.lock()
    assert not left.exists()
    refused("run a", run.lock)
    held.close()
    run.lock().close()
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(38, "Function not implemented")))
    run.lock().close()


def test_metrics_with_half_a_line_a_damaged_line_and_cut_back(tmp_path):
    run = Run(tmp_path)
    run.record("step", loss=float("nan"), more=[1.5, (float("-inf"), "é")])
    size = run.metrics_file.stat().st_size
    run.record("stage", seconds=3)
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole + b'{"event": "step", "lo')  # killed here
    assert run.metrics("step") == [{"event": "step", "loss": None, "more": [1.5, [None, "é"]]}]
    assert run.metrics("stage", "seconds") == [{"event": "stage", "seconds": 3}]
    refused(run.metrics_file, run.metrics, "stage", "seconds", "tokens")
    run.cut_metrics(size)
    assert run.metrics_file.read_bytes() == whole[:size] and run.metrics("stage") == []
    refused(run.metrics_file, run.cut_metrics, size + 1)
    for damage in (b'{"event": \n', b'{"evenu": "step"}\n'):
        run.metrics_file.write_bytes(whole + damage)
        refused(run.metrics_file, run.metrics, "step")


def test_the_committed_files_and_their_examples(tmp_path):
    for path, sha256 in ((d.CORPUS, d.CORPUS_SHA256), (d.MERGES, d.MERGES_SHA256)):
        copy = tmp_path / path.name
        copy.write_bytes(d.read_committed(path, sha256))
        flip(copy, 12_345)
        refused(copy, d.read_committed, copy, sha256)
    examples = d.read_examples("sotu", 10_000)
    train, val = ({*examples[split]} for split in ("train", "val"))
    assert (len(train), len(val), len(train | val)) == (9000, 1000, 10_000)
    rows = [json.loads(line) for line in d.CORPUS.read_text().splitlines()]
    groups = {split: {row["source"].rpartition("-")[0] for row in rows if row["split"] == split}
              for split in examples}
    assert not groups["train"] & groups["val"]  # an address validates whole, or not at all
    tokens = d.tokenizer(50_257).encode_ordinary_batch([row["text"] for row in rows])
    assert all(64 <= len(ids) <= 160 for ids in tokens)
    some = d.read_examples("sotu", 100)  # spread evenly over the text
    assert some == {split: texts[::100] for split, texts in examples.items()}


def test_ranks_are_gpt2s_and_every_prefix_of_them_is_lossless():
    gpt2 = d.tokenizer(50_257)  # ids as OpenAI's own tokenizer gives them
    tokens = (b"!", b"\0", b" t", b" the", b"<|endoftext|>")
    assert [*map(gpt2.encode_single_token, tokens)] == [0, 188, 256, 262, 50_256]
    assert gpt2.encode_ordinary("Hello, world!") == [15496, 11, 995, 0]
    text = "The naïve café, 🦉 שלום عالم 日本語\n\n  in the winter\t\0\r\n<|endoftext|>"
    texts = [text, "".join(map(chr, range(0x3000))), *d.read_examples("sotu", 500)["train"]]
    for vocab_size, the in ((257, [220, 83, 71, 68]), (258, [256, 71, 68]), (4096, [262])):
        encoding = d.tokenizer(vocab_size)
        assert encoding.n_vocab == vocab_size and encoding.eot_token == vocab_size - 1
        assert encoding.encode_ordinary(" the") == the
        for text in texts:
            ids = encoding.encode_ordinary(text)
            assert encoding.decode(ids) == text
            assert max(ids) < vocab_size - 1  # never <|endoftext|>, whatever is written
    for size in (2, 256, 50_258):
        refused(size, d.tokenizer, size)


def test_the_tokenizer_is_written_as_gpt2s_files(tmp_path):
    byte_of, _, _ = d.gpt2_vocabulary(257)
    assert [len(byte_of), byte_of["Ġ"], byte_of["Ċ"], byte_of["a"]] == [256, *b" \na"]
    for vocab_size in (257, 4096, 50_257):
        d.write_tokenizer(tmp_path, vocab_size)
        rank_of = json.loads((tmp_path / "vocab.json").read_text())
        assert rank_of.pop("<|endoftext|>") == vocab_size - 1 == len(rank_of)
        for token, rank in rank_of.items():
            token = bytes(byte_of[c] for c in token)
            assert d.tokenizer(vocab_size).decode_single_token_bytes(rank) == token
        merges = (tmp_path / "merges.txt").read_text().splitlines()[1:]
        assert [merge.replace(" ", "") for merge in merges] == [*rank_of][256:]
    assert (tmp_path / "merges.txt").read_bytes() == d.MERGES.read_bytes()


def prose(count, seed=0):
    """`count` paragraphs, no two alike."""
    return [f"Of {seed}, é🦉 {' '.join(WORDS[i % 9 : i % 7 + 9])} {i}." for i in range(count)]


def own_text(folder, text, name="text.txt", **changes):
    """A toy Config of a text in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return toy_config(source=str(folder / name), token_folder=str(folder / "data"), **changes)


def test_every_format_gives_the_same_examples_and_of_each_file_the_last_tenth(tmp_path):
    p = prose(60)
    spaced = [text.replace(" ", " \n\t ", 3) for text in p]
    records = [{"text": text, "split": "train" if i < 54 else "val"} for i, text in enumerate(p)]
    for name, text in {
        "paragraphs.txt": "\ufeff\n\n" + "\n \t\n\n".join(spaced) + "\n",
        "dos.txt": "\r\n\r\n".join(spaced),
        "lines.md": "\n".join(p),
        "nine.txt": "\n\n".join("\n".join(p[i : i + 7]) for i in range(0, 60, 7)),
        "stories.txt": "\n<|endoftext|>\n".join(text.replace("\n", "\n\n") for text in spaced),
        "few.txt": "\n".join(p[:30]) + "<|endoftext|>" + "\r\n".join(p[30:]),
        "plain.jsonl": "\n".join(json.dumps({"text": text}) for text in spaced) + "\n\n",
        "packed.jsonl": "\n".join(json.dumps({"text": "<|endoftext|>".join(p[i : i + 7])})
                                  for i in range(0, 60, 7)),
        "split.jsonl": "\n".join(map(json.dumps, records[54:] + records[:54])),
    }.items():
        source = own_text(tmp_path, text, name).source
        assert d.read_examples(source, 1000) == {"train": p[:54], "val": p[54:]}
    folder = tmp_path / "texts"
    for name, part in (("b.TXT", p[:20]), ("a.txt", p[20:53]), ("c.md", p)):
        own_text(folder, "\n\n".join(part), name)
    own_text(folder / "d", "\n".join(p[53:]), "e.txt")  # seven: a tenth of all, still
    for hidden in (folder, folder / "d", folder / ".d", folder / ".d" / "d"):  # not read
        own_text(hidden, b"\0", ".e.txt" if hidden.name != "d" else "._e.TXT")
    own_text(folder / ".d", "\n".join(p), "e-checkpoint.txt")
    assert d.read_examples(str(folder), 1000) == {
        "train": p[20:50] + p[:18] + p[53:59], "val": p[50:53] + p[18:20] + p[59:]}  # fmt: skip


def test_a_text_that_cannot_be_read_is_named(tmp_path):
    for name, text in (
        ("a.txt", b"a\n" * 9), ("b.txt", b"a\0\n" * 99), ("c.txt", b"caf\xe9"), ("d", b" "),
        ("e.jsonl", b'{"text": "alone", "split": "train"}'),
        *[("f.jsonl: line 3", b'{"text": "x"}\n\n' + line)
          for line in (b"{", b"[" * 99_999, b"NaN", b'["x"]', b'{"txt": "x"}', b'{"text": 1}',
                       b'{"text": "\\ud800"}', b'{"text": "x", "split": "test"}')],
    ):  # fmt: skip
        config = own_text(tmp_path, text, name.partition(":")[0])
        refused(name, load_tokens, config)
    refused("none.txt", load_tokens, config.replace(source="none.txt"))
    assert not (tmp_path / "data").exists()


def test_tokens_are_the_examples_with_separators(tmp_path, capsys, monkeypatch):
    config = own_text(tmp_path, "\n".join(prose(60)), "🦉 é's.txt", num_examples=20)
    arguments = ["--prepare", f"data.source={config.source}", "data.num_examples=20",
                 f"data.token_folder={config.token_folder}"]  # fmt: skip
    with monkeypatch.context() as patch:  # a console that cannot encode the name
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        assert d.main(arguments) == 0
        assert b"? ?'s.txt" in sys.stdout.buffer.getvalue()
    capsys.readouterr()
    assert d.main([*arguments, "model.vocab_size=257"]) == 0  # one file, and one line of it
    made, ready = capsys.readouterr().out.splitlines()
    assert "tokens_257.safetensors" in made and ready.endswith("vocabularies of 257")
    texts = d.read_examples(config.source, 20)
    monkeypatch.setattr(d, "read_examples", None)  # side by side: nothing is made again
    for size in (50_257, 4096):  # those of gpt2.yaml and of its preset
        config = config.replace(vocab_size=size)
        *tokens, digest = load_tokens(config)
        for split, ids in zip(("train", "val"), tokens):
            whole = "".join(f"{text}<|endoftext|>" for text in texts[split])
            assert ids.dtype == np.uint16 and d.tokenizer(size).decode(ids.tolist()) == whole
        assert digest == hashlib.sha256(b"".join(ids.tobytes() for ids in tokens)).hexdigest()
        assert load_tokens(config, digest)[2] == digest
        refused(config.source, load_tokens, config, "0" * 64)
    for mistake in ([], ["--prepare", "--sorce", "a"], ["--prepare", "training.lr=[1"]):
        fails(d.main, mistake, capsys, *mistake[1:2])


def test_another_or_a_changed_text_or_a_damaged_file_is_made_anew(tmp_path, capsys, monkeypatch):
    other = own_text(tmp_path, "\n".join(prose(60)), "a.txt")
    config = own_text(tmp_path, "\n".join(prose(60)), "b.txt").replace(source=str(tmp_path))
    first = load_tokens(config)[2]
    (path,) = (tmp_path / "data").iterdir()
    good = path.read_bytes()

    def made_again(config):
        """The digest; what is made is said once, and a second time is silent."""
        capsys.readouterr()
        digest = load_tokens(config)[2]
        assert capsys.readouterr().out.count("\n") == 1
        assert load_tokens(config)[2] == digest and capsys.readouterr().out == ""
        return digest

    for another in (other, config.replace(num_examples=30)):
        assert made_again(another) != first and made_again(config) == first
    for seed in (2, 0):
        own_text(tmp_path, "\n".join(prose(60, seed)), "b.txt")
        assert (made_again(config) == first) == (seed == 0)
    with monkeypatch.context() as patch:
        patch.setattr(d, "MERGES_SHA256", "0" * 64)  # another tokenizer of this size
        assert made_again(config) == first
    assert made_again(config) == first
    for position in range(0, len(good), len(good) // 9):
        flip(path, position)
        assert made_again(config) == first and path.read_bytes() == good


@pytest.mark.parametrize("n_tokens, seq_len", [(100, 8), (101, 8), (107, 8), (64, 2), (30, 16)])
def test_each_token_is_predicted_once_an_epoch(n_tokens, seq_len):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    rows = d.rows_in(n_tokens, seq_len)
    firsts = set()
    for epoch in range(20):
        batch = d.training_rows(tokens, seq_len, rows, 0, 0, epoch)  # (rows, seq_len)
        assert torch.equal(batch, batch[:, :1] + torch.arange(seq_len))  # contiguous
        predicted = batch[:, 1:].flatten().sort().values
        firsts.add(first := int(predicted[0]))
        assert torch.equal(predicted, torch.arange(first, first + rows * (seq_len - 1)))
    assert n_tokens - rows * (seq_len - 1) < 2 * seq_len
    assert firsts <= {*range(1, seq_len)} and (len(firsts) > 1 or seq_len == 2)


def test_rows_do_not_depend_on_the_batch_size_and_repeat_exactly():
    tokens = np.arange(500, dtype=np.uint16)

    def walk(batch_size, seed=1, stage=2):  # 300 rows: over four epochs of 70
        return torch.cat([d.training_rows(tokens, 8, batch_size, seed, stage, step)
                          for step in range(300 // batch_size)])  # fmt: skip

    small = walk(5)
    assert small.dtype == torch.int64 and torch.equal(small, walk(60))
    d.epoch_starts.cache_clear()
    assert torch.equal(d.training_rows(tokens, 8, 5, 1, 2, 59), small[-5:])  # resume at step 59
    assert not torch.equal(small, walk(5, seed=3)) and not torch.equal(small, walk(5, stage=1))
    assert not torch.equal(small[:70], small[70:140])  # epochs are shuffled anew


def test_validation_rows_cover_the_text_without_overlap_and_a_short_text_is_refused():
    tokens = np.arange(1000, dtype=np.uint16)
    every = d.validation_rows(tokens, 8)
    assert every.shape == (142, 8) and every.dtype == torch.int64
    assert torch.equal(every[:, 1:].flatten(), torch.arange(1, 995))
    assert torch.equal(d.validation_rows(tokens, 8, 10_000), every)
    some = d.validation_rows(tokens, 8, 10)
    assert torch.equal(some, every[[i * 142 // 10 for i in range(10)]])
    refused("model.seq_len", d.validation_rows, tokens[:7], 8)
    assert len(d.training_rows(tokens[:50], 8, 6, 0, 0, 0)) == 6
    for seq_len, batch_size in ((64, 1), (8, 7)):
        refused("model.seq_len", d.training_rows, tokens[:50], seq_len, batch_size, 0, 0, 0)
