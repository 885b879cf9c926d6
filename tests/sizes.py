"""`python -m tests.sizes`: how long functions and files are; fails above the limits the house keeps."""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
LONGEST_FUNCTION, LONGEST_FILE, USUAL_FUNCTION, TRAINING_LINES = 80, 600, 40, 6000
EXCEPTIONS = {("a3_jax/training/loop.py", "train"): 250}
TRAINING_ROOMS = ("errors.py", "paths.py", "tokenizer.py", "ordering", "model", "checkpoints", "decoding", "data",
                  "training")  # fmt: skip


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1, node.lineno


def main() -> int:
    lengths, complaints, training = [], [], 0
    for path in sorted((ROOT / "a3_jax").rglob("*.py")):
        name, lines = str(path.relative_to(ROOT)), len(path.read_text().splitlines())
        training += lines if path.relative_to(ROOT / "a3_jax").parts[0] in TRAINING_ROOMS else 0
        if lines > LONGEST_FILE:
            complaints.append(f"{name}: {lines} lines, more than {LONGEST_FILE}")
        for function, length, line in functions(path):
            lengths.append(length)
            if length > EXCEPTIONS.get((name, function), LONGEST_FUNCTION):
                complaints.append(f"{name}:{line}: {function} has {length} lines")
    usual = sorted(lengths)[int(0.95 * len(lengths))]
    if usual > USUAL_FUNCTION:
        complaints.append(f"95th percentile of function lengths is {usual}, more than {USUAL_FUNCTION}")
    if training > TRAINING_LINES:
        complaints.append(f"`a3 train` imports {training} lines of ours, more than {TRAINING_LINES}")
    print(f"functions: 95th percentile {usual} lines, longest {max(lengths)}; `a3 train`: {training} lines of ours")
    print("\n".join(complaints))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
