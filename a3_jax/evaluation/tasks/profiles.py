"""Protocols by name: every switch that papers and scripts set differently, with where it is known from.

    a3_best_guess      data and metrics of the DiffuLLaMA scripts, A3's own way of scoring, natural spaces
    diffullama_script  the released scripts of DiffuLLaMA (arXiv 2410.17891), oddities and all
    diffullama_paper   the same where the paper's text says otherwise

A profile is for one kind of model: the scripts treat autoregressive baselines differently. `profile_for`
gives a profile with what the caller wants otherwise: `rule.piqa=sum`, `pile.samples=64`, decoding options.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from a3_jax.checks import one_of, whole_number
from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.models import A3, AR, DIFFUSION, EMPTY_LEVELS, LOSS_WEIGHTS, MODELS
from a3_jax.evaluation.tasks.catalogue import (
    CHOICE,
    CODE,
    GENERATE,
    INFILL,
    PERPLEXITY,
    TASKS,
    Task,
    task_named,
)

BOS_POLICIES = ("first", "each", "none")
PILE_ORDERS = ("random", "confidence", "entropy")
RULES = ("sum", "per_token", "per_character", "per_byte")
_VALUES = {
    "join_space": ("script", "natural"),
    "tokenising": ("whole", "separate"),
    "winogrande_pieces": ("three", "two", "suffix"),
    "loss_weight": LOSS_WEIGHTS,
    "empty_level": EMPTY_LEVELS,
    "triviaqa_norm": ("squad", "triviaqa"),
    "triviaqa_match": ("containment", "strict"),
    "ar_cap": ("tokens", "characters"),
}
_BY_LEVELS = ("mask32", "levels")  # scorers with noise levels
_CHOICE_TASKS = tuple(task.name for task in TASKS.values() if task.kind == CHOICE)
_FILL_TASKS = tuple(task.name for task in TASKS.values() if task.kind in (INFILL, GENERATE, CODE))


@dataclasses.dataclass(frozen=True)
class PileSettings:
    """Conditional perplexity on The Pile: what A3's Table 2 leaves open, our proposal for it.

    Attributes:
      samples: number of documents, drawn by seed.
      prompt: number of given tokens, as the evaluator counts.
      min_tokens: the fewest tokens of a document, as the evaluator counts.
      lengths: lengths of the whole text, prompt included, in the model's tokens.
      orders: criteria of dynamic resampling, the table's columns.
      step_size, temperature, top_p: options of dynamic resampling.
    """

    samples: int = 256
    prompt: int = 128
    min_tokens: int = 1024
    lengths: tuple[int, ...] = (512, 1024)
    orders: tuple[str, ...] = PILE_ORDERS
    step_size: int = 1
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        for name in ("samples", "prompt", "min_tokens", "step_size"):
            whole_number(f"pile.{name}", getattr(self, name), 1)
        for length in self.lengths:
            whole_number("pile.lengths", length, 1)
        for order in self.orders:
            if order not in PILE_ORDERS:
                message = f"must be among {', '.join(PILE_ORDERS)}, got {order!r}"
                raise InputError(message, field="pile.orders")


@dataclasses.dataclass(frozen=True)
class Profile:
    """All switches of a protocol. Those per task hold for the tasks that the mapping names.

    Attributes:
      name: as in `--profile`.
      model: "a3" (two streams), "ar" (left to right) or "masked_diffusion".
      source: where it is known from.
      context: per task, what precedes the choices or the blank, where it is not the task's own.
      before_choice: per task, a text in front of each choice. DiffuLLaMA's diffusion script puts a
        space in front of PIQA's solutions, its AR script does not.
      join_space: where pieces meet: "script", the texts as the scripts put them together, or "natural",
        one space between words that belongs to the piece after it, as in ordinary text. The scripts' pieces
        start without one, which SentencePiece hides and byte-pair tokenisers do not.
      tokenising: "whole": the text's own tokens, cut at the token that holds the first predicted character
        (`borders.cut`); "separate": pieces are encoded each by itself, so that there is a token boundary
        between them (DiffuLLaMA). LAMBADA and code are "whole" under every profile.
      bos: per task: "first": the tokenizer's habit once, so one BOS at position 0 where it adds one; "each":
        its habit at each piece, so a second BOS inside the scored part (DiffuLLaMA's diffusion script on
        HellaSwag and PIQA); "none".
      winogrande_pieces: "three": prefix | option | suffix, the last two scored (diffusion script);
        "two": prefix | option + space + suffix (AR script); "suffix": the option belongs to the context,
        the suffix alone is scored (lm-evaluation-harness, and the scripts of SEDD and Plaid).
      rule: per task of choices, what decides: the log-probability itself, or per token, character or byte
        of the choice. DiffuLLaMA's AR script sums on PIQA and SIQA and takes the mean on the others; its
        paper says mean on all four.
      scorer: for two streams one of `scorers.SCORERS` (which one A3 used is unknown, `chain` is most
        probable), for masked diffusion one of `scorers.ESTIMATORS`. None: the model's own way, for masked
        diffusion its family's.
      levels: number of noise levels of scorers `mask32` and `levels` (DiffuLLaMA: 32).
      loss_weight: weight of a level: "none" (released code) or "inv_t", 1/t (paper, eq. 25).
      empty_level: a level that masks nothing counts as a loss of "zero" (released code), or "skip".
      limit: per task, number of rows that count, where it is not the task's own; None: all.
      length: per task, number of blank tokens where it is not the reference's own (DiffuLLaMA takes the
        oracle length in TriviaQA, LAMBADA, ROCStories and code).
      triviaqa_extra: blank tokens beyond the longest alias: 0 (scripts), 10 (paper, SEDD script).
      triviaqa_norm: how predictions are normalised: "squad" (scripts) deletes punctuation; "triviaqa", like
        the data set's own aliases, makes it a space, so that hyphenated answers match them.
      triviaqa_match: what `exact_match` is: "containment" of any normalised alias in the prediction
        (scripts), or "strict" equality (harness).
      ar_cap: number of blank tokens of ROCStories for AR models: the reference's "tokens", or, by a slip in
        the AR script, its "characters".
      generate: per task, how blanks are filled: fields of `GenerateOptions` for "a3" and "ar"; `sampler`,
        `steps` (a number, or "length" of the blank), `temperature` for "masked_diffusion", its family's
        own where not given.
      stops: per task, texts at which an answer is cut.
      shots: per task, number of training rows in front of the prompt.
      code_max_tokens: longer programs get an empty completion (DiffuLLaMA skips above 1,000); None: no cap.
      pile: settings of the conditional perplexity.
    """

    name: str
    model: str
    source: str
    join_space: str
    bos: Mapping[str, str]
    rule: Mapping[str, str]
    generate: Mapping[str, Mapping[str, Any]]
    context: Mapping[str, str] = dataclasses.field(default_factory=dict)
    before_choice: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenising: str = "whole"
    winogrande_pieces: str = "three"
    scorer: str | None = "chain"
    levels: int = 32
    loss_weight: str = "none"
    empty_level: str = "zero"
    limit: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    length: Mapping[str, int] = dataclasses.field(default_factory=dict)
    triviaqa_extra: int = 0
    triviaqa_norm: str = "squad"
    triviaqa_match: str = "containment"
    ar_cap: str = "tokens"
    stops: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shots: Mapping[str, int] = dataclasses.field(default_factory=dict)
    code_max_tokens: int | None = None
    pile: PileSettings = PileSettings()

    def __post_init__(self):
        one_of("model", self.model, MODELS)
        for name, choices in _VALUES.items():
            one_of(name, getattr(self, name), choices)
        for name, choices in (("bos", BOS_POLICIES), ("rule", RULES)):
            for task, value in getattr(self, name).items():
                one_of(f"{name}.{task}", value, choices)
        whole_number("triviaqa_extra", self.triviaqa_extra, 0)
        whole_number("levels", self.levels, 1)

    def context_of(self, task: Task) -> str:
        """Returns what precedes the choices or the blank of a task."""
        return self.context.get(task.name, task.context)

    def limit_of(self, task: Task) -> int | None:
        """Returns how many rows of a task count; None: all."""
        return self.limit.get(task.name, task.limit)

    @property
    def scorer_options(self) -> dict[str, Any]:
        """The options of the scorer, if it has noise levels."""
        if self.scorer not in _BY_LEVELS:
            return {}
        return {"levels": self.levels, "loss_weight": self.loss_weight, "empty_level": self.empty_level}

    def settings(self, task: Task | None = None) -> dict[str, Any]:
        """Returns every switch as plain JSON; given a task, its entry of the switches per task."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in found.items():
            if isinstance(value, Mapping):
                found[name] = dict(value) if task is None else value.get(task.name)
        found["pile"] = dataclasses.asdict(self.pile)
        if task is not None:
            found["context"], found["limit"] = self.context_of(task), self.limit_of(task)
            if task.kind != PERPLEXITY:
                del found["pile"]
        return json.loads(json.dumps(found))


