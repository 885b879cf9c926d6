"""The embedded corpus: short stories made from templates, for runs with no file from outside.

A story is an opening, a middle and an ending. A name, a thing and a place run through it:

    One morning [Anna] found a [kite] near the [mill]. Soon the whole [mill] knew [Anna] and the [kite]. ...

Each value comes up first in the opening and again in the other two sentences. Seen from the left
alone its first mention is a guess among twelve; with the rest of the story it is certain. Its last
mention is certain from the left. So the same story has blanks that a left-to-right model can fill
and blanks that it can't.

Every value is equally frequent, in dozens of templates, and independent of the other two: guessing
by frequency gains nothing. The held-out stories combine values as no training story does. All of it is
a function of a fixed seed; plain Python and the `tokenizers` library.
"""

import dataclasses
import functools
import itertools
import random

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Kate", "Leo")
THINGS = ("kite", "drum", "lamp", "boat", "ball", "doll", "hat", "ring", "book", "bell", "flute", "clock")
PLACES = (
    "forest", "garden", "harbor", "market", "meadow", "castle",
    "village", "mill", "bridge", "park", "barn", "orchard",
)  # fmt: skip
VALUES = {"name": NAMES, "thing": THINGS, "place": PLACES}

OPENINGS = (
    "One morning {name} found a {thing} near the {place}.",
    "Near the {place} a small {thing} waited for {name}.",
    "Long ago {name} lost a {thing} by the {place}.",
    "By the {place} lived {name} with a beautiful {thing}.",
)
MIDDLES = (
    "{name} took the {thing} around the {place} all day.",
    "Nobody at the {place} but {name} saw the {thing}.",
    "Soon the whole {place} knew {name} and the {thing}.",
    "The {thing} made {name} famous all over the {place}.",
)
ENDINGS = (
    "At night {name} carried the {thing} to the {place}.",
    "Now the {place} is where {name} keeps the {thing}.",
    "At last {name} left the {thing} at the {place}.",
    "So the {thing} of the {place} belongs to {name}.",
)

HELDOUT_SHARE = 6  # one combination of values in six is held out
BOS, UNKNOWN = "<s>", "<unk>"
SPLITS = ("train", "heldout")
KINDS = ("left", "right")
_SEED = 20


@dataclasses.dataclass(frozen=True)
class HiddenWords:
    """A held-out story with one word missing.

    Attributes:
      text: the story with `[[1]]` in place of the word.
      answer: the word.
      kind: "left": words before the blank decide it; "right": only words after it do.
      slot: which of `VALUES` the answer belongs to.
    """

    text: str
    answer: str
    kind: str
    slot: str


@functools.cache
def stories(split: str) -> tuple[str, ...]:
    """Returns the stories of a split, "train" or "heldout", in a fixed shuffled order."""
    return tuple(template.format(**values) for template, values in _written(split))


def blanks(kind: str, count: int) -> list[HiddenWords]:
    """`count` blanks in held-out stories, the answers of each slot equally frequent (to one).

    Args:
      kind: "left" removes a slot's last mention, "right" its first.
      count: at most the number of held-out stories.

    Raises:
      ValueError: unknown kind, or more blanks than stories.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    # In turn a name, a thing and a place, so that the first blanks have some of each.
    answers = [
        answer for row in zip(*VALUES.values(), strict=True) for answer in zip(VALUES, row, strict=True)
    ]
    by_answer = {answer: [] for answer in answers}
    for template, values in _written("heldout"):
        slot = min(VALUES, key=lambda slot: len(by_answer[slot, values[slot]]))
        by_answer[slot, values[slot]].append(_blank(template, values, slot, kind))
    rounds = itertools.chain.from_iterable(zip(*by_answer.values()))
    chosen = list(itertools.islice(rounds, count))
    if len(chosen) < count:
        raise ValueError(f"{count} blanks asked for, the held-out stories give {len(chosen)}")
    return chosen


@functools.cache
def tokenizer_json() -> str:
    """Returns a word-level `tokenizer.json` of the corpus: words and full stops are tokens, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = sorted({word for text in stories("train") for word in text.replace(".", " .").split()})
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, BOS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([UNKNOWN, BOS])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # no space before a full stop
    return tokenizer.to_str(pretty=True)


@functools.cache
def _written(split):
    """(template, values by slot) of each story of a split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = random.Random(_SEED)
    written = []
    for indices in itertools.product(*(range(len(words)) for words in VALUES.values())):
        templates = _templates(rng)
        is_heldout = sum(indices) % HELDOUT_SHARE == 0
        if is_heldout == (split == "heldout"):
            words = (words[index] for words, index in zip(VALUES.values(), indices, strict=True))
            values = dict(zip(VALUES, words, strict=True))
            written += [(template, values) for template in templates]
    rng.shuffle(written)
    return tuple(written)


def _templates(rng) -> list[str]:
    """Each opening once, with another middle and ending each: openings say nothing of the values."""
    middles, endings = (rng.sample(parts, len(parts)) for parts in (MIDDLES, ENDINGS))
    return [" ".join(parts) for parts in zip(OPENINGS, middles, endings, strict=True)]


def _blank(template, values, slot, kind):
    field = "{" + slot + "}"
    place = template.index(field) if kind == "right" else template.rindex(field)
    before, after = template[:place], template[place + len(field) :]
    return HiddenWords(before.format(**values) + "[[1]]" + after.format(**values), values[slot], kind, slot)
