"""T5's denoising objective against its definition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_t5_core.training.span_corruption import corrupt, span_lengths

SENTINELS = np.arange(9_999, 9_899, -1)


@given(
    length=st.integers(2, 600),
    density=st.floats(0.02, 0.9),
    mean_span=st.floats(1, 10),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_and_sentinels_are_in_order(length: int, density: float, mean_span: float, seed: int) -> None:
    tokens = np.arange(length)
    marks = np.arange(10_000, 9_000, -1)
    inputs, targets = corrupt(tokens, marks, density, mean_span, np.random.default_rng(seed))
    in_inputs, in_targets = inputs[inputs > length], targets[targets > length]
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise + 1)
    assert in_inputs.tolist() == in_targets.tolist() == marks[:spans].tolist()
    assert len(targets) == noise + spans and len(inputs) == length - noise + spans
    # Each span back in the place of its sentinel gives the text; none is empty, and none touches another.
    starts = np.flatnonzero(targets > length)
    contents = dict(zip(in_targets.tolist(), np.split(targets, starts)[1:], strict=True))
    assert min(len(content) for content in contents.values()) > 1
    restored = [token for mark in inputs.tolist() for token in (contents[mark][1:] if mark in contents else [mark])]
    assert restored == tokens.tolist()
    places = np.flatnonzero(inputs > length)
    assert (np.diff(places) > 1).all()


def test_fifteen_percent_in_spans_of_three() -> None:
    kept, noise = span_lengths(512, 0.15, 3.0, np.random.default_rng(0))
    assert (noise.sum(), kept.sum(), len(noise), len(kept)) == (77, 435, 26, 27)


def test_every_division_into_spans_is_equally_likely() -> None:
    random = np.random.default_rng(0)
    # 5 noise tokens in 2 spans: four ways.
    counts = Counter(tuple(span_lengths(10, 0.5, 2.5, random)[1].tolist()) for _ in range(4000))
    assert set(counts) == {(1, 4), (2, 3), (3, 2), (4, 1)}
    # Beyond five standard deviations.
    assert all(abs(count - 1000) < 140 for count in counts.values())


def test_a_span_of_a_short_text_lies_anywhere() -> None:
    random = np.random.default_rng(0)
    # One span of 2 in 8 tokens: seven places.
    counts = Counter(int(span_lengths(8, 0.25, 2.0, random)[0][0]) for _ in range(7000))
    assert set(counts) == set(range(7)) and all(abs(count - 1000) < 150 for count in counts.values())


def test_texts_that_cannot_be_corrupted() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match="a text of 1 tokens cannot be corrupted"):
        corrupt(np.arange(1), SENTINELS, 0.15, 3.0, random)
    with pytest.raises(ValueError, match="has 150 noise spans, and the vocabulary 100 sentinels"):
        corrupt(np.arange(1000), SENTINELS, 0.15, 1.0, random)
