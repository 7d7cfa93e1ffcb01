"""Shampoo and SOAP: AdaGrad's full matrix as a Kronecker product of two small ones.

Baselines that Optax does not have. Appendix B of arXiv:2512.24695 calls them
approximations of the preconditioner that it derives as a memory of gradients, the root
of H = Σ vec(g) vec(g)ᵀ; `adagrad_memory(form="outer")` has one side of it.

A matrix is the last two axes of a leaf, whatever is stacked before them. All is made of
matrix products: calls of LAPACK's `eigh` and `qr` by several virtual CPU devices at
once did not come back within minutes (sides of 256), and on accelerators they take the
matrices of a batch one after another.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.optim import orthogonal
from hope_jax.optim.leaves import (
    as_type,
    direction_of,
    guarded,
    like,
    next_count,
    placed,
    taken,
    wide,
    zeros,
)

Grafting = Literal["adam", "rms", "none"]

_STARTS = 10  # rounds to the first eigenvectors, from the axes,
_SHIFT = 1e-3  # shifted so that the columns of a singular matrix are no rounding errors
_BLOCK = 32  # columns made orthogonal one by one


class Sides(NamedTuple):
    """A matrix for the rows and one for the columns; () is the identity."""

    left: Any
    right: Any


class Grams(NamedTuple):
    """Decayed sums over the gradients g of a leaf.

    Attributes:
      size: about the largest entry of the gradients in the sum, [..., 1, 1].
      trace: Σ ‖g / size‖², [..., 1, 1].
      sides: Σ g gᵀ / size² and Σ gᵀ g / size².
    """

    size: Float[Array, "*B 1 1"]
    trace: Float[Array, "*B 1 1"]
    sides: Sides


class ShampooState(NamedTuple):
    """In float32 or wider. A pytree, so it can be saved in the middle of a period.

    Attributes:
      count: int32 scalar, gradients taken in.
      memory: M, the decayed mean of gradients.
      root: for grafting="adam" √V, else ().
      grams: `Grams` of each leaf.
      powers: `Sides` of each leaf, the inverse roots as they were last taken.
    """

    count: Int[Array, ""]
    memory: PyTree
    root: PyTree
    grams: PyTree
    powers: PyTree


class SoapState(NamedTuple):
    """In float32 or wider. A pytree, so it can be saved in the middle of a period.

    Attributes:
      count: int32 scalar, gradients taken in.
      memory: M, the decayed mean of gradients.
      root: √V, of gradients in `bases`.
      grams: `Grams` of each leaf.
      bases: `Sides` of each leaf, the eigenvectors in columns, as they were last
        turned.
    """

    count: Int[Array, ""]
    memory: PyTree
    root: PyTree
    grams: PyTree
    bases: PyTree


@guarded
def scale_by_shampoo(
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    frequency: int = 10,
    root: int = 4,
    grafting: Grafting = "adam",
    eps: float = 1e-4,
    max_size: int = 2048,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of Shampoo (arXiv:1802.09568), for trees of matrices.

        L ← b₂ L + (1 − b₂) g gᵀ,   R ← b₂ R + (1 − b₂) gᵀ g
        M ← b₁ M + (1 − b₁) g,      D = L^(−1/4) M R^(−1/4)

    with Adam's correction of all three for their start at 0. The paper's are sums,
    L + g gᵀ and R + gᵀ g, which `b2=1` keeps, and M = g, which is `b1=0`. They stand
    for AdaGrad's full matrix, as H ≼ r √L ⊗ √R for gradients of rank r. Both sides are
    equal, and D is AdaGrad's, for one gradient of rank one and for diagonal ones.

    Grafting takes the size of each matrix's step from elsewhere (arXiv:2002.09018), so
    that learning rates carry over. Every direction is of degree 0: it does not depend
    on the scale of the gradients. It points uphill, like a gradient.

    Args:
      b1: what M keeps at each step, in [0, 1).
      b2: what L and R keep, in [0, 1); or 1, for sums.
      frequency: steps between two takings of the inverse roots, first at step 1. L and
        R move at every step.
      root: 4; or 2 for D = √(tr L) L^(−1/2) M R^(−1/2), whose Kronecker product is
        nearer to H (arXiv:2406.17748).
      grafting: D with the norm of Adam's M / √V, where V keeps b₂ like L and is a sum,
        AdaGrad's, where L is ("adam"); with Muon's root mean square 0.2 ("rms"); or D
        itself ("none").
      eps: added to the eigenvalues of L, in units of its Frobenius norm, likewise of R;
        in (0, 1). It bounds what is made of directions that no gradient has had.
      max_size: of a side with a matrix of its own: the work is its cube. Where only one
        side is so short, D = L^(−1/2) M or M R^(−1/2); where none is, M / √(tr L).
      mesh: cut the batches of roots over all devices of it, where otherwise every
        device of a data-parallel program would repeat the work on all matrices.

    With `optax.inject_hyperparams`, `frequency`, `root`, `eps` and `max_size` are
    `static_args`.

    Raises:
      ValueError: names the argument, or the leaf that is no matrix.

    >>> rule = scale_by_shampoo(b1=0.0, b2=1.0, grafting="none", eps=1e-7)
    >>> g = jnp.diag(jnp.array([0.1, 2.0]))
    >>> update, state = rule.update(g, rule.init(g))
    >>> [round(float(x), 2) for x in jnp.diag(update)]
    [1.0, 1.0]
    """
    orthogonal.check_fraction("b1", b1)
    if not (isinstance(b2, int | float) and b2 == 1):
        orthogonal.check_fraction("b2", b2)
    _check_whole("frequency", frequency)
    _check_whole("max_size", max_size)
    if root not in (2, 4):
        raise ValueError(f"root must be 2 or 4, got {root}.")
    if grafting not in ("adam", "rms", "none"):
        raise ValueError(f"grafting must be 'adam', 'rms' or 'none', got {grafting!r}.")
    if not isinstance(eps, int | float) or not 0 < eps < 1:
        raise ValueError(
            f"eps must be a number in (0, 1), got {eps}; with "
            "optax.inject_hyperparams, name it in static_args."
        )

    def take(grams):
        """The inverse roots of all grams, those of one size and power at once."""
        matrices, structure = jax.tree.flatten([_of_trace_one(g) for g in grams])
        counts = [len(jax.tree.leaves(g.sides)) for g in grams]
        powers = [root if n == 2 else 2 for n in counts for _ in range(n)]
        roots = list(matrices)
        for power in sorted(set(powers)):
            places = [i for i, one in enumerate(powers) if one == power]
            taken = _together(
                lambda gram, power=power: inverse_root(gram, power, eps),
                [matrices[i] for i in places],
                mesh=mesh,
            )
            for i, one in zip(places, taken, strict=True):
                roots[i] = one
        return structure.unflatten(roots)

    def direct(memory, squares, grams, powers, count):
        mean = memory / _one_minus_power(b1, count, memory.dtype)
        debt = _weight(b2, count, memory.dtype)
        root_of_trace = grams.size * jnp.sqrt(grams.trace / debt)
        direction = _turn(mean / _safe(root_of_trace), powers)
        if grafting == "none":
            return direction
        direction, _ = direction_of(direction, (-2, -1))
        if grafting == "rms":
            return orthogonal.RMS * math.sqrt(math.prod(mean.shape[-2:])) * direction
        _, norm = direction_of(_over(mean, squares / jnp.sqrt(debt)), (-2, -1))
        return norm * direction

    def init(params):
        orthogonal.check_matrices(params)
        grams, bare = _begin(params, max_size)
        squares = zeros(params) if grafting == "adam" else ()
        return ShampooState(
            jnp.zeros((), jnp.int32), zeros(params), squares, grams, bare
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        count = next_count(state.count)
        gradient, structure = _flat(updates)
        memory = _average(structure, state.memory, gradient, b1)
        squares = [None] * len(gradient)
        if grafting == "adam":
            squares = _root_mean_square(structure, state.root, gradient, b2)
        grams = _gather(taken(updates, state.grams), gradient, b2)
        powers = jax.lax.cond(
            (count - 1) % frequency == 0,
            lambda grams, powers: take(grams),
            lambda grams, powers: powers,
            grams,
            taken(updates, state.powers),
        )
        directions = [
            direct(*leaf, count)
            for leaf in zip(memory, squares, grams, powers, strict=True)
        ]
        return like(structure.unflatten(directions), updates), ShampooState(
            count,
            structure.unflatten(memory),
            structure.unflatten(squares) if grafting == "adam" else (),
            placed(updates, grams),
            placed(updates, powers),
        )

    return optax.GradientTransformationExtraArgs(init, update)


@guarded
def scale_by_soap(
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float = 0.95,
    frequency: int = 10,
    eps: float = 1e-8,
    max_size: int = 2048,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of SOAP (arXiv:2409.11321), for trees of matrices: Adam in the
    eigenvectors of Shampoo's L and R.

        M ← b₁ M + (1 − b₁) g,   V ← b₂ V + (1 − b₂) (Q_Lᵀ g Q_R)²
        update = Q_L (Q_Lᵀ M Q_R / (√V + ε)) Q_Rᵀ
        L ← β L + (1 − β) g gᵀ,  R ← β R + (1 − β) gᵀ g

    with Adam's corrections of M and V. Every `frequency` steps Q ← QR(L Q), one power
    iteration, after the columns of Q, and V with them, were put in the order of
    diag(Qᵀ L Q), the largest first. As in the paper and its code the bases never know
    the gradient that they turn, so the first step is but for them: its update is 0. The
    first bases there are those of `eigh`; here they are those of ten power iterations
    from the axes, for the reason at the top of this module.

    Components of rounding errors' size are left out, where a basis is no identity: Adam
    would make steps as large as any of them. A matrix whose gradients are of low rank
    has arbitrary bases in the rest, and updates there that differ with the hardware.

    Where the bases are the identity (`max_size` below both sides) it is Adam, from the
    second step on. Updates are of degree 0 in gradients well above ε. They point
    uphill, like a gradient.

    Args:
      b1: what M keeps at each step, in [0, 1).
      b2: what V keeps, in [0, 1).
      shampoo_beta: β, what L and R keep, in [0, 1); or 1, for sums.
      frequency: steps between two turns of the bases, at steps 1, 1 + frequency, ...
        L and R move at every step.
      eps: ε.
      max_size: of a side with a basis of its own: the work is its cube. The basis of a
        longer one is the identity.
      mesh: cut the batches of bases over all devices of it, see `scale_by_shampoo`.

    With `optax.inject_hyperparams`, `frequency` and `max_size` are `static_args`.

    Raises:
      ValueError: names the argument, or the leaf that is no matrix.

    >>> rule = scale_by_soap()
    >>> g = jnp.array([[1.0, 1.0], [1.0, 1.0]])  # of rank one: one axis of four
    >>> _, state = rule.update(g, rule.init(g))
    >>> update, state = rule.update(g, state)
    >>> [round(float(x), 2) for x in update.ravel()]
    [0.5, 0.5, 0.5, 0.5]
    """
    for name, value in (("b1", b1), ("b2", b2)):
        orthogonal.check_fraction(name, value)
    if not (isinstance(shampoo_beta, int | float) and shampoo_beta == 1):
        orthogonal.check_fraction("shampoo_beta", shampoo_beta)
    _check_whole("frequency", frequency)
    _check_whole("max_size", max_size)

    def turn(grams, bases, root, first):
        """New bases, and `root` with its rows and columns in their order."""
        matrices, structure = jax.tree.flatten([_of_trace_one(g) for g in grams])
        root = _whole(root, mesh)

        def once(bases, root):
            shift = jnp.where(first, _SHIFT, 0)
            turned = _together(
                lambda gram, basis: power_iteration(gram, basis, shift),
                matrices,
                jax.tree.leaves(bases),
                mesh=mesh,
            )
            orders = structure.unflatten([order for _, order in turned])
            root = [_reorder(*one) for one in zip(root, orders, strict=True)]
            return structure.unflatten([basis for basis, _ in turned]), root

        def round_(i, carry):
            return jax.lax.cond((i == 0) | first, once, lambda *carry: carry, *carry)

        return jax.lax.fori_loop(0, _STARTS, round_, (bases, root))

    def direct(memory, root, bases, count):
        mean = memory / _one_minus_power(b1, count, memory.dtype)
        root = root / jnp.sqrt(_one_minus_power(b2, count, memory.dtype))
        below = root + as_type(eps, root)
        if jax.tree.leaves(bases):  # along axes that no gradient had: rounding errors
            _, norm = direction_of(root, (-2, -1))
            below = jnp.where(root > 4 * jnp.finfo(root.dtype).eps * norm, below, 0)
        return _turn(_over(_turn(mean, bases, back=True), below), bases)

    def init(params):
        orthogonal.check_matrices(params)
        grams, bare = _begin(params, max_size)
        return SoapState(
            jnp.zeros((), jnp.int32),
            zeros(params),
            zeros(params),
            grams,
            bare,
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        first = state.count == 0
        gradient, structure = _flat(updates)
        bases = taken(updates, state.bases)
        turned = [_turn(g, q, back=True) for g, q in zip(gradient, bases, strict=True)]
        memory = _average(structure, state.memory, gradient, b1)
        root = _root_mean_square(structure, state.root, turned, b2)
        memory, root = (
            [jnp.where(first, 0, x) for x in moment] for moment in (memory, root)
        )
        moments = jnp.maximum(state.count, 1)
        directions = [
            direct(*leaf, moments) for leaf in zip(memory, root, bases, strict=True)
        ]
        grams = _gather(taken(updates, state.grams), gradient, shampoo_beta)
        bases, root = jax.lax.cond(
            state.count % frequency == 0,
            turn,
            lambda grams, bases, root, first: (bases, root),
            grams,
            bases,
            root,
            first,
        )
        return like(structure.unflatten(directions), updates), SoapState(
            next_count(state.count),
            structure.unflatten(memory),
            structure.unflatten(root),
            placed(updates, grams),
            placed(updates, bases),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    frequency: int = 10,
    root: int = 4,
    grafting: Grafting = "adam",
    eps: float = 1e-4,
    max_size: int = 2048,
    mesh: Mesh | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo with decoupled weight decay, for trees of matrices.

    `hope_jax.optim.with_adamw(scale_by_shampoo(), learning_rate)` is the one for a
    whole model. See `scale_by_shampoo` for the other arguments.
    """
    direction = scale_by_shampoo(
        b1=b1,
        b2=b2,
        frequency=frequency,
        root=root,
        grafting=grafting,
        eps=eps,
        max_size=max_size,
        mesh=mesh,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float = 0.95,
    frequency: int = 10,
    eps: float = 1e-8,
    max_size: int = 2048,
    mesh: Mesh | None = None,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """SOAP with decoupled weight decay, for trees of matrices.

    `hope_jax.optim.with_adamw(scale_by_soap(), learning_rate)` is the one for a
    whole model. See `scale_by_soap` for the other arguments.
    """
    direction = scale_by_soap(
        b1=b1,
        b2=b2,
        shampoo_beta=shampoo_beta,
        frequency=frequency,
        eps=eps,
        max_size=max_size,
        mesh=mesh,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def inverse_root(
    matrices: Float[Array, "B N N"], power: int, eps: float
) -> Float[Array, "B N N"]:
    """`(A + eps ‖A‖ I)^(-1/power)` of symmetric A ≽ 0, by products alone.

    The coupled Newton iteration (Iannazzo, 2006), in as many rounds as the least
    possible eigenvalue, eps ‖A‖ in the Frobenius norm, needs. In float32 its error is
    that of `eigh` or smaller. Zero gives the identity.

    Args:
      matrices: of entries not far from 1.
      power: 2 or 4.
      eps: in (0, 1), not below the precision of the type.
    """
    n, dtype = matrices.shape[-1], matrices.dtype
    eye = jnp.eye(n, dtype=dtype)[None]
    norm = _norm(matrices)
    a = jnp.where(norm > 0, matrices + as_type(eps, norm) * norm * eye, eye)
    scale = (1 + power) / (2 * _norm(a))

    def newton(_, carry):
        a, x = carry
        t = ((power + 1) * eye - a) / power
        x = _product(x, t)
        for _ in range(power.bit_length() - 1):  # t to the power
            t = _product(t, t)
        return _product(t, a), x

    start = scale * a, scale ** (1 / power) * eye
    return jax.lax.fori_loop(0, _rounds(power, eps), newton, start)[1]


def power_iteration(
    matrices: Float[Array, "B N N"], bases: Float[Array, "B N N"], shift: Any
) -> tuple[Float[Array, "B N N"], Int[Array, "B N"]]:
    """Better eigenvectors Q of symmetric A ≽ 0, and which column each came from.

    Orders the columns by diag(Qᵀ A Q), the largest first, and takes the Q of the QR
    decomposition of `(A + shift ‖A‖ I) Q`. The eigenvectors are those of A, columns
    that A takes to 0 stay what they were, and zero leaves all as it is. The shift is at
    least some rounding errors; a greater one is slower for eigenvalues below it.
    """
    dtype = matrices.dtype
    norm = _norm(matrices)
    shift = jnp.maximum(as_type(shift, norm), 8 * jnp.finfo(dtype).eps)
    shift = jnp.where(norm > 0, shift * norm, 1)
    image = _product(matrices, bases)
    order = jnp.argsort(-jnp.sum(bases * image, axis=-2), axis=-1)
    image = jnp.take_along_axis(image + shift * bases, order[:, None], axis=-1)
    return orthonormal(image), order


def orthonormal(x: Float[Array, "B N N"]) -> Float[Array, "B N N"]:
    """The Q of the QR decomposition whose R has a positive diagonal.

    Gram and Schmidt's, a block of columns at a time and each block twice: orthogonal to
    rounding errors where x is regular in its type. Columns that are 0 stay 0.
    """
    n = x.shape[-1]
    width = min(_BLOCK, n)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -n % width)))

    def column(k, block):
        before = jnp.where(jnp.arange(width)[None, None] < k, block, 0)
        v = jax.lax.dynamic_slice_in_dim(block, k, 1, axis=-1)
        v = v - _product(before, _product(before.mT, v))
        return jax.lax.dynamic_update_slice_in_dim(
            block, v / _safe(_norm(v)), k, axis=-1
        )

    def add(k, q):
        block = jax.lax.dynamic_slice_in_dim(x, k * width, width, axis=-1)
        for _ in range(2):
            block = block - _product(q, _product(q.mT, block))
            block = jax.lax.fori_loop(0, width, column, block)
        return jax.lax.dynamic_update_slice_in_dim(q, block, k * width, axis=-1)

    blocks = x.shape[-1] // width
    return jax.lax.fori_loop(0, blocks, add, jnp.zeros_like(x))[..., :n]


def _begin(params: PyTree, max_size: int) -> tuple[PyTree, PyTree]:
    """Grams of nothing, and the identity for each of their sides."""

    def grams(leaf):
        *stack, rows, columns = leaf.shape
        dtype = wide(leaf).dtype

        def side(n):
            return jnp.zeros((*stack, n, n), dtype) if n <= max_size else ()

        one = jnp.zeros((*stack, 1, 1), dtype)
        return Grams(one, one, Sides(side(rows), side(columns)))

    def identities(leaf):
        return jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape),
            grams(leaf).sides,
        )

    leaves = jax.tree.leaves(params)
    return tuple(
        placed(params, [of(leaf) for leaf in leaves]) for of in (grams, identities)
    )


