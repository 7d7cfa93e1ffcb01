"""When a level moves, and at which of its past states it takes its gradients."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """The update frequency of a level, counted in items of its own context.

    Item `i` (1-based) moves the level iff `i % period == 0`, using only items `<= i`;
    the new state is visible from item `i + 1` on. One clock serves the tokens of a
    sequence and the optimizer steps between sequences.

    Attributes:
      period: items between two moves. `math.inf` never moves (a frozen level) and 0 is
        a non-parametric level, which is solved anew for every item (attention).
      anchor: items between two refreshes of the point at which gradients are taken.
        1 takes each gradient where the level stands; C takes all gradients of a chunk
        of C items at the chunk's start (equation 90, arXiv:2512.24695).

    >>> [i for i in range(1, 10) if Clock(period=3).moves(i)]
    [3, 6, 9]
    """

    period: float = 1
    anchor: int = 1

    def __post_init__(self):
        whole = self.period == math.inf or float(self.period).is_integer()
        if not whole or self.period < 0:
            raise ValueError(
                "period must be a whole number of items, 0 (non-parametric) or "
                f"math.inf (frozen), got {self.period}."
            )
        if self.anchor < 1:
            raise ValueError(f"anchor must be at least 1 item, got {self.anchor}.")
        if self.anchor > 1 and self.period != 1:
            raise ValueError(
                f"anchor ({self.anchor}) needs period 1, got period {self.period}: a "
                "slower level already takes its gradients where its period began."
            )

    @property
    def parametric(self) -> bool:
        return self.period > 0

    @property
    def frozen(self) -> bool:
        return self.period == math.inf

    def moves(self, item):
        """Whether 1-based `item` (an int or an int32 array) moves the level."""
        if self.frozen or not self.parametric:
            return item != item
        return item % int(self.period) == 0

    def frequency(self) -> float:
        """Moves per item: 0 when frozen, inf when non-parametric (Definition 2)."""
        if not self.parametric:
            return math.inf
        return 0.0 if self.frozen else 1.0 / self.period
