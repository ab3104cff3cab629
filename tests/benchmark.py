"""Speed and memory of training steps, every kind of step measured in the same way.

    python tests/benchmark.py                     GPT-2 Small: about half an hour on 2 cores
    python tests/benchmark.py --growth            how cost grows: rows, length, layers, rank
    python tests/benchmark.py --preset tiny --steps 9

Where `transformers` and `peft` are installed, their GPT-2 takes steps too, on the same number of
tokens, with the same autocast and fused AdamW: `pip install transformers peft`.

Every kind of step runs in a process of its own with nothing else in memory: a block of steps one
after another, as in training, of which the first does not count. Blocks take turns (A B C A B C
...), so that a machine which gets slower or faster treats all kinds alike. Figures are medians over
the counted steps of all blocks, with their quartiles; the peak is the largest of any block.

What is freed: glibc gives large tensors back to the kernel and gets them anew, page by page, at
the next step. Our training asks it not to (`keep_freed_memory`), Hugging Face's users do not. So
there are rows of either side with the other's setting.
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
from data_loader import UserError, load_config, one_line_errors, write_json
from evaluate_gpt2 import keep_freed_memory, memory, memory_mib, pick_device, print_table
from model import GPT, compute_type

# name -> (stage, settings that differ from gpt2.yaml)
NEXT_TOKEN = ["training.mode=standard", "training.time_step_masking=false"]
VARIANTS = {
    "stage 0": (0, []),
    "stage 1": (1, []),
    "stage 2": (2, []),
    "stage 1, no adapters": (1, ["training.qlora_enabled=false"]),
    "stage 2, no adapters": (2, ["training.qlora_enabled=false"]),
    "stage 2, stored in fp32": (2, ["training.quantization_type=fp32"]),
    "stage 2, stored in int4": (2, ["training.quantization_type=int4"]),
    "stage 2, stored in nf4": (2, ["training.quantization_type=nf4"]),
    "stage 1, nothing recomputed": (1, ["training.gradient_checkpointing=none"]),
    "stage 2, nothing recomputed": (2, ["training.gradient_checkpointing=none"]),
    "stage 2, all recomputed": (2, ["training.gradient_checkpointing=all"]),
    "standard": (0, ["training.mode=standard"]),
    "standard, next-token": (0, NEXT_TOKEN),
    "stage 0, freed memory returned": (0, []),
    "stage 2, freed memory returned": (2, []),
    "standard, next-token, freed memory returned": (0, NEXT_TOKEN),
}
# Stage 2 at 4 x 256, 12 layers, rank 8, and with one of these changed.
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
REFERENCES = {
    "transformers": ["transformers"],
    "transformers + peft": ["transformers", "peft"],
    "transformers, freed memory kept": ["transformers"],
    "transformers + peft, freed memory kept": ["transformers", "peft"],
}


class Variant:
    """A model in the middle of a stage, ready to take steps on made-up tokens."""

    def __init__(self, name, args):
        if not name.endswith("returned"):
            keep_freed_memory()
        index, settings = (VARIANTS | GROWTH)[name]
        self.config, self.training = configuration(args, settings)
        stages = train.fusion_schedule(self.config, self.training)
        self.stage = stages[index]
        self.device = pick_device(self.training.device)
        self.dtype = compute_type(self.device, self.training.compute_type)
        self.tokens = made_up_tokens(self.config)
        self.model = GPT(self.config, blocks=0).to(self.device)
        for stage in stages[:index]:  # as if the stages before had run
            train.grow(self.model, self.training)
            train.begin_stage(self.model, stage, self.training)
            quant.freeze_block(self.model, stage.block, self.training.quantization_type)
        train.grow(self.model, self.training)
        self.optimizer = train.begin_stage(self.model, self.stage, self.training)
        self.loss_of = train.stage_loss(self.model, self.stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.taken = 0
        self.flops_per_token = train.matmul_flops(self.stage, self.config)
        if not name.endswith("returned"):
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
        """MiB of weights, gradients and optimizer state."""
        return memory(self.model, self.optimizer)["total"]


class Reference:
    """GPT2LMHeadModel of the same size, trained on next tokens as its users do: everything, or
    with peft LoRA matrices on every linear; autocast, fused AdamW (its Trainer's default)."""

    flops_per_token = None  # the share of the limit is not computed for others' code

    def __init__(self, name, args):
        import transformers

        if name.endswith("kept"):
            keep_freed_memory()
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
        self.taken = 0
        if name.endswith("kept"):
            keep_freed_memory(return_now=True)

    def step(self):
        """Take a training step. -> seconds"""
        start = time.perf_counter()
        rows = self.training.batch_size
        first = self.taken * rows % (len(self.tokens) - rows)
        idx = self.tokens[first : first + rows].to(self.device)
        with torch.autocast(self.device.type, self.dtype):
            loss = self.model(input_ids=idx, labels=idx).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.training.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        norm.item()
        self.taken += 1
        return time.perf_counter() - start

    def held(self):
        """MiB of weights, gradients and optimizer state."""
        states = [t for s in self.optimizer.state.values() for t in s.values()]
        return sum(t.nbytes for t in [*self.model.parameters(), *self.trained, *states]) / 2**20


def configuration(args, settings):
    """(ModelConfig, TrainingConfig) of gpt2.yaml with a variant's settings."""
    config = load_config(preset=args.preset, overrides=args.overrides + settings)
    return config.model, config.training


def made_up_tokens(config):
    return np.random.default_rng(0).integers(config.vocab_size, size=400 * config.seq_len)


def take_block(name, args):
    """What one process does: a block of steps. -> its figures

    The machine's own matrix-product rate is measured when the steps and their peak are done.
    """
    variant = (Reference if name in REFERENCES else Variant)(name, args)
    memory_mib(variant.device, reset=True)
    seconds = [variant.step() for _ in range(args.steps + 1)]
    figures = {
        "seconds": seconds[1:],  # the first step also allocates and prepares kernels
        "tokens": variant.training.batch_size * variant.config.seq_len,
        "held_mib": variant.held(),
        "peak_mib": memory_mib(variant.device)[1],
    }
    if variant.flops_per_token and variant.device.type == "cpu":  # where matmul_rate measures
        rates = [train.matmul_rate(variant.config, variant.dtype) for _ in range(5)]
        figures["flops_per_token"] = variant.flops_per_token
        figures["flops_per_second"] = rates
    return figures


def block_in_a_process(name, args):
    """`take_block` in a fresh process, alone on the machine. UserError: it failed, and said why."""
    command = [sys.executable, __file__, "--block", name, "--steps", str(args.steps)]
    command += ["--preset", args.preset] if args.preset else []
    done = subprocess.run([*command, *args.overrides], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name}: its process ended with status {done.returncode}")
    return json.loads(done.stdout)


def summary(blocks):
    """The figures of all blocks of one kind of step."""
    seconds = [value for block in blocks for value in block["seconds"]]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    tokens = blocks[0]["tokens"]
    row = {
        "seconds_per_step": median,
        "quartiles": [low, high],
        "tokens_per_second": tokens / median,
        "held_mib": blocks[0]["held_mib"],
        "peak_mib": max(block["peak_mib"] for block in blocks),
        "all_seconds": [block["seconds"] for block in blocks],
    }
    if "flops_per_token" in blocks[0]:
        rate = statistics.median(rate for block in blocks for rate in block["flops_per_second"])
        row["share_of_limit"] = tokens * blocks[0]["flops_per_token"] / median / rate
    return row


def print_mix(table, shares):
    """One step of a whole fused run on average, beside every other kind of step."""
    stages = [f"stage {k}" for k in range(len(shares))]
    if not all(stage in table for stage in stages):
        return
    for suffix in ("", ", no adapters"):
        rows = [table.get(stage + suffix, table[stage]) for stage in stages]
        mix = sum(share * row["seconds_per_step"] for share, row in zip(shares, rows)) / sum(shares)
        print(f"\na step of the {':'.join(f'{s:g}' for s in shares)} mix of the stages{suffix}: "
              f"{mix:.2f} s; times as long:")
        for name, row in table.items():
            if not name.startswith("stage"):
                print(f"  {name:43s}  {row['seconds_per_step'] / mix:.2f}")


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed and memory of training steps.")
    parser.add_argument("--preset")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a block")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each kind of step")
    parser.add_argument("--growth", action="store_true", help="how cost grows instead")
    names = [*VARIANTS, *GROWTH, *REFERENCES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--block", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.block:
        print(json.dumps(take_block(args.block, args)))
        return 0

    installed = [name for name, packages in REFERENCES.items()
                 if all(map(importlib.util.find_spec, packages))]
    chosen = args.only or ([*GROWTH] if args.growth else [*VARIANTS, *installed])
    blocks = {name: [] for name in chosen}
    for number in range(args.rounds):
        for name in chosen:
            blocks[name].append(block_in_a_process(name, args))
            median = statistics.median(blocks[name][-1]["seconds"])
            print(f"round {number + 1}  {name:43s}  {median:.3f} s", file=sys.stderr, flush=True)
    table = {name: summary(blocks[name]) for name in chosen}
    print(f"{torch.get_num_threads()} threads, medians of {args.rounds} x {args.steps} steps\n")
    print_table({"step": "", "seconds_per_step": ".3f", "quartiles": ".2f",
                 "tokens_per_second": ",.0f", "share_of_limit": ".2f", "held_mib": ".0f",
                 "peak_mib": ".0f"}, [{"step": name, **row} for name, row in table.items()])
    print_mix(table, configuration(args, [])[1].block_steps)
    if args.json:
        write_json(args.json, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
