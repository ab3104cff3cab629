"""Stages, loop and runs that lose nothing: the real script at toy size. Campaigns: --slow."""

import ctypes
import dataclasses
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, flip, toy_config
from torch.utils.flop_counter import FlopCounterMode

import data_loader
import evaluate_gpt2
import lora
import quant
import train_gpt2_fusion as train
from data_loader import UserError, load_config, load_tokens, read_tensors, write_tensors
from evaluate_gpt2 import MIB, Run
from model import GPT, diffusion_loss

EVERY_STEP = {"training__max_steps": 36, "training__checkpoint_interval": 1,
              "training__log_interval": 1, "training__eval_interval": 6}  # fmt: skip
DROPOUT = {"model__dropout": 0.1, "training__qlora_dropout": 0.1}
KILLED = {
    "frozen": DROPOUT | {"training__quantization_type": "int4"},
    "trainable": DROPOUT | {"training__fusion_mode": "trainable"},
    "standard": DROPOUT | {"training__mode": "standard"},
    "bidirectional": {"model__attention_mode": "bidirectional", "training__batch_size": 2,
                      "training__gradient_accumulation": 2, "training__quantization_type": "nf4"},
}  # fmt: skip
NEXT_TOKEN = {"training__mode": "standard", "training__time_step_masking": "false"}
CPU = torch.device("cpu")


@pytest.fixture
def no_report(monkeypatch):
    """A run ends without its evaluation, which takes longer than the toy run. -> the models"""
    models = []
    monkeypatch.setattr(train, "report", lambda _, model, **options: models.append(model.eval()))
    return models


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


def stop_in(monkeypatch, step, *signals):
    """In the step with that number, counted from now on: send ourselves the signals; or, where
    there are none, be killed before it is done."""
    real, count = train.train_step, [0]

    def step_then_stop(*args):
        count[0] += 1
        if count[0] == step:
            monkeypatch.setattr(train, "train_step", real)
            if not signals:
                raise Killed
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_then_stop)


def killed_in(monkeypatch, step, arguments):
    """Train until the step with that number, and be killed in it."""
    stop_in(monkeypatch, step)
    with pytest.raises(Killed):
        train.main(arguments)


def same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_weights(a, b):
    """Whether two GPTs have the same parameters and buffers, bit for bit."""
    return same(dict(a.state_dict()), dict(b.state_dict()))


def weights(folder):
    """{file: {name: tensor}} of a run's backups."""
    return {path.name: read_tensors(path)[0] for path in sorted(folder.glob("backup/block_*"))}


def outcome(folder):
    """What a run must arrive at, however often it was stopped; clocks and memory are left out."""
    varies = {"tokens_per_second", "memory_mib", "seconds", "peak_mib", "metrics_bytes", "backups"}
    lines = [{key: value for key, value in line.items() if key not in varies}
             for line in Run(folder).metrics()]  # fmt: skip
    tensors, facts, _ = read_tensors(folder / "checkpoint.safetensors")
    facts = {key: value for key, value in facts.items() if key not in varies}
    scores = None
    if (folder / "eval.json").exists():
        result = Run(folder).evaluation()
        scores = {key: result[key] for key in ("nelbo_12", "nelbo", "left_to_right", "time_steps")}
    return {"lines": lines, "weights": weights(folder), "tensors": dict(tensors),
            "state": facts, "scores": scores}  # fmt: skip


def start(arguments):
    """The real script, in a process of its own."""
    command = [sys.executable, str(ROOT / "train_gpt2_fusion.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(process, there, pause=1e-3):
    """Poll until there() holds (True) or the process has ended (False)."""
    while not there():
        if process.poll() is not None:
            return False
        time.sleep(pause)
    return True


def leftovers(folder):
    """Files that a failed or killed write leaves behind."""
    return list(Path(folder).rglob(".*.tmp"))


# --- the schedule ----------------------------------------------------------------------------


def schedule(*overrides):
    config = load_config(overrides=overrides)
    return train.fusion_schedule(config.model, config.training)


def test_frozen_mode_trains_every_layer_in_exactly_one_stage():
    for blocks, size in ((3, 4), (2, 6), (12, 1), (1, 12), (4, 3)):
        edges = [i / blocks for i in range(blocks + 1)]
        steps = [(i + 0.5) / blocks for i in range(blocks)]
        stages = schedule(
            f"training.total_blocks={blocks}", f"training.block_size={size}",
            f"training.block_mask_ranges={[list(band) for band in itertools.pairwise(edges)]}",
            f"training.time_step_mask_fractions={steps}", "training.max_steps=1001",
            f"training.block_steps={[*range(1, blocks + 1)]}",
        )  # fmt: skip
        assert [stage.block for stage in stages] == [*range(blocks)]
        assert [i for stage in stages for i in stage.layers] == [*range(12)]
        assert sum(stage.steps for stage in stages) == 1001
        assert [m for stage in stages for m in stage.time_steps] == steps
        for k, stage in enumerate(stages):
            assert stage.adapted == tuple(range(k * size)) and stage.stored == (k,)
            assert stage.embeddings == (k == 0) and not stage.plain


def test_the_schedule_of_the_other_modes():
    everything = tuple(range(12))
    trainable = schedule("training.fusion_mode=trainable")
    assert [stage.layers for stage in trainable] == [everything[:n] for n in (4, 8, 12)]
    assert all(stage.embeddings and not stage.adapted for stage in trainable)
    assert [stage.stored for stage in trainable] == [(), (), (0, 1, 2)]
    assert [stage.adapted for stage in schedule("training.qlora_enabled=false")] == [()] * 3
    for overrides in (["training.mode=standard"], ["training.mode=standard", "model.init_from=gpt2",
                                                   "training.qlora_enabled=false"]):  # fmt: skip
        (standard,) = schedule(*overrides)
        assert standard.layers == everything and standard.embeddings and not standard.plain
        assert standard.adapted == () and standard.stored == (0,) and standard.steps == 2000
        assert standard.time_steps == load_config().model.time_step_mask_fractions
    (plain,) = schedule("training.mode=standard", "model.init_from=gpt2")
    assert plain.plain and plain.adapted == everything and not plain.embeddings
    assert plain.layers == () and plain.stored == ()  # its block is stored before the first step
    assert not any(stage.plain for stage in schedule("model.init_from=gpt2"))
    unmasked = schedule("training.time_step_masking=false")
    assert [stage.time_steps for stage in unmasked] == [(0.0,)] * 3


def test_the_learning_rate_warms_up_and_ends_at_its_share():
    training = load_config(overrides=["training.warmup_steps=10"]).training
    (stage, *_) = schedule()
    shares = [train.learning_rate_share(step, stage, training) for step in range(stage.steps)]
    assert shares[0] == pytest.approx(1 / 11) and shares[10] == 1.0
    assert shares[:11] == sorted(shares[:11]) and shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)


def one_step(model, stage, training, optimizer, step=0):
    """A training step on random tokens. -> the batch"""
    tokens = np.random.default_rng(0).integers(0, 257, 5000).astype(np.uint16)
    batch = train.batch_of(tokens, model.config, training, stage, step)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.train_step(train.stage_loss(model, stage), optimizer, scaler, batch, training, CPU,
                     torch.float32)  # fmt: skip
    return batch


def test_the_counts_of_parameters_and_flops():
    """Against the model itself, and torch's counter; only the adapters' own are left out."""
    config = toy_config(total_blocks=1, block_size=3, block_mask_ranges=((0.0, 1.0),))
    embeddings, layer, norm = train.parameter_counts(config)
    count = sum(p.numel() for p in GPT(config).parameters())
    assert count == embeddings + 3 * layer + norm
    training = dataclasses.replace(load_config().training, mode="standard", qlora_rank=1,
                                   gradient_checkpointing="none")  # fmt: skip
    for source in ("scratch", "a folder"):
        config = dataclasses.replace(config, init_from=source)
        (stage,) = train.fusion_schedule(config, training)
        model = GPT(config)
        if stage.plain:
            quant.freeze_block(model, 0, "int4")
        optimizer = train.begin_stage(model, stage, training)
        with FlopCounterMode(display=False) as counter:
            batch = one_step(model, stage, training, optimizer)
        # The head scores 15 positions of 16; adapters of rank 1 have two factors, forward and back.
        expected = train.matmul_flops(stage, config)
        expected -= (4 if stage.plain else 6) * 32 * config.padded_vocab_size / 16
        expected += 6 * 3 * 16 * 32 * stage.plain
        assert counter.get_total_flops() / batch[0].numel() == pytest.approx(expected, rel=1e-3)
    assert stage.plain


# --- what frozen means -----------------------------------------------------------------------


def test_a_later_stage_changes_nothing_that_an_earlier_exit_computes():
    config = toy_config()
    training = dataclasses.replace(load_config().training, quantization_type="int4", batch_size=4,
                                   qlora_lr=1e-2, warmup_steps=0)  # fmt: skip
    model, idx, remembered = GPT(config, blocks=0), torch.randint(257, (2, 16)), []
    for stage in train.fusion_schedule(config, training):
        train.grow(model, training)
        optimizer = train.begin_stage(model, stage, training)
        assert model.blocks == stage.block + 1  # blocks not yet reached are not in memory
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for step in range(4):
            one_step(model, stage, training, optimizer, step)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in trained), name
        quant.freeze_block(model, stage.block, "int4")
        with torch.no_grad():
            for block, logits in enumerate(remembered):
                assert torch.equal(model(idx, block), logits), f"exit {block} changed"
            remembered.append(model(idx, stage.block))
    assert len(remembered) == 3
    # The adapters of exit 2 do act, or the test above would prove nothing.
    for parameter in lora.adapter_parameters(model, 2).values():
        parameter.data.zero_()
    with torch.no_grad():
        assert (model(idx, 2) - remembered[2])[..., :257].abs().max() > 1e-4


