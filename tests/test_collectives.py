"""What chips send to each other, read from programs: hand-written ones, and the real step of a tiny model."""

import math

import pytest

from a3_jax.pods.collectives import KINDS, read_collectives, traffic
from tests.tpu_programs import CASES, CHIPS, MODEL, program

LOOPS = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%start (p: bf16[8,16]) -> (bf16[8,16], bf16[32,16], u32[]) {
  %gather.1 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %begun = (bf16[8,16], bf16[32,16], u32[]) custom-call(%gather.1)
}

%piece (p: bf16[8,16]) -> bf16[32,16] {
  ROOT %gather.2 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.5 (p: f32[64]) -> f32[16] {
  %summed = f32[64]{0} all-reduce(%p), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %part = f32[16]{0} dynamic-slice(%summed, %here), dynamic_slice_sizes={16}
}

%inner_condition (s: (s32[], f32[64])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %index = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%index, %three), direction=LT
}

%inner_body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %begin = (bf16[8,16], bf16[32,16], u32[]) fusion(%w), kind=kCustom, calls=%start
  %done = bf16[32,16]{1,0} fusion(%begin), kind=kCustom, calls=%piece
  ROOT %out = (s32[], f32[64]) tuple(%index, %done)
}

%outer_condition (s: (s32[], f32[64])) -> pred[] {
  ROOT %less = pred[] compare(%index, %n), direction=LT
}

%outer_body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %inner = (s32[], f32[64]{0}) while(%s), condition=%inner_condition, body=%inner_body
  ROOT %scattered = f32[16]{0} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.5
}

%ring_condition (s: (u32[], bf16[8,4])) -> pred[] {
  %seven = u32[]{:T(128)} constant(7)
  %at = u32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %less = pred[]{:T(512)} compare(%at, %seven), direction=LT
}

%ring_body (s: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %two = u32[]{:T(128)} constant(2)
  %at = u32[]{:T(128)} get-tuple-element(%s), index=1
  %on = u32[]{:T(128)} add(%at, %two)
  %turn = (bf16[8,4]{1,0}, bf16[8,4]{1,0}) collective-permute-start(%c), channel_id=2, source_target_pairs={{0,1}}
  ROOT %out = (bf16[8,4]{1,0:T(8,128)}, /*index=1*/u32[]{:T(128)}) tuple(%turned, /*index=1*/%on), metadata={}
}

