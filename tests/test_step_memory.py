"""The compiled step holds nothing of size T x S or B x T x V: for TPUs that are not there, and on CPU."""

import math
import re

import pytest

from tests.tpu_programs import LENGTH, MODEL, compile_text, program

LIMIT = (
    LENGTH * MODEL.vocab_size
)  # elements: a device's logits; all scores of a head are more than twice as many
ON_TPU = "fsdp", "tensor"
ON_CPU = {
    "cpu": ("cpu", 1, {"fsdp": 4}, "none", LENGTH, "auto"),
    "cpu, dense": ("cpu", 1, {"fsdp": 4}, "none", LENGTH, "dense"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Case -> the optimised program."""
    return lambda case: compile_text(*ON_CPU[case]) if case in ON_CPU else program(case, tmp_path_factory)


def largest(program):
    shapes = re.findall(r"(?:f32|bf16|pred|s32|s8)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ON_TPU, "cpu"])
def test_no_array_of_all_scores_or_all_logits(text, case):
    assert largest(text(case)) < LIMIT


def test_dense_attention_would_be_found(text):
    """The negative control."""
    assert largest(text("cpu, dense")) >= 2 * LIMIT


@pytest.mark.slow
def test_what_the_tpu_program_is_made_of(text):
    """Splash attention's kernels; no sum of whole embedding tables over devices; offload to the host."""
    plain, offload = text("fsdp"), text("tensor")
    assert len(set(re.findall(r"splash_mha_\w+", plain))) >= 3
    assert not re.findall(rf"= \(?\w+\[{MODEL.vocab_size},{MODEL.d_model}\]\S* all-reduce", plain)
    assert "S(5)" in offload and "S(5)" not in plain  # host memory