def test_without_adapters_no_gradient_is_computed_in_the_frozen_prefix():
    config = toy_config()
    for adapters in (False, True):
        training = dataclasses.replace(load_config().training, qlora_enabled=adapters)
        first, second, _ = train.fusion_schedule(config, training)
        model, outputs = GPT(config, blocks=2), []
        train.begin_stage(model, first, training)
        quant.freeze_block(model, 0, "fp16")
        train.begin_stage(model, second, training)
        model.h[0].register_forward_hook(lambda _, __, out: outputs.append(out.requires_grad))
        model(torch.zeros(1, 4, dtype=torch.long), 1)
        assert outputs == [adapters]


# --- a run, from the command line to eval.json -----------------------------------------------


@pytest.mark.texts
def test_the_whole_run(toy, capsys):
    assert train.main(toy(training__max_steps=240, training__lr="3e-3")) == 0
    printed = capsys.readouterr().out
    for word in ("frozen", "adapters", "no GPU: about", "nelbo", "eta", "training tokens of",
                 "text.txt", "nats_per_token",
                 "stage 0: layers 0-1 and embeddings learn m 0.1 0.2 0.3 0.4\n",
                 "stage 2: layers 4-5 learn m 0.8 0.85 0.9 0.95 0.99 on top of blocks 0-1, frozen "
                 "in fp16, adapted by LoRA\n",
                 "backed up, verified, and now stored in fp16: 3 of 3 blocks",
                 "written by diffusion", "written left to right, from exit",
                 "real text, from validation:\n"):  # fmt: skip
        assert word in printed, word
    assert re.search(r"step   120/120  loss .* eta 0:\d\d  validation \d\.\d{4}\n", printed)
    run = Run(toy.folder)
    have = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert have == {"config.json", "metrics.jsonl", "checkpoint.safetensors", "eval.json", "lock",
                    *(f"backup/block_{k}.safetensors" for k in range(3))}  # fmt: skip
    # metrics.jsonl: a line per logged step, in order, each with its keys
    steps = run.metrics("step")
    assert [line["stage"] for line in steps] == [0] * 60 + [1] * 30 + [2] * 30
    assert [line["step"] for line in steps] == [*range(2, 122, 2)] + [*range(2, 62, 2)] * 2
    assert set(steps[0]) == {"event", "stage", "step", "loss", "loss_by_time_step", "lr",
                             "grad_norm", "masked_fraction", "memory_mib", "tokens_per_second"}
    assert set(steps[0]["loss_by_time_step"]) == {"0.1", "0.2", "0.3", "0.4"}
    assert set(steps[-1]["loss_by_time_step"]) == {"0.8", "0.85", "0.9", "0.95", "0.99"}
    assert 0.1 < steps[0]["masked_fraction"] < 0.4 and steps[-1]["masked_fraction"] > 0.8
    (plan,) = run.metrics("plan")
    assert [stage["stored"] for stage in plan["stages"]] == [[0], [1], [2]]
    stages = run.metrics("stage")
    assert [stage["stage"] for stage in stages] == [0, 1, 2]
    assert [stage["tokens"] for stage in stages] == [120 * 128, 60 * 128, 60 * 128]
    embeddings, layer, norm = train.parameter_counts(run.config.model)
    for stage in stages:
        assert stage["peak_mib"] > 0 and stage["seconds"] > 0
        assert stage["standard_mib"] == 16 * (embeddings + 6 * layer + norm) / MIB
    # Stage 0: fp32 weights, as much again for gradients, twice that and a count each for AdamW.
    assert stages[0]["weights_mib"] * MIB == 4 * (embeddings + 2 * layer + norm)
    assert stages[0]["gradients_mib"] == stages[0]["weights_mib"]
    assert stages[0]["optimizer_mib"] * MIB == 8 * (embeddings + 2 * layer + norm) + 4 * 28
    # it learned: far below what ignoring the context gives
    result = run.evaluation()
    assert result["nelbo_12"] < result["unigram"] - 0.1
    assert result["left_to_right"][0] < result["unigram"] - 0.2
    assert len(result["time_steps"]) == 13 and len(result["left_to_right"]) == 3
    # and evaluation from disk repeats it
    again = toy.folder / "again.json"
    assert evaluate_gpt2.main(["--run", toy.folder, "--json", again]) == 0
    again = json.loads(again.read_text())
    for key in ("nelbo_12", "nelbo", "nelbo_stderr", "left_to_right", "time_steps", "config"):
        assert again[key] == result[key], key


def test_every_combination_runs_to_its_end(toy, no_report):
    for kind, fusion, adapters in itertools.product(
        quant.KINDS, ("frozen", "trainable"), ("true", "false")
    ):
        name = f"{kind}-{fusion}-{adapters}"
        assert train.main(toy(training__quantization_type=kind, training__fusion_mode=fusion,
                              training__qlora_enabled=adapters, training__max_steps=4,
                              training__run_id=name)) == 0  # fmt: skip
        folder = toy.folder.with_name(name)
        has = [any("lora_" in n for n in tensors) for tensors in weights(folder).values()]
        assert has == [False] + [adapters == "true" and fusion == "frozen"] * 2, name
        model = Run(folder).load()
        assert same_weights(model, no_report[-1]), name
        stored = {m.kind for m in model.modules() if isinstance(m, quant.QuantLinear)}
        assert stored == {kind}  # the last block too
        assert not any(isinstance(layer.mlp.c_fc, torch.nn.Linear) for layer in model.h)


