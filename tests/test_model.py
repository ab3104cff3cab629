"""The network, the schedule and the objective against definitions and plain torch; GPT-2's weights.

tests/gpt2_golden/ holds a small random model as `transformers` writes it, and what `transformers`
computes with it; `make_golden` is the recipe. Only the last test needs that package.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import toy_config

import lora
import quant
from data_loader import UserError, load_config, read_tensors, write_tensors
from model import (GPT, _ChunkedCrossEntropy, attend, block_of, corrupt, diffusion_loss,
                   read_pretrained, reverse_step, sample_tokens, stratified, tied_cross_entropy,
                   time_steps_of, token_weights)

TOY = toy_config(vocab_size=5, d_model=16, n_layers=6, seq_len=8, block_size=2)
BOTH = pytest.mark.parametrize("attention", ["causal", "bidirectional"])


def toy_model(seed=0, scale=8.0, **changes):
    """A small random GPT in eval mode; weights scaled up so that predictions are far from flat."""
    torch.manual_seed(seed)
    model = GPT(dataclasses.replace(TOY, **changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= scale
    return model


def text(rows, config=TOY):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (rows, config.seq_len), generator=generator)


def noise(rows, seed=0):
    return torch.rand(rows, TOY.seq_len, generator=torch.Generator().manual_seed(seed))


# --- the network -----------------------------------------------------------------------------


def test_gpt2_small_has_its_size():
    """GPT-2 Small has 124,439,808 parameters with 50,257 rows and 1,024 positions."""
    config = dataclasses.replace(load_config().model, seq_len=1024)
    with torch.device("meta"):
        model = GPT(config)
    count = sum(p.numel() for p in model.parameters())
    extra_rows = (config.padded_vocab_size - 50257) * 768
    extra_exit_norms = 2 * 2 * 768
    assert config.padded_vocab_size == 50304 and config.mask_id == 50257
    assert count - extra_rows - extra_exit_norms == 124_439_808


def test_a_new_block_starts_as_in_gpt2():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TOY, d_model=128), blocks=0)
    assert len(model.h) == model.blocks == 0
    model.grow()
    model.exit_norms[0].weight.data.fill_(7.0)  # as if trained
    model.grow()
    model.grow()
    assert len(model.h) == 6 and (model.exit_norms[2].weight == 7.0).all()
    for name, weight in model.h.named_parameters():
        if name.endswith("c_proj.weight"):  # writes into the residual stream: 2 per layer
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.03), name
        elif weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert (weight == float("ln_" in name and "weight" in name)).all(), name
    with pytest.raises(ValueError, match="all 3 blocks exist"):
        model.grow()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_torchs_on_both_sides_of_the_switch(causal):
    for T in (1, 8, 512, 513):
        q, k, v = torch.randn(3, 1, 2, T, 4, generator=torch.Generator().manual_seed(T))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(attend(q, k, v, causal, 0.0), expected, atol=1e-6, rtol=1e-5)


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
    uniform = torch.ones(2, TOY.seq_len)
    uniform[:, i] = 0.0  # mask exactly position i
    half = torch.full((2,), 0.5)
    x_t, mask = corrupt(x, half, uniform, TOY.mask_id)
    assert mask.sum() == 2 and mask[:, i].all()
    for change in range(1, TOY.vocab_size):
        other = x.clone()
        other[:, i] = (x[:, i] + change) % TOY.vocab_size
        other_t, _ = corrupt(other, half, uniform, TOY.mask_id)
        assert torch.equal(model(x_t)[:, i - 1], model(other_t)[:, i - 1])
    for side in (i - 2, i + 1):
        seen = x_t.clone()
        seen[:, side] = (seen[:, side] + 1) % TOY.vocab_size
        assert not torch.equal(model(x_t)[:, i - 1], model(seen)[:, i - 1])


@BOTH
def test_mask_is_never_predicted(attention):
    logits = toy_model(attention_mode=attention)(text(3))
    assert logits.shape == (3, TOY.seq_len, TOY.padded_vocab_size)
    assert (logits[..., TOY.vocab_size :] == -torch.inf).all()
    assert logits[..., : TOY.vocab_size].isfinite().all()
    drawn = sample_tokens(logits.flatten(0, 1), temperature=50.0)
    assert set(drawn.tolist()) == set(range(TOY.vocab_size))


def test_an_exit_runs_only_the_layers_up_to_its_block():
    model, ran = toy_model(), []
    for i, layer in enumerate(model.h):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    for block, layers in ((0, 2), (1, 4), (2, 6), (None, 6)):
        ran.clear()
        model(text(1), block)
        assert ran == list(range(layers))
    model = GPT(TOY, blocks=1)
    for missing in (1, -1):
        with pytest.raises(ValueError, match=f"exit {missing} does not exist"):
            model(text(1), missing)
    with pytest.raises(ValueError, match="9 positions, but seq_len is 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_the_row_of_mask_is_trained_beside_a_frozen_embedding():
    model, x = toy_model(), text(3)
    without_mask = model(x)
    x[:, 4] = TOY.mask_id
    before = model(x)
    model.requires_grad_(False)
    model.add_mask_row()
    assert model.mask_row.shape == (TOY.d_model,) and model.mask_row.requires_grad
    assert torch.equal(model.mask_row, model.wte.weight[TOY.mask_id])
    assert torch.equal(model(x), before)
    model(x)[..., : TOY.vocab_size].square().sum().backward()
    assert model.mask_row.grad.abs().sum() > 0 and model.wte.weight.grad is None
    model.mask_row.data += 1.0
    after = model(x)
    assert torch.equal(after[:, :4], before[:, :4])  # text is read through the embedding as before
    assert not torch.equal(after[:, 4], before[:, 4])
    assert torch.equal(model(text(3)), without_mask)
    model.wte.half()  # stored, as plain QLoRA has it: the row that trains stays fp32
    model.add_mask_row()
    assert model.mask_row.dtype == torch.float32


# --- the forward process ---------------------------------------------------------------------


def test_each_mask_fraction_has_one_owner_and_no_time_step_is_lost():
    for m in [1e-9, *(i / 1000 for i in range(1, 1001))]:
        owners = [k for k, (low, high) in enumerate(TOY.block_mask_ranges) if low < m <= high]
        assert owners == [block_of(m, TOY)]
    assert [block_of(m, TOY) for m in (0.4, 0.41, 0.7, 0.71, 1.0)] == [0, 1, 1, 2, 2]
    for outside in (0.0, 1.01, -0.1):
        with pytest.raises(ValueError, match="outside"):
            block_of(outside, TOY)
    dealt = [time_steps_of(block, TOY) for block in range(3)]
    assert dealt == [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7), (0.8, 0.85, 0.9, 0.95, 0.99)]


def test_batches_hold_every_time_step_equally_often():
    m = stratified((0.1, 0.2, 0.3, 0.4), 8, offset=3)
    assert m.tolist() == pytest.approx([0.4, 0.1, 0.2, 0.3] * 2)


def test_corruption_masks_the_stated_fraction_and_never_position_0():
    x_0 = torch.zeros(4000, 8, dtype=torch.long)
    x_t, mask = corrupt(x_0, torch.full((4000,), 0.3), noise(4000), 5)
    assert not mask[:, 0].any()
    assert torch.equal(x_t == 5, mask)
    # 28,000 draws: standard deviation 0.0027; 5 of them
    assert abs(mask[:, 1:].float().mean().item() - 0.3) < 0.014


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
    x_t, mask = corrupt(x_0, m, noise(4, seed=1), TOY.mask_id)
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
    x_t, mask = corrupt(x_0, m, noise(8), TOY.mask_id)
    results = []
    for size in (8, 4, 3, 1):
        model.zero_grad()
        total = 0.0
        for i in range(0, 8, size):
            micro = [t[i : i + size] for t in (x_0, x_t, mask, m)]
            loss, _, _ = diffusion_loss(model, *micro, 0, rows=8)
            loss.backward()
            total += loss.item()
        results.append((total, model.wte.weight.grad.clone()))
    for total, grad in results[1:]:
        assert abs(total - results[0][0]) < 1e-5
        torch.testing.assert_close(grad, results[0][1], atol=1e-5, rtol=1e-5)


@BOTH
def test_scoring_without_gradients_tells_right_from_wrong(attention):
    """Also while the embedding is in training, as in the validation of stage 0."""
    model, x_0 = toy_model(attention_mode=attention), text(6)
    m = torch.full((6,), 0.5)
    x_t, mask = corrupt(x_0, m, noise(6), TOY.mask_id)
    assert model.wte.weight.requires_grad
    with torch.no_grad():
        _, _, hit = diffusion_loss(model, x_0, x_t, mask, m, 1)
    right = (model(x_t, 1)[:, :-1].argmax(-1) == x_0[:, 1:]).float()
    scored = torch.ones_like(right) if attention == "causal" else mask[:, 1:].float()
    assert 0 < (right * scored).sum() < scored.sum()
    torch.testing.assert_close(hit, (right * scored).sum(1) / scored.sum(1))


@BOTH
def test_one_batch_can_be_overfitted(attention):
    torch.manual_seed(0)
    model, x_0 = GPT(dataclasses.replace(TOY, d_model=32, attention_mode=attention)), text(4)
    x_0[:, 0] = torch.arange(4)  # a causal model can tell the rows apart from the first token on
    m = torch.full((4,), 0.4)
    x_t, mask = corrupt(x_0, m, noise(4), TOY.mask_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss, _, _ = diffusion_loss(model, x_0, x_t, mask, m, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05  # from log 5 = 1.61


# --- the objective, fast ---------------------------------------------------------------------


@pytest.fixture
def sizes(monkeypatch):
    """How many positions the head was asked for, call by call."""
    asked, forward = [], _ChunkedCrossEntropy.forward

    def watched(ctx, hidden, *rest):
        asked.append(len(hidden))
        return forward(ctx, hidden, *rest)

    monkeypatch.setattr(_ChunkedCrossEntropy, "forward", staticmethod(watched))
    return asked


def test_tied_cross_entropy_is_cross_entropy(monkeypatch, sizes):
    """Loss, cross-entropies and gradients in fp64: all positions, some, one, none; any chunks."""
    model = toy_model().double()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 15, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(5, (6, 15), generator=generator)
    weights, W = torch.rand(6, 15, generator=generator), model.wte.weight
    logits = (hidden @ W.T)[..., :5]  # (6, 15, 5)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(6, 15)
    some = weights > 0.3
    one = torch.arange(90).view(6, 15) == 37
    assert 64 < some.sum() < 90
    cases = ((None, 90), (some, 128), (one, 64), (some & False, 0))
    for (scored, size), chunk in itertools.product(cases, (1, 7, 64, 512)):
        monkeypatch.setattr("model.CHUNK", chunk)
        monkeypatch.setattr("model.SLICE", 3 * chunk + 2)
        kept = torch.ones_like(some) if scored is None else scored
        loss, ce, _ = tied_cross_entropy(model, hidden, targets, weights * kept, scored)
        assert sizes.pop() == size  # masked positions in multiples of 64, for the kernels' sake
        torch.testing.assert_close(ce.double(), plain * kept, atol=1e-5, rtol=1e-5)
        expected = (plain * weights * kept).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours = torch.autograd.grad(3 * loss, (hidden, W), allow_unused=True)
        theirs = torch.autograd.grad(3 * expected, (hidden, W), retain_graph=True)
        for a, b in zip(ours, theirs):
            assert torch.allclose(torch.zeros_like(b) if a is None else a, b, atol=1e-7)
        assert (ours[1] is None or not ours[1][5:].any())  # [MASK] and padding learn nothing here


def test_small_weights_do_not_vanish_in_half_precision():
    """Weights of 1e-4, as in training: times probabilities of 1e-4 they would be 0 in fp16."""
    torch.manual_seed(0)
    model = GPT(toy_config(vocab_size=4000), blocks=0)
    hidden = torch.randn(4, 15, 32, requires_grad=True)
    targets, weights = torch.randint(4000, (4, 15)), torch.full((4, 15), 1e-4)
    both = (hidden, model.wte.weight)
    exact = torch.autograd.grad(tied_cross_entropy(model, hidden, targets, weights)[0], both)
    for dtype, most in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        with torch.autocast("cpu", dtype):
            loss, _, _ = tied_cross_entropy(model, hidden, targets, weights)
        for a, b in zip(torch.autograd.grad(loss, both), exact):
            assert a.dtype == torch.float32 and (a - b).norm() < most * b.norm(), dtype


def test_hopeless_predictions_cost_what_they_cost():
    """A target 300 nats below the best has probability 0 in fp32, but a finite loss."""
    model = toy_model(d_model=2)
    model.wte.weight.data[:5] = torch.tensor([[0.0, 0], [300, 0], [0, 0], [0, 0], [0, 0]])
    hidden, targets = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0]])
    _, ce, hit = tied_cross_entropy(model, hidden, targets, torch.ones(1, 1))
    assert ce.item() == pytest.approx(300.0) and not hit.item()


def test_no_head_gradient_where_the_embedding_is_frozen():
    model = toy_model()
    model.wte.requires_grad_(False)
    hidden = torch.randn(2, 2, 16, requires_grad=True)
    loss, _, _ = tied_cross_entropy(model, hidden, text(2)[:, :2], torch.ones(2, 2))
    assert loss.grad_fn.saved_tensors[1] is None
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and model.wte.weight.grad is None


def test_a_causal_training_step_never_waits_for_a_number_of_masks(monkeypatch, sizes):
    """nonzero makes a GPU's queue run empty. Bidirectional training needs it; causal does not."""
    x_0, m = text(40), torch.full((40,), 0.5)
    x_t, mask = corrupt(x_0, m, noise(40), TOY.mask_id)

    def refuse(*_, **__):
        raise AssertionError("nonzero")

    monkeypatch.setattr(torch.Tensor, "nonzero", refuse)
    monkeypatch.setattr(torch, "nonzero", refuse)
    diffusion_loss(toy_model(), x_0, x_t, mask, m, 1)[0].backward()
    assert sizes == [40 * 7]
    with pytest.raises(AssertionError, match="nonzero"):
        diffusion_loss(toy_model(attention_mode="bidirectional"), x_0, x_t, mask, m, 1)


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
    assert set(sample_tokens(logits).tolist()) == {0, 1, 2, 3}
    assert set(sample_tokens(logits, top_p=0.7).tolist()) == {0, 1}
    assert set(sample_tokens(logits, top_p=0.01).tolist()) == {0}
    for temperature in (0, 1e-39):
        assert set(sample_tokens(logits, temperature=temperature).tolist()) == {0}


