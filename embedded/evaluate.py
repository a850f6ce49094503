"""How many held-out tasks a model answers exactly: ``python -m embedded.evaluate MODEL PAIRS.jsonl``."""

import json
import sys
from pathlib import Path

import torch

from nai_t5_core.weights.load import load_whole

_PROMPTS_AT_ONCE = 64
_MAX_NEW_TOKENS = 64


def answers(source: str | Path, questions: list[str]) -> list[str]:
    """What a model writes for questions, greedily and in float32.

    Raises:
        ValueError: the model cannot be loaded, or has no tokenizer.
    """
    loaded = load_whole(source, torch.float32, "cpu")
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{source} comes without a tokenizer")
    found = []
    for start in range(0, len(questions), _PROMPTS_AT_ONCE):
        batch = tokenizer(questions[start : start + _PROMPTS_AT_ONCE])
        ids, mask = torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask)
        rows = loaded.model.generate(ids, mask, max_new_tokens=_MAX_NEW_TOKENS).tolist()
        found += [tokenizer.decode(row) for row in rows]
    return found


def wrong_answers(source: str | Path, pairs: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Question, right answer and given answer of every task that is not answered exactly."""
    given = answers(source, [question for question, _ in pairs])
    return [(q, right, found) for (q, right), found in zip(pairs, given, strict=True) if found != right]


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The tasks that :mod:`embedded.tasks` wrote."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(pair["input"], pair["target"]) for pair in lines]


if __name__ == "__main__":
    tasks = read_pairs(Path(sys.argv[2]))
    wrong = wrong_answers(sys.argv[1], tasks)
    for question, right, found in wrong:
        print(f"{question} → {found} (right: {right})")
    print(f"{len(tasks) - len(wrong)} of {len(tasks)} exactly right: {1 - len(wrong) / len(tasks):.1%}")
