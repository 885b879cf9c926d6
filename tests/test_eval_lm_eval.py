"""lm-evaluation-harness: our answers are those of its Hugging Face backend; its tasks run offline."""

import gzip
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.errors import InputError
from a3_jax.evaluation.models.any_order import AnyOrder
from a3_jax.evaluation.models.interface import TextBlank
from a3_jax.evaluation.models.left_to_right import LeftToRight
from tests.prepare_fixtures import POINTER, zstd
from tests.tiny_hf import write_tiny_llama

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.torch

import lm_eval.tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from a3_jax.evaluation import lm_eval_run  # noqa: E402
from a3_jax.evaluation.lm_eval_model import HarnessModel, windows  # noqa: E402
from a3_jax.evaluation.lm_eval_run import (  # noqa: E402
    harness_files,
    local_splits,
    run_lm_eval,
)

LONGEST = 64
PAIRS = [
    ("The cat sat on the ", "mat"),
    ("The cat sat on the", " mat"),
    ("The cat sat on the", " sofa, and slept. "),
    ("", "no context"),
    ("Ünïcode: ", "日本"),
    ("far too long " * 8, "for the context"),
    ("x", "y" * 60),
]
TEXTS = ["short", "a text that is longer than the model's context. " * 4, "y" * LONGEST, "y" * (LONGEST + 1)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module", params=["no_bos", "bos"])
def directory(request, tmp_path_factory):
    """A tiny random Llama that reads bytes; with "bos" its tokenizer puts BOS before a text."""
    directory = tmp_path_factory.mktemp("models") / request.param
    write_tiny_llama(directory, max_length=LONGEST, seed=3)
    if request.param == "bos":
        file = directory / "tokenizer.json"
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        template = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 256)]
        )
        tokenizer.post_processor = template
        file.write_text(tokenizer.to_str(), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def theirs(directory):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def ours(directory):
    return HarnessModel(LeftToRight(open_checkpoint(directory)))


def ask(kind, *arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_loglikelihood(theirs, ours):
    requests = ask("loglikelihood", *PAIRS)
    expected, answers = theirs.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests)
    for pair, (score, greedy), (their_score, their_greedy) in zip(PAIRS, answers, expected):
        assert score == pytest.approx(their_score, abs=1e-3), pair
        assert greedy == their_greedy


def test_greedy_continuations(theirs, ours):
    """What greedy decoding gives is greedy for both, and what has another end is not."""
    context = "The cat"
    prefix = np.array(ours.model.tokenizer.encode(context), np.int32)
    # Bytes that are text by themselves, so that encoding the text again gives the same tokens.
    likely = next(
        text
        for length in (3, 2, 1)
        if (text := ours.model.tokenizer.decode(ours.model.fill([TextBlank(prefix, prefix[:0], length)])[0]))
    )
    requests = ask("loglikelihood", (context, likely), (context, likely[:-1] + "~"))
    greedy = [answer[1] for answer in ours.loglikelihood(requests)]
    assert greedy == [answer[1] for answer in theirs.loglikelihood(requests, disable_tqdm=True)]


def test_rolling(theirs, ours):
    """Texts shorter and longer than the context, in the same windows."""
    requests = ask("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests), expected, atol=2e-3)
    assert min(expected) < -500


def test_generate_until(theirs, ours):
    """Greedy texts, whole and cut at stop strings; a context that must lose its beginning."""
    contexts = ["The cat", "far too long " * 8, "The dog"]
    requests = ask("generate_until", *((text, {"until": [], "max_gen_toks": 24}) for text in contexts))
    whole = ours.generate_until(requests)
    assert whole == theirs.generate_until(requests, disable_tqdm=True)
    stops = [[whole[0][5:7], "never"], whole[1][18:20], [whole[2][0]]]
    stopped = ask(
        "generate_until",
        *(
            (text, {"until": stop, "max_gen_toks": 24, "do_sample": False})
            for text, stop in zip(contexts, stops)
        ),
    )
    answers = ours.generate_until(stopped)
    assert answers == theirs.generate_until(stopped, disable_tqdm=True)
    assert [len(answer) < len(text) for answer, text in zip(answers, whole)] == [True] * 3
    assert answers[2] == ""


def test_windows():
    """Every token once; the last window reads back as far as it can."""
    found = [(target.tokens.tolist(), target.start, target.stop) for target in windows(range(10), 99, 5)]
    assert found == [
        ([99, 0, 1, 2, 3], 1, 5), ([3, 4, 5, 6, 7], 1, 5), ([5, 6, 7, 8, 9], 3, 5)
    ]  # fmt: skip
    assert [len(target.tokens) for target in windows(range(4), 99, 5)] == [5]
    assert list(windows([], 99, 5)) == []


@pytest.fixture(scope="module", autouse=True)
def known_tasks():
    """Three of the harness' 14,000 tasks: to read them all takes 15 seconds."""
    root = Path(lm_eval.tasks.__file__).parent
    names = ("gsm8k", "hellaswag", "winogrande")
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / name for name in names])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_run, "_known_tasks", lambda: manager)
        yield


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A checkpoint whose context holds a prompt with examples."""
    directory = tmp_path_factory.mktemp("reader")
    write_tiny_llama(directory, max_length=512, query_embed=True)
    return open_checkpoint(directory)


def hellaswag_rows(count):
    """Invented rows in the columns and types of the hub's data set."""
    endings = ["sings [title] loudly.", "sleeps.", "eats the hat.", "walks off into the rain."]
    return [
        {
            "ind": index, "activity_label": f"Task {index}", "ctx_a": "A man stands up.", "ctx_b": "he then",
            "ctx": "A man stands up. he then", "endings": endings, "source_id": str(index), "split": "val",
            "split_type": "indomain", "label": str(index % 4),
        }
        for index in range(count)
    ]  # fmt: skip


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_task_of_multiple_choice(reader, tmp_path):
    """HellaSwag by the harness' own file: what it asked, answered again; its accuracy from the answers."""
    write_rows(tmp_path / "hellaswag" / "validation.jsonl", hellaswag_rows(5))
    model = LeftToRight(reader)
    results = run_lm_eval(model, ["hellaswag"], tmp_path, log_samples=True)
    asked = results["samples"]["hellaswag"]
    assert len(asked) == 5
    right = 0
    for number, sample in enumerate(asked):
        pairs = [tuple(pair) for pair in sample["arguments"]]
        assert pairs[1] == (f"Task {number}: A man stands up. He then", " sleeps.")
        answers = HarnessModel(model).loglikelihood(ask("loglikelihood", *pairs))
        right += int(np.argmax([score for score, _ in answers]) == number % 4)
    assert results["results"]["hellaswag"]["acc,none"] == pytest.approx(right / 5)
    assert "acc_norm,none" in results["results"]["hellaswag"]
    assert results["config"]["a3_jax"]["model"] == "ar"


