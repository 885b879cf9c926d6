"""`a3 preflight`: verdicts, bad input, what is kept and what is advised.

The compiler is a stand-in that tells a small story, but for the last tests: there it is the TPU's own, in
processes of their own.
"""

import dataclasses
import json
import pathlib

import jax
import pytest

from a3_jax.cli import main
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_OK, InputError
from a3_jax.model import accelerators
from a3_jax.pods import aot_compile, estimates
from a3_jax.pods.aot_compile import check_flags
from a3_jax.pods.estimates import estimate_memory
from a3_jax.pods.preflight import cache_file
from a3_jax.pods.search import advice, search
from a3_jax.pods.spec import config_hash
from a3_jax.pods.topologies import ParallelConfig, Pod, find_topology, parallel_config_of
from a3_jax.training import loss, setup
from a3_jax.training.config import RunConfig, model_config, read_run_config
from tests.test_collectives import LOOPS
from tests.tpu_programs import run_apart

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "seq_len": 128, "batch_size": 8, "microbatches": 2, "learning_rate": 1e-3, "dtype": "bfloat16",
        "remat": "dots", "init_from": "weights-elsewhere", "data": "rows-elsewhere",
        "model": {"vocab_size": 512, "d_model": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
                  "head_size": 64, "mlp_size": 256, "max_length": 128, "tie_embeddings": True},
        "stages": ({"name": "l2r", "steps": 9, "objective": "any_order",
                    "orders": ({"order": "l2r", "group_sizes": (1,)},)},),
    })
"""
# What the compiler says of a run that is too large, now and in an older version -> GiB.
REFUSED = {
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for"
    " HLO temporaries (31.85G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee ...": 31.85,
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G"
    " of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 20.75G:": 20.5,
}
ON_TPU = """
import sys
from a3_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny run; a home of its own, so that nothing is known from before."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "tiny.py"
    file.write_text(TINY)
    return file


class Story:
    """What a compiler says of a program: 4 KiB of temporaries, and one of each loop's collectives."""

    argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = 1000, 900, 800
    temp_size_in_bytes, generated_code_size_in_bytes = 4096, 50

    def memory_analysis(self):
        return self

    def as_text(self):
        return LOOPS


@pytest.fixture
def stories(monkeypatch):
    """CPU devices in the place of a pod's chips, and a stand-in for compiling; the steps it was given."""
    compiled, devices = [], jax.devices()

    def compile_step(run, model, mesh, objective, weight):
        setup.sharded_state(run, model, mesh)
        compiled.append((run.remat, dict(mesh.shape), objective))
        return Story()

    monkeypatch.setattr(aot_compile, "topology_devices", lambda topology, slices=1: devices[: 4 * slices])
    monkeypatch.setattr(aot_compile, "compile_step", compile_step)
    for name in aot_compile.COMPILER_FLAGS:
        monkeypatch.delenv(name, raising=False)
    return compiled


def preflight(config, *flags, topology="v5e:2x2"):
    return main(["preflight", f"--config={config}", f"--topology={topology}", *flags])


def with_memory(monkeypatch, size):
    """Chips of so many bytes."""
    chips = [dataclasses.replace(chip, memory_bytes=size) for chip in accelerators.ACCELERATORS]
    monkeypatch.setattr(estimates, "ACCELERATORS", chips)


def test_a_run_that_fits(config, stories, capsys):
    assert preflight(config, "--json") == EXIT_OK
    report = json.loads(capsys.readouterr().out)
    chip = report["per_chip"]
    assert report["fits"] and chip["total"] < chip["capacity"] == 16 * 2**30
    assert (
        chip["total"]
        == sum(chip[n] for n in ("arguments", "outputs", "temporaries", "code")) - chip["aliases"]
    )
    assert {"parameters", "optimizer", "activations"} <= set(chip)
    assert report["flops_per_step"] > 0 and report["collectives"]["all-gather"]["count"] == 16
    assert 0 < report["estimate"]["utilization_at_most"] <= 1
    assert [note.split(":")[0] for note in report["notes"]] == ["init_from", "data"]
    assert all("not checked: not found here" in note for note in report["notes"])


