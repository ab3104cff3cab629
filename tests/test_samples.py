"""tests/samples.py, exits.py and campaigns.py: a text by hand, a toy run, mistakes."""

import json
import math

import campaigns
import exits
import pytest
import samples
import torch
from conftest import fails, toy_config
from evaluate_gpt2 import left_to_right
from model import GPT


def test_figures_of_text_by_hand():
    rows = torch.tensor([[9, 0, 1, 0], [9, 0, 1, 1]])  # position 0 is context; 01, 10, 01, 11
    assert [*samples.text_figures(rows).values()] == [None, 3 / 4]
    judge = GPT(toy_config())
    expected = math.exp(left_to_right(judge, rows, 2).mean())  # of its last exit
    assert samples.text_figures(rows, judge)["judge_perplexity"] == pytest.approx(expected)


def test_every_way_to_sample_is_measured(run, monkeypatch, capsys):
    monkeypatch.setattr(samples, "WINDOWS", (1, None))
    assert samples.main("toy --samples 1 --length 9 --judge toy".split()) == 0  # judges itself
    table = json.loads((run.folder / "samples.json").read_text())["table"]
    ways = [tuple(row.get(key) for key in ("order", "window", "steps")) for row in table]
    assert len({*ways}) == len(ways) == 2 * 2 * 2 + 1 + 1
    assert all(row["judge_perplexity"] > 1 and 0 < row["distinct_2"] <= 1 for row in table)
    for option, value in (("--length", 40), ("--samples", 0), ("--judge", "none")):
        fails(samples.main, ["toy", option, value], capsys)


def test_every_exit_on_every_band(run, monkeypatch, capsys):
    monkeypatch.setattr(exits, "ROWS", 8)
    bands = exits.bands(run, torch.device("cpu"))
    steps = json.loads((run.folder / "eval.json").read_text())["time_steps"]
    owners = torch.cat([bands[k][k].mean(1) for k in range(3)]).tolist()
    assert owners == pytest.approx([step["cross_entropy"] for step in steps], abs=1e-12)
    monkeypatch.setattr(exits, "bands", lambda *_: bands)
    assert exits.main(["toy"]) == 0
    difference = (bands[1][2] - bands[1][1]).mean(0)
    expected = f"{difference.mean():+.3f} +- {difference.std() / 8 ** 0.5:.3f}"
    assert expected in capsys.readouterr().out.splitlines()[2]


def test_flipped_bits_are_noticed(monkeypatch, capsys):
    assert campaigns.main(["flips", "--count", "5"]) == 0
    monkeypatch.setattr(campaigns.data_loader, "load_tokens", lambda *_: None)  # reads nothing
    assert campaigns.main(["flips", "--count", "5"]) == 1
    assert "flips, 5 in all: 1 failed" in capsys.readouterr().out