def test_a_task_that_generates_with_examples(reader, tmp_path):
    """GSM8K with one example before each question, from another split; any order and left to right."""
    rows = [{"question": f"{n} and {n}?", "answer": f"So {2 * n}.\n#### {2 * n}"} for n in range(3)]
    for split in ("test", "train"):
        write_rows(tmp_path / "gsm8k" / f"{split}.jsonl", rows)
    model = AnyOrder(reader, generate={"strategy": "dynamic", "step_size": 64})
    results = run_lm_eval(model, ["gsm8k"], tmp_path, num_fewshot=1, limit=2, log_samples=True)
    (sample, _) = [s for s in results["samples"]["gsm8k"] if s["filter"] == "strict-match"]
    assert sample["arguments"][0][0].count("Question:") == 2
    assert results["results"]["gsm8k"]["exact_match,strict-match"] in (0, 0.5, 1)
    (tmp_path / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"gsm8k: no file of split 'train' \(the few-shot examples\)"):
        run_lm_eval(model, ["gsm8k"], tmp_path)


def test_any_order_answers(reader):
    """A model that draws orders: its estimate, and greedy told from left to right."""
    model = AnyOrder(reader, "mc_order", {"draws": 3})
    requests = ask("loglikelihood", *PAIRS[:3])
    harness = HarnessModel(model, seed=1)
    answers = harness.loglikelihood(requests)
    assert answers == harness.loglikelihood(requests)
    assert answers != HarnessModel(model, seed=2).loglikelihood(requests)
    chain = HarnessModel(AnyOrder(reader)).loglikelihood(requests)
    assert all(abs(a[0] - b[0]) > 1e-4 for a, b in zip(answers, chain))
    rolling = ask("loglikelihood_rolling", ("some text",))
    assert harness.loglikelihood_rolling(rolling) == HarnessModel(AnyOrder(reader)).loglikelihood_rolling(
        rolling
    )


