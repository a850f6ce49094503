"""Real pipeline classes of diffusers around tiny random parts, one for each way that a family uses its T5.

Every weight of the denoisers is redrawn, because many of them begin at zero and would let nothing of a prompt through.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import toy_audio
import toy_images
import toy_videos
from toy_parts import NEGATIVE, PROMPT, T5, UMT5, VOCABULARY, Toy, text_encoder, tokenizer

__all__ = ["NEGATIVE", "PROMPT", "T5", "TOYS", "UMT5", "VOCABULARY", "Toy", "make", "text_encoder", "tokenizer"]

_NEEDS = {"stable-audio": "torchsde", "skyreels-v2": "ftfy", "helios": "ftfy"}


def make(name: str) -> Toy:
    """The toy of a family, quiet; the test is skipped where a package is missing that the pipeline itself needs."""
    if name in _NEEDS:
        pytest.importorskip(_NEEDS[name], reason=f"diffusers' own {name} pipeline needs {_NEEDS[name]}")
    toy = TOYS[name]()
    toy.pipe.set_progress_bar_config(disable=True)
    return toy


TOYS: dict[str, Callable[[], Toy]] = {
    "flux": toy_images.flux,
    "visualcloze": toy_images.visualcloze,
    "sd3": toy_images.sd3,
    "cogvideox": toy_videos.cogvideox,
    "cogview3plus": toy_images.cogview3plus,
    "ltx-video": toy_videos.ltx_video,
    "hidream": toy_images.hidream,
    "deepfloyd-if": toy_images.deepfloyd_if,
    "chroma": toy_images.chroma,
    "hunyuandit": toy_images.hunyuandit,
    "pixart-alpha": toy_images.pixart_alpha,
    "pixart-sigma": toy_images.pixart_sigma,
    "allegro": toy_videos.allegro,
    "latte": toy_videos.latte,
    "ltx-condition": toy_videos.ltx_condition,
    "mochi": toy_videos.mochi,
    "cosmos": toy_videos.cosmos2,
    "auraflow": toy_images.auraflow,
    "wan": toy_videos.wan,
    "skyreels-v2": toy_videos.skyreels_v2,
    "helios": toy_videos.helios,
    "bria": toy_images.bria,
    "kandinsky3": toy_images.kandinsky3,
    "stable-audio": toy_audio.stable_audio,
    "longcat-audiodit": toy_audio.longcat_audiodit,
    "audioldm2": toy_audio.audioldm2,
    "hunyuanimage": toy_images.hunyuanimage,
    "hunyuanvideo-1.5": toy_videos.hunyuanvideo_1_5,
    "glm-image": toy_images.glm_image,
}
