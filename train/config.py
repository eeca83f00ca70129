"""Settings from the command line: a frozen dataclass, one of its presets to start from, and flags over it."""

import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import tyro

Settings = TypeVar("Settings")


def flags_in(arguments: Sequence[str]) -> set[str]:
    """The flags of a command, such as "--data", without their values."""
    return {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}


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
    return tyro.cli(kind, args=arguments, default=presets[name], description=description, config=kept)
