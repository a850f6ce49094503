"""Other families that make images."""

from nai_t5_core.facts.families.record import ComfyAlone, Diffusers, Family, Trainers
from nai_t5_core.facts.families.shared import NO_MASK, V1_1_XXL, WITH_MASKS, ZEROED

FAMILIES = (
    Family(
        name="auraflow",
        title="AuraFlow",
        aliases=("aura-flow",),
        checkpoint="EleutherAI/pile-t5-xl",
        max_length=256,
        padding="skip",
        mask_dtype="int64",
        reason=ZEROED,
        notes="Pads have the id 1, the end token 2. The returned mask is repeated over the width; nothing reads it.",
        diffusers=Diffusers(pipelines=("AuraFlowPipeline",), outputs=WITH_MASKS),
        comfy=ComfyAlone(
            name="auraflow",
            title="AuraFlow",
            module="comfy.text_encoders.aura_t5",
            model="AuraT5Model",
            tokenizer="AuraT5Tokenizer",
            slot="pile_t5xl",
        ),
        trainers=Trainers(names={"simpletuner": "auraflow"}, mask="prompt_attention_mask"),
    ),
    Family(
        name="cogview3plus",
        title="CogView3 Plus",
        aliases=("cogview3", "cogview3-plus"),
        checkpoint=V1_1_XXL,
        max_length=224,
        encoder_mask=False,
        padding="attend",
        reason=NO_MASK,
        notes="Without a negative prompt the negative embeddings are zeros; the encoder is not called.",
        diffusers=Diffusers(
            pipelines=("CogView3PlusPipeline",),
            zeros_without_negative=True,
            one_chunk="its call takes no negative embeddings",
            call_takes="negative-text",
        ),
    ),
    Family(
        name="kandinsky3",
        title="Kandinsky 3",
        aliases=("kandinsky-3",),
        checkpoint="google/flan-ul2",
        max_length=128,
        padding="skip",
        mask_dtype="int64",
        reason=ZEROED,
        notes=(
            "The length is fixed; a pipeline call then cuts all rows to the longest prompt and one pad, and "
            "a mean over the rows counts that pad. Without a negative prompt the negative embeddings are "
            "zeros."
        ),
        diffusers=Diffusers(
            pipelines=("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"),
            outputs=("prompt_embeds", "negative_prompt_embeds", "attention_mask", "negative_attention_mask"),
            zeros_without_negative=True,
            one_chunk="its model averages over the rows, which are cut to the longest prompt",
        ),
    ),
    Family(
        name="hunyuandit",
        title="HunyuanDiT",
        aliases=("hunyuan-dit",),
        checkpoint="google/mt5-xl",
        max_length=256,
        padding="exact",
        mask_dtype="int64",
        reason="attention never sees a pad row, but the pooling that feeds the time embedding reads every row",
        notes="The T5 is the second encoder (text_encoder_index=1) and may be left out.",
        diffusers=Diffusers(
            pipelines=("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", "HunyuanDiTPAGPipeline"),
            outputs=(
                "prompt_embeds",
                "negative_prompt_embeds",
                "prompt_attention_mask",
                "negative_prompt_attention_mask",
            ),
            runs="by-encoder",
            one_chunk="its transformer has one learned value for each pad position",
        ),
    ),
)
