"""Three long campaigns on toy runs: nothing is lost, no damage goes unseen, nothing grows.

    python tests/campaigns.py                       all three, some minutes on two cores
    python tests/campaigns.py kills --count 12      one of them, shorter

kills   the real script is killed (SIGKILL) at random moments and resumed until it ends: the same
        losses, weights and evaluation as a run that was never stopped, to the last bit
flips   one bit of a file is flipped: whatever reads the file names it, or makes it again
steps   memory, open files and threads of a training do not grow (Linux)

Prints a line for each kind of run, file or stage and one for each campaign; the status is 1 if
anything failed.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from conftest import ROOT, toy_arguments

import data_loader
import evaluate_gpt2
import train_gpt2_fusion as train
from data_loader import Parser, Run, UserError, load_config, one_line_errors, read_tensors
from evaluate_gpt2 import number
from model import GPT

EVERY_STEP = {"max_steps": 36, "checkpoint_interval": 1, "log_interval": 1, "eval_interval": 6}
DROPOUT = {"dropout": 0.1, "qlora_dropout": 0.1}
KINDS = {
    "frozen": DROPOUT | {"quantization_type": "int4"},
    "trainable": DROPOUT | {"fusion_mode": "trainable"},
    "end to end": DROPOUT | {"mode": "standard"},
    "plain QLoRA": DROPOUT | {"mode": "standard", "quantization_type": "nf4"},  # and init_from
    "bidirectional": {"attention_mode": "bidirectional", "batch_size": 2,
                      "gradient_accumulation": 2, "quantization_type": "nf4"},
}  # fmt: skip
# Clocks, memory and names, which differ between two runs of the same training.
VARIES = {"tokens_per_second", "memory_mib", "seconds", "peak_mib", "metrics_bytes", "backups",
          "config"}  # fmt: skip


def silently(main, arguments):
    """Call a script's main(argv) without its printing. -> its status"""
    with contextlib.redirect_stdout(io.StringIO()):
        return main([str(argument) for argument in arguments])


