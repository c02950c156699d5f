"""Stage 1 at work: decode workers, shards on their way to the disk, the teacher's pass, what it will cost."""
