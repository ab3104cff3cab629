"""Every way to sample from a run, measured: seconds, layer evaluations, figures of the text.

    python tests/samples.py tiny                            8 samples each way
    python tests/samples.py fused-0 --judge next-token-0    and the perplexity under another run

Orders (ancestral, by confidence) x windows (1, 2, 4, 8, 16, 32 tokens, the whole text) x time steps
a window (the run's own, 4, 2), depth by noise; the first and the last exit at every step, for whole
texts and for windows of 8; left to right from every exit where the model is causal; and the
validation text as a yardstick. The samples of a way are written together, as one batch. The table
is written to samples.json in the run's folder.
"""

import itertools
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_loader import Parser, UserError, one_line_errors, tokenizer, validation_rows, write_json
from evaluate_gpt2 import (Run, begin, expand, left_to_right, number, pick_device, print_table,
                           sample)
from model import autocast, compute_type

WINDOWS = (1, 2, 4, 8, 16, 32, None)
STEPS = (None, 4, 2)
COLUMNS = {"order": "", "window": "", "steps": "", "exit": "", "seconds": ".4f", "layers": ".2f",
           "judge_perplexity": ".1f", "distinct_2": ".1%", "entropy": ".2f"}  # fmt: skip


def text_figures(rows, judge=None):
    """Figures of written text, token ids (R, T); position 0 is context.

    Returns:
        dict: perplexity left to right under `judge` (None without one), the share of distinct
        2-grams, the entropy in nats of the token frequencies; the last two over all rows together.
    """
    ce = judge and left_to_right(judge, rows)[-1].mean().item()
    written = rows[:, 1:].tolist()
    pairs = [pair for row in written for pair in itertools.pairwise(row)]
    share = np.array([*Counter(itertools.chain(*written)).values()]) / sum(map(len, written))
    return {"judge_perplexity": ce and math.exp(ce), "distinct_2": len({*pairs}) / len(pairs),
            "entropy": float(-(share * np.log(share)).sum())}


def load_judge(run, config, n_tokens, device, dtype):
    """The run that scores samples of `n_tokens` tokens, <|endoftext|> included, of the vocabulary
    of `config`. UserError for one that cannot."""
    theirs = run.config.model
    if (theirs.vocab_size, theirs.attention_mode) != (config.vocab_size, "causal"):
        raise UserError(f"{run.name} cannot judge: it must be causal, with vocab_size "
                        f"{config.vocab_size}")
    if theirs.seq_len < n_tokens:
        raise UserError(f"the judge reads {theirs.seq_len} tokens: give --length")
    return expand(run.load(device=device), dtype)


def ways_of(model):
    """Every way to write that is measured: a list of dicts of options of `sample`."""
    causal, last = model.config.attention_mode == "causal", model.blocks - 1
    orders = ("ancestral", "confidence")
    ways = [{"order": order, "window": window, "steps": steps}
            for order, window, steps in itertools.product(orders, WINDOWS, STEPS)]  # fmt: skip
    ways += [{"order": order, "window": window, "exit_k": exit_k}
             for order, window, exit_k in itertools.product(orders, (8, None), {0, last})]
    exits = range(model.blocks) if causal else ()
    return ways + [{"order": "left-to-right", "exit_k": exit_k} for exit_k in exits]


def measure(run, n, judge_run=None, length=None, seed=0, device="cpu", **how):
    """What n samples of every way to write cost and are worth.

    Args:
        judge_run: Run or None. length: tokens of a sample (None: what the context has room for).
        how: temperature, top_p, as for `sample`.

    Returns:
        dict: samples, tokens, judge, and `table`, a list of dicts with the way's order, window,
        steps and exit (None: whole text, the run's own, by noise), `seconds` and `layers` (layer
        evaluations) for each token, the keys of `text_figures`.
    """
    config, training = run.config.model, run.config.training
    dtype = compute_type(device, training.compute_type)
    x = begin("", length or config.seq_len - 1, tokenizer(config.vocab_size), config)  # (1, T)
    n_tokens = x.size(1) - 1
    model = expand(run.load(device=device), dtype)
    judge = judge_run and load_judge(judge_run, config, n_tokens + 1, device, dtype)
    table = []
    with autocast(device, dtype):
        for way in ways_of(model):
            start = time.perf_counter()
            ids, layers = sample(model, x.repeat(n, 1), **way, seed=seed, **how)
            ids = ids.cpu()  # before the clock is read: a GPU may still be at work
            row = {"order": way["order"], "window": way.get("window"), "steps": way.get("steps"),
                   "exit": way.get("exit_k"),
                   "seconds": (time.perf_counter() - start) / (n * n_tokens),
                   "layers": layers.double().mean().item() / n_tokens}  # fmt: skip
            table.append(row | text_figures(ids, judge))
        rows = validation_rows(run.tokens()[1], n_tokens + 1, n)
        table.append({"order": "validation text", **text_figures(rows, judge)})
    return {"samples": n, "tokens": n_tokens, "judge": judge_run and judge_run.name,
            "table": table}  # fmt: skip


@one_line_errors
def main(argv=None):
    parser = Parser(description="Every way to sample from a run, measured.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--judge", metavar="RUN", help="causal run that scores the samples")
    parser.add_argument("--samples", type=number(int, 1), default=8, metavar="N", help="each (8)")
    parser.add_argument("--length", type=number(int, 2), metavar="N", help="tokens (all that fit)")
    parser.add_argument("--temperature", type=number(float, 0, 1e6), default=1.0, metavar="X")
    parser.add_argument("--top-p", type=number(float, 1e-9, 1), default=0.95, metavar="P")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    run, judge = Run.named(args.run), args.judge and Run.named(args.judge)
    result = measure(run, args.samples, judge, args.length, args.seed, pick_device(args.device),
                     temperature=args.temperature, top_p=args.top_p)
    print(f"{result['samples']} samples of {result['tokens']} tokens each way"
          + (f"; judge: {judge.name}, left to right\n" if judge else "\n"))
    print_table(COLUMNS, result["table"])
    path = run.folder / "samples.json"
    write_json(path, result)
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
