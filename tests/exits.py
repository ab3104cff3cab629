"""Every exit of a run on every band: does a later block pay, on its own ground and elsewhere?

    python tests/exits.py fused-1-1-1

A column for each exit: how much worse it is on a band than the exit that owns it, in nats, as the
mean over the band's time steps (m = 1 with the last), paired over 100 validation rows, +- the
standard error over them. Below 0 the owner is worse. A run of an exercise needs its change first
(git apply tests/exercises/NAME.patch).
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_loader import Parser, one_line_errors, validation_rows
from evaluate_gpt2 import (ROWS, Run, exit_of, expand, pick_device, print_table, row_noise,
                           score_at, standard_error)
from model import autocast, compute_type


def bands(run, device):
    """{owner: CE (exits, time steps, rows)} of a run, its time steps by the exit that owns them."""
    config, training = run.config.model, run.config.training
    dtype = compute_type(device, training.compute_type)
    model = expand(run.load(device=device), dtype)
    rows = validation_rows(run.tokens()[1], config.seq_len, ROWS)
    noise = row_noise(len(rows), config.seq_len, training.seed, tag=0)
    by_owner = defaultdict(list)
    with autocast(device, dtype):
        for m in sorted({*config.time_step_mask_fractions, 1.0}):
            ce = [score_at(model, rows, m, block, noise)[0] for block in range(model.blocks)]
            by_owner[exit_of(m, model)].append(torch.stack(ce))  # (exits, R)
    return {owner: torch.stack(ce, 1) for owner, ce in by_owner.items()}


@one_line_errors
def main(argv=None):
    parser = Parser(description="Every exit of a run on every band.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    table, columns = [], {"band of": "d", "cross_entropy": ".3f"}
    for owner, ce in sorted(bands(Run.named(args.run), pick_device(args.device)).items()):
        by_row = ce.mean(1)  # (exits, R)
        row = {"band of": owner, "cross_entropy": by_row[owner].mean().item()}
        for block, one in enumerate(by_row):
            behind = one - by_row[owner]
            text = f"{behind.mean().item():+.3f} +- {standard_error(behind):.3f}"
            row[f"exit {block}"] = "owner" if block == owner else text
            columns[f"exit {block}"] = ""
        table.append(row)
    print_table(columns, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
