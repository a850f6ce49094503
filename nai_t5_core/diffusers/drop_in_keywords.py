"""The keywords that transformers' classes take beyond those that do something here: which are neutral, which refused.

Software written for transformers passes them by habit. What changes nothing in the result is accepted; what asks for
something that is not done here is refused by its name, before anything is loaded or written.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nai_t5_core.weights.hub import HubOptions

_QUANTISED = (
    "load it unquantised, with layout='separate' if another library is to quantise what was loaded, or with "
    "quantize='int8' for 8 bits on the CPU"
)
_ONE_DEVICE = "the whole model goes to one device; give device_map"

# What from_pretrained takes whatever the value is. Weights are mapped from safetensors files, unpickled as tensors
# alone, never held twice, and put on one device; code from a repository is never run; attention is our own.
_NEUTRAL_IN_LOADING = (
    "low_cpu_mem_usage use_safetensors weights_only disable_mmap trust_remote_code max_memory offload_folder "
    "offload_state_dict offload_buffers generation_config adapter_name resume_download tqdm_class mirror user_agent "
    "attn_implementation allow_all_kernels _fast_init _from_auto _from_pipeline _commit_hash"
)
NEUTRAL_IN_LOADING = frozenset(_NEUTRAL_IN_LOADING.split())
# What it refuses, unless the value asks for nothing: None, False or an empty dictionary.
REFUSED_IN_LOADING = {
    "quantization_config": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "config": "sizes come from the config.json beside the weights, or from the weights; change that file",
    "state_dict": "give a file, or load it into transformers' own class and take from_hf",
    "gguf_file": "give the path of the GGUF file in place of the folder",
    "from_tf": "convert the checkpoint to safetensors with transformers",
    "from_flax": "convert the checkpoint to safetensors with transformers",
    "key_mapping": "the names of a T5 are known in all their spellings; rename others in the file",
    "ignore_mismatched_sizes": "a weight of another shape is a fault of the checkpoint",
    "adapter_kwargs": "load the model, and add the file with nai_t5_core.LiveLoras(model)",
    "output_loading_info": "a checkpoint with faults is refused with a list of them",
    "proxies": "set HTTPS_PROXY, which the hub's client reads",
    "tp_plan": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "device_mesh": _ONE_DEVICE,
    "distributed_config": _ONE_DEVICE,
    "use_flash_attention_2": "a T5 has a bias on its logits, which that does not take; leave it out",
    "experts_implementation": "a T5 has no experts",
    "use_kernels": "the kernels here are our own, and chosen by themselves",
    "kernel_config": "the kernels here are our own, and chosen by themselves",
    "fusion_config": "layout='fused' is what is fused here",
    "output_attentions": "attention weights are never formed; use transformers' own class",
}
HUB_KEYWORDS = ("cache_dir", "token", "use_auth_token", "force_download", "local_files_only")
ATTENTION_IMPLEMENTATIONS = (None, "eager", "sdpa")
# Settings of the config that a call reads.
CONFIG_SETTINGS = ("output_hidden_states", "return_dict")

_NEUTRAL_IN_SAVING = (
    "safe_serialization max_shard_size save_function save_peft_format save_original_format token "
    "use_auth_token repo_id commit_message create_pr private ignore_metadata_errors"
)
NEUTRAL_IN_SAVING = frozenset(_NEUTRAL_IN_SAVING.split())
REFUSED_IN_SAVING = {
    "distributed_checkpoint": "the weights are always one file",
    "save_config": "it is an old name of is_main_process; give that",
    "push_to_hub": "save to a folder, and upload that with 'hf upload'",
    "state_dict": "what is saved are the weights of the model",
}


def loading_options(keywords: Mapping[str, Any], revision: str | None) -> tuple[HubOptions, dict[str, Any]]:
    """What from_pretrained takes beyond its named arguments: for the hub, and for the config.

    Raises:
        ValueError: a keyword asks for something that is not done here; what to do instead is said.
        TypeError: a keyword that neither transformers nor we have.
    """
    _refuse("from_pretrained", keywords, NEUTRAL_IN_LOADING.union(HUB_KEYWORDS, CONFIG_SETTINGS), REFUSED_IN_LOADING)
    attention = keywords.get("attn_implementation")
    if attention not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={attention!r}: attention is chosen by itself here; leave it out, or give 'sdpa' or "
            "'eager', which change nothing"
        )
    token = keywords.get("token")
    hub = HubOptions(
        revision=revision,
        cache_dir=keywords.get("cache_dir"),
        token=keywords.get("use_auth_token") if token is None else token,
        force_download=bool(keywords.get("force_download")),
        local_files_only=bool(keywords.get("local_files_only")),
    )
    return hub, {name: keywords[name] for name in CONFIG_SETTINGS if keywords.get(name) is not None}


def refuse_for_saving(keywords: Mapping[str, Any], folder: Path) -> None:
    """The same for save_pretrained, which also needs a folder that is no file."""
    _refuse("save_pretrained", keywords, NEUTRAL_IN_SAVING, REFUSED_IN_SAVING)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save to")


def _refuse(function: str, keywords: Mapping[str, Any], neutral: frozenset[str], refused: Mapping[str, str]) -> None:
    for name, value in keywords.items():
        if name in refused:
            if value is not None and value is not False and value != {}:
                shown = " ".join(reprlib.repr(value).split())
                raise ValueError(f"{name}={shown} is not done by {function}: {refused[name]}")
        elif name not in neutral:
            near = get_close_matches(name, [*neutral, *refused], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() has no keyword {name!r}{hint}")
