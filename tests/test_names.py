"""Names stand once, retired words stay out, and docstrings say what a function does."""

import ast
import collections
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parent.parent / "a3_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
REPEATED_MODULES = {"__init__", "command", "config"}
# Words of earlier drafts: the field has its own for them.
RETIRED = {
    "Judge", "Judged", "Laws", "law", "laws", "Offer", "Rule", "Program", "Network", "Presence", "Geometry",
    "LayerRecord", "part_sums", "behind", "lay_out_for_few_rows", "compiled_meanwhile", "Piece",
}  # fmt: skip
NOUN_CLAUSE = re.compile(r"(What|Whether|How|Which|Of|Why|Where|When|Who)\b")
BARE_GENITIVE = re.compile(
    r"^\s+\w[\w, ]*: of the (run|checkpoint|model|step|tokenizer|batch|stage|example)s?\.$"
)


def nodes(kind):
    """Yields (path, node) for all nodes of a kind in the package."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield path.relative_to(PACKAGE), node


def test_modules_and_classes_have_names_of_their_own():
    modules = collections.Counter(path.stem for path in FILES if path.stem not in REPEATED_MODULES)
    classes = collections.Counter(node.name for _, node in nodes(ast.ClassDef))
    assert not [name for name, count in (modules + classes).items() if count > 1]


def test_retired_words_are_no_identifiers():
    found = [f"{path}:{node.lineno} {node.id}" for path, node in nodes(ast.Name) if node.id in RETIRED]
    found += [
        f"{path}:{node.lineno} {node.attr}" for path, node in nodes(ast.Attribute) if node.attr in RETIRED
    ]
    found += [f"{path}:{node.lineno} {node.arg}" for path, node in nodes(ast.arg) if node.arg in RETIRED]
    defined = nodes(ast.ClassDef | ast.FunctionDef)
    found += [f"{path}:{node.lineno} {node.name}" for path, node in defined if node.name in RETIRED]
    assert not found, "\n".join(found)


def test_docstrings_of_functions_are_no_noun_clauses():
    """A docstring says what a function does or returns, not `What ...` or `Whether ...`."""
    wrong = [
        f"{path}:{node.lineno} {node.name}"
        for path, node in nodes(ast.FunctionDef)
        if NOUN_CLAUSE.match(ast.get_docstring(node) or "")
    ]
    assert not wrong, "\n".join(wrong)


def test_arguments_are_described():
    """`seed: of the run.` describes nothing."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{number} {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if BARE_GENITIVE.match(line)
    ]
    assert not wrong, "\n".join(wrong)
