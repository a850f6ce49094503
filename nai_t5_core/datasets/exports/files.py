"""Formats that have a file for each sample."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from nai_t5_core.datasets.exports.sample import Format, Sample, stem_of, whole

# Policies by which the rows of pads are zeros, and by which they are tokens like others.
_WITHOUT_PADS = ("skip", "trim")
_WITH_PADS = ("attend",)


def _each(
    place: Callable[[str, str], str], save: Callable[[Sample, Path], None]
) -> Callable[[Iterable[Sample], Path], None]:
    def write(samples: Iterable[Sample], out: Path) -> None:
        for sample in samples:
            with whole(out / place(sample.id, sample.caption)) as partial:
                save(sample, partial)

    return write


def _musubi_place(sample_id: str, caption: str) -> str:
    return f"{PurePosixPath(stem_of(sample_id)).name}_wan_te.safetensors"


def _save_musubi(sample: Sample, path: Path) -> None:
    metadata = {"architecture": "wan", "caption1": sample.caption, "format_version": "1.0.1"}
    save_file({"varlen_t5_bfloat16": sample.text}, path, metadata)


def _pixart_place(sample_id: str, caption: str) -> str:
    return f"{'_'.join(stem_of(sample_id).rsplit('/', 1))}.npz"


def _save_pixart(sample: Sample, path: Path) -> None:
    """Padded, since one of the two readers does not pad; zeros take no room in a compressed file."""
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            caption_feature=sample.padded()[None].half().numpy(),
            attention_mask=sample.mask()[None].to(torch.int16).numpy(),
        )


def _ltx_place(sample_id: str, caption: str) -> str:
    return f".precomputed/conditions/{stem_of(sample_id)}.pt"


def _save_ltx(sample: Sample, path: Path) -> None:
    torch.save({"prompt_embeds": sample.padded(), "prompt_attention_mask": sample.mask()}, path)


_AI_TOOLKIT_SPACES = {"wan": "wan21", "flux": "flux"}


def ai_toolkit(space: str | None = None) -> Format:
    """ai-toolkit's format, for the model architecture that its configuration names, such as ``wan22_14b``."""

    def named(family: str) -> Callable[[str, str], str]:
        return lambda sample_id, caption: _ai_toolkit_place(sample_id, caption, space or _AI_TOOLKIT_SPACES[family])

    def write(samples: Iterable[Sample], out: Path) -> None:
        for sample in samples:
            with whole(out / named(sample.family)(sample.id, sample.caption)) as partial:
                _save_ai_toolkit(sample, partial)

    families = {"wan": _WITHOUT_PADS, "flux": _WITH_PADS}
    return Format("ai-toolkit", families, write, named("wan"), frozenset({"flux"}))


def _ai_toolkit_place(sample_id: str, caption: str, space: str) -> str:
    path = PurePosixPath(stem_of(sample_id))
    known_by = {"caption": caption, "text_embedding_space_version": space, "text_embedding_version": 1}
    digest = hashlib.md5(json.dumps(known_by, sort_keys=True).encode()).digest()
    name = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    return str(path.parent / "_t_e_cache" / f"{path.name}_{name}.safetensors")


def _save_ai_toolkit(sample: Sample, path: Path) -> None:
    tensors = {"text_embed": sample.padded()[None]}
    if sample.clip is not None:
        tensors["pooled_embed"] = sample.clip.pooled[None].to(sample.states.dtype)
    save_file(tensors, path)


# What SimpleTuner calls the families.
_SIMPLETUNER = {
    "wan": "wan",
    "pixart-sigma": "pixart_sigma",
    "ltx-video": "ltxvideo",
    "auraflow": "auraflow",
    "flux": "flux",
    "sd3": "sd3",
}


def _save_simpletuner(sample: Sample, path: Path) -> None:
    torch.save(_simpletuner_content(sample), path)