def _gather(grams: list[Grams], gradient: list, decay) -> list[Grams]:
    """`decay` of the grams and the rest of the new ones; the sum for a decay of 1.

    The unit of size follows the gradients up at once and down as their sum forgets, so
    that entries leave the range of a float at no scale.
    """

    def gather(old, g):
        keep = as_type(decay, g)
        weight = jnp.where(keep < 1, 1 - keep, 1)
        faded = jnp.sqrt(keep) * old.size
        size = jnp.maximum(faded, _largest(g))
        keep = jnp.square(faded / _safe(size))
        g = g / _safe(size)
        new = (_product(g, g.mT), _product(g.mT, g))
        sides = (
            () if isinstance(was, tuple) else keep * was + weight * one
            for was, one in zip(old.sides, new, strict=True)
        )
        trace = keep * old.trace + weight * jnp.sum(g**2, axis=(-2, -1), keepdims=True)
        return Grams(size, trace, Sides(*sides))

    return [gather(*pair) for pair in zip(grams, gradient, strict=True)]


def _average(structure, memory: PyTree, gradient: list, decay) -> list[Array]:
    old = structure.flatten_up_to(memory)
    return [orthogonal.average(m, g, decay) for m, g in zip(old, gradient, strict=True)]


def _root_mean_square(structure, root: PyTree, gradient: list, decay) -> list[Array]:
    """√V from √V: squares of gradients of 1e20 would overflow. A sum for decay 1."""

    def learn(r, g):
        keep = as_type(decay, g)
        weight = jnp.where(keep < 1, 1 - keep, 1)
        return jnp.hypot(jnp.sqrt(keep) * r, jnp.sqrt(weight) * g)

    old = structure.flatten_up_to(root)
    return [learn(*pair) for pair in zip(old, gradient, strict=True)]


