"""Prepared rows: read at random, the same stream however it is read, and damage found by name."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from a3_jax.data import prepared, shards
from a3_jax.data.batches import BatchPlan, batch, examples
from a3_jax.data.feature_converter import stream
from a3_jax.data.mixing import BLOCK, Mixture
from a3_jax.data.prepared import find_prepared, open_tables
from a3_jax.data.prepared_manifest import complaints, read_manifest
from a3_jax.errors import InputError
from a3_jax.ordering.curriculum import Order, Stage
from tests.prepared_fixtures import make_prepared, row_numbers, rows

RANDOM = (Stage("random", 40, orders=(Order("random", (1, 2)),)),)


def open_train(directory, seq_len=8):
    return open_tables(find_prepared(str(directory)), seq_len)[0]


def equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype


@pytest.mark.parametrize("roles", [False, True])
def test_rows_are_those_that_were_written(tmp_path, roles, monkeypatch):
    """Any rows, in any order, some twice; with fewer readers open than there are shards."""
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    table = rows(33, roles=roles)
    stored = open_train(make_prepared(tmp_path, table))
    assert (stored.num_rows, stored.seq_len, stored.has_roles) == (33, 8, roles)
    rng = np.random.default_rng(0)
    for size in (1, 7, 40):
        picked = rng.integers(0, 33, size)
        equal(stored.take(picked), table.take(picked))


@pytest.mark.parametrize(("vocab", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_narrowest_dtype_holds_every_id(tmp_path, vocab, dtype):
    assert shards.token_dtype(vocab) == dtype
    table = dataclasses.replace(rows(3), tokens=np.full((3, 8), vocab - 1, np.int32))
    info = shards.write_shard(tmp_path / "x", table, tokens=dtype, segments="uint16")
    manifest = dataclasses.replace(
        read_manifest(make_prepared(tmp_path / "d", rows(3))),
        token_dtype=dtype,
        splits={"train": [info]},
    )
    taken = shards.ShardTable(tmp_path, manifest, "train").take([2, 0])
    assert (taken["tokens"] == vocab - 1).all()


def test_the_stream_is_that_of_rows_in_memory(tmp_path):
    """And of any host count and any first step: 3 epochs of 11 rows, 4 a step."""
    table = rows(11)
    stored = open_train(make_prepared(tmp_path, table))
    whole = [batch(BatchPlan(stored, RANDOM, 5, 4), step) for step in range(9)]
    for step, expected in enumerate(whole):
        equal(expected, batch(BatchPlan(table, RANDOM, 5, 4), step))
        for hosts in (2, 4):
            parts = [batch(BatchPlan(stored, RANDOM, 5, 4, host, hosts), step) for host in range(hosts)]
            equal(expected, {name: np.concatenate([part[name] for part in parts]) for name in expected})


def test_resumed_at_every_step(tmp_path):
    stored = open_train(make_prepared(tmp_path, rows(11, roles=True)))
    stages = (dataclasses.replace(RANDOM[0], steps=6),)
    straight = list(stream(BatchPlan(stored, stages, 5, 4)))
    assert len(straight) == 6
    for first in range(6):
        resumed = list(stream(BatchPlan(stored, stages, 5, 4), first))
        assert len(resumed) == 6 - first
        for ours, theirs in zip(resumed, straight[first:], strict=True):
            equal(ours, theirs)


def test_each_row_exactly_once_an_epoch(tmp_path):
    stored = open_train(make_prepared(tmp_path, rows(31)))
    plan = BatchPlan(stored, RANDOM, 2, 31)
    epochs = [row_numbers(examples(plan, step)["tokens"]) for step in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(31))
    assert not np.array_equal(epochs[0], epochs[1])


class TestMixture:
    def mixture(self, rates, sizes=(7, 300)):
        firsts = np.cumsum([0, *sizes[:-1]])
        return Mixture([rows(size, first=first) for size, first in zip(sizes, firsts)], rates)

    def numbers(self, mixture, count, seed=3):
        plan = BatchPlan(mixture, RANDOM, seed, count)
        return row_numbers(examples(plan, 0)["tokens"])

    @pytest.mark.parametrize("rates", [(1, 3), (0.3, 0.7), (1023, 1), (1, 1)])
    def test_rates_hold_in_every_block(self, rates):
        numbers = self.numbers(self.mixture(rates), 5 * BLOCK).reshape(5, BLOCK)
        share = (numbers < 7).mean(axis=1)
        np.testing.assert_allclose(share, rates[0] / sum(rates), atol=0.51 / BLOCK)

    def test_each_source_once_an_epoch_of_its_own(self):
        numbers = self.numbers(self.mixture((1, 3)), 4 * BLOCK)
        for first, size in ((0, 7), (7, 300)):
            own = numbers[(numbers >= first) & (numbers < first + size)]
            whole = own[: len(own) // size * size].reshape(-1, size)
            counts = np.bincount(own - first, minlength=size)
            assert len(whole) > 1 and counts.max() - counts.min() <= 1, "no row twice before all were once"

    def test_sources_come_in_random_order(self):
        """Runs of one source are as long as when each example is drawn by itself."""
        from_first = self.numbers(self.mixture((1, 1)), 4 * BLOCK) < 7
        changes = (from_first[1:] != from_first[:-1]).mean()
        assert abs(changes - 0.5) < 0.04

    def test_hosts_and_batch_sizes_do_not_matter(self):
        mixture = self.mixture((2, 1))
        straight = self.numbers(mixture, 96)
        for size in (8, 32):
            steps = [examples(BatchPlan(mixture, RANDOM, 3, size), step) for step in range(96 // size)]
            np.testing.assert_array_equal(
                np.concatenate([row_numbers(step["tokens"]) for step in steps]), straight
            )
        halves = [row_numbers(examples(BatchPlan(mixture, RANDOM, 3, 96, h, 2), 0)["tokens"]) for h in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(halves), straight)

    def test_roles_of_some_sources(self):
        """Rows of a source without roles are predicted throughout, whichever sources a batch has."""
        mixture = Mixture([rows(7, roles=True), rows(300, first=7)], (1, 3))
        taken = examples(BatchPlan(mixture, RANDOM, 3, 64), 0)
        from_first = row_numbers(taken["tokens"]) < 7
        assert from_first.any() and (taken["roles"][~from_first] == 1).all()
        assert (taken["roles"][from_first] == rows(1, roles=True).roles).all()
        assert "roles" in examples(BatchPlan(mixture, RANDOM, 3, 1), 0)

    @pytest.mark.parametrize("rates", [(0, 1), (-1, 2), (1, 5000), (float("inf"), 1)])
    def test_bad_rates(self, rates):
        with pytest.raises(InputError, match="rate"):
            self.mixture(rates)


def test_several_directories_by_rate(tmp_path):
    for name, first in (("a@b", 0), ("b", 20)):
        make_prepared(tmp_path / name, rows(20, first=first))
    table = open_train(f"{tmp_path}/a@b@3,{tmp_path}/b@1")
    assert table.counts.tolist() == [768, 256]
    table = open_train(f"{tmp_path}/a@b, {tmp_path}/b")
    assert table.counts.tolist() == [512, 512]
    with pytest.raises(InputError, match="a rate to each"):
        open_train(f"{tmp_path}/a@b@3,{tmp_path}/b")
    with pytest.raises(InputError, match="not a rate: 'x'"):
        open_train(f"{tmp_path}/b@x,{tmp_path}/b")


DAMAGES = {
    "flipped": lambda content, at: content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :],
    "cut": lambda content, at: content[:at],
    "emptied": lambda content, at: b"",
    "longer": lambda content, at: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.99])
def test_a_damaged_shard_is_named(tmp_path, damage, place):
    make_prepared(tmp_path, rows(12))
    file = tmp_path / "train-00001.array_record"
    content = file.read_bytes()
    file.write_bytes(DAMAGES[damage](content, int(place * len(content))))
    with pytest.raises(InputError, match="damaged") as error:
        open_train(tmp_path)
    assert str(error.value.file) == str(file)
    found = complaints(tmp_path, read_manifest(tmp_path), deep=True)
    assert [str(each.file) for each in found] == [str(file)]


def test_in_a_large_set_each_record_as_it_is_read(tmp_path, monkeypatch):
    """Only sizes are checked there before the first step: a flipped bit is found when its row is read."""
    monkeypatch.setattr(prepared, "_READ_WHOLE", 0)
    make_prepared(tmp_path, rows(12))
    file = tmp_path / "train-00001.array_record"
    good = file.read_bytes()
    table, expected = open_train(tmp_path), rows(12)
    errors = []
    for at in range(0, len(good), 97):
        file.write_bytes(DAMAGES["flipped"](good, at))
        try:
            taken = open_train(tmp_path).take(np.arange(12))
        except InputError as error:
            errors.append(error)
        else:
            equal(taken, expected.take(np.arange(12)))  # a bit that nothing is read from
    assert len(errors) > 5
    assert all(str(error.file) == str(file) and "damaged" in str(error) for error in errors)
    file.write_bytes(good)
    equal(table.take(np.arange(12)), expected.take(np.arange(12)))


def test_a_missing_shard_is_named(tmp_path):
    make_prepared(tmp_path, rows(12))
    (tmp_path / "train-00002.array_record").unlink()
    with pytest.raises(InputError, match=r"train-00002.*not there"):
        open_train(tmp_path)


def test_a_changed_manifest_is_refused(tmp_path):
    directory = make_prepared(tmp_path, rows(12))
    file = tmp_path / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"rows": 5', '"rows": 6', 1))
    with pytest.raises(InputError, match=r"manifest.json: crc32: is damaged"):
        find_prepared(directory)
    file.write_text(text[:-20])
    with pytest.raises(InputError, match=r"manifest.json.*not JSON"):
        find_prepared(directory)
    fields = json.loads(text) | {"format_version": 9}
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="newer format"):
        find_prepared(directory)


def test_seq_len_is_the_prepared_one(tmp_path):
    with pytest.raises(InputError, match=r"seq_len: 16, but the rows in .* have 8 tokens"):
        open_train(make_prepared(tmp_path, rows(12)), seq_len=16)


def test_the_tokenizer_is_the_manifests(tmp_path):
    directory = make_prepared(tmp_path, rows(12), tokenizer="0" * 64)
    with pytest.raises(InputError, match=r"manifest.json: tokenizer: is of another tokenizer"):
        prepared.prepared_tokenizer(find_prepared(directory)[0])


def test_an_unfinished_directory_is_refused(tmp_path):
    make_prepared(tmp_path, rows(12))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest.json there"):
        find_prepared(str(tmp_path))


def test_text_files_are_not_prepared(tmp_path):
    assert find_prepared("") == find_prepared(str(tmp_path / "x.jsonl")) == []


def test_nothing_is_left_where_a_shard_can_not_be_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").mkdir()
    with pytest.raises(IsADirectoryError):
        shards.write_shard(tmp_path / "full" / "x", rows(3), tokens="uint16", segments="uint16")
    assert [path.name for path in pathlib.Path(tmp_path / "full").iterdir()] == ["x"]