def test_other_settings_run_to_their_end(toy, monkeypatch):
    monkeypatch.setattr(evaluate_gpt2, "ROWS", 2)
    for number, (blocks, changes) in enumerate([
        (1, {"training__mode": "standard"}),
        (1, NEXT_TOKEN),
        (1, {"training__mode": "standard", "model__n_layers": 5, "training__block_steps": [3],
             "training__block_mask_ranges": [[0.5, 0.6]]}),  # bands that it does not use
        (3, {"training__time_step_masking": "false"}),
        (3, {"model__attention_mode": "bidirectional"}),
        (3, {"training__gradient_accumulation": 2, "training__batch_size": 2}),
        (3, {"training__compute_type": "bf16"} | DROPOUT),
        (2, {"training__total_blocks": 2, "training__block_size": 3,
             "training__block_steps": [1, 1],
             "training__block_mask_ranges": [[0.0, 0.5], [0.5, 1.0]]}),
        (3, {"training__block_mask_ranges": [[0.7, 1.0], [0.4, 0.7], [0.0, 0.4]]}),  # heavy first
    ]):  # fmt: skip
        assert train.main(toy(**changes, training__run_id=f"run-{number}")) == 0, changes
        run = Run(toy.folder.with_name(f"run-{number}"))
        result, bidirectional = run.evaluation(), "model__attention_mode" in changes
        assert (result["left_to_right"] is None) == bidirectional, changes
        assert {step["block"] for step in result["time_steps"]} == set(range(blocks)), changes
        assert all(math.isfinite(line["loss"]) for line in run.metrics("step"))
        assert len(run.metrics("stage")) == blocks == len(weights(run.folder))


def test_recomputing_changes_nothing_but_memory(toy, no_report):
    """The same losses and weights, bit for bit; what is kept for the backward pass of stage 2."""
    outcomes, kept = [], []
    for mode in ("none", "frozen", "all"):
        changes = DROPOUT | {"training__gradient_checkpointing": mode, "training__run_id": mode}
        assert train.main(toy(**changes)) == 0
        outcomes.append(outcome(toy.folder.with_name(mode)))
        config = Run(toy.folder.with_name(mode)).config
        stage, model = train.fusion_schedule(config.model, config.training)[2], no_report[-1]
        model.grow() if model.blocks < 3 else None
        train.begin_stage(model, dataclasses.replace(stage, layers=()), config.training)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            model.hidden(torch.zeros(4, 32, dtype=torch.long), 2)
        kept.append(sum(sizes.values()))
    assert same(outcomes[0], outcomes[1]) and same(outcomes[0], outcomes[2])
    assert kept[2] <= kept[1] < kept[0] / 2, kept  # four of six layers are frozen


@pytest.mark.parametrize("changes", [[], ["training.gradient_checkpointing=none"],
                                     ["training.quantization_type=int4"],
                                     ["training.mode=standard"]])  # fmt: skip
def test_the_plan_says_what_memory_a_stage_needs(changes):
    """The tiny preset's size, in bf16: what is held, counted from the tensors, and what autograd
    keeps of the layers, beside the formula. (Of the process around it README speaks.)"""
    config = load_config(preset="tiny", overrides=changes)
    c, training = config.model, config.training
    model = GPT(c, blocks=0)
    for stage in train.fusion_schedule(c, training):
        train.grow(model, training)
        optimizer = train.begin_stage(model, stage, training)
        sizes = {}

        def note(tensor):
            if not tensor.requires_grad or tensor.grad_fn:  # a weight is there anyway
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16), \
                torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = model.hidden(torch.zeros(8, c.seq_len, dtype=torch.long))
        hidden.sum().backward()
        optimizer.step()
        held = evaluate_gpt2.memory(model, optimizer)["total"]
        head = 2 * c.padded_vocab_size * (192 + 512) + 10 * 192 * 1024
        needed = train.memory_needed(stage, c, training, torch.bfloat16) - head / MIB
        assert needed == pytest.approx(held + sum(sizes.values()) / MIB, rel=0.15), stage.block
        quant.freeze_block(model, stage.block, training.quantization_type)


def test_the_peak_of_a_stage_is_its_own(toy, no_report, monkeypatch):
    """Stage 0 takes 200 MiB for a moment; stages 1 and 2, and their lines, do not."""
    real, large = train.train_step, [True]

    def step(*args):
        if large and large.pop():
            torch.ones(50 * MIB)
        return real(*args)

    monkeypatch.setattr(train, "train_step", step)
    assert train.main(toy()) == 0
    peaks = [stage["peak_mib"] for stage in Run(toy.folder).metrics("stage")]
    assert peaks[0] > max(peaks[1:]) + 150, peaks


# --- from pretrained weights -----------------------------------------------------------------


def test_training_starts_from_saved_gpt2_weights(toy, no_report, tmp_path, capsys):
    """A run's weights, in Hugging Face's layout, begin another at the same loss."""
    plain = NEXT_TOKEN | {"training__quantization_type": "fp32", "training__qlora_enabled": "false"}
    assert train.main(toy(**plain, training__max_steps=100, training__lr="3e-3")) == 0
    Run(toy.folder).load().save_pretrained(tmp_path / "gpt2")
    before = Run(toy.folder).metrics("validation")[-1]["cross_entropy"]
    assert before < 3.5  # scratch: log 257 = 5.5
    again = {"model__init_from": tmp_path / "gpt2", "training__max_steps": 4,
             "training__lr": "1e-12"}  # fmt: skip
    assert train.main(toy(**plain, **again, training__run_id="second")) == 0
    after = Run(toy.folder.with_name("second")).metrics("validation")[-1]["cross_entropy"]
    assert after == pytest.approx(before, abs=1e-4)
    # every block and exit norm of a fused run starts from them too, in each stage
    assert train.main(toy(**again, training__run_id="fused")) == 0
    (source,), fused = weights(toy.folder).values(), weights(toy.folder.with_name("fused"))
    assert len(fused) == 3
    for block, tensors in enumerate(fused.values()):
        for name, tensor in tensors.items():
            if name.startswith(("h.", "exit_norms.")) and "lora_" not in name:
                expected = source[name.replace(f"exit_norms.{block}", "exit_norms.0")]
                assert torch.allclose(tensor, expected, atol=1e-6), name
    changes = again | {"training__run_id": "wrong", "model__d_model": 64}
    fails(train.main, toy(**changes), capsys, "d_model=32")
    assert not toy.folder.with_name("wrong").exists()


def next_token_loss(model, idx):
    """The diffusion loss at m = 0: GPT-2's own loss."""
    mask = torch.zeros(idx.shape, dtype=torch.bool)
    return diffusion_loss(model, idx, idx, mask, torch.zeros(len(idx)), model.blocks - 1)[0].item()


