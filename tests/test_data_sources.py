"""Files to documents, and what is said of files that can't be read."""

import json

import pytest

from a3_jax.data.documents import find_files, read_documents
from a3_jax.errors import InputError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_jsonl(tmp_path):
    texts = ["one\ntwo", "🙂", "", "  ", "three\u2028line"]
    lines = "\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts)
    assert read_documents(write(tmp_path / "a.jsonl", lines + "\n\n")) == (
        "one\ntwo",
        "🙂",
        "three\u2028line",
    )


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("a\nb\n\nc\n", ("a\nb", "c")),
        ("a\r\n \r\n\r\nb\r\n", ("a", "b")),
        ("a\nb\nc", ("a", "b", "c")),  # no blank line: a document a line
        ("\n\na\nb\n\n", ("a", "b")),
        ("\ufeffa\n\nb", ("a", "b")),
    ],
)
def test_plain_text(tmp_path, content, documents):
    assert read_documents(write(tmp_path / "a.txt", content)) == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.txt", b"good\nb\xffd\n", ":2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xc3"}', ":2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"', ":3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', ":2: expected a JSON object, got list"),
        ("a.jsonl", b'{"texts": "a"}', ":1: text: is missing"),
        ("a.jsonl", b'{"text": 5}', ":1: text: must be a text, got int"),
        ("a.jsonl", b'{"text": null}', ":1: text: must be a text"),
        ("a.jsonl", b'{"text": "\\ud800"}', ":1: text: holds half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, ":1: not JSON"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error:
        read_documents(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_find_files(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        write(tmp_path / name, "x")
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]
    assert find_files(f"{tmp_path}/*") == names
    assert find_files([names[2], f"{tmp_path}/*.txt"]) == [names[2], names[0], names[1]]


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    path = write(tmp_path / "a[1].txt", "x")
    assert find_files(path) == [path]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "names no file"),
        ("absent.txt", "no such file"),
        ("*.jsonl", "no file matches"),
        (".", "not a .txt or .jsonl"),
    ],
)
def test_no_files(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        find_files(data)
