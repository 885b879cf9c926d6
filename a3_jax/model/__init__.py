"""The two-stream decoder: pure functions over explicit parameters, in thin Flax Linen modules."""
