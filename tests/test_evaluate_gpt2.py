"""The metrics against enumeration and closed forms on toy vocabularies."""

import itertools
import json
import math
import shutil
import sys

import numpy as np
import pytest
import tiktoken
import torch

import evaluate_gpt2 as e
import lora
import quant
import train_gpt2_fusion as train
from data_loader import UserError
from model import autocast, block_of, sample_tokens
from test_model import BOTH, TOY, toy_model

SMALL = dict(vocab_size=3, seq_len=4)


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
def test_nelbo_12_is_the_enumerated_value(attention):
    """Time steps that are quarters, and the 4^3 grid of uniform numbers for three positions, give
    every mask as often as its probability says, so the estimate has no error left."""
    quarters = dict(SMALL, time_step_mask_fractions=(0.25, 0.5, 0.75))
    grid = torch.tensor([*itertools.product([0.5], *[[0.125, 0.375, 0.625, 0.875]] * 3)])  # (64, 4)
    for scale, row in ((4.0, [0, 2, 1, 2]), (4.0, [1, 0, 0, 2]), (0.0, [2, 1, 1, 0])):
        model, row = toy_model(attention_mode=attention, scale=scale, **quarters), torch.tensor(row)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(e, "row_noise", lambda *args, **kwargs: grid)
            bound, table = e.nelbo_12(model, row.repeat(64, 1), seed=0)
        assert bound == pytest.approx(enumerated_nelbo_12(model, row).item(), abs=2e-6)
        assert [step["layers"] for step in table] == [2, 4, 6, 6]  # depth by noise
        assert table[-1]["mask_fraction"] == 1.0
    assert bound == pytest.approx(math.log(3), abs=1e-6)  # uniform; less without the term at m = 1


@torch.no_grad()
@BOTH
def test_nelbo_12_estimates_the_enumerated_value(attention):
    model = toy_model(attention_mode=attention, scale=4.0, **SMALL)
    row = torch.tensor([0, 2, 1, 2])
    bounds = [e.nelbo_12(model, row.repeat(6, 1), seed=seed)[0] for seed in range(8)]
    error = np.std(bounds, ddof=1) / math.sqrt(8)
    assert abs(np.mean(bounds) - enumerated_nelbo_12(model, row)) < 4 * error + 1e-6
    assert error < 0.4


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
        assert e.nelbo_12(uniform, rows, seed=0)[0] == pytest.approx(math.log(3), abs=1e-5)
    assert e.nelbo(uniform, rows, seed=0)[0] == pytest.approx(math.log(3), abs=1e-5)


@torch.no_grad()
def test_left_to_right_is_a_distribution():
    model = toy_model(scale=4.0, **SMALL)
    for first in range(3):
        totals = np.zeros(3)  # one per exit
        for rest in itertools.product(range(3), repeat=3):
            exits = e.left_to_right(model, torch.tensor([[first, *rest]]))
            totals += np.exp(-3 * np.array(exits))
        assert totals == pytest.approx(1, abs=1e-5)
    bidirectional = toy_model(attention_mode="bidirectional", **SMALL)
    assert e.left_to_right(bidirectional, torch.zeros(1, 4, dtype=torch.long)) is None


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
    lora.add_adapters(model, 1, rank=2, alpha=4.0)
    for B in lora.adapter_state(model, 1).values():
        torch.nn.init.normal_(B)
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


def test_words_end_where_an_example_ends():
    encoding = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks={
        bytes([b]): b for b in range(256)}, special_tokens={"<|endoftext|>": 256})  # fmt: skip
    rows = torch.tensor([[256, *b"we go.", 256, *b"all", 256]])
    assert e.units_of(rows, encoding) == (9 / 11, 3 / 11)  # per token, end-of-text has no bytes


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:1", "auto"):
        assert e.pick_device(name).type == "cuda"
    for name in ("cuda:2", "cuda:x", "cpu:x", "gpu"):
        with pytest.raises(UserError, match=f"device '{name}' is unknown or not available"):
            e.pick_device(name)


def canvas(config, prompt, n_masks):
    return torch.tensor(prompt + [config.mask_id] * n_masks)


