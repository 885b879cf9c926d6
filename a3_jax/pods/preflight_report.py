"""What preflight found: the object of `--json`, and the same for people."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from a3_jax.console import print_table
from a3_jax.model.config import ModelConfig
from a3_jax.pods.aot_compile import Compiled
from a3_jax.pods.collectives import read_collectives, traffic
from a3_jax.pods.estimates import (
    accelerator_of,
    describe,
    estimate_memory,
    estimate_times,
    estimate_traffic,
    step_flops,
)
from a3_jax.pods.search import Candidate, advice
from a3_jax.pods.topologies import Pod, parallel_config_of
from a3_jax.training.config import RunConfig

_GIB = 2**30
_SHOWN = 12  # candidates of a search


def make_report(
    run: RunConfig, model: ModelConfig, pod: Pod, compiled: Sequence[Compiled], asked: Sequence[str]
) -> dict[str, Any]:
    """Returns what `--json` prints, bytes and seconds.

    Args:
      run, model, pod: what was compiled for where.
      compiled: the programs, train steps first; the one that needs most decides.
      asked: names of the others.
    """
    layout, capacity = parallel_config_of(run, pod), accelerator_of(pod).memory_bytes
    steps = [program for program in compiled if program.name.startswith("train")]
    worst = max(steps, key=lambda program: (bool(program.refused), program.total))
    objective = worst.name.split()[1]
    memory = estimate_memory(run, model, layout, objective)
    fits = not any(program.refused or program.total > capacity for program in compiled)
    collectives = traffic(read_collectives(worst.text, pod.slice.chips, pod.slices))
    sent = {network: sum(row[network] for row in collectives.values()) for network in ("ici", "dcn")}
    if not worst.text:
        sent = dict(zip(sent, estimate_traffic(run, model, layout, pod), strict=True))
    times = estimate_times(run, model, layout, pod, **sent, objective=objective)
    return {
        "fits": fits,
        "topology": pod.slice.name, "slices": pod.slices, "chips": pod.chips,
        "layout": dataclasses.asdict(layout),
        "batch": {"rows": run.batch_size, "length": run.seq_len, "steps": run.total_steps},
        "per_chip": {
            "parameters": memory.parameters, "optimizer": memory.optimizer,
            "activations": memory.activations, **worst.bytes, "capacity": capacity,
        },
        "formula": {**dataclasses.asdict(memory), "total": memory.total},
        "deviation": _deviations(run, layout, memory, worst),
        "flops_per_step": step_flops(run, model, objective),
        "collectives": collectives if worst.text else {},
        "estimate": {
            **describe(times, run, model, pod, objective), "traffic": "program" if worst.text else "formula",
        },
        "programs": {
            program.name: {**program.bytes, "refused": program.refused, "compiled_in": program.seconds}
            for program in compiled
        },
        "advice": [] if fits else describe_candidates(advice(run, model, pod, layout, objective)),
        "model": model.to_dict(),
        "asked": list(asked),
    }  # fmt: skip


def _deviations(run, layout, memory, step: Compiled) -> dict[str, float]:
    """Returns the formula over the compiler, less 1: of parameters with optimiser, and of the total."""
    if step.refused:
        return {}
    fields = 5  # of a batch, 4 bytes each (`training.step.Batch`)
    batch = fields * 4 * run.batch_size * run.seq_len / (layout.data * layout.fsdp)
    return {"state": memory.state / (step.arguments - batch) - 1, "total": memory.total / step.total - 1}


def describe_candidates(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Candidates of a search: layout, bytes and seconds by formula, the flags that ask for it."""
    return [
        {
            "layout": dataclasses.asdict(candidate.layout), "total": candidate.memory.total,
            "step_seconds_at_least": candidate.times.bound, "limited_by": candidate.times.limit,
            "fits": candidate.fits, "flags": candidate.layout.flags,
        }
        for candidate in candidates
    ]  # fmt: skip


def show(report: dict[str, Any], as_json: bool) -> None:
    """Prints a report: one JSON object, or tables with the verdict last."""
    if as_json:
        print(json.dumps(report))
        return
    if "search" in report:
        _show_search(report["search"])
    if "per_chip" in report:
        _show_memory(report)
        _show_programs(report["programs"])
        if report["collectives"]:
            _show_traffic(report["collectives"])
        _show_estimate(report)
        for note in report["notes"]:
            print(note)
    print(_verdict(report))


