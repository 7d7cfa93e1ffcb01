"""What the installed versions have; nothing here starts jax."""

from importlib.metadata import version

# XLA's older code generator for CPUs, and the flag that chooses it.
FORMER_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
