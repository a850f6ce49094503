"""Tensor names in LoRA files of every trainer, to the Hugging Face names of the T5 weights that they change.

Tables and pure functions; nothing is read. A LoRA of a whole diffusion model has keys of its other parts as well, which
are listed by part; a key that is neither is an unknown one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from nai_t5_core.formats import CheckpointError

Role = Literal["up", "down", "alpha"]

# The end of a key says which factor it is. kohya and OneTrainer; peft, with or without the adapter's name; diffusers.
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("down", re.compile(r"\.(lora_down|lora_A(\.\w+)?|lora(_linear_layer)?\.down)\.weight$")),
    ("up", re.compile(r"\.(lora_up|lora_B(\.\w+)?|lora(_linear_layer)?\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)

# A projection of a T5 encoder, with dots or, as kohya writes it, underscores; whatever stands before it.
_PROJECTION = re.compile(
    r"(?P<prefix>(.*[._])?)encoder[._]block[._](?P<block>\d+)[._]layer[._](?P<layer>\d)[._]"
    r"(?P<module>SelfAttention[._][qkvo]|DenseReluDense[._](wi_0|wi_1|wi|wo))"
)

_OTHER_PARTS = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"(.*[._])?decoder[._]block[._]\d+[._]layer[._]\d[._]\w+[._]", "the T5's decoder"),
        (r"bundle_emb\.", "textual inversion vectors"),
        (r"(.*[._])?(text_model|text_projection)[._]|(.*\.)?clip_\w\.", "a CLIP text encoder"),
        (r"(lora_te\d?|text_encoders?(_\d)?)[._](.*[._])?model[._]layers[._]", "a language model"),
        (
            r"(base_model\.model\.)?((model\.)?diffusion_model|transformer|lora_transformer|lycoris)[._]",
            "the transformer",
        ),
        (r"(lora_)?(prior_)?unet[._]", "the UNet or transformer"),
        (
            r"(base_model\.model\.)?(double_blocks|single_blocks|joint_blocks|(single_)?transformer_blocks)\.",
            "the transformer",
        ),
        (r"(base_model\.model\.)?(down_blocks|mid_block|up_blocks)\.", "the UNet"),
        (r"(lora_)?vae[._]|first_stage_model[._]", "the VAE"),
    )
)

# What is trained on a T5 and is no LoRA of its projections.
_UNSUPPORTED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r".*(dora_scale|lora_magnitude_vector)", "DoRA"),
        (r".*\.hada_", "LoHa"),
        (r".*\.lokr_", "LoKr"),
        (r".*\.oft_", "OFT"),
        (r".*\.lora_mid", "a LoRA of three factors"),
        (r".*\.bias$", "a bias, and T5 has none"),
        (r".*\.(diff|diff_b)$", "a full difference of weights"),
        (r".*lora_embedding_[AB]", "a LoRA of the embedding table"),
    )
)


@dataclass
class LoraKeyMap:
    """What the tensors of a LoRA file are for."""

    weights: dict[str, dict[Role, str]] = field(default_factory=dict)
    """Hugging Face name of a T5 weight to the file's names of its two factors and alpha."""
    prefix: str = ""
    """What stands before the T5's module names in the file."""
    others: dict[str, str] = field(default_factory=dict)
    """The file's names that belong to other parts of a diffusion model, and to which."""
    unknown: dict[str, str] = field(default_factory=dict)
    """The file's names that can't be used, and why."""


def map_lora_names(names: Iterable[str], source: str) -> LoraKeyMap:
    """Finds the LoRA of a T5 encoder among the tensor names of a file.

    Raises:
        CheckpointError: it has LoRAs for two T5 encoders, or twice for one weight.
    """
    keymap = LoraKeyMap()
    prefixes: set[str] = set()
    for name in names:
        role, module = _split(name)
        projection = _PROJECTION.fullmatch(module)
        if role is None or projection is None:
            _place_other(keymap, name)
            continue
        prefixes.add(projection["prefix"])
        factors = keymap.weights.setdefault(_weight_name(projection), {})
        if role in factors and len(prefixes) == 1:
            raise CheckpointError(f"{source} has two tensors for one factor: {factors[role]} and {name}")
        factors[role] = name
    if len(prefixes) > 1:
        found = ", ".join(map(repr, sorted(prefixes)))
        raise CheckpointError(f"{source} holds LoRAs of {len(prefixes)} T5 encoders, under {found}; split the file")
    keymap.prefix = next(iter(prefixes), "")
    return keymap


def _split(name: str) -> tuple[Role | None, str]:
    """The role of a tensor and the module it belongs to."""
    for role, pattern in _ROLES:
        if match := pattern.search(name):
            return role, name[: match.start()]
    return None, name


def _weight_name(projection: re.Match[str]) -> str:
    # Only the first underscore parts module and projection: wi_0 has one of its own.
    module = projection["module"].replace("_", ".", 1) if "." not in projection["module"] else projection["module"]
    return f"encoder.block.{projection['block']}.layer.{projection['layer']}.{module}.weight"


def _place_other(keymap: LoraKeyMap, name: str) -> None:
    part = next((part for pattern, part in _OTHER_PARTS if pattern.match(name)), None)
    if part is not None and not _PROJECTION.match(name):
        keymap.others[name] = part
    else:
        reason = next((reason for pattern, reason in _UNSUPPORTED if pattern.match(name)), "not known")
        keymap.unknown[name] = reason
