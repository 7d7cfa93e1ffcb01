"""Do the models of the paper fit their machines? Asked of XLA, for devices not there.

Run:     pip install libtpu==0.0.42.1 jax-cuda12-plugin==0.10.2
         JAX_PLATFORMS=cpu python -m experiments.fits  (one: --rows=hope_760m_v5e-64)
Smoke:   --scale=smoke --out=DIR (a tiny Transformer, on the devices that are here).
Expect:  experiments/README.md has the table.
Cost:    half a minute to three minutes of one CPU core a row, and 4 GB.

The step of each row is compiled whole, at its full size, with all its collectives, for
all devices of the machine; nothing runs, so it says nothing of speed. For TPUs XLA is
asked for its least effort, with which it is done soonest and programs are slower. For
GPUs it tries no kernels out, attention is not cuDNN's, and it keeps the program's size
to itself.
`launch.plan` says beforehand, from shapes, what goes into a step.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments import lab, paper
from hope_jax.core.config import from_json
from hope_jax.models import zoo
from hope_jax.train import plan
from hope_jax.train.config import RunConfig
from launch import command

NAME = "plan"
MODELS = (
    *("hope_760m", "hope_attention_760m", "transformer_760m"),
    *("hope_1b3", "hope_attention_1b3", "transformer_1b3"),
    *("llama3_8b_stacked", "llama3_8b_copied"),
)


def rows(scale: str) -> dict[str, RunConfig]:
    """The rows of `experiments.paper` on each machine."""
    if scale == "smoke":
        (tiny,) = paper.rows("smoke").values()
        train = dataclasses.replace(tiny.train, batch=2 * jax.device_count())
        model = zoo.get("transformer_tiny")
        return {"transformer_tiny": dataclasses.replace(tiny, model=model, train=train)}
    return {
        f"{model}_{machine}": paper.rows(machine)[model]
        for model in MODELS
        for machine in plan.MACHINES
        if model in paper.rows(machine)
    }


def measure(task: lab.Task) -> dict[str, float]:
    """What the compiler says, and what shapes say of products."""
    config = task.config
    machine = plan.MACHINES.get(config.scale)
    devices = plan.topology(machine) if machine else jax.devices()
    said = plan.plan(config, len(devices))
    start = time.process_time()
    program = plan.compiled(config, devices, effort=-1.0)
    took = time.process_time() - start
    memory = program.memory_analysis()
    return {
        "parameters": said.parameters,
        "step flops": said.step_flops,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "memory": machine.bytes if machine else 0,
        "compiling": took,
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A line a row, in GiB of one device; what shapes say is asked of them anew."""
    lines = []
    for result in found:
        m, train = dict(result["metrics"]), result["config"]["train"]
        config = from_json(RunConfig, result["config"])
        machine = plan.MACHINES.get(config.scale)
        devices = machine.devices if machine else jax.device_count()
        tiled = machine is not None and machine.tiled
        m["said"] = sum(plan.kept(config, devices, tiled))
        size = lambda name, m=m: f"{m[name] / 2**30:.2f}"  # noqa: E731
        need = m["arguments"] + m["temporaries"] + m["code"]
        tokens = train["batch"] * train["seq_len"]
        lines.append(
            [
                result["row"],
                train["mesh"] or "data",
                train["accumulate"],
                size("said"),
                size("arguments"),
                size("temporaries"),
                size("code") if m["code"] else "?",
                size("memory"),
                "yes" if need <= m["memory"] else "no",
                f"{m['step flops'] / tokens / m['parameters']:.1f}",
                f"{m['compiling']:.0f}",
            ]
        )
    columns = [
        *("model and machine", "mesh", "parts", "arguments, from shapes"),
        *("arguments, XLA", "temporaries", "program", "there is", "fits"),
        *("FLOPs a token and parameter", "compiling, CPU s"),
    ]
    return lab.table(columns, lines, words=2)


main = lab.Experiment(
    name=NAME,
    doc=__doc__,
    rows=lambda flags: rows(flags.scale),
    measure=measure,
    table=table,
)

if __name__ == "__main__":
    command.run(main)
