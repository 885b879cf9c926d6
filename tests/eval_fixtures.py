"""Invented rows in the real containers with the real columns and types, and models that know or ignore them.

`write_fixtures(directory, "hub")` lays files as the parquet mirrors do, "original" as the authors' releases.
"""

import csv
import functools
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from a3_jax.evaluation.tasks.catalogue import TASKS, task_named
from a3_jax.evaluation.tasks.examples import ChoiceExample, make_examples
from a3_jax.evaluation.tasks.files import find_data, read_rows
from a3_jax.evaluation.tasks.profiles import profile_named
from a3_jax.tokenizer import bytes_tokenizer, from_files

CONTAINERS = ("hub", "original")
CHOICES = ("hellaswag", "winogrande", "siqa", "piqa")
FILLS = ("triviaqa", "rocstories", "lambada", "gsm8k")
CODES = tuple(name for name in TASKS if name.startswith("humaneval"))
SHARES_OF_FIRST = {"hellaswag": 1 / 3, "winogrande": 0.5, "siqa": 1 / 3, "piqa": 1 / 3}  # gold is choice 0

HELLASWAG = [
    {
        "ind": 4,
        "activity_label": "Mending a kite",
        "ctx_a": "A girl sits on a wall.",
        "ctx_b": "she HOLDS",
        "ctx": "A girl sits on a wall. she HOLDS",
        "split": "val",
        "split_type": "indomain",
        "label": "2",
        "endings": [
            "the wall up.",
            "a kite [step] as large  as a door.",
            "a torn kite and some tape.",
            "rain.",
        ],
        "source_id": "activitynet~v_1",
    },
    {
        "ind": 7,
        "activity_label": "Home and Garden",
        "ctx_a": "How to store bulbs [title] Dig them up. [step] Wait.",
        "ctx_b": "",
        "ctx": "How to store bulbs [title] Dig them up. [step] Wait.",
        "split": "val",
        "split_type": "zeroshot",
        "label": "0",
        "source_id": "wikihow~2",
        "endings": [
            "Dry them [title] Use paper.",
            "Eat them.",
            "Paint them blue.",
            "Read to them [substeps] nightly.",
        ],
    },
    {
        "ind": 9,
        "activity_label": "Rowing",
        "ctx_a": "Two men row.",
        "ctx_b": "the boat",
        "label": "3",
        "ctx": "Two men row. the boat",
        "split": "val",
        "split_type": "indomain",
        "source_id": "activitynet~v_3",
        "endings": ["flies.", "is a loaf.", "sings to itself for an hour.", "turns round a buoy."],
    },
]
WINOGRANDE = [
    {
        "qID": "A-1",
        "sentence": "Ann gave Sue the key because _ was leaving.",
        "option1": "Ann",
        "option2": "Sue",
        "answer": "1",
    },
    {
        "qID": "A-2",
        "sentence": "The dog feared the cat's toy, so _'s bark was low.",
        "option1": "the cat",
        "option2": "the dog",
        "answer": "2",
    },
    {
        "qID": "A-3",
        "sentence": "_ lent Bo a coat, as Al's was warm.",
        "option1": "Bo",
        "option2": "Al",
        "answer": "2",
    },
    {
        "qID": "A-4",
        "sentence": "Of O'Neil and Wu, the taller is _ .",
        "option1": "O'Neil",
        "option2": "Wu",
        "answer": "1",
    },
]
PIQA = [
    {
        "goal": "How do I keep a door open?",
        "sol1": "Ask it to stay.",
        "sol2": "Put a wedge under it.",
        "label": 1,
    },
    {
        "goal": "To cool soup quickly,",
        "sol1": "stir it in a wide bowl.",
        "sol2": "stir it in the oven.",
        "label": 0,
    },
    {"goal": "Sharpen a pencil", "sol1": "with a spoon", "sol2": "with a knife, away from you", "label": 1},
]
SIQA = [
    {
        "context": "Kai lost a glove.",
        "question": "What will Kai want to do next?",
        "answerA": "find it",
        "answerB": "sell it",
        "answerC": "buy a boat",
        "label": "1",
    },
    {
        "context": "Robin cooked for all.",
        "question": "How would others feel?",
        "answerA": "tall",
        "answerB": "thankful",
        "answerC": "green",
        "label": "2",
    },
    {
        "context": "Lee's train was late.",
        "question": "Why did Lee run?",
        "answerA": "for fun",
        "answerB": "to eat",
        "answerC": "to be in time",
        "label": "3",
    },
]
ROCSTORIES = [
    {
        "InputStoryid": "a-1",
        "InputSentence1": "Mia had a red, old bike.",
        "InputSentence2": "One wheel was bent.",
        "InputSentence3": 'She took it to "Spokes", a shop.',
        "InputSentence4": "They put it right.",
        "RandomFifthSentenceQuiz1": "Mia rode home.",
        "RandomFifthSentenceQuiz2": "Mia swam home, sadly.",
        "AnswerRightEnding": "1",
    },
    {
        "InputStoryid": "a-2",
        "InputSentence1": "Tom didn't like rain.",
        "InputSentence2": "It rained all week.",
        "InputSentence3": "On Friday he bought boots.",
        "InputSentence4": "He walked through every puddle.",
        "RandomFifthSentenceQuiz1": "He hated the boots.",
        "RandomFifthSentenceQuiz2": "Now he likes rain.",
        "AnswerRightEnding": "2",
    },
]
TRIVIAQA = [
    (
        "tq_1",
        "Which music did they call the devil's?",
        ["Rock-n-roll", "loud old rock and roll music"],
        ["rock n roll", "loud old rock and roll music"],
    ),
    (
        "tq_2",
        "Which is the largest city of Brazil?",
        ["São Paulo", "Sao Paulo city"],
        ["são paulo", "sao paulo city"],
    ),
    ("tq_3", "Who sang Yesterday", ["The Beatles", "Beatles", "!"], ["beatles", ""]),
]
LAMBADA = [
    "she did n't see the cat , so she called and called for the cat",
    "`` where is the key ? '' he asked , and his sister held up the key",
    "the café was shut , and so they went on to the next café",
]
GSM8K = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7 pens.\n#### 7"},
    {"question": "A car costs $1,200 and tyres $34. In all?", "answer": "1200 + 34 = 1234.\n#### 1,234"},
]
GSM8K_TRAIN = [
    {
        "question": f"Bo has {n} eggs and eats one. How many are left?",
        "answer": f"{n} - 1 = {n - 1}\n#### {n - 1}",
    }
    for n in range(2, 8)
]
HUMANEVAL = [
    {
        "task_id": "SingleLineInfilling/HumanEval/0/L0",
        "entry_point": "add_one",
        "prompt": 'def add_one(x):\n    """x and one more."""\n',
        "suffix": "    return y\n",
        "canonical_solution": "    y = x + 1\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    },
    {
        "task_id": "SingleLineInfilling/HumanEval/1/L0",
        "entry_point": "shout",
        "prompt": "def shout(text):\n",
        "suffix": "",
        "canonical_solution": "    return text.upper()\n",
        "test": "\n\ndef check(candidate):\n    assert candidate('né') == 'NÉ'\n",
    },
]
_SENTENCE = "Number {} of these lines tells of a mill by the river, its wheel, and the flour that it made. "
PILE = [
    {"text": "".join(_SENTENCE.format(n * k) for k in range(n + 10)), "meta": {"pile_set_name": "Invented"}}
    for n in range(1, 8)
] + [{"text": "Too short.", "meta": {"pile_set_name": "Invented"}}]


def write_fixtures(directory, containers="hub"):
    """Files of every task under `directory`/TASK."""
    writers = {"hub": _write_hub, "original": _write_original}
    writers[containers](directory)
    for name in CODES:
        file = next(file for file in TASKS[name].files if file.endswith("gz") == (containers == "hub"))
        write_jsonl(directory / name / file, HUMANEVAL)
    story_file = TASKS["rocstories"].files[1 if containers == "hub" else 0]
    write_csv(directory / "rocstories" / story_file, ROCSTORIES)


def _write_hub(directory):
    part = "00000-of-00001.parquet"
    write_parquet(directory / f"triviaqa/rc.nocontext/validation-{part}", [_trivia(*row) for row in TRIVIAQA])
    write_parquet(directory / f"hellaswag/data/validation-{part}", HELLASWAG)
    rows = [{name: value for name, value in row.items() if name != "qID"} for row in WINOGRANDE]
    write_parquet(directory / f"winogrande/winogrande_xl/validation-{part}", rows)
    write_parquet(directory / "piqa/piqa_validation.parquet", PIQA)
    write_parquet(directory / f"siqa/data/validation-{part}", SIQA)
    write_parquet(directory / f"lambada/default/test-{part}", [{"text": text} for text in LAMBADA])
    write_parquet(directory / f"gsm8k/main/test-{part}", GSM8K)
    write_parquet(directory / f"gsm8k/main/train-{part}", GSM8K_TRAIN)
    write_jsonl(directory / "pile/val.jsonl.zst", PILE)


def _write_original(directory):
    write_jsonl(directory / "triviaqa/triviaqa.jsonl", [_trivia(*row) for row in TRIVIAQA])
    rows = [{**row, "label": int(row["label"])} for row in HELLASWAG]
    write_jsonl(directory / "hellaswag/hellaswag_val.jsonl", rows)
    write_jsonl(directory / "winogrande/dev.jsonl", WINOGRANDE)
    for name, rows, stem in (("piqa", PIQA, "valid"), ("siqa", SIQA, "dev")):
        unlabelled = [{key: value for key, value in row.items() if key != "label"} for row in rows]
        write_jsonl(directory / name / f"{stem}.jsonl", unlabelled)
        labels = "".join(f"{row['label']}\n" for row in rows)
        (directory / name / f"{stem}-labels.lst").write_text(labels)
    (directory / "lambada").mkdir()
    text = "\n".join(LAMBADA) + "\n"
    (directory / "lambada/lambada_test_plain_text.txt").write_text(text, encoding="utf-8")
    (directory / "gsm8k").mkdir()
    rows = [{"instruction": row["question"], "output": row["answer"]} for row in GSM8K]
    (directory / "gsm8k/gsm_test.json").write_text(json.dumps(rows))
    write_jsonl(directory / "gsm8k/train.jsonl", GSM8K_TRAIN)
    write_jsonl(directory / "pile/pile_val.jsonl", PILE)


def _trivia(name, question, aliases, normalized):
    """A row of the hub's data set, with the columns that make it large."""
    return {
        "question": question,
        "question_id": name,
        "question_source": "http://www.example.org/",
        "entity_pages": {"title": ["Page"], "wiki_context": ["text " * 50]},
        "search_results": {"rank": [1], "search_context": ["text " * 50]},
        "answer": {
            "aliases": aliases,
            "normalized_aliases": normalized,
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": normalized[0],
            "type": "FreeForm",
            "value": aliases[0],
        },
    }


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def write_jsonl(path, rows):
    """JSON lines, compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)


def write_csv(path, rows):
    """With a heading, quotes where RFC 4180 wants them, CRLF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)


