"""Where documents come from: JSONL and plain-text files, or texts in memory.

A source is a tuple of documents, each a non-empty str, every file checked before any work starts:

    *.jsonl   an object a line, its document in the field "text"
    *.txt     paragraphs between blank lines; where there is no blank line, each line
"""

import glob
import json
from collections.abc import Iterator, Sequence

from a3_jax.errors import InputError
from a3_jax.paths import as_path

SUFFIXES = (".jsonl", ".txt")
TEXT_FIELD = "text"
_GLOB_LETTERS = set("*?[")


def find_files(data: str | Sequence[str]) -> list[str]:
    """The files that a path, a glob or a list of both names; sorted within each glob.

    Raises:
      InputError: nothing there, a directory, or a file of another kind.
    """
    if isinstance(data, str):
        data = [data]
    found = [name for entry in data for name in _expand(str(entry))]
    if not found:
        raise InputError("names no file", field="data")
    for name in found:
        if not name.endswith(SUFFIXES):
            raise InputError(f"not a {' or '.join(reversed(SUFFIXES))} file", file=name, field="data")
        if not as_path(name).exists():
            raise InputError("no such file", file=name, field="data")
    return found


def read_documents(name: str) -> tuple[str, ...]:
    """The documents of one `.jsonl` or `.txt` file.

    Raises:
      InputError: unreadable, empty, not UTF-8 or not JSON, with the file, the line and the field.
    """
    lines = _read_lines(name)
    documents = _json_documents(name, lines) if name.endswith(".jsonl") else _paragraphs(list(lines))
    kept = tuple(document for document in documents if document.strip())
    if not kept:
        raise InputError("holds no text", file=name)
    return kept


def _expand(entry: str) -> list[str]:
    if not _GLOB_LETTERS & set(entry) or as_path(entry).exists():
        return [entry]
    if "://" in entry:
        root = entry.rsplit("/", 1)[0]
        if _GLOB_LETTERS & set(root):
            raise InputError(
                "a bucket glob may have wildcards in its last part only", file=entry, field="data"
            )
        names = [str(path) for path in as_path(root).glob(entry.rsplit("/", 1)[1])]
    else:
        names = glob.glob(entry, recursive=True)
    if not names:
        raise InputError("no file matches", file=entry, field="data")
    return sorted(names)


def _read_lines(name: str) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends."""
    try:
        with as_path(name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"not UTF-8 text (byte {error.start} of the line)", file=name, line=number
                    ) from error
                yield text.rstrip("\r\n")
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror or error}", file=name) from error


def _json_documents(name: str, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"not JSON: {error}", file=name, line=number) from error
        if not isinstance(value, dict):
            raise InputError(f"expected a JSON object, got {type(value).__name__}", file=name, line=number)
        text = value.get(TEXT_FIELD)
        if not isinstance(text, str):
            what = "is missing" if TEXT_FIELD not in value else f"must be a text, got {type(text).__name__}"
            raise InputError(what, file=name, line=number, field=TEXT_FIELD)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = "holds half of a surrogate pair, which is no character"
            raise InputError(message, file=name, line=number, field=TEXT_FIELD) from error
        yield text


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Blocks of lines between blank ones; single lines if no blank line stands between two blocks."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    if not blocks[-1]:
        blocks.pop()
    return iter(blocks[0]) if len(blocks) == 1 else ("\n".join(block) for block in blocks)
