"""The READMEs: every link, command, option and run name in them, and the code that they quote."""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from data_loader import known_keys, load_config

import study

TEXTS = ["README.md", "data/README.md", "data/results/README.md", "tests/README.md",
         "tests/exercises/README.md"]  # fmt: skip


def tracked_files():
    """The files of the repository, as git lists them."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def anchors(text):
    """GitHub's anchors of a text's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_no_link_is_dead(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def commands(text):
    """The commands of a text, as lists of words: lines of its code blocks, and code in a line."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    prose = re.sub(r"```.*?```", "", text, flags=re.S).replace("\n", " ")
    inline = re.findall(r"`((?:python|torchrun|git|pip) [^`]*)`", prose)
    for line in [*"".join(blocks).replace("\\\n", " ").splitlines(), *inline]:
        for part in re.split(r"&&", line):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def made_by(words):
    """The names of the runs that a command makes: run ids, rows of the study, exported folders."""
    script = next((word for word in words if word.endswith(".py")), "")
    arguments = words[words.index(script) + 1 :] if script else []
    if script.endswith("train_gpt2_fusion.py"):
        overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
        preset = arguments[arguments.index("--preset") + 1] if "--preset" in arguments else None
        overrides = [word for word in overrides if not word.startswith("model.init_from")]
        config = load_config(preset=preset, overrides=overrides)  # UserError: it cannot be trained
        return {config.run_id}
    if script.endswith("study.py"):
        groups = study.rows()
        known = {"ROW", "NAME", *groups, *(row for group in groups.values() for row in group)}
        rows = [word for word in arguments if not word.startswith("-") and word != "1"]
        assert known.issuperset(rows), words
        return {row for group in rows for row in groups.get(group, [group])}
    return {arguments[1]} if arguments[:1] == ["export"] else set()


class Parsed(Exception):
    """Raised with what a script's parser has made of its arguments."""


def parsed(script, arguments, monkeypatch):
    """What a script's own parser makes of its arguments; it is started, and goes no further."""
    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)

        def stop(parser, argv, real=real):
            raise Parsed(real(parser, argv))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(Path(script).stem).main(arguments)
    monkeypatch.undo()
    return caught.value.args[0]


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_exists(name, monkeypatch):
    """Scripts and other files are there, options parse, runs are made by a command of the text."""
    text = (ROOT / name).read_text()
    found = [*commands(text)]
    made = set().union(*map(made_by, found))
    assert found
    for words in found:
        if words[0] in ("pip", "git", ".", "set") or words[:3] == ["python3", "-m", "venv"]:
            files = [word for word in words[1:] if "/" in word or "." in word]
            made_up = ("venv", "*", "NAME")
            files = [file for file in files if not any(part in file for part in made_up)]
            assert all((ROOT / file).exists() for file in files), words
            continue
        if words[:3] == ["python", "-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
            continue
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        assert at is not None, words
        script, arguments = words[at], words[at + 1 :]
        assert (ROOT / script).exists(), words
        args = parsed(script, arguments, monkeypatch)
        runs = []
        if script == "evaluate_gpt2.py":
            runs = [*getattr(args, "runs", []), getattr(args, "run", None)]
        elif script in ("tests/samples.py", "tests/gif.py", "tests/exits.py"):
            runs = [args.run, getattr(args, "judge", None)]
        elif script == "train_gpt2_fusion.py":
            if "--resume" in arguments:
                runs = [arguments[arguments.index("--resume") + 1]]
            runs += [word[16:] for word in arguments if word.startswith("model.init_from=")]
        for run in filter(None, runs):
            assert run in made or run in ("RUN", "A", "B"), (words, sorted(made))


def test_keys_and_files_that_are_named_exist():
    keys = {f"{section}.{key}" for key, section in known_keys()[0].items()}
    for name in TEXTS:
        text = (ROOT / name).read_text()
        for key in re.findall(r"\b((?:model|training|data)\.[a-z_]+)=", text):
            assert key in keys, (name, key)
    # Files: the list in README.md names every file and folder of the repository, one to one.
    table = (ROOT / "README.md").read_text().split("## Files")[1].split("### ")[0]
    listed = {word.rstrip("/") for row in re.findall(r"^\| (`.*?) \|", table, re.M)
              for word in re.findall(r"`([^`]+)`", row)}  # fmt: skip
    tracked = {path.split("/")[0] for path in tracked_files()} - {".ci"} | {".ci/run"}
    assert tracked == listed, tracked ^ listed
    # ... and says how long the scripts are.
    for name, stated in re.findall(r"^\| `(\w+\.(?:py|yaml))` \| (\d+) \|", table, re.M):
        assert abs(len((ROOT / name).read_text().splitlines()) - int(stated)) <= 15, name


def test_the_training_step_is_quoted_word_for_word():
    text = (ROOT / "README.md").read_text()
    block = text.split("### The training step")[1].split("```python\n")[1].split("```")[0]
    code = (ROOT / "model.py").read_text() + (ROOT / "train_gpt2_fusion.py").read_text()
    assert len(block.splitlines()) == 5
    for line in block.splitlines():
        assert line.strip() in code, line


def test_the_readmes_are_short():
    for name, most in (("README.md", 260), ("data/results/README.md", 250)):
        assert len((ROOT / name).read_text().splitlines()) <= most, name
