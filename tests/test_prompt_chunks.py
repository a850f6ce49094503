"""Prompts split into pieces that fit."""

from __future__ import annotations

from typing import Any

from nai_t5_core.diffusers.prompt_chunks import split_text


def short(most: int) -> Any:
    return lambda text: len(text) <= most


def test_pieces_are_as_long_as_fits_and_end_between_words() -> None:
    assert split_text("one two three four", short(9), 9) == ["one two", "three", "four"]
    assert split_text("one two", short(9), 9) == ["one two"]
    assert split_text("", short(9), 9) == [""]
    assert split_text(" one  two\nthree ", short(5), 9) == [" one", "two", "three"]


def test_no_more_pieces_than_asked_for() -> None:
    assert split_text("one two three four", short(3), 1) == ["one two three four"]
    assert split_text("one two three four", short(3), 2) == ["one", "two three four"]


def test_a_word_that_is_too_long_is_torn() -> None:
    assert split_text("abcdefgh ij", short(3), 9) == ["abc", "def", "gh", "ij"]
    assert split_text("abc", short(0), 3) == ["abc"]


def test_words_that_belong_together_stay_so() -> None:
    assert split_text("a red fox", short(6), 9) == ["a red", "fox"]
    assert split_text("a Red fox", short(8), 9, ["red fox"]) == ["a", "Red fox"]
    assert split_text("red foxes run", short(9), 9, ["red fox"]) == ["red foxes", "run"]
    assert split_text("a red fox", short(5), 9, ["red fox"]) == ["a", "red f", "ox"], "longer than a piece may be"
