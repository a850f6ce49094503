"""Whole T5s of other packages, and ours, as functions that read a known text, to compare their decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nai_t5_core.bench.peers import (
    State,
    exact_norms,
    nai_t5_config,
    own_t5,
    refuse_for_nai_t5,
    require,
    transformers_t5,
)
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.encoder import Layout


class Decoded(NamedTuple):
    """The decoder's hidden states [prompts, length, d_model] after its final norm, and logits [..., vocab_size]."""

    hidden: Tensor
    logits: Tensor


# Ids [prompts, length], their bool mask, and what the decoder reads [prompts, text length].
Decode = Callable[[Tensor, Tensor, Tensor], Decoded]


def own_decoder(
    config: T5Config,
    state: State,
    dtype: torch.dtype,
    layout: Layout,
    scales: StackScales | None = None,
    decoder_scales: StackScales | None = None,
) -> Decode:
    """Our encoder and decoder as one function."""
    model = own_t5(config, state, dtype, layout, scales, decoder_scales)

    def decode(ids: Tensor, mask: Tensor, texts: Tensor) -> Decoded:
        hidden = model.decode(texts, model.read(ids, mask))
        return Decoded(hidden, model.logits(hidden))

    return decode


def transformers_decoder(config: T5Config, state: State, dtype: torch.dtype, exact: bool = False) -> Decode:
    """transformers' encoder and decoder as one function; ``exact`` makes its norms exact in float64."""
    model: Any = transformers_t5(config, state, dtype)
    if exact:
        exact_norms(model)

    def decode(ids: Tensor, mask: Tensor, texts: Tensor) -> Decoded:
        out = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=texts, output_hidden_states=True)
        return Decoded(out.decoder_hidden_states[-1], out.logits)

    return decode


def nai_t5_decoder(config: T5Config, state: State, dtype: torch.dtype) -> Decode:
    """Encoder and decoder of the nai-t5 package as one function, with its own conversion and norm fusion.

    Raises:
        ValueError: the package is not installed, or does not support the config or dtype.
    """
    refuse_for_nai_t5(config, dtype)
    if config.tie_word_embeddings:
        raise ValueError("nai-t5 has no tied output head")
    if config.num_decoder_layers != config.num_layers:
        raise ValueError("nai-t5 has as many decoder layers as encoder layers, always")
    whole, hf, fusing = (require(f"nai_t5.{part}") for part in ("t5", "t5_hf", "fuse_norm_scales"))
    based = nai_t5_config(config, dtype)
    with torch.device("meta"):
        model = whole.T5(based)
    wanted = model.state_dict()
    # Copies, since the norm fusion writes into its projections.
    tensors = {
        name: tensor.clone().to(wanted[name].dtype) for name, tensor in hf.hf_to_based_t5_state(state, based).items()
    }
    model.load_state_dict(tensors, assign=True)
    model.eval().requires_grad_(False)
    fusing.fuse_norm_scales(model, fuse_via_f32=True)

    def decode(ids: Tensor, mask: Tensor, texts: Tensor) -> Decoded:
        encoding = model.encoder(ids, input_mask=mask)
        crossing = mask[:, None, :].expand(-1, texts.shape[1], -1)
        everything = torch.ones_like(texts, dtype=torch.bool)
        hidden = model.decoder(model.encoder.vocab_embed(texts), encoding, everything, cross_mask=crossing)
        return Decoded(hidden, model.lm_head(hidden))

    return decode


DECODER_PEERS: dict[str, Callable[[T5Config, State, torch.dtype], Decode]] = {
    "transformers": transformers_decoder,
    "nai-t5": nai_t5_decoder,
}
