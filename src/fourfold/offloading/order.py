"""Which module's experts are used after which, learned from the passes.

Nothing is asked of the model: training uses modules upwards, then each one again (recomputed, then
differentiated) downwards; evaluation and decoding go upwards only. What came next is noted for each pair of
a module and the one before it, and so is the longest run of uses of one module in that place, for a module
that is differentiated right after it was recomputed must not be let go of in between. One step is enough to
know all of them. A pair never seen is taken to go on in its direction.
"""

from __future__ import annotations

_Place = tuple[int | None, int]


class Order:
    """Uses so far, and what follows.

    Args:
        count: number of modules, numbered as the model holds them.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._before: int | None = None
        self._current: int | None = None
        self._run = 0
        self._next: dict[_Place, int] = {}
        self._longest: dict[_Place, int] = {}

    def note(self, module: int) -> None:
        """Module number ``module`` is used now."""
        if module == self._current:
            self._run += 1
            return
        if self._current is not None:
            place = (self._before, self._current)
            self._next[place] = module
            self._longest[place] = max(self._run, self._longest.get(place, 0))
        self._before, self._current, self._run = self._current, module, 1

    def upcoming(self, number: int) -> list[int]:
        """At most ``number`` different modules that are used next, the first one first.

        The current one is the first of them unless it has been used just as often as ever in this place. (If
        more often, as in the first step after evaluations, nothing is known but that it is in use.)
        """
        if self._current is None:
            return list(range(min(number, self._count)))
        before, current = self._before, self._current
        stays = self._run != self._longest.get((before, current), 0)
        found = [current] if stays else []
        for _ in range(2 * number + 2):
            if len(found) == number:
                break
            before, current = current, self._following(before, current)
            if current not in found:
                found.append(current)
        return found[:number]

    def _following(self, before: int | None, current: int) -> int:
        known = self._next.get((before, current))
        if known is not None:
            return known
        down = before is not None and current < before
        following = current - 1 if down else current + 1
        if not 0 <= following < self._count:  # the other way: backward follows forward
            following = current + 1 if down else current - 1
        return min(max(following, 0), self._count - 1)