def _turn(x: Array, sides: Sides, back: bool = False) -> Array:
    """`left x rightᵀ`, or with the transposes of both."""
    left, right = sides
    if not isinstance(left, tuple):
        x = _product(left.mT if back else left, x)
    if not isinstance(right, tuple):
        x = _product(x, right if back else right.mT)
    return x


def _reorder(x: Array, orders: Sides) -> Array:
    left, right = orders
    if not isinstance(left, tuple):
        x = jnp.take_along_axis(x, left[..., :, None], axis=-2)
    if not isinstance(right, tuple):
        x = jnp.take_along_axis(x, right[..., None, :], axis=-1)
    return x


def _together(
    function: Callable, *arguments: Sequence[Array], mesh: Mesh | None
) -> list[PyTree]:
    """`function` of matrices [..., N, N] in one call for all those of one size.

    It takes batches [B, N, N], one for each list of `arguments`, and gives a tree whose
    leaves lead with B; there is one such tree for each place in the lists.
    """
    places = collections.defaultdict(list)
    for place, x in enumerate(arguments[0]):
        places[x.shape[-1], x.dtype].append(place)
    results = [None] * len(arguments[0])
    for (n, _), group in places.items():
        stacks = [arguments[0][place].shape[:-2] for place in group]
        ends = [0]
        for stack in stacks:
            ends.append(ends[-1] + math.prod(stack))
        batches = [
            jnp.concatenate(
                [_whole(of[place], mesh).reshape(-1, n, n) for place in group]
            )
            for of in arguments
        ]
        if mesh is not None:
            over = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            more = ((0, -ends[-1] % mesh.size), (0, 0), (0, 0))
            batches = [
                jax.lax.with_sharding_constraint(jnp.pad(x, more), over)
                for x in batches
            ]
        out = _whole(function(*batches), mesh)
        for place, stack, start in zip(group, stacks, ends[:-1], strict=True):
            end = start + math.prod(stack)
            results[place] = jax.tree.map(
                lambda x, stack=stack, start=start, end=end: x[start:end].reshape(
                    *stack, *x.shape[1:]
                ),
                out,
            )
    return results


