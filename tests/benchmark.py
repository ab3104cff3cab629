"""Speed and memory of training steps, every variant side by side in one run.

    python tests/benchmark.py                     GPT-2 Small: about 6 minutes on 2 cores
    python tests/benchmark.py --preset tiny --steps 9

Speed: all variants live in one process and take turns, so that a noisy machine treats them alike;
the figures are medians. Memory: each variant runs alone in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import quant
import train_gpt2_fusion as train
from data_loader import DataConfig, load_config, one_line_errors
from evaluate_gpt2 import MIB, memory, memory_mib, pick_device
from model import GPT, ModelConfig, compute_type

# name -> (stage, settings that differ from gpt2.yaml)
VARIANTS = {
    "stage 1": (0, []),
    "stage 2": (1, []),
    "stage 3": (2, []),
    "stage 3, stored in fp32": (2, ["training.quantization_type=fp32"]),
    "stage 3, stored in int4": (2, ["training.quantization_type=int4"]),
    "stage 3, stored in nf4": (2, ["training.quantization_type=nf4"]),
    "stage 3, no adapters": (2, ["training.qlora_enabled=false"]),
    "stage 3, gradient_checkpointing": (2, ["training.gradient_checkpointing=true"]),
    "standard": (0, ["training.mode=standard"]),
    "standard, next-token": (0, ["training.mode=standard", "training.time_step_masking=false"]),
}


class Variant:
    """A model in the middle of a stage, ready to take steps on made-up tokens."""

    def __init__(self, name, args):
        index, settings = VARIANTS[name]
        sections = {"model": ModelConfig, "training": train.TrainingConfig, "data": DataConfig}
        config = load_config(ROOT / "gpt2.yaml", sections, args.preset, args.overrides + settings)
        self.config, self.training = config["model"], config["training"]
        if self.training.mode == "standard":
            self.config = train.standard_config(self.config)
        stages = train.fusion_schedule(self.config, self.training)
        self.stage = stages[index]
        self.device = pick_device(self.training.device)
        self.dtype = compute_type(self.device, self.training.compute_type)
        self.tokens = np.random.default_rng(0).integers(
            self.config.vocab_size, size=400 * self.config.seq_len
        )
        self.model = GPT(self.config, blocks=0).to(self.device)
        for stage in stages[:index]:  # as if the stages before had run
            train.begin_stage(self.model, stage, self.training)
            quant.freeze_block(self.model, stage.block, self.training.quantization_type)
        self.optimizer = train.begin_stage(self.model, self.stage, self.training)
        self.loss_of = train.stage_loss(self.model, self.stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.taken = 0

    def step(self):
        """Take a training step. -> seconds"""
        start = time.perf_counter()
        batch = train.batch_of(self.tokens, self.config, self.training, self.stage, self.taken)
        _, norm = train.train_step(self.loss_of, self.optimizer, self.scaler, batch,
                                   self.training, self.device, self.dtype)
        norm.item()  # on a GPU: wait for the step to end
        self.taken += 1
        return time.perf_counter() - start

    def memory(self):
        """Take three steps. -> bytes held and the peak, in MiB."""
        memory_mib(self.device, reset=True)
        for _ in range(3):
            self.step()
        held = memory(self.model, self.optimizer)
        return {"held_mib": held["total"] / MIB, "peak_mib": memory_mib(self.device)[1]}


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed and memory of training steps.")
    parser.add_argument("--preset")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.memory_of:
        print(json.dumps(Variant(args.memory_of, args).memory()))
        return 0
    table = {}
    for name in args.only:
        command = [sys.executable, __file__, "--memory-of", name, *args.overrides]
        command += ["--preset", args.preset] if args.preset else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        table[name] = json.loads(done.stdout)
    variants = {name: Variant(name, args) for name in args.only}
    times = {name: [] for name in variants}
    for turn in range(args.steps + 1):
        for name, variant in variants.items():
            times[name].append(variant.step())
    print(f"{torch.get_num_threads()} threads, medians of {args.steps} steps taken in turns\n")
    print("variant                           s/step  tokens/s  of limit  held MiB  peak MiB")
    for name, variant in variants.items():
        seconds = statistics.median(times[name][1:])
        tokens = variant.training.batch_size * variant.config.seq_len
        row = table[name]
        row |= {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
        flops = tokens * train.matmul_flops(variant.stage, variant.config)
        row["share_of_limit"] = flops / seconds / train.matmul_rate(variant.config, variant.dtype)
        print(f"{name:32s}  {seconds:6.3f}  {tokens / seconds:8,.0f}  {row['share_of_limit']:8.2f}"
              f"  {row['held_mib']:8.0f}  {row['peak_mib']:8.0f}")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
