"""The network, the masking schedule and the objective, against definitions and plain torch."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from model import (
    GPT,
    ModelConfig,
    block_of,
    chunked_cross_entropy,
    corrupt,
    diffusion_loss,
    reverse_step,
    sample_tokens,
    stratified,
    time_steps_of,
    token_weights,
)

TOY = ModelConfig(vocab_size=5, d_model=16, n_layers=6, n_heads=2, seq_len=8, block_size=2)
BOTH = pytest.mark.parametrize("attention", ["causal", "bidirectional"])


def toy_model(seed=0, scale=8.0, **changes):
    """A small random GPT in eval mode; weights scaled up so that predictions are far from flat."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TOY, **changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= scale
    return model


def text(rows, config=TOY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, config.seq_len), generator=generator)


# --- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"n_heads": 3}, "n_heads 3 does not divide"),
        ({"n_layers": 7}, "must equal n_layers 7"),
        ({"attention_mode": "casual"}, "attention_mode"),
        ({"dropout": 1.0}, "dropout"),
        ({"seq_len": 1}, "seq_len"),
        ({"block_mask_ranges": ((0.0, 0.4), (0.4, 1.0))}, "block_mask_ranges needs one range"),
        ({"block_mask_ranges": ((0.0, 0.4), (0.5, 0.7), (0.7, 1.0))}, "without hole"),
        ({"block_mask_ranges": ((0.0, 0.4), (0.3, 0.7), (0.7, 1.0))}, "without hole"),
        ({"block_mask_ranges": ((0.0, 0.4), (0.4, 0.7), (0.7, 0.9))}, "end at 1.0"),
        ({"time_step_mask_fractions": (0.2, 0.1, 0.5, 0.8)}, "must increase"),
        ({"time_step_mask_fractions": (0.0, 0.1, 0.5, 0.8)}, "in (0, 1]"),
        ({"time_step_mask_fractions": (0.1, 0.5, 1.1)}, "in (0, 1]"),
        ({"time_step_mask_fractions": (0.1, 0.8)}, "no time step in block 1"),
    ],
)
def test_impossible_configurations_are_named(changes, named):
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        dataclasses.replace(TOY, **changes)


def test_gpt2_small_has_its_size():
    """GPT-2 Small has 124,439,808 parameters with 50,257 rows and 1,024 positions."""
    with torch.device("meta"):
        model = GPT(ModelConfig(seq_len=1024))
    count = sum(p.numel() for p in model.parameters())
    extra_rows = (ModelConfig().rows - 50257) * 768
    extra_exit_norms = 2 * 2 * 768
    assert ModelConfig().rows == 50304 and ModelConfig().mask_id == 50257
    assert count - extra_rows - extra_exit_norms == 124_439_808


# --- the schedule ----------------------------------------------------------------------------


def test_each_mask_fraction_has_one_owner():
    for m in [1e-9, *(i / 1000 for i in range(1, 1001))]:
        owners = [k for k, (low, high) in enumerate(TOY.block_mask_ranges) if low < m <= high]
        assert owners == [block_of(m, TOY)]
    assert [block_of(m, TOY) for m in (0.4, 0.41, 0.7, 0.71, 1.0)] == [0, 1, 1, 2, 2]
    for outside in (0.0, 1.01, -0.1):
        with pytest.raises(ValueError, match="outside"):
            block_of(outside, TOY)


def test_time_steps_are_dealt_to_the_bands_and_none_is_lost():
    dealt = [time_steps_of(block, TOY) for block in range(3)]
    assert dealt == [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7), (0.8, 0.85, 0.9, 0.95, 0.99)]


def test_batches_hold_every_time_step_equally_often():
    m = stratified((0.1, 0.2, 0.3, 0.4), 8, offset=3)
    assert m.tolist() == pytest.approx([0.4, 0.1, 0.2, 0.3] * 2)


def test_corruption_masks_the_stated_fraction_and_never_position_0():
    x_0 = torch.zeros(4000, 8, dtype=torch.long)
    m = torch.full((4000,), 0.3)
    x_t, mask = corrupt(x_0, m, torch.rand(4000, 8, generator=torch.Generator().manual_seed(0)), 5)
    assert not mask[:, 0].any()
    assert torch.equal(x_t == 5, mask)
    # 28,000 draws: standard deviation 0.0027; 5 of them
    assert abs(mask[:, 1:].float().mean().item() - 0.3) < 0.014


# --- no leakage ------------------------------------------------------------------------------


def test_a_causal_prediction_never_depends_on_the_token_itself_or_later_ones():
    model, x = toy_model(), text(2)
    for i in range(1, TOY.seq_len):
        changed = x.clone()
        changed[:, i:] = (changed[:, i:] + 1) % TOY.vocab_size
        assert torch.equal(model(x)[:, :i], model(changed)[:, :i])  # predict tokens 1 .. i
        assert not torch.equal(model(x)[:, i], model(changed)[:, i])