# --- GPT-2's weights: parity -----------------------------------------------------------------

GOLDEN = Path(__file__).parent / "gpt2_golden"
TWO_BLOCKS = toy_config(
    vocab_size=61, n_layers=2, n_heads=4, total_blocks=2, block_mask_ranges=((0.0, 0.5), (0.5, 1.0))
)  # the golden model's sizes
IDX = torch.arange(16)[None]


def reference_model(seed, n_positions, **sizes):
    """A random transformers.GPT2LMHeadModel, far from its flat start. Needs transformers."""
    import transformers

    end = sizes["vocab_size"] - 1
    config = transformers.GPT2Config(
        n_positions=n_positions, bos_token_id=end, eos_token_id=end, **sizes
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        start = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        linear = parameter.dim() == 2 and ".h." in name
        scale = sizes["n_embd"] ** -0.5 if linear else 0.3
        parameter.data = start + scale * torch.randn(parameter.shape, generator=generator)
    return reference


def make_golden():
    """The recipe of tests/gpt2_golden/ (torch 2.13.0, transformers 5.23.0, safetensors 0.8.0)."""
    from safetensors.torch import save_file

    reference = reference_model(0, 16, vocab_size=61, n_embd=32, n_layer=2, n_head=4)
    reference.save_pretrained(GOLDEN)
    (GOLDEN / "generation_config.json").unlink(missing_ok=True)
    idx = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    out = reference(idx, labels=idx)
    out.loss.backward()
    parameters = dict(reference.transformer.named_parameters())
    grads = ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias",
             "h.1.mlp.c_proj.weight", "h.1.ln_2.weight", "ln_f.bias")  # fmt: skip
    expected = {"idx": idx, "logits": out.logits.detach(), "loss": out.loss.detach()}
    expected |= {f"grad.{name}": parameters[name].grad for name in grads}
    save_file(expected, GOLDEN / "expected.safetensors")


