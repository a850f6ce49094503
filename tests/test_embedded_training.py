"""What the embedded model is trained on: a split that leaves nothing to be known by heart, and a config that runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checkpoints import spiece_model

sys.path.append(str(Path(__file__).parents[1]))  # the recipe is not part of the installed package

from embedded import tasks
from embedded.evaluate import answers, read_pairs, wrong_answers
from embedded.tasks import WORDINGS, held_out_tasks, is_fact, training_tasks, worded_tasks
from nai_t5_core.training.config import TrainConfig, read_config
from nai_t5_core.training.loop import train
from nai_t5_core.weights.hub import EMBEDDED_MODEL
from nai_t5_core.weights.load import load_whole

COUNT = 30_000


def bare(question: str) -> str:
    """A question without its wording."""
    for wording in WORDINGS[1:]:
        before, after = wording.split("{}")
        if question.startswith(before) and question.endswith(after):
            return question[len(before) : len(question) - len(after)]
    return question


def test_the_split_is_the_same_everywhere_and_complete() -> None:
    every = [(question, answer) for question, answer, _ in worded_tasks(3, COUNT)]
    training, held_out = training_tasks(3, COUNT), held_out_tasks(3, COUNT)
    assert set(training) | set(held_out) == set(every)
    assert not {question for question, _ in training} & {question for question, _ in held_out}
    assert 0.03 < len([pair for pair in every if pair in set(held_out)]) / COUNT < 0.07
    assert held_out_tasks(3, COUNT) == held_out


def test_held_out_questions_are_new_and_their_facts_known() -> None:
    answer_of = {bare(question): answer for question, answer in training_tasks(tasks.SEED, tasks.TASKS)}
    held_out = held_out_tasks(tasks.SEED + 1, 60 * tasks.HELD_OUT)[: tasks.HELD_OUT]
    assert len(held_out) == tasks.HELD_OUT
    facts = [(bare(question), answer) for question, answer in held_out if is_fact(bare(question))]
    others = [bare(question) for question, _ in held_out if not is_fact(bare(question))]
    assert min(len(facts), len(others)) > 150
    assert [question for question, answer in facts if answer_of.get(question) != answer] == []
    assert [question for question in others if question in answer_of] == []


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("opposite of hot", True),
        ("3 plus 12", True),
        ("plural of mouse", True),
        ("kind of thing: pear", True),
        ("twelve in digits", True),
        ("colour of the red apple", False),
        ("count: cat cat cat", False),
        ("larger of 30 and 4", False),
        ("repeat: a plural of ideas", False),
    ],
)
def test_facts(question: str, expected: bool) -> None:
    assert is_fact(question) == expected


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The config of the embedded model on less data, for a smaller model and fewer steps."""
    monkeypatch.setattr(tasks, "CAPTIONS", 200)
    monkeypatch.setattr(tasks, "TASKS", 2_000)
    monkeypatch.setattr(tasks, "HELD_OUT", 20)
    # Its training takes seconds, and test_embedded_recipe has it.
    monkeypatch.setattr(tasks, "train_vocabulary", spiece_model)
    tasks.write(tmp_path / "data")
    recipe = Path(tasks.__file__).with_name("train.toml")
    (tmp_path / recipe.name).write_text(recipe.read_text())
    full = read_config(tmp_path / recipe.name)
    assert full.model.sizes == load_whole(EMBEDDED_MODEL, torch.float32, "cpu").model.config
    small = full.model.sizes.model_copy(
        update={"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1}
    )
    sections = tuple(section.model_copy(update={"rows": section.rows // 8}) for section in full.data)
    optimizer = full.optimizer.model_copy(update={"warmup": 5, "learning_rate": 0.01})
    model = full.model.model_copy(update={"sizes": small})
    changes = {"steps": 60, "log_every": 1, "model": model, "data": sections, "optimizer": optimizer}
    return full.model_copy(update=changes)


def test_the_recipe_learns(config: TrainConfig) -> None:
    trained = train(config)
    losses = [report.loss for report in trained.reports]
    assert len(losses) == 60
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]
    pairs = read_pairs(config.out.parent / "held-out.jsonl")
    assert len(pairs) == 20
    questions = [question for question, _ in pairs]
    given = answers(trained.file, questions)
    rows = [(question, answer, found) for (question, answer), found in zip(pairs, given, strict=True)]
    assert wrong_answers(trained.file, pairs) == [row for row in rows if row[1] != row[2]]
    # Nothing is wrong where the right answers are the model's own.
    assert wrong_answers(trained.file, list(zip(questions, given, strict=True))) == []


def test_the_model_in_the_package_answers_what_it_never_met() -> None:
    pairs = held_out_tasks(tasks.SEED + 1, 16_000)[:400]
    assert len(pairs) == 400
    assert len(wrong_answers(EMBEDDED_MODEL, pairs)) <= 20
