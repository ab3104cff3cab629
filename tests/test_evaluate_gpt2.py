"""The metrics against enumeration and closed forms on toy vocabularies."""

import itertools
import math

import numpy as np
import pytest
import torch

import evaluate_gpt2 as e
from model import block_of
from test_model import BOTH, TOY, toy_model

SMALL = dict(vocab_size=3, seq_len=4)


def enumerated_ce(model, row, m, block):
    """CE(m) of one row by its definition: every mask with its probability."""
    n = len(row) - 1
    patterns = torch.tensor([*itertools.product([False, True], repeat=n)])  # (2^n, n)
    mask = torch.cat([torch.zeros(len(patterns), 1, dtype=torch.bool), patterns], dim=1)
    logits = model(row.masked_fill(mask, model.config.mask_id), block)[:, :-1].double()
    ce = -torch.log_softmax(logits, -1)[:, range(n), row[1:]]  # (2^n, n)
    chance = torch.where(patterns, m, 1 - m).double().prod(1)  # (2^n,)
    return (chance * (ce * patterns).sum(1)).sum().item() / (m * n)


def enumerated_nelbo_12(model, row):
    edges = [0.0, *model.config.time_step_mask_fractions, 1.0]
    return sum(
        (high - low) * enumerated_ce(model, row, high, block_of(high, model.config))
        for low, high in zip(edges, edges[1:])
    )


@torch.no_grad()
def test_nelbo_12_by_hand():
    """Three positions, causal: only the mask of position 1 matters, so 100 evenly spaced numbers
    for it (the time steps are whole percents) make the estimate exact."""
    model = toy_model(vocab_size=4, seq_len=3, scale=5.0)
    row = torch.tensor([1, 3, 0])
    noise = torch.full((100, 3), 0.5)
    noise[:, 1] = (torch.arange(100) + 0.5) / 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(e, "row_noise", lambda *args, **kwargs: noise)
        bound, table = e.nelbo_12(model, row.repeat(100, 1), seed=0)
    assert bound == pytest.approx(enumerated_nelbo_12(model, row), abs=1e-5)
    assert [step["layers"] for step in table] == [2] * 4 + [4] * 3 + [6] * 6
    assert table[-1]["mask_fraction"] == 1.0


@torch.no_grad()
@BOTH
def test_nelbo_12_estimates_the_enumerated_value(attention):
    model = toy_model(attention_mode=attention, scale=4.0, **SMALL)
    row = torch.tensor([0, 2, 1, 2])
    bounds = [e.nelbo_12(model, row.repeat(100, 1), seed=seed)[0] for seed in range(8)]
    error = np.std(bounds, ddof=1) / math.sqrt(8)
    assert abs(np.mean(bounds) - enumerated_nelbo_12(model, row)) < 4 * error + 1e-6
    assert error < 0.1


@torch.no_grad()
@BOTH
def test_the_bound_is_a_bound(attention):
    """exp(-NELBO) summed over all texts is at most 1, and exactly 1 for uniform predictions (which
    would exceed 1 if the term at m = 1 were left out)."""
    for scale in (0.0, 4.0):
        model = toy_model(attention_mode=attention, scale=scale, **SMALL)
        total = sum(
            math.exp(-3 * enumerated_nelbo_12(model, torch.tensor([1, *rest])))
            for rest in itertools.product(range(3), repeat=3)
        )
        assert total == pytest.approx(1, abs=1e-5) if scale == 0 else total <= 1
    uniform = toy_model(attention_mode=attention, scale=0.0, **SMALL)
    rows = torch.randint(3, (50, 4))
    if attention == "causal":  # bidirectional estimates are exact in expectation only
        assert e.nelbo_12(uniform, rows, seed=0)[0] == pytest.approx(math.log(3), abs=1e-5)
    assert e.nelbo(uniform, rows, seed=0)[0] == pytest.approx(math.log(3), abs=1e-5)


@torch.no_grad()
def test_left_to_right_is_a_distribution():
    model = toy_model(scale=4.0, **SMALL)
    for block in range(3):
        total = 0.0
        for rest in itertools.product(range(3), repeat=3):
            total += math.exp(-3 * e.left_to_right(model, torch.tensor([[2, *rest]]))[block])
        assert total == pytest.approx(1, abs=1e-5)
    bidirectional = toy_model(attention_mode="bidirectional", **SMALL)
    assert e.left_to_right(bidirectional, torch.zeros(1, 4, dtype=torch.long)) is None


@torch.no_grad()
@BOTH
def test_the_continuous_bound_covers_the_integral(attention):
    """Against the midpoint rule on the enumerated CE(m), for 12 seeds: the error stays within 4
    standard errors (8 replicates, so Student's t with 7 degrees; p < 0.006 each)."""
    model = toy_model(attention_mode=attention, scale=4.0, **SMALL)
    row = torch.tensor([0, 2, 1, 2])
    grid = [(i + 0.5) / 200 for i in range(200)]
    exact = np.mean([enumerated_ce(model, row, m, block_of(m, model.config)) for m in grid])
    outside = 0
    for seed in range(12):
        mean, stderr = e.nelbo(model, row.repeat(64, 1), seed)
        assert 0 < stderr < 0.1
        outside += abs(mean - exact) > 4 * stderr + 2e-3
    assert outside <= 1


@torch.no_grad()
def test_metrics_repeat_to_the_last_digit_whatever_the_batch():
    model, rows = toy_model(), torch.randint(5, (30, 8))
    assert e.evaluate(model, rows, 3, "fp32") == e.evaluate(model, rows, 3, "fp32")
    noise, m = e.row_noise(30, 8, 3, 0), torch.full((30,), 0.5)
    one = e.score(model, rows, m, 1, noise, batch_size=30)[0]
    two = e.score(model, rows, m, 1, noise, batch_size=7)[0]
    assert torch.allclose(one, two, atol=1e-6)


def test_unigram_entropy_by_hand():
    # counts + 1 over ids 0, 1, 2: 3, 2, 1 of 6
    expected = -(math.log(3 / 6) + math.log(1 / 6)) / 2
    assert e.unigram_entropy([0, 0, 1], [0, 2], 3) == pytest.approx(expected)


@BOTH
def test_samples_keep_the_prompt_and_hold_no_mask(attention):
    model = toy_model(attention_mode=attention)
    ids, layers = e.sample(model, [1, 4], 8, seed=1)
    assert ids[:2].tolist() == [1, 4] and len(ids) == 8
    assert ids.max() < TOY.vocab_size
    assert layers == 4 * 2 + 3 * 4 + 5 * 6  # 50 of 72 layer evaluations: depth by noise
    again, _ = e.sample(model, [1, 4], 8, seed=1)
    assert torch.equal(ids, again)


def test_left_to_right_samples_from_any_exit():
    model = toy_model()
    for block in range(3):
        ids = e.sample_left_to_right(model, [3], 8, block)
        assert len(ids) == 8 and ids[0] == 3 and ids.max() < TOY.vocab_size