@BOTH
@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_samples_keep_what_is_revealed_and_hold_no_mask(attention, order):
    model = toy_model(attention_mode=attention, seq_len=64)
    seen = []
    x = canvas(model.config, [1, 4], 62)
    ids, layers = e.sample(model, x, 1, order=order, watch=lambda m, x: seen.append((m, x.clone())))
    assert ids[:2].tolist() == [1, 4] and len(ids) == 64 and ids.max() < TOY.vocab_size
    assert layers == 4 * 2 + 3 * 4 + 5 * 6  # 50 of 72 layer evaluations: depth by noise
    assert [m for m, _ in seen] == [1.0, *model.config.time_step_mask_fractions[-2::-1], 0.0]
    for (_, before), (m, after) in itertools.pairwise(seen):
        shown = before != model.config.mask_id
        assert torch.equal(before[shown], after[shown])
        if order == "confidence":
            assert (after == model.config.mask_id).sum() == round(m * 62)
    again, _ = e.sample(model, x, 1, order=order)
    assert torch.equal(ids, again)
    other, layers = e.sample(model, x, 2, order=order, full_depth=True, steps=e.even_steps(5))
    assert layers == 5 * 6 and not torch.equal(ids, other)


def test_confidence_reveals_the_likeliest_draws_first():
    """At temperature 0 the draws are the likeliest tokens, and those shown have the highest p."""
    model = toy_model(attention_mode="bidirectional")
    x = canvas(model.config, [3], 7)
    seen = []
    e.sample(model, x, 0, 0, steps=[0.5, 1.0], order="confidence",
             watch=lambda m, x: seen.append(x.clone()))
    p, token = torch.softmax(model(x[None], 2)[0, :-1], -1).max(-1)
    shown = torch.zeros(7, dtype=torch.bool).index_fill(0, p.topk(7 - round(0.5 * 7)).indices, True)
    assert torch.equal(seen[1][1:] != model.config.mask_id, shown)
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


def test_left_to_right_samples_from_any_exit():
    model = toy_model()
    for block in range(3):
        x = canvas(model.config, [3], 7)
        ids, layers = e.sample_left_to_right(model, x, block)
        assert torch.equal(x, canvas(model.config, [3], 7))  # the argument is left alone
        assert len(ids) == 8 and ids[0] == 3 and ids.max() < TOY.vocab_size
        assert layers == 7 * 2 * (block + 1)


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def run(toy, capsys, monkeypatch):
    """run(*options) -> (status, stdout, stderr) of evaluate_gpt2.py on a finished toy run."""
    monkeypatch.setattr(e, "ROWS", 4)
    monkeypatch.setattr(e, "PLOT_ROWS", 4)
    assert train.main(toy()) == 0

    def command(*options):
        capsys.readouterr()
        options = ["--folder", str(toy.folder.parent), *map(str, options)]
        return e.main(options), *capsys.readouterr()

    command.folder, command.toy = toy.folder, toy
    return command


def test_sampling_from_the_command_line(run, monkeypatch):
    evaluated = (run.folder / "eval.json").read_bytes()
    assert run("--prompt", "the people", "--seed", 3)[1] == run("--prompt", "the people",
                                                               "--seed", 3)[1]
    status, out, _ = run("--prompt", "of ____ and ____.")
    note, text = out.split("\n", 1)
    assert status == 0 and "left of a blank" in note
    assert text.startswith("of") and " and" in text and text.endswith(".\n") and "____" not in text
    status, out, _ = run("--watch", "--order", "confidence", "--length", 12, "--steps", 4)
    lines = out.split("\n")[:-1]
    assert [line.count("░") for line in lines] == [12, 9, 6, 3, 0]
    status, out, _ = run("--left-to-right", 0, "--length", 5, "--temperature", 0)
    assert status == 0 and out
    assert (run.folder / "eval.json").read_bytes() == evaluated
    # on a terminal the text is redrawn in place
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(e.time, "sleep", lambda seconds: None)
    _, out, _ = run("--watch", "--steps", 3, "--length", 8)
    assert out.count("\033[1A\r\033[J") == 3  # one line, drawn four times
    assert out.count("░") > 8 and f"38;5;{e.RAMP[0]}m" in out
    assert "░" not in out[out.rindex("\033[J") :]


