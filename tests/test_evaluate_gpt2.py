"""A run on disk, the metrics against enumeration and closed forms, sampling, and every command."""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails, flip, toy_config
from test_model import BOTH, TOY, toy_model

import evaluate_gpt2 as e
import lora
import quant
import train_gpt2_fusion as train
from data_loader import (UserError, load_config, read_tensors, token_bytes, tokenizer,
                         validation_rows, write_tensors)
from evaluate_gpt2 import Run, State
from model import GPT, autocast, block_of, confident_step, reverse_step, sample_tokens

SMALL = {"vocab_size": 3, "seq_len": 4}


def out(capsys, *arguments):
    """What evaluate_gpt2.py prints with these arguments, which must succeed."""
    capsys.readouterr()
    assert e.main(arguments) == 0
    return capsys.readouterr().out


def set_config(run, section, **values):
    """Change a run's config.json. -> the Run as it is now"""
    path = run.folder / "config.json"
    tree = json.loads(path.read_text())
    tree[section] |= values
    path.write_text(json.dumps(tree))
    return Run(run.folder)


# --- a run on disk ---------------------------------------------------------------------------


def test_a_run_is_also_named_by_one_of_its_files(run, capsys):
    for name in ("config.json", "eval.json", "checkpoint.safetensors"):
        assert Run.named(run.folder / name).folder == run.folder
    fails(e.main, ["--run", ""], capsys, "name a run")
    fails(e.main, ["--run", "~nobody-of-this-name/x"], capsys, "no run")


