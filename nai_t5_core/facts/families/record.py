"""The record of a diffusion model family: all that any front end needs to know of it."""

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
    """How the pipelines of a family use its T5, so that all of it can be encoded in one pass before.

    Attributes:
        pipelines: their class names.
        outputs: the names of what `encode_prompt` gives, in order.
        of_others: those of them that are not of the T5, so that they are those of the whole prompt however many pieces
            it has.
        runs: how often a call runs `encode_prompt`. `once`, or `negative-apart`: a second time for the negative prompt,
            which `encode_prompt` itself does not take; or `by-encoder`: for each text encoder, by `text_encoder_index`.
        zeros_without_negative: whether they make zeros where there is no negative prompt; else the T5 gets "".
        prompt_argument: the argument of `encode_prompt` that the prompt is.
        composed: how the text of the T5 is put together; a name in braces stands for the argument `<name>_prompt`.
            Empty where the text is the prompt.
        one_by_one: whether each prompt goes alone and without pads into the encoder.
        tokenizer_limit: what the greatest length of the tokenizer is to them. `unread`, or `is-the-length` of the rows,
            or `cuts-the-length` that was asked for.
        not_predicted: why words can have no weights. Nothing is predicted where the ids are put together by the
            pipeline, or hidden states of more layers are read: each call of the T5 is a pass. Empty elsewhere.
        one_chunk: why a prompt cannot be longer than one piece; empty where it can.
        call_takes: what a call takes in place of the prompts. `results`: what `encode_prompt` gives. `nothing`: it
            makes embeddings from the texts, whatever else it is given. `prompt-only`: the embeddings of the prompt; its
            negative is always the empty text, and would have to be as long. `negative-text`: of the negative prompt
            the text, since it makes zeros without it. `halves`: the one batch of both, negative first, taken apart.
            `unprojected`: the T5's own rows, which it projects itself.
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
    """ComfyUI's own classes for a family whose only text encoder is a T5; two families may share them.

    They are named and not imported, since an older server may lack some.

    Attributes:
        name: what the user chooses.
        title: what people call the models.
        module, model, tokenizer: the module, and the names in it of the model's class (or of a function that makes it)
            and of the tokenizer's class.
        slot: the name of the T5 in the model, and of its tokens.
        config_key: the option by which ComfyUI takes other sizes for this model, if it goes by another name than the
            slot's.
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
    """A family that has other text encoders in ComfyUI beside the T5.

    Attributes:
        name: what the user chooses, and ComfyUI's type of CLIP in small letters.
        title: what people call the models.
        files: how many files it takes. With another number ComfyUI would take them for another family.
    """

    name: str
    title: str
    files: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one diffusion model family uses its T5.

    Attributes:
        name: the family's name, in kebab-case.
        title: its name as people write it.
        aliases: other names that `family` takes.
        checkpoint: the hub id of the T5 that the family's encoder is, or was made from.
        max_length: tokens per prompt, end token included, that `encode_prompt` asks for by default.
        call_length: the same for a call of the whole pipeline, where that asks for another number; else None.
        length_limit: the greatest length that the pipeline takes; None where it sets no limit.
        pad_to: how long the rows of the result are: `max_length`, the longest prompt, or each its own length.
        encoder_mask: whether the pad mask is given to the encoder.
        padding: the policy that gives the consumer exactly what it reads, at the least work.
            `attend`: pads are ordinary tokens. `exact`: pads are no keys, but their rows are computed.
            `skip`: pad rows come back as zeros. `trim`: there are no pad rows.
        extra_pad: pad positions after the text that the returned mask counts as text.
        mask_dtype: what `encode_prompt` returns as mask, or None if it returns no mask.
        text_cleaning: what is done to the text first; see `text_cleaning.clean_text`.
        reason: why this padding policy.
        notes: what else a faithful caller has to know.
        diffusers: how its pipelines use it; None where diffusers has none.
        comfy: what it is in ComfyUI; None where the nodes do not offer it.
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

    @property
    def returns_mask(self) -> bool:
        """Whether `encode_prompt` returns a mask beside the embeddings."""
        return self.mask_dtype is not None

    @property
    def pipelines(self) -> tuple[str, ...]:
        """Class names of its diffusers pipelines; empty where diffusers has none."""
        return self.diffusers.pipelines if self.diffusers else ()
