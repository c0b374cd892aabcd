"""The training loop that all methods share, its state, its checkpoints and its image features."""
