"""Golden files: what every reader makes of small files in the official layouts, and of the first real rows."""
