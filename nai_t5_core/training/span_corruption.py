"""T5's denoising objective: spans of a text are taken out, and the model writes what was in them.

Of n tokens, round(n · density) are noise, in round(noise / mean span) spans between which there is text. In the inputs
every span is one sentinel; the targets are the same sentinels, each followed by the tokens it stands for. The text
begins with what is kept and ends with noise, as in the published training (Raffel et al., 2020, section 3.1.4).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def span_lengths(length: int, density: float, mean_span: float, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Lengths of the kept pieces and of the noise spans behind each: two arrays [spans] of numbers from 1 on.

    Raises:
        ValueError: fewer than 2 tokens, of which one is kept and one is noise.
    """
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be corrupted; it needs 2 at least")
    noise = min(max(round(length * density), 1), length - 1)
    kept = length - noise
    spans = min(max(round(noise / mean_span), 1), noise, kept)
    return _composition(kept, spans, random), _composition(noise, spans, random)


def _composition(total: int, parts: int, random: np.random.Generator) -> Ids:
    """``total`` as a sum of ``parts`` numbers from 1 on; every such sum is as likely as the others."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total]))).astype(np.int64)


def corrupt(
    tokens: Ids, sentinels: Ids, density: float, mean_span: float, random: np.random.Generator
) -> tuple[Ids, Ids]:
    """A text to inputs and targets, both without an end token.

    Args:
        tokens: [length] ids without an end token.
        sentinels: ids of the sentinels in the order of their use.
        density: the share of tokens that is noise.
        mean_span: the mean length of a noise span.
        random: draws where the spans lie.

    Returns:
        Inputs [kept + spans] and targets [noise + spans].

    Raises:
        ValueError: fewer than 2 tokens, or more spans than there are sentinels.
    """
    kept, noise = span_lengths(len(tokens), density, mean_span, random)
    if len(kept) > len(sentinels):
        raise ValueError(
            f"a text of {len(tokens)} tokens has {len(kept)} noise spans, and the vocabulary {len(sentinels)} "
            "sentinels; use shorter texts (max_length) or longer spans (mean_span)"
        )
    # Kept and noise take turns; the pieces begin at the running sum of both.
    ends = np.cumsum(np.stack([kept, noise], axis=1).ravel())[:-1]
    pieces = np.split(tokens, ends)
    marks = sentinels[: len(kept), None]
    inputs = [part for pair in zip(pieces[0::2], marks, strict=True) for part in pair]
    targets = [part for pair in zip(marks, pieces[1::2], strict=True) for part in pair]
    return np.concatenate(inputs), np.concatenate(targets)
