"""Read shards or raw images into batches: the order of an epoch, rows, threads, loaders, data sets."""
