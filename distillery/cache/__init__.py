"""What a cache folder is: bytes of a shard, records, index; opening, planning, verifying, rebuilding."""
