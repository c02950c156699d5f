"""Stage 2: the training step, the objects it needs, checkpoints, the run's folder and log."""