def test_a_run_is_named_by_name_by_path_or_is_the_newest(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("toy", "checkpoints/toy", "./checkpoints/toy/", "~/checkpoints/toy",
                 tmp_path / "checkpoints/toy"):
        found = Run.named(name)
        assert found.folder.samefile(run.folder) and found.name == "toy"
    assert str(Run.named("toy")) == str(Run.named("checkpoints/toy")) == "toy"
    shutil.copytree(run.folder, "elsewhere/of mine")
    found = Run.named("elsewhere/of mine")
    assert str(found) == "'elsewhere/of mine'" and found.name == "of mine"
    assert Run.named(shlex.split(str(found))[0]).folder == found.folder
    shutil.copytree(run.folder, "checkpoints/not this")
    for number, name in enumerate(("toy", "not this", "toy")):
        os.utime(Path("checkpoints", name, "metrics.jsonl"), (number, 10**9 + number))
        assert Run.named(None).name == name or number == 0
        assert str(Run.named(None)) == shlex.quote(Run.named(None).name)
    with pytest.raises(UserError, match="no run 'none'; there are: not this, toy$"):
        Run.named("none")
    shutil.rmtree("checkpoints")
    with pytest.raises(UserError, match="no run in checkpoints/; train one first"):
        Run.named(None)
    with pytest.raises(UserError, match="no run 'toy'; there are: none$"):
        Run.named("toy")


def test_a_damaged_or_older_config_json_ends_in_one_line(run, capsys):
    path = run.folder / "config.json"
    good = path.read_bytes()
    tree = json.loads(good)
    older = json.loads(good)  # the first edition kept these under `model`
    for key in ("total_blocks", "block_size", "block_mask_ranges", "time_step_mask_fractions"):
        older["model"][key] = older["training"].pop(key)
    del tree["training"]["qlora_rank"]
    for data, word in (
        (good[:-30], "line"), (b"[1]", ""), (b'"text"', ""), (b"\xff", "utf-8"),
        (b"{}", "tokens_sha256"), (json.dumps(tree).encode(), "training.qlora_rank is missing"),
        (good.replace(b'"n_heads"', b'"heads"'), "model.heads"),
        (good.replace(b'"n_heads": 2', b'"n_heads": 3'), "n_heads 3"),
        (json.dumps(older).encode(), "model.total_blocks"),
    ):  # fmt: skip
        path.write_bytes(data)
        fails(e.main, ["sample"], capsys, path, "damaged or of another version of this code", word)


def test_metrics_with_a_damaged_line(run, capsys):
    path = run.folder / "metrics.jsonl"
    good = path.read_bytes()
    events = [json.loads(line)["event"] for line in good.splitlines()]
    assert [line["event"] for line in run.metrics()] == events
    assert len(run.metrics("step")) == events.count("step") == 11  # 20 steps, one stage ends odd
    path.write_bytes(good + b'{"event": "st')  # a kill in the middle of a line
    assert [line["event"] for line in run.metrics()] == events
    before = (run.folder / "eval.json").read_bytes()
    for damaged in (good.replace(b'"event"', b'"event', 1), b"[1]\n" + good, b"\xff\n" + good):
        path.write_bytes(damaged)
        fails(e.main, [], capsys, path, "line 1 is damaged")
    assert (run.folder / "eval.json").read_bytes() == before
    path.unlink()
    assert run.metrics() == []


def test_metrics_are_cut_back_to_what_a_checkpoint_counts(run):
    path = run.folder / "metrics.jsonl"
    good, size = path.read_bytes(), run.state().metrics_bytes
    assert size == len(good)
    run.record("step", loss=1.0)
    assert run.metrics()[-1] == {"event": "step", "loss": 1.0}
    run.cut_metrics(size)
    assert path.read_bytes() == good
    path.write_bytes(good[:-1])
    with pytest.raises(UserError, match="metrics.jsonl is shorter than the checkpoint says"):
        run.cut_metrics(size)


def test_damaged_or_missing_weights_are_named(run, capsys):
    backup = run.folder / "backup"
    for path in (run.folder / "checkpoint.safetensors", backup / "block_1.safetensors"):
        good = path.read_bytes()
        for position in (3, len(good) // 2, len(good) - 1):
            flip(path, position)
            fails(e.main, ["sample", "a"], capsys, path, "damaged")
            path.write_bytes(good)
        path.write_bytes(good[: len(good) // 2])
        fails(e.main, ["sample", "a"], capsys, path, "damaged")
        path.write_bytes(good)
    path = backup / "block_1.safetensors"
    run.back_up(run.load("fp32"), 0, step=99)  # whole, but of another moment
    fails(e.main, ["sample"], capsys, backup / "block_0.safetensors", "is not the one that",
          "checkpoint.safetensors")
    path.rename(backup / "block_0.safetensors")
    fails(e.main, ["sample"], capsys, backup / "block_0.safetensors", "is not the one that")
    (backup / "block_0.safetensors").unlink()
    fails(e.main, ["sample"], capsys, backup / "block_0.safetensors", "is missing")
    (run.folder / "checkpoint.safetensors").unlink()
    fails(e.main, ["sample"], capsys, "run toy has no checkpoint yet", "--resume")


def test_tensors_that_do_not_fit_config_json_are_named(run):
    """A backup with a tensor too few, too many or of another shape, which the checkpoint counts."""
    checkpoint = run.folder / "checkpoint.safetensors"
    backup = run.folder / "backup" / "block_1.safetensors"
    whole, facts, seal = read_tensors(backup)
    adapter, linear = "h.0.attn.c_attn.lora_A.1", "h.2.mlp.c_fc.weight"
    for name in (adapter, linear):
        assert name in whole
    for named, tensors in (
        (adapter, {n: t for n, t in whole.items() if n != adapter}),
        (linear, {n: t for n, t in whole.items() if n != linear}),
        ("extra", whole | {"extra": torch.zeros(1)}),
        ("h.4.ln_1.bias", whole | {"h.4.ln_1.bias": torch.zeros(32)}),  # of a block to come
        (linear, whole | {linear: torch.zeros(32, 32)}),
        (None, whole),
    ):
        state = run.state()
        state.backups[1] = write_tensors(backup, tensors, facts)
        write_tensors(checkpoint, {}, dataclasses.asdict(state))
        if named is None:
            assert state.backups[1] == seal and run.load().blocks == 3
            continue
        with pytest.raises(UserError, match=f"block_1.* does not fit config.json: {named}$"):
            run.load()


def same(a, b):
    """Whether two {name: tensor} are equal, bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_a_run_comes_back_from_disk_bit_for_bit(tmp_path, toy):
    """In the middle of a stage and at its end, block 0 stored in int4 and adapted."""
    config = load_config(overrides=toy(training__quantization_type="int4"))
    run = Run.start(tmp_path / "new", config, "0" * 64)
    assert (run.config, run.tokens_sha256) == (config, "0" * 64)
    assert run.state() is None and run.resume() == (None, None, None)
    model, state, training = GPT(config.model, blocks=0), State(), config.training
    tokens = np.random.default_rng(0).integers(256, size=4000).astype(np.uint16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for stage in train.fusion_schedule(config.model, training)[:2]:
        train.grow(model, training)
        optimizer = train.begin_stage(model, stage, training)
        for step in range(2):
            batch = train.batch_of(tokens, config.model, training, stage, step)
            train.train_step(train.stage_loss(model, stage), optimizer, scaler, batch, training,
                             torch.device("cpu"), torch.float32)
            run.record("step", stage=stage.block, step=step)
        (run.folder / "eval.json").write_text("of the model before")
        state.stage, state.step, state.seconds, state.scaler = stage.block, 2, 1 / 3, {"scale": 2.0}
        run.save(model, optimizer, state)
        assert not (run.folder / "eval.json").exists()
        again, found, kept = run.resume()
        assert found == state == run.state() and found.blocks == stage.block + 1
        assert found.metrics_bytes == (run.folder / "metrics.jsonl").stat().st_size > 0
        assert same(again.state_dict(), model.state_dict())
        expected = {f"{name}.{key}": tensor for name, p in model.named_parameters()
                    for key, tensor in optimizer.state.get(p, {}).items()}  # fmt: skip
        assert same(kept, expected) and len(kept) == 3 * sum(p.requires_grad
                                                             for p in model.parameters())
        exact = {n: p.clone() for n, p in model.block_parameters(stage.block).items()}
        train.store_blocks(run, model, stage.stored, state, 2)
        run.save(model, None, state)
        again, found, kept = run.resume()
        assert same(again.state_dict(), model.state_dict()) and kept == {}
        assert len(found.backups) == stage.block + 1
    tensors, facts, seal = read_tensors(run.folder / "backup" / "block_1.safetensors")
    assert seal == found.backups[1] and facts == {"block": 1, "step": 2, "config":
                                                  json.loads(json.dumps(config.tree()))}
    adapters = lora.adapter_parameters(model, 1)
    assert same(tensors, exact | adapters) and len(adapters) == 2 * 4 * 2
    full, _, _ = run.resume(precision="fp32")  # the backups' own values
    assert torch.equal(full.h[2].mlp.c_fc.dequantize(), exact["h.2.mlp.c_fc.weight"])
    assert not torch.equal(again.h[2].mlp.c_fc.dequantize(), exact["h.2.mlp.c_fc.weight"])


def test_a_run_that_has_not_ended(run, capsys):
    begun = Run.start("checkpoints/begun", run.config, run.tokens_sha256)
    fails(e.main, ["--run", "begun"], capsys, "run begun has no checkpoint yet", "--resume")
    begun.save(GPT(run.config.model, blocks=2), None, State(stage=1))
    for command in (["report", "--precision", "int4"], ["precision"],
                    ["sample", "--precision", "fp16"]):
        fails(e.main, [*command, "--run", "begun"], capsys, "has not ended", "--resume")
    fails(e.main, ["sample", "--run", "begun", "--exit", "2"], capsys, "there are 0 to 1")
    printed = out(capsys, "--run", "begun")
    assert "note: training has not ended; only exits 0 to 1 exist" in printed
    result = begun.evaluation()
    assert [step["block"] for step in result["time_steps"]] == [0] * 4 + [1] * 9
    assert len(result["left_to_right"]) == 2 and result["train_seconds"] == 0


def test_a_text_that_changed_since_the_run_was_begun_is_refused(run, tmp_path, capsys):
    text = tmp_path / "mine.txt"
    shutil.copy(run.config.data.source, text)
    mine = set_config(run, "data", source=str(text), folder=str(tmp_path / "data"))
    train_tokens, val_tokens = mine.tokens()
    assert np.array_equal(train_tokens, run.tokens()[0]) and len(val_tokens) > 1000
    text.write_text(text.read_text().replace("1.", "2.", 1))
    before = (run.folder / "eval.json").read_bytes()
    for command in ([], ["precision"]):
        fails(e.main, command, capsys, "mine.txt has changed since run toy was begun")
    assert (run.folder / "eval.json").read_bytes() == before
    assert out(capsys, "sample", "--length", "3")  # needs no text


def test_a_run_is_locked_for_one_process(tmp_path):
    folder = tmp_path / "new" / "run"
    lock = Run.lock(folder)
    with pytest.raises(UserError, match="run run is being trained by another process"):
        Run.lock(folder)
    lock.close()
    Run.lock(folder).close()


# --- metrics ---------------------------------------------------------------------------------


def enumerated_ce(model, rows, m, block):
    """CE(m) of rows (R, T), or of one row (T,), by its definition: every mask with its probability.
    Returns (R,) or a scalar, float64."""
    n = rows.size(-1) - 1
    patterns = torch.tensor([*itertools.product([False, True], repeat=n)])  # (2^n, n)
    mask = torch.cat([torch.zeros(len(patterns), 1, dtype=torch.bool), patterns], dim=1)
    x_0 = rows[..., None, :].expand(*rows.shape[:-1], *mask.shape)  # (R, 2^n, T)
    x_t = x_0.masked_fill(mask, model.config.mask_id).reshape(-1, n + 1)
    logits = model(x_t, block)[:, :-1].double()
    ce = -torch.log_softmax(logits, -1).gather(2, x_0.reshape(-1, n + 1)[:, 1:, None])
    ce = ce.view(*x_0.shape[:-1], n)  # (R, 2^n, n)
    chance = torch.where(patterns, m, 1 - m).double().prod(1)  # (2^n,)
    return (chance * (ce * patterns).sum(-1)).sum(-1) / (m * n)


def enumerated_nelbo_12(model, rows):
    edges = [0.0, *model.config.time_step_mask_fractions, 1.0]
    return sum(
        (high - low) * enumerated_ce(model, rows, high, block_of(high, model.config))
        for low, high in zip(edges, edges[1:])
    )


@torch.no_grad()
@BOTH
def test_nelbo_12_is_the_enumerated_value(attention, monkeypatch):
    """Time steps that are quarters, and the 4^3 grid of uniform numbers for three positions, give
    every mask as often as its probability says, so the estimate has no error left."""
    quarters = SMALL | {"time_step_mask_fractions": (0.25, 0.5, 0.75)}
    grid = torch.tensor([*itertools.product([0.5], *[[0.125, 0.375, 0.625, 0.875]] * 3)])  # (64, 4)
    monkeypatch.setattr(e, "row_noise", lambda *args, **kwargs: grid)
    for scale, row in ((4.0, [0, 2, 1, 2]), (4.0, [1, 0, 0, 2]), (0.0, [2, 1, 1, 0])):
        model, row = toy_model(attention_mode=attention, scale=scale, **quarters), torch.tensor(row)
        bound, table = e.nelbo_12(model, row.repeat(64, 1), seed=0)
        bound = bound.mean().item()
        assert bound == pytest.approx(enumerated_nelbo_12(model, row).item(), abs=2e-6)
        assert [step["layers"] for step in table] == [2, 4, 6, 6]  # depth by noise
        assert table[-1]["mask_fraction"] == 1.0
    assert bound == pytest.approx(math.log(3), abs=1e-6)  # uniform; less without the term at m = 1


@torch.no_grad()
@BOTH
def test_nelbo_12_estimates_the_enumerated_value(attention):
    model = toy_model(attention_mode=attention, scale=4.0, **SMALL)
    row = torch.tensor([0, 2, 1, 2])
    bounds = [e.nelbo_12(model, row.repeat(6, 1), seed=seed)[0].mean() for seed in range(8)]
    error = np.std(bounds, ddof=1) / math.sqrt(8)
    assert abs(np.mean(bounds) - enumerated_nelbo_12(model, row)) < 4 * error + 1e-6
    assert error < 0.4


@torch.no_grad()
@BOTH
def test_draws_of_masks_come_over_every_position_equally_often(attention, monkeypatch):
    model, masks = toy_model(attention_mode=attention), []

    def score(model, rows, m, block, noise, tick):
        masks.append(noise < m[:, None])
        return torch.zeros(len(rows)), torch.zeros(len(rows))

    monkeypatch.setattr(e, "score", score)
    for m in (0.1, 0.3, 0.85, 1.0):
        masks.clear()
        e.score_at(model, torch.zeros(50, 16).long(), m, 0, e.row_noise(50, 16, seed=0, tag=0))
        often = torch.stack(masks).sum(0)  # (50, 16)
        if attention == "causal" or m == 1:
            assert len(masks) == 1
        else:
            assert len(masks) == math.ceil(2 / m)
            assert set(often.unique().tolist()) <= {math.floor(len(masks) * m + 1e-6),
                                                    math.ceil(len(masks) * m - 1e-6)}
        assert masks[0].float().mean().item() == pytest.approx(m, abs=0.06)


@torch.no_grad()
@BOTH
def test_the_bound_is_a_bound(attention):
    """exp(-NELBO) summed over all texts is at most 1, and exactly 1 for uniform predictions (which
    would exceed 1 if the term at m = 1 were left out)."""
    for scale, first in ((0.0, 1), (4.0, 0), (4.0, 1), (4.0, 2)):
        model = toy_model(attention_mode=attention, scale=scale, **SMALL)
        texts = torch.tensor([[first, *rest] for rest in itertools.product(range(3), repeat=3)])
        total = torch.exp(-3 * enumerated_nelbo_12(model, texts)).sum().item()
        assert total == pytest.approx(1, abs=1e-5) if scale == 0 else total <= 1
    uniform = toy_model(attention_mode=attention, scale=0.0, **SMALL)
    rows = torch.randint(3, (50, 4))
    if attention == "causal":  # bidirectional estimates are exact in expectation only
        assert e.nelbo_12(uniform, rows, seed=0)[0].mean() == pytest.approx(math.log(3), abs=1e-5)
    assert e.nelbo(uniform, rows, seed=0)[0] == pytest.approx(math.log(3), abs=1e-5)


@torch.no_grad()
def test_left_to_right_is_a_distribution():
    model = toy_model(scale=4.0, **SMALL)
    for first in range(3):
        totals = np.zeros(3)  # one per exit
        for rest in itertools.product(range(3), repeat=3):
            exits = e.left_to_right(model, torch.tensor([[first, *rest]]))
            totals += np.exp(-3 * exits[:, 0].numpy())
        assert totals == pytest.approx(1, abs=1e-5)
    bidirectional = toy_model(attention_mode="bidirectional", **SMALL)
    assert e.left_to_right(bidirectional, torch.zeros(1, 4, dtype=torch.long)) is None


@torch.no_grad()
def test_both_ways_is_unbiased():
    """Over every number of masks and every order of the positions its mean is the integral of the
    enumerated CE(m), a quadratic for three positions, so that two points of Gauss are exact."""
    one_block = {"total_blocks": 1, "block_size": 6, "block_mask_ranges": ((0.0, 1.0),)}
    model = toy_model(attention_mode="bidirectional", scale=4.0, **SMALL, **one_block)
    every = [*itertools.product(range(3), itertools.permutations((0.1, 0.5, 0.9)))]  # 3 x 6
    strata = torch.tensor([(n + 0.5) / 3 for n, _ in every], dtype=torch.float64)
    noise = torch.tensor([[0.0, *order] for _, order in every])
    points, weights = np.polynomial.legendre.leggauss(2)
    for row in ([0, 2, 1, 2], [1, 0, 0, 2]):
        row = torch.tensor(row)
        by_row = e.both_ways(model, row.repeat(18, 1), strata, noise.clone(),
                             np.random.default_rng(0), lambda n: None)
        exact = sum(w / 2 * enumerated_ce(model, row, (1 + x) / 2, 0)
                    for x, w in zip(points, weights))  # fmt: skip
        assert by_row.mean().item() == pytest.approx(exact.item(), abs=1e-6)
        assert by_row.std() > 0.1  # not by being constant


@torch.no_grad()
def test_scoring_every_position_or_the_masked_ones_agrees():
    """A causal model may be scored either way; `attention_mode` alone says which to the metrics.
    Both bounds, 12 seeds: within 4 standard errors. Every position is the surer way; for NELBO_12
    the draws of masks, evenly spread, make up for it."""
    model = toy_model(scale=4.0)
    rows = torch.randint(5, (6, 8), generator=torch.Generator().manual_seed(0))
    figures = {}
    for way in ("causal", "bidirectional"):  # the layers stay causal, as they were built
        model.config = dataclasses.replace(model.config, attention_mode=way)
        figures[way] = np.array([
            (e.nelbo_12(model, rows, seed)[0].mean(), e.nelbo(model, rows, seed, replicates=2)[0])
            for seed in range(12)])  # fmt: skip
    every, masked = figures.values()
    errors = [way.std(0, ddof=1) / math.sqrt(12) for way in (every, masked)]
    assert (abs(every.mean(0) - masked.mean(0)) < 4 * np.hypot(*errors)).all()
    assert errors[0][1] < 0.7 * errors[1][1] and max(errors[1]) < 0.2
    assert errors[1][0] < 1.4 * errors[0][0]


@torch.no_grad()
@BOTH
def test_the_continuous_bound_covers_the_integral(attention):
    """Of 40 seeds, the 95 % and 50 % intervals (8 replicates: Student's t with 7 degrees) hold the
    midpoint rule's value of the enumerated integral as often as they say (p < 0.002 each)."""
    model = toy_model(attention_mode=attention, scale=4.0, **SMALL)
    row = torch.tensor([0, 2, 1, 2])
    grid = [(i + 0.5) / 400 for i in range(400)]
    exact = np.mean([enumerated_ce(model, row, m, block_of(m, model.config)) for m in grid])
    inside = np.zeros(2)
    for seed in range(40):
        mean, stderr = e.nelbo(model, row.repeat(3, 1), seed)
        inside += abs(mean - exact) < np.array([2.365, 0.711]) * stderr
    assert inside[0] >= 33 and 10 <= inside[1] <= 30


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_figures_do_not_depend_on_the_rows_beside_it(attention, dtype):
    """To the last digit. At these sizes products of other shapes do differ in it."""
    model, rows = toy_model(attention_mode=attention), torch.randint(5, (30, 8))
    noise = e.row_noise(30, 8, 3, 0)
    with autocast(torch.device("cpu"), dtype):
        for m in (0.1, 0.5, 1.0):
            m = torch.full((30,), m)
            together = e.score(model, rows, m, 2, noise)
            for size in (1, 7, 20):
                parts = [e.score(model, rows[i : i + size], m[i : i + size], 2, noise[i : i + size])
                         for i in range(0, 30, size)]
                for whole, split in zip(together, zip(*parts)):
                    assert torch.equal(whole, torch.cat(split))
    assert e.evaluate(model, rows[:3], 3, "bf16") == e.evaluate(model, rows[:3], 3, "bf16")


@torch.no_grad()
@pytest.mark.parametrize("kind", quant.KINDS)
def test_expanding_the_weights_changes_no_bit(kind):
    model = toy_model()
    lora.add_adapters(model, 1, [0, 1], rank=2, alpha=4.0)
    for name, parameter in lora.adapter_parameters(model, 1).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    quant.freeze_block(model, 0, kind)
    rows = torch.randint(5, (4, 8))
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), dtype):
            expanded = e.expand(model, dtype)
            for block in range(3):
                assert torch.equal(model(rows, block), expanded(rows, block))
    assert not any(isinstance(m, quant.QuantLinear) for m in expanded.modules())
    assert any(isinstance(m, quant.QuantLinear) for m in model.modules())


def test_unigram_entropy_by_hand():
    # counts + 1 over ids 0, 1, 2: 3, 2, 1 of 6
    expected = -(math.log(3 / 6) + math.log(1 / 6)) / 2
    assert e.unigram_entropy([0, 0, 1], [0, 2], 3) == pytest.approx(expected)


# --- the machine -----------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:1", "auto"):
        assert e.pick_device(name).type == "cuda"
    for name in ("cuda:2", "cuda:x", "cpu:x", "gpu"):
        with pytest.raises(UserError, match=f"device '{name}' is unknown or not available"):
            e.pick_device(name)


def no_proc(monkeypatch, ps):
    """As on a machine without /proc; `ps` stands for subprocess.run."""
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: "proc" not in path.parts and real(path))
    monkeypatch.setattr(subprocess, "run", ps)


def test_memory_in_use_as_ps_tells_it(monkeypatch):
    said = []
    no_proc(monkeypatch, lambda command, **how: SimpleNamespace(stdout=said.pop(0)))
    cpu = torch.device("cpu")
    said += [b"3072\n", b"  2048\n", b"1024\n", b"4096\n", b"1024\n", b""]
    monkeypatch.setattr(e.memory_mib, "peak", 0.0)  # as at the start: the plan asks before a reset
    assert e.memory_mib(cpu) == (3, 3)
    assert e.memory_mib(cpu, reset=True) == (2, 2)
    assert [e.memory_mib(cpu) for _ in range(2)] == [(1, 2), (4, 4)]
    assert e.memory_mib(cpu, reset=True) == (1, 1)
    assert e.memory_mib(cpu) == (None, None)  # a ps that does not know these options


def test_memory_that_is_not_known_is_a_dash(toy, tmp_path, monkeypatch, capsys):
    def no_ps(*args, **how):
        raise FileNotFoundError(2, "No such file or directory", "ps")

    no_proc(monkeypatch, no_ps)
    monkeypatch.chdir(tmp_path)
    assert e.memory_mib(torch.device("cpu"), reset=True) == (None, None)
    assert train.main(toy(training__max_steps=4)) == 0
    printed = capsys.readouterr().out
    assert "-/s" not in printed and re.search(r"tokens/s +- MiB", printed)
    run = Run.named("toy")
    assert {line["memory_mib"] for line in run.metrics("step")} == {None}
    stages = run.evaluation()["memory"]["stages"]
    assert [stage["peak_mib"] for stage in stages] == [None] * 3
    assert [row["peak_mib"] for row in table_in(printed, "stage  steps")[:3]] == ["-"] * 3
    (row,) = table_in(out(capsys, "compare", "toy"), "run ")[:1]
    assert row["peak_mib"] == "-" and float(row["held_mib"]) > 0


def test_memory_is_counted_from_the_tensors():
    config = toy_config()
    d, layer = 32, 4 * (12 * 32 * 32 + 13 * 32)  # bytes in fp32
    model = GPT(config, blocks=2)
    quant.freeze_block(model, 0, "fp16")
    lora.add_adapters(model, 1, [0], rank=4, alpha=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    held = {kind: round(size * e.MIB) for kind, size in e.memory(model, optimizer).items()}
    adapters, own = 4 * 4 * 16 * d, layer + 4 * 2 * d
    assert held.pop("total") == sum(held.values())
    assert held == {
        "embeddings": 2 * (config.padded_vocab_size + config.seq_len) * d, "adapters": adapters,
        "frozen": layer - 2 * 12 * d * d + 4 * 2 * d, "trainable": own,
        "gradients": adapters + own, "optimizer": 2 * (adapters + own) + 4 * (8 + 14),
    }  # fmt: skip
    assert e.memory(model)["gradients"] == e.memory(model)["optimizer"] == 0


# --- sampling --------------------------------------------------------------------------------


def canvas(config, prompt, n_masks, rows=1):
    return torch.tensor([prompt + [config.mask_id] * n_masks] * rows)


@BOTH
@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_windows_are_written_by_the_whole_reverse_process_each(attention, order, window):
    """Two rows, as the steps of model.py write them one window after another, with [MASK] to the
    right: the same draws, and the same count of layers."""
    model = toy_model(attention_mode=attention, seq_len=64)
    mask, steps = model.config.mask_id, [*model.config.time_step_mask_fractions[::-1], 0.0]
    x = canvas(model.config, [1, 4], 61, rows=2)
    x[:, 30] = 3  # a blank ends here
    seen = []
    ids, layers = e.sample(model, x, order, window, seed=1, watch=lambda x: seen.append(x.clone()))
    assert (x == mask).sum() == 2 * 60  # the argument is left alone
    assert (ids[:, :2] == torch.tensor([1, 4])).all() and (ids[:, 30] == 3).all()
    assert ids.max() < TOY.vocab_size and not torch.equal(ids[0], ids[1])

    draws = {"top_p": 0.95, "generator": torch.Generator().manual_seed(1)}
    expected, n_layers, shown = x.clone(), torch.zeros(2), [x]
    places = (x[0] == mask).nonzero().flatten().tolist()
    for start in range(0, 60, window or 60):
        own = places[start : start + (window or 60)]
        right = own[-1] + 1
        for m_t, m_s in itertools.pairwise(steps):
            owner = 0 if m_t <= 0.4 else 1 if m_t <= 0.7 else 2  # depth by noise
            before = expected.clone()
            left = before[:, :right] if attention == "causal" else before
            if order == "ancestral":
                after = reverse_step(model, left, m_t, m_s, owner, right, **draws)
            else:
                after = confident_step(model, left, round(m_s * len(own)), owner, right, **draws)
                assert (after[:, own] == mask).sum() == 2 * round(m_s * len(own))
            expected[:, :right] = after[:, :right]
            was_shown = before != mask
            assert torch.equal(before[was_shown], expected[was_shown])  # nothing is taken back
            assert (expected[:, right:] == x[:, right:]).all()
            changed = (before != expected).any(1)
            n_layers += changed * 2 * (owner + 1)
            shown += [expected.clone()] if changed.any() else []
        assert not (expected[:, :right] == mask).any()
    assert torch.equal(ids, expected) and layers.tolist() == n_layers.tolist()
    assert len(seen) == len(shown) and all(map(torch.equal, seen, shown))
    assert torch.equal(ids, e.sample(model, x, order, window, seed=1)[0])
    assert not torch.equal(ids, e.sample(model, x, order, window, seed=2)[0])
    if window is None:
        assert torch.equal(ids, e.sample(model, x, order, 60, seed=1)[0])


def test_windows_of_one_token_are_left_to_right():
    """By confidence draw for draw; by ancestral sampling in distribution."""
    model = toy_model()
    x = canvas(model.config, [1, 4], 3, rows=2000)
    for exit_k in (0, 2):
        one = e.sample(model, x, "confidence", 1, exit_k, seed=3)[0]
        assert torch.equal(one, e.sample(model, x, "left-to-right", exit_k=exit_k, seed=3)[0])
        other = e.sample(model, x, "ancestral", 1, exit_k, seed=4)[0]
        for place in (2, 4):
            shares = [ids[:, place].bincount(minlength=TOY.vocab_size) / 2000
                      for ids in (one, other)]  # fmt: skip
            # A share of 0.2 has a standard error of 0.009.
            torch.testing.assert_close(*shares, atol=0.05, rtol=0)


def test_confidence_reveals_the_likeliest_draws_first():
    """At temperature 0 the draws are the likeliest tokens, and those shown have the highest p."""
    model = toy_model(attention_mode="bidirectional")
    x = canvas(model.config, [3], 7)
    for exit_k in (0, 2):
        seen = []
        e.sample(model, x, "confidence", exit_k=exit_k, steps=2, temperature=0.0,
                 watch=lambda x: seen.append(x[0].clone()))
        p, token = torch.softmax(model(x, exit_k)[0, :-1], -1).max(-1)
        shown = torch.zeros(7, dtype=torch.bool).index_fill(0, p.topk(3).indices, True)
        assert torch.equal(seen[1][1:] != model.config.mask_id, shown)  # 7 - round(7 / 2)
        assert torch.equal(seen[1][1:][shown], token[shown])


def test_top_p_draws_in_proportion_also_from_flat_rows():
    """A nucleus of .5, .3, .15 is drawn with these shares (standard deviation below 0.02); that of
    10,000 nearly equal tokens, the likeliest first, goes beyond the 8,192 looked at first."""
    peaked = torch.full((10_000,), 1e-9)
    peaked[[7, 3, 9000]] = torch.tensor([0.5, 0.3, 0.15])
    flat = torch.linspace(1.001e-4, 0.999e-4, 10_000)
    logits = torch.stack([flat] * 500 + [peaked] * 1000).log()
    drawn = sample_tokens(logits, 1.0, 0.9, torch.Generator().manual_seed(0))
    shares = [(drawn[500:] == token).double().mean().item() for token in (7, 3, 9000)]
    assert shares == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95], abs=0.06)
    assert sum(shares) == pytest.approx(1) and drawn[:500].max() < 9010
    assert 20 < (drawn[:500] >= 8192).sum() < 80  # about 0.8 / 9 of 500


def test_left_to_right_writes_one_token_after_another_from_any_exit():
    """Blanks too. At temperature 0 each token is the likeliest one after what stands before it."""
    model = toy_model()
    x = torch.tensor([[3, TOY.mask_id, 1, TOY.mask_id, TOY.mask_id, 0, TOY.mask_id]])
    for block in range(3):
        seen = []
        ids, layers = e.sample(model, x, "left-to-right", exit_k=block, temperature=0.0,
                               watch=lambda x: seen.append(x.clone()))
        assert ids[0, [0, 2, 5]].tolist() == [3, 1, 0] and layers == 4 * 2 * (block + 1)
        for i in (1, 3, 4, 6):
            assert ids[0, i] == model(ids[:, :i], block)[0, -1].argmax()
        assert [(x == TOY.mask_id).sum() for x in seen] == [4, 3, 2, 1, 0]
    assert torch.equal(e.sample(model, x, "left-to-right", temperature=0.0)[0], ids)  # the last
    assert (x == TOY.mask_id).sum() == 4


# --- tables ----------------------------------------------------------------------------------


def test_a_table_has_text_left_and_numbers_right():
    lines = []
    rows = [{"name": "a", "n": 1200, "list": [0.5, None], "share": None},
            {"name": "long one", "n": 7, "list": [], "share": 0.125}, {"name": None}]
    e.print_table({"name": "", "n": ",d", "list": ".2f", "share": ".1%"}, rows, lines.append)
    assert lines == [
        "name          n    list  share",
        "a         1,200  0.50 -      -",
        "long one      7          12.5%",
        "-             -       -      -",
    ]


def table_in(printed, start):
    """The rows of the printed table whose first line begins with `start`: dicts of cells."""
    lines = printed.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    columns = re.split("  +", lines[first])
    rows = [re.split("  +", line.strip()) for line in itertools.takewhile(bool, lines[first + 1 :])]
    return [dict(zip(columns, row)) for row in rows]


def agree(row, values):
    """Whether every cell of a printed row is the value under its key, rounded."""
    for key, cell in row.items():
        value = values[key]
        if value is None or isinstance(value, str):
            assert cell == (value or "-"), key
            continue
        values_of_cell = value if isinstance(value, list) else [value]
        for part, exact in zip(cell.split(), values_of_cell, strict=True):
            digits = part.replace(",", "").rstrip("%")
            unit = 0.01 if "%" in part else 1
            half = 0.501 * unit * 10 ** -len(digits.partition(".")[2])
            assert abs(float(digits) * unit - exact) <= half, (key, cell, value)


def test_eval_json_holds_what_is_printed(run, capsys):
    (run.folder / "eval.json").unlink()
    printed = out(capsys)
    result = run.evaluation()
    assert result.keys() == e.EVALUATION_KEYS | {"losses", "precision"}
    total = result["memory"]["weights"]["total"]
    assert printed.startswith(f"\ntoy (fused, frozen), weights in fp16, {total:.1f} MiB; "
                              f"8 validation rows of {run.config.data.source}\n")  # fmt: skip
    assert "written to checkpoints/toy/eval.json" in printed and result["rows"] == 8
    for start, rows in (
        ("mask_fraction ", result["time_steps"]), ("loss ", result["losses"]),
        ("stage  steps", result["memory"]["stages"]),
    ):  # fmt: skip
        table = table_in(printed, start)[: len(rows)]
        assert len(table) == len(rows) > 0 and len(table[0]) >= 5
        for row, values in zip(table, rows):
            agree(row, values)
    config = run.config.model
    assert [step["mask_fraction"] for step in result["time_steps"]] == [
        *config.time_step_mask_fractions, 1.0]  # fmt: skip
    assert [step["layers"] for step in result["time_steps"]] == [2] * 4 + [4] * 3 + [6] * 6
    assert [row["nats_per_token"] for row in result["losses"]] == [
        result["nelbo_12"], result["nelbo"], *result["left_to_right"], result["unigram"]]
    stages = result["memory"]["stages"]
    assert stages == run.metrics("stage") and [stage["steps"] for stage in stages] == [10, 5, 5]
    assert result["train_tokens"] == 20 * 4 * 32
    assert result["train_seconds"] == sum(stage["seconds"] for stage in stages)
    assert result["config"] == json.loads(json.dumps(run.config.tree()))
    # The units: here a token is one byte, but for <|endoftext|>, which has none.
    rows = validation_rows(run.tokens()[1], config.seq_len, 8)[:, 1:]
    bytes_per_token = (rows < 256).double().mean().item()
    assert bytes_per_token == token_bytes(tokenizer(257))[rows].mean()
    for row in result["losses"]:
        nats = row["nats_per_token"]
        assert row["perplexity"] == pytest.approx(math.exp(nats))
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_per_token)
    bits = {row["loss"].partition(":")[0]: row["bits_per_byte"] for row in result["losses"]}
    assert result["bits_per_byte"] == {"nelbo": pytest.approx(bits["nelbo"]), "left_to_right": min(
        bits[f"left to right, exit {k}"] for k in range(3))}  # fmt: skip