@functools.cache
def llama3_tokenizer():
    """Byte-level BPE, where a space is part of the word after it; adds BOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


@functools.cache
def llama2_tokenizer():
    """As SentencePiece makes them: a text gets a space in front that was not typed; adds BOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("▁*[^▁]+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _trained(tokenizer, [], [f"<0x{byte:02X}>" for byte in range(256)])


def _trained(tokenizer, alphabet, first=()):
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", *first], show_progress=False
    )
    rows = (HELLASWAG, WINOGRANDE, PIQA, SIQA, ROCSTORIES, LAMBADA, GSM8K, GSM8K_TRAIN, HUMANEVAL)
    tokenizer.train_from_iterator([json.dumps(row, ensure_ascii=False) for row in rows] * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    file = json.loads(tokenizer.to_str())  # byte tokens are trained as special ones, and are none
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in first]
    return from_files({"tokenizer.json": json.dumps(file), "special_tokens_map.json": names})


TOKENIZERS = {"bytes": bytes_tokenizer, "llama2": llama2_tokenizer, "llama3": llama3_tokenizer}


def read_examples(name, data_dir, profile=None, tokenizer=None, **options):
    """All examples of a task's files; profile: one, or its name."""
    task, profile = task_named(name), profile or "a3_best_guess"
    profile = profile_named(profile) if isinstance(profile, str) else profile
    files = find_data(task, data_dir, shots=profile.shots.get(name, 0) > 0)
    shots = list(read_rows(task, files, shots=True)) if files.shots else ()
    rows = read_rows(task, files, profile.limit_of(task))
    return list(make_examples(task, profile, rows, tokenizer or bytes_tokenizer(), shots=shots, **options))


