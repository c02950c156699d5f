"""From shards or raw images to batches: the order of an epoch, rows, threads, loaders, data sets."""
