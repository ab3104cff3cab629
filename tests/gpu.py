"""Everything on a GPU, in order of worth: is it right, does it wait, how fast is it.

    python tests/gpu.py                 on a GPU, 16 minutes at most; figures go to gpu.json
    python tests/gpu.py --toy           the same on a CPU at toy sizes, to see that it runs
    python tests/gpu.py right waits     these parts only

right   golden logits, codes and dequantized weights beside the CPU's; every kind of run, stopped
        once and resumed; one checkpoint evaluated on both; every order of sampling
waits   no training step makes the CPU wait for the GPU (CUDA's own check, an error where one does)
tiny    the tiny preset, trained and evaluated: seconds
speed   steps of GPT-2 Small, each in a process of its own (tests/benchmark.py), beside Hugging
        Face's where `transformers` and `peft` are installed
small   GPT-2 Small as gpt2.yaml has it, trained and evaluated

Each part is a process with a time limit (speed may reach it); what it found is kept at once, and a
table printed last.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate_gpt2
import quant
import train_gpt2_fusion as train
from data_loader import Parser, Run, one_line_errors, write_json
from model import GPT, pick_device

GOLDEN = ROOT / "tests" / "gpt2_golden"
LIMITS = {"right": 180, "waits": 60, "tiny": 120, "speed": 300, "small": 300}  # seconds
TOY_RUN = ["--preset", "tiny", "model.d_model=64", "model.n_heads=2", "model.seq_len=32",
           "training.max_steps=12", "training.block_steps=[1,1,1]", "training.log_interval=2",
           "training.eval_rows=4", "training.checkpoint_interval=2",
           "training.checkpoint_seconds=0", "training.compile=false"]  # fmt: skip
KINDS = {
    "int4, adapters, dropout": ["quantization_type=int4", "dropout=0.1", "qlora_dropout=0.1"],
    "bidirectional, nf4": ["attention_mode=bidirectional", "quantization_type=nf4"],
    "standard": ["mode=standard"],
    "next-token": ["mode=standard", "time_step_masking=false"],
    "trainable": ["fusion_mode=trainable", "gradient_accumulation=2"],
    "products in fp16": ["compute_type=fp16"],
    "products in fp32": ["compute_type=fp32"],
    "compiled, int4": ["compile=true", "quantization_type=int4"],
}
SIZES = {"64 x 256": ["training.batch_size=64"], "8 x 256": [],
         "16 x 1024": ["training.batch_size=16", "model.seq_len=1024"]}  # fmt: skip
STEPS = ("stage 0", "stage 1", "stage 2", "standard", "standard, next-token")
THEIRS = ("transformers", "transformers + peft")
COMPILED = {"eager": "training.compile=false", "compiled": "training.compile=true"}


def kinds(toy):
    """KINDS; of a toy without the compiled one, as a CPU takes a minute to build its kernels."""
    return {name: changes for name, changes in KINDS.items() if not (toy and "compiled" in name)}


def arguments(folder, name, changes, device):
    """What trains a toy run."""
    return [*TOY_RUN, f"training.folder={folder}", f"training.run_id={name}",
            f"training.device={device}", *changes]  # fmt: skip


def right(device, toy):
    """Yield (what, figure); a part fails by an exception."""
    idx = torch.arange(24).view(2, 12)
    model = GPT.from_pretrained(GOLDEN)
    expected = model(idx).detach()
    logits = model.to(device)(idx.to(device)).detach().cpu()
    real = expected.isfinite()
    error = (logits[real] - expected[real]).abs().max().item()
    assert error < 1e-4, error
    yield "golden logits, largest difference", error
    linear = torch.nn.Linear(200, 96)
    for kind in quant.KINDS:
        here, there = (quant.QuantLinear(linear.to(where), kind) for where in ("cpu", device))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(here.dequantize(dtype), there.dequantize(dtype).cpu()), kind
        assert all(map(torch.equal, here.buffers(), there.cpu().buffers())), kind
    yield "codes and weights of every storage", "the CPU's bits"
    with tempfile.TemporaryDirectory() as folder:
        real_step = train.train_step
        for name, changes in kinds(toy).items():
            left = iter([False] * 6 + [True])  # Ctrl-C in the seventh step

            def step(*args):
                if next(left, False):
                    raise KeyboardInterrupt
                return real_step(*args)

            run = Run(Path(folder) / name)
            train.train_step = step
            assert train.main(arguments(folder, name, changes, device)) == 130
            train.train_step = real_step
            assert train.main(["--resume", str(run.folder)]) == 0
            nats = {}
            for where in ("cpu", device):
                assert evaluate_gpt2.main(["--run", str(run.folder), "--device", str(where)]) == 0
                losses = json.loads((run.folder / "eval.json").read_text())["losses"]
                nats[str(where)] = losses[next(iter(losses))]["nats_per_token"]
            assert abs(nats["cpu"] - nats[str(device)]) < 0.005, nats
            yield name, nats
        for order in ("ancestral", "confidence", "left-to-right"):
            sample = ["sample", "The", "--run", f"{folder}/standard", "--order", order]
            assert evaluate_gpt2.main([*sample, "--length", "8", "--device", str(device)]) == 0
        yield "orders of sampling", "all"


def waits(device, toy):
    """Yield each kind whose training steps run without one wait."""
    real_step, before = train.train_step, []

    def step(loss_of, optimizer, *args):
        # The first step of a stage may copy a table, once.
        checks = device.type == "cuda" and before[-1:] == [optimizer]
        before.append(optimizer)
        if checks:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return real_step(loss_of, optimizer, *args)
        finally:
            if checks:
                torch.cuda.set_sync_debug_mode("default")

    train.train_step = step
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in kinds(toy).items():
            assert train.main(arguments(folder, name, changes, device)) == 0
            yield name, "none" if device.type == "cuda" else "not checked: no GPU"


def whole(preset, device, toy):
    """Train and evaluate a preset (None: GPT-2 Small)."""
    with tempfile.TemporaryDirectory() as folder:
        changes = TOY_RUN[2:] if toy else []
        start = time.perf_counter()
        assert train.main([*(["--preset", preset or "tiny"] if preset or toy else []), *changes,
                           f"training.device={device}", f"training.folder={folder}"]) == 0
        yield "training, s", time.perf_counter() - start
        (run,) = Path(folder).iterdir()
        assert evaluate_gpt2.main(["--run", str(run), "--device", str(device)]) == 0
        yield "with evaluation, s", time.perf_counter() - start
        losses = json.loads((run / "eval.json").read_text())["losses"]
        yield "nats", {name: round(loss["nats_per_token"], 4) for name, loss in losses.items()}
        yield "peak, MiB", max(stage["peak_mib"] or 0 for stage in Run(run).metrics("stage"))


def speed(device, toy):
    """Yield tokens/s, share of the products' rate, MiB at the peak of every step at every size."""
    import benchmark

    there = all(map(importlib.util.find_spec, ("transformers", "peft")))
    names, sizes, how = [*STEPS, *(THEIRS if there else ())], SIZES, []
    if toy:  # kernels of a CPU take long to build: one size, and those of one kind of step
        sizes, how = {"8 x 32": []}, ["--preset", "tiny", "model.seq_len=32"]
    for size, changes in sizes.items():
        for name, mode in itertools.product(names, COMPILED):
            if toy and mode == "compiled" and name != "stage 2":
                continue
            what = f"{size}, {name}, {mode}"
            command = [sys.executable, benchmark.__file__, "--block", name, "--steps",
                       "2" if toy else "10", *how, *changes, COMPILED[mode],
                       f"training.device={device}"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                yield what, (done.stderr.strip() or "failed").splitlines()[-1][-200:]
                continue
            row = benchmark.summary([json.loads(done.stdout)])
            kept = ("tokens_per_second", "share_of_limit", "held_mib", "peak_mib")
            yield what, {key: row[key] for key in kept if key in row}


PARTS = {
    "right": right, "waits": waits, "speed": speed,
    "tiny": lambda device, toy: whole("tiny", device, toy),
    "small": lambda device, toy: whole(None, device, toy),
}  # fmt: skip


@one_line_errors
def main(argv):
    parser = Parser(description="Everything on a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all of them")
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--to", default="gpu.json", metavar="PATH")
    parser.add_argument("--part", choices=PARTS, help="run this one here, for the script itself")
    args = parser.parse_args(argv)
    device = pick_device("cpu" if args.toy else "cuda")
    path = Path(args.to).resolve()
    found = json.loads(path.read_text()) if path.exists() else {}
    if args.part:
        if args.toy or args.part == "right":
            evaluate_gpt2.ROWS = 8
        for what, figure in PARTS[args.part](device, args.toy):
            found.setdefault(args.part, {})[what] = figure
            write_json(path, found)
        return 0
    name = "a CPU, toy sizes" if args.toy else torch.cuda.get_device_name()
    write_json(path, {"device": name, "torch": torch.__version__})
    failed = 0
    for part, limit in LIMITS.items():
        if args.parts and part not in args.parts:
            continue
        command = [sys.executable, __file__, "--part", part, "--to", path]
        command += ["--toy"] if args.toy else []
        log = path.with_name(f"gpu-{part}.log")
        with open(log, "w") as file:
            start = time.perf_counter()
            try:
                status = subprocess.run(command, stdout=file, stderr=file, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                status = f"more than {limit} s"
        failed += bool(status)
        print(f"{part}: {f'FAILED ({status}), see {log}' if status else 'ok'}, "
              f"{time.perf_counter() - start:.0f} s", flush=True)
    for part, figures in json.loads(path.read_text()).items():
        for what, figure in figures.items() if isinstance(figures, dict) else ():
            print(f"{part:6s}  {what:40s}  {figure}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
