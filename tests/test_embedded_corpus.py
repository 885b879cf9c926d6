"""The embedded stories promise that guessing gains nothing: each test is one part of that promise."""

import collections
import itertools
import re

import pytest

from a3_jax.borders import encode_blanks
from a3_jax.data import embedded
from a3_jax.tokenizer import from_files

COUNT = 252
ALL_VALUES = {slot: set(words) for slot, words in embedded.VALUES.items()}


def values_of(story: str) -> tuple[str, ...]:
    """The value of each slot in a story, whose words are found in none of the templates."""
    words = set(re.findall(r"\w+", story))
    found = [words & ALL_VALUES[slot] for slot in embedded.VALUES]
    assert all(len(values) == 1 for values in found), story
    return tuple(values.pop() for values in found)


def template_of(story: str) -> str:
    return re.sub("|".join(rf"\b{word}\b" for word in itertools.chain(*ALL_VALUES.values())), "_", story)


@pytest.fixture(scope="module")
def tokenizer():
    return from_files({"tokenizer.json": embedded.tokenizer_json()})


def test_no_template_holds_a_value():
    parts = " ".join(embedded.OPENINGS + embedded.MIDDLES + embedded.ENDINGS)
    template_words = set(re.findall(r"\w+", re.sub(r"\{\w+\}", "", parts)))
    assert not template_words & set(itertools.chain(*ALL_VALUES.values()))


@pytest.mark.parametrize("split", embedded.SPLITS)
def test_every_value_is_equally_frequent(split):
    stories = embedded.stories(split)
    for slot in range(3):
        counts = collections.Counter(values_of(story)[slot] for story in stories)
        assert len(counts) == 12
        assert set(counts.values()) == {len(stories) // 12}


def test_opening_and_two_values_say_nothing_of_the_third_beyond_what_the_split_takes():
    """Every pair of values comes with ten of the twelve third ones, equally often after each opening."""
    thirds = collections.defaultdict(collections.Counter)
    for story in embedded.stories("train"):
        name, thing, place = values_of(story)
        opening = template_of(story).split(".")[0]
        thirds[opening, name, thing][place] += 1
    assert len(thirds) == 4 * 144
    for counts in thirds.values():
        assert len(counts) == 10
        assert set(counts.values()) == {1}


def test_every_value_is_in_nearly_every_template():
    templates = collections.defaultdict(set)
    for story in embedded.stories("train"):
        for value in values_of(story):
            templates[value].add(template_of(story))
    assert len(templates) == 36
    assert len(set.union(*templates.values())) == 64
    assert min(len(seen) for seen in templates.values()) >= 60


def test_splits_share_no_combination_of_values():
    train, heldout = ({values_of(story) for story in embedded.stories(split)} for split in embedded.SPLITS)
    assert len(train) == 1440
    assert len(heldout) == 288
    assert not train & heldout


def test_no_story_twice():
    stories = embedded.stories("train") + embedded.stories("heldout")
    assert len(set(stories)) == len(stories)


@pytest.mark.parametrize("kind", embedded.KINDS)
def test_blanks_are_held_out_and_their_answers_balanced(kind):
    blanks = embedded.blanks(kind, COUNT)
    assert len(set(blanks)) == COUNT
    heldout = set(embedded.stories("heldout"))
    assert all(blank.text.replace("[[1]]", blank.answer) in heldout for blank in blanks)
    counts = collections.Counter((blank.slot, blank.answer) for blank in blanks)
    assert len(counts) == 36
    assert set(counts.values()) == {COUNT // 36}


def test_left_blanks_are_decided_by_what_comes_before():
    for blank in embedded.blanks("left", COUNT):
        before = set(re.findall(r"\w+", blank.text.split("[[1]]")[0]))
        assert before & ALL_VALUES[blank.slot] == {blank.answer}


def test_right_blanks_are_decided_only_by_what_comes_after():
    """Before the blank no word of its slot, and the very same words stand before other answers."""
    answers = collections.defaultdict(set)
    for story in embedded.stories("train"):
        words = story.split(" ")
        for slot, value in zip(embedded.VALUES, values_of(story), strict=True):
            before = " ".join(words[: [word.rstrip(".") for word in words].index(value)])
            answers[slot, before].add(value)
    for blank in embedded.blanks("right", COUNT):
        before, after = blank.text.split("[[1]]")
        assert not set(re.findall(r"\w+", before)) & ALL_VALUES[blank.slot]
        assert set(re.findall(r"\w+", after)) & ALL_VALUES[blank.slot] == {blank.answer}
        assert len(answers[blank.slot, before.rstrip()]) >= 6


def test_guessing_right_blanks_by_frequency_gains_nothing():
    """The most frequent answer is right for one blank in twelve."""
    blanks = embedded.blanks("right", COUNT)
    for slot in embedded.VALUES:
        of_slot = [blank.answer for blank in blanks if blank.slot == slot]
        assert max(collections.Counter(of_slot).values()) == len(of_slot) / 12


def test_tokenizer_gives_every_story_back(tokenizer):
    assert tokenizer.adds_bos
    for split in embedded.SPLITS:
        stories = embedded.stories(split)
        tokens = tokenizer.encode_batch(list(stories))
        assert all(tokenizer.decode(ids) == story for ids, story in zip(tokens, stories, strict=True))
        unknown = tokenizer.encode("zebra", "no")
        assert not any(unknown[0] in ids for ids in tokens)
        assert {len(ids) for ids in tokens} == {31}


@pytest.mark.parametrize("kind", embedded.KINDS)
def test_a_blank_stands_for_one_token(tokenizer, kind):
    for blank in embedded.blanks(kind, COUNT):
        answer = tokenizer.encode(blank.answer, "no")
        filled = [
            answer[0] if token is None else token for token in encode_blanks(tokenizer, blank.text).tokens
        ]
        assert len(answer) == 1
        assert filled == tokenizer.encode(blank.text.replace("[[1]]", blank.answer))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="middle"):
        embedded.blanks("middle", 1)
    with pytest.raises(ValueError, match="test"):
        embedded.stories("test")
    with pytest.raises(ValueError, match="100000"):
        embedded.blanks("left", 100000)
