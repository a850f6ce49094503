"""Where a model argument leads: a local path, the embedded model, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from nai_t5_core.facts.paths import user_path
from nai_t5_core.weights.formats import CheckpointError

EMBEDDED_MODEL = Path(__file__).parent / "embedded" / "tiny.safetensors"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SMALL_FILES = ("*.json", "*.model")
# The weights of a hub folder, the preferred form first: the same order as in a local folder.
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True)
class HubOptions:
    """How a hub id is fetched; the names and meanings are those of huggingface_hub. Local paths need none of it."""

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    force_download: bool = False
    local_files_only: bool = False


_AS_CONFIGURED = HubOptions()


def find_model(source: str | Path | None, subfolder: str = "", hub: HubOptions = _AS_CONFIGURED) -> Path:
    """The local file or folder of a model argument; a hub id is downloaded first (weights, config and tokenizer only).

    ``None`` is the tiny embedded model.

    Args:
        hub: with ``local_files_only`` nothing is asked of the network.

    Raises:
        CheckpointError: nothing there, or the hub cannot be reached and its cache does not hold the model.
    """
    if source is None:
        return EMBEDDED_MODEL
    path = user_path(source)
    if _is_local(path) or not _HUB_ID.fullmatch(str(source)):
        return path / subfolder
    return _download(str(source), subfolder, hub) / subfolder


def _is_local(path: Path) -> bool:
    """Whether the path leads to something, or names a file: a model on the hub is not called x.safetensors."""
    try:
        return path.exists() or path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".json")
    except OSError:  # something is there, and opening it will tell what is wrong with it
        return True


def _download(repo: str, subfolder: str, hub: HubOptions) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if hub.local_files_only:
        return _cached(repo, hub, "local_files_only=True keeps from asking it; leave that out")
    try:
        wanted = _wanted(list_repo_files(repo, revision=hub.revision, token=hub.token), repo, subfolder)
        return Path(snapshot_download(repo, allow_patterns=wanted, **asdict(hub)))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{repo!r} is no local path, and the hub has no such model that you may read ({_first_line(error)}); "
            "check the name, accept its licence on its page, or log in with 'hf auth login'"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # every transport has its own exceptions
        unreached = f"the hub cannot be reached ({_first_line(error)})"
        if hub.force_download:
            raise CheckpointError(f"{repo!r}: {unreached}; without force_download the hub's cache is used") from error
        return _cached(repo, hub, f"{unreached}; go online")


def _cached(repo: str, hub: HubOptions, why_not_asked: str) -> Path:
    """What an earlier download has left in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=hub.revision, cache_dir=hub.cache_dir, local_files_only=True))
    except Exception as error:
        raise CheckpointError(
            f"{repo!r} is neither a local path nor in the hub's cache, and {why_not_asked}, or give a local file or "
            "folder"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].removesuffix(": ")


def _wanted(files: list[str], repo: str, subfolder: str) -> list[str]:
    """The config, the tokenizer, and one form of the weights.

    Raises:
        CheckpointError: a whole pipeline without a subfolder, or several models side by side: tens of gigabytes.
    """
    if "model_index.json" in files and not subfolder:
        encoders = sorted({name.partition("/")[0] for name in files if name.startswith("text_encoder")})
        raise CheckpointError(
            f"{repo!r} is a whole pipeline; give the subfolder of its T5 text encoder ({', '.join(encoders) or 'none'})"
        )
    here = _files_in(files, subfolder)
    weights = next((found for form in _WEIGHTS if (found := _matching(here, form))), [])
    if len(weights) > 1 and not _matching(here, "*.index*.json"):
        names = ", ".join(weights[:5])
        raise CheckpointError(f"{repo!r} holds {len(weights)} weight files ({names}); download one and give its path")
    # In a pipeline, the tokenizer has a folder beside the encoder's.
    beside = _files_in(files, subfolder.replace("text_encoder", "tokenizer")) if subfolder else []
    small = [name for pattern in _SMALL_FILES for name in _matching([*here, *beside], pattern)]
    return [*dict.fromkeys(small), *weights]


def _files_in(files: list[str], folder: str) -> list[str]:
    return [name for name in files if name.rpartition("/")[0] == folder.strip("/")]


def _matching(files: list[str], pattern: str) -> list[str]:
    return [name for name in files if fnmatch(name.rpartition("/")[2], pattern)]
