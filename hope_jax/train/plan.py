"""What a run costs, found without running it: parameters, bytes of a device, FLOPs.

Shapes alone say what is kept from step to step, and the traced step how many products
it makes. What a step needs beside that, its compiler alone knows: `compiled` asks it,
for TPUs and GPUs that are not there too.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import PyTree

from hope_jax.models import lm
from hope_jax.train import guard, loop, sharding
from hope_jax.train import state as state_lib
from hope_jax.train.config import RunConfig
from hope_jax.train.step import Packed
from hope_jax.train.watching import PEAKS


class Machine(NamedTuple):
    """Accelerators by their makers' figures.

    Attributes:
      devices: that JAX sees.
      bytes: of memory of one.
      flops: a second of one, dense products of bfloat16.
      topology: by which their compiler knows how they hang together.
      platform: "tpu" or "cuda".
    """

    devices: int
    bytes: int
    flops: float
    topology: str
    platform: str = "tpu"

    @property
    def tiled(self) -> bool:
        """Whether arrays lie in tiles there."""
        return self.platform == "tpu"


MACHINES = {
    "v5e-64": Machine(64, int(15.75 * 2**30), PEAKS["tpu v5e"], "v5e:8x8"),
    # Two cores a chip, which JAX sees as one device.
    "v5p-128": Machine(64, int(95.74 * 2**30), PEAKS["tpu v5p"], "v5p:4x4x4"),
    # Processes, hosts, GPUs of each.
    "8xH100": Machine(8, 80 * 10**9, PEAKS["h100"], "1x1x8", "cuda"),
}
COMPILERS = {  # and what has them
    "tpu": "libtpu",
    "cuda": "jax-cuda12-plugin, of JAX's version, and set JAX_PLATFORMS=cpu",
}
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  device_memory_size: 80000000000
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""  # as XLA is told of a GPU, in the words of its GpuTargetConfigProto


class Plan(NamedTuple):
    """Of one run on one mesh.

    Attributes:
      parameters: how many.
      params, optimizer: bytes on one device.
      gradient: the same, of what a step hands to the optimizer.
      rows: the same, of the states of the rows that are read at once.
      checkpoint: bytes of a checkpoint.
      step_flops: of one step over all devices, multiplications and additions of
        products, with what the backward pass makes again.
      tokens: of one step.
    """

    parameters: int
    params: int
    optimizer: int
    gradient: int
    rows: int
    checkpoint: int
    step_flops: float
    tokens: int

    def tokens_per_second(self, machine: Machine, share: float) -> float:
        """At a `share` of the peak of a machine's products."""
        peak = machine.devices * machine.flops * share
        return self.tokens * peak / self.step_flops


def kept(config: RunConfig, devices: int, tiled: bool = False) -> tuple[int, int]:
    """Bytes of parameters and of the optimizer on one of so many devices.

    Args:
      config: of the run.
      devices: how many.
      tiled: arrays lie in tiles of 8 by 128, as on TPUs, in that order of their axes
        which leaves least of the tiles empty.
    """
    mesh = _abstract_mesh(config, devices)
    graphdef, shapes = lm.abstract_model(config.model)
    tx, _ = loop.make_optimizer(config, graphdef, shapes, mesh)
    state = _state(config, shapes, tx)
    lies = sharding.state_shardings(state, shapes, mesh)
    params = _bytes(state.params, lies.params, tiled)
    return params, _bytes(state.level.opt, lies.level.opt, tiled)


def plan(config: RunConfig, devices: int, tiled: bool = False) -> Plan:
    """What `config` costs on so many devices; `tiled` as of `kept`.

    Raises:
      ValueError: a model, a batch or a mesh that do not fit one another.
    """
    mesh = _abstract_mesh(config, devices)
    graphdef, shapes = lm.abstract_model(config.model)
    tx, _ = loop.make_optimizer(config, graphdef, shapes, mesh)
    state = _state(config, shapes, tx)
    whole = config.train.gather == "step" or sharding.FSDP not in mesh.axis_names
    params, optimizer = kept(config, devices, tiled)
    rows = config.train.batch // (sharding.row_shards(mesh) * config.train.accumulate)
    fresh = jax.eval_shape(
        lambda params: lm.apply(
            graphdef,
            params,
            jnp.zeros((1, config.train.seq_len), jnp.int32),
            after=jnp.zeros((1,), jnp.int32),
            horizon=config.train.seq_len,
        )[1],
        shapes,
    )
    tensor = mesh.shape.get(sharding.TENSOR, 1)
    first, more = (_step_flops(config, graphdef, shapes, rows) for rows in (1, 2))
    batch = config.train.batch
    return Plan(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        params=params,
        optimizer=optimizer,
        gradient=_bytes(state.params) // tensor if whole else params,
        rows=rows * _bytes(fresh) // tensor,
        checkpoint=_bytes(state),
        step_flops=2 * first - more + batch * (more - first),
        tokens=batch * config.train.seq_len,
    )


