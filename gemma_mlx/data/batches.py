"""Samples -> batches: order, padding, reading ahead, and the cursor that a resumed run goes on from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.data.features import Patches
from gemma_mlx.data.features_gemma3n import Clip, Picture, stack_clips
from gemma_mlx.data.order import Plan, Rows, Shuffled
from gemma_mlx.data.packing import Packed, joined
from gemma_mlx.data.template import AUDIO, IMAGE, TEXT, VIDEO, Sample
from gemma_mlx.errors import InputError


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
    """What batches are made of: a `Dataset`, or a list of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Batches:
    """An endless (or `epochs` long) iterator of batches in an order that depends on (seed, epoch), or on a plan, alone.

    Worker threads make the next batches while the current one is in use; what they do can be seen only in time: batches
    come in order, and an error in one of them is raised where that batch would have come. The last batch of an epoch
    may be smaller. `state` names the batch after the last one handed out, whatever has been read ahead.

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
        plan: which samples make up the batches, made with the same batch size and seed, in place of the order of
            (seed, epoch) or of the file.
        finish: called on each batch by the worker that made it; what it returns is handed out in the batch's place.
        state: where to go on, as `state` gave it.

    Raises:
        InputError: no rows, a batch size below 1, or a state of other data.
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
        plan: Plan | None = None,
        finish: Callable[[Batch], Any] | None = None,
        state: dict[str, int] | None = None,
    ):
        if not len(samples):
            raise InputError("the data has no rows; expected at least one")
        if batch_size < 1 or pad_to_multiple < 1:
            raise InputError(f"batch_size {batch_size}, pad_to_multiple {pad_to_multiple}: expected at least 1")
        self.samples, self.batch_size, self.pad_id = samples, batch_size, pad_id
        self.seed, self.epochs, self.finish = seed, epochs, finish
        self.plan = plan or Shuffled(len(samples), batch_size, seed, shuffle)
        self.pad_to_multiple, self.workers, self.prefetch = pad_to_multiple, workers, max(1, prefetch)
        self._epoch = self._position = 0
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[Rows, Future[Any]]] = deque()
        self._planned: Iterator[Rows] | None = None
        if state is not None:
            self.seek(state)

    def __len__(self) -> int:
        """Batches in the first epoch; in all of them unless rows are packed."""
        return int(self.plan.count(1))

    def state(self) -> dict[str, int]:
        """Where the next batch starts (samples of the epoch before it), and what it depends on: a few integers."""
        return {"epoch": self._epoch, "position": self._position, **self._data()}

    def _data(self) -> dict[str, int]:
        return {"rows": len(self.samples), "seed": self.seed, **self.plan.state()}

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
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        self.start()
        try:
            rows, batch = self._next_ahead() if self.workers else self._next_now()
        except BaseException:
            self.close()
            raise
        self._position += sum(map(len, rows))
        if self._position >= len(self.samples):
            self._epoch, self._position = self._epoch + 1, 0
        return batch

    def start(self) -> None:
        """Begins to read ahead, before the first batch is asked for."""
        if self._planned is None:
            self._planned = self._plan(self._epoch, self._position)
        if self.workers:
            self._read_ahead()

    def _plan(self, epoch: int, position: int) -> Iterator[Rows]:
        """Rows of each batch from there on."""
        while self.epochs is None or epoch < self.epochs:
            yield from self.plan.batches(epoch, position)
            epoch, position = epoch + 1, 0

    def _make(self, rows: Rows) -> Any:
        if isinstance(self.plan, Packed):
            samples = [joined([self.samples[i] for i in row]) for row in rows]
        else:
            samples = [self.samples[i] for (i,) in rows]
        batch = collate(samples, self.pad_id, self.pad_to_multiple)
        return batch if self.finish is None else self.finish(batch)

    def _next_now(self) -> tuple[Rows, Any]:
        rows = next(self._planned)
        return rows, self._make(rows)

    def _read_ahead(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="batches")
        while len(self._ahead) <= self.prefetch and (rows := next(self._planned, None)) is not None:
            self._ahead.append((rows, self._pool.submit(self._make, rows)))

    def _next_ahead(self) -> tuple[Rows, Any]:
        if not self._ahead:
            raise StopIteration
        rows, batch = self._ahead.popleft()
        return rows, batch.result()

    def close(self) -> None:
        """Stops the workers and forgets what was read ahead; the next batch starts them again from `state`."""
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._planned = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
