"""The paper's tables as data: published figures, and for each row the commands that make and evaluate it.

A row's name is the directory of its results: `a3 eval ... --results=RESULTS/a3-1b` writes RESULTS/a3-1b/.
The figures are in `paper_tables.json`, each with its source and how certain it is.
"""

import dataclasses
import functools
import importlib.resources
import json
import shlex

from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.tasks.catalogue import PERPLEXITY, TASKS, Task

SUSPECT, COPIED = "suspect", "copied"  # of the statuses
_ALL = "all"
_EVALUATOR, _DATA_DIR, _TRAINING_ROWS = "Llama-3.1-8B", "data", "fineweb-2048"


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of a table.

    Attributes:
      table, model, metric: its place; metrics as in `catalogue.Task.cells`.
      value, unit: as printed; percent are points.
      source: key of `sources`.
      status: key of `statuses`.
      note: what is odd about it; "" for nothing.
    """

    table: str
    model: str
    metric: str
    value: float
    unit: str
    source: str
    status: str
    note: str = ""


@functools.cache
def _file() -> dict:
    text = importlib.resources.files("a3_jax.evaluation").joinpath("paper_tables.json")
    return json.loads(text.read_text(encoding="utf-8"))


def sources() -> dict[str, str]:
    """Returns what the sources are, by key."""
    return dict(_file()["sources"])


def statuses() -> dict[str, str]:
    """Returns what "read", "quoted", "copied" and so on mean for a figure."""
    return dict(_file()["statuses"])


@functools.cache
def published_figures() -> tuple[Published, ...]:
    """Returns all published figures, in the order of the tables."""
    return tuple(Published(**entry) for entry in _file()["entries"])


def published(table: str) -> dict[tuple[str, str], Published]:
    """Returns the figures of a table by (model, metric)."""
    return {(each.model, each.metric): each for each in published_figures() if each.table == table}


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A model of the tables.

    Attributes:
      name: name of the directory of its results.
      model: kind of model, as in `a3 eval --model`; None: only cited, this code can't run it.
      checkpoint: the checkpoint to evaluate.
      commands: commands that make the checkpoint.
      needs: what the commands need, one text each.
      why_cited: why a row is only cited.
    """

    name: str
    model: str | None
    checkpoint: str = ""
    commands: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    why_cited: str = ""


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table.

    Attributes:
      name: as in `a3 reproduce NAME`.
      key: as in `paper_tables.json` and `catalogue.Task.cells`.
      title: what it shows.
      rows: (name of a `TableRow`, its model's name in the paper), from top to bottom.
      lower_is_better: whether lower figures are better.
      notes: what a reader must know.
    """

    name: str
    key: str
    title: str
    rows: tuple[tuple[str, str], ...]
    lower_is_better: bool = False
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[tuple[Task, str, str], ...]:
        """(task, metric of its results, metric in the paper) for each column, from left to right."""
        return tuple(
            (task, metric, name)
            for task in TASKS.values()
            for metric, key, name in task.cells
            if key == self.key
        )


def _llama(name: str) -> str:
    return f"{name} from huggingface.co/meta-llama (safetensors; gated: Meta's licence)"


def _trained(name: str, config: str, source: str, hardware: str) -> TableRow:
    """Makes a row whose model is adapted from a left-to-right one."""
    run, start = f"runs/{name}", f"{source}-a3".lower()
    return TableRow(
        name=name,
        model="a3",
        checkpoint=run,
        commands=(
            f"a3 convert {source} {start}",
            f"a3 data prepare 'fineweb/*.parquet' {_TRAINING_ROWS} --tokenizer={source} --seq_len=2048 "
            "--holdout=1000",
            f"a3 train --config=configs/{config}.py --workdir={run} --config.init_from={start} "
            f"--config.data={_TRAINING_ROWS}",
        ),
        needs=(
            _llama(source),
            "2.0e9 tokens of FineWeb (huggingface.co/datasets/HuggingFaceFW/fineweb, parquet)",
            f"{hardware}; hours not measured",
        ),
    )


_V5E_64 = "v5e:8x8 (64 chips of 16 GiB)"
_ROWS = (
    TableRow("llama-3.1-8b", "ar", "Llama-3.1-8B", needs=(_llama("Llama-3.1-8B"),)),
    TableRow("plaid-1b", None, why_cited="continuous diffusion, which this code does not run; the paper "
             "copies its figures too"),
    TableRow("dream-7b", "masked_diffusion", "Dream-v0-Base-7B",
             needs=("Dream-v0-Base-7B from huggingface.co/Dream-org (safetensors)",)),
    TableRow("diffullama-7b", "masked_diffusion", "diffullama",
             needs=("diffullama from huggingface.co/diffusionfamily (safetensors)",)),
    _trained("a3-1b", "a3_llama32_1b", "Llama-3.2-1B", "v5e:4x4 (16 chips of 16 GiB)"),
    _trained("a3-3b", "a3_llama32_3b", "Llama-3.2-3B", _V5E_64),
    _trained("a3-8b", "a3_llama31_8b", "Llama-3.1-8B", "v5p:4x4x4 (64 chips of 95 GiB)"),
    _trained("a3-three-stages", "a3_ablation_three_stages", "Llama-3.2-3B", _V5E_64),
    _trained("a3-last-stage", "a3_ablation_last_stage", "Llama-3.2-3B", _V5E_64),
)  # fmt: skip
ROWS: dict[str, TableRow] = {row.name: row for row in _ROWS}

_QUOTED = "The paper's figures stand here as public reading notes quote them (docs/evaluation.md)."
_TOKENS = (
    "The main A3 rows saw 8B tokens by one account, 2B by another, with the same figures; "
    "the configs train on 2B."
)
PAPER_TABLES: dict[str, PaperTable] = {
    table.name: table
    for table in (
        PaperTable(
            name="table1",
            key="a3_table1",
            title="A3, table 1: question answering, commonsense reasoning, infilling",
            rows=(
                ("llama-3.1-8b", "Llama-3.1-8B"),
                ("plaid-1b", "Plaid-1B"),
                ("dream-7b", "Dream-7B"),
                ("diffullama-7b", "DiffuLlama-7B"),
                ("a3-1b", "A3-1B"),
                ("a3-3b", "A3-3B"),
                ("a3-8b", "A3-8B"),
            ),
            notes=(
                _QUOTED,
                _TOKENS,
                "TriviaQA's exact match counts an answer that contains a normalised alias; multiple choice "
                "goes by the profile's rule: acc and acc_norm of the harness are those of task lm_eval:NAME.",
                "Dream-7B near chance on HellaSwag (26.9, chance 25) is far below what its authors report by "
                "their own rules: no figure to aim at.",
            ),
        ),
        PaperTable(
            name="table2",
            key="a3_table2_conditional_ppl",
            title="A3, table 2: conditional perplexity on The Pile under Llama-3.1-8B, lower is better",
            rows=(("dream-7b", "Dream-7B"), ("diffullama-7b", "DiffuLlama-7B"), ("a3-8b", "A3-8B")),
            lower_is_better=True,
            notes=(
                _QUOTED,
                "Not known of it: prompts, their length and number, temperature, whether 512 and 1024 are "
                "lengths or steps. Ours: whole texts of that length; the profile's `pile` settings are our "
                "proposal.",
            ),
        ),
        PaperTable(
            name="table3",
            key="a3_table3_curriculum",
            title="A3, table 3: the curriculum, and its last stage alone",
            rows=(
                ("a3-three-stages", "A3 three-stage curriculum (2B tokens)"),
                ("a3-last-stage", "A3 skip stages 1&2 (2B tokens)"),
            ),
            notes=(
                _QUOTED,
                "The size of the model is not stated, and the row equals none of table 1; the configs take "
                "Llama-3.2-3B, whose row is nearest.",
            ),
        ),
    )
}


def tables_named(name: str) -> list[PaperTable]:
    """Returns the table of a name, or all of them."""
    known = [*PAPER_TABLES, _ALL]
    if name not in known:
        message = f"no table {name!r}{nearest(name, known) or '; known are ' + ', '.join(known)}"
        raise InputError(message, field="TABLE")
    return list(PAPER_TABLES.values()) if name == _ALL else [PAPER_TABLES[name]]


def evaluation_command(row: TableRow, tasks, profile: str, results: str) -> str:
    """Returns the command that evaluates a row on tasks, into its directory of results."""
    words = ["a3", "eval", row.checkpoint, f"--tasks={','.join(task.name for task in tasks)}"]
    words += [
        f"--data_dir={_DATA_DIR}",
        f"--profile={profile}",
        f"--results={results.rstrip('/')}/{row.name}",
    ]
    if row.model != "a3":
        words.append(f"--model={row.model}")
    if any(task.kind == PERPLEXITY for task in tasks):
        words.append(f"--evaluator={_EVALUATOR}")
    return shlex.join(words)


def needs(row: TableRow, tasks) -> list[str]:
    """Returns what the commands of a row and `evaluation_command` need, except for the data files."""
    found = list(row.needs)
    if any(task.kind == PERPLEXITY for task in tasks):
        found.append(f"as the evaluator, {_llama(_EVALUATOR)}")
    return found


def data_files(tasks) -> list[str]:
    """Returns the data file of each task and where people get it; `a3 eval --list` has its other names."""
    return [f"{_DATA_DIR}/{task.name}/{task.files[0]}: {task.where}" for task in tasks if task.files]