def test_eval_json_is_written_before_anything_is_printed(run):
    """A closed pipe or Ctrl-C in the tables loses nothing."""
    before = run.evaluation()
    (run.folder / "eval.json").unlink()

    def interrupted(*text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        e.report(run, run.load(), say=interrupted)
    again = run.evaluation()
    assert again == before  # the trained model's own report, to the last digit


def test_report_writes_where_it_is_told(run, monkeypatch, capsys, tmp_path):
    before = (run.folder / "eval.json").read_bytes()
    assert "weights in int4" in out(capsys, "report", "--precision", "int4")
    result = json.loads((run.folder / "eval_int4.json").read_text())
    assert result["precision"] == "int4" and result["nelbo_12"] != run.evaluation()["nelbo_12"]
    out(capsys, "--run", "toy", "--json", str(tmp_path / "new" / "a.json"))
    assert (tmp_path / "new" / "a.json").read_bytes() == before
    assert (run.folder / "eval.json").read_bytes() == before
    rows = []
    monkeypatch.setattr(e, "evaluate", lambda model, x, *how: rows.append(x) or {})
    for options, count in (([], 8), (["--full"], (len(run.tokens()[1]) - 1) // 31)):
        with pytest.raises(KeyError):  # as nothing was scored
            e.main(["report", *options])
        assert len(rows[-1]) == count


def test_precision_puts_every_storage_side_by_side(run, tmp_path, capsys):
    printed = out(capsys, "precision")
    table = json.loads((run.folder / "precision.json").read_text())
    rows = table_in(printed, "storage ")
    for row, values in zip(rows, table, strict=True):
        agree(row, values)
    fp32, fp16, int4, nf4 = table
    assert [row["storage"] for row in table] == [*quant.KINDS]
    assert (fp32["to_fp32"], fp32["signal_to_noise_db"]) == (0, None)
    assert (fp32["bits_per_weight"], fp16["bits_per_weight"]) == (32, 16)
    # Groups of 32 where a row has 32 weights (3 matrices in 4 of a layer): 4 + 32 / 32 bits.
    assert int4["bits_per_weight"] == pytest.approx(4 + (8 * 1 + 4 * 0.5) / 12)
    assert 4 < nf4["bits_per_weight"] < int4["bits_per_weight"]
    assert fp16["signal_to_noise_db"] > 70 > 24 > int4["signal_to_noise_db"] > 20
    assert fp16["layers_mib"] == fp32["layers_mib"] / 2 == 6 * 12 * 32 * 32 * 2 / e.MIB
    assert 0 < abs(fp16["to_fp32"]) < 1e-3 < abs(int4["to_fp32"]) + abs(nf4["to_fp32"])
    for row in table:
        assert row["to_fp32"] == row["nelbo_12"] - fp32["nelbo_12"]
        assert row["perplexity"] == math.exp(row["nelbo_12"])
    assert fp16["nelbo_12"] == run.evaluation()["nelbo_12"]
    out(capsys, "report", "--precision", "nf4", "--json", str(tmp_path / "nf4.json"))
    report = json.loads((tmp_path / "nf4.json").read_text())
    assert [report[key] for key in ("nelbo_12", "left_to_right")] == [
        nf4[key] for key in ("nelbo_12", "left_to_right")]  # fmt: skip
    assert report["memory"]["weights"]["total"] == nf4["weights_mib"]


def test_a_config_edited_by_hand_is_not_believed(run, capsys):
    for section, key, value in (("model", "n_heads", 4), ("training", "qlora_alpha", 1600.0),
                                ("training", "seed", 5),
                                ("training", "time_step_mask_fractions", [0.3, 0.6, 0.8, 1.0]),
                                ("training", "block_mask_ranges",
                                 [[0.7, 1.0], [0.4, 0.7], [0.0, 0.4]])):
        before = json.loads(json.dumps(run.config.tree()[section][key]))
        set_config(run, section, **{key: value})
        for command in ("report", "sample"):
            fails(e.main, [command], capsys, "config.json has been changed",
                  f"{section}.{key} was {before} and is now {value}")  # fmt: skip
        set_config(run, section, **{key: before})
    set_config(run, "training", log_interval=7)  # changes no figure
    assert out(capsys, "sample", "--length", "3")


def test_a_checkpoint_of_another_version_is_one_line(run, capsys):
    path = run.folder / "checkpoint.safetensors"
    tensors, facts, _ = read_tensors(path)
    write_tensors(path, tensors, facts | {"what_comes_next": 1})
    fails(e.main, ["sample"], capsys, path, "another version", "what_comes_next")


def test_a_loss_beyond_all_floats_has_a_perplexity(run, monkeypatch, capsys):
    assert e.perplexity(1.0) == math.e and e.perplexity(1e4) == math.exp(700)
    monkeypatch.setattr(e, "nelbo_12", lambda *_: (torch.full((8,), 1e4), []))
    assert "10000.000" in out(capsys)
    assert "10000.0000" in out(capsys, "precision")


def test_json_spares_the_files_of_a_run(run, tmp_path, capsys):
    whole = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    for name in ("config.json", "metrics.jsonl", "checkpoint.safetensors",
                 "backup/block_0.safetensors"):
        for command in ("report", "precision"):
            fails(e.main, [command, "--json", run.folder / name], capsys, name, "another name")
    fails(e.main, ["--json", run.folder / "config.json" / "x"], capsys, "is not a folder")
    assert whole == {path: path.read_bytes() for path in whole}


def test_standard_errors_are_over_the_rows(run, capsys):
    printed = out(capsys)
    result = run.evaluation()
    rows = np.array(result["by_row"]["nelbo_12"])
    assert len(rows) == 8 and result["nelbo_12"] == pytest.approx(rows.mean())
    assert result["nelbo_12_stderr"] == pytest.approx(rows.std(ddof=1) / math.sqrt(8))
    exits = np.array(result["by_row"]["left_to_right"])
    assert exits.shape == (3, 8) and result["left_to_right"] == pytest.approx(exits.mean(1))
    assert result["left_to_right_stderr"] == pytest.approx(exits.std(1, ddof=1) / math.sqrt(8))
    model, texts = run.load().eval(), validation_rows(run.tokens()[1], 32, 8)
    by_row = e.score(e.expand(model, torch.float32), texts, torch.full((8,), 0.99), 2,
                     e.row_noise(8, 32, 0, tag=0))[0]  # fmt: skip
    assert result["time_steps"][-2]["stderr"] == pytest.approx(e.standard_error(by_row))
    assert f"by the masks drawn +- {result['nelbo_stderr']:.4f}" in printed
    assert e.standard_error(torch.ones(1)) is None


def test_compare_pairs_runs_row_by_row(run, capsys):
    """A difference that is the same on every row is sure; one that rows disagree on is not."""
    for name, change in (("sure", lambda row: 0.01 + row % 2 / 1000),
                         ("unsure", lambda row: (-1) ** row / 100)):  # fmt: skip
        shutil.copytree(run.folder, f"checkpoints/{name}")
        result = run.evaluation()
        for rows in (result["by_row"]["nelbo_12"], *result["by_row"]["left_to_right"]):
            rows[:] = [value + change(row) for row, value in enumerate(rows)]
        Path(f"checkpoints/{name}/eval.json").write_text(json.dumps(result))
    printed = out(capsys, "compare", "toy", "sure", "unsure")
    table = table_in(printed, "run     loss")
    assert [(row["run"], row["loss"]) for row in table] == [
        *itertools.product(("sure", "unsure"), ("nelbo_12", "left_to_right"))]  # fmt: skip
    assert [row["difference"] for row in table] == ["+0.011", "+0.011", "+0.000", "+0.000"]
    assert [row["beyond two of them"] for row in table] == ["yes", "yes", "no", "no"]
    set_config(Run.named("sure"), "model", seq_len=16)
    assert "beyond" not in out(capsys, "compare", "toy", "sure")  # other rows


def test_an_unfinished_run_is_compared_with_a_note(run, monkeypatch, capsys):
    result = run.evaluation()
    result["memory"]["stages"].pop()
    (run.folder / "eval.json").write_text(json.dumps(result))
    assert "note: not trained to the end: toy;" in out(capsys, "compare", "toy")


def test_compare_puts_runs_side_by_side(run, capsys):
    for name in ("next", "a copy"):
        shutil.copytree(run.folder, f"checkpoints/{name}")
    set_config(Run.named("next"), "training", time_step_masking=False)
    printed = out(capsys, "compare", "toy", "next")
    rows = table_in(printed, "run ")
    result, stages = run.evaluation(), run.metrics("stage")
    values = {key: result[key] for key in ("nelbo_12", "nelbo", "train_seconds", "train_tokens")}
    values |= {"run": "toy", "trained": "fused, frozen", "left_to_right":
               min(result["left_to_right"]), "bits_nelbo": result["bits_per_byte"]["nelbo"],
               "bits_left_to_right": result["bits_per_byte"]["left_to_right"],
               "held_mib": max(stage["held_mib"] for stage in stages),
               "peak_mib": max(stage["peak_mib"] for stage in stages)}  # fmt: skip
    assert rows[0].keys() == values.keys()
    agree(rows[0], values)
    # [MASK] is new to a run without masks: no bound is shown
    no_bound = dict.fromkeys(("nelbo_12", "nelbo", "bits_nelbo"))
    agree(rows[1], values | no_bound | {"run": "next", "trained": "next-token"})
    assert "note" not in printed and "note" not in out(capsys, "compare", "checkpoints/toy")
    evaluated = Path("checkpoints/next/eval.json")
    evaluated.write_text(json.dumps(result | {"rows": 7}))
    assert "only their bits per byte can be compared" in out(capsys, "compare", "toy", "next")
    evaluated.write_text(json.dumps(result | {"tokens_sha256": "another"}))
    assert "different texts: their figures cannot" in out(capsys, "compare", "toy", "next")
    evaluated = Path("checkpoints/a copy/eval.json")
    good = evaluated.read_bytes()
    del result["bits_per_byte"]
    again = "python evaluate_gpt2.py --run 'a copy'"
    for damaged in (good[:-5], b"[1]", b"\xff", json.dumps(result).encode()):
        evaluated.write_bytes(damaged)
        fails(e.main, ["compare", "toy", "a copy"], capsys, evaluated, "damaged", again)
    evaluated.unlink()
    fails(e.main, ["compare", "a copy"], capsys, evaluated, "is missing", again)


# --- the command line ------------------------------------------------------------------------


def test_every_command_has_its_help(capsys):
    for command, words in (
        ([], ["report", "sample", "compare", "plot", "precision", "export"]),
        (["report"], ["--run", "--precision", "--full", "--json", "--device"]),
        (["sample"], ["--order", "--exit", "--length", "--steps", "--temperature", "--top-p",
                      "--seed", "--watch", "--window", "--gif", "--precision", "--run", "____"]),
        (["compare"], ["RUN"]), (["plot"], ["RUN", "--to"]),
        (["precision"], ["--run", "--full", "--json"]),
        (["export"], ["FOLDER", "--run", "--precision"]),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            e.main([*command, "--help"])
        printed = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in printed for word in words)


def test_mistakes_end_in_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(e, "score", None)  # all of them are told before anything is scored
    for command, words in (
        (["--run", "other"], ["'other'", "toy"]), (["toy"], ["unrecognized", "toy"]),
        (["--precision", "int3"], ["--precision", "int4"]), (["--device", "gpu"], ["'gpu'"]),
        (["report", "--json", tmp_path], [tmp_path, "is a folder"]),
        (["precision", "--json", tmp_path], [tmp_path, "is a folder"]),
        (["sample", "the people " * 20], ["220 tokens", "(1)", "at most 31 tokens"]),
        (["sample", "the ____" * 20], ["80 tokens", "at most 31 tokens"]),
        (["sample", "a", "--length", "31"], ["(1 tokens)", "(31)", "at most 31 tokens"]),
        (["sample", "the ____", "--length", "3"], ["--length"]),
        (["sample", "--length", "0"], ["--length", "at least 1"]),
        (["sample", "--top-p", "1.5"], ["--top-p", "to 1, not 1.5"]),
        (["sample", "--temperature", "nan"], ["--temperature"]),
        (["sample", "--steps", "x"], ["--steps", "invalid int"]),
        (["sample", "--exit", "7"], ["exit 7 does not exist", "0 to 2"]),
        (["sample", "--order", "sideways"], ["--order", "ancestral"]),
        (["sample", "--order", "left-to-right", "--steps", "3"], ["no windows or time steps"]),
        (["sample", "--order", "left-to-right", "--window", "3"], ["no windows or time steps"]),
        (["sample", "--window", "0"], ["--window", "at least 1"]),
        (["compare"], ["RUN"]), (["compare", "toy", "none"], ["'none'"]),
        (["export"], ["FOLDER"]), (["export", run.folder], ["name a new folder"]),
        (["export", ""], ["name a new folder"]),
    ):  # fmt: skip
        fails(e.main, command, capsys, *words)
    monkeypatch.setattr(Run, "_check_config", lambda *_: None)
    set_config(run, "model", attention_mode="bidirectional")
    fails(e.main, ["sample", "--order", "left-to-right"], capsys, "needs a causal model")
    fails(e.main, ["export", "out"], capsys, "causal")
    assert not Path("out").exists()


def test_sampling_from_the_command_line(run, monkeypatch, capsys):
    evaluated = (run.folder / "eval.json").read_bytes()
    same = [out(capsys, "sample", "the people", "--seed", seed) for seed in "334"]
    assert same[0] == same[1] != same[2] and all(text.startswith("the people") for text in same)
    for order in (["--order", "left-to-right"], []):
        note, text = out(capsys, "sample", "of ____ and ____.", *order).split("\n", 1)
        assert note == "note: a causal model sees only what stands left of a blank"
        assert re.fullmatch(r"of.* and.*\.\n", text, re.DOTALL) and "____" not in text
    texts = {out(capsys, "sample", "--order", order, "--exit", exit_k, "--length", "20")
             for order in ("ancestral", "confidence", "left-to-right") for exit_k in "02"}
    assert len(texts) == 6  # one seed, but every order and exit writes its own
    printed = out(capsys, "sample", "--watch", "--window", "12", "--length", "12", "--steps", "4")
    assert [line.count("░") for line in printed.split("\n")[:-1]] == [12, 9, 6, 3, 0]
    printed = out(capsys, "sample", "we", "--watch", "--window", "2", "--length", "4")
    lines = printed.split("\n")[:-1]  # two windows; in each one token, then the other
    assert [line[:7] for line in lines] == [f"  {n}  we" for n in (4, 3, 2, 1, 0)]
    assert [line.count("░") for line in lines] == [4, 3, 2, 1, 0]
    assert lines[1].endswith("░░") and lines[2].endswith("░░") and "░" not in lines[2][7:-2]
    assert (run.folder / "eval.json").read_bytes() == evaluated


def test_a_watched_text_is_redrawn_in_place_on_a_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(e.time, "sleep", lambda seconds: None)
    printed = out(capsys, "sample", "--watch", "--steps", "3", "--window", "8", "--length", "8")
    assert printed.count("\033[2A\r\033[J") == 3  # two lines, drawn four times
    assert printed.count("5 of 8 tokens are [MASK]; red: revealed first, blue: last") == 1
    monkeypatch.setattr(e.shutil, "get_terminal_size", lambda *_: os.terminal_size((12, 5)))
    printed = out(capsys, "sample", "--watch", "--steps", "1", "--window", "31", "--length", "31")
    assert printed.count("\033[4A\r\033[J") == 1  # 31 masks are three lines of eleven; 5 - 2 fit
    assert printed.count("░") == 31 and f"38;5;{e.RAMP[-1]}m" in printed


def test_a_token_has_the_colour_of_when_it_was_revealed():
    encoding = tokenizer(257)
    watch = e.Watcher(encoding, mask_id := 257, show=False)
    x = torch.tensor([[256, 64, *[mask_id] * 12]])
    watch(x)
    for position in (5, 2, 13):
        x[0, position] = 65
        watch(x)
    x[0, 2:] = 65
    watch(x)
    assert [heading for heading, _ in watch.frames] == [
        f"{masked} of 12 tokens are [MASK]" for masked in (12, 11, 10, 9, 0)]  # fmt: skip
    start, *_, third, last = (cells for _, cells in watch.frames)
    assert start == [("a", None)] + [("░", "masked")] * 12
    assert [cell for cell in third if cell[1] != "masked"] == [
        ("a", None), ("b", 1), ("b", 0), ("b", 2)]  # fmt: skip
    assert [colour for _, colour in last] == [None, 1, 11, 11, 0, *[11] * 7, 2]
    assert e.ansi(None) == "0" and e.ansi("masked") == "2" and e.ansi(0) == "38;5;196"
    assert e.hex_colour(0) == "#ff0000" and e.hex_colour(11) == "#5f5fff"


def test_the_steps_as_a_moving_picture(run, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    printed = out(capsys, "sample", "we", "--length", "16", "--gif", "a.gif")
    assert printed.startswith("we") and printed.endswith("written to a.gif\n")
    assert "░" not in printed  # without --watch nothing but the text
    with image.open("a.gif") as picture:
        assert picture.n_frames == 17  # 16 in windows of 4, and the start
        assert picture.size[0] == 608
        picture.seek(16)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10_000)}
        assert (0x16, 0x16, 0x16) in colours and len(colours) > 20  # of tokens, on the ground
    fails(e.main, ["sample", "--gif", "missing/a.gif"], capsys, "missing", "No such file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(e.main, ["sample", "--gif", "b.gif"], capsys, "pip install matplotlib")


def test_watched_text_is_broken_between_words_and_fits():
    def lines(text, width):
        wrapped = e.wrapped([(character, None) for character in text], width)
        return ["".join(character for character, _ in line) for line in wrapped]

    assert lines("one three five", 12) == ["one three ", "five"]
    assert lines("a" * 7, 3) == ["aaa", "aaa", "a"]
    assert lines("国民的x", 5) == ["国民", "的x"]  # two columns each


def test_a_run_is_sampled_the_way_it_was_trained(run, monkeypatch, capsys):
    orders = []
    real = e.sample

    def recorded(model, x, order, window, **how):
        orders.append((order, window))
        return real(model, x, order, window, **how)

    monkeypatch.setattr(e, "sample", recorded)
    assert "note" not in out(capsys, "sample", "--length", "3")
    set_config(run, "training", time_step_masking=False)
    assert "note" not in out(capsys, "sample", "--length", "3")
    printed = out(capsys, "sample", "--length", "3", "--order", "confidence")
    assert printed.startswith("note: trained without masks: [MASK] is new to this model\n")
    assert orders == [("confidence", e.WINDOW), ("left-to-right", None), ("confidence", e.WINDOW)]
    set_config(run, "training", time_step_masking=True)
    monkeypatch.setattr(Run, "_check_config", lambda *_: None)
    set_config(run, "model", attention_mode="bidirectional")
    assert "note" not in out(capsys, "sample", "a ____ b")


# --- pretrained weights, and export ----------------------------------------------------------


@pytest.fixture
def weights(run, monkeypatch):
    """Makes a folder of weights never trained here, in Hugging Face's layout; evaluated on the toy
    text instead of the built-in corpus."""
    data = run.config.data
    overrides = [f"data.source={data.source}", f"data.folder={data.folder}",
                 "training.compute_type=fp32"]
    monkeypatch.setattr(e, "load_config", lambda **how: load_config(overrides=overrides, **how))

    def write(folder, outliers=1, **sizes):
        torch.manual_seed(0)
        one_block = {"total_blocks": 1, "block_size": 2, "block_mask_ranges": ((0.0, 1.0),)}
        model = GPT(toy_config(n_layers=2, seq_len=32, n_heads=4, **one_block, **sizes)).eval()
        for layer in model.h:
            for linear in (layer.attn.c_attn, layer.mlp.c_fc):
                linear.weight.data[:, [3, -10]] *= outliers
        model.save_pretrained(folder)
        return model

    return write


def test_every_command_takes_pretrained_weights_as_a_run(run, weights, tmp_path, capsys):
    """By their folder or their file: a run of zero steps, next-token, in fp32."""
    model = weights("hf")
    rows = validation_rows(run.tokens()[1], 32, 8)
    for name in ("hf", "hf/model.safetensors"):
        assert str(Run.named(name)) == name
        printed = out(capsys, "--run", name)
        assert "next-token), weights in fp32" in printed and "s of training" not in printed
        result = json.loads(Path("hf/eval.json").read_text())
        exact = e.left_to_right(model, rows).mean().item()
        assert result["left_to_right"] == [pytest.approx(exact, abs=1e-6)]
        assert (result["train_seconds"], result["train_tokens"]) == (0, 0)
        assert result["memory"]["stages"] == [] and result["config"]["model"]["seq_len"] == 32
        assert "note" not in out(capsys, "sample", "the people", "--run", name, "--length", "3")
        printed = out(capsys, "sample", "a ____", "--run", name, "--order", "ancestral",
                      "--precision", "nf4")  # fmt: skip
        assert "[MASK] is new to this model" in printed
        target = tmp_path / f"out-{Path(name).name}"
        assert "lost: the [MASK] row" in out(capsys, "export", str(target), "--run", name)
        exported, original = (read_tensors(f / "model.safetensors", sealed=False)[0]
                              for f in (target, Path("hf")))
        assert same(exported, original)
        fails(e.main, ["export", "hf", "--run", name], capsys, "hf holds a model or run already")
    rows = table_in(out(capsys, "compare", "toy", "hf"), "run ")
    assert rows[1]["trained"] == "next-token" and rows[1]["held_mib"] == rows[1]["nelbo"] == "-"
    Path("hf/model.safetensors").write_bytes(b"nothing")
    fails(e.main, ["--run", "hf"], capsys, "hf/model.safetensors: truncated")
    Path("hf/config.json").unlink()
    fails(e.main, ["--run", "hf"], capsys, "hf/config.json")


def test_weights_with_outliers_in_every_storage(weights, capsys):
    """A few columns of 50 sigma, as GPT-2 has them; judged left to right."""
    figures = {}
    for name, outliers in (("plain", 1), ("outliers", 50)):
        model = weights(name, outliers, d_model=128)
        agree(table_in(out(capsys, "precision", "--run", name), "storage ")[0],
              json.loads(Path(name, "precision.json").read_text())[0])
        table = json.loads(Path(name, "precision.json").read_text())
        figures[name] = {row["storage"]: row for row in table}
    for table in figures.values():
        assert list(table) == list(quant.KINDS)
        for kind, row in table.items():
            assert 5 < row["left_to_right"][0] < 8, kind
            assert row["perplexity"] == math.exp(row["left_to_right"][0])
            assert row["nelbo_12"] is None
        assert table["fp32"]["signal_to_noise_db"] is None
        assert table["fp16"]["signal_to_noise_db"] > 70
        assert abs(table["fp16"]["to_fp32"]) < 1e-3
        assert 0 < abs(table["int4"]["to_fp32"]) < 0.1 and abs(table["nf4"]["to_fp32"]) < 0.1
    # Measured: an outlier takes int4's range from its whole group, nf4's scale likewise.
    expected = {"int4": (20.95, 15.15), "nf4": (20.72, 18.60)}
    for kind, pair in expected.items():
        for table, db in zip(figures.values(), pair):
            assert table[kind]["signal_to_noise_db"] == pytest.approx(db, abs=0.3)
    model.h[1].mlp.c_fc.weight.data[0, 0] = 1e5
    model.save_pretrained("large")
    for command in ("precision", "report", "sample"):
        precision = [] if command == "precision" else ["--precision", "fp16"]
        fails(e.main, [command, *precision, "--run", "large"], capsys, "mlp.c_fc: weight "
              "(512, 128) has values up to 1e+05, too large for fp16")  # fmt: skip


def test_a_fused_run_is_exported_at_its_last_exit_or_another(run, capsys):
    idx = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    for precision, dtype, atol in (("fp32", torch.float32, 1e-5), ("fp16", torch.float16, 1e-2),
                                   ("int4", torch.float32, 1e-5), (None, torch.float32, 1e-5)):
        folder, option = f"out/{precision}", ["--precision", precision] if precision else []
        assert "exit 2 of toy" in (printed := out(capsys, "export", folder, *option))
        assert "lost: the other exits and the [MASK] row" in printed
        tensors, _, _ = read_tensors(Path(folder, "model.safetensors"), sealed=False)
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        ours, model = GPT.from_pretrained(folder)(idx)[..., :257], run.load(precision).eval()
        torch.testing.assert_close(ours, model(idx)[..., :257], atol=atol, rtol=0)
    for parameter in lora.adapter_parameters(model, 2).values():
        parameter.data.zero_()
    assert (model(idx)[..., :257] - ours).abs().max() > 1e-2  # or merging proved nothing
    assert "exit 0 of toy" in out(capsys, "export", "out/first", "--exit", "0")
    first = GPT.from_pretrained("out/first")
    assert len(first.h) == 2
    torch.testing.assert_close(first(idx)[..., :257], run.load().eval()(idx, 0)[..., :257],
                               atol=1e-5, rtol=0)  # fmt: skip
    fails(e.main, ["export", "out/none", "--exit", "3"], capsys, "exit 3 does not exist")


# --- pictures --------------------------------------------------------------------------------


def test_without_matplotlib_a_picture_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(e.main, ["plot", "toy"], capsys, "pip install matplotlib")
    assert not [*run.folder.glob("*.png")]


def test_pictures(run, weights, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(e, "PLOT_ROWS", 4)
    shutil.copytree(run.folder, "checkpoints/other")
    for command, folder in ((["plot"], None), (["plot", "toy", "other", "--to", "a/b"], "a/b")):
        printed = out(capsys, *command)
        for name in ("loss", "cross_entropy", "memory"):
            path = Path(folder or Run.named(None).folder, f"{name}.png")
            assert f"written to {path}" in printed and path.stat().st_size > 10_000
            assert path.read_bytes().startswith(b"\x89PNG")
    weights("hf")
    fails(e.main, ["plot", "hf"], capsys, "run hf was not trained here")


def test_a_run_without_metrics_has_no_losses_to_draw(run):
    (run.folder / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="run toy was not trained here"):
        e.plot_loss(None, [run], None)


def test_what_the_pictures_show(run, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    monkeypatch.setattr(e, "PLOT_ROWS", 4)
    loss, ce, memory = (Figure(layout="constrained").subplots() for _ in range(3))
    e.plot_loss(loss, [run], torch.device("cpu"))
    drawn = {(line.get_linestyle(), *map(tuple, line.get_data())) for line in loss.get_lines()}
    for stage, before in enumerate((0, 10, 15)):
        for event, key, style in (("step", "loss", "-"), ("validation", "cross_entropy", "--")):
            lines = [line for line in run.metrics(event) if line["stage"] == stage]
            steps = tuple(before + line["step"] for line in lines)
            assert steps and (style, steps, tuple(line[key] for line in lines)) in drawn
    labels = {text.get_text(): text.get_rotation() for text in loss.texts}
    assert len(labels) == 3 and {*labels.values()} == {90}  # narrow stages' do not overlap
    e.plot_cross_entropy(ce, [run], torch.device("cpu"))
    assert "solid where the exit owns m" in ce.get_title()
    every, own = ce.get_lines()[::4], ce.get_lines()[1::4]  # and two caps of its error bars
    steps = run.config.model.time_step_mask_fractions
    rows = validation_rows(run.tokens()[1], 32, 4)
    exits = e.left_to_right(run.load().eval(), rows).mean(1).tolist()
    for block, (line, solid) in enumerate(zip(every, own, strict=True)):
        assert tuple(line.get_xdata()) == (0.0, *steps, 1.0)
        assert line.get_ydata()[0] == pytest.approx(exits[block], abs=1e-5)
        owned = [m for m in (*steps, 1.0) if block_of(m, run.config.model) == block]
        assert [*solid.get_xdata()] == owned and {*solid.get_ydata()} < {*line.get_ydata()}
    e.plot_memory(memory, [run], torch.device("cpu"))
    heights = [bar.get_height() for bar in memory.patches]
    assert heights == [stage[f"{kind}_mib"] for stage in run.metrics("stage")
                       for kind in ("weights", "gradients", "optimizer")]  # fmt: skip
