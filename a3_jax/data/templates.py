"""Chat templates: Jinja programs of others that write messages out, run in a sandbox."""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

from a3_jax.data.documents import BadRecord
from a3_jax.errors import InputError
from a3_jax.tokenizer import Tokenizer

MESSAGES = "messages"
_WORD = re.compile("[a-z_]+")  # a role: no special token, and nothing that messages are cut at
_GENERATION = "_a3_generation"  # what a template knows the marks of generation blocks by
_TODAY = datetime.datetime(2024, 7, 26)  # the date that Llama 3's template holds
_ASKS_FOR_TODAY = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")


class ChatTemplate:
    """A chat template (Jinja), run in a sandbox that can neither reach Python nor change its input.

    Attributes:
      text: its source.
      has_generation: whether it marks what the assistant says by `{% generation %}` blocks.
      sought: strings that it may look for in a message, such as "</think>".
      surely_sought: those of them in comparisons and in calls of methods.

    Raises:
      InputError: no valid Jinja.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, file=None):
        import jinja2
        from jinja2 import nodes

        self.text, self._file = text, file
        self._names: dict[str, Any] = {
            "bos_token": tokenizer.token_text(tokenizer.bos_id),
            "eos_token": tokenizer.token_text(tokenizer.eos_id),
        }
        if not _ASKS_FOR_TODAY.search(text):
            self._names["strftime_now"] = _TODAY.strftime
        try:
            sandbox = _sandbox()
            tree = sandbox.parse(text)
            self._template = sandbox.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"no chat template: {error.message}", file=file, line=error.lineno) from error
        except Exception as error:  # nested too deeply, say: for Jinja, or for the Python it makes
            raise InputError(f"no chat template: {_told(error)}", file=file) from error
        extensions = tree.find_all(nodes.ExtensionAttribute)
        self.has_generation = any(node.name == "marked" for node in extensions)
        self.sought, self.surely_sought = _sought(tree)

    def render(
        self,
        messages: Sequence[dict],
        add_generation_prompt: bool = False,
        generation: tuple[str, str] = ("", ""),
    ) -> str:
        """Returns the text of messages.

        Args:
          messages: with a role and a content each.
          add_generation_prompt: whether to end with what precedes the assistant's next message.
          generation: written before and after each `{% generation %}` block.

        Raises:
          BadRecord: the template can't write these messages.
          InputError: the template tries what no template may.
        """
        import jinja2

        try:
            values = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
            values[_GENERATION] = generation
            return self._template.render(**values, tools=None, **self._names)
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"the chat template is refused: {error}", file=self._file) from error
        except Exception as error:  # a template is a program: it may raise anything
            message = f"the chat template can't write it: {_told(error)}"
            raise BadRecord("template", message, field=MESSAGES) from error


def chat_template(tokenizer: Tokenizer, file=None) -> ChatTemplate | None:
    """Returns the template in a file, or else the one that came with the tokenizer; None if there is none."""
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
    """Returns what an exception says, or its kind where it says nothing."""
    return str(error) or type(error).__name__


def _sought(tree) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the strings that a template may look for in messages, and those that it surely looks for."""
    from jinja2 import nodes

    sought, surely = set(), set()
    for node in tree.find_all((nodes.Compare, nodes.Operand, nodes.Call, nodes.Filter, nodes.Assign,
                               nodes.List, nodes.Tuple)):  # fmt: skip
        is_sure = isinstance(node, nodes.Compare | nodes.Operand)
        is_sure |= isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr)
        for child in node.iter_child_nodes():
            text = child.value if isinstance(child, nodes.Const) else None
            if isinstance(text, str) and text.strip() and not _WORD.fullmatch(text):
                sought.add(text)
                surely |= {text} if is_sure else set()
    return frozenset(sought), frozenset(surely)


def _sandbox():
    """Returns the environment that chat templates are written for.

    `strftime_now` is absent where a template asks whether it is there: it then takes the date it holds.
    Elsewhere it always tells the same day. So the same text is the same tomorrow.
    """
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses at once what Jinja's own would only refuse to go on with."""

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}")

    class Generation(ext.Extension):
        """`{% generation %}` around what the assistant says, with marks where it begins and ends."""

        tags: set[str] = {"generation"}  # noqa: RUF012

        def parse(self, parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, as in transformers: what is set within is not seen after it.
            call = self.call_method("marked", [nodes.Name(_GENERATION, "load")])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def marked(self, marks, caller) -> str:
            begin, end = marks
            return begin + caller() + end

    def raise_exception(message):
        raise TemplateError(message)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
