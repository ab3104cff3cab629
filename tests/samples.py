"""Every way to sample from a run, measured: seconds, layer evaluations, figures of the text.

    python tests/samples.py tiny                            8 samples each way
    python tests/samples.py fused-0 --judge next-token-0    and the perplexity under another run

Orders (ancestral, by confidence) x depths (by noise, full) with the same seeds, in turns, so that a
busy moment of the machine hits all of them; left to right from the last exit where the model is
causal; and the validation text as a yardstick. The table is written to samples.json in the run's
folder.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_loader import (UserError, load_tokens, one_line_errors, tokenizer, validation_rows,
                         write_atomically)
from evaluate_gpt2 import (begin, check_ranges, even_steps, expand, left_to_right, load_run,
                           pick_device, read_config, sample, sample_left_to_right)
from model import autocast, compute_type


def text_figures(rows, judge=None):
    """Figures of written text, token ids (R, T); position 0 is context.

    Returns:
        dict: perplexity left to right under `judge` (None without one), the share of distinct
        2-grams, the entropy in nats of the token frequencies; the last two over all rows together.
    """
    ce = judge and left_to_right(judge, rows)[-1]
    written = rows[:, 1:].tolist()
    pairs = [pair for row in written for pair in itertools.pairwise(row)]
    share = np.array([*Counter(itertools.chain(*written)).values()]) / sum(map(len, written))
    return {"judge_perplexity": ce and math.exp(ce), "distinct_2": len({*pairs}) / len(pairs),
            "entropy": float(-(share * np.log(share)).sum())}


def load_judge(folder, config, n_tokens, device, dtype):
    """The run that scores samples of `n_tokens` tokens, <|endoftext|> included, of the vocabulary
    of `config`. UserError for one that cannot."""
    judge = expand(load_run(folder, device=device), dtype)
    theirs = judge.config
    if (theirs.vocab_size, theirs.attention_mode) != (config.vocab_size, "causal"):
        raise UserError(f"{folder.name} cannot judge: it must be causal, with vocab_size "
                        f"{config.vocab_size}")
    if theirs.seq_len < n_tokens:
        raise UserError(f"the judge reads {theirs.seq_len} tokens: give --length")
    return judge


def measure(folder, n, judge_folder=None, length=None, steps=None, seed=0, device="cpu", **how):
    """What n samples of every way to write cost and are worth.

    Args:
        folder, judge_folder: runs. length: tokens of a sample (None: what the context has room
        for). steps: number of even time steps (None: the run's own). how: temperature, top_p.

    Returns:
        dict: samples, tokens, judge, and `table`, a list of dicts with order, depth, the medians
        `seconds` and `layers` (layer evaluations) of a sample, and the keys of `text_figures`.
    """
    config, training, data = read_config(folder)
    dtype = compute_type(device, training["compute_type"])
    encoding = tokenizer(config.vocab_size, data.folder)
    x = begin("", length or config.seq_len - 1, encoding, config)  # (T,)
    model = expand(load_run(folder, device=device), dtype)
    judge = judge_folder and load_judge(judge_folder, config, len(x), device, dtype)
    ways = [*itertools.product(("ancestral", "confidence"), ("by noise", "full"))]
    if config.attention_mode == "causal":
        ways.append(("left to right", f"exit {model.blocks - 1}"))
    runs = {way: [] for way in ways}  # (seconds, layer evaluations, ids)
    with autocast(device, dtype):
        for i, (order, depth) in itertools.product(range(n), ways):
            start, seeded = time.perf_counter(), dict(how, seed=seed + i)
            if order == "left to right":
                ids, layers = sample_left_to_right(model, x, **seeded)
            else:
                ids, layers = sample(model, x, steps=even_steps(steps), order=order,
                                     full_depth=depth == "full", **seeded)
            ids = ids.cpu()  # before the clock is read: a GPU may still be at work
            runs[order, depth].append((time.perf_counter() - start, layers, ids))
        tokens = load_tokens(data, "val", config.vocab_size)
        table = []
        for (order, depth), done in runs.items():
            seconds, layers, ids = zip(*done)
            table.append({"order": order, "depth": depth, "seconds": float(np.median(seconds)),
                          "layers": float(np.median(layers)),
                          **text_figures(torch.stack(ids), judge)})
        table.append({"order": "validation text", "depth": "", "seconds": None, "layers": None,
                      **text_figures(validation_rows(tokens, len(x), n), judge)})
    return {"samples": n, "tokens": len(x) - 1, "judge": judge_folder and judge_folder.name,
            "table": table}


def print_table(result):
    judge = result["judge"]
    print(f'{result["samples"]} samples of {result["tokens"]} tokens each way, the same seeds'
          + (f"; judge: {judge}, left to right" if judge else ""))
    print("\norder            depth     s/sample  layers  "
          + ("perplexity  " if judge else "") + "distinct 2-grams  entropy")
    for row in result["table"]:
        cost = f'{row["seconds"]:8.2f}  {row["layers"]:6.0f}' if row["layers"] else " " * 16
        print(f'{row["order"]:15s}  {row["depth"]:8s}  {cost}  '
              + (f'{row["judge_perplexity"]:10.1f}  ' if judge else "")
              + f'{row["distinct_2"]:16.1%}  {row["entropy"]:7.2f}')
    for order in ("ancestral", "confidence"):
        by_noise, full = (row["seconds"] for row in result["table"] if row["order"] == order)
        print(f"{order}: depth by noise is {full / by_noise:.2f} times as fast as full depth")


@one_line_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description="Every way to sample from a run, measured.")
    parser.add_argument("run", metavar="RUN_ID")
    parser.add_argument("--judge", metavar="RUN_ID", help="causal run that scores the samples")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="each way (8)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens (as many as fit)")
    parser.add_argument("--steps", type=int, metavar="N", help="even time steps (the run's own)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="of the runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    check_ranges(args)
    if args.length == 1:
        raise UserError("--length must be 2 or more: the table counts 2-grams")
    judge = args.judge and args.folder / args.judge
    result = measure(args.folder / args.run, args.samples, judge, args.length, args.steps,
                     args.seed, pick_device(args.device), temperature=args.temperature,
                     top_p=args.top_p)
    print_table(result)
    path = args.folder / args.run / "samples.json"
    write_atomically(path, json.dumps(result, indent=1).encode())
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
