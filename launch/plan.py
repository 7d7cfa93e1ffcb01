"""What a run costs, without running it: memory, products, speed, size of a checkpoint.

    python -m launch.plan --experiment=paper --row=hope_760m --scale=v5e-64
    python -m launch.plan --experiment=quickstart --row=hope --devices=4 --mesh=fsdp:4

The row and its settings are those of launch.train. Bytes are of one device and come
from shapes, for TPUs from the tiles in which arrays lie there; what a step needs beside
them its compiler says, with --compile: for the devices of --machine too, which need not
be there (pip install libtpu, or for GPUs jax-cuda12-plugin, of JAX's version, with
JAX_PLATFORMS=cpu set).
"""

import sys
from collections.abc import Sequence

from launch import command, train


def _define(define) -> None:
    train.define_row(define)
    define.string(
        "machine", None, "v5e-64, v5p-128 or 8xH100; by default the scale, if it is one"
    )
    define.integer("devices", None, "how many, where --machine does not say it")
    define.float("mfu", 0.3, "share of the machine's peak at which speed is stated")
    define.bool("compile", False, "compile the step, and say what XLA says of it")
    define.float(
        "effort",
        0.0,
        "of the compiler for TPUs, from -1 to 1: the least is done soonest",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan, and what the compiler says if it is asked."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = command.parse(__doc__, _define, arguments)
    if not 0 < given.mfu <= 1:
        command.fail(f"--mfu must lie in (0, 1], got {given.mfu}.")
    if not -1 <= given.effort <= 1:
        command.fail(f"--effort must lie in [-1, 1], got {given.effort}.")
    if given.effort and not given.compile:
        command.fail(f"--effort={given.effort} is of the compiler: add --compile.")
    with command.fail_in_words():
        config = train.config_of(given)

        import jax

        from hope_jax.train import plan

        name = given.machine or (given.scale if given.scale in plan.MACHINES else None)
        if name is not None and name not in plan.MACHINES:
            raise ValueError(
                f"--machine={name} must be one of {', '.join(plan.MACHINES)}."
            )
        machine = None if name is None else plan.MACHINES[name]
        devices = given.devices or (machine.devices if machine else jax.device_count())
        tiled = machine is not None and machine.tiled
        said = plan.plan(config, devices, tiled)
        print(_table(config, said, devices, name, machine, given.mfu))
        if given.compile:
            found = plan.topology(machine) if machine else jax.devices()[:devices]
            print(_of_xla(plan.compiled(config, found, given.effort), machine))
    return 0


def _table(config, said, devices, name, machine, mfu) -> str:
    kept = said.params + said.optimizer
    lines = [
        ("model", config.model.name),
        ("devices", f"{devices}{f' of {name}' if name else ''}"),
        ("mesh", config.train.mesh or f"data:{devices}"),
        ("batch", f"{config.train.batch} rows, {said.tokens:,} tokens"),
        ("accumulate", str(config.train.accumulate)),
        ("parameters", f"{said.parameters:,}"),
        ("params a device", _size(said.params)),
        ("optimizer a device", _size(said.optimizer)),
        ("gradient a device", _size(said.gradient)),
        ("states of rows a device", _size(said.rows)),
        ("kept between steps", _size(kept)),
        ("checkpoint", _size(said.checkpoint)),
        ("FLOPs a token", f"{said.step_flops / said.tokens:,.0f}"),
        ("FLOPs a token and parameter", _per(said)),
    ]
    if machine is not None:
        speed = said.tokens_per_second(machine, mfu)
        lines += [(f"tokens/s at {mfu:.0%} of peak", f"{speed:,.0f}")]
        lines += [("memory of a device", _size(machine.bytes))]
    return "\n".join(f"{what:<28} {value}" for what, value in lines)


def _per(said) -> str:
    return f"{said.step_flops / said.tokens / said.parameters:.1f}"


def _of_xla(program, machine) -> str:
    memory = program.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    need = sum(parts.values())
    lines = [(f"XLA: {what} a device", _size(size)) for what, size in parts.items()]
    lines.append(("XLA: all", _size(need)))
    if machine is not None:
        lines.append(("fits", "yes" if need <= machine.bytes else "no"))
    return "\n".join(f"{what:<28} {value}" for what, value in lines)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


if __name__ == "__main__":
    command.run(main)
