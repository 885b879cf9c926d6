"""Text through seqio to tables and streams. Needs TensorFlow and seqio."""

import json
import subprocess
import sys

import numpy as np
import pytest

from a3_jax.data.batches import BatchPlan, batch
from a3_jax.data.feature_converter import stream
from a3_jax.data.seqio_tasks import (
    TextVocabulary,
    embedded_source,
    open_data,
    read_table,
    register,
    split_documents,
)
from a3_jax.data.tensorflow_host import seqio, tf
from a3_jax.errors import InputError
from a3_jax.ordering.curriculum import Order, Stage
from a3_jax.tokenizer import bytes_tokenizer, from_files
from tests.test_data_batches import RANDOM, small_table
from tests.test_tokenizer import AWKWARD_TEXTS, byte_fallback_tokenizer, word_tokenizer


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def documents_in(table, tokenizer):
    """The decoded texts of a table's segments."""
    return [
        tokenizer.decode(row[segments == segment])
        for row, segments in zip(table.tokens, table.segment_ids, strict=True)
        for segment in range(1, segments.max() + 1)
    ]


TOKENIZERS = {"bytes": bytes_tokenizer(), "byte fallback, pad = EOS": from_files(byte_fallback_tokenizer())}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_vocabulary_round_trip(tokenizer, text):
    vocabulary = TextVocabulary(tokenizer)
    ids = vocabulary.encode(text)
    assert ids == tokenizer.encode(text)
    assert vocabulary.decode(ids) == text
    encoded = vocabulary.encode_tf(tf.constant(text))
    assert encoded.dtype == tf.int32 and encoded.numpy().tolist() == ids
    if ids:
        assert vocabulary.decode_tf(encoded).numpy().decode() == text


def test_vocabulary_is_the_tokenizers():
    vocabulary = TextVocabulary(bytes_tokenizer())
    assert (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (
        258,
        256,
        257,
        None,
    )
    assert vocabulary == TextVocabulary(bytes_tokenizer()) != TextVocabulary(bytes_tokenizer(), bos="yes")
    assert vocabulary != TextVocabulary(word_tokenizer())


def test_tensorflow_sees_no_accelerator():
    assert not tf.config.get_visible_devices("GPU") and not tf.config.get_visible_devices("TPU")


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_all_text_of_all_files_arrives(tmp_path, tokenizer):
    texts = [text for text in AWKWARD_TEXTS if text.strip()] + [f"story {n}" for n in range(9)]
    first = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_text("one\ntwo\n\nthree")
    table = open_data([first, f"{tmp_path}/*.txt"], tokenizer, 64, holdout=0).train
    assert sorted(documents_in(table, tokenizer)) == sorted([*texts, "one\ntwo", "three"])


def test_held_out_documents_are_apart(tmp_path):
    texts = [f"story {n}" for n in range(40)] + ["twice", "twice"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    data = open_data(path, bytes_tokenizer(), 32, holdout=0.2)
    train, heldout = (documents_in(table, bytes_tokenizer()) for table in (data.train, data.heldout))
    assert sorted(train + heldout) == sorted(texts)
    assert not set(train) & set(heldout)
    assert len(set(heldout)) == 9  # a fifth of 41 different texts
    again = open_data(path, bytes_tokenizer(), 32, holdout=0.2)
    assert (again.heldout.tokens == data.heldout.tokens).all() and (
        again.train.tokens == data.train.tokens
    ).all()


def test_split_documents():
    texts = ["a", "b", "c", "b", "d"]
    for holdout, distinct in ((0, 0), (0.01, 1), (0.5, 2), (1, 1), (3, 3), (99, 3)):
        parts = split_documents(texts, holdout)
        assert len(set(parts["heldout"])) == distinct
        assert sorted((*parts["train"], *parts["heldout"])) == sorted(texts)
    assert split_documents(["a"], 5) == {"train": ("a",), "heldout": ()}
    assert set(split_documents(texts, 2)["heldout"]) == set(split_documents(texts[::-1], 2)["heldout"])
    for bad in (-1, 1.5):
        with pytest.raises(InputError, match="holdout"):
            split_documents(texts, bad)


def test_one_document_has_no_held_out_part(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["alone"])
    assert open_data(path, bytes_tokenizer(), 8).heldout is None


def test_packing_can_be_turned_off(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defghijk", "l"])
    table = open_data(path, bytes_tokenizer(), 4, packing=False, holdout=0).train
    assert sorted(documents_in(table, bytes_tokenizer())) == ["abc", "defg", "l"]


def test_bos_of_a_document_is_a_token(tmp_path):
    tokenizer = TOKENIZERS["byte fallback, pad = EOS"]
    table = open_data(write_jsonl(tmp_path / "a.jsonl", ["the", "cat"]), tokenizer, 8, holdout=0).train
    assert (table.tokens[(table.positions == 0) & (table.segment_ids > 0)] == tokenizer.bos_id).all()


def test_embedded_corpus():
    from a3_jax.data import embedded

    tokenizer = from_files({"tokenizer.json": embedded.tokenizer_json()})
    data = open_data("", tokenizer, 64)
    stories = embedded_source()
    assert data.train.tokens.max() < tokenizer.vocab_size
    for table, split in ((data.train, "train"), (data.heldout, "heldout")):
        assert table.num_tokens == sum(map(len, tokenizer.encode_batch(list(stories[split]))))


def test_registered_tasks_of_others_are_read():
    """Any seqio task or mixture with a feature "targets" makes a table."""
    vocabulary = TextVocabulary(bytes_tokenizer())
    name = register({"ours": {"train": ("abc", "de")}, "theirs": {"train": ("f",)}}, vocabulary)
    assert name == register({"ours": {"train": ("abc", "de")}, "theirs": {"train": ("f",)}}, vocabulary)
    assert len(seqio.get_mixture_or_task(name).tasks) == 2
    assert sorted(documents_in(read_table(name, "train", 8), bytes_tokenizer())) == ["abc", "de", "f"]
    tables = [read_table(task.name, "train", 8) for task in seqio.get_mixture_or_task(name).tasks]
    assert sorted(len(documents_in(table, bytes_tokenizer())) for table in tables) == [1, 2]
    assert read_table(name, "train", 8, packing=False).num_rows == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b"\xff", "a.txt:1: not UTF-8"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text: must be a text"),
        ("a.csv", b"x", "a.csv: data: not a .txt or .jsonl file"),
        ("a.parquet", b"x", "a.parquet:1: can't be read"),
    ],
)
def test_bad_data(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path / name), bytes_tokenizer(), 8)


