"""Options of `a3 generate` and `a3 score`, checked where they are made, and the request to fill blanks.

Imports nothing heavy.
"""

import dataclasses
import math
from typing import Any

from a3_jax.checks import check_seed, from_mapping, number, one_of, whole_number
from a3_jax.errors import InputError

MODELS = ("a3", "ar")
STRATEGIES = ("groupwise", "dynamic", "speculative")
CRITERIA = ("confidence", "entropy", "margin", "random")
COMMITS = ("chain", "flat")
CONTEXTS = ("flat", "l2r")
DTYPES = ("float32", "bfloat16")
BOS = ("auto", "yes", "no")


@dataclasses.dataclass(frozen=True)
class SharedOptions:
    """Options of `generate` and of `score`.

    Attributes:
      model: "a3", or "ar" for the content stream as the plain left-to-right model.
      context: given tokens as one group ("flat") or in reading order ("l2r"); None: what the
        checkpoint was trained with, flat if it doesn't say.
      dtype: type of parameters and activations; None: float32 on CPU, bfloat16 on accelerators. Float32
        implies the highest matmul precision.
      bos: whether text gets a BOS token; "auto": if its tokenizer adds one.
    """

    model: str = "a3"
    context: str | None = None
    dtype: str | None = None
    bos: str = "auto"

    def __post_init__(self):
        one_of("model", self.model, MODELS)
        one_of("bos", self.bos, BOS)
        if self.context is not None:
            one_of("context", self.context, CONTEXTS)
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES)

    @property
    def compute_dtype(self) -> str:
        """`dtype`, or the default of the devices at hand."""
        from a3_jax.model.two_stream import default_dtype

        return self.dtype or default_dtype()


@dataclasses.dataclass(frozen=True)
class ScoreOptions(SharedOptions):
    """Options of `score`, over those it shares with `generate`.

    Attributes:
      orders: under how many sampled orders each input is scored.
    """

    orders: int = 1

    def __post_init__(self):
        super().__post_init__()
        whole_number("orders", self.orders, 1)
        if self.model == "ar" and self.orders > 1:
            raise InputError(f"{self.orders} contradicts model 'ar', which has one order", field="orders")


@dataclasses.dataclass(frozen=True)
class GenerateOptions(SharedOptions):
    """Options of `generate`, over those it shares with `score`.

    Attributes:
      strategy: "groupwise" (fixed groups, one forward per group), "dynamic" (each step looks at every
        blank and commits the best by `criterion`) or "speculative" (several per forward, drafted in
        parallel and verified, with the distribution of one at a time).
      order, group_size: the groups of groupwise, where the input gives no ranks; speculative takes the
        order in singles. "block" also holds for dynamic, inside each block.
      block_size, block_order: of order "block": blanks per block, and the order inside.
      step_size: blanks that dynamic commits per step, where no bound says how many.
      entropy_bound, threshold, factor: dynamic commits as many as this allows, see
        `strategies.CommitPolicy`; the entropy bound also limits the windows of speculative.
      max_commit: of dynamic with a bound, the most blanks per step.
      min_gap: of dynamic, positions between two commits of a step.
      window: of speculative, drafts per forward.
      commit: "chain" (a token keeps the rank of its commit: exact log-probability) or "flat" (all
        tokens so far are one group, recomputed each step: the authors' release).
      temperature: 0 is greedy.
      top_k, top_p: filters on what is drawn from; 0 and 1.0 filter nothing.
      num_samples: completions per input.
      rerank: of these the one with the largest exact joint log-probability, left to right given all
        given tokens, is kept.
      stop_at_eos: an EOS, any of the checkpoint's `eos_ids`, after all given tokens, with every blank
        before it filled, ends the text; what was generated after it is dropped. Implied by order "block",
        where the checkpoint has an EOS.
      no_blanks: `[[` in a text is text like any other, never a blank.
    """

    strategy: str = "groupwise"
    order: str = "l2r"
    group_size: int = 4
    criterion: str = "confidence"
    step_size: int = 1
    entropy_bound: float | None = None
    threshold: float | None = None
    factor: float | None = None
    max_commit: int = 16
    min_gap: int = 1
    window: int = 8
    block_size: int = 32
    block_order: str = "random"
    commit: str = "chain"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1
    rerank: bool = False
    stop_at_eos: bool = False
    no_blanks: bool = False

    def __post_init__(self):
        from a3_jax.ordering.ranks import INNER_ORDERS, ORDERS

        super().__post_init__()
        one_of("block_order", self.block_order, INNER_ORDERS)
        for name in ("max_commit", "min_gap", "window", "block_size"):
            whole_number(name, getattr(self, name), 1)
        for name, most in (("entropy_bound", math.inf), ("threshold", 1), ("factor", math.inf)):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0, most)
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("order", self.order, ORDERS)
        one_of("criterion", self.criterion, CRITERIA)
        one_of("commit", self.commit, COMMITS)
        whole_number("group_size", self.group_size, 1)
        whole_number("step_size", self.step_size, 1)
        whole_number("top_k", self.top_k, 0)
        check_seed(self.seed)
        whole_number("num_samples", self.num_samples, 1)
        number("temperature", self.temperature, 0)
        number("top_p", self.top_p, 0, 1, above=True)
        self._refuse_contradictions()

    def _refuse_contradictions(self):
        if self.commit == "flat" and self.context == "l2r":
            raise InputError(
                "'l2r' contradicts commit 'flat', which has all tokens in one group", field="context"
            )
        if self.model == "ar" and self.commit == "flat":
            raise InputError(
                "'flat' contradicts model 'ar', which has every token in its own group", field="commit"
            )
        bounds = [
            name for name in ("entropy_bound", "threshold", "factor") if getattr(self, name) is not None
        ]
        if len(bounds) > 1:
            raise InputError(
                f"contradicts {bounds[0]}: one of them says how much is committed", field=bounds[1]
            )
        allowed = {"dynamic": bounds, "speculative": ["entropy_bound"], "groupwise": []}[self.strategy]
        for name in bounds:
            if name not in allowed:
                raise InputError(f"strategy {self.strategy!r} does not read it", field=name)
        if bounds and self.strategy == "dynamic" and self.step_size != 1:
            raise InputError(
                f"{self.step_size} contradicts {bounds[0]}; --max_commit limits it", field="step_size"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, reader in (("min_gap", "dynamic"), ("max_commit", "dynamic"), ("window", "speculative")):
            if self.strategy != reader and getattr(self, name) != defaults[name]:
                raise InputError(f"strategy {self.strategy!r} does not read it", field=name)
        if self.commit == "flat" and self.strategy == "speculative":
            raise InputError(
                "'flat' contradicts strategy 'speculative', whose commits have ranks of their own",
                field="commit",
            )
        if self.model == "ar" and self.strategy != "groupwise":
            raise InputError(
                f"{self.strategy!r} contradicts model 'ar', which fills from the left", field="strategy"
            )


@dataclasses.dataclass(frozen=True)
class BlankRequest:
    """What to fill: T tokens in reading order.

    Attributes:
      number: the input line, or a seed below 2^32: randomness is a function of it.
      tokens: [T] int32, 0 at blanks.
      blank: [T] bool.
      ranks: [T] int32, read at blanks only; None where the input has none.
      text: the `borders.BlankText` of the tokens, for the text of the result; None of an input of tokens.
    """

    number: int
    tokens: Any
    blank: Any
    ranks: Any
    text: Any = None


def make_options(cls, options: dict):
    """Returns `cls(**options)`; an unknown name is refused with the nearest known one."""
    return from_mapping(cls, options, noun="option")
