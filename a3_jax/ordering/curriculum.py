"""The curriculum as data: stages, each with its orders, its steps and its learning-rate schedule.

paper     l2r -> contiguous groups of 2 -> of 4 -> random groups of 4    (arXiv 2601.13228)
release   the six strategies of the authors' code, each a run of its own
"""

import dataclasses
from collections.abc import Mapping, Sequence

from a3_jax.checks import from_mapping, number, one_of, whole_number
from a3_jax.errors import InputError
from a3_jax.ordering.contexts import CONTEXT_SHAPES
from a3_jax.ordering.ranks import CONTEXTS, TRAINING_CONTEXTS, TRAINING_ORDERS

OBJECTIVES = ("any_order", "ar", "masked_diffusion")
SCHEDULES = ("linear", "cosine", "constant")

PAPER_STEPS = 954  # per stage: four stages of 256 x 2048 tokens per step are 2.0e9 tokens
RELEASE_STEPS = 800
RELEASE_WARMUP_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Order:
    """One component of a stage's mixture of orders.

    Attributes:
      order: "l2r" (one token per group), "contiguous", "random" or "spread", see `ranks`.
      group_sizes: drawn uniformly, one per example; (1,) for l2r, else (4,) if left empty.
      weight: relative share of the examples.
      context_shapes: shapes of a context that comes first and is not predicted, see `contexts`: drawn
        uniformly, one per document; () for no context.
      context: how given tokens (context, BOS, prompts) are ranked: "flat" (one group), "l2r" (one token
        per group, in reading order) or "group" (contiguous groups of the example's size).
    """

    order: str = "l2r"
    group_sizes: tuple[int, ...] = ()
    weight: float = 1.0
    context_shapes: tuple[str, ...] = ()
    context: str = "flat"

    def __post_init__(self):
        one_of("order", self.order, TRAINING_ORDERS)
        if not _is_list(self.group_sizes):
            raise InputError(f"must be a list of numbers, got {self.group_sizes!r}", field="group_sizes")
        sizes = tuple(self.group_sizes) or ((1,) if self.order == "l2r" else (4,))
        for size in sizes:
            whole_number("group_sizes", size, 1)
        if self.order == "l2r" and sizes != (1,):
            raise InputError("l2r has one token a group; use order='contiguous'", field="group_sizes")
        number("weight", self.weight, 0, above=True)
        if not _is_list(self.context_shapes):
            raise InputError(f"must be a list of names, got {self.context_shapes!r}", field="context_shapes")
        for shape in self.context_shapes:
            one_of("context_shapes", shape, CONTEXT_SHAPES)
        one_of("context", self.context, TRAINING_CONTEXTS)
        object.__setattr__(self, "group_sizes", sizes)
        object.__setattr__(self, "context_shapes", tuple(self.context_shapes))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training under one mixture of orders.

    Attributes:
      name: unique within a run; checkpoints and metrics carry it.
      steps: optimiser steps.
      objective: "any_order" (query stream), "ar" (next token from the content stream; `orders` is not
        read), or "masked_diffusion" (masked tokens from all the others; neither is `orders`).
      orders: the mixture each example draws from.
      learning_rate, warmup_steps, schedule: None = the run's.
      restart_schedule: the schedule spans this stage alone, warm-up included.
      reset_optimizer: fresh moments at the start of the stage.
      one_order_per_batch: all examples of a step share one draw.
      bos_given: a document's BOS is given, not predicted (where the tokenizer has one).
      absent: share of the examples, 0 to 1, whose documents each lose a span: positions are kept, but
        its tokens are neither given nor predicted. Read by "any_order" alone.
      content_loss_weight: of the next-token loss of the content rows, on examples whose ranks are the
        positions, beside the query rows' loss; what keeps the left-to-right model alive. 0 for none.
    """

    name: str
    steps: int
    objective: str = "any_order"
    orders: tuple[Order, ...] = dataclasses.field(default_factory=lambda: (Order("l2r"),))
    learning_rate: float | None = None
    warmup_steps: int | None = None
    schedule: str | None = None
    restart_schedule: bool = False
    reset_optimizer: bool = False
    one_order_per_batch: bool = False
    bos_given: bool = False
    absent: float = 0.0
    content_loss_weight: float = 0.0

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"must be a text, got {self.name!r}", field="name")
        whole_number("steps", self.steps, 1)
        one_of("objective", self.objective, OBJECTIVES)
        if not _is_list(self.orders) or not self.orders:
            raise InputError(f"must be a list of at least one order, got {self.orders!r}", field="orders")
        if self.learning_rate is not None:
            number("learning_rate", self.learning_rate, 0, above=True)
        if self.warmup_steps is not None:
            whole_number("warmup_steps", self.warmup_steps, 0)
        if self.schedule is not None:
            one_of("schedule", self.schedule, SCHEDULES)
        for name in ("restart_schedule", "reset_optimizer", "one_order_per_batch", "bos_given"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"must be True or False, got {getattr(self, name)!r}", field=name)
        number("absent", self.absent, 0, 1)
        number("content_loss_weight", self.content_loss_weight, 0)
        if self.content_loss_weight and self.objective != "any_order":
            raise InputError(f"the loss of objective {self.objective!r} is that of the content rows",
                             field="content_loss_weight")  # fmt: skip


def paper_stages(steps: int | Sequence[int] = PAPER_STEPS) -> tuple[Stage, ...]:
    """Returns the paper's progressive adaptation: groups grow from one token to four, then any order.

    Args:
      steps: one number for each of the four stages, or one for all (2.0e9 tokens in all at the paper's
        batch of 256 x 2048, split evenly).
    """
    return _named_stages(
        {
            "l2r": (Order("l2r"),),
            "contiguous2": (Order("contiguous", (2,)),),
            "contiguous4": (Order("contiguous", (4,)),),
            "random4": (Order("random", (4,)),),
        },
        steps,
    )


def release_stages(steps: int | Sequence[int] = RELEASE_STEPS) -> tuple[Stage, ...]:
    """Returns the six strategies of the authors' release, in its order, each trained as a run of its own.

    Every stage warms up, decays linearly to zero and starts with a fresh optimiser; one order is
    drawn for a whole batch. The release has one truncated document in a row: use `packing=False`.

    Args:
      steps: one number for each of the six stages, or one for all.
    """
    return _named_stages(
        {
            "l2r": (Order("l2r"),),
            "contiguous2": (Order("contiguous", (2,)),),
            "contiguous4": (Order("contiguous", (4,)),),
            "random4": (Order("random", (4,)),),
            "random8": (Order("random", (8,)),),
            "mixed8": (Order("random", (8,)), Order("contiguous", (8,))),
        },
        steps,
        warmup_steps=RELEASE_WARMUP_STEPS,
        schedule="linear",
        restart_schedule=True,
        reset_optimizer=True,
        one_order_per_batch=True,
    )


PRESETS = {"paper": paper_stages, "release": release_stages}


def stages_from_config(stages: Sequence[Mapping]) -> tuple[Stage, ...]:
    """Stages from a list of mappings with `Stage`'s fields (`orders`: mappings with `Order`'s)."""
    if not _is_list(stages) or not stages:
        raise InputError(f"must be a list of at least one stage, got {stages!r}", field="stages")
    built = tuple(_stage(fields, f"stages[{index}]") for index, fields in enumerate(stages))
    names = [stage.name for stage in built]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two stages are called {name!r}", field="stages")
    return built


def stages_done(stages: Sequence[Stage], step: int) -> list[int]:
    """Returns each stage's number of steps before a step; stages that a run left out count as done."""
    done, left = [], step
    for stage in stages:
        done.append(min(left, stage.steps))
        left -= done[-1]
    return done


