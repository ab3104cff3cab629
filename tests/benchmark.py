"""Speed and memory of training steps, every variant side by side in one run.

    python tests/benchmark.py                     GPT-2 Small: about 8 minutes on 2 cores
    python tests/benchmark.py --growth            how cost grows: rows, length, layers, rank
    python tests/benchmark.py --preset tiny --steps 9

Where `transformers` and `peft` are installed, their GPT-2 takes steps beside ours, on the same
number of tokens and with fused AdamW too: `pip install transformers peft`.

Speed: all variants take turns, so that a noisy machine treats them alike; the figures are medians.
The references live in processes of their own, where memory is allocated as they are used to.
Memory: each variant runs alone in a process of its own.
"""

import argparse
import importlib.util
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
from evaluate_gpt2 import MIB, keep_freed_memory, memory, memory_mib, pick_device
from model import GPT, ModelConfig, compute_type

# name -> (stage, settings that differ from gpt2.yaml)
VARIANTS = {
    "stage 1": (0, []),
    "stage 2": (1, []),
    "stage 3": (2, []),
    "stage 2, no adapters": (1, ["training.qlora_enabled=false"]),
    "stage 3, no adapters": (2, ["training.qlora_enabled=false"]),
    "stage 3, stored in fp32": (2, ["training.quantization_type=fp32"]),
    "stage 3, stored in int4": (2, ["training.quantization_type=int4"]),
    "stage 3, stored in nf4": (2, ["training.quantization_type=nf4"]),
    "stage 3, gradient_checkpointing": (2, ["training.gradient_checkpointing=true"]),
    "standard": (0, ["training.mode=standard"]),
    "standard, next-token": (0, ["training.mode=standard", "training.time_step_masking=false"]),
}
# Stage 3 at 4 x 256, 12 layers, rank 8, and with one of these changed.
HALF = ["training.batch_size=4"]
GROWTH = {
    "4 x 256, 12 layers, rank 8": (2, HALF),
    "batch 8": (2, ["training.batch_size=8"]),
    "batch 16": (2, ["training.batch_size=16"]),
    "length 128": (2, [*HALF, "model.seq_len=128"]),
    "length 512": (2, [*HALF, "model.seq_len=512"]),
    "length 1024": (2, [*HALF, "model.seq_len=1024"]),
    "layers 6": (2, [*HALF, "model.n_layers=6", "training.block_size=2"]),
    "layers 24": (2, [*HALF, "model.n_layers=24", "training.block_size=8"]),
    "rank 2": (2, [*HALF, "training.qlora_rank=2"]),
    "rank 32": (2, [*HALF, "training.qlora_rank=32"]),
}
REFERENCES = {"transformers": ["transformers"], "transformers + peft": ["transformers", "peft"]}


class Variant:
    """A model in the middle of a stage, ready to take steps on made-up tokens."""

    def __init__(self, name, args):
        keep_freed_memory()
        index, settings = (VARIANTS | GROWTH)[name]
        self.config, self.training = configuration(args, settings)
        if self.training.mode == "standard":
            self.config = train.standard_config(self.config)
        stages = train.fusion_schedule(self.config, self.training)
        self.stage = stages[index]
        self.device = pick_device(self.training.device)
        self.dtype = compute_type(self.device, self.training.compute_type)
        self.tokens = made_up_tokens(self.config)
        self.model = GPT(self.config, blocks=0).to(self.device)
        for stage in stages[:index]:  # as if the stages before had run
            train.begin_stage(self.model, stage, self.training)
            quant.freeze_block(self.model, stage.block, self.training.quantization_type)
        self.optimizer = train.begin_stage(self.model, self.stage, self.training)
        self.loss_of = train.stage_loss(self.model, self.stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.taken = 0
        keep_freed_memory(return_now=True)

    def step(self):
        """Take a training step. -> seconds"""
        start = time.perf_counter()
        batch = train.batch_of(self.tokens, self.config, self.training, self.stage, self.taken)
        _, norm = train.train_step(self.loss_of, self.optimizer, self.scaler, batch,
                                   self.training, self.device, self.dtype)
        norm.item()  # on a GPU: wait for the step to end
        self.taken += 1
        return time.perf_counter() - start

    def held(self):
        """Bytes of weights, gradients and optimizer state."""
        return memory(self.model, self.optimizer)["total"]


class Reference:
    """GPT2LMHeadModel of the same size, trained on next tokens as its users do: everything, or
    with peft LoRA matrices on every linear; autocast, fused AdamW (its Trainer's default)."""

    def __init__(self, name, args):
        import transformers

        self.config, self.training = configuration(args, [])
        c, self.device = self.config, pick_device(self.training.device)
        self.dtype = compute_type(self.device, self.training.compute_type)
        torch.manual_seed(0)
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.seq_len, n_embd=c.d_model, n_layer=c.n_layers,
            n_head=c.n_heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        ))  # fmt: skip
        if "peft" in name:
            import peft

            self.model = peft.get_peft_model(self.model, peft.LoraConfig(
                r=self.training.qlora_rank, lora_alpha=self.training.qlora_alpha,
                target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
            ))  # fmt: skip
        self.model.to(self.device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.training.lr, fused=True)
        self.tokens = torch.from_numpy(made_up_tokens(c)).view(-1, c.seq_len)

    def step(self):
        """Take a training step. -> seconds"""
        start = time.perf_counter()
        idx = self.tokens[: self.training.batch_size].to(self.device)
        with torch.autocast(self.device.type, self.dtype):
            loss = self.model(input_ids=idx, labels=idx).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        norm.item()
        return time.perf_counter() - start

    def held(self):
        """Bytes of weights, gradients and optimizer state."""
        states = [t for s in self.optimizer.state.values() for t in s.values()]
        return sum(t.nbytes for t in [*self.model.parameters(), *self.trained, *states])


