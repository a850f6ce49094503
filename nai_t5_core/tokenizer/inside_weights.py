"""The tokenizer inside a file of weights: a tensor in our own files and ComfyUI's, metadata in GGUF files."""

from __future__ import annotations

from pathlib import Path

# The kind of tokenizer by the name of the tensor that holds it. ComfyUI's single files use the first name.
TOKENIZER_TENSORS = {"spiece_model": "sentencepiece", "tokenizer_json": "tokenizer.json"}

_LENGTH_BYTES = 8
_GGUF = b"GGUF"


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with file.open("rb") as opened:
        return opened.read(len(_GGUF)) == _GGUF


def is_safetensors(file: Path) -> bool:
    """Whether a file begins as safetensors do: with the length of the json object that follows."""
    with file.open("rb") as opened:
        start = opened.read(_LENGTH_BYTES + 1)
    return start[_LENGTH_BYTES:] == b"{" and int.from_bytes(start[:_LENGTH_BYTES], "little") < file.stat().st_size


def tokenizer_inside(file: Path) -> tuple[str, bytes]:
    """Kind and content of the tokenizer in a safetensors or GGUF file; the weights are not read.

    Raises ValueError where there is none, or more than one, or the file is damaged.
    """
    if is_gguf(file):
        from nai_t5_core.tokenizer.gguf_vocabulary import tokenizer_in_gguf  # imports numpy, which is slow

        return TOKENIZER_TENSORS["spiece_model"], tokenizer_in_gguf(file)
    return _tokenizer_tensor(file)


def _tokenizer_tensor(file: Path) -> tuple[str, bytes]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as weights:
            found = [name for name in weights.keys() if name.rpartition(".")[2] in TOKENIZER_TENSORS]  # noqa: SIM118
            if len(found) != 1:
                named = f"{len(found)} tokenizers ({', '.join(found)})" if found else "no tokenizer"
                raise ValueError(
                    f"{str(file)!r} has {named} inside: give a tokenizer.json, a SentencePiece model (spiece.model), a "
                    "folder that holds one of them, or a file of weights with one inside"
                )
            values = weights.get_tensor(found[0])
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} cannot be read as safetensors: {error}") from None
    if values.dtype != "uint8":
        raise ValueError(
            f"the tokenizer in {str(file)!r} was cast to {values.dtype}, and is lost; give that of the original"
        )
    return TOKENIZER_TENSORS[found[0].rpartition(".")[2]], values.tobytes()
