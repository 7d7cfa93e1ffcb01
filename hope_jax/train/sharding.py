"""What lies where: one table from what an axis of an array means to that of the mesh.

    data     rows; every device has all parameters
    fsdp     rows too, and parameters with all that the optimizer keeps of them: a
             device gathers them when it reads, and keeps its share of their gradient
    sequence the tokens of a row, a stretch to each device, for layers that can be told
             what the stretches before did to their memories (`hope_jax.models.share`)
    tensor   heads, with every memory of a head, and the hidden units of MLPs

The state of a row, fast weights included, lies where the row does. Rows may also be
read some after others: gradient accumulation.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)
from jaxtyping import PyTree

from hope_jax.core.level import Differentiate
from hope_jax.models.config import ModelConfig
from hope_jax.models.parts import Parts
from hope_jax.optim.leaves import path_names

AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone

DATA, FSDP, SEQUENCE, TENSOR = AXES = ("data", "fsdp", "sequence", "tensor")

TABLE: Mapping[str, str | tuple[str, ...]] = {
    "rows": (DATA, FSDP),
    "tokens": SEQUENCE,
    "width": FSDP,
    "memory": FSDP,
    "heads": TENSOR,
    "hidden": TENSOR,
    "vocabulary": TENSOR,
}

# The last axes of each parameter, by its name; those before them are layers and kinds.
# What is not named here is small, and whole everywhere.
_AXES = (
    (r"(embed|head)\.embedding", ("vocabulary", "width")),
    (r"mlp\.(gate|up)\.kernel", ("width", "hidden")),
    (r"mlp\.down\.kernel", ("hidden", "width")),
    (r"(q|k|v|gate|gates|asks|target)\.kernel", ("width", "heads")),
    (r"qkv\.kernel", ("width", None)),
    (r"out\.kernel", ("heads", "width")),
    (r"(main_|projection_)?starts?(\.\d+)?\.\w+", ("heads", "memory", None)),
)


def read_mesh(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes, of `data:2,fsdp:4`; those left out are 1.

    Raises:
      ValueError: no such axis, one twice, or no size.

    >>> read_mesh("fsdp:4,tensor:2")
    {'fsdp': 4, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition(":")
        if name not in AXES or name in sizes or not re.fullmatch(r"[1-9]\d*", size):
            raise ValueError(
                f"mesh={text!r} must name each of {', '.join(AXES)} at most once, each "
                f"with a size of at least 1, as in data:2,fsdp:4; {part!r} does not."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] jax does not say that it is a class
    sizes: Mapping[str, int] | None = None,
) -> Mesh:
    """A mesh of all devices; one device is a mesh of one.

    Args:
      devices: those of all processes by default.
      sizes: of its axes; `data` is what is left for it where it is not said.

    Raises:
      ValueError: the sizes do not make up the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(len(devices), sizes)
    grid = np.array(devices).reshape(*shape.values())
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def mesh_shape(devices: int, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """The axes of a mesh of so many devices, `data` among them; see `make_mesh`."""
    said = sizes or {}
    sizes = {name: size for name, size in said.items() if size > 1}
    others = math.prod(size for name, size in sizes.items() if name != DATA)
    data = said.get(DATA, devices // others or 1)
    if data * others != devices:
        words = " x ".join(f"{name} {size}" for name, size in said.items())
        raise ValueError(
            f"mesh ({words}) is of {said.get(DATA, 1) * others} devices, but there are "
            f"{devices}: sizes must multiply to that, and data, left out, is what the "
            "others leave."
        )
    return {DATA: data} | {n: sizes[n] for n in AXES[1:] if n in sizes}


def describe(mesh: AnyMesh) -> str:
    """The axes of a mesh that has several: `: data 2 x fsdp 4`."""
    if len(mesh.axis_names) == 1:
        return ""
    return ": " + " x ".join(f"{name} {mesh.shape[name]}" for name in mesh.axis_names)


def row_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The axes that cut rows."""
    return tuple(name for name in TABLE["rows"] if name in mesh.axis_names)


def row_shards(mesh: AnyMesh) -> int:
    """In how many parts rows are cut."""
    return math.prod(mesh.shape[name] for name in row_axes(mesh))


def shared(mesh: AnyMesh | None) -> str | None:
    """The axis that cuts the tokens of rows, if the mesh has it."""
    return SEQUENCE if mesh is not None and SEQUENCE in mesh.axis_names else None


def share_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The axes over which devices read tokens of their own."""
    return row_axes(mesh) + ((SEQUENCE,) if shared(mesh) else ())


def shares(mesh: AnyMesh) -> int:
    """In how many parts the tokens of a batch are cut."""
    return math.prod(mesh.shape[name] for name in share_axes(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, _rows(mesh))


def _rows(mesh: AnyMesh) -> PartitionSpec:
    first, *others = row_axes(mesh)
    return PartitionSpec((first, *others) if others else first)


def _tokens(mesh: AnyMesh) -> PartitionSpec:
    """Of what leads with rows, and where tokens are cut with these then."""
    return PartitionSpec(*_rows(mesh), SEQUENCE) if shared(mesh) else _rows(mesh)


def cuts(mesh: AnyMesh) -> bool:
    """Whether parameters are cut over `mesh`."""
    return any(name in mesh.axis_names for name in (FSDP, TENSOR))


def spec_of(name: str, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """How a parameter is cut: an axis that its size does not divide leaves it whole.

    Args:
      name: dotted.
      shape: of the array.
      mesh: where it lies.
    """
    for pattern, axes in _AXES:
        if re.search(rf"(^|\.){pattern}$", name) and len(axes) <= len(shape):
            last = shape[len(shape) - len(axes) :]
            found = [_axis(mesh, a, size) for a, size in zip(axes, last, strict=True)]
            while found and found[-1] is None:  # as JAX writes it
                found.pop()
            before = [None] * (len(shape) - len(axes)) if found else []
            return PartitionSpec(*before, *found)
    return PartitionSpec()


def _axis(mesh: AnyMesh, means: str | None, size: int) -> str | None:
    name = None if means is None else TABLE[means]
    if not isinstance(name, str) or name not in mesh.axis_names:
        return None
    return None if size % mesh.shape[name] else name


def param_specs(params: PyTree, mesh: AnyMesh) -> PyTree[PartitionSpec]:
    """`spec_of` every parameter; arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec_of(".".join(path_names(path)), leaf.shape, mesh), params
    )


def state_shardings(state: PyTree, params: PyTree, mesh: AnyMesh) -> PyTree:
    """Of a state that holds trees like the parameters, as those of optimizers do: an
    array with the name and the shape of a parameter lies as that does, others whole.

    Args:
      state: arrays or shapes; of `hope_jax.train.state.TrainState`, for example.
      params: arrays or shapes.
      mesh: where they lie.
    """
    known = {
        path_names(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def sharding(path, leaf):
        names, spec = path_names(path), PartitionSpec()
        for i in range(len(names)):
            if known.get(names[i:]) == leaf.shape:
                spec = spec_of(".".join(names[i:]), leaf.shape, mesh)
                break
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def check_batch(batch: int, mesh: AnyMesh, parts: int = 1) -> None:
    """Refuses a batch that the devices cannot share equally, each in equal `parts`.

    Raises:
      ValueError: names both numbers.
    """
    shards = row_shards(mesh)
    share = shards * parts
    if batch % share:
        each = f"the {shards} devices"
        if len(mesh.axis_names) > 1:
            cut = " x ".join(f"{name} {mesh.shape[name]}" for name in row_axes(mesh))
            each = f"the {shards} shares of rows of the mesh ({cut})"
        if parts > 1:
            each = f"{share}: {each.removeprefix('the ')} with accumulate={parts}"
        least = batch // share * share
        near = (
            f"the nearest are {least} and {least + share}"
            if least
            else (f"the least is {share}")
        )
        raise ValueError(f"batch ({batch}) must be a multiple of {each}; {near}.")


def check_heads(heads: int, mesh: AnyMesh) -> None:
    """Refuses heads that the tensor axis cannot share equally.

    Raises:
      ValueError: names both numbers.
    """
    size = mesh.shape.get(TENSOR, 1)
    if heads % size:
        raise ValueError(
            f"model.heads ({heads}) must be a multiple of the mesh's tensor axis "
            f"({size}): every head and its memory lies on one device, and {heads} = "
            f"{heads // size} x {size} + {heads % size}."
        )


def check_tokens(model: ModelConfig, seq_len: int, stretch: int, mesh: AnyMesh) -> None:
    """Refuses rows that the sequence axis cannot cut.

    Raises:
      ValueError: as of `ModelConfig.check_shared`; or documents of packed rows may
        begin elsewhere than where a device's tokens do.
    """
    devices = mesh.shape.get(SEQUENCE, 1)
    if devices == 1:
        return
    model.check_shared(seq_len, devices)
    if stretch and seq_len // devices % stretch:
        raise ValueError(
            f"train.stretch ({stretch}) must divide the {seq_len // devices} tokens of "
            f"a row that each device of sequence:{devices} reads: use a shorter "
            "stretch, longer rows or fewer devices."
        )


def own_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process reads, and of how many; processes whose
    devices hold the same rows read the same.

    Raises:
      ValueError: the rows of a process's devices are not such a share.
    """
    shards = row_shards(mesh)
    places = by_rows(mesh).devices_indices_map((shards,))
    own = {at[0].start or 0 for d, at in places.items() if d in mesh.local_devices}
    first, count = min(own), len(own)
    if own != set(range(first, first + count)) or shards % count or first % count:
        raise ValueError(
            f"The devices of process {jax.process_index()} hold shares {sorted(own)} "
            f"of the {shards} of the rows, which must be a block of neighbours: let "
            "data or fsdp be a multiple of the number of processes."
        )
    return first // count, shards // count


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows on its devices, as global arrays; leaves lead with rows."""
    _, count = own_share(mesh)
    rows = jax.tree.leaves(batch)[0].shape[0]
    check_batch(rows * count, mesh)

    def put(leaf):
        shape = (leaf.shape[0] * count, *leaf.shape[1:])
        make = jax.make_array_from_process_local_data
        return make(by_rows(mesh), np.asarray(leaf), shape)

    return jax.tree.map(put, batch)


def own_rows(batch: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows of a batch that every process holds."""
    index, count = own_share(mesh)

    def cut(leaf):
        share = leaf.shape[0] // count
        return leaf[index * share :][:share]

    return jax.tree.map(cut, batch)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree`, which every process holds, on all devices of `mesh`."""
    return jax.tree.map(lambda leaf: _put(leaf, replicated(mesh)), tree)


def place(state: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """`state`, which every process holds, where `state_shardings` says."""
    return jax.tree.map(_put, state, state_shardings(state, params, mesh))


def _put(leaf, sharding: NamedSharding):
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def parts_of(params: PyTree, mesh: Mesh) -> Parts | None:
    """What each device holds of the parameters on a mesh with `fsdp`."""
    if FSDP not in mesh.axis_names:
        return None
    return Parts.of(FSDP, params, _fsdp_dims(params, mesh))


def of_rows(
    differentiate: Differentiate | None, mesh: Mesh, *, by_layer: bool = False
) -> Differentiate:
    """How `hope_jax.core.level.hope_update` differentiates a mean over rows which the
    devices of `mesh` share.

    Each device takes the gradient of its own rows, which nothing interrupts, and one
    mean over all of them follows. Left to itself the compiler would sum the gradient of
    a parameter over the devices wherever a loop uses it: at every chunk of tokens. Of
    rows that are cut each takes that of its tokens; what it was told by others carries
    gradients back to them.

    Args:
      differentiate: of one device's rows; None is `jax.value_and_grad`.
      by_layer: whether what is differentiated makes the `parts_of` its parameters
        whole, layer by layer. Otherwise they are before, and their whole gradient is
        made.
    """

    own = _plain if differentiate is None else differentiate
    axes = share_axes(mesh)

    def differentiate_rows(f, params, *given):
        dims = _fsdp_dims(params, mesh)

        def local(params, *given):
            if not by_layer:
                params = _gathered(params, dims)
            (loss, rest), gradient, inputs = own(f, params, *given)
            loss, inputs = jax.lax.pmean((loss, inputs), axes)
            return (loss, rest), _shared(gradient, dims, mesh, by_layer), inputs

        whole, rows = PartitionSpec(), _rows(mesh)
        cut = _manual_specs(params, dims)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(cut, *[rows] * len(given)),
            out_specs=((whole, _tokens(mesh)), cut, whole),
            axis_names=set(axes),  # the others are the compiler's
            check_vma=False,  # else the means would be taken at every use again
        )(params, *given)

    return differentiate_rows


def of_shares(mean: Callable, mesh: Mesh) -> Callable:
    """`(params, batch) -> mean` of all tokens, of a `mean` that each device takes of
    its share of them; for meshes that cut rows."""
    axes = share_axes(mesh)
    whole = PartitionSpec()
    return jax.shard_map(
        lambda params, batch: jax.lax.pmean(mean(params, batch), axes),
        mesh=mesh,
        in_specs=(whole, _rows(mesh)),
        out_specs=whole,
        axis_names=set(axes),
        check_vma=False,
    )


def of_replicas(differentiate: Differentiate | None, axis: str) -> Differentiate:
    """`of_rows` inside `jax.pmap` over `axis`, of which each device has all parameters
    and rows of its own."""
    own = _plain if differentiate is None else differentiate

    def differentiate_rows(f, params, *given):
        (loss, rest), gradient, inputs = own(f, params, *given)
        loss, gradient, inputs = jax.lax.pmean((loss, gradient, inputs), axis)
        return (loss, rest), gradient, inputs

    return differentiate_rows


def _fsdp_dims(params: PyTree, mesh: AnyMesh) -> PyTree[int]:
    """The axis of each parameter that `fsdp` cuts; -1 for none."""

    def dim(spec):
        return tuple(spec).index(FSDP) if FSDP in tuple(spec) else -1

    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(dim, param_specs(params, mesh), is_leaf=is_spec)


def _manual_specs(params: PyTree, dims: PyTree[int]) -> PyTree[PartitionSpec]:
    def spec(leaf, dim):
        del leaf
        return PartitionSpec() if dim < 0 else PartitionSpec(*[None] * dim, FSDP)

    return jax.tree.map(spec, params, dims)


def _gathered(params: PyTree, dims: PyTree[int]) -> PyTree:
    """All of each parameter, of a device's share."""

    def gather(leaf, dim):
        if dim < 0:
            return leaf
        return jax.lax.all_gather(leaf, FSDP, axis=dim, tiled=True)

    return jax.tree.map(gather, params, dims)


def _shared(
    gradient: PyTree, dims: PyTree[int], mesh: Mesh, summed: bool = False
) -> PyTree:
    """The mean over the rows of all devices, of which each keeps its share; `summed`
    where it already keeps its share of the sum over `fsdp`."""

    def mean(leaf, dim):
        if dim < 0:
            return jax.lax.pmean(leaf, share_axes(mesh))
        if not summed:
            leaf = jax.lax.psum_scatter(leaf, FSDP, scatter_dimension=dim, tiled=True)
        others = tuple(name for name in share_axes(mesh) if name != FSDP)
        return jax.lax.pmean(leaf / mesh.shape[FSDP], others)

    return jax.tree.map(mean, gradient, dims)


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


def jit_step(step: Callable, mesh: Mesh, state: PyTree | None = None) -> Callable:
    """`step(state, tokens) -> (state, metrics)` compiled for `mesh`, its state donated.

    The state that goes in is gone afterwards: its buffers hold the one that comes out.

    Args:
      step: of `hope_jax.train.step.make_step`.
      mesh: where it runs.
      state: arrays or shapes, on a mesh that cuts parameters.
    """
    whole = lies = replicated(mesh)
    if cuts(mesh):
        assert state is not None
        lies = state_shardings(state, state.params, mesh)
    return jax.jit(
        step,
        in_shardings=(lies, by_rows(mesh)),
        out_shardings=(lies, whole),
        donate_argnums=0,
    )


def pmap_step(step: Callable) -> Callable:
    """`step(state, tokens) -> (state, metrics)` for loops written around `jax.pmap`:
    the same numbers as `jit_step` on a mesh of rows.

    Every leaf of the state leads with devices, each of which holds all of it
    (`flax.jax_utils.replicate`), and so do the tokens, `[devices, rows, T + 1]`, and
    the metrics. The state is donated.

    Args:
      step: of `hope_jax.train.step.make_step` with `axis="data"` and no mesh.
    """
    return jax.pmap(step, axis_name=DATA, donate_argnums=0)


def jit_evaluation(
    evaluate: Callable, mesh: Mesh, params: PyTree | None = None
) -> Callable:
    """`evaluate(params, tokens) -> loss` compiled for `mesh`; `params` as of
    `jit_step`."""
    whole = lies = replicated(mesh)
    given = evaluate
    if cuts(mesh):
        lies = state_shardings(params, params, mesh)

        def given(params, tokens):
            return evaluate(_on_every_row_shard(params, mesh), tokens)

    return jax.jit(given, in_shardings=(lies, by_rows(mesh)), out_shardings=whole)


def _on_every_row_shard(params, mesh):
    def spec(spec):
        kept = (name if name == TENSOR else None for name in tuple(spec))
        return NamedSharding(mesh, PartitionSpec(*kept))

    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    lies = jax.tree.map(spec, param_specs(params, mesh), is_leaf=is_spec)
    return jax.lax.with_sharding_constraint(params, lies)
