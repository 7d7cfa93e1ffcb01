"""Data parallelism: the batch is cut over a mesh, the state is the same everywhere.

Rows may also be read some after others: gradient accumulation.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from hope_jax.core.level import Differentiate

DATA = "data"


def make_mesh(
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] jax does not say that it is a class
) -> Mesh:
    """All devices on one axis, `data`; one device is a mesh of one."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch(batch: int, mesh: Mesh, parts: int = 1) -> None:
    """Refuses a batch that the devices cannot share equally, each in equal `parts`.

    Raises:
      ValueError: names both numbers.
    """
    devices = mesh.shape[DATA]
    share = devices * parts
    if batch % share:
        each = f"the {devices} devices"
        if parts > 1:
            each = f"{share}: {devices} devices with accumulate={parts}"
        raise ValueError(
            f"batch ({batch}) must be a multiple of {each}; the nearest are "
            f"{batch // share * share or share} and {(batch // share + 1) * share}."
        )


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows on its devices, as global arrays; leaves lead with rows."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    check_batch(rows * jax.process_count(), mesh)
    put = jax.make_array_from_process_local_data
    return jax.tree.map(lambda leaf: put(by_rows(mesh), leaf), batch)


def own_rows(batch: PyTree) -> PyTree:
    """This process's rows of a batch that every process holds."""

    def cut(leaf):
        share = leaf.shape[0] // jax.process_count()
        return leaf[jax.process_index() * share :][:share]

    return jax.tree.map(cut, batch)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree`, which every process holds, on all devices of `mesh`."""
    return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def _put(leaf, sharding: NamedSharding):
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def of_rows(differentiate: Differentiate | None, mesh: Mesh) -> Differentiate:
    """How `hope_jax.core.level.hope_update` differentiates a mean over rows which the
    devices of `mesh` share.

    Each device takes the gradient of its own rows, which nothing interrupts, and one
    mean over all of them follows. Left to itself the compiler would sum the gradient of
    a parameter over the devices wherever a loop uses it: at every chunk of tokens.

    Args:
      differentiate: of one device's rows; None is `jax.value_and_grad`.
    """

    own = _plain if differentiate is None else differentiate

    def differentiate_rows(f, params, *given):
        def local(params, *given):
            (loss, rest), gradient, inputs = own(f, params, *given)
            loss, gradient, inputs = jax.lax.pmean((loss, gradient, inputs), DATA)
            return (loss, rest), gradient, inputs

        whole, rows = PartitionSpec(), PartitionSpec(DATA)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, *[rows] * len(given)),
            out_specs=((whole, rows), whole, whole),
            check_vma=False,  # else the means would be taken at every use again
        )(params, *given)

    return differentiate_rows


def in_turn(differentiate: Differentiate | None, parts: int) -> Differentiate:
    """The same of a mean over rows that are read in `parts` equal parts, one after
    another: of the states and residuals of a part alone there is memory.

    Gradients and inputs of parts are averaged.
    """
    own = _plain if differentiate is None else differentiate

    def differentiate_parts(f, params, *given):
        @jax.jit  # traced once for the shapes and the loop
        def part(i):
            def of(leaf):
                size = leaf.shape[0] // parts
                return jax.lax.dynamic_slice_in_dim(leaf, i * size, size)

            (loss, rest), gradient, inputs = own(f, params, *jax.tree.map(of, given))
            return (loss, gradient, inputs), rest

        def add(means, i):
            more, rest = part(i)
            return jax.tree.map(lambda a, b: a + b / parts, means, more), rest

        turns = jnp.arange(parts, dtype=jnp.int32)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, turns[0])[0])
        means, rest = jax.lax.scan(add, nothing, turns)
        loss, gradient, inputs = means
        rest = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rest)
        return (loss, rest), gradient, inputs

    return differentiate_parts


def _plain(f, params, *given):
    value, gradient = jax.value_and_grad(f, has_aux=True)(params, *given)
    return value, gradient, None


def jit_step(step: Callable, mesh: Mesh) -> Callable:
    """`step(state, tokens) -> (state, metrics)` compiled for `mesh`, its state donated.

    The state that goes in is gone afterwards: its buffers hold the one that comes out.
    """
    whole = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, by_rows(mesh)),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


def jit_evaluation(evaluate: Callable, mesh: Mesh) -> Callable:
    """`evaluate(params, tokens) -> loss` compiled for `mesh`."""
    whole = replicated(mesh)
    return jax.jit(evaluate, in_shardings=(whole, by_rows(mesh)), out_shardings=whole)
