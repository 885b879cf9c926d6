"""A conversion proves itself before its destination appears: `a3 convert`, `--check`, `--no-check`. NaN."""

import importlib.util

import numpy as np
import pytest

from a3_jax.checkpoints import check, conversion
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.hf_export import tree_reader
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.cli import main
from a3_jax.errors import InputError, RunError
from a3_jax.model.flops import parameter_count
from tests.tiny_diffusion import write_diffusion
from tests.tiny_families import rewrite, write_family
from tests.tiny_hf import write_tiny_llama

needs_torch = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
        reason="needs torch and transformers",
    ),
]


def with_torch(function):
    for mark in needs_torch:
        function = mark(function)
    return function


@pytest.fixture
def llama(tmp_path):
    write_tiny_llama(tmp_path / "hf", num_layers=3, tokenizer=None)
    return tmp_path / "hf"


@pytest.fixture
def without_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))


@pytest.fixture
def transformers_fails(monkeypatch):
    import transformers

    def fail(*_, **__):
        raise ValueError("no such\nmodel")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)


def break_writing(monkeypatch, edit):
    """What is written is not what was read."""
    write_params, write_hf = conversion.write_params, conversion.write_hf

    def broken(params):
        params = {**params, "layers": dict(params["layers"]), "last_layer": dict(params["last_layer"])}
        edit(params)
        return params

    def write_broken_hf(directory, read, target, meta, *arguments, **options):
        params: dict = {"layers": {}, "last_layer": {}}
        for path in {part.leaf for parts in target.parts.values() for part in parts}:
            (params if len(path) == 1 else params[path[0]])[path[-1]] = read(path, ())
        write_hf(directory, tree_reader(broken(params)), target, meta, *arguments, **options)

    def write_broken_params(directory, leaves, pieces, read, *arguments):
        params: dict = {"layers": {}, "last_layer": {}}
        for path, leaf in leaves.items():
            (params if len(path) == 1 else params[path[0]])[path[-1]] = np.zeros(leaf.shape, leaf.dtype)
        parts = {
            piece: [
                (path, begin, tuple(slice(b, b + n) for b, n in zip(begin, array.shape)), array)
                for path, begin, array in read(piece)
            ]
            for piece in pieces
        }
        for path, _, place, array in (part for each in parts.values() for part in each):
            tree_reader(params)(path)[place] = array
        again = tree_reader(broken(params))

        def read_again(piece):
            return [(path, begin, again(path, place)) for path, begin, place, _ in parts[piece]]

        return write_params(directory, leaves, pieces, read_again, *arguments)

    monkeypatch.setattr(conversion, "write_params", write_broken_params)
    monkeypatch.setattr(conversion, "write_hf", write_broken_hf)


def turn(part, leaf, layer=...):
    """An edit that turns a leaf's sign around, or that of one layer: no norm changes."""

    def edit(params):
        tree = params[part] if part else params
        tree[leaf] = tree[leaf].copy()
        tree[leaf][layer] *= -1

    return edit


@with_torch
@pytest.mark.parametrize(("name", "dtype"), [("llama", None), ("gemma3", "float16")])
def test_both_directions_pass(tmp_path, name, dtype):
    """Of bfloat16 files, whether they stay what they are or are rounded."""
    write_family(tmp_path / "hf", name, dtype="bfloat16")
    there = convert(tmp_path / "hf", tmp_path / "a3", dtype=dtype, check=True)
    back = convert(tmp_path / "a3", tmp_path / "back", to="hf", check=True)
    for checked in (there, back):
        assert checked.difference < 2e-5 and checked.scale > 1 and checked.tokens == 128
    assert back.tensors == there.tensors + 1 and back.parameters == there.parameters + 32
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(tmp_path / "hf").config


@with_torch
def test_float32_into_narrower_files(llama, tmp_path):
    convert(llama, tmp_path / "a3")
    checked = convert(tmp_path / "a3", tmp_path / "narrow", to="hf", dtype="bfloat16", check=True)
    assert checked.difference < 1e-4
    assert convert(llama, tmp_path / "narrow-a3", dtype="bfloat16", check=True).difference < 1e-4


