"""The config of a training run (model, data, optimizer, precision), read from TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.nested_text import parse_toml, shown
from nai_t5_core.facts.padding import LONGEST_ROW
from nai_t5_core.facts.paths import user_path

# Of a file in a batch.
MOST_ROWS = 100_000
Objective = Literal["span-corruption", "prefix", "pairs"]


def _from_config_folder(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / user_path(path)


def _local_source(source: str | None, info: ValidationInfo) -> str | None:
    """A path from the config file's folder, if it exists; anything else, such as a hub id, as it is."""
    path = _from_config_folder(Path(source or ""), info)
    return str(path) if source and path.exists() else source


# Relative paths start at the folder of the config file, wherever the command is run.
ConfigPath = Annotated[Path, AfterValidator(_from_config_folder)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(_Section):
    """The model to train: with the weights of ``source`` (hub id, folder or file), or with random ones of ``sizes``.

    ``tokenizer`` is a file or folder; by default the one that comes with ``source``.
    """

    source: Annotated[str | None, AfterValidator(_local_source)] = None
    sizes: T5Config | None = None
    tokenizer: ConfigPath | None = None

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> ModelSection:
        if (self.source is None) == (self.sizes is None):
            raise ValueError("give either source (weights to go on from) or sizes (to train from scratch)")
        if self.sizes is not None and self.sizes.num_decoder_layers == 0:
            raise ValueError("sizes.num_decoder_layers is 0 or absent: a decoder is needed to train")
        if self.sizes is not None and self.tokenizer is None:
            raise ValueError("sizes without a tokenizer; give the path of a spiece.model or tokenizer.json")
        return self


class OptimizerSection(_Section):
    """AdamW or Adafactor, and the schedule of the learning rate.

    The rate rises linearly over ``warmup`` steps to ``learning_rate`` and then follows ``schedule``: ``constant``,
    ``linear`` or ``cosine`` down to 0 at the last step, or ``inverse-sqrt``, √(warmup / step). Embeddings and position
    biases, whose values are larger than those of matrices, have ``table_factor`` times that rate.
    """

    kind: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "linear"
    table_factor: float = Field(default=1.0, gt=0)
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_gradient_norm: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> OptimizerSection:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}; each must be at least 0 and below 1")
        if self.kind == "adafactor" and "betas" in self.model_fields_set:
            raise ValueError("betas are AdamW's; Adafactor has none")
        return self


class DataSection(_Section):
    """One file of texts, and the number of ``rows`` that it contributes to every batch.

    ``span-corruption`` and ``prefix`` read one text per line; ``pairs`` reads JSON lines with ``input`` and
    ``target``. Lengths count tokens, the end token included. A longer text is cut into pieces; a longer pair is an
    error.
    """

    objective: Objective
    file: ConfigPath
    rows: int = Field(gt=0, le=MOST_ROWS)
    max_length: int = Field(default=512, ge=3, le=LONGEST_ROW)
    noise_density: float = Field(default=0.15, gt=0, lt=1)
    mean_span: float = Field(default=3.0, ge=1)

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        useless = sorted({"noise_density", "mean_span"} & self.model_fields_set)
        if useless and self.objective != "span-corruption":
            raise ValueError(f"only span-corruption has {' and '.join(useless)}; leave it out of {self.objective}")
        return self


class TrainConfig(_Section):
    """A whole run. ``precision`` is the compute dtype; the weights that the optimizer changes are float32.

    ``dropout`` is the share of activations that are set to zero, in the places where T5 has dropout; published models
    were pre-trained without dropout and fine-tuned with 0.1. ``attention`` is the encoder's; ``"auto"`` is SDPA, and
    ``"flex"`` needs CUDA and no dropout.
    """

    out: ConfigPath
    steps: int = Field(gt=0, lt=2**63)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attention: Literal["auto", "flex", "sdpa"] = "auto"
    accumulation: int = Field(default=1, gt=0)
    gradient_checkpointing: bool = False
    log_every: int = Field(default=10, gt=0)
    checkpoint_every: int = Field(default=500, gt=0)
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    model: ModelSection
    optimizer: OptimizerSection = OptimizerSection()
    data: tuple[DataSection, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.attention == "flex" and self.dropout > 0:
            raise ValueError("flex attention has no dropout; use attention 'auto' or 'sdpa', or leave dropout out")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that must be unchanged to resume a run: all that its losses depend on, without paths."""
        return self.model_dump(
            mode="json",
            exclude={
                "out": True,
                "device": True,
                "log_every": True,
                "checkpoint_every": True,
                "export_dtype": True,
                "model": {"source", "tokenizer"},
                "data": {"__all__": {"file"}},
            },
        )


def read_config(path: str | Path) -> TrainConfig:
    """Reads a TOML file; relative paths in it start at its folder.

    Raises:
        ValueError: the file cannot be read, is no TOML, or has unknown, absent or impossible values; all are listed.
    """
    path = Path(path)
    try:
        values = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as TOML: {error}") from error
    try:
        return TrainConfig.model_validate(values, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise ValueError("\n  - ".join([f"{path} is no training config:", *map(_fault, error.errors())])) from error


def _fault(fault: Any) -> str:
    place = ".".join(map(str, fault["loc"]))
    given = "" if fault["type"] in ("missing", "value_error") else f" (given: {shown(fault['input'])})"
    return f"{place}: {fault['msg'].removeprefix('Value error, ')}{given}"
