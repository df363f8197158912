"""A random order of so many things that a list of them would fill the memory."""

import math

import numpy as np

AT_ONCE = 1024  # places that are computed together, since a few cost nearly as much


def scatter(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where each of numbers, all below n, stands in a permutation of 0 ... n - 1 that keys, (k,) uint64, decide on.

    A Feistel network on pairs below (rows, columns), as close to square as holds n: each half is moved by a hash of the
    other one, which can be undone, so no two numbers meet; the few that fall behind n go round again (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    places = np.array(numbers, dtype=np.uint64)
    again = np.ones(len(places), dtype=bool)
    while again.any():
        left, right = places[again] % np.uint64(rows), places[again] // np.uint64(rows)
        for first, second in zip(keys[::2], keys[1::2]):
            left = (left + _mixed(right ^ first)) % np.uint64(rows)
            right = (right + _mixed(left ^ second)) % np.uint64(columns)
        places[again] = left + right * np.uint64(rows)
        again = places >= n
    return places.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """x, uint64, with all bits stirred: the finish of MurmurHash3 (Appleby), below 2 ** 63."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(33))) >> np.uint64(1)


class Scattered:
    """A permutation of 0 ... n - 1 drawn from random, indexed like an array of it: order[numbers], (k,) int64."""

    def __init__(self, n: int, random: np.random.Generator):
        self.n, self.keys = n, random.integers(0, 2**64, 8, dtype=np.uint64)
        self.first, self.known = 0, np.empty(0, dtype=np.int64)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        least, most = int(numbers.min()), int(numbers.max())
        if not self.first <= least <= most < self.first + len(self.known):
            end = min(self.n, max(most + 1, least + AT_ONCE))
            self.first, self.known = least, scatter(np.arange(least, end), self.n, self.keys)
        return self.known[numbers - self.first]
