"""What codes the bytes that compress: DEFLATE, which every Python has, and Zstandard, which is read faster."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from nai_t5_core.datasets.arrow import MissingPackageError, arrow


class Coder(Protocol):
    """Codes a run of bytes by itself, without a checksum: a shard has one."""

    def code(self, plain: memoryview) -> bytes:
        """The coded bytes."""

    def decode(self, coded: memoryview, size: int) -> bytes:
        """The ``size`` bytes that were coded.

        Raises:
            ValueError: the bytes are damaged.
        """


class Deflate:
    """A raw DEFLATE stream of Huffman codes alone: exponents match by chance, which costs more than it saves."""

    _RAW = -15

    def code(self, plain: memoryview) -> bytes:
        coder = zlib.compressobj(wbits=self._RAW, strategy=zlib.Z_HUFFMAN_ONLY)
        return coder.compress(plain) + coder.flush()

    def decode(self, coded: memoryview, size: int) -> bytes:
        try:
            return _whole(zlib.decompress(coded, self._RAW, size), size)
        except zlib.error as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Zstandard:
    """A Zstandard frame, by pyarrow. Higher levels find matches, which are longer to write and no shorter to read.

    Raises:
        MissingPackageError: pyarrow is not installed, or was built without Zstandard.
    """

    level: int = 1

    def code(self, plain: memoryview) -> bytes:
        return bytes(self._codec.compress(plain, asbytes=True))

    def decode(self, coded: memoryview, size: int) -> bytes:
        try:
            return _whole(self._codec.decompress(coded, size, asbytes=True), size)
        except (OSError, arrow().ArrowException) as error:
            raise ValueError(str(error)) from error

    @cached_property
    def _codec(self) -> Any:
        pyarrow = arrow()
        if not pyarrow.Codec.is_available("zstd"):
            raise MissingPackageError(
                f"this pyarrow {pyarrow.__version__} was built without Zstandard; install another build, such as that "
                "of PyPI, or make sets with --compress zlib"
            )
        return pyarrow.Codec("zstd", compression_level=self.level)


def _whole(plain: bytes, size: int) -> bytes:
    if len(plain) != size:
        raise ValueError(f"{len(plain):,} bytes come of it in place of {size:,}")
    return plain


_CODERS: dict[str, Coder] = {"zlib": Deflate(), "zstd": Zstandard()}


def coder(compress: str) -> Coder:
    """What codes where ``compress`` is not ``"none"``.

    Raises:
        ValueError: unknown to this version.
    """
    if compress not in _CODERS:
        raise ValueError(f"it is compressed by {compress!r}, and this version knows {', '.join(_CODERS)}")
    return _CODERS[compress]
