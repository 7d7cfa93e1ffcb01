"""How every source is read: divided among processes, ahead of need, in batches."""

from collections.abc import Mapping
from typing import Any, Protocol

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
    """What one process reads, `batch / process_count` at a time.

    The state of its iterator is how many items were read, whoever read them: it fits
    any number of workers.
    """
    return _Batched(dataset, config.batch // process_count, config.workers, threads)


class _Batched(grain.IterDataset):
    """`count` items at a time of a dataset, read ahead by `workers` processes."""

    def __init__(
        self, dataset: grain.MapDataset, count: int, workers: int, threads: int
    ):
        super().__init__(dataset)
        self.count = count
        self._dataset, self._workers, self._threads = dataset, workers, threads

    def __iter__(self) -> "_Iterator":
        return _Iterator(self)

    def after(self, items: int) -> grain.DatasetIterator:
        """Of what comes after so many items."""
        rest = self._dataset[items:] if items else self._dataset
        read = rest.to_iter_dataset(grain.ReadOptions(num_threads=self._threads))
        if self._workers:
            read = read.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=self.count
                ),
                worker_init_fn=workers.begin,
            )
        # After the workers: before them the order would depend on their number.
        return iter(read.batch(self.count, drop_remainder=True))


class _Iterator(grain.DatasetIterator):
    def __init__(self, batches: _Batched):
        super().__init__()
        self._batches, self._read = batches, 0
        self._inner = batches.after(0)

    def __next__(self) -> Any:
        item = next(self._inner)
        self._read += self._batches.count
        return item

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._read}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._read = _items(state)
        self._inner.close()
        self._inner = self._batches.after(self._read)

    def start_prefetch(self) -> None:
        self._inner.start_prefetch()

    def close(self) -> None:
        super().close()
        self._inner.close()


def shared(state: Mapping[str, Any], before: int, now: int) -> dict[str, Any]:
    """Where each of `now` processes goes on when `before` of them stood at `state`."""
    if before == now:
        return dict(state)
    return {"next_index": _items(state) * before // now}


def _items(state: Mapping[str, Any]) -> int:
    """How many items were read; also of states of grain's own, of workers each.

    >>> workers = [{"next_index": 105}, {"next_index": 104}]
    >>> _items({"iterators_in_use_states": workers, "exhausted": [0, 0]})
    209
    """
    if "iterators_in_use_states" in state:
        return sum(map(_items, state["iterators_in_use_states"]))
    return state["next_index"]