def test_a_bidirectional_prediction_sees_both_sides_but_not_the_masked_token():
    model, x = toy_model(attention_mode="bidirectional"), text(2)
    i = 4
    hide = torch.zeros(2, TOY.seq_len)
    hide[:, i] = 1.0  # mask exactly position i
    for change in range(1, TOY.vocab_size):
        other = x.clone()
        other[:, i] = (x[:, i] + change) % TOY.vocab_size
        x_t, _ = corrupt(x, torch.full((2,), 0.5), 1 - hide, TOY.mask_id)
        other_t, _ = corrupt(other, torch.full((2,), 0.5), 1 - hide, TOY.mask_id)
        assert torch.equal(model(x_t)[:, i - 1], model(other_t)[:, i - 1])
    later = x_t.clone()
    later[:, i + 1] = (later[:, i + 1] + 1) % TOY.vocab_size
    assert not torch.equal(model(x_t)[:, i - 1], model(later)[:, i - 1])


@BOTH
def test_mask_is_never_predicted(attention):
    model = toy_model(attention_mode=attention)
    logits = model(text(3))
    assert logits.shape == (3, TOY.seq_len, TOY.rows)
    assert (logits[..., TOY.vocab_size :] == -torch.inf).all()
    assert logits[..., : TOY.vocab_size].isfinite().all()
    drawn = sample_tokens(logits.flatten(0, 1), temperature=50.0)
    assert drawn.max() < TOY.vocab_size


# --- exits -----------------------------------------------------------------------------------


def test_an_exit_runs_only_the_layers_up_to_its_block():
    model, ran = toy_model(), []
    for i, layer in enumerate(model.h):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    for block in range(3):
        ran.clear()
        model(text(1), block)
        assert ran == list(range(2 * (block + 1)))


def test_a_missing_exit_and_a_long_input_are_refused():
    model = GPT(TOY, blocks=1)
    with pytest.raises(ValueError, match="exit 1 does not exist"):
        model(text(1), 1)
    with pytest.raises(ValueError, match="seq_len"):
        model(torch.zeros(1, 9, dtype=torch.long))


# --- the objective ---------------------------------------------------------------------------


def test_the_two_estimators_have_the_same_expectation():
    """Causal model, every mask of 3 predicted positions enumerated with its probability."""
    model = toy_model(seq_len=4)
    x_0 = text(1)[:, :4]
    for m in (0.1, 0.5, 0.99):
        by_masked = by_all = 0.0
        for pattern in itertools.product([False, True], repeat=3):
            mask = torch.tensor([[False, *pattern]])
            weight = math.prod(m if masked else 1 - m for masked in pattern)
            x_t = x_0.masked_fill(mask, TOY.mask_id)
            ce = F.cross_entropy(model(x_t)[0, :-1], x_0[0, 1:], reduction="none")  # (3,)
            fraction = torch.tensor([m])
            by_masked += weight * (ce * token_weights(mask, fraction, causal=False)[0]).sum()
            by_all += weight * (ce * token_weights(mask, fraction, causal=True)[0]).sum()
        assert by_masked.item() == pytest.approx(by_all.item(), rel=1e-5)


@BOTH
def test_the_loss_is_its_definition(attention):
    """Against a plain sum over rows and positions."""
    model, x_0 = toy_model(attention_mode=attention), text(4)
    m = torch.tensor([0.1, 0.5, 0.85, 0.99])
    uniform = torch.rand(4, TOY.seq_len, generator=torch.Generator().manual_seed(1))
    x_t, mask = corrupt(x_0, m, uniform, TOY.mask_id)
    loss, by_row, _ = diffusion_loss(model, x_0, x_t, mask, m, 1)
    ce = -torch.log_softmax(model(x_t, 1), -1)
    for row in range(4):
        total = 0.0
        for i in range(1, TOY.seq_len):
            if attention == "causal":
                total += ce[row, i - 1, x_0[row, i]].item() / 7
            elif mask[row, i]:
                total += ce[row, i - 1, x_0[row, i]].item() / (m[row].item() * 7)
        assert by_row[row].item() == pytest.approx(total, rel=1e-5)
    assert loss.item() == pytest.approx(by_row.mean().item(), rel=1e-6)


