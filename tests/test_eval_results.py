"""Files of results: versions, damage, and records that outlive a kill."""

import json

import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.results import (
    RecordFile,
    Result,
    check_directory,
    identity_of,
    load_result,
    load_results,
    record_key,
    result_path,
    write_result,
)
from a3_jax.evaluation.tasks.metrics import Figure

IDENTITY = identity_of({"seed": 0})
RESULT = Result(
    task="lm_eval:piqa",
    kind="choice",
    profile="a3_best_guess",
    split="validation",
    examples=2,
    skipped={"too_long": 1},
    figures={"accuracy": Figure(50.0, 1.5, 2), "distinct_2": Figure(0.5, None, 2)},
    settings={"profile": {}, "model": {}, "evaluator": None},
    overrides={},
    limit=None,
    samples=1,
    seed=0,
    checkpoint={"path": "runs/x", "fingerprint": "f"},
    evaluator=None,
    data={"valid.jsonl": "00"},
    versions={},
    seconds=1.0,
    notes=[],
    identity=IDENTITY,
    records="x.records.jsonl",
)


def record(row):
    return {"id": f"é{row}", "row": row, "sample": 0}


def test_a_result_reads_back(tmp_path):
    write_result(tmp_path / "new", RESULT)
    path = result_path(tmp_path / "new", RESULT.task, IDENTITY)
    assert path.name == f"lm_eval-piqa-{IDENTITY[:10]}.json"
    assert load_result(path) == RESULT and load_results(tmp_path / "new") == [RESULT]
    assert RESULT.figure("accuracy") == Figure(50.0, 1.5, 2) and RESULT.figure("f1") is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", 2, "schema: version 1 is read, this is 2"),
        ("schema", None, "schema: version 1"),
        ("figures", [], "figures: must be a dict"),
        ("figures", {"f1": {"value": 1.0}}, "figures.f1: must have"),
        ("figures", {"f1": {"value": "1", "standard_error": None, "count": 1}}, "figures.f1.value: must be"),
        ("checkpoint", "runs/x", "checkpoint: must be a dict"),
    ],
)
def test_other_versions_and_damage_are_refused(tmp_path, field, value, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**RESULT.to_dict(), field: value}))
    with pytest.raises(InputError) as caught:
        load_results(tmp_path)
    assert message in str(caught.value) and "x.json" in str(caught.value)


def test_a_missing_field_is_named(tmp_path):
    fields = RESULT.to_dict()
    del fields["seed"]
    (tmp_path / "x.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match="seed: is missing"):
        load_result(tmp_path / "x.json")


def test_identity_is_of_the_values_alone():
    assert identity_of({"a": 1, "b": 2}) == identity_of({"b": 2, "a": 1}) != identity_of({"a": 1, "b": 3})


def test_records_go_on_behind_a_torn_line(tmp_path):
    path = tmp_path / "new" / "x.records.jsonl"
    with RecordFile(path) as records:
        records.append([record(1), record(2)])
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):  # killed after any byte
        path.write_bytes(whole[:cut])
        with RecordFile(path) as records:
            assert records.all == [record(1), record(2)][: whole[:cut].count(b"\n")]
            records.append([record(3)])
        with RecordFile(path) as records:
            assert [record_key(each) for each in records.all][-1] == ("é3", 3, 0)


def test_a_damaged_record_is_named_by_its_line(tmp_path):
    path = tmp_path / "x.records.jsonl"
    path.write_text(json.dumps(record(1)) + "\n{\n" + json.dumps(record(2)) + "\n")
    with pytest.raises(InputError, match=r"line 2|:2"):
        RecordFile(path)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_places_that_hold_no_results(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        check_directory(tmp_path / place)
