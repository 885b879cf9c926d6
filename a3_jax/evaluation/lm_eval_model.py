"""A model under evaluation as lm-evaluation-harness knows models.

The harness asks in texts: how likely is a continuation, how likely a whole text, what comes next until a
stop string. Here they become `ScoreTarget`s and `TextBlank`s, encoded as the harness' own Hugging Face
backend encodes them, so that a left-to-right model gets exactly the figures that it would get there.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from a3_jax.errors import InputError
from a3_jax.evaluation.models.interface import NO_TOKENS, EvaluatedModel, ScoreTarget, TextBlank
from a3_jax.evaluation.models.left_to_right import LeftToRight

MAX_NEW_TOKENS = 256  # where a task doesn't say
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FIRST_ROUND = 16  # tokens of the first round of a text that may stop anywhere; rounds double


class HarnessModel(LM):
    """A model that answers the harness's requests.

    Attributes:
      model: the model that answers.
      bos: whether texts get BOS: "auto" (if the tokenizer adds one), "yes" or "no".
      seed: seed of what is drawn, together with each request's own text.
    """

    def __init__(self, model: EvaluatedModel, bos: str = "auto", seed: int = 0):
        super().__init__()
        self.model, self.bos, self.seed = model, bos, seed
        model.tokenizer.encode("", bos)  # refuses a policy that the tokenizer can't follow

    @property
    def tokenizer_name(self) -> str:
        """The key of cached requests."""
        return self.model.tokenizer.fingerprint

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-probability of the continuation, whether greedy decoding gives it) per request.

        The context's trailing spaces belong to the continuation; both are encoded together and cut by
        the context's own number of tokens. A text too long for the model loses its beginning. Without
        a context, BOS (or EOS) takes its place.
        """
        del disable_tqdm
        pairs = [request.args for request in requests]
        targets = [self._target(context, continuation) for context, continuation in pairs]
        answers = _score_and_greedy(self.model, targets)
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text, left to right, after BOS (or EOS).

        A text longer than the model's context is read in windows, see `windows`.
        """
        del disable_tqdm
        targets: list[ScoreTarget] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self._encode(request.args[0])
            for target in windows(tokens, self._first_token(), _scored_length(self.model)):
                targets.append(target)
                owners.append(index)
        sums = np.zeros(len(requests))
        for owner, logprobs in zip(owners, self.model.token_logprobs(targets), strict=True):
            sums[owner] += np.sum(logprobs, dtype=np.float64)
        for request, value in zip(requests, sums.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continues each context, up to EOS or the first of the stop strings `until`.

        Of the settings `max_gen_toks` (256), `do_sample`, `temperature`, `top_p` and `top_k` are read;
        decoding is greedy unless they ask for sampling. A context too long for the model loses its beginning.
        """
        del disable_tqdm
        answers = [""] * len(requests)
        by_settings: dict[tuple, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(_sampling(request.args[1]), []).append(index)
        for sampling, indices in by_settings.items():
            model = _with_sampling(self.model, dict(sampling))
            blanks = [self._blank(index, *requests[index].args) for index in indices]
            stops = [_stop_strings(requests[index].args[1]) for index in indices]
            for index, text in zip(indices, _continue(model, blanks, stops), strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness writes into its results in addition to its own settings."""
        return {"a3_jax": self.model.describe() | {"bos": self.bos, "seed": self.seed}}

    def _encode(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text, self.bos)

    def _first_token(self) -> int:
        """Returns the token used as context when the context is empty (BOS, else EOS)."""
        tokenizer = self.model.tokenizer
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if first is None:
            raise InputError("has neither BOS nor EOS to begin a text with", field="tokenizer")
        return first

    def _target(self, context: str, continuation: str) -> ScoreTarget:
        if context:
            stripped = context.rstrip()
            continuation, context = context[len(stripped) :] + continuation, stripped
            before, whole = self._encode(context), self._encode(context + continuation)
        else:
            whole = self.model.tokenizer.encode(continuation, "no")
            if whole[:1] != [self._first_token()]:
                whole = [self._first_token(), *whole]
            before = whole[:1]
        start, most = len(before), _scored_length(self.model)
        if start >= len(whole):
            raise InputError(f"the continuation {continuation!r} has no tokens", field="lm_eval")
        if len(whole) - start >= most:
            raise InputError(
                f"a continuation of {len(whole) - start} tokens, the model's context is {most}",
                field="lm_eval",
            )
        cut = max(len(whole) - most, 0)
        seed = _seed(self.seed, context, continuation)
        return ScoreTarget(np.asarray(whole[cut:], np.int32), start - cut, len(whole) - cut, seed)

    def _blank(self, index: int, context: str, settings: dict[str, Any]) -> TextBlank:
        given = [settings[name] for name in _LENGTH_NAMES if settings.get(name) is not None]
        length = int(given[0]) if given else MAX_NEW_TOKENS
        room = self.model.max_length - length
        if length < 1 or room < 1:
            raise InputError(
                f"{length} new tokens, the model's context is {self.model.max_length}", field="max_gen_toks"
            )
        prefix = (self._encode(context) or [self._first_token()])[-room:]
        return TextBlank(np.asarray(prefix, np.int32), NO_TOKENS, length, _seed(self.seed, index, context))


def windows(tokens: Sequence[int], first: int, longest: int) -> Iterator[ScoreTarget]:
    """Yields a text in windows that score each of its tokens once, with as much to its left as fits.

        longest 5, first _    _ 0 1 2 3      scored: 0 1 2 3
                                    3 4 5 6 7                4 5 6 7
                                          5 6 7 8 9                  8 9     the last reads back

    Args:
      tokens: the text's tokens.
      first: the token before the text.
      longest: number of tokens of a window.
    """
    text, step = np.asarray([first, *tokens], np.int32), longest - 1
    for start in range(1, len(text), step):
        stop = min(start + step, len(text))
        begin = max(stop - longest, 0)
        yield ScoreTarget(text[begin:stop], start - begin, stop - begin)


def _scored_length(model: EvaluatedModel) -> int:
    return getattr(model, "scored_length", model.max_length)


def _score_and_greedy(model: EvaluatedModel, targets: list[ScoreTarget]) -> list[tuple[float, bool]]:
    """Scores each part and tells whether it is greedy: from one pass, else by filling a blank."""
    both: Callable | None = getattr(model, "score_and_greedy", None)
    if both is not None:
        return both(targets)
    blanks = [
        TextBlank(target.tokens[: target.start], NO_TOKENS, target.stop - target.start, target.seed)
        for target in targets
    ]
    greedy = _with_sampling(model, {"temperature": 0.0}).fill(blanks)
    parts = [target.tokens[target.start : target.stop] for target in targets]
    same = [bool((part == tokens).all()) for part, tokens in zip(parts, greedy, strict=True)]
    return list(zip(model.score(targets), same, strict=True))


def _with_sampling(model: EvaluatedModel, sampling: dict[str, Any]) -> EvaluatedModel:
    change: Callable | None = getattr(model, "with_generate", None)
    return model if change is None else change(**sampling)


def _sampling(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns the options of `with_generate` that a request asks for; greedy unless it asks for sampling."""
    temperature, do_sample = settings.get("temperature"), settings.get("do_sample")
    if do_sample and temperature is None:
        temperature = 1.0
    if do_sample is False or not temperature:
        return (("temperature", 0.0),)
    found: list[tuple[str, Any]] = [("temperature", float(temperature))]
    for name, kind in (("top_p", float), ("top_k", int)):
        if settings.get(name) is not None:
            found.append((name, kind(settings[name])))
    return tuple(found)


def _stop_strings(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _continue(model: EvaluatedModel, blanks: list[TextBlank], stops: list[list[str]]) -> list[str]:
    """Fills blanks; returns their texts, each up to EOS or its first stop string.

    A left-to-right model fills in rounds, continuing those that have not stopped: the tokens are the same.
    """
    found = [NO_TOKENS] * len(blanks)
    texts, open_ = [""] * len(blanks), list(range(len(blanks)))
    room = _FIRST_ROUND if isinstance(model, LeftToRight) else max(blank.length for blank in blanks)
    while open_:
        rest = [
            TextBlank(
                np.concatenate([blanks[index].prefix, found[index]]), NO_TOKENS,
                min(room, blanks[index].length - len(found[index])), blanks[index].seed,
            )
            for index in open_
        ]  # fmt: skip
        going = []
        for index, tokens in zip(open_, model.fill(rest), strict=True):
            found[index] = np.concatenate([found[index], tokens])
            texts[index], stopped = _cut(model, found[index], stops[index])
            if not stopped and len(found[index]) < blanks[index].length:
                going.append(index)
        open_, room = going, 2 * room
    return texts


def _cut(model: EvaluatedModel, tokens: np.ndarray, stops: list[str]) -> tuple[str, bool]:
    """Returns the text before EOS and every stop string, and whether one of them occurred."""
    ends = np.flatnonzero(np.isin(tokens, model.tokenizer.eos_ids))
    text = model.tokenizer.decode(tokens[: ends[0]] if ends.size else tokens)
    positions = [position for position in map(text.find, stops) if position >= 0]
    return text[: min(positions, default=len(text))], bool(positions or ends.size)


def _seed(*parts) -> int:
    """Returns a seed below 2^32 that is a function of the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).digest()[:4])
