"""`a3 score --model=ar` of a Hugging Face Llama equals `transformers`, and so does greedy filling."""

import json

import numpy as np
import pytest

from tests.decoding_cli import read_lines, run, write_lines

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module", params=["untied", "tied, llama3 rotary scaling"])
def llama(request, tmp_path_factory):
    """(directory, model) as `transformers` makes and saves it."""
    torch.manual_seed(0)
    tied = request.param != "untied"
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=tied,
        rope_parameters=ROPE if tied else None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    return directory, model


def test_log_probabilities(llama, tmp_path, capsys):
    directory, model = llama
    rng = np.random.default_rng(0)
    lines = [{"tokens": rng.integers(0, 97, length).tolist()} for length in (2, 13, 16, 60)]
    source = write_lines(tmp_path / "in.jsonl", *lines)
    status, _, err = run(
        capsys, "score", directory, source, tmp_path / "out.jsonl", "--model=ar", "--dtype=float32"
    )
    assert status == 0, err
    for line, result in zip(lines, read_lines(tmp_path / "out.jsonl"), strict=True):
        ids = torch.tensor([line["tokens"]])
        with torch.no_grad():
            law = torch.log_softmax(model(ids).logits[0].double(), dim=-1).numpy()
        expected = law[np.arange(len(line["tokens"]) - 1), line["tokens"][1:]]
        assert result["logprobs"][0] is None
        np.testing.assert_allclose(result["logprobs"][1:], expected, atol=1e-4)
        assert result["logprob"] == pytest.approx(expected.sum(), abs=1e-3)
    assert "NaN" not in json.dumps(read_lines(tmp_path / "out.jsonl"))


def test_greedy_continuation(llama, tmp_path, capsys):
    """`a3 generate --model=ar` of blanks at the end is `transformers`' greedy search."""
    directory, model = llama
    prompt = [5, 17, 80, 3]
    source = write_lines(tmp_path / "in.jsonl", {"tokens": prompt + [None] * 8})
    _, (result,), _ = run(capsys, "generate", directory, source, "-", "--model=ar", "--dtype=float32")
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    assert result["tokens"] == expected[0].tolist()
