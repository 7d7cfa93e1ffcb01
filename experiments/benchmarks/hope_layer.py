"""The self-modifying layer: tokens per second, growth in length, memory.

Run:     python -m experiments.benchmarks.hope_layer
Smoke:   add --quick (small sizes, seconds); a test runs it so.
Goal:    forward at least 10 times the token-sequential reference at 512 tokens.
Expect:  as many tokens per second at 2,048 tokens as at 512 (ratio 1: linear growth),
         where attention falls to a fifth. What was measured last is in
         experiments/results/benchmarks/, with the commit it was measured at.
Cost:    5 minutes on 2 CPU cores; 8 GB for the gradient of the reference at 512 tokens.

Three programs on the same input in interleaved rounds: the layer (chunk-parallel), its
own definition token by token (`models.reference`, of the same weights: outputs and
gradients are compared first, and no ratio is given if they differ), and the attention
layer of Transformer++. The reference keeps every token's memories for its gradient;
where 8 GB are too much, let `--reference_training` be fewer tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import lab
from experiments.benchmarks import timing
from hope_jax.models.mixers.attention import AttentionConfig
from hope_jax.models.mixers.self_modifying import (
    MLP,
    SelfModifyingConfig,
    SelfModifyingTitans,
)
from hope_jax.models.reference import self_modifying_reference
from hope_jax.train.metrics import write_benchmark
from launch import command

TOLERANCE = {"forward": 1e-3, "training": 1e-2}  # float32 over hundreds of writes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
      d_model, heads: of the three layers.
      chunk: tokens per chunk of every memory.
      short, long: tokens; growth is from the one to the other.
      reference_training: tokens of the training runs beside the reference.
      rounds: interleaved rounds.
    """

    d_model: int = 256
    heads: int = 4
    chunk: int = 64
    short: int = 512
    long: int = 2048
    reference_training: int = 512
    rounds: int = 5


QUICK = Sizes(
    d_model=8, heads=2, chunk=4, short=4, long=8, reference_training=4, rounds=2
)


def run(sizes: Sizes, report: Callable[[str], Any] = print) -> list[dict[str, Any]]:
    """Measures everything and returns the workloads of a benchmark file."""
    programs = build(sizes)
    compiled = {}
    for name, (program, arguments) in programs.items():
        report(f"compiling {' '.join(map(str, name))}")
        compiled[name] = jax.jit(program).lower(*arguments).compile()

    def call(name):
        return compiled[name](*programs[name][1])

    for name in programs:
        layer, task, length = name
        if layer == "reference":
            what = f"layer and reference, {task}, T {length},"
            worst = timing.check_agreement(
                what, call(("layer", task, length))[0], call(name)[0], TOLERANCE[task]
            )
            report(f"{what} agree to {worst:.0e}")

    times = timing.interleave(
        {name: lambda name=name: call(name) for name in programs}, sizes.rounds
    )
    return [
        *speeds(times),
        *growths(times, sizes),
        *memory(
            {name: program.memory_analysis() for name, program in compiled.items()}
        ),
    ]


