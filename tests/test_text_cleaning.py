"""What stands in quotes is what the reference's regular expressions find, in a time that grows with the text alone."""

from __future__ import annotations

import re

import pytest
from hostile import in_little
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_t5_core.facts.text_cleaning import clean_text

TEXTS = st.text(alphabet="ab'\"‘’“”\n", max_size=16)


def glyphs(parts: list[str]) -> str:
    return "".join(f'Text "{part}". ' for part in parts)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_quotes_are_those_of_the_reference(text: str) -> None:
    one_after_the_other = [part for a, b in ("''", '""', "‘’", "“”") for part in re.findall(f"{a}(.*?){b}", text)]
    assert clean_text(text, "quoted") == glyphs(one_after_the_other)
    together = [straight or curly for straight, curly in re.findall('"(.*?)"|“(.*?)”', text)]
    assert clean_text(text, "double-quoted") == glyphs(list(dict.fromkeys(together)))


@pytest.mark.parametrize("kind", ["quoted", "double-quoted"])
@pytest.mark.parametrize("text", ["‘", "“", "“‘", "‘’", '"“'])
def test_quotes_without_an_end(kind: str, text: str) -> None:
    """Each was looked at again from every place before it: a minute for this many."""
    with in_little():
        clean_text(text * (100_000 // len(text)), kind)  # type: ignore[arg-type]
