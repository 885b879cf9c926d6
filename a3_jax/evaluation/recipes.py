"""The rows of the paper's tables as data: which model, and the commands that make and evaluate it.

A row has a name, under which its results lie: `a3 eval ... --results=RESULTS/a3-1b` wrote RESULTS/a3-1b/.
"""

import dataclasses
import shlex

from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.tasks.catalogue import PERPLEXITY, TASKS, Task

ALL = "all"
EVALUATOR = "Llama-3.1-8B"
DATA_DIR = "data"
_ROWS_OF_TEXT = "fineweb-2048"


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A model of the tables.

    Attributes:
      name: of the directory of its results.
      model: kind of model, as in `a3 eval --model`; None: cited alone, this code can't run it.
      checkpoint: what `a3 eval` is given.
      commands: that make the checkpoint.
      needs: what the commands take, one text each.
      why_cited: of a row that is cited alone.
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
      name: as in `a3 reproduce NAME`. key: in `paper_tables.json` and `tasks.Task.cells`.
      title: what it shows.
      rows: (name of a `TableRow`, its model's name in the paper), from top to bottom.
      lower_is_better: of its figures.
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
        """(task, metric of its results, metric in the paper) of the columns, from left to right."""
        return tuple(
            (task, metric, name)
            for task in TASKS.values()
            for metric, key, name in task.cells
            if key == self.key
        )


def _llama(name: str) -> str:
    return f"{name} from huggingface.co/meta-llama (safetensors; gated: Meta's licence)"


def _trained(name: str, config: str, source: str, hardware: str) -> TableRow:
    """A row that is adapted from a left-to-right model."""
    run, start = f"runs/{name}", f"{source}-a3".lower()
    return TableRow(
        name=name,
        model="a3",
        checkpoint=run,
        commands=(
            f"a3 convert {source} {start}",
            f"a3 data prepare 'fineweb/*.parquet' {_ROWS_OF_TEXT} --tokenizer={source} --seq_len=2048 "
            "--holdout=1000",
            f"a3 train --config=configs/{config}.py --workdir={run} --config.init_from={start} "
            f"--config.data={_ROWS_OF_TEXT}",
        ),
        needs=(
            _llama(source),
            "2.0e9 tokens of FineWeb (huggingface.co/datasets/HuggingFaceFW/fineweb, parquet)",
            f"{hardware}; hours not measured",
        ),
    )


_V5E_64 = "v5e:8x8 (64 chips of 16 GiB)"
ROWS: dict[str, TableRow] = {
    row.name: row
    for row in (
        TableRow("llama-3.1-8b", "ar", "Llama-3.1-8B", needs=(_llama("Llama-3.1-8B"),)),
        TableRow(
            "plaid-1b",
            None,
            why_cited="continuous diffusion, which this code does not run; the paper copies its figures too",
        ),
        TableRow(
            "dream-7b",
            "masked_diffusion",
            "Dream-v0-Base-7B",
            needs=("Dream-v0-Base-7B from huggingface.co/Dream-org (safetensors)",),
        ),
        TableRow(
            "diffullama-7b",
            "masked_diffusion",
            "diffullama",
            needs=("diffullama from huggingface.co/diffusionfamily (safetensors)",),
        ),
        _trained("a3-1b", "a3_llama32_1b", "Llama-3.2-1B", "v5e:4x4 (16 chips of 16 GiB)"),
        _trained("a3-3b", "a3_llama32_3b", "Llama-3.2-3B", _V5E_64),
        _trained("a3-8b", "a3_llama31_8b", "Llama-3.1-8B", "v5p:4x4x4 (64 chips of 95 GiB)"),
        _trained("a3-three-stages", "a3_ablation_three_stages", "Llama-3.2-3B", _V5E_64),
        _trained("a3-last-stage", "a3_ablation_last_stage", "Llama-3.2-3B", _V5E_64),
    )
}

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
    """The table of a name, or all of them.

    Raises:
      InputError: no such table; with the nearest name.
    """
    known = [*PAPER_TABLES, ALL]
    if name not in known:
        message = f"no table {name!r}{nearest(name, known) or '; known are ' + ', '.join(known)}"
        raise InputError(message, field="TABLE")
    return list(PAPER_TABLES.values()) if name == ALL else [PAPER_TABLES[name]]


def evaluation_command(row: TableRow, tasks, profile: str, results: str) -> str:
    """The command that evaluates a row on tasks, into its directory of results."""
    words = ["a3", "eval", row.checkpoint, f"--tasks={','.join(task.name for task in tasks)}"]
    words += [f"--data_dir={DATA_DIR}", f"--profile={profile}", f"--results={results.rstrip('/')}/{row.name}"]
    if row.model != "a3":
        words.append(f"--model={row.model}")
    if any(task.kind == PERPLEXITY for task in tasks):
        words.append(f"--evaluator={EVALUATOR}")
    return shlex.join(words)


def needs(row: TableRow, tasks) -> list[str]:
    """What the commands of a row and `evaluation_command` take, data files of the tasks apart."""
    found = list(row.needs)
    if any(task.kind == PERPLEXITY for task in tasks):
        found.append(f"as the evaluator, {_llama(EVALUATOR)}")
    return found


def data_files(tasks) -> list[str]:
    """The data file of each task and where people get it; `a3 eval --list` tells its other names."""
    return [f"{DATA_DIR}/{task.name}/{task.files[0]}: {task.where}" for task in tasks if task.files]