ENTRY %main (p: f32[64]) -> f32[] {
  %outer = (s32[], f32[64]{0}) while(%s), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %rings = (bf16[8,4]{1,0}, u32[]) while(%s), condition=%ring_condition, body=%ring_body
  %both = (f32[10]{0}, bf16[6]{0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %ring = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %end = bf16[8,4]{1,0} collective-permute-done(%ring)
  %swap = bf16[4,8]{1,0} all-to-all(%c), channel_id=3, replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %wide = (f32[4]{0}, f32[16]{0}) all-gather-start(%d), channel_id=4, replica_groups={}, dimensions={0}
  %thin = f32[4]{0} reduce-scatter(%e), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %away = (f32[8,2]{1,0}, u32[], token[]) send(%f, %token), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %home = (f32[8,2]{1,0}, u32[], token[]) send(%f, %token), channel_id=8, is_host_transfer=true
}
"""  # noqa: E501


def found(name):
    return next(each for each in read_collectives(LOOPS, 4, 2) if each.name == name)


@pytest.mark.parametrize(
    ("name", "kind", "size", "times", "sent"),
    [
        ("gather.1", "all-gather", 32 * 16 * 2, 15, 15 * 1024 * 3 / 4),
        ("summed", "reduce-scatter", 64 * 4, 5, 5 * 256 * 3 / 4),
        ("turn", "collective-permute", 64, 4, 256),
        ("both", "all-reduce", 10 * 4 + 6 * 2, 1, 52),
        ("ring", "collective-permute", 64, 1, 64),
        ("swap", "all-to-all", 64, 1, 32),
        ("wide", "all-gather", 64, 1, 48),
        ("thin", "reduce-scatter", 64, 1, 48),
        ("away", "all-reduce", 64, 1, 64),
    ],
)
def test_bytes_and_turns(name, kind, size, times, sent):
    each = found(name)
    assert (each.kind, each.bytes, each.times, each.sent) == (kind, size, times, sent)


def test_an_asynchronous_collective_counts_once_and_what_only_looks_like_one_not_at_all():
    names = [each.name for each in read_collectives(LOOPS, 4, 2)]
    assert sorted(names) == sorted(
        ["gather.1", "summed", "turn", "both", "ring", "swap", "wide", "thin", "away"]
    )


def test_only_what_is_sent_beyond_the_slice_is_dcn():
    table = traffic(read_collectives(LOOPS, 4, 2))
    assert tuple(table) == KINDS
    assert table["all-reduce"] == {"count": 2, "ici": 52.0, "dcn": 64.0}
    assert sum(row["dcn"] for row in table.values()) == 64.0


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_groups_in_every_notation(notation, groups):
    reduction = f"%r = f32[4]{{0}} all-reduce(%p), {notation}, to_apply=%add"
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {reduction}\n}}"
    (each,) = read_collectives(text, 4)
    assert each.groups == groups


# Case -> the kinds that may run along which axes. What runs along `data` is the sum of gradients alone; along
# `fsdp` weights are gathered, gradients scattered, and embeddings of each chip's part of the width exchanged,
# rings of permutes included; along `tensor` the parts of activations and of the loss are added.
ALONG_FSDP = {(kind, ("fsdp",)) for kind in KINDS}
EXPECTED = {
    "fsdp": ALONG_FSDP,
    "data": ALONG_FSDP | {("all-reduce", ("data",)), ("all-reduce", ("data", "fsdp"))},
    "tensor": ALONG_FSDP | {("all-reduce", ("tensor",)), ("all-reduce", ("fsdp", "tensor"))},
    "slices": {("all-reduce", ("slice",))},
}
SUMS = {"data", "tensor", "slices"}  # whose arrays must be added over that axis: the positive half


def collectives(case, tmp_path_factory):
    return read_collectives(program(case, tmp_path_factory), CHIPS[case], 2 if case == "slices" else 1)


def axes_of(each, sizes):
    """The mesh axes along which the positions of a group differ."""
    if each.dcn:
        return ("slice",)
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    places = [[(c // (fsdp * tensor), c // tensor % fsdp, c % tensor) for c in g] for g in each.groups]
    names = ("data", "fsdp", "tensor")
    return tuple(name for i, name in enumerate(names) if any(len({p[i] for p in g}) > 1 for g in places))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_only_the_expected_collectives(case, tmp_path_factory):
    sizes = CASES[case][2]
    kinds = {
        (each.kind, axes_of(each, sizes))
        for each in collectives(case, tmp_path_factory)
        if axes_of(each, sizes)
    }
    assert kinds <= EXPECTED[case], kinds - EXPECTED[case]
    if case in SUMS:
        axis = "slice" if case == "slices" else case
        assert any(kind == "all-reduce" and axes == (axis,) for kind, axes in kinds)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_none_of_the_whole_tree_of_logits_or_of_masks(case, tmp_path_factory):
    """Weights are gathered a layer at a time, the table once; nothing of T x T or rows x V travels."""
    m, length = MODEL, CASES[case][4]
    leaves = [m.vocab_size * m.d_model, m.d_model * m.mlp_size, m.d_model * m.num_heads * m.head_size]
    gathered = set()
    for each in collectives(case, tmp_path_factory):
        for dtype, shape in each.shapes:
            size, shape = math.prod(shape), [axis for axis in shape if axis > 1]
            scores = shape.count(length) > 1 or (dtype == "pred" and size > 1)
            of_vocabulary = {m.vocab_size, m.vocab_size // 2} & set(shape)
            logits = of_vocabulary and {length, length // 2, 2 * length} & set(shape)
            assert not scores and not logits, each
            if each.kind == "all-gather":
                assert size <= max(leaves), each
                gathered.add(size)
    if CASES[case][2]["fsdp"] > 1:
        assert gathered & set(leaves)  # weights are gathered indeed
