"""The claims, measured: every run of the study, its command, its table.

    python tests/study.py --list                  every row and the one command that trains it
    python tests/study.py --table                 the tables of what has been measured, by group
    python tests/study.py fused-0 end-to-end-0    train these rows; a group's name stands for all
    python tests/study.py --jobs 1 small          three hours: GPT-2 Small, one run at a time
    python tests/study.py                         train all that data/results/ does not hold yet

A row is a run of the tiny preset, or (small-...) of gpt2.yaml as it stands, with some keys changed.
It is trained and evaluated by `train_gpt2_fusion.py` itself in a process of its own, its log in
checkpoints/<row>.log; a study that was stopped goes on where it was, and `--again` trains anew what
checkpoints/ holds finished. What came out of a row is kept in data/results/study-tiny.json, or
study-gpt2-small.json, as soon as it is there.

At tiny size two runs at a time, one thread each, use two cores better than one run on both. So the
seconds of those tables are seconds of one core, with another run on the other core; those of GPT-2
Small are seconds of both. The same row on as many threads gives the same figures, to the last
digit, on the same kind of processor.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_loader import CORPUS, MERGES, UserError, one_line_errors, write_json
from evaluate_gpt2 import Run

RESULTS = ROOT / "data" / "results"
STANDARD = "training.mode=standard"
UNMASKED = "training.time_step_masking=false"
NEXT_TOKEN = f"{STANDARD} {UNMASKED}"

# The four variants: what each changes in the tiny preset, and its steps in the tuning runs.
VARIANTS = {
    "fused": ("", 1450),
    "fused-no-adapters": ("training.qlora_enabled=false", 1450),
    "end-to-end": (STANDARD, 730),
    "next-token": (NEXT_TOKEN, 730),
}
# The short runs of GPT-2 Small are scored on 20 validation rows, which is a fifth of the work.
ON_20_ROWS = ("import sys, evaluate_gpt2, train_gpt2_fusion; evaluate_gpt2.ROWS = 20; "
              "sys.exit(train_gpt2_fusion.main(sys.argv[1:]))")
RATES = ("5e-4", "1e-3", "2e-3", "3e-3")
LONGER = "training.max_steps=8800"  # than the tiny preset itself
TUNED = "training.batch_size=16 training.block_steps=[8,1,1] training.qlora_lr=3e-3"


def rows():
    """{group: {row: settings}}, in the order in which they are run."""
    tuning = {f"tune-{name}-{lr}": f"{keys} {TUNED} training.max_steps={steps} training.lr={lr}"
              for lr in RATES for name, (keys, steps) in VARIANTS.items()}
    # Beside tune-<variant>-<rate>, from which each of these differs in one thing (and in the steps
    # that keep the time equal).
    fused = "training.lr=1e-3 training.qlora_lr=3e-3"
    half, quarter = (f"training.batch_size={n} training.max_steps" for n in (8, 4))
    full = f"{fused} training.batch_size=16 training.max_steps=1450"
    tried = {
        "try-8-rows-fused": f"{fused} training.block_steps=[8,1,1] {half}=2900",
        "try-8-rows-end-to-end": f"{STANDARD} training.lr=1e-3 {half}=1460",
        "try-8-rows-next-token": f"{NEXT_TOKEN} training.lr=2e-3 {half}=1460",
        "try-8-rows-end-to-end-5e-4": f"{STANDARD} training.lr=5e-4 {half}=1460",
        "try-4-rows-fused": f"{fused} training.block_steps=[8,1,1] {quarter}=5400",
        "try-4-rows-end-to-end": f"{STANDARD} training.lr=1e-3 {quarter}=2700",
        "try-4-rows-next-token": f"{NEXT_TOKEN} training.lr=2e-3 {quarter}=2700",
        "try-shares-2-1-1": f"{full} training.block_steps=[2,1,1]",
        "try-shares-4-1-1": f"{full} training.block_steps=[4,1,1]",
        "try-shares-16-1-1": f"{full} training.block_steps=[16,1,1]",
        "try-adapter-rate-1e-2": f"{full} training.block_steps=[8,1,1] training.qlora_lr=1e-2",
        "try-time-step-0.01": f"{full} training.block_steps=[8,1,1] "
        "training.time_step_mask_fractions=[.01,.1,.2,.3,.4,.5,.6,.7,.8,.85,.9,.95,.99]",
    }
    # Steps for equal training time, from the tokens per second of the tuning runs. The fused run
    # is the tiny preset, four times as long.
    main = {
        "fused": LONGER,
        "fused-no-adapters": "training.qlora_enabled=false training.max_steps=9200",
        "end-to-end": f"{STANDARD} training.max_steps=4150",
        "next-token": f"{NEXT_TOKEN} training.max_steps=4150 training.lr=2e-3",
    }
    seeds = {f"{name}-{seed}": f"{keys} training.seed={seed}"
             for seed in range(3) for name, keys in main.items()}
    one_block = (f"{STANDARD} training.total_blocks=1 training.block_steps=[1] "
                 "training.block_mask_ranges=[[0.0,1.0]]")
    two_layers = f"{one_block} model.n_layers=2"
    both_ways = "model.attention_mode=bidirectional"
    more = {
        "end-to-end-2-layers": f"{two_layers} training.max_steps=8700",
        "next-token-2-layers": f"{two_layers} training.max_steps=8700 {UNMASKED} training.lr=2e-3",
        "next-token-longer": f"{NEXT_TOKEN} training.max_steps=4450 training.lr=2e-3",
        "fused-int4": f"training.quantization_type=int4 {LONGER}",
        "fused-trainable": "training.fusion_mode=trainable training.max_steps=8200",
        "fused-bidirectional": f"{both_ways} training.max_steps=10500",
        "end-to-end-bidirectional": f"{both_ways} {STANDARD} training.max_steps=4500",
    }
    # What each idea is worth: a quarter of the time of the runs above, all of it equal again.
    blocks = "training.total_blocks={} training.block_size={} training.block_steps={} " \
             "training.block_mask_ranges={}"
    ideas = {
        "fused-quarter": "training.max_steps=2200",
        "no-adapters": "training.qlora_enabled=false training.max_steps=2300",
        "heavy-to-light": "training.max_steps=2200 "
                          "training.block_mask_ranges=[[0.7,1.0],[0.4,0.7],[0.0,0.4]]",
        "two-blocks": blocks.format(2, 3, "[16,2]", "[[0.0,0.5],[0.5,1.0]]")
                      + " training.max_steps=1800",
        "six-blocks": blocks.format(6, 1, "[25,1,1,1,1,1]",
                                    "[[0.0,0.3],[0.3,0.5],[0.5,0.6],[0.6,0.8],[0.8,0.9],[0.9,1.0]]")
                      + " training.max_steps=2700",
        "shift-off": "training.max_steps=3000",
        "masked-only": "training.max_steps=3000",
        "shared-adapters": "training.max_steps=2200",
        "embeddings-on": "training.max_steps=2150",
        "drawn-masks": "training.max_steps=3000",
        "both-ways": "training.max_steps=2200",
    }  # fmt: skip
    ideas = {name: f"training.eval_interval=10000 {keys}" for name, keys in ideas.items()}
    # Where the gain comes from: light masks alone, with two layers and with six. Their time steps
    # are not the 12, so that only the continuous bound can be compared.
    light = f"{one_block} training.time_step_mask_fractions=[0.1,0.2,0.3,0.4]"
    why = {
        "light-masks-2-layers": f"{light} model.n_layers=2 training.max_steps=2200",
        "light-masks-6-layers": f"{light} training.block_size=6 training.max_steps=1040",
    }
    # The controls that isolate block-wise training: end to end on the fused run's own mixture of
    # noise (a patch), and models of two layers, each kind at rates of its own. Steps are those of
    # the rows above with as many layers; the tuning has a third of them. Last the best rate.
    kinds = {
        "mostly-light": (STANDARD, 4150, "5e-4 1e-3 2e-3", "1e-3"),
        "mostly-light-2-layers": (two_layers, 8700, "5e-4 1e-3 2e-3 3e-3", "1e-3"),
        "2-layers-end-to-end": (two_layers, 8700, "2.5e-4 5e-4 1e-3 2e-3 3e-3", "5e-4"),
        "2-layers-next-token": (f"{two_layers} {UNMASKED}", 8700, "1e-3 2e-3 3e-3 5e-3", "2e-3"),
    }
    controls_tuning = {
        f"{name}-{lr}": f"{keys} training.max_steps={steps // 3} training.lr={lr}"
        for name, (keys, steps, rates, _) in kinds.items() for lr in rates.split()
    }  # fmt: skip
    controls = {
        f"{name}-{seed}": f"{keys} training.max_steps={steps} training.lr={best} "
                          f"training.seed={seed}"
        for name, (keys, steps, _, best) in kinds.items() for seed in range(3)
    }  # fmt: skip
    # A rate of its own for the token embedding (two patches), at the length of the tiny preset.
    embeddings = {
        f"embeddings-x{times}-{name}-{seed}": f"{keys} training.seed={seed}"
        for seed in range(3) for times in (1, 3, 10)
        for name, keys in (("fused", "training.max_steps=2200"),
                           ("end-to-end", f"{STANDARD} training.max_steps=1040"),
                           ("next-token", f"{NEXT_TOKEN} training.max_steps=1040 training.lr=2e-3"))
    }  # fmt: skip
    # From the weights of next-token-0, exported: python evaluate_gpt2.py export next-token-gpt2
    # --run next-token-0 --precision fp32
    started = "model.init_from=next-token-gpt2 training.max_steps=4600"
    pretrained = {
        "fused-from-gpt2": started,
        "plain-qlora": f"{started} {STANDARD}",
    }
    # Adapters where they should pay: from a model of the older addresses, a quarter longer than
    # next-token-0, to the newest tenth of them, for a fifth of its steps (the fused runs for as
    # long). Between the two comes python evaluate_gpt2.py export older-gpt2 --run older
    # --precision fp32. `newer-start` is where they start: one step that learns nothing.
    older, newer = (f"data.source=checkpoints/{name}.jsonl data.folder=checkpoints/{name}-tokens"
                    for name in ("older", "newer"))
    newer += " model.dropout=0.1"
    from_older = f"{newer} model.init_from=older-gpt2"
    fine, fused = f"{from_older} {STANDARD} training.max_steps=1040", "training.max_steps=1780"
    full = f"{fine} training.qlora_enabled=false"
    adapters = {
        "older": f"{older} {NEXT_TOKEN} training.max_steps=5200 training.lr=2e-3",
        "newer-start": f"{from_older} {STANDARD} training.max_steps=1 training.qlora_enabled=false "
                       "training.lr=1e-9",
        "newer-full": full,
        "newer-full-3e-4": f"{full} training.lr=3e-4",
        "newer-qlora-fp16": fine,
        "newer-qlora-fp16-3e-3": f"{fine} training.qlora_lr=3e-3",
        "newer-qlora-fp32": f"{fine} training.quantization_type=fp32",
        "newer-qlora-int4": f"{fine} training.quantization_type=int4",
        "newer-qlora-nf4": f"{fine} training.quantization_type=nf4",
        "newer-fused": f"{from_older} {fused}",
        "newer-fused-no-adapters": f"{from_older} {fused} training.qlora_enabled=false",
        "newer-scratch": f"{newer} {fused}",
        "newer-next-token-full": f"{full} {UNMASKED}",
        "newer-next-token-qlora": f"{fine} {UNMASKED}",
        "newer-next-token-qlora-3e-3": f"{fine} {UNMASKED} training.qlora_lr=3e-3",
    }
    # Ten times the steps of `main`: several passes over the training text, 53 fused and 25 of the
    # controls. Weight decay is 0.1 everywhere; dropout is given to all kinds too.
    long = {
        "long-next-token": f"{NEXT_TOKEN} training.max_steps=41500 training.lr=2e-3",
        "long-fused": "training.max_steps=88000",
        "long-end-to-end": f"{STANDARD} training.max_steps=41500",
    }
    long |= {f"{name}-dropout": f"{keys} model.dropout=0.1" for name, keys in long.items()}
    # Early stopping, fixed after the run above: the decay ends where next-token's validation was
    # best there. The other kinds were best at, or within 500 steps of, their last one.
    long["long-next-token-stopped"] = f"{NEXT_TOKEN} training.max_steps=33000 training.lr=2e-3"
    # Where depth begins to pay: more of the time for the later blocks, as long in all.
    long |= {
        "long-fused-4-1-1": "training.max_steps=71000 training.block_steps=[4,1,1]",
        "long-fused-1-1-1": "training.max_steps=55000 training.block_steps=[1,1,1]",
        "both-ways-long": "training.max_steps=88000",
    }
    long = {name: f"{keys} training.eval_interval=1000" for name, keys in long.items()}
    # The same question as the last three at the length of `main`, whose rows they stand beside.
    depth = {
        "fused-1-1-1": "training.max_steps=5500 training.block_steps=[1,1,1]",
        "both-ways-1-1-1": "training.max_steps=5500 training.block_steps=[1,1,1]",
        "fused-4-1-1": "training.max_steps=7100 training.block_steps=[4,1,1]",
    }
    # GPT-2 Small, each kind at a few rates for an eleventh of the time.
    small_tuning = {
        f"small-tune-{name}-{lr}": f"{keys} training.max_steps={steps} training.lr={lr}"
        for name, keys, steps, rates in (("fused", "", 170, "5e-4 1e-3"),
                                         ("end-to-end", STANDARD, 100, "2.5e-4 5e-4 1e-3"),
                                         ("next-token", NEXT_TOKEN, 100, "2.5e-4 5e-4 1e-3"))
        for lr in rates.split()
    }  # fmt: skip
    # Steps for 45 minutes on both cores, from the tokens per second of the short runs. The fused
    # run is gpt2.yaml as it stands.
    small = {
        "small-fused": "training.max_steps=2000 training.lr=5e-4",
        "small-next-token": f"{NEXT_TOKEN} training.max_steps=1100 training.lr=5e-4",
        "small-end-to-end": f"{STANDARD} training.max_steps=1100 training.lr=5e-4",
    }
    return {"tuning": tuning, "tried": tried, "main": seeds, "more": more, "ideas": ideas,
            "why": why, "controls-tuning": controls_tuning, "controls": controls,
            "embeddings": embeddings, "pretrained": pretrained, "adapters": adapters, "long": long,
            "depth": depth, "small-tuning": small_tuning, "small": small}


def command_of(row, settings):
    """The command that trains a row. Some need this script: an exercise's change, fewer rows."""
    if patch_of(row) or row.startswith("small-tune-"):
        return f"python tests/study.py {row}"
    return "python train_gpt2_fusion.py " + shlex.join(arguments(row, settings))


