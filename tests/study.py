"""The claims, measured: every run of the study, its command, its table.

    python tests/study.py --list                  every row and the one command that trains it
    python tests/study.py --table                 the tables of what has been measured, by group
    python tests/study.py fused-0 end-to-end-0    train these rows; a group's name stands for all
    python tests/study.py --jobs 1 small          three hours: GPT-2 Small, one run at a time
    python tests/study.py                         all that data/results/ does not hold: many-passes,
                                                  hours a row, best on a GPU

A row is a run of the tiny preset, or (small-...) of gpt2.yaml as it stands, with some keys changed:
one process trains it, one evaluates it, their output in checkpoints/<row>.log. A study that was
stopped goes on where it was; `--again` trains anew what is finished. What comes out is kept in
data/results/study-tiny.json and study-gpt2-small.json.

Two runs at a time, one thread each, use two cores better at tiny size than one run on both: the
seconds of those tables are of one core, with another run on the other, those of GPT-2 Small of
both. The same row on as many threads gives the same figures, to the last digit, on the same kind
of processor.
"""

import json
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
from data_loader import (CORPUS, MERGES, Parser, Run, UserError, load_config, one_line_errors,
                         write_json)  # fmt: skip
from evaluate_gpt2 import best_exit, evaluation
from train_gpt2_fusion import cell

RESULTS = ROOT / "data" / "results"

# Words that stand for several in the table of rows.
SHORT = {
    "STANDARD": "mode=standard",
    "UNMASKED": "time_step_masking=false",
    "NO_ADAPTERS": "qlora_enabled=false",
    "TWO_LAYERS": "STANDARD model.n_layers=2",
    "BOTH_WAYS": "model.attention_mode=bidirectional",
    "MANY": "model.dropout=0.1 batch_size=64 max_steps=20000 eval_interval=500",
    "OLDER": "data.source=checkpoints/older.jsonl data.token_folder=checkpoints/older-tokens",
    "NEWER": "data.source=checkpoints/newer.jsonl data.token_folder=checkpoints/newer-tokens "
             "model.dropout=0.1",
    "FROM_OLDER": "NEWER model.init_from=older-gpt2",
    "PLAIN": "FROM_OLDER STANDARD max_steps=1040",
}  # fmt: skip

