"""Slips in numbers and choices are refused with what is allowed, before anything is made because of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hostile import in_little

from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.weights.load import load_encoder


@cache
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)


def encode(prompts: Any = ("a cat",), **options: Any) -> Any:
    return encoder().encode(list(prompts), **options)


SLIPS: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"{name}={value!r}": (
            lambda name=name, value=value: encode(**{name: value}),
            f"{name}={value!r}; it must be {told}",
        )
        for name in ("max_length", "extra_pad")
        for value, told in (
            *((odd, "a whole number, 0 or more") for odd in (1.5, "5", True, float("nan"), b"4")),
            (-3, "0 or more"),
        )
    },
    "extra_pad beyond any row": (
        lambda: encode(padding="skip", extra_pad=10**7),
        "extra_pad=10000000; it must be at most 8,192",
    ),
    "a slip in pad_to": (
        lambda: encode(max_length=8, pad_to="max-length"),
        "unknown pad_to 'max-length'; allowed: max_length, longest, none",
    ),
    "a slip in pad_to, with a family": (
        lambda: encode(family="flux", pad_to="max-length"),
        "unknown pad_to 'max-length'; allowed: max_length, longest, none",
    ),
    "pad_to of another type": (lambda: encode(max_length=8, pad_to=8), "unknown pad_to 8; allowed: max_length"),
    "empty padding": (lambda: encode(padding=""), "unknown padding policy ''; allowed: attend, exact, skip, trim"),
    "padding of another type": (lambda: encode(padding=["skip"]), r"unknown padding policy \['skip'\]; allowed"),
    "padding beyond any row": (
        lambda: encode(max_length=10**9, pad_to="max_length"),
        "pad_to='max_length' with max_length=1,000,000,000: no row of more than 8,192 tokens is computed; give a sm",
    ),
    "max_length of another type, with a family": (
        lambda: encode(family="flux", max_length="5"),
        "max_length='5'; it must be a whole number, 0 or more",
    ),
    "100,000 characters": (
        lambda: encode(["cat " * 25_000]),
        "prompt 0 has 25,001 tokens, and at most 8,192 are computed together, .*; give max_length to cut it, or parts",
    ),
    "100,000 characters, and a limit beyond them": (
        lambda: encode(["a", "cat " * 25_000], max_length=10**9),
        "prompt 1 has 25,001 tokens, and at most 8,192",
    ),
    **{
        f"token_budget={value!r}": (
            lambda value=value: TextEncoder(encoder().stack, encoder().tokenizer, token_budget=value),
            f"token_budget={value!r}; it must be a whole number, 1 or more",
        )
        for value in (float("nan"), 1.5, "5", True, None)
    },
    **{
        f"tokenizer, {name}={value!r}": (
            lambda name=name, value=value: encoder().tokenizer(["a"], **{name: value}),
            f"{name}={value!r}; it must be a whole number, 0 or more",
        )
        for name in ("max_length", "pad_to")
        for value in (1.5, True, float("nan"), b"4")
    },
    "tokenizer, max_length in quotes": (
        lambda: encoder().tokenizer(["a"], max_length="5"),
        "max_length='5'; it must be a whole number, 0 or more",
    ),
    "tokenizer, a slip in pad_to": (
        lambda: encoder().tokenizer(["a"], 8, pad_to="max_length"),
        "pad_to='max_length' is neither a number of tokens nor 'longest' nor None",
    ),
    "tokenizer, padding beyond any row": (
        lambda: encoder().tokenizer(["a"], pad_to=10**9),
        "pad_to=1000000000; it must be at most 8,192",
    ),
    "a slip in attention": (
        lambda: load_encoder(attention="Flex"),  # type: ignore[arg-type]
        "unknown attention 'Flex'; allowed: auto, flex, sdpa",
    ),
    "a slip in output_device": (lambda: encode(output_device="gpu"), "device 'gpu' cannot be used here"),
    "truncate in quotes": (lambda: encode(truncate="no"), "truncate='no'; allowed: True, False"),
    "family of another type": (lambda: encode(family=7), "Unknown family 7; known: "),
}


@pytest.mark.parametrize("case", SLIPS)
def test_slip(case: str) -> None:
    call, expected = SLIPS[case]
    encoder()
    with in_little(), pytest.raises(ValueError, match=expected):
        call()


def test_a_long_prompt_with_a_limit() -> None:
    """What is cut away costs the time of its tokens, and no more."""
    out = encode(["cat " * 25_000], max_length=16)
    assert out.token_counts == [16] and out.truncated == [True] and len(out.cut_text[0]) > 99_000


@pytest.mark.parametrize("number", [np.int64(16), torch.tensor(16)])
def test_whole_numbers_of_other_libraries(number: Any) -> None:
    assert encode(["cat " * 50], max_length=number).hidden_states.shape[1] == 16
    assert encode(["cat"], max_length=number, pad_to="max_length").hidden_states.shape[1] == 16
