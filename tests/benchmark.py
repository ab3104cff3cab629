"""Speed and memory of training steps, every kind of step measured in the same way.

    python tests/benchmark.py --steps 3           GPT-2 Small: about half an hour on 2 cores
    python tests/benchmark.py --preset tiny --steps 9

Where `transformers` and `peft` are installed, their GPT-2 takes steps too, on the same number of
tokens, with the same autocast and fused AdamW: `pip install transformers peft`. What is compiled
needs a C++ compiler on a CPU.

Every kind of step runs in a process of its own with nothing else in memory: a block of steps one
after another, as in training, of which the first does not count. Blocks take turns (A B C A B C
...), so that a machine which gets slower or faster treats all kinds alike. Figures are medians over
the counted steps of all blocks, with their quartiles; the peak is the largest of any block.

Our training asks glibc to keep freed memory (`keep_freed_memory`), Hugging Face's users do not, so
there are rows of theirs with our setting.
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
from data_loader import Parser, UserError, load_config, one_line_errors, write_json
from model import GPT, compute_type, pick_device

# name -> (stage, settings that differ from gpt2.yaml)
NEXT_TOKEN = ["mode=standard", "time_step_masking=false"]
VARIANTS = {
    **{f"stage {k}": (k, []) for k in (0, 1, 2)},
    **{f"stage {k}, compiled": (k, ["compile=true"]) for k in (0, 2)},
    **{f"stage {k}, no adapters": (k, ["qlora_enabled=false"]) for k in (1, 2)},
    "stage 2, stored in int4": (2, ["quantization_type=int4"]),
    "standard": (0, ["mode=standard"]),
    "standard, next-token": (0, NEXT_TOKEN),
    **{f"{name}, moments in fp32": (0, [*settings, "moments=fp32"])
       for name, settings in (("stage 0", []), ("standard", ["mode=standard"]))},
}  # fmt: skip
REFERENCES = ("transformers", "transformers + peft", "transformers, freed memory kept",
              "transformers + peft, freed memory kept")  # fmt: skip


def matmul_flops(stage, config):
    """Matrix-product FLOPs that one token of a stage needs, forward and backward.

    A weight: 2 forward, 2 for the gradient of its input, 2 for its own; frozen it needs no gradient
    of its own, so 4, and without adapters no backward pass, so 2. The attention's two products,
    counted whole, have no weight among their factors: 2 forward, 4 where there is a backward pass.
    The head scores every position, as in a causal model. The adapters (about 1 %) do not count.
    """
    d, trained = config.d_model, len(stage.trained)
    weights, attention = 12 * d * d, 2 * d * config.seq_len  # of a layer
    frozen = (stage.block + 1) * config.block_size - trained
    per_token = 6 * trained * (weights + attention)
    per_token += frozen * (4 * weights + 6 * attention if stage.adapted else
                           2 * (weights + attention))
    return per_token + (6 if stage.embeddings else 4) * d * config.padded_vocab_size


def matmul_rate(config, dtype, device):
    """FLOP/s that this machine reaches in a product of the MLP's shape (median of 25)."""
    tokens, times = (16384, 20) if device.type == "cuda" else (2048, 1)
    x = torch.randn(tokens, config.d_model, dtype=dtype, device=device)
    w = torch.randn(4 * config.d_model, config.d_model, dtype=dtype, device=device)

    def products(_):
        for _ in range(times):
            out = torch.nn.functional.linear(x, w)
        out[0, 0].item()  # on a GPU: wait for them

    return 2 * x.numel() * len(w) * times / statistics.median(timed(products, 26))


def timed(step, times):
    """Seconds of step(0), step(1), ... but for the first, which also prepares kernels."""
    seconds = []
    for number in range(times):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def ours(config, index, tokens, device):
    """A model in the middle of stage `index`. -> model, optimizer, a function that takes step n"""
    stages = train.fusion_schedule(config)
    model = GPT(config, blocks=0).to(device)
    for stage in stages[:index]:  # as if the stages before had run
        train.add_block(model)
        train.begin_stage(model, stage)
        quant.freeze_block(model, stage.block, config.quantization_type)
    train.add_block(model)
    optimizer = train.begin_stage(model, stages[index])
    loss_of = train.stage_loss(model, stages[index])
    in_fp16 = compute_type(device, config.compute_type) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=in_fp16)

    def step(number):
        batch = train.batch_of(tokens, config, stages[index], number)
        _, norm = train.train_step(loss_of, optimizer, scaler, batch, config, device)
        norm.item()  # on a GPU: wait for the step to end

    return model, optimizer, step


