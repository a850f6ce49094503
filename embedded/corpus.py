"""The text of the embedded model: image captions and short text-to-text tasks, the same ones for the same seed.

The vocabulary is made from it and the model is trained on it.
"""

from collections.abc import Callable

from embedded.grammar import Writer, articles, plural
from embedded.lexicon import LEXICON, NUMBERS, OPPOSITES


def generate_captions(seed: int, count: int) -> list[str]:
    """Write image captions in the manner of prompts: sentences, tags, counts, signs, camera moves.

    Args:
        seed: the same seed gives the same captions; a greater count only adds to them.
        count: how many.

    Returns:
        The captions, in the order they were drawn; few are equal.
    """
    writer = Writer(f"captions {seed}")
    return [writer.caption() for _ in range(count)]


def generate_tasks(seed: int, count: int) -> list[tuple[str, str]]:
    """Write text-to-text tasks with one right answer each, for an encoder-decoder.

    Args:
        seed: the same seed gives the same tasks; a greater count only adds to them.
        count: how many.

    Returns:
        Pairs of a question and its answer, such as `("colour of the red apple", "red")`.
    """
    writer = Writer(f"tasks {seed}")
    return [_TASKS[writer.below(len(_TASKS))](writer) for _ in range(count)]


def _colour_of(w: Writer) -> tuple[str, str]:
    colour, thing = w.pick("colour"), w.pick("thing")
    return f"colour of the {colour} {thing}", colour


def _colour_of_one(w: Writer) -> tuple[str, str]:
    (first, second), (this, that) = w.some(2, "thing"), w.some(2, "colour")
    asked, answer = ((first, this), (second, that))[w.below(2)]
    return articles(f"colour of the {asked}: a {this} {first} and a {that} {second}"), answer


def _material_of(w: Writer) -> tuple[str, str]:
    size, thing, material = w.pick("size"), w.pick("object", "furniture"), w.pick("material")
    return articles(f"material of the {thing}: a {size} {thing} made of {material}"), material


def _subject_of(w: Writer) -> tuple[str, str]:
    being = w.pick("being")
    text = f"subject: {w.pick('picture')} of a {w.pick('mood')} {being} {w.pick('where')}"
    return articles(text), being


def _where_is(w: Writer) -> tuple[str, str]:
    (first, second), relation = w.some(2, "object", "furniture", "animal"), w.pick("relation")
    answer = articles(f"{relation} a {second}")
    return articles(f"where is the {first}? a {first} ") + answer, answer


def _is_there(w: Writer) -> tuple[str, str]:
    first, second, third = w.some(3, "thing")
    asked, answer = ((first, "yes"), (second, "yes"), (third, "no"), (third, "no"))[w.below(4)]
    return articles(f"is there a {asked}? a {first} {w.pick('relation')} a {second}"), answer


def _caption_from(w: Writer) -> tuple[str, str]:
    being, doing, place, colour = w.pick("animal", "bird"), w.pick("doing"), w.pick("place"), w.pick("colour")
    return f"caption: {being}, {colour}, {doing}, {place}", articles(f"a {colour} {being} {doing} in a {place}")


def _count(w: Writer) -> tuple[str, str]:
    count = 1 + w.below(9)
    return f"count: {' '.join([w.pick('animal', 'fruit', 'object')] * count)}", str(count)


def _how_many(w: Writer) -> tuple[str, str]:
    first, second = w.some(2, "fruit", "animal", "object")
    this, that = 2 + w.below(11), 2 + w.below(11)
    asked, answer = ((first, this), (second, that))[w.below(2)]
    text = f"how many {plural(asked)}? {NUMBERS[this]} {plural(first)} and {NUMBERS[that]} {plural(second)}"
    return text, str(answer)


def _sum(w: Writer) -> tuple[str, str]:
    a, b = w.below(13), w.below(13)
    return f"{a} plus {b}", str(a + b)


def _difference(w: Writer) -> tuple[str, str]:
    a, b = sorted((w.below(21), w.below(21)))
    return f"{b} minus {a}", str(b - a)


def _larger(w: Writer) -> tuple[str, str]:
    a, b = w.below(100), w.below(100)
    return f"larger of {a} and {b}", str(max(a, b))


def _in_order(w: Writer) -> tuple[str, str]:
    numbers = [w.below(10) for _ in range(2 + w.below(4))]
    return f"in order: {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def _number_word(w: Writer) -> tuple[str, str]:
    number = w.below(len(NUMBERS))
    pair = (f"{number} in words", NUMBERS[number])
    return pair if w.below(2) else (f"{NUMBERS[number]} in digits", str(number))


def _opposite(w: Writer) -> tuple[str, str]:
    pair = list(OPPOSITES.items())[w.below(len(OPPOSITES))]
    this = w.below(2)
    return f"opposite of {pair[this]}", pair[1 - this]


def _plural_of(w: Writer) -> tuple[str, str]:
    noun = w.pick("animal", "bird", "object", "fruit", "vegetable", "vehicle", "building", "person")
    return (f"plural of {noun}", plural(noun)) if w.below(2) else (f"singular of {plural(noun)}", noun)


def _kind_of(w: Writer) -> tuple[str, str]:
    kinds = ("animal", "bird", "fruit", "vegetable", "vehicle", "furniture", "clothing", "building", "person", "drink")
    kind = kinds[w.below(len(kinds))]
    return f"kind of thing: {w.pick(kind)}", kind


def _first_or_last(w: Writer) -> tuple[str, str]:
    words = w.some(2 + w.below(5), "colour", "fruit", "animal", "food")
    return (f"last of: {', '.join(words)}", words[-1]) if w.below(2) else (f"first of: {', '.join(words)}", words[0])


def _reverse(w: Writer) -> tuple[str, str]:
    words = w.some(2 + w.below(3), "colour", "fruit", "animal")
    return f"reverse: {', '.join(words)}", ", ".join(reversed(words))


def _repeat(w: Writer) -> tuple[str, str]:
    text = articles(w.pick("np"))
    return f"repeat: {text}", text


def _capitals(w: Writer) -> tuple[str, str]:
    word = w.pick("word")
    return f"capitals: {word}", word.upper()


def _next(w: Writer) -> tuple[str, str]:
    kind = ("weekday", "month", "season")[w.below(3)]
    cycle, at = LEXICON[kind], w.below(len(LEXICON[kind]))
    return f"{kind} after {cycle[at]}", cycle[(at + 1) % len(cycle)]


_TASKS: tuple[Callable[[Writer], tuple[str, str]], ...] = (
    _colour_of,
    _colour_of_one,
    _material_of,
    _subject_of,
    _where_is,
    _is_there,
    _caption_from,
    _count,
    _how_many,
    _sum,
    _difference,
    _larger,
    _in_order,
    _number_word,
    _opposite,
    _plural_of,
    _kind_of,
    _first_or_last,
    _reverse,
    _repeat,
    _capitals,
    _next,
)
