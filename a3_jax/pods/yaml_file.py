"""A YAML file of the user's: what the versions of YAML read differently is refused, not guessed."""

import re

import yaml

from a3_jax.errors import InputError
from a3_jax.paths import read_text

_OCTAL, _BASE_60 = re.compile(r"[-+]?0[0-9_]+"), re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses keys given twice and plain scalars of several meanings."""

    def __init__(self, stream):
        super().__init__(stream)
        self._keys = {}  # a value's node -> its key

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise InputError("the key is given twice", line=_line(key), field=key.value)
                names.add(key.value)
                self._keys[value] = key.value
        return super().construct_mapping(node, deep)

    def construct_boolean(self, node):
        if node.value.lower() not in ("true", "false"):
            raise self._ambiguous(node, "a truth value", "true or false")
        return self.construct_yaml_bool(node)

    def construct_number(self, node):
        if _OCTAL.fullmatch(node.value):
            raise self._ambiguous(node, "an octal number", "it without the leading 0")
        if _BASE_60.fullmatch(node.value):
            raise self._ambiguous(node, "a number in base 60", "the number itself")
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)

    def _ambiguous(self, node, meaning: str, plain: str) -> InputError:
        message = (
            f"{node.value} is {meaning} to some readers of YAML: write {plain}, or '{node.value}' for text"
        )
        return InputError(message, line=_line(node), field=self._keys.get(node))


_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.construct_boolean)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def read_yaml(path):
    """Returns the value in a YAML file.

    Raises:
      InputError: not YAML, a key given twice, or a plain scalar of several meanings; names the line.
    """
    text = read_text(path)
    try:
        return _Loader(text).get_single_data()
    except InputError as error:
        error.file = path
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not YAML: {error or type(error).__name__}", file=path) from error


def _line(node) -> int:
    return node.start_mark.line + 1
