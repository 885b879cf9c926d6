"""Perplexities of what a model writes: of a uniform evaluator they are V, whatever was written."""

import gzip
import json

import numpy as np
import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.models.interface import TextBlank
from a3_jax.evaluation.runner import evaluate
from a3_jax.evaluation.tasks.perplexity import Variant, Writing, write_and_score
from tests.eval_fixtures import UniformModel, llama3_tokenizer

SMALL = {"pile.samples": 3, "pile.prompt": 8, "pile.min_tokens": 20, "pile.lengths": [24, 32]}


class Biased(UniformModel):
    """Token t has the log-probability -1 - t / 100, given whatever."""

    def token_logprobs(self, targets):
        return [
            np.float32(-1) - target.tokens[target.start : target.stop].astype(np.float32) / 100
            for target in targets
        ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    (place / "pile").mkdir()
    rows = [{"text": f"Document {n} tells of a kite and of {n} storms.", "meta": {"pile_set_name": "x"}}
            for n in range(6)]  # fmt: skip
    with gzip.open(place / "pile" / "pile.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return place


def run(tmp_path, data, evaluator, task="pile", model=None):
    model = model or UniformModel()
    (result,) = evaluate(model, [task], data, results=tmp_path, switches=SMALL, evaluator=evaluator)
    return result


@pytest.mark.parametrize("task", ["pile", "unconditional"])
def test_a_uniform_evaluator_has_perplexity_v(tmp_path, data, task):
    figures = run(tmp_path, data, UniformModel(vocab_size=50), task).figures
    perplexities = [name for name in figures if name.startswith("ppl")]
    assert {name.split("_")[-1] for name in perplexities} == {"24", "32"}
    assert any("full" in name for name in perplexities) and any("mean" in name for name in perplexities)
    for name in perplexities:
        assert figures[name].value == pytest.approx(50, rel=1e-5), name
    assert all(0 < figures[name].value <= 1 for name in figures if name.startswith("distinct"))


@pytest.mark.parametrize("tokenizer", [None, llama3_tokenizer()], ids=["same", "another"])
def test_the_prompt_changes_the_full_perplexity_alone(tokenizer):
    """Two prompts of one length before the same tokens."""

    class Same(UniformModel):
        def fill(self, blanks):
            return [
                np.asarray(self.tokenizer.encode(" and a kite", "no")[: blank.length]) for blank in blanks
            ]

    model, evaluator = Same(), Biased(tokenizer, vocab_size=900)
    length = len(model.tokenizer.encode(" and a kite", "no"))
    variant, nothing = Variant("random", 99, {}), np.zeros(0, np.int32)
    first, second = (
        write_and_score(
            [Writing(variant, 1, TextBlank(np.asarray(model.tokenizer.encode(prompt)), nothing, length))],
            model,
            evaluator,
        )[0]
        for prompt in ("A storm", "A zebra")
    )
    assert first["text"] == second["text"] == " and a kite"
    assert first["nats"] == pytest.approx(second["nats"]) and first["scored"] == second["scored"]
    assert first["nats_full"] != pytest.approx(second["nats_full"])
    whole = evaluator.tokenizer.encode("A storm and a kite", "no")
    assert first["nats_full"] == pytest.approx(sum(1 + token / 100 for token in whole), rel=1e-5)


def test_figures_are_those_of_the_records(tmp_path, data):
    result = run(tmp_path, data, Biased())
    records = [json.loads(line) for line in (tmp_path / result.records).read_text().splitlines()]
    own = [record for record in records if record["variant"] == "entropy_32"]
    assert len(own) == 3 and all(len(record["tokens"]) + len(record["prompt"]) == 32 for record in own)
    nats, scored = (np.array([record[name] for record in own]) for name in ("nats", "scored"))
    assert result.figures["ppl_entropy_32"].value == pytest.approx(np.exp(nats.sum() / scored.sum()))
    assert result.figures["ppl_mean_entropy_32"].value == pytest.approx(np.exp(nats / scored).mean())
    size = sum(record["bytes"] for record in own)
    assert result.figures["bits_per_byte_entropy_32"].value == pytest.approx(nats.sum() / np.log(2) / size)
    assert any("Rows: " in note for note in result.notes)


def test_another_tokenizer_is_told_of(tmp_path, data):
    told = run(tmp_path, data, Biased(llama3_tokenizer(), vocab_size=900)).notes
    assert any("another tokenizer" in note for note in told)
    assert not any("another tokenizer" in note for note in run(tmp_path, data, Biased()).notes)


def test_too_few_documents_and_no_evaluator(tmp_path, data):
    with pytest.raises(InputError, match="documents of 20 tokens are wanted, 6 are there"):
        evaluate(UniformModel(), ["pile"], data, results=tmp_path, evaluator=Biased(),
                 switches=SMALL | {"pile.samples": 7})  # fmt: skip
    with pytest.raises(InputError, match="needs one"):
        evaluate(UniformModel(), ["pile"], data, results=tmp_path)
