"""The line at a report's end: the command that makes the run again, and what no option gives."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, those in a mapping with a dot: "schedule.steps"."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            found[name] = value
    return found


def option_words(options: Mapping[str, str], settings: Mapping[str, Any]) -> list[str]:
    """The options of a command.

    Args:
        options: the name of each, and of the setting that it gives. Of one that is a bool, it is a
            flag; numbers in a row get commas between.
        settings: as `flat` gives them.
    """
    words = []
    for option, name in options.items():
        value = settings[name]
        if isinstance(value, bool):
            words += [f"--{option}"] if value else []
        else:
            row = isinstance(value, (tuple, list))
            words += [f"--{option}", ",".join(map(str, value)) if row else str(value)]
    return words


def set_words(settings: Mapping[str, Any]) -> list[str]:
    """A --set for each, such that `parse_settings` gives the value back."""
    return [
        word for name, value in settings.items() for word in ("--set", f"{name}={_text(value)}")
    ]


def _text(value: Any) -> str:
    """JSON, or a word that would not be read as JSON as it is."""
    text = json.dumps(value, separators=(",", ":"))
    if not isinstance(value, str):
        return text
    try:
        json.loads(value)
    except json.JSONDecodeError:
        return value
    return text


def apart(settings: Mapping[str, Any], reached: Mapping[str, Any]) -> list[str]:
    """Name and value of each setting that is not the one that the command reaches."""
    lines = [
        f"{name} {_text(value)}"
        for name, value in settings.items()
        if name not in reached or reached[name] != value
    ]
    return lines + [f"no {name}" for name in reached if name not in settings]


def again(words: Sequence[str], missing: Sequence[str]) -> str:
    """The command, and the settings that it has no option for, where the run's are others than the
    command's."""
    line = f"`{shlex.join(words)}`"
    return f"{line}; it has no option for {', '.join(missing)}" if missing else line
