"""The tasks, each a row of facts: which file people have, which columns, how a row becomes text.

Whatever papers and scripts decide differently (spaces, BOS, rules) is in `profiles`.
"""

import dataclasses

from a3_jax.errors import InputError, nearest

CHOICE, INFILL, GENERATE, CODE, PERPLEXITY = "choice", "infill", "generate", "code", "perplexity"
_DATA_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv")


@dataclasses.dataclass(frozen=True)
class Field:
    """A column.

    Attributes:
      name: what the code calls it.
      kind: "text", "texts" (a list of them), "label", "id", or "answer" (TriviaQA's record with aliases).
      others: names that it has in other files.
      may_be_empty: whether an empty text is allowed, as in half of HellaSwag's `ctx_b`.
      required: whether a file without the column is refused.
    """

    name: str
    kind: str = "text"
    others: tuple[str, ...] = ()
    may_be_empty: bool = False
    required: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.others)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      name: as in `--tasks`.
      kind: what is asked of the model: "choice" scores choices, "infill" and "generate" fill a blank,
        "code" fills one and runs the program, "perplexity" has an evaluator score what is written.
      split: split of the data set, by its publishers' name.
      files: file names or patterns, the best first, looked for in DATA_DIR/TASK and then in DATA_DIR.
      fields: the columns that are read.
      where: how people get the file.
      metrics: what is reported; metrics of the published tables first.
      hub: data set on the Hugging Face hub and its files, for `--download`; None: it is not there.
      cells: (metric, table, name in the table) of the published figures.
      id_fields: the columns that name a row; its number where they are absent.
      labels: the label texts of the choices in order, such as ("1", "2"); for choices only.
      context: what precedes the choices or the blank, with fields in braces.
      choices: the fields that hold the choices: one text each, or one list of texts.
      capitalised: fields that begin with a capital, all other letters small (Python's `capitalize`).
      is_cleaned: whether wikiHow's marks are removed from context and choices (`examples.clean`).
      gap: a field with `_` in place of the choice; the context is what precedes it.
      limit: number of rows that the published figures are about; None: all.
      too_long: what becomes of an example longer than the context: "skip", or "empty", an empty answer.
      labels_file: (data file, file of its labels), where labels have a file of their own.
      shots_files: as `files`, for the training rows of few-shot prompts.
    """

    name: str
    kind: str
    split: str
    files: tuple[str, ...]
    fields: tuple[Field, ...]
    where: str
    metrics: tuple[str, ...]
    hub: tuple[str, tuple[str, ...]] | None = None
    cells: tuple[tuple[str, str, str], ...] = ()
    id_fields: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    context: str = ""
    choices: tuple[str, ...] = ()
    capitalised: tuple[str, ...] = ()
    is_cleaned: bool = False
    gap: str | None = None
    limit: int | None = None
    too_long: str = "skip"
    labels_file: tuple[str, str] | None = None
    shots_files: tuple[str, ...] = ()

    @property
    def file_names(self) -> tuple[str, ...]:
        """All names looked for: its own, then the task's name with any suffix that is read."""
        own = tuple(f"{self.name}{suffix}" for suffix in _DATA_SUFFIXES) if self.files else ()
        return (*self.files, *own)

    @property
    def columns(self) -> str:
        """The required columns as a text, such as `goal, sol1, sol2, label`."""
        return ", ".join(field.name for field in self.fields if field.required)


def _published(metrics: dict[str, str], *tables: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((metric, table, name) for table in tables for metric, name in metrics.items())


def _choice(name: str, cell: str, **facts) -> Task:
    metrics = (
        "accuracy",
        *(f"accuracy_{rule}" for rule in ("sum", "per_token", "per_character", "per_byte")),
    )
    cells = _published({"accuracy": cell}, *_TABLES)
    return Task(name=name, kind=CHOICE, split="validation", metrics=metrics, cells=cells, **facts)


def _code(name: str, file: str, cells=()) -> Task:
    fields = (
        Field("task_id", "id"), Field("entry_point"), Field("prompt", may_be_empty=True),
        Field("suffix", may_be_empty=True), Field("canonical_solution"), Field("test"),
    )  # fmt: skip
    upstream = "github.com/openai/human-eval-infilling (or hub data set loubnabnl/humaneval_infilling)"
    return Task(
        name=name, kind=CODE, split="test", files=(f"{file}.jsonl.gz", f"{file}.jsonl"), fields=fields,
        id_fields=("task_id",), where=f"data/{file}.jsonl.gz of {upstream}", metrics=("pass@1",),
        cells=cells, too_long="empty",
    )  # fmt: skip


_A3, _ABLATION, _DIFFULLAMA = "a3_table1", "a3_table3_curriculum", "diffullama_table1"
_TABLES = (_A3, _ABLATION, _DIFFULLAMA)
_ROUGE = ("rouge1", "rouge2", "rougeL")

_ALL = (
    Task(
        name="triviaqa",
        kind=GENERATE,
        split="validation",
        files=("rc/validation-*.parquet", "rc.nocontext/validation-*.parquet", "validation-*.parquet",
               "triviaqa_validation.parquet"),
        fields=(Field("question"), Field("question_id", "id", required=False), Field("answer", "answer")),
        id_fields=("question_id",),
        where="hub data set mandarjoshi/trivia_qa, config rc (its first 2,000 rows are the published ones) "
              "or rc.nocontext (7 MB, the same questions)",
        hub=("mandarjoshi/trivia_qa", ("rc.nocontext/validation-*.parquet",)),
        metrics=("exact_match", "containment", "strict_exact_match", "f1"),
        cells=_published({"exact_match": "triviaqa_em"}, *_TABLES, "a3_table4_data_scaling",
                         "diffullama_table2_triviaqa"),
        context="Question: {question}?\nAnswer: ",
        limit=2000,
    ),
    _choice(
        "hellaswag",
        "hellaswag_acc",
        files=("data/validation-*.parquet", "validation-*.parquet", "hellaswag_val.jsonl"),
        fields=(Field("activity_label"), Field("ctx_a"), Field("ctx_b", may_be_empty=True),
                Field("endings", "texts"), Field("label", "label"), Field("ind", "id", required=False)),
        id_fields=("ind",),
        where="hub data set Rowan/hellaswag, or hellaswag_val.jsonl of github.com/rowanz/hellaswag",
        hub=("Rowan/hellaswag", ("data/validation-*.parquet",)),
        labels=("0", "1", "2", "3"),
        context="{activity_label}: {ctx_a} {ctx_b}",
        choices=("endings",),
        capitalised=("ctx_b",),
        is_cleaned=True,
    ),
    _choice(
        "winogrande",
        "winogrande_acc",
        files=("winogrande_xl/validation-*.parquet", "validation-*.parquet", "dev.jsonl"),
        fields=(Field("sentence"), Field("option1"), Field("option2"), Field("answer", "label"),
                Field("qID", "id", required=False)),
        id_fields=("qID",),
        where="hub data set allenai/winogrande, config winogrande_xl, or dev.jsonl of winogrande_1.1.zip",
        hub=("allenai/winogrande", ("winogrande_xl/validation-*.parquet",)),
        labels=("1", "2"),
        choices=("option1", "option2"),
        gap="sentence",
    ),
    _choice(
        "siqa",
        "siqa_acc",
        files=("data/validation-*.parquet", "validation-*.parquet", "dev.jsonl"),
        labels_file=("dev.jsonl", "dev-labels.lst"),
        fields=(*map(Field, ("context", "question", "answerA", "answerB", "answerC")),
                Field("label", "label")),
        where="hub data set lighteval/siqa, or dev.jsonl with dev-labels.lst of socialiqa-train-dev.zip",
        hub=("lighteval/siqa", ("data/validation-*.parquet",)),
        labels=("1", "2", "3"),
        context="Question: {context} {question}\nAnswer: ",
        choices=("answerA", "answerB", "answerC"),
    ),
    _choice(
        "piqa",
        "piqa_acc",
        files=("piqa_validation.parquet", "data/validation-*.parquet", "validation-*.parquet", "valid.jsonl"),
        labels_file=("valid.jsonl", "valid-labels.lst"),
        fields=(*map(Field, ("goal", "sol1", "sol2")), Field("label", "label")),
        where="hub data set baber/piqa, or valid.jsonl with valid-labels.lst of physicaliqa-train-dev.zip",
        hub=("baber/piqa", ("piqa_validation.parquet",)),
        labels=("0", "1"),
        context="Question: {goal}\nAnswer: ",
        choices=("sol1", "sol2"),
    ),
    Task(
        name="rocstories",
        kind=INFILL,
        split="validation, spring 2016",
        files=("cloze_test_val__spring2016.csv", "cloze_test_val__spring2016 - cloze_test_ALL_val.csv"),
        fields=(Field("InputStoryid", "id", required=False),
                *(Field(f"InputSentence{number}") for number in (1, 2, 3, 4)),
                Field("RandomFifthSentenceQuiz1"), Field("RandomFifthSentenceQuiz2"),
                Field("AnswerRightEnding", "label")),
        id_fields=("InputStoryid",),
        where="the authors' form at cs.rochester.edu/nlp/rocstories sends it; it may not be passed on",
        metrics=_ROUGE,
        cells=_published({name: f"rocstories_{name}" for name in _ROUGE}, *_TABLES),
        labels=("1", "2"),
        choices=("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"),
        limit=1000,
    ),
    Task(
        name="lambada",
        kind=GENERATE,
        split="test",
        files=("lambada_test_plain_text.txt", "default/test-*.parquet", "plain_text/test-*.parquet",
               "test-*.parquet", "lambada_test.jsonl", "data/lambada_test.jsonl", "test.jsonl"),
        fields=(Field("text"),),
        where="lambada_test_plain_text.txt (a passage a line, tokenised) as in the published scripts, "
              "or hub data sets EleutherAI/lambada_openai (not tokenised) and cimec/lambada",
        hub=("EleutherAI/lambada_openai", ("default/test-*.parquet", "data/lambada_test.jsonl")),
        metrics=("accuracy",),
        cells=_published({"accuracy": "lambada_acc"}, _DIFFULLAMA),
    ),
    Task(
        name="gsm8k",
        kind=GENERATE,
        split="test",
        files=("main/test-*.parquet", "test-*.parquet", "test.jsonl", "gsm_test.json"),
        shots_files=("main/train-*.parquet", "train-*.parquet", "train.jsonl", "gsm8k_train.jsonl"),
        fields=(Field("question", others=("instruction",)), Field("answer", others=("output",))),
        where="hub data set openai/gsm8k, config main, or test.jsonl, train.jsonl of "
              "openai/grade-school-math",
        hub=("openai/gsm8k", ("main/test-*.parquet", "main/train-*.parquet")),
        metrics=("accuracy", "strict_match", "flexible_match"),
        cells=_published({"accuracy": "gsm8k_finetuned_acc"}, _DIFFULLAMA),
        context="{question}",
    ),
    _code("humaneval_infilling", "HumanEval-SingleLineInfilling",
          _published({"pass@1": "humaneval_single_line_infill_pass1"}, _DIFFULLAMA)),
    _code("humaneval_infilling_multi", "HumanEval-MultiLineInfilling"),
    _code("humaneval_infilling_random_span", "HumanEval-RandomSpanInfilling"),
    _code("humaneval_infilling_light", "HumanEval-RandomSpanInfillingLight"),
    Task(
        name="pile",
        kind=PERPLEXITY,
        split="validation",
        files=("val.jsonl.zst", "test.jsonl.zst", "pile_val.jsonl.zst", "pile_val.jsonl"),
        fields=(Field("text"),),
        where="val.jsonl.zst of hub data set monology/pile-uncopyrighted",
        hub=("monology/pile-uncopyrighted", ("val.jsonl.zst",)),
        metrics=("ppl_cond", "ppl_full", "bits_per_byte"),
        cells=tuple((f"ppl_{order}_{length}", "a3_table2_conditional_ppl", f"ppl_{order}_{length}")
                    for order in ("random", "confidence", "entropy") for length in (512, 1024)),
    ),
    Task(
        name="unconditional", kind=PERPLEXITY, split="none", files=(), fields=(),
        where="no file: the model writes from nothing", metrics=("ppl", "unigram_entropy", "distinct_2"),
    ),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_named(name: str) -> Task:
    """Returns the task of a name."""
    if name not in TASKS:
        message = f"no task {name!r}{nearest(name, TASKS) or '; known are ' + ', '.join(TASKS)}"
        raise InputError(message, field="tasks")
    return TASKS[name]


def task_records() -> list[dict]:
    """Returns what `--list` prints about each task, as plain JSON."""
    return [
        {
            "task": task.name,
            "kind": task.kind,
            "split": task.split,
            "rows": task.limit,
            "files": list(task.file_names),
            "columns": [field.name for field in task.fields if field.required],
            "labels_file": list(task.labels_file) if task.labels_file else None,
            "where": task.where,
            "metrics": list(task.metrics),
            "tables": [list(cell) for cell in task.cells],
        }
        for task in TASKS.values()
    ]
