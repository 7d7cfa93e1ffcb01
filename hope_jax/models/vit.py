"""The vision transformer (arXiv:2010.11929): patches, attention both ways, one class.

Figure 11 of arXiv:2512.24695 trains two of them. As in arXiv:2205.01580 the class is
read from the mean over patches, not from a token of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hope_jax.core.config import did_you_mean
from hope_jax.models.layers import Dense

_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer.

    Attributes:
      image: side of the images, in pixels; a multiple of `patch`.
      channels: of a pixel.
      patch: side of a patch.
      classes: logits.
      d_model: width of the residual stream; a multiple of `heads`, and of 4 for sines.
      layers: number of blocks.
      heads: of the attention.
      hidden: width of the MLPs.
      position: what patches are told of their place: a `learned` vector each, or the
        fixed `sincos` of row and column.
      dtype: compute type of the blocks' projections and attention, `float32` or
        `bfloat16`; norms and the head stay in float32.

    Raises:
      ValueError: a field out of range.
    """

    image: int = 8
    channels: int = 1
    patch: int = 2
    classes: int = 10
    d_model: int = 32
    layers: int = 2
    heads: int = 4
    hidden: int = 128
    position: str = "learned"
    dtype: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}.")
        if self.image % self.patch:
            raise ValueError(
                f"image ({self.image}) must be a multiple of patch ({self.patch})."
            )
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of heads ({self.heads})."
            )
        if self.position not in ("learned", "sincos"):
            raise ValueError(
                f"position must be 'learned' or 'sincos', got {self.position!r}."
            )
        if self.position == "sincos" and self.d_model % 4:
            raise ValueError(
                f"d_model must be a multiple of 4 for position='sincos', got "
                f"{self.d_model}."
            )
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}."
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch


def _photographs(d_model: int, layers: int, heads: int) -> ViTConfig:
    return ViTConfig(
        image=224,
        channels=3,
        patch=16,
        classes=1000,
        d_model=d_model,
        layers=layers,
        heads=heads,
        hidden=4 * d_model,
        position="sincos",
        dtype="bfloat16",
    )


SIZES = {
    "digits": ViTConfig(),
    "ti16": _photographs(192, 12, 3),
    "s16": _photographs(384, 12, 6),  # Figure 11's "24M"
    "b16": _photographs(768, 12, 12),  # its "86M"
}


def get(name: str, **changes) -> ViTConfig:
    """A named size, with other fields changed: `get("s16", classes=10_450)`.

    Raises:
      ValueError: no such size; the message says which there are.
    """
    if name not in SIZES:
        raise ValueError(
            f"no vision transformer is named {name!r}.{did_you_mean(name, SIZES)}"
            f" There are {', '.join(SIZES)}."
        )
    return dataclasses.replace(SIZES[name], **changes)


class Attention(nnx.Module):
    """Softmax attention of all patches to all patches."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width, self.heads = config.d_model, config.heads
        dtype = _DTYPES[config.dtype]
        self.qkv = _dense(width, 3 * width, dtype, rngs)
        self.out = _dense(width, width, dtype, rngs, scale=0.5)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        rows, patches, width = x.shape
        shape = (rows, patches, 3, self.heads, width // self.heads)
        q, k, v = jnp.unstack(self.qkv(x).reshape(shape), axis=2)
        y = jax.nn.dot_product_attention(q, k, v)
        return self.out(y.reshape(x.shape))


class Block(nnx.Module):
    """Pre-norm: attention, then an MLP."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width, hidden = config.d_model, config.hidden
        dtype = _DTYPES[config.dtype]
        self.norm_attention = Norm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_mlp = Norm(config, rngs=rngs)
        self.up = _dense(width, hidden, dtype, rngs)
        self.down = _dense(hidden, width, dtype, rngs, scale=0.5)

    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        x = x + self.attention(self.norm_attention(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm_mlp(x))))


