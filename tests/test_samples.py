"""tests/samples.py: the figures of a text by hand, the table of a toy run, its mistakes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails
from evaluate_gpt2 import left_to_right
from test_model import toy_model

sys.path.insert(0, str(ROOT / "tests"))
import samples


def test_figures_of_text_by_hand():
    rows = torch.tensor([[9, 0, 1, 0], [9, 0, 1, 1]])  # position 0 is context
    figures = samples.text_figures(rows)
    assert figures["judge_perplexity"] is None
    assert figures["distinct_2"] == 3 / 4  # 01, 10, 01, 11
    assert figures["entropy"] == pytest.approx(math.log(2))
    judge = toy_model()
    rows = torch.randint(5, (3, 8))
    expected = math.exp(left_to_right(judge, rows)[2])
    assert samples.text_figures(rows, judge)["judge_perplexity"] == pytest.approx(expected)


def test_every_way_to_sample_is_measured(run, capsys):
    evaluated = (run.folder / "eval.json").read_bytes()
    command = ["toy", "--samples", "2"]
    # the run judges itself
    assert samples.main([*command, "--judge", "toy", "--temperature", "0.9"]) == 0
    result = json.loads((run.folder / "samples.json").read_text())
    assert (result["samples"], result["tokens"], result["judge"]) == (2, 31, "toy")
    table = result["table"]
    assert [(row["order"], row.get("depth")) for row in table] == [
        ("ancestral", "by noise"), ("ancestral", "exit 2"), ("confidence", "by noise"),
        ("confidence", "exit 2"), ("left-to-right", "exit 2"), ("validation text", None),
    ]  # fmt: skip
    assert all(0 < row["layers"] for row in table[:5]) and table[4]["layers"] == 31 * 6
    assert table[0]["layers"] < table[1]["layers"] and table[2]["layers"] < table[3]["layers"]
    assert all(row["judge_perplexity"] > 1 and 0 < row["distinct_2"] <= 1 for row in table)
    printed = capsys.readouterr().out
    assert "2 samples of 31 tokens" in printed and "judge: toy" in printed
    assert f"{table[3]['judge_perplexity']:.1f}" in printed
    assert (run.folder / "eval.json").read_bytes() == evaluated
    assert samples.main([*command, "--length", "5", "--steps", "3"]) == 0
    result = json.loads((run.folder / "samples.json").read_text())
    assert result["tokens"] == 5 and result["table"][3]["layers"] == 3 * 6
    assert all(row["judge_perplexity"] is None for row in result["table"])


def test_mistakes_end_in_one_line(run, capsys):
    for wrong in (["--length", "1"], ["--samples", "0"], ["--top-p", "2"]):
        fails(samples.main, ["toy", *wrong], capsys, wrong[0])
    fails(samples.main, ["toy", "--length", "40"], capsys, "at most 31 tokens")
    fails(samples.main, ["toy", "--judge", "none"], capsys, "'none'")
    fails(samples.main, ["none"], capsys, "'none'", "toy")
    path = Path("checkpoints/toy/config.json")
    tree = json.loads(path.read_text())
    tree["model"]["attention_mode"] = "bidirectional"
    path.write_text(json.dumps(tree))
    fails(samples.main, ["toy", "--judge", "toy"], capsys, "toy cannot judge", "causal")
