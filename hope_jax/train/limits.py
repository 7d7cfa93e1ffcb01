"""What fits: sizes that configs and checkpoints declare, before anything is allocated.

A model that is larger than the memory ends the process, without a word of which number
was too large; so the numbers are multiplied first.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.models.config import ModelConfig
from hope_jax.train.config import RunConfig

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory() -> int:
    """Bytes of memory of all devices together; of CPU devices that of this machine."""
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
    known = [limit for limit in limits if limit]
    if len(known) == len(limits):
        return sum(known) * jax.process_count()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        total = min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return total * jax.process_count()


def least_parameters(model: ModelConfig) -> int:
    """Parameters that a model has at least, by arithmetic alone: its embeddings, and a
    matrix of its width in each layer."""
    tables = 1 if model.tied_embedding else 2
    return tables * model.vocab * model.d_model + model.layers * model.d_model**2


def check_model(model: ModelConfig) -> None:
    """Refuses a model whose parameters alone, in float32, are more than the memory.

    Raises:
      ValueError: says what was multiplied.
    """
    least, most = least_parameters(model), memory()
    if 4 * least > most:
        raise ValueError(
            f"model.vocab ({model.vocab:,}), model.d_model ({model.d_model:,}) and "
            f"model.layers ({model.layers:,}) make {least:,} parameters at least, "
            f"vocab x d_model + layers x d_model²: {said(4 * least)} in float32, and "
            f"the devices here have {said(most)}. Use a smaller model."
        )


def check_run(config: RunConfig) -> None:
    """Refuses a model, or rows of which the embeddings alone, that are more than the
    memory.

    Raises:
      ValueError: says what was multiplied.
    """
    check_model(config.model)
    train, width = config.train, config.model.d_model
    least = 4 * -(-train.batch // train.accumulate) * train.seq_len * width
    most = memory()
    if least > most:
        raise ValueError(
            f"train.batch ({train.batch:,}) x train.seq_len ({train.seq_len:,}) x "
            f"model.d_model ({width:,}) / train.accumulate ({train.accumulate:,}) "
            f"numbers take {said(least)} in float32, and the devices here have "
            f"{said(most)}. Use fewer or shorter rows, or more parts."
        )


def declared(manifest: Mapping[str, Any]) -> int:
    """Bytes of the arrays of a manifest (`hope_jax.train.checkpoint.manifest`)."""
    return sum(
        jnp.dtype(dtype).itemsize * math.prod(shape)
        for dtype, shape, _ in manifest.values()
    )


def check_declared(manifest: Mapping[str, Any], where: str) -> None:
    """Refuses arrays that are more than the memory.

    Raises:
      ValueError: names where they are, and their size.
    """
    size, most = declared(manifest), memory()
    if size > most:
        raise ValueError(
            f"{where} declares arrays of {said(size)}, and the devices here have "
            f"{said(most)}: nothing was read."
        )


def said(size: int) -> str:
    """`size` bytes in words.

    >>> said(3 * 1024**3), said(600)
    ('3.0 GiB', '600 bytes')
    """
    for power, unit in ((5, "PiB"), (4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:,.1f} {unit}"
    return f"{size} bytes"
