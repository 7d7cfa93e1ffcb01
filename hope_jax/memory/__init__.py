"""Associative memory: the four MIRAS choices, and their meeting in `compose`."""
