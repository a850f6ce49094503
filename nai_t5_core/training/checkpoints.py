"""Where a run stands, in one file that is replaced as a whole: an interruption leaves the one before."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nai_t5_core.formats import replacing

NAME = "checkpoint.pt"


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> None:
    """Writes weights and optimizer state after ``step`` steps of the run that ``identity`` describes."""
    state = {"step": step, "identity": identity, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        # Else the new name may be on the disk before the content is.
        os.fsync(file.fileno())


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> int:
    """Fills model and optimizer, and returns the number of steps done.

    Raises:
        ValueError: no such file, a damaged one, or one of another run; the message names what differs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, stored = int(state["step"]), state["identity"]
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: there is no run to go on with; start one without --resume") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of a training run, or is damaged: {error}") from error
    differing = [name for name in identity if stored.get(name) != identity[name]]
    if differing:
        told = "; ".join(f"{name} was {stored.get(name)!r} and is {identity[name]!r}" for name in differing)
        raise ValueError(f"{path} is of a run with another config ({told}); restore it, or begin in another folder")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return step