def compiled(config: RunConfig, devices: Sequence[Any], effort: float = 0.0) -> Any:
    """The step of a run, compiled for devices that need not be there.

    Args:
      config: of the run.
      devices: of this machine, or of `topology`.
      effort: of the compiler for TPUs to make the program fast, from -1 to 1; the
        least is done soonest.
    """
    mesh = loop.make_mesh(config, devices)
    graphdef, shapes = lm.abstract_model(config.model)
    tx, layers = loop.make_optimizer(config, graphdef, shapes, mesh)
    state = _state(config, shapes, tx)
    step = loop.make_step(config, graphdef, tx, layers, mesh)
    lowered = sharding.jit_step(step, mesh, state).lower(state, _batch(config))
    options = {}
    if effort and devices[0].platform == "tpu":
        options["exec_time_optimization_effort"] = effort
    return lowered.compile(compiler_options=options)


def topology(machine: Machine) -> Sequence[Any]:
    """The devices of a machine that is not there.

    For GPUs XLA then tries no kernels out: Triton's make all products. Attention is
    `attention.in_blocks`, for without a GPU cuDNN's cannot be traced.

    Raises:
      ValueError: the compiler for its devices is not here (`COMPILERS`).
    """
    from jax.experimental import topologies

    if machine.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # of machines of Google Cloud
        said = {"topology_name": machine.topology}
    else:
        said = {"topology": machine.topology, "target_config": H100}
    try:
        found = topologies.get_topology_desc(platform=machine.platform, **said)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"There is no compiler for {machine.platform} here ({error}); install "
            f"{COMPILERS[machine.platform]}."
        ) from None
    return found.devices


def flops(jaxpr: Any) -> float:
    """Multiplications and additions of all products of a traced program, loops as
    often as they run; of branches the dearest, of loops without an end known one round.

    >>> traced = jax.jit(lambda a, b: a @ b).trace(jnp.ones((2, 3)), jnp.ones((3, 5)))
    >>> flops(traced.jaxpr.jaxpr)
    60.0
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shared = (eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shared)
            continue
        if name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            out = params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[out]
            continue
        if name == "cond":
            total += max(flops(branch.jaxpr) for branch in params["branches"])
            continue
        times = params["length"] if name == "scan" else 1
        if name == "shard_map":  # of the shares of one device
            mesh = params["mesh"]
            times = math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
        total += times * sum(map(flops, _inner(params)))
    return total


def _inner(params):
    """The programs that an operation runs."""
    leaves = jax.tree.leaves(tuple(params.values()), is_leaf=_is_program)
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if _is_program(leaf)]


def _is_program(node):
    return hasattr(node, "eqns") or hasattr(getattr(node, "jaxpr", None), "eqns")


def _step_flops(config, graphdef, shapes, rows):
    """Of a step of so many rows on one device, or on those that share their tokens."""
    devices = sharding.read_mesh(config.train.mesh).get(sharding.SEQUENCE, 1)
    train = dataclasses.replace(
        config.train, batch=rows, accumulate=1, mesh="", gather="layer"
    )
    config, mesh = dataclasses.replace(config, train=train), None
    if devices > 1:  # which sum up what is handed on as well
        sizes = {sharding.DATA: 1, sharding.SEQUENCE: devices}
        mesh = _abstract(sizes)
    tx, layers = loop.make_optimizer(config, graphdef, shapes, None)
    step = loop.make_step(config, graphdef, tx, layers, mesh)
    state = _state(config, shapes, tx)
    return flops(jax.jit(step).trace(state, _batch(config)).jaxpr.jaxpr)


def _state(config, shapes, tx):
    known = jax.eval_shape(lambda: guard.begin(config.guard.window))
    return state_lib.abstract(shapes, tx)._replace(guard=known)


def _batch(config):
    shape = config.train.batch, config.train.seq_len + 1
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    return Packed(tokens, tokens) if config.train.stretch else tokens


def _abstract_mesh(config, devices):
    """`loop.make_mesh` of devices that are not there."""
    sizes = sharding.mesh_shape(devices, sharding.read_mesh(config.train.mesh))
    mesh = _abstract(sizes)
    loop.check_mesh(config, mesh)
    return mesh


def _abstract(sizes):
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def _bytes(tree: PyTree, lies: PyTree | None = None, tiled: bool = False) -> int:
    """Of all arrays, or of what one device holds of them."""

    def size(leaf, where=None):
        shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 8
        count = _in_tiles(shape, leaf.dtype.itemsize) if tiled else math.prod(shape)
        return count * leaf.dtype.itemsize

    trees = (tree,) if lies is None else (tree, lies)
    return sum(jax.tree.leaves(jax.tree.map(size, *trees)))


def _in_tiles(shape: Sequence[int], itemsize: int) -> int:
    """Entries of an array laid in tiles of 128, by 8 or more as items get smaller.

    >>> _in_tiles((5, 96, 384), 4)  # 384 fill three tiles, 96 fill twelve
    184320
    >>> _in_tiles((300, 4), 4)
    3072
    """
    if len(shape) < 2:
        return math.prod(shape)
    tile = 8 * max(1, 4 // itemsize), 128
    found = []
    for last_two in itertools.permutations(range(len(shape)), 2):
        up = dict(zip(last_two, tile, strict=True))
        lengths = (-(-n // up.get(i, 1)) * up.get(i, 1) for i, n in enumerate(shape))
        found.append(math.prod(lengths))
    return min(found)