def _simpletuner_content(sample: Sample) -> dict[str, Any]:
    embeds = {"prompt_embeds": sample.padded()[None]}
    mask = sample.mask().long()
    if sample.family in ("wan", "ltx-video"):
        return {**embeds, "attention_masks": mask[None]}
    if sample.family == "pixart-sigma":
        return {**embeds, "attention_mask": mask}
    if sample.family == "auraflow":
        return {**embeds, "prompt_attention_mask": mask[None]}
    pooled = sample.with_clip.pooled.to(sample.states.dtype)
    if sample.family == "flux":
        ids = torch.zeros(1, sample.length, 3)
        return {**embeds, "pooled_prompt_embeds": pooled, "time_ids": ids, "attention_masks": mask[None]}
    return {"prompt_embeds": _joined(sample)[None], "pooled_prompt_embeds": pooled}


def _joined(sample: Sample) -> Tensor:
    """SD3's rows: CLIP's, filled up with zeros to the T5's width, and then the T5's."""
    states = sample.with_clip.states
    assert states is not None
    wide = torch.nn.functional.pad(states.to(sample.states.dtype), (0, sample.states.shape[1] - states.shape[1]))
    return torch.cat([wide, sample.padded()])


def simpletuner() -> Format:
    def place(family: str) -> Callable[[str, str], str]:
        return lambda _, caption: f"{hashlib.md5(caption.encode()).hexdigest()}-{_SIMPLETUNER[family]}.pt"

    def write(samples: Iterable[Sample], out: Path) -> None:
        for sample in samples:
            with whole(out / place(sample.family)(sample.id, sample.caption)) as partial:
                _save_simpletuner(sample, partial)

    families = {
        **dict.fromkeys(("wan", "pixart-sigma", "auraflow"), _WITHOUT_PADS),
        **dict.fromkeys(("ltx-video", "flux", "sd3"), _WITH_PADS),
    }
    return Format("simpletuner", families, write, place("wan"), frozenset({"flux", "sd3"}), shares_files=True)


def _sd_scripts_place(suffix: str) -> Callable[[str, str], str]:
    return lambda sample_id, _: f"{stem_of(sample_id)}_{suffix}_te.npz"


def _save_sd_scripts_flux(sample: Sample, path: Path) -> None:
    _save_npz(
        path,
        l_pooled=sample.with_clip.pooled,
        t5_out=sample.padded().float(),
        txt_ids=torch.zeros(sample.length, 3),
        t5_attn_mask=sample.mask().long(),
        apply_t5_attn_mask=False,
    )


def _save_sd_scripts_sd3(sample: Sample, path: Path) -> None:
    clip = sample.with_clip
    assert clip.states is not None
    _save_npz(
        path,
        lg_out=clip.states,
        lg_pooled=clip.pooled,
        t5_out=sample.padded().float(),
        clip_l_attn_mask=clip.masks[0],
        clip_g_attn_mask=clip.masks[1],
        t5_attn_mask=sample.mask().long(),
        apply_lg_attn_mask=False,
        apply_t5_attn_mask=False,
    )


def _save_npz(path: Path, **content: Tensor | bool) -> None:
    arrays: dict[str, Any] = {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in content.items()
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


MUSUBI_WAN = Format("musubi-wan", {"wan": _WITHOUT_PADS}, _each(_musubi_place, _save_musubi), _musubi_place)
PIXART = Format(
    "pixart",
    dict.fromkeys(("pixart-sigma", "pixart-alpha"), _WITHOUT_PADS),
    _each(_pixart_place, _save_pixart),
    _pixart_place,
)
LTX = Format("ltx", {"ltx-condition": _WITHOUT_PADS}, _each(_ltx_place, _save_ltx), _ltx_place)
SD_SCRIPTS_FLUX = Format(
    "sd-scripts-flux",
    {"flux": _WITH_PADS},
    _each(_sd_scripts_place("flux"), _save_sd_scripts_flux),
    _sd_scripts_place("flux"),
    frozenset({"flux"}),
)
SD_SCRIPTS_SD3 = Format(
    "sd-scripts-sd3",
    {"sd3": _WITH_PADS},
    _each(_sd_scripts_place("sd3"), _save_sd_scripts_sd3),
    _sd_scripts_place("sd3"),
    frozenset({"sd3"}),
)
