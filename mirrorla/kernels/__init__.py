"""Linear attention over mirrored features: the op, its twins and its tables."""
