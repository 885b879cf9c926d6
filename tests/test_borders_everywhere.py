"""The rule of borders where it is used: tasks, dialogs, the Pile, `generate`; every kind of tokenizer."""

import json
import re

import numpy as np
import pytest
import tokenizers

from a3_jax.borders import completion
from a3_jax.data.dialogs import ChatTemplate, Specials, chat_parts, prompt_parts
from a3_jax.data.encoding import Document, Encoder
from a3_jax.data.table import GIVEN, PREDICTED
from a3_jax.decoding import generate
from a3_jax.evaluation.tasks.catalogue import CODE, task_named
from a3_jax.evaluation.tasks.examples import ChoiceExample, make_examples
from a3_jax.evaluation.tasks.files import DataRow
from a3_jax.evaluation.tasks.grading import grade, program_of, summarise
from a3_jax.evaluation.tasks.perplexity import pile_prompts
from a3_jax.evaluation.tasks.profiles import PROFILES, PileSettings, profile_named
from tests import eval_fixtures as fixtures
from tests import tiny
from tests.decoding_cli import assert_refused, run, write_lines
from tests.tiny_checkpoint import tiny_checkpoint
from tests.tiny_hf import write_tiny_llama
from tests.tokenizer_kinds import KINDS

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    fixtures.write_fixtures(folder, "hub")
    return folder


def answer_of(example, model):
    is_choice = isinstance(example, ChoiceExample)
    return model.score(example.targets) if is_choice else model.fill([example.blank])[0]


@kinds
@pytest.mark.parametrize("profile", PROFILES)
def test_gold_answers_score_100_on_every_task(hub, kind, profile):
    tokenizer, profile = KINDS[kind](), profile_named(profile)
    for name in fixtures.CHOICES + fixtures.FILLS + fixtures.CODES:
        task = task_named(name)
        examples = fixtures.read_examples(name, hub, profile, tokenizer)
        model = fixtures.OracleModel(examples, tokenizer)
        records = [
            grade(task, profile, example, answer_of(example, model), tokenizer, allow_code_execution=False)
            for example in examples
        ]
        if task.kind == CODE:
            for example, record in zip(examples, records, strict=True):
                assert record["completion"] == example.values["canonical_solution"], (name, example.row)
                assert record["completion"] in program_of(example, record["completion"])
        else:
            metric = task.metrics[0]
            assert summarise(task, records)[metric].value == pytest.approx(100), (name, metric)


HOLES = [
    ("def f(x):\n    y = x\n", "    y = y + 1", "\n    return y\n"),
    ("def f(x):\n", "    if x:\n        return 1", "\n    return y\n"),
    ("def f(", "x", "):\n    return x\n"),
    ("", "def f(x):", "\n    return x\n"),
    ("def f(x):\n    return x ", "+ 1\n", ""),
    ("def f(x):\n\treturn ", "'a  b'", "\n"),
]


@kinds
@pytest.mark.parametrize("hole", HOLES)
def test_holes_in_programs(kind, hole):
    """The right tokens are the program's own, and come back as what stood in the hole."""
    tokenizer, (prompt, middle, suffix) = KINDS[kind](), hole
    values = {"task_id": "t", "entry_point": "f", "prompt": prompt, "suffix": suffix}
    row = DataRow(1, "f", values | {"canonical_solution": middle, "test": ""})
    task, profile = task_named("humaneval_infilling"), profile_named("a3_best_guess")
    (example,) = make_examples(task, profile, [row], tokenizer)
    record = grade(task, profile, example, example.gold, tokenizer)
    assert record["completion"] == middle
    front = len(example.blank.prefix) - len(tokenizer.encode("")) if example.blank.prefix.size else 0
    tokens = [*example.blank.prefix, *example.gold, *example.blank.suffix]
    assert front >= 0 and tokens[
        -len(tokenizer.encode(prompt + middle + suffix, "no")) :
    ] == tokenizer.encode(prompt + middle + suffix, "no")


