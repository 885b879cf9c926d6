"""Public names say what they do; functions of arrays say the shapes."""

import ast
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parent.parent / "a3_jax"
ARRAY_FILES = [
    "ordering/intervals.py", "ordering/ranks.py", "ordering/contexts.py", "ordering/segments.py",
    "model/attention.py", "model/layers.py", "training/loss.py",
    "decoding/decode_state.py", "decoding/sampling.py",
]  # fmt: skip
SHAPE = re.compile(r"\[[^\]]*[A-Zn.][^\]]*\]|scalar")


def public_functions(path):
    """Functions at the top level of a file whose names have no underscore in front."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_rooms_tell_their_idea():
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_functions_of_arrays_state_shapes():
    silent = [
        f"{name}:{function.lineno} {function.name}"
        for name in ARRAY_FILES
        for function in public_functions(PACKAGE / name)
        if not SHAPE.search(ast.get_docstring(function) or "")
    ]
    assert not silent, "\n".join(silent)


def test_axis_letters_are_those_of_the_legend():
    """Names such as `hidden_BTD` use the letters listed in `a3_jax/__init__.py`, and R rows, Q candidates."""
    legend = set("BTSNKGHDFVL") | set("RQ1h")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "arg", None) or getattr(node, "id", None)
            match = re.fullmatch(r"[a-z][a-z_]*_([A-Z][A-Za-z0-9]*)", name) if isinstance(name, str) else None
            if match and not name.isupper():
                assert set(match[1]) <= legend, f"{path}:{node.lineno} {name}"
