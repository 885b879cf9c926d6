"""`a3 eval` and `a3 reproduce`: flags and tables around `runner.evaluate` and `reproduce.compare`."""

import dataclasses
import json
import sys
import textwrap
from typing import Any

from a3_jax.decoding.options import DTYPES, GenerateOptions
from a3_jax.errors import EXIT_OK, InputError

_EVAL_EPILOG = """\
Each task's result is a JSON file in --results with every setting that its figures depend on, and the
records of its examples beside it. The same command again runs what is missing: an interrupted or killed
run continues where it was. Nothing is downloaded unless --download is given.

profiles:
  a3_best_guess      data and metrics of the DiffuLLaMA scripts, A3's own way of scoring (default)
  diffullama_script  the released scripts of DiffuLLaMA, oddities and all
  diffullama_paper   the same where its paper says otherwise

examples:
  a3 eval --list --data_dir=data
  a3 eval llama-a3 --tasks=hellaswag,piqa,lambada --data_dir=data --results=results/llama-a3
  a3 eval llama-a3 --tasks=pile --data_dir=data --evaluator=Llama-3.1-8B --limit=64
  a3 eval llama-a3 --tasks=rocstories --data_dir=data --strategy=dynamic --criterion=entropy
  a3 eval llama-a3 --tasks=piqa --data_dir=data --scorer=mc_order:draws=32 --set=rule.piqa=per_token
  a3 eval Llama-3.2-1B --model=ar --tasks=lm_eval:hellaswag --data_dir=data
"""

_REPRODUCE_EPILOG = """\
examples:
  a3 reproduce table1 --results=results              the paper's figures beside those in results/ROW/
  a3 reproduce all --results=results --markdown > tables.md
  a3 reproduce table1 --results=results --json | jq '.tables[0].rows[] | {row, commands}'

results: one directory per row, which a3 eval writes into:
  a3 eval Llama-3.1-8B --model=ar --tasks=hellaswag --data_dir=data --results=results/llama-3.1-8b
rows: llama-3.1-8b dream-7b diffullama-7b a3-1b a3-3b a3-8b a3-three-stages a3-last-stage
Any other directory is a row of your own below the paper's.
"""

_NOT_FOR_TASKS = ("model", "dtype", "bos", "num_samples", "rerank", "stop_at_eos", "seed")
DECODING_FLAGS = {
    field.name: field.type
    for field in dataclasses.fields(GenerateOptions)
    if field.name not in _NOT_FOR_TASKS
}
_TYPES: dict[Any, Any] = {int: int, float: float, float | None: float}


def add_eval(subparsers) -> None:
    """Adds `a3 eval`."""
    parser = subparsers.add_parser(
        "eval", help="benchmark tasks, with where every number comes from",
        description="Evaluates a checkpoint on the tasks of the published tables.", epilog=_EVAL_EPILOG
    )  # fmt: skip
    parser.set_defaults(run=run_eval)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="A3 checkpoint, run or Hugging Face directory"
    )

    def option(name, metavar, help_text, **more):
        parser.add_argument(f"--{name}", metavar=metavar, help=help_text, **more)

    def switch(name, help_text):
        parser.add_argument(f"--{name}", action="store_true", help=help_text)

    option("tasks", "A,B,...", "names of --list, or lm_eval:NAME of lm-evaluation-harness")
    option("data_dir", "DIR", "where task files are, in DIR/TASK or DIR")
    option("profile", "NAME", "the protocol of prompts and grading; default a3_best_guess",
           default="a3_best_guess")  # fmt: skip
    option("results", "DIR", "where results go; default results", default="results")
    option("limit", "N", "rows per task; default: as many as the published figures have", type=int)
    option("samples", "K", "completions per row, for pass@k; default 1", type=int, default=1)
    option("evaluator", "CHECKPOINT", "the left-to-right model that scores texts of pile and unconditional")
    option("set", "SWITCH=VALUE", "a switch of the profile, such as rule.piqa=sum or pile.samples=64; may be "
           "given several times", action="append", default=[])  # fmt: skip
    switch("allow_code_execution", "run programs that the model wrote")
    switch("download", "download missing files from the hub")
    switch("list", "list the tasks, their files, and which of them are there")
    switch("json", "print JSON")
    option("model", "a3|ar|masked_diffusion", "how the checkpoint is run; default: by the checkpoint")
    option("scorer", "NAME[:OPTION=VALUE,...]", "how choices are scored: chain, chain_s, ctx0_chain, "
           "one_shot, mc_order or mask32; default: the profile's")  # fmt: skip
    option("seed", "N", "seed of all that is drawn; default 0", type=int, default=0)
    option("batch_size", "N", "requests per batch at most; default: as many as their rows allow", type=int)
    option("dtype", "|".join(DTYPES), "default float32 on CPU, bfloat16 on accelerators")
    option("mesh", "AXIS=N,...", "devices along data, fsdp and tensor; default: one device")
    decoding = parser.add_argument_group("decoding, in place of the profile's options; see `a3 generate`")
    for name, kind in DECODING_FLAGS.items():
        decoding.add_argument(f"--{name}", type=_TYPES.get(kind, str), metavar="X")
    decoding.add_argument("--sampler", metavar="NAME", help="of masked-diffusion models")
    decoding.add_argument("--steps", metavar="N|length", help="forwards of a sampler at most")


