"""How much of everything, with which random numbers; counted."""

import os
from collections import Counter

SCALE = float(os.environ.get("FAULTS_SCALE", "1"))
SEED = int(os.environ.get("FAULTS_SEED", "0"))
COUNTS: Counter[str] = Counter()


def scaled(count: int) -> int:
    """How many times to do something of which the short lane does `count`."""
    return max(1, round(count * SCALE))
