"""Which of ComfyUI's own classes serve each model family whose only text encoder is a T5.

They decide what the diffusion model is used to: lengths, masks, padding, how a weight of 1.2 is applied. Their names
stand in the records of the families.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nai_t5_core.facts.families import FAMILIES as RECORDS
from nai_t5_core.facts.families.record import ComfyAlone, ComfyJoint

if TYPE_CHECKING:
    from nai_t5_core.facts.config import T5Config


@dataclass(frozen=True, kw_only=True)
class ServerFamily(ComfyAlone):
    """A family whose only text encoder is a T5.

    Attributes:
        checkpoint: the hub id of the T5 that the diffusion model was trained with; None: anything goes.
    """

    checkpoint: str | None

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

    def fits(self, config: T5Config) -> bool:
        """Whether the family was trained with a T5 like this."""
        return self.checkpoint is not None and _kind_and_width(config) == _kind_and_width(_t5(self.checkpoint))

    def check(self, config: T5Config) -> None:
        """Raises a ValueError if the family cannot use a T5 like this."""
        if self.checkpoint is not None and not self.fits(config):
            kind, width = _kind_and_width(_t5(self.checkpoint))
            raise ValueError(
                f"{self.title} was trained with a {kind} of width {width}; this file holds a {config.kind} "
                f"of width {config.d_model}. Choose the right file, or the family that it belongs to"
            )


@dataclass(frozen=True, kw_only=True)
class JointFamily(ComfyJoint):
    """A family with other text encoders beside the T5.

    Attributes:
        checkpoint: the hub id of the T5 that the diffusion model was trained with.
    """

    checkpoint: str

    def check(self, files: int, config: T5Config | None) -> None:
        """Raises a ValueError unless it takes this number of files, of which one is a T5 of this config."""
        if files not in self.files:
            allowed = " or ".join(map(str, self.files))
            raise ValueError(f"{self.name} takes {allowed} text encoder files and {files} were given")
        if config is None:
            raise ValueError("none of these files holds a T5; choose the file of the T5")
        kind = _t5(self.checkpoint).kind
        if config.kind != kind:
            raise ValueError(
                f"{self.name} was trained with a {kind}, and this file holds a {config.kind}; choose the right one"
            )


def _t5(checkpoint: str) -> T5Config:
    from nai_t5_core.facts.config import named_config

    return named_config(checkpoint.rpartition("/")[2])


def _kind_and_width(config: T5Config) -> tuple[str, int]:
    return config.kind, config.d_model


_WITHOUT_FAMILY = ServerFamily(
    name="t5",
    title="no family",
    module="comfy_nai_t5.plain",
    model="PlainModel",
    tokenizer="PlainTokenizer",
    slot="t5",
    checkpoint=None,
)
FAMILIES = {
    row.comfy.name: ServerFamily(**vars(row.comfy), checkpoint=row.checkpoint)
    for row in RECORDS
    if isinstance(row.comfy, ComfyAlone)
} | {_WITHOUT_FAMILY.name: _WITHOUT_FAMILY}
JOINT_FAMILIES = {
    row.comfy.name: JointFamily(**vars(row.comfy), checkpoint=row.checkpoint)
    for row in RECORDS
    if isinstance(row.comfy, ComfyJoint)
}
AUTO = "auto"


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
    fitting = [row for row in FAMILIES.values() if row.fits(config)]
    if len(fitting) > 1:
        raise ValueError(
            f"a {config.kind} of width {config.d_model} is the text encoder of several families; choose one of "
            f"{', '.join(row.name for row in fitting)} (for {joint_titles('and')} take Load CLIP + T5)"
        )
    return fitting[0] if fitting else _WITHOUT_FAMILY


def joint_titles(word: str) -> str:
    """The titles of the families with other encoders, a word before the last."""
    *others, last = (row.title for row in JOINT_FAMILIES.values())
    return f"{', '.join(others)} {word} {last}"


def check_joint(name: str, files: int, config: T5Config | None) -> None:
    """Raises a ValueError unless the family takes this number of files, of which one is a T5 of this config."""
    if name not in JOINT_FAMILIES:
        raise ValueError(f"unknown family {name!r}; allowed: {', '.join(JOINT_FAMILIES)}")
    JOINT_FAMILIES[name].check(files, config)


def server_config(config: T5Config) -> dict[str, Any]:
    """The sizes in the words of ComfyUI's config files."""
    return {
        **config.model_dump(include={"vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"}),
        "is_gated_act": config.gated,
        "dense_act_fn": "gelu_pytorch_tanh" if config.gated else "relu",
        "model_type": "umt5" if config.bias_per_layer else "t5",
    }
