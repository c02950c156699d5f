"""Show a run or a cache in pictures and plain words: python -m distillery.report."""
