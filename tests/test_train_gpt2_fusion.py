"""Stages, the loop, a run's weights on disk, and runs that lose nothing: the real script, small."""

import functools
import itertools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, flip, toy_config

import lora
import quant
import train_gpt2_fusion as train
from data_loader import Run, UserError, load_config, read_tensors, write_tensors
from model import GPT, diffusion_loss, read_pretrained

DROPOUT = {"dropout": 0.1, "qlora_dropout": 0.1}
INT4 = DROPOUT | {"quantization_type": "int4"}
NEXT_TOKEN = {"mode": "standard", "time_step_masking": "false"}
RESUME = ["--resume", "toy"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where toy's checkpoints/ is: its runs have names


def trains(toy, name="toy", **changes):
    """Train a toy run to its end. -> the Run"""
    assert train.main(toy(run_id=name, **changes)) == 0
    return Run.named(name)


def train_until(step, arguments, event):
    """Train; before the step with that number is done, event() happens. -> exit status"""
    real, count = train.train_step, itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda *args: (
            next(count) == step and event(), real(*args))[1])
        return train.main(arguments)


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


kill = Mock(side_effect=KeyboardInterrupt)  # as with SIGKILL nothing is saved any more


def state_of(name="toy"):
    return train.read_checkpoint(Run.named(name))[0]


def weights(run):
    """[{name: tensor}, ...] of a run's backups."""
    return [read_tensors(path)[0] for path in sorted(run.folder.glob("backup/block_*"))]


def bits(tensors):
    """{name: hash} of {name: tensor} or of a model: equal only where every bit is."""
    tensors = tensors if isinstance(tensors, dict) else tensors.state_dict()
    return {name: hash(t.detach().flatten().view(torch.uint8).numpy().tobytes())
            for name, t in tensors.items()}  # fmt: skip


def outcome(name="toy"):
    """What a run must arrive at, however often it was stopped; clocks and memory are left out."""
    varies = "tokens_per_second memory_mib seconds peak_mib metrics_bytes backups config".split()
    run = Run.named(name)
    state, tensors = train.read_checkpoint(run)
    lines = [*run.metrics("step"), *run.metrics("validation"), *run.metrics("stage"), state.facts()]
    lines = [{key: line[key] for key in line.keys() - {*varies}} for line in lines]
    return [*lines, *map(bits, [tensors, *weights(run)])]


