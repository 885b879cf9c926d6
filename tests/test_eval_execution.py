"""Programs that a model wrote run only when told, apart from everything, and end in time."""

import pathlib
import time

import pytest

from a3_jax.errors import InputError
from a3_jax.evaluation.tasks.catalogue import TASKS, task_named
from a3_jax.evaluation.tasks.code_sandbox import check_execution, check_program
from a3_jax.evaluation.tasks.grading import grade, program_of, summarise
from a3_jax.evaluation.tasks.profiles import profile_named
from tests import eval_fixtures as fixtures

TASK, PROFILE = task_named("humaneval_infilling"), profile_named("a3_best_guess")


@pytest.fixture
def examples(tmp_path):
    fixtures.write_fixtures(tmp_path, "original")
    return fixtures.read_examples(TASK.name, tmp_path, PROFILE)


def test_refused_without_leave():
    with pytest.raises(InputError, match="--allow_code_execution") as caught:
        check_execution([TASKS["piqa"], TASK], allow=False)
    assert TASK.name in caught.value.message
    check_execution([TASK], allow=True)
    check_execution([TASKS["piqa"]], allow=False)


def test_nothing_runs_without_leave(examples, monkeypatch):
    monkeypatch.setattr(
        "a3_jax.evaluation.tasks.grading.check_program", lambda program: pytest.fail("it ran")
    )
    tokenizer = fixtures.bytes_tokenizer()
    record = grade(TASK, PROFILE, examples[0], examples[0].gold, tokenizer)
    assert record["result"] == "not run" and record["figures"] == {}
    assert summarise(TASK, [record]) == {}


def test_right_wrong_and_empty_completions(examples):
    tokenizer = fixtures.bytes_tokenizer()

    def judged(example, answer):
        return grade(TASK, PROFILE, example, answer, tokenizer, allow_code_execution=True)

    right = [judged(example, example.gold) for example in examples]
    assert [record["result"] for record in right] == ["passed", "passed"]
    wrong = judged(examples[0], tokenizer.encode("    y = x + 2\n"))
    assert wrong["result"].startswith("failed: AssertionError") and wrong["figures"] == {"passed": 0.0}
    empty = judged(examples[0], None)  # too long for the model: attempted all the same
    assert empty["completion"] == "" and empty["result"].startswith("failed: NameError")
    figures = summarise(TASK, [right[0], {**wrong, "row": 2}])
    assert figures["pass@1"].value == 50.0 and set(figures) == {"pass@1"}


def test_pass_at_k_of_several_samples(examples):
    records = [
        {"row": row, "figures": {"passed": float(row == 1 and k < 5)}} for row in (1, 2) for k in range(10)
    ]
    figures = summarise(TASK, records)
    assert {name: figure.value for name, figure in figures.items()} == {"pass@1": 25.0, "pass@10": 50.0}


def test_the_program_has_prompt_completion_suffix_and_tests(examples):
    row = fixtures.HUMANEVAL[0]
    expected = row["prompt"] + "HERE\n" + row["suffix"] + "\n" + row["test"] + "\ncheck(add_one)"
    assert program_of(examples[0], "HERE\n") == expected


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("import math, re, random, hashlib, collections, typing\nassert math.gcd(4, 6) == 2", "passed"),
        ("print('x' * 10**6)", "passed"),
        ("import sys\nassert sys.argv == sys.argv[:1]", "passed"),
        ("import os\nassert not {'HOME', 'PATH', 'PYTHONPATH'} & set(os.environ)", "passed"),
        ("x = 'né \\ud800'", "passed"),
        ("assert 1 == 2, 'nö'", "failed: AssertionError: nö"),
        ("def f(:", "failed: SyntaxError"),
        ("import sys\nsys.exit(0)", "failed: SystemExit"),  # its tests behind it never ran
        ("import os\nos._exit(0)", "failed: ended before"),
        (
            "import os\nfor n in range(3, 16):\n  try: os.write(n, b'x')\n  except OSError: pass",
            "failed: ended",
        ),
        ("input()", "failed: EOFError"),
        ("def f(): f()\nf()", "failed: RecursionError"),
        ("x = bytearray(1 << 32)", "failed: MemoryError"),
        ("open('/tmp/a3-evil', 'w')", "failed: PermissionError"),
        ("import os\nos.open('evil', os.O_CREAT)", "failed: PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9), 1)", "failed: PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "failed: PermissionError"),
        ("import _posixsubprocess", "failed: PermissionError"),
        ("import os\nos.fork()", "failed: PermissionError"),
        ("import os\nos.system('true')", "failed: PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "failed: PermissionError"),
        ("import ctypes", "failed: PermissionError"),
        ("import shutil\nshutil.rmtree('/tmp/nothing-there')", "failed: PermissionError"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "failed: E"),
    ],
)
def test_outcomes(program, result):
    outcome = check_program(program, seconds=20.0)
    assert outcome.result.startswith(result)
    assert outcome.passed == (result == "passed")
    assert not pathlib.Path("/tmp/a3-evil").exists()


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time\ntime.sleep(60)", "try:\n  while True: pass\nexcept BaseException: 0"],
)
def test_time_runs_out(program):
    before = time.monotonic()
    assert check_program(program, seconds=0.3).result == "timed out"
    assert time.monotonic() - before < 30


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert check_program("import os\nassert os.listdir('.') == []").passed
    check_program("while True: pass", seconds=0.2)
    assert list(tmp_path.iterdir()) == []
