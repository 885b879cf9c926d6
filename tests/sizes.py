"""`python -m tests.sizes`: the figures that the house keeps; fails above its limits.

With `--walks` also the files that data passes through (`tests.walks`), which takes a minute.
"""

import ast
import io
import pathlib
import sys
import tokenize

from tests.test_docstrings import array_files, is_of_arrays

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE, BENCHMARKS = ROOT / "a3_jax", ROOT / "benchmarks"
LONGEST_FUNCTION, USUAL_FUNCTION, LONGEST_FILE = 80, 40, 600
COMMENTS = 0.05  # lines of comments over lines of code, where at least half of the functions compute arrays
EXCEPTIONS = {("a3_jax/training/train.py", "train"): 250}
PACKAGE_LINES, MODULES, BENCHMARK_LINES = 29600, 158, 1700  # the goals are 25,000 and 150
TRAINING_LINES = 14500  # raw lines that `a3 train` imports; the goal is 9,500


def functions(path):
    """(name, lines, first line) of every function of a file, docstrings included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1, node.lineno


def imported_from(start):
    """The files of ours that a file imports, and those that they do; late imports count."""
    seen, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("a3_jax"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = [(ROOT / name.replace(".", "/")).with_suffix(".py") for name in names]
                waiting += [file for file in files if file.exists()]
    return seen


def lines(paths) -> int:
    """Raw lines of all these files."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def lines_of_code(path):
    """Lines that are neither blank nor comment nor docstring."""
    text, outside = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            outside |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    numbered = enumerate(text.splitlines(), start=1)
    return sum(
        1 for number, line in numbered if line.strip() and line.strip()[0] != "#" and number not in outside
    )


def is_mostly_arrays(path):
    tree = ast.parse(path.read_text())
    found = [is_of_arrays(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return 2 * sum(found) >= len(found)


def lines_of_comments(path):
    """Lines that hold a comment and nothing else, but for the formatter's."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return sum(
        token.type == tokenize.COMMENT and token.line.strip().startswith("#") and "fmt:" not in token.string
        for token in tokens
    )


def main() -> int:
    lengths, complaints = [], []
    for path in sorted([*PACKAGE.rglob("*.py"), *BENCHMARKS.rglob("*.py")]):
        name, length = str(path.relative_to(ROOT)), lines([path])
        if length > LONGEST_FILE:
            complaints.append(f"{name}: {length} lines, more than {LONGEST_FILE}")
        for function, length, line in functions(path):
            lengths.append(length)
            if length > EXCEPTIONS.get((name, function), LONGEST_FUNCTION):
                complaints.append(f"{name}:{line}: {function} has {length} lines")
    package, training = [*PACKAGE.rglob("*.py")], imported_from(PACKAGE / "training/command.py")
    usual = sorted(lengths)[int(0.95 * len(lengths))]
    figures = {  # what: (figure, limit)
        "lines of a function, 95th percentile": (usual, USUAL_FUNCTION),
        "raw lines of the package": (lines(package), PACKAGE_LINES),
        "modules of the package": (len(package), MODULES),
        "raw lines that `a3 train` imports": (lines(training), TRAINING_LINES),
        "raw lines of benchmarks/": (lines(BENCHMARKS.rglob("*.py")), BENCHMARK_LINES),
    }
    for what, (figure, limit) in figures.items():
        print(f"{what}: {figure:,} (limit {limit:,})")
        if figure > limit:
            complaints.append(f"{what}: {figure}, more than {limit}")
    arrays = list(filter(is_mostly_arrays, array_files()))
    comments = sum(map(lines_of_comments, arrays)) / sum(map(lines_of_code, arrays))
    print(f"own-line comments in files of arrays: {comments:.1%} (at least {COMMENTS:.0%})")
    if comments < COMMENTS:
        complaints.append(f"own-line comments in array files are {comments:.1%}, less than {COMMENTS:.0%}")
    print(f"longest function: {max(lengths)} lines; modules that `a3 train` imports: {len(training)}")
    if "--walks" in sys.argv:
        from tests import walks

        walks.main()
    print("\n".join(complaints))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
