"""The learning rule of a memory as one transformation of parts that have names."""

from typing import NamedTuple

import optax
from jaxtyping import PyTree

Transformation = optax.GradientTransformationExtraArgs


def transformation(init, update) -> optax.GradientTransformationExtraArgs:
    """Optax's pair of an `update` that must be given what Optax's types leave open."""
    return optax.GradientTransformationExtraArgs(init, update)


class Flow(NamedTuple):
    """Transformations in the order in which they act; None where there is none.

    Attributes:
      step: what a gradient asks for.
      momentum: what carries that on from token to token.
      erase: the delta term.
      retention: what is kept.
      landing: where the weights may come to lie.
    """

    step: Transformation | None = None
    momentum: Transformation | None = None
    erase: Transformation | None = None
    retention: Transformation | None = None
    landing: Transformation | None = None


class FlowState(NamedTuple):
    """The states of the parts of a `Flow`; None where it has no such part.

    `momentum` is shaped like the weights, and so is `retention` where that moves dual
    weights: these are they.
    """

    step: PyTree = None
    momentum: PyTree = None
    erase: PyTree = None
    retention: PyTree = None
    landing: PyTree = None


def chain(flow: Flow) -> Transformation:
    """The parts, one after another, as `optax.chain` has them but for their names."""

    def init(params):
        return FlowState(*(part and part.init(params) for part in flow))

    def update(updates, state, params=None, **extra):
        after = []
        for part, standing in zip(flow, state, strict=True):
            if part is not None:
                updates, standing = part.update(updates, standing, params, **extra)
            after.append(standing)
        return updates, FlowState(*after)

    return Transformation(init, update)
