"""What `encode_prompt` of pipelines gives, and what of it their calls take in place of the prompts."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.facts.families.record import CallTakes


class EncodedPrompt(Mapping[str, Any]):
    """What a pipeline's call takes in place of the prompts: ``pipe(**encoded, height=1024, …)``.

    Attributes:
        outputs: all that the pipeline's ``encode_prompt`` gave, by name, in its order.
        cut_text: what the T5 has not seen of each prompt because it is too long; "" where it has seen all.
        negative_cut_text: the same of each negative prompt; empty where the T5 got none.
    """

    def __init__(
        self,
        outputs: dict[str, Any],
        cut_text: list[str],
        negative_cut_text: list[str],
        arguments: dict[str, Any],
        pipeline: str,
    ) -> None:
        self.outputs, self.cut_text, self.negative_cut_text = outputs, cut_text, negative_cut_text
        self._arguments, self._pipeline = arguments, pipeline

    def _taken(self) -> dict[str, Any]:
        if not self._arguments:
            raise ValueError(f"the call of {self._pipeline} takes no embeddings; what was encoded is in .outputs")
        return self._arguments

    def __getitem__(self, name: str) -> Any:
        return self._taken()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken())

    def __len__(self) -> int:
        return len(self._taken())

    def __repr__(self) -> str:
        return f"EncodedPrompt({', '.join(f'{name}={_told(value)}' for name, value in self._arguments.items())})"


def _told(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def call_arguments(pipe: Any, takes: CallTakes, given: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Embeddings and masks by the names that the pipeline's call has for them; empty if it takes none.

    None stands for a text that the call would assume by default, and then refuse beside the embeddings.

    Args:
        takes: what the record of its family says.
        given: the arguments of the pipeline's ``encode_prompt``.
        outputs: what that gave.
    """
    if takes == "nothing":
        return {}
    of_call = inspect.signature(pipe.__call__).parameters
    named = _as_the_call_has_them(takes, given, outputs)
    arguments = {name: value for name, value in named.items() if name in of_call and value is not None}
    for text in ("prompt", "negative_prompt"):
        replaced = any(name.startswith(f"{text}_embeds") for name in arguments)
        if replaced and text in of_call and of_call[text].default is not None:
            arguments[text] = None
    return arguments


def _as_the_call_has_them(takes: CallTakes, given: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    if takes == "halves" and given["do_classifier_free_guidance"]:
        halves = {name: value.chunk(2) for name, value in outputs.items()}
        negative = {f"negative_{name}": first for name, (first, _) in halves.items()}
        return negative | {name: second for name, (_, second) in halves.items()}
    if takes == "prompt-only":
        return {"prompt_embeds": outputs["prompt_embeds"]}
    if takes == "negative-text" and given.get("negative_prompt") is not None:
        texts = {name: given[name] for name in ("negative_prompt", "max_sequence_length")}
        return {"prompt_embeds": outputs["prompt_embeds"], **texts}
    return outputs


def join_chunks(parts: list[dict[str, Any]], length: int, of_others: Collection[str] = ()) -> dict[str, Any]:
    """The results of each chunk as those of one long prompt.

    Args:
        parts: by name: embeddings [batch, length, width], masks [batch, length], or ids [length, 3].
        length: of the T5's rows in a part. Rows of CLIP that precede them are taken from the first part.
        of_others: names of results that are not of the T5. They are those of the first part.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    joined = {}
    for name, value in first.items():
        if value is None or name in of_others:
            joined[name] = value
        elif name.endswith("text_ids"):
            joined[name] = torch.cat([part[name] for part in parts], dim=-2)
        elif name.endswith("mask"):
            joined[name] = torch.cat([part[name] for part in parts], dim=1)
        else:
            joined[name] = torch.cat([value, *(part[name][:, -length:] for part in parts[1:])], dim=1)
    return joined
