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
from data_loader import Parser, Run, load_tokens, one_line_errors, validation_rows
from evaluate_gpt2 import ROWS, score_at, standard_error
from model import exit_of, noise_of_rows, pick_device
from quant import expand
from train_gpt2_fusion import load_run, print_table


def bands(run, device):
    """{owner: CE (exits, time steps, rows)} of a run, its time steps by the exit that owns them."""
    model, state, _ = load_run(run, device)
    config, model = state.config, expand(model)
    val = load_tokens(config, state.tokens_sha256)[1]
    rows = validation_rows(val, config.seq_len, ROWS)
    noise = noise_of_rows(len(rows), config.seq_len, config.seed)
    by_owner = defaultdict(list)
    for m in sorted({*config.time_step_mask_fractions, 1.0}):
        ce = [score_at(model, rows, m, exit_k, noise)[0] for exit_k in range(model.blocks)]
        by_owner[exit_of(m, model)].append(torch.stack(ce))  # (exits, R)
    return {owner: torch.stack(ce, 1) for owner, ce in by_owner.items()}


@one_line_errors
def main(argv):
    parser = Parser(description="Every exit of a run on every band.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    table, columns = [], {"band of": "d", "cross_entropy": ".3f"}
    for owner, ce in sorted(bands(Run.named(args.run), pick_device(args.device)).items()):
        by_row = ce.mean(1)  # (exits, R)
        row = {"band of": owner, "cross_entropy": by_row[owner].mean().item()}
        for exit_k, one in enumerate(by_row):
            behind = one - by_row[owner]
            text = f"{behind.mean().item():+.3f} +- {standard_error(behind):.3f}"
            row[f"exit {exit_k}"] = "owner" if exit_k == owner else text
            columns[f"exit {exit_k}"] = ""
        table.append(row)
    print_table(columns, table)


if __name__ == "__main__":
    sys.exit(main())
