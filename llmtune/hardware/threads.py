"""How threads of a CPU wait for each other; has to be said before torch loads its OpenMP runtime."""

from __future__ import annotations

import os

# GNU OpenMP spins while it waits. When another program uses a core, the spinning thread holds the core that the awaited
# one needs, and a step takes many times as long. After this many turns a thread gives its core away instead.
# Measured on builtin:tiny with two threads on two cores, median seconds per update. One busy neighbour: 0.94 with
# 10,000 turns, 2.4 with 100,000, above 3 with the library's default. Idle: 0.38, 0.34, and 0.21 with 1,000,000; that is
# the price of waking threads for matrices so small that the plan gives such models one thread.
SPIN_COUNT = "10000"


def yield_cores() -> None:
    """Let waiting threads give their core to other programs; what the user has set stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