PASSAGES = [
    ('"Where is the dog?" asked Ann.\n\nShe called, and at last she found the dog', "dog"),
    ("one\n\ntwo", "two"),
    ("some  spaces   here", "here"),
    ("a tab\there", "here"),
    (" outer space here \n", "here"),
]


@kinds
@pytest.mark.parametrize(("text", "word"), PASSAGES)
def test_lambada_changes_nothing_before_the_last_word(kind, text, word):
    tokenizer = KINDS[kind]()
    task, profile = task_named("lambada"), profile_named("a3_best_guess")
    (example,) = make_examples(task, profile, [DataRow(1, "f", {"text": text})], tokenizer)
    front = len(tokenizer.encode(""))
    whole = [*example.blank.prefix[front:], *example.gold]
    assert whole == tokenizer.encode(text.strip(), "no")
    assert example.references == (word,) and example.blank.length == len(example.gold)
    assert grade(task, profile, example, example.gold, tokenizer)["figures"] == {"accuracy": 1.0}


@kinds
@pytest.mark.parametrize("word", ["caf\u00e9", "cafe\u0301"])
def test_accents_may_be_characters_of_their_own(kind, word):
    """A tokenizer may compose them: the right tokens are right all the same."""
    tokenizer, profile = KINDS[kind](), profile_named("a3_best_guess")
    answer = {"aliases": [word], "normalized_aliases": [word]}
    for name, values in (
        ("lambada", {"text": f"he walked on to the {word}"}),
        ("triviaqa", {"question": "Where?", "answer": answer}),
    ):
        task = task_named(name)
        (example,) = make_examples(task, profile, [DataRow(1, "f", values)], tokenizer)
        figures = grade(task, profile, example, example.gold, tokenizer)["figures"]
        assert set(figures.values()) == {1.0}, figures


def row_of(name, choice, other="no"):
    """A row of a task of two choices or more whose first choice is this one."""
    values = {
        "piqa": {"goal": "g", "sol1": choice, "sol2": other},
        "siqa": {"context": "c", "question": "q", "answerA": choice, "answerB": other, "answerC": "x"},
        "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": [choice, other, "x", "y"]},
        "winogrande": {"sentence": "The _ ran.", "option1": choice, "option2": other, "answer": 0},
    }
    return DataRow(1, "f", {"label": 0} | values[name])


@pytest.mark.parametrize("name", fixtures.CHOICES)
@pytest.mark.parametrize("typed", ["old mill", "old mill ", "  old mill", "old  mill", "\told   mill \n"])
def test_white_space_of_choices_counts_nowhere(name, typed):
    """Outer and doubled white space changes neither what is scored nor by how much it is divided."""
    task, profile = task_named(name), profile_named("a3_best_guess")
    plain, spaced = (
        next(make_examples(task, profile, [row_of(name, choice)], fixtures.bytes_tokenizer()))
        for choice in ("old mill", typed)
    )
    assert (spaced.choices, spaced.characters, spaced.bytes, spaced.tokens) == (
        plain.choices,
        plain.characters,
        plain.bytes,
        plain.tokens,
    )
    for ours, theirs in zip(spaced.targets, plain.targets, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist() and ours.start == theirs.start


@kinds
def test_pile_prompts_end_with_a_whole_character(kind):
    evaluator = KINDS[kind]()
    text = "你好世界 the cat 🙂👩‍🚀é " * 40
    rows = [DataRow(1, "f", {"text": text})]
    for count in range(1, 24):
        settings = PileSettings(samples=1, prompt=count, min_tokens=30)
        (prompt,) = pile_prompts(rows, evaluator, evaluator, settings)
        assert text.startswith(prompt.text) and "\ufffd" not in prompt.text
        assert len(evaluator.encode(prompt.text, "no")) <= count + 1


def encoded(kind_or_tokenizer, parts):
    tokenizer = KINDS[kind_or_tokenizer]() if isinstance(kind_or_tokenizer, str) else kind_or_tokenizer
    encoder = Encoder(tokenizer, bos="no", eos="yes", seq_len=512, filler=0)
    (result,) = encoder.encode([Document(0, 0, 0, parts)])
    return tokenizer, result


RESPONSES = [
    ("Q: x?\nA:", " the mat"),
    ("go", "ing home"),
    ("", "the cat"),
    ("the cat ", "sat"),
    ("a\n", "\nb"),
]


@kinds
@pytest.mark.parametrize(("prompt", "response"), RESPONSES)
def test_prompt_and_response_are_one_text(kind, prompt, response):
    tokenizer, result = encoded(kind, prompt_parts({"prompt": prompt, "response": response}))
    tokens, roles = result.tokens.tolist(), result.roles.tolist()
    assert tokens == [*tokenizer.encode(prompt + response, "no"), tokenizer.eos_id]
    given = [token for token, role in zip(tokens, roles, strict=True) if role == GIVEN]
    answer = tokens[len(given) : -1]
    assert roles == [GIVEN] * len(given) + [PREDICTED] * (len(tokens) - len(given))
    assert completion(tokenizer, given, answer).endswith(response)
    assert prompt.startswith(tokenizer.decode(given))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "What goes up?"},
    {"role": "assistant", "content": "The cat, and then it left."},
    {"role": "user", "content": "She said: more"},
    {"role": "assistant", "content": "nothing\n\nmore!"},
]