def test_known_from_before(config, stories, capsys):
    """Told again without compiling; compiled again when asked to, and when anything differs."""
    assert preflight(config, "--json") == EXIT_OK
    first = json.loads(capsys.readouterr().out)
    assert preflight(config, "--json") == EXIT_OK
    second = json.loads(capsys.readouterr().out)
    assert len(stories) == 1 and second.pop("cached") and not first.pop("cached") and first == second
    for more in (["--again"], ["--config.remat=block"], ["--programs=fingerprint"]):
        before = len(stories)
        assert preflight(config, *more) == EXIT_OK
        assert len(stories) > before, more
    assert "fits: " in capsys.readouterr().out.splitlines()[-1]


def test_what_launch_looks_for(config, stories):
    """The file that `a3 launch xpk --submit` reads has the hash of config, slices and code."""
    assert preflight(config) == EXIT_OK
    digest = config_hash(read_run_config(str(config), []), Pod(find_topology("v5e:2x2")))
    assert json.loads(cache_file(digest).read_text())["passed"] is True
    assert config_hash(read_run_config(str(config), []), Pod(find_topology("v5e:2x2"), 2)) != digest
    assert (
        config_hash(read_run_config(str(config), ["--config.seed=1"]), Pod(find_topology("v5e:2x2")))
        != digest
    )


def test_the_hash_covers_code_and_flags(config, monkeypatch):
    from a3_jax.runtime import versions

    def digest():
        return config_hash(read_run_config(str(config), []), Pod(find_topology("v5e:2x2")))

    before = digest()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=true")
    assert digest() != before
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    assert digest() == before
    monkeypatch.setattr(versions, "software", lambda: {"code": "another"})
    assert digest() != before


def test_a_run_that_does_not_fit(config, stories, capsys, monkeypatch):
    """Exit status 3 with what would do, kept as not passed."""
    with_memory(monkeypatch, 2**12)
    assert preflight(config) == EXIT_DOES_NOT_FIT
    assert "does not fit: " in capsys.readouterr().out
    digest = config_hash(read_run_config(str(config), []), Pod(find_topology("v5e:2x2")))
    assert json.loads(cache_file(digest).read_text())["passed"] is False
    assert preflight(config, "--json") == EXIT_DOES_NOT_FIT  # from the cache as well
    assert json.loads(capsys.readouterr().out)["cached"]


@pytest.mark.parametrize(("said", "size"), REFUSED.items())
def test_what_the_compiler_refuses(config, stories, capsys, monkeypatch, said, size):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(aot_compile, "compile_step", refuse)
    assert preflight(config, "--json") == EXIT_DOES_NOT_FIT
    report = json.loads(capsys.readouterr().out)
    assert report["per_chip"]["total"] == round(size * 2**30) and report["advice"][0]["fits"]
    assert "15.75G" in report["programs"]["train any_order"]["refused"]
    assert preflight(config) == EXIT_DOES_NOT_FIT
    assert f"does not fit: at least {size:.2f} of 16.00 GiB a chip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--topology=v5e:2x3"], "topology: unknown topology 'v5e:2x3'; did you mean"),
        (["--config.mesh.fsdp=3"], "4 chips, the config's mesh is"),
        (
            ["--config.mesh.data=4", "--config.microbatches=4"],
            "the 2 rows of a microbatch can't be split in 4",
        ),
        (["--slices=2", "--config.mesh.data=1"], "data alone goes over slices"),
        (["--slices=0"], "--slices: must be at least 1"),
        (["--config.batch_sise=3"], "did you mean 'batch_size'"),
        (["--programs=decod"], "did you mean 'decode'"),
        (["--spec=launch/v5e-16.yaml"], "--config: the spec says it already"),
        (["--config.mesh.tensor=4", "--config.mesh.fsdp=1"], "can't be split in 4"),
        (["--jsn"], "unknown argument '--jsn'"),
    ],
)
def test_bad_input_is_one_line(config, stories, capsys, flags, complaint):
    topology = next((flag.split("=")[1] for flag in flags if flag.startswith("--topology")), "v5e:2x2")
    rest = [flag for flag in flags if not flag.startswith("--topology")]
    assert preflight(config, *rest, topology=topology) == EXIT_BAD_INPUT
    output = capsys.readouterr()
    assert output.out == "" and complaint in output.err.splitlines()[-1]


