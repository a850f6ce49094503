"""Which of ComfyUI's own classes serve each model family whose only text encoder is a T5.

They decide what the diffusion model is used to: lengths, masks, padding, how a weight of 1.2 is applied. Classes are
named and not imported, since an older server may lack some.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nai_t5_core.facts.config import T5Config


@dataclass(frozen=True)
class ServerFamily:
    """One family.

    Attributes:
        name: what the user chooses.
        title: what people call the models.
        module, model, tokenizer: ComfyUI's module under ``comfy.text_encoders``, and the names in it of the model's
            class (or of a function that makes it) and of the tokenizer's class.
        slot: the name of the T5 in the model, and of its tokens.
        kind, width: what the diffusion model was trained with; None: anything goes.
        config_key: the option by which ComfyUI takes other sizes for this model.
    """

    name: str
    title: str
    module: str
    model: str
    tokenizer: str
    slot: str
    kind: str | None
    width: int | None
    config_key: str = ""

    @property
    def size_option(self) -> str:
        return self.config_key or f"{self.slot}_model_config"

    @property
    def brings_no_tokenizer(self) -> bool:
        """Whether ComfyUI's classes want the SentencePiece model of the file."""
        return self.slot.startswith("umt5")

    def classes(self) -> tuple[Any, Any]:
        """The classes of the model and of its tokenizer.

        Raises:
            ValueError: this ComfyUI is older than its support for the family.
        """
        try:
            home = import_module(self.module)
        except ModuleNotFoundError as error:
            raise ValueError(f"this ComfyUI does not know {self.title}; update it, or choose another family") from error
        model = getattr(home, self.model)
        return (model if isinstance(model, type) else model()), getattr(home, self.tokenizer)

    def check(self, config: T5Config) -> None:
        """Raises a ValueError if the family cannot use a T5 like this."""
        if self.kind not in (None, config.kind) or self.width not in (None, config.d_model):
            raise ValueError(
                f"{self.title} was trained with a {self.kind} of width {self.width}; this file holds a {config.kind} "
                f"of width {config.d_model}. Choose the right file, or the family that it belongs to"
            )


def _family(name: str, title: str, module: str, model: str, tokenizer: str, *facts: Any) -> ServerFamily:
    return ServerFamily(name, title, f"comfy.text_encoders.{module}", model, tokenizer, *facts)


_XXL = ("t5xxl", "T5 v1.1", 4096)
# fmt: off
_ROWS = (
    _family("pixart", "PixArt", "pixart_t5", "pixart_te", "PixArtTokenizer", *_XXL),
    _family("chroma", "Chroma", "pixart_t5", "pixart_te", "PixArtTokenizer", *_XXL),
    _family("ltxv", "LTX-Video", "lt", "ltxv_te", "LTXVT5Tokenizer", *_XXL),
    _family("mochi", "Mochi", "genmo", "mochi_te", "MochiT5Tokenizer", *_XXL),
    _family("cogvideox", "CogVideoX", "cogvideo", "cogvideo_te", "CogVideoXTokenizer", *_XXL),
    _family("cosmos", "Cosmos", "cosmos", "te", "CosmosT5Tokenizer", "t5xxl", "T5 v1.0", 1024),
    _family("wan", "Wan", "wan", "te", "WanT5Tokenizer", "umt5xxl", "UMT5", 4096),
    _family("auraflow", "AuraFlow", "aura_t5", "AuraT5Model", "AuraT5Tokenizer", "pile_t5xl", "Pile-T5", 2048),
    _family("stable_audio", "Stable Audio", "sa_t5", "SAT5Model", "SAT5Tokenizer", "t5base", "T5 v1.0", 768),
    # ComfyUI gives ACE's T5 no name, so its sizes go by the empty one.
    _family("ace", "ACE-Step", "ace", "AceT5Model", "AceT5Tokenizer", "umt5base", "UMT5", 768, "_model_config"),
    ServerFamily("t5", "no family", "comfy_nai_t5.plain", "PlainModel", "PlainTokenizer", "t5", None, None),
)
# fmt: on
FAMILIES = {row.name: row for row in _ROWS}
AUTO = "auto"
# Those with other text encoders beside the T5, which is a v1.1 XXL: ComfyUI's names for them, and how many files each
# takes. With another number ComfyUI would take them for another family.
JOINT_FAMILIES = {"flux": (2,), "sd3": (1, 2, 3), "hidream": (1, 2, 4)}


def family_for(config: T5Config, name: str = AUTO) -> ServerFamily:
    """The family of this name; with ``"auto"`` the one that is known by its T5.

    Raises:
        ValueError: no such family, several that use this T5, or one that cannot use it.
    """
    if name != AUTO:
        if name not in FAMILIES:
            raise ValueError(f"unknown family {name!r}; known: {AUTO}, {', '.join(FAMILIES)}")
        FAMILIES[name].check(config)
        return FAMILIES[name]
    fitting = [row for row in FAMILIES.values() if row.kind and (row.kind, row.width) == (config.kind, config.d_model)]
    if len(fitting) > 1:
        raise ValueError(
            f"a {config.kind} of width {config.d_model} is the text encoder of several families; choose one of "
            f"{', '.join(row.name for row in fitting)} (for Flux, SD3 and HiDream take Load CLIP + T5)"
        )
    return fitting[0] if fitting else FAMILIES["t5"]


def check_joint(name: str, files: int, config: T5Config | None) -> None:
    """Raises a ValueError unless the family takes this number of files, of which one is a T5 of this config."""
    if name not in JOINT_FAMILIES:
        raise ValueError(f"unknown family {name!r}; allowed: {', '.join(JOINT_FAMILIES)}")
    allowed = JOINT_FAMILIES[name]
    if files not in allowed:
        raise ValueError(f"{name} takes {' or '.join(map(str, allowed))} text encoder files and {files} were given")
    if config is None:
        raise ValueError("none of these files holds a T5; choose the file of the T5")
    if config.kind != "T5 v1.1":
        raise ValueError(
            f"{name} was trained with a T5 v1.1, and this file holds a {config.kind}; choose the right one"
        )


def server_config(config: T5Config) -> dict[str, Any]:
    """The sizes in the words of ComfyUI's config files."""
    return {
        **config.model_dump(include={"vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"}),
        "is_gated_act": config.gated,
        "dense_act_fn": "gelu_pytorch_tanh" if config.gated else "relu",
        "model_type": "umt5" if config.bias_per_layer else "t5",
    }
