"""What the embedded model is trained on and tested with: ``python -m embedded.tasks FOLDER`` writes it all.

The folder gets ``captions.txt``, ``tasks.jsonl``, ``held-out.jsonl`` and ``spiece.model``, which ``train.toml`` reads.

Every question comes in one of a few wordings. A question about what it says itself ("count: …", "colour of the red
apple") is held out with all its wordings, so that its answer has to be worked out. A fact ("opposite of hot", "3 plus
4") can be known only by having met it: it is held out in single wordings, and met in the others.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from embedded.corpus import generate_captions, generate_tasks
from embedded.vocabulary import train_vocabulary

SEED = 1
CAPTIONS, TASKS, HELD_OUT = 60_000, 400_000, 2_000
# Kinds of questions that a model this small does not learn in so short a time: of numbers and orders, and those that
# name one of two things in a text, which has to be found by its name.
_TOO_HARD = re.compile(r"(larger of|in order|reverse|is there|how many|colour of [^:]+:).*")
WORDINGS = ("{}", "{}?", "question: {}", "answer this: {}")

# One question in so many is held out.
_HELD_OUT_OF = 20
_FACT = re.compile(
    r"\d+ (plus|minus) \d+|.+ in (words|digits)|(opposite|plural|singular) of .+|(capitals|kind of thing): .+"
    r"|(weekday|month|season) after .+"
)


def is_fact(question: str) -> bool:
    """Whether the answer is to be known, and cannot be read off the question."""
    return _FACT.fullmatch(question) is not None


def is_held_out(question: str, wording: str) -> bool:
    """Whether a question in a wording is for testing only; the same on every machine."""
    key = wording.format(question) if is_fact(question) else question
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % _HELD_OUT_OF == 0


def worded_tasks(seed: int, count: int) -> Iterator[tuple[str, str, bool]]:
    """Questions in a wording, their answers, and whether they are held out; the same for the same seed.

    Args:
        seed: of the questions; the wordings take turns.
        count: how many.
    """
    for number, (question, answer) in enumerate(generate_tasks(seed, count)):
        if _TOO_HARD.fullmatch(question):
            continue
        wording = WORDINGS[number % len(WORDINGS)]
        yield wording.format(question), answer, is_held_out(question, wording)


def training_tasks(seed: int, count: int) -> list[tuple[str, str]]:
    """The tasks for training among ``count`` drawn ones."""
    return [(question, answer) for question, answer, held_out in worded_tasks(seed, count) if not held_out]


def held_out_tasks(seed: int, count: int) -> list[tuple[str, str]]:
    """The different tasks for testing among ``count`` drawn ones."""
    return list(dict.fromkeys((q, answer) for q, answer, held_out in worded_tasks(seed, count) if held_out))


def write(folder: Path) -> None:
    """Writes texts, tasks and vocabulary into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = generate_captions(SEED, CAPTIONS)
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    _write_pairs(folder / "tasks.jsonl", training_tasks(SEED, TASKS))
    _write_pairs(folder / "held-out.jsonl", held_out_tasks(SEED + 1, HELD_OUT * 60)[:HELD_OUT])
    (folder / "spiece.model").write_bytes(train_vocabulary())


def _write_pairs(file: Path, pairs: list[tuple[str, str]]) -> None:
    lines = (json.dumps({"input": question, "target": answer}) + "\n" for question, answer in pairs)
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
