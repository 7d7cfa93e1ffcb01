"""Compiled steps that runs of one config share: to trace and compile the step is most
of what so small a run costs."""

import json
from typing import Any

from hope_jax.core import config as config_lib
from hope_jax.train import loop, sharding

_PROGRAMS: dict[Any, Any] = {}


def share(monkeypatch) -> None:
    """Lets a run take the program of an earlier one, if all that it is made of is the
    same: config, mesh, and what a test has put in place of the makers."""
    make, jit = loop.make_step, sharding.jit_step

    def make_step(config, *arguments):
        step: Any = make(config, *arguments)
        said = json.dumps(config_lib.to_json(config))
        step.made_of = (said, loop.step_lib.make_step, loop.optim.build)
        return step

    def jit_step(step, mesh, state=None):
        if not hasattr(step, "made_of"):
            return jit(step, mesh, state)
        key = (*step.made_of, mesh)
        if key not in _PROGRAMS:
            _PROGRAMS[key] = jit(step, mesh, state)
        return _PROGRAMS[key]

    monkeypatch.setattr(loop, "make_step", make_step)
    monkeypatch.setattr(sharding, "jit_step", jit_step)