def test_plain_qlora(toy, no_report, tmp_path, monkeypatch, capsys):
    """A run from the weights of another: it goes on from there, what is frozen stays, and rebuilt
    from disk, resumed or exported it is the model that was trained."""
    small = {"model__n_layers": 3, "training__block_size": 1, "training__checkpoint_interval": 4}
    assert train.main(toy(**NEXT_TOKEN, **small, training__max_steps=60, training__lr="3e-3",
                          training__run_id="source")) == 0  # fmt: skip
    folder = tmp_path / "hf"
    source = toy.folder.with_name("source")
    assert evaluate_gpt2.main(["export", folder, "--run", source, "--precision", "fp32"]) == 0
    plain = small | {"training__mode": "standard", "model__init_from": folder,
                     "training__qlora_dropout": 0.1, "training__quantization_type": "int4",
                     "training__qlora_lr": "1e-2", "training__max_steps": 24}  # fmt: skip
    capsys.readouterr()
    assert train.main(toy(**plain)) == 0
    run, model = Run(toy.folder), no_report[-1]
    printed = capsys.readouterr().out
    assert "plain QLoRA" in printed and "no effect" not in printed
    losses = [line["cross_entropy"] for line in run.metrics("validation")]
    assert losses[-1] < losses[0] - 0.04
    # The backup is what the file holds; what is frozen is that in int4; what is trained has moved.
    exact = GPT.from_pretrained(folder, model.config).eval()
    (backup,) = weights(run.folder).values()
    assert same(dict(backup), {name: p.detach() for name, p in exact.named_parameters()})
    assert read_tensors(run.folder / "backup" / "block_0.safetensors")[1]["step"] == 0
    quant.freeze_block(exact, 0, "int4")
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in exact.state_dict().items():
        assert torch.equal(state[name], tensor) != name.startswith("exit_norms"), name
    assert not torch.equal(model.mask_row, exact.wte.weight[257].float())
    # What training held: gradients and AdamW state of adapters, exit norm and [MASK] row alone.
    (stage,) = run.metrics("stage")
    trained = 3 * 16 * 32 * 8 + 3 * 32
    assert stage["gradients_mib"] * MIB == 4 * trained
    assert stage["optimizer_mib"] * MIB == 8 * trained + 4 * (3 * 8 + 3)  # and a step count each
    # From disk, in its own storage the same model, and near it in every other.
    idx = torch.randint(258, (2, 32), generator=torch.Generator().manual_seed(0))  # with [MASK]
    loaded = run.load().eval()
    assert same_weights(loaded, model) and torch.equal(loaded(idx), model(idx))
    text = idx % 257
    for kind in quant.KINDS:  # of noise: 7.8; nf4 gives 0.09 more
        other = next_token_loss(run.load(kind).eval(), text)
        assert other == pytest.approx(next_token_loss(model, text), abs=0.2), kind
    # Out again: the same logits, of text.
    assert evaluate_gpt2.main(["export", tmp_path / "out", "--run", run.folder]) == 0
    exported = GPT.from_pretrained(tmp_path / "out")(text)[..., :257]
    torch.testing.assert_close(exported, model(text)[..., :257], atol=1e-4, rtol=1e-4)
    # Killed one step after a checkpoint, and resumed: the same model.
    stopped = toy(**plain, training__run_id="stopped")
    killed_in(monkeypatch, 6, stopped)
    assert train.main([*stopped, "--resume"]) == 0
    assert same_weights(no_report[-1], model)
    assert same(outcome(toy.folder.with_name("stopped")), outcome(run.folder))


def test_plain_qlora_begins_at_the_pretrained_loss():
    config = toy_config(total_blocks=1, block_size=3, block_mask_ranges=((0.0, 1.0),),
                        init_from="a folder")  # fmt: skip
    training = dataclasses.replace(load_config().training, mode="standard")
    (stage,) = train.fusion_schedule(config, training)
    idx = torch.randint(257, (4, 16))
    for kind, tolerance in (("fp32", 0), ("fp16", 1e-3), ("int4", 0.1)):
        model = GPT(config)
        before = next_token_loss(model.eval(), idx)
        quant.freeze_block(model, 0, kind)
        train.begin_stage(model, stage, training)
        assert next_token_loss(model.eval(), idx) == pytest.approx(before, abs=tolerance), kind


def test_the_last_lines_are_commands_that_work(toy, no_report, monkeypatch, capsys):
    """Also with a name and a folder that must be quoted. The control does about the same work."""
    for changes in ({}, {"training__folder": toy.folder / "my runs", "training__run_id": "a b"}):
        assert train.main(toy(**changes)) == 0
        lines = capsys.readouterr().out.split("\n")
        lines = [shlex.split(line) for line in lines if line.startswith("    python ")]
        scripts = [words[1] for words in lines]
        assert scripts == ["evaluate_gpt2.py"] * 2 + ["train_gpt2_fusion.py", "evaluate_gpt2.py"]
        folder = str(changes.get("training__folder", toy.folder.parent))
        name = changes.get("training__run_id", "toy")
        assert lines[0][2:] == ["sample", "The people of", "--run", f"{folder}/{name}", "--watch"]
        assert lines[1][2:] == ["plot", f"{folder}/{name}"]
        assert lines[3][2:] == ["compare", f"{folder}/{name}", f"{folder}/{name}-control"]
        assert train.main(lines[2][2:]) == 0
        runs = [Run(f"{folder}/{name}"), Run(f"{folder}/{name}-control")]
        work = [sum(stage.steps * train.matmul_flops(stage, run.config.model)
                    for stage in train.fusion_schedule(run.config.model, run.config.training))
                for run in runs]  # fmt: skip
        assert work[1] == pytest.approx(work[0], rel=0.1)  # to the nearest of 7 steps
        assert runs[1].config.training.mode == "standard"
        printed = capsys.readouterr().out  # of the control: no control of its own
        assert printed.count("\n    python ") == 2


# --- killed and resumed ----------------------------------------------------------------------


def test_a_killed_run_ends_as_one_that_was_never_stopped(toy, no_report, monkeypatch):
    """Logged every step but saved every second one, so that a kill leaves lines to cut off."""
    for fusion in ("frozen", "trainable"):
        settings = DROPOUT | {"training__fusion_mode": fusion, "training__log_interval": 1}
        assert train.main(toy(**settings, training__run_id=f"whole-{fusion}")) == 0
        whole = outcome(toy.folder.with_name(f"whole-{fusion}"))
        assert whole["state"]["finished"]
        for step in (4, 7, 9):  # in stage 0, before the first step of stage 1, in stage 1
            arguments = toy(**settings, training__run_id=f"{fusion}-{step}")
            killed_in(monkeypatch, step, arguments)
            assert train.main([*arguments, "--resume"]) == 0
            assert same(outcome(toy.folder.with_name(f"{fusion}-{step}")), whole), (fusion, step)


def test_optimizer_and_loss_scaler_go_on_where_they_were(toy, no_report, monkeypatch):
    """In fp16, stopped after step 5: once without a kill before, once with two."""
    settings = DROPOUT | {"training__compute_type": "fp16", "training__max_steps": 24}
    arguments = toy(**settings, training__run_id="whole")
    stop_in(monkeypatch, 5, signal.SIGINT)
    assert train.main(arguments) == 130
    killed = toy(**settings)
    killed_in(monkeypatch, 4, killed)  # saved after step 2
    killed_in(monkeypatch, 3, [*killed, "--resume"])  # and after step 4
    stop_in(monkeypatch, 1, signal.SIGINT)
    assert train.main([*killed, "--resume"]) == 130
    whole = outcome(toy.folder.with_name("whole"))
    assert whole["state"]["step"] == 5 and whole["state"]["scaler"]["_growth_tracker"] > 0
    kinds = Counter(name.rpartition(".")[2] for name in whole["tensors"] if "optimizer." in name)
    assert kinds == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), 28)
    assert all(whole["tensors"][name] == 5 for name in whole["tensors"] if name.endswith(".step"))
    assert same(outcome(toy.folder), whole)
    assert train.main([*killed, "--resume"]) == 0
    assert train.main([*arguments, "--resume"]) == 0
    assert same(outcome(toy.folder), outcome(toy.folder.with_name("whole")))


def test_signals_on_the_real_script(toy, no_report):
    """SIGTERM, then SIGKILL within a checkpoint, then to the end: three processes, one result."""
    settings = EVERY_STEP | KILLED["frozen"] | {"training__max_steps": 16}
    arguments = toy(**settings)
    assert train.main(toy(**settings, training__run_id="whole")) == 0
    checkpoint = toy.folder / "checkpoint.safetensors"
    process = start(["--resume", *arguments])
    assert wait_for(process, checkpoint.exists)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    assert process.returncode == 130, printed
    assert "stopping after this step; once more stops at once" in printed
    assert "go on with --resume" in printed.splitlines()[-1] and "Traceback" not in printed
    process = start(["--resume", *arguments])
    assert wait_for(process, lambda: leftovers(toy.folder))
    process.kill()
    process.communicate()
    assert train.main(["--resume", *arguments]) == 0
    assert not leftovers(toy.folder)
    assert same(outcome(toy.folder), outcome(toy.folder.with_name("whole")))


