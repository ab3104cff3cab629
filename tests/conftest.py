"""What the tests share: the repository on the path, toy sizes, a toy run's settings."""

import os
import random
import shutil
import signal
import sys
from pathlib import Path

WITH_GPU = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests ask for the bits of a CPU, wherever they run

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # toy sizes: a second thread costs more than it brings

WORDS = "the people of this union have seen peace and war in every state of our country".split()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"),
                     help="cuda: ask a GPU, too, what only it can answer")  # fmt: skip


def pytest_configure(config):
    # A job in the background of a shell begins with these ignored, and our training leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def toy_config(**changes):
    """A Config of 3 blocks of one layer, small enough for anything; bytes as vocabulary."""
    from data_loader import load_config

    sizes = {"vocab_size": 257, "d_model": 32, "n_layers": 3, "n_heads": 2, "seq_len": 16,
             "block_size": 1, "compute_type": "fp32"}  # fmt: skip
    return load_config().replace(**sizes | changes)


def fails(main, arguments, capsys, *words):
    """main(arguments) ends with status 2 and one line on stderr that holds all the words."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and len(error) < 600, error
    for word in words:
        assert str(word) in error, error


def flip(path, position):
    """Change one bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def toy_arguments(folder):
    """Command-line arguments of a toy run on made-up text, with the 256 bytes as vocabulary.

    The text has word order to learn: each word is followed by one of three others.
    """
    rng = random.Random(0)
    paragraphs = []
    for _ in range(400):
        word, sentence = rng.randrange(len(WORDS)), []
        for _ in range(14):
            sentence.append(WORDS[word])
            word = (word * 3 + rng.randrange(3)) % len(WORDS)
        paragraphs.append(" ".join(sentence).capitalize() + f" {len(paragraphs)}.")
    source = folder / "text.txt"
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
        "training.checkpoint_seconds": 0,
        "training.compute_type": "fp32",
        "training.device": "cpu",
        "training.run_id": "toy",
        "training.folder": folder / "checkpoints",
        "data.source": source,
        "data.token_folder": folder / "data",
    }

    def arguments(**changes):
        """toy(mode="standard") -> the argument list with that key changed."""
        sections = {key.partition(".")[2]: key for key in settings}
        changed = settings | {sections.get(key, key): value for key, value in changes.items()}
        return [f"{key}={value}" for key, value in changed.items()]

    arguments.folder = folder / "checkpoints" / "toy"
    return arguments


@pytest.fixture
def toy(tmp_path):
    """`toy_arguments` of a run in tmp_path."""
    return toy_arguments(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished and evaluated toy run, shared by all tests: only to be read."""
    import evaluate_gpt2
    import train_gpt2_fusion

    toy = toy_arguments(tmp_path_factory.mktemp("trained"))
    assert train_gpt2_fusion.main(toy(max_steps=20, lr=3e-3, qlora_lr=3e-2)) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_gpt2, "ROWS", 8)
        assert evaluate_gpt2.main(["--run", str(toy.folder)]) == 0
    return toy.folder


@pytest.fixture
def run(trained, monkeypatch, tmp_path):
    """A copy of that run, `toy` in checkpoints/ of the current folder, as a Run."""
    import evaluate_gpt2
    from data_loader import Run

    monkeypatch.setattr(evaluate_gpt2, "ROWS", 8)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "checkpoints/toy")
    return Run.named("toy")