class Norm(nnx.LayerNorm):
    """Layer norm in float32, whatever it is given."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        super().__init__(config.d_model, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class VisionTransformer(nnx.Module):
    """Images to logits; `blocks` is one `Block` whose parameters lead with layers, L.

    Logits are small at the start, not 0: every layer learns from the first step on.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, places = config.d_model, config.grid**2
        dtype = _DTYPES[config.dtype]
        pixels = config.patch**2 * config.channels
        self.embed = _dense(pixels, width, dtype, rngs)
        if config.position == "learned":
            draw = jax.random.normal(rngs.params(), (places, width), jnp.float32)
            self.position = nnx.Param(0.02 * draw)
        keys = jax.random.split(rngs.params(), config.layers)
        graphdef = nnx.graphdef(Block(config, rngs=nnx.Rngs(0)))
        stacked = jax.vmap(
            lambda key: nnx.state(Block(config, rngs=nnx.Rngs(key)), nnx.Param)
        )(keys)
        self.blocks = nnx.merge(graphdef, stacked)
        self.norm = Norm(config, rngs=rngs)
        self.head = _dense(width, config.classes, jnp.float32, rngs, scale=0.1)

    def __call__(self, images: Float[Array, "B S S C"]) -> Float[Array, "B N"]:
        """Pixels in [0, 1] to logits."""
        config = self.config
        expected = (config.image, config.image, config.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"images must be [B, {', '.join(map(str, expected))}] for this model, "
                f"got {list(images.shape)}; read them with its size and channels."
            )
        x = self.embed(patches(2.0 * images - 1.0, config.patch))
        x = x + self._places().astype(x.dtype)[None]
        graphdef, params = nnx.split(self.blocks, nnx.Param)

        def layer(x, params):
            return nnx.merge(graphdef, params)(x), None

        x, _ = jax.lax.scan(layer, x, params)
        return self.head(jnp.mean(self.norm(x.astype(jnp.float32)), axis=1))

    def _places(self) -> Float[Array, "P D"]:
        if self.config.position == "learned":
            return self.position[...]
        return sincos(self.config.grid, self.config.d_model)


def patches(images: Float[Array, "B S S C"], patch: int) -> Float[Array, "B P F"]:
    """Squares of `patch` pixels a side, row by row, each laid out flat.

    >>> patches(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    rows, side, _, channels = images.shape
    grid = side // patch
    cut = images.reshape(rows, grid, patch, grid, patch, channels)
    return cut.swapaxes(2, 3).reshape(rows, grid**2, patch**2 * channels)


def sincos(grid: int, width: int, longest: float = 10_000.0) -> Float[Array, "P D"]:
    """Sines and cosines of rows and columns, as in arXiv:2205.01580."""
    frequency = longest ** -jnp.linspace(0.0, 1.0, width // 4)
    place = jnp.arange(grid, dtype=jnp.float32)[:, None] * frequency[None]
    waves = jnp.concatenate([jnp.sin(place), jnp.cos(place)], axis=1)
    row, column = jnp.repeat(waves, grid, axis=0), jnp.tile(waves, (grid, 1))
    return jnp.concatenate([row, column], axis=1)


def build(config: ViTConfig, key: Array) -> tuple[nnx.GraphDef, nnx.State]:
    """A new model as `(graphdef, params)`; after this only pure functions."""
    return nnx.split(VisionTransformer(config, rngs=nnx.Rngs(key)), nnx.Param)


def abstract(config: ViTConfig) -> nnx.State:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda key: build(config, key)[1], jax.random.key(0))


def count_parameters(config: ViTConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))


def apply(
    graphdef: nnx.GraphDef, params: nnx.State, images: Float[Array, "B S S C"]
) -> Float[Array, "B N"]:
    """Logits, float32, of images with pixels in [0, 1].

    Raises:
      ValueError: images of another size or other channels than the model's.
    """
    return nnx.merge(graphdef, params)(images)


def _dense(d_in: int, d_out: int, dtype, rngs: nnx.Rngs, scale: float = 1.0) -> Dense:
    """A projection with a bias, `scale / sqrt(d_in)` at the start."""
    init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
    return Dense(d_in, d_out, kernel_init=init, dtype=dtype, rngs=rngs)