def test_text_that_the_tokenizer_lacks(tmp_path):
    """What the tokenizer says reaches the user as it is, not as TensorFlow's report of it."""
    path = write_jsonl(tmp_path / "a.jsonl", ["zero one", "three"])
    with pytest.raises(InputError, match="UNK"):
        open_data(path, word_tokenizer(), 8)


def test_stream_from_any_step():
    """Started anywhere, the stream goes on as if it had never stopped, and ends with the curriculum."""
    stages = (
        Stage("a", 3, orders=(Order("random", (2,)), Order("l2r"))),
        Stage("b", 2, one_order_per_batch=True),
    )
    whole = list(stream(BatchPlan(small_table(), stages, 9, 4)))
    assert len(whole) == 5
    for first in range(6):
        rest = list(stream(BatchPlan(small_table(), stages, 9, 4), first))
        assert len(rest) == 5 - first
        for made, expected in zip(rest, whole[first:], strict=True):
            assert made.keys() == expected.keys()
            assert all((made[name] == expected[name]).all() for name in expected)


def test_stream_is_batch():
    plan = BatchPlan(small_table(), RANDOM, 2, 6)
    for step, made in zip(range(20), stream(plan)):
        expected = batch(plan, step)
        assert all((made[name] == expected[name]).all() for name in expected)
        assert all(made[name].dtype == expected[name].dtype for name in expected)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_stream_on_several_hosts(num_hosts):
    stages = (Stage("a", 4, orders=(Order("random", (1,)),)),)
    whole = list(stream(BatchPlan(small_table(), stages, 9, 8)))
    parts = [
        list(stream(BatchPlan(small_table(), stages, 9, 8, host=host, num_hosts=num_hosts)))
        for host in range(num_hosts)
    ]
    for step, expected in enumerate(whole):
        for name in expected:
            joined = np.concatenate([part[step][name] for part in parts])
            assert (joined == expected[name]).all()


def test_bad_batch_size_is_told_at_once():
    with pytest.raises(InputError, match="batch_size"):
        stream(BatchPlan(small_table(), RANDOM, 0, 3, num_hosts=2))


def test_a_process_ends_with_an_unfinished_stream():
    code = (
        "from tests.test_data_batches import *; from a3_jax.data.feature_converter import stream;"
        "made = stream(BatchPlan(small_table(), RANDOM, 0, 64)); next(made); print('read')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "read\n")
    assert not done.stderr


def test_nothing_is_out_of_sight_once_tensorflow_is_there():
    """What Keras does without can be imported by others."""
    assert all(sys.modules.get(name, True) is not None for name in ("matplotlib", "pandas", "sklearn"))
