"""OneTrainer trains Chroma, Flux, PixArt-Alpha, SD3 or HiDream on the embeddings of a caption set. From its folder, in
the place of ``scripts/train.py``:

python …/onetrainer_captions.py captions-chroma --config-path chroma.json
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from nai_t5_core import EmbeddingDataset


def reader(folder: str) -> Any:
    """What answers in the place of ``EncodeT5Text.get_item``: with the embedding of the prompt that it would encode."""
    dataset = EmbeddingDataset(folder)
    ids, feeding = dataset.ids_by_caption(), dataset.plan.recipe.feeding

    def get_item(self: Any, variation: int, index: int, requested_name: str | None = None) -> dict[str, Any]:
        tokens = self._get_previous_item(variation, self.tokens_in_name, index)
        attends = self.tokens_attention_mask_in_name is None
        if (feeding.max_length, feeding.padding == "attend") != (len(tokens), attends):
            needed = f"--max-length {len(tokens)}{' --padding attend' if attends else ', and not --padding attend'}"
            raise ValueError(f"{folder} was made otherwise than this model is trained; make a set with {needed}")
        states, _ = dataset.batch([ids[self._get_previous_item(variation, "prompt", index)]], pad_to=len(tokens))
        return {self.hidden_state_out_name: states[0].to(tokens.device)}

    return get_item


if __name__ == "__main__":
    sys.path.insert(0, "scripts")
    sys.path.insert(0, ".")
    from mgds.pipelineModules.EncodeT5Text import EncodeT5Text  # type: ignore[import-not-found]

    EncodeT5Text.get_item = reader(sys.argv.pop(1))
    runpy.run_path("scripts/train.py", run_name="__main__")
