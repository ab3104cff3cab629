"""Every way to sample from a run, measured by figures of the text.

    python tests/samples.py tiny                            8 samples each way
    python tests/samples.py fused-0 --judge next-token-0    and the perplexity under another run

Orders (ancestral, by confidence) x windows (1, 2, 4, 8, 16 tokens, the whole text) x time steps a
window (the run's own, 4); left to right from exit 0 where the model is causal; and the validation
text as a yardstick. The samples of a way are written together, as one batch. The table is written
to samples.json in the run's folder.
"""

import itertools
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_loader import (Parser, Run, UserError, load_tokens, one_line_errors, validation_rows,
                         write_json)  # fmt: skip
from evaluate_gpt2 import left_to_right, number, prompt_ids
from model import pick_device, sample
from quant import expand
from train_gpt2_fusion import load_run, print_table

WINDOWS = (1, 2, 4, 8, 16, None)
STEPS = (None, 4)
COLUMNS = {"order": "", "window": "", "steps": "", "judge_perplexity": ".1f", "distinct_2": ".1%"}


def text_figures(rows, judge=None):
    """Figures of written text, token ids (R, T); position 0 is context.

    Returns:
        dict: perplexity left to right under `judge`'s last exit (None without a judge), the share
        of distinct 2-grams, over all rows together (None where there are none).
    """
    ce = judge and left_to_right(judge, rows, judge.blocks - 1).mean().item()
    pairs = [pair for row in rows[:, 1:].tolist() for pair in itertools.pairwise(row)]
    return {"judge_perplexity": ce and math.exp(ce),
            "distinct_2": len({*pairs}) / len(pairs) if pairs else None}  # fmt: skip


def load_judge(run, config, length, device):
    """The model of a run that scores samples of `length` tokens of the vocabulary of `config`."""
    judge, state, _ = load_run(run, device)
    theirs = state.config
    if (theirs.vocab_size, theirs.attention_mode) != (config.vocab_size, "causal"):
        raise UserError(f"{run.name} cannot judge: it must be causal, with vocab_size "
                        f"{config.vocab_size}")
    if theirs.seq_len <= length:
        raise UserError(f"the judge reads {theirs.seq_len} tokens: give --length")
    return expand(judge)


def ways_of(model):
    """Every way to write that is measured: a list of dicts of options of `sample`."""
    orders = ("ancestral", "confidence")
    ways = [{"order": order, "window": window, "steps": steps}
            for order, window, steps in itertools.product(orders, WINDOWS, STEPS)]  # fmt: skip
    if model.config.attention_mode == "causal":
        ways.append({"order": "left-to-right", "exit_k": 0})
    return ways


def measure(model, x, seed, judge=None):
    """What every way to fill in the [MASK]s of x (R, T) is worth.

    Returns:
        a list of dicts: the way's order, window and steps (None: whole text, the run's own), and
        `text_figures`.
    """
    table = []
    for way in ways_of(model):
        ids = sample(model, x, **way, seed=seed).cpu()
        told = {key: way.get(key) for key in ("order", "window", "steps")}
        table.append(told | text_figures(ids, judge))
    return table


@one_line_errors
def main(argv):
    parser = Parser(description="Every way to sample from a run, measured.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--judge", metavar="RUN", help="causal run that scores the samples")
    parser.add_argument("--samples", type=number(int, 1), default=8, metavar="N", help="each (8)")
    parser.add_argument("--length", type=number(int, 1), metavar="N", help="tokens (all that fit)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    run, device = Run.named(args.run), pick_device(args.device)
    judge_run = args.judge and Run.named(args.judge)
    model, state, _ = load_run(run, device)
    config = state.config
    length = args.length or config.seq_len - 1
    x = prompt_ids("", length, config).repeat(args.samples, 1)  # (R, T)
    judge = judge_run and load_judge(judge_run, config, length, device)
    val = load_tokens(config, state.tokens_sha256)[1]
    rows = validation_rows(val, length + 1, args.samples)
    table = measure(expand(model), x, args.seed, judge)
    table.append({"order": "validation text", **text_figures(rows, judge)})
    result = {"samples": args.samples, "tokens": length, "judge": judge_run and judge_run.name}
    print("; ".join(f"{key}: {value}" for key, value in result.items()) + "\n")
    print_table(COLUMNS, table)
    path = run.folder / "samples.json"
    write_json(path, result | {"table": table})
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(main())
