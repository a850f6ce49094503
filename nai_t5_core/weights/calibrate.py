"""Finding the float16 scales of a checkpoint: its largest activations over a set of prompts, layer by layer.

Runs in float32 with one layer in memory at a time, read from the file when its turn comes, so that the largest models
fit into little memory. A decoder reads known texts for this: by default it is given the prompts themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.facts.config import T5Config, decoder_tensors, encoder_tensors
from nai_t5_core.facts.scales import LayerScales, StackScales, scale_for
from nai_t5_core.float16.maxima import LayerMaxima, observe, scales_for
from nai_t5_core.model.attention import DocumentAttention, distance_table, logit_scale
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.decoder_attention import CausalAttention, CrossMemory, causal_table, cross_bias
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import NoInit, RMSNorm
from nai_t5_core.model.packing import Packing, pack_batch
from nai_t5_core.model.precision import is_finite, largest_finite
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.weights.calibration_report import Calibration, StackMaxima
from nai_t5_core.weights.examine import (
    Examination,
    ModelSource,
    decoder_faults,
    examine,
    find_tokenizer_for,
    settle_head,
)
from nai_t5_core.weights.formats import CheckpointError

# Short and long, plain and odd: outliers sit on rare tokens, on repetitions, and at the end of the prompt.
PROMPTS = (
    "",
    "a",
    "cat",
    "a photo of a cat",
    "An oil painting of a lighthouse on a cliff at dusk, waves breaking below, warm light in the windows.",
    "(masterpiece, best quality:1.2), 1girl, solo, silver hair, looking at viewer <lora:detail:0.8> [sketch|ink]",
    "the the the the the the the the the the the the the the the the the the the the the the the the",
    "!!!!!!!!!!!!!!!!!!!!!!!! ???????? ........ ,,,,,,,, :::: ;;;; ---- ____ //// \\\\\\\\",
    "0 1 2 3 4 5 6 7 8 9 10 100 1000 1,000,000 3.14159265358979 -40 °C 1920x1080 f/1.8 ISO 100 24fps 4k 8k",
    "Ein Fuchs springt über den faulen Hund; le cœur a ses raisons; ¿dónde está la biblioteca?",
    "一只猫坐在窗台上，夕阳西下。 猫が窓辺に座っている。 고양이가 창가에 앉아 있다.",
    "Кошка сидит на подоконнике. القطة تجلس على النافذة. बिल्ली खिड़की पर बैठी है।",
    "😀 🐈 🌅 👩‍🚀 🏳️‍🌈 ✨ → ∑ √2 ≈ 1.41 ½ © ™",
    "def encode(self, prompts: list[str]) -> Tensor:\n    return self.stack(torch.tensor(ids), mask)\n",
    "low quality, blurry, bad anatomy, extra fingers, watermark, signature, jpeg artifacts, cropped, worst quality",
    " ".join(["A wide shot of a busy market street in the rain, neon signs reflected in the puddles."] * 24),
)
MAX_LENGTH = 512


@torch.no_grad()
def calibrate(
    source: ModelSource = None,
    prompts: Sequence[str] = PROMPTS,
    headroom: float = 4.0,
    subfolder: str = "",
    tokenizer: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    encoder_only: bool = False,
    texts: Sequence[str] | None = None,
) -> Calibration:
    """Runs a model in float32 over prompts and chooses the scales that leave ``headroom`` below 65504.

    Args:
        source, subfolder: as for :func:`nai_t5_core.weights.load.load_t5`.
        prompts: each is cut to 512 tokens.
        headroom: how many times larger than seen a value may become before float16 overflows; at least 1.
        tokenizer: a tokenizer file or folder, where the source has none.
        progress: called with (layers done, layers in all).
        encoder_only: leave the decoder out, where there is one.
        texts: what the decoder reads for each prompt, as if it had written it; by default the prompts.

    Raises:
        CheckpointError: the checkpoint is unusable.
        ValueError: no tokenizer or that of another model, no prompts, another number of texts, or a headroom below 1.
    """
    if not headroom >= 1:
        raise ValueError(f"headroom={headroom}; it must be at least 1, which leaves no room at all")
    if texts is not None and len(texts) != len(prompts):
        raise ValueError(f"{len(texts)} texts for {len(prompts)} prompts; give one for each")
    found = find_tokenizer_for(source, subfolder, tokenizer)
    examination = examine(source, subfolder)
    if encoder_only:
        examination.config = examination.config.encoder_only()
    elif examination.config.num_decoder_layers:
        settle_head(examination)
        examination.faults += decoder_faults(examination)
    examination.refuse_faults()
    config = examination.config
    ids, mask = _tokenized(found, prompts, config)
    steps = _Steps(progress, config.num_layers + config.num_decoder_layers)
    packing = pack_batch(mask, mask.shape[0], mask.shape[1], "skip")
    encoder, states = _calibrate_encoder(examination, ids, packing, headroom, steps)
    decoder = None
    if config.num_decoder_layers:
        known, _ = _tokenized(found, texts if texts is not None else prompts, config)
        decoder = _calibrate_decoder(examination, states, packing, mask, known, headroom, steps)
    return Calibration(config, len(prompts), packing.tokens, headroom, encoder, decoder)


@dataclass
class _Steps:
    """Counts layers for a progress bar."""

    tell: Callable[[int, int], None] | None
    total: int
    done: int = 0

    def advance(self) -> None:
        self.done += 1
        if self.tell is not None:
            self.tell(self.done, self.total)


def _tokenized(tokenizer: Tokenizer, texts: Sequence[str], config: T5Config) -> tuple[Tensor, Tensor]:
    """Ids and bool mask, [texts, length] each."""
    tokens = tokenizer(texts, MAX_LENGTH)
    ids, mask = torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask).bool()
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token id {int(ids.max())}, the model has {config.vocab_size} tokens; "
            "the tokenizer belongs to another model"
        )
    return ids, mask


def _calibrate_encoder(
    examination: Examination, ids: Tensor, packing: Packing, headroom: float, steps: _Steps
) -> tuple[StackMaxima, Tensor]:
    """What the encoder shows, and its hidden states [tokens, d_model]."""
    config = examination.config
    plan = DocumentAttention(packing.groups, logit_scale(config))
    table = examination.read("shared.weight")
    residual = _rows(table, packing.pack(ids))
    embedding = scale_for(largest_finite(table), headroom=1)
    del table
    layers, attend = [], None
    for index in range(config.num_layers):
        block = EncoderBlock.separate(config, **_block_arguments(config, index))
        _fill(block, examination, f"encoder.block.{index}.")
        if attend is None or config.bias_per_layer:
            attend = plan.layer(distance_table(_bias_weight(block), config.relative_attention_max_distance))
        layers.append(LayerMaxima())
        residual = observe(block, LayerScales(), residual, (attend,), layers[-1])
        steps.advance()
    norm = RMSNorm(config.d_model, config.layer_norm_epsilon, "meta")
    _fill(norm, examination, "encoder.final_layer_norm.")
    return _chosen(layers, headroom, config, embedding), norm(residual)


def _calibrate_decoder(
    examination: Examination,
    states: Tensor,
    packing: Packing,
    mask: Tensor,
    texts: Tensor,
    headroom: float,
    steps: _Steps,
) -> StackMaxima:
    """What the decoder shows when it reads texts [prompts, length] behind the start token.

    Pad tokens behind a text count: in generation, too, a text that is finished goes on with them beside the others.
    """
    config = examination.config
    scale, hides_pads = logit_scale(config), cross_bias(mask, torch.float32)
    before = texts.roll(1, dims=1)
    before[:, 0] = config.decoder_start_token_id
    residual = _rows(examination.read("shared.weight"), before)
    layers, attend = [], None
    for index in range(config.num_decoder_layers):
        block = DecoderBlock.separate(config, **_block_arguments(config, index))
        _fill(block, examination, f"decoder.block.{index}.")
        if attend is None or config.bias_per_layer:
            table = causal_table(_bias_weight(block), config.relative_attention_max_distance)
            plan = CausalAttention([table], texts.shape[1], scale)
            attend = plan.layer(index, plan.bias(0))
        layers.append(LayerMaxima.of_decoder())
        cross: Any = block.layer[1]
        keys, values = cross.EncDecAttention.keys_values(states)
        layers[-1].add("cross_k", keys, 1.0)
        layers[-1].add("cross_v", values, 1.0)
        spread = [packing.unpack(part).transpose(1, 2) for part in (keys, values)]
        memory = CrossMemory([(spread[0], spread[1])], hides_pads, scale)
        residual = observe(block, LayerScales(), residual, (attend, memory.layer(0)), layers[-1])
        steps.advance()
    return _chosen(layers, headroom, config)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    """Embeddings of ids in float32: [..., d_model]. Rows that nothing uses may be anything."""
    # torch 2.5 takes no rows of tensors in float8, but rows of their bytes.
    rows = (table.view(torch.uint8)[ids].view(table.dtype) if table.itemsize == 1 else table[ids]).float()
    if not is_finite(rows):
        odd = sorted(set(ids[~rows.isfinite().all(-1)].tolist()))
        raise CheckpointError(
            f"shared.weight holds values that are not finite in the rows of the tokens {', '.join(map(str, odd[:8]))}, "
            "which the prompts use; leave those tokens out, or use another file of the same model"
        )
    return rows


def _block_arguments(config: T5Config, index: int) -> dict[str, Any]:
    return {
        "has_bias": config.bias_per_layer or index == 0,
        "scales": LayerScales(),
        "ops": NoInit,
        "device": "meta",
        "dtype": torch.float32,
    }


def _fill(module: torch.nn.Module, examination: Examination, prefix: str) -> None:
    """Reads the tensors of a module on the meta device, in float32."""
    names = encoder_tensors(examination.config) | decoder_tensors(examination.config)
    own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    tensors = {part: examination.read(name).float() for part, name in own.items()}
    damaged = next((own[part] for part, tensor in tensors.items() if not is_finite(tensor)), None)
    if damaged is not None:
        raise CheckpointError(f"{damaged} holds values that are not finite; the weights are damaged: fetch them again")
    module.load_state_dict(tensors, assign=True)


def _bias_weight(block: Any) -> Tensor:
    weight: Tensor = block.layer[0].SelfAttention.relative_attention_bias.weight
    return weight


def _chosen(layers: list[LayerMaxima], headroom: float, config: T5Config, embedding: float = 1.0) -> StackMaxima:
    scales = tuple(scales_for(seen, headroom, config.can_scale_hidden) for seen in layers)
    return StackMaxima(tuple(layers), StackScales(scales, embedding))
