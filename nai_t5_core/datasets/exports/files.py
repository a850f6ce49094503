"""Formats that have a file for each sample."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import save as safetensors
from torch import Tensor

from nai_t5_core.datasets.exports.sample import Format, Place, Sample, stem_of, whole


def _for_each(
    name: str,
    place: Place,
    save: Callable[[Sample, IO[bytes]], None],
    shares_files: bool = False,
    has_one_length: bool = False,
) -> Format:
    def write(samples: Iterable[Sample], out: Path) -> None:
        for sample in samples:
            path = out / place(sample.id, sample.caption, sample.trainers.names[name])
            # Opened by Python, which tells of a full disk as such.
            with whole(path) as partial, partial.open("wb") as file:
                save(sample, file)

    return Format(name, write, place, shares_files, has_one_length)


def _musubi_place(sample_id: str, caption: str, named: str) -> str:
    return f"{PurePosixPath(stem_of(sample_id)).name}_{named}_te.safetensors"


def _save_musubi(sample: Sample, file: IO[bytes]) -> None:
    metadata = {
        "architecture": sample.trainers.names["musubi-wan"],
        "caption1": sample.caption,
        "format_version": "1.0.1",
    }
    file.write(safetensors({"varlen_t5_bfloat16": sample.text}, metadata))


def _pixart_place(sample_id: str, caption: str, named: str) -> str:
    return f"{'_'.join(stem_of(sample_id).rsplit('/', 1))}.npz"


def _save_pixart(sample: Sample, file: IO[bytes]) -> None:
    """Padded, since one of the two readers does not pad; zeros take no room in a compressed file."""
    np.savez_compressed(
        file,
        caption_feature=sample.padded()[None].half().numpy(),
        attention_mask=sample.mask()[None].to(torch.int16).numpy(),
    )


def _ltx_place(sample_id: str, caption: str, named: str) -> str:
    return f".precomputed/conditions/{stem_of(sample_id)}.pt"


def _save_ltx(sample: Sample, file: IO[bytes]) -> None:
    torch.save({"prompt_embeds": sample.padded(), "prompt_attention_mask": sample.mask()}, file)


def ai_toolkit(architecture: str | None = None) -> Format:
    """ai-toolkit's format; for another model of the family by the architecture that its configuration names."""

    def place(sample_id: str, caption: str, named: str) -> str:
        return _ai_toolkit_place(sample_id, caption, architecture or named)

    return _for_each("ai-toolkit", place, _save_ai_toolkit, has_one_length=True)


def _ai_toolkit_place(sample_id: str, caption: str, space: str) -> str:
    path = PurePosixPath(stem_of(sample_id))
    known_by = {"caption": caption, "text_embedding_space_version": space, "text_embedding_version": 1}
    digest = hashlib.md5(json.dumps(known_by, sort_keys=True).encode()).digest()
    name = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    return str(path.parent / "_t_e_cache" / f"{path.name}_{name}.safetensors")


def _save_ai_toolkit(sample: Sample, file: IO[bytes]) -> None:
    tensors = {"text_embed": sample.padded()[None]}
    if sample.clip is not None:
        tensors["pooled_embed"] = sample.clip.pooled[None].to(sample.states.dtype)
    file.write(safetensors(tensors))


def _simpletuner_place(sample_id: str, caption: str, named: str) -> str:
    return f"{hashlib.md5(caption.encode()).hexdigest()}-{named}.pt"


def _save_simpletuner(sample: Sample, file: IO[bytes]) -> None:
    trainers = sample.trainers
    content = {"prompt_embeds": (_joined(sample) if trainers.clips > 1 else sample.padded())[None]}
    if trainers.mask:
        mask = sample.mask().long()
        content[trainers.mask] = mask[None] if trainers.mask_has_batch else mask
    if trainers.clips:
        content["pooled_prompt_embeds"] = sample.with_clip.pooled.to(sample.states.dtype)
    if trainers.position_ids:
        content[trainers.position_ids] = torch.zeros(1, sample.length, 3)
    torch.save(content, file)


def _joined(sample: Sample) -> Tensor:
    """SD3's rows: CLIP's, filled up with zeros to the T5's width, and then the T5's."""
    states = sample.with_clip.states
    assert states is not None
    wide = torch.nn.functional.pad(states.to(sample.states.dtype), (0, sample.states.shape[1] - states.shape[1]))
    return torch.cat([wide, sample.padded()])


# What sd-scripts' stand-in for CLIP gives.
_ROWS_WITHOUT_CLIP = (77, 1)


def _sd_scripts_place(sample_id: str, caption: str, named: str) -> str:
    return f"{stem_of(sample_id)}_{named}_te.npz"


def _save_sd_scripts_flux(sample: Sample, file: IO[bytes]) -> None:
    """Of Flux; and of Chroma, which has a mask that it lengthens by itself, and in the place of CLIP's rows zeros."""
    has_clip = sample.trainers.clips > 0
    _save_npz(
        file,
        l_pooled=sample.with_clip.pooled if has_clip else torch.zeros(_ROWS_WITHOUT_CLIP),
        t5_out=sample.padded().float(),
        txt_ids=torch.zeros(sample.length, 3),
        t5_attn_mask=(torch.arange(sample.length) < sample.tokens).long(),
        apply_t5_attn_mask=not has_clip,
    )


def _save_sd_scripts_sd3(sample: Sample, file: IO[bytes]) -> None:
    clip = sample.with_clip
    assert clip.states is not None
    _save_npz(
        file,
        lg_out=clip.states,
        lg_pooled=clip.pooled,
        t5_out=sample.padded().float(),
        clip_l_attn_mask=clip.masks[0],
        clip_g_attn_mask=clip.masks[1],
        t5_attn_mask=sample.mask().long(),
        apply_lg_attn_mask=False,
        apply_t5_attn_mask=False,
    )


def _save_npz(file: IO[bytes], **content: Tensor | bool) -> None:
    arrays: dict[str, Any] = {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in content.items()
    }
    np.savez(file, **arrays)


MUSUBI_WAN = _for_each("musubi-wan", _musubi_place, _save_musubi)
PIXART = _for_each("pixart", _pixart_place, _save_pixart, has_one_length=True)
LTX = _for_each("ltx", _ltx_place, _save_ltx, has_one_length=True)
SIMPLETUNER = _for_each("simpletuner", _simpletuner_place, _save_simpletuner, shares_files=True, has_one_length=True)
# Their --t5xxl_max_token_length says how long rows are.
SD_SCRIPTS_FLUX = _for_each("sd-scripts-flux", _sd_scripts_place, _save_sd_scripts_flux)
SD_SCRIPTS_SD3 = _for_each("sd-scripts-sd3", _sd_scripts_place, _save_sd_scripts_sd3)
