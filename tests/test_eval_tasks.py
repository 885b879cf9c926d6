"""Rows become the texts of each protocol; a perfect model scores 100, a constant one takes choice 0."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.tasks.catalogue import TASKS, task_named
from a3_jax.evaluation.tasks.examples import ChoiceExample, derived_seed, is_too_long, make_examples
from a3_jax.evaluation.tasks.files import DataRow, find_data, read_rows
from a3_jax.evaluation.tasks.grading import cut_at_stops, grade, summarise
from a3_jax.evaluation.tasks.perplexity import pile_prompts, unconditional_blanks
from a3_jax.evaluation.tasks.profiles import MODELS, PROFILES, PileSettings, changed, profile_named
from tests import eval_fixtures as fixtures
from tests.eval_fixtures import CHOICES, FILLS, TOKENIZERS, ConstantModel, OracleModel, read_examples

LLAMA3 = fixtures.llama3_tokenizer
ROOM = 1 << 16


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    fixtures.write_fixtures(folder, "hub")
    return folder


def figures_of(name, profile, examples, model):
    """What a model's answers come to."""
    records = []
    for example in examples:
        is_choice = isinstance(example, ChoiceExample)
        answer = model.score(example.targets) if is_choice else model.fill([example.blank])[0]
        records.append(grade(task_named(name), profile, example, answer, model.tokenizer))
        assert json.loads(json.dumps(records[-1])) == records[-1]
    return summarise(task_named(name), records)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("model", MODELS)
def test_a_perfect_model_scores_100_and_a_constant_one_takes_the_first(hub, profile, model, tokenizer):
    profile, tokenizer = profile_named(profile, model), TOKENIZERS[tokenizer]()
    for name in CHOICES + FILLS:
        examples = read_examples(name, hub, profile, tokenizer)
        perfect = figures_of(name, profile, examples, OracleModel(examples, tokenizer))
        constant = figures_of(name, profile, examples, ConstantModel(tokenizer))
        headline = perfect if name in CHOICES else {TASKS[name].metrics[0]: perfect[TASKS[name].metrics[0]]}
        for metric, figure in headline.items():
            assert figure.value == pytest.approx(100), (name, metric)
        share = 100 * fixtures.SHARES_OF_FIRST.get(name, 0.0)
        assert {round(figure.value, 6) for figure in constant.values()} == {round(share, 6)}, name


def shown(target, tokenizer):
    """A target as text: BOS tokens of the context and of the scored part, what is given, what is scored."""
    parts = target.tokens[: target.start], target.tokens[target.start : target.stop]
    counts = tuple(int((part == tokenizer.bos_id).sum()) for part in parts)
    assert target.stop == len(target.tokens)
    return counts, *(tokenizer.decode(part) for part in parts)


KEY = "Ann gave Sue the key because"
DOG = "The dog feared the cat's toy, so"
OPEN = "Question: How do I keep a door open?\nAnswer:"
GLOVE = "Kai lost a glove. What will Kai want to do next?"
KITE = "Mending a kite: A girl sits on a wall. She holds"
CHOICE_TEXTS = [
    ("a3_best_guess", "a3", "hellaswag", 0, (1, 0), KITE, " the wall up."),
    ("diffullama_script", "a3", "hellaswag", 0, (1, 1), KITE, "the wall up."),
    ("diffullama_script", "ar", "hellaswag", 0, (0, 0), KITE, "the wall up."),
    ("a3_best_guess", "ar", "hellaswag", 1, (1, 0),
     "Home and Garden: How to store bulbs. Dig them up. Wait.", " Dry them. Use paper."),
    ("a3_best_guess", "a3", "piqa", 0, (1, 0), OPEN, " Ask it to stay."),
    ("diffullama_script", "a3", "piqa", 0, (1, 1), f"{OPEN} ", " Ask it to stay."),
    ("diffullama_script", "ar", "piqa", 0, (0, 0), f"{OPEN} ", "Ask it to stay."),
    ("a3_best_guess", "a3", "siqa", 0, (1, 0), f"Question: {GLOVE}\nAnswer:", " find it"),
    ("diffullama_script", "a3", "siqa", 0, (0, 0), f"Question: {GLOVE}\nAnswer: ", "find it"),
    ("a3_best_guess", "a3", "winogrande", 0, (1, 0), KEY, " Ann was leaving."),
    ("a3_best_guess", "a3", "winogrande", 1, (1, 0), DOG, " the cat's bark was low."),
    ("diffullama_script", "a3", "winogrande", 0, (0, 0), f"{KEY} ", "Annwas leaving."),
    ("diffullama_script", "ar", "winogrande", 0, (0, 0), f"{KEY} ", "Ann was leaving."),
    ("diffullama_script", "ar", "winogrande", 1, (0, 0), f"{DOG} ", "the cat 's bark was low."),
    ("a3_best_guess", "a3", "winogrande", 2, (1, 0), "", "Bo lent Bo a coat, as Al's was warm."),
    ("diffullama_script", "ar", "winogrande", 2, (1, 0), "", "Bo lent Bo a coat, as Al's was warm."),
]  # fmt: skip


