"""Stage 1: decode workers, the writers of shards, the teacher pass, and the estimate of the cost."""
