"""PixArt and similar families, whose pipelines lower-case the prompt and may clean it as a caption."""

from nai_t5_core.facts.families.record import ComfyAlone, Diffusers, Family, Trainers
from nai_t5_core.facts.families.shared import ALL_READ, MASKED, V1_1_XXL, WITH_MASKS

_PIXART = ComfyAlone(
    name="pixart",
    title="PixArt",
    module="comfy.text_encoders.pixart_t5",
    model="pixart_te",
    tokenizer="PixArtTokenizer",
)

FAMILIES = (
    Family(
        name="pixart-alpha",
        title="PixArt-α",
        checkpoint=V1_1_XXL,
        max_length=120,
        padding="skip",
        mask_dtype="int64",
        text_cleaning="lower-strip",
        reason=MASKED,
        notes="With clean_caption the pipeline cleans much more than is done here. ComfyUI neither pads nor masks.",
        diffusers=Diffusers(pipelines=("PixArtAlphaPipeline",), outputs=WITH_MASKS),
        comfy=_PIXART,
        trainers=Trainers(names={"pixart": "pixart"}),
    ),
    Family(
        name="pixart-sigma",
        title="PixArt-Σ",
        checkpoint=V1_1_XXL,
        max_length=300,
        padding="skip",
        mask_dtype="int64",
        text_cleaning="lower-strip",
        reason=MASKED,
        notes="With clean_caption the pipeline cleans much more than is done here. ComfyUI neither pads nor masks.",
        diffusers=Diffusers(pipelines=("PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"), outputs=WITH_MASKS),
        comfy=_PIXART,
        trainers=Trainers(
            names={"pixart": "pixart", "simpletuner": "pixart_sigma"}, mask="attention_mask", mask_has_batch=False
        ),
    ),
    Family(
        name="allegro",
        title="Allegro",
        checkpoint=V1_1_XXL,
        max_length=512,
        padding="skip",
        mask_dtype="int64",
        text_cleaning="lower-strip",
        reason=MASKED,
        notes="With clean_caption the pipeline cleans much more than is done here.",
        diffusers=Diffusers(pipelines=("AllegroPipeline",), outputs=WITH_MASKS),
    ),
    Family(
        name="latte",
        title="Latte",
        checkpoint=V1_1_XXL,
        max_length=120,
        padding="exact",
        text_cleaning="lower-strip",
        reason="a single negative prompt is cut to the length of the prompt and not its own: its pad rows are read",
        notes=(
            "The length is fixed; a single prompt is then cut to its tokens, and the negative one to as "
            "many. Several prompts are multiplied by their masks, unless mask_feature=False."
        ),
        diffusers=Diffusers(
            pipelines=("LattePipeline",), one_chunk="its negative prompt is cut to the tokens of the prompt"
        ),
    ),
    Family(
        name="deepfloyd-if",
        title="DeepFloyd IF",
        aliases=("if", "deepfloyd"),
        checkpoint=V1_1_XXL,
        max_length=77,
        padding="exact",
        text_cleaning="lower-strip",
        reason=ALL_READ,
        notes="The length is fixed. With clean_caption the pipeline cleans much more than is done here.",
        diffusers=Diffusers(
            pipelines=(
                "IFPipeline",
                "IFImg2ImgPipeline",
                "IFInpaintingPipeline",
                "IFSuperResolutionPipeline",
                "IFImg2ImgSuperResolutionPipeline",
                "IFInpaintingSuperResolutionPipeline",
            )
        ),
    ),
)