def test_pictures(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        status, _, error = run("--plot")
        assert status == 2 and "pip install matplotlib" in error
    pytest.importorskip("matplotlib")
    assert run("--plot", run.folder / "pictures")[0] == 0
    for name in ("loss", "cross_entropy", "memory"):
        picture = (run.folder / "pictures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_the_loss_picture_shows_training_and_validation(run):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    e.plot_loss(axes, [run.folder], "cpu")
    drawn = {(line.get_linestyle(), tuple(line.get_ydata())) for line in axes.get_lines()}
    for stage in range(3):
        for event, loss, style in (("step", "loss", "-"), ("validation", "cross_entropy", "--")):
            lines = [line for line in e.read_metrics(run.folder, event)
                     if line["stage"] == stage]  # fmt: skip
            assert lines and (style, tuple(line[loss] for line in lines)) in drawn


def test_runs_that_cannot_be_compared_but_in_bits_per_byte(run):
    other = run.folder.with_name("next")
    shutil.copytree(run.folder, other)
    config = json.loads((other / "config.json").read_text())
    config["training"]["time_step_masking"] = False
    (other / "config.json").write_text(json.dumps(config))
    status, out, _ = run("--compare", "toy", "next")
    assert status == 0 and "bits per byte can" not in out.replace("byte \n", "")
    assert out.splitlines()[-1].split()[-5:-3] == ["-", "-"]  # no bound without masks
    result = json.loads((other / "eval.json").read_text())
    (other / "eval.json").write_text(json.dumps(result | {"rows": 7}))
    assert "only their bits per byte" in run("--compare", "toy", "next")[1]


def test_damage_and_mistakes_end_in_one_line(run, tmp_path):
    def refused(*words, options=()):
        status, _, error = run(*options)
        assert status == 2 and len(error.strip().splitlines()) == 1, error
        assert error.startswith("error:") and all(word in error for word in words), error

    refused("'other'", "toy", options=["--run", "other"])
    refused("shorten", options=["--prompt", "the people " * 20])
    refused("shorten", options=["--prompt", "the ____" * 20])
    refused("--length", options=["--prompt", "the ____", "--length", 3])
    refused("--length", options=["--length", 0])
    refused("--top-p", options=["--top-p", 1.5])
    refused("exit 7", options=["--left-to-right", 7])
    refused("--order", options=["--left-to-right", "--order", "confidence"])
    refused("one precision", options=["--prompt", "a", "--precision", "all"])
    refused("one precision", options=["--prompt", "a", "--full"])
    for what in (["--compare", "toy"], ["--plot"], ["--export", tmp_path / "gpt2"]):
        refused(f"--json means nothing to {what[0]}", options=[*what, "--json", tmp_path / "a"])
    refused("--run means nothing to --compare", options=["--run", "toy", "--compare", "toy"])
    refused("is a folder", options=["--json", tmp_path])
    assert run("--precision", "nf4", "--json", tmp_path / "new" / "a.json")[0] == 0
    assert (tmp_path / "new" / "a.json").exists()

    def damaged(name, change, *words, options=("--prompt", "a")):
        path = run.folder / name
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        refused(name.split("/")[-1], *words, options=options)
        path.write_bytes(whole)

    def without(section, key):
        return lambda data: json.dumps({name: {k: v for k, v in part.items() if (name, k) !=
                                               (section, key)} if isinstance(part, dict) else part
                                        for name, part in json.loads(data).items()}).encode()

    def flipped(data):
        half = len(data) // 2
        return data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]

    damaged("checkpoint.pt", flipped)
    damaged("backup/block_1.pt", flipped)
    damaged("config.json", lambda data: data[:-30])
    damaged("config.json", lambda data: data.replace(b'"n_heads"', b'"heads"'), "heads")
    damaged("config.json", without("training", "qlora_rank"), "qlora_rank")
    damaged("metrics.jsonl", lambda data: data.replace(b'"event"', b'"event', 1), "line 1",
            options=())
    damaged("eval.json", lambda data: data[:-5], "--run toy", options=["--compare", "toy"])
    damaged("eval.json", lambda data: b"[1]", "--run toy", options=["--compare", "toy"])
    # a run made before a key existed: its default, and a note
    path = run.folder / "config.json"
    path.write_bytes(without("model", "dropout")(path.read_bytes()))
    status, out, _ = run("--prompt", "a")
    assert status == 0 and "note" in out and "model.dropout=0.0" in out
