"""Stable hashing and per-sample random numbers in vectorised uint64 arithmetic.

Python's `hash` of a string is salted per process, and a numpy generator shared by a batch gives other numbers
when the batch is cut otherwise. Everything here depends only on its arguments, so features and augmentations
are the same in every process, for every number of workers.

B samples of a batch.
"""

from __future__ import annotations

import numpy as np

Rng = np.random.Generator | np.ndarray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S40 = (np.uint64(s) for s in (27, 30, 31, 40))


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of uint64 with full avalanche."""
    x = np.asarray(x, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> _S30)) * _MIX_A
        x = (x ^ (x >> _S27)) * _MIX_B
        return x ^ (x >> _S31)


def tag(value: int) -> np.uint64:
    """A constant that separates one use of a hash from another."""
    return np.uint64(mix64(np.array([(value * int(GOLDEN) + 1) % 2**64], dtype=np.uint64))[0])


def sample_keys(seed: int, epoch: int, positions_B: np.ndarray) -> np.ndarray:
    """uint64 keys (B,), one per (seed, epoch, position in the stream): pass them as `rng` of
    `Encoder.prepare`.
    """
    with np.errstate(over="ignore"):
        start = mix64(np.array([seed], dtype=np.int64).view(np.uint64) + GOLDEN)
        start = mix64(start + np.uint64(epoch) * GOLDEN)
        return mix64(start + np.asarray(positions_B).astype(np.uint64) * GOLDEN)


class SampleRandom:
    """Random numbers keyed by sample: row b depends only on key b, the name of the draw and the shape.

    `rng` is a numpy Generator (keys are drawn from it) or uint64 keys (B,).
    """

    def __init__(self, rng: Rng, size: int) -> None:
        if isinstance(rng, np.random.Generator):
            self.keys_B = rng.integers(0, 2**64, size=size, dtype=np.uint64)
        else:
            self.keys_B = np.asarray(rng).astype(np.uint64)
            if self.keys_B.shape != (size,):
                raise ValueError(f"rng keys have shape {self.keys_B.shape}, expected ({size},): one key per sample")

    def uniform(self, draw: int, *shape: int) -> np.ndarray:
        """float32 in [0, 1), (B, *shape); `draw` numbers the use, so that two uses are independent."""
        count = int(np.prod(shape)) if shape else 1
        with np.errstate(over="ignore"):
            base_B = mix64(self.keys_B + tag(draw))
            bits = mix64(base_B[:, None] + np.arange(1, count + 1, dtype=np.uint64)[None, :] * GOLDEN)
        return ((bits >> _S40).astype(np.float32) * np.float32(2.0**-24)).reshape(len(self.keys_B), *shape)

    def integers(self, draw: int, high: np.ndarray | int) -> np.ndarray:
        """int64 (B,) in [0, high), `high` a number or (B,)."""
        value = np.floor(self.uniform(draw).astype(np.float64) * high).astype(np.int64)
        return np.minimum(value, np.maximum(np.asarray(high) - 1, 0))

    def normal(self, draw: int, *shape: int) -> np.ndarray:
        """Standard normal float32, (B, *shape), by Box and Muller."""
        pair = self.uniform(draw, 2, *shape)
        radius = np.sqrt(-2.0 * np.log1p(-pair[:, 0]))
        return (radius * np.cos(np.float32(2.0 * np.pi) * pair[:, 1])).astype(np.float32)
