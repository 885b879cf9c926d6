"""Sources to documents to tokens: read and parsed in a thread ahead, encoded in several.

files -> records -> documents -> batches of them -> tokens, in order
"""

import collections
import concurrent.futures
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

from a3_jax.data.dialogs import (
    MESSAGES,
    PROMPT,
    RESPONSE,
    TOOL_FIELDS,
    Specials,
    chat_parts,
    ignored_fields,
    prompt_messages,
    prompt_parts,
)
from a3_jax.data.documents import TEXT_FIELD, BadRecord, DocumentSource, text_of
from a3_jax.data.encoding import Document, Encoded, Encoder
from a3_jax.data.templates import ChatTemplate
from a3_jax.errors import InputError
from a3_jax.tokenizer import Tokenizer

KINDS = (TEXT, PROMPTS, CHATS) = ("text", "prompts", "messages")  # what sources hold
DIGESTS = 1 << 64  # a document's digest is below

_PROMPT_COLUMNS = [PROMPT, RESPONSE]
_BATCH_CHARACTERS, _BATCH_RECORDS = 1 << 20, 1 << 14
_BATCHES_AHEAD = 8
_MOST_THREADS = 8

Batch = tuple[list, int]  # documents or bad records; bytes of the sources read by then


class Reading:
    """All documents of some files, in order, from any one on.

    Attributes:
      kind: what they hold, one of `KINDS`.
      size: bytes of all files.

    Raises:
      InputError: files of several kinds, or as `DocumentSource.check`.
    """

    def __init__(self, sources: list[DocumentSource], text_column: str | None):
        self._sources, column = sources, text_column or TEXT_FIELD
        self.kind = TEXT if text_column else _kind_of(sources)
        self._columns = {TEXT: [column], PROMPTS: _PROMPT_COLUMNS, CHATS: [MESSAGES]}[self.kind]
        self.size = sum(source.size for source in sources)
        for source in sources:
            source.check(self._columns)

    def batches(self, parse: "Parse", start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Documents in lots of about a megabyte, each the next ones of all files.

        Args:
          parse: makes the content of a document of a record, see `parser`.
          start: source and record to begin with.

        Yields:
          `Document`s, and a `BadRecord` in place of each record that gives none.
        """
        batch, size = [], 0
        for item in self._documents(parse, start):
            batch.append(item)
            size += _characters(item)
            if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_RECORDS:
                yield batch, self._bytes_read()
                batch, size = [], 0
        if batch:
            yield batch, self._bytes_read()

    def _bytes_read(self) -> int:
        return sum(source.bytes_read for source in self._sources)

    def _documents(self, parse, start) -> Iterator[Document | BadRecord]:
        for source in self._sources:
            source.bytes_read = source.size if source.index < start[0] else 0
        for source in self._sources[start[0] :]:
            first = start[1] if source.index == start[0] else 0
            columns, unread = self._columns_of(source)
            for number, record in source.records(columns, first):
                if isinstance(record, BadRecord):
                    yield record
                    continue
                try:
                    content, key, ignored = parse(record)
                    yield Document(source.index, number, _digest(key), content, (*ignored, *unread))
                except BadRecord as error:
                    yield error.at(source, number)

    def _columns_of(self, source: DocumentSource) -> tuple[list[str], list[str]]:
        """Returns the fields to read of a source, and, of a table of dialogs, those that are not read."""
        if self.kind == TEXT or not source.name.endswith(".parquet"):
            return self._columns, []
        names = source.column_names()
        tools = [name for name in names if name in TOOL_FIELDS and self.kind == CHATS]
        columns = [*self._columns, *tools]
        return columns, [name for name in names if name not in columns]


# record -> content of a document, what says that two are equal, names of fields that were ignored
Parse = Callable[[dict], tuple[Any, str, list[str]]]


def parser(kind: str, text_column: str | None, template: ChatTemplate | None, tokenizer: Tokenizer) -> Parse:
    """Returns what makes a document of a record.

    Args:
      kind: one of `KINDS`.
      text_column: of texts; None: "text".
      template: of messages, and of prompts if there is one.
      tokenizer: its special tokens are those that a template may write.
    """
    column = text_column or TEXT_FIELD
    if kind == TEXT:

        def text(record):
            content = text_of(record, column)
            return content, content, []

        return text
    specials = Specials(tokenizer)
    known = [MESSAGES] if kind == CHATS else _PROMPT_COLUMNS

    def dialog(record):
        if template is None:
            parts = prompt_parts(record)
        else:
            messages = record if kind == CHATS else prompt_messages(record)
            parts = chat_parts(messages, template, specials)
        return parts, json.dumps(parts), ignored_fields(record, known)

    return dialog


def prefetched(items: Iterator) -> Iterator:
    """Yields the same items, made in a thread of their own."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    waiting = collections.deque(pool.submit(next, items, None) for _ in range(_BATCHES_AHEAD))
    try:
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def encoded(
    batches: Iterator[Batch], encoder: Encoder
) -> Generator[tuple[list[Encoded | BadRecord], int], None, None]:
    """Batches in tokens, in order; several are in work at a time."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    waiting = collections.deque()
    try:
        for batch, bytes_read in prefetched(batches):
            waiting.append((pool.submit(encoder.encode, batch), bytes_read))
            if len(waiting) > threads + _BATCHES_AHEAD:  # enough to do while a shard is written
                future, position = waiting.popleft()
                yield future.result(), position
        for future, position in waiting:
            yield future.result(), position
    finally:
        pool.shutdown(cancel_futures=True)


class Smallest:
    """The smallest different ones of many numbers."""

    def __init__(self, count: int):
        self._count, self._heap, self._known = count, [], set()

    def add(self, number: int) -> None:
        if number in self._known or (len(self._heap) == self._count and number > -self._heap[0]):
            return
        self._known.add(number)
        heapq.heappush(self._heap, -number)
        if len(self._heap) > self._count:
            self._known.remove(-heapq.heappop(self._heap))

    def values(self) -> list[int]:
        return [-number for number in self._heap]


def _kind_of(sources: list[DocumentSource]) -> str:
    """Returns what the sources hold: text, prompts, or messages."""
    first = None
    for source in sources:
        names = source.column_names()
        if not names:  # nothing in it that can be read
            continue
        kind = CHATS if MESSAGES in names else PROMPTS if set(_PROMPT_COLUMNS) <= set(names) else TEXT
        first = first or (kind, source)
        if kind != first[0]:
            message = f"holds {kind}, {first[1].name} holds {first[0]}: prepare them apart"
            raise InputError(message, file=source.name)
    return first[0] if first else TEXT


def _characters(item: Document | BadRecord) -> int:
    if isinstance(item, BadRecord):
        return 0
    if isinstance(item.content, str):
        return len(item.content)
    return sum(len(piece) for _, pieces in item.content for piece in pieces if isinstance(piece, str))


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
