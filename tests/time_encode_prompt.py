"""Time of `encode_prompt` against the pipeline's own, with a random T5 of real size. Run by hand:

    python tests/time_encode_prompt.py --family pixart-sigma --dtype bfloat16

The pipelines are the real classes with tiny denoisers, which have no part in it. Both take turns in one process.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import torch
import typer
from diffusers.utils import logging
from toy_pipelines import make, text_encoder

from nai_t5_core.diffusers.adapter import padding_for
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.diffusers.encode_prompt import encode_prompt
from nai_t5_core.facts.config import named_config
from nai_t5_core.facts.families import family as family_named

PROMPT = "a red fox on a green hill under an old tree, two dogs and a blue bird in the morning light"
NEGATIVE = "blurred, dark, low quality, a bad hand, text and watermark"


@torch.no_grad()
def main(
    family: Annotated[list[str] | None, typer.Option(help="such as pixart-sigma, mochi, allegro or wan")] = None,
    size: Annotated[str, typer.Option(help="the sizes of a published T5")] = "t5-v1_1-large",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rounds: int = 3,
    threads: int = 2,
) -> None:
    """Prints a row of a Markdown table for each family: medians, and how many times faster, as median of the rounds."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    print(f"{threads} threads, {size}, {dtype}")
    head = ["family", "length", "theirs", "tokens", "ours", "ratio", "tokens", "ours", "ratio"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in family or ["pixart-sigma"]:
        print(row(name, size, getattr(torch, dtype), rounds), flush=True)


def row(name: str, size: str, dtype: torch.dtype, rounds: int) -> str:
    """One line of the table.

    Args:
        name: of a family whose pipeline has one text encoder.
        size: a name that :func:`nai_t5_core.facts.config.named_config` knows.
    """
    their_toy, our_toy = make(name), make(name)
    their_toy.encoder, our_toy.encoder = encoders(size, their_toy.encoder.config.model_type == "umt5", dtype)
    our_toy.encoder.padding = padding_for(our_toy.pipe).padding
    facts = family_named(name)
    options: dict[str, Any] = {"max_sequence_length": facts.call_length or facts.max_length}
    calls: list[Callable[[], Any]] = [
        # The pads make every negative prompt equally long for theirs.
        lambda: their_toy.pipe.encode_prompt(PROMPT, negative_prompt="", **options),
        lambda: encode_prompt(our_toy.pipe, PROMPT, negative_prompt="", **options),
        lambda: encode_prompt(our_toy.pipe, PROMPT, negative_prompt=NEGATIVE, **options),
    ]
    seconds = [[clocked(call) for call in calls] for _ in range(rounds + 1)][1:]  # the first does not count
    cells = [f"{statistics.median(each[0] for each in seconds):.2f} s"]
    for place, negative in ((1, ""), (2, NEGATIVE)):
        tokens = " + ".join(str(len(their_toy.tokenizer(text).input_ids)) for text in (PROMPT, negative))
        ours = statistics.median(each[place] for each in seconds)
        ratio = statistics.median(each[0] / each[place] for each in seconds)
        cells += [tokens, f"{ours:.2f} s", f"{ratio:.1f}"]
    return f"| {name} | {options['max_sequence_length']} | {' | '.join(cells)} |"


@cache
def encoders(size: str, per_layer: bool, dtype: torch.dtype) -> tuple[Any, NAIT5EncoderModel]:
    """A random encoder of transformers of a published size, and ours of the same weights."""
    config = named_config(size).encoder_only().model_copy(update={"bias_per_layer": per_layer})
    theirs = text_encoder(config).to(dtype)
    return theirs, NAIT5EncoderModel.from_hf(theirs)


def clocked(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