def _whole(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """On every device of `mesh`. Of matrices that are cut along both axes XLA makes
    other roots, and refuses to reorder them."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def _of_trace_one(grams: Grams) -> Sides:
    return jax.tree.map(lambda x: x / _safe(grams.trace), grams.sides)


def _flat(updates: PyTree) -> tuple[list[Array], Any]:
    leaves, structure = jax.tree.flatten(updates)
    return [wide(leaf) for leaf in leaves], structure


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True))


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)


def _safe(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)


def _over(above: Array, below: Array) -> Array:
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)


def _one_minus_power(decay, count: Array, dtype) -> Array:
    """1 − decayᵗ, without the cancellation that costs float32 half its digits."""
    return -jnp.expm1(count.astype(dtype) * jnp.log(jnp.asarray(decay, dtype)))


def _weight(decay, count: Array, dtype) -> Array:
    """The sum of the weights of all gradients in a mean, and 1 for a sum."""
    below = jnp.asarray(decay, dtype) < 1
    return jnp.where(below, _one_minus_power(decay, count, dtype), 1)


def _rounds(power: int, eps: float) -> int:
    """Of Newton, until the smallest eigenvalue has come to 1, and three to be exact."""
    smallest, rounds = 0.5 * (power + 1) * eps / (1 + eps), 3
    while smallest < 0.9:
        smallest *= ((power + 1 - smallest) / power) ** power
        rounds += 1
    return rounds


def _check_whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} must be a whole number >= 1, got {value}; with "
            "optax.inject_hyperparams, name it in static_args."
        )
