"""Stage 2 at work: the step, its parts put together, checkpoints, the run's folder and log."""
