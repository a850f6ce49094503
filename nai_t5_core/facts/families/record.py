"""The record of a diffusion model family: all that any front end needs to know of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nai_t5_core.facts.padding import PaddingPolicy, PadTo
from nai_t5_core.facts.text_cleaning import TextCleaning

MaskDtype = Literal["bool", "int64", "float"]
Runs = Literal["once", "negative-apart", "by-encoder"]
TokenizerLimit = Literal["unread", "is-the-length", "cuts-the-length"]
CallTakes = Literal["results", "nothing", "prompt-only", "negative-text", "halves", "unprojected"]


@dataclass(frozen=True, kw_only=True)
class Diffusers:
    """How the pipelines of a family use its T5, which is needed to encode all prompts of a call in one pass beforehand.

    Attributes:
        pipelines: their class names.
        outputs: the names of the results of `encode_prompt`, in order.
        of_others: those of the outputs that do not come from the T5. If a long prompt is encoded in pieces, they are
            computed from the whole prompt.
        runs: how often a call of the pipeline runs `encode_prompt`. `once`; `negative-apart`: a second time for the
            negative prompt, which `encode_prompt` itself does not take; `by-encoder`: once for each text encoder, which
            `text_encoder_index` chooses.
        zeros_without_negative: whether the negative embeddings are zeros if no negative prompt is given; else the T5
            encodes "".
        prompt_argument: the name of the prompt's argument of `encode_prompt`.
        composed: a template for the text that the T5 gets; a name in braces stands for the argument `<name>_prompt`.
            Empty where the text is the prompt.
        one_by_one: whether each prompt is encoded alone and without pads.
        tokenizer_limit: how the pipelines use the tokenizer's greatest length: `unread`: not at all;
            `is-the-length`: as the length of the rows; `cuts-the-length`: as an upper limit of the requested length.
        not_predicted: why words cannot be given weights, and prompts cannot be encoded in one pass beforehand: the ids
            that the T5 will get cannot be predicted, or hidden states of several layers are read. Empty where they can.
        one_chunk: why a prompt cannot be longer than one piece; empty where it can.
        call_takes: what a call of the pipeline takes in place of the prompts. `results`: results of `encode_prompt`.
            `nothing`: it always encodes the texts itself. `prompt-only`: the embeddings of the prompt; the negative
            prompt is always the empty text, and would have to be as long. `negative-text`: embeddings of the prompt,
            but the negative prompt as text, since it makes zeros of negative embeddings. `halves`: the batch of
            negative and positive prompts, split in two. `unprojected`: the T5's own hidden states, which the call
            projects itself.
    """

    pipelines: tuple[str, ...]
    outputs: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")
    of_others: tuple[str, ...] = ()
    runs: Runs = "once"
    zeros_without_negative: bool = False
    prompt_argument: str = "prompt"
    composed: str = ""
    one_by_one: bool = False
    tokenizer_limit: TokenizerLimit = "unread"
    not_predicted: str = ""
    one_chunk: str = ""
    call_takes: CallTakes = "results"


@dataclass(frozen=True, kw_only=True)
class ComfyAlone:
    """ComfyUI's own classes for a family whose only text encoder is a T5; several families may share them.

    The classes are given by name and not imported, since an older ComfyUI may lack some.

    Attributes:
        name: the choice in the nodes.
        title: the common name of the models.
        module, model, tokenizer: the module, and the names in it of the model's class (or a function that makes it) and
            of the tokenizer's class.
        slot: the name of the T5 in ComfyUI's model, which is also the key of its tokens.
        config_key: the model option by which ComfyUI takes other sizes; empty where its name follows from the slot's.
    """

    name: str
    title: str
    module: str
    model: str
    tokenizer: str
    slot: str = "t5xxl"
    config_key: str = ""


@dataclass(frozen=True, kw_only=True)
class ComfyJoint:
    """A family that ComfyUI gives further text encoders beside the T5.

    Attributes:
        name: the choice in the nodes, which is ComfyUI's CLIP type in lower case.
        title: the common name of the models.
        files: the possible numbers of files. From another number ComfyUI would recognise another family.
    """

    name: str
    title: str
    files: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Trainers:
    """How trainers keep the family's embeddings on disk, see :mod:`nai_t5_core.datasets.exports`.

    Attributes:
        names: what a trainer calls the family, by the name of the trainer's format. Where a format is not among them,
            the trainer has no such file for the family, or one of which nobody has verified that it is read.
        clips: text encoders of CLIP whose embeddings are kept as well.
        mask: SimpleTuner's name for the mask; empty where it keeps none.
        mask_has_batch: whether SimpleTuner keeps it as [1, length] and not as [length].
        position_ids: SimpleTuner's name for the zeros that it keeps as the text's positions; empty where it keeps none.
    """

    names: Mapping[str, str]
    clips: int = 0
    mask: str = "attention_masks"
    mask_has_batch: bool = True
    position_ids: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one diffusion model family uses its T5.

    Attributes:
        name: the family's name, in kebab-case.
        title: the name as it is usually written.
        aliases: other names that `family` takes.
        checkpoint: the hub id of the T5 that the family's encoder is, or was made from.
        max_length: tokens per prompt, end token included, that `encode_prompt` asks for by default.
        call_length: tokens per prompt that a call of the whole pipeline asks for, if another number; else None.
        length_limit: the greatest length that the pipeline takes; None where it sets no limit.
        pad_to: the length of the result's rows: `max_length`, the `longest` prompt's, or `none`: each its own.
        encoder_mask: whether the pad mask is given to the encoder.
        padding: the policy with the least work that leaves every row that the diffusion model reads as it is.
            `attend`: pads are ordinary tokens. `exact`: pads are masked as keys, but their rows are computed.
            `skip`: pad rows come back as zeros. `trim`: there are no pad rows.
        extra_pad: pad positions after the text that the returned mask counts as text.
        mask_dtype: the dtype of the mask that `encode_prompt` returns, or None if it returns no mask.
        text_cleaning: how the text is cleaned first; see `text_cleaning.clean_text`.
        reason: why this padding policy.
        notes: what else a caller has to know to get the pipeline's results.
        diffusers: how its diffusers pipelines use the T5; None where diffusers has no pipeline.
        comfy: its classes in ComfyUI; None where the nodes do not offer the family.
        trainers: how trainers keep its embeddings; None where caption sets are not exported for it.
    """

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    checkpoint: str
    max_length: int
    call_length: int | None = None
    length_limit: int | None = None
    pad_to: PadTo = "max_length"
    encoder_mask: bool = True
    padding: PaddingPolicy
    extra_pad: int = 0
    mask_dtype: MaskDtype | None = None
    text_cleaning: TextCleaning = "none"
    reason: str
    notes: str = ""
    diffusers: Diffusers | None = None
    comfy: ComfyAlone | ComfyJoint | None = None
    trainers: Trainers | None = None

    @property
    def returns_mask(self) -> bool:
        """Whether `encode_prompt` returns a mask beside the embeddings."""
        return self.mask_dtype is not None

    @property
    def pipelines(self) -> tuple[str, ...]:
        """Class names of its diffusers pipelines; empty where diffusers has none."""
        return self.diffusers.pipelines if self.diffusers else ()
