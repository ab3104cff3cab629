"""The network, the objective and sampling against definitions and plain torch; GPT-2's weights."""

import itertools
import json
import math
import shutil
import urllib.request
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import toy_config

import model as m
from data_loader import UserError, load_config, read_tensors, write_tensors
from model import (GPT, corrupt, diffusion_loss, noise_of_rows, read_pretrained, sample,
                   sample_tokens, score, stratified, tied_cross_entropy)

TOY = toy_config(vocab_size=5, d_model=16, n_layers=6, seq_len=8, block_size=2)
MASK = TOY.mask_id
BOTH = pytest.mark.parametrize("attention", ["causal", "bidirectional"])


def toy_model(seed=0, scale=8.0, **changes):
    """A small random GPT in eval mode; weights scaled up so that predictions are far from flat."""
    torch.manual_seed(seed)
    model = GPT(TOY.replace(**changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= scale
    return model


def text(rows):
    return torch.randint(5, (rows, TOY.seq_len), generator=torch.Generator().manual_seed(0))


def noise(rows):
    return noise_of_rows(rows, TOY.seq_len, seed=0)


def test_gpt2_small_has_its_size():
    """GPT-2 Small has 124,439,808 parameters with 50,257 rows and 1,024 positions."""
    config = load_config().replace(seq_len=1024)
    assert config.padded_vocab_size == 50304 and config.mask_id == 50257
    assert sum(map(math.prod, m.pretrained_shapes(config, 12).values())) == 124_439_808


def test_a_new_block_starts_as_in_gpt2():
    torch.manual_seed(0)
    model = GPT(TOY.replace(d_model=128), blocks=1)
    assert m.exit_of(0.9, model) == 0  # its owner is not there yet
    model.exit_norms[0].weight.data.fill_(7.0)  # as if trained
    model.grow()
    model.grow()
    assert len(model.h) == 6 and (model.exit_norms[2].weight == 7.0).all()
    assert [m.exit_of(fraction, model) for fraction in (0.4, 0.41, 1.0)] == [0, 1, 2]
    for name, weight in model.h.named_parameters():
        if weight.dim() == 2:  # c_proj writes into the residual stream: 2 per layer
            std = 0.02 / math.sqrt(12) if "c_proj" in name else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.03), name
        else:
            assert (weight == float("ln_" in name and "weight" in name)).all(), name


def test_attention_is_torchs_on_both_sides_of_the_switch():
    for T, causal in itertools.product((1, 8, 512, 513), (True, False)):
        q, k, v = torch.randn(3, 1, 2, T, 4, generator=torch.Generator().manual_seed(T))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(m.attend(q, k, v, causal, 0.0), expected, atol=1e-6, rtol=1e-5)


@BOTH
def test_who_sees_whom(attention):
    """Hidden state i predicts token i + 1. Causal, it depends on tokens 0 .. i, each of them and no
    other, to the last bit; bidirectional on both sides, but not on a token that is masked."""
    model, x = toy_model(attention_mode=attention), text(2)
    for i in range(TOY.seq_len):
        other = x.clone()
        other[:, i] = (x[:, i] + 1) % TOY.vocab_size
        differs = (model(x) != model(other)).any(-1)  # (2, T)
        assert (differs == (torch.arange(8) >= i if attention == "causal" else True)).all()
        uniform = torch.ones(2, 8).index_fill(1, torch.tensor(i), 0.0)  # mask exactly position i
        x_t, other_t = (corrupt(t, torch.full((2,), 0.5), uniform, MASK)[0] for t in (x, other))
        assert torch.equal(model(x_t), model(other_t)) == (i > 0)


def test_mask_is_never_predicted():
    logits = toy_model()(text(3)).flatten(0, 1)  # (24, V)
    assert (logits.isfinite() == (torch.arange(64) < 5)).all() and logits.max() < torch.inf
    assert set(sample_tokens(logits, temperature=50.0).tolist()) == {0, 1, 2, 3, 4}


def test_an_exit_runs_only_the_layers_up_to_its_block():
    model, ran = toy_model(), []
    for i, layer in enumerate(model.h):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    for exit_k, layers in ((0, 2), (1, 4), (2, 6), (None, 6)):
        ran.clear()
        model(text(1), exit_k)
        assert ran == list(range(layers))
    for T, exit_k, words in ((8, 3, "exit 3 does not"), (8, -1, "exit -1"), (9, 0, "9 positions")):
        with pytest.raises(UserError, match=words):
            model(torch.zeros(1, T, dtype=torch.long), exit_k)


def test_the_row_of_mask_is_trained_beside_a_frozen_embedding():
    model, x = toy_model().requires_grad_(False), text(3)
    model.wte.half()  # stored, as plain QLoRA has it: the row that trains is fp32
    x[:, 4] = MASK
    before = model(x)
    model.add_mask_row()
    assert torch.equal(model.mask_row, model.wte.weight[MASK].float())
    assert model.mask_row.dtype == torch.float32
    assert torch.equal(model(x), before)
    model(x)[..., : TOY.vocab_size].square().sum().backward()
    assert model.mask_row.grad.abs().sum() > 0 and model.wte.weight.grad is None
    model.mask_row.data += 1.0
    after = model(x)
    assert torch.equal(after[:, :4], before[:, :4])  # text is read through the embedding as before
    assert not torch.equal(after[:, 4], before[:, 4])


def test_time_steps_are_dealt_out_and_as_many_positions_masked_but_never_position_0():
    fractions = stratified((0.1, 0.2, 0.3, 0.4), 8000, offset=3)
    assert fractions.tolist() == pytest.approx([0.4, 0.1, 0.2, 0.3] * 2000)
    x_0 = text(8000)
    x_t, mask = corrupt(x_0, fractions, noise(8000), MASK)
    assert torch.equal(x_t, torch.where(mask, MASK, x_0)) and not mask[:, 0].any()
    share = mask[:, 1:].float().view(-1, 4, 7).mean((0, 2))  # of 14,000: deviation below 0.0042
    torch.testing.assert_close(share, fractions[:4], atol=0.02, rtol=0)


def test_the_two_estimators_agree():
    """A causal model may be scored at every position or at the masked ones; `attention_mode` says
    which. Every mask of 7 positions with its probability: the same mean, less variance."""
    model, x_0 = toy_model(scale=4.0), text(1).expand(128, -1)
    uniform = torch.tensor([*itertools.product([0.0], *[[0.0, 1.0]] * 7)])  # (128, 8), 0: masked
    for fraction in (0.1, 0.5, 0.99):
        chance = torch.where(uniform[:, 1:] == 0, fraction, 1 - fraction).double().prod(1)  # (128,)
        figures = []
        for way in ("causal", "bidirectional"):  # the layers stay causal, as they were built
            model.config = TOY.replace(attention_mode=way)
            ce, _ = score(model, x_0, torch.full((128,), fraction), 2, uniform, batch_size=128)
            mean = (chance * ce).sum().item()
            figures.append((mean, (chance * (ce - mean) ** 2).sum().item()))
        (every, variance), (masked, its_variance) = figures
        assert every == pytest.approx(masked, rel=1e-5) and 0 < variance < its_variance


@BOTH
def test_the_loss_is_its_definition(attention):
    """Against a plain sum over rows and positions; and the accuracy, without gradients."""
    model, x_0 = toy_model(attention_mode=attention), text(4)
    fractions = torch.tensor([0.1, 0.5, 0.85, 0.99])
    x_t, mask = corrupt(x_0, fractions, noise(4), MASK)
    loss, by_row, _ = diffusion_loss(model, x_0, x_t, mask, fractions, 1)
    ce = -torch.log_softmax(model(x_t, 1), -1)
    scored = mask[:, 1:] | (attention == "causal")  # (4, 7)
    for row, fraction in enumerate(fractions.tolist()):
        divisor = 7 if attention == "causal" else 7 * fraction
        total = sum(ce[row, i, x_0[row, i + 1]].item() for i in range(7) if scored[row, i])
        assert by_row[row].item() == pytest.approx(total / divisor, rel=1e-5)
    assert loss.item() == pytest.approx(by_row.mean().item(), rel=1e-6)
    again, hit = score(model, x_0, fractions, 1, noise(4))
    torch.testing.assert_close(again.float(), by_row, rtol=1e-5, atol=0)
    right = scored & (ce[:, :-1].argmin(-1) == x_0[:, 1:])
    assert 0 < right.sum() < scored.sum()
    torch.testing.assert_close(hit.float(), right.sum(1) / scored.sum(1).clamp(min=1))


@BOTH
def test_micro_batches_add_up(attention):
    model, x_0 = toy_model(attention_mode=attention, scale=3.0), text(8)
    fractions = stratified((0.1, 0.2, 0.3, 0.4), 8, 0)
    x_t, mask = corrupt(x_0, fractions, noise(8), MASK)
    results = []
    for size in (8, 3, 1):
        model.zero_grad()
        total = 0.0
        for micro in zip(*(t.split(size) for t in (x_0, x_t, mask, fractions))):
            loss, _, _ = diffusion_loss(model, *micro, 0, rows=8)
            loss.backward()
            total += loss.detach()
        results.append((total, model.wte.weight.grad.clone()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


@BOTH
def test_a_rows_figures_do_not_depend_on_the_rows_beside_it(attention):
    """To the last digit. At these sizes products of other shapes do differ in it."""
    model = toy_model(attention_mode=attention)
    for fraction in (0.1, 0.5, 1.0):
        given = (text(30), torch.full((30,), fraction), noise(30))
        together = score(model, *given[:2], 2, given[2])
        parts = [score(model, *part[:2], 2, part[2]) for part in zip(*(t.split(1) for t in given))]
        assert all(map(torch.equal, together, map(torch.cat, zip(*parts))))
    assert torch.equal(noise(30)[:7], noise(7)) and len(together[0].unique()) == 30


def test_tied_cross_entropy_is_cross_entropy(monkeypatch):
    """Loss, cross-entropies and gradients in fp64: all positions, some, one, none; any chunks."""
    model, generator = toy_model().double(), torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 15, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(5, (6, 15), generator=generator)
    weights, W = torch.rand(6, 15, generator=generator), model.wte.weight
    logits = (hidden @ W.T)[..., :5].transpose(1, 2)  # (6, 5, 15)
    plain = F.cross_entropy(logits, targets, reduction="none")  # (6, 15)
    some, one = weights > 0.3, torch.arange(90).view(6, 15) == 37
    cases = ((None, 90), (some, 128), (one, 64), (some & False, 0))
    for (scored, size), chunk in itertools.product(cases, (1, 7, 64, 512)):
        monkeypatch.setattr(m, "CHUNK", chunk)
        monkeypatch.setattr(m, "SLICE", 3 * chunk + 2)
        kept = torch.ones_like(some) if scored is None else scored
        loss, ce, _ = tied_cross_entropy(model, hidden, targets, weights * kept, scored)
        assert len(loss.grad_fn.saved_tensors[0]) == size  # in multiples of 64, for the kernels
        torch.testing.assert_close(ce.double(), plain * kept, atol=1e-5, rtol=1e-5)
        expected = (plain * weights * kept).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        ours = torch.autograd.grad(3 * loss, (hidden, W), materialize_grads=True, allow_unused=True)
        theirs = torch.autograd.grad(3 * expected, (hidden, W), retain_graph=True)
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)
        assert not ours[1][5:].any()  # [MASK] and padding learn nothing here


def test_small_weights_do_not_vanish_in_half_precision():
    """Weights of 3e-6: times probabilities of 1e-4 they would be 0 in fp16."""
    torch.manual_seed(0)
    model, hidden = GPT(toy_config(vocab_size=4000), blocks=0), torch.randn(4, 15, 32)
    both = (hidden.requires_grad_(), model.wte.weight)
    targets, weights = torch.randint(4000, (4, 15)), torch.full((4, 15), 3e-6)
    exact = torch.autograd.grad(tied_cross_entropy(model, hidden, targets, weights)[0], both)
    for dtype, most in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        with torch.autocast("cpu", dtype):
            loss, _, _ = tied_cross_entropy(model, hidden, targets, weights)
        for a, b in zip(torch.autograd.grad(loss, both), exact):
            assert a.dtype == torch.float32 and (a - b).norm() < most * b.norm(), dtype


def test_a_hopeless_prediction_has_a_finite_cost_and_a_frozen_head_no_gradient():
    """A target 300 nats below the best has probability 0 in fp32."""
    model = toy_model(d_model=2)
    model.wte.weight.data[:5] = torch.tensor([[0.0, 0], [300, 0], [0, 0], [0, 0], [0, 0]])
    model.wte.requires_grad_(False)
    hidden, targets = torch.tensor([[[1.0, 0.0]]], requires_grad=True), torch.tensor([[0]])
    loss, ce, _ = tied_cross_entropy(model, hidden, targets, torch.ones(1, 1))
    assert ce.item() == pytest.approx(300.0)
    assert loss.grad_fn.saved_tensors[1] is None
    loss.backward()
    assert hidden.grad[0, 0].tolist() == pytest.approx([300, 0])


def test_a_training_step_never_waits_for_a_number_of_masks(monkeypatch):
    """Reading one back makes a GPU's queue run empty: whoever made the masks has counted them."""
    x_0, fractions, both = text(40), torch.full((40,), 0.5), "bidirectional"
    x_t, mask = corrupt(x_0, fractions, noise(40), MASK)
    n_masked, batch = int(mask[:, 1:].sum()), (x_0, x_t, mask, fractions, 1)
    counted = diffusion_loss(toy_model(attention_mode=both), *batch)[0]
    models = [toy_model(), toy_model(attention_mode=both)]
    for name in ("torch.nonzero", "torch.Tensor.nonzero", "torch.Tensor.__int__"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("waits"))
    for model in models:
        loss = diffusion_loss(model, *batch, n_masked=n_masked)[0]
        loss.backward()
    assert torch.equal(loss, counted)
    with pytest.raises(pytest.fail.Exception, match="waits"):
        diffusion_loss(models[1], *batch)


def test_what_a_machine_cannot_do_is_not_asked_of_it(monkeypatch):
    """bf16 products of Apple's CPUs, products into some columns on mps, GPUs without kernels."""
    cpu, outs = torch.device("cpu"), []
    for unit, dtype in (("bf16", torch.float32), ("avx512_bf16", torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
        assert m.compute_type.__wrapped__(cpu) == dtype
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: outs.append(out) or real(a, b, out=out))
    monkeypatch.setattr(m, "SLICE", 64)
    monkeypatch.setattr(m, "product_dtype", lambda x: x.dtype)
    with torch.device("meta"):  # which is no CPU
        model, hidden, weights = toy_model(vocab_size=200), torch.zeros(2, 7, 16), torch.ones(2, 7)
        tied_cross_entropy(model, hidden, torch.zeros(2, 7).long(), weights)
    assert [out.is_contiguous() for out in outs if out is not None] == [True]
    assert m.usable(cpu) == cpu
    missing = RuntimeError("CUDA error: no kernel image is available\nCompile with ...")
    monkeypatch.setattr(torch, "ones", Mock(side_effect=missing))
    with pytest.raises(UserError, match=r"image is available\); use training.device=cpu"):
        m.usable(cpu)


def test_a_reverse_step_reveals_the_scheduled_share_and_changes_nothing_else():
    model, x_t = toy_model(), torch.full((600, TOY.seq_len), MASK)
    x_t[:, [0, 3]] = 2
    x_s = m.reverse_step(model, x_t, 0.8, 0.6, 2, generator=torch.Generator().manual_seed(0))
    masked = x_t == MASK
    assert torch.equal(x_s[~masked], x_t[~masked])
    revealed = (x_s != MASK)[masked].float().mean().item()
    assert abs(revealed - 0.25) < 0.04  # 3,600 draws: standard deviation 0.007
    assert not (m.reverse_step(model, x_s, 0.1, 0.0, 0) == MASK).any()


def test_top_p_keeps_the_smallest_set_in_proportion_and_temperature_0_the_likeliest():
    logits = torch.tensor([[0.05, 0.3, 0.5, 0.15]]).log().repeat(1000, 1)
    for temperature, top_p, kept in ((1, 1, {0, 1, 2, 3}), (1, 0.7, {1, 2}), (1, 0.01, {2}),
                                     (0, 1, {2}), (1e-39, 0.9, {2})):  # fmt: skip
        assert set(sample_tokens(logits, temperature, top_p).tolist()) == kept
    drawn = sample_tokens(logits, 1.0, 0.7, torch.Generator().manual_seed(0))
    expected = torch.tensor([0, 0.3, 0.5, 0]) / 0.8  # standard deviation below 0.016
    torch.testing.assert_close(drawn.bincount(minlength=4) / 1000, expected, atol=0.05, rtol=0)


@BOTH
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_each_window_is_written_by_the_whole_reverse_process(attention, order, window, monkeypatch):
    """Two rows with a blank inside: which steps are taken, on what, from which exit."""
    model, taken, seen = toy_model(attention_mode=attention, seq_len=32), [], []
    x = torch.tensor([[1, 4] + [MASK] * 27] * 2)
    x[:, 15] = 3  # a blank ends here
    step = m.reverse_step if order == "ancestral" else m.confident_step

    def watched(model, x_t, *schedule, **draw):
        taken.append((x_t.size(1), *schedule))
        return step(model, x_t, *schedule, **draw)

    monkeypatch.setattr(m, step.__name__, watched)
    ids = sample(model, x, order, window, seed=1, watch=lambda x: seen.append(x.clone()))
    expected = []
    for own in (x[0] == MASK).nonzero().flatten().split(window or 26):
        end = int(own[-1]) + 1
        for m_t, m_s in itertools.pairwise([*TOY.time_step_mask_fractions[::-1], 0.0]):
            target = (m_t, m_s) if order == "ancestral" else (round(m_s * len(own)),)
            owner = 0 if m_t <= 0.4 else 1 if m_t <= 0.7 else 2  # depth by noise
            expected.append((end if attention == "causal" else 29, *target, owner, end))
    assert taken == expected
    assert torch.equal(seen[0], x)  # the argument is left alone
    assert torch.equal(seen[-1], ids) and not (ids == MASK).any()
    for before, after in itertools.pairwise(seen):  # nothing is taken back
        assert torch.equal(before[before != MASK], after[before != MASK])
    assert torch.equal(ids, sample(model, x, order, window, seed=1))
    assert not torch.equal(ids, sample(model, x, order, window, seed=2))


def test_confidence_reveals_the_likeliest_draws_first():
    """At temperature 0 the draws are the likeliest tokens, and those shown have the highest p."""
    model, x, seen = toy_model(attention_mode="bidirectional"), torch.tensor([[3] + [MASK] * 7]), []
    sample(model, x, "confidence", exit_k=0, steps=2, temperature=0.0,
           watch=lambda x: seen.append(x[0, 1:].clone()))  # fmt: skip
    p, token = torch.softmax(model(x, 0)[0, :-1], -1).max(-1)
    shown = torch.zeros(7, dtype=torch.bool).index_fill(0, p.topk(3).indices, True)
    assert torch.equal(seen[1] != MASK, shown)  # 7 - round(7 / 2)
    assert torch.equal(seen[1][shown], token[shown])


def test_windows_of_one_token_are_left_to_right_from_any_exit():
    """Blanks too. At temperature 0 each token is the likeliest one after what stands before it."""
    model, x = toy_model(), torch.tensor([[3, MASK, 1, MASK, MASK, 0, MASK]])
    for exit_k in range(3):
        ids = sample(model, x, "left-to-right", exit_k=exit_k, temperature=0.0)
        assert ids[0, [0, 2, 5]].tolist() == [3, 1, 0]
        for i in (1, 3, 4, 6):
            assert ids[0, i] == model(ids[:, :i], exit_k)[0, -1].argmax()
        for order in ("ancestral", "confidence"):
            assert torch.equal(sample(model, x, order, 1, exit_k, temperature=0.0), ids)
    assert torch.equal(sample(model, x, "left-to-right", temperature=0.0), ids)  # the last


# A small random model as Hugging Face's transformers 5.23.0 writes it, and what it computes there.
GOLDEN = Path(__file__).parent / "gpt2_golden"
TWO_BLOCKS = toy_config(  # the golden model's sizes
    vocab_size=61, n_layers=2, n_heads=4, total_blocks=2, block_steps=(1, 1),
    block_mask_ranges=((0.0, 0.5), (0.5, 1.0)),
)  # fmt: skip


def stored(folder, name="model.safetensors"):
    return read_tensors(folder / name, sealed=False)[0]


def golden_copy(folder, tensors=None, **description):
    """The golden model in `folder`, with other tensors or values in config.json."""
    write_tensors(folder / "model.safetensors", tensors or stored(GOLDEN), sealed=False)
    config = json.loads((GOLDEN / "config.json").read_text()) | description
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def filled(folder, config=TWO_BLOCKS):
    model = GPT(config)
    model.load_state_dict(read_pretrained(folder, config))
    return model


def same(a, b):
    """Whether two dicts of tensors, or two GPTs, are the same, bit for bit."""
    a, b = (x.state_dict() if isinstance(x, GPT) else x for x in (a, b))
    dtypes = [{name: t.dtype for name, t in x.items()} for x in (a, b)]
    return dtypes[0] == dtypes[1] and all(torch.equal(a[name], b[name]) for name in a)


def refused(folder, *words, config=None):
    """Reading `folder` ends in one UserError, of one line, with the words."""
    with pytest.raises(UserError) as caught:
        filled(folder, config) if config else GPT.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 + len(str(folder)), message
    assert all(word in message for word in words), message


def test_golden_logits_loss_and_gradients():
    """1e-4 on every logit, 1e-4 relative on the loss (GPT-2's is ours at m = 0) and gradients."""
    expected, model = stored(GOLDEN, "expected.safetensors"), GPT.from_pretrained(GOLDEN)
    idx, loss, logits = (expected.pop(name) for name in ("idx", "loss", "logits"))
    torch.testing.assert_close(model(idx)[..., :61], logits, atol=1e-4, rtol=0)
    assert logits.std() > 1 and len(expected) == 7  # far from flat
    model.config = model.config.replace(compute_type="fp32")
    ours, _, _ = diffusion_loss(model, idx, idx, idx < 0, torch.zeros(len(idx)), 0)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
    ours.backward()
    for name, theirs in expected.items():
        name = name.removeprefix("grad.").replace("ln_f", "exit_norms.0")
        grad = model.get_parameter(name).grad[: 61 if name == "wte.weight" else None]
        grad = grad.t() if name.startswith("h.") else grad
        assert (grad - theirs).norm() < 1e-4 * theirs.norm(), name


def test_other_spellings_of_the_layout_blocks_and_a_shorter_context(tmp_path, monkeypatch):
    """Without the prefix, with the tied head, the causal mask as buffers, a padded vocabulary."""
    file = {name.removeprefix("transformer."): t for name, t in stored(GOLDEN).items()}
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    extra = {"lm_head.weight": file["wte.weight"], "h.0.attn.bias": mask}
    golden_copy(tmp_path, file | extra | {"h.0.attn.masked_bias": torch.tensor([-1e4])})
    assert same(GPT.from_pretrained(str(tmp_path)), GPT.from_pretrained(GOLDEN))
    model = filled(tmp_path, TWO_BLOCKS.replace(seq_len=12))
    assert torch.equal(model.wpe.weight, file["wpe.weight"][:12])  # cropped
    assert torch.equal(model.wte.weight[:61], file["wte.weight"])
    assert (model.wte.weight[61:] == file["wte.weight"].mean(0)).all()  # [MASK] and padding
    assert torch.equal(model.h[1].mlp.c_proj.weight, file["h.1.mlp.c_proj.weight"].t())
    monkeypatch.setattr(m, "GPT2_VOCAB_SIZE", 61)
    padded = torch.cat([file["wte.weight"], torch.ones(3, 32)])  # rows behind all text
    golden_copy(tmp_path, file | {"wte.weight": padded, "lm_head.weight": padded}, vocab_size=64)
    assert same(filled(tmp_path), filled(GOLDEN))
    refused(tmp_path, "set model.vocab_size=61", config=TWO_BLOCKS.replace(vocab_size=40))
    for name, parameter in model.exit_norms.named_parameters():  # 0.weight, ...
        assert torch.equal(parameter, file["ln_f" + name[1:]])


def test_wrong_sizes_and_other_networks_are_named_in_one_line(tmp_path):
    wrong = TWO_BLOCKS.replace(vocab_size=62, d_model=64, n_layers=4, block_size=2, n_heads=2)
    all_four = "set model.vocab_size=61 model.d_model=32 model.n_layers=2 model.n_heads=4"
    refused(GOLDEN, all_four, config=wrong)
    refused(GOLDEN, "set model.seq_len=16", config=TWO_BLOCKS.replace(seq_len=17))
    for key, value in (
        ("activation_function", "gelu"), ("layer_norm_epsilon", 1e-6), ("model_type", "llama"),
        ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False), ("n_layer", None), ("n_layer", -1), ("n_embd", "32"),
        ("vocab_size", 10**30), ("n_head", 5),
    ):  # fmt: skip
        refused(golden_copy(tmp_path, **{key: value}), m.PRETRAINED_SIZES.get(key, key))
    for content in (b"", b"[]", b"1", b"[" * 100_000, b"\xff", b"9" * 5000):
        (tmp_path / "config.json").write_bytes(content)
        refused(tmp_path, "config.json: not the config.json of a GPT-2")


def test_wrong_tensors_are_named_in_one_line(tmp_path):
    file, name = stored(GOLDEN), "transformer.h.0.attn.c_attn.weight"
    for key, tensor, words in (
        ("h.0.crossattention.c_attn.weight", torch.zeros(32, 96), "unknown"),
        (name, torch.zeros(96, 32), "floats of shape (32, 96)"),  # not transposed
        (name, torch.zeros(32, 96, dtype=torch.int64), "not floats"),
        (name, torch.zeros(32, 96).fill_diagonal_(-math.inf), "not finite"),
        ("lm_head.weight", torch.zeros(61, 32), "not wte.weight"),
    ):
        golden_copy(tmp_path, file | {key: tensor})
        refused(tmp_path, f"model.safetensors: {key.removeprefix('transformer.')}", words)
    del file[name]
    refused(golden_copy(tmp_path, file), "model.safetensors: h.0.attn.c_attn.weight is missing")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    refused(tmp_path, "model.safetensors is missing", "sharded", f"from_pretrained('{tmp_path}')")


def test_download(tmp_path, monkeypatch):
    """`gpt2` without a network is one clear line; with one, two files, each fetched once."""
    monkeypatch.chdir(tmp_path)
    config, asked = TWO_BLOCKS.replace(token_folder="cache"), []

    def retrieve(url, target):
        asked.append(url.rpartition("/")[2])
        Path(target).write_bytes(b"{")  # half of it
        if len(asked) == 1:
            raise OSError("no network")
        shutil.copy(GOLDEN / asked[-1], target)

    monkeypatch.setattr(urllib.request, "urlretrieve", retrieve)
    refused("gpt2", "cannot download GPT-2's config.json", "no network", "cache", config=config)
    for _ in range(2):
        assert same(filled("gpt2", config), filled(GOLDEN))
    assert asked == ["config.json", "config.json", "model.safetensors"]


def test_round_trip_is_exact(tmp_path):
    model, theirs = GPT.from_pretrained(GOLDEN), stored(GOLDEN)
    model.save_pretrained(tmp_path / "a" / "b")
    assert same(stored(tmp_path / "a" / "b"), theirs)  # as the reference writes them
    assert same(GPT.from_pretrained(tmp_path / "a" / "b"), model)
    golden = json.loads((GOLDEN / "config.json").read_text())
    for key, value in json.loads((tmp_path / "a" / "b" / "config.json").read_text()).items():
        assert value == (0.0 if "pdrop" in key else golden[key]), key
    model.save_pretrained(tmp_path, dtype=torch.float16)
    half = {name: tensor.half() for name, tensor in theirs.items()}
    assert same(stored(tmp_path), half)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_an_earlier_exit_is_a_shorter_gpt2(tmp_path):
    model, idx = filled(GOLDEN), torch.arange(16)[None]
    model.exit_norms[0].weight.data *= 1.5  # each exit reads through its own norm
    for exit_k in (0, 1, None):
        model.save_pretrained(tmp_path, exit_k)  # over the file of the exit before
        loaded = GPT.from_pretrained(tmp_path)
        assert len(loaded.h) == (1 if exit_k == 0 else 2)
        assert torch.equal(loaded(idx)[..., :61], model(idx, exit_k)[..., :61])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model.h[1].mlp.c_fc.weight.data[0, 0] = 1e5
    both = filled(GOLDEN, TWO_BLOCKS.replace(attention_mode="bidirectional"))
    for refuses, exit_k, word in ((model, 2, "exit 2"), (model, -1, "exit -1"), (both, 1, "causal"),
                                  (model, 1, "h.1.mlp.c_fc.weight .* not finite")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            refuses.save_pretrained(tmp_path, exit_k, torch.float16)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
