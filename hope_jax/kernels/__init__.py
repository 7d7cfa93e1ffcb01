"""The memories of `hope_jax.memory`, faster; each file names its reference."""
