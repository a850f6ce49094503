"""What each diffusion model family expects of its T5, one record per family.

A record says how the reference pipelines of diffusers call the encoder, which rows of the result their transformers
read, and which classes the family has in ComfyUI. `family("pixart-sigma")` gives a frozen `Family`; nothing here
imports torch. A new family is one record in a file of this folder; no other file of the package names it.
"""

import re
from difflib import get_close_matches

from nai_t5_core.facts.families import audio, flux_like, glyphs, images, pixart_like, videos
from nai_t5_core.facts.families.record import Family

__all__ = ["FAMILIES", "Family", "family", "family_names"]

# The order in menus.
FAMILIES: tuple[Family, ...] = (
    *pixart_like.FAMILIES,
    *flux_like.FAMILIES,
    *videos.FAMILIES,
    *images.FAMILIES,
    *glyphs.FAMILIES,
    *audio.FAMILIES,
)


def _key(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


_INDEX = {_key(name): row for row in FAMILIES for name in (row.name, *row.aliases, *row.pipelines)}


def family_names() -> list[str]:
    """The names of all families, sorted, without aliases."""
    return sorted(row.name for row in FAMILIES)


def family(name: str) -> Family:
    """The record of one family.

    Args:
        name: a family's name, an alias or the class name of a diffusers pipeline; case does not matter, and
            underscores or spaces may stand for hyphens.

    Raises:
        ValueError: no family has this name.
    """
    key = _key(str(name))
    found = _INDEX.get(key)
    if found is None:
        close = get_close_matches(key, _INDEX, n=1)
        hint = f" Did you mean {_INDEX[close[0]].name!r}?" if close else ""
        raise ValueError(f"Unknown family {name!r}; known: {', '.join(family_names())}.{hint}")
    return found