def test_the_first_signal_saves_and_the_second_stops_at_once(toy, no_report, monkeypatch, capfd):
    stop_in(monkeypatch, 5, signal.SIGHUP)
    assert train.main(toy()) == 130
    printed = capfd.readouterr().out
    assert "stopping after this step" in printed and "go on with --resume" in printed
    assert Run(toy.folder).state().step == 5
    stop_in(monkeypatch, 2, signal.SIGTERM, signal.SIGINT)
    assert train.main([*toy(), "--resume"]) == 130
    captured = capfd.readouterr()
    assert "resuming in stage 0 after step 5" in captured.out
    assert captured.out.count("stopping after this step") == 1
    assert "saved" not in captured.out and captured.err.strip() == "interrupted"
    state = Run(toy.folder).state()  # of the end of stage 0, not of the step that was stopped
    assert (state.stage, state.step, len(state.backups)) == (1, 0, 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as they were before
    assert train.main([*toy(), "--resume"]) == 0


def test_a_signal_in_the_last_step_of_a_stage_stops_behind_it(toy, no_report, monkeypatch):
    stop_in(monkeypatch, 6, signal.SIGINT)
    assert train.main(toy()) == 130
    state = Run(toy.folder).state()
    assert (state.stage, state.step, len(state.backups)) == (1, 0, 1)
    assert {line["stage"] for line in Run(toy.folder).metrics("step")} == {0}
    stop_in(monkeypatch, 6, signal.SIGINT)
    assert train.main([*toy(), "--resume"]) == 130
    assert Run(toy.folder).state().finished and not no_report  # not evaluated: asked to stop
    assert train.main([*toy(), "--resume"]) == 0 and no_report


def test_a_closed_pipe_does_not_end_the_training(toy):
    """`train ... | head -3`: nobody reads on, the run goes on to its end."""
    code = ("import sys, evaluate_gpt2, train_gpt2_fusion as train; evaluate_gpt2.ROWS = 1; "
            "evaluate_gpt2.print_texts = print; sys.exit(train.main(sys.argv[1:]))")
    command = f"set -o pipefail; {shlex.join([sys.executable, '-c', code, *toy()])} | head -3"
    piped = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT)
    assert piped.returncode == 0 and not piped.stderr and piped.stdout.count(b"\n") == 3
    assert Run(toy.folder).state().finished and (toy.folder / "eval.json").exists()


def test_a_folder_that_is_no_run_of_ours_is_left_alone(toy, no_report, capsys):
    toy.folder.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", ".a.tmp", "sub/.b.1.tmp"):
        (toy.folder / name).parent.mkdir(exist_ok=True)
        (toy.folder / name).write_text("mine")
    fails(train.main, toy(), capsys, "config.json is damaged or of another version")
    assert train.main([*toy(), "--overwrite"]) == 0  # moved aside
    old = toy.folder.with_name("toy.old-1")
    assert {str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()} == {
        "config.json", "metrics.jsonl", ".a.tmp", "sub/.b.1.tmp", "lock"}  # fmt: skip
    assert (old / "config.json").read_text() == "mine"


def what_was_hit(folder, backups):
    """What a killed process was doing, by the files it left; backups: those it found."""
    backup = folder / "backup"
    aside = list(folder.glob(".checkpoint*.tmp"))
    if not (folder / "checkpoint.safetensors").exists():
        return "a first checkpoint" if aside else "the first step"
    if leftovers(backup):
        return "a backup"
    state = Run(folder).state()
    if state.finished:
        return "the evaluation"
    uncounted = {path.name for path in backup.glob("block_*")}
    uncounted -= {f"block_{block}.safetensors" for block in range(len(state.backups))}
    if uncounted:  # backed up, and no checkpoint counts it yet
        where = "between backup and checkpoint" if uncounted - backups else "such a place again"
        return where + (", in the checkpoint" if aside else ", in a conversion")
    if aside:
        return "a checkpoint"
    return "a place between stages" if state.stage and not state.step else "a step"


@pytest.mark.slow
def test_campaign_of_kills(toy, monkeypatch, capsys):
    """Kill the real script 12 times in each of four kinds of run, then compare with a whole one."""
    monkeypatch.setattr(evaluate_gpt2, "ROWS", 100)  # as the script has it
    began, hits, rng = time.time(), Counter(), random.Random(1)
    for name, changes in KILLED.items():
        changes = EVERY_STEP | changes
        assert train.main(toy(**changes, training__run_id=f"whole-{name}")) == 0
        folder = toy.folder.with_name(name)
        checkpoint, backup = folder / "checkpoint.safetensors", folder / "backup"
        arguments = ["--resume", *toy(**changes, training__run_id=name)]
        for kill in range(12):
            for path in leftovers(folder):
                path.unlink()  # so that what is found below is this kill's
            backups = {path.name for path in backup.glob("block_*")}
            times = {checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0}
            wanted = rng.choice([1, 1, 2])
            if kill == 11 or (kill % 4 == 3 and name in ("frozen", "bidirectional")):
                wanted = 99  # on to the end of a stage

            def there():
                """Some new checkpoints, or the end of a stage."""
                if checkpoint.exists():
                    times.add(checkpoint.stat().st_mtime_ns)
                new = [path for path in backup.glob("*block_*") if path.name not in backups]
                return len(times) > wanted or new

            process = start(arguments)
            wait_for(process, there)
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
            printed = process.communicate()[0]
            assert process.returncode == -signal.SIGKILL, printed  # not ended before
            hits[what_was_hit(folder, backups)] += 1
        process = start(arguments)
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        assert same(outcome(folder), outcome(toy.folder.with_name(f"whole-{name}"))), name
        assert not leftovers(folder)
    with capsys.disabled():
        print(f"\n{sum(hits.values())} kills in {len(KILLED)} runs, {time.time() - began:.0f} s: "
              + ", ".join(f"{count} hit {what}" for what, count in hits.most_common()))
    assert sum(hits.values()) >= 48 and len(hits) >= 5


# --- what --resume and --overwrite do --------------------------------------------------------