def build(sizes: Sizes) -> dict[tuple[str, str, int], tuple[Callable, tuple]]:
    """`(layer, task, tokens) -> (program, arguments)`, each to be compiled."""
    config = SelfModifyingConfig(
        memory=dataclasses.replace(MLP, chunk=sizes.chunk), projection_chunk=sizes.chunk
    )
    rngs = nnx.Rngs(0)
    modules = {
        "layer": SelfModifyingTitans(
            sizes.d_model, sizes.heads, config, jnp.float32, rngs=rngs
        ),
        "attention": AttentionConfig(context=sizes.long).build(
            sizes.d_model, sizes.heads, jnp.float32, rngs=rngs
        ),
    }
    modules["reference"] = modules["layer"]
    split = {name: nnx.split(module, nnx.Param) for name, module in modules.items()}

    def forward(name):
        graphdef, _ = split[name]
        if name == "reference":
            return lambda params, x: self_modifying_reference(
                nnx.merge(graphdef, params), x
            )
        return lambda params, x: nnx.merge(graphdef, params)(x)

    def training(name):
        def loss(params, x, cotangent):
            return jnp.vdot(forward(name)(params, x)[0], cotangent)

        # A pair, like what `forward` returns: what is compared, and the rest.
        return lambda *arguments: (jax.grad(loss, argnums=(0, 1))(*arguments), ())

    def one(name, task, length):
        shape = (1, length, sizes.d_model)
        x = jax.random.normal(jax.random.key(0), shape)
        params = split[name][1]
        if task == "forward":
            return forward(name), (params, x)
        return training(name), (params, x, jax.random.normal(jax.random.key(1), shape))

    lengths = (sizes.short, sizes.long)
    wanted = {
        (name, task, length)
        for name in ("layer", "attention")
        for task in ("forward", "training")
        for length in lengths
    }
    wanted |= {("reference", "forward", length) for length in lengths}
    wanted |= {
        (name, "training", sizes.reference_training) for name in ("layer", "reference")
    }
    return {name: one(*name) for name in sorted(wanted)}


def speeds(times) -> list[dict[str, Any]]:
    """The layer against each peer, in tokens per second."""
    found = []
    for name, peer in sorted(times.items()):
        layer, task, length = name
        if layer == "layer":
            continue
        ours = times["layer", task, length]
        for kind, metric in (
            ("cpu", "tokens per second of one core"),
            ("wall", "tokens per second"),
        ):
            found.append(
                timing.workload(
                    f"self-modifying layer against {layer}, {task}, T {length}",
                    metric,
                    [length / t for t in getattr(ours, kind)],
                    [length / t for t in getattr(peer, kind)],
                )
            )
    return found


def growths(times, sizes: Sizes) -> list[dict[str, Any]]:
    """Each layer's speed on long inputs against its own on short ones."""
    found = []
    for layer in ("layer", "attention"):
        for task in ("forward", "training"):
            long, short = (
                [length / t for t in times[layer, task, length].cpu]
                for length in (sizes.long, sizes.short)
            )
            found.append(
                timing.workload(
                    f"growth of {layer}, {task}, T {sizes.long} against {sizes.short}",
                    "tokens per second of one core",
                    long,
                    short,
                )
            )
    return found


def memory(analyses) -> list[dict[str, Any]]:
    """Bytes of temporary buffers, as tokens per MiB so that more is better."""
    found = []
    for name, peer in sorted(analyses.items()):
        layer, task, length = name
        ours = analyses["layer", task, length]
        if layer == "layer" or ours is None or peer is None:
            continue
        found.append(
            timing.workload(
                f"memory of self-modifying layer against {layer}, {task}, T {length}",
                "tokens per MiB of temporary buffers",
                [length * 2**20 / max(ours.temp_size_in_bytes, 1)],
                [length * 2**20 / max(peer.temp_size_in_bytes, 1)],
            )
        )
    return found


def _define(define) -> None:
    define.bool("quick", False, "small sizes, seconds")
    define.integer("rounds", None, "interleaved rounds", lower_bound=1)
    define.integer(
        "reference_training", None, "tokens of the training runs beside the reference"
    )
    define.alias("reference-training", "reference_training")
    define.string("out", str(lab.RESULTS), "folder of the results")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the ratios and writes the file."""
    flags = command.parse(__doc__, _define, arguments)
    changes = {
        name: value
        for name in ("rounds", "reference_training")
        if (value := getattr(flags, name)) is not None
    }
    sizes = dataclasses.replace(QUICK if flags.quick else Sizes(), **changes)
    workloads = run(sizes)
    print(timing.table(workloads))
    print(write_benchmark(flags.out, name="hope_layer", workloads=workloads))


if __name__ == "__main__":
    command.run(main)
