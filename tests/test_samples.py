"""tests/samples.py (a text by hand, a toy run, mistakes) and tests/exits.py."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails
from evaluate_gpt2 import Run, left_to_right
from test_model import toy_model

sys.path.insert(0, str(ROOT / "tests"))
import exits
import samples


def test_figures_of_text_by_hand():
    rows = torch.tensor([[9, 0, 1, 0], [9, 0, 1, 1]])  # position 0 is context
    figures = samples.text_figures(rows)
    assert figures["judge_perplexity"] is None
    assert figures["distinct_2"] == 3 / 4  # 01, 10, 01, 11
    assert figures["entropy"] == pytest.approx(math.log(2))
    judge = toy_model()
    rows = torch.randint(5, (3, 8))
    expected = math.exp(left_to_right(judge, rows)[2].mean())
    assert samples.text_figures(rows, judge)["judge_perplexity"] == pytest.approx(expected)


def test_every_way_to_sample_is_measured(run, monkeypatch, capsys):
    monkeypatch.setattr(samples, "WINDOWS", (1, 8, None))
    monkeypatch.setattr(samples, "STEPS", (None, 2))
    evaluated = (run.folder / "eval.json").read_bytes()
    command = ["toy", "--samples", "2"]
    # the run judges itself
    assert samples.main([*command, "--judge", "toy", "--temperature", "0.9"]) == 0
    result = json.loads((run.folder / "samples.json").read_text())
    assert (result["samples"], result["tokens"], result["judge"]) == (2, 31, "toy")
    table = result["table"]
    ways = [tuple(row.get(key) for key in ("order", "window", "steps", "exit")) for row in table]
    orders = ("ancestral", "confidence")
    assert ways == [
        *itertools.product(orders, (1, 8, None), (None, 2), [None]),
        *itertools.product(orders, (8, None), [None], (0, 2)),
        *(("left-to-right", None, None, exit_k) for exit_k in range(3)),
        ("validation text", None, None, None),
    ]
    layers = dict(zip(ways, (row.get("layers") for row in table)))
    # A token a step from exit k: its layers, 2 (k + 1), once for each token.
    assert [layers["left-to-right", None, None, exit_k] for exit_k in range(3)] == [2, 4, 6]
    # Of 31 tokens, round(31 / 2) and the rest are shown in two steps, at m = 1 and 0.5: exits 2, 1.
    assert layers["confidence", None, 2, None] == pytest.approx((6 + 4) / 31)
    # One after another they are shown where m falls to 0.5: from 0.6 exit 1, from 1 exit 2.
    assert layers["confidence", 1, None, None] == 4 and layers["confidence", 1, 2, None] == 6
    assert layers["ancestral", None, None, 0] < layers["ancestral", None, None, 2]
    assert all(row["judge_perplexity"] > 1 and 0 < row["distinct_2"] <= 1 for row in table)
    printed = capsys.readouterr().out
    assert "2 samples of 31 tokens" in printed and "judge: toy" in printed
    assert f"{table[3]['judge_perplexity']:.1f}" in printed
    assert (run.folder / "eval.json").read_bytes() == evaluated
    assert samples.main([*command, "--length", "5"]) == 0
    result = json.loads((run.folder / "samples.json").read_text())
    assert result["tokens"] == 5
    assert all(row["judge_perplexity"] is None for row in result["table"])


def test_mistakes_end_in_one_line(run, monkeypatch, capsys):
    for wrong in (["--length", "1"], ["--samples", "0"], ["--top-p", "2"]):
        fails(samples.main, ["toy", *wrong], capsys, wrong[0])
    fails(samples.main, ["toy", "--length", "40"], capsys, "at most 31 tokens")
    fails(samples.main, ["toy", "--judge", "none"], capsys, "'none'")
    fails(samples.main, ["none"], capsys, "'none'", "toy")
    path = Path("checkpoints/toy/config.json")
    tree = json.loads(path.read_text())
    tree["model"]["attention_mode"] = "bidirectional"
    monkeypatch.setattr(Run, "_check_config", lambda *_: None)
    path.write_text(json.dumps(tree))
    fails(samples.main, ["toy", "--judge", "toy"], capsys, "toy cannot judge", "causal")


def test_every_exit_on_every_band(run, monkeypatch, capsys):
    """The owner's figures are those of the evaluation; the others' differences are theirs to it."""
    monkeypatch.setattr(exits, "ROWS", 8)
    bands = exits.bands(run, torch.device("cpu"))
    steps = run.evaluation()["time_steps"]
    for owner, ce in bands.items():
        expected = [step["cross_entropy"] for step in steps if step["block"] == owner]
        assert ce[owner].mean(1).tolist() == pytest.approx(expected, abs=1e-12)
    assert sorted(bands) == [0, 1, 2] and bands[0].shape == (3, 4, 8)
    assert exits.main(["toy"]) == 0
    difference = (bands[1][2] - bands[1][1]).mean(0)
    text = f"{difference.mean():+.3f} +- {difference.std() / 8 ** 0.5:.3f}"
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split()[0] == "1" and text in line and "owner" in line
