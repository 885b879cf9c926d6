"""`a3 bench decode`: equal tokens first, then figures; on a stand-in for the authors' code."""

import json
import pathlib

import pytest

from a3_jax.cli import main

STAND_IN = pathlib.Path(__file__).with_name("release_stand_in.py").read_text()
FLAGS = ["--d_model=16", "--layers=2", "--heads=2", "--kv_heads=1", "--mlp=24", "--vocab=40", "--repeats=2"]
DECODING = '''

def _generate(self, input_ids, group_ids, max_length, do_sample, pad_token_id):
    """Group by group, greedily: all rows of the model again for each."""
    tokens = input_ids.clone()
    for group in sorted(set(group_ids.flatten().tolist()) - {0}):
        wanted = group_ids == group
        tokens[wanted] = self.scores(tokens, group_ids).argmax(-1)[wanted]
    return tokens


def _scores(self, input_ids, group_ids):
    own, other = group_ids[:, :, None], group_ids[:, None]
    content = self.model.embed_tokens(input_ids)
    query = self.model.query_embed.expand(content.shape)
    for layer in self.model.layers:
        content, query = layer(content, content, other <= own), layer(query, content, other < own)
    return self.lm_head(self.model.norm(query))


LlamaTwoStreamForCausalLM.generate_two_stream = _generate
LlamaTwoStreamForCausalLM.scores = _scores
'''


def test_lengths_and_strategies(capsys):
    assert main(["bench", "decode", "--lengths", "12", "24", *FLAGS, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {(row["metric"], row["setting"]["length"]): row for row in result["rows"]}
    for length in (12, 24):
        once, fills = (rows[f"{name}_fill_time", length]["repeats"] for name in ("recomputed", "cached"))
        assert rows["cached_fill_speedup", length]["value"] == pytest.approx(once[0] / (sum(fills) / 2))
        assert rows["time_per_token", length]["repeats"] == [s / (length - 1) for s in fills]
    for row in result["rows"]:
        tells_better = "_over_" in row["metric"] or row["metric"].endswith("_speedup")
        assert (row["unit"] == "ratio") == tells_better, row["metric"]


@pytest.mark.torch
@pytest.mark.parametrize("visible", ["other < own", "other <= own"])
def test_the_releases_tokens_must_be_ours(tmp_path, capsys, visible):
    """Equal tokens: its time beside ours. A query row that sees its own group: one line, no figure."""
    pytest.importorskip("transformers")
    (tmp_path / "llama_xlnet.py").write_text(STAND_IN + DECODING.replace("other < own", visible))
    status = main(["bench", "decode", f"--release={tmp_path}", "--lengths", "24", *FLAGS, "--json"])
    captured = capsys.readouterr()
    if visible == "other <= own":
        assert status == 1 and captured.out == ""
        assert "greedy tokens differ from those of the release, by up to" in captured.err.splitlines()[-1]
        return
    rows = {row["metric"]: row for row in json.loads(captured.out)["rows"]}
    assert status == 0
    theirs, ours = rows["release_fill_time"]["repeats"], rows["cached_fill_time"]["repeats"]
    assert 0 <= rows["release_token_below_our_best"]["value"] < 1e-3
    assert rows["fill_speedup_over_release"]["repeats"] == [theirs[0] / s for s in ours]
    assert rows["ar_fill_speedup_over_transformers"]["value"] > 0
