"""A Markdown table of how near our encoder is to theirs in each family's pipeline. Run by hand:

    python tests/diffusers_parity.py [--family wan]

For every tiny pipeline of `toy_pipelines`, on six prompts and more: the results of `encode_prompt`, every row computed,
and the image of two steps with the policy of the family.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from diffusers.utils import logging
from test_diffusers_families import prompts_for
from torch import Tensor
from toy_pipelines import TOYS, make

from nai_t5_core.diffusers.adapter import replace_text_encoder
from nai_t5_core.diffusers.encode_prompt import encode_prompt


def main(family: Annotated[list[str] | None, typer.Option(help="all, if none is given")] = None) -> None:
    """Prints the table."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    print("| family | `encode_prompt` | masks | image | policy |\n|---|---|---|---|---|")
    for name in family or TOYS:
        print(row(name), flush=True)


def row(name: str) -> str:
    """Largest difference over the largest value, of embeddings and of the image; whether all else is equal."""
    toy = make(name)
    prompts = prompts_for(toy)
    expected, image = [toy.encode_prompt(prompt) for prompt in prompts], toy.run()
    replace_text_encoder(toy.pipe, padding="exact")
    worst, equal, masks = 0.0, True, 0
    for prompt, outputs in zip(prompts, expected, strict=True):
        encoded = encode_prompt(toy.pipe, **toy.encode_arguments(prompt)).outputs
        for (output, ours), theirs in zip(encoded.items(), outputs, strict=True):
            for one, other in zip(tensors(ours), tensors(theirs), strict=True):
                if "mask" in output or not other.is_floating_point():
                    masks += 1
                    equal &= torch.equal(one, other)
                else:
                    worst = max(worst, difference(one, other))
    replace_text_encoder(toy.pipe)
    told = "none" if not masks else "equal" if equal else "differ"
    return f"| {name} | {worst:.1e} | {told} | {difference(toy.run(), image):.1e} | `{toy.encoder.padding}` |"


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value


def difference(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel() or not theirs.any():
        return float(ours.abs().max()) if ours.numel() else 0.0
    return float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    typer.run(main)