def contents(folder):
    """{path: bytes} of the files below a folder, sorted."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def schedule(*overrides):
    return train.fusion_schedule(load_config(overrides=overrides))


def test_frozen_mode_trains_every_layer_in_exactly_one_stage():
    for blocks, size in ((3, 4), (2, 6), (12, 1), (1, 12), (4, 3)):
        bands = [[i / blocks, (i + 1) / blocks] for i in range(blocks)]
        steps, shares = [(i + 0.5) / blocks for i in range(blocks)], [*range(1, blocks + 1)]
        stages = schedule(
            f"total_blocks={blocks}", f"block_size={size}", f"block_steps={shares}",
            f"block_mask_ranges={bands}", f"time_step_mask_fractions={steps}", "max_steps=1001")
        assert [stage.block for stage in stages] == [*range(blocks)]
        assert [i for stage in stages for i in stage.trained] == [*range(12)]
        assert sum(stage.steps for stage in stages) == 1001
        assert [m for stage in stages for m in stage.time_steps] == steps
        for k, stage in enumerate(stages):
            assert stage.adapted == tuple(range(k * size)) and stage.stored == (k,)
            assert stage.embeddings == (k == 0) and not stage.plain_qlora


def test_the_schedule_of_the_other_modes():
    everything = tuple(range(12))
    trainable = schedule("fusion_mode=trainable")
    assert [stage.trained for stage in trainable] == [everything[:n] for n in (4, 8, 12)]
    assert all(stage.embeddings and not stage.adapted for stage in trainable)
    assert [stage.stored for stage in trainable] == [(), (), (0, 1, 2)]
    for overrides in (["mode=standard"], ["mode=standard", "init_from=x", "qlora_enabled=false"]):
        (standard,) = schedule(*overrides)
        assert standard.trained == everything and standard.embeddings and not standard.plain_qlora
        assert standard.adapted == () and standard.stored == (0,) and standard.steps == 2000
        assert standard.time_steps == load_config().time_step_mask_fractions
    (plain,) = schedule("mode=standard", "init_from=x")
    assert plain.plain_qlora and plain.adapted == everything and not plain.embeddings
    assert plain.trained == () and plain.stored == ()  # its block is stored before the first step
    for stage in schedule("init_from=x", "qlora_enabled=false", "time_step_masking=false"):
        assert stage.time_steps == (0.0,) and not stage.plain_qlora and not stage.adapted
    with pytest.raises(UserError, match="max_steps=2 "):  # a block without a step
        schedule("max_steps=2")


def test_the_learning_rate_warms_up_and_ends_at_its_share():
    config, stage = load_config(overrides=["warmup_steps=10"]), schedule()[0]
    shares = [train.learning_rate_share(step, stage, config) for step in range(stage.steps)]
    assert shares[0] == pytest.approx(1 / 11) and shares[10] == 1.0
    assert shares[:11] == sorted(shares[:11]) and shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == pytest.approx(0.1, abs=1e-3)


def test_every_step_has_its_rate_and_its_dropout_and_gradients_are_clipped(toy, monkeypatch):
    real, seen = train.train_step, []

    def step(loss_of, optimizer, *arguments):
        shares = {group["lr"] / group["peak_lr"] for group in optimizer.param_groups}
        seen.append((*shares, torch.initial_seed()))
        return real(loss_of, optimizer, *arguments)

    monkeypatch.setattr(train, "train_step", step)
    run = trains(toy, qlora_dropout=0.1, max_steps=8, warmup_steps=0, weight_decay=0)
    config = train.read_checkpoint(run)[0].config
    expected = [train.learning_rate_share(step, stage, config)
                for stage in train.fusion_schedule(config) for step in range(stage.steps)]
    assert [share for share, _ in seen] == pytest.approx(expected)  # one for all groups
    assert len({seed for _, seed in seen}) == 8
    start, clipped = (weights(trains(toy, name, grad_clip=1e-9, warmup_steps=0, weight_decay=0,
                                     max_steps=steps))[0]["h.0.mlp.c_fc.weight"]
                      for name, steps in (("start", 0), ("clipped", 8)))  # fmt: skip
    moved = weights(run)[0]["h.0.mlp.c_fc.weight"] - start
    assert (clipped - start).abs().max() < 1e-4 < moved.abs().max()


def test_moments_in_bf16_change_adamw_by_their_rounding_alone(monkeypatch):
    """Beside torch's AdamW in float64: the first step, which rounds nothing yet, and a hundred."""
    monkeypatch.setattr(train.AdamWInBf16, "SLICE", 100)  # 217 weights: three slices, one shorter
    target, after = torch.randn(7, 31, generator=torch.Generator().manual_seed(0)), {}
    for kind, dtype in ((train.AdamWInBf16, torch.float32), (torch.optim.AdamW, torch.float64)):
        w, unused, alone = (torch.nn.Parameter(torch.ones(7, 31, dtype=dtype)) for _ in range(3))
        groups = [{"params": [w, unused], "lr": 0.1}, {"params": [alone]}]
        optimizer = kind(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        for step in range(1, 101):
            groups[0]["lr"] = 0.1 / step
            (w - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step in (1, 100):
                after[dtype, step] = w.detach().double().clone()
        assert optimizer.state[w]["step"] == 100 and unused.eq(1).all() and alone.eq(1).all()
    error = [(after[torch.float32, step] - after[torch.float64, step]).abs().max().item()
             for step in (1, 100)]  # fmt: skip
    assert error[0] < 1e-6 < 1e-4 < error[1] < 2e-2, error
    assert (after[torch.float64, 100] - 1).abs().max() > 0.3
    w = torch.nn.Parameter(torch.ones(300))
    optimizer = train.AdamWInBf16([w], fused=True)
    for skipped in (0.0, 1.0):  # as GradScaler says it, where a gradient overflowed
        w.grad, optimizer.found_inf = torch.ones(300), torch.tensor(skipped)
        optimizer.state[w] |= {"step": torch.zeros(())} if skipped else {}
        before = bits({"w": w} | optimizer.state[w])
        optimizer.step()
        optimizer.state[w]["step"].zero_()
        assert (before == bits({"w": w} | optimizer.state[w])) == bool(skipped)
    kinds = [optimizer.state[w][key].dtype for key in ("exp_avg", "exp_avg_sq", "step")]
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]


def one_step(model, stage, optimizer, step=0):
    """A training step on random tokens."""
    tokens = np.random.default_rng(0).integers(0, 257, 5000).astype(np.uint16)
    batch = train.batch_of(tokens, model.config, stage, step)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss_of = train.stage_loss(model, stage)
    train.train_step(loss_of, optimizer, scaler, batch, model.config, torch.device("cpu"))


def test_a_later_stage_changes_nothing_that_an_earlier_exit_computes():
    config = toy_config(quantization_type="int4", batch_size=4, qlora_lr=1e-2, dropout=0.1)
    model, idx, remembered = GPT(config, blocks=0), torch.randint(257, (2, 16)), []
    for stage in train.fusion_schedule(config):
        train.add_block(model)
        optimizer = train.begin_stage(model, stage)
        assert model.blocks == stage.block + 1  # blocks not yet reached are not in memory
        assert [layer.training for layer in model.h] == [False] * stage.block + [True]  # dropout
        adapters = {*lora.adapter_parameters(model, stage.block).values()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert group["lr"] == (1e-2 if p in adapters else 5e-4)
                assert group["weight_decay"] == 0.1 * (p.dim() == 2 and p not in adapters)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        for step in range(4):
            one_step(model, stage, optimizer, step)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in trained), name
        quant.freeze_block(model, stage.block, "int4")
        model.eval()
        with torch.no_grad():
            for block, logits in enumerate(remembered):
                assert torch.equal(model(idx, block), logits), f"exit {block} changed"
            remembered.append(model(idx, stage.block))


def test_without_adapters_no_gradient_is_computed_in_the_frozen_prefix():
    for adapters in (False, True):
        config, outputs = toy_config(qlora_enabled=adapters), []
        model = GPT(config)
        train.begin_stage(model, train.fusion_schedule(config)[1])
        model.h[0].register_forward_hook(lambda _, __, out: outputs.append(out.requires_grad))
        model(torch.zeros(1, 4, dtype=torch.long), 1)
        assert outputs == [adapters]


def test_recomputing_changes_nothing_but_memory(toy):
    """The same losses and weights, bit for bit; what is kept for the backward pass of stage 2."""
    kept = []
    for mode in ("none", "frozen", "all"):
        trains(toy, mode, gradient_checkpointing=mode, max_steps=4, **DROPOUT)
        assert outcome(mode) == outcome("none")
        config, sizes = toy_config(n_layers=6, block_size=2, gradient_checkpointing=mode), {}
        model = GPT(config)
        train.begin_stage(model, train.fusion_schedule(config)[2])
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
            model.hidden(torch.zeros(64, 16, dtype=torch.long), 2)
        kept.append(sum(sizes.values()))
    assert kept[2] < kept[1] / 2 < kept[0] / 4, kept  # four of six layers are frozen


@pytest.mark.parametrize("kind", ["int4", "nf4"])
@pytest.mark.filterwarnings("error:.*lru_cache")
def test_compiled_layers_compute_the_same(kind, monkeypatch):
    """Traced as for a GPU, but run by torch: no kernel is built here."""
    real, gradients = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: real(m, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    for compiled in ("false", "true"):
        config = toy_config(compile=compiled, n_layers=2, total_blocks=2, block_steps=(1, 1),
                            block_mask_ranges=((0, 0.5), (0.5, 1)))  # fmt: skip
        torch.manual_seed(0)
        model, stage = GPT(config), train.fusion_schedule(config)[1]
        quant.freeze_block(model, 0, kind)
        optimizer = train.begin_stage(model, stage)
        monkeypatch.setattr(optimizer, "step", lambda: gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}))
        one_step(model, stage, optimizer)
        assert bool(torch._dynamo.utils.counters["stats"]) == (compiled == "true")
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert any("lora_B.1" in name for name in gradients[0])


