"""Tensor names in LoRA files of every trainer, to the Hugging Face names of the T5 weights that they change.

Tables and pure functions; nothing is read. A LoRA of a whole diffusion model has keys of its other parts as well, which
are listed by part; a key that is neither is an unknown one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from nai_t5_core.weights.formats import CheckpointError

Role = Literal["up", "down", "alpha", "table_up", "table_down", "difference"]

# The end of a key says which factor it is. kohya and OneTrainer; peft, with or without the adapter's name; diffusers.
_ROLES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    # peft's factors of an embedding table, which are those of its transpose.
    ("table_down", re.compile(r"\.lora_embedding_B(\.\w+)?$")),
    ("table_up", re.compile(r"\.lora_embedding_A(\.\w+)?$")),
    # A whole difference: ComfyUI, and what LyCORIS calls that of a norm.
    ("difference", re.compile(r"\.(diff|w_norm)$")),
    ("down", re.compile(r"\.(lora_down|lora_A(\.\w+)?|lora(_linear_layer)?\.down)\.weight$")),
    ("up", re.compile(r"\.(lora_up|lora_B(\.\w+)?|lora(_linear_layer)?\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)

# A module of a T5 encoder's block, with dots or, as kohya writes it, underscores; whatever stands before it.
_IN_BLOCK = re.compile(
    r"(?P<prefix>(.*[._])?)encoder[._]block[._](?P<block>\d+)[._]layer[._](?P<layer>\d)[._]"
    r"(?P<module>SelfAttention[._]([qkvo]|relative_attention_bias)|DenseReluDense[._](wi_0|wi_1|wi|wo)|layer_norm)"
)
# The modules outside of blocks. Parts of other models end in such names, too.
_OUTSIDE = re.compile(r"(?P<prefix>(.*[._])?)(?P<module>shared|encoder[._](final_layer_norm|embed_tokens))")

_OTHER_PARTS = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (
            r"(.*[._])?decoder[._](block[._]\d+[._]layer[._]\d[._]\w+|final_layer_norm|embed_tokens)[._]",
            "the T5's decoder",
        ),
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

# What is trained on a T5 and cannot be added to its weights.
_UNSUPPORTED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r".*(dora_scale|lora_magnitude_vector)", "DoRA"),
        (r".*\.hada_", "LoHa"),
        (r".*\.lokr_", "LoKr"),
        (r".*\.oft_", "OFT"),
        (r".*\.lora_mid", "a LoRA of three factors"),
        (r".*\.(bias|diff_b|b_norm)$", "a bias, and T5 has none"),
        (r".*\.set_weight$", "a weight in place of the model's own"),
        (r".*\.(diff|w_norm)$", "a difference of a weight that no T5 has"),
    )
)
# What is added to something, so that zeros of it are nothing, and what goes along with it.
_ADDED = re.compile(r"\.(bias|diff|diff_b|w_norm|b_norm|lora_up\.weight|lora_B(\.\w+)?\.(weight|bias))$")
_BESIDE_ADDED = re.compile(r"\.(alpha|lora_down\.weight|lora_A(\.\w+)?\.weight)$")


@dataclass
class LoraKeyMap:
    """What the tensors of a LoRA file are for."""

    weights: dict[str, dict[Role, str]] = field(default_factory=dict)
    """Hugging Face name of a T5 weight to the file's names of its two factors and alpha, or of its difference."""
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
        found = _find_module(module)
        if role is None or found is None:
            _place_other(keymap, name)
            continue
        prefix, weight = found
        prefixes.add(prefix)
        factors = keymap.weights.setdefault(weight, {})
        if role in factors and len(prefixes) == 1:
            raise CheckpointError(f"{source} has two tensors for one factor: {factors[role]} and {name}")
        factors[role] = name
    if len(prefixes) > 1:
        found_in = ", ".join(map(repr, sorted(prefixes)))
        raise CheckpointError(f"{source} holds LoRAs of {len(prefixes)} T5 encoders, under {found_in}; split the file")
    keymap.prefix = next(iter(prefixes), "")
    return keymap


def additions(keymap: LoraKeyMap) -> list[tuple[list[str], list[str]]]:
    """The unknown names of each module that something is added to: what is added, and what goes along with it."""
    modules: dict[str, tuple[list[str], list[str]]] = {}
    for name in keymap.unknown:
        for index, pattern in enumerate((_ADDED, _BESIDE_ADDED)):
            if match := pattern.search(name):
                modules.setdefault(name[: match.start()], ([], []))[index].append(name)
    return [parts for parts in modules.values() if parts[0]]


def _split(name: str) -> tuple[Role | None, str]:
    """The role of a tensor and the module it belongs to."""
    for role, pattern in _ROLES:
        if match := pattern.search(name):
            return role, name[: match.start()]
    return None, name


def _find_module(name: str) -> tuple[str, str] | None:
    """What stands before a module of the T5's encoder, and the Hugging Face name of its weight."""
    match = _IN_BLOCK.fullmatch(name)
    if match:
        module = match["module"]
        # Only the first underscore parts module and projection: wi_0 has one of its own, and a norm's is no such.
        if "." not in module and module != "layer_norm":
            module = module.replace("_", ".", 1)
        return match["prefix"], f"encoder.block.{match['block']}.layer.{match['layer']}.{module}.weight"
    match = _OUTSIDE.fullmatch(name)
    if match is None or _other_part(name + ".") is not None:
        return None
    weight = "encoder.final_layer_norm" if "norm" in match["module"] else "shared"
    return match["prefix"], f"{weight}.weight"


def _other_part(name: str) -> str | None:
    return next((part for pattern, part in _OTHER_PARTS if pattern.match(name)), None)


def _place_other(keymap: LoraKeyMap, name: str) -> None:
    part = _other_part(name)
    if part is not None and not _IN_BLOCK.match(name):
        keymap.others[name] = part
    else:
        reason = next((reason for pattern, reason in _UNSUPPORTED if pattern.match(name)), "not known")
        keymap.unknown[name] = reason
