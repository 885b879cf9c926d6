r"""Where given text meets predicted text: every kind of tokenizer, `[[n]]` blanks, `\[[`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_jax.borders import completion, cut, encode_blanks, predicted_tokens, whole_text
from a3_jax.errors import InputError
from a3_jax.tokenizer import bytes_tokenizer, from_files
from tests.test_tokenizer import AWKWARD_TEXTS, byte_fallback_tokenizer, word_tokenizer
from tests.tokenizer_kinds import KINDS

CAT = "The cat sat on the mat, and then it left."
CODE = ("def f(x):\n    y = x\n", "    y = y + 1", "\n    return y\n")
PARTS = [
    ("The cat", " sat", ", and then it left."),
    ("The cat ", "sat", " on the mat"),
    ("The ", "cat sat", ""),
    ("", "The cat", " sat"),
    ("un", "believ", "able"),
    ("go", "ing home", ""),
    ("Q: x?\nA:", " the mat", ""),
    ("line\n\n", "She", " called"),
    ("two  ", "spaces", "  here"),
    ("你好", "世界", "。 ok"),
    ("a 🙂", "👩‍🚀 é", " z"),
    ('"Where', '?"\n\nShe', ' said'),
    ("x = ", "345", "6"),
    CODE,
    ("f(", "x", "):\n    y"),
    ("a:", "\n", "\nb"),
]  # fmt: skip

kinds = pytest.mark.parametrize("kind", KINDS)
parts_ = pytest.mark.parametrize("parts", PARTS, ids=lambda parts: parts[0][:8] + parts[1][:8])


@kinds
@parts_
def test_a_text_keeps_its_own_tokens(kind, parts):
    """A cut changes no token; what is predicted holds every character of the predicted part."""
    tokenizer, (prefix, middle, suffix) = KINDS[kind](), parts
    text = cut(tokenizer, *parts)
    assert [*text.prefix, *text.middle, *text.suffix] == tokenizer.encode(prefix + middle + suffix, "no")
    assert prefix.startswith(tokenizer.decode(text.prefix)) or not text.prefix
    assert completion(tokenizer, text.prefix, text.middle, text.before, text.after) == middle
    assert tokenizer.decode(text.prefix) + text.before == prefix


@kinds
@settings(max_examples=60, deadline=None)
@given(
    st.text("ab .\n é你🙂:", max_size=5),
    st.text("ab .\n é你🙂:", min_size=1, max_size=5),
    st.text("a \n.é🙂", max_size=4),
)
def test_the_right_tokens_give_the_text_back(kind, prefix, middle, suffix):
    tokenizer = KINDS[kind]()
    text = cut(tokenizer, prefix, middle, suffix)
    assert [*text.prefix, *text.middle, *text.suffix] == tokenizer.encode(prefix + middle + suffix, "no")
    if tokenizer.decode([*text.prefix, *text.middle, *text.suffix]) == prefix + middle + suffix:
        assert completion(tokenizer, text.prefix, text.middle, text.before, text.after) == middle


def test_a_token_on_the_border_is_predicted():
    offsets = [(0, 3), (3, 7), (7, 8)]
    assert predicted_tokens(offsets, [("The c", False), ("at", True), (".", False)]).tolist() == [0, 1, 0]
    assert predicted_tokens(offsets, [("The", False), (" cat", True), (".", False)]).tolist() == [0, 1, 0]
    assert predicted_tokens(offsets, [("The", True), (" cat.", False)]).tolist() == [1, 0, 0]
    assert predicted_tokens(offsets, [("The cat.", False), ("", True)]).tolist() == [0, 0, 0]
    assert predicted_tokens([], []).tolist() == []


@kinds
def test_a_cut_text_never_ends_inside_a_character(kind):
    text = "你好 🙂 the cat é"
    ((ids, offsets),) = KINDS[kind]().encode_with_offsets([text])
    for count in range(len(ids) + 2):
        beginning = whole_text(text, offsets, count)
        assert text.startswith(beginning) and "\ufffd" not in beginning
    assert whole_text(text, offsets, len(ids)) == text


@kinds
@parts_
def test_blanks_keep_what_is_given(kind, parts):
    """Whatever is filled in; and the text's own tokens give the text back."""
    tokenizer, (prefix, middle, suffix) = KINDS[kind](), parts
    gold = cut(tokenizer, *parts)
    blanks = encode_blanks(tokenizer, f"{prefix}[[{len(gold.middle)}]]{suffix}", bos="no")
    assert blanks.tokens.count(None) == len(gold.middle)
    for token in (tokenizer.encode("t", "no")[-1], tokenizer.encode(" the", "no")[-1], 5):
        filled = blanks.filled(tokenizer, [token if one is None else one for one in blanks.tokens])
        assert filled.startswith(prefix) and filled.endswith(suffix)
    if not gold.before.strip(" ") and not gold.after:  # each border is a token's edge
        answer = iter(gold.middle)
        tokens = [next(answer) if one is None else one for one in blanks.tokens]
        assert blanks.filled(tokenizer, tokens) == prefix + middle + suffix
        if middle != "345":  # the space before digits is a token of its own
            assert tokens == [*gold.prefix, *gold.middle, *gold.suffix]