@pytest.mark.torch
@kinds
def test_dialogs_have_the_ids_of_apply_chat_template(kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = KINDS[kind]()
    config = json.loads(tokenizer.files()["tokenizer_config.json"])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"]),
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )
    expected = theirs.apply_chat_template(MESSAGES, chat_template=TEMPLATE, tokenize=True, return_dict=False)
    parts = chat_parts({"messages": MESSAGES}, ChatTemplate(TEMPLATE, tokenizer), Specials(tokenizer))
    _, result = encoded(tokenizer, parts)
    assert result.tokens.tolist() == expected
    scored = np.flatnonzero(result.roles == PREDICTED)
    text = tokenizer.decode(result.tokens[scored])
    assert "The cat, and then it left." in text and "nothing\n\nmore!" in text and "INST" not in text


FILLED = [
    "The cat [[1]], and then it left.",
    "[[2]] cat",
    "un[[1]]able",
    "def f(x):\n    y = x\n[[4]]\n    return y\n",
]


@kinds
@pytest.mark.parametrize("text", FILLED)
def test_generate_gives_back_what_is_given(kind, text):
    """Letter for letter, whatever a model of random weights puts into the blanks."""
    tokenizer = KINDS[kind]()
    config = tiny.ModelConfig(**{**tiny.CONFIG.to_dict(), "vocab_size": 512})
    checkpoint = tiny_checkpoint(config, tokenizer=tokenizer)
    pieces = re.split(r"\[\[[0-9]+\]\]", text)
    for result in generate(checkpoint, [{"text": text}], temperature=1.0, num_samples=3):
        assert result["text"].startswith(pieces[0]) and result["text"].endswith(pieces[-1])
        rest = tokenizer.encode_continuation(pieces[-1])
        assert result["tokens"][-len(rest) :] == rest
        assert not pieces[0] or tokenizer.decode(result["tokens"]).endswith(pieces[-1])


def test_brackets_of_a_users_own_text(tmp_path, capsys):
    write_tiny_llama(tmp_path / "model", query_embed=True)
    source = write_lines(tmp_path / "in.jsonl", {"text": r"a\[[1]][[2]]"}, {"text": "see [[x]"})
    assert_refused(run(capsys, "generate", tmp_path / "model", source, "-"), source, ":2", "text", "[[x]")
    source = write_lines(tmp_path / "in.jsonl", {"text": r"a\[[1]][[2]]"})
    status, (result,), _ = run(capsys, "generate", tmp_path / "model", source, "-")
    assert status == 0 and result["text"].startswith("a[[1]]") and len(result["tokens"]) == 8
    status, (result,), _ = run(capsys, "generate", tmp_path / "model", source, "-", "--no_blanks")
    assert (status, result["text"], result["logprob"]) == (0, r"a\[[1]][[2]]", 0.0)
