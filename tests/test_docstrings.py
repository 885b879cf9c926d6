"""Public names say what they do; functions of arrays say the shapes."""

import ast
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parent.parent / "a3_jax"
ARRAY_ROOMS = ("ordering", "model", "decoding")
JAX_ROOMS = ("training", "evaluation")
SHAPE = re.compile(r"\[[^\]]*[A-Zn.][^\]]*\]|scalar")
# Calls of array libraries, array types, and names with axis letters.
ARRAYS = re.compile(
    r"\b(?:jnp|np|xp|jax\.lax|jax\.nn)\.[a-z]\w*\(|\bnp\.ndarray\b|\bjax\.Array\b|\bBatch\b|[a-z]_[A-Z]\w*\b"
)


def array_files():
    """Files that compute arrays, by their imports: NumPy or JAX in the rooms of the model, JAX in others.

    `training` and `evaluation` hold files that only pass arrays on; those that compute import `jax.numpy`.
    """
    for path in sorted(PACKAGE.glob("*/*.py")):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        wanted = {"numpy", "jax.numpy"} if path.parent.name in ARRAY_ROOMS else {"jax.numpy"}
        if path.parent.name in (*ARRAY_ROOMS, *JAX_ROOMS) and imported & wanted:
            yield path


def is_of_arrays(function):
    """Whether a function calls an array library itself, or its signature names an array."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    code = [ast.unparse(function.args), ast.unparse(function.returns or ast.Constant(None))]
    return bool(ARRAYS.search("\n".join([*code, *map(ast.unparse, body)])))


def public_functions(path):
    """Functions at the top level of a file whose names have no underscore in front."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_rooms_tell_their_idea():
    for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_functions_of_arrays_state_shapes():
    files = list(array_files())
    functions = [
        (path, function) for path in files for function in public_functions(path) if is_of_arrays(function)
    ]
    silent = [
        f"{path.relative_to(PACKAGE)}:{function.lineno} {function.name}"
        for path, function in functions
        if not SHAPE.search(ast.get_docstring(function) or "")
    ]
    assert not silent, "\n".join(silent)
    assert len(files) > 20 and len(functions) > 80, "the rule finds the files and functions"


def test_axis_letters_are_those_of_the_legend():
    """Names such as `hidden_BTD` use the letters listed in `a3_jax/__init__.py`, and R rows, Q candidates."""
    legend = set("BTSNKGHDFVL") | set("RQ1h")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "arg", None) or getattr(node, "id", None)
            match = re.fullmatch(r"[a-z][a-z_]*_([A-Z][A-Za-z0-9]*)", name) if isinstance(name, str) else None
            if match and not name.isupper():
                assert set(match[1]) <= legend, f"{path}:{node.lineno} {name}"
