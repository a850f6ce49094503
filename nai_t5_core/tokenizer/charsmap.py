"""Whether a precompiled character map can be walked without leaving it.

SentencePiece files, tokenizer.json and GGUF files keep one: the size of a trie in bytes, the trie, and texts that each
end in a zero byte. The trie is a double array of 32-bit units (Yata et al. 2007, as Darts-clone stores it): a unit
leads to another one by its offset and the next byte of a prompt, or holds the place of a text. The libraries that
walk it trust it, wholly or in part, and one of them ends the program where it leads outside.
"""

from __future__ import annotations

_SIZE_BYTES = 4


def refuse_damaged_charsmap(charsmap: bytes) -> None:
    """Checks every step that any prompt could take. An empty map is a whole one.

    Raises:
        ValueError: the map is damaged.
    """
    if charsmap and (fault := _fault(charsmap)):
        raise ValueError(f"its map of characters is damaged: {fault}; fetch the file again")


def _fault(charsmap: bytes) -> str | None:
    import numpy as np  # takes a while, and not every tokenizer has a map

    size = int.from_bytes(charsmap[:_SIZE_BYTES], "little")
    texts = charsmap[_SIZE_BYTES + size :]
    if size == 0 or size % 4 or not texts:
        return f"a trie of {size:,} bytes does not fit into {len(charsmap):,}"
    units = np.frombuffer(charsmap, "<u4", size // 4, _SIZE_BYTES)
    is_value = units >> 31 == 1
    steps = np.arange(len(units), dtype=np.uint32) ^ ((units >> 10) << ((units & 0x200) >> 6))
    # Whatever byte comes next, it changes the last eight bits alone.
    if (steps[~is_value] | 0xFF).max(initial=0) >= len(units):
        return "a step leads out of the trie"
    ends_a_key = ~is_value & (units & 0x100 != 0)
    if not is_value[steps[ends_a_key]].all():
        return "a key has no text"
    begins_a_character = np.frombuffer(texts, np.uint8) & 0xC0 != 0x80
    places = units[is_value] & 0x7FFFFFFF
    if places.max(initial=0) >= len(texts) or not begins_a_character[places].all():
        return "a key has a text that begins inside a character, or outside of the map"
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        return f"its texts are no UTF-8 ({error.reason})"
    return None if texts.endswith(b"\0") else "its last text has no end"
