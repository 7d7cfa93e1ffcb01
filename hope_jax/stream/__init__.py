"""Models that read on: a state that moves with the text, and text made from it."""
