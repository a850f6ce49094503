"""The LoRAs of one encoder, by name and strength: what merged and live ones have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from nai_t5_core.facts.config import T5Config, encoder_tensors
from nai_t5_core.facts.given_numbers import real_number
from nai_t5_core.lora.changes import Change
from nai_t5_core.lora.files import Lora, listed, read_lora
from nai_t5_core.lora.merge import row_counts
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.weights.fuse import Recipe, fused_recipes, separate_recipes

LoraSource = Lora | str | Path

# Merged into the weights, or computed beside them.
Way = Literal["merged", "live"]

# LoRAs by name, each with its strength.
NamedLoras = dict[str, tuple[Lora, float]]


def lora_of(source: LoraSource) -> Lora:
    """What is given as a LoRA, read where it is a file or folder.

    Raises:
        CheckpointError: the file is unusable.
    """
    return source if isinstance(source, Lora) else read_lora(source)


@dataclass(frozen=True, eq=False)
class LorasInForce:
    """What one set of LoRAs has told of itself: each LoRA with its strength, in order. A new one for every change."""

    way: Way
    loras: tuple[tuple[Lora, float], ...]

    def __deepcopy__(self, memo: object) -> LorasInForce:
        return self


class HasStack(Protocol):
    """What is built around an encoder: TextEncoder, NAIT5EncoderModel."""

    @property
    def stack(self) -> T5EncoderStack: ...


class LoraSet(ABC):
    """The LoRAs of one encoder. How they reach its result is the subclass's.

    Attributes:
        way: how, in a word.

    While threads encode, each of their calls has the LoRAs from before a change or those from after it.
    """

    way: Way

    def __init__(self, model: T5EncoderStack | HasStack) -> None:
        self._stack = model if isinstance(model, T5EncoderStack) else model.stack
        self._loras: NamedLoras = {}
        # What another object has done stays told, also when that object is gone.
        self._who = object()

    @property
    def strengths(self) -> dict[str, float]:
        """Strength of each LoRA by name, in the order in which they were added."""
        return {name: strength for name, (_, strength) in self._loras.items()}

    def add(self, lora: LoraSource, strength: float = 1.0, name: str | None = None) -> str:
        """Puts a LoRA beside those that are there.

        Args:
            lora: a file or folder, as :func:`nai_t5_core.lora.files.read_lora` takes it, or what that gave.
            strength: multiplies the change; 0 and negative numbers are allowed.
            name: for the other methods; by default that of the file.

        Returns:
            The name.

        Raises:
            CheckpointError: the file is unusable.
            ValueError: the name is taken, the strength is no number, the LoRA is for a T5 of other sizes, or the
                weights of this one do not take it (the class says which do). Nothing is changed then.
        """
        lora = lora_of(lora)
        name = lora.name if name is None else name
        with self._alone():
            if name in self._loras:
                raise ValueError(f"there is a LoRA {name!r} already; give another name=, or use set_strength")
            refuse_misfits(lora, self._stack.config)
            self._change({**self._loras, name: (lora, real_number("strength", strength))}, lora.changes)
        return name

    def set_strength(self, name: str, strength: float) -> None:
        """Gives a LoRA another strength.

        Raises:
            ValueError: there is no such LoRA, or the strength is no number; or see :meth:`add`.
        """
        with self._alone():
            lora = self._find(name)
            self._change({**self._loras, name: (lora, real_number("strength", strength))}, lora.changes)

    def remove(self, name: str) -> None:
        """Takes a LoRA away.

        Raises:
            ValueError: there is no such LoRA; or see :meth:`add`.
        """
        with self._alone():
            lora = self._find(name)
            self._change({other: entry for other, entry in self._loras.items() if other != name}, lora.changes)

    def clear(self) -> None:
        """Takes all LoRAs away."""
        with self._alone():
            self._change({}, [weight for lora, _ in self._loras.values() for weight in lora.changes])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While this is open nobody else uses the encoder; neither does a GPU, which calls do not wait for."""
        with self._stack.turns.change():
            self._wait_for_gpu()
            with self._stack.alterations.by(self._who, lambda: LorasInForce(self.way, tuple(self._loras.values()))):
                yield
            self._wait_for_gpu()

    def _wait_for_gpu(self) -> None:
        if self._stack.device.type == "cuda":
            torch.cuda.synchronize(self._stack.device)

    def _change(self, loras: NamedLoras, changed: Iterable[str]) -> None:
        """As :meth:`_apply`, for subclasses that treat some weights in another way."""
        self._apply(loras, changed)

    @abstractmethod
    def _apply(self, loras: NamedLoras, changed: Iterable[str]) -> None:
        """Makes these the LoRAs of the encoder; ``changed`` are the original weights that this is about."""

    def _recipes(self, changed: Iterable[str]) -> list[Recipe]:
        """How the weights that hold these originals, or have them multiplied in, are made."""
        find_recipes = fused_recipes if self._stack.layout == "fused" else separate_recipes
        names = set(changed)
        return [r for r in find_recipes(self._stack.config, self._stack.scales) if not names.isdisjoint(r.originals)]

    def _row_counts(self, recipe: Recipe) -> list[int]:
        return row_counts(self._stack, recipe)

    def _changes(self, recipe: Recipe) -> Iterator[tuple[int, Change, float]]:
        """What the LoRAs change in a weight: the place of the original in it, the change, and its factor."""
        for index, (name, scale) in enumerate(zip(recipe.parts, recipe.scales, strict=True)):
            for change, factor in self._changes_of(name):
                yield index, change, factor * scale

    def _changes_of(self, name: str) -> list[tuple[Change, float]]:
        """What the LoRAs change in an original weight, each with its factor."""
        found = ((lora.changes.get(name), strength) for lora, strength in self._loras.values())
        return [(change, strength * change.scale) for change, strength in found if change is not None and strength]

    def _find(self, name: str) -> Lora:
        if name not in self._loras:
            raise ValueError(f"there is no LoRA {name!r}; there are: {', '.join(self._loras) or 'none'}")
        return self._loras[name][0]

    def __repr__(self) -> str:
        loras = ", ".join(f"{name}: {strength:g}" for name, strength in self.strengths.items())
        return f"{type(self).__name__}({loras or 'none'}; {self._changed_count()} weights changed)"

    @abstractmethod
    def _changed_count(self) -> int:
        """How many weights of the encoder are not what they are without LoRA."""


def refuse_misfits(lora: Lora, config: T5Config) -> None:
    """Raises a ValueError that lists what a LoRA changes and a T5 of this config does not have in that shape."""
    shapes = encoder_tensors(config)
    faults = [
        f"{name}: the model has no such weight"
        if name not in shapes
        else f"{name}: a change of shape {list(change.shape)} for a weight of shape {list(shapes[name])}"
        for name, change in lora.changes.items()
        if shapes.get(name) != change.shape
    ]
    if faults:
        raise ValueError(f"the LoRA {lora.name!r} is for another T5 than this {config.kind}:{listed(faults)}")
