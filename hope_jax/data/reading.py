"""How every source is read: divided among processes, ahead of need, in batches."""

from typing import Protocol

import grain
from absl import flags

from hope_jax.data import workers


class Reading(Protocol):
    """What a config says of it: rows of a step over all processes, and workers."""

    @property
    def batch(self) -> int: ...

    @property
    def workers(self) -> int: ...


def check(config: Reading, process_index: int, process_count: int, what: str) -> None:
    """Refuses what cannot be read so.

    Args:
      config: of the batches.
      process_index, process_count: which process this is, and of how many.
      what: is read: rows, images.

    Raises:
      ValueError: no such process; a batch that the processes cannot share equally;
        workers where absl flags are not parsed.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index ({process_index}) must lie in [0, process_count), and"
            f" process_count is {process_count}."
        )
    if config.batch % process_count:
        raise ValueError(
            f"batch ({config.batch}) must be a multiple of process_count"
            f" ({process_count}), so that each process reads as many {what}."
        )
    if config.workers and not flags.FLAGS.is_parsed():
        raise ValueError(
            f"workers={config.workers} needs parsed absl flags. Start through"
            " absl.app.run, call absl.flags.FLAGS.mark_as_parsed() first, or use"
            " workers=0."
        )


def batched(
    dataset: grain.MapDataset, config: Reading, process_count: int, threads: int
) -> grain.IterDataset:
    """What one process reads, `batch / process_count` at a time."""
    items = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads))
    if config.workers:
        items = items.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.workers, per_worker_buffer_size=config.batch
            ),
            worker_init_fn=workers.begin,
        )
    # After the workers: before them the order would depend on their number.
    return items.batch(config.batch // process_count, drop_remainder=True)