@pytest.mark.parametrize(("profile", "model", "name", "row", "bos", "given", "scored"), CHOICE_TEXTS)
def test_texts_of_choices(hub, profile, model, name, row, bos, given, scored):
    """The last two: where nothing stands before the choice, BOS does, whatever the profile says."""
    example = read_examples(name, hub, profile_named(profile, model), LLAMA3())[row]
    assert shown(example.targets[0], LLAMA3()) == (bos, given, scored)
    length = example.targets[0].stop - example.targets[0].start
    assert example.tokens[0] == length


def test_three_pieces_have_their_own_boundaries(hub):
    example = read_examples("winogrande", hub, "diffullama_script", LLAMA3())[0]
    target = example.targets[0]
    pieces = [LLAMA3().encode(text, "no") for text in (f"{KEY} ", "Ann", "was leaving.")]
    assert target.tokens.tolist() == [token for piece in pieces for token in piece]
    assert target.start == len(pieces[0])


def test_a_prepended_space_is_not_typed_twice(hub):
    """SentencePiece puts a space before every piece by itself: natural texts have one, not two."""
    tokenizer = fixtures.llama2_tokenizer()
    target = read_examples("piqa", hub, "a3_best_guess", tokenizer)[0].targets[0]
    scored = "".join(tokenizer.token_text(token) for token in target.tokens[target.start :].tolist())
    assert scored == "▁Ask▁it▁to▁stay."


def test_the_rest_of_a_sentence_alone_can_be_scored(hub):
    profile = changed(profile_named("a3_best_guess"), winogrande_pieces="suffix")
    example = read_examples("winogrande", hub, profile, LLAMA3())[0]
    assert shown(example.targets[0], LLAMA3()) == ((1, 0), f"{KEY} Ann", " was leaving.")


def test_lengths_are_of_the_choice_without_its_space(hub):
    example = read_examples("piqa", hub, "a3_best_guess")[2]
    assert example.choices == ("with a spoon", "with a knife, away from you")
    assert example.characters == (12, 27) and example.bytes == (12, 27)
    assert example.tokens == (13, 28)  # bytes, with the space
    assert example.gold == 1 and example.id == "3" and example.length == len(example.targets[1].tokens)


def test_bytes_and_characters_differ():
    row = DataRow(1, "f", {"goal": "g", "sol1": "né", "sol2": "no", "label": 0})
    task, profile = task_named("piqa"), profile_named("a3_best_guess")
    (example,) = make_examples(task, profile, [row], fixtures.bytes_tokenizer())
    assert (example.characters, example.bytes) == ((2, 2), (3, 2))


def test_natural_texts_have_one_space_where_pieces_meet():
    row = DataRow(1, "f", {"goal": "g", "sol1": "  two", "sol2": "no", "label": 0})
    (example,) = make_examples(task_named("piqa"), profile_named("a3_best_guess"), [row], LLAMA3())
    assert shown(example.targets[0], LLAMA3())[1:] == ("Question: g\nAnswer:", " two")


def test_gsm8k_has_the_template_of_the_harness():
    pytest.importorskip("lm_eval")
    place = pathlib.Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks/gsm8k/gsm8k.yaml"
    line = next(line for line in place.read_text().splitlines() if line.startswith("doc_to_text:"))
    text = json.loads(line.split(":", 1)[1]).replace("{{", "{").replace("}}", "}")
    assert profile_named("a3_best_guess").context_of(task_named("gsm8k")) == text


def gap_texts(example, tokenizer):
    blank = example.blank
    return tokenizer.decode(blank.prefix), tokenizer.decode(example.gold), tokenizer.decode(blank.suffix)


