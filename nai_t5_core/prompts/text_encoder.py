""":class:`TextEncoder`, which turns prompts into embeddings and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from nai_t5_core.backends.choices import ProductsChoice, Quantisation
from nai_t5_core.facts.given_numbers import whole_number
from nai_t5_core.facts.nested_text import shown
from nai_t5_core.facts.padding import LONGEST_ROW, PAD_TO, PaddingPolicy, PadTo
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.model.encoder import Layout, T5EncoderStack
from nai_t5_core.model.packing import check_policy
from nai_t5_core.model.precision import resolve_device
from nai_t5_core.prompts.cache.store import Store, open_store
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.prompts.encoding import DEFAULT_TOKEN_BUDGET, Encoding, Pads
from nai_t5_core.prompts.late import cached_encoding
from nai_t5_core.tokenizer import TokenBatch, Tokenizer, load_tokenizer
from nai_t5_core.weights.chosen import ScalesChoice
from nai_t5_core.weights.examine import NO_TOKENIZER, ModelSource, find_tokenizer
from nai_t5_core.weights.load_report import LoadReport
from nai_t5_core.weights.scales_file import write_scales

if TYPE_CHECKING:
    from nai_t5_core.facts.families import Family
    from nai_t5_core.lora.set import LoraSource


@dataclass(frozen=True)
class PromptEmbeddings:
    """The result of :meth:`TextEncoder.encode`.

    Attributes:
        hidden_states: [batch, length, d_model].
        attention_mask: [batch, length] bool, True at the tokens of the prompt (and the family's extra pad positions).
        token_counts: tokens of each prompt, the end token included, after truncation.
        truncated: whether the prompt was longer than allowed.
        cut_text: what was cut off each prompt, "" where nothing was.
    """

    hidden_states: Tensor
    attention_mask: Tensor
    token_counts: list[int]
    truncated: list[bool]
    cut_text: list[str]

    def unpadded(self) -> list[Tensor]:
        """The embeddings of each prompt without padding: [tokens, d_model] each."""
        return [states[:count] for states, count in zip(self.hidden_states, self.token_counts, strict=True)]


class TextEncoder:
    """A T5 encoder with its tokenizer.

    >>> encoder = TextEncoder.from_pretrained()          # the tiny embedded model
    >>> out = encoder.encode(["a cat", "two dogs"])
    >>> out.hidden_states.shape
    torch.Size([2, 4, 128])
    """

    def __init__(
        self,
        stack: T5EncoderStack | Encoding,
        tokenizer: Tokenizer,
        report: LoadReport | None = None,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
    ) -> None:
        self._encoding = _encoding_of(stack, report) if isinstance(stack, T5EncoderStack) else stack
        self.tokenizer = tokenizer
        # At least one row is computed at a time.
        self.token_budget = whole_number("token_budget", token_budget, least=1)

    @classmethod
    def from_pretrained(
        cls,
        source: ModelSource = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        layout: Layout = "fused",
        tokenizer: str | Path | None = None,
        subfolder: str = "",
        scales: ScalesChoice = "auto",
        optimize: bool = True,
        quantize: Quantisation | None = None,
        compile: bool | str = False,  # noqa: A002
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        attention: AttentionChoice = "auto",
        loras: Sequence[tuple[LoraSource, float]] = (),
        products: ProductsChoice = "auto",
        cache: bool | str | Path | Store = False,
        unpack: bool = False,
        offload: bool = False,
    ) -> TextEncoder:
        """Loads weights and tokenizer; sources and arguments are those of :func:`nai_t5_core.load_encoder`.

        Args:
            tokenizer: a tokenizer file or folder, or a file of weights with a tokenizer inside; for a ``source`` that
                comes without one.
            optimize: prepack the weights where that makes this device faster. The model can then not be moved or
                trained. On CUDA in half precision our own kernels encode, from CUDA graphs, see
                :mod:`nai_t5_core.backends.cuda`; these leave the model's weights as they are.
            quantize: ``"int8"`` computes the projections in 8 bits, or on CUDA from weights in 8 bits, see
                :func:`nai_t5_core.backends.choose.quantize_int8`.
            compile: True, or a mode of torch.compile, compiles the encoder, see
                :func:`nai_t5_core.backends.compiled.compile_stack`; the weights are then not prepacked.
            token_budget: how many rows are computed at a time; larger batches are split, which bounds the memory.
            loras: files and strengths, merged for good before the weights are prepacked, quantised or compiled. To add
                and remove LoRAs later, use :class:`nai_t5_core.lora.live.LiveLoras`. Weights that are quantised in the
                checkpoint are unpacked for this: merging rounds.
            products: what computes on a CPU: an instruction set, or oneDNN; see
                :func:`nai_t5_core.backends.choose.prepack`.
            cache: keeps embeddings, and loads the weights at the first prompt that is not kept: True for the default
                folder, a folder, or a :class:`nai_t5_core.Store`. Weights are hashed once, since the cache knows them
                by their contents.
            unpack: make numbers of a quantised checkpoint's weights while it is loaded, which takes the memory of
                ``dtype`` and makes encoding faster. Else they stay as they lie in the file.
            offload: for a CUDA device with too little memory: the weights stay in the host's, and each layer comes for
                its work, under that of the layer before; see :mod:`nai_t5_core.backends.offload`. The device holds two
                layers at a time, and an encode takes as long as the bus takes for the weights: half as long with
                ``quantize="int8"``.

        Raises:
            CheckpointError: the checkpoint or a LoRA is unusable, or there is no tokenizer.
            MemoryError: with ``offload``, the system does not lock as much memory as the weights take.
            ValueError: an unknown choice, one that is not possible on this device, or a LoRA for another T5.
            FlexUnavailableError: ``compile`` without a compiler.
        """
        how = Choices(
            *(dtype, device, layout, scales, optimize, quantize, compile, attention, tuple(loras), products),
            *(unpack, offload),
        )
        how.refuse_impossible()
        own = load_tokenizer(tokenizer) if tokenizer is not None else None
        if cache is not False:
            encoding, examination = cached_encoding(source, subfolder, how, open_store(cache))
            return cls(encoding, own or _found(find_tokenizer(examination), source), token_budget=token_budget)
        from nai_t5_core.prompts.loading import finish, load_chosen

        loaded = load_chosen(source, subfolder, how)
        found = own or _found(loaded.tokenizer, loaded.report.source)
        return cls(finish(loaded.stack, how), found, loaded.report, token_budget)

    @property
    def stack(self) -> T5EncoderStack:
        """The encoder; with a cache it is loaded for this, if it was not yet."""
        return self._encoding.stack

    @property
    def report(self) -> LoadReport | None:
        """What the load did; None where that is not known, or it is not loaded yet."""
        return self._encoding.report

    @property
    def source(self) -> str | None:
        """Where the weights come from; None where that is not known."""
        return self._encoding.source

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory. Without a cache they always are."""
        return self._encoding.is_loaded

    def save_scales(self, path: str | Path) -> None:
        """Writes the float16 scales in use to a JSON file, with all that were tightened since loading.

        ``from_pretrained(…, scales=path)`` and ``convert(…, scales=path)`` read it.
        """
        write_scales(path, self.stack.scales)

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the end token included, before any truncation."""
        return self.tokenizer(prompts, pad_to=None).full_counts

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        family: str | None = None,
        *,
        max_length: int | None = None,
        padding: PaddingPolicy | None = None,
        pad_to: PadTo | None = None,
        extra_pad: int | None = None,
        truncate: bool = True,
        output_device: str | torch.device | None = None,
    ) -> PromptEmbeddings:
        """Encodes a batch of any size.

        Args:
            prompts: a list of texts; the empty text is allowed.
            family: a diffusion model family such as ``"pixart-sigma"``, which sets length, padding and text cleaning as
                in its pipeline. The other arguments override these.
            max_length: longer prompts are cut to this many tokens, end token included. None: no limit but that of
                8,192 tokens, beyond which a prompt is refused.
            padding: how pad tokens are treated, see :func:`nai_t5_core.model.packing.pack_batch`; ``"exact"`` by
                default.
            pad_to: ``"max_length"``, or ``"longest"`` prompt of the batch (the default without a family).
            extra_pad: pad positions after the text that are computed and left unmasked, up to 8,192.
            truncate: False makes a prompt that is too long an error; else it is cut, and the result has what was cut.
            output_device: where the result is put; by default it stays on the model's device.

        Raises:
            ValueError: an empty list, a prompt that is no text, an unknown family or padding policy, an invalid length,
                or with ``truncate=False`` a prompt beyond the limit.
        """
        row = _row_of(family) if family is not None else None
        settings = _Settings.choose(row, max_length, padding, pad_to, extra_pad)
        if not isinstance(truncate, bool):
            raise ValueError(f"truncate={truncate!r}; allowed: True, False")
        if output_device is not None:
            output_device = resolve_device(output_device)
        tokens = self._tokenize(prompts, row, settings)
        if not truncate:
            _refuse_truncated(tokens, settings.max_length)
        _refuse_endless(tokens)
        ids = torch.tensor(tokens.input_ids)
        mask = torch.tensor(tokens.attention_mask, dtype=torch.bool)
        ids, mask = self._with_room(ids, mask, settings)
        pads = Pads(settings.padding, settings.extra_pad, self.token_budget)
        hidden = self._encoding(ids, mask, pads, output_device)
        mask = _with_extra_pad(mask, tokens.token_counts, settings.extra_pad)[:, : hidden.shape[1]]
        return PromptEmbeddings(hidden, mask.to(hidden.device), tokens.token_counts, tokens.truncated, tokens.cut_text)

    def _tokenize(self, prompts: Sequence[str], row: Family | None, settings: _Settings) -> TokenBatch:
        if row is not None and isinstance(prompts, Sequence) and not isinstance(prompts, str):
            from nai_t5_core.facts.text_cleaning import clean_text

            # Entries that are no text are passed on: the tokenizer refuses them and names their place in the list.
            prompts = [clean_text(text, row.text_cleaning) if isinstance(text, str) else text for text in prompts]
        if settings.pad_to == "max_length" and settings.padding != "trim":
            return self.tokenizer(prompts, settings.max_length, pad_to=settings.max_length)
        return self.tokenizer(prompts, settings.max_length, pad_to="longest")

    def _with_room(self, ids: Tensor, mask: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
        """Ids and mask with pads added behind the longest prompt, as many as ``extra_pad`` needs within the limit."""
        room = settings.extra_pad - (ids.shape[1] - int(mask.sum(dim=1).max()))
        if settings.max_length is not None:
            room = min(room, settings.max_length - ids.shape[1])
        if room <= 0:
            return ids, mask
        return pad(ids, (0, room), value=self.tokenizer.pad_token_id), pad(mask, (0, room))

    def __repr__(self) -> str:
        return f"TextEncoder({self._encoding!r})"


@dataclass(frozen=True)
class _Settings:
    """Length and padding of one call: the caller's values, or else the family's."""

    max_length: int | None
    padding: PaddingPolicy
    pad_to: PadTo
    extra_pad: int

    @classmethod
    def choose(
        cls,
        row: Family | None,
        max_length: int | None,
        padding: PaddingPolicy | None,
        pad_to: PadTo | None,
        extra_pad: int | None,
    ) -> _Settings:
        if max_length is not None:
            max_length = whole_number("max_length", max_length)
        if row is None:
            settings = cls(
                max_length,
                "exact" if padding is None else padding,
                "longest" if pad_to is None else pad_to,
                0 if extra_pad is None else extra_pad,
            )
        else:
            if max_length is not None and row.length_limit is not None and max_length > row.length_limit:
                raise ValueError(f"max_length={max_length}; {row.title} takes at most {row.length_limit} tokens")
            settings = cls(
                (row.call_length or row.max_length) if max_length is None else max_length,
                row.padding if padding is None else padding,
                row.pad_to if pad_to is None else pad_to,
                row.extra_pad if extra_pad is None else extra_pad,
            )
        settings._check()
        return settings

    def _check(self) -> None:
        check_policy(self.padding, self.extra_pad)
        if self.pad_to not in PAD_TO:
            raise ValueError(f"unknown pad_to {shown(self.pad_to)}; allowed: {', '.join(PAD_TO)}")
        if self.pad_to == "max_length" and self.max_length is None:
            raise ValueError("pad_to='max_length' needs a max_length")
        if self.pad_to == "max_length" and self.max_length is not None and self.max_length > LONGEST_ROW:
            raise ValueError(
                f"pad_to='max_length' with max_length={self.max_length:,}: no row of more than {LONGEST_ROW:,} "
                "tokens is computed; give a smaller max_length, or pad_to='longest'"
            )


def _row_of(name: str) -> Family:
    from nai_t5_core.facts.families import family

    return family(name)


def _encoding_of(stack: T5EncoderStack, report: LoadReport | None) -> Encoding:
    from nai_t5_core.prompts.stack_encoding import StackEncoding

    return StackEncoding(stack, report)


def _found(tokenizer: Tokenizer | None, source: ModelSource) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER.format(source=source))
    return tokenizer


def _refuse_truncated(tokens: TokenBatch, limit: int | None) -> None:
    for index, cut in enumerate(tokens.truncated):
        if cut:
            raise ValueError(
                f"prompt {index} has {tokens.full_counts[index]} tokens, the limit is {limit}; shorten it by "
                f"{tokens.cut_text[index][:60]!r}, raise max_length, or allow truncation"
            )


def _refuse_endless(tokens: TokenBatch) -> None:
    longest = max(tokens.token_counts)
    if longest > LONGEST_ROW:
        raise ValueError(
            f"prompt {tokens.token_counts.index(longest)} has {longest:,} tokens, and at most {LONGEST_ROW:,} "
            "are computed together, since the time grows with their square; give max_length to cut it, or parts of it "
            "as prompts of their own"
        )


def _with_extra_pad(mask: Tensor, counts: list[int], extra_pad: int) -> Tensor:
    if extra_pad == 0:
        return mask
    ends = torch.tensor(counts)[:, None] + extra_pad
    return torch.arange(mask.shape[1])[None, :] < ends