def add_reproduce(subparsers) -> None:
    """Adds `a3 reproduce`."""
    parser = subparsers.add_parser(
        "reproduce",
        help="the paper's tables beside your results, and what would run the rest",
        description="Prints a table of the paper: in each cell the published figure, ours with its standard "
        "error, and their difference in standard errors; or that it was not run, with the commands that "
        "would run it and what they need. Runs nothing itself.",
        epilog=_REPRODUCE_EPILOG,
    )
    parser.set_defaults(run=run_reproduce)
    parser.add_argument("table", metavar="TABLE", help="table1, table2, table3 or all")
    parser.add_argument(
        "--results", required=True, metavar="DIR", help="directory with one directory per row"
    )
    parser.add_argument(
        "--profile", default="a3_best_guess", metavar="P",
        help="profile of the results that count (default: %(default)s)",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as Markdown")
    form.add_argument("--json", action="store_true", help="as JSON; docs/evaluation.md lists the fields")


def run_eval(args) -> int:
    """Runs `a3 eval`; returns the exit status."""
    if args.list:
        return _list(args)
    for name in ("checkpoint", "tasks"):
        if not getattr(args, name):
            missing = "CHECKPOINT" if name == "checkpoint" else "--tasks"
            raise InputError(f"{missing} is missing; `a3 eval --list` tells of the tasks", file="a3 eval")
    try:
        results = _evaluate(args)
    except InputError as error:
        if error.file is None and error.field is not None:
            error.file, error.field = "a3 eval", f"--{error.field}"
        raise
    if args.json:
        print(json.dumps([result.to_dict() for result in results], indent=2, ensure_ascii=False))
    else:
        _show(results, args.results)
    return EXIT_OK


def run_reproduce(args) -> int:
    """Reads results, compares and prints them; returns the exit status."""
    from a3_jax.evaluation.paper_tables import tables_named
    from a3_jax.evaluation.reproduce import compare, markdown, show

    comparisons = [compare(table, args.results, args.profile) for table in tables_named(args.table)]
    if args.json:
        print(json.dumps({"tables": [comparison.to_dict() for comparison in comparisons]}, indent=2))
    elif args.markdown:
        print("\n".join(markdown(comparison) for comparison in comparisons), end="")
    else:
        for number, comparison in enumerate(comparisons):
            print("\n" if number else "", end="")
            show(comparison)
    return EXIT_OK


def _evaluate(args):
    from a3_jax.decoding.command import mesh_of
    from a3_jax.evaluation.runner import evaluate
    from a3_jax.runtime.preemption import StopRequest

    scorer, _, options = (args.scorer or "").partition(":")
    generate = {name: getattr(args, name) for name in (*DECODING_FLAGS, "sampler", "steps")}
    if generate["steps"] is not None and generate["steps"].isdecimal():
        generate["steps"] = int(generate["steps"])
    with StopRequest() as stop:

        def tell(line):
            stop.anything_to_save = True  # from here on a stop waits for the chunk
            print(f"a3 eval: {line}", file=sys.stderr, flush=True)

        return evaluate(
            args.checkpoint,
            [name for name in args.tasks.split(",") if name],
            args.data_dir,
            args.profile,
            args.results,
            model=args.model,
            scorer=None if args.scorer is None else scorer,
            scorer_options=dict(_switch(option) for option in options.split(",") if option),
            generate={name: value for name, value in generate.items() if value is not None},
            switches=dict(_switch(text) for text in args.set),
            limit=args.limit,
            samples=args.samples,
            seed=args.seed,
            batch_size=args.batch_size,
            dtype=args.dtype,
            mesh=mesh_of(args),
            evaluator=args.evaluator,
            allow_code_execution=args.allow_code_execution,
            download=args.download,
            stop=lambda: bool(stop),
            tell=tell,
        )


def _switch(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE; the value is JSON, else a text."""
    name, found, value = text.partition("=")
    if not found or not name:
        raise InputError(f"expected NAME=VALUE, got {text!r}", file="a3 eval")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _list(args) -> int:
    """Prints the tasks, and which of their files are there."""
    from a3_jax.evaluation.tasks.catalogue import TASKS, task_records
    from a3_jax.evaluation.tasks.files import find_data

    found = {}
    for name, task in TASKS.items():
        try:
            found[name] = [str(path) for path in find_data(task, args.data_dir).paths]
        except InputError:
            found[name] = None
    if args.json:
        print(json.dumps([it | {"found": found[it["task"]]} for it in task_records()], indent=2))
        return EXIT_OK
    for it in task_records():
        paths = found[it["task"]]
        here = "not found" if paths is None else ", ".join(paths) or "needs none"
        first = f", first {it['rows']:,} rows" if it["rows"] else ""
        print(f"{it['task']}: {it['split']}{first}")
        for name, value in {**it, "here": here}.items():
            if name in ("files", "columns", "where", "here"):
                text = ", ".join(value) if isinstance(value, list) else value
                print(textwrap.fill(text, 100, initial_indent=f"  {name:9}", subsequent_indent=" " * 11))
        print()
    where = f"in {args.data_dir}/TASK or {args.data_dir}" if args.data_dir else "with --data_dir=DIR"
    print(f"Files are looked for {where}. Also lm_eval:NAME, any task of lm-evaluation-harness, whose files "
          "are\nDATA_DIR/NAME/SPLIT.jsonl (.parquet, .csv).")  # fmt: skip
    return EXIT_OK


def _show(results, directory) -> None:
    from a3_jax.console import print_table

    rows = []
    for result in results:
        skipped = sum(result.skipped.values())
        for number, (metric, figure) in enumerate(result.figures.items()):
            error = "" if figure.standard_error is None else f"{figure.standard_error:.2f}"
            head = (result.task, f"{result.examples:,}", f"{skipped:,}") if not number else ("", "", "")
            rows.append((*head, metric, f"{figure.value:.2f}", error))
    headings = ("task", "examples", "skipped", "metric", "value", "standard error")
    origin = results[0].checkpoint["path"] or "model"
    print_table(f"{origin}, profile {results[0].profile}", rows, headings, f"results in {directory}")
    for result in results:
        for note in result.notes:
            print(f"{result.task}: {note}")
