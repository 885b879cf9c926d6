"""Every id that the files of a model say ends a text does: the tokenizer's, and those beside it."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from a3_jax.checkpoints.a3_format import load_params, save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.inspect import describe
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.cli import main
from a3_jax.data.prepared_manifest import read_manifest
from a3_jax.decoding import generate
from a3_jax.decoding.generation import generate_stream
from a3_jax.errors import InputError
from a3_jax.tokenizer import bytes_tokenizer, load_tokenizer
from a3_jax.training import train as training
from tests.decoding_cli import run, write_lines
from tests.prepare_fixtures import json_lines, prepare, segments_of, write_bytes
from tests.test_prepare_dialogs import END, EOS, chat_tokenizer, messages, predicted
from tests.tiny_hf import write_tiny_llama
from tests.training_fixtures import tiny_run

LINE = {"tokens": [97, 98, *[None] * 6]}
OPTIONS = {"group_size": 2, "temperature": 1.0}


def state(directory, generation=None, config=None):
    """Writes what `generation_config.json` and `config.json` say of EOS."""
    if generation is not None:
        text = json.dumps({"temperature": 0.6, "eos_token_id": generation})
        (directory / "generation_config.json").write_text(text)
    if config is not None:
        fields = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(fields | {"eos_token_id": config}))


@pytest.fixture
def hf(tmp_path):
    write_tiny_llama(tmp_path / "hf", num_layers=1, query_embed=True)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, (257,)),
        ([257, 7], None, (257, 7)),
        ([7, 9, 7], 257, (257, 7, 9)),
        (None, [9, 257, 7], (257, 9, 7)),
        (9, [7], (257, 9, 7)),
        (None, 7, (257, 7)),
    ],
)
@pytest.mark.parametrize("tokenizer", [True, False], ids=["tokenizer", "tokens"])
def test_they_go_with_a_model_wherever_it_goes(hf, tmp_path, generation, config, expected, tokenizer):
    """Read on the fly, converted, back, and from an older A3 checkpoint, whose tokenizer has one alone."""
    state(hf, generation, config)
    if not tokenizer:
        (hf / "tokenizer.json").unlink()
        (hf / "tokenizer_config.json").unlink()
        stated = generation if isinstance(generation, list) else [generation] if generation else []
        beside = config if isinstance(config, list) else [257 if config is None else config]
        expected = tuple(dict.fromkeys([*stated, *beside]))
    convert(hf, tmp_path / "a3")
    convert(tmp_path / "a3", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "back", to="hf")
    meta = open_checkpoint(tmp_path / "a3").meta
    older = bytes_tokenizer() if tokenizer else None
    save_checkpoint(tmp_path / "older", load_params(tmp_path / "a3"), meta, older)
    for name in ("hf", "a3", "again", "back", "older"):
        assert open_checkpoint(tmp_path / name).eos_ids == expected, name
        if tokenizer:
            eos = describe(tmp_path / name)["tokenizer"]["eos"]
            assert eos == (list(expected) if expected[1:] else 257)
    if tokenizer:
        for place in (hf, tmp_path / "a3" / "tokenizer"):
            assert load_tokenizer(place).eos_ids == expected
            assert load_tokenizer(place).fingerprint == bytes_tokenizer().fingerprint
    theirs, back = (place / "generation_config.json" for place in (hf, tmp_path / "back"))
    if generation is not None:
        assert back.read_bytes() == theirs.read_bytes()
    elif tokenizer and config == 7:  # the one case in which `config.json` doesn't state all of them
        assert json.loads(back.read_text())["eos_token_id"] == [257, 7]
    else:
        assert not back.exists()


def test_any_of_them_ends_a_text(hf, capsys, tmp_path):
    """Tokens that the model gives on its own stand in for them, the earlier one wherever it comes first."""
    free = generate(open_checkpoint(hf), [LINE], **OPTIONS)[0]
    late, early = free["tokens"][6], free["tokens"][3]
    state(hf, [257, late, early])
    length = 2 + min(free["tokens"][2:].index(token) for token in (late, early)) + 1
    checkpoint = open_checkpoint(hf)
    for options in ({"stop_at_eos": True}, {"order": "block", "block_order": "l2r", "block_size": 6}):
        cut = generate(checkpoint, [LINE], **OPTIONS, **options)[0]
        assert cut["tokens"] == free["tokens"][:length] and cut["forwards"] <= free["forwards"]
    *events, last = generate_stream(checkpoint, LINE, **OPTIONS, stop_at_eos=True)
    assert last["tokens"] == free["tokens"][:length]
    assert sum(len(event["columns"]) for event in events) == length - 2
    assert generate(checkpoint, [LINE], **OPTIONS)[0]["tokens"] == free["tokens"]
    (hf / "tokenizer.json").unlink()
    convert(hf, tmp_path / "a3")
    source = write_lines(tmp_path / "in.jsonl", LINE)
    status, (result,), _ = run(
        capsys, "generate", tmp_path / "a3", source, "-", "--stop_at_eos", "--group_size=2", "--temperature=1"
    )
    assert (status, result["tokens"], result["text"]) == (0, free["tokens"][:length], None)


def test_ids_beyond_the_vocabulary_end_nothing(hf, tmp_path):
    """Such as the defaults that transformers writes for GPT-2, OLMo-2 and SmolLM3 of any size."""
    state(hf, generation=[257, 50256], config=128001)
    convert(hf, tmp_path / "a3")
    assert open_checkpoint(hf).eos_ids == open_checkpoint(tmp_path / "a3").eos_ids == (257,)


@pytest.mark.parametrize("value", [[257, 1 << 40], -1, True, "</s>", [257, [1]], {"a": 1}, 1.5])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("tokenizer", [True, False], ids=["tokenizer", "tokens"])
def test_what_is_no_token_id_is_refused(hf, tmp_path, capsys, value, file, tokenizer):
    state(hf, **({"generation": value} if file == "generation_config.json" else {"config": value}))
    if not tokenizer:
        (hf / "tokenizer.json").unlink()
    for arguments in (["convert", hf, tmp_path / "a3"], ["info", hf]):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{file}: eos_token_id: " in err
    assert not (tmp_path / "a3").exists()
    with pytest.raises(InputError, match="eos_token_id"):
        open_checkpoint(hf)


def test_a_bad_id_in_an_a3_checkpoint_names_its_description(hf, tmp_path):
    convert(hf, tmp_path / "a3")
    checkpoint = open_checkpoint(tmp_path / "a3")
    source = (checkpoint.meta.source or {}) | {"files": {"generation_config.json": '{"eos_token_id": "no"}'}}
    meta = dataclasses.replace(checkpoint.meta, source=source)
    save_checkpoint(tmp_path / "bad", checkpoint.params, meta, checkpoint.tokenizer)
    with pytest.raises(
        InputError, match=r"meta/a3\.json: source: generation_config\.json: .*must be a token id"
    ):
        open_checkpoint(tmp_path / "bad")


@pytest.fixture
def chat(tmp_path):
    """The directory of a tokenizer whose `<eos>` ends documents; turns end with another token."""
    for name, text in chat_tokenizer().files().items():
        (tmp_path / "chat").mkdir(exist_ok=True)
        (tmp_path / "chat" / name).write_text(text, encoding="utf-8")
    return tmp_path / "chat"


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_end_of_a_turn_is_the_scored_eos(chat, tmp_path, capsys, file):
    """Once a response, kept, and nothing behind it is predicted; what has none gets the tokenizer's."""
    (chat / file).write_text(json.dumps({"eos_token_id": [EOS, END]}))
    dialogs = write_bytes(tmp_path / "a.jsonl", json_lines([messages("Hi", "Hello", "Bye", "Ciao", "more")]))
    outcome = prepare(capsys, dialogs, tmp_path / "rows", "--filler=8", tokenizer=chat, seq_len=256)
    assert outcome[0] == 0
    (segment,) = segments_of(tmp_path / "rows")
    assert predicted(segment) == ["Hello", END, "Ciao", END]
    assert segment[0][-4:] == [END] * 4 and EOS not in segment[0]
    assert read_manifest(tmp_path / "rows").settings["eos_ids"] == [EOS, END]
    assert load_tokenizer(tmp_path / "rows" / "tokenizer").eos_ids == (EOS, END)

    pairs = write_bytes(tmp_path / "b.jsonl", json_lines([{"prompt": "a", "response": "b"}]))
    assert prepare(capsys, pairs, tmp_path / "pairs", "--filler=0", tokenizer=chat)[0] == 0
    assert predicted(segments_of(tmp_path / "pairs")[0]) == ["b", EOS]
    (chat / file).unlink()
    status, _, err = prepare(capsys, dialogs, tmp_path / "rows", "--filler=8", tokenizer=chat, seq_len=256)
    assert status == 2 and "eos_ids" in err[-1], "rows of other ids are other rows"