def test_triviaqa_prompts_and_lengths(hub):
    script, guess, paper = (
        read_examples("triviaqa", hub, name, LLAMA3())
        for name in ("diffullama_script", "a3_best_guess", "diffullama_paper")
    )
    short = changed(profile_named("a3_best_guess"), length={"triviaqa": 3})
    question = "Question: Which is the largest city of Brazil??\nAnswer:"
    assert gap_texts(script[1], LLAMA3())[0] == f"{question} "
    assert gap_texts(guess[1], LLAMA3())[:2] == (question, " Sao Paulo city")
    aliases = [LLAMA3().encode(text, "no") for text in fixtures.TRIVIAQA[1][2]]
    assert script[1].blank.length == max(map(len, aliases))
    assert paper[1].blank.length == script[1].blank.length + 10
    assert {one.blank.length for one in read_examples("triviaqa", hub, short, LLAMA3())} == {3}
    assert all(len(example.blank.suffix) == 0 for example in script)
    assert [int(example.blank.prefix[0]) for example in (script[0], guess[0])] == [LLAMA3().bos_id] * 2
    assert script[0].id == "tq_1" and script[2].references == ("The Beatles", "Beatles", "!")


def test_rocstories_blanks_the_third_sentence(hub):
    natural = read_examples("rocstories", hub, "a3_best_guess", LLAMA3())
    script = read_examples("rocstories", hub, "diffullama_script", LLAMA3())
    assert gap_texts(natural[0], LLAMA3()) == (
        "Mia had a red, old bike. One wheel was bent.",
        ' She took it to "Spokes", a shop.',
        " They put it right. Mia rode home.",
    )
    assert gap_texts(script[1], LLAMA3()) == (
        "Tom didn't like rain. It rained all week.",
        "On Friday he bought boots.",
        "He walked through every puddle. Now he likes rain.",
    )
    assert (natural[0].blank.prefix[0] == LLAMA3().bos_id) and LLAMA3().bos_id not in script[0].blank.prefix
    assert script[0].blank.length == len(script[0].gold)


def test_rocstories_cap_of_left_to_right_models(hub):
    slip = read_examples("rocstories", hub, profile_named("diffullama_script", "ar"), LLAMA3())[0]
    mended = read_examples("rocstories", hub, profile_named("diffullama_paper", "ar"), LLAMA3())[0]
    assert slip.blank.length == len(slip.references[0]) > mended.blank.length == len(mended.gold)


def test_lambada_blank_is_the_last_word(hub):
    for example, text in zip(
        read_examples("lambada", hub, tokenizer=LLAMA3()), fixtures.LAMBADA, strict=True
    ):
        words = text.split()
        assert gap_texts(example, LLAMA3()) == (" ".join(words[:-1]), f" {words[-1]}", "")
        assert example.blank.length == len(example.gold) and example.references == (words[-1],)
    task, row = task_named("lambada"), DataRow(7, "f.txt", {"text": "word"})
    with pytest.raises(InputError, match=r"f\.txt:7: text: holds one word"):
        list(make_examples(task, profile_named("a3_best_guess"), [row], LLAMA3()))


def test_gsm8k_shots_stand_before_the_prompt(hub):
    example = read_examples("gsm8k", hub, "a3_best_guess")[0]
    prefix, gold, _ = gap_texts(example, fixtures.bytes_tokenizer())
    shots = prefix.split("\n\n")
    assert shots[0] == "Question: Bo has 2 eggs and eats one. How many are left?\nAnswer: 2 - 1 = 1\n#### 1"
    assert len(shots) == 6 and shots[-1] == "Question: Ann has 3 pens and buys 4. How many?\nAnswer:"
    assert gold.startswith(" 3 + 4") and example.blank.length == 256
    bare = read_examples("gsm8k", hub, "diffullama_script")[0]
    assert gap_texts(bare, fixtures.bytes_tokenizer())[0] == "Ann has 3 pens and buys 4. How many?"
    with pytest.raises(InputError, match="5 training rows"):
        list(make_examples(task_named("gsm8k"), profile_named("a3_best_guess"), [], LLAMA3(), shots=[]))


def test_answers_are_cut_at_the_stops():
    stops = {"triviaqa": ("\n", ".", ","), "gsm8k": ("Question:",)}
    profile, answer = changed(profile_named("a3_best_guess"), stops=stops), " Paris, France.\nQuestion: x"
    assert cut_at_stops(task_named("triviaqa"), profile, answer) == " Paris"
    assert cut_at_stops(task_named("gsm8k"), profile, answer) == " Paris, France.\n"
    assert cut_at_stops(task_named("lambada"), profile, answer).endswith("x")


