"""The path from nothing to any-order text, each part through the functions that users call.

    WORKDIR/ar            training of the source model, left to right
    WORKDIR/source        that model as a Hugging Face directory
    WORKDIR/converted     the directory as an A3 checkpoint
    WORKDIR/a3            the curriculum, from the converted checkpoint
    WORKDIR/quickstart.json, curves.png, report.html

Run again in the same directory, it goes on where it stopped.
"""

import dataclasses
import json
import sys
import time
from typing import Any

from a3_jax.paths import as_path, read_json_lines, write_text
from a3_jax.quickstart import questions, report
from a3_jax.quickstart.config import BYTE_STEPS, SMOKE_STEPS, WORD_STEPS, text_run, tiny_run
from a3_jax.training.config import RunConfig

BLANKS = 2 * 252  # both kinds, half each; 252 = 7 for each of 12 values in 3 slots
SMOKE_BLANKS = 2 * 36


@dataclasses.dataclass(frozen=True)
class QuickstartPlan:
    """What is run.

    Attributes:
      run: AR stage and curriculum as one.
      blanks: how many are counted, both kinds together; 0 with the user's own text.
      text: the user's own text file, or None for the embedded stories.
    """

    run: RunConfig
    blanks: int
    text: str | None

    @classmethod
    def make(cls, *, smoke: bool, text: str | None) -> "QuickstartPlan":
        if text is not None:
            config, blanks = text_run(text, SMOKE_STEPS if smoke else BYTE_STEPS), 0
        else:
            config = tiny_run(SMOKE_STEPS if smoke else WORD_STEPS)
            blanks = SMOKE_BLANKS if smoke else BLANKS
        return cls(RunConfig.from_config(config.to_dict()), blanks, text)


@dataclasses.dataclass(frozen=True)
class QuickstartOutcome:
    """What came out.

    Attributes:
      figures: as `quickstart.json` holds them: "loss" in nats a predicted token on held-out text,
        "exact_match" as shares (None with the user's own text), "blanks", "seconds" (of this call).
      infillings: to read.
    """

    figures: dict[str, Any]
    infillings: list[questions.Infilling]


def quickstart(workdir, *, smoke: bool = False, text: str | None = None) -> QuickstartOutcome:
    """Walks the whole path and writes what came out.

    Args:
      workdir: directory for everything; a second run there goes on where the first one stopped.
      smoke: a few steps of everything, without any claim on the figures.
      text: a text file to use in place of the embedded stories, byte by byte.
    """
    begin = time.monotonic()
    workdir = as_path(workdir)
    plan = QuickstartPlan.make(smoke=smoke, text=text)
    _walk(plan.run, workdir)

    _say("filling blanks")
    a3, source = _open(workdir / "a3"), _open(workdir / "converted")  # the source's very weights
    infillings = questions.infillings(a3, source, _questions(plan))
    figures = {
        "loss": _losses(workdir / "a3" / "eval.jsonl"),
        "exact_match": None if plan.text else _exact_match(a3, source, plan.blanks),
        "blanks": plan.blanks,
        "seconds": round(time.monotonic() - begin, 1),
    }
    report.write(workdir, figures, infillings, plan.run)
    write_text(workdir / "quickstart.json", json.dumps(figures, indent=2) + "\n")
    return QuickstartOutcome(figures, infillings)


def _walk(run: RunConfig, workdir) -> None:
    """Training, export, conversion, adaptation; each is skipped where it is done already."""
    from a3_jax.checkpoints.conversion import convert
    from a3_jax.training.train import train

    source, converted = workdir / "source", workdir / "converted"
    ar_stages = tuple(stage for stage in run.stages if stage.objective == "ar")
    curriculum = tuple(stage for stage in run.stages if stage.objective != "ar")

    _say("1/4 training the source model, left to right")
    # No held-out losses: the adaptation measures the model that it begins with.
    train(dataclasses.replace(run, stages=ar_stages, eval_every=0).to_dict(), workdir / "ar")
    _say("2/4 writing it as a Hugging Face directory")
    if not source.exists():
        convert(workdir / "ar", source, to="hf", query_vector=False)  # as others publish theirs
    _say("3/4 converting that to an A3 checkpoint")
    if not converted.exists():
        convert(source, converted)
    _say("4/4 adapting it, from left to right to any order")
    train(dataclasses.replace(run, stages=curriculum, init_from=str(converted)).to_dict(), workdir / "a3")


def _open(directory):
    from a3_jax.checkpoints.loading import open_checkpoint

    return open_checkpoint(directory)


def _questions(plan: QuickstartPlan) -> list[questions.Question]:
    if plan.text is None:
        return questions.story_questions()
    from a3_jax.data.documents import read_documents
    from a3_jax.data.seqio_tasks import split_documents

    splits = split_documents(read_documents(plan.text), plan.run.holdout)
    return questions.text_questions(splits["heldout"] or splits["train"])


def _losses(file) -> dict[str, float | None]:
    """Before and after adaptation: random groups of the query stream, and the AR stream."""
    rows = read_json_lines(file)
    first, last = (rows[0], rows[-1]) if rows else ({}, {})
    return {
        "any_order_before": first.get("random"),
        "any_order_after": last.get("random"),
        "ar_before": first.get("ar"),
        "ar_after": last.get("ar"),
    }


def _exact_match(a3, source, blanks: int) -> dict[str, dict[str, float]]:
    from a3_jax.data.embedded import KINDS
    from a3_jax.data.embedded import blanks as held_out_blanks

    shares = {}
    for kind in KINDS:
        asked = held_out_blanks(kind, blanks // len(KINDS))
        shares[kind] = {
            "a3": questions.exact_match(a3, asked),
            "ar": questions.exact_match(source, asked, model="ar"),
        }
    return shares


def _say(text: str) -> None:
    print(f"quickstart: {text}", file=sys.stderr, flush=True)
