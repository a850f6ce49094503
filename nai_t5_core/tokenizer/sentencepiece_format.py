"""Reads and writes SentencePiece model files without a protobuf runtime.

A model file is one protobuf message (`ModelProto` in sentencepiece_model.proto), of which only a few fields are needed
here. The numbers below are the field numbers of the public .proto file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# ModelProto
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3
# ModelProto.SentencePiece
PIECE, SCORE, TYPE = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# TrainerSpec
MODEL_TYPE, VOCAB_SIZE, WHITESPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 4, 24, 35
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 40, 41, 42, 43
UNK_PIECE, BOS_PIECE, EOS_PIECE, PAD_PIECE = 45, 46, 47, 48
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
# NormalizerSpec
NORMALIZER_NAME, CHARSMAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 1, 2, 3, 4, 5

# The most that a number takes.
_VARINT_BYTES = 10

EXTRA_ID = re.compile(r"<extra_id_\d+>")
# How many `<extra_id_N>` a bare model file lacks, by its number of pieces: UMT5 has 300, every other T5 has 100.
EXTRA_IDS = 100
EXTRA_IDS_BY_PIECES = {256_000: 300}


def read_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and raw value of every field of a protobuf message, in file order.

    A varint comes as a non-negative int, everything else as bytes (a float as its four little-endian bytes).
    Raises ValueError where the bytes are no protobuf message.
    """
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        wire_type = tag & 7
        if wire_type == 0:
            number, position = _read_varint(message, position)
            yield tag >> 3, number
            continue
        if wire_type == 2:
            size, position = _read_varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"protobuf wire type {wire_type} at byte {position}: this is no SentencePiece model")
        if position + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {position} runs past the end ({len(message)} bytes)")
        yield tag >> 3, message[position : position + size]
        position += size


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"the bytes end inside a number, at byte {position}: the file is cut short or no protobuf")


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as 64-bit two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_field(number: int, value: int | float | str | bytes) -> bytes:
    """One protobuf field: an int as varint, a float in 32 bits, text, bytes and sub-messages with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def write_piece(text: str, score: float, kind: int) -> bytes:
    """One entry of the vocabulary, as a field of ModelProto. `kind` is NORMAL, UNKNOWN, CONTROL, …."""
    message = write_field(PIECE, text) + write_field(SCORE, float(score))
    return write_field(PIECES, message if kind == NORMAL else message + write_field(TYPE, kind))


class _Fields:
    """The single fields of a message; of several values, the last counts.

    A value of another type than its field has is as good as none: the protobuf runtime passes over it.
    """

    def __init__(self, message: bytes = b"") -> None:
        self._numbers: dict[int, int] = {}
        self._contents: dict[int, bytes] = {}
        self.add(message)

    def add(self, message: bytes) -> None:
        """Fields of a further part of the same message."""
        for field, value in read_fields(message):
            if isinstance(value, int):
                self._numbers[field] = value
            else:
                self._contents[field] = value

    def number(self, field: int, default: int) -> int:
        return self._numbers.get(field, default)

    def raw(self, field: int) -> bytes:
        return self._contents.get(field, b"")

    def text(self, field: int, default: str) -> str:
        return self._contents[field].decode() if field in self._contents else default

    def float32(self, field: int, default: float) -> float:
        content = self._contents.get(field, b"")
        return float(struct.unpack("<f", content)[0]) if len(content) == 4 else default


@dataclass(frozen=True)
class SentencePieceModel:
    """The fields of a SentencePiece model file that tokenizing a prompt needs."""

    pieces: list[tuple[str, float, int]]  # text, score, kind; the position is the id
    model_type: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    whitespace_as_suffix: bool
    byte_fallback: bool
    eos_piece: str
    pad_piece: str

    @classmethod
    def parse(cls, model_bytes: bytes) -> SentencePieceModel:
        """Reads a serialized ModelProto. Raises ValueError for other bytes."""
        pieces: list[tuple[str, float, int]] = []
        trainer, normalizer = _Fields(), _Fields()
        for number, value in read_fields(model_bytes):
            if number == PIECES and isinstance(value, bytes):
                piece = _Fields(value)
                pieces.append((piece.text(PIECE, ""), piece.float32(SCORE, 0.0), piece.number(TYPE, NORMAL)))
            elif number == TRAINER_SPEC and isinstance(value, bytes):
                trainer.add(value)
            elif number == NORMALIZER_SPEC and isinstance(value, bytes):
                normalizer.add(value)
        if not pieces:
            raise ValueError(f"no pieces in these {len(model_bytes)} bytes: this is no SentencePiece model")
        return cls(
            pieces=pieces,
            model_type=MODEL_TYPES.get(trainer.number(MODEL_TYPE, 1), "unknown"),
            charsmap=normalizer.raw(CHARSMAP),
            add_dummy_prefix=bool(normalizer.number(ADD_DUMMY_PREFIX, 1)),
            remove_extra_whitespaces=bool(normalizer.number(REMOVE_EXTRA_WHITESPACES, 1)),
            whitespace_as_suffix=bool(trainer.number(WHITESPACE_AS_SUFFIX, 0)),
            byte_fallback=bool(trainer.number(BYTE_FALLBACK, 0)),
            eos_piece=trainer.text(EOS_PIECE, "</s>"),
            pad_piece=trainer.text(PAD_PIECE, "<pad>"),
        )


def charsmap_of(model_bytes: bytes) -> bytes:
    """The precompiled character map of a serialized ModelProto. Raises ValueError where the bytes are none."""
    # Most of a file are short pieces, in front: a tag and a length of one byte each, and so many bytes.
    position, tag = 0, PIECES << 3 | 2
    while position + 1 < len(model_bytes) and model_bytes[position] == tag and model_bytes[position + 1] < 0x80:
        position += 2 + model_bytes[position + 1]
    normalizer = _Fields()
    for number, value in read_fields(model_bytes[position:]):
        if number == NORMALIZER_SPEC and isinstance(value, bytes):
            normalizer.add(value)
    return normalizer.raw(CHARSMAP)


def missing_extra_ids(piece_count: int, pad_id: int, has_extra_ids: bool) -> int:
    """How many `<extra_id_N>` are to be added after the pieces of a model file.

    T5 and UMT5 files lack them, although the models' embeddings have rows for them. The number is 0 for a file whose
    pad piece is not its first piece, which is no T5 file, and for a file that has extra ids.
    """
    return 0 if has_extra_ids or pad_id != 0 else EXTRA_IDS_BY_PIECES.get(piece_count, EXTRA_IDS)


def extend_sentencepiece(model_bytes: bytes, pieces: Sequence[str] = (), pad_piece: str | None = None) -> bytes:
    """A model file with `pieces` appended to its vocabulary and, where given, another pad piece.

    `<extra_id_N>` become user-defined symbols, all others control symbols. Protobuf messages are extended by appending:
    repeated fields add up, and the last value of a single field counts.
    """
    added = [write_piece(text, 0.0, USER_DEFINED if EXTRA_ID.fullmatch(text) else CONTROL) for text in pieces]
    if pad_piece is not None:
        added.append(write_field(TRAINER_SPEC, write_field(PAD_PIECE, pad_piece)))
    return model_bytes + b"".join(added)
