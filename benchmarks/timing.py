"""Rates, and contestants in turns."""

import time

import numpy as np


def rate(unit, seconds):
    """Images a second, of whole units."""
    n, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not n:
        n += unit()
    return n / elapsed


def in_turns(contestants, n_rounds, measure, seed=0):
    """`measure(contestant)` of each in every round, in an order drawn anew; lists by name."""
    rng, found = np.random.default_rng(seed), {name: [] for name in contestants}
    for _ in range(n_rounds):
        for i in rng.permutation(len(contestants)):
            name = list(contestants)[i]
            time.sleep(0.05)  # threads of the one before that still spin
            found[name].append(measure(contestants[name]))
    return found
