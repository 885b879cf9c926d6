"""What the quickstart asks: blanks stand where they are said to, and the truth fits them."""

import re

import pytest

from a3_jax.borders import encode_blanks
from a3_jax.quickstart.questions import (
    all_but_last_mentions,
    blank_out,
    first_mentions,
    sentence,
    story_questions,
    text_questions,
)
from a3_jax.tokenizer import bytes_tokenizer

STORY = (
    "Long ago Ben lost a kite by the mill. The kite made Ben very happy. "
    "So the kite of the mill belongs to Ben."
)
WORDS = re.findall(r"\w+|\.", STORY)


def test_neighbours_are_one_blank_and_a_full_stop_follows_its_word():
    assert blank_out("Ben found a kite.", {0, 1, 3}) == "[[2]] a [[1]]."
    assert blank_out("Ben found a kite.", set()) == "Ben found a kite."


def test_first_mentions():
    assert blank_out(STORY, first_mentions(WORDS)).startswith(
        "Long ago [[1]] lost a [[1]] by the [[1]]. The kite"
    )


def test_all_but_last_mentions_leave_one_of_each_value():
    left = blank_out(STORY, all_but_last_mentions(WORDS))
    assert [left.count(word) for word in ("Ben", "kite", "mill")] == [1, 1, 1]
    assert left.endswith("So the kite of the mill belongs to Ben.")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "[[9]]. The kite made Ben very happy. So the kite of the mill belongs to Ben."),
        (1, "Long ago Ben lost a kite by the mill. [[6]]. So the kite of the mill belongs to Ben."),
        (-1, "Long ago Ben lost a kite by the mill. The kite made Ben very happy. [[9]]."),
    ],
)
def test_sentence(number, expected):
    assert blank_out(STORY, sentence(number)(WORDS)) == expected


def test_ten_stories_with_as_many_words_as_their_blanks_say():
    questions = story_questions()
    assert len(questions) == 10
    for question in questions:
        words = sum(int(count) for count in re.findall(r"\[\[(\d+)\]\]", question.text))
        words += len(re.findall(r"\w+|\.", re.sub(r"\[\[\d+\]\]", "", question.text)))
        assert words == len(re.findall(r"\w+|\.", question.truth))


def test_blanks_in_text_count_bytes():
    documents = [
        "Über allen Gipfeln ist große Ruh, in allen Wipfeln.",
        "too short",
        "one [[2]] three four five six seven",
    ]
    (question,) = text_questions(documents)
    tokenizer = bytes_tokenizer()
    assert "[[" in question.text
    assert len(encode_blanks(tokenizer, question.text).tokens) == len(tokenizer.encode(question.truth))
