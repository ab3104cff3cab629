"""The metrics against enumeration and closed forms; what every command prints and writes."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from conftest import fails
from test_model import BOTH, GOLDEN, TOY, toy_model

import evaluate_gpt2 as e
import lora
import quant
import train_gpt2_fusion as train
from data_loader import Run, UserError, load_tokens, read_tensors, validation_rows, write_tensors
from model import GPT, noise_of_rows, score

EXITS = [f"left_to_right_{k}" for k in range(3)]


def small(attention="causal", scale=4.0, **changes):
    """A model of 3 blocks for rows of four tokens, of which there are three."""
    return toy_model(attention_mode=attention, scale=scale, vocab_size=3, seq_len=4, n_layers=3,
                     block_size=1, **changes)


@pytest.fixture
def together(monkeypatch):
    """Rows are scored together: the same figures but for the last digits, in less time."""
    monkeypatch.setattr(e, "score", lambda *args: score(*args, batch_size=100))


def out(capsys, *arguments):
    """What evaluate_gpt2.py prints with these arguments, which must succeed."""
    capsys.readouterr()
    assert e.main([*arguments]) == 0
    return capsys.readouterr().out


def shows(printed, values, *specs):
    """Whether a line of a printed table begins with these values, in these formats."""
    cells = [train.cell(value, spec) for value, spec in zip(values, specs)]
    return cells in [line.split()[: len(cells)] for line in printed.splitlines()]


def evaluated(run, name="eval.json"):
    return json.loads((run.folder / name).read_text())


def changed(run, **values):
    """Make a run say that it was trained with other settings. -> its Config"""
    tensors, facts, _ = read_tensors(run.checkpoint)
    facts["config"] |= values
    write_tensors(run.checkpoint, tensors, facts)
    return train.read_checkpoint(run)[0].config


def rows_of(run, count=8):
    """The validation rows that a run is judged by."""
    config = train.read_checkpoint(run)[0].config
    return validation_rows(load_tokens(config)[1], config.seq_len, count)


@torch.no_grad()
def enumerated_ce(model, rows, m, exit_k):
    """CE(m) of rows (R, T), or of one row (T,), by its definition: every mask with its chance."""
    n = rows.size(-1) - 1
    patterns = torch.tensor([*itertools.product([False, True], repeat=n)])  # (2^n, n)
    mask = torch.cat([torch.zeros(len(patterns), 1, dtype=torch.bool), patterns], dim=1)
    x_0 = rows[..., None, :].expand(*rows.shape[:-1], *mask.shape)  # (R, 2^n, T)
    x_t = x_0.masked_fill(mask, model.config.mask_id).reshape(-1, n + 1)
    logits = model(x_t, exit_k)[:, :-1].double()
    ce = -torch.log_softmax(logits, -1).gather(2, x_0.reshape(-1, n + 1)[:, 1:, None])
    ce = ce.view(*x_0.shape[:-1], n)  # (R, 2^n, n)
    chance = torch.where(patterns, m, 1 - m).double().prod(1)  # (2^n,)
    return (chance * (ce * patterns).sum(-1)).sum(-1) / (m * n)


def enumerated_nelbo_12(model, rows):
    edges = [0.0, *model.config.time_step_mask_fractions, 1.0]
    return sum((high - low) * enumerated_ce(model, rows, high, model.config.block_of(high))
               for low, high in itertools.pairwise(edges))


@BOTH
def test_nelbo_12_is_the_enumerated_value(attention, together, monkeypatch):
    """Where time steps are quarters, the 4^3 grid of uniform numbers for three positions gives
    every mask as often as its probability says, so that no error is left."""
    grid = torch.tensor([*itertools.product([0.5], *[[0.125, 0.375, 0.625, 0.875]] * 3)])  # (64, 4)
    monkeypatch.setattr(e, "noise_of_rows", lambda *args: grid)
    for scale, row, last in ((4, [0, 2, 1, 2], 0.75), (4, [1, 0, 0, 2], 1.0), (0, [2] * 4, 0.75)):
        model = small(attention, scale, time_step_mask_fractions=(0.25, 0.5, last))
        bound, table = e.nelbo_12(model, torch.tensor([row] * 64), seed=0)
        exact = enumerated_nelbo_12(model, torch.tensor(row)).item()
        assert bound.mean().item() == pytest.approx(exact, abs=2e-6)
        assert [step["block"] for step in table[:3]] == [0, 1, 2]  # depth by noise
    assert exact == pytest.approx(math.log(3), abs=1e-6)  # uniform; less without the term at m = 1


@BOTH
def test_draws_of_masks_come_over_every_position_equally_often(attention, monkeypatch):
    model, masks = small(attention), []
    monkeypatch.setattr(e, "score", lambda model, rows, m, exit_k, noise:
                        masks.append(noise < m[:, None]) or (torch.zeros(50),) * 2)  # fmt: skip
    for m in (0.1, 0.3, 0.85, 1.0):
        masks.clear()
        e.score_at(model, torch.zeros(50, 16).long(), m, 0, noise_of_rows(50, 16, seed=0))
        n = 1 if attention == "causal" or m == 1 else math.ceil(2 / m)
        assert len(masks) == n and masks[0].float().mean().item() == pytest.approx(m, abs=0.06)
        often = torch.stack(masks).sum(0)  # (50, 16)
        if n > 1:
            assert {*often.unique().tolist()} <= {int(n * m + 1e-6), math.ceil(n * m - 1e-6)}


@BOTH
def test_the_bound_is_a_bound_and_left_to_right_a_distribution(attention, together):
    """exp(-NELBO) summed over all texts is at most 1, and exactly 1 for uniform predictions (which
    would exceed 1 if the term at m = 1 were left out); of every exit left to right it is 1."""
    for scale, first in ((0.0, 1), (4.0, 0), (4.0, 1), (4.0, 2)):
        model = small(attention, scale)
        texts = torch.tensor([[first, *rest] for rest in itertools.product(range(3), repeat=3)])
        total = torch.exp(-3 * enumerated_nelbo_12(model, texts)).sum().item()
        assert total == pytest.approx(1, abs=1e-5) if scale == 0 else total <= 1
        for exit_k in range(3) if attention == "causal" else ():
            nats = e.left_to_right(model, texts, exit_k)  # (27,), CE(m) as m goes to 0
            assert torch.exp(-3 * nats).sum().item() == pytest.approx(1, abs=1e-5)
            assert (nats - enumerated_ce(model, texts, 1e-6, exit_k)).abs().max() < 1e-4
    uniform, rows = small(attention, scale=0.0), torch.randint(3, (50, 4))
    if attention == "causal":  # bidirectional estimates are exact in expectation only
        assert e.nelbo_12(uniform, rows, seed=0)[0].mean() == pytest.approx(math.log(3), abs=1e-5)
    assert e.nelbo(uniform, rows, seed=0).numpy() == pytest.approx(math.log(3), abs=1e-5)


def test_bidirectional_nelbo_is_unbiased(together):
    """Over every number of masks and every order of the positions its mean is the integral of the
    enumerated CE(m), a quadratic for three positions, so that two points of Gauss are exact."""
    model, rng = small("bidirectional", mode="standard"), np.random.default_rng(0)
    every = [*itertools.product(range(3), itertools.permutations((0.1, 0.5, 0.9)))]  # 3 x 6
    strata = torch.tensor([(n + 0.5) / 3 for n, _ in every], dtype=torch.float64)
    noise = torch.tensor([[0.0, *order] for _, order in every])
    points, weights = np.polynomial.legendre.leggauss(2)
    for row in (torch.tensor([0, 2, 1, 2]), torch.tensor([1, 0, 0, 2])):
        by_row = e.bidirectional_nelbo(model, row.repeat(18, 1), strata, noise.clone(), rng)
        exact = sum(w / 2 * enumerated_ce(model, row, (1 + x) / 2, 0).item()
                    for x, w in zip(points, weights))  # fmt: skip
        assert by_row.mean().item() == pytest.approx(exact, abs=1e-6)
        assert by_row.std() > 0.1  # not by being constant


@BOTH
def test_the_continuous_bound_covers_the_integral(attention, together):
    """Of 40 seeds, the 95 % and 50 % intervals (8 replicates: Student's t with 7 degrees) hold the
    midpoint rule's value of the enumerated integral as often as they say (p < 0.002 each)."""
    model, row = small(attention, scale=8.0), torch.tensor([0, 2, 1, 2])
    model.exit_norms[0].weight.data.zero_()  # an exit that knows nothing: which one is read shows
    grid = [(i + 0.5) / 100 for i in range(100)]  # the bands end between two of them
    exact = np.mean([enumerated_ce(model, row, m, model.config.block_of(m)) for m in grid])
    inside = np.zeros(2)
    for seed in range(40):
        replicates = e.nelbo(model, row.repeat(3, 1), seed).mean(1)  # (8,)
        error = abs(replicates.mean().item() - exact)
        inside += error < np.array([2.365, 0.711]) * e.standard_error(replicates)
    assert inside[0] >= 33 and 10 <= inside[1] <= 30


def test_unigram_by_hand():
    # counts + 1 over ids 0, 1, 2: 3, 2, 1 of 6; the first token of a row is given
    by_row = e.unigram(np.array([0, 0, 1], np.uint16), torch.tensor([[1, 0, 2], [2, 1, 1]]))
    assert by_row.tolist() == pytest.approx([(math.log(2) + math.log(6)) / 2, math.log(3)])


def test_standard_errors_are_over_the_rows(run):
    """That of the continuous bound is over its replicates, on the same rows."""
    result, rows, model = evaluated(run), rows_of(run), quant.expand(train.load_run(run)[0])
    losses, step = result["losses"], result["time_steps"][-2]
    replicates = e.nelbo(model, rows, seed=0)  # (8, 8)
    ce, _ = e.score_at(model, rows, 0.99, 2, noise_of_rows(8, 32, 0))
    pairs = [(losses[name], losses[name]["by_row"]) for name in ("nelbo_12", *EXITS)]
    for figure, values in (*pairs, (losses["nelbo"], replicates.mean(1)), (step, ce)):
        assert figure["stderr"] == pytest.approx(np.std([*values], ddof=1) / math.sqrt(8))
    assert e.standard_error(torch.ones(1)) is None


@pytest.mark.parametrize("changes, names, orders", [
    ({}, ["nelbo_12", "nelbo", *EXITS, "unigram"], ["confidence", "left-to-right"]),
    ({"attention_mode": "bidirectional"}, ["nelbo_12", "nelbo", "unigram"], ["confidence"]),
    ({"time_step_masking": False}, [*EXITS, "unigram"], ["left-to-right"]),
])  # fmt: skip
def test_eval_json_holds_what_is_printed(changes, names, orders, run, monkeypatch, capsys):
    """And no bound without masks, no left to right where a token sees itself."""
    before, config, written = evaluated(run)["losses"], changed(run, **changes), []
    monkeypatch.setattr(e, "write", lambda model, **how: written.append(how["order"]) or "")
    (run.folder / "eval.json").unlink()
    printed, result = out(capsys), evaluated(run)
    steps, stages = result["time_steps"], result["stages"]
    assert [*result["losses"]] == names and written == orders and result["rows"] == 8
    assert result["config"] == json.loads(json.dumps(vars(config)))
    assert result["tokens_sha256"] == load_tokens(config)[2]
    bytes_per_token = (rows_of(run)[:, 1:] < 256).double().mean().item()  # <|endoftext|> has none
    for name, loss in result["losses"].items():
        nats = loss["nats_per_token"]
        assert nats == pytest.approx(np.mean(loss["by_row"]))
        assert loss["perplexity"] == pytest.approx(math.exp(nats))
        assert loss["bits_per_byte"] == pytest.approx(nats / math.log(2) / bytes_per_token)
        assert shows(printed, [name, *loss.values()], "", ".3f", ".3f", ".1f", ".3f")
        if "nelbo" not in name:  # the same weights, however they may be judged
            assert loss == before[name]
    fractions = [*config.time_step_mask_fractions, 1.0] if config.time_step_masking else []
    assert [(step["mask_fraction"], step["block"]) for step in steps] == [
        *zip(fractions, [0] * 4 + [1] * 3 + [2] * 6)]  # fmt: skip
    assert all(shows(printed, step.values(), ".2f", "d", ".3f", ".3f", ".1%") for step in steps)
    assert stages == run.metrics("stage") and [stage["steps"] for stage in stages] == [10, 5, 5]
    assert all(shows(printed, [*stage.values()][1:], "d", "d", ".0f", ",", *[".1f"] * 3)
               for stage in stages)  # fmt: skip


def test_a_run_stopped_in_stage_1_can_be_evaluated_but_not_on_another_text(
        toy, tmp_path, monkeypatch, capsys):
    answers = iter([False] * 5 + [True])  # after each of 4 steps and stage 0; in stage 1
    monkeypatch.setattr(train, "in_any_process",
                        lambda flag: next(answers) if isinstance(flag, list) else flag)  # fmt: skip
    monkeypatch.setattr(e, "ROWS", 3)
    assert train.main(toy(max_steps=8)) == 130
    run, name, text = Run(toy.folder), ["--run", str(toy.folder)], tmp_path / "text.txt"
    assert train.read_checkpoint(run)[0].step == 1  # of 2
    out(capsys, *name)
    result = evaluated(run)
    assert [step["block"] for step in result["time_steps"]] == [0] * 4 + [1] * 9
    assert [*result["losses"]] == ["nelbo_12", "nelbo", *EXITS[:2], "unigram"]
    text.write_text(text.read_text().replace("1.", "2.", 1))
    for command, word in (([], text), (["--precision", "int4"], "ended"),
                          (["sample", "--exit", "2"], "exit 2")):  # fmt: skip
        fails(e.main, [*command, *name], capsys, word)
    assert evaluated(run) == result
    out(capsys, "sample", *name)  # needs no text


def test_a_run_that_can_only_be_read_is_evaluated_all_the_same(run, monkeypatch, capsys):
    printed = [out(capsys), out(capsys, "precision")]
    unwritable = OSError(30, "cannot write: Read-only file system", "the file")
    monkeypatch.setattr(e, "write_json", Mock(side_effect=unwritable))
    for command, whole in zip(([], ["precision"]), printed):
        assert e.main(command) == 2
        shown = capsys.readouterr()
        assert shown.err == "error: the file: cannot write: Read-only file system\n"
        assert shown.out == whole.rpartition("\nwritten to")[0]


def test_every_storage_side_by_side(run, capsys):
    before, printed = evaluated(run), out(capsys, "precision")
    table = evaluated(run, "precision.json")
    assert [row["storage"] for row in table] == ["fp32", "fp16", "int4", "nf4"]
    assert [row["bits_per_weight"] for row in table[:2]] == [32, 16]
    noise = [row["signal_to_noise_db"] for row in table]  # measured: none, 73.7, 22.1, 21.2
    assert noise[0] is None and noise[1] > 70 and 23 > noise[2] > 21.6 > noise[3] > 20
    for row in table:
        assert row["to_fp32"] == row["nelbo_12"] - table[0]["nelbo_12"]
        assert shows(printed, row.values(), "", ".1f", ".3f", ".2f", *[".4f"] * 4, "+z.4f")
    # A report says the same: of the run as it is, and rebuilt in another storage.
    out(capsys, "report", "--precision", "int4")
    assert evaluated(run) == before
    for result, row in zip((before, evaluated(run, "eval_int4.json")), table[1:]):
        for name in ("nelbo_12", *EXITS):
            assert result["losses"][name]["nats_per_token"] == row[name]


def test_compare_puts_runs_side_by_side_and_pairs_their_rows(run, capsys):
    result, next_token = evaluated(run), Path("checkpoints/next")
    losses, stages = result["losses"], result["stages"]
    for name in ("other", "next"):
        shutil.copytree(run.folder, f"checkpoints/{name}")
    changed(Run(next_token), time_step_masking=False)
    out(capsys, "--run", "next")
    best = min((losses[name] for name in EXITS), key=lambda loss: loss["nats_per_token"])
    judged = [losses["nelbo_12"], losses["nelbo"], best]
    figures = [sum(stage["seconds"] for stage in stages), 20 * 4 * 32,
               max(stage["peak_mib"] or 0 for stage in stages) or None,
               *(loss["nats_per_token"] for loss in judged),
               *(loss["bits_per_byte"] for loss in judged[1:])]  # fmt: skip
    for loss in losses.values():
        loss["by_row"] = [value + 0.5 - row % 2 * 0.75 for row, value in enumerate(loss["by_row"])]
    Path("checkpoints/other/eval.json").write_text(json.dumps(result))
    printed = out(capsys, "compare", "toy", "other", "next")
    specs = ["", ",.0f", ",", ",.0f", *[".3f"] * 5]
    assert all(shows(printed, [name, *figures], *specs) for name in ("toy", "other"))
    figures[3] = figures[4] = figures[6] = None  # it never saw masks
    assert shows(printed, ["next", *figures], *specs)
    # By hand, 0.5 and -0.25 on four rows each: mean 0.125, standard error 0.375 / sqrt(7).
    assert [line.split() for line in printed.splitlines()[-3:]] == [
        ["other", "nelbo_12", "+0.125", "0.142"], ["other", "left_to_right", "+0.125", "0.142"],
        ["next", "left_to_right", "+0.000", "0.000"]]  # fmt: skip
    out(capsys, "--run", "next", "--full")
    assert evaluated(Run(next_token))["rows"] == len(rows_of(run, count=None)) > 8
    printed = out(capsys, "compare", "toy", "next")
    assert "other rows" in printed and "difference" not in printed
    (next_token / "eval.json").unlink()
    fails(e.main, ["compare", "toy", "next"], capsys, next_token, "evaluate_gpt2.py --run next")


def test_a_prompt_becomes_tokens_and_masks():
    config, mask = TOY.replace(vocab_size=257, seq_len=16), [257]
    the, of, dot = map(e.tokenizer(257).encode_ordinary, ("the", " of", "."))
    for prompt, length, ids in (("the", None, the + mask * 12), ("the", 2, the + mask * 2),
                                (" the\n ", 2, the + mask * 2),
                                ("the<|endoftext|>the", 2, the + [256] + the + mask * 2),
                                ("the ____\r\n of_____.", 5, the + mask + of + mask + dot)):
        assert e.prompt_ids(prompt, length, config).tolist() == [[256, *ids]]  # after <|endoftext|>
    for prompt, length in (("the", 13), ("", 16), ("the people of t", None), ("____ " * 16, 1)):
        with pytest.raises(UserError, match="at most 15 tokens"):
            e.prompt_ids(prompt, length, config)


def test_sampling_from_the_command_line(run, monkeypatch, capsys):
    same = [out(capsys, "sample", "the people", "--seed", seed) for seed in "334"]
    assert same[0] == same[1] != same[2] and all(text.startswith("the people") for text in same)
    texts = {out(capsys, "sample", "--order", order, "--exit", exit_k, "--length", "20")
             for order in ("ancestral", "confidence", "left-to-right") for exit_k in "02"}
    assert len(texts) == 6  # one seed, but every order and exit writes its own
    assert out(capsys, "sample", "--temperature", "0") == out(capsys, "sample", "--top-p", "0.001")
    # A line a step: how many masks are left, and the text, a mask being one character.
    printed = out(capsys, "sample", "we", *"--watch --window 6 --length 12 --steps 2".split())
    *lines, text, end = printed.split("\n")
    assert [(line[:14], line.count("░")) for line in lines] == [
        (f" {n:2d} masked  we", n) for n in (12, 9, 6, 3)] and text[:2] == "we"  # fmt: skip
    asked, real = [], e.sample
    monkeypatch.setattr(e, "sample", lambda model, x, order, window, **how:
                        asked.append((order, window)) or real(model, x, order, window, **how))
    for changes in ({}, {"attention_mode": "bidirectional"},
                    {"attention_mode": "causal", "time_step_masking": False}):  # fmt: skip
        changed(run, **changes)
        text = out(capsys, "sample", "of ____ and ____.")
        assert text.startswith("of") and text.endswith(".\n") and "_" not in text
    assert asked == [("confidence", 4)] * 2 + [("left-to-right", None)]  # as it was trained


def test_weights_in_hugging_faces_layout_are_a_run_of_zero_steps(toy, monkeypatch, capsys):
    """As `transformers` wrote them, but with more rows in the embedding: the text is bytes."""
    folder, run = toy.folder.parents[1] / "hf", Run(toy.folder)
    tensors, _, _ = read_tensors(GOLDEN / "model.safetensors", sealed=False)
    wte = [tensors["transformer.wte.weight"], torch.full((257 - 61, 32), 0.01)]
    tensors["transformer.wte.weight"] = torch.cat(wte)
    write_tensors(folder / "model.safetensors", tensors, sealed=False)
    sizes = json.loads((GOLDEN / "config.json").read_text()) | {"vocab_size": 257}
    (folder / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(e, "ROWS", 8)
    assert train.main(toy(mode="standard", max_steps=0, time_step_masking="false", n_layers=2,
                          qlora_enabled="false", quantization_type="fp32", init_from=folder,
                          n_heads=4, seq_len=16)) == 0  # fmt: skip
    out(capsys, "--run", str(run.folder))
    out(capsys, "precision", "--run", str(run.folder))
    losses, rows = evaluated(run)["losses"], rows_of(run)
    logits = GPT.from_pretrained(folder)(rows)[:, :-1].transpose(1, 2).detach()  # (8, V, 15)
    ce = torch.nn.functional.cross_entropy(logits, rows[:, 1:], reduction="none").mean(1)
    assert [*losses] == ["left_to_right_0", "unigram"]
    assert losses["left_to_right_0"]["by_row"] == pytest.approx(ce.tolist(), abs=1e-5)
    fp32, *_, nf4 = evaluated(run, "precision.json")
    assert nf4["to_fp32"] == nf4["left_to_right_0"] - fp32["left_to_right_0"] != 0


@torch.no_grad()
def test_an_exit_is_exported_with_its_adapters_merged(run, capsys):
    idx = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
    for kind, exit_k, atol in (("fp16", 2, 1e-2), ("int4", 1, 1e-5), (None, None, 1e-5)):
        options = ["--precision", kind, "--exit", str(exit_k)] if kind else []
        out(capsys, "export", f"out/{kind}", *options)
        file = Path(f"out/{kind}/model.safetensors")
        assert len(json.loads((file.parent / "vocab.json").read_text())) == 257
        dtype = torch.float16 if kind == "fp16" else torch.float32
        assert {tensor.dtype for tensor in read_tensors(file, sealed=False)[0].values()} == {dtype}
        model, exported = train.load_run(run, "cpu", kind)[0], GPT.from_pretrained(file.parent)
        merged = lora.merge(model, exit_k or 2)(idx, exit_k)[..., :257]
        torch.testing.assert_close(exported(idx)[..., :257], merged, atol=atol, rtol=0)
    for parameter in lora.adapter_parameters(model, 2).values():
        parameter.zero_()
    assert (model(idx)[..., :257] - merged).abs().max() > 1e-2  # or merging proved nothing
    fails(e.main, ["export", file.parent], capsys, file.parent)  # it holds a model


def test_a_picture_shows_what_was_measured(run, monkeypatch, capsys):
    """matplotlib, which need not be there, is played by objects that note how they are called."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(e.main, ["plot", "toy"], capsys, "pip install matplotlib")
    panels = [MagicMock() for _ in range(3)]
    drawn = MagicMock(**{"Figure.return_value.subplots.return_value": panels})
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, drawn)
    with monkeypatch.context() as patch:
        patch.setattr(e, "load_run", None)  # nothing is computed in vain
        fails(e.main, ["plot", "toy", "--to", "none/a.png"], capsys, "--to")
    monkeypatch.setattr(e, "PLOT_ROWS", 8)
    out(capsys, "plot", "toy")
    drawn = [point for call in panels[1].errorbar.call_args_list for point in zip(*call.args[:2])]
    assert [(m, ce) for m, ce in drawn if m > 0] == [
        (step["mask_fraction"], step["cross_entropy"]) for step in evaluated(run)["time_steps"]]
    drawn = [call.args[1] for call in panels[2].bar.call_args_list]
    assert drawn[::3] == [stage["weights_mib"] for stage in run.metrics("stage")]


def test_progress_is_for_terminals_and_for_long_evaluations(monkeypatch, capsys):
    assert [*e.progress(range(3), "step")] == [0, 1, 2] and capsys.readouterr().err == ""
    clock = itertools.chain([0, 50, 61, 61, 70], itertools.repeat(0))
    monkeypatch.setattr(e.time, "monotonic", lambda: next(clock))
    assert [*e.progress("abc", "step")] == [*"abc"]
    assert capsys.readouterr().err.split() == ["step", "2", "of", "3"]
    monkeypatch.setattr(sys, "stderr", None)  # a service
    assert [*e.progress("ab", "step")] == [*"ab"]


def test_mistakes_end_in_one_line(run, capsys):
    for command, words in (
        (["--run", "other"], ["'other'", "toy"]), (["toy"], ["toy"]), (["export"], ["FOLDER"]),
        (["--precision", "int3"], ["--precision", "int4"]), (["--device", "gpu"], ["'gpu'"]),
        (["sample", "the people " * 20], ["219 tokens"]), (["sample", "--exit", "9"], ["exit 9"]),
        (["sample", "--window", "0"], ["--window"]), (["sample", "--top-p", "0"], ["--top-p"]),
        (["sample", "--temperature", "nan"], ["nan"]), (["compare", "toy", "none"], ["'none'"]),
        (["sample", "--order", "x"], ["ancestral"]), (["export", "out", "--exit", "9"], ["exit 9"]),
    ):  # fmt: skip
        fails(e.main, command, capsys, *words)
    changed(run, attention_mode="bidirectional")
    fails(e.main, ["sample", "--order", "left-to-right"], capsys, "causal")
    run.record("stage")
    (run.folder / "eval.json").unlink()
    fails(e.main, [], capsys, "metrics.jsonl")
    assert not Path("out").exists() and not (run.folder / "eval.json").exists()