# The rows by group: a name, and the keys that it changes (without a section: of `training`). A name
# with {a,b} is one row for each, the value standing where its keys have {}.
ROWS = """
[ladder]  each differs from the one before in one thing; the last three are controls; equal time
end-to-end-{0,1,2}             STANDARD max_steps=1780 seed={}
mostly-light-{0,1,2}           STANDARD max_steps=1780 lr=1e-3 seed={}
fused-no-adapters-{0,1,2}      NO_ADAPTERS max_steps=3600 seed={}
fused-{0,1,2}                  max_steps=3300 seed={}
mostly-light-2-layers-{0,1,2}  TWO_LAYERS max_steps=3750 lr=1e-3 seed={}
next-token-{0,1,2}             STANDARD UNMASKED max_steps=1780 lr=2e-3 seed={}
2-layers-next-token-{0,1,2}    TWO_LAYERS UNMASKED max_steps=3750 lr=2e-3 seed={}
[moments]  AdamW's moments between steps in two bytes and in four
moments-bf16-fused-{0,1,2}             max_steps=2200 seed={}
moments-fp32-fused-{0,1,2}             max_steps=2200 seed={} moments=fp32
moments-bf16-next-token-{0,1,2,3,4,5}  STANDARD UNMASKED max_steps=1040 lr=2e-3 seed={}
moments-fp32-next-token-{0,1,2,3,4,5}  STANDARD UNMASKED max_steps=1040 lr=2e-3 seed={} moments=fp32
[ideas]  what each is worth: the preset's length, or steps for the same time; most are patches
unchanged        eval_interval=10000 max_steps=2200
no-adapters      eval_interval=10000 NO_ADAPTERS max_steps=2300
heavy-to-light   eval_interval=10000 max_steps=2200 \
block_mask_ranges=[[0.7,1.0],[0.4,0.7],[0.0,0.4]]
two-blocks       eval_interval=10000 total_blocks=2 block_size=3 block_steps=[16,2] \
block_mask_ranges=[[0.0,0.5],[0.5,1.0]] max_steps=1800
six-blocks       eval_interval=10000 total_blocks=6 block_size=1 block_steps=[25,1,1,1,1,1] \
block_mask_ranges=[[0.0,0.3],[0.3,0.5],[0.5,0.6],[0.6,0.8],[0.8,0.9],[0.9,1.0]] max_steps=2700
shift-off        eval_interval=10000 max_steps=3000
masked-only      eval_interval=10000 max_steps=3000
drawn-masks      eval_interval=10000 max_steps=3000
shared-adapters  eval_interval=10000 max_steps=2200
embeddings-on    eval_interval=10000 max_steps=2150
both-ways        eval_interval=10000 max_steps=2200
embeddings-x{3,10}-fused-0       max_steps=2200 seed=0
embeddings-x{3,10}-next-token-0  STANDARD UNMASKED max_steps=1040 lr=2e-3 seed=0
muon-fused-{2200,1500}      max_steps={}
muon-next-token-{1040,700}  STANDARD UNMASKED lr=2e-3 max_steps={}
[kinds]  other kinds of run, four times as long as the preset
fused-int4                quantization_type=int4 max_steps=8800
fused-trainable           fusion_mode=trainable max_steps=8200
fused-bidirectional       BOTH_WAYS max_steps=10500
end-to-end-bidirectional  BOTH_WAYS STANDARD max_steps=4500
[shares]  more of the time for the later blocks, four times as long as the preset
fused-16-1-1     max_steps=8800
fused-4-1-1      max_steps=7100 block_steps=[4,1,1]
fused-1-1-1      max_steps=5500 block_steps=[1,1,1]
both-ways-1-1-1  max_steps=5500 block_steps=[1,1,1]
[adapters]  to the newest addresses; after `older`: export older-gpt2 --run older --precision fp32
older                        OLDER STANDARD UNMASKED max_steps=5200 lr=2e-3
newer-start                  FROM_OLDER STANDARD max_steps=1 NO_ADAPTERS lr=1e-9
newer-full                   PLAIN NO_ADAPTERS
newer-qlora-int4             PLAIN quantization_type=int4
newer-qlora-fp16             PLAIN
newer-qlora-fp16-3e-3        PLAIN qlora_lr=3e-3
newer-fused                  FROM_OLDER max_steps=1780
newer-fused-no-adapters      FROM_OLDER max_steps=1780 NO_ADAPTERS
newer-scratch                NEWER max_steps=1780
newer-next-token-full        PLAIN NO_ADAPTERS UNMASKED
newer-next-token-qlora-3e-3  PLAIN UNMASKED qlora_lr=3e-3
[long]  forty times as long as the preset; stopped: its decay ends where the first was best
long-next-token          STANDARD UNMASKED max_steps=41500 lr=2e-3 eval_interval=1000
long-next-token-stopped  STANDARD UNMASKED max_steps=33000 lr=2e-3 eval_interval=1000
long-next-token-dropout  STANDARD UNMASKED max_steps=41500 lr=2e-3 model.dropout=0.1 \
eval_interval=1000
long-fused               max_steps=88000 eval_interval=1000
long-end-to-end          STANDARD max_steps=41500 eval_interval=1000
long-end-to-end-dropout  STANDARD max_steps=41500 model.dropout=0.1 eval_interval=1000
[many-passes]  a hundred passes over the corpus: best on a GPU
passes-fused                     MANY block_steps=[8,1,1] lr=1e-3
passes-fused-bidirectional       MANY block_steps=[8,1,1] lr=1e-3 BOTH_WAYS
passes-end-to-end                MANY STANDARD lr=1e-3
passes-end-to-end-bidirectional  MANY STANDARD lr=1e-3 BOTH_WAYS
passes-next-token                MANY STANDARD UNMASKED lr=2e-3
[small]  gpt2.yaml as it stands, and its controls: steps for 45 minutes on both cores
small-fused       max_steps=2000 lr=5e-4
small-next-token  STANDARD UNMASKED max_steps=1100 lr=5e-4
small-end-to-end  STANDARD max_steps=1100 lr=5e-4
"""


def rows():
    """{group: {row: settings}} of ROWS, in the order in which they are run."""
    groups = {}
    for line in filter(None, ROWS.splitlines()):
        name, _, keys = line.partition(" ")
        if name.startswith("["):
            group = groups.setdefault(name.strip("[]"), {})
            continue
        before, _, values = name.partition("{")
        values, _, after = values.partition("}")
        for value in values.split(","):
            group[before + value + after] = " ".join(written_out(keys.replace("{}", value)))
    return groups


def written_out(keys):
    """A row's keys as the command line has them, a list."""
    words = []
    for word in keys.split():
        if word in SHORT:
            words += written_out(SHORT[word])
        else:
            words.append(word if "." in word.partition("=")[0] else f"training.{word}")
    return words


def seed_of(settings):
    """The seed among a row's keys, 0 where there is none."""
    return int((settings + " training.seed=0").partition("training.seed=")[2].split()[0])


def preset_of(row):
    """The preset that a row changes; None: gpt2.yaml as it stands."""
    return None if row.startswith("small-") else "tiny"