def profile_named(name: str, model: str = A3) -> Profile:
    """Returns the profile of a name, for a kind of model."""
    if name not in PROFILES:
        message = f"no profile {name!r}{nearest(name, PROFILES) or '; known are ' + ', '.join(PROFILES)}"
        raise InputError(message, field="profile")
    one_of("model", model, MODELS)
    return _MAKERS[name](model)


def changed(profile: Profile, **switches) -> Profile:
    """Returns the profile with other values of some switches, by name."""
    known = [field.name for field in dataclasses.fields(profile)]
    for name in switches:
        if name not in known:
            raise InputError(f"no such switch{nearest(name, known)}", field=f"profile.{name}")
    return dataclasses.replace(profile, **switches)


def profile_for(
    profile: str | Profile,
    kind: str,
    scorer: str | None = None,
    generate: Mapping[str, Any] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> Profile:
    """Returns the profile of a kind of model, with the caller's changes.

    Args:
      profile: its name, or the profile itself.
      kind: kind of model, one of `MODELS`.
      scorer: scorer in place of the profile's.
      generate: decoding options over those of every task.
      switches: values by name of the switch; those per task as NAME.TASK, those of the pile as pile.NAME.
    """
    if isinstance(profile, str):
        profile = profile_named(profile, kind)
    elif profile.model != kind:
        raise InputError(f"is for {profile.model!r}, the model is {kind!r}", field="profile")
    for name, value in (switches or {}).items():
        profile = _with_switch(profile, name, value)
    if scorer is not None:
        profile = changed(profile, scorer=scorer)
    if not generate:
        return profile
    merged = {}
    for task in _FILL_TASKS:
        base = profile.generate.get(task, {})
        # Another sampler starts from its own settings, not from those of the profile's sampler.
        is_other = kind == DIFFUSION and generate.get("sampler", base.get("sampler")) != base.get("sampler")
        merged[task] = dict(generate) if is_other else {**base, **generate}
    return changed(profile, generate=merged)


def _with_switch(profile: Profile, name: str, value) -> Profile:
    """Changes one switch: NAME, NAME.TASK or pile.NAME."""
    head, _, key = name.partition(".")
    values = getattr(profile, head, None)
    if not key:
        if isinstance(values, Mapping | PileSettings):
            raise InputError(f"has several values: one of them is {head}.NAME", field=f"profile.{head}")
        return changed(profile, **{head: value})
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(values, PileSettings):
        names = [field.name for field in dataclasses.fields(values)]
        if key not in names:
            raise InputError(f"no such setting{nearest(key, names)}", field=name)
        if isinstance(getattr(values, key), tuple) and not isinstance(value, tuple):
            value = tuple(value.split(",")) if isinstance(value, str) else (value,)
        return changed(profile, pile=dataclasses.replace(values, **{key: value}))
    if not isinstance(values, Mapping):
        names = [field.name for field in dataclasses.fields(profile)]
        raise InputError(f"no switch of several values{nearest(head, names)}", field=name)
    task_named(key)
    return changed(profile, **{head: {**values, key: value}})


_DIFFULLAMA = "github.com/HKUNLP/DiffuLLaMA, evaluation/, and arXiv 2410.17891 (ICLR 2025)"
_BOS_SCRIPT = {  # what encode() was called with in the diffusion script, by task
    "hellaswag": "each", "piqa": "each", "winogrande": "none", "siqa": "none",
    "triviaqa": "first", "lambada": "first", "rocstories": "none",
}  # fmt: skip
_RULE_AR = {"hellaswag": "per_token", "winogrande": "per_token", "piqa": "sum", "siqa": "sum"}


def _sampled(model: str) -> dict[str, dict]:
    """Fills as the diffusion scripts do: confidence order, temperature 0.9, no top-p."""
    if model == AR:
        return {task: {"temperature": 0.0} for task in _FILL_TASKS}
    if model == A3:
        one_by_one = {"strategy": "dynamic", "criterion": "confidence", "step_size": 1}
        settings = {task: {**one_by_one, "temperature": 0.9} for task in _FILL_TASKS}
        settings["lambada"] = {**one_by_one, "temperature": 1.0}
        settings["gsm8k"] = {**one_by_one, "temperature": 0.0}
        return settings
    sampled = {"sampler": "diffullama", "steps": 32, "temperature": 0.9}
    settings = dict.fromkeys(_FILL_TASKS, sampled)
    settings["triviaqa"] = {**sampled, "steps": "length"}
    settings["lambada"] = {**sampled, "steps": "length", "temperature": 1.0}
    settings["gsm8k"] = {**sampled, "steps": 64, "temperature": 0.0}  # argmax
    return settings


def _script(model: str) -> Profile:
    is_ar = model == AR
    bos = {**dict.fromkeys((*_CHOICE_TASKS, *_FILL_TASKS), "none"), **_BOS_SCRIPT}
    if is_ar:
        bos |= dict.fromkeys(_CHOICE_TASKS, "none")
    return Profile(
        name="diffullama_script",
        model=model,
        source=_DIFFULLAMA,
        join_space="script",
        tokenising="separate",
        bos=bos,
        before_choice={} if is_ar else {"piqa": " "},
        winogrande_pieces="two" if is_ar else "three",
        rule=_RULE_AR if is_ar else dict.fromkeys(_CHOICE_TASKS, "per_token"),
        scorer={A3: "mask32", AR: None, DIFFUSION: "levels"}[model],
        generate=_sampled(model),
        length={"gsm8k": 256},
        ar_cap="characters",
        code_max_tokens=1000,
    )


def _paper(model: str) -> Profile:
    return dataclasses.replace(
        _script(model),
        name="diffullama_paper",
        rule=dict.fromkeys(_CHOICE_TASKS, "per_token"),
        loss_weight="inv_t",
        triviaqa_extra=10,
        ar_cap="tokens",
    )


def _best_guess(model: str) -> Profile:
    greedy = {"order": "l2r", "group_size": 1, "temperature": 0.0}
    return dataclasses.replace(
        _script(model),
        name="a3_best_guess",
        source=f"arXiv 2601.13228 as far as it says, else {_DIFFULLAMA}",
        join_space="natural",
        tokenising="whole",
        bos=dict.fromkeys((*_CHOICE_TASKS, *_FILL_TASKS), "first"),
        before_choice={},
        winogrande_pieces="three",
        rule=dict.fromkeys(_CHOICE_TASKS, "per_token") if model == DIFFUSION else _RULE_AR,
        scorer={A3: "chain", AR: None, DIFFUSION: "levels"}[model],
        generate=dict.fromkeys(_FILL_TASKS, greedy) if model == A3 else _sampled(model),
        context={"gsm8k": "Question: {question}\nAnswer:"},  # the harness's template
        shots={"gsm8k": 5},
        stops={"gsm8k": ("Question:",)},
        ar_cap="tokens",
        code_max_tokens=None,
    )


_MAKERS = {
    "a3_best_guess": _best_guess,
    "diffullama_script": _script,
    "diffullama_paper": _paper,
}
DEFAULT_PROFILE = "a3_best_guess"
PROFILES: dict[str, Profile] = {name: make(A3) for name, make in _MAKERS.items()}
