"""The model card: front matter that parses, facts that are recorded, nothing from outside takes effect."""

import dataclasses
import json
import re

import jax
import pytest
import yaml

from a3_jax.checkpoints.a3_format import Meta, save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.hf_export import plan_hf_export, plan_release_export
from a3_jax.checkpoints.inspect import describe
from a3_jax.checkpoints.model_card import Facts, model_card, run_facts
from a3_jax.ordering.curriculum import paper_stages
from a3_jax.tokenizer import bytes_tokenizer
from tests import tiny

STAGES = [dataclasses.asdict(stage) for stage in paper_stages([30, 40, 50, 60])]
RUN = {
    "stages": STAGES, "batch_size": 16, "seq_len": 96, "learning_rate": 2e-5, "seed": 7, "dtype": "bfloat16",
    "optimizer": "adamw", "data": "/home/somebody/corpora/fineweb.jsonl,gs://secret/more",
    "init_from": "base",
}  # fmt: skip
SOURCE = {
    "config": {
        "architectures": ["LlamaForCausalLM"], "_name_or_path": "somebody/Tiny-1B",
        "transformers_version": "5.2.1",
    },
    "tensors": {}, "files": {}, "sha256": {"model.safetensors": "ab" * 32},
}  # fmt: skip
FACTS = Facts(
    "0123456789abcdef", {"l2r": 1.25, "random": 2.0625, "ar": 1.125}, 100, {"/data/rows": 987654321}
)


def card(meta, facts=None, tokenizer=None, target=None):
    target = target or plan_hf_export(meta)
    return model_card(meta, target.config, target.tensors, tokenizer, facts)


def front_matter(text):
    begin, end = text.index("---\n") + 4, text.index("\n---\n")
    return yaml.safe_load(text[begin:end])


def body(text):
    """What is no front matter and no block of code."""
    text = text[text.index("\n---\n") + 5 :]
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def trained(**changes):
    return Meta(tiny.CONFIG, SOURCE, step=100, stage="contiguous4", run_config={**RUN, **changes})


def with_card(text):
    return {**SOURCE, "files": {"README.md": text}}


def test_front_matter():
    found = front_matter(card(trained(), FACTS))
    assert found["library_name"] == "a3_jax" and found["base_model"] == "somebody/Tiny-1B"
    assert "a3" in found["tags"] and "license" not in found
    assert front_matter(card(Meta(tiny.CONFIG))).keys() == {"library_name", "tags"}
    plain = card(trained(), target=plan_hf_export(trained(), query_vector=False))
    assert front_matter(plain)["library_name"] == "transformers" and "a3" not in front_matter(plain)["tags"]


def test_every_number_comes_from_what_is_recorded():
    """Each number outside of front matter and code is in the checkpoint, or follows by the rules here."""
    meta = trained()
    known = re.findall(r"\d+", json.dumps([meta.to_dict(), dataclasses.asdict(FACTS)], default=str))
    tokens = {
        30 * 16 * 96,
        40 * 16 * 96,
        30 * 16 * 96,
        0,
    }  # 100 steps: two stages whole, 30 steps of the third
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tiny.params()))
    losses = "1.2500 2.0625 1.1250"
    known += [*map(str, (*tokens, parameters)), *re.findall(r"\d+", f"2601.13228 {losses} a3 A3 float32")]
    known += ["32", "256"]  # CRC-32, SHA-256
    text = body(card(meta, FACTS)).replace("ab" * 32, "").replace(FACTS.fingerprint, "")
    numbers = re.findall(r"\d[\d,]*", text)
    assert len(numbers) > 40
    assert [number for number in numbers if number.replace(",", "").lstrip("0") not in
            {it.lstrip("0") for it in known}] == []  # fmt: skip


def test_what_was_trained():
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", card(trained()), re.MULTILINE
    )
    assert rows == [
        ("l2r", "l2r, groups of 1", "30", "30", "46,080"),
        ("contiguous2", "contiguous, groups of 2", "40", "40", "61,440"),
        ("contiguous4", "contiguous, groups of 4", "30", "50", "46,080"),
        ("random4", "random, groups of 4", "0", "60", "0"),
    ]
    text = card(trained(start_stage="contiguous4"))
    assert "| `contiguous4` |" in text and "| `l2r` |" not in text  # another run's, if anybody's


def test_places_are_not_told():
    """Cards are published: of absolute paths and addresses the last part alone."""
    text = card(trained(init_from="/home/somebody/llama"), FACTS)
    assert "`fineweb.jsonl`, `more`" in text and "`llama`" in text and "`rows`" in text
    assert not [hidden for hidden in ("home", "secret", "corpora", "/data") if hidden in text]


def test_nothing_is_said_where_nothing_is_recorded():
    text = card(Meta(tiny.CONFIG))
    assert text.count("None is recorded.") == 1 and text.count("None are recorded.") == 1
    assert "Nothing is recorded." in text and "not trained" not in text


def test_a_query_vector_that_was_drawn_says_so():
    converted = Meta(tiny.CONFIG, SOURCE)
    assert "**The query vector is not trained.**" in card(converted)
    assert "not trained" not in card(trained())
    has_one = {**SOURCE, "tensors": {"model.query_embed": "float32"}}
    assert "not trained" not in card(Meta(tiny.CONFIG, has_one))
    assert "not trained" not in card(converted, target=plan_hf_export(converted, query_vector=False))