def test_checkpoints_are_apart_by_steps_and_by_seconds(toy, monkeypatch):
    saved, real = [], train.save_run
    monkeypatch.setattr(train, "save_run", lambda run, state, *rest: (
        saved.append((state.stage, state.step)), real(run, state, *rest)))
    ends = [(0, 0), (1, 0), (2, 0), (3, 0)]
    for seconds, between in (0, [(0, 4)]), (10**6, []):
        trains(toy, f"{seconds}", checkpoint_seconds=seconds, checkpoint_interval=4)
        assert saved == sorted(ends + between)
        saved.clear()


def test_the_whole_run(toy, monkeypatch, capsys):
    monkeypatch.setattr(train, "seed_dropout", lambda config, stage, step:
                        (stage.block, step) == (0, 0) and torch.ones(50 * train.MIB))  # 200 MiB
    run = trains(toy, max_steps=40, lr="5e-3", log_interval=5, checkpoint_interval=15)
    printed = capsys.readouterr().out
    assert "step    20/20" in printed and "python evaluate_gpt2.py --run" in printed
    assert [str(path.relative_to(toy.folder)) for path in contents(toy.folder)] == [
        *(f"backup/block_{k}.safetensors" for k in range(3)), "checkpoint.safetensors",
        "metrics.jsonl"]  # fmt: skip
    steps, losses, stages = map(run.metrics, ("step", "validation", "stage"))
    assert [line["stage"] for line in losses] == [0] * 5 + [1] * 3 + [2] * 3
    assert set(steps[0]) == {"event", "stage", "step", "loss", "loss_by_time_step", "lr",
                             "grad_norm", "tokens_per_second", "memory_mib"}
    assert set(steps[0]["loss_by_time_step"]) == {"0.1", "0.2", "0.3", "0.4"}
    assert losses[0]["cross_entropy"] > 4.5 and losses[4]["cross_entropy"] < 3.7  # log 257: 5.5
    assert losses[-1]["cross_entropy"] < 3.6 and losses[-1]["accuracy"] > 0.15
    assert [stage["tokens"] for stage in stages] == [20 * 128, 10 * 128, 10 * 128]
    peaks = [stage["peak_mib"] for stage in stages]
    assert peaks[0] > max(peaks[1:]) + 150, peaks  # the peak of a stage is its own
    # Counted from the tensors. In stage 0 fp32 weights, as much for gradients, twice that and
    # counts for AdamW; in stage 2 matrices and embeddings are fp16, and adapters are there.
    vectors, embeddings, matrices = 2 * 13 * 32 + 2 * 32, (320 + 32) * 32, 2 * 12 * 32 * 32
    own, adapters = 4 * (vectors + matrices), 4 * 2 * 16 * 32 * 8  # those on one block
    first, third = own + 4 * embeddings, own + 2 * adapters
    frozen = 2 * embeddings + 2 * (2 * matrices + 4 * vectors) + adapters
    assert [[stage[f"{kind}_mib"] * train.MIB for kind in ("weights", "gradients", "optimizer")]
            for stage in (stages[0], stages[2])] == [
        [first, first, first + 4 * 28], [frozen + third, third, third + 4 * 58]]