def arguments(row, settings):
    """The arguments of train_gpt2_fusion.py that train a row."""
    preset = [] if row.startswith("small-") else ["--preset", "tiny"]
    return [*preset, *settings.split(), f"training.run_id={row}"]


def exercises():
    """{name: patch} of the changes in tests/exercises/."""
    return {path.stem: path for path in sorted((ROOT / "tests" / "exercises").glob("*.patch"))}


def patch_of(row):
    """The name of the exercise whose change a row is trained with; None: the code as it is."""
    return next((name for name in exercises() if f"{row}-".startswith(f"{name}-")), None)


def older_and_newer():
    """Write the corpus as two texts: checkpoints/newer.jsonl, the newest tenth of the addresses,
    and checkpoints/older.jsonl, the others."""
    lines = CORPUS.read_text().splitlines()
    source = {line: json.loads(line)["source"] for line in lines}
    addresses = sorted(set(source.values()), key=lambda name: int(name.split("-")[0]))
    newest = addresses[-(len(addresses) // 10):]
    for name, wanted in (("older", False), ("newer", True)):
        text = "".join(f"{line}\n" for line in lines if (source[line] in newest) == wanted)
        (ROOT / "checkpoints" / f"{name}.jsonl").write_text(text)


def changed_copy(name, folder):
    """Copy the code into `folder` and apply an exercise's patch. UserError if it does not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "gpt2.yaml", CORPUS, MERGES]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    # Below checkpoints/ git would find our repository and apply the patch to nothing.
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    done = subprocess.run(["git", "apply", exercises()[name].resolve()], cwd=folder, env=alone,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise UserError(f"{exercises()[name]} does not fit the code (is it applied already? git "
                        f"apply -R takes it back): {done.stderr}")


def run(row, settings, threads, again):
    """Train and evaluate a row, or go on with it. -> its figures; UserError where it failed."""
    runs, code = ROOT / "checkpoints", ROOT
    if finished := (runs / row / "eval.json").exists():
        print(f"{row} is finished; " + ("training it anew" if again else "--again trains it anew"))
    script = ["-c", ON_20_ROWS] if row.startswith("small-tune-") else ["train_gpt2_fusion.py"]
    command = [sys.executable, *script, *arguments(row, settings),
               "--overwrite" if finished and again else "--resume"]
    if patch := patch_of(row):
        code = runs / f"{row}-code"
        changed_copy(patch, code)
        command += [f"training.folder={runs}", f"data.folder={ROOT / 'data'}"]
    with open(runs / f"{row}.log", "a") as log:
        status = subprocess.run(command, cwd=code, stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
    if status:
        raise UserError(f"{row} failed with status {status}; see {runs / f'{row}.log'}")
    return figures(Run(runs / row)) | {"threads": threads}


def figures(run):
    """What is kept of a run: its metrics; of each stage seconds, memory, validations, stability.

    largest_rise is that of the logged loss from one line to the next, in nats; largest_grad_norm
    that of the lines after step 100, before clipping (None in a shorter stage).
    """
    result = run.evaluation()
    keys = ("nelbo_12", "nelbo", "nelbo_stderr", "left_to_right", "bits_per_byte", "unigram",
            "rows", "train_seconds", "train_tokens")
    kept = ("steps", "seconds", "tokens", "held_mib", "peak_mib")
    stages = [{key: stage[key] for key in kept} for stage in result["memory"]["stages"]]
    validations, steps = (run.metrics(event) for event in ("validation", "step"))
    for number, stage in enumerate(stages):
        seen = [(line["cross_entropy"], line["step"]) for line in validations
                if line["stage"] == number]
        best, step = min(seen)
        stage["validation"] = {"best": best, "best_step": step, "last": seen[-1][0]}
        lines = [line for line in steps if line["stage"] == number]
        rises = [after["loss"] - line["loss"] for line, after in zip(lines, lines[1:])]
        stage["largest_rise"] = max([0.0, *rises])
        stage["largest_grad_norm"] = max((line["grad_norm"] for line in lines
                                          if line["step"] > 100), default=None)
    ce = {f'{step["mask_fraction"]:g}': step["cross_entropy"] for step in result["time_steps"]}
    if any(map(math.isnan, result["left_to_right"] or [])):  # exercise shift-off: it would leak
        result |= {"left_to_right": None}
        result["bits_per_byte"]["left_to_right"] = None
    return {key: result[key] for key in keys} | {"cross_entropy": ce, "stages": stages}


def results_of(row):
    """The file that holds a row's figures."""
    return RESULTS / f"study-{'gpt2-small' if row.startswith('small-') else 'tiny'}.json"


def read(path):
    """What a file of results holds: {row: {command, figures}}."""
    return json.loads(path.read_text()) if path.exists() else {}


def measured():
    """What all files of results hold."""
    return read(RESULTS / "study-tiny.json") | read(RESULTS / "study-gpt2-small.json")


def mean(values, digits):
    """The mean as text, with the standard deviation over seeds where there are several."""
    if None in values:
        return "-"
    text = f"{statistics.mean(values):,.{digits}f}"
    return text + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_table(group, settings):
    """A Markdown table of a group, {row: settings}; rows that differ in their seed share a line.

    Nats per token; left to right at the best exit; bits per byte by the continuous bound, or left
    to right where there is none. `+-` is the standard deviation over the seeds. Rise and gradient
    norm (see `figures`) are the largest of all stages and seeds; rows measured before they were
    kept have "-".
    """
    done, lines = measured(), {}
    for name in settings:
        if name in done:
            seeded = "training.seed=" in settings[name]
            line = name.rpartition("-")[0] if seeded else name
            lines.setdefault(line, []).append(name)
    if not lines:
        return
    head = ("run", "seeds", "seconds", "M tokens", "tokens/s", "NELBO_12", "NELBO",
            "left to right", "bits/byte", "MiB held, by stage", "MiB at the peak",
            "largest rise", "largest gradient norm")
    print(f"\n{group}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, same_but_seed in lines.items():
        masked = "time_step_masking=false" not in settings[same_but_seed[0]]
        runs = [done[row] for row in same_but_seed]
        best = [run["left_to_right"] and min(run["left_to_right"]) for run in runs]
        bits = [run["bits_per_byte"]["nelbo" if masked else "left_to_right"] for run in runs]
        speed = [run["train_tokens"] / run["train_seconds"] for run in runs]
        stages = list(zip(*(run["stages"] for run in runs)))
        held, peak = (" / ".join(f"{statistics.mean(s[key] for s in same):.0f}" for same in stages)
                      for key in ("held_mib", "peak_mib"))
        rise, norm = (max((s[key] for same in stages for s in same if s.get(key) is not None),
                          default=None) for key in ("largest_rise", "largest_grad_norm"))
        seconds = mean([run["train_seconds"] for run in runs], 0)
        bounds = (mean([run[key] if masked else None for run in runs], 3)
                  for key in ("nelbo_12", "nelbo"))
        cells = (name, len(runs), seconds, f'{runs[0]["train_tokens"] / 1e6:.2f}', mean(speed, 0),
                 *bounds, mean(best, 3), f"{statistics.mean(bits):.3f}", held, peak,
                 "-" if rise is None else f"{rise:.3f}", "-" if norm is None else f"{norm:.2f}")
        print(f"| {' | '.join(map(str, cells))} |")


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="The claims, measured.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows or groups")
    parser.add_argument("--list", action="store_true", help="print the command of each row")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument("--again", action="store_true", help="also what is finished already")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    args = parser.parse_args(argv)
    groups = rows()
    every = {row: settings for group in groups.values() for row, settings in group.items()}
    unknown = [name for name in args.rows if name not in every and name not in groups]
    if unknown:
        raise UserError(f"no row {unknown[0]!r}; --list names them all")
    chosen = [row for group, names in groups.items() for row in names
              if not args.rows or row in args.rows or group in args.rows]
    if args.list:
        for row in chosen:
            print(command_of(row, every[row]))
        return 0
    if not args.table:
        todo = [row for row in chosen if args.rows or row not in measured()]
        (ROOT / "checkpoints").mkdir(exist_ok=True)
        if any(".jsonl" in every[row] for row in todo):
            older_and_newer()
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        pool = ThreadPoolExecutor(args.jobs)
        try:
            results = pool.map(lambda row: run(row, every[row], threads, args.again), todo)
            for row, result in zip(todo, results):
                path = results_of(row)
                table = read(path) | {row: {"command": command_of(row, every[row])} | result}
                write_json(path, table)
                best = result["left_to_right"] and round(min(result["left_to_right"]), 3)
                print(f'{row}: {result["train_seconds"]:.0f} s, NELBO_12 '
                      f'{result["nelbo_12"]:.3f}, left to right {best}', flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # a run under way saves itself on Ctrl-C
    for group, names in groups.items():
        print_table(group, {row: names[row] for row in names if row in chosen})
    return 0


if __name__ == "__main__":
    sys.exit(main())
