"""What each diffusion model family expects of its T5, one row per family.

The rows say how the reference pipelines of diffusers call the encoder and what their transformers read of the result.
They are data: `family("pixart-sigma")` gives a frozen `Family`, nothing here needs torch.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, NamedTuple

from nai_t5_core.facts.text_cleaning import TextCleaning

PadTo = Literal["max_length", "longest", "none"]
Padding = Literal["attend", "exact", "skip", "trim"]
MaskDtype = Literal["bool", "int64", "float"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one diffusion model family uses its T5.

    Attributes:
        name: the family's name, in kebab-case.
        title: its name as people write it.
        aliases: other names that `family` takes.
        checkpoint: the hub id of the T5 that the family's encoder is, or was made from.
        pipelines: class names of its diffusers pipelines; empty where diffusers has none.
        max_length: tokens per prompt, end token included, that `encode_prompt` asks for by default.
        call_length: the same for a call of the whole pipeline, where that asks for another number; else None.
        length_limit: the greatest length that the pipeline takes; None where it sets no limit.
        pad_to: how long the rows of the result are: `max_length`, the longest prompt, or each its own length.
        encoder_mask: whether the pad mask is given to the encoder.
        padding: the policy that gives the consumer exactly what it reads, at the least work.
            `attend`: pads are ordinary tokens. `exact`: pads are no keys, but their rows are computed.
            `skip`: pad rows come back as zeros. `trim`: there are no pad rows.
        extra_pad: pad positions after the text that the returned mask counts as text.
        mask_dtype: what `encode_prompt` returns as mask, or None if it returns no mask.
        text_cleaning: what is done to the text first; see `text_cleaning.clean_text`.
        reason: why this padding policy.
        notes: what else a faithful caller has to know.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    checkpoint: str
    pipelines: tuple[str, ...]
    max_length: int
    call_length: int | None
    length_limit: int | None
    pad_to: PadTo
    encoder_mask: bool
    padding: Padding
    extra_pad: int
    mask_dtype: MaskDtype | None
    text_cleaning: TextCleaning
    reason: str
    notes: str

    @property
    def returns_mask(self) -> bool:
        """Whether `encode_prompt` returns a mask beside the embeddings."""
        return self.mask_dtype is not None


class _Facts(NamedTuple):
    """The columns of the table below; meanings as in `Family`."""

    name: str
    checkpoint: str
    max_length: int
    length_limit: int | None
    pad_to: PadTo
    encoder_mask: bool
    padding: Padding
    mask_dtype: MaskDtype | None
    text_cleaning: TextCleaning
    extra_pad: int = 0
    call_length: int | None = None


class _Words(NamedTuple):
    """The rest of a row, by keyword; meanings as in `Family`."""

    title: str
    reason: str
    pipelines: str = ""  # class names, without the word Pipeline at the end
    aliases: str = ""
    notes: str = ""


_V1_XXL, _XXL = "google-t5/t5-11b", "google/t5-v1_1-xxl"
_UMT5, _UMT5_BASE, _MT5_XL = "google/umt5-xxl", "google/umt5-base", "google/mt5-xl"
_PILE, _UL2, _BYT5 = "EleutherAI/pile-t5-xl", "google/flan-ul2", "google/byt5-small"
_T5_BASE, _FLAN_L = "google-t5/t5-base", "google/flan-t5-large"

# fmt: off
_FACTS = (
    #      name                checkpoint length limit pad_to       mask in  padding  mask out  text
    _Facts("flux",             _XXL,        512,   512, "max_length", False, "attend", None,    "none"),
    _Facts("visualcloze",      _XXL,        512,   512, "max_length", False, "attend", None,    "none"),
    _Facts("sd3",              _XXL,        256,   512, "max_length", False, "attend", None,    "none"),
    _Facts("cogvideox",        _XXL,        226,  None, "max_length", False, "attend", None,    "none"),
    _Facts("cogview3plus",     _XXL,        224,  None, "max_length", False, "attend", None,    "none"),
    _Facts("ltx-video",        _XXL,        128,  None, "max_length", False, "attend", "bool",  "none"),
    _Facts("hidream",          _XXL,        128,  None, "max_length", True,  "exact",  None,    "none"),
    _Facts("deepfloyd-if",     _XXL,         77,  None, "max_length", True,  "exact",  None,    "lower-strip"),
    _Facts("chroma",           _XXL,        512,   512, "max_length", True,  "exact",  "float", "none", extra_pad=1),
    _Facts("hunyuandit",       _MT5_XL,     256,  None, "max_length", True,  "exact",  "int64", "none"),
    _Facts("latte",            _XXL,        120,  None, "max_length", True,  "exact",  None,    "lower-strip"),
    _Facts("ace-step",         _UMT5_BASE,  256,  None, "longest",    True,  "exact",  None,    "none"),
    _Facts("pixart-alpha",     _XXL,        120,  None, "max_length", True,  "skip",   "int64", "lower-strip"),
    _Facts("pixart-sigma",     _XXL,        300,  None, "max_length", True,  "skip",   "int64", "lower-strip"),
    _Facts("allegro",          _XXL,        512,  None, "max_length", True,  "skip",   "int64", "lower-strip"),
    _Facts("ltx-condition",    _XXL,        256,  None, "max_length", True,  "skip",   "bool",  "none"),
    _Facts("mochi",            _XXL,        256,  None, "max_length", True,  "skip",   "bool",  "none"),
    _Facts("cosmos",           _V1_XXL,     512,  None, "max_length", True,  "skip",   None,    "none"),
    _Facts("auraflow",         _PILE,       256,  None, "max_length", True,  "skip",   "int64", "none"),
    _Facts("wan",              _UMT5,       226,  None, "max_length", True,  "skip",   None,    "wan", call_length=512),
    _Facts("helios",           _UMT5,       226,  None, "max_length", True,  "skip",   None,    "wan", call_length=512),
    _Facts("bria",             _XXL,        128,   512, "max_length", False, "skip",   None,    "none"),
    _Facts("kandinsky3",       _UL2,        128,  None, "max_length", True,  "skip",   "int64", "none"),
    _Facts("stable-audio",     _T5_BASE,    128,  None, "max_length", True,  "skip",   None,    "none"),
    _Facts("audioldm2",        _FLAN_L,     128,  None, "longest",    True,  "skip",   "int64", "none"),
    _Facts("longcat-audiodit", _UMT5,       512,  None, "longest",    True,  "skip",   None,    "none"),
    _Facts("hunyuanimage",     _BYT5,       128,  None, "max_length", True,  "skip",   "int64", "quoted"),
    _Facts("hunyuanvideo-1.5", _BYT5,       256,  None, "max_length", True,  "skip",   "float", "double-quoted"),
    _Facts("glm-image",        _BYT5,      2048,  None, "none",       True,  "trim",   None,    "none"),
)
# fmt: on

_NO_MASK = "no mask goes in, so text attends to pads, and the transformer reads every row"
_ALL_READ = "pads are masked in the encoder, but no mask comes out: the transformer reads the rows of the pads"
_MASKED = "the returned mask keeps the transformer's attention off pad rows"
_ZEROED = "the pipeline itself puts zeros in the pad rows"

_WORDS = {
    "flux": _Words(
        title="Flux.1",
        reason=_NO_MASK,
        pipelines="Flux FluxImg2Img FluxInpaint FluxFill FluxControl FluxControlImg2Img FluxControlInpaint "
        "FluxControlNet FluxControlNetImg2Img FluxControlNetInpaint FluxKontext FluxKontextInpaint "
        "FluxPriorRedux",
        aliases="flux.1 flux-dev flux-schnell flux-fill flux-kontext",
        notes="The schnell variant was made for 256 tokens. ComfyUI pads to 256 at least and never cuts.",
    ),
    "visualcloze": _Words(
        title="VisualCloze",
        reason=_NO_MASK,
        pipelines="VisualCloze VisualClozeGeneration",
        notes="The text is the layout prompt, the task prompt and a sentence on the last image, joined.",
    ),
    "sd3": _Words(
        title="Stable Diffusion 3 and 3.5",
        reason=_NO_MASK,
        pipelines="StableDiffusion3 StableDiffusion3Img2Img StableDiffusion3Inpaint StableDiffusion3ControlNet "
        "StableDiffusion3ControlNetInpainting StableDiffusion3PAG StableDiffusion3PAGImg2Img",
        aliases="sd3.5 stable-diffusion-3 stable-diffusion-3.5",
        notes="The rows follow CLIP's in one sequence. The T5 may be left out (zeros). ComfyUI pads to 77 at least.",
    ),
    "cogvideox": _Words(
        title="CogVideoX",
        reason=_NO_MASK,
        pipelines="CogVideoX CogVideoXImageToVideo CogVideoXVideoToVideo CogVideoXFunControl ConsisID",
        aliases="cogvideo consisid",
    ),
    "cogview3plus": _Words(
        title="CogView3 Plus",
        reason=_NO_MASK,
        pipelines="CogView3Plus",
        aliases="cogview3 cogview3-plus",
        notes="Without a negative prompt the negative embeddings are zeros; the encoder is not called.",
    ),
    "ltx-video": _Words(
        title="LTX-Video",
        reason="no mask goes in, so text attends to pads, although the transformer masks the rows of the pads",
        pipelines="LTX LTXImageToVideo LTXI2VLongMultiPrompt",
        aliases="ltx ltxv",
        notes="ComfyUI gives the encoder the mask, as ltx-condition does.",
    ),
    "hidream": _Words(
        title="HiDream",
        reason=_ALL_READ,
        pipelines="HiDreamImage",
        aliases="hidream-i1 hidream-image",
        notes="The length is cut to the tokenizer's own limit if that is smaller.",
    ),
    "deepfloyd-if": _Words(
        title="DeepFloyd IF",
        reason=_ALL_READ,
        pipelines="IF IFImg2Img IFInpainting IFSuperResolution IFImg2ImgSuperResolution IFInpaintingSuperResolution",
        aliases="if deepfloyd",
        notes="The length is fixed. With clean_caption the pipeline cleans much more than is done here.",
    ),
    "chroma": _Words(
        title="Chroma",
        reason="the mask is float and diffusers adds it to the logits: pad rows are read, with less weight",
        pipelines="Chroma ChromaImg2Img ChromaInpaint",
        notes="The returned mask also holds the first pad. Encoded inside the inpaint pipeline's call: 256. "
        "ComfyUI neither pads nor masks.",
    ),
    "hunyuandit": _Words(
        title="HunyuanDiT",
        reason="attention never sees a pad row, but the pooling that feeds the time embedding reads every row",
        pipelines="HunyuanDiT HunyuanDiTControlNet HunyuanDiTPAG",
        aliases="hunyuan-dit",
        notes="The T5 is the second encoder (text_encoder_index=1) and may be left out.",
    ),
    "latte": _Words(
        title="Latte",
        reason="a single negative prompt is cut to the length of the prompt and not its own: its pad rows are read",
        pipelines="Latte",
        notes="The length is fixed; a single prompt is then cut to its tokens, and the negative one to as many. "
        "Several prompts are multiplied by their masks, unless mask_feature=False.",
    ),
    "ace-step": _Words(
        title="ACE-Step",
        reason="ComfyUI masks pads in the encoder but hands no mask on, so pad rows would be read",
        aliases="ace acestep",
        notes="Only in ComfyUI, which sets no length; 256 is the authors' own, whose code hands on an int64 mask.",
    ),
    "pixart-alpha": _Words(
        title="PixArt-α",
        reason=_MASKED,
        pipelines="PixArtAlpha",
        notes="With clean_caption the pipeline cleans much more than is done here. ComfyUI neither pads nor masks.",
    ),
    "pixart-sigma": _Words(
        title="PixArt-Σ",
        reason=_MASKED,
        pipelines="PixArtSigma PixArtSigmaPAG",
        notes="With clean_caption the pipeline cleans much more than is done here. ComfyUI neither pads nor masks.",
    ),
    "allegro": _Words(
        title="Allegro",
        reason=_MASKED,
        pipelines="Allegro",
        notes="With clean_caption the pipeline cleans much more than is done here.",
    ),
    "ltx-condition": _Words(
        title="LTX-Video, conditioned",
        reason=_MASKED,
        pipelines="LTXCondition",
        aliases="ltxv-condition",
    ),
    "mochi": _Words(
        title="Mochi 1",
        reason=_MASKED,
        pipelines="Mochi",
        aliases="mochi-1 genmo-mochi",
        notes="With force_zeros_for_empty_prompt an empty last prompt masks every token of the whole batch.",
    ),
    "cosmos": _Words(
        title="Cosmos and Cosmos 2",
        reason=_ZEROED,
        pipelines="CosmosTextToWorld CosmosVideoToWorld Cosmos2TextToImage Cosmos2VideoToWorld",
        aliases="cosmos1 cosmos2 cosmos-predict2",
        notes="The zeros are written into the encoder's output.",
    ),
    "auraflow": _Words(
        title="AuraFlow",
        reason=_ZEROED,
        pipelines="AuraFlow",
        aliases="aura-flow",
        notes="Pads have the id 1, the end token 2. The returned mask is repeated over the width; nothing reads it.",
    ),
    "wan": _Words(
        title="Wan, SkyReels-V2, ChronoEdit, AnyFlow, Lucy Edit",
        reason=_ZEROED,
        pipelines="Wan WanImageToVideo WanVideoToVideo WanVACE WanAnimate SkyReelsV2 SkyReelsV2ImageToVideo "
        "SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingImageToVideo "
        "SkyReelsV2DiffusionForcingVideoToVideo ChronoEdit AnyFlow AnyFlowFAR LucyEdit",
        aliases="wan2.1 wan2.2 skyreels-v2 chronoedit anyflow lucy-edit",
        notes="The zero rows are attended to, so the length matters: models and pipeline calls use 512.",
    ),
    "helios": _Words(
        title="Helios",
        reason=_ZEROED,
        pipelines="Helios HeliosPyramid",
        notes="The zero rows are attended to, so the length matters: pipeline calls use 512.",
    ),
    "bria": _Words(
        title="Bria 3.2",
        reason="each prompt is encoded alone without pads, then zero rows are appended",
        pipelines="Bria",
        aliases="bria-3.2",
        notes="Without a negative prompt the negative embeddings are zeros; the encoder is not called.",
    ),
    "kandinsky3": _Words(
        title="Kandinsky 3",
        reason=_ZEROED,
        pipelines="Kandinsky3 Kandinsky3Img2Img",
        aliases="kandinsky-3",
        notes="The length is fixed; a pipeline call then cuts all rows to the longest prompt and one pad, and a mean "
        "over the rows counts that pad. Without a negative prompt the negative embeddings are zeros.",
    ),
    "stable-audio": _Words(
        title="Stable Audio Open",
        reason="pad rows are multiplied by the mask after a projection",
        pipelines="StableAudio",
        aliases="stable-audio-1 stable-audio-open",
        notes="The length is the tokenizer's own limit, 128 in the published checkpoint.",
    ),
    "audioldm2": _Words(
        title="AudioLDM 2",
        reason=_MASKED,
        pipelines="AudioLDM2",
        aliases="audioldm-2",
        notes="The length is the tokenizer's own limit, 128 in converted checkpoints. "
        "The negative prompt is padded to the length of the positive one.",
    ),
    "longcat-audiodit": _Words(
        title="LongCat-AudioDiT",
        reason="the transformer puts zeros in the pad rows as they come in",
        pipelines="LongCatAudioDiT",
        aliases="longcat longcat-audio-dit",
        notes="The length is the tokenizer's own limit if that is 1 to 32768. Lengths are returned instead of a mask. "
        "The embedding output is read too: both are normalised and added. A pipeline call lower-cases the prompt, "
        "blanks double and curly quotes and collapses whitespace; the negative prompt stays as it is.",
    ),
    "hunyuanimage": _Words(
        title="HunyuanImage 2.1",
        reason=_MASKED,
        pipelines="HunyuanImage",
        aliases="hunyuanimage-2.1 hunyuan-image",
        notes="The weights are ByT5 small trained on for glyphs. Only quoted text is encoded, one prompt at a time "
        "with a float32 mask; a prompt without quotes gives zeros without calling the encoder.",
    ),
    "hunyuanvideo-1.5": _Words(
        title="HunyuanVideo 1.5",
        reason=_MASKED,
        pipelines="HunyuanVideo15 HunyuanVideo15ImageToVideo",
        aliases="hunyuanvideo1.5 hunyuan-video-1.5",
        notes="As hunyuanimage, with text in double quotes only and a larger embedding table. The returned mask has "
        "the dtype of the first encoder.",
    ),
    "glm-image": _Words(
        title="GLM-Image",
        reason="only the rows of valid tokens are read, joined into one sequence",
        pipelines="GlmImage",
        aliases="glmimage",
        notes="Each quoted part of a prompt is a text of its own (without one: the empty text). If their number is "
        "even each gets a pad id in front, unmasked. Joined prompts are padded with zeros on the left.",
    ),
}


def _row(facts: _Facts) -> Family:
    words = _WORDS[facts.name]
    return Family(
        **facts._asdict(),
        title=words.title,
        aliases=tuple(words.aliases.split()),
        pipelines=tuple(f"{name}Pipeline" for name in words.pipelines.split()),
        reason=words.reason,
        notes=words.notes,
    )


def _key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


_FAMILIES = {facts.name: _row(facts) for facts in _FACTS}
_INDEX = {_key(name): row for row in _FAMILIES.values() for name in (row.name, *row.aliases, *row.pipelines)}


def family_names() -> list[str]:
    """The names of all families, sorted, without aliases."""
    return sorted(_FAMILIES)


def family(name: str) -> Family:
    """The row of one family.

    Args:
        name: a family's name, an alias or the class name of a diffusers pipeline; case does not matter, and
            underscores or spaces may stand for hyphens.

    Raises:
        ValueError: no family has this name.
    """
    found = _INDEX.get(_key(name))
    if found is None:
        close = get_close_matches(_key(name), _INDEX, n=1)
        hint = f" Did you mean {_INDEX[close[0]].name!r}?" if close else ""
        raise ValueError(f"Unknown family {name!r}; known: {', '.join(family_names())}.{hint}")
    return found