class _Fake:
    """What the fakes share; `seen` counts the requests of each kind."""

    def __init__(self, tokenizer=None, max_length=1 << 16):
        self.tokenizer, self.max_length = tokenizer or bytes_tokenizer(), max_length
        self.seen = {"score": 0, "fill": 0}

    def score(self, targets):
        self.seen["score"] += len(targets)
        return [float(logprobs.sum(dtype=np.float64)) for logprobs in self.token_logprobs(targets)]

    def fill(self, blanks):
        self.seen["fill"] += len(blanks)
        return [np.asarray(self._filled(blank), np.int32) for blank in blanks]

    def describe(self):
        return {"model": type(self).__name__, "max_length": self.max_length}

    def token_logprobs(self, targets):
        raise NotImplementedError

    def _filled(self, blank):
        raise NotImplementedError


class ConstantModel(_Fake):
    """The same score for whatever it is asked, the same token in every blank."""

    def token_logprobs(self, targets):
        return [np.zeros(target.stop - target.start, np.float32) for target in targets]

    def _filled(self, blank):
        return self.tokenizer.encode("z" * blank.length, "no")[:1] * blank.length


class UniformModel(_Fake):
    """Every token is as likely as any other of the vocabulary; fills with drawn ones."""

    def __init__(self, tokenizer=None, vocab_size=None, max_length=1 << 16):
        super().__init__(tokenizer, max_length)
        self.vocab_size = vocab_size or self.tokenizer.vocab_size

    def token_logprobs(self, targets):
        each = -np.log(np.float32(self.vocab_size))
        return [np.full(target.stop - target.start, each, np.float32) for target in targets]

    def _filled(self, blank):
        return np.random.default_rng(blank.seed).integers(self.vocab_size, size=blank.length)


