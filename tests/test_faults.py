"""Nothing is lost: kills, full disks, damaged files, mistakes. Long campaigns: pytest --slow."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data_loader
import evaluate_gpt2
import quant
import train_gpt2_fusion as train
from model import GPT, ModelConfig

# The real script in a process of its own, with bytes as vocabulary in place of the network's.
SCRIPT = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import data_loader, torch
torch.set_num_threads(1)
data_loader.gpt2_ranks = lambda folder: {{bytes([b]): b for b in range(256)}}
runpy.run_path({str(ROOT / "train_gpt2_fusion.py")!r}, run_name="__main__")
"""
EVERY_STEP = {"training__max_steps": 36, "training__checkpoint_interval": 1,
              "training__log_interval": 1, "training__eval_interval": 6}  # fmt: skip
NO_SCORES = dict.fromkeys(("nelbo_12", "nelbo", "left_to_right", "time_steps"))  # of a stub
DROPOUT = {"model__dropout": 0.1, "training__qlora_dropout": 0.1}
KILLED = {
    "frozen": DROPOUT | {"training__quantization_type": "int4"},
    "trainable": DROPOUT | {"training__fusion_mode": "trainable"},
    "standard": DROPOUT | {"training__mode": "standard"},
    "bidirectional": {"model__attention_mode": "bidirectional", "training__batch_size": 2,
                      "training__gradient_accumulation": 2, "training__quantization_type": "nf4"},
}  # fmt: skip


@pytest.fixture
def no_report(monkeypatch):
    """A run ends without its evaluation, which takes longer than the toy run itself."""
    monkeypatch.setattr(train, "report", lambda *args, **kwargs: NO_SCORES)


def outcome(folder):
    """What a run must arrive at, however often it was stopped: losses, weights, evaluation."""
    lines = [(line["stage"], line["step"], line["loss"], line["grad_norm"])
             for line in evaluate_gpt2.read_metrics(folder, "step")]
    assert len({line[:2] for line in lines}) == len(lines)  # no step appears twice
    others = [line for line in evaluate_gpt2.read_metrics(folder)
              if line["event"] in ("validation", "loss_jump")]
    blocks = len(list((folder / "backup").glob("block_*.pt")))
    weights = [quant.read_backup(folder / "backup", block) for block in range(blocks)]
    result = json.loads((folder / "eval.json").read_text())
    scores = {key: result[key] for key in ("nelbo_12", "nelbo", "left_to_right", "time_steps")}
    return {"lines": lines, "others": others, "weights": weights, "scores": scores}


def data_config(tmp_path):
    """The data of a toy run."""
    return data_loader.DataConfig(str(tmp_path / "text.txt"), 10_000, str(tmp_path / "data"))


def start(arguments):
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, there, pause=1e-3):
    """Poll until there() holds (True) or the process has ended (False)."""
    while not there():
        if process.poll() is not None:
            return False
        time.sleep(pause)
    return True


