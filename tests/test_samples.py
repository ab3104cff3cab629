"""tests/samples.py: the figures of a text by hand, the table of a toy run, its mistakes."""

import json
import math
import sys

import pytest
import torch
import train_gpt2_fusion as train
from conftest import ROOT
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


def test_every_way_to_sample_is_measured(toy, capsys):
    assert train.main(toy()) == 0
    evaluated = (toy.folder / "eval.json").read_bytes()
    command = ["toy", "--folder", str(toy.folder.parent), "--samples", "2"]
    # the run judges itself
    assert samples.main([*command, "--judge", "toy", "--temperature", "0.9"]) == 0
    table = json.loads((toy.folder / "samples.json").read_text())["table"]
    assert [(row["order"], row["depth"]) for row in table] == [
        ("ancestral", "by noise"), ("ancestral", "full"), ("confidence", "by noise"),
        ("confidence", "full"), ("left to right", "exit 2"), ("validation text", "")]  # fmt: skip
    assert all(0 < row["layers"] for row in table[:5]) and table[4]["layers"] == 31 * 6
    assert table[0]["layers"] < table[1]["layers"] and table[2]["layers"] < table[3]["layers"]
    assert all(row["judge_perplexity"] > 1 and 0 < row["distinct_2"] <= 1 for row in table)
    assert "times as fast" in capsys.readouterr().out
    assert (toy.folder / "eval.json").read_bytes() == evaluated
    assert samples.main([*command, "--length", "5", "--steps", "3"]) == 0
    result = json.loads((toy.folder / "samples.json").read_text())
    assert result["tokens"] == 5 and result["table"][1]["layers"] == 3 * 6
    assert all(row["judge_perplexity"] is None for row in result["table"])
    for wrong in (["--length", "1"], ["--samples", "0"], ["--top-p", "2"], ["--judge", "none"]):
        capsys.readouterr()
        assert samples.main([*command, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error:") and len(error.strip().splitlines()) == 1
        assert wrong[0] in error or wrong[1] in error