class OracleModel(_Fake):
    """Knows the right answers of the examples it is made with, and holds all others for impossible.

    Blanks longer than the answer end with EOS, which is left out when they are decoded.
    """

    def __init__(self, examples, tokenizer=None, max_length=1 << 16):
        super().__init__(tokenizer, max_length)
        self._right, self._answers = set(), {}
        for example in examples:
            if isinstance(example, ChoiceExample):
                self._right.add(_target_key(example.targets[example.gold]))
            else:
                self._answers[_blank_key(example.blank)] = example.gold

    @classmethod
    def of(cls, names, data_dir, profile=None, tokenizer=None, **options):
        """One that knows all tasks named."""
        examples = [
            example
            for name in names
            for example in read_examples(name, data_dir, profile, tokenizer, **options)
        ]
        return cls(examples, tokenizer)

    def token_logprobs(self, targets):
        return [
            np.full(
                target.stop - target.start, 0.0 if _target_key(target) in self._right else -9.0, np.float32
            )
            for target in targets
        ]

    def _filled(self, blank):
        answer = self._answers[_blank_key(blank)]
        padding = [self.tokenizer.eos_id or 0] * blank.length
        return [*answer, *padding][: blank.length]


def _target_key(target):
    return target.tokens.tobytes(), target.start, target.stop


def _blank_key(blank):
    return blank.prefix.tobytes(), blank.suffix.tobytes()
