"""Distil a big vision model into a small one. The commands, each with --help:

python precompute_cache.py          stage 1: images, and a teacher's outputs, into a cache
python distill_trainer.py           stage 2: train the student
python -m distillery.verify DIR     every byte of a cache against its hashes
python -m distillery.report DIR     a run or a cache in pictures and words
python -m distillery.evaluate       k-NN and linear probe of student and teacher
python -m distillery.export         the student, ready to leave
python -m distillery.embed          the embedding of every image, as parquet files
"""

import sys

from distillery.system.errors import EXIT_DONE, EXIT_USAGE


def main() -> int:
    """Print the commands: an answer to --help, an error where something was to be done."""
    is_asked = sys.argv[1:] in (["-h"], ["--help"])
    print(__doc__.strip(), file=sys.stdout if is_asked else sys.stderr)
    return EXIT_DONE if is_asked else EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
