"""What stands in quotes is what the reference's regular expressions find, in a time that grows with the text alone."""

from __future__ import annotations

import html
import re
from itertools import product

import ftfy
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
    """Each was looked at again from every place before it: seven seconds and more for this many."""
    with in_little():
        clean_text(text * (50_000 // len(text)), kind)  # type: ignore[arg-type]


ASCII = "".join(map(chr, range(128)))


def as_wan_does(text: str) -> str:
    """As its pipeline has it."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(st.text(alphabet=ASCII, max_size=40), st.text(max_size=40)))
def test_wan_cleans_as_its_pipeline_does(text: str) -> None:
    assert clean_text(text, "wan") == as_wan_does(text)


@pytest.mark.parametrize("kind", ["alone", "pairs", "within words", "as entities"])
def test_no_text_that_needs_repair_goes_without(kind: str) -> None:
    """Printable ASCII is passed by; every character of it, and every pair, is one that ftfy leaves alone."""
    texts = {
        "alone": list(ASCII),
        "pairs": [one + other for one, other in product(ASCII, repeat=2)],
        "within words": [f"a fox{sign}{sign}  hill" for sign in ASCII],
        "as entities": [f"a {begin}{name}; b" for begin in ("&", "&amp;", "&#", "<&") for name in ("lt", "38", "x41")],
    }[kind]
    assert [clean_text(text, "wan") for text in texts] == [as_wan_does(text) for text in texts]