@kinds
def test_no_space_is_put_after_a_blank(kind):
    tokenizer = KINDS[kind]()
    blanks = encode_blanks(tokenizer, "The cat [[1]], and then it left.")
    token = tokenizer.encode("cat sat", "no")[-1]
    tokens = [token if one is None else one for one in blanks.tokens]
    filled = blanks.filled(tokenizer, tokens)
    assert filled.startswith("The cat ") and filled.endswith(", and then it left.") and "  " not in filled
    assert " ," not in filled


@kinds
def test_several_blanks(kind):
    tokenizer = KINDS[kind]()
    text = "[[1]] cat [[2]][[1]] the [[1]] [[1]], and[[1]]"
    blanks = encode_blanks(tokenizer, text)
    assert blanks.blanks == (1, 3, 1, 1, 1)
    tokens = [tokenizer.encode("x", "no")[-1] if one is None else one for one in blanks.tokens]
    filled = blanks.filled(tokenizer, tokens)
    places = [filled.index(piece) for piece in (" cat ", " the ", ", and")]
    assert places == sorted(places)


def test_a_text_that_an_eos_ended_stops_there():
    tokenizer = bytes_tokenizer()
    blanks = encode_blanks(tokenizer, "ab[[6]]")
    assert blanks.filled(tokenizer, [97, 98, 99, tokenizer.eos_id]) == "abc"


def test_blanks_in_bytes():
    tokens = encode_blanks(bytes_tokenizer(), "a [[2]] b[[1]]", bos="yes").tokens
    assert tokens == [256, 97, 32, None, None, 32, 98, None]


def test_blanks_take_the_space_before_them():
    """A space that starts a word belongs to the blank; a space typed twice keeps the other one."""
    tokenizer = from_files(byte_fallback_tokenizer())
    the, cat = tokenizer.encode("the", "no") + tokenizer.encode("cat", "no")
    assert encode_blanks(tokenizer, "the [[3]] cat", bos="no").tokens == [the, None, None, None, cat]
    assert encode_blanks(tokenizer, "[[1]] cat", bos="auto").tokens == [tokenizer.bos_id, None, cat]
    words = encode_blanks(word_tokenizer(), "zero [[2]] two")
    assert words.tokens == [0, None, None, 2]
    assert words.filled(word_tokenizer(), [0, 1, 1, 2]) == "zero one one two"


@kinds
def test_text_without_blanks_is_encoded_as_ever(kind):
    for text in AWKWARD_TEXTS:
        tokenizer = KINDS[kind]()
        assert encode_blanks(tokenizer, text).tokens == tokenizer.encode(text)
        assert encode_blanks(tokenizer, text).filled(tokenizer, tokenizer.encode(text)) == text


ESCAPES = [
    (r"a \[[1]] b", "a [[1]] b", 0),
    (r"\[[ and \[[x]]", "[[ and [[x]]", 0),
    (r"a\\[[2]]", "a\\", 2),
    (r"a\\\[[2]]", r"a\[[2]]", 0),
    (r"\[[1]] [[3]]", "[[1]]", 3),
    (r"C:\dir\n", r"C:\dir\n", 0),
    (r"\[ \] [1] ]] \\", r"\[ \] [1] ]] \\", 0),
]


@pytest.mark.parametrize(("typed", "text", "count"), ESCAPES)
def test_brackets_can_be_typed(typed, text, count):
    tokenizer = KINDS["byte_level"]()
    blanks = encode_blanks(tokenizer, typed)
    given = [token for token in blanks.tokens if token is not None]
    assert (tokenizer.decode(given), len(blanks.tokens) - len(given)) == (text, count)


@pytest.mark.parametrize("text", ["a [[2]]", "[[", r"\[[1]]", "[[0]]"])
def test_blanks_can_be_turned_off(text):
    tokenizer = bytes_tokenizer()
    assert encode_blanks(tokenizer, text, are_blanks_read=False).tokens == list(text.encode())


MALFORMED = ["[[x]]", "[[0]]", "[[000]]", "a [[", "[[]]", "[[-1]]", "[[1]", "[[3]] [[1.5]]", "[[9999999999]]"]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_blanks(text):
    with pytest.raises(InputError, match=r"\[\["):
        encode_blanks(bytes_tokenizer(), text)


@kinds
def test_offsets_cover_the_text(kind):
    """No character is in no token, not even the spaces that post-processors trim from offsets."""
    for text in (CAT, "".join(CODE), " a  b "):
        ((_, offsets),) = KINDS[kind]().encode_with_offsets([text])
        covered = np.zeros(len(text), bool)
        for start, end in offsets:
            covered[start:end] = True
        assert covered.all()