def total_steps(stages: Sequence[Stage]) -> int:
    return sum(stage.steps for stage in stages)


def stage_at(stages: Sequence[Stage], step: int) -> tuple[int, Stage, int]:
    """Finds the stage of a step, counted from 0 over all stages.

    Returns:
      (index of the stage, stage, its first step).
    """
    first = 0
    for index, stage in enumerate(stages):
        if first <= step < first + stage.steps:
            return index, stage, first
        first += stage.steps
    raise ValueError(f"step {step} is outside the {first} steps of the curriculum")


def trained_context(stage: Stage) -> str | None:
    """Returns how a stage ranks all contexts it draws, "flat" or "l2r"; None: draws none, or differs."""
    modes = {order.context for order in stage.orders if order.context_shapes}
    agreed = stage.objective == "any_order" and len(modes) == 1 and modes <= set(CONTEXTS)
    return modes.pop() if agreed else None


def _named_stages(orders: Mapping[str, tuple[Order, ...]], steps, **fields) -> tuple[Stage, ...]:
    each = [steps] * len(orders) if isinstance(steps, int) else list(steps)
    if len(each) != len(orders):
        raise InputError(f"expected {len(orders)} numbers ({', '.join(orders)}), got {each}", field="steps")
    return tuple(
        Stage(name, steps=count, orders=mixture, **fields)
        for (name, mixture), count in zip(orders.items(), each, strict=True)
    )


def _stage(fields, where: str) -> Stage:
    if isinstance(fields, Stage):
        return fields
    if hasattr(fields, "keys") and _is_list(fields.get("orders")):
        orders = tuple(
            order if isinstance(order, Order) else from_mapping(Order, order, f"{where}.orders[{index}]")
            for index, order in enumerate(fields["orders"])
        )
        fields = dict(fields) | {"orders": orders}
    return from_mapping(Stage, fields, where)


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)
