"""The tensors in a file that torch.save wrote, found without running any code that the file may hold."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where training loops put the weights that are meant, beside others such as averaged ones.
_WEIGHTS = "state_dict"
# Libraries whose tensors are classes of their own, by the beginning of the classes' names.
_QUANTISERS = {
    "torchao.": "torchao",
    "optimum.quanto.": "quanto",
    "quanto.": "quanto",
    "bitsandbytes.": "bitsandbytes",
    "hqq.": "HQQ",
}
_REMEDY = "save the weights alone: torch.save(model.state_dict(), …) or model.save_pretrained(…)"
# What stands before torch's reason, and before its advice, which is to trust the file.
_REASON, _ADVICE = "WeightsUnpickler error:", "In PyTorch 2.6"
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state_dict by name, mapped from the file where it allows, and what else stands among them.

    A state_dict that stands inside another dictionary is found there.

    Raises:
        ValueError: the file holds Python objects, no state_dict or several, or is damaged; the message goes on from the
            file's name.
    """
    try:
        content = _unpickle(path)
    except Exception as error:  # of many kinds: the file may hold anything
        raise ValueError(_fault(path, error)) from error
    state = _state_in(content)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta}
    return tensors, {name: _described(value) for name, value in state.items() if name not in tensors}


def _unpickle(path: Path) -> Any:
    if form := _form_with_code(path):
        raise _HoldsCodeError(form)
    # weights_only: a pickle may otherwise run code. mmap works for the zip form, which is all files since 2020.
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # torch.load goes by this suffix and not by the content, unless it is given no name.
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


class _HoldsCodeError(ValueError):
    """The file is of a form that torch before 2.6 reads by running what stands in it, whatever it is told."""


def _form_with_code(path: Path) -> str | None:
    """TorchScript beside its constants, or the archive of torch's first years; None if it is neither."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] for name in archive.namelist()}
        return "it is a TorchScript archive" if "constants.pkl" in members else None
    try:
        with tarfile.open(path, "r:"):
            return "it is a tar archive, as torch wrote them in its first years"
    except tarfile.TarError:
        return None


def _fault(path: Path, error: Exception) -> str:
    if isinstance(error, _HoldsCodeError):
        return f"cannot be read without running code ({error}); {_REMEDY}"
    reason = _COLOURS.sub("", str(error)) or type(error).__name__
    classes = _classes(path, reason)
    quantiser = next((name for start, name in _QUANTISERS.items() if any(c.startswith(start) for c in classes)), None)
    if quantiser:
        return (
            f"holds weights that {quantiser} has quantised, which cannot be read; use a safetensors file of the same "
            "model in bfloat16, float16 or float8, or a GGUF file"
        )
    if classes:
        shown = ", ".join(classes[:3]) + (f" and {len(classes) - 3} more" if classes[3:] else "")
        what = "a whole model" if any(name.startswith("torch.nn.") for name in classes) else "Python objects"
        return f"holds {what} (classes {shown}), and reading those could run any code; {_REMEDY}"
    if "weights_only" in reason:  # whole, but in a form for which torch asks for trust in its author
        detail = reason.rpartition(_REASON)[2].partition(_ADVICE)[0].strip().partition("\n")[0]
        return f"cannot be read without running code ({detail}); {_REMEDY}"
    return f"is not a readable PyTorch weight file ({reason.splitlines()[0]}); fetch it again"


def _classes(path: Path, reason: str) -> list[str]:
    """Classes that stand in a pickle and are no tensors; the first that torch met where it tells no more.

    That is of the form before 2020, and of any form by torch before 2.6.
    """
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return sorted(found, key=lambda name: (name.startswith("torch."), name))
    except Exception:  # damaged, or no zip
        return re.findall(r"Unsupported global: GLOBAL (\S+)", reason)[:1]


def _state_in(content: object) -> Mapping[str, object]:
    """The state_dict: the content itself, or the one that stands in it under some name."""
    own = content if isinstance(content, Mapping) else {}
    inner = {name: value for name, value in own.items() if _tensor_count(value)}
    if _WEIGHTS in inner:
        return inner[_WEIGHTS]
    if _tensor_count(own) and all(_tensor_count(own) >= _tensor_count(value) for value in inner.values()):
        return own
    if len(inner) > 1:
        raise ValueError(
            f"holds several dictionaries of tensors, under {', '.join(map(repr, inner))}; save the one that is meant "
            "as a file of its own"
        )
    if not inner:
        raise ValueError("is a PyTorch file but no dictionary of tensors; save the model's state_dict")
    return next(iter(inner.values()))


def _tensor_count(value: object) -> int:
    """Tensors that stand under names in a dictionary; a number or None among them does no harm."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return 0
    return sum(isinstance(item, Tensor) for item in value.values())


def _described(value: object) -> str:
    if value is None:
        return "no tensor, but None"
    if isinstance(value, Tensor):
        return "a tensor without values (it was saved from the device meta)"
    words = {"int": "number", "float": "number", "str": "text"}
    return f"no tensor, but a {words.get(type(value).__name__, type(value).__name__)}"
