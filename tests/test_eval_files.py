"""Rows from every container as they are published, and one clear line for whatever is wrong with them."""

import gzip
import hashlib
import json

import pyarrow.parquet
import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.tasks.catalogue import TASKS, task_named, task_records
from a3_jax.evaluation.tasks.files import find_data, read_rows
from tests import eval_fixtures as fixtures
from tests.eval_fixtures import write_csv, write_jsonl, write_parquet
from tests.prepare_fixtures import POINTER

WITH_FILES = [name for name, task in TASKS.items() if task.files]
ROWS = {
    "triviaqa": 3, "hellaswag": 3, "winogrande": 4, "siqa": 3, "piqa": 3, "rocstories": 2, "lambada": 3,
    "gsm8k": 2, "pile": 8, **dict.fromkeys(fixtures.CODES, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Containers -> directory with the files of every task."""
    folders = {name: tmp_path_factory.mktemp(name) for name in fixtures.CONTAINERS}
    for name, folder in folders.items():
        fixtures.write_fixtures(folder, name)
    return folders


def rows_of(name, place, limit=None, shots=False):
    task = task_named(name)
    return list(read_rows(task, find_data(task, place, shots), limit, shots))


def refusal(name, place, **options):
    with pytest.raises(InputError) as caught:
        rows_of(name, place, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", WITH_FILES)
def test_both_containers_hold_the_same_rows(data, name):
    hub, original = (rows_of(name, data[container]) for container in fixtures.CONTAINERS)
    assert [row.number for row in hub] == list(range(1, ROWS[name] + 1))
    required = {field.name for field in TASKS[name].fields if field.required}
    for one, other in zip(hub, original, strict=True):
        assert required <= set(one.values)
        assert {key: one.values[key] for key in required} == {key: other.values[key] for key in required}


def test_values_are_as_published(data):
    first = rows_of("hellaswag", data["original"])[0].values
    assert first["label"] == 2 and first["endings"][1] == "a kite [step] as large  as a door."
    assert [row.values["answer"] for row in rows_of("winogrande", data["hub"])] == [0, 1, 1, 0]
    assert [row.values["label"] for row in rows_of("siqa", data["original"])] == [0, 1, 2]
    story = rows_of("rocstories", data["hub"])[0].values
    assert story["InputSentence3"] == 'She took it to "Spokes", a shop.'
    assert story["AnswerRightEnding"] == 0  # and not "1\r"
    assert rows_of("triviaqa", data["hub"])[1].values["answer"]["aliases"][0] == "São Paulo"
    assert rows_of("lambada", data["original"])[2].values["text"].endswith("next café")
    assert rows_of("gsm8k", data["original"])[0].values["question"].startswith("Ann has 3 pens")
    assert len(rows_of("gsm8k", data["hub"], shots=True)) == len(fixtures.GSM8K_TRAIN)


def test_large_columns_stay_unread(data, monkeypatch):
    asked = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def spy(self, *arguments, **options):
        asked.append(options["columns"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", spy)
    rows_of("triviaqa", data["hub"])
    assert asked == [["question", "question_id", "answer"]]


def test_the_file_itself_or_a_directory(data, tmp_path):
    source = data["hub"] / "piqa" / "piqa_validation.parquet"
    assert len(rows_of("piqa", source)) == 3  # the file
    (tmp_path / "piqa_validation.parquet").write_bytes(source.read_bytes())
    assert len(rows_of("piqa", tmp_path)) == 3  # in DATA_DIR
    write_jsonl(tmp_path / "hellaswag.jsonl.gz", fixtures.HELLASWAG)
    assert len(rows_of("hellaswag", tmp_path)) == 3  # by the task's name
    assert find_data(task_named("unconditional"), None).paths == ()


def test_shards_are_one_file_in_order(tmp_path):
    for shard in (1, 0):
        path = tmp_path / f"triviaqa/rc/validation-0000{shard}-of-00002.parquet"
        write_parquet(path, [fixtures._trivia(f"tq_{shard}", "Who?", ["I"], ["i"])])
    rows = rows_of("triviaqa", tmp_path)
    assert [(row.values["question_id"], row.number) for row in rows] == [("tq_0", 1), ("tq_1", 1)]
    assert len(find_data(task_named("triviaqa"), tmp_path).sha256()) == 2


def test_checksums_are_of_every_file_read(data):
    files = find_data(task_named("siqa"), data["original"])
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (data["original"] / "siqa" / "dev.jsonl", data["original"] / "siqa" / "dev-labels.lst")
    }
    assert files.sha256() == expected


def test_json_lines_under_the_name_json(tmp_path):
    (tmp_path / "piqa.json").write_text("\n".join(map(json.dumps, fixtures.PIQA)) + "\n")
    assert [row.values["label"] for row in rows_of("piqa", tmp_path)] == [1, 0, 1]


def test_windows_ends_and_byte_order_marks(tmp_path):
    (tmp_path / "lambada_test_plain_text.txt").write_bytes(b"one two\r\n\r\nthree four\r\n")
    texts = [(row.number, row.values["text"]) for row in rows_of("lambada", tmp_path)]
    assert texts == [(1, "one two"), (3, "three four")]
    write_csv(tmp_path / "rocstories.csv", fixtures.ROCSTORIES)
    path = tmp_path / "rocstories.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert rows_of("rocstories", tmp_path)[0].values["InputStoryid"] == "a-1"


def test_rows_behind_the_limit_are_not_read(tmp_path):
    write_jsonl(tmp_path / "piqa.jsonl", [*fixtures.PIQA, {"goal": 3}])
    assert len(rows_of("piqa", tmp_path, limit=3)) == 3
    assert refusal("piqa", tmp_path).line == 4


@pytest.mark.parametrize("name", WITH_FILES)
def test_missing_file_says_name_columns_and_source(tmp_path, name):
    error, task = refusal(name, tmp_path), task_named(name)
    assert error.file == tmp_path
    for text in (task.files[0], task.columns, task.where):
        assert text in error.message
    assert "no such directory" in refusal(name, tmp_path / "none").message


def test_no_directory_and_no_training_rows(tmp_path):
    assert refusal("piqa", None).field == "data_dir"
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", fixtures.GSM8K)
    assert "train.jsonl" in refusal("gsm8k", tmp_path, shots=True).message


@pytest.mark.parametrize("write", [write_parquet, write_jsonl, write_csv])
def test_wrong_column_names_the_nearest(tmp_path, write):
    rows = [
        {"goals" if name == "goal" else name: value for name, value in row.items()} for row in fixtures.PIQA
    ]
    suffix = {write_parquet: "parquet", write_jsonl: "jsonl", write_csv: "csv"}[write]
    write(tmp_path / f"piqa.{suffix}", rows)
    error = refusal("piqa", tmp_path)
    assert error.field == "goal" and "did you mean 'goals'?" in error.message
    assert str(error.file).endswith(suffix)


@pytest.mark.parametrize(
    ("name", "change", "field", "words"),
    [
        ("piqa", {"label": 2}, "label", "must be one of 0, 1, got 2"),
        ("piqa", {"label": -1}, "label", "no label (-1), as in a test split"),
        ("piqa", {"label": True}, "label", "got bool"),
        ("piqa", {"label": 1.0}, "label", "got float"),
        ("piqa", {"sol2": "  "}, "sol2", "is empty"),
        ("piqa", {"sol2": None}, "sol2", "must be a text, got nothing"),
        ("hellaswag", {"label": ""}, "label", "no label (''), as in"),
        ("hellaswag", {"label": "4"}, "label", "must be one of 0, 1, 2, 3, got '4'"),
        ("hellaswag", {"endings": []}, "endings", "a list of 4 texts, got 0 of them"),
        ("hellaswag", {"endings": "a"}, "endings", "a list of 4 texts, got str"),
        ("hellaswag", {"endings": ["a", "b", "", "d"]}, "endings", "is empty"),
        ("winogrande", {"answer": ""}, "answer", "no label"),
        ("siqa", {"label": "0"}, "label", "must be one of 1, 2, 3, got '0'"),
        ("triviaqa", {"answer": "x"}, "answer", "must be a record with aliases, got str"),
        ("triviaqa", {"answer": {"aliases": [], "normalized_aliases": []}}, "answer.aliases", "has no alias"),
        ("triviaqa", {"answer": {"aliases": ["a"]}}, "answer.normalized_aliases", "texts, got nothing"),
    ],
)
def test_bad_row_names_file_number_and_field(tmp_path, name, change, field, words):
    good = {
        "piqa": fixtures.PIQA,
        "hellaswag": fixtures.HELLASWAG,
        "winogrande": fixtures.WINOGRANDE,
        "siqa": fixtures.SIQA,
        "triviaqa": [fixtures._trivia(*row) for row in fixtures.TRIVIAQA],
    }[name]
    path = tmp_path / f"{name}.jsonl"
    write_jsonl(path, [good[0], {**good[1], **change}])
    error = refusal(name, tmp_path)
    assert (error.file, error.line, error.field) == (str(path), 2, field)
    assert words in error.message


def test_labels_and_rows_must_be_as_many(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in fixtures.PIQA]
    write_jsonl(tmp_path / "valid.jsonl", rows)
    labels = tmp_path / "valid-labels.lst"
    labels.write_text("1\n0\n")
    assert "holds 2 labels" in refusal("piqa", tmp_path / "valid.jsonl").message
    labels.write_text("1\n0\n1\n1\n")
    error = refusal("piqa", tmp_path / "valid.jsonl")
    assert error.file == labels and "4 labels, the data file 3 rows" in error.message
    labels.unlink()
    error = refusal("piqa", tmp_path / "valid.jsonl")
    assert error.field == "label" and "no valid-labels.lst is beside it" in error.message


def test_a_label_file_beside_other_data_is_left_alone(tmp_path):
    write_jsonl(tmp_path / "valid.jsonl", fixtures.PIQA)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n0\n")
    assert [row.values["label"] for row in rows_of("piqa", tmp_path)] == [1, 0, 1]


def test_damaged_files(tmp_path):
    def written(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    bad = written("a.jsonl", json.dumps(fixtures.PIQA[0]).encode() + b"\n{oops\n")
    error = refusal("piqa", bad)
    assert (error.line, error.message.split(":")[0]) == (2, "not JSON")
    assert refusal("piqa", written("b.jsonl", b"[1]\n")).line == 1
    assert "no rows" in refusal("piqa", written("c.jsonl", b"")).message
    assert "not UTF-8" in refusal("lambada", written("d.txt", b"a \xff")).message
    assert "can't be read" in refusal("piqa", written("e.parquet", b"PAR1 and no more")).message
    whole = gzip.compress(json.dumps(fixtures.PIQA[0]).encode() * 50)
    assert "can't be read" in refusal("piqa", written("f.jsonl.gz", whole[:-20])).message
    assert "not a file that is read" in refusal("piqa", written("g.tsv", b"a\tb\n")).message
    assert "plain text has no columns" in refusal("piqa", written("h.txt", b"a b\n")).message
    assert refusal("piqa", written("i.json", b"[{}, 3]")).line == 1
    assert "not JSON" in refusal("piqa", written("j.json", b"[{}, ")).message
    heading = ",".join(fixtures.ROCSTORIES[0]).encode()
    error = refusal("rocstories", written("k.csv", heading + b"\r\n1,2\r\n"))
    assert error.line == 1 and "2 cells, the heading 8" in error.message
    assert "not CSV" in refusal("rocstories", written("l.csv", heading + b'\r\n"1"2,3')).message


def test_the_list_tells_of_every_task():
    told = json.loads(json.dumps(task_records()))
    assert [task["task"] for task in told] == list(TASKS) and told[0]["rows"] == 2000
    with pytest.raises(InputError, match="did you mean 'hellaswag'") as caught:
        task_named("helaswag")
    assert caught.value.field == "tasks"


@pytest.mark.parametrize("name", ["train.csv", "train.parquet"])
def test_two_columns_of_one_name(tmp_path, name):
    """Which of them is meant can't be told."""
    names, cells = ["sentence", "sentence", "option1", "option2", "answer"], ["a _ b", "c _ d", "e", "f", "1"]
    if name.endswith(".csv"):
        (tmp_path / name).write_text(",".join(names) + "\n" + ",".join(cells) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table([[cell] for cell in cells], names=names), tmp_path / name)
    task = task_named("winogrande")
    with pytest.raises(InputError, match="sentence: the table has 2 columns of this name"):
        list(read_rows(task, find_data(task, tmp_path / name)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.json", "a.csv"])
def test_a_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    task = task_named("winogrande")
    with pytest.raises(InputError, match=f"{name}: is a Git LFS pointer"):
        list(read_rows(task, find_data(task, tmp_path / name)))
