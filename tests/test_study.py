"""The study of the claims: its rows can be trained, the exercises fit the code, the table."""

import copy
import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import data_loader
import numpy as np
import pytest
import torch
from conftest import ROOT, fails, toy_config
from data_loader import Run, UserError, load_config
from train_gpt2_fusion import fusion_schedule

sys.path.insert(0, str(ROOT / "tests"))
import study

EVERY = {row: settings for group in study.rows().values() for row, settings in group.items()}


def test_every_row_is_a_valid_configuration_and_measured_ones_name_todays_command(monkeypatch):
    files = functools.cache(data_loader.read_yaml)
    monkeypatch.setattr(data_loader, "read_yaml", lambda path: copy.deepcopy(files(path)))
    for row, settings in EVERY.items():
        words = study.arguments(row, settings)
        config = load_config(preset="tiny" if "tiny" in words else None,
                             overrides=[word for word in words if "=" in word])
        steps = [stage.steps for stage in fusion_schedule(config)]
        assert config.run_id == row and sum(steps) == config.max_steps
        if config.mode == "fused":
            assert min(steps) > config.warmup_steps, f"{row}: more max_steps"
    for row, kept in study.measured().items():
        assert kept["command"] == study.command_of(row, EVERY[row])


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """{exercise: folder with its changed code}; below a repository, as checkpoints/ is."""
    folder = tmp_path_factory.mktemp("exercises")
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    for name in study.exercises():
        study.changed_copy(name, folder / name)
    return {name: folder / name for name in study.exercises()}


def test_every_patch_says_what_and_why_and_changes_what_it_names(copies):
    assert len(copies) == 13
    for name, patch in study.exercises().items():
        head, _, diff = patch.read_text().partition("diff --git ")
        title, why, seen, command = head.strip().split("\n\n")
        assert "\n" not in title and why.startswith("Why: ") and seen.startswith("What one sees")
        assert command.startswith("    python ")
        if "study.py " in command:
            assert set(command.split("study.py ")[1].split()) <= EVERY.keys(), name
        assert {line[6:].strip() for line in diff.splitlines() if line.startswith("+++ b/")} == {
            path.name for path in ROOT.glob("*.py")
            if path.read_text() != (copies[name] / path.name).read_text()}


# A toy in each copy, in a fork, so that torch is imported once for all of them. It is stopped and
# resumed in its last stage; what stands on disk, there and at the end, must be what was trained.
TRAIN_THEM_ALL = """
import os, sys
import numpy, tiktoken, torch, torch.utils.checkpoint, yaml
torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports a good deal
for folder in sys.argv[1].split(","):
    if os.fork():
        assert os.wait()[1] == 0, folder
        continue
    sys.path.insert(0, folder)
    os.chdir(folder)
    import evaluate_gpt2, train_gpt2_fusion as training
    models, train = [], training.train
    training.train = lambda run, state, model, *rest: (
        models.append(model) or train(run, state, model, *rest))
    training.in_any_process = lambda flag: len(models) == 1 and models[0].blocks == 3
    kind = "quantization_type=" + ("fp8" if folder.endswith("fp8") else "int4")
    rows = torch.arange(32)[None]
    for arguments, status in (([*sys.argv[2:], kind], 130), (["--resume", "toy"], 0)):
        assert training.main(arguments) == status
        loaded = training.load_run(training.Run.named("toy"))[0]
        assert all(torch.equal(models[-1].eval()(rows, k), loaded(rows, k)) for k in range(3))
    print(folder, *evaluate_gpt2.losses_by_row(loaded, rows)[0], file=sys.stderr)
    os._exit(0)  # nothing of the parent is to be undone
"""


