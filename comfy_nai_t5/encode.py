"""Text to conditioning through any CLIP with a T5, with what the stock node does not tell: counts, and what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.facts.padding import LONGEST_ROW

# How ComfyUI names the tokens of a T5 beside those of other encoders.
T5_TOKENS = ("t5xxl", "umt5xxl", "umt5base", "pile_t5xl", "t5base", "mt5xl", "byt5", "t5")
# A token or an embedding, and its weight.
Pair = tuple[int | Tensor, float]
# Where ComfyUI's tokenizers begin to mean that they have no limit.
_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class Tokens:
    """The tokens of one text.

    Attributes:
        all: what ComfyUI's encoder takes, for every encoder of the CLIP.
        count: tokens of the T5 with the end token and without padding, before anything was cut.
        rows: rows that the T5 gives, padding included.
        over: tokens that were cut off.
        cut_text: what was cut off, as the tokenizer spells it; "" where nothing was.
    """

    all: dict[str, Any]
    count: int
    rows: int
    over: int
    cut_text: str


def tokenize(clip: Any, text: str, max_length: int = 0, pad_to: int = 0) -> Tokens:
    """The tokens of a text, with those of the T5 cut and padded as asked for.

    Args:
        clip: ComfyUI's CLIP, ours or not.
        max_length: the most tokens of the T5, end token included; 0: none but that of the family, as in ComfyUI.
        pad_to: the fewest rows of the T5; 0: as the family has it.

    Raises:
        ValueError: there is no T5 in the CLIP.
    """
    tokens = clip.tokenize(text)
    name = next((name for name in T5_TOKENS if name in tokens), None)
    if name is None:
        raise ValueError(f"this CLIP gives tokens for {', '.join(tokens)}, and none for a T5; connect one with a T5")
    tokenizer = _tokenizer(clip, name)
    pairs: list[Pair] = list(tokens[name][0])
    count = _without_padding(pairs, tokenizer)
    kept, cut = pairs[:count], _beyond(tokenizer, text)
    if max_length and count > max_length:
        kept, cut = [*pairs[: max_length - 1], (tokenizer.end_token, 1.0)], pairs[max_length - 1 : count - 1] + cut
    # The family's least is what it makes of the empty text.
    rows = pad_to or (len(clip.tokenize("")[name][0]) if len(kept) < count else len(pairs))
    padded = kept + [(tokenizer.pad_token, 1.0)] * (rows - len(kept))
    return Tokens({**tokens, name: [padded]}, len(kept) + len(cut), len(padded), len(cut), _text_of(cut, tokenizer))


def _beyond(tokenizer: Any, text: str) -> list[Pair]:
    """The tokens of a text that the family itself leaves out: HiDream takes the first of several windows."""
    if getattr(tokenizer, "max_length", _NO_LIMIT) >= _NO_LIMIT:
        return []
    _, *windows = tokenizer.tokenize_with_weights(text)
    return [pair for window in windows for pair in window[: _without_padding(window, tokenizer) - 1]]


def refuse_endless(rows: int) -> None:
    """Refuses a prompt of so many tokens that nobody would wait for its end."""
    if rows > LONGEST_ROW:
        raise ValueError(
            f"the prompt has {rows:,} tokens, and {LONGEST_ROW:,} are the most that are computed together; shorten it, "
            "or set max_length in the node T5 Encode"
        )


def encode(clip: Any, text: str, max_length: int = 0, pad_to: int = 0) -> tuple[list[Any], Tokens]:
    """The conditioning of one text, as ComfyUI's nodes pass it on, and its tokens; arguments of :func:`tokenize`."""
    tokens = tokenize(clip, text, max_length, pad_to)
    refuse_endless(tokens.rows)
    return clip.encode_from_tokens_scheduled(tokens.all), tokens


def encode_lines(
    clip: Any, texts: Sequence[str], max_length: int = 0, pad_to: int = 0
) -> tuple[list[Any], list[Tokens]]:
    """One conditioning that holds a batch, an entry for each text, all padded to the longest.

    Raises:
        ValueError: no texts, or the CLIP has a schedule, which gives several conditionings for each text.
    """
    if not texts:
        raise ValueError("there is no line of text; write at least one")
    rows = max(tokenize(clip, text, max_length, pad_to).rows for text in texts)
    encoded = [encode(clip, text, max_length, rows) for text in texts]
    if any(len(conditioning) != 1 for conditioning, _ in encoded):
        raise ValueError("a CLIP with scheduled hooks gives several conditionings for a text; encode the lines singly")
    states, extras = zip(*(conditioning[0] for conditioning, _ in encoded), strict=True)
    merged = {key: _joined([extra[key] for extra in extras]) for key in extras[0]}
    return [[torch.cat(states), merged]], [tokens for _, tokens in encoded]


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if all(isinstance(value, Tensor) for value in values) else values[0]


def embedding_widths(tokens: dict[str, Any]) -> set[int]:
    """The widths of all embeddings among the tokens of a T5."""
    pairs = (pair for name in T5_TOKENS for window in tokens.get(name, ()) for pair in window)
    return {token.shape[-1] for token, *_ in pairs if isinstance(token, Tensor)}


def _tokenizer(clip: Any, name: str) -> Any:
    """The tokenizer of the T5 inside that of the CLIP, which goes by either of two names."""
    return getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}")


def _without_padding(pairs: Sequence[Pair], tokenizer: Any) -> int:
    """The number of tokens up to the last that is no padding."""
    count = len(pairs)
    while count > 1 and isinstance(pairs[count - 1][0], int) and pairs[count - 1][0] == tokenizer.pad_token:
        count -= 1
    return count


def _text_of(pairs: Sequence[Pair], tokenizer: Any) -> str:
    ids = [int(token) for token, *_ in pairs if not isinstance(token, Tensor)]
    if not ids:
        return ""
    inner = tokenizer.tokenizer  # an older server's tokenizers cannot decode, but what they wrap can
    decoder = inner if hasattr(inner, "decode") else inner.tokenizer
    return str(decoder.decode(ids))
