"""Errors that name a setting."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting cannot be used.

    Args:
        name: the setting, as Python spells it: "group_size". The command line makes `--group-size` of it.
        reason: what was given, what is accepted, and what to change.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason
