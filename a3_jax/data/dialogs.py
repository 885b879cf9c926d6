"""Prompts and responses: what of a record is given, and what is predicted.

    {"prompt": ..., "response": ...}                   the one given, the other predicted
    {"messages": [{"role": ..., "content": ...}]}      written out by a chat template; what the
                                                       assistant says is predicted, all else is given

A dialog is a list of parts, each with its role and its pieces: text, or the id of a special token.
Special tokens come from the template alone. What people wrote is wrapped in marks before the template
sees it, and between marks nothing is ever read as a special token.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from a3_jax.data.documents import BadRecord, text_of
from a3_jax.data.table import GIVEN, PREDICTED
from a3_jax.errors import InputError
from a3_jax.tokenizer import Tokenizer

PROMPT, RESPONSE, MESSAGES = "prompt", "response", "messages"
ASSISTANT = "assistant"

Pieces = list[str | int]
Part = tuple[int, Pieces]  # its role: GIVEN or PREDICTED

_ROLE = re.compile("[a-z_]{1,32}")  # no special token looks like that
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning


class ChatTemplate:
    """A chat template (Jinja), run in a sandbox that can neither reach Python nor change its input.

    Raises:
      InputError: no valid Jinja.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, place=None):
        import jinja2

        self.text, self._place = text, place
        self._names = {
            "bos_token": tokenizer.token_text(tokenizer.bos_id),
            "eos_token": tokenizer.token_text(tokenizer.eos_id),
        }
        try:
            self._template = _sandbox().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"no chat template: {error.message}", file=place, line=error.lineno) from error
        except Exception as error:  # nested too deeply, say: for Jinja, or for the Python it makes
            raise InputError(f"no chat template: {_told(error)}", file=place) from error

    def render(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        """The text of messages.

        Raises:
          BadRecord: the template can't write these messages.
          InputError: the template tries what no template may.
        """
        import jinja2

        try:
            values = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
            return self._template.render(**values, tools=None, **self._names)
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"the chat template is refused: {error}", file=self._place) from error
        except Exception as error:  # a template is a program: it may raise anything
            message = f"the chat template can't write it: {_told(error)}"
            raise BadRecord("template", message, field=MESSAGES) from error


def chat_template(tokenizer: Tokenizer, file=None) -> ChatTemplate | None:
    """The template in a file, or else the one that came with the tokenizer; None if there is none.

    Raises:
      InputError: the file can't be read, or is no template.
    """
    from a3_jax.paths import read_text

    if file:
        return ChatTemplate(read_text(file), tokenizer, file)
    files = tokenizer.files()
    text = files.get("chat_template.jinja")
    if text is None:
        config = json.loads(files.get("tokenizer_config.json", "{}"))
        text = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(text, list):  # several by name
        named = [entry for entry in text if isinstance(entry, dict) and entry.get("name") == "default"]
        text = named[-1].get("template") if named else None
    return ChatTemplate(text, tokenizer, "the tokenizer's chat_template") if isinstance(text, str) else None


def _told(error: Exception) -> str:
    """What an exception says, or its kind where it says nothing."""
    return str(error) or type(error).__name__


def prompt_parts(record: dict) -> list[Part]:
    """The parts of a prompt and its response.

    Raises:
      BadRecord: one of them is absent or no text, or the response is empty.
    """
    prompt = "" if record.get(PROMPT) == "" else text_of(record, PROMPT)
    return [(GIVEN, [prompt]), (PREDICTED, [text_of(record, RESPONSE)])]


def prompt_messages(record: dict) -> dict:
    """A prompt and its response as messages."""
    (_, prompt), (_, response) = prompt_parts(record)
    roles = ("user", ASSISTANT)
    turns = zip(roles, prompt + response)
    return {MESSAGES: [{"role": role, "content": content} for role, content in turns]}


def chat_parts(record: dict, template: ChatTemplate, specials: "Specials") -> list[Part]:
    """The parts of messages up to the last that the assistant wrote.

    The text of an assistant's message is what the template writes more once it is there:

        render(messages[:k], add_generation_prompt)     <user> Hi <end> <assistant>
        render(messages[:k + 1])                        <user> Hi <end> <assistant> Hello <end>
                                                                                    predicted

    Raises:
      BadRecord: no messages, none of the assistant's, or a template that writes earlier messages
        differently once later ones are there.
    """
    messages = _checked(record)
    marks = _marks("".join(message["content"] for message in messages))
    marked = [message | {"content": _mark(message["content"], marks)} for message in messages]
    parts, done = [], ""
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = template.render(marked[:index], add_generation_prompt=True)
        after = template.render(marked[: index + 1], add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            told = "the chat template rewrites earlier messages once later ones are there"
            raise BadRecord("template", told, field=MESSAGES)
        parts.append((GIVEN, specials.split(before[len(done) :], marks)))
        parts.append((PREDICTED, specials.split(after[len(before) :], marks)))
        done = after
    if not parts:
        raise BadRecord("no_response", "no message is the assistant's", field=MESSAGES)
    return parts


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

    def split(self, text: str, marks: tuple[str, str]) -> Pieces:
        """Text and ids of special tokens in turn; text that stood between marks is never a special token.

        Raises:
          BadRecord: the template tore marked text to pieces.
        """
        opening, closing = marks
        pieces: Pieces = []
        held, is_marked, is_torn = [], False, False
        for part in re.split(f"([{opening}{closing}])", text):
            if part in marks:
                is_torn |= is_marked == (part == opening)
                is_marked = not is_marked
            elif is_marked:
                held.append(part)
            else:
                place = 0
                for match in self._pattern.finditer(part):
                    token = self._ids[match[match.lastgroup or 0]]
                    pieces += ["".join(held) + part[place : match.start()], token]
                    held, place = [], match.end()
                held.append(part[place:])
        if is_marked or is_torn:
            raise BadRecord("template", "the chat template cuts a message to pieces", field=MESSAGES)
        return [piece for piece in [*pieces, "".join(held)] if piece != ""]


def _checked(record: dict) -> list[dict[str, str]]:
    """The messages of a record, role and content of each."""
    messages: Any = record.get(MESSAGES)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("messages", "must be a list of objects with role and content", field=MESSAGES)
    checked = []
    for index, message in enumerate(messages):
        field = f"{MESSAGES}[{index}]"
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise BadRecord("messages", f"must be a word, got {role!r}", field=f"{field}.role")
        if message.get("tool_calls"):
            raise BadRecord("messages", "tool calls can't be written", field=f"{field}.tool_calls")
        if not (content == "" and role != ASSISTANT):
            try:
                content = text_of({"content": content}, "content")
            except BadRecord as error:
                error.field = f"{field}.content"
                raise
        checked.append({"role": role, "content": content})
    return checked


def _marks(content: str) -> tuple[str, str]:
    """Two characters that no message has."""
    used = set(content)
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return next(unused), next(unused)


def _mark(content: str, marks: tuple[str, str]) -> str:
    """A message in marks. White space around it stays outside: templates trim it."""
    text = content.strip()
    if not text:
        return content
    before, after = content.split(text, 1)
    return f"{before}{marks[0]}{text}{marks[1]}{after}"


def _sandbox():
    """The environment that chat templates are written for.

    There is no `strftime_now`: templates then take a fixed date, and the same text is the same tomorrow.
    """
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses at once what Jinja's own would only refuse to go on with."""

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}")

    class Generation(ext.Extension):
        """`{% generation %}` around what the assistant says: here it is found otherwise."""

        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise TemplateError(message)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    return environment