def arguments(row, settings):
    """The arguments of train_gpt2_fusion.py that train a row."""
    preset = ["--preset", preset_of(row)] if preset_of(row) else []
    return [*preset, *settings.split(), f"training.run_id={row}"]


def command_of(row, settings):
    """The command that trains a row. Some need this script: an exercise's change."""
    if patch_of(row):
        return f"python tests/study.py {row}"
    return "python train_gpt2_fusion.py " + shlex.join(arguments(row, settings))


def exercises():
    """{name: patch} of the changes in tests/exercises/."""
    return {path.stem: path for path in sorted((ROOT / "tests" / "exercises").glob("*.patch"))}


def patch_of(row):
    """The name of the exercise whose change a row is trained with; None: the code as it is."""
    return next((name for name in exercises() if f"{row}-".startswith(f"{name}-")), None)


def changed_copy(name, folder):
    """Copy the code into `folder` and apply an exercise's patch. UserError if it does not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in [*ROOT.glob("*.py"), ROOT / "gpt2.yaml", CORPUS, MERGES]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    # Below checkpoints/ git would find our repository and apply the patch to nothing.
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    done = subprocess.run(["git", "apply", exercises()[name].resolve()], cwd=folder, env=alone,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise UserError(f"{exercises()[name]} does not fit the code (is it applied already? git "
                        f"apply -R takes it back): {done.stderr}")


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


def run(row, settings, threads, again):
    """Train and evaluate a row, or go on with it. -> its figures; UserError where it failed."""
    run, code, log = Run(ROOT / "checkpoints" / row), ROOT, ROOT / "checkpoints" / f"{row}.log"
    train = ["train_gpt2_fusion.py", *arguments(row, settings)]
    commands = [train, ["evaluate_gpt2.py", "--run", run.folder]]
    if (run.folder / "eval.json").exists():
        wanted = load_config(preset=preset_of(row), overrides=settings.split()).max_steps
        if not again and sum(stage["steps"] for stage in evaluation(run)["stages"]) != wanted:
            raise UserError(f"{run.folder} is of another length: move it, or train it --again")
        print(f"{row} is finished; " + ("training it anew" if again else "--again trains it anew"))
        train += ["--overwrite"]
        commands = commands if again else []
    elif run.checkpoint.exists():
        train += ["--resume", run.folder]  # with its keys: a run of others is refused
    if patch := patch_of(row):
        code = ROOT / "checkpoints" / f"{row}-code"
        changed_copy(patch, code)
        train += [f"training.folder={run.folder.parent}", f"data.token_folder={ROOT / 'data'}"]
    for command in commands:
        with open(log, "a") as file:
            status = subprocess.run([sys.executable, *command], cwd=code, stdout=file,
                                    stderr=subprocess.STDOUT,
                                    env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
        if status:
            raise UserError(f"{row} failed with status {status}; see {log}")
    return figures(run) | {"threads": threads}


def figures(run):
    """What is kept of a run: its metrics; of each stage seconds, memory, validations, stability.

    largest_rise is that of the logged loss from one line to the next, in nats.
    """
    result, stages = evaluation(run), []
    validations, steps = run.metrics("validation"), run.metrics("step")
    for number, stage in enumerate(result["stages"]):
        seen = [(line["cross_entropy"], line["step"]) for line in validations
                if line["stage"] == number]
        lines = [line for line in steps if line["stage"] == number]
        rises = [after["loss"] - line["loss"] for line, after in zip(lines, lines[1:])]
        stages.append({
            "steps": stage["steps"], "seconds": stage["seconds"], "tokens": stage["tokens"],
            "held_mib": sum(stage[f"{kind}_mib"] for kind in ("weights", "gradients", "optimizer")),
            "peak_mib": stage["peak_mib"],
            "validation": {"best": min(seen)[0], "best_step": min(seen)[1], "last": seen[-1][0]},
            "largest_rise": max([0.0, *rises]),
        })  # fmt: skip
    losses = result["losses"]
    nats, bits = ({name: loss[key] for name, loss in losses.items()}
                  for key in ("nats_per_token", "bits_per_byte"))  # fmt: skip
    exits = [nats[name] for name in nats if name.startswith("left_to_right")]
    return {
        "nelbo_12": nats.get("nelbo_12"), "nelbo": nats.get("nelbo"),
        "left_to_right": exits or None,
        "bits_per_byte": {"nelbo": bits.get("nelbo"), "left_to_right": bits.get(best_exit(nats))},
        "unigram": nats["unigram"], "rows": result["rows"],
        "train_seconds": sum(stage["seconds"] for stage in stages),
        "train_tokens": sum(stage["tokens"] for stage in stages),
        "cross_entropy": {f'{step["mask_fraction"]:g}': step["cross_entropy"]
                          for step in result["time_steps"]},
        "stages": stages,
    }  # fmt: skip


def results_of(row):
    """The file that holds a row's figures."""
    return RESULTS / f"study-{preset_of(row) or 'gpt2-small'}.json"


