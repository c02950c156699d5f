"""The teacher's outputs on disk: what identifies them, their records, reading them back as targets."""
