"""The cache folder of stage 1: its files, how to open and verify them, and how to rebuild a lost index."""
