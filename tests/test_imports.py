"""The import line, and what may not be loaded when."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "a3_jax"
# Each room imports only from rooms of its own line and above.
LINE = [
    {"errors", "checks", "paths", "progress", "console", "tokenizer", "borders", "ordering", "config_file"},
    {"model"},
    {"runtime"},
    {"checkpoints"},
    {"decoding"},
    {"data"},
    {"training"},
    {"evaluation"},
    {"pods"},
    {"quickstart"},
    {"bench_command"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LINE) for room in rooms}


def imports_of(path):
    """Yields (line, module) for every import of ours in a file, inside functions and by importlib too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "a3_jax":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("a3_jax"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = ast.unparse(node.args[0]).lstrip("f").strip("'")
            if name.startswith("a3_jax"):
                yield node.lineno, name


def test_rooms_import_to_their_left_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in LEVEL, f"{path}: the room {room!r} has no place in the import line"
        for line, module in imports_of(path):
            imported = (module.split(".") + [""])[1]
            if LEVEL.get(imported, -1) > LEVEL[room]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions count: a circle would be one thing in two files."""
    modules = {
        ".".join(("a3_jax", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in PACKAGE.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {
        name: {m if m in modules else m.rpartition(".")[0] for _, m in imports_of(path)} - {name}
        for name, path in modules.items()
    }
    while free := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"circles among {sorted(graph)}"


@pytest.mark.parametrize(
    "code",
    [
        "import a3_jax",
        "import a3_jax.cli",
        "from a3_jax import convert, generate, score, open_checkpoint",
        "import a3_jax.data",
        "import a3_jax.data.prepare, a3_jax.data.documents",
        "import a3_jax.training.step",
    ],
)
def test_neither_seqio_nor_tensorflow_loads(code):
    """They load when training data is read, never before."""
    check = "import sys; bad = {'seqio', 'tensorflow', 'torch'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], check=True, timeout=120)


def test_help_loads_nothing_heavy():
    code = """
import contextlib, io, sys
from a3_jax.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["--help"])
assert "quickstart" in out.getvalue()
bad = {"jax", "flax", "orbax", "numpy", "tensorflow", "seqio", "tokenizers"} & set(sys.modules)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
