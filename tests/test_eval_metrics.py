"""Golden values of text cleaning, answer normalisation, F1, ROUGE, pass@k, perplexity and their errors."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3_jax.errors import InputError
from a3_jax.evaluation.tasks import metrics
from a3_jax.evaluation.tasks.examples import clean


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  How to bake [title] Mix it. [step] Wait. ", "How to bake. Mix it. Wait."),
        ("[header] Start [title] Go", " Start. Go"),
        ("a    b", "a  b"),  # four spaces: each pair becomes one, once
        ("a   b", "a  b"),
        ("x [a] [b] y", "x  y"),  # three spaces are left, of which a pair is joined
        ("nothing [open", "nothing [open"),
        ("a[]b", "ab"),
    ],
)
def test_hellaswag_cleaning(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Beatles!", "beatles"),
        ("U.S.A.", "usa"),
        ("rock-n-roll", "rocknroll"),
        ("Cote d'Ivoire", "cote divoire"),
        ("the THE a", ""),
        ("an  apple\ta day", "apple day"),
        ("theatre", "theatre"),
        ("\u201cQuote\u201d", "\u201cquote\u201d"),  # curly quotes stay
    ],
)
def test_squad_norm(text, normalised):
    assert metrics.squad_normalised(text) == normalised


@pytest.mark.parametrize(
    ("text", "normalised"),
    [("rock-n-roll", "rock n roll"), ("snake_case", "snake case"), ("Cote d\u2019Ivoire", "cote d ivoire")],
)
def test_triviaqa_norm_makes_spaces_of_punctuation(text, normalised):
    assert metrics.triviaqa_normalised(text) == normalised


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("the big red dog", "red dog", 0.8),
        ("red dog", "the big red dog", 0.8),
        ("cat", "dog", 0.0),
        ("a a b", "b b", 2 * 1 / (1 + 2)),  # articles go: "b" against "b b"
        ("", "", 1.0),
        ("", "dog", 0.0),
    ],
)
def test_token_f1(prediction, reference, f1):
    texts = map(metrics.squad_normalised, (prediction, reference))
    assert metrics.token_f1(*texts) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "contained", "strict"),
    [
        (" the Beatles", 1, 1),
        ("It was the Beatles of Liverpool", 1, 0),  # "exact match" of the scripts
        ("beetles", 0, 0),
        ("", 0, 0),
        ("Beatle", 0, 0),
    ],
)
def test_triviaqa_containment_and_strict(prediction, contained, strict):
    figures = metrics.triviaqa_figures(prediction, ["The Beatles", "!"], ["beatles", ""])
    assert (figures["containment"], figures["strict_exact_match"]) == (contained, strict)


def test_an_alias_of_punctuation_matches_nothing():
    """Its normal form is empty, and the empty text is in every answer."""
    assert metrics.triviaqa_figures("anything", ["?"], [""]) == {
        "containment": 0.0, "strict_exact_match": 0.0, "f1": 0.0,
    }  # fmt: skip


def test_triviaqa_white_space_of_aliases_counts_nowhere():
    for alias in ("the  Beatles", " The Beatles\n"):
        figures = metrics.triviaqa_figures("The Beatles", [alias], [alias.lower().replace("the", "")])
        assert set(figures.values()) == {1.0}
    assert metrics.triviaqa_figures("long ago", ["x"], [" long  ago "])["containment"] == 1.0


def test_hyphens_meet_only_under_triviaqas_own_norm():
    aliases, normalized = ["Rock-n-roll"], ["rock n roll"]
    found = {
        norm: metrics.triviaqa_figures("rock-n-roll", aliases, normalized, norm)["containment"]
        for norm in ("squad", "triviaqa")
    }
    assert found == {"squad": 0.0, "triviaqa": 1.0}


def test_triviaqa_f1_takes_the_best_alias():
    figures = metrics.triviaqa_figures("big red dog", ["cat", "red dog"], ["cat", "red dog"])
    assert figures["f1"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("The cat sat on the mat.", "the cat lay on a mat", (0.666667, 0.2, 0.666667)),
        ("She didn't go home.", "She did not go home!", (0.6, 0.25, 0.6)),
        ("Running fast", "runs fast", (0.5, 0.0, 0.5)),  # no stemming
        ("a a a b", "a b a", (0.857143, 0.4, 0.571429)),
        ("one two three four", "four three two one", (1.0, 0.0, 0.25)),
        ("one", "", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge(reference, prediction, expected):
    scores = metrics.rouge(prediction, reference)
    assert tuple(scores[name] for name in metrics.ROUGE_TYPES) == pytest.approx(expected, abs=1e-6)


def test_rouge_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    metrics._rouge_scorer.cache_clear()
    with pytest.raises(InputError, match=r"a3_jax\[eval\]"):
        metrics.rouge("a", "b")
    metrics._rouge_scorer.cache_clear()


@pytest.mark.parametrize(
    ("prediction", "word", "right"),
    [(" key", "key", 1), ("key", "key", 1), ("Key", "key", 0), ("keys", "key", 0), ("n't", "n't", 1)],
)
def test_lambada_wants_the_word_exactly(prediction, word, right):
    assert metrics.last_word_is(prediction, word) == right


@pytest.mark.parametrize(
    ("prediction", "accuracy", "strict", "flexible"),
    [
        ("so 12 + 1,222\n#### 1,234", 1, 1, 1),
        ("#### 1234.", 1, 1, 1),
        ("it costs $1,234.", 0, 0, 1),
        ("#### 7\n#### 1234", 1, 0, 1),  # the last mark by one rule, the first by the other
        ("#### 12 and 1234", 0, 0, 1),
        ("none", 0, 0, 0),
        ("1234 #### five", 0, 0, 1),
    ],
)
def test_gsm8k_rules(prediction, accuracy, strict, flexible):
    found = metrics.gsm8k_figures(prediction, "12 + 1222 = 1234\n#### 1,234")
    assert tuple(found.values()) == (accuracy, strict, flexible)


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for total, correct, k in [(5, 2, 1), (5, 2, 3), (4, 0, 2), (6, 6, 2), (4, 3, 2)]:
        draws = list(itertools.combinations(range(total), k))
        share = sum(any(index < correct for index in draw) for draw in draws) / len(draws)
        assert metrics.pass_at_k(total, correct, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="k=3"):
        metrics.pass_at_k(2, 1, 3)


def test_choice_rules_and_ties():
    chosen = metrics.best_choices([-6.0, -5.0, -9.0], (3, 1, 9), (12, 5, 9), (12, 5, 27))
    assert chosen == {"sum": 1, "per_token": 2, "per_character": 0, "per_byte": 2}
    assert set(metrics.best_choices([-2.0, -2.0], (1, 1), (3, 3), (3, 3)).values()) == {0}
    with pytest.raises(ValueError, match="NaN"):
        metrics.best_choices([0.0, math.nan], (1, 1), (1, 1), (1, 1))


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=60))
@settings(max_examples=50, deadline=None)
def test_standard_error_of_a_share(values):
    figure, p = metrics.mean_figure(values), sum(values) / len(values)
    assert figure.value == pytest.approx(100 * p)
    assert figure.standard_error == pytest.approx(100 * math.sqrt(p * (1 - p) / (len(values) - 1)), abs=1e-9)


def test_figures_of_one_and_of_none():
    assert metrics.mean_figure([0.5]) == metrics.Figure(50.0, None, 1)
    with pytest.raises(InputError):
        metrics.mean_figure([])


def test_perplexity_of_a_uniform_evaluator_is_the_vocabulary():
    counts = [3, 100, 7]
    found = metrics.perplexity([count * math.log(50) for count in counts], counts)
    assert found == {"corpus": pytest.approx(50), "mean": pytest.approx(50)}


def test_corpus_perplexity_weighs_tokens_and_the_mean_texts():
    found = metrics.perplexity([math.log(2) * 9, math.log(1000)], [9, 1])
    assert found["corpus"] == pytest.approx(math.exp((9 * math.log(2) + math.log(1000)) / 10))
    assert found["mean"] == pytest.approx((2 + 1000) / 2)
    with pytest.raises(InputError):
        metrics.perplexity([1.0], [0])


def test_bits_entropy_and_distinct():
    assert metrics.bits_per_byte([math.log(2) * 8, 0.0], [2, 2]) == pytest.approx(2.0)
    assert metrics.unigram_entropy([5, 5, 5]) == 0.0
    assert metrics.unigram_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert metrics.unigram_entropy([1, 1, 2]) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert metrics.distinct_n([[1, 2, 1, 2], np.array([1, 2])], 2) == pytest.approx(2 / 4)
    assert metrics.distinct_n([[1]], 2) == 0.0