def fails(arguments, capsys, *words, main=train.main):
    """main(arguments) ends with status 2 and one line that holds all the words."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and len(error) < 600, error
    for word in words:
        assert word in error, error


def leftovers(folder):
    """Files that a failed write would leave behind."""
    return [path for path in Path(folder).rglob("*") if path.suffix == ".tmp"]


# --- kills -----------------------------------------------------------------------------------


def test_signals_on_the_real_script(toy, no_report):
    """SIGTERM, then SIGINT, then SIGKILL within a checkpoint: three processes, one result."""
    settings = EVERY_STEP | KILLED["frozen"] | {"training__max_steps": 12}
    arguments = toy(**settings)
    assert train.main(toy(**settings, training__run_id="whole")) == 0
    checkpoint, aside = toy.folder / "checkpoint.pt", toy.folder / "checkpoint.pt.tmp"
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(arguments + ["--resume"])
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        assert wait_for(process,
                        lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen)
        process.send_signal(number)
        printed = process.communicate()[0]
        assert process.returncode == 130, printed
        assert "--resume" in printed.splitlines()[-1] and "Traceback" not in printed
    process = start(arguments + ["--resume"])
    assert wait_for(process, aside.exists)
    process.kill()
    process.communicate()
    assert train.main(arguments + ["--resume"]) == 0
    assert quant._same(outcome(toy.folder), outcome(toy.folder.with_name("whole")))


def what_was_hit(folder, backups):
    """What a killed process was doing, by the files it left; backups: those it found."""
    backup = folder / "backup"
    aside = (folder / "checkpoint.pt.tmp").exists()
    if not (folder / "checkpoint.pt").exists():
        return "a first checkpoint" if aside else "the first step"
    if list(backup.glob("*.tmp")):
        return "a backup"
    state = quant.load_file(folder / "checkpoint.pt")
    if state["finished"]:
        return "the evaluation"
    uncounted = {path.name for path in backup.glob("block_*.pt")}
    uncounted -= {f"block_{block}.pt" for block in range(state["backed_up"])}
    if uncounted:  # backed up, and no checkpoint counts it yet
        where = "between backup and checkpoint" if uncounted - backups else "such a place again"
        return where + (", in the checkpoint" if aside else ", in a conversion")
    if aside:
        return "a checkpoint"
    return "a place between stages" if state["stage"] and not state["step"] else "a step"


@pytest.mark.slow
def test_campaign_of_kills(toy, capsys):
    """Kill the real script 12 times in each of four kinds of run, then compare with a whole one."""
    began, hits, rng = time.time(), Counter(), random.Random(1)
    for name, changes in KILLED.items():
        changes = EVERY_STEP | changes
        assert train.main(toy(**changes, training__run_id=f"whole-{name}")) == 0
        folder = toy.folder.with_name(name)
        checkpoint, backup = folder / "checkpoint.pt", folder / "backup"
        arguments = toy(**changes, training__run_id=name) + ["--resume"]
        for kill in range(12):
            for path in [*folder.glob("*.tmp"), *backup.glob("*.tmp")]:
                path.unlink()  # so that what is found below is this kill's
            backups = {path.name for path in backup.glob("block_*.pt")}
            times = {checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0}
            wanted = rng.choice([1, 1, 2])
            if kill == 11 or (kill % 4 == 3 and name in ("frozen", "bidirectional")):
                wanted = 99  # on to the end of a stage

            def there():
                """Some new checkpoints, or the end of a stage."""
                if checkpoint.exists():
                    times.add(checkpoint.stat().st_mtime_ns)
                new = [path for path in backup.glob("block*") if path.name not in backups]
                return len(times) > wanted or new

            process = start(arguments)
            wait_for(process, there)
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
            process.communicate()
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0
                break  # it had ended before
            hits[what_was_hit(folder, backups)] += 1
        process = start(arguments)
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        assert quant._same(outcome(folder), outcome(toy.folder.with_name(f"whole-{name}"))), name
    with capsys.disabled():
        print(f"\n{sum(hits.values())} kills in {len(KILLED)} runs, {time.time() - began:.0f} s: "
              + ", ".join(f"{count} hit {what}" for what, count in hits.most_common()))
    assert sum(hits.values()) >= 30 and len(hits) >= 5


# --- full disks ------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_loses_nothing(toy, no_report, monkeypatch, capsys):
    """From a step on no file can grow beyond `room` bytes: the kernel refuses (RLIMIT_FSIZE)."""
    settings = {"training__log_interval": 1}
    assert train.main(toy(**settings, training__run_id="whole")) == 0
    whole = outcome(toy.folder.with_name("whole"))
    limits, real = resource.getrlimit(resource.RLIMIT_FSIZE), train.train_step
    for case, (step, room, name) in enumerate([
        (0, 100, "config.json"), (1, 50_000, "checkpoint.pt"), (5, 150_000, "block_0.pt"),
        (8, 100_000, "checkpoint.pt"), (8, None, "metrics.jsonl"),  # None: in the middle of a line
    ]):  # fmt: skip
        count = [0]

        def step_then_full(*args):
            count[0] += 1
            if count[0] == step:
                size = room or (folder / "metrics.jsonl").stat().st_size + 10
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            return real(*args)

        arguments = toy(**settings, training__run_id=f"full-{case}")
        folder = toy.folder.with_name(f"full-{case}")
        monkeypatch.setattr(train, "train_step", step_then_full)
        try:
            if step == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            fails(arguments, capsys, name, "File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.setattr(train, "train_step", real)
        assert not leftovers(folder)
        for path in folder.rglob("*.pt"):
            quant.load_file(path)
        assert train.main(arguments + ["--resume"]) == 0
        assert quant._same(outcome(folder), whole), name


def test_a_full_disk_while_data_are_prepared(toy, tmp_path, no_report, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room, name in ((1000, "english_10k.jsonl"), (50_000, "train_257.bin")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            fails(toy(), capsys, name, "File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not toy.folder.exists() and not leftovers(tmp_path)
    assert train.main(toy()) == 0


# --- damaged files ---------------------------------------------------------------------------


def flipped(path, position):
    """The file with one bit of one byte changed."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def test_a_run_names_the_stored_file_that_is_damaged(toy, tmp_path, no_report, capsys, monkeypatch):
    """Any file that training reads, one byte flipped, or cut off: named, and nothing is changed."""
    stop_after(monkeypatch, 8)  # in stage 2: one block is backed up
    assert train.main(toy()) == 130
    rng = random.Random(0)
    data = tmp_path / "data"
    files = [toy.folder / "checkpoint.pt", toy.folder / "backup" / "block_0.pt",
             data / "train_257.bin", data / "val_257.bin", data / "english_10k.jsonl"]  # fmt: skip
    for path in files:
        good = path.read_bytes()
        for position in rng.sample(range(len(good)), 3):
            flipped(path, position)
            fails([*toy(), "--resume"], capsys, path.name)
            path.write_bytes(good)
        path.write_bytes(good[: len(good) // 2])
        fails([*toy(), "--resume"], capsys, path.name)
        path.write_bytes(good)
    for path in (toy.folder / "config.json", toy.folder / "backup" / "manifest.json"):
        good = path.read_bytes()
        path.write_bytes(good[:-20])
        fails([*toy(), "--resume"], capsys, path.name)
        path.write_bytes(good)
    assert train.main([*toy(), "--resume"]) == 0


@pytest.mark.slow
def test_campaign_of_flips(toy, tmp_path, monkeypatch, capsys):
    """Every byte of a small file and thousands of a run's own: detected and named."""
    began, count = time.time(), Counter()
    stop_after(monkeypatch, 8)  # in stage 2: one block is backed up
    assert train.main(toy()) == 130
    small = tmp_path / "small.pt"
    quant.save_file(small, {"w": torch.arange(9.0), "step": 3})
    rng = random.Random(0)
    config = data_config(tmp_path)

    def backup():
        quant.read_backup(toy.folder / "backup", 0)

    def tokens():
        data_loader.load_tokens(config, "val", 257)

    for path, read, positions in [
        (small, lambda: quant.load_file(small), None),
        (toy.folder / "checkpoint.pt", lambda: quant.load_file(toy.folder / "checkpoint.pt"), 5000),
        (toy.folder / "backup" / "block_0.pt", backup, 5000),
        (tmp_path / "data" / "val_257.bin", tokens, 3000),
        (tmp_path / "data" / "english_10k.jsonl", tokens, 3000),
    ]:
        good = path.read_bytes()
        everywhere = range(len(good))
        for position in rng.sample(everywhere, min(positions or len(good), len(good))):
            with open(path, "r+b") as file:
                file.seek(position)
                file.write(bytes([good[position] ^ 1 << rng.randrange(8)]))
            with pytest.raises((quant.DamagedFile, data_loader.UserError), match=path.name):
                read()
            with open(path, "r+b") as file:
                file.seek(position)
                file.write(good[position : position + 1])
            count[path.name] += 1
        read()
    with capsys.disabled():
        print(f"\n{sum(count.values())} flips, all detected, {time.time() - began:.0f} s: "
              + ", ".join(f"{n} of {name}" for name, n in count.items()))


# --- training watches itself -----------------------------------------------------------------


def stop_after(monkeypatch, steps, error=None):
    """Send SIGINT (or raise error) in the step with that number."""
    real, count = train.train_step, [0]

    def step_then_stop(*args):
        count[0] += 1
        if count[0] == steps:
            monkeypatch.setattr(train, "train_step", real)
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_then_stop)


@pytest.mark.parametrize("what, step, words", [
    ("loss", 5, ["the loss is nan", "stage 1 (block 0)", "step 5", "row 2 of its batch"]),
    ("gradient", 5, ["gradient norm nan", "stage 1 (block 0)", "step 5", "row 0, 1, 2, 3 of"]),
    ("weights", 4, ["weights", "stage 1 (block 0)", "not finite after step 4"]),
    ("optimizer", 6, ["optimizer state", "stage 1 (block 0)", "not finite after step 6"]),
])  # fmt: skip
def test_nothing_that_is_not_finite_is_ever_saved(
    toy, no_report, monkeypatch, capsys, what, step, words
):
    """Checkpoints after steps 2 and 4, a log line after 4, the stage's end and backup after 6."""
    settings = {"training__checkpoint_interval": 2 if step != 5 else 4, "training__log_interval": 4}
    real, count = train.train_step, [0]

    def broken(loss_of, optimizer, *args):
        ce, grad_norm = real(loss_of, optimizer, *args)
        count[0] += 1
        if count[0] == step:
            if what == "loss":
                ce[2] = float("nan")
            elif what == "gradient":
                grad_norm = grad_norm * float("nan")
            elif what == "weights":
                loss_of.model.h[1].mlp.c_fc.bias.data[3] = float("inf")
            else:
                next(iter(optimizer.state.values()))["exp_avg_sq"][0, 0] = float("inf")
        return ce, grad_norm

    monkeypatch.setattr(train, "train_step", broken)
    fails(toy(**settings), capsys, *words)
    assert quant.load_file(toy.folder / "checkpoint.pt")["step"] == (2 if step == 4 else 4)
    assert not (toy.folder / "backup").exists()
    monkeypatch.setattr(train, "train_step", real)
    assert train.main([*toy(**settings), "--resume"]) == 0


def test_a_loss_far_above_its_trend_is_reported(toy, no_report, monkeypatch, capsys):
    """Stage 1, step 7 is 3 nats too high; a run killed before or behind it says the same."""
    settings = {"training__max_steps": 16, "training__log_interval": 1}
    real_batch, real_step, where = train.batch_of, train.train_step, [None]

    def batch_of(tokens, config, training, stage, step):
        where[0] = (stage.index, step)
        return real_batch(tokens, config, training, stage, step)

    def train_step(*args):
        ce, grad_norm = real_step(*args)
        return ce + 3 * (where[0] == (0, 6)), grad_norm

    monkeypatch.setattr(train, "batch_of", batch_of)
    monkeypatch.setattr(train, "train_step", train_step)
    assert train.main(toy(**settings, training__run_id="whole")) == 0
    whole = outcome(toy.folder.with_name("whole"))
    (jump,) = [line for line in whole["others"] if line["event"] == "loss_jump"]
    assert (jump["stage"], jump["step"]) == (0, 7) and jump["loss"] > jump["usual"] + 2
    assert "is usual" in capsys.readouterr().out
    for number in (6, 8):  # saved after steps 4 and 6

        class Killed(BaseException):
            pass

        stop_after(monkeypatch, number, Killed())
        with pytest.raises(Killed):
            train.main(toy(**settings, training__run_id=f"killed-{number}"))
        assert train.main([*toy(**settings, training__run_id=f"killed-{number}"), "--resume"]) == 0
        assert quant._same(outcome(toy.folder.with_name(f"killed-{number}")), whole)


@pytest.mark.slow
def test_memory_files_and_threads_do_not_grow(toy, monkeypatch, capsys):
    """Over 2,000 steps; the same stage's step 100 is compared with its last."""
    real, seen = train.batch_of, {}

    def batch_of(tokens, config, training, stage, step):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen[stage.index, step] = (pages * resource.getpagesize() / 2**20,
                                   len(os.listdir("/proc/self/fd")),
                                   len(os.listdir("/proc/self/task")))  # fmt: skip
        return real(tokens, config, training, stage, step)

    monkeypatch.setattr(train, "batch_of", batch_of)
    before = threading.active_count()
    assert train.main(toy(training__max_steps=2000, training__log_interval=10,
                          training__eval_interval=100, training__checkpoint_interval=20)) == 0
    assert threading.active_count() == before
    with capsys.disabled():
        for stage, last in ((0, 999), (1, 499), (2, 499)):
            (first, *others), (end, *others_end) = seen[stage, 100], seen[stage, last]
            print(f"\nstage {stage + 1}: {first:.1f} MiB at step 100, {end:.1f} at the end; "
                  f"open files and threads {others}, then {others_end}", end="")
            assert end - first < 4 and others == others_end
    assert seen[2, 499][0] - seen[0, 100][0] < 20


# --- mistakes --------------------------------------------------------------------------------


def test_resume_names_every_key_that_differs(toy, no_report, capsys):
    assert train.main(toy()) == 0
    capsys.readouterr()
    changes = {"training__lr": "9e-4", "training__seed": 4, "model__dropout": 0.5,
               "data__num_examples": 50}  # fmt: skip
    keys = [key.replace("__", ".") for key in changes]
    fails([*toy(**changes, training__log_interval=1), "--resume"], capsys, *keys)
    assert train.main([*toy(training__log_interval=1), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "note: training.log_interval was 2 and is now 1" in printed
    assert "finished" in printed and "--overwrite" in printed
    fails(toy(), capsys, "is finished", "evaluate_gpt2.py --run toy", "--overwrite")
    (toy.folder / "eval.json").unlink()  # killed while it was evaluated
    assert train.main([*toy(), "--resume"]) == 0
    assert (toy.folder / "eval.json").exists()


def test_a_folder_that_may_not_be_written(toy, monkeypatch, capsys):
    """Simulated, because the superuser may write anywhere."""
    for folder in ("data", "checkpoints"):
        real = os.mkdir

        def mkdir(path, *args):
            if folder in Path(path).name:
                raise PermissionError(13, "Permission denied", str(path))
            real(path, *args)

        monkeypatch.setattr(os, "mkdir", mkdir)
        fails(toy(), capsys, folder, "Permission denied")
        assert not toy.folder.exists()
        monkeypatch.setattr(os, "mkdir", real)


def write(name, data):
    """What makes a file before a mistake is tried."""

    def prepare(tmp_path):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return prepare


def other_tokenizer(tmp_path):
    shutil.copy(tmp_path / "data" / "train_257.bin", tmp_path / "data" / "val_257.bin")


def short_gpt2(tmp_path):
    config = ModelConfig(vocab_size=257, d_model=32, n_layers=6, n_heads=2, seq_len=8, block_size=2)
    GPT(config).save_pretrained(tmp_path / "gpt2")


# name: (what is changed on the command line, words of the error, what is done before it)
# "config" is the text of a config file, "source" a file for data.source.
MISTAKES = {
    "broken yaml": ({"config": "model: [1"}, ["mine.yaml: line 1"]),
    "a tab": ({"config": "model:\n\td_model: 3"}, ["mine.yaml: line 2"]),
    "unknown section": ({"config": "modle: {}"}, ["mine.yaml", "modle"]),
    "unknown key": ({"config": "training: {epochs: 3}"}, ["mine.yaml", "training.epochs", "mean"]),
    "duplicate key": ({"config": "training: {lr: 1, lr: 2}"}, ["mine.yaml", "duplicate key lr"]),
    "a number in quotes": ({"config": "training: {lr: '6e-4'}"}, ["mine.yaml", "training.lr"]),
    "n_heads in the file": ({"config": "model: {n_heads: 7}"}, ["mine.yaml", "n_heads 7"]),
    "no config file": ({"--config": "none.yaml"}, ["none.yaml", "--config"]),
    "config is a folder": ({"--config": "/tmp"}, ["/tmp", "--config"]),
    "unknown preset": ({"--preset": "tini"}, ["tini", "tiny"]),
    "learning_rate": ({"training__learning_rate": 1}, ["command line", "mean training.lr?"]),
    "word for a number": ({"training__lr": "abc"}, ["command line", "training.lr", "abc"]),
    "half a layer": ({"model__n_layers": 12.5}, ["command line", "model.n_layers", "12.5"]),
    "no value": ({"training__lr": ""}, ["command line", "training.lr"]),
    "n_heads": ({"model__n_heads": 3}, ["command line", "n_heads 3"]),
    "layers and blocks": ({"model__n_layers": 7}, ["command line", "n_layers 7", "block_size"]),
    "unsorted fractions": (
        {"training__time_step_mask_fractions": [0.5, 0.1, 0.9]},
        ["command line", "time_step_mask_fractions"],
    ),
    "fraction 0": (
        {"training__time_step_mask_fractions": [0, 0.5, 0.9]},
        ["command line", "time_step_mask_fractions", "(0, 1]"],
    ),
    "fraction 1.5": (
        {"training__time_step_mask_fractions": [0.1, 0.5, 1.5]},
        ["command line", "time_step_mask_fractions", "(0, 1]"],
    ),
    "a block without a fraction": (
        {"training__time_step_mask_fractions": [0.1, 0.2]},
        ["command line", "block"],
    ),
    "bands with a hole": (
        {"training__block_mask_ranges": [[0.0, 0.4], [0.5, 0.7], [0.7, 1.0]]},
        ["command line", "block_mask_ranges"],
    ),
    "bands that end early": (
        {"training__block_mask_ranges": [[0.0, 0.4], [0.4, 0.7], [0.7, 0.9]]},
        ["command line", "block_mask_ranges"],
    ),
    "shares": ({"training__block_steps": [1, 1]}, ["command line", "block_steps"]),
    "no batch": ({"training__batch_size": 0}, ["command line", "batch_size"]),
    "negative steps": ({"training__max_steps": -5}, ["command line", "max_steps"]),
    "too few steps": ({"training__max_steps": 2}, ["max_steps"]),
    "unknown device": ({"training__device": "gpu"}, ["device", "gpu", "cpu"]),
    "device without numbers": ({"training__device": "meta"}, ["device", "meta"]),
    "device that is not here": ({"training__device": "xpu"}, ["device", "xpu"]),
    "run_id with a slash": ({"training__run_id": "../up"}, ["command line", "run_id"]),
    "both": ({"--resume": None, "--overwrite": None}, ["--resume", "--overwrite"]),
    "no text": ({"source": "none.txt"}, ["none.txt"]),
    "empty text": ({"source": "a.txt"}, ["a.txt", "empty"], write("a.txt", "")),
    "NUL in the text": ({"source": "a.txt"}, ["a.txt", "NUL"], write("a.txt", "a\0b")),
    "latin-1": ({"source": "a.txt"}, ["a.txt", "UTF-8"], write("a.txt", b"caf\xe9")),
    "huge batch": ({"training__batch_size": 10**9}, ["batch_size"]),
    "context longer than the text": ({"model__seq_len": 10**6}, ["seq_len"]),
    "no weights": ({"model__init_from": "/nowhere"}, ["init_from", "/nowhere"]),
    "context longer than the positions": (
        {"model__init_from": "gpt2"}, ["init_from", "seq_len"], short_gpt2,
    ),
    "run folder is a file": ({"training__folder": "gpt2.yaml"}, ["gpt2.yaml"]),
    "validation of another tokenizer": ({}, ["val_257.bin", "delete it"], other_tokenizer),
}  # fmt: skip
NEEDS_DATA = list(MISTAKES).index("huge batch")


def test_mistakes_end_in_one_line_that_names_them(toy, tmp_path, monkeypatch, capsys):
    """As a user would make them; those before NEEDS_DATA are found before any file is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2.yaml").write_text((ROOT / "gpt2.yaml").read_text())
    wrong = []
    for number, (name, (changes, words, *before)) in enumerate(MISTAKES.items()):
        if number == NEEDS_DATA:
            assert not (tmp_path / "data").exists() and not wrong, "\n".join(wrong)
            for split in ("train", "val"):
                data_loader.load_tokens(data_config(tmp_path), split, 257)
        arguments = toy(**{key: value for key, value in changes.items() if "__" in key})
        for key, value in changes.items():
            if key == "config":
                Path("mine.yaml").write_text(value)
                arguments[1] = "mine.yaml"
                arguments = [a for a in arguments if not a.startswith("model.")]
            elif key == "source":
                arguments.append(f"data.source={value}")
            elif key.startswith("--"):
                arguments += [key] + ([value] if value else [])
        for prepare in before:
            prepare(tmp_path)
        try:
            fails(arguments, capsys, *words)
            assert not toy.folder.exists() and not leftovers(tmp_path)
        except Exception as error:  # all of them in one go
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)
