"""Checkpoints: one file that is replaced as a whole, so that an interruption leaves the previous checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.sharding import part_of, whole
from nai_t5_core.weights.whole_files import replacing

NAME = "checkpoint.pt"
_NO_CHECKPOINT = "{} is no checkpoint of a training run, or is damaged: {}"


def save(
    path: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    is_writer: bool = True,
) -> None:
    """Writes weights and optimizer state after ``step`` steps of the run that ``identity`` describes.

    All processes of a sharded run call this; the one with ``is_writer`` writes the gathered tensors.
    """
    weights = _gathered(model.state_dict(), is_writer)
    kept = optimizer.state_dict()
    states = {index: _gathered(values, is_writer) for index, values in kept["state"].items()}
    if not is_writer:
        return
    state = {"step": step, "identity": identity, "model": weights, "optimizer": {**kept, "state": states}}
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # What torch's writer raises while it handles that of a full disk.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> int:
    """Loads a checkpoint into model and optimizer, and returns the number of steps done.

    Raises:
        ValueError: no such file, a damaged one, or one of another run; the message names what differs.
    """
    state = _read(path)
    stored = state["identity"]
    differing = [name for name in identity if stored.get(name) != identity[name]]
    if differing:
        told = "; ".join(f"{name} was {stored.get(name)!r} and is {identity[name]!r}" for name in differing)
        raise ValueError(f"{path} is of a run with another config ({told}); restore it, or begin in another folder")
    try:
        return _fill(model, optimizer, state)
    except Exception as error:  # of many kinds: the file may hold anything
        raise ValueError(f"{path} is damaged: {_first_line(error)}; begin the run again") from error


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; raises ValueError as :func:`load`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: there is no run to go on with; start one without --resume") from error
    except Exception as error:  # of many kinds: the file may hold anything
        raise ValueError(_NO_CHECKPOINT.format(path, _first_line(error))) from error
    kinds = {"identity": dict, "step": int, "model": dict, "optimizer": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(_NO_CHECKPOINT.format(path, "it lacks one of identity, step, model and optimizer"))
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fill(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> int:
    own = model.state_dict()
    model.load_state_dict({name: part_of(tensor, own[name]) for name, tensor in state["model"].items()})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = state["optimizer"]
    states = {index: _spread(values, parameters[index]) for index, values in kept["state"].items()}
    optimizer.load_state_dict({**kept, "state": states})
    return int(state["step"])


def _gathered(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """The values with sharded tensors gathered; empty without ``keep``, though all processes must take part."""
    gathered = {}
    for name, value in values.items():
        complete = whole(value).cpu() if isinstance(value, Tensor) else value
        if keep:
            gathered[name] = complete
    return gathered


def _spread(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The optimizer's state of a parameter; tensors of its shape are sharded as the parameter is."""
    return {
        name: part_of(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for name, value in values.items()
    }
