"""LoRAs that are given as hooks and reach nothing.

ComfyUI looks for their keys when hooks are set on a CLIP, and lists none that it leaves out. It calls back afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from comfy.hooks import EnumHookType, EnumWeightTarget
from comfy.patcher_extension import CallbacksMP

from comfy_nai_t5.telling import warn

_KEY = "nai-t5.idle-hooks"
# How a LoRA's keys begin that are meant for a text encoder, in all spellings that ComfyUI knows.
_FOR_TEXT = re.compile(r"text_encoders?(_\d)?\.|lora_(prior_)?te\d?_")

_TEXT = (
    "The LoRA of a hook changes nothing in the text encoders: it has keys for some, and none of them belongs to those "
    "connected ({encoders}); choose one that was trained for this model."
)


def tell_of_idle_hooks(patcher: Any, encoders: Sequence[str]) -> None:
    """Has a CLIP's patcher warn of every hook that is set from now on, is meant for text encoders and finds none.

    A LoRA without keys for text encoders is for the diffusion model alone, which a CLIP knows nothing of: no warning.

    Args:
        encoders: the names of the CLIP's text encoders, for the warning.
    """

    def tell(patcher: Any, hooks: Any, target: dict[str, Any], *_: Any) -> None:
        if target.get("target") is EnumWeightTarget.Clip:
            for hook in hooks.get_type(EnumHookType.Weight):
                if _is_idle(hook, patcher):
                    warn(_TEXT.format(encoders=", ".join(encoders)))

    patcher.remove_callbacks_with_key(CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, _KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, _KEY, tell)


def _is_idle(hook: Any, patcher: Any) -> bool:
    """Whether a LoRA hook was to change a CLIP and does not. Other weight hooks bring their own names of weights."""
    if not hook.need_weight_init or not hook._strength_clip:  # without the schedule, which may begin with none of it
        return False
    return not patcher.hook_patches.get(hook.hook_ref) and any(map(_FOR_TEXT.match, hook.weights))
