"""OneTrainer trains Chroma, Flux, PixArt-Alpha, SD3 or HiDream on the embeddings of a caption set. From its folder, in
the place of ``scripts/train.py``:

python …/onetrainer_captions.py captions-chroma --config-path chroma.json
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from nai_t5_core import EmbeddingDataset

# By "model_type" of the trainer's configuration.
FAMILIES = {
    "CHROMA_1": "chroma",
    "FLUX_DEV_1": "flux",
    "FLUX_FILL_DEV_1": "flux",
    "PIXART_ALPHA": "pixart-alpha",
    "STABLE_DIFFUSION_3": "sd3",
    "STABLE_DIFFUSION_35": "sd3",
    "HI_DREAM_FULL": "hidream",
}


def reader(folder: str, model_type: str) -> Any:
    """What answers in the place of ``EncodeT5Text.get_item``: with the embedding of the prompt that it would encode.

    Raises:
        ValueError: the set was made for another model; later, with another length or padding, or a caption is not in
            it.
    """
    dataset = EmbeddingDataset(folder)
    feeding = dataset.plan.recipe.feeding
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}; sets are read for {', '.join(FAMILIES)}")
    if feeding.family != FAMILIES[model_type]:
        raise ValueError(
            f"{folder} was made for {feeding.family or 'no family'}, and {model_type} is trained; make a set with "
            f"--family {FAMILIES[model_type]}"
        )

    def get_item(self: Any, variation: int, index: int, requested_name: str | None = None) -> dict[str, Any]:
        tokens = self._get_previous_item(variation, self.tokens_in_name, index)
        attends = self.tokens_attention_mask_in_name is None
        if (feeding.max_length, feeding.padding == "attend") != (len(tokens), attends):
            needed = f"--max-length {len(tokens)}{' --padding attend' if attends else ', and not --padding attend'}"
            raise ValueError(f"{folder} was made otherwise than this model is trained; make a set with {needed}")
        caption = self._get_previous_item(variation, "prompt", index)
        states, _ = dataset.batch([dataset.id_of_caption(caption)], pad_to=len(tokens))
        return {self.hidden_state_out_name: states[0].to(tokens.device)}

    return get_item


def model_type_of(arguments: list[str]) -> str:
    """What the configuration trains that the trainer is given.

    Raises:
        ValueError: it names no model.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config-path", type=Path, required=True)
    config: Path = parser.parse_known_args(arguments)[0].config_path
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"{config} has no model_type; it has to name one of {', '.join(FAMILIES)}")
    return model_type


if __name__ == "__main__":
    sys.path.insert(0, "scripts")
    sys.path.insert(0, ".")
    from mgds.pipelineModules.EncodeT5Text import EncodeT5Text  # type: ignore[import-not-found]

    EncodeT5Text.get_item = reader(sys.argv.pop(1), model_type_of(sys.argv[1:]))
    runpy.run_path("scripts/train.py", run_name="__main__")