@pytest.mark.parametrize("changes", [
    {"quantization_type": "fp32", "gradient_accumulation": 2, "batch_size": 2},
    INT4 | {"attention_mode": "bidirectional"},
    {"quantization_type": "nf4", "fusion_mode": "trainable"},
    {"qlora_enabled": "false", "compute_type": "bf16"},
    {"time_step_masking": "false", "block_mask_ranges": [[0.7, 1.0], [0.4, 0.7], [0.0, 0.4]]},
    {"total_blocks": 1, "block_size": 6, "block_steps": [1], "block_mask_ranges": [[0.0, 1.0]]},
    {"mode": "standard", "n_layers": 5, "block_steps": [3], "quantization_type": "int4"},
    NEXT_TOKEN,
])  # fmt: skip
def test_every_combination_runs_to_its_end(toy, changes):
    run = trains(toy, **changes, max_steps=4)
    model, state, _ = train.load_run(run)
    config, blocks = state.config, state.config.total_blocks
    assert state.finished and len(run.metrics("stage")) == blocks
    assert all(0 < line["loss"] < 7 for line in run.metrics("step"))  # log 257 = 5.5
    adapted = 16 * (config.fusion_mode == "frozen" and config.qlora_enabled)
    assert [sum(".lora_" in name for name in tensors) for tensors in weights(run)] == [
        0, adapted, 2 * adapted][:blocks]
    stored = [m.kind for m in model.modules() if isinstance(m, quant.QuantLinear)]
    assert stored == [config.quantization_type] * (4 * config.n_layers)  # the last block too


