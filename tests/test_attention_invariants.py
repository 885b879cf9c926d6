"""The invariants hold whatever computes attention: the test of each, once more with every implementation."""

import functools
import importlib.util

import jax
import pytest

from a3_jax.model import attention, attention_chunked
from tests import (
    test_cached_decoding,
    test_chain_rule,
    test_conversion_parity,
    test_model_oracle,
    test_no_leak,
    test_packing,
    test_permutation,
    test_sharding,
    test_sums_to_one,
)

MODEL = {
    "2 no leak": functools.partial(test_no_leak.test_changing_a_token_changes_only_later_ranks, 0),
    "3 permutation": functools.partial(test_permutation.test_permuting_storage_permutes_the_outputs, "query"),
    "4 packing": functools.partial(test_packing.test_a_packed_document_is_as_when_alone, "query"),
    "7 meshes": functools.partial(
        test_sharding.test_every_mesh_gives_the_numbers_of_one_device, {"data": 2, "fsdp": 2, "tensor": 2}
    ),
    "dense model": functools.partial(test_model_oracle.test_both_streams_equal_the_dense_model, "standard"),
}
DECODING = {
    "5 chain rule": functools.partial(test_chain_rule.test_reported_is_the_one_pass_score, "any first"),
    "6 cache": functools.partial(
        test_cached_decoding.test_cached_equals_recomputed, {"order": "random", "group_size": 2}
    ),
    "9 sums": functools.partial(
        test_sums_to_one.test_all_values_of_a_subset_add_up_to_one, [0, 3, 0, 1, 1, 0], ""
    ),
}


@pytest.fixture
def everywhere(monkeypatch):
    """A call that makes "auto" mean the given implementation, in blocks of 8, from here on."""

    def use(implementation):
        monkeypatch.setattr(attention, "_chosen", lambda query, key: implementation)
        monkeypatch.setattr(attention_chunked, "ROWS", 8)
        monkeypatch.setattr(attention_chunked, "KEYS", 8)
        jax.clear_caches()

    yield use
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("invariant", MODEL)
@pytest.mark.parametrize("implementation", ["chunked", "splash"])
def test_of_the_model(implementation, invariant, everywhere):
    everywhere(implementation)
    MODEL[invariant]()


@pytest.mark.parametrize("invariant", DECODING)
def test_of_decoding(invariant, everywhere):
    everywhere("chunked")
    DECODING[invariant]()


@pytest.mark.torch
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs torch and transformers")
@pytest.mark.parametrize("implementation", ["chunked", "splash"])
def test_1_of_the_source_model(implementation, everywhere, tmp_path):
    everywhere(implementation)
    test_conversion_parity.test_logits_equal_those_of_transformers(tmp_path, True, "plain")


def test_the_implementation_is_the_one_asked_for(everywhere):
    """A mistake in it is seen: the positive half of the tests above."""
    everywhere("broken")
    with pytest.raises(ValueError, match="implementation='broken'"):
        MODEL["2 no leak"]()
