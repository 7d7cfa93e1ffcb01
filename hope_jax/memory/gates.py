"""How a layer makes the rates of a memory's tokens: pure data, read by the mixer."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Where keys, inner rates and retentions come from.

    Attributes:
      rate: inner rate η: `one`, a sigmoid of the `token` times `rate_bound`, or `step`,
        Mamba-2's Δ: then α = exp(−aΔ) with a learned rate `a` a head.
      rate_bound: bound on η; None is 1 for exact memories (½ where both the gradient
        and a delta term recall), 1 under a `rate_law` and `1 / (chunk · window)` for
        other anchored ones, whose sums of a chunk's gradients diverge beyond 2; times
        `1 − θ` with inner momentum. Above what None is, η falls with the token's
        retention (`memory.rates.within`).
      retention: α: `one`, a `constant` of each head (RetNet's 1 − 2^(−5−h)), or a
        sigmoid of the `token`, per channel where the memory's retention is.
      erase: what the delta term recalls: the write `key`; RWKV-7's own removal key with
        a rate a `channel`; or the key with Comba's learned `feedback` strength.
      threshold: of robust biases: the config's `one`, or made of the `token`.
      unit_keys: keys and queries of unit norm.
      unit_values: values of unit norm.
      rotary: rotary positions on keys and queries (RetNet).
    """

    rate: Literal["one", "token", "step"] = "token"
    rate_bound: float | None = None
    retention: Literal["one", "constant", "token"] = "token"
    erase: Literal["key", "channel", "feedback"] = "key"
    threshold: Literal["one", "token"] = "one"
    unit_keys: bool = True
    unit_values: bool = False
    rotary: bool = False

    def __post_init__(self):
        choices = {
            "rate": ("one", "token", "step"),
            "retention": ("one", "constant", "token"),
            "erase": ("key", "channel", "feedback"),
            "threshold": ("one", "token"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}."
                )
        if self.rate_bound is not None and not 0 < self.rate_bound <= 2:
            raise ValueError(f"rate_bound must lie in (0, 2], got {self.rate_bound}.")
