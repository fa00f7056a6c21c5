"""The nearest valid names for a misspelt one, by edit distance: short keys such as `tp` defeat similarity ratios."""

from __future__ import annotations

from collections.abc import Iterable


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn one text into the other (optimal string
    alignment)."""
    before: list[int] = []
    previous = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        current = [i]
        for j, right in enumerate(second, start=1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (left != right))
            if i > 1 and j > 1 and left == second[j - 2] and first[i - 2] == right:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]


def nearest(name: str, allowed: Iterable[str], limit: int = 6) -> list[str]:
    """The names nearest to `name`, best first; empty when nothing is near enough to be meant."""
    wanted = _plain(name)
    scored = []
    for candidate in allowed:
        plain = _plain(candidate)
        distance = edit_distance(wanted, plain)
        reach = max(1, (max(len(wanted), len(plain)) + 1) // 3)
        contained = min(len(wanted), len(plain)) >= 3 and (plain.startswith(wanted) or wanted.startswith(plain))
        if distance <= reach or contained:
            same_letters = sorted(wanted) == sorted(plain)
            scored.append((distance, not same_letters, wanted[:1] != plain[:1], candidate))
    scored.sort()
    best = [entry for entry in scored if entry[0] == scored[0][0]]
    return [entry[-1] for entry in best[:limit]]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean ...?` with the nearest names, or nothing."""
    close = nearest(name, allowed)
    return f" Did you mean {' or '.join(f'{item!r}' for item in close)}?" if close else ""


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