def configuration(args, settings):
    """(ModelConfig, TrainingConfig) of gpt2.yaml with a variant's settings."""
    sections = {"model": ModelConfig, "training": train.TrainingConfig, "data": DataConfig}
    config = load_config(ROOT / "gpt2.yaml", sections, args.preset, args.overrides + settings)
    return config["model"], config["training"]


def made_up_tokens(config):
    return np.random.default_rng(0).integers(config.vocab_size, size=400 * config.seq_len)


def build(name, args):
    return (Reference if name in REFERENCES else Variant)(name, args)


def child(name, args, task):
    """This script in another process, with one variant, doing `task`."""
    command = [sys.executable, __file__, f"--{task}", name, *args.overrides]
    command += ["--preset", args.preset] if args.preset else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def step_in(process):
    """Have the process of a reference take a step. -> seconds"""
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed and memory of training steps.")
    parser.add_argument("--preset")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--growth", action="store_true", help="how cost grows instead")
    names = [*VARIANTS, *GROWTH, *REFERENCES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--memory-of", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--steps-of", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.memory_of:
        variant = build(args.memory_of, args)
        memory_mib(variant.device, reset=True)
        for _ in range(3):
            variant.step()
        peak = memory_mib(variant.device)[1]
        print(json.dumps({"held_mib": variant.held() / MIB, "peak_mib": peak}))
        return 0
    if args.steps_of:
        variant = build(args.steps_of, args)
        for _ in sys.stdin:
            print(variant.step(), flush=True)
        return 0

    installed = [name for name, packages in REFERENCES.items()
                 if all(map(importlib.util.find_spec, packages))]
    chosen = args.only or ([*GROWTH] if args.growth else [*VARIANTS, *installed])
    table = {}
    for name in chosen:
        process = child(name, args, "memory-of")
        text, _ = process.communicate()
        if process.returncode:
            return process.returncode  # it has said why
        table[name] = json.loads(text)
    ours = {name: build(name, args) for name in chosen if name not in REFERENCES}
    others = {name: child(name, args, "steps-of") for name in chosen if name in REFERENCES}
    times, rates = {name: [] for name in chosen}, {name: [] for name in ours}
    for _ in range(args.steps + 1):
        for name in chosen:
            if name in others:
                times[name].append(step_in(others[name]))
                continue
            variant = ours[name]
            rates[name].append(train.matmul_rate(variant.config, variant.dtype))
            times[name].append(variant.step())
    for process in others.values():
        process.communicate()
    print(f"{torch.get_num_threads()} threads, medians of {args.steps} steps taken in turns\n")
    print("variant                           s/step  tokens/s  of limit  held MiB  peak MiB")
    model_config, training = configuration(args, [])
    for name, row in table.items():
        variant = ours.get(name)
        config = variant.config if variant else model_config
        rows = variant.training.batch_size if variant else training.batch_size
        seconds, tokens = statistics.median(times[name][1:]), rows * config.seq_len
        row |= {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds}
        limit = ""
        if variant and variant.device.type == "cpu":  # where matmul_rate measures
            flops = tokens * train.matmul_flops(variant.stage, config)
            row["share_of_limit"] = flops / seconds / statistics.median(rates[name][1:])
            limit = f"{row['share_of_limit']:.2f}"
        print(f"{name:32s}  {seconds:6.3f}  {tokens / seconds:8,.0f}  {limit:>8s}"
              f"  {row['held_mib']:8.0f}  {row['peak_mib']:8.0f}")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