def test_every_exercise_trains_and_loads(copies, toy):
    sizes = {"n_layers": 3, "block_size": 1, "max_steps": 8, "eval_rows": 1, "log_interval": 1}
    arguments = [word for word in toy(**sizes) if not word.startswith("training.folder=")]
    folders, seen = ",".join(map(str, copies.values())), set()
    done = subprocess.run([sys.executable, "-c", TRAIN_THEM_ALL, folders, *arguments],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (name, folder), said in zip(copies.items(), done.stderr.splitlines(), strict=True):
        # Left to right of every exit, but for those that would see the answer.
        exits = {"both-ways": 1, "shift-off": 0}.get(name, 3)
        losses = ["nelbo_12"] + [f"left_to_right_{k}" for k in range(exits)]
        assert said.split() == [str(folder), *losses]
        lines = Run(folder / "checkpoints" / "toy").metrics("step")
        assert len(lines) == 8 and all(0 < line["loss"] < 10 for line in lines), name
        seen.add(tuple((line["loss"], line["grad_norm"]) for line in lines))
    # The order of revealing changes no training, and mostly-light none that is fused: all others
    # give figures of their own.
    assert len(seen) == len(copies) - 1


def test_exercises_change_what_they_say(copies):
    """Signal to noise of three and of eight bits; the share of light masks; the leftmost masks
    first; halves of a batch do not add up where the number of masks drawn divides."""
    linear, w = torch.nn.Linear(256, 256), torch.randn(256, 256)
    linear.weight.data = w
    for name, kind, low, high in (("three-bit", "int4", 14, 14.7), ("fp8", "fp8", 29, 34)):
        stored = runpy.run_path(copies[name] / "quant.py")["QuantLinear"](linear, kind)
        db = 10 * torch.log10(w.square().mean() / (stored.dequantize() - w).square().mean())
        assert low < db < high, (name, db)  # measured: 14.33; four bits give 20.95
    assert 8 * stored.nbytes / w.numel() == 8 + 32 / 256

    light = runpy.run_path(copies["mostly-light"] / "train_gpt2_fusion.py")
    control = load_config(preset="tiny", overrides=["mode=standard"])
    (stage,), tokens = light["fusion_schedule"](control), np.arange(4096).repeat(4)
    m = torch.cat([light["batch_of"](tokens, control, stage, step)[3] for step in range(200)])
    assert (m < 0.45).float().mean().item() == pytest.approx(16 / 18, abs=0.01)

    config = toy_config(n_layers=1, seq_len=8, mode="standard")
    code = runpy.run_path(copies["leftmost-first"] / "model.py")
    x = torch.tensor([[1] + [config.mask_id] * 7])
    x = code["confident_step"](code["GPT"](config), x, 4, 0)
    assert (x[0] == config.mask_id).tolist() == [False] * 4 + [True] * 4

    code = runpy.run_path(copies["drawn-masks"] / "model.py")
    torch.manual_seed(0)
    x_0, m = torch.randint(257, (8, 8)), torch.tensor([0.1] * 4 + [0.4] * 4)
    batch = (x_0, *code["corrupt"](x_0, m, torch.rand(8, 8), config.mask_id), m)
    loss = functools.partial(code["diffusion_loss"], code["GPT"](config), exit_k=0, rows=8)
    halves = loss(*(part[:4] for part in batch))[0] + loss(*(part[4:] for part in batch))[0]
    assert abs(loss(*batch)[0] - halves) > 0.003  # where a constant divides: 1e-6


def test_exercise_that_does_not_fit_is_refused(monkeypatch, tmp_path):
    odd = tmp_path / "odd.patch"
    odd.write_text(study.exercises()["three-bit"].read_text().replace("/ 15", "/ 99"))
    monkeypatch.setattr(study, "exercises", lambda: {"odd": odd})
    with pytest.raises(UserError, match="odd.patch does not fit the code .*quant.py"):
        study.changed_copy("odd", tmp_path / "code")


def test_a_run_of_another_length_is_not_taken_for_a_row(run, monkeypatch):
    run.folder.rename("checkpoints/unchanged")  # as by an exercise tried under its own name
    monkeypatch.setattr(study, "ROOT", Path())
    with pytest.raises(UserError, match="another length"):
        study.run("unchanged", "training.max_steps=2200", 1, False)
    kept = study.run("unchanged", "training.max_steps=20", 1, False)
    assert kept["train_tokens"] == 20 * 4 * 32


def test_figures_of_a_run(run):
    """They have the layout of data/results; a next-token run lacks the bounds."""
    lines = [*map(json.loads, run.metrics_file.read_text().splitlines())]
    steps = [line for line in lines if line["event"] == "step" and line["stage"] == 0]
    for line, loss in zip(steps, (5, 4, 4.25, 4, 4)):
        line["loss"] = loss
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = json.loads((run.folder / "eval.json").read_text())
    kept, losses = study.figures(run), result["losses"]
    first, seen = kept["stages"][0], [line["cross_entropy"] for line in run.metrics("validation")]
    assert {*kept, "command", "threads"} == study.measured()["fused-0"].keys()
    assert kept["nelbo_12"] == losses["nelbo_12"]["nats_per_token"]
    assert kept["left_to_right"][2] == losses["left_to_right_2"]["nats_per_token"]
    assert kept["bits_per_byte"]["left_to_right"] == min(
        losses[f"left_to_right_{k}"]["bits_per_byte"] for k in range(3))
    assert kept["train_tokens"] == 20 * 4 * 32 and len(kept["cross_entropy"]) == 13
    assert first["largest_rise"] == 0.25
    assert (first["validation"]["best"], first["validation"]["last"]) == (min(seen[:3]), seen[2])

    result["losses"] = {name: losses[name] for name in ("left_to_right_0", "unigram")}
    (run.folder / "eval.json").write_text(json.dumps(result | {"time_steps": []}))
    kept = study.figures(run)
    assert kept["nelbo_12"] is kept["nelbo"] is kept["bits_per_byte"]["nelbo"] is None
    assert len(kept["left_to_right"]) == 1 and kept["cross_entropy"] == {}


def test_seeds_share_a_line_of_the_table(monkeypatch, tmp_path, capsys):
    stage = {"steps": 30, "held_mib": 26.0, "peak_mib": 500.0}  # without a rise
    kept = {"nelbo": 5.0, "train_seconds": 10.0, "train_tokens": 1000, "left_to_right": [4.6, 4.5],
            "bits_per_byte": {"nelbo": 2.0, "left_to_right": 1.5}, "stages": [stage]}  # fmt: skip
    results = {f"a-{seed}": kept | {"nelbo_12": 5.1 + seed / 5} for seed in range(3)}
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    study.results_of("a-0").write_text(json.dumps(results | {"b": kept | {"nelbo_12": None}}))
    settings = {f"a-{seed}": f"training.seed={seed}" for seed in range(4)}  # one is not measured
    study.print_table("runs", settings | {"b": "training.time_step_masking=false"})
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| a | 30 | 10 +- 0 | 100 +- 0 | 5.300 +- 0.200 | 5.000 +- 0.000 | 4.500 +- 0.000 | "
        "2.000 | 26 | 500 | - |",
        "| b | 30 | 10 | 100 | - | - | 4.500 | 1.500 | 26 | 500 | - |"]


def test_a_fresh_clone_has_no_folder_for_runs_yet(monkeypatch, tmp_path, capsys):
    """The folder is there when a row begins, and the two texts where a row needs them."""
    def run(row, *_):
        raise UserError(f"{row}: {sorted(path.name for path in tmp_path.glob('checkpoints/*'))}")

    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "run", run)
    for row, there in (("fused-0", "[]"), ("older", "['newer.jsonl', 'older.jsonl']")):
        fails(study.main, [row], capsys, f"{row}: {there}")
    older, newer = ([json.loads(line)["source"] for line in open(tmp_path / "checkpoints" / name)]
                    for name in ("older.jsonl", "newer.jsonl"))  # fmt: skip
    assert (len({*older}), len({*newer}), len(older + newer)) == (225, 24, 10_000)
    assert max(int(name[:4]) for name in older) < min(int(name[:4]) for name in newer)
    fails(study.main, ["nothing"], capsys, "no row 'nothing'")
