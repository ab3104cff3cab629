"""The study of the claims: its rows can be trained, the exercises fit the code, the table."""

import importlib.util
import json
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
import train_gpt2_fusion
from conftest import ROOT, toy_config
from data_loader import UserError, load_config
from evaluate_gpt2 import Run
from train_gpt2_fusion import fusion_schedule

sys.path.insert(0, str(ROOT / "tests"))
import study

EVERY = {row: settings for group in study.rows().values() for row, settings in group.items()}


@pytest.mark.parametrize("row", EVERY)
def test_every_row_is_a_valid_configuration(row):
    arguments = study.arguments(row, EVERY[row])
    preset = "tiny" if "tiny" in arguments else None
    assert (preset is None) == row.startswith("small-")
    overrides = [argument for argument in arguments if "=" in argument]
    config = load_config(preset=preset, overrides=overrides)
    assert config.training.run_id == row
    if config.training.mode == "fused":
        stages = fusion_schedule(config.model, config.training)
        assert sum(stage.steps for stage in stages) == config.training.max_steps
        short = row.startswith("small-tune-")  # their warm-ups are cut to half of the stage
        least = 1 if short else config.training.warmup_steps
        shortest = min(stage.steps for stage in stages)
        assert shortest > least, f"its shortest stage has {shortest} steps: more training.max_steps"


def test_what_was_measured_names_the_command_of_today():
    assert {row: entry["command"] for row, entry in study.measured().items()} == {
        row: study.command_of(row, EVERY[row]) for row in EVERY if row in study.measured()}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """{exercise: folder with its changed code}; below a repository, as checkpoints/ is."""
    folder = tmp_path_factory.mktemp("exercises")
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    for name in study.exercises():
        study.changed_copy(name, folder / name)
    return {name: folder / name for name in study.exercises()}


def test_every_patch_says_what_and_why_and_changes_what_it_names(copies):
    assert len(copies) == 12
    for name, patch in study.exercises().items():
        head, _, diff = patch.read_text().partition("diff --git ")
        parts = head.strip().split("\n\n")
        assert len(parts) == 4, f"{patch}: a title, Why: ..., What one sees ..., a command"
        title, why, seen, command = parts
        assert "\n" not in title and why.startswith("Why: ") and seen.startswith("What one sees")
        assert command.startswith("    python ") and len(head.splitlines()) <= 20
        changed = {line[6:].strip() for line in diff.splitlines() if line.startswith("+++ b/")}
        for path in ROOT.glob("*.py"):
            copy = (copies[name] / path.name).read_text()
            assert (copy != path.read_text()) == (path.name in changed), (name, path.name)


# A toy training in each copy, in a fork, so that torch is imported once for all of them.
TRAIN_THEM_ALL = """
import os, sys
import numpy, tiktoken, torch, yaml
import torch.utils.checkpoint
torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports a good deal
failed = []
for folder in sys.argv[1].split(","):
    child = os.fork()
    if not child:
        sys.path.insert(0, folder)
        os.chdir(folder)
        import train_gpt2_fusion
        train_gpt2_fusion.report = lambda *_, **__: None
        kind = "fp8" if folder.endswith("fp8") else "int4"
        status = train_gpt2_fusion.main([*sys.argv[2:], f"training.quantization_type={kind}"])
        sys.stdout.flush()
        os._exit(status)
    failed += [folder] if os.waitpid(child, 0)[1] else []
sys.exit(" ".join(failed) or 0)
"""


def test_every_exercise_trains(copies, toy):
    folders = ",".join(map(str, copies.values()))
    arguments = [argument for argument in toy(training__max_steps=6, training__eval_rows=1,
                                             training__checkpoint_interval=100)
                 if not argument.startswith("training.folder=")]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", TRAIN_THEM_ALL, folders, *arguments],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    exact = []
    for name, folder in copies.items():
        text = (folder / "checkpoints" / "toy" / "metrics.jsonl").read_text()
        lines = [line for line in map(json.loads, text.splitlines()) if line["event"] == "step"]
        assert all(0 < line["loss"] < 10 for line in lines) and lines[-1]["stage"] == 2, name
        exact.append(tuple((line["loss"], line["grad_norm"]) for line in lines))
    # The order of revealing changes no training, and mostly-light none that is fused: all others
    # give figures of their own.
    assert len({*exact}) == len(exact) - 1


