"""Training: one loop, objectives, optimizers, curves, checkpoints, and the stage that pre-trains."""
