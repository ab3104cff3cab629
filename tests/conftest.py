"""What the tests share: the repository on the path, a made-up vocabulary, a toy run's settings."""

import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # toy sizes: a second thread costs more than it brings

WORDS = "the people of this union have seen peace and war in every state of our country".split()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the long campaigns (README.md)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long campaign, run with --slow only")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("--slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Command-line arguments of a toy run on made-up text: bytes as vocabulary, no network.

    The text has word order to learn: each word is followed by one of three others.
    """
    import data_loader
    import evaluate_gpt2

    monkeypatch.setattr(evaluate_gpt2, "ROWS", 8)  # scored one by one, after every toy run
    ranks = {bytes([b]): b for b in range(256)}
    monkeypatch.setattr(data_loader, "gpt2_ranks", lambda folder: ranks)
    rng = random.Random(0)
    paragraphs = []
    for _ in range(400):
        word, sentence = rng.randrange(len(WORDS)), []
        for _ in range(14):
            sentence.append(WORDS[word])
            word = (word * 3 + rng.randrange(3)) % len(WORDS)
        paragraphs.append(" ".join(sentence).capitalize() + f" {len(paragraphs)}.")
    source = tmp_path / "text.txt"
    source.write_text("\n\n".join(paragraphs))
    settings = {
        "model.vocab_size": 257,
        "model.d_model": 32,
        "model.n_layers": 6,
        "model.n_heads": 2,
        "model.seq_len": 32,
        "training.block_size": 2,
        "training.block_steps": "[2,1,1]",
        "training.batch_size": 4,
        "training.max_steps": 12,
        "training.warmup_steps": 2,
        "training.log_interval": 2,
        "training.eval_interval": 4,
        "training.eval_rows": 4,
        "training.checkpoint_interval": 2,
        "training.compute_type": "fp32",
        "training.device": "cpu",
        "training.run_id": "toy",
        "training.folder": tmp_path / "checkpoints",
        "data.source": source,
        "data.folder": tmp_path / "data",
    }

    def arguments(**changes):
        """toy(training__mode="standard") -> the argument list with that key changed."""
        changed = settings | {key.replace("__", "."): value for key, value in changes.items()}
        config = ["--config", str(ROOT / "gpt2.yaml")]
        return config + [f"{key}={value}" for key, value in changed.items()]

    arguments.folder = tmp_path / "checkpoints" / "toy"
    return arguments