def test_drawn_texts(reader):
    """A draw is asked for by `do_sample` or a temperature; equal requests draw apart, and the same again."""
    harness = HarnessModel(LeftToRight(reader))
    settings = {"until": ["\n"], "max_gen_toks": 12, "temperature": 1.0, "do_sample": True}
    requests = ask("generate_until", ("ab", settings), ("ab", settings))
    first, second = harness.generate_until(requests)
    assert first != second
    assert harness.generate_until(requests) == [first, second]


def test_files_of_a_task(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet", "README.md"):
        (tmp_path / name).touch()
    assert {split: len(files) for split, files in local_splits(tmp_path).items()} == {"train": 2, "test": 1}
    (tmp_path / "validation.csv").touch()
    with pytest.raises(InputError, match="files of several kinds: csv, parquet"):
        local_splits(tmp_path)


@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        (["helaswag"], "tasks: unknown task 'helaswag' of lm-evaluation-harness; did you mean 'hellaswag'"),
        (["hellaswag"], "no local file for lm_eval:hellaswag: put validation.jsonl, .* of the hub's data set "
                        "Rowan/hellaswag there"),
        (["winogrande"], "no file of split 'validation'"),
    ],
)  # fmt: skip
def test_what_is_missing(reader, tmp_path, tasks, complaint):
    if tasks == ["winogrande"]:
        write_rows(tmp_path / "winogrande" / "train.jsonl", [{"sentence": "a _ b"}])
    with pytest.raises(InputError, match=complaint):
        run_lm_eval(LeftToRight(reader), tasks, tmp_path)


def test_only_the_files_of_the_tasks_asked_for_matter(reader, tmp_path):
    """Directories of other tasks, and other files of the task's own, may hold what they like."""
    write_rows(tmp_path / "hellaswag" / "validation.jsonl", hellaswag_rows(3))
    (tmp_path / "hellaswag" / "hellaswag_val.parquet").touch()
    write_rows(tmp_path / "winogrande" / "train_xl.jsonl", [{"sentence": "a _ b"}])
    (tmp_path / "winogrande" / "dev.csv").touch()
    results = run_lm_eval(LeftToRight(reader), ["hellaswag"], tmp_path)
    assert results["n-samples"]["hellaswag"]["effective"] == 3
    assert list(harness_files("lm_eval:hellaswag", tmp_path)) == ["validation.jsonl"]
    with pytest.raises(InputError, match="no local file for lm_eval:winogrande"):
        run_lm_eval(LeftToRight(reader), ["winogrande"], tmp_path)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("validation.jsonl", bytes),
        ("validation.jsonl.gz", gzip.compress),
        ("validation.jsonl.zst", lambda content: zstd(content, 31)),
    ],
)
def test_files_that_datasets_does_not_read(reader, tmp_path, name, pack):
    """A byte order mark, a zstd window of 2 GiB, zeros after gzip's last member."""
    write_rows(tmp_path / "hellaswag" / "rows", hellaswag_rows(3))
    content = b"\xef\xbb\xbf" + (tmp_path / "hellaswag" / "rows").read_bytes()
    packed = pack(content) + bytes(600 if name.endswith(".gz") else 0)
    (tmp_path / "hellaswag" / name).write_bytes(packed)
    results = run_lm_eval(LeftToRight(reader), ["hellaswag"], tmp_path)
    assert results["n-samples"]["hellaswag"]["effective"] == 3


def test_a_git_lfs_pointer_is_no_data(reader, tmp_path):
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag" / "validation.parquet").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"validation.parquet: is a Git LFS pointer"):
        run_lm_eval(LeftToRight(reader), ["hellaswag"], tmp_path)