def test_exercise_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    odd = tmp_path / "odd.patch"
    good = study.exercises()["three-bit"].read_text()
    odd.write_text(good.replace("/ 15", "/ 99"))
    monkeypatch.setattr(study, "exercises", lambda: {"odd": odd})
    with pytest.raises(UserError, match="odd.patch does not fit the code .*quant.py"):
        study.changed_copy("odd", tmp_path / "code")


def imported(path, name):
    """The module at `path`, under another name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_exercises_change_what_they_say(copies):
    """Three bits give three bits' signal to noise, eight more than four; the leftmost masks are
    revealed first; halves of a batch no longer add up where drawn masks divide."""
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    for name, kind, low, high in (("three-bit", "int4", 14, 14.7), ("fp8", "fp8", 29, 34)):
        stored = imported(copies[name] / "quant.py", f"quant_{kind}").quantize(w, kind)
        db = 10 * torch.log10(w.square().mean() / (stored.dequantize() - w).square().mean())
        assert low < db < high, (name, db)  # measured: 14.33; four bits give 20.95
    assert 8 * stored.nbytes / w.numel() == 8 + 32 / 256

    tokens = np.arange(4096, dtype=np.uint16).repeat(4)
    control = load_config(preset="tiny", overrides=["training.mode=standard"])
    light = imported(copies["mostly-light"] / "train_gpt2_fusion.py", "mostly_light")
    (stage,) = light.fusion_schedule(control.model, control.training)
    drawn = torch.cat([light.batch_of(tokens, control.model, control.training, stage, step)[3]
                       for step in range(200)])  # fmt: skip
    for low, high, share in ((0, 0.4, 16 / 18), (0.4, 0.7, 1 / 18), (0.7, 1, 1 / 18)):
        inside = ((drawn > low + 1e-6) & (drawn < high + 1e-6)).float().mean().item()
        assert inside == pytest.approx(share, abs=0.01)

    left = imported(copies["leftmost-first"] / "model.py", "leftmost")
    config = toy_config(n_layers=1, seq_len=8, total_blocks=1, block_mask_ranges=((0.0, 1.0),))
    x = torch.full((1, 8), config.mask_id)
    x[0, 0] = 1
    x = left.confident_step(left.GPT(config), x, 4, 0)
    assert (x[0] == config.mask_id).tolist() == [False] * 4 + [True] * 4

    for module, adds_up in ((imported(ROOT / "model.py", "model_as_it_is"), True),
                            (imported(copies["drawn-masks"] / "model.py", "drawn"), False)):
        torch.manual_seed(0)
        model = module.GPT(config)
        x_0 = torch.randint(257, (8, 8))
        m = torch.tensor([0.1, 0.4] * 4)
        batch = (x_0, *module.corrupt(x_0, m, torch.rand(8, 8), config.mask_id), m)
        halves = [[part[rows] for part in batch] for rows in (slice(4), slice(4, 8))]
        whole = module.diffusion_loss(model, *batch, block=0)[0]
        parts = sum(module.diffusion_loss(model, *half, block=0, rows=8)[0] for half in halves)
        assert torch.isclose(whole, parts, atol=1e-5) == adds_up


def test_figures_of_a_run(toy):
    assert train_gpt2_fusion.main(toy()) == 0
    figures = study.figures(Run(toy.folder))
    result = json.loads((toy.folder / "eval.json").read_text())
    assert figures["nelbo_12"] == result["nelbo_12"] and len(figures["cross_entropy"]) == 13
    assert [stage["steps"] for stage in figures["stages"]] == [6, 3, 3]
    assert sum(stage["tokens"] for stage in figures["stages"]) == figures["train_tokens"]
    best = [stage["validation"] for stage in figures["stages"]]
    metrics = [*map(json.loads, (toy.folder / "metrics.jsonl").read_text().splitlines())]
    seen = [line for line in metrics if line["event"] == "validation"]
    assert [line["step"] for line in seen] == [4, 6, 3, 3]
    assert [b["last"] for b in best] == [line["cross_entropy"] for line in seen[1:]]
    assert best[0]["best"] == min(line["cross_entropy"] for line in seen[:2])
    result["left_to_right"][1] = float("nan")  # exercise shift-off
    (toy.folder / "eval.json").write_text(json.dumps(result))
    figures = study.figures(Run(toy.folder))
    assert figures["left_to_right"] is None and figures["bits_per_byte"]["left_to_right"] is None


def test_stability_of_a_run(toy):
    """The largest rise within a stage; the largest gradient norm of the steps after 100."""
    assert train_gpt2_fusion.main(toy()) == 0
    path = toy.folder / "metrics.jsonl"
    lines = [*map(json.loads, path.read_text().splitlines())]
    steps = [line for line in lines if line["event"] == "step"]
    assert [(line["stage"], line["step"]) for line in steps] == [
        (0, 2), (0, 4), (0, 6), (1, 2), (1, 3), (2, 2), (2, 3)]  # fmt: skip
    for line, step, loss, norm in zip(steps, (100, 200, 300, 99, 100, 100, 101),
                                      (5.0, 4.0, 4.25, 6.0, 5.5, 6.5, 6.75),
                                      (9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.5)):
        line |= {"step": step, "loss": loss, "grad_norm": norm}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages = study.figures(Run(toy.folder))["stages"]
    assert [stage["largest_rise"] for stage in stages] == [0.25, 0, 0.25]
    assert [stage["largest_grad_norm"] for stage in stages] == [2.0, None, 0.5]


def test_seeds_share_a_line_of_the_table(monkeypatch, tmp_path, capsys):
    run = {"command": "", "nelbo": 5.0, "train_seconds": 10.0, "train_tokens": 1000,
           "left_to_right": [4.6, 4.5], "bits_per_byte": {"nelbo": 2.0, "left_to_right": 1.5},
           "stages": [{"held_mib": 26.0, "peak_mib": 500.0, "largest_rise": 0.0,
                       "largest_grad_norm": None}]}  # fmt: skip
    bounds = [5.1, 5.3, 5.5]
    results = {f"a-{seed}": run | {"nelbo_12": bound, "command": f"training.seed={seed}"}
               for seed, bound in enumerate(bounds)}
    results["b-1e-3"] = run | {"nelbo_12": 6.0, "command": "training.time_step_masking=false"}
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    study.results_of("a-0").write_text(json.dumps(results))
    study.results_of("small-c").write_text("{}")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["study-gpt2-small.json",
                                                                  "study-tiny.json"]
    settings = {row: results.get(row, run)["command"] for row in [*results, "not-measured-0"]}
    study.print_table("runs", settings)
    a, b = capsys.readouterr().out.splitlines()[-2:]
    spread = statistics.stdev(bounds)
    assert a.startswith("| a | 3 |") and f"5.300 +- {spread:.3f}" in a and "4.500 +- 0.000" in a
    assert b.startswith("| b-1e-3 | 1 |")
    assert "2.000" in a and "1.500" in b  # bits per byte: by the bound, or left to right
    assert "6.000" not in b and "100" in b  # without masks no bound; tokens a second
    assert "not-measured" not in a + b
    assert a.endswith("| 0.000 | - |") and b.endswith("| 0.000 | - |")


def test_a_fresh_clone_has_no_folder_for_runs_yet(monkeypatch, tmp_path):
    """The folder is there when a row begins, and the two texts where a row needs them."""
    seen = []

    def run(row, *_):
        seen.append([row, *sorted(path.name for path in (tmp_path / "checkpoints").iterdir())])
        raise UserError("enough")

    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "exercises", dict)
    monkeypatch.setattr(study, "run", run)
    for row in ("fused-0", "older"):
        assert study.main([row]) == 2
    assert seen == [["fused-0"], ["older", "newer.jsonl", "older.jsonl"]]
    texts = {name: [json.loads(line)["source"] for line in open(tmp_path / "checkpoints" / name)]
             for name in ("newer.jsonl", "older.jsonl")}  # fmt: skip
    older, newer = (set(texts[name]) for name in ("older.jsonl", "newer.jsonl"))
    assert (len(older), len(newer)) == (225, 24) and len(sum(texts.values(), [])) == 10_000
    assert max(int(name[:4]) for name in older) < min(int(name[:4]) for name in newer)


def test_unknown_row_is_one_line():
    result = subprocess.run([sys.executable, "tests/study.py", "nothing"], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: no row 'nothing'; --list names them all\n"