def stored(path):
    """The tensors of a safetensors file."""
    return read_tensors(path, sealed=False)[0]


def compare(model, idx, logits, loss=None, grads=()):
    """1e-4 on every logit, 1e-4 relative on the loss (GPT-2's is ours at m = 0) and gradients."""
    n_text = model.config.vocab_size
    ours = model(idx)
    torch.testing.assert_close(ours[..., :n_text], logits, atol=1e-4, rtol=0)
    assert (ours[..., n_text:] == -torch.inf).all()
    if loss is None:
        return
    model.zero_grad()
    ours, _, _ = diffusion_loss(model, idx, idx, idx < 0, torch.zeros(len(idx)), model.blocks - 1)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
    parameters = dict(model.named_parameters())
    for name, expected in grads.items():
        grad = parameters[name.replace("ln_f", f"exit_norms.{model.blocks - 1}")].grad
        grad = grad[:n_text] if name == "wte.weight" else grad
        grad = grad.t() if name.startswith("h.") else grad
        error = (grad - expected).norm() / expected.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


def golden_copy(folder, change=None, **description):
    """The golden model in `folder`, tensors after `change(tensors)`, config.json updated."""
    tensors = stored(GOLDEN / "model.safetensors")
    write_tensors(folder / "model.safetensors", change(tensors) if change else tensors,
                  sealed=False)  # fmt: skip
    config = json.loads((GOLDEN / "config.json").read_text()) | description
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(a, b):
    """Whether two GPTs have the same parameters, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(path, *words, config=None):
    """Reading `path` ends in one UserError, of one line and readable length. -> the line"""
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(path, config)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 + len(str(path)), message
    for word in words:
        assert word in message, message
    return message


def test_golden_logits_loss_and_gradients():
    expected = stored(GOLDEN / "expected.safetensors")
    grads = {n.removeprefix("grad."): t for n, t in expected.items() if n.startswith("grad.")}
    model = GPT.from_pretrained(GOLDEN)
    assert model.config == dataclasses.replace(
        TWO_BLOCKS, total_blocks=1, block_size=2, block_mask_ranges=((0.0, 1.0),),
        time_step_mask_fractions=(1.0,), init_from=str(GOLDEN),
    )  # fmt: skip
    assert len(grads) == 7
    compare(model, expected["idx"], expected["logits"], expected["loss"], grads)
    assert expected["logits"].std() > 1  # far from flat, so that the comparison means something


# --- GPT-2's weights: in ---------------------------------------------------------------------


def test_every_spelling_of_the_layout_gives_the_same_model(tmp_path):
    reference = GPT.from_pretrained(GOLDEN)

    def bare(tensors):
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    def with_head(tensors):
        return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}

    def with_buffers(tensors):
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        buffers = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.bias": mask.float()}
        return tensors | buffers | {"transformer.h.0.attn.masked_bias": torch.tensor([-1e4])}

    for change in (bare, with_head, with_buffers):
        folder = golden_copy(tmp_path / change.__name__, change)
        assert same(GPT.from_pretrained(folder), reference), change.__name__
        assert same(GPT.from_pretrained(str(folder / "model.safetensors")), reference)
    tensors = with_head(with_buffers(stored(GOLDEN / "model.safetensors")))
    shutil.copy(GOLDEN / "config.json", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    for zipped in (True, False):  # the second is how files were before 2020
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        assert same(GPT.from_pretrained(file), reference)
        assert same(GPT.from_pretrained(tmp_path), reference)


def test_half_precision_becomes_fp32_and_is_written_on_request(tmp_path):
    reference = GPT.from_pretrained(GOLDEN)
    for dtype in (torch.float16, torch.bfloat16):
        reference.save_pretrained(tmp_path, dtype=dtype)
        assert {t.dtype for t in stored(tmp_path / "model.safetensors").values()} == {dtype}
        for name, parameter in GPT.from_pretrained(tmp_path).named_parameters():
            assert parameter.dtype == torch.float32
            rows = 61 if name == "wte.weight" else None  # the others are a mean
            expected = reference.get_parameter(name)[:rows].to(dtype).float()
            assert torch.equal(parameter[:rows], expected), name


def test_the_trainers_config_is_filled_block_by_block():
    config = dataclasses.replace(TWO_BLOCKS, seq_len=12, attention_mode="bidirectional")
    same_config, tensors = read_pretrained(GOLDEN, config)
    assert same_config is config
    model = GPT(config, blocks=0)
    model.grow()
    model.fill_from(tensors, 0)
    file = stored(GOLDEN / "model.safetensors")
    assert torch.equal(model.wpe.weight, file["transformer.wpe.weight"][:12])  # cropped
    words = file["transformer.wte.weight"]
    assert torch.equal(model.wte.weight[:61], words)
    assert (model.wte.weight[61:] == words.mean(0)).all()  # [MASK] and the padding rows
    model.exit_norms[0].weight.data.fill_(7.0)  # as if trained; the next stage starts from ln_f
    first = {name: p.clone() for name, p in model.block_parameters(0).items()}
    model.grow()
    model.fill_from(tensors, 1)
    assert all(torch.equal(p, first[name]) for name, p in model.block_parameters(0).items())
    assert torch.equal(model.exit_norms[1].weight, file["transformer.ln_f.weight"])
    assert torch.equal(model.exit_norms[1].bias, file["transformer.ln_f.bias"])
    model.exit_norms[0].load_state_dict(model.exit_norms[1].state_dict())
    assert same(model, GPT.from_pretrained(GOLDEN, config))


def test_reading_does_not_change_the_file(tmp_path):
    folder = golden_copy(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").chmod(0o444)
    _, tensors = read_pretrained(folder)
    tensors["wte.weight"].zero_()  # a private mapping
    GPT.from_pretrained(folder).wte.weight.data.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_sizes_that_disagree_are_named():
    for changes, words in (
        ({"vocab_size": 62}, ["model.vocab_size=61 (not 62)"]),
        ({"d_model": 64}, ["model.d_model=32 (not 64)"]),
        ({"n_heads": 2}, ["model.n_heads=4 (not 2)"]),
        ({"n_layers": 4, "block_size": 2}, ["model.n_layers=2 (not 4)"]),
        ({"seq_len": 17, "vocab_size": 62}, ["model.vocab_size=61", "model.seq_len=16 (not 17)"]),
    ):
        config = dataclasses.replace(TWO_BLOCKS, **changes)
        message = refused(GOLDEN, "config.json: to start from", *words, config=config)
        assert message.count("model.") == len(words)  # and nothing that agrees


def test_another_network_is_refused_by_name(tmp_path):
    for description, word in (
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"activation_function": "gelu"}, "activation_function 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_layer": None}, "n_layer"),
        ({"n_layer": True}, "n_layer"),
        ({"n_layer": -1}, "n_layers must be from 1 to 10^6"),
        ({"n_embd": "32"}, "n_embd"),
        ({"n_embd": 10**9}, "n_embd"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"n_head": 5}, "n_heads 5 does not divide"),
    ):
        refused(golden_copy(tmp_path, **description), "config.json: ", word)


def test_sizes_that_no_file_has_end_in_one_line_too(tmp_path):
    """As they are used before the weights are looked at: neither memory nor minutes may be lost."""
    golden_copy(tmp_path, n_layer=60000)  # 12 tensors in each layer
    refused(tmp_path, "h.10.attn.c_attn.bias is missing", f"; and {59998 * 12 - 5} more")
    golden_copy(tmp_path, n_embd=2**19)
    refused(tmp_path, "h.0.attn.c_attn.bias is torch.float32 (96,), not float (1572864,)")


def test_wrong_tensors_are_named_at_most_five_at_a_time(tmp_path):
    def spoil(tensors):
        tensors = dict(tensors)
        del tensors["transformer.h.1.ln_2.bias"], tensors["transformer.ln_f.weight"]
        tensors["transformer.h.0.crossattention.c_attn.weight"] = torch.zeros(2)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(96, 32)  # not transposed
        tensors["transformer.wpe.weight"] = torch.zeros(16, 32, dtype=torch.int64)
        return tensors

    message = refused(
        golden_copy(tmp_path, spoil),
        "model.safetensors: ",
        "h.1.ln_2.bias is missing",
        "ln_f.weight is missing",
        "h.0.crossattention.c_attn.weight is unknown",
        "h.0.attn.c_attn.weight is torch.float32 (96, 32), not float (32, 96)",
        "wpe.weight is torch.int64 (16, 32)",
    )
    assert message.count(";") == 4 and "more" not in message

    def spoil_more(tensors):
        return spoil(tensors) | {"a": torch.zeros(1), "z": torch.zeros(1)}

    message = refused(golden_copy(tmp_path, spoil_more), "a is unknown", "; and 2 more")
    assert message.count(";") == 5 and "wpe.weight" not in message


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_weights_that_cannot_be_used_end_in_one_line(tmp_path):
    for value in (float("inf"), -float("inf"), float("nan")):
        tensors = stored(GOLDEN / "model.safetensors")  # a private mapping
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = value
        golden_copy(tmp_path, lambda _, tensors=tensors: tensors)
        refused(tmp_path, "model.safetensors: h.1.mlp.c_fc.weight has values that are not finite")
    untied = golden_copy(tmp_path, lambda t: t | {"lm_head.weight": torch.zeros(61, 32)})
    refused(untied, "lm_head.weight is not wte.weight")
    (tmp_path / "model.safetensors").unlink()
    tensors = stored(GOLDEN / "model.safetensors")
    for tensor in (
        torch.zeros(16, 32, device="meta"),
        torch.zeros(16, 32).to(torch.float8_e4m3fn),
        torch.zeros(16, 32, dtype=torch.complex64),
        torch.nested.nested_tensor([torch.zeros(16, 32)]),
    ):
        torch.save(tensors | {"transformer.wpe.weight": tensor}, tmp_path / "pytorch_model.bin")
        refused(tmp_path, "pytorch_model.bin: refused", "'transformer.wpe.weight' is not")


def test_a_folder_without_weights_says_what_to_do(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no model.safetensors.*set model.init_from"):
            GPT.from_pretrained(path)
    shutil.copy(GOLDEN / "model.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        GPT.from_pretrained(tmp_path)
    for content in (b"", b"{", b"[]", b"1", b"[" * 100_000, b"\xff", b"9" * 5000):
        (tmp_path / "config.json").write_bytes(content)
        refused(tmp_path, "config.json: not the config.json of a GPT-2")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_is_no_plain_tensors_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    for value in (Evil(), {"a": Evil()}, [1], {"a": 1}, {0: torch.zeros(1)},
                  {"a": torch.eye(2).to_sparse()}):  # fmt: skip
        for zipped in (True, False):
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
            refused(tmp_path, "pytorch_model.bin: refused, not plain tensors")
    for content in (b"", b"PK not a zip", b"\x80\x02."):
        file.write_bytes(content)
        refused(tmp_path, "refused, not plain tensors")
    assert not (tmp_path / "evil").exists()


def test_download(tmp_path, monkeypatch):
    """`gpt2` without a network is one clear line; with one, two files, fetched once, checked."""
    monkeypatch.chdir(tmp_path)
    source, asked = None, []

    def retrieve(url, target):
        asked.append(url.rpartition("/")[2])
        if source is None:
            raise urllib.error.URLError("no network")
        shutil.copy(source / asked[-1], target)

    monkeypatch.setattr(urllib.request, "urlretrieve", retrieve)
    with pytest.raises(OSError, match="cannot download GPT-2's config.json .*no network.*cache"):
        GPT.from_pretrained("gpt2", cache="cache")
    source = golden_copy(tmp_path / "bad")
    (source / "model.safetensors").write_bytes(b"<html>please log in</html>")
    with pytest.raises(OSError, match="cannot download GPT-2's model.safetensors"):
        GPT.from_pretrained("gpt2", cache="cache")
    (source / "config.json").write_bytes(b"<html>please log in</html>")
    with pytest.raises(OSError, match="cannot download GPT-2's config.json"):
        GPT.from_pretrained("gpt2", cache="elsewhere")
    assert not (tmp_path / "cache" / "gpt2" / "model.safetensors").exists()
    assert not (tmp_path / "elsewhere" / "gpt2" / "config.json").exists()
    source, asked[:] = GOLDEN, []
    model = GPT.from_pretrained("gpt2", cache="cache")
    assert asked == ["model.safetensors"]  # the configuration was there already
    assert same(GPT.from_pretrained("gpt2", cache="cache"), model) and len(asked) == 1
    assert same(GPT.from_pretrained(GOLDEN), model)


# --- GPT-2's weights: out --------------------------------------------------------------------


def test_round_trip_is_exact(tmp_path):
    model, folder = GPT.from_pretrained(GOLDEN), tmp_path / "a" / "b"
    model.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert same(GPT.from_pretrained(folder), model)
    ours = stored(folder / "model.safetensors")
    theirs = stored(GOLDEN / "model.safetensors")
    assert ours.keys() == theirs.keys()  # names, shapes and bits as the reference writes them
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    theirs = json.loads((GOLDEN / "config.json").read_text())
    for key, value in json.loads((folder / "config.json").read_text()).items():
        assert value == (0.0 if "pdrop" in key else theirs[key]), key


def test_an_earlier_exit_is_a_shorter_gpt2(tmp_path):
    model = GPT.from_pretrained(GOLDEN, TWO_BLOCKS)
    model.exit_norms[0].weight.data *= 1.5  # each exit reads through its own norm
    for exit_k in (0, 1, None):
        model.save_pretrained(tmp_path, exit_k)  # over the file of the exit before
        loaded = GPT.from_pretrained(tmp_path)
        assert len(loaded.h) == (1 if exit_k == 0 else 2)
        assert torch.equal(loaded(IDX)[..., :61], model(IDX, exit_k)[..., :61])
    for exit_k in (2, -1):
        with pytest.raises(UserError, match=f"exit {exit_k} does not exist"):
            model.save_pretrained(tmp_path, exit_k)


@pytest.mark.parametrize("kind", quant.KINDS)
def test_quantized_layers_and_adapters(tmp_path, kind):
    """Exit 1 with block 0 quantized and adapted: refused, then merged, then the same logits."""
    model = GPT.from_pretrained(GOLDEN, TWO_BLOCKS)
    quant.freeze_block(model, 0, kind)
    before = model(IDX)[..., :61]
    model.save_pretrained(tmp_path / "quantized")
    loaded = GPT.from_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(loaded(IDX)[..., :61], before, atol=1e-4, rtol=1e-4)
    lora.add_adapters(model, 1, [0], rank=2, alpha=4)
    torch.manual_seed(0)
    for parameter in lora.adapter_parameters(model, 1).values():
        parameter.data.normal_(std=0.1)
    after = model(IDX)[..., :61]
    assert (after - before).abs().max() > 0.1
    with pytest.raises(UserError, match=r"lora.merge\(model, exit\)"):
        model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lora.merge(model, 1).save_pretrained(tmp_path / "merged")
    loaded = GPT.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(IDX)[..., :61], after, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    folder = golden_copy(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = GPT.from_pretrained(folder)
    model.h[1].mlp.c_fc.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match="h.1.mlp.c_fc.weight has values that are not finite"):
        model.save_pretrained(folder, dtype=torch.float16)
    both = dataclasses.replace(model.config, attention_mode="bidirectional")
    with pytest.raises(UserError, match="causal"):
        GPT.from_pretrained(folder, both).save_pretrained(folder)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_live_against_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(3)
    for vocab_size, n_embd, n_layer, n_head in ((61, 32, 2, 4), (999, 96, 5, 3), (257, 256, 1, 16)):
        reference = reference_model(
            7, 1024, vocab_size=vocab_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head
        )
        reference.save_pretrained(tmp_path / "theirs")
        model = GPT.from_pretrained(tmp_path / "theirs")
        model.save_pretrained(tmp_path / "ours")
        back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
        assert back.dtype == torch.float32
        for T in (1, 7, 1024):
            idx = torch.randint(0, vocab_size, (2, T), generator=generator)
            out = reference(idx, labels=idx if T > 1 else None)
            assert torch.equal(back(idx).logits, out.logits)
            if T == 1:
                compare(model, idx, out.logits.detach())
                continue
            reference.zero_grad()
            out.loss.backward()
            grads = {name: p.grad for name, p in reference.transformer.named_parameters()}
            compare(model, idx, out.logits.detach(), out.loss, grads)
