"""Seeded, vectorised augmentations of images and of short strings.

Every draw is keyed by sample (`SampleRandom`), so a sample is changed alike in any batch.

B samples, H height, W width, C channels, L characters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, field_validator

from labelmill.encoders.hashing import Rng, SampleRandom
from labelmill.job import StrictModel

# Letters of Latin-script words in rough proportion to their use; a draw from it is a plausible slip.
LATIN_LETTERS = (
    "eeeeeeeeeeeeeeeaaaaaaaaaaiiiiiiiiirrrrrrrrrnnnnnnnnnssssssssttttttttoooooooolllllluuuuucccccdddd"
    "mmmppphhhgggbbffvvkkyzzwjqx"
)

SUBSTITUTE, INSERT, DELETE, TRANSPOSE = range(4)


class ImageAugment(StrictModel):
    """Training augmentation of images; every option is off at its default."""

    shift: int = Field(0, ge=0, description="largest shift in pixels, each axis; the border is filled with zeros")
    flip: float = Field(0.0, ge=0.0, le=1.0, description="probability of a horizontal flip")
    cutout: int = Field(0, ge=0, description="side of a square set to zero at a random place, in pixels")
    noise: float = Field(0.0, ge=0.0, description="standard deviation of Gaussian noise, on the 0..1 pixel scale")

    @property
    def active(self) -> bool:
        """True when any option is on."""
        return bool(self.shift or self.flip or self.cutout or self.noise)


class Typos(StrictModel):
    """Random edits of short strings: substitute, insert, delete, transpose, equally likely."""

    edits: tuple[float, ...] = Field(
        (0.0, 0.75, 0.25), min_length=2, description="probability of 0, 1, 2, ... edits; sums to 1"
    )
    letters: str = Field(
        LATIN_LETTERS, min_length=2, description="letters to substitute and insert, repeated by frequency"
    )

    @field_validator("edits")
    @classmethod
    def _sums_to_one(cls, edits: tuple[float, ...]) -> tuple[float, ...]:
        if min(edits) < 0 or abs(sum(edits) - 1.0) > 1e-6:
            raise ValueError(f"edits are probabilities of 0, 1, 2, ... edits and must sum to 1, not {sum(edits):g}")
        return edits

    @field_validator("letters")
    @classmethod
    def _two_letters(cls, letters: str) -> str:
        if len(set(letters)) < 2:
            raise ValueError("letters needs at least two different letters")
        return letters


def augment_images(images_BHWC: np.ndarray, options: ImageAugment, rng: Rng) -> np.ndarray:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) on the 0..255 scale, augmented."""
    size, height, width, _ = images_BHWC.shape
    random = SampleRandom(rng, size)
    if options.shift:
        s = options.shift
        padded = np.pad(images_BHWC, ((0, 0), (s, s), (s, s), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
        out = windows[np.arange(size), random.integers(0, 2 * s + 1), random.integers(1, 2 * s + 1)]
    else:
        out = images_BHWC.transpose(0, 3, 1, 2)
    images_BCHW = out.astype(np.float32)
    if options.flip:
        flipped = random.uniform(2) < options.flip
        images_BCHW[flipped] = images_BCHW[flipped][..., ::-1]
    if options.noise:
        images_BCHW += (255.0 * options.noise) * random.normal(3, *images_BCHW.shape[1:])
    if options.cutout:
        # the square's corner may lie outside, so that the border is hit as often as the middle
        top = random.integers(4, height + options.cutout - 1)[:, None] - (options.cutout - 1)
        left = random.integers(5, width + options.cutout - 1)[:, None] - (options.cutout - 1)
        rows, cols = np.arange(height)[None, :], np.arange(width)[None, :]
        in_rows = (rows >= top) & (rows < top + options.cutout)
        in_cols = (cols >= left) & (cols < left + options.cutout)
        images_BCHW *= ~(in_rows[:, None, :, None] & in_cols[:, None, None, :])
    return images_BCHW


def code_points(strings: Sequence[str | None], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unicode code points uint32 (B, L) padded with 0, and lengths int64 (B,); None counts as "".

    Strings longer than `max_length` code points are cut there. No Python code runs per string.
    """
    texts = [s or "" for s in strings]
    full_B = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    flat = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return _pad(flat, full_B, max_length)


def _pad(flat: np.ndarray, full_B: np.ndarray, max_length: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Ragged values, row after row, into a matrix padded with 0."""
    length_B = full_B if max_length is None else np.minimum(full_B, max_length)
    width = int(length_B.max(initial=0))
    matrix_BL = np.zeros((len(full_B), width), dtype=flat.dtype)
    column = np.arange(width)[None, :]
    if max_length is not None and int(full_B.max(initial=0)) > max_length:
        position = np.arange(len(flat)) - np.repeat(np.cumsum(full_B) - full_B, full_B)
        flat = flat[position < max_length]
    matrix_BL[column < length_B[:, None]] = flat
    return matrix_BL, length_B


def apply_typos(words: Sequence[str], rng: Rng, options: Typos | None = None) -> list[str]:
    """Each word with random edits; a word that is to be edited always comes out different from itself.

    About 0.4 million words a second on one core. Words of one letter are substituted or extended.
    """
    options = options or Typos()
    codes_BL, length_B = code_points(words)
    random = SampleRandom(rng, len(words))
    chance = np.cumsum(options.edits)
    edits_B = np.minimum(np.searchsorted(chance, random.uniform(0), side="right"), len(options.edits) - 1)
    extra = len(options.edits)  # every edit can add one letter, the last one is the repair below
    codes = np.pad(codes_BL, ((0, 0), (0, extra)))
    start, lengths = codes.copy(), length_B.copy()
    letters = np.array([ord(c) for c in options.letters], dtype=np.uint32)
    for step in range(1, len(options.edits)):
        _edit(codes, lengths, edits_B >= step, random, 10 * step, letters)
    undone = (edits_B > 0) & (codes == start).all(axis=1)
    if undone.any():  # two edits can cancel; one edit can't
        _edit(codes, lengths, undone, random, 10 * (extra + 1), letters)
    width = codes.shape[1]
    return codes.astype("<u4").view(f"<U{width}").reshape(-1).tolist() if len(words) else []


def _edit(
    codes: np.ndarray,
    lengths: np.ndarray,
    chosen: np.ndarray,
    random: SampleRandom,
    draw: int,
    letters: np.ndarray,
) -> None:
    """One edit in place of the rows in `chosen`, always a change of the word."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return
    work, length = codes[rows], lengths[rows]
    kind = random.integers(draw, 4)[rows]
    kind[length == 0] = INSERT
    kind[(length == 1) & (kind >= DELETE)] = SUBSTITUTE
    slots = np.where(kind == INSERT, length + 1, np.where(kind == TRANSPOSE, length - 1, length))
    place = np.floor(random.uniform(draw + 1)[rows] * slots).astype(np.int64)
    place = np.minimum(place, slots - 1)
    here = work[np.arange(len(rows)), place]
    after = work[np.arange(len(rows)), np.minimum(place + 1, work.shape[1] - 1)]
    kind[(kind == TRANSPOSE) & (here == after)] = SUBSTITUTE
    letter = letters[random.integers(draw + 2, len(letters))[rows]]
    distinct = np.unique(letters)
    other = distinct[(np.searchsorted(distinct, letter) + 1) % len(distinct)]
    letter = np.where((kind == SUBSTITUTE) & (letter == here), other, letter)

    column = np.broadcast_to(np.arange(work.shape[1])[None, :], work.shape)
    at, kinds = place[:, None], kind[:, None]
    source = np.where((kinds == DELETE) & (column >= at), column + 1, column)
    source = np.where((kinds == INSERT) & (column > at), column - 1, source)
    source = np.where((kinds == TRANSPOSE) & (column == at), at + 1, source)
    source = np.where((kinds == TRANSPOSE) & (column == at + 1), at, source)
    new = np.take_along_axis(work, np.minimum(source, work.shape[1] - 1), axis=1)
    write = (kind == SUBSTITUTE) | (kind == INSERT)
    new[np.flatnonzero(write), place[write]] = letter[write]
    length = length + (kind == INSERT) - (kind == DELETE)
    new[np.arange(work.shape[1])[None, :] >= length[:, None]] = 0
    codes[rows], lengths[rows] = new, length
