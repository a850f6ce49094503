"""Families that make sound."""

from nai_t5_core.facts.families.record import ComfyAlone, Diffusers, Family
from nai_t5_core.facts.families.shared import MASKED, UMT5_XXL

FAMILIES = (
    Family(
        name="stable-audio",
        title="Stable Audio Open",
        aliases=("stable-audio-1", "stable-audio-open"),
        checkpoint="google-t5/t5-base",
        max_length=128,
        padding="skip",
        reason="pad rows are multiplied by the mask after a projection",
        notes="The length is the tokenizer's own limit, 128 in the published checkpoint.",
        diffusers=Diffusers(
            pipelines=("StableAudioPipeline",),
            outputs=("prompt_embeds",),
            zeros_without_negative=True,
            tokenizer_limit="is-the-length",
            call_takes="unprojected",
        ),
        comfy=ComfyAlone(
            name="stable_audio",
            title="Stable Audio",
            module="comfy.text_encoders.sa_t5",
            model="SAT5Model",
            tokenizer="SAT5Tokenizer",
            slot="t5base",
        ),
    ),
    Family(
        name="ace-step",
        title="ACE-Step",
        aliases=("ace", "acestep"),
        checkpoint="google/umt5-base",
        max_length=256,
        pad_to="longest",
        padding="exact",
        reason="ComfyUI masks pads in the encoder but hands no mask on, so pad rows would be read",
        notes="Only in ComfyUI, which sets no length; 256 is the authors' own, whose code hands on an int64 mask.",
        comfy=ComfyAlone(
            name="ace",
            title="ACE-Step",
            module="comfy.text_encoders.ace",
            model="AceT5Model",
            tokenizer="AceT5Tokenizer",
            slot="umt5base",
            # ComfyUI prefixes this option with the T5's name, which is empty here.
            config_key="_model_config",
        ),
    ),
    Family(
        name="audioldm2",
        title="AudioLDM 2",
        aliases=("audioldm-2",),
        checkpoint="google/flan-t5-large",
        max_length=128,
        pad_to="longest",
        padding="skip",
        mask_dtype="int64",
        reason=MASKED,
        notes=(
            "The length is the tokenizer's own limit, 128 in converted checkpoints. The negative prompt is "
            "padded to the length of the positive one."
        ),
        diffusers=Diffusers(
            pipelines=("AudioLDM2Pipeline",),
            outputs=("prompt_embeds", "attention_mask", "generated_prompt_embeds"),
            tokenizer_limit="is-the-length",
            one_chunk="its language model goes on from the whole text",
            call_takes="halves",
        ),
    ),
    Family(
        name="longcat-audiodit",
        title="LongCat-AudioDiT",
        aliases=("longcat", "longcat-audio-dit"),
        checkpoint=UMT5_XXL,
        max_length=512,
        pad_to="longest",
        padding="skip",
        reason="the transformer puts zeros in the pad rows as they come in",
        notes=(
            "The length is the tokenizer's own limit if that is 1 to 32768. Lengths are returned instead of "
            "a mask. The embedding output is read too: both are normalised and added. A pipeline call "
            "lower-cases the prompt, blanks double and curly quotes and collapses whitespace; the negative "
            "prompt stays as it is."
        ),
        diffusers=Diffusers(
            pipelines=("LongCatAudioDiTPipeline",),
            outputs=("prompt_embeds", "lengths"),
            tokenizer_limit="is-the-length",
            not_predicted="normalises each row",
            one_chunk="its call takes no embeddings",
            call_takes="nothing",
        ),
    ),
)
