"""`python -m tests.sizes`: the figures that the house keeps; fails above its limits.

With `--walks` also the files that data passes through (`tests.walks`), which takes a minute.
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE, BENCHMARKS = ROOT / "a3_jax", ROOT / "benchmarks"
LONGEST_FUNCTION, USUAL_FUNCTION, LONGEST_FILE = 80, 40, 600
EXCEPTIONS = {("a3_jax/training/train.py", "train"): 250}
PACKAGE_LINES, MODULES, BENCHMARK_LINES = 30000, 180, 1700
TRAINING_LINES = 13900  # raw lines that `a3 train` imports


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
    print(f"longest function: {max(lengths)} lines; modules that `a3 train` imports: {len(training)}")
    if "--walks" in sys.argv:
        from tests import walks

        walks.main()
    print("\n".join(complaints))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
