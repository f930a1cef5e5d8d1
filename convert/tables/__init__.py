"""Which weight of ours is which of theirs: a table a model."""