def _show_memory(report) -> None:
    chip, formula = report["per_chip"], report["formula"]
    resident = chip["arguments"] + chip["outputs"] - chip["aliases"]  # 0: refused
    rows = [
        ("parameters", _gib(formula["parameters"]), ""),
        ("optimiser", _gib(formula["optimizer"]), ""),
        (
            "parameters, optimiser, batch",
            _gib(formula["parameters"] + formula["optimizer"]),
            _gib(resident) if resident else "",
        ),
        ("activations kept", _gib(formula["activations"]), ""),
        ("gradients", _gib(formula["gradients"]), ""),
        ("a layer at work", _gib(formula["layer"]), ""),
        ("head and embeddings", _gib(formula["head"]), ""),
        ("temporaries, all of these", _gib(_temporaries(formula)), _gib(chip["temporaries"])),
        ("program", "", _gib(chip["code"])),
        ("total", _gib(formula["total"]), _gib(chip["total"])),
        ("memory of the chip", "", _gib(chip["capacity"])),
    ]
    where = f"{report['slices']} x {report['topology']}" if report["slices"] > 1 else report["topology"]
    layout = ", ".join(f"{name} {value}" for name, value in report["layout"].items())
    cached = " (from the cache)" if report.get("cached") else ""
    title = f"GiB a chip of {where}{cached}: {layout}"
    caption = "; ".join(f"{name}: formula {value:+.1%}" for name, value in report["deviation"].items())
    print_table(title, rows, ("", "formula", "compiler"), caption and f"of the compiler's {caption}")


def _temporaries(formula) -> int:
    return sum(formula[name] for name in ("gradients", "activations", "layer", "head"))


def _show_programs(programs) -> None:
    rows = [
        (name, "refused" if program["refused"] else _gib(program["total"]), f"{program['compiled_in']:.0f} s")
        for name, program in programs.items()
    ]
    print_table("programs", rows, ("", "GiB a chip", "compiled in"))


def _show_traffic(collectives) -> None:
    rows = [
        (kind, f"{row['count']:,.0f}", f"{row['ici'] / 1e6:,.1f}", f"{row['dcn'] / 1e6:,.1f}")
        for kind, row in collectives.items()
        if row["count"]
    ]
    print_table("a chip sends in a step, MB", rows, ("", "times", "in its slice", "beyond"))


def _show_estimate(report) -> None:
    estimate = report["estimate"]
    rows = [
        ("model FLOPs", f"{report['flops_per_step']:.3g}"),
        *((part, f"{estimate[f'{part}_seconds']:.3g} s") for part in ("compute", "memory", "ici", "dcn")),
        ("step, at least", f"{estimate['step_seconds_at_least']:.3g} s, by {estimate['limited_by']}"),
        ("utilisation, at most", f"{estimate['utilization_at_most']:.0%}"),
        (
            f"run of {report['batch']['steps']} steps",
            f"{estimate['chip_hours_at_least']:,.0f} chip-hours at least",
        ),
    ]
    caption = "bounds at the published rates, not predictions; nothing has run"
    if estimate["traffic"] == "formula":
        caption += "; no program to read, so ici and dcn are by formula"
    print_table("estimate of a step", rows, caption=caption)


def _show_search(found) -> None:
    rows = [
        (
            " x ".join(str(each["layout"][axis]) for axis in ("data", "fsdp", "tensor")),
            str(each["layout"]["microbatches"]), each["layout"]["remat"], _gib(each["total"]),
            f"{each['step_seconds_at_least']:.3g}", "yes" if each["fits"] else "no",
        )
        for each in found["candidates"][:_SHOWN]
    ]  # fmt: skip
    headings = ("data x fsdp x tensor", "microbatches", "remat", "GiB", "seconds", "fits")
    print_table(f"the best of {len(found['candidates'])} layouts, by formula", rows, headings)
    for tried in found["compiled"]:
        print(f"{'fits' if tried['fits'] else 'refused'}: {' '.join(tried['flags'])}")


def _verdict(report) -> str:
    if "per_chip" not in report:
        return "does not fit: no layout fits by formula"
    chip = report["per_chip"]
    share = f"{_gib(chip['total'])} of {_gib(chip['capacity'])} GiB a chip"
    if report["fits"]:
        return f"fits: {share}"
    refusals = [f"{name}: {each['refused']}" for name, each in report["programs"].items() if each["refused"]]
    if refusals:
        share = f"at least {share}" if chip["total"] else f"{_gib(report['formula']['total'])} by formula"
    lines = [*refusals, f"does not fit: {share}"]
    for each in report["advice"]:
        lines.append(f"would fit by formula ({_gib(each['total'])} GiB): {' '.join(each['flags'])}")
    if not report["advice"]:
        lines.append("nothing that mesh, microbatches and remat can do would make it fit: take more chips")
    return "\n".join(lines)


def _gib(count: float) -> str:
    return f"{count / _GIB:.2f}"