def theirs(config, with_peft, tokens, device):
    """GPT2LMHeadModel of the same size, trained on next tokens as its users do: everything, or with
    peft LoRA matrices on every linear; fused AdamW (its Trainer's default). -> as `ours`"""
    import transformers

    c, dtype = config, compute_type(device, config.compute_type)
    rows, n = torch.from_numpy(tokens).view(-1, c.seq_len), train.tokens_per_step(c) // c.seq_len
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.seq_len, n_embd=c.d_model, n_layer=c.n_layers,
        n_head=c.n_heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ))  # fmt: skip
    if with_peft:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(
            r=c.qlora_rank, lora_alpha=c.qlora_alpha, fan_in_fan_out=True,
            target_modules=["c_attn", "c_proj", "c_fc"],
        ))  # fmt: skip
    model.to(device).train()
    if c.compile == "true":
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=c.lr, fused=True)

    def step(number):
        first = number * n % (len(rows) - n)
        idx = rows[first : first + n].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=idx, labels=idx).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        norm.item()

    return model, optimizer, step


def take_block(name, args):
    """What one process does: a block of steps on made-up tokens. -> its figures

    The machine's own matrix-product rate is measured when the steps and their peak are done.
    """
    index, settings = VARIANTS.get(name, (None, []))
    config = load_config(preset=args.preset, overrides=args.overrides + settings)
    device = pick_device(config.device)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=400 * config.seq_len)
    kept = name not in REFERENCES or name.endswith("kept")
    if kept:
        train.keep_freed_memory()
    if name in REFERENCES:
        model, optimizer, step = theirs(config, "peft" in name, tokens, device)
    else:
        model, optimizer, step = ours(config, index, tokens, device)
    if kept:
        train.keep_freed_memory(return_now=True)
    train.memory_mib(device, reset=True)
    figures = {"seconds": timed(step, args.steps + 1), "tokens": train.tokens_per_step(config),
               "held_mib": sum(train.memory(model, optimizer).values()),
               "peak_mib": train.memory_mib(device)[1]}  # fmt: skip
    if name not in REFERENCES:
        rate = matmul_rate(config, compute_type(device, config.compute_type), device)
        flops = matmul_flops(train.fusion_schedule(config)[index], config)
        figures["limit"] = rate / flops  # tokens/s, were all time spent in such products
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
    speed = blocks[0]["tokens"] / median
    row = {"seconds_per_step": median, "quartiles": [low, high], "tokens_per_second": speed,
           "held_mib": blocks[0]["held_mib"],
           "peak_mib": max(block["peak_mib"] for block in blocks),
           "all_seconds": [block["seconds"] for block in blocks]}  # fmt: skip
    if "limit" in blocks[0]:
        row["share_of_limit"] = speed / statistics.median(block["limit"] for block in blocks)
    return row


def print_mix(table, shares):
    """One step of a whole fused run on average, beside every other kind of step."""
    stages = [f"stage {k}" for k in range(len(shares))]
    for suffix in ("", ", no adapters"):
        if not {*stages, f"stage 1{suffix}"} <= table.keys():
            continue
        rows = [table.get(stage + suffix, table[stage]) for stage in stages]
        mix = sum(share * row["seconds_per_step"] for share, row in zip(shares, rows)) / sum(shares)
        print(f"\na step of the {':'.join(f'{s:g}' for s in shares)} mix of the stages{suffix}: "
              f"{mix:.2f} s; times as long:")
        for name, row in table.items():
            if not name.startswith("stage"):
                print(f"  {name:43s}  {row['seconds_per_step'] / mix:.2f}")


@one_line_errors
def main(argv):
    parser = Parser(description="Speed and memory of training steps.")
    parser.add_argument("--preset")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a block")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each kind of step")
    names = [*VARIANTS, *REFERENCES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME")
    parser.add_argument("--block", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.block:
        return print(json.dumps(take_block(args.block, args)))
    installed = [name for name in REFERENCES
                 if importlib.util.find_spec("peft" if "peft" in name else "transformers")]
    chosen = args.only or [*VARIANTS, *installed]
    blocks = {name: [] for name in chosen}
    for number in range(args.rounds):
        for name in chosen:
            blocks[name].append(block_in_a_process(name, args))
            median = statistics.median(blocks[name][-1]["seconds"])
            print(f"round {number + 1}  {name:43s}  {median:.3f} s", file=sys.stderr, flush=True)
    table = {name: summary(blocks[name]) for name in chosen}
    print(f"{torch.get_num_threads()} threads, medians of {args.rounds} x {args.steps} steps\n")
    rows = [row | {"step": name, "quartiles": "{:.2f} {:.2f}".format(*row["quartiles"])}
            for name, row in table.items()]  # fmt: skip
    train.print_table({"step": "", "seconds_per_step": ".3f", "quartiles": "",
                       "tokens_per_second": ",.0f", "share_of_limit": ".2f", "held_mib": ".0f",
                       "peak_mib": ".0f"}, rows)  # fmt: skip
    print_mix(table, load_config(preset=args.preset, overrides=args.overrides).block_steps)
    if args.json:
        write_json(args.json, table)


if __name__ == "__main__":
    sys.exit(main())