def test_a_run_comes_back_from_disk_bit_for_bit(tmp_path):
    """In the middle of each stage and at its end, stored in int4 and adapted."""
    config = toy_config(quantization_type="int4", batch_size=4)
    run, model, state = Run(tmp_path), GPT(config, blocks=0), train.State(config, "0" * 64)
    for stage in train.fusion_schedule(config):
        train.add_block(model)
        optimizer = train.begin_stage(model, stage)
        one_step(model, stage, optimizer)
        (tmp_path / "eval.json").write_text("of the model before")
        state.stage, state.step, state.seconds, state.scaler = stage.block, 1, 1 / 3, {"scale": 2.0}
        train.save_run(run, state, model, optimizer)
        assert not (tmp_path / "eval.json").exists()
        again, found, _ = train.load_run(run)
        assert found.facts() == state.facts() and bits(again) == bits(model)
        with pytest.raises(UserError, match="--resume"):
            train.load_run(run, kind="fp32")
        exact = {n: p.clone() for n, p in model.block_parameters(stage.block).items()}
        train.store_blocks(run, state, model, stage.stored)
        state.stage, state.step = stage.block + 1, 0
        train.save_run(run, state, model)
        again, _, kept = train.load_run(run)
        assert bits(again) == bits(model) and kept == {}
    tensors = read_tensors(run.backup(2))[0]
    assert bits(tensors) == bits(exact | lora.adapter_parameters(model, 2))
    full, _, _ = train.load_run(run, kind="fp32")  # the backups' own values
    assert torch.equal(full.h[2].mlp.c_fc.dequantize(), exact["h.2.mlp.c_fc.weight"])
    # Tensors that do not fit, in a backup that the checkpoint counts: too few, too many, a shape.
    adapter, linear, other = "h.0.attn.c_attn.lora_A.2", "h.2.mlp.c_fc.weight", "h.3.ln_1.bias"
    for name, change in [(adapter, {}), (linear, {}), (linear, {linear: torch.zeros(9)}),
                         (other, {other: torch.zeros(32)})]:  # fmt: skip
        changed = {n: t for n, t in tensors.items() if n != name} | change
        state.backups[2] = write_tensors(run.backup(2), changed, {})
        write_tensors(run.checkpoint, {}, state.facts())
        with pytest.raises(UserError, match=f"(?s)block_2.*{name}"):
            train.load_run(run)


@pytest.fixture
def pretrained(toy):
    """A folder in Hugging Face's layout, of toy's sizes; its predictions are far from flat."""
    torch.manual_seed(0)
    model = GPT(load_config(overrides=toy(mode="standard")))
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() == 2 else 1).add_(0.01)
    model.save_pretrained("pretrained")
    return "pretrained"


def test_training_starts_from_saved_gpt2_weights(toy, pretrained, monkeypatch):
    """No step at all stores what it starts from; every block of a fused run starts from it too.
    What a block has taken is let go: it would count as memory to the end."""
    read = []
    monkeypatch.setattr(train, "read_pretrained",
                        lambda *args: read.append(read_pretrained(*args)) or read[-1])
    zero = NEXT_TOKEN | {"qlora_enabled": "false", "quantization_type": "fp32", "max_steps": 0}
    for name, changes in (("zero", zero), ("fused", {"max_steps": 4, "lr": "1e-12"})):
        run = trains(toy, name, init_from=pretrained, **changes)
        given = read_pretrained(pretrained, state_of(name).config)
        found = {key: t for tensors in weights(run) for key, t in tensors.items()}
        assert given.keys() == {key for key in found if ".lora_" not in key}
        assert all(torch.allclose(found[key], given[key], atol=1e-6) for key in given)
        assert name == "fused" or bits(found) == bits(given)
    assert read == [{}, {}]