def measured(*paths):
    """What files of results (none: all) hold: {row: {command, figures}}."""
    every = [path for path in paths or RESULTS.glob("study-*.json") if path.exists()]
    return {row: kept for path in every for row, kept in json.loads(path.read_text()).items()}


def mean(values, digits):
    """The mean as text, with the standard deviation over seeds where there are several."""
    if None in values:
        return "-"
    text = f"{statistics.mean(values):,.{digits}f}"
    return text + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def print_table(group, settings):
    """A Markdown table of a group, {row: settings}; rows that differ in their seed share a line.

    Nats per token; left to right at the best exit; bits per byte by the continuous bound, or left
    to right where there is none. `+-` is the standard deviation over the seeds. The rise (see
    `figures`) is the largest of all stages and seeds; rows measured before it was kept have "-".
    """
    done, lines, table = measured(), {}, []
    for row in (row for row in settings if row in done):
        line = row.rpartition("-")[0] if "seed=" in settings[row] else row
        lines.setdefault(line, []).append(row)
    for line, same in lines.items():
        masked = "time_step_masking=false" not in settings[same[0]]
        runs = [done[row] for row in same]
        stages = [*zip(*(run["stages"] for run in runs))]  # of each stage, that of every run
        bits = [run["bits_per_byte"]["nelbo" if masked else "left_to_right"] for run in runs]
        exits = [min(run["left_to_right"] or [], default=None) for run in runs]
        seconds, tokens = ([run[f"train_{key}"] for run in runs] for key in ("seconds", "tokens"))
        bounds = ([run[key] if masked else None for run in runs] for key in ("nelbo_12", "nelbo"))
        held, peak = (" / ".join(f"{statistics.mean(run[key] for run in stage):.0f}"
                                 for stage in stages) for key in ("held_mib", "peak_mib"))
        rise = max((run["largest_rise"] for stage in stages for run in stage
                    if "largest_rise" in run), default=None)  # fmt: skip
        steps = sum(stage["steps"] for stage in runs[0]["stages"])
        cells = (line, str(steps), mean(seconds, 0),
                 mean([n / s for n, s in zip(tokens, seconds)], 0), *(mean(b, 3) for b in bounds),
                 mean(exits, 3), f"{statistics.mean(bits):.3f}", held, peak, cell(rise, ".3f"))
        table.append(f"| {' | '.join(cells)} |")
    if table:
        print(f"\n{group}\n\n| run | steps | seconds | tokens/s | NELBO_12 | NELBO | "
              "left to right | bits/byte | MiB held, by stage | MiB at the peak | largest rise |\n"
              f"|{'---|' * 11}", *table, sep="\n")


def train(todo, jobs, again):
    """Train and evaluate {row: settings}, and keep the figures of each as they come."""
    (ROOT / "checkpoints").mkdir(exist_ok=True)
    if any(".jsonl" in settings for settings in todo.values()):
        older_and_newer()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ThreadPoolExecutor(jobs)
    try:
        results = pool.map(lambda row: run(row, todo[row], threads, again), todo)
        for row, result in zip(todo, results):
            path = results_of(row)
            kept = {"command": command_of(row, todo[row])} | result
            write_json(path, measured(path) | {row: kept})
            print(f'{row}: {result["train_seconds"]:.0f} s', flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # a run under way saves itself on Ctrl-C


@one_line_errors
def main(argv):
    parser = Parser(description="The claims, measured.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows or groups")
    parser.add_argument("--list", action="store_true", help="print the command of each row")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument("--again", action="store_true", help="also what is finished already")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    args = parser.parse_args(argv)
    groups = rows()
    every = {row: settings for group in groups.values() for row, settings in group.items()}
    for name in args.rows:
        if name not in every and name not in groups:
            raise UserError(f"no row {name!r}; --list names them all")
    chosen = [row for group, names in groups.items() for row in names
              if not args.rows or row in args.rows or group in args.rows]
    if args.list:
        print(*(command_of(row, every[row]) for row in chosen), sep="\n")
        return
    if not args.table:
        todo = [row for row in chosen if args.rows or row not in measured()]
        todo.sort(key=lambda row: seed_of(every[row]))  # rows take turns: first all of one seed
        train({row: every[row] for row in todo}, args.jobs, args.again)
    for group, names in groups.items():
        print_table(group, {row: names[row] for row in names if row in chosen})


if __name__ == "__main__":
    sys.exit(main())
