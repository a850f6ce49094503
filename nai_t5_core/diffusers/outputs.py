"""What `encode_prompt` of each family's pipelines gives, and what of it their calls take in place of the prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PAIR = "prompt_embeds negative_prompt_embeds"
_WITH_MASKS = "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask"
_GLYPHS = "prompt_embeds prompt_embeds_mask prompt_embeds_2 prompt_embeds_mask_2"

# The names of the results, in order.
OUTPUTS = {
    "allegro": _WITH_MASKS,
    "audioldm2": "prompt_embeds attention_mask generated_prompt_embeds",
    "auraflow": _WITH_MASKS,
    "bria": f"{_PAIR} text_ids",
    "chroma": "prompt_embeds text_ids prompt_attention_mask "
    "negative_prompt_embeds negative_text_ids negative_prompt_attention_mask",
    "cogvideox": _PAIR,
    "cogview3plus": _PAIR,
    "cosmos": _PAIR,
    "deepfloyd-if": _PAIR,
    "flux": "prompt_embeds pooled_prompt_embeds text_ids",
    "glm-image": _PAIR,
    "helios": _PAIR,
    "hidream": "prompt_embeds_t5 negative_prompt_embeds_t5 prompt_embeds_llama3 negative_prompt_embeds_llama3 "
    "pooled_prompt_embeds negative_pooled_prompt_embeds",
    "hunyuandit": f"{_PAIR} prompt_attention_mask negative_prompt_attention_mask",
    "hunyuanimage": _GLYPHS,
    "hunyuanvideo-1.5": _GLYPHS,
    "kandinsky3": f"{_PAIR} attention_mask negative_attention_mask",
    "latte": _PAIR,
    "longcat-audiodit": "prompt_embeds lengths",
    "ltx-condition": _WITH_MASKS,
    "ltx-video": _WITH_MASKS,
    "mochi": _WITH_MASKS,
    "pixart-alpha": _WITH_MASKS,
    "pixart-sigma": _WITH_MASKS,
    "sd3": f"{_PAIR} pooled_prompt_embeds negative_pooled_prompt_embeds",
    "stable-audio": "prompt_embeds",
    "visualcloze": "prompt_embeds pooled_prompt_embeds text_ids",
    "wan": _PAIR,
}
# Not of the T5, so that they are those of the whole prompt however many chunks it has.
_OF_OTHERS = ("pooled_prompt_embeds", "prompt_embeds_llama3")
# Their calls make embeddings from the texts, whatever else they are given.
_WITHOUT_EMBEDDINGS = ("longcat-audiodit", "visualcloze")


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


def call_arguments(pipe: Any, family: str, given: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Embeddings and masks by the names that the pipeline's call has for them; empty if it takes none.

    None stands for a text that the call would assume by default, and then refuse beside the embeddings.

    Args:
        given: the arguments of the pipeline's ``encode_prompt``.
        outputs: what that gave.
    """
    if family in _WITHOUT_EMBEDDINGS:
        return {}
    taken = inspect.signature(pipe.__call__).parameters
    named = _as_the_call_has_them(family, given, outputs)
    arguments = {name: value for name, value in named.items() if name in taken and value is not None}
    for text in ("prompt", "negative_prompt"):
        replaced = any(name.startswith(f"{text}_embeds") for name in arguments)
        if replaced and text in taken and taken[text].default is not None:
            arguments[text] = None
    return arguments


def _as_the_call_has_them(family: str, given: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    if family == "audioldm2" and given["do_classifier_free_guidance"]:  # one batch, the negative half first
        halves = {name: value.chunk(2) for name, value in outputs.items()}
        negative = {f"negative_{name}": first for name, (first, _) in halves.items()}
        return negative | {name: second for name, (_, second) in halves.items()}
    if family == "glm-image":  # its negative is always the empty text, and would have to be as long as the other
        return {"prompt_embeds": outputs["prompt_embeds"]}
    if family == "cogview3plus" and given.get("negative_prompt") is not None:  # gives zeros unless it has the text
        texts = {name: given[name] for name in ("negative_prompt", "max_sequence_length")}
        return {"prompt_embeds": outputs["prompt_embeds"], **texts}
    return outputs


def join_chunks(parts: list[dict[str, Any]], length: int) -> dict[str, Any]:
    """The results of each chunk as those of one long prompt.

    Args:
        parts: by name: embeddings [batch, length, width], masks [batch, length], or ids [length, 3].
        length: of the T5's rows in a part. Rows of CLIP that precede them are taken from the first part.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    joined = {}
    for name, value in first.items():
        if value is None or name.endswith(_OF_OTHERS):
            joined[name] = value
        elif name.endswith("text_ids"):
            joined[name] = torch.cat([part[name] for part in parts], dim=-2)
        elif name.endswith("mask"):
            joined[name] = torch.cat([part[name] for part in parts], dim=1)
        else:
            joined[name] = torch.cat([value, *(part[name][:, -length:] for part in parts[1:])], dim=1)
    return joined
