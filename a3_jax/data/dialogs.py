"""Prompts and responses: what of a record is given, and what is predicted.

    {"prompt": ..., "response": ...}                   the one given, the other predicted
    {"messages": [{"role": ..., "content": ...}]}      written out by a chat template; what the
                                                       assistant says is predicted, all else is given

A message of the assistant with `"weight": 0` is given, too. A dialog is a list of parts, each with its
role and its pieces: text, or the id of a special token. Special tokens come from the template alone.
The template is run once more with marks around what people wrote, and between marks nothing is ever
read as a special token.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from a3_jax.data.documents import BadRecord, text_of
from a3_jax.data.table import GIVEN, PREDICTED
from a3_jax.data.templates import MESSAGES, ChatTemplate
from a3_jax.data.templates import chat_template as chat_template
from a3_jax.tokenizer import Tokenizer

PROMPT, RESPONSE = "prompt", "response"
TOOL_FIELDS = ("tools", "functions")  # of a record; they change what a template writes
ASSISTANT = "assistant"

Pieces = list[str | int]
Part = tuple[int, Pieces]  # its role: GIVEN or PREDICTED
Span = tuple[int, int]  # first character, and the one after the last

_ROLE = re.compile("[a-z_]{1,32}")  # no special token looks like that
_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # characters without a meaning
_KNOWN_FIELDS = {"role", "content", "weight", "tool_calls", "function_call"}


def prompt_parts(record: dict) -> list[Part]:
    """Returns the parts of a prompt and its response.

    Raises:
      BadRecord: one of them is absent or no text, or the response is empty.
    """
    prompt = "" if record.get(PROMPT) == "" else text_of(record, PROMPT)
    return [(GIVEN, [prompt]), (PREDICTED, [text_of(record, RESPONSE)])]


def prompt_messages(record: dict) -> dict:
    """Returns a prompt and its response as messages."""
    (_, prompt), (_, response) = prompt_parts(record)
    roles = ("user", ASSISTANT)
    turns = zip(roles, prompt + response)
    return {MESSAGES: [{"role": role, "content": content} for role, content in turns]}


def chat_parts(record: dict, template: ChatTemplate, specials: "Specials") -> list[Part]:
    """Returns the parts of messages up to the last one that is predicted.

    They make up the text that the template writes of all these messages together. Predicted in it are

    - the template's `{% generation %}` blocks, if it has any;
    - else, from the end of the generation prompt to the end of the turn, what the template writes more
      once a message of the assistant is there:

        render(messages[:k], add_generation_prompt)     <user> Hi <end> <assistant>
        render(messages[:k + 1])                        <user> Hi <end> <assistant> Hello <end>
                                                                                    predicted

    - where the template writes a turn differently once later ones are there (Qwen 3 leaves its thoughts
      out), or a generation prompt that the message does not begin with (DeepSeek R1): see `_Dialog.turn`.

    Messages of weight 0 are given.

    Raises:
      BadRecord: no messages, none of the assistant's to predict, or a template that writes what was
        said before the last one differently once it is there.
    """
    messages, weights = _checked(record)
    predicted = [index for index, weight in enumerate(weights) if weight]
    if not predicted:
        has_some = any(message["role"] == ASSISTANT for message in messages)
        told = "every message of the assistant has weight 0" if has_some else "no message is the assistant's"
        raise BadRecord("no_response", told, field=MESSAGES)
    dialog = _Dialog(messages[: predicted[-1] + 1], template, specials)
    if template.has_generation:
        spans = dialog.generated()
        for index, message in enumerate(dialog.messages):
            if message["role"] == ASSISTANT and not weights[index]:
                first, last = dialog.turn(index)
                spans = [(start, end) for start, end in spans if end <= first or start >= last]
        if not spans:
            told = "the chat template's generation blocks hold none of it"
            raise BadRecord("no_response", told, field=MESSAGES)
    else:
        spans = [dialog.turn(index) for index in predicted]
    parts, done = [], 0
    for start, end in spans:
        if start < done:
            raise _rewritten()
        parts += [(GIVEN, dialog.pieces(done, start)), (PREDICTED, dialog.pieces(start, end))]
        done = end
    return parts


def ignored_fields(record: dict, known: Sequence[str]) -> list[str]:
    """Returns the names of a dialog's fields that nothing reads and that hold something.

    For example "source" and "messages[].name". Weights above 0 of others than the assistant are among them.

    Args:
      record: what `chat_parts` or `prompt_parts` accepts.
      known: the fields that one of them reads.
    """
    names = [
        name
        for name, value in record.items()
        if name not in known and not (_is_void(value) or (MESSAGES in known and name in TOOL_FIELDS))
    ]
    for message in record[MESSAGES] if MESSAGES in known else ():
        for name, value in message.items():
            if name not in _KNOWN_FIELDS and not _is_void(value):
                names.append(f"{MESSAGES}[].{name}")
        if message.get("weight") and message["role"] != ASSISTANT:
            names.append(f"{MESSAGES}[].weight ({message['role']})")
        for part in message["content"] if isinstance(message["content"], list) else ():
            for name, value in part.items():
                if name not in ("type", "text") and not _is_void(value):
                    names.append(f"{MESSAGES}[].content[].{name}")
    return list(dict.fromkeys(names))


class _Dialog:
    """What a template writes of some messages, the last of them the assistant's.

    Attributes:
      messages: a role and a content each.
      text: all of them, as the template writes them.

    Raises:
      BadRecord: the template can't write them, or cuts what people wrote into pieces.
    """

    def __init__(self, messages: list[dict[str, str]], template: ChatTemplate, specials: "Specials"):
        self.messages, self._template, self._specials = messages, template, specials
        used = set(template.text).union(*(message["content"] for message in messages))
        unused = (chr(code) for code in itertools.chain(*_PRIVATE_USE) if chr(code) not in used)
        private = list(itertools.islice(unused, 5))
        if len(private) < 5:
            raise BadRecord("messages", "hold every character of private use", field=MESSAGES)
        opening, closing, begin, end, self._stand_in = private
        self._generation = begin, end
        self.text = template.render(messages)
        self._tokens = self._found(opening, closing)

    def pieces(self, start: int, end: int) -> Pieces:
        """Returns text and ids of special tokens in turn, of a span of the text."""
        pieces: Pieces = []
        for first, last, token in self._tokens:
            if start <= first < end:
                pieces += [self.text[start:first], token]
            if first < end:
                start = max(start, last)  # some tokens take the white space after them along
        return [piece for piece in [*pieces, self.text[start:end]] if piece != ""]

    def generated(self) -> list[Span]:
        """Returns the spans of the text that the template wrote in `{% generation %}` blocks."""
        begin, end = self._generation
        spans, written, depth, start = [], "", 0, 0
        marked = self._template.render(self.messages, generation=(begin, end))
        for part in re.split(f"([{begin}{end}])", marked):
            if part == begin:
                start = start if depth else len(written)
                depth += 1
            elif part == end:
                depth -= 1
                spans += [(start, len(written))] if not depth and start < len(written) else []
            else:
                written += part
        if depth or written != self.text:
            raise BadRecord("template", "the chat template cuts a generation block to pieces", field=MESSAGES)
        return spans

    def turn(self, index: int) -> Span:
        """Returns the span of what the assistant says in a message.

        Where the template writes the message as it does when it is the last one, that is what it writes
        more than with a generation prompt. Otherwise the message's content is found by an exchange:

            text                               <user> Hi <end> <assistant> Hello <end> <user> Bye ...
            with a stand-in for the content    <user> Hi <end> <assistant> _     <end> <user> Bye ...
            up to the stand-in, as the last    <user> Hi <end> <assistant> <think></think> _ <end>

        The turn then begins where the generation prompt ends, if the text goes on from it, else at the
        content and what always precedes it. It ends with the content and what follows it in the last line.
        """
        write, text, is_last = self._template.render, self.text, index == len(self.messages) - 1
        earlier = self.messages[:index]
        try:
            before = write(earlier, True)
        except BadRecord:  # the template refuses to go on there, or from nothing
            before = None
        after = text if is_last else write(self.messages[: index + 1])
        if before is not None and text.startswith(after) and after.startswith(before):
            return len(before), len(after)
        exchanged = [*earlier, {"role": ASSISTANT, "content": self._stand_in}]
        alone, among = write(exchanged), write(exchanged + self.messages[index + 1 :])
        if alone.count(self._stand_in) != 1 or among.count(self._stand_in) != 1:
            told = "the chat template leaves a message of the assistant out, or writes it twice"
            raise BadRecord("template", told, field=f"{MESSAGES}[{index}]")
        (head, tail), (_, rest) = alone.split(self._stand_in), among.split(self._stand_in)
        if not text.endswith(rest):
            raise _rewritten()
        last = len(text) - len(rest)
        first = min(_common(text, among), last)
        if before is not None and text.startswith(before):
            first = len(before)
        elif before is not None and head.startswith(write(earlier)):
            lead = head[_common(before, alone) :]
            first -= len(lead) if text[:first].endswith(lead) else 0
        else:  # the assistant's own last turn may change
            while earlier and earlier[-1]["role"] == ASSISTANT:
                earlier.pop()
            if earlier and not head.startswith(write(earlier)):
                raise _rewritten()
        return first, len(text) if is_last else self._turn_end(last, tail)

    def _turn_end(self, start: int, tail: str) -> int:
        """Returns where a turn ends whose content ends at `start`.

        Args:
          tail: ends it where it is the last. Later turns may follow its special tokens in other ways.
        """
        end = start + _common(self.text[start : start + len(tail)], tail)
        if end < start + len(tail):
            ends = (last for first, last, _ in self._tokens if start <= first and last <= end)
            end = max(ends, default=start)
        return end

    def _found(self, opening: str, closing: str) -> list[tuple[int, int, int]]:
        """Returns the special tokens of the text: first character, the one after the last, id.

        Marks around a whole message would hide from a template what it looks for in it: how a message
        begins, or the "</think>" that it is cut at. If they do, then such strings stay outside of marks.
        Those that are special tokens do so in what the assistant says alone, and there they become such.
        """
        between = f"[^{opening}{closing}]*"
        for cuts, assistant_cuts in (((), ()), self._specials.cuts(self._template)):
            marked = []
            for message in self.messages:
                strings = assistant_cuts if message["role"] == ASSISTANT else cuts
                content = _mark(message["content"], strings, opening, closing)
                marked.append(message | {"content": content})
            try:
                text = self._template.render(marked)
            except BadRecord:  # it could write them without marks
                continue
            if re.fullmatch(f"{between}(?:{opening}{between}{closing}{between})*", text) and (
                re.sub(f"[{opening}{closing}]", "", text) == self.text
            ):
                return self._specials.find(text, opening, closing)
        raise BadRecord("template", "the chat template cuts a message to pieces", field=MESSAGES)


class Specials:
    """The special tokens of a tokenizer, found where a template wrote them."""

    def __init__(self, tokenizer: Tokenizer):
        tokens = sorted(tokenizer.special_tokens().items(), key=lambda item: -len(item[1].content))
        self._ids = {token.content: index for index, token in tokens}
        written = [
            r"\s*" * token.lstrip + f"(?P<t{index}>{re.escape(token.content)})" + r"\s*" * token.rstrip
            for index, token in tokens
        ]
        self._pattern = re.compile("|".join(written) or "(?!)")

    def find(self, text: str, opening: str, closing: str) -> list[tuple[int, int, int]]:
        """Returns the special tokens outside of marks; places count the characters that are no marks.

        Returns:
          Of each the first character, the one after the last, and the id.
        """
        found, offset, is_marked = [], 0, False
        for part in re.split(f"([{opening}{closing}])", text):
            if part in (opening, closing):
                is_marked = part == opening
                continue
            for match in () if is_marked else self._pattern.finditer(part):
                token = self._ids[match[match.lastgroup or 0]]
                found.append((offset + match.start(), offset + match.end(), token))
            offset += len(part)
        return found

    def cuts(self, template: ChatTemplate) -> tuple[list[str], list[str]]:
        """Returns the strings that stay outside of marks: in messages, and in those of the assistant."""
        plain = [text for text in template.sought if not self._pattern.search(text)]
        return plain, [*plain, *(text for text in template.surely_sought if self._pattern.search(text))]


def _checked(record: dict) -> tuple[list[dict[str, str]], list[bool]]:
    """Returns role and content of each message of a record, and whether it is predicted."""
    messages: Any = record.get(MESSAGES)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("messages", "must be a list of objects with role and content", field=MESSAGES)
    for name in TOOL_FIELDS:
        if not _is_void(record.get(name)) and record[name] != "[]":
            raise BadRecord("tools", "tools can't be written", field=name)
    checked, weights = [], []
    for index, message in enumerate(messages):
        field = f"{MESSAGES}[{index}]"
        role, weight = message.get("role"), message.get("weight")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise BadRecord("messages", f"must be a word, got {role!r}", field=f"{field}.role")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise BadRecord("messages", "tool calls can't be written", field=f"{field}.{name}")
        weight = 1 if weight is None else weight
        if not isinstance(weight, int | float) or weight not in (0, 1):
            told = f"must be 0 (given) or 1 (predicted), got {str(weight)[:40]!r}"
            raise BadRecord("weight", told, field=f"{field}.weight")
        checked.append({"role": role, "content": _content(message, role, f"{field}.content")})
        weights.append(role == ASSISTANT and weight == 1)
    return checked, weights


def _content(message: dict, role: str, field: str) -> str:
    """Returns the text of a message; parts of text are joined."""
    content = message.get("content")
    if isinstance(content, list):
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                told = f'only parts {{"type": "text", "text": ...}} can be written, got {str(kind)[:40]!r}'
                raise BadRecord("not_text", told, field=f"{field}[{index}]")
        content = "".join(part["text"] for part in content)
    if content == "" and role != ASSISTANT:
        return content
    try:
        return text_of({"content": content}, "content")
    except BadRecord as error:
        error.field = field
        raise


def _mark(content: str, cuts: Sequence[str], opening: str, closing: str) -> str:
    """Returns a message in marks, but for `cuts` and the white space around them: templates trim it."""
    if not content.strip():
        return content
    strings = "|".join(re.escape(text) for text in sorted(cuts, key=len, reverse=True))
    marked = []
    for part in re.split(f"({strings})", content) if strings else [content]:
        text = part.strip()
        if text and part not in cuts:
            before, after = part.split(text, 1)
            part = f"{before}{opening}{text}{closing}{after}"
        marked.append(part)
    return "".join(marked)


def _common(left: str, right: str) -> int:
    """Returns the length of what two texts begin with."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle - 1)
    return low


def _is_void(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _rewritten() -> BadRecord:
    told = "the chat template rewrites earlier messages once later ones are there"
    return BadRecord("template", told, field=MESSAGES)
