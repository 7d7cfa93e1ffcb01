"""Tokens to logits: Flax NNX modules that own what the outermost level learns."""