def test_plain_qlora(toy, pretrained):
    """It begins at the pretrained loss, and trains adapters, exit norm and [MASK] row alone."""
    plain = {"mode": "standard", "init_from": pretrained, "qlora_dropout": 0.1, "qlora_lr": "1e-2",
             "max_steps": 10, "eval_interval": 5}  # fmt: skip
    idx, exact = torch.randint(257, (4, 32)), GPT.from_pretrained(pretrained)
    for kind, tolerance in (("fp32", 0), ("int4", 0.3)):
        plain["quantization_type"] = kind
        model, state, _ = train.load_run(trains(toy, kind, **plain | {"max_steps": 0}))
        exact.config = state.config
        mine, its = (diffusion_loss(m.eval(), idx, idx, idx > 256, torch.zeros(4), 0)[0].item()
                     for m in (model, exact))  # fmt: skip
        assert mine == pytest.approx(its, abs=tolerance), kind
    run = trains(toy, **plain)
    losses = [line["cross_entropy"] for line in run.metrics("validation")]
    assert losses[-1] < losses[0] - 0.02 and run.metrics("step")[0]["lr"] > 5e-3
    before, after = bits(model), bits(train.load_run(run)[0])
    moved = [name for name in sorted(after) if after[name] != before[name]]
    assert [name for name in moved if ".lora_" not in name] == [
        "exit_norms.0.bias", "exit_norms.0.weight", "mask_row"] and len(moved) == 3 + 6 * 8
    assert bits(weights(run)[0]) == bits(read_pretrained(pretrained, state.config))
    train_until(6, toy(**plain, run_id="killed"), kill)  # saved after step 4
    Path(pretrained).rename("elsewhere")  # the block that it was read for is there
    assert train.main(["--resume", "killed"]) == 0 and outcome("killed") == outcome()


def test_a_killed_run_ends_as_one_that_was_never_stopped(toy, monkeypatch):
    """Logged every step but saved every second one, so that a kill leaves lines to cut off."""
    for fusion, points in (("frozen", (7, 9, "backup")), ("trainable", ("backup",))):
        settings = INT4 | {"fusion_mode": fusion, "log_interval": 1, "eval_interval": 2}
        trains(toy, fusion, **settings)
        for point in points:
            name = f"{fusion}-{point}"
            with monkeypatch.context() as patch:
                if point == "backup":  # between it and the checkpoint that counts it
                    patch.setattr(quant, "freeze_block", kill)
                assert train_until(point, toy(**settings, run_id=name), kill) == 130
            if point == "backup":
                Run.named(name).backup(0).write_bytes(b"what no checkpoint counts is replaced")
            assert train.main(["--resume", name]) == 0
            assert outcome(name) == outcome(fusion), name


def test_optimizer_and_loss_scaler_go_on_where_they_were(toy):
    """In fp16, stopped after step 5: once without a kill before, once with one."""
    settings = DROPOUT | {"compute_type": "fp16"}
    train_until(5, toy(**settings, run_id="whole"), send(signal.SIGINT))
    train_until(4, toy(**settings), kill)  # saved after step 2
    train_until(3, RESUME, send(signal.SIGINT))
    state, tensors = train.read_checkpoint(Run.named("toy"))
    assert state.scaler["_growth_tracker"] == tensors["optimizer.wte.weight.step"] == 5
    assert sum(name.endswith(".exp_avg_sq") for name in tensors) == 28
    train.load_run(Run.named("toy"), checkpoint=(state, tensors))
    assert not tensors  # views of the file, which are memory as long as there is one
    assert outcome() == outcome("whole")


def test_the_first_signal_saves_and_a_second_ctrl_c_stops_at_once(toy, capfd):
    for step, arguments, numbers, stands in [
        (5, toy(), [signal.SIGHUP], (0, 5, 0)),
        (1, RESUME, [signal.SIGINT], (1, 0, 1)),  # the last step of a stage: stops behind it
        (1, RESUME, [signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP], (1, 1, 1)),
        (1, RESUME, [signal.SIGTERM, signal.SIGINT, signal.SIGINT], (1, 1, 1)),
    ]:  # fmt: skip
        assert train_until(step, arguments, send(*numbers)) == 130
        state, captured = state_of(), capfd.readouterr()
        assert (state.stage, state.step, len(state.backups)) == stands
        assert ("saved" in captured.out) == (captured.err == "")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as they were before