def test_code_is_taken_as_it_stands(hub):
    for name in fixtures.CODES:
        example = read_examples(name, hub, "a3_best_guess", LLAMA3())[0]
        row = fixtures.HUMANEVAL[0]
        assert gap_texts(example, LLAMA3()) == (row["prompt"], row["canonical_solution"], row["suffix"])
        assert example.id == row["task_id"]


def test_seeds_depend_on_seed_row_and_choice_alone(hub):
    task, profile = task_named("piqa"), profile_named("a3_best_guess")
    seeds = [[target.seed for target in example.targets] for example in read_examples("piqa", hub)]
    flat = [seed for row in seeds for seed in row]
    assert len(set(flat)) == len(flat) and all(0 <= seed < 2**32 for seed in flat)
    assert seeds[1] == [derived_seed(0, 2, 0), derived_seed(0, 2, 1)]
    rows = read_rows(task, find_data(task, hub), limit=2)
    again = list(make_examples(task, profile, rows, LLAMA3()))  # fewer rows, another tokenizer
    assert [[target.seed for target in example.targets] for example in again] == seeds[:2]
    other = read_examples("piqa", hub, seed=1)
    assert not set(flat) & {target.seed for example in other for target in example.targets}


def test_samples_of_a_row(hub):
    examples = read_examples("rocstories", hub, samples=3)
    assert [(example.row, example.sample) for example in examples] == [
        (row, k) for row in (1, 2) for k in range(3)
    ]
    assert len({example.blank.seed for example in examples}) == 6
    records = [{"row": row, "figures": dict.fromkeys(TASKS["rocstories"].metrics, value)}
               for row, value in ((1, 1.0), (1, 0.0), (2, 1.0), (2, 1.0))]  # fmt: skip
    figure = summarise(task_named("rocstories"), records)["rouge1"]
    assert (figure.value, figure.count) == (75.0, 2)


def test_too_long(hub):
    profile = profile_named("diffullama_script")
    for name in ("piqa", "rocstories", "humaneval_infilling"):
        example = read_examples(name, hub, profile)[0]
        assert not is_too_long(task_named(name), profile, example, example.length)
        assert is_too_long(task_named(name), profile, example, example.length - 1)
    short = changed(profile, code_max_tokens=20)  # holds for programs alone
    code, story = (read_examples(name, hub, short)[0] for name in ("humaneval_infilling", "rocstories"))
    assert is_too_long(task_named("humaneval_infilling"), short, code, ROOM)
    assert not is_too_long(task_named("rocstories"), short, story, ROOM)
    assert [TASKS[name].too_long for name in ("piqa", "humaneval_infilling")] == ["skip", "empty"]


def test_records_hold_what_was_decided(hub):
    profile = profile_named("a3_best_guess")
    example = read_examples("hellaswag", hub, profile)[0]
    record = grade(task_named("hellaswag"), profile, example, [-13.0, -20.0, -54.0, -30.0], example)
    assert record["chosen"] == 1 and record["gold"] == 2  # per token; the sum takes the first
    assert record["figures"]["accuracy"] == record["figures"]["accuracy_per_token"] == 0.0
    example = read_examples("triviaqa", hub, profile)[2]
    tokenizer = fixtures.bytes_tokenizer()
    record = grade(task_named("triviaqa"), profile, example, tokenizer.encode(" Beatles!"), tokenizer)
    assert (record["completion"], record["empty_aliases"]) == (" Beatles!", 1)
    assert record["figures"]["exact_match"] == 1.0


def test_exact_match_is_what_the_profile_says(hub):
    answer = fixtures.bytes_tokenizer().encode(" some loud old rock and roll music here")
    found = {}
    for name in ("containment", "strict"):
        profile = changed(profile_named("a3_best_guess"), triviaqa_match=name)
        example = read_examples("triviaqa", hub, profile)[0]
        record = grade(task_named("triviaqa"), profile, example, answer, fixtures.bytes_tokenizer())
        found[name] = record["figures"]["exact_match"]
    assert found == {"containment": 1.0, "strict": 0.0}


@pytest.mark.parametrize(
    ("row", "name", "words"),
    [
        ({"sentence": "no gap", "option1": "a", "option2": "b", "answer": 0}, "winogrande", "no gap '_'"),
        (
            {"activity_label": "x", "ctx_a": "y", "ctx_b": "", "endings": ["a", "[b]", "c", "d"], "label": 0},
            "hellaswag", "empty once cleaned",
        ),
    ],
)  # fmt: skip
def test_rows_that_give_no_example(row, name, words):
    with pytest.raises(InputError, match=rf"f\.csv:9: .*{words}"):
        list(
            make_examples(
                task_named(name), profile_named("a3_best_guess"), [DataRow(9, "f.csv", row)], LLAMA3()
            )
        )


