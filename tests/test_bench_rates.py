"""`a3 bench score`, `forwards` and `data`: their rows, on sizes that take seconds."""

import json

import numpy as np
import pytest

from a3_jax.cli import main
from benchmarks import forward_counts

MODEL = ["--d_model=16", "--layers=2", "--heads=2", "--kv_heads=1", "--mlp=24", "--vocab=40"]


def rows_of(capsys, *arguments):
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_score_is_the_training_loss(capsys):
    """The benchmark itself refuses figures of two different sums."""
    rows = {row["metric"]: row for row in rows_of(capsys, "score", *MODEL, "--length=24", "--repeats=2")}
    ours, theirs = (rows[name]["repeats"] for name in ("score_rate", "training_forward_rate"))
    ratios = rows["score_time_over_training_forward"]["repeats"]
    np.testing.assert_allclose(ratios, np.divide(theirs, ours))


def test_guards_are_a_share_of_the_step(capsys):
    rows = {row["metric"]: row for row in rows_of(capsys, "guards", *MODEL, "--length=24", "--repeats=2")}
    step, each, saved, share = (
        np.array(rows[name]["repeats"])
        for name in ("step_time", "guards_time", "fingerprints_time", "guards_and_fingerprints_over_step")
    )
    assert min(*step, *each, *saved) > 0
    np.testing.assert_allclose(share, (each + saved / 100) / step)


def test_forwards_by_strategy(capsys, monkeypatch):
    """Never more than one a blank; of the exact chain what is known of it, whatever the model has learnt."""
    monkeypatch.setattr(forward_counts, "TEXTS", 8)
    names = ("speculative_l2r", "speculative_spread", "groupwise4_random")
    monkeypatch.setattr(
        forward_counts, "STRATEGIES", {name: forward_counts.STRATEGIES[name] for name in names}
    )
    rows = rows_of(capsys, "forwards", "--steps=2")
    found = {(row["metric"], row["setting"].get("conditionals")): row["value"] for row in rows}
    for (metric, _), value in found.items():
        assert not metric.endswith("_forwards_at_most") or value <= forward_counts.BLANKS
        assert not metric.endswith("_acceptance") or 0 <= value <= 1
    assert found["groupwise4_random_forwards", "trained"] == forward_counts.BLANKS / 4
    assert found["speculative_spread_forwards", "exact"] < 10 < found["speculative_l2r_forwards", "exact"]
    entropy = found["chain_entropy", None]
    assert found["speculative_l2r_nats", "exact"] == pytest.approx(entropy, rel=0.2)
    assert found["speculative_l2r_nats", "trained"] > 2 * entropy, "after two steps it knows nothing"


def test_the_chains_samples_have_its_pairs():
    transition = forward_counts.transition_matrix(5, seed=1)
    chains = forward_counts.sample_chains(np.random.default_rng(0), transition, 4000, 12)
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (chains[:, :-1].ravel(), chains[:, 1:].ravel()), 1)
    np.testing.assert_allclose(pairs / pairs.sum(1, keepdims=True), transition, atol=0.03)
    law = forward_counts.stationary(transition)
    np.testing.assert_allclose(law @ transition, law, atol=1e-9)


def test_data(capsys, monkeypatch):
    from benchmarks import data_rates

    for name, value in {
        "DOCUMENTS": 200, "WORDS": 300, "MEDIAN_WORDS": 20, "MERGES_VOCABULARY": 400, "MILLION_ROWS": 1 << 10,
        "SHORT_ROWS": 1 << 8, "SHORT_LENGTH": 16, "FAR_STEP": 1000, "FLAT_STEPS": 20,
    }.items():  # fmt: skip
        monkeypatch.setattr(data_rates, name, value)
    rows = rows_of(capsys, "data", "--length=64", "--batch=4", "--repeats=2")
    found = {row["metric"]: row for row in rows}
    prepared, alone = (np.array(found[name]["repeats"]) for name in ("prepare_rate", "tokenizers_rate"))
    np.testing.assert_allclose(found["prepare_time_over_tokenizers"]["repeats"], alone / prepared)
    assert 0 <= found["padding"]["value"] < 0.2
    assert {"first_batch_at_step_0", "first_batch_at_step_1000", "memory_growth"} <= found.keys()
    assert found["batches_speedup_over_need"]["value"] > 0


def test_convert(capsys):
    """Beside a copy: speeds are ratios of neighbours, the limit is twice the largest leaf and 1 GB."""
    shape = ["--d_model=32", "--heads=4", "--kv_heads=2", "--layers=3", "--mlp=48", "--vocab=300"]
    found = {row["metric"]: row for row in rows_of(capsys, "convert", *shape, "--repeats=1")}
    for name in ("to_a3", "to_hf"):
        seconds, copied = (found[f"{each}_time"]["repeats"] for each in (name, "copy"))
        np.testing.assert_allclose(found[f"{name}_speed_over_copy"]["repeats"], np.array(copied) / seconds)
        peak, limit = found[f"{name}_peak"]["value"], 10**9 + 2 * 2 * 300 * 32
        np.testing.assert_allclose(found[f"{name}_peak_over_limit"]["value"], peak / limit)
        assert 1e8 < peak < 1e9


def test_launch_says_why_it_ended(capsys, tmp_path):
    assert main(["bench", "launch", f"--config={tmp_path / 'absent.py'}", "--repeats=1"]) == 1
    assert "exit status 2" in (told := capsys.readouterr().err) and "absent.py" in told