@with_torch
def test_the_command_says_what_it_found(llama, tmp_path, capfd):
    """With --check and, where the model fits in memory, without."""
    for number, option in enumerate((["--check"], [])):
        assert main(["convert", str(llama), str(tmp_path / str(number)), *option]) == 0
        out, err = capfd.readouterr()
        checked, wrote = out.splitlines()
        assert checked.startswith("checked: logits of 128 tokens are those of transformers, largest differ")
        assert "norms of 30 tensors" in checked and wrote == f"wrote {tmp_path / str(number)}"
        assert "transformers" not in err and "Loading" not in err
    assert main(["convert", str(llama), str(tmp_path / "a3"), "--no-check"]) == 0
    assert capfd.readouterr().out == f"wrote {tmp_path / 'a3'}\n"


PLACES = {
    "the embedding": turn(None, "embed", slice(0, 200)),
    "layer 1": turn("layers", "v", 1),
    "layer 2": turn("last_layer", "o"),
    "the final norm": turn(None, "final_norm", slice(0, 5)),
    "the head": turn(None, "head", slice(0, 5)),
}


@with_torch
@pytest.mark.parametrize("place", PLACES)
def test_the_first_layer_that_differs_is_named(llama, tmp_path, monkeypatch, place):
    break_writing(monkeypatch, PLACES[place])
    with pytest.raises(RunError) as caught:
        convert(llama, tmp_path / "a3", check=True)
    assert caught.value.status == 1 and f"the first difference is in {place}" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@with_torch
