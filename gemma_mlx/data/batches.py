"""Samples -> batches: order, padding, reading ahead, and the cursor that a resumed run goes on from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.data.budget import Budget
from gemma_mlx.data.features import Patches
from gemma_mlx.data.features_gemma3n import Clip, Picture, stack_clips
from gemma_mlx.data.order import Plan, Rows, Shuffled
from gemma_mlx.data.packing import Packed, joined
from gemma_mlx.data.template import AUDIO, IMAGE, TEXT, VIDEO, Sample
from gemma_mlx.errors import InputError, SourceError

MAX_BYTES = 1 << 30
"""Of batches made ahead."""
MAX_BAD_ROWS = 0.05
"""The part of the rows that may be bad where bad rows are skipped."""
FEWEST_LOOKED_AT = 200
"""Fewer rows than these do not say how many are bad."""
LOOKED_AHEAD = 16
"""Batches between the one that is made and the one whose media are fetched from far away."""

Place = dict[str, int]
"""Epoch, and position within it."""


Bad = tuple[int, str, bool]


class KnownBadRow(InputError):
    """A bad row that was counted when all rows were looked at."""


def collate(samples: Sequence[Sample], pad_id: int, pad_to_multiple: int = 1) -> Batch:
    """One batch of right-padded rows, media in reading order.

    Args:
        samples: at least one.
        pad_id: the id in padding positions.
        pad_to_multiple: tokens of a row are padded to a multiple of this, and so are the soft tokens of pictures (in
            patches) and clips (in frames), so that few shapes arise.

    Raises:
        InputError: a row whose media slots are not those of its pictures and clips.
    """
    if not samples:
        raise InputError("a batch needs at least one sample")
    for sample in samples:
        _check_slots(sample)
    rows, tokens = len(samples), _round_up(max(map(len, samples)), pad_to_multiple)
    input_ids = np.full((rows, tokens), pad_id, np.int32)
    attention_mask = np.zeros((rows, tokens), np.int32)
    types = np.full((rows, tokens), TEXT, np.int32)
    labels = np.full((rows, tokens), IGNORE_INDEX, np.int32)
    for i, sample in enumerate(samples):
        n = len(sample)
        input_ids[i, :n], attention_mask[i, :n] = sample.input_ids, 1
        types[i, :n], labels[i, :n] = sample.token_types, sample.labels
    pixel_values, positions = _stack_images([image for s in samples for image in s.images], pad_to_multiple)
    videos = [video for sample in samples for video in sample.videos]
    films, film_positions = _stack_images([frame for video in videos for frame in video], pad_to_multiple)
    features, mask = _stack_clips(samples, pad_to_multiple)
    row_ids = tuple(sample.row_id or sample.where for sample in samples)
    return Batch(
        input_ids, attention_mask, types, labels, pixel_values, positions, features, mask, films, film_positions,
        np.array([len(video) for video in videos], np.int32) if videos else None, row_ids,
        _segments(samples, tokens), _digests(samples),
    )  # fmt: skip


def _segments(samples: Sequence[Sample], tokens: int) -> np.ndarray | None:
    """Segment ids of packed rows, 0 in padding."""
    if samples[0].segment_ids is None:
        return None
    return np.stack([np.pad(sample.segment_ids, (0, tokens - len(sample))) for sample in samples])


def _digests(samples: Sequence[Sample]) -> dict[str, tuple[bytes, ...]]:
    """Of pictures and frames."""
    images = tuple(image.digest() for sample in samples for image in sample.images)
    frames = tuple(frame.digest() for sample in samples for video in sample.videos for frame in video)
    return {"image": images, "video": frames}


def clip_tokens(clip: np.ndarray | Clip, frames_per_token: int) -> int:
    """Soft tokens of a clip."""
    return clip.soft_tokens if isinstance(clip, Clip) else -(-len(clip) // frames_per_token)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _check_slots(sample: Sample) -> None:
    for kind, name, wanted in (
        (IMAGE, "image", sum(image.soft_tokens for image in sample.images)),
        (VIDEO, "video", sum(frame.soft_tokens for video in sample.videos for frame in video)),
        (AUDIO, "audio", sum(clip_tokens(clip, sample.frames_per_token) for clip in sample.clips)),
    ):
        found = int((sample.token_types == kind).sum())
        if found != wanted:
            raise InputError(
                f"{sample.where}: {found} {name} slots in the tokens, {wanted} {name} soft tokens in the features; "
                "make the sample with its features, by one processor"
            )


def _stack_images(images: Sequence[Patches], multiple: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    if not images:
        return None, None
    if isinstance(images[0], Picture):
        return np.stack([image.pixels for image in images]), None
    cell = len(images[0].pixels) // images[0].soft_tokens  # patches in one soft token
    patches = _round_up(max(len(image.pixels) for image in images), cell * multiple)
    values = np.zeros((len(images), patches, images[0].pixels.shape[1]), np.uint8)
    positions = np.full((len(images), patches, 2), -1, np.int32)
    for i, image in enumerate(images):
        n = len(image.pixels)
        values[i, :n], positions[i, :n] = image.pixels, image.positions
    return values, positions


def _stack_clips(samples: Sequence[Sample], multiple: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    clips = [clip for sample in samples for clip in sample.clips]
    if not clips:
        return None, None
    if isinstance(clips[0], Clip):
        return stack_clips(clips, 16 * multiple if multiple > 1 else 1)
    longest = max(map(len, clips))
    frames = longest if multiple == 1 else _round_up(longest, samples[0].frames_per_token * multiple)
    features = np.zeros((len(clips), frames, clips[0].shape[1]), np.float32)
    mask = np.zeros((len(clips), frames), bool)
    for i, clip in enumerate(clips):
        features[i, : len(clip)], mask[i, : len(clip)] = clip, True
    return features, mask


class Samples(Protocol):
    """What batches are made of: a `Dataset`, or a list of samples. What has a method ``prefetch`` is told which samples
    will be asked for, `LOOKED_AHEAD` batches before."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A batch as a worker hands it over: as `finish` left it, None where no row was left; the names of its rows; the
    bad ones (sample, reason, whether that was known before); samples looked at; bytes of its arrays."""

    batch: Any
    row_ids: tuple[str, ...]
    bad: tuple[Bad, ...]
    looked_at: int
    nbytes: int


class Batches:
    """An endless (or `epochs` long) iterator of batches in an order that depends on (seed, epoch), or on a plan, alone.

    Worker threads make the next batches while the current one is in use; what they do can be seen only in time: batches
    come in order, and an error in one of them is raised where that batch would have come. The last batch of an epoch
    may be smaller. `state` names the batch after the last one handed out, whatever has been read ahead.

    Attributes:
        row_ids: of the batch handed out last.
        bad: sample -> reason, of the rows that were skipped so far.

    Args:
        samples: the rows.
        batch_size: rows a batch.
        pad_id: the id in padding positions.
        seed: orders the rows.
        shuffle: false for the order of the file.
        epochs: passes over the rows; None for no end.
        pad_to_multiple: see `collate`.
        workers: threads that read ahead; 0 reads when asked.
        prefetch: batches made ahead.
        max_bytes: of the batches made ahead; see `gemma_mlx.data.budget.Budget`.
        plan: which samples make up the batches, made with the same batch size and seed, in place of the order of
            (seed, epoch) or of the file.
        finish: called on each batch by the worker that made it; what it returns is handed out in the batch's place.
        on_bad_row: "stop", or "skip" to leave bad rows out of their batches; the others stay where they are.
        max_bad_rows: the part of an epoch's rows that may be skipped; more of them stop the iterator.
        share: (k, n): of the rows of every batch only each n-th from the k-th on, for the k-th of n processes. All have
            the same `state`, but that each counts its own bad rows; a process without a row in a batch gets None in its
            place.
        state: where to go on, as `state` gave it.

    Raises:
        InputError: no rows, a batch size below 1, or a state of other data; while iterating, a bad row or too many.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        pad_id: int = 0,
        *,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        pad_to_multiple: int = 1,
        workers: int = 2,
        prefetch: int = 4,
        max_bytes: int = MAX_BYTES,
        plan: Plan | None = None,
        finish: Callable[[Batch], Any] | None = None,
        on_bad_row: str = "stop",
        max_bad_rows: float = MAX_BAD_ROWS,
        share: tuple[int, int] = (0, 1),
        state: dict[str, int] | None = None,
    ):
        if batch_size < 1 or pad_to_multiple < 1:
            raise InputError(f"batch_size {batch_size}, pad_to_multiple {pad_to_multiple}: expected at least 1")
        self.samples, self.batch_size, self.pad_id = samples, batch_size, pad_id
        self.seed, self.epochs, self.finish = seed, epochs, finish
        self.plan = plan or Shuffled(len(samples), batch_size, seed, shuffle)
        if self.plan.walk.n == 0:
            raise InputError("the data has no rows; expected at least one")
        self.pad_to_multiple, self.workers = pad_to_multiple, workers
        self.prefetch, self.max_bytes = prefetch, max_bytes
        self.on_bad_row, self.max_bad_rows, self.share = on_bad_row, max_bad_rows, share
        self.row_ids: tuple[str, ...] = ()
        self.bad: dict[int, str] = {}
        self._place = {"epoch": 0, "position": 0}
        self._looked_at = self._skipped = 0
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[Place, Future[Made]]] = deque()
        self._planned: Planned | None = None
        if state is not None:
            self.seek(state)

    def __len__(self) -> int:
        """Batches in the first epoch; in all of them unless rows are packed."""
        return int(self.plan.count(1))

    def state(self) -> dict[str, int]:
        """Where the next batch starts (samples of the epoch before it), and what it depends on: a few integers."""
        skipping = {"looked_at": self._looked_at, "bad": self._skipped} if self.on_bad_row == "skip" else {}
        return {**self._place, **skipping, **self._data()}

    def _data(self) -> dict[str, int]:
        rows = {} if self.plan.walk.n is None else {"rows": self.plan.walk.n}
        return {**rows, "seed": self.seed, **self.plan.state()}

    def seek(self, state: dict[str, int]) -> None:
        """Go on from a `state` of the same rows and seed.

        Raises:
            InputError: the number of rows, the seed, or lengths that the plan depends on differ.
        """
        for name, own in self._data().items():
            if state.get(name, own) != own:
                raise InputError(
                    f"cannot resume: the saved run had {name} {state[name]}, this one has {own}; use the same"
                )
        self.close()
        self._place = {"epoch": int(state["epoch"]), "position": int(state["position"])}
        self._looked_at, self._skipped = int(state.get("looked_at", 0)), int(state.get("bad", 0))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        while True:
            self.start()
            try:
                place, made = self._next_ahead() if self.workers else self._next_now()
                self._count(made, place["epoch"] != self._place["epoch"])
            except BaseException:
                self.close()
                raise
            self._place, self.row_ids = place, made.row_ids
            if made.batch is not None or self.share[1] > 1:
                return made.batch

    def _count(self, made: Made, last: bool) -> None:
        """Keeps account of an epoch's bad rows, and stops where they are too many.

        Each epoch meets the same ones again, so it is counted by itself; and those that were known before were counted
        when all rows were looked at.
        """
        new = [reason for _, reason, known in made.bad if not known]
        looked_at, skipped = (self._looked_at, self._skipped) if self._place["position"] else (0, 0)
        looked_at, skipped = looked_at + made.looked_at, skipped + len(new)
        if new and skipped > self.max_bad_rows * max(looked_at, FEWEST_LOOKED_AT):
            raise InputError(
                f"{skipped} of the first {looked_at} rows are bad, more than {self.max_bad_rows:.0%} "
                f"(--max-bad-rows); the last one: {new[-1]}"
            )
        if last and new and skipped == looked_at and self.share[1] == 1:
            raise InputError(f"all {looked_at} rows are bad; the last one: {new[-1]}")
        self._looked_at, self._skipped = looked_at, skipped
        self.bad.update({sample: reason for sample, reason, _ in made.bad})

    def start(self) -> None:
        """Begins to read ahead, before the first batch is asked for."""
        if self._planned is None:
            self._planned = Planned(self.plan, self._place, self.epochs, getattr(self.samples, "prefetch", None))
        if self.workers:
            self._read_ahead()

    def _make(self, rows: Rows) -> Made:
        found: list[list[Sample]] = []
        bad: list[Bad] = []
        rows = rows[self.share[0] :: self.share[1]]
        for row in rows:
            good = [sample for i in row if (sample := self._sample(i, bad)) is not None]
            if good:
                found.append(good)
        looked_at = sum(map(len, rows))
        if not found:
            return Made(None, (), tuple(bad), looked_at, 0)
        packed = isinstance(self.plan, Packed)
        batch = collate([joined(row) if packed else row[0] for row in found], self.pad_id, self.pad_to_multiple)
        finished = batch if self.finish is None else self.finish(batch)
        return Made(finished, batch.row_ids, tuple(bad), looked_at, batch.nbytes)

    def _sample(self, index: int, bad: list[Bad]) -> Sample | None:
        try:
            return self.samples[index]
        except SourceError:
            raise
        except InputError as error:
            if self.on_bad_row != "skip":
                raise
            bad.append((index, str(error), isinstance(error, KnownBadRow)))
            return None

    def _next_now(self) -> tuple[Place, Made]:
        rows, place = next(self._planned)
        return place, self._make(rows)

    def _read_ahead(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="batches")
            self._budget, self._number = Budget(self.max_bytes), 0
        while len(self._ahead) <= self.prefetch:
            try:
                rows, place = next(self._planned)
            except StopIteration:
                return
            except Exception as error:  # told where the batch would have come
                self._ahead.append((self._place, Future()))
                self._ahead[-1][1].set_exception(error)
                return
            self._ahead.append((place, self._pool.submit(self._make_within, self._budget, self._number, rows)))
            self._number += 1

    def _make_within(self, budget: Budget, number: int, rows: Rows) -> Made:
        """As `_make`, when there is room."""
        budget.begin(number)
        made = None
        try:
            made = self._make(rows)
        finally:
            budget.end(made.nbytes if made else 0)
        return made

    def _next_ahead(self) -> tuple[Place, Made]:
        if not self._ahead:
            raise StopIteration
        place, batch = self._ahead.popleft()
        made = batch.result()
        self._budget.take(made.nbytes)
        return place, made

    def close(self) -> None:
        """Stops the workers and forgets what was read ahead; the next batch starts them again from `state`."""
        self._ahead.clear()
        self._planned = None
        if self._pool is not None:
            self._budget.close()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Planned:
    """The batches of a plan from a place on, each with the place after it. What the plan raises comes behind the
    batches before it.

    Args:
        plan: gives the batches of each epoch.
        place: where to begin.
        epochs: passes over the rows; None for no end.
        prefetch: told of each sample when its batch is looked at, `LOOKED_AHEAD` batches before it comes.
    """

    def __init__(self, plan: Plan, place: Place, epochs: int | None, prefetch: Callable[[int], None] | None):
        self._batches, self._prefetch = self._from(plan, place["epoch"], place["position"], epochs), prefetch
        self._seen: deque[tuple[Rows, Place]] = deque()
        self._ended: Exception | None = None

    def __iter__(self) -> Planned:
        return self

    def __next__(self) -> tuple[Rows, Place]:
        ahead = 0 if self._prefetch is None else LOOKED_AHEAD
        while self._ended is None and len(self._seen) <= ahead:
            try:
                self._seen.append(next(self._batches))
            except Exception as ended:  # StopIteration among them
                self._ended = ended
            else:
                self._fetch(self._seen[-1][0])
        if not self._seen:
            raise self._ended
        return self._seen.popleft()

    def _fetch(self, rows: Rows) -> None:
        if self._prefetch is not None:
            for row in rows:
                for sample in row:
                    self._prefetch(sample)

    @staticmethod
    def _from(plan: Plan, epoch: int, position: int, epochs: int | None) -> Iterator[tuple[Rows, Place]]:
        while epochs is None or epoch < epochs:
            batches = plan.batches(epoch, position)
            batch = next(batches, None)
            if batch is None and not position:
                raise InputError("the data has no rows; expected at least one")
            while batch is not None:
                failed = None
                try:
                    after = next(batches, None)
                except Exception as error:
                    after, failed = batch, error
                position += sum(map(len, batch))
                last = after is None
                yield batch, {"epoch": epoch + last, "position": 0 if last else position}
                if failed is not None:
                    raise failed
                batch = after
            epoch, position = epoch + 1, 0
