"""What the registries of a memory's choices hold: entries that say what is so of them.

Who asks whether a rule has a momentum, or a bias a threshold, asks the entry and no
name; so a new one, declared in its own file, works wherever the old ones do.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from hope_jax.memory.flow import Transformation

if TYPE_CHECKING:
    from hope_jax.memory.compose import MemoryConfig

Make = Callable[["MemoryConfig"], Transformation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One member of a registry.

    Attributes:
      kind: its name, by which a config chooses it.
      options: the fields of `MemoryConfig` that it reads and others do not.
      words: what tables call it, with the fields of the config in braces; the name if
        there are none.
    """

    kind: str
    options: tuple[str, ...] = ()
    words: str = ""

    def says(self, config: "MemoryConfig") -> str:
        """Its words, of this config."""
        return self.words.format_map(vars(config)) or self.kind
