"""A profile with what the caller wants otherwise: `rule.piqa=sum`, `pile.samples=64`, decoding options."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from a3_jax.errors import InputError, nearest
from a3_jax.evaluation.tasks.catalogue import CODE, GENERATE, INFILL, TASKS, task_named
from a3_jax.evaluation.tasks.profiles import DIFFUSION, PileSettings, Profile, changed, profile_named


def profile_for(
    profile: str | Profile,
    kind: str,
    scorer: str | None = None,
    generate: Mapping[str, Any] | None = None,
    switches: Mapping[str, Any] | None = None,
) -> Profile:
    """The profile of a kind of model, changed.

    Args:
      profile: its name, or itself.
      scorer: instead of the profile's.
      generate: decoding options over those of every task.
      switches: values by name of the switch; those per task as NAME.TASK, those of the pile as pile.NAME.

    Raises:
      InputError: an unknown name, with the nearest, or a value that can't be.
    """
    if isinstance(profile, str):
        profile = profile_named(profile, kind)
    elif profile.model != kind:
        raise InputError(f"is for {profile.model!r}, the model is {kind!r}", field="profile")
    for name, value in (switches or {}).items():
        profile = _with_switch(profile, name, value)
    if scorer is not None:
        profile = changed(profile, scorer=scorer)
    if generate:
        tasks = [task.name for task in TASKS.values() if task.kind in (INFILL, GENERATE, CODE)]
        merged = {task: with_options(profile.generate.get(task, {}), generate, kind) for task in tasks}
        profile = changed(profile, generate=merged)
    return profile


def with_options(base: Mapping[str, Any], generate: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Decoding options over others. Another sampler starts from its own, not from those of the first."""
    if kind == DIFFUSION and generate.get("sampler", base.get("sampler")) != base.get("sampler"):
        return dict(generate)
    return {**base, **generate}


def _with_switch(profile: Profile, name: str, value) -> Profile:
    head, _, key = name.partition(".")
    if not key:
        if isinstance(getattr(profile, head, None), Mapping | PileSettings):
            raise InputError(f"has several values: one of them is {head}.NAME", field=f"profile.{head}")
        return changed(profile, **{head: value})
    values = getattr(profile, head, None)
    if isinstance(values, PileSettings):
        names = [field.name for field in dataclasses.fields(values)]
        if key not in names:
            raise InputError(f"no such setting{nearest(key, names)}", field=name)
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(getattr(values, key), tuple) and not isinstance(value, tuple):
            value = tuple(value.split(",")) if isinstance(value, str) else (value,)
        return changed(profile, pile=dataclasses.replace(values, **{key: value}))
    if not isinstance(values, Mapping):
        names = [field.name for field in dataclasses.fields(profile)]
        raise InputError(f"no switch of several values{nearest(head, names)}", field=name)
    task_named(key)
    return changed(profile, **{head: {**values, key: tuple(value) if isinstance(value, list) else value}})