def test_the_authors_residual_is_told():
    meta = Meta(dataclasses.replace(tiny.CONFIG, residual="release"), step=3)
    for target in (plan_release_export(meta), plan_hf_export(meta)):
        text = card(meta, target=target)
        assert "**Residual.**" in text and "from llama_xlnet import" in text and "AutoModel" not in text
    assert "**Residual.**" not in card(trained()) and "AutoModel" in card(trained())


def test_the_licence_is_that_of_the_sources_card():
    """Even where, as in published ones, the front matter is long."""
    front = f"""---
language: [en]
license: "other"  # a comment
extra_gated_prompt: >-
{"  license: of the text" * 5000}
license_name: llama3.2
license_link: LICENSE.txt
---
license: none
"""
    found = front_matter(card(Meta(tiny.CONFIG, with_card(front))))
    licence = {"license": "other", "license_name": "llama3.2", "license_link": "LICENSE.txt"}
    assert {name: found.get(name) for name in licence} == licence and "language" not in found


@pytest.mark.parametrize(
    "text",
    [
        "# No front matter\nlicense: mit\n", "---\nlicense: [unclosed\n---\n", "---\n- mit\n---\n",
        "---\nlicense: {a: b}\n---\n", "---\nlicense: !!python/object/apply:os.system [x]\n---\n",
        "---\nlicense: mit\n", "---\nlicense: " + "[" * 50_000 + "\n---\n", "---\nlicense: 2024-99-01\n---\n",
        "---\nlicense: 1.5\n---\n", "---\nlicense:\n---\n", "---\nlicense: |\n---\n",
    ],
    ids=range(11),
)  # fmt: skip
def test_cards_that_state_no_licence(text):
    assert "license" not in front_matter(card(Meta(tiny.CONFIG, with_card(text))))


def test_nothing_from_outside_takes_effect():
    """Names that would be YAML, HTML, Markdown or more rows of a table stay names."""
    evil = 'x`|<script>\n---\nlicense: mit\n"\u2028\x1b[31m'
    source = {
        "config": {"architectures": [evil], "_name_or_path": evil, "transformers_version": evil},
        "tensors": {}, "files": {"README.md": f"---\nlicense: {json.dumps(evil)}\n---\n"},
        "sha256": {evil: evil},
    }  # fmt: skip
    stages = [{**STAGES[0], "name": evil}]
    run = {**RUN, "data": evil, "init_from": evil, "optimizer": evil, "stages": stages}
    meta = Meta(tiny.CONFIG, source, step=9, stage=evil, run_config=run, versions={evil: evil})
    text = card(meta, Facts(evil, {"l2r": 1.0}, 9, {evil: 1}))
    found = front_matter(text)
    assert found.keys() == {"library_name", "license", "tags"} and found["license"].startswith("x`|<script>")
    told = body(text)
    assert "\u2028" not in text and "\x1b" not in text and "\nlicense" not in told
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", told)
    for table in re.findall(r"(?:^\|.*\n)+", told, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1


def test_a_malformed_run_config_is_survived():
    for changes in ({"batch_size": "x"}, {"batch_size": None, "seq_len": [1]}, {"data": 3, "init_from": 7}):
        assert "saved after step 100" in card(trained(**changes))


@pytest.fixture
def run(tmp_path):
    """A run's checkpoint of step 100 with what lies beside it."""
    directory = tmp_path / "run" / "checkpoints" / "100"
    save_checkpoint(directory, tiny.params(), trained(), bytes_tokenizer())
    rows = [
        {"step": 50, "stage": "l2r", "l2r": 9.5, "random": 9.75},
        {
            "step": 100,
            "stage": "contiguous4",
            "l2r": 3.5,
            "random": 3.75,
            "ar": None,
            "contiguous": float("nan"),
        },
        {"step": 150, "stage": "random4", "l2r": 1.5, "random": 1.75},
    ]
    lines = [json.dumps(row) for row in rows] + ["[1]", '{"step": 100, "l2r": 0.1']
    (tmp_path / "run" / "eval.jsonl").write_text("\n".join(lines))
    (tmp_path / "run" / "data.json").write_text('{"/data/rows": 987654321}')
    return directory


def test_a_runs_figures_are_those_of_its_checkpoint(run, tmp_path):
    facts = run_facts(run, 100)
    assert facts.held_out == {"l2r": 3.5, "random": 3.75} and facts.held_out_step == 100
    assert facts.data == {"/data/rows": 987654321}
    assert facts.fingerprint == describe(run)["fingerprint"]
    convert(tmp_path / "run", tmp_path / "out", to="hf")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Held-out loss after step 100," in text and "| query stream, random groups | 3.7500 |" in text
    assert f"`{facts.fingerprint}`" in text and "`rows`, manifest with CRC-32 `987654321`" in text


def test_files_of_a_run_that_can_not_be_read_are_left_out(run):
    (run.parent.parent / "eval.jsonl").write_bytes(b"\xff\n")
    (run.parent.parent / "data.json").write_text("{")
    assert run_facts(run, 100) == Facts(describe(run)["fingerprint"])
    (run.parent.parent / "eval.jsonl").unlink()
    assert run_facts(run, 100).held_out == {}
    assert run_facts(run, None) == Facts(describe(run)["fingerprint"])  # converted, not saved by the run
