"""The teacher's outputs on disk: their identity, their records, and how training reads them as targets."""
