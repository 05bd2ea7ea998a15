"""The encoder: its architecture, its modules, its heads, its cost. Imports only itself, so it ships in a checkpoint."""