def test_a_run_is_named_by_its_name_or_path_alone(toy, no_report, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # where checkpoints/ is
    for number, how in enumerate((["toy"], [str(toy.folder)], ["elsewhere/renamed"], [*toy()],
                                  ["toy", "training.log_interval=1"])):  # fmt: skip
        stop_in(monkeypatch, 5, signal.SIGINT)
        assert train.main([*toy(), "--overwrite"]) == 130
        if number == 2:
            Path("elsewhere").mkdir()
            toy.folder.rename("elsewhere/renamed")
        capsys.readouterr()
        assert train.main(["--resume", *how]) == 0
        assert "resuming in stage 0 after step 5" in capsys.readouterr().out
        assert Run("elsewhere/renamed" if number == 2 else toy.folder).state().finished
    fails(train.main, ["--resume", "other"], capsys, "no run 'other'", "toy")


def test_resume_names_every_key_that_differs(toy, no_report, monkeypatch, capsys):
    stop_in(monkeypatch, 5, signal.SIGINT)
    assert train.main(toy()) == 130
    changes = {"training__lr": "9e-4", "training__seed": 4, "model__dropout": 0.5,
               "data__num_examples": 50, "training__block_steps": [1, 1, 1]}  # fmt: skip
    keys = [key.replace("__", ".") for key in changes]
    before = (toy.folder / "metrics.jsonl").read_bytes()
    fails(train.main, [*toy(**changes), "--resume"], capsys, *keys, "was 0.0005 and is now 0.0009")
    fails(train.main, ["--resume", toy.folder, "training.lr=9e-4"], capsys, "training.lr")
    assert (toy.folder / "metrics.jsonl").read_bytes() == before
    may = {"log_interval": 1, "eval_interval": 3, "eval_rows": 5, "checkpoint_interval": 3,
           "gradient_checkpointing": "all", "device": "auto"}  # fmt: skip
    if torch.cuda.is_available():
        may["device"] = "cpu"
    may_arguments = {f"training__{key}": str(value).lower() for key, value in may.items()}
    assert train.main([*toy(**may_arguments), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "note: training.log_interval was 2 and is now 1" in printed
    for key in may:
        assert f"note: training.{key} was" in printed or key == "device", key
    assert [line["step"] for line in Run(toy.folder).metrics("step")][:4] == [2, 4, 5, 6]


def test_an_existing_run_is_not_lost(toy, no_report, capsys):
    assert train.main(toy()) == 0
    (toy.folder / "eval.json").write_text("{}")
    before = weights(toy.folder)
    fails(train.main, toy(), capsys, "is finished", "evaluate_gpt2.py --run", "--overwrite")
    fails(train.main, [*toy(), "--resume", "--overwrite"], capsys, "--overwrite", "--resume")
    assert train.main([*toy(), "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert same(before, weights(toy.folder)) and len(no_report) == 1
    (toy.folder / "eval.json").unlink()  # killed while it was evaluated
    assert train.main([*toy(), "--resume"]) == 0
    assert "only its evaluation is missing" in capsys.readouterr().out and len(no_report) == 2
    for number, seed in ((1, 1), (2, 0)):
        assert train.main([*toy(training__seed=seed), "--overwrite"]) == 0
        assert f"the earlier run is now {toy.folder}.old-{number}" in capsys.readouterr().out
        assert same(before, weights(toy.folder)) == (seed == 0)  # the same seed, the same weights
    assert same(before, weights(toy.folder.with_name("toy.old-1")))
    assert not same(before, weights(toy.folder.with_name("toy.old-2")))


def test_a_run_without_a_checkpoint_starts_anew(toy, no_report, monkeypatch, capsys):
    killed_in(monkeypatch, 2, toy(training__log_interval=1))
    assert [line["step"] for line in Run(toy.folder).metrics("step")] == [1]
    for folder, name in ((toy.folder, "checkpoint"), (toy.folder / "backup", "block_0")):
        folder.mkdir(exist_ok=True)
        (folder / f".{name}.safetensors.4711.tmp").write_bytes(b"half")
    assert train.main(toy(training__lr="9e-4")) == 0  # nothing to lose: no flag, any change
    assert not leftovers(toy.folder)
    assert [line["step"] for line in Run(toy.folder).metrics("step")] == [2, 4, 6, 2, 3, 2, 3]
    assert len(Run(toy.folder).metrics("plan")) == 1
    assert Run(toy.folder).config.training.lr == 9e-4
    capsys.readouterr()
    assert train.main([*toy(training__run_id="new"), "--resume"]) == 0
    assert "run new has no checkpoint to resume from" in capsys.readouterr().out


def test_a_second_process_on_a_run_is_refused(toy, no_report, capsys):
    with Run.lock(toy.folder):
        fails(train.main, toy(), capsys, "toy", "another process")
    assert train.main(toy()) == 0


def test_a_backup_that_no_checkpoint_counts_is_replaced(toy, no_report, monkeypatch):
    """Left by a killed process, and other than what the resumed run arrives at."""
    assert train.main(toy(training__seed=1, training__run_id="other")) == 0
    assert train.main(toy(training__run_id="whole")) == 0
    killed_in(monkeypatch, 4, toy())
    (toy.folder / "backup").mkdir()
    name = "backup/block_0.safetensors"
    shutil.copy(toy.folder.with_name("other") / name, toy.folder / name)
    assert train.main([*toy(), "--resume"]) == 0
    assert same(weights(toy.folder), weights(toy.folder.with_name("whole")))


def test_a_run_stopped_in_stage_1_can_be_evaluated(toy, monkeypatch):
    killed_in(monkeypatch, 8, toy())
    assert evaluate_gpt2.main(["--run", toy.folder]) == 0
    assert Run(toy.folder).load().blocks == 1  # the checkpoint is that of the end of stage 0
    assert len(Run(toy.folder).evaluation()["left_to_right"]) == 1
    # A later checkpoint removes that evaluation, so that it is not taken for the finished run's.
    stop_in(monkeypatch, 2, signal.SIGINT)
    assert train.main([*toy(), "--resume"]) == 130
    assert not (toy.folder / "eval.json").exists()
    assert evaluate_gpt2.main(["--run", toy.folder]) == 0
    assert len(Run(toy.folder).evaluation()["left_to_right"]) == 2

    def killed(*args, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "report", killed)
        with pytest.raises(Killed):
            train.main([*toy(), "--resume"])
    assert not (toy.folder / "eval.json").exists()
    assert train.main([*toy(), "--resume"]) == 0
    assert len(Run(toy.folder).evaluation()["left_to_right"]) == 3


# --- full disks and damaged files ------------------------------------------------------------


def limit(size):
    """From now on no file can grow beyond `size` bytes: the kernel refuses, as on a full disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def test_a_full_disk_stops_the_run_and_loses_nothing(toy, no_report, monkeypatch, capsys):
    settings = {"training__log_interval": 1}
    assert train.main(toy(**settings, training__run_id="whole")) == 0
    whole = outcome(toy.folder.with_name("whole"))
    real = train.train_step
    for case, (step, room, name) in enumerate([
        (0, 100, "config.json"), (1, 50_000, "checkpoint.safetensors"),
        (5, 100_000, "block_0.safetensors"), (8, 100_000, "checkpoint.safetensors"),
        (8, None, "metrics.jsonl"),  # in the middle of a line
    ]):  # fmt: skip
        arguments = toy(**settings, training__run_id=f"full-{case}")
        folder, count = toy.folder.with_name(f"full-{case}"), [0]

        def step_then_full(*args):
            count[0] += 1
            if count[0] == step:
                limit(room or (folder / "metrics.jsonl").stat().st_size + 10)
            return real(*args)

        monkeypatch.setattr(train, "train_step", step_then_full)
        try:
            if step == 0:
                limit(room)
            fails(train.main, arguments, capsys, folder, name, "File too large")
        finally:
            limit(None)
        monkeypatch.setattr(train, "train_step", real)
        assert not leftovers(folder)
        for path in folder.rglob("*.safetensors"):
            read_tensors(path)
        assert (folder / "checkpoint.safetensors").exists() == (step > 1)
        assert train.main([*arguments, "--resume"]) == 0
        assert same(outcome(folder), whole), name


def test_a_full_disk_while_data_are_prepared(toy, tmp_path, no_report, capsys):
    limit(1000)
    try:
        fails(train.main, toy(), capsys, "train_257.bin", "File too large")
    finally:
        limit(None)
    assert not toy.folder.exists() and not leftovers(tmp_path)
    assert train.main(toy()) == 0


def test_a_run_names_the_stored_file_that_is_damaged(
    toy, tmp_path, no_report, capsys, monkeypatch
):
    """Any file that training reads, a bit flipped, or cut off: named, and nothing is changed."""
    stop_in(monkeypatch, 8, signal.SIGINT)  # in stage 1: one block is backed up
    assert train.main(toy()) == 130
    rng, data, backup = random.Random(0), tmp_path / "data", toy.folder / "backup"
    stored = {path: path.read_bytes() for path in toy.folder.rglob("*") if path.is_file()}
    for path in (toy.folder / "checkpoint.safetensors", backup / "block_0.safetensors",
                 data / "train_257.bin", data / "val_257.bin"):  # fmt: skip
        good = path.read_bytes()
        for position in rng.sample(range(len(good)), 3):
            flip(path, position)
            fails(train.main, [*toy(), "--resume"], capsys, path, "damaged")
            flip(path, position)
        path.write_bytes(good[: len(good) // 2])
        fails(train.main, [*toy(), "--resume"], capsys, path, "damaged")
        path.write_bytes(good)
    (toy.folder / "config.json").write_bytes(stored[toy.folder / "config.json"][:-20])
    fails(train.main, [*toy(), "--resume"], capsys, "config.json is damaged")
    (toy.folder / "config.json").write_bytes(stored[toy.folder / "config.json"])
    # A backup that is whole, but not the one that the checkpoint counts on; and none.
    path = backup / "block_0.safetensors"
    tensors, facts, _ = read_tensors(path)
    write_tensors(path, {name: t.clone() for name, t in tensors.items()}, facts | {"step": 5})
    fails(train.main, [*toy(), "--resume"], capsys, path, "is not the one")
    path.unlink()
    fails(train.main, [*toy(), "--resume"], capsys, path, "is missing")
    path.write_bytes(stored[path])
    # Metrics that are shorter than the checkpoint says are not padded.
    path = toy.folder / "metrics.jsonl"
    path.write_bytes(stored[path][:-1])
    fails(train.main, [*toy(), "--resume"], capsys, path, "shorter than the checkpoint says")
    assert path.read_bytes() == stored[path][:-1]
    path.unlink()
    fails(train.main, [*toy(), "--resume"], capsys, path, "shorter")
    path.write_bytes(stored[path] + b'{"event": "st')  # longer: what a kill leaves
    # Another text.
    source = tmp_path / "text.txt"
    text = source.read_text()
    source.write_text(text.replace("people", "nation"))
    fails(train.main, [*toy(), "--resume"], capsys, "text has changed")
    source.write_text(text)
    for name, data in stored.items():
        assert name == path or name.read_bytes() == data, name
    assert train.main([*toy(), "--resume"]) == 0
    assert [line["step"] for line in Run(toy.folder).metrics("step")] == [2, 4, 6, 2, 3, 2, 3]


@pytest.mark.slow
def test_campaign_of_flips(toy, tmp_path, monkeypatch, capsys):
    """Every byte of a small file and thousands of a run's own: detected and named."""
    began, count, rng = time.time(), Counter(), random.Random(0)
    stop_in(monkeypatch, 8, signal.SIGINT)  # in stage 1: one block is backed up
    assert train.main(toy()) == 130
    small, corpus = tmp_path / "small.safetensors", tmp_path / "english_10k.jsonl"
    write_tensors(small, {"w": torch.arange(9.0)}, {"step": 3})
    shutil.copy(data_loader.CORPUS, corpus)
    monkeypatch.setattr(data_loader, "CORPUS", corpus)
    run = Run(toy.folder)
    for path, read, positions in [
        (small, lambda: read_tensors(small), None),
        (toy.folder / "checkpoint.safetensors", run.resume, 5200),
        (toy.folder / "backup" / "block_0.safetensors", run.resume, 5200),
        (tmp_path / "data" / "val_257.bin", lambda: load_tokens(run.config.data, 257), 3500),
        (corpus, lambda: data_loader.read_examples("sotu", 10), 3500),
    ]:
        good = path.read_bytes()
        for position in rng.sample(range(len(good)), positions or len(good)):
            with open(path, "r+b") as file:
                file.seek(position)
                file.write(bytes([good[position] ^ 1 << rng.randrange(8)]))
            with pytest.raises(UserError, match=path.name):
                read()
            with open(path, "r+b") as file:
                file.seek(position)
                file.write(good[position : position + 1])
            count[path.name] += 1
        read()
    with capsys.disabled():
        print(f"\n{sum(count.values())} flips, all detected, {time.time() - began:.0f} s: "
              + ", ".join(f"{n} of {name}" for name, n in count.items()))
    assert sum(count.values()) >= 17_617


# --- training watches itself -----------------------------------------------------------------


def test_nothing_that_is_not_finite_is_ever_saved(toy, no_report, monkeypatch, capsys):
    """Checkpoints after steps 2 and 4, a log line after 4, the stage's end and backup after 6."""
    real = train.train_step
    for what, at, words in [
        ("loss", 5, ["the loss is nan", "stage 0 at step 5", "row 2 of its batch"]),
        ("gradient", 5, ["gradient norm nan", "stage 0 at step 5", "row 0, 1, 2, 3 of"]),
        ("weights", 4, ["weights", "stage 0", "not finite after step 4"]),
        ("optimizer", 6, ["optimizer state", "stage 0", "not finite after step 6"]),
    ]:
        settings = {"training__checkpoint_interval": 2 if at != 5 else 4,
                    "training__log_interval": 4, "training__run_id": what}  # fmt: skip
        count = [0]

        def broken(loss_of, optimizer, *args):
            ce, grad_norm = real(loss_of, optimizer, *args)
            count[0] += 1
            if count[0] == at and what == "loss":
                ce[2] = float("nan")
            elif count[0] == at and what == "gradient":
                grad_norm = grad_norm * float("nan")
            elif count[0] == at and what == "weights":
                loss_of.model.h[1].mlp.c_fc.bias.data[3] = float("inf")
            elif count[0] == at:
                next(iter(optimizer.state.values()))["exp_avg_sq"][0, 0] = float("inf")
            return ce, grad_norm

        monkeypatch.setattr(train, "train_step", broken)
        fails(train.main, toy(**settings), capsys, *words, "lower training.lr")
        folder = toy.folder.with_name(what)
        assert Run(folder).state().step == (2 if at == 4 else 4)
        assert not (folder / "backup").exists()
        monkeypatch.setattr(train, "train_step", real)
        assert train.main([*toy(**settings), "--resume"]) == 0
    wild = toy(training__lr="1e9", training__grad_clip="1e30", training__warmup_steps=0)
    fails(train.main, wild, capsys, "stage 0", "training.lr")


def test_a_loss_far_above_its_trend_is_reported(toy, no_report, monkeypatch, capsys):
    """Stage 0, step 7 is 3 nats too high; a run killed before or behind it says the same."""
    settings = {"training__max_steps": 16, "training__log_interval": 1}
    real_batch, real_step, where = train.batch_of, train.train_step, [None]

    def batch_of(tokens, config, training, stage, step):
        where[0] = (stage.block, step)
        return real_batch(tokens, config, training, stage, step)

    def train_step(*args):
        ce, grad_norm = real_step(*args)
        return ce + 3 * (where[0] == (0, 6)), grad_norm

    monkeypatch.setattr(train, "batch_of", batch_of)
    monkeypatch.setattr(train, "train_step", train_step)
    assert train.main(toy(**settings, training__run_id="whole")) == 0
    whole = toy.folder.with_name("whole")
    (jump,) = Run(whole).metrics("loss_jump")
    assert (jump["stage"], jump["step"]) == (0, 7) and jump["loss"] > jump["usual"] + 2
    assert "is usual" in capsys.readouterr().out
    for number in (6, 8):  # saved after steps 4 and 6
        arguments = toy(**settings, training__run_id=f"killed-{number}")
        killed_in(monkeypatch, number, arguments)
        assert train.main([*arguments, "--resume"]) == 0
        assert same(outcome(toy.folder.with_name(f"killed-{number}")), outcome(whole))


@pytest.mark.slow
def test_memory_files_and_threads_do_not_grow(toy, monkeypatch, capsys):
    """Over 2,000 steps; the same stage's step 100 is compared with its last."""
    real, seen = train.batch_of, {}

    def batch_of(tokens, config, training, stage, step):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen[stage.block, step] = (pages * resource.getpagesize() / MIB,
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
            print(f"\nstage {stage}: {first:.1f} MiB at step 100, {end:.1f} at the end; "
                  f"open files and threads {others}, then {others_end}", end="")
            assert end - first < 4 and others == others_end
    assert seen[2, 499][0] - seen[0, 100][0] < 20


# --- more than one process, other machines ---------------------------------------------------


def assert_same_course(folder, other):
    """Two runs logged the same losses and gradient norms, within what fp32 rounds away."""
    for event, keys in (("step", ("loss", "grad_norm")), ("validation", ("cross_entropy",))):
        for a, b in zip(Run(folder).metrics(event), Run(other).metrics(event), strict=True):
            assert (a["stage"], a["step"]) == (b["stage"], b["step"])
            for key in keys:
                assert a[key] == pytest.approx(b[key], abs=1e-5), (event, key, a["step"])


def test_two_processes_train_as_one(toy, monkeypatch):
    """By torchrun, as a user starts it; 8 rows are shared, in micro-batches of 8, then of 2."""
    monkeypatch.setattr(evaluate_gpt2, "ROWS", 100)  # as the script has it
    few = {"data__num_examples": 40}  # 9 validation rows
    assert train.main(toy(**few, training__batch_size=8, training__run_id="one")) == 0
    small = few | {"training__batch_size": 2, "training__gradient_accumulation": 4}
    assert train.main(toy(**small, training__run_id="accumulated")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               str(ROOT / "train_gpt2_fusion.py"), *toy(**small, training__run_id="two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stage 2  step     3/3  loss") == 1  # process 0 alone speaks
    one = toy.folder.with_name("one")
    for name in ("accumulated", "two"):
        other = toy.folder.with_name(name)
        assert_same_course(one, other)
        bound = Run(other).evaluation()["nelbo_12"]
        assert bound == pytest.approx(Run(one).evaluation()["nelbo_12"], abs=1e-5)
        for block, tensors in weights(one).items():
            for key, tensor in tensors.items():  # AdamW enlarges what rounding does to tiny grads
                assert (tensor - weights(other)[block][key]).abs().mean() < 1e-6, key


def test_rows_that_processes_cannot_share_are_refused(toy, monkeypatch, capsys):
    monkeypatch.setattr(train, "process", lambda: (0, 3))
    fails(train.main, toy(), capsys, "4 rows cannot be shared equally by 3 processes")


def test_what_other_systems_lack_is_not_needed(toy, monkeypatch, tmp_path, capsys):
    """Without file locks, fadvise, syncing of folders, SIGHUP, /proc, ps and glibc: the same."""
    assert train.main(toy(training__run_id="whole")) == 0
    exists = Path.exists
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(Path, "exists",
                        lambda self: not str(self).startswith("/proc") and exists(self))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    stop_in(monkeypatch, 8, signal.SIGTERM)
    assert train.main(toy()) == 130
    assert train.main([*toy(), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "- MiB" in printed
    assert same(outcome(toy.folder)["scores"], outcome(toy.folder.with_name("whole"))["scores"])
    assert same(weights(toy.folder), weights(toy.folder.with_name("whole")))
    assert {line["peak_mib"] for line in Run(toy.folder).metrics("stage")} == {None}
    assert {line["memory_mib"] for line in Run(toy.folder).metrics("step")} == {None}
    assert evaluate_gpt2.main(["--run", toy.folder, "--precision", "int4"]) == 0


# --- mistakes --------------------------------------------------------------------------------


def test_a_folder_that_may_not_be_written(toy, monkeypatch, capsys):
    """Simulated, because the superuser may write anywhere."""
    real = os.mkdir
    for folder in ("data", "checkpoints"):

        def mkdir(path, *args):
            if folder in Path(path).name:
                raise PermissionError(13, "Permission denied", str(path))
            real(path, *args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", mkdir)
            fails(train.main, toy(), capsys, folder, "Permission denied")
        assert not toy.folder.exists()


def test_mistakes_end_in_one_line_and_leave_nothing(toy, tmp_path, monkeypatch, capsys):
    """As a user makes them; what is wrong with a config or a text is in test_data_loader.py."""
    monkeypatch.chdir(tmp_path)
    GPT(toy_config(seq_len=8, d_model=32, n_layers=6, block_size=2)).save_pretrained("short")
    Path("mine.yaml").write_text("model: [1")
    Path("file").write_text("")
    for options, changes, words in [
        (["--config", "none.yaml"], {}, ["none.yaml", "--config"]),
        (["--config", "mine.yaml"], {}, ["mine.yaml: line 1"]),
        (["--preset", "tini"], {}, ["tini", "tiny"]),
        (["--resume", "--overwrite"], {}, ["--resume", "--overwrite"]),
        (["--verbose"], {}, ["--verbose", "--help"]),
        ([], {"training__learning_rate": 1}, ["command line", "mean training.lr?"]),
        ([], {"training__lr": ""}, ["command line", "training.lr"]),
        ([], {"model__n_heads": 3}, ["command line", "n_heads 3"]),
        ([], {"training__block_size": 3}, ["command line", "block_size", "n_layers"]),
        ([], {"training__run_id": "../up"}, ["command line", "run_id"]),
        ([], {"training__max_steps": 2}, ["max_steps=2", "a block without a step"]),
        ([], {"training__device": "gpu"}, ["device", "gpu", "cpu"]),
        ([], {"training__device": "meta"}, ["device", "meta"]),
        ([], {"training__device": "xpu"}, ["device", "xpu"]),
        ([], {"data__source": "none.txt"}, ["none.txt"]),
        ([], {"model__vocab_size": 100}, ["vocab_size", "257"]),
        ([], {"training__batch_size": 10**9}, ["batch_size"]),
        ([], {"model__seq_len": 10**6}, ["seq_len"]),
        ([], {"model__init_from": "/nowhere"}, ["init_from", "/nowhere"]),
        ([], {"model__init_from": "short"}, ["short", "model.seq_len=8 (not 32)"]),
        ([], {"training__folder": "file"}, ["file", "Not a directory"]),
    ]:  # fmt: skip
        fails(train.main, [*options, *toy(**changes)], capsys, *words)
        assert not toy.folder.exists() and not leftovers(tmp_path), words


def test_a_tilde_is_the_home_folder(toy, no_report, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert train.main(toy(training__folder="~/runs", data__folder="~/data")) == 0
    assert (tmp_path / "home" / "runs" / "toy" / "checkpoint.safetensors").exists()
    assert (tmp_path / "home" / "data" / "train_257.bin").exists()


def test_a_folder_of_pretrained_weights_is_no_run(toy, no_report, tmp_path, capsys):
    shutil.copytree(ROOT / "tests" / "gpt2_golden", toy.folder)
    files = {path.name: path.read_bytes() for path in toy.folder.iterdir()}
    for arguments in (toy(), [*toy(), "--resume"], [*toy(), "--overwrite"]):
        fails(train.main, arguments, capsys, toy.folder, "weights")
        assert {path.name: path.read_bytes() for path in toy.folder.iterdir()} == files


def test_resume_of_a_pretrained_folder(toy, no_report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "gpt2_golden", tmp_path / "hf")
    before = (tmp_path / "hf" / "config.json").read_bytes()
    arguments = ["--resume", "hf", f"data.source={tmp_path / 'text.txt'}", "training.max_steps=2"]
    try:
        train.main(arguments)
    finally:
        assert (tmp_path / "hf" / "config.json").read_bytes() == before


def test_a_saved_run_without_its_config_is_not_overwritten(toy, no_report, capsys):
    assert train.main(toy()) == 0
    before = (toy.folder / "checkpoint.safetensors").read_bytes()
    (toy.folder / "config.json").unlink()
    for option in ([], ["--resume"]):
        fails(train.main, [*toy(training__seed=1), *option], capsys, "config.json")
        assert (toy.folder / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors"])
def test_a_damaged_run_can_be_moved_aside(toy, no_report, capsys, name):
    assert train.main(toy()) == 0
    path = toy.folder / name
    path.write_bytes(path.read_bytes()[:50])
    fails(train.main, toy(), capsys, name, "damaged")
    assert train.main([*toy(), "--overwrite"]) == 0
    assert (toy.folder.with_name("toy.old-1") / name).stat().st_size == 50


def test_an_ignored_signal_stays_ignored(toy, no_report, monkeypatch):
    """nohup python train_gpt2_fusion.py"""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_in(monkeypatch, 2, signal.SIGHUP)
        assert train.main(toy()) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)