def test_what_a_system_or_a_terminal_lacks_is_not_needed(toy, monkeypatch):
    """The same run with an ignored signal, prints that fail, no locks, no /proc and no glibc."""
    trains(toy, "whole", max_steps=8)
    train_until(1, toy(max_steps=8), kill)
    closed = Mock(spec=["write", "flush"], write=Mock(side_effect=BrokenPipeError))
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(train, "Path", lambda path: Path("no/where" if "/proc" in path else path))
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: object())
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train_until(2, RESUME, send(signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert outcome() == outcome("whole") and " - MiB" in str(closed.write.mock_calls)
    assert {line["peak_mib"] for line in Run.named("toy").metrics("stage")} == {None}


def test_resume_takes_a_run_as_it_was_or_not_at_all(toy, capsys):
    """Damaged files and changed settings are named, and nothing changes. Some keys may change."""
    assert train_until(8, toy(), send(signal.SIGINT)) == 130  # in stage 1
    run, stored, cases = Run.named("toy"), contents(Path()), []
    for path in (run.checkpoint, run.backup(0)):
        data = stored[path]
        cases += [(path, data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :])
                  for n in (3, len(data) // 2, len(data) - 1)]  # fmt: skip
        cases += [(path, data[: len(data) // 2])]
    write_tensors("other", read_tensors(run.backup(0))[0], {"step": 5})  # whole, but another
    for path, data in [*cases, (run.backup(0), Path("other").read_bytes()),
                       (run.metrics_file, stored[run.metrics_file][:-1]),
                       (Path("text.txt"), stored[Path("text.txt")].replace(b"people", b"nation"))]:
        path.write_bytes(data)
        fails(train.main, RESUME, capsys, path.name)
        path.write_bytes(stored[path])
    run.backup(0).unlink()
    fails(train.main, RESUME, capsys, "block_0")
    run.backup(0).write_bytes(stored[run.backup(0)])
    for change in ("lr=9e-4", "seed=4", "dropout=0.5", "num_examples=50", "block_steps=[1,1,1]",
                   "max_steps=20", "batch_size=2", "quantization_type=int4"):  # fmt: skip
        fails(train.main, [*RESUME, change], capsys, change.partition("=")[0])
    assert stored.items() <= contents(Path()).items()
    toy.folder.rename("elsewhere")
    may = ["log_interval=1", "eval_interval=3", "eval_rows=5", "checkpoint_interval=3",
           "checkpoint_seconds=9", "compile=false",
           "gradient_checkpointing=all", "device=auto", "token_folder=tokens"]  # fmt: skip
    assert train.main(["--resume", "elsewhere", *may]) == 0
    assert [line["step"] for line in Run("elsewhere").metrics("step")] == [2, 4, 6, 2, 3, 1, 2, 3]
    before = contents(Path())
    assert train.main(["--resume", "elsewhere"]) == 0
    assert "is finished" in capsys.readouterr().out and contents(Path()) == before


def test_a_full_disk_stops_the_run_and_loses_nothing(toy, capsys):
    """The kernel refuses to let a file grow beyond a size, as it does on a full disk."""
    settings = {"log_interval": 1, "max_steps": 8, "eval_interval": 5}
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    trains(toy, "whole", **settings)
    for step, room, file in [(1, 50_000, "checkpoint"), (3, 100_000, "block_0"), (6, None, "")]:
        name = f"full-{file}"

        def full():  # None: in the middle of a line of metrics.jsonl
            size = room or Run.named(name).metrics_file.stat().st_size + 10
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

        try:
            fails(lambda arguments: train_until(step, arguments, full),
                  toy(**settings, run_id=name), capsys, file, "too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert not [*Path().rglob(".*.tmp")]
        assert train.main(["--resume", name]) == 0
        assert outcome(name) == outcome("whole"), name


def test_nothing_that_is_not_finite_is_ever_saved(toy, monkeypatch, capsys):
    """Checkpoints after steps 2 and 4, a log line after 4, the stage's end and backup after 6."""
    real = train.train_step
    for at, saved, broken, words in [
        (5, 4, lambda model, optimizer, ce, norm: ce[2:3], ["loss is nan", "step 5"]),
        (5, 4, lambda model, optimizer, ce, norm: norm, ["gradient norm nan", "step 5"]),
        (4, 2, lambda model, *_: model.h[1].mlp.c_fc.bias, ["h.1.mlp.c_fc.bias", "step 4"]),
        (4, 2, lambda model, optimizer, *_: optimizer.state[model.wpe.weight]["exp_avg_sq"],
         ["wpe.weight.exp_avg_sq", "step 4"]),
        (6, 4, lambda model, *_: model.wpe.weight, ["wpe.weight", "step 6", "block_0"]),
    ]:  # fmt: skip
        name, count = words[0], itertools.count(1)

        def train_step(loss_of, optimizer, *args):
            ce, norm = real(loss_of, optimizer, *args)
            if next(count) == at:
                broken(loss_of.model, optimizer, ce, norm).data[...] = torch.nan
            return ce, norm

        monkeypatch.setattr(train, "train_step", train_step)
        fails(train.main, toy(log_interval=4, run_id=name), capsys, *words, "stage 0", "lr")
        assert state_of(name).step == saved and not Run.named(name).backup(0).exists(), words


def test_steps_that_fp16_skips_are_told_and_do_not_go_on_for_ever(toy, monkeypatch, capsys):
    """By a scale at which every gradient overflows, halved or not."""
    real, arguments = torch.amp.GradScaler, toy(compute_type="fp16", max_steps=8)
    for backoff, status in ((0.5, 0), (2.0**-98, 2)):
        scaler = functools.partial(real, init_scale=2.0**70, backoff_factor=backoff)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
        assert train.main([*arguments, "--overwrite"]) == status
        printed = capsys.readouterr()
        assert printed.out.count("all skipped") == printed.out.count("tokens/s") == 4 - 2 * status
    assert "step 2" in printed.err and "compute_type=fp32" in printed.err and state_of().step == 0


def test_two_processes_train_as_one(toy):
    """By torchrun, as a user starts it; 8 rows are shared, in micro-batches of 8, then of 2."""
    arguments = toy(run_id="two", batch_size=2, gradient_accumulation=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               str(ROOT / "train_gpt2_fusion.py"), *arguments]  # fmt: skip
    processes = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    one = trains(toy, "one", batch_size=8)  # meanwhile
    printed, _ = processes.communicate(timeout=300)
    assert processes.returncode == 0, printed
    assert printed.count("stage 2  step     3/3  loss") == 1  # process 0 alone speaks
    assert "; on 2 x cpu, products in" in printed
    runs = one, Run.named("two")
    for event, key in (("step", "loss"), ("step", "grad_norm"), ("validation", "cross_entropy")):
        mine, others = ([line[key] for line in run.metrics(event)] for run in runs)
        assert mine == pytest.approx(others, abs=1e-5), key
    for tensors, others in zip(*map(weights, runs), strict=True):
        for name, tensor in tensors.items():  # AdamW enlarges what rounding does
            assert (tensor - others[name]).abs().mean() < 1e-6, name


def test_mistakes_end_in_one_line_and_lose_nothing(toy, monkeypatch, capsys):
    """As a user makes them, with --overwrite: an earlier run is moved only when all is well."""
    run = trains(toy, max_steps=4)
    flip(run.checkpoint, 100)  # even a damaged one
    Path("short.txt").write_text("One paragraph.\n\nAnd another.")
    Path("ten.txt").write_text("A word.\n" * 10)
    Path("nine.txt").write_text(f"{'A word. ' * 50}\n" * 9 + "A word.")
    before = contents(Path())
    for mistake, word in [
        ("--config none.yaml", "none.yaml"), ("--preset tini", "tiny"), ("--resume none", "none"),
        ("--verbose", "--help"), ("training.learning_rate=1", "training.learning_rate"),
        ("lr=fast", "training.lr"), ("max_steps=2", "max_steps"), ("device=gpu", "cpu"),
        ("source=none.txt", "none.txt"), ("source=short.txt", "short.txt"),
        ("source=ten.txt", "training text has 1 rows"), ("source=nine.txt", "give more text"),
        ("init_from=/nowhere", "/nowhere"), ("batch_size=5", "2 processes"),
    ]:  # fmt: skip
        monkeypatch.setattr(train, "world_size", lambda: 1 + (mistake == "batch_size=5"))
        fails(train.main, [*toy(), "--overwrite", *mistake.split()], capsys, word)
        assert contents(Path()) == before, mistake
    fails(train.main, toy(), capsys, "--resume", "--overwrite")
    with run.lock(), Run("checkpoints/new").lock():
        for arguments in ([*toy(), "--overwrite"], RESUME, toy(run_id="new")):
            fails(train.main, arguments, capsys, "another process")
    for number in (1, 2):
        assert train.main([*toy(max_steps=4, seed=number), "--overwrite"]) == 0
        assert f"toy.old-{number}" in capsys.readouterr().out
    old = contents(Path("checkpoints/toy.old-1"))
    assert len(old) == 5 and {*old.values()} <= {*before.values()}
    assert [state_of(name).config.seed for name in ("toy.old-2", "toy")] == [1, 2]
