"""How exact our decoder is: hidden states and logits of known texts, against float64, beside other implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from nai_t5_core.bench.decoder_peers import DECODER_PEERS, Decode, own_decoder, transformers_decoder
from nai_t5_core.bench.parity import PROMPT_LENGTHS, TOLERANCES, difference, dtype_name, random_batch
from nai_t5_core.bench.parity_report import OWN, Difference
from nai_t5_core.bench.peers import State
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.encoder import LAYOUTS
from nai_t5_core.model.precision import DTYPES

TEXT_LENGTH = 40


@dataclass(frozen=True)
class DecoderDifferences:
    """Differences of every implementation's hidden states and logits from the reference; those that could not run."""

    hidden: tuple[Difference, ...]
    logits: tuple[Difference, ...]
    skipped: tuple[str, ...]


@torch.no_grad()
def measure_decoder_parity(
    config: T5Config,
    state: State,
    dtypes: Sequence[torch.dtype | str] = ("float32",),
    against: Sequence[str] = ("transformers",),
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    text_length: int = TEXT_LENGTH,
    seed: int = 0,
    scales: StackScales | None = None,
    decoder_scales: StackScales | None = None,
    progress: Callable[[str], None] | None = None,
    reference_state: State | None = None,
) -> DecoderDifferences:
    """Compares our decoder, and others, with transformers in float64 with exact norms.

    Random texts are read for random prompts, which each implementation's own encoder encodes in the same dtype.

    Args:
        state: weights of a whole model under Hugging Face names.
        text_length: tokens that the decoder reads for each prompt, the start token included.
        scales, decoder_scales: of our encoder and decoder in float16.
        dtypes, against, prompt_lengths, reference_state, progress: as for
            :func:`nai_t5_core.bench.parity.measure_parity`.

    Raises:
        ValueError: transformers is not installed, an unknown dtype or peer, no decoder, or no usable lengths.
    """
    if config.num_decoder_layers == 0:
        raise ValueError("there is no decoder to measure; give a whole model")
    if text_length < 1:
        raise ValueError(f"text_length={text_length}; the decoder reads at least the start token")
    if unknown := set(against) - set(DECODER_PEERS):
        raise ValueError(f"unknown peers {sorted(unknown)}; allowed: {', '.join(DECODER_PEERS)}")
    names = [dtype_name(dtype) for dtype in dtypes]
    tell = progress or (lambda _: None)
    ids, mask = random_batch(config, prompt_lengths, max(prompt_lengths, default=0), seed)
    texts = torch.randint(config.vocab_size, (len(ids), text_length), generator=torch.Generator().manual_seed(seed + 1))
    texts[:, 0] = config.decoder_start_token_id
    original = state if reference_state is None else reference_state
    tell("reference of the decoder")
    expected = transformers_decoder(config, original, torch.float64, exact=True)(ids, mask, texts)

    hidden, logits, skipped = list[Difference](), list[Difference](), list[str]()

    def measure(label: str, name: str, decode: Decode, tolerance: float | None) -> None:
        found = decode(ids, mask, texts)
        for into, values, wanted in zip((hidden, logits), found, expected, strict=True):
            item = difference(label, name, values, wanted)
            into.append(item if tolerance is None else replace(item, tolerance=tolerance))

    for name in names:
        in_float16 = (scales, decoder_scales) if name == "float16" else (None, None)
        for layout in LAYOUTS:
            tell(f"decoder, {layout} in {name}")
            own = own_decoder(config, state, DTYPES[name], layout, *in_float16)
            measure(f"{OWN} {layout}", name, own, TOLERANCES[DTYPES[name]])
        for peer in against:
            tell(f"decoder of {peer} in {name}")
            try:
                theirs = DECODER_PEERS[peer](config, original, DTYPES[name])
            except ValueError as error:
                skipped.append(f"decoder of {peer} in {name}: {error}")
                continue
            measure(peer, name, theirs, None)
    return DecoderDifferences(tuple(hidden), tuple(logits), tuple(skipped))