@BOTH
def test_micro_batches_add_up(attention):
    model, x_0 = toy_model(attention_mode=attention, scale=3.0), text(8)
    m = stratified((0.1, 0.2, 0.3, 0.4), 8, 0)
    x_t, mask = corrupt(x_0, m, torch.rand(8, TOY.seq_len), TOY.mask_id)
    results = []
    for size in (8, 4, 3, 1):
        model.zero_grad()
        total = 0.0
        for i in range(0, 8, size):
            part = slice(i, i + size)
            loss, _, _ = diffusion_loss(
                model, x_0[part], x_t[part], mask[part], m[part], 0, rows=8
            )
            loss.backward()
            total += loss.item()
        results.append((total, model.wte.weight.grad.clone()))
    for total, grad in results[1:]:
        assert abs(total - results[0][0]) < 1e-5
        assert torch.allclose(grad, results[0][1], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_is_cross_entropy(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(64, 16, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(5, (20,)), torch.rand(20, dtype=torch.float64)
    loss, ce, _ = chunked_cross_entropy(hidden, weight, targets, weights, 5, chunk)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    plain = F.cross_entropy((hidden @ weight.T)[:, :5], targets, reduction="none")
    theirs = torch.autograd.grad(3 * (plain * weights).sum(), (hidden, weight))
    assert torch.allclose(ce.double(), plain, atol=1e-5)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-12)


def test_chunked_cross_entropy_survives_hopeless_predictions():
    """A target 300 nats below the best has probability 0 in fp32, but a finite loss."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [300.0]])
    _, ce, hit = chunked_cross_entropy(hidden, weight, torch.tensor([0]), torch.ones(1), 2)
    assert ce.item() == pytest.approx(300.0) and not hit.item()


def test_scoring_without_gradients_tells_right_from_wrong():
    """Also while the embedding is in training, as in the validation of stage 1."""
    model, x_0 = toy_model(), text(6)
    assert model.wte.weight.requires_grad
    with torch.no_grad():
        _, _, hit = diffusion_loss(model, x_0, x_0, x_0 < 0, torch.zeros(6), 1)
    right = model(x_0, 1)[:, :-1].argmax(-1) == x_0[:, 1:]
    assert 0 < right.float().mean() < 1
    assert torch.allclose(hit, right.float().mean(1))


def test_no_head_gradient_where_the_embedding_is_frozen():
    hidden = torch.randn(4, 16, requires_grad=True)
    weight = torch.randn(64, 16)
    loss, _, _ = chunked_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long),
                                       torch.ones(4), 5)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


@BOTH
def test_one_batch_can_be_overfitted(attention):
    torch.manual_seed(0)
    config = dataclasses.replace(TOY, d_model=32, attention_mode=attention)
    model, x_0 = GPT(config), text(4)
    x_0[:, 0] = torch.arange(4)  # a causal model can tell the rows apart from the first token on
    m = torch.full((4,), 0.4)
    x_t, mask = corrupt(x_0, m, torch.rand(4, TOY.seq_len), TOY.mask_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss, ce, _ = diffusion_loss(model, x_0, x_t, mask, m, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05  # from log 5 = 1.61


# --- the reverse process ---------------------------------------------------------------------


@BOTH
def test_a_reverse_step_reveals_the_scheduled_share_and_changes_nothing_else(attention):
    model = toy_model(attention_mode=attention)
    x_t = torch.full((600, TOY.seq_len), TOY.mask_id)
    x_t[:, 0] = 1
    x_t[:, 3] = 2
    generator = torch.Generator().manual_seed(0)
    x_s = reverse_step(model, x_t, 0.8, 0.6, 2, generator=generator)
    was_masked = x_t == TOY.mask_id
    assert torch.equal(x_s[~was_masked], x_t[~was_masked])
    revealed = (x_s != TOY.mask_id)[was_masked].float().mean().item()
    assert abs(revealed - 0.25) < 0.04  # 3,600 draws: standard deviation 0.007
    assert x_s.max() <= TOY.mask_id
    assert not (reverse_step(model, x_s, 0.1, 0.0, 0) == TOY.mask_id).any()


def test_top_p_keeps_the_smallest_set_and_temperature_0_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    assert set(sample_tokens(logits, top_p=0.7).tolist()) == {0, 1}
    assert set(sample_tokens(logits, top_p=0.01).tolist()) == {0}
    for temperature in (0, 1e-39):
        assert set(sample_tokens(logits, temperature=temperature).tolist()) == {0}


def test_masks_are_scored_in_few_sizes_and_the_padding_counts_nothing(monkeypatch):
    """Every size is a kernel that a matrix library keeps: 1.2 GB of them in a tiny training run."""
    model, x_0, sizes = toy_model(attention_mode="bidirectional"), text(40), set()

    def watched(hidden, weight, targets, weights, vocab_size):
        sizes.add(len(hidden))
        return chunked_cross_entropy(hidden, weight, targets, weights, vocab_size)

    monkeypatch.setattr("model.chunked_cross_entropy", watched)
    for seed in range(10):
        uniform = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(seed))
        m = torch.full((40,), 0.5)
        x_t, mask = corrupt(x_0, m, uniform, TOY.vocab_size)
        loss, ce, _ = diffusion_loss(model, x_0, x_t, mask, m, block=1)
        logits = model(x_t, 1)[:, :-1]  # (B, T-1, V)
        exact = F.cross_entropy(logits.transpose(1, 2), x_0[:, 1:], reduction="none")  # (B, T-1)
        exact = (exact * token_weights(mask, m, causal=False)).sum(1)
        assert torch.allclose(ce, exact, atol=1e-5)
        assert torch.allclose(loss, exact.mean(), atol=1e-5)
    assert len(sizes) <= 2 and all(size % 64 == 0 for size in sizes)
