"""A clip of any length -> stretches that a model can hear at once, cut where nobody speaks.

Loudness is looked at in frames of 10 ms: the mean square of a frame's samples about their mean (so that an offset or
hum is no sound), averaged over five frames, in dB below full scale. Two thresholds follow from it:

- A frame belongs to a **pause** where it is little louder than the quiet tenth of the frames around it. Cuts are made
  in the middle of the longest pause of the last part of what fits; where there is no pause, at the quietest frame.
- A frame is **silent** where it is little louder than the room itself: the noise floor, which falls at once and rises
  slowly (`RISE` dB a second), so that a long loud passage is not taken for noise. Only silent frames are left out,
  at the edges of stretches: models make up words where they hear nothing.

Nothing is kept but the samples that no cut has been found for yet, so memory does not grow with the clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.spec import MAX_AUDIO_SAMPLES, SAMPLE_RATE

FRAME = SAMPLE_RATE // 100
"""Samples of a frame."""
SMOOTH = 5
"""Frames that a frame's loudness is averaged over; odd."""
QUIETEST = -100.0
"""dB below full scale: an empty frame's loudness."""
LEAST_FLOOR = -75.0
"""dB: the floor is no lower than this; below it is no room's noise but silence that was made."""
FIRST_FLOOR = -40.0
"""dB: the floor is no higher than this at first; a clip that begins loud is not taken for noise."""
RISE = 0.2
"""dB a second by which the floor may rise."""
LEAST_MARGIN, MARGIN_PART = 3.0, 0.2
"""A threshold lies this many dB above a floor, or this part of the way from it to the loud frames, if that is more."""
FLOOR_PART, LOUD_PART = 10, 95
"""Percentiles of frames that count as the floor and as loud."""
SHORTEST_PAUSE = 20
"""Frames: shorter ones also stand inside words (closures)."""
LONG_PAUSE = 200
"""Frames of silence that always end a stretch."""
EDGE_SECONDS = (0.25, 0.25)
"""Of silence that stay before a stretch's first sound and behind its last: words may begin and end below the
threshold."""
LAST_PARTS = (2 / 3, 1 / 3)
"""Where a cut is looked for: behind this part of what fits; if no pause is there, behind the next."""
SHORTEST = 1.0
"""Seconds: the least that stretches may be limited to."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Samples of a clip that belong together.

    Attributes:
        start: the first one's number in the clip, at 16 kHz.
        samples: float32 [n].
    """

    start: int
    samples: np.ndarray

    @property
    def end(self) -> int:
        """The number behind the last one's."""
        return self.start + len(self.samples)


def stretches(
    blocks: Iterable[np.ndarray],
    most_samples: int = MAX_AUDIO_SAMPLES,
    edge_seconds: tuple[float, float] = EDGE_SECONDS,
) -> Iterator[Stretch]:
    """The stretches of a clip in order, disjoint; what is in none of them is silent.

    Args:
        blocks: float32 [n], mono at 16 kHz, the clip end to end.
        most_samples: the longest stretch.
        edge_seconds: of silence that stay before its first sound and behind its last, where there are so many.

    Raises:
        InputError: `most_samples` is less than a second, or one of `edge_seconds` not 0 to 1.
    """
    if most_samples < SHORTEST * SAMPLE_RATE:
        raise InputError(f"pieces of {most_samples / SAMPLE_RATE:g} s: expected at least {SHORTEST:g} s")
    if any(not 0 <= seconds <= 1 for seconds in edge_seconds):
        raise InputError(f"{edge_seconds} s of silence at the edges of pieces: expected 0 to 1 s each")
    most = most_samples // FRAME
    before, behind = (round(seconds * SAMPLE_RATE / FRAME) for seconds in edge_seconds)
    window = _Window(iter(blocks))
    floor = _Floor()
    while window.fill(most + 1):
        seen, last = min(window.frames, most), window.ended and window.frames <= most
        loudness = window.loudness(seen)
        threshold = floor.threshold(loudness)
        sounds = np.flatnonzero(loudness > threshold)
        if not len(sounds):
            window.drop(seen if last else seen - min(before, seen - 1), floor)
            continue
        if sounds[0] > before:  # then more fits behind it
            window.drop(int(sounds[0]) - before, floor)
            continue
        end, follows = _end(loudness, sounds, most, behind, last)
        yield window.stretch(end)
        window.drop(follows, floor)


