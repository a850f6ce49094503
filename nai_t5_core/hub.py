"""Where a model argument leads: a local path, the embedded model, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from nai_t5_core.formats import CheckpointError

EMBEDDED_MODEL = Path(__file__).parent / "embedded" / "tiny.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL_FILES = ("*.json", "*.model")


def find_model(source: str | Path | None, subfolder: str = "", revision: str | None = None) -> Path:
    """The local file or folder of a model argument; a hub id is downloaded first (weights, config and tokenizer only).

    ``None`` is the tiny embedded model.

    Raises:
        CheckpointError: nothing there, or the hub cannot be reached and its cache does not hold the model.
    """
    if source is None:
        return EMBEDDED_MODEL
    path = Path(source).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        return path / subfolder
    return _download(str(source), subfolder, revision) / subfolder


def _download(repo: str, subfolder: str, revision: str | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = list_repo_files(repo, revision=revision)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_wanted(files, subfolder)))
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise CheckpointError(
            f"the hub has no model {repo!r} that you may read ({str(error).splitlines()[0]}); "
            "check the name, accept its licence on its page, or log in with 'hf auth login'"
        ) from error
    except Exception as error:  # every transport has its own exceptions
        try:
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"{repo!r} is neither a local path nor in the hub's cache, and the hub cannot be reached "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); give a local file or folder, or go online"
            ) from error


def _wanted(files: list[str], subfolder: str) -> list[str]:
    """Patterns for the config, the tokenizer, and one form of the weights: safetensors where there are any."""
    folder = f"{subfolder}/" if subfolder else ""
    here = [name for name in files if name.startswith(folder) and "/" not in name.removeprefix(folder)]
    weights = next(
        (pattern for pattern in (".safetensors", ".bin") if any(name.endswith(pattern) for name in here)),
        ".safetensors",
    )
    # A pipeline keeps its tokenizers in folders beside the encoder's.
    beside = [f"tokenizer*/{pattern}" for pattern in _SMALL_FILES] if subfolder else []
    return [*(f"{folder}{pattern}" for pattern in (*_SMALL_FILES, f"*{weights}")), *beside]
