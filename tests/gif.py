"""Text appearing, as a moving picture: data/results/sample.gif.

    python tests/gif.py fused-0 "The people of" --seed 5 --to data/results/sample.gif

Written by confidence, a few tokens at a time. A token's colour says when it was revealed, from red
for the first to blue for the last; the prompt is white, a mask is dim. Needs matplotlib.
"""

import colorsys
import itertools
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_loader import Parser, Run, UserError, one_line_errors, tokenizer
from evaluate_gpt2 import WINDOW, prompt_ids
from model import sample
from quant import expand
from train_gpt2_fusion import load_run

PROMPT, MASK, HEADING, GROUND = "#f0f0f0", "#606060", "#a0a0a0", "#161616"
COLUMNS, WIDE, HIGH = 72, 8, 20  # characters in a line; of a character, in pixels


def frames_of(model, prompt, seed):
    """Write a text. -> for each step how many tokens are [MASK], and [(character, colour), ...]"""
    config, steps = model.config, []
    sample(model, prompt_ids(prompt, None, config), "confidence", WINDOW, seed=seed,
           watch=lambda x: steps.append(x[0, 1:].tolist()))  # fmt: skip
    total, colours, frames = steps[0].count(config.mask_id), {}, []
    for ids in steps:
        left = ids.count(config.mask_id)
        colour = colorsys.hsv_to_rgb(2 / 3 * (1 - left / total), 0.75, 1) if frames else PROMPT
        for place, token in enumerate(ids):
            if token != config.mask_id:
                colours.setdefault(place, colour)
        cells = []
        for shade, places in itertools.groupby(range(len(ids)), lambda i: colours.get(i, MASK)):
            part = [ids[i] for i in places]  # decoded together: they may share a character
            text = "░" * len(part) if shade == MASK else tokenizer(config.vocab_size).decode(part)
            cells += [(character if character.isprintable() else " ", shade) for character in text]
        frames.append((left, cells))
    return frames


def wrapped(cells):
    """Cells as lines of at most COLUMNS."""
    text, rest = "".join(character for character, _ in cells), iter(cells)
    return [[*itertools.islice(rest, len(line))]
            for line in textwrap.wrap(text, COLUMNS, drop_whitespace=False)]  # fmt: skip


def write_gif(frames, path):
    """Draw the frames, four a second; the last one stays for four seconds."""
    try:
        from matplotlib.animation import PillowWriter
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    pictures = [(f"{left} tokens are [MASK]", wrapped(cells)) for left, cells in frames]
    width, height = COLUMNS + 4, 3 + max(len(lines) for _, lines in pictures)  # in characters
    figure = Figure(figsize=(width * WIDE / 72, height * HIGH / 72), facecolor=GROUND)
    font = {"family": "DejaVu Sans Mono", "size": WIDE / 0.602}
    writer = PillowWriter(fps=4)
    with writer.saving(figure, path, 72):
        for heading, lines in pictures + 15 * pictures[-1:]:
            figure.texts.clear()
            figure.text(2 / width, 1 - 1 / height, heading, color=HEADING, **font)
            for number, line in enumerate(lines):
                column, y = 2, 1 - (number + 3) / height
                for colour, run in itertools.groupby(line, lambda cell: cell[1]):
                    text = "".join(character for character, _ in run)
                    figure.text(column / width, y, text, color=colour, **font)
                    column += len(text)
            writer.grab_frame(facecolor=GROUND)


@one_line_errors
def main(argv):
    parser = Parser(description="A moving picture of text appearing.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--to", default="sample.gif", metavar="FILE", help="default: sample.gif")
    args = parser.parse_args(argv)
    model, _, _ = load_run(Run.named(args.run))
    write_gif(frames_of(expand(model), args.prompt, args.seed), args.to)
    print(f"written to {args.to}")


if __name__ == "__main__":
    sys.exit(main())
