"""Damaged GGUF files are refused with what is wrong, at once and in little memory."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import encoder_part, spiece_model
from conftest import TOY_CONFIGS, random_state
from toy_gguf import add_tokenizer, gguf, write_gguf, write_tensors

from nai_t5_core.facts.gguf_header import read_header
from nai_t5_core.tokenizer import load_tokenizer
from nai_t5_core.tokenizer.sentencepiece_format import SentencePieceModel
from nai_t5_core.weights.examine import examine
from nai_t5_core.weights.formats import CheckpointError
from nai_t5_core.weights.load import load_encoder

V1_1 = TOY_CONFIGS["v1.1"]
STATE = encoder_part(random_state(V1_1))
UINT8, UINT32, FLOAT32, STRING, ARRAY, FLOAT64 = 0, 4, 6, 8, 9, 12
HUGE = 2**62


def test_headers_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path := tmp_path / "facts.gguf", "t5encoder")
    add_tokenizer(writer, SentencePieceModel.parse(spiece_model()), rows=4200)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_custom_alignment(64)
    write_tensors(writer, random_state(V1_1), "Q8_0")
    reader, header = gguf.GGUFReader(path), read_header(path)
    facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert facts.keys() == header.metadata.keys()
    for name, fact in facts.items():
        found = header.metadata[name]
        if isinstance(fact, list):
            found = [value.decode() if isinstance(value, bytes) else value for value in found]
        assert found == fact, name
    assert len(header.tensors) == len(reader.tensors) > 0
    for tensor in reader.tensors:
        stored = header.tensors[tensor.name]
        assert stored.shape == tuple(tensor.shape)[::-1] and stored.start == tensor.data_offset
        assert stored.kind == tensor.tensor_type


# ---------------------------------------------------------------------------------------------------------------------
# Headers, byte by byte
# ---------------------------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    *parts: bytes, tensors: int = 0, entries: int = 0, magic: bytes = b"GGUF", version: int = 3, behind: int = 4096
) -> bytes:
    """A file of these parts; ``behind`` zeros follow."""
    return magic + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts) + bytes(behind)


OLD = "is a GGUF file of version {}, or of a machine with its bytes in another order; versions 2 and 3 in the usual ord"
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing behind the magic": (b"GGUF", "8 bytes are to follow byte 0, and it ends at byte 4"),
    "cut in the counts": (header()[:20], "8 bytes are to follow byte 16, and it ends at byte 20"),
    "impossible number of tensors": (
        header(tensors=HUGE),
        r"it promises 4,611,686,018,427,387,904 tensors and 0 metadata, which do not fit into its 4,120 bytes",
    ),
    "impossible number of metadata": (
        header(entries=2**64 - 1),
        "it promises 0 tensors and 18,446,744,073,709,551,615 m",
    ),
    "number of tensors a little too large": (header(tensors=3, behind=47), "promises 3 tensors .* into its 71 bytes"),
    "zeros for metadata": (header(entries=100), "it has '' twice"),
    "zeros for tensors": (header(tensors=100), "it has '' twice"),
    "huge name": (
        header(struct.pack("<Q", HUGE), entries=1),
        "387,904 bytes are to follow byte 32, and it ends at byte 4",
    ),
    "huge text": (
        header(entry("a", STRING, struct.pack("<Q", 2**63)), entries=1),
        "9,223,372,036,854,775,808 bytes are to follow byte 45",
    ),
    "name that is no text": (header(text(b"\xff\xfe"), entries=1), "'utf-8' codec can't decode byte 0xff"),
    "unknown kind of metadata": (header(entry("a", 13, b""), entries=1), "metadata of the unknown kind 13"),
    "unknown kind in a list": (header(entry("a", ARRAY, array(77, 3)), entries=1), "metadata of the unknown kind 77"),
    "huge list of numbers": (
        header(entry("a", ARRAY, array(FLOAT32, HUGE)), entries=1),
        "18,446,744,073,709,551,616 bytes are to follow",
    ),
    "huge list of texts": (header(entry("a", ARRAY, array(STRING, HUGE)), entries=1), "8 bytes are to follow byte 4,"),
    "lists in a list": (header(entry("a", ARRAY, array(ARRAY, HUGE)), entries=1), "it has lists in a list, which"),
    "alignment of nothing": (
        header(entry("general.alignment", UINT32, bytes(4)), entries=1),
        "general.alignment is 0; a number of bytes is needed",
    ),
    "alignment that is a text": (
        header(entry("general.alignment", STRING, text("x")), entries=1),
        "general.alignment is 'x'; a number of bytes is needed",
    ),
    "alignment that is a list": (
        header(entry("general.alignment", ARRAY, array(UINT8, 2, b"ab")), entries=1),
        "general.alignment is array.* a number of bytes is needed",
    ),
    "huge number of dimensions": (
        header(text("a") + struct.pack("<I", 2**32 - 1), tensors=1),
        "a tensor has 4,294,967,295 dimensions; 4 are the most",
    ),
    "huge dimensions": (header(tensor("a", (HUGE, HUGE, HUGE)), tensors=1), r"[\d,]{60,} bytes of a are missing"),
    "a tensor behind the end": (
        header(tensor("a", (4, 4), offset=HUGE), tensors=1),
        r"[\d,]{20,} bytes of a are missing",
    ),
    "a tensor over the end": (header(tensor("a", (1024,)), tensors=1, behind=4095), "8 bytes of a are missing"),
    "rows of half a block": (
        header(tensor("a", (48, 2), 8), tensors=1),
        "a has rows of 48 numbers, which are no whole bl",
    ),
    "a number in blocks": (
        header(tensor("a", (), 8), tensors=1),
        "a has rows of 1 numbers, which are no whole blocks of Q8",
    ),
    "the same tensor twice": (header(tensor("a", (4,)) * 2, tensors=2), "it has 'a' twice"),
    "the same metadata twice": (header(entry("a", UINT32, bytes(4)) * 2, entries=2), "it has 'a' twice"),
    "parts that are a list": (
        header(entry("split.count", ARRAY, array(UINT8, 2, b"ab")), entries=1),
        "split.count is array.* and a number is needed",
    ),
    "scores beyond float32": (
        header(
            entry("tokenizer.ggml.model", STRING, text("t5")),
            entry("tokenizer.ggml.tokens", ARRAY, array(STRING, 1, text("a"))),
            entry("tokenizer.ggml.scores", ARRAY, array(FLOAT64, 1, struct.pack("<d", 1e300))),
            entry("tokenizer.ggml.token_type", ARRAY, array(UINT8, 1, b"\1")),
            entries=4,
        ),
        "its vocabulary cannot be read: float too large",
    ),
    "layers that are a text": (
        header(
            entry("general.architecture", STRING, text("t5")), entry("t5.block_count", STRING, text("3")), entries=2
        ),
        "t5.block_count is '3', and a number is needed",
    ),
}
REFUSED: dict[str, tuple[bytes, str]] = {
    **{
        name: (content, rf"is a damaged GGUF file \(.*{fault}.*\); fetch it again")
        for name, (content, fault) in DAMAGED.items()
    },
    "version 1": (header(version=1), OLD.format(1)),
    "version 4": (header(version=4), OLD.format(4)),
    "big-endian": (header(version=3 << 24), OLD.format("50,331,648")),
    "another magic": (
        header(magic=b"GGML"),
        "is neither safetensors, nor a PyTorch or GGUF file, .* begins with b'GGML",
    ),
    "parts that are a text": (
        header(entry("split.count", STRING, text("3")), entries=1),
        "is one of 3 parts of a GGUF file; join them",
    ),
    "a kind of tokenizer that is a list": (
        header(entry("tokenizer.ggml.model", ARRAY, array(UINT8, 2, b"ab")), entries=1),
        "is no T5: it begins with nothing",
    ),
    "a kind of tokenizer that is a list of texts": (
        header(entry("tokenizer.ggml.model", ARRAY, array(STRING, 1, text("t5"))), entries=1),
        "is no T5: it begins with nothing",
    ),
    "a kind of model that is a list": (
        header(entry("general.architecture", ARRAY, array(UINT8, 2, b"ab")), entries=1),
        "is no T5: it begins with nothing",
    ),
    "no tensors": (header(), "is no T5: it begins with nothing"),
    "an empty tensor": (header(tensor("enc.blk.0.attn_q.weight", (0, 4)), tensors=1), "shared.weight is absent"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "t5.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(path)
    assert str(path) in str(caught.value)


def in_little(path: Path, message: str) -> None:
    """A file is refused within seconds and megabytes."""
    began = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            examine(path)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 60


# What a hole in a download looks like: a file of the right size, with zeros in it.
@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (header(tensors=100_000_000, behind=0), "it has '' twice"),
        (header(entries=100_000_000, behind=0), "it has '' twice"),
        (header(entry("a", ARRAY, array(STRING, 100_000_000)), entries=1, behind=0), "more than 1,048,576 texts"),
    ],
    ids=["tensors", "metadata", "texts"],
)
def test_a_large_hole(begin: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t5.gguf"
    path.write_bytes(begin)
    with path.open("r+b") as file:
        file.truncate(8_000_000_000)
    in_little(path, message)


# ---------------------------------------------------------------------------------------------------------------------
# Whole files that were damaged
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "t5.gguf"
    model = V1_1.model_copy(update={"vocab_size": 4096})
    return write_gguf(path, encoder_part(random_state(model)), "Q8_0", spiece_model(), config=V1_1).read_bytes()


def test_cut_anywhere(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t5.gguf"
    draw = random.Random(0)
    # The last tensor may end before the file does, which is filled up.
    for length in (4, 7, 8, 100, 600, len(whole) - 32, *(draw.randrange(4, len(whole) - 32) for _ in range(40))):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"t5\.gguf is a damaged GGUF file \(.*\); fetch it again"):
            examine(path)


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        changed[draw.randrange(8, len(changed))] = draw.randrange(256)
    return bytes(changed)


def doubled(content: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(8, len(content)), draw.randrange(1, 64)
    return content[: place + length] + content[place:]


def missing(content: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(8, len(content)), draw.randrange(1, 64)
    return content[:place] + content[place + length :]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # scales that are no numbers
@pytest.mark.parametrize("damage", [flipped, doubled, missing])
def test_damage_in_the_header(damage: Callable[[bytes, random.Random], bytes], tmp_path: Path) -> None:
    """The file loads, or is refused by our error; nothing else happens."""
    config = V1_1.model_copy(update={"vocab_size": 8})
    path = write_gguf(tmp_path / "t5.gguf", encoder_part(random_state(config)), "Q8_0", config=config)
    content = path.read_bytes()
    begin = min(stored.start for stored in read_header(path).tensors.values())
    draw = random.Random(1)
    refused = 0
    for _ in range(300):
        path.write_bytes(damage(content[:begin], draw) + content[begin:])
        try:
            load_encoder(path, "float32", "cpu")
        except CheckpointError:
            refused += 1
        with suppress(ValueError):
            load_tokenizer(path)
    assert refused > 100


def test_a_file_that_becomes_shorter(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t5.gguf"
    path.write_bytes(whole)
    examination = examine(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t5\.gguf has become shorter since it was opened; fetch it again"):
        for name in examination.keymap.names:
            examination.read(name)