def test_a_broken_layer_on_the_way_back(llama, tmp_path, monkeypatch, capsys):
    convert(llama, tmp_path / "a3")
    break_writing(monkeypatch, turn("layers", "gate", 1))
    assert main(["convert", str(tmp_path / "a3"), str(tmp_path / "back"), "--to=hf", "--check"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "back: not written" in err and "in layer 1 (of 0" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a3", "hf"]


@with_torch
def test_a_model_that_transformers_cannot_open(llama, tmp_path, monkeypatch, transformers_fails):
    """The reason is reported, and sizes and norms are compared."""
    a3, back = tmp_path / "a3", tmp_path / "back"
    for checked in (
        convert(llama, a3, check=True, dtype="bfloat16"),
        convert(a3, back, to="hf", check=True),
        convert(llama, tmp_path / "default", check=None),
    ):
        assert checked is not None and checked.difference is None and checked.tensors >= 30
        assert "can't open the model: ValueError: no such model" in str(checked)

    def scale(params):
        params["layers"]["up"] = params["layers"]["up"] * 1.5

    break_writing(monkeypatch, scale)
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.up_proj\.weight: norm .* on the other side"):
        convert(llama, tmp_path / "again", check=True)
    assert not (tmp_path / "again").exists()


@with_torch
@pytest.mark.parametrize("name", ["llada", "dream", "diffullama, as trained", "diffugpt"])
def test_masked_diffusion_that_transformers_has_not_or_fills_up(tmp_path, capsys, name):
    write_diffusion(tmp_path / "hf", name)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "a3"), "--check"]) == 0
    assert main(["convert", str(tmp_path / "a3"), str(tmp_path / "back"), "--to=hf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("logits were not compared: transformers" in lines[n] for n in (0, 2))


@with_torch
def test_a_model_that_transformers_does_not_read_whole(tmp_path):
    """Its names are those of another layout, so that random numbers are in its place: no comparison."""
    write_family(tmp_path / "hf", "llama")
    rewrite(tmp_path / "hf", lambda tensors: {
        key.replace("model.layers.", "denoise_model.layers."): value for key, value in tensors.items()
    })  # fmt: skip
    checked = convert(tmp_path / "hf", tmp_path / "a3", check=True)
    assert "transformers does not find" in checked.why_not and "model.layers.0" in checked.why_not


@with_torch
def test_a_model_that_transformers_cannot_run(llama, tmp_path, monkeypatch, capsys):
    import transformers

    def fail(*_, **__):
        raise KeyError("rope_type")

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaModel, "forward", fail)
    assert main(["convert", str(llama), str(tmp_path / "a3"), "--check"]) == 0
    out, err = capsys.readouterr()
    assert "can't run the model: KeyError: 'rope_type'" in out and not err.count("Traceback")


def test_without_torch(llama, tmp_path, capsys, without_torch):
    """--check says what is missing; otherwise it is no matter."""
    assert main(["convert", str(llama), str(tmp_path / "a3"), "--check"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "torch not installed" in err and "check" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    assert main(["convert", str(llama), str(tmp_path / "a3")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a3'}\n"


@with_torch
def test_a_model_that_does_not_fit_in_memory(llama, tmp_path, monkeypatch, capsys, caplog):
    """By default half of the free memory counts, with --check all of it."""
    needed = 8 * parameter_count(open_checkpoint(llama).config)
    monkeypatch.setattr(check, "free_memory", lambda: 1.5 * needed)
    assert convert(llama, tmp_path / "a3", check=None) is None
    assert f"not checked: the model takes {needed:,} bytes of memory on both sides" in caplog.text
    assert convert(llama, tmp_path / "b3", check=True).difference < 1e-4
    monkeypatch.setattr(check, "free_memory", lambda: 0.9 * needed)
    assert main(["convert", str(llama), str(tmp_path / "c3"), "--check"]) == 2
    assert f"{needed:,} bytes" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "c3").exists()


def test_free_memory(tmp_path):
    """The least of what the machine has and what the container may take, its cache not counted as used."""
    group, machine = tmp_path / "sys/fs/cgroup", tmp_path / "proc"
    group.mkdir(parents=True)
    machine.mkdir()
    assert check.free_memory(str(tmp_path)) > 0
    (machine / "meminfo").write_text("MemTotal:  90 kB\nMemAvailable:   50 kB\n")
    assert check.free_memory(str(tmp_path)) == 50 * 1024
    (group / "memory.max").write_text("max\n")
    assert check.free_memory(str(tmp_path)) == 50 * 1024
    for name, text in {"max": "9000\n", "current": "8000\n", "stat": "anon 5000\nfile 3000\n"}.items():
        (group / f"memory.{name}").write_text(text)
    assert check.free_memory(str(tmp_path)) == 4000


def test_a_checkpoint_to_itself_and_the_release(llama, tmp_path):
    convert(llama, tmp_path / "a3")
    checked = convert(tmp_path / "a3", tmp_path / "again", check=True)
    assert checked.why_not == "both sides are A3" and checked.difference is None
    write_tiny_llama(tmp_path / "release", architecture="LlamaTwoStreamForCausalLM")
    checked = convert(tmp_path / "release", tmp_path / "release-a3", check=True)
    assert "authors' release" in str(checked)


def test_no_torch_without_check(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "importlib", None)  # whoever asked for torch would fail
    assert convert(llama, tmp_path / "a3") is None


QUERY_1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [QUERY_1, "model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_values_that_are_no_numbers_are_refused(llama, tmp_path, capsys, name, value):
    """By the tensor's name in the file; of an A3 checkpoint by the leaf's."""

    def spoil(tensors):
        tensors[name].flat[[3, 5]] = value
        return tensors

    rewrite(llama, spoil)
    for to in ("a3", "hf"):
        with pytest.raises(InputError, match=r"2 of its .* values are NaN or infinite") as caught:
            convert(llama, tmp_path / "dst", to=to)
        assert caught.value.field == name and "model.safetensors" in str(caught.value.file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]

    assert main(["convert", str(llama), str(tmp_path / "a3"), "--allow_nonfinite"]) == 0
    assert main(["convert", str(tmp_path / "a3"), str(tmp_path / "back"), "--to=hf", "--no-check"]) == 2
    assert "a3: params/" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@with_torch
def test_a_check_of_what_is_not_finite_fails(llama, tmp_path, transformers_fails):
    def spoil(tensors):
        tensors[QUERY_1].flat[0] = np.nan
        return tensors

    rewrite(llama, spoil)
    with pytest.raises(RunError, match=rf"{QUERY_1}: its norm is not finite"):
        convert(llama, tmp_path / "a3", check=True, allow_nonfinite=True)
    assert convert(llama, tmp_path / "a3", check=None, allow_nonfinite=True) is None