def test_a_tokenizer_that_names_none(chat, tmp_path, capsys):
    """The model's files alone say how a response ends."""
    names = {"chat_template": json.loads((chat / "tokenizer_config.json").read_text())["chat_template"]}
    text = (chat / "tokenizer.json").read_text(encoding="utf-8").replace("<eos>", "<stop>")
    (chat / "tokenizer.json").write_text(text, encoding="utf-8")
    (chat / "tokenizer_config.json").write_text(json.dumps(names))
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    assert (load_tokenizer(chat).eos_id, load_tokenizer(chat).eos_ids) == (None, (END,))
    pairs = write_bytes(tmp_path / "b.jsonl", json_lines([{"prompt": "a", "response": "b"}]))
    assert prepare(capsys, pairs, tmp_path / "pairs", "--filler=0", tokenizer=chat)[0] == 0
    assert predicted(segments_of(tmp_path / "pairs")[0]) == ["b", END]


def train(config, workdir):
    return training.train(config, workdir, devices=jax.devices()[:1])


def test_a_run_keeps_those_of_its_data_and_of_its_model(hf, chat, tmp_path, capsys):
    """From nothing, from a model with its own, and with another tokenizer: there the model's mean nothing."""
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, END]}))
    text = write_bytes(tmp_path / "a.jsonl", json_lines([{"text": "some text " * 9}] * 40))
    assert prepare(capsys, text, tmp_path / "rows", tokenizer=chat, seq_len=24)[0] == 0
    stages = [{"name": "l2r", "steps": 1}]
    config = tiny_run(str(tmp_path / "rows"), tokenizer="", batch_size=8, stages=stages)
    new = train(config, tmp_path / "new")
    assert open_checkpoint(new).eos_ids == (EOS, END)

    state(hf, [EOS, 7])
    shutil.copy(chat / "tokenizer.json", hf)
    kept = train(config | {"init_from": str(hf)}, tmp_path / "kept")
    assert open_checkpoint(kept).eos_ids == (EOS, END, 7)
    train(config | {"init_from": str(hf), "stages": [{"name": "l2r", "steps": 2}]}, tmp_path / "kept")
    assert open_checkpoint(tmp_path / "kept").eos_ids == (EOS, END, 7)
    convert(kept, tmp_path / "back", to="hf")
    told = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert told == {"temperature": 0.6, "eos_token_id": [EOS, END, 7]}

    (tmp_path / "a.txt").write_text("some text\n" * 99)
    config = tiny_run(str(tmp_path / "a.txt"), tokenizer="bytes", batch_size=8, stages=stages)
    other = train(config | {"init_from": str(hf)}, tmp_path / "other")
    assert open_checkpoint(other).eos_ids == (EOS,)
    convert(other, tmp_path / "back2", to="hf")
    for name in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "back2" / name).read_text())
        assert (told["bos_token_id"], told["eos_token_id"]) == (256, EOS)


def test_a_run_refuses_an_id_that_its_model_has_no_row_for(chat, tmp_path, capsys):
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 260]}))
    (tmp_path / "a.txt").write_text("some text\n" * 99)
    config = tiny_run(str(tmp_path / "a.txt"), tokenizer=str(chat), batch_size=8)
    with pytest.raises(InputError, match="eos_token_id: 260 is outside the vocabulary of 260"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.torch
def test_each_of_them_ends_an_answer_in_lm_eval():
    pytest.importorskip("lm_eval")
    from types import SimpleNamespace

    from a3_jax.evaluation.lm_eval_model import _cut

    model: Any = SimpleNamespace(tokenizer=bytes_tokenizer().with_eos_ids([33]))
    for end in (257, 33):
        assert _cut(model, np.array([97, 98, end, 99]), []) == ("ab", True)
    assert _cut(model, np.array([97, 98]), []) == ("ab", False)
