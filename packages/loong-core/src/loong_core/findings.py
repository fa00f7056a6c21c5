"""All problems of one recipe, gathered with their places, raised once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from loong_core.errors import PluginError, UserError
from loong_core.recipe import Recipe
from loong_core.recipe_load import LoadedRecipe

_KEY = re.compile(r"(?<![\w.])(?:" + "|".join(Recipe.model_fields) + r")(?:\.[a-z_]+)+")


class Findings:
    """Collects messages. A section with a wrong key is `suspect`: what is missing there may be that very key."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self.loaded = loaded
        self.messages: list[str] = [str(problem) for problem in loaded.problems]
        self._suspect = {problem.key[:1] for problem in loaded.problems if problem.key}
        self._top_level = any(len(problem.key) == 1 for problem in loaded.problems)

    def suspect(self, *sections: str) -> bool:
        """Whether a problem found while reading may be the cause of what these sections lack."""
        return self._top_level or any((section,) in self._suspect for section in sections)

    def add(self, key: str, text: str) -> None:
        """A problem of a dotted key."""
        self._append(self.loaded.problem(key, text))

    def absorb(self, key: str, texts: Sequence[str]) -> None:
        """Problems found by somebody who knows no files: each is placed at the key it names, or at `key`."""
        for text in texts:
            if text.startswith(f"{self.loaded.where(key)}:"):
                self._append(text)
                continue
            match = _KEY.search(text)
            named = match.group() if match else key
            if self.loaded.where(named) == self.loaded.source:
                named = key
            prefix = f"{self.loaded.where(named)}: "
            if match is None and key:
                prefix += f"`{key}`: "
            self._append(prefix + text)

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """Collect what the block raises; a plugin's fault is collected too, so that everything is reported together."""
        try:
            yield
        except UserError as error:
            self.absorb(key, error.problems)
        except PluginError as error:
            self.absorb(key, [str(error)])

    def attempt[T](self, key: str, action: Callable[[], T], doubtful: bool = False) -> T | None:
        """The result of `action`, or None with its problems collected. `doubtful`: some of its inputs may be defaults
        in place of wrong keys, so only problems of keys that somebody wrote are believed."""
        try:
            return action()
        except UserError as error:
            self.absorb(key, [text for text in error.problems if not doubtful or self._is_written(text)])
        except PluginError as error:
            self.absorb(key, [str(error)])
        return None

    def _is_written(self, text: str) -> bool:
        match = _KEY.search(text)
        return match is not None and tuple(match.group().split(".")) in self.loaded.places

    def raise_any(self) -> None:
        """Raise everything found as one error, if anything was."""
        if self.messages:
            raise UserError(self.messages)

    def raise_all(self) -> NoReturn:
        """Raise everything found: there is something, or checking could have gone on."""
        self.raise_any()
        raise AssertionError("checking stopped without a reason")

    def _append(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)
