"""How threads of a CPU wait for each other; has to be said before torch loads its OpenMP runtime."""

from __future__ import annotations

import os

# GNU OpenMP spins while it waits. When another program uses a core, the spinning thread holds the core that the awaited
# one needs, and a step takes 20 to 40 times as long. After this many turns a thread gives its core away instead; on an
# idle machine nothing is lost. Measured with two threads and one busy neighbour on two cores: below 100 tokens per
# second without, above 1,000 with it.
SPIN_COUNT = "10000"


def yield_cores() -> None:
    """Let waiting threads give their core to other programs; what the user has set stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
