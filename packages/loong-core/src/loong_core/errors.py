"""Errors a user can act on: what failed, where, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class LoongError(Exception):
    """Base of every error loong raises on purpose. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UserError(LoongError):
    """The input is wrong; nothing was started. `problems` holds one message per problem, all found at once."""

    exit_code = 2

    def __init__(self, *problems: str | Sequence[str]) -> None:
        self.problems: list[str] = []
        for problem in problems:
            self.problems.extend([problem] if isinstance(problem, str) else problem)
        super().__init__("\n".join(self.problems))


class RecipeError(UserError):
    """A recipe asks for something that does not exist or cannot be."""


class NotFound(UserError):
    """No descriptor of this kind has this name."""


class DataError(UserError):
    """A data file, or a row of one, is not what its source promises."""


class CheckpointError(UserError):
    """A checkpoint is absent, damaged, foreign or incomplete."""


class Unsupported(UserError):
    """A combination that loong knows and refuses, with the reason."""


class PluginError(LoongError):
    """A plugin broke the contract; the message names the plugin and its version."""

    exit_code = 2


class RunError(LoongError):
    """The run itself failed after it started. `told` is whether another rank tells the user the same."""

    told = False