def _end(loudness: np.ndarray, sounds: np.ndarray, most: int, behind: int, last: bool) -> tuple[int, int]:
    """(frames of the stretch that begins here, frames until the next one may begin).

    Args:
        loudness: dB [up to `most` frames].
        sounds: the numbers of those that are not silent.
        most: frames of the longest stretch.
        behind: frames of silence that stay at its end.
        last: whether the clip ends with these frames.
    """
    gaps = np.flatnonzero(np.diff(sounds) > LONG_PAUSE)
    final = int(sounds[gaps[0] if len(gaps) else -1]) + 1
    if len(gaps) or len(loudness) - final >= LONG_PAUSE:
        return (min(final + behind, len(loudness)),) * 2
    if last:
        return min(final + behind, len(loudness)), len(loudness)
    cut = _cut(loudness, most)
    heard = int(sounds[sounds < cut][-1]) + 1 if len(sounds) and sounds[0] < cut else cut
    return min(cut, heard + behind), cut


def _cut(loudness: np.ndarray, most: int) -> int:
    """The frame before which to cut: 1 to `most`."""
    floor, loud = np.percentile(loudness, (FLOOR_PART, LOUD_PART))
    quiet = loudness <= floor + _margin(floor, loud)
    for part in LAST_PARTS:
        first = max(1, round(most * part))
        begins, ends = _runs(quiet[first:])
        lengths = ends - begins
        if len(lengths) and lengths.max() >= SHORTEST_PAUSE:
            means = [loudness[first + a : first + b].mean() for a, b in zip(begins, ends, strict=True)]
            best = max(range(len(lengths)), key=lambda i: (lengths[i], -means[i], i))
            return first + int(begins[best] + ends[best]) // 2
    first = max(1, round(most * LAST_PARTS[0]))
    return first + int(np.argmin(loudness[first:]))


def _runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where runs of true begin, where they end) of bool [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return edges[::2], edges[1::2]


def _margin(floor: float, loud: float) -> float:
    return max(LEAST_MARGIN, MARGIN_PART * (loud - floor))


@dataclass
class _Floor:
    """The loudness of the room, as far as it has been heard."""

    level: float | None = None
    frames: int = 0
    """That went by since the level was set."""

    def threshold(self, loudness: np.ndarray) -> float:
        """What is not louder than this among frames, dB [n], is silent."""
        here, loud = np.percentile(loudness, (FLOOR_PART, LOUD_PART))
        before = FIRST_FLOOR if self.level is None else self.level + RISE * self.frames * FRAME / SAMPLE_RATE
        self.level, self.frames = max(LEAST_FLOOR, float(min(here, before))), 0
        return self.level + _margin(self.level, float(loud))


@dataclass
class _Window:
    """The samples from where the next stretch may begin, as far as they have been read."""

    blocks: Iterator[np.ndarray]
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    start: int = 0
    """The first one's number in the clip."""
    ended: bool = False
    _levels: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Mean squares of frames; the last frame may be a part of one, where the clip has ended."""

    @property
    def frames(self) -> int:
        return len(self._levels)

    def fill(self, frames: int) -> bool:
        """Reads on until there are so many frames, or the clip ends; false where nothing is left."""
        while self.frames < frames and not self.ended:
            block = next(self.blocks, None)
            self.ended = block is None
            if block is not None:
                self.samples = np.concatenate([self.samples, block])
            done = self.frames * FRAME
            whole = len(self.samples) if self.ended else len(self.samples) // FRAME * FRAME
            self._levels = np.concatenate([self._levels, _mean_squares(self.samples[done:whole])])
        return self.frames > 0

    def loudness(self, frames: int) -> np.ndarray:
        """dB [frames] of the first frames."""
        reach = SMOOTH // 2
        levels = self._levels[: frames + reach]
        padded = np.concatenate([levels[:1].repeat(reach), levels, levels[-1:].repeat(reach)])
        smooth = np.convolve(padded, np.full(SMOOTH, 1 / SMOOTH), "valid")[:frames]
        return 10 * np.log10(np.maximum(smooth, 10 ** (QUIETEST / 10)))

    def stretch(self, frames: int) -> Stretch:
        """The first frames' samples."""
        return Stretch(self.start, self.samples[: frames * FRAME].copy())

    def drop(self, frames: int, floor: _Floor) -> None:
        """Goes on behind so many frames."""
        floor.frames += frames
        taken = min(frames * FRAME, len(self.samples))
        self.samples, self._levels = self.samples[taken:], self._levels[frames:]
        self.start += taken


def _mean_squares(samples: np.ndarray) -> np.ndarray:
    """float64 [frames] of float32 [samples], about each frame's mean; the last frame may be short."""
    whole = len(samples) // FRAME * FRAME
    found = samples[:whole].reshape(-1, FRAME).astype(np.float64).var(axis=1)
    return found if whole == len(samples) else np.append(found, samples[whole:].astype(np.float64).var())