def test_weights_and_data_that_are_here_are_checked(config, stories, capsys, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    assert preflight(config, f"--config.init_from={tmp_path / 'weights'}") == EXIT_BAD_INPUT
    (tmp_path / "rows").mkdir()
    assert preflight(config, f"--config.data={tmp_path / 'rows'}") == EXIT_BAD_INPUT
    assert (
        preflight(ROOT / "configs/a3_llama32_1b.py", "--config.model=", topology="v5e:4x4") == EXIT_BAD_INPUT
    )
    assert "init_from: Llama-3.2-1B is not here" in capsys.readouterr().err.splitlines()[-1]


def test_a_program_whose_text_can_not_be_read(config, stories, capsys, monkeypatch):
    """Memory is known all the same, traffic by formula."""

    def unreadable(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction")

    monkeypatch.setattr(Story, "as_text", unreadable)
    assert preflight(config, "--json") == EXIT_OK
    report = json.loads(capsys.readouterr().out)
    assert report["collectives"] == {} and report["estimate"]["traffic"] == "formula"
    assert report["estimate"]["ici_seconds"] > 0 and report["per_chip"]["total"] == 5246
    assert preflight(config) == EXIT_OK
    assert "by formula" in capsys.readouterr().out


def test_other_programs(config, stories, capsys):
    assert preflight(config, "--programs=decode,fingerprint,restore", "--json") == EXIT_OK
    compiled = json.loads(capsys.readouterr().out)["programs"]
    assert list(compiled) == ["train any_order", "decode", "fingerprint", "restore"]
    assert all(program["total"] for program in compiled.values())


def test_a_search(config, stories, capsys):
    """The best layout by formula is compiled, and told with the flags that ask for it."""
    assert preflight(config, "--search", "--json") == EXIT_OK
    report = json.loads(capsys.readouterr().out)
    candidates, compiled = report["search"]["candidates"], report["search"]["compiled"]
    assert len(stories) == 1 and [each["fits"] for each in compiled] == [True]
    assert compiled[0]["flags"] == candidates[0]["flags"] and candidates[0]["fits"]
    assert report["layout"] == candidates[0]["layout"]
    assert preflight(config, *compiled[0]["flags"]) == EXIT_OK
    assert len(stories) == 1  # the very config that was compiled


def paper_run(name, topology, *flags, slices=1):
    run = RunConfig.from_config(read_run_config(str(ROOT / f"configs/{name}.py"), list(flags)))
    return run, model_config(run), Pod(find_topology(topology), slices)


# GiB a chip by the TPU aot_compile, from `docs/performance.md`.
COMPILED = [
    ("a3_llama32_1b", "v5e:4x4", "dots", 10.71), ("a3_llama32_1b", "v5e:4x4", "block", 4.39),
    ("a3_llama32_3b", "v5e:8x8", "dots", 10.13), ("a3_llama32_3b", "v5e:4x4", "block", 11.68),
    ("a3_llama31_8b", "v5p:4x4x4", "dots", 19.72), ("a3_llama31_8b", "v5p:4x4x4", "offload", 8.90),
    ("a3_llama31_8b", "v5e:8x8", "block", 9.17),
]  # fmt: skip


@pytest.mark.parametrize(("name", "topology", "remat", "total"), COMPILED)
def test_the_formula_is_near_the_compiler(name, topology, remat, total):
    run, model, pod = paper_run(name, topology, f"--config.remat={remat}")
    memory = estimate_memory(run, model, parallel_config_of(run, pod))
    assert memory.total / 2**30 == pytest.approx(total, rel=0.16)


def test_the_formula_knows_the_chunk_of_the_loss():
    assert estimates.CHUNK_ROWS == loss._CHUNK_ROWS_ELSEWHERE


def test_search_ranks_what_fits_first_and_the_fastest_of_these():
    run, model, pod = paper_run("a3_llama31_8b", "v5e:4x8")
    found = search(run, model, pod)
    fitting = [candidate for candidate in found if candidate.fits]
    assert found[: len(fitting)] == fitting and 0 < len(fitting) < len(found)
    assert fitting[0].times.bound == min(candidate.times.bound for candidate in fitting)
    assert not any(
        c.layout == parallel_config_of(run, pod) for c in fitting
    )  # the config's own is for larger pods
    for candidate in found:
        at = candidate.layout
        assert at.data * at.fsdp * at.tensor == pod.chips and at.rows(run.batch_size) >= 1


def test_data_alone_crosses_slices_in_a_search():
    run, model, pod = paper_run("a3_llama32_1b", "v5e:4x4", slices=2)
    found = search(run, model, pod)
    assert found and all(candidate.layout.data % 2 == 0 for candidate in found)
    assert all(candidate.times.dcn > 0 for candidate in found)


def test_advice_is_the_nearest_change():
    run, model, pod = paper_run("a3_llama31_8b", "v5e:8x8")
    nearest = advice(run, model, pod, parallel_config_of(run, pod), "any_order")[0]
    assert nearest.layout == dataclasses.replace(parallel_config_of(run, pod), remat="block")


def test_more_parts_take_less_of_a_chip():
    run, model, _ = paper_run("a3_llama32_1b", "v5e:4x4")

    def total(*layout):
        return estimate_memory(run, model, ParallelConfig(*layout)).total

    assert total(1, 16, 1, 8, "block") < total(1, 16, 1, 8, "dots") < total(1, 16, 1, 8, "none")
    assert total(1, 16, 1, 16, "dots") < total(1, 16, 1, 8, "dots") < total(1, 8, 1, 8, "dots")
    assert total(1, 8, 2, 8, "dots") < total(1, 8, 1, 8, "dots")


def test_the_bound_is_the_slowest_part():
    times = estimates.Times(compute=2.0, memory=1.0, ici=3.0, dcn=0.5)
    assert (times.bound, times.limit) == (3.0, "ici")


@pytest.mark.slow
def test_the_tpu_compiler(config, capsys):
    """The real thing: a tiny run fits, with all its programs, in a process of its own."""
    pytest.importorskip("libtpu")
    flags = [f"--config={config}", "--topology=v5e:2x2", "--json", "--config.microbatches=1"]
    flags += ["--config.model.d_model=512"]  # whole tiles a chip: nothing is padded
    flags += ["--programs=decode,fingerprint,restore"]
    report = json.loads(run_apart(ON_TPU, "preflight", *flags, HOME=str(config.parent)))
    assert report["fits"] and not report["cached"]
    assert abs(report["deviation"]["state"]) < 0.01
    assert report["collectives"]["all-gather"]["count"]
    programs = report["programs"]
    assert programs.keys() == {"train any_order", "decode", "fingerprint", "restore"}
    assert all(program["total"] and not program["refused"] for program in programs.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flag"), [("XLA_FLAGS", "--xla_nonsense=1"), ("LIBTPU_INIT_ARGS", "--xla_tpu_nonsense=1")]
)
def test_a_flag_that_the_compiler_does_not_know(monkeypatch, name, flag):
    pytest.importorskip("libtpu")
    for other in aot_compile.COMPILER_FLAGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, flag)
    with pytest.raises(InputError, match=f"{name}: .*{flag}"):
        check_flags("v5e:1x1")
