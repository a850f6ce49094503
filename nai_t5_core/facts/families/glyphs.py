"""Families whose ByT5 reads only the quoted parts of a prompt, so that the model draws their letters correctly."""

from nai_t5_core.facts.families.record import Diffusers, Family
from nai_t5_core.facts.families.shared import MASKED

_BYT5 = "google/byt5-small"
_WITH_GLYPHS = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
_QUOTED_ONLY = "only quoted parts of a prompt are encoded"

FAMILIES = (
    Family(
        name="hunyuanimage",
        title="HunyuanImage 2.1",
        aliases=("hunyuanimage-2.1", "hunyuan-image"),
        checkpoint=_BYT5,
        max_length=128,
        padding="skip",
        mask_dtype="int64",
        text_cleaning="quoted",
        reason=MASKED,
        notes=(
            "The weights are ByT5 small trained on for glyphs. Only quoted text is encoded, one prompt at a "
            "time with a float32 mask; a prompt without quotes gives zeros without calling the encoder."
        ),
        diffusers=Diffusers(
            pipelines=("HunyuanImagePipeline",), outputs=_WITH_GLYPHS, runs="negative-apart", one_chunk=_QUOTED_ONLY
        ),
    ),
    Family(
        name="hunyuanvideo-1.5",
        title="HunyuanVideo 1.5",
        aliases=("hunyuanvideo1.5", "hunyuan-video-1.5"),
        checkpoint=_BYT5,
        max_length=256,
        padding="skip",
        mask_dtype="float",
        text_cleaning="double-quoted",
        reason=MASKED,
        notes=(
            "As hunyuanimage, with text in double quotes only and a larger embedding table. The returned "
            "mask has the dtype of the first encoder."
        ),
        diffusers=Diffusers(
            pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
            outputs=_WITH_GLYPHS,
            runs="negative-apart",
            one_chunk=_QUOTED_ONLY,
        ),
    ),
    Family(
        name="glm-image",
        title="GLM-Image",
        aliases=("glmimage",),
        checkpoint=_BYT5,
        max_length=2048,
        pad_to="none",
        padding="trim",
        reason="only the rows of valid tokens are read, joined into one sequence",
        notes=(
            "Each quoted part of a prompt is a text of its own (without one: the empty text). If their "
            "number is even each gets a pad id in front, unmasked. Joined prompts are padded with zeros on "
            "the left."
        ),
        diffusers=Diffusers(
            pipelines=("GlmImagePipeline",),
            not_predicted="changes these prompts itself",
            one_chunk=_QUOTED_ONLY,
            call_takes="prompt-only",
        ),
    ),
)
