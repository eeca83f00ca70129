"""Settings from the command line: a frozen dataclass, one of its presets to start from, and flags over it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import tyro

Settings = TypeVar("Settings")


def flags_in(arguments: Sequence[str]) -> set[str]:
    """The flags of a command, such as "--data", without their values."""
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}


def gathered(arguments: Sequence[str], *kinds: type) -> list[str]:
    """`--lora a --lora b` as `--lora a b`, which would otherwise be b alone: of these dataclasses' fields that take any
    number of values, what comes again adds to what came."""
    several = {field.name for kind in kinds for field in fields(kind) if "..." in str(field.type)}
    current: list[str] = []
    groups, known = [current], {}
    for argument in arguments:
        flag, _, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if argument.startswith("--") and name in several:
            if name not in known:
                known[name] = [flag]
                groups.append(known[name])
            current = known[name]
            current += [value] if value else []
            continue
        if argument.startswith("--"):
            current = []
            groups.append(current)
        current.append(argument)
    return [word for group in groups for word in group]


def at_least_one(config: Any, *names: str) -> None:
    """ValueError naming the first of these fields that is below 1; None is none of theirs."""
    for name in names:
        if (number := getattr(config, name)) is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {number}: expected at least 1")


def check_clip(config: Any) -> None:
    if not config.clip > 0:
        raise ValueError(f"--clip {config.clip}: expected above 0, inf for no limit")


def parse(kind: type[Settings], presets: Mapping[str, Settings], *, default: str) -> Settings:
    """`--preset NAME` chooses where to start, every other flag replaces a field.

    Raises ValueError naming the presets when there is none of that name.
    """
    arguments, name = [], default
    rest = iter(sys.argv[1:])
    for argument in rest:
        if argument == "--preset":
            name = next(rest, "")
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
        else:
            arguments.append(argument)
    if name not in presets:
        raise ValueError(f"--preset {name!r}: expected one of {', '.join(presets)}")
    description = f"Presets, chosen by --preset (now {name}): {', '.join(presets)}."
    kept = (tyro.conf.AvoidSubcommands,)  # a preset's U-Net is the kind whose fields are flags
    arguments = gathered(arguments, kind)
    return tyro.cli(kind, args=arguments, default=presets[name], description=description, config=kept)
