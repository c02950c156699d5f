"""Programs that measure; each prints its ceiling beside its figure."""