def shares(count, kinds):
    """[(kind, how many of `count` fall to it), ...]"""
    return [(kind, count // len(kinds) + (i < count % len(kinds))) for i, kind in enumerate(kinds)]


def go_on(run, arguments):
    """The arguments that begin a run, or go on with it."""
    return ["--resume", run.folder] if run.checkpoint.exists() else arguments


def killed(arguments, steps, pause):
    """Start the real script and kill it `pause` seconds after it has logged so many steps (0: after
    its first words). -> its status, the last line that it printed"""
    command, logged, line = [sys.executable, ROOT / "train_gpt2_fusion.py", *arguments], 0, ""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        logged += bool(re.match(r"stage \d+ +step", line))
        if logged >= steps:
            break
    time.sleep(pause)
    process.kill()
    process.communicate()
    return process.returncode, line.strip()


def what_was_hit(run):
    """What a killed process was doing, by the files that it left."""
    if not run.checkpoint.exists():
        return "before the first checkpoint"
    aside = "".join(path.name for path in run.folder.rglob(".*.tmp"))
    if aside:
        return "in a backup" if "block" in aside else "in a checkpoint"
    state, _ = train.read_checkpoint(run)
    if run.backup(len(state.backups)).exists():
        return "between backup and checkpoint"
    return "between stages" if state.stage and not state.step else "in a step"


def finish(run, arguments):
    """Train a run to its end and evaluate it on 8 rows. -> all that it arrives at, to compare"""

    def plain(tensors):
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

    def fixed(facts):
        return {key: value for key, value in facts.items() if key not in VARIES}

    with mock.patch.object(evaluate_gpt2, "ROWS", 8):
        status = silently(train.main, go_on(run, arguments))
        status = status or silently(evaluate_gpt2.main, ["--run", run.folder])
    if status:
        return {"status": status}
    state, tensors = train.read_checkpoint(run)
    evaluation = json.loads((run.folder / "eval.json").read_bytes())
    backups = [read_tensors(run.backup(block))[0] for block in range(len(state.backups))]
    lines = [line for event in ("step", "validation", "stage") for line in run.metrics(event)]
    return {"status": 0, "log": [fixed(line) for line in lines], "state": fixed(state.facts()),
            "checkpoint": plain(tensors), "backups": [plain(backup) for backup in backups],
            "evaluation": [evaluation["losses"], evaluation["time_steps"]],
            "left over": [path.name for path in run.folder.rglob(".*.tmp")]}  # fmt: skip


def kills(folder, count):
    """Yields for each kind of run what was hit, and what then differs from a run never stopped."""
    rng = random.Random(1)
    for kind, number in shares(count, KINDS):
        (folder / kind).mkdir()
        toy, changes = toy_arguments(folder / kind), EVERY_STEP | KINDS[kind]
        if kind == "plain QLoRA":
            changes["init_from"] = folder / kind / "gpt2"
            GPT(load_config(overrides=toy(mode="standard"))).save_pretrained(changes["init_from"])
        arguments, run, hits, fault = toy(**changes), Run(toy.folder), Counter(), ""
        config = load_config(overrides=arguments)
        whole = finish(Run(toy.folder.with_name("whole")), toy(**changes, run_id="whole"))
        for kill in range(number):
            begun = run.checkpoint.exists()
            state = train.read_checkpoint(run)[0] if begun else train.State(config, "")
            left = [stage.steps for stage in train.fusion_schedule(config)[state.stage :]]
            steps = rng.randint(0, (sum(left) - state.step) // (number - kill))
            if rng.random() < 0.3 and (len(left) > 1 or kill == number - 1):
                steps = sum(left[:1]) - state.step  # to the end of a stage
            status, line = killed(go_on(run, arguments), steps, rng.uniform(0, 0.03))
            if status != -signal.SIGKILL:  # it has ended
                fault = f"{line}; " if status else ""
                break
            hits[what_was_hit(run)] += 1
        again = finish(run, arguments)
        fault += ", ".join(f"{key} differs" for key in whole if whole[key] != again.get(key))
        fault += "; not even whole" if whole["status"] else ""
        yield f"{kind}: killed {hits.total()} times, {dict(hits)}", fault


def noticed(path, read, rng):
    """Flip a bit of a file and back. -> whether what reads it has named it, or made it again"""
    good = path.read_bytes()
    position = rng.randrange(len(good))
    with open(path, "r+b", buffering=0) as file, contextlib.redirect_stdout(io.StringIO()):
        file.seek(position)
        file.write(bytes([good[position] ^ 1 << rng.randrange(8)]))
        try:
            read()
            return path.read_bytes() == good
        except UserError as error:
            return str(path) in str(error)
        finally:
            file.seek(position)
            file.write(good[position : position + 1])


def flips(folder, count):
    """Yields for each file how many flips were tried, and how many of them went unseen."""
    rng, toy = random.Random(0), toy_arguments(folder)
    run, corpus = Run(toy.folder), Path(shutil.copy(data_loader.CORPUS, folder))
    # Stopped in stage 1: a block is backed up, and the checkpoint holds an optimizer's state.
    left = iter([False] * 8 + [True])
    with mock.patch.object(train, "in_any_process",
                           lambda flag: next(left) if isinstance(flag, list) else flag):
        silently(train.main, toy())
    state, _ = train.read_checkpoint(run)
    readers = {
        run.checkpoint: lambda: train.load_run(run),
        run.backup(0): lambda: train.load_run(run),
        folder / "data" / "tokens_257.safetensors":
            lambda: data_loader.load_tokens(state.config, state.tokens_sha256),
        corpus: lambda: data_loader.read_examples("sotu", 10),
    }  # fmt: skip
    with mock.patch.object(data_loader, "CORPUS", corpus):
        for path, number in shares(count, readers):
            unseen = sum(not noticed(path, readers[path], rng) for _ in range(number))
            yield f"{path.name}: {number} flips", f"{unseen} unseen" if unseen else ""


def steps(folder, count):
    """Yields for each stage what the process held after a fifth of its steps and at its end."""
    held, real, toy = {}, train.batch_of, toy_arguments(folder)

    def batch_of(tokens, config, stage, step):
        held[stage.block, step] = (train.memory_mib(torch.device("cpu"))[0],
                                   len(os.listdir("/proc/self/fd")),
                                   len(os.listdir("/proc/self/task")))  # fmt: skip
        return real(tokens, config, stage, step)

    arguments = toy(max_steps=count, log_interval=10, eval_interval=100, checkpoint_interval=20)
    with mock.patch.object(train, "batch_of", batch_of):
        silently(train.main, arguments)
    for stage in train.fusion_schedule(load_config(overrides=arguments)):
        (mib, *others), (mib_then, *others_then) = (
            held[stage.block, step] for step in (stage.steps // 5, stage.steps - 1)
        )  # fmt: skip
        grown = mib_then - mib > 4 or mib_then - held[0, count // 10][0] > 20  # from stage 0 on
        yield (f"stage {stage.block}: {mib:.1f} MiB at step {stage.steps // 5}, {mib_then:.1f} at "
               f"{stage.steps}; open files and threads {others}, then {others_then}",
               "grown" if grown or others != others_then else "")


CAMPAIGNS = {"kills": (kills, 48), "flips": (flips, 17_600), "steps": (steps, 2000)}


@one_line_errors
def main(argv):
    parser = Parser(description="Long campaigns on toy runs.")
    parser.add_argument("campaign", nargs="?", choices=CAMPAIGNS, help="default: all of them")
    parser.add_argument("--count", type=number(int, 1), metavar="N", help="kills, flips or steps")
    args = parser.parse_args(argv)
    failed = 0
    for name in [args.campaign] if args.campaign else CAMPAIGNS:
        campaign, count = CAMPAIGNS[name]
        began, count, faults = time.monotonic(), args.count or count, 0
        with tempfile.TemporaryDirectory() as folder:
            for what, fault in campaign(Path(folder), count):
                print(f"{'FAILED' if fault else 'ok':6s}  {what}  {fault}".rstrip(), flush=True)
                faults += bool(fault)
        print(f"{name}, {count} in all: {faults} failed, {time.monotonic() - began:.0f} s\n")
        failed += faults
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
