"""The stages and the loop: the real scripts, in process, at toy size on made-up text."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

import evaluate_gpt2
import lora
import quant
import train_gpt2_fusion as train
from conftest import ROOT
from model import GPT, ModelConfig
from train_gpt2_fusion import TrainingConfig, fusion_schedule, standard_config

CONFIG = ModelConfig(
    vocab_size=257, d_model=32, n_layers=6, n_heads=2, seq_len=32, block_size=2
)
EVERY_KIND = pytest.mark.parametrize("kind", quant.KINDS)


def metrics(folder, event="step"):
    return evaluate_gpt2.read_metrics(folder, event)


def weights(folder):
    """All tensors that a finished run left in its backups."""
    return {
        (block, name): tensor
        for block in range(len(list((folder / "backup").glob("block_*.pt"))))
        for name, tensor in quant.read_backup(folder / "backup", block).items()
    }


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- the schedule ----------------------------------------------------------------------------


@pytest.mark.parametrize("blocks, size", [(3, 4), (2, 6), (12, 1), (1, 12), (4, 3)])
def test_frozen_mode_trains_every_layer_in_exactly_one_stage(blocks, size):
    edges = [i / blocks for i in range(blocks + 1)]
    ranges = tuple(zip(edges, edges[1:]))
    steps = tuple((i + 0.5) / blocks for i in range(blocks))
    config = ModelConfig(total_blocks=blocks, block_size=size, block_mask_ranges=ranges,
                         time_step_mask_fractions=steps)  # fmt: skip
    training = TrainingConfig(total_blocks=blocks, block_size=size, max_steps=1001,
                              block_steps=tuple(range(1, blocks + 1)))  # fmt: skip
    stages = fusion_schedule(config, training)
    assert sorted(i for stage in stages for i in stage.layers) == list(range(12))
    assert sum(stage.steps for stage in stages) == 1001
    assert [stage.embeddings for stage in stages] == [True] + [False] * (blocks - 1)
    assert [stage.adapters for stage in stages] == [False] + [True] * (blocks - 1)
    assert sorted(m for stage in stages for m in stage.time_steps) == list(steps)


def test_the_schedule_of_the_other_modes():
    config, training = ModelConfig(), TrainingConfig()
    trainable = fusion_schedule(config, dataclasses.replace(training, fusion_mode="trainable"))
    assert [len(stage.layers) for stage in trainable] == [4, 8, 12]
    assert all(stage.embeddings and not stage.adapters for stage in trainable)
    (standard,) = fusion_schedule(
        standard_config(config), dataclasses.replace(training, mode="standard")
    )
    assert standard.layers == tuple(range(12)) and standard.embeddings and not standard.adapters
    assert standard.time_steps == config.time_step_mask_fractions
    unmasked = fusion_schedule(config, dataclasses.replace(training, time_step_masking=False))
    assert [stage.time_steps for stage in unmasked] == [(0.0,)] * 3


def test_the_learning_rate_warms_up_and_ends_at_its_share():
    training = TrainingConfig(warmup_steps=10, lr_min_share=0.1)
    (stage, *_) = fusion_schedule(ModelConfig(), training)
    shares = [train.learning_rate_share(step, stage, training) for step in range(stage.steps)]
    assert shares[0] == pytest.approx(1 / 11) and shares[10] == 1.0
    assert shares[:11] == sorted(shares[:11]) and shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)


def test_standard_bytes_are_those_of_gpt2_small():
    """124.5 M parameters (50,304 rows, 256 positions), 16 bytes each: 1.98 GB."""
    model = GPT(standard_config(ModelConfig(d_model=96, n_layers=12)))
    count = sum(p.numel() for p in model.parameters())
    assert train.standard_bytes(model.config) == 16 * count


# --- a run, from the command line to eval.json -----------------------------------------------


def test_the_whole_run(toy, capsys):
    assert train.main(toy(training__max_steps=240, training__lr="3e-3")) == 0
    printed = capsys.readouterr().out
    folder = toy.folder
    for word in ("frozen", "adapters", "no GPU: about", "validation", "NELBO", "sample", "eta"):
        assert word in printed, word
    # metrics.jsonl: a line per logged step, in order, each with its keys
    steps = metrics(folder)
    assert [line["stage"] for line in steps] == [0] * 60 + [1] * 30 + [2] * 30
    assert [line["step"] for line in steps] == [*range(2, 122, 2)] + [*range(2, 62, 2)] * 2
    for key in ("block", "loss", "loss_by_time_step", "lr", "grad_norm", "tokens_per_second",
                "memory_mib", "masked_fraction"):  # fmt: skip
        assert key in steps[0]
    assert set(steps[0]["loss_by_time_step"]) == {"0.1", "0.2", "0.3", "0.4"}
    assert set(steps[-1]["loss_by_time_step"]) == {"0.8", "0.85", "0.9", "0.95", "0.99"}
    assert 0.1 < steps[0]["masked_fraction"] < 0.4 and steps[-1]["masked_fraction"] > 0.8
    stages = metrics(folder, "stage")
    assert [stage["tokens"] for stage in stages] == [120 * 128, 60 * 128, 60 * 128]
    assert all(stage["peak_mib"] > 0 for stage in stages)
    # it learned: far below what ignoring the context gives
    result = json.loads((folder / "eval.json").read_text())
    assert result["nelbo_12"] < result["unigram"] - 0.1
    assert result["left_to_right"][0] < result["unigram"] - 0.2
    assert len(result["time_steps"]) == 13 and len(result["left_to_right"]) == 3
    for key in ("nelbo", "nelbo_stderr", "memory", "train_seconds", "train_tokens", "config"):
        assert key in result
    # and evaluation from disk repeats it
    options = ["--folder", str(folder.parent)]
    assert evaluate_gpt2.main([*options, "--run", "toy", "--json", str(folder / "again.json")]) == 0
    again = json.loads((folder / "again.json").read_text())
    for key in ("nelbo_12", "nelbo", "nelbo_stderr", "left_to_right", "time_steps"):
        assert again[key] == result[key]
    assert evaluate_gpt2.main([*options, "--precision", "int4", "--prompt", "the people"]) == 0
    assert "the people" in capsys.readouterr().out


@EVERY_KIND
@pytest.mark.parametrize("fusion", ["frozen", "trainable"])
@pytest.mark.parametrize("adapters", [True, False])
def test_every_combination_runs_end_to_end(toy, kind, fusion, adapters):
    changes = toy(training__quantization_type=kind, training__fusion_mode=fusion,
                  training__qlora_enabled=str(adapters).lower(), training__max_steps=8)  # fmt: skip
    assert train.main(changes) == 0
    saved = weights(toy.folder)
    assert {block for block, _ in saved} == {0, 1, 2}
    has = {block: any("lora_" in name for b, name in saved if b == block) for block in range(3)}
    assert has == {0: False, 1: adapters and fusion == "frozen", 2: adapters and fusion == "frozen"}
    model = evaluate_gpt2.load_run(toy.folder)
    assert model.blocks == 3
    stored = {m.kind for m in model.modules() if isinstance(m, quant.QuantLinear)}
    assert stored == {kind}  # the last block too


@pytest.mark.parametrize(
    "changes",
    [
        {"training__mode": "standard"},
        {"training__mode": "standard", "training__time_step_masking": "false"},
        {"training__time_step_masking": "false"},
        {"model__attention_mode": "bidirectional"},
        {"training__gradient_accumulation": 2, "training__batch_size": 2},
        {"training__gradient_checkpointing": "true"},
        {"training__compute_type": "bf16", "model__dropout": 0.1, "training__qlora_dropout": 0.1},
        {
            "training__total_blocks": 2,
            "training__block_size": 3,
            "training__block_steps": [1, 1],
            "training__block_mask_ranges": [[0.0, 0.5], [0.5, 1.0]],
        },
        {  # heavy to light
            "training__block_mask_ranges": [[0.7, 1.0], [0.4, 0.7], [0.0, 0.4]],
        },
    ],
)
def test_other_settings_run_end_to_end(toy, changes):
    assert train.main(toy(**changes)) == 0
    result = json.loads((toy.folder / "eval.json").read_text())
    bidirectional = changes.get("model__attention_mode") == "bidirectional"
    assert (result["left_to_right"] is None) == bidirectional
    blocks = 1 if changes.get("training__mode") == "standard" else changes.get(
        "training__total_blocks", 3
    )
    assert {step["block"] for step in result["time_steps"]} == set(range(blocks))


# --- what frozen means -----------------------------------------------------------------------


def test_a_later_stage_changes_nothing_that_an_earlier_exit_computes():
    config = CONFIG
    training = TrainingConfig(block_size=2, quantization_type="int4", max_steps=12, batch_size=4)
    stages = fusion_schedule(config, training)
    model = GPT(config, blocks=0)
    idx = torch.randint(257, (2, 32))
    remembered = []
    for stage in stages:
        optimizer = train.begin_stage(model, stage, training)
        assert model.blocks == stage.block + 1  # blocks not yet reached are not in memory
        before = {name: t.clone() for name, t in model.state_dict().items()}
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        tokens = torch.randint(257, (5000,)).numpy().astype("uint16")
        for step in range(4):
            batch = train.batch_of(tokens, config, training, stage, step)
            train.train_step(train.stage_loss(model, stage), optimizer, scaler, batch, training,
                             torch.device("cpu"), torch.float32)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in trains), name
        quant.freeze_block(model, stage.block, "int4")
        with torch.no_grad():
            for block, logits in enumerate(remembered):
                assert torch.equal(model(idx, block), logits), f"exit {block} changed"
            remembered.append(model(idx, stage.block))
    assert len(remembered) == 3
    # the adapters of exit 2 do act, or the test above would prove nothing
    adapters = lora.adapter_parameters(model, 2)
    assert adapters and any(p.abs().sum() > 0 for n, p in adapters.items() if "lora_B" in n)


def test_without_adapters_no_gradient_is_computed_in_the_frozen_prefix():
    config = CONFIG
    for adapters in (False, True):
        training = TrainingConfig(block_size=2, qlora_enabled=adapters)
        first, second, _ = fusion_schedule(config, training)
        model = GPT(config, blocks=0)
        train.begin_stage(model, first, training)
        quant.freeze_block(model, 0, "fp16")
        train.begin_stage(model, second, training)
        outputs = []
        model.h[1].register_forward_hook(lambda _, __, out: outputs.append(out.requires_grad))
        model(torch.zeros(1, 4, dtype=torch.long), 1)
        assert outputs == [adapters]


# --- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["frozen", "trainable"])
@pytest.mark.parametrize("stop_after", [3, 6, 8])  # in stage 1, at its end, in stage 2
def test_a_stopped_run_ends_as_one_that_was_never_stopped(toy, stop_after, fusion, monkeypatch):
    # Logged every step but saved every second one, so that a stop leaves lines to cut off.
    settings = dict(training__fusion_mode=fusion, model__dropout=0.1, training__log_interval=1)
    assert train.main(toy(**settings, training__run_id="whole")) == 0
    whole = toy.folder.with_name("whole")

    real, count = train.train_step, [0]

    def step_then_die(*args):
        if count[0] == stop_after:
            raise Killed
        count[0] += 1
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_then_die)
    with pytest.raises(Killed):
        train.main(toy(**settings))
    monkeypatch.setattr(train, "train_step", real)
    assert train.main([*toy(**settings), "--resume"]) == 0
    losses = [[(s["stage"], s["step"], s["loss"]) for s in metrics(f)] for f in (whole, toy.folder)]
    assert losses[0] == losses[1]
    assert same(weights(whole), weights(toy.folder))


def test_a_backup_that_no_checkpoint_counts_is_moved_aside(toy, monkeypatch):
    """Left by a killed process, and other than what the resumed run arrives at."""
    assert train.main(toy(training__seed=1, training__run_id="other")) == 0
    assert train.main(toy(training__run_id="whole")) == 0
    real, count = train.train_step, [0]

    def step_then_die(*args):
        count[0] += 1
        if count[0] == 4:
            raise Killed
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_then_die)
    with pytest.raises(Killed):
        train.main(toy())
    monkeypatch.setattr(train, "train_step", real)
    backup = toy.folder / "backup"
    backup.mkdir()
    for name in ("block_0.pt", "manifest.json"):
        shutil.copy(toy.folder.with_name("other") / "backup" / name, backup / name)
    assert train.main([*toy(), "--resume"]) == 0
    assert same(weights(toy.folder), weights(toy.folder.with_name("whole")))
    assert len(list(backup.glob("uncounted-*"))) == 1


def test_a_run_is_not_resumed_on_another_text(toy, tmp_path, capsys):
    real = train.report
    try:
        train.report = lambda *args, **kwargs: {}
        assert train.main(toy()) == 0
    finally:
        train.report = real
    source = tmp_path / "text.txt"
    source.write_text(source.read_text().replace("people", "nation"))
    fails([*toy(), "--resume"], capsys, "text has changed")


def test_ctrl_c_saves_first(toy, monkeypatch, capsys):
    import os
    import signal

    real, count = train.train_step, [0]

    def step_then_signal(*args):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_then_signal)
    assert train.main(toy()) == 130
    assert "--resume" in capsys.readouterr().out
    assert quant.load_file(toy.folder / "checkpoint.pt")["step"] == 5
    assert train.main([*toy(), "--resume"]) == 0


def test_a_run_stopped_in_stage_2_can_be_evaluated(toy, monkeypatch, capsys):
    real, count = train.train_step, [0]

    def step_then_stop(*args):
        count[0] += 1
        if count[0] == 8:
            raise Killed
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_then_stop)
    with pytest.raises(Killed):
        train.main(toy())
    assert evaluate_gpt2.main(["--folder", str(toy.folder.parent)]) == 0
    assert evaluate_gpt2.load_run(toy.folder).blocks in (1, 2)
    # What that wrote, or one while the run goes on, is not taken for the finished run's.
    def step_and_evaluation(*args):
        (toy.folder / "eval.json").write_text("of an unfinished run")
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_and_evaluation)
    real_report = train.report
    monkeypatch.setattr(train, "report", lambda *_, **__: step_then_stop())
    count[0] = 7
    with pytest.raises(Killed):
        train.main([*toy(), "--resume"])
    monkeypatch.setattr(train, "report", real_report)
    assert not (toy.folder / "eval.json").exists()
    assert train.main([*toy(), "--resume"]) == 0
    assert len(json.loads((toy.folder / "eval.json").read_text())["left_to_right"]) == 3


# --- mistakes --------------------------------------------------------------------------------


def fails(arguments, capsys, *words):
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model__n_heads": 3}, ["n_heads"]),
        ({"training__block_size": 3}, ["block_size", "n_layers"]),
        ({"training__mode": "fusd"}, ["mode", "fused"]),
        ({"training__quantization_type": "int8"}, ["quantization_type", "int4"]),
        ({"training__batch_size": 0}, ["batch_size"]),
        ({"training__lr": 0}, ["lr"]),
        ({"training__lr": "fast"}, ["lr"]),
        ({"training__max_steps": 2}, ["max_steps"]),
        ({"training__block_steps": [1, 1]}, ["block_steps"]),
        ({"training__run_id": "../up"}, ["run_id"]),
        ({"training__learning_rate": 1}, ["learning_rate"]),
        ({"model__vocab_size": 100}, ["vocab_size"]),
        ({"model__seq_len": 100000}, ["seq_len"]),
        ({"training__batch_size": 100000}, ["batch"]),
        ({"data__source": "/nowhere.txt"}, ["nowhere.txt"]),
        (
            {"training__time_step_masking": "false", "model__attention_mode": "bidirectional"},
            ["time_step_masking", "causal"],
        ),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(toy, capsys, changes, words):
    fails(toy(**changes), capsys, *words)
    assert not toy.folder.exists()


def test_an_existing_run_is_not_overwritten(toy, capsys):
    assert train.main(toy()) == 0
    before = weights(toy.folder)
    capsys.readouterr()
    fails(toy(), capsys, "finished", "--overwrite")
    fails([*toy(training__lr="9e-4"), "--resume"], capsys, "training.lr", "0.0009")
    fails([*toy(), "--resume", "--overwrite"], capsys, "exclude")
    assert same(before, weights(toy.folder))
    assert train.main([*toy(training__seed=1), "--overwrite"]) == 0
    assert same(before, weights(toy.folder.with_name("toy.old-1")))
    assert not same(before, weights(toy.folder))
    # the same seed gives the same weights
    assert train.main([*toy(), "--overwrite"]) == 0
    assert same(before, weights(toy.folder))


def test_a_second_process_on_a_run_is_refused(toy, capsys):
    training = TrainingConfig(run_id="toy", folder=str(toy.folder.parent))
    _, lock = train.open_folder(training, resume=False, overwrite=False)
    fails(toy(), capsys, "another process")
    lock.close()
    assert train.main(toy()) == 0


def test_evaluation_names_what_is_missing(toy, capsys):
    folder = str(toy.folder.parent)
    assert evaluate_gpt2.main(["--folder", folder]) == 2
    assert "no run" in capsys.readouterr().err
    assert train.main(toy()) == 0
    assert evaluate_gpt2.main(["--folder", folder, "--run", "other"]) == 2
    assert "toy" in capsys.readouterr().err
    assert evaluate_gpt2.main(["--folder", folder, "--prompt", "the people " * 20]) == 2
    assert "shorten" in capsys.readouterr().err
    path = toy.folder / "backup" / "block_1.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert evaluate_gpt2.main(["--folder", folder]) == 2
    assert "block_1.pt" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(toy, capsys):
    fails(toy(training__lr="1e9", training__grad_clip="1e30", training__warmup_steps=0),
          capsys, "loss is", "time step", "training.lr")  # fmt: skip


def test_a_run_in_every_storage_and_runs_side_by_side(toy, capsys):
    assert train.main(toy(training__quantization_type="nf4", training__max_steps=60)) == 0
    assert train.main(toy(training__mode="standard", training__run_id="end")) == 0
    folder = str(toy.folder.parent)
    capsys.readouterr()
    assert evaluate_gpt2.main(["--folder", folder, "--run", "toy", "--precision", "all"]) == 0
    table = json.loads((toy.folder / "eval_all.json").read_text())
    assert list(table) == list(quant.KINDS)
    bits = {kind: row["bits_per_weight"] for kind, row in table.items()}
    # groups of 64 do not fill rows of 32 numbers, so four-bit kinds cost more here
    assert bits["fp32"] == 32 and bits["fp16"] == 16 and bits["nf4"] < bits["int4"] < 7
    assert abs(table["fp16"]["nelbo_12"] - table["fp32"]["nelbo_12"]) < 1e-3
    assert table["int4"]["nelbo_12"] != table["fp32"]["nelbo_12"]
    assert evaluate_gpt2.main(["--folder", folder, "--compare", "toy", "end"]) == 0
    assert "fused, frozen" in capsys.readouterr().out


def test_training_starts_from_saved_gpt2_weights(toy, tmp_path, capsys):
    """A run's weights, written in Hugging Face's layout, begin another run at the same loss."""
    next_token = {"training__mode": "standard", "training__time_step_masking": "false",
                  "training__quantization_type": "fp32", "training__qlora_enabled": "false"}
    assert train.main(toy(**next_token, training__max_steps=100, training__lr="3e-3")) == 0
    evaluate_gpt2.load_run(toy.folder).save_pretrained(tmp_path / "gpt2")
    before = json.loads((toy.folder / "eval.json").read_text())["left_to_right"][0]
    again = {"model__init_from": tmp_path / "gpt2", "training__max_steps": 4,
             "training__run_id": "second"}
    assert train.main(toy(**next_token, **again, training__lr="1e-12")) == 0
    folder = toy.folder.with_name("second")
    assert metrics(folder, "validation")[0]["cross_entropy"] < 4.5  # scratch: log 257 = 5.5
    result = json.loads((folder / "eval.json").read_text())
    assert result["left_to_right"][0] == pytest.approx(before, abs=1e-4)
    # every block and exit norm of a fused run starts from them too, in each stage
    fused = again | {"training__run_id": "fused", "training__lr": "1e-12"}
    assert train.main(toy(**fused)) == 0
    saved = weights(toy.folder.with_name("fused"))
    source = weights(toy.folder)
    for (block, name), tensor in saved.items():
        if name.startswith("h.") and "lora_" not in name:
            assert torch.allclose(tensor, source[0, name], atol=1e-6), name
        if name.startswith("exit_norms."):
            other = source[0, name.replace(f"norms.{block}", "norms.0")]
            assert torch.allclose(tensor, other, atol=1e-6), name
    fails(toy(**again | {"training__run_id": "wrong"}, model__d_model=64), capsys, "d_model=32")


# --- more than one process -------------------------------------------------------------------


def assert_same_course(folder, other):
    """Two runs logged the same losses and gradient norms, within what fp32 rounds away."""
    for kind, keys in (("step", ("loss", "grad_norm")), ("validation", ("cross_entropy",))):
        for a, b in zip(metrics(folder, kind), metrics(other, kind), strict=True):
            assert a["step"] == b["step"] and a["stage"] == b["stage"]
            for key in keys:
                assert a[key] == pytest.approx(b[key], abs=1e-5), (kind, key, a["step"])


def test_gradient_accumulation_changes_nothing(toy):
    for rows in (8, 2):
        assert train.main(toy(training__batch_size=rows, training__run_id=f"by-{rows}",
                              training__gradient_accumulation=8 // rows)) == 0  # fmt: skip
    assert_same_course(toy.folder.with_name("by-8"), toy.folder.with_name("by-2"))


def test_two_processes_train_as_one(toy, tmp_path):
    assert train.main(toy(training__batch_size=8, training__run_id="one")) == 0
    # By torchrun, as a user starts it; the tests' made-up vocabulary has to come along.
    script = tmp_path / "two.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, data_loader, evaluate_gpt2, train_gpt2_fusion
evaluate_gpt2.ROWS = {evaluate_gpt2.ROWS}
torch.set_num_threads(1)
data_loader.gpt2_ranks = lambda folder: {{bytes([b]): b for b in range(256)}}
sys.exit(train_gpt2_fusion.main(sys.argv[1:]))
""")
    # 8 rows for both: each process takes 4 of them, in micro-batches of 2.
    arguments = toy(training__batch_size=2, training__gradient_accumulation=4,
                    training__run_id="two")  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               str(script), *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stage 3  step     3/3  loss") == 1  # process 0 alone speaks
    one, two = toy.folder.with_name("one"), toy.folder.with_name("two")
    assert_same_course(one, two)
    bounds = [json.loads((run / "eval.json").read_text())["nelbo_12"] for run in (one, two)]
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-5)
    for name, tensor in weights(one).items():  # AdamW enlarges what rounding does to tiny gradients
        assert (tensor - weights(two)[name]).abs().mean() < 1e-6, name


def test_rows_that_processes_cannot_share_are_refused(toy, monkeypatch, capsys):
    monkeypatch.setattr(train, "process", lambda: (0, 3))
    assert train.main(toy(training__batch_size=4)) == 2
    assert "4 rows cannot be shared equally by 3 processes" in capsys.readouterr().err
