"""Families that make videos, and whose T5 reads the whole prompt."""

from nai_t5_core.facts.families.record import ComfyAlone, Diffusers, Family
from nai_t5_core.facts.families.shared import MASKED, NO_MASK, UMT5_XXL, V1_1_XXL, WITH_MASKS, ZEROED

_LTXV = ComfyAlone(
    name="ltxv", title="LTX-Video", module="comfy.text_encoders.lt", model="ltxv_te", tokenizer="LTXVT5Tokenizer"
)

FAMILIES = (
    Family(
        name="ltx-video",
        title="LTX-Video",
        aliases=("ltx", "ltxv"),
        checkpoint=V1_1_XXL,
        max_length=128,
        encoder_mask=False,
        padding="attend",
        mask_dtype="bool",
        reason="no mask goes in, so text attends to pads, although the transformer masks the rows of the pads",
        notes="ComfyUI gives the encoder the mask, as ltx-condition does.",
        diffusers=Diffusers(
            pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXI2VLongMultiPromptPipeline"), outputs=WITH_MASKS
        ),
        comfy=_LTXV,
    ),
    Family(
        name="ltx-condition",
        title="LTX-Video, conditioned",
        aliases=("ltxv-condition",),
        checkpoint=V1_1_XXL,
        max_length=256,
        padding="skip",
        mask_dtype="bool",
        reason=MASKED,
        diffusers=Diffusers(pipelines=("LTXConditionPipeline",), outputs=WITH_MASKS),
        comfy=_LTXV,
    ),
    Family(
        name="mochi",
        title="Mochi 1",
        aliases=("mochi-1", "genmo-mochi"),
        checkpoint=V1_1_XXL,
        max_length=256,
        padding="skip",
        mask_dtype="bool",
        reason=MASKED,
        notes="With force_zeros_for_empty_prompt an empty last prompt masks every token of the whole batch.",
        diffusers=Diffusers(pipelines=("MochiPipeline",), outputs=WITH_MASKS),
        comfy=ComfyAlone(
            name="mochi",
            title="Mochi",
            module="comfy.text_encoders.genmo",
            model="mochi_te",
            tokenizer="MochiT5Tokenizer",
        ),
    ),
    Family(
        name="cogvideox",
        title="CogVideoX",
        aliases=("cogvideo", "consisid"),
        checkpoint=V1_1_XXL,
        max_length=226,
        encoder_mask=False,
        padding="attend",
        reason=NO_MASK,
        diffusers=Diffusers(
            pipelines=(
                "CogVideoXPipeline",
                "CogVideoXImageToVideoPipeline",
                "CogVideoXVideoToVideoPipeline",
                "CogVideoXFunControlPipeline",
                "ConsisIDPipeline",
            ),
            one_chunk="its transformer has positions for one piece of text",
        ),
        comfy=ComfyAlone(
            name="cogvideox",
            title="CogVideoX",
            module="comfy.text_encoders.cogvideo",
            model="cogvideo_te",
            tokenizer="CogVideoXTokenizer",
        ),
    ),
    Family(
        name="cosmos",
        title="Cosmos and Cosmos 2",
        aliases=("cosmos1", "cosmos2", "cosmos-predict2"),
        checkpoint="google-t5/t5-11b",
        max_length=512,
        padding="skip",
        reason=ZEROED,
        notes="The zeros are written into the encoder's output.",
        diffusers=Diffusers(
            pipelines=(
                "CosmosTextToWorldPipeline",
                "CosmosVideoToWorldPipeline",
                "Cosmos2TextToImagePipeline",
                "Cosmos2VideoToWorldPipeline",
            )
        ),
        comfy=ComfyAlone(
            name="cosmos",
            title="Cosmos",
            module="comfy.text_encoders.cosmos",
            model="te",
            tokenizer="CosmosT5Tokenizer",
        ),
    ),
    Family(
        name="wan",
        title="Wan, SkyReels-V2, ChronoEdit, AnyFlow, Lucy Edit",
        aliases=("wan2.1", "wan2.2", "skyreels-v2", "chronoedit", "anyflow", "lucy-edit"),
        checkpoint=UMT5_XXL,
        max_length=226,
        call_length=512,
        padding="skip",
        text_cleaning="wan",
        reason=ZEROED,
        notes="The zero rows are attended to, so the length matters: models and pipeline calls use 512.",
        diffusers=Diffusers(
            pipelines=(
                "WanPipeline",
                "WanImageToVideoPipeline",
                "WanVideoToVideoPipeline",
                "WanVACEPipeline",
                "WanAnimatePipeline",
                "SkyReelsV2Pipeline",
                "SkyReelsV2ImageToVideoPipeline",
                "SkyReelsV2DiffusionForcingPipeline",
                "SkyReelsV2DiffusionForcingImageToVideoPipeline",
                "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
                "ChronoEditPipeline",
                "AnyFlowPipeline",
                "AnyFlowFARPipeline",
                "LucyEditPipeline",
            )
        ),
        comfy=ComfyAlone(
            name="wan",
            title="Wan",
            module="comfy.text_encoders.wan",
            model="te",
            tokenizer="WanT5Tokenizer",
            slot="umt5xxl",
        ),
    ),
    Family(
        name="helios",
        title="Helios",
        checkpoint=UMT5_XXL,
        max_length=226,
        call_length=512,
        padding="skip",
        text_cleaning="wan",
        reason=ZEROED,
        notes="The zero rows are attended to, so the length matters: pipeline calls use 512.",
        diffusers=Diffusers(pipelines=("HeliosPipeline", "HeliosPyramidPipeline")),
    ),
)
