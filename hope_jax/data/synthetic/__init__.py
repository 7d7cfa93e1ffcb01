"""Tasks whose rows are drawn from a key: a file each, whose config draws them, and a
line here; beside them what optimizers are tried on."""

from typing import Annotated

from hope_jax.core.config import Kinds
from hope_jax.data.synthetic.compression import CompressionConfig
from hope_jax.data.synthetic.copying import CopyingConfig
from hope_jax.data.synthetic.formal import FormalConfig
from hope_jax.data.synthetic.fuzzy import FuzzyConfig
from hope_jax.data.synthetic.in_context import InContextConfig
from hope_jax.data.synthetic.memorisation import MemorisationConfig
from hope_jax.data.synthetic.recall import RecallConfig
from hope_jax.data.synthetic.task import Asked, Task
from hope_jax.data.synthetic.words import WordsConfig

TASKS = Kinds.of_entries(
    "task",
    *(RecallConfig(), FormalConfig(), WordsConfig()),
    *(InContextConfig(), FuzzyConfig(), CopyingConfig()),
    *(CompressionConfig(), MemorisationConfig()),
)
AnyTask = Annotated[Task, TASKS]

__all__ = ["TASKS", "AnyTask", "Asked", "Task"]