def test_profiles_name_every_switch():
    for name in PROFILES:
        for model in MODELS:
            profile = profile_named(name, model)
            settings = profile.settings()
            assert json.loads(json.dumps(settings)) == settings and settings["name"] == name
            for task in CHOICES + FILLS + fixtures.CODES:
                assert profile.bos[task]
                assert (task in profile.rule) == (task in CHOICES) != (task in profile.generate)
    one = profile_named("diffullama_script").settings(task_named("triviaqa"))
    assert (one["bos"], one["limit"], one["context"][:9]) == ("first", 2000, "Question:")
    whole = changed(profile_named("diffullama_script"), limit={"triviaqa": None})
    assert whole.settings(task_named("triviaqa"))["limit"] is None


def test_what_script_and_paper_say_differently():
    """The disagreements that the sheet of the protocol lists, and nothing else but the cap."""
    script, paper = (profile_named(name).settings() for name in ("diffullama_script", "diffullama_paper"))
    assert {key for key in script if script[key] != paper[key]} == {
        "name", "loss_weight", "triviaqa_extra", "ar_cap",
    }  # fmt: skip
    assert paper["loss_weight"] == "inv_t" and paper["triviaqa_extra"] == 10
    script, paper = (profile_named(name, "ar").rule for name in ("diffullama_script", "diffullama_paper"))
    assert script == {"hellaswag": "per_token", "winogrande": "per_token", "piqa": "sum", "siqa": "sum"}
    assert set(paper.values()) == {"per_token"}


def test_unknown_profiles_and_switches():
    with pytest.raises(InputError, match="did you mean 'diffullama_paper'") as caught:
        profile_named("diffulama_paper")
    assert caught.value.field == "profile"
    profile = profile_named("a3_best_guess")
    with pytest.raises(InputError, match="did you mean 'triviaqa_norm'"):
        changed(profile, trivia_norm="squad")
    for switches in ({"triviaqa_norm": "sqad"}, {"triviaqa_extra": -1}, {"rule": {"piqa": "mean"}}):
        with pytest.raises(InputError):
            changed(profile, **switches)
    assert profile_named("diffullama_script").scorer_options == {
        "levels": 32, "loss_weight": "none", "empty_level": "zero",
    }  # fmt: skip
    assert profile.scorer_options == {}


def test_pile_prompts_are_drawn_by_seed_and_row(hub):
    task, tokenizer = task_named("pile"), fixtures.bytes_tokenizer()
    settings = PileSettings(samples=3, prompt=16, min_tokens=500)

    def prompts(seed, model=tokenizer, settings=settings):
        return pile_prompts(read_rows(task, find_data(task, hub)), model, tokenizer, settings, seed)

    chosen = prompts(0)
    rows = [prompt.row for prompt in chosen]
    assert rows == sorted(rows) and len(set(rows)) == 3 and 8 not in rows  # the eighth is too short
    draws = sorted((derived_seed(0, row), row) for row in range(1, 8))
    assert rows == sorted(row for _, row in draws[:3])
    assert len({tuple(prompt.row for prompt in prompts(seed)) for seed in range(8)}) > 1
    assert chosen[0].text == fixtures.PILE[rows[0] - 1]["text"][:16]
    other = prompts(0, LLAMA3())  # the model has another tokenizer, the documents stay
    assert [prompt.row for prompt in other] == rows and other[0].tokens[0] == LLAMA3().bos_id
    blank = other[0].blank(100)
    assert len(blank) == 100 and blank.prefix.tolist() == LLAMA3().encode(chosen[0].text)
    with pytest.raises(InputError, match="no more than the prompt"):
        chosen[0].blank(16)
    with pytest.raises(InputError, match="3 documents of 4000 tokens are wanted, 0 are there"):
        prompts(0, settings=PileSettings(samples=3, min_tokens=4000))


def test_unconditional_blanks_begin_with_bos():
    blanks = unconditional_blanks(LLAMA3(), 64, 3, seed=1)
    assert {len(blank) for blank in blanks} == {64} and len({blank.seed for blank in blanks}) == 3
    assert all(np.array_equal(blank.prefix, [LLAMA3().bos_id]) for blank in blanks)
    with pytest.raises(InputError):
        unconditional_blanks(LLAMA3(), 1, 3)
