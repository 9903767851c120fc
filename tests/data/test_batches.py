"""Padding and checks of a batch; order, resumption, reading ahead and errors of a stream of batches."""

import threading
import time
from dataclasses import fields, replace

import numpy as np
import pytest
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.batches import LOOKED_AHEAD, Batches, collate
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.media import load_audio
from gemma_mlx.data.order import Shuffled
from gemma_mlx.data.packing import Packed
from gemma_mlx.data.permutation import Order
from gemma_mlx.data.template import Sample
from gemma_mlx.data.walks import Shuffle, Stream
from gemma_mlx.errors import InputError, SourceError

MIXED = (
    "id,image_path,audio_path,question,answer,text\n"
    "a,tall.png,,What?,this,\n"
    "b,,short.wav,,,hello\n"
    "c,,,Why?,because the dog,\n"
    "d,wide.png,long.wav,Say?,the fox,\n"
    "e,,,,,once upon a time\n"
)


def row(i, length=None):
    ids = np.full(length or 1 + i % 7, i, np.int32)
    return Sample(ids, ids.copy(), np.zeros_like(ids), row_id=str(i))


def rows_of(batches):
    return [tuple(int(i) for i in batch.row_ids) for batch in batches]


def take(batches, n):
    return [next(batches) for _ in range(n)]


def equal(a, b):
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if not (x is y or (np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype)):
            return False
    return True


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_collate(table, processor, multiple):
    dataset = Dataset(table(MIXED), processor)
    samples = list(dataset)
    batch = collate(samples, pad_id=9, pad_to_multiple=multiple)
    longest = max(map(len, samples))
    assert batch.input_ids.shape[1] == -(-longest // multiple) * multiple
    for i, sample in enumerate(samples):
        n = len(sample)
        assert np.array_equal(batch.input_ids[i, :n], sample.input_ids) and (batch.input_ids[i, n:] == 9).all()
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert np.array_equal(batch.labels[i, :n], sample.labels) and (batch.labels[i, n:] == IGNORE_INDEX).all()
        assert np.array_equal(batch.mm_token_type_ids[i, :n], sample.token_types)
        assert not batch.mm_token_type_ids[i, n:].any()
    assert batch.row_ids == ("a", "b", "c", "d", "e")
    assert batch.label_count == sum(sample.label_count for sample in samples)
    given = [f.name for f in fields(batch) if f.name in batch.inputs() or f.name == "labels"]
    kinds = {name: getattr(batch, name).dtype for name in given}
    assert kinds == {
        **dict.fromkeys(("input_ids", "attention_mask", "mm_token_type_ids", "labels", "image_position_ids"), np.int32),
        **{"pixel_values": np.uint8, "input_features": np.float32, "input_features_mask": np.bool_},
    }
    images = [image for sample in samples for image in sample.images]
    assert batch.pixel_values.shape[0] == 2 and batch.pixel_values.shape[1] % (9 * multiple) == 0
    for values, positions, image in zip(batch.pixel_values, batch.image_position_ids, images, strict=True):
        n = len(image.pixels)
        assert np.array_equal(values[:n], image.pixels) and not values[n:].any()
        assert np.array_equal(positions[:n], image.positions) and (positions[n:] == -1).all()
    floats = batch.inputs()["pixel_values"]
    expected = batch.pixel_values.astype(np.float32) * np.float32(1 / 255)
    assert floats.dtype == np.float32 and np.array_equal(floats, expected)


def test_clips_of_a_batch_equal_the_reference(table, processor, media):
    """The shorter first: features and mask of transformers, up to the padding that only batching adds."""
    batch = collate(list(Dataset(table(MIXED), processor)), pad_id=0)
    out = Gemma4AudioFeatureExtractor()([load_audio(media / name) for name in ("short.wav", "long.wav")])
    frames = batch.input_features.shape[1]
    for i in range(2):
        mask = out["input_features_mask"][i]
        assert not mask[frames:].any() and np.array_equal(batch.input_features_mask[i], mask[:frames])
        assert np.abs(batch.input_features[i] - out["input_features"][i][:frames]).max() <= 1e-5


def test_text_alone_has_no_media(processor, table):
    batch = collate([Dataset(table(MIXED), processor)[2]], pad_id=0)
    assert set(batch.inputs()) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_collate_checks_slots_against_features(table, processor):
    dataset = Dataset(table(MIXED), processor)
    for sample in (
        replace(dataset[0], images=()),
        replace(dataset[1], clips=()),
        replace(dataset[2], clips=dataset[1].clips),
    ):
        with pytest.raises(InputError, match=r"train.csv:\d: \d+ (image|audio) slots in the tokens, \d+"):
            collate([sample], pad_id=0)
    with pytest.raises(InputError, match="at least one"):
        collate([], pad_id=0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 255, 1000])
def test_order_is_a_permutation_by_seed_and_epoch(n):
    orders = [[Order(n, seed, epoch)[i] for i in range(n)] for seed in (0, 1, -5, 2**63 + 9) for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 16:
        assert len({tuple(order) for order in orders}) == len(orders)
        assert all(order != list(range(n)) for order in orders)
    with pytest.raises(IndexError):
        Order(n, 0, 0)[n]


def test_order_looks_random():
    """Every row comes at every tenth of the epoch about equally often; neighbours are parted."""
    n, epochs = 50, 400
    where = np.zeros((n, 10))
    together = 0
    for epoch in range(epochs):
        order = np.array([Order(n, 11, epoch)[i] for i in range(n)])
        where[order, np.arange(n) * 10 // n] += 1
        together += (np.abs(np.diff(order)) == 1).sum()
    chi = ((where - epochs / 10) ** 2 / (epochs / 10)).sum()
    assert abs(chi - n * 9) < 5 * np.sqrt(2 * n * 9)  # chi-square of n·9 degrees of freedom, 5 sigma
    expected = epochs * 2 * (n - 1) / n
    assert abs(together - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_row_once_an_epoch(workers):
    data = [row(i) for i in range(11)]
    with Batches(data, 4, seed=3, epochs=3, workers=workers) as batches:
        found = rows_of(batches)
    assert [len(b) for b in found] == [4, 4, 3] * 3 and len(batches) == 3
    epochs = [sum(found[i : i + 3], ()) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(11)) for e in epochs) and len(set(epochs)) == 3
    assert rows_of(Batches(data, 4, shuffle=False, epochs=1, workers=workers)) == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
        (8, 9, 10),
    ]


def test_order_does_not_depend_on_the_workers():
    class Slow(list):
        def __getitem__(self, i):
            time.sleep(0.002 * (i % 3))
            return row(i)

    data = Slow(range(20))
    runs = [rows_of(take(Batches(data, 3, seed=1, workers=w, prefetch=p), 12)) for w, p in ((0, 1), (1, 1), (4, 6))]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
def test_resumes_exactly(table, processor, workers, stop):
    dataset = Dataset(table(MIXED), processor)
    whole = take(Batches(dataset, 2, seed=5, workers=workers), 12)
    first = Batches(dataset, 2, seed=5, workers=workers)
    take(first, stop)
    state = first.state()
    first.close()
    second = take(Batches(dataset, 2, seed=5, workers=workers, state=state), 12 - stop)
    assert all(equal(a, b) for a, b in zip(whole[stop:], second, strict=True))
    assert set(state) == {"epoch", "position", "rows", "seed"} and state["epoch"] == stop // 3
    # The stream itself goes on after a close, without loss.
    assert all(equal(a, b) for a, b in zip(whole[stop:], take(first, 12 - stop), strict=True))


def test_refuses_a_state_of_other_data():
    data = [row(i) for i in range(5)]
    state = Batches(data, 2, seed=1).state()
    with pytest.raises(InputError, match="rows 5, this one has 4"):
        Batches(data[:4], 2, seed=1, state=state)
    with pytest.raises(InputError, match="seed 1, this one has 2"):
        Batches(data, 2, seed=2, state=state)
    with pytest.raises(InputError, match="no rows"):
        Batches([], 2)
    with pytest.raises(InputError, match="batch_size 0"):
        Batches(data, 0)


class Counting:
    """Ten rows; remembers who read them; one of them may be bad."""

    def __init__(self, bad=None):
        self.read, self.threads, self.bad = [], set(), bad

    def __len__(self):
        return 10

    def __getitem__(self, i):
        self.read.append(i)
        self.threads.add(threading.current_thread().name)
        if i == self.bad:
            raise InputError(f"train.csv:{i + 2}: bad row")
        return row(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_in_their_place(workers):
    before = threading.enumerate()
    batches = Batches(Counting(bad=5), 2, shuffle=False, workers=workers, prefetch=5)
    assert rows_of(take(batches, 2)) == [(0, 1), (2, 3)]
    with pytest.raises(InputError, match=r"train.csv:7: bad row"):
        next(batches)
    assert batches.state()["position"] == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("batches") and t not in before]


def test_reads_ahead_but_no_further_than_asked():
    before, data = threading.enumerate(), Counting()
    with Batches(data, 1, shuffle=False, workers=2, prefetch=3) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(data.read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(data.read) == [0, 1, 2, 3]
    assert all(name.startswith("batches") for name in data.threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches") and t not in before]


def test_dataset_keeps_samples_within_its_limit(table, processor, monkeypatch):
    read = []
    make = processor.sample
    monkeypatch.setattr(processor, "sample", lambda example: read.append(example.row_id) or make(example))
    path = table(MIXED)
    dataset = Dataset(path, processor)
    first, second = list(dataset), list(dataset)
    assert read == list("abcde") and all(a is b for a, b in zip(first, second, strict=True))
    read.clear()
    none = Dataset(path, processor, cache_bytes=0)
    assert none[2] is not none[2] and read == ["c", "c"]


def test_dataset_drops_the_longest_unused(table, processor, monkeypatch):
    path = table("id,prompt,response\n" + "".join(f"{i},hi,ho\n" for i in range(4)))
    size = Dataset(path, processor)[0].nbytes
    dataset, read, make = Dataset(path, processor, cache_bytes=2 * size), [], processor.sample
    monkeypatch.setattr(processor, "sample", lambda example: read.append(example.row_id) or make(example))
    for i in (0, 1, 0, 2, 0, 1, 3, 1):
        dataset[i]
    assert read == ["0", "1", "2", "1", "3"]
    assert dataset._cached == sum(s.nbytes for s in dataset._cache.values()) == 2 * size


def test_bad_media_name_their_line(table, processor, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
    path = table("audio_path,text\nshort.wav,hello\nbroken.wav,hello\n")
    batches = Batches(Dataset(path, processor), 1, shuffle=False)
    next(batches)
    with pytest.raises(InputError, match=r"train.csv:3: .*broken.wav: unreadable audio"):
        next(batches)


class Failing:
    """A plan of which one batch cannot be made out, for a while."""

    def __init__(self, at):
        self.walk, self.at = Shuffle(12, shuffle=False), at

    def batches(self, epoch, start=0):
        for first in range(start, 12, 2):
            if first == self.at:
                raise SourceError("shard 3: its server fails")
            yield [[first], [first + 1]]

    def state(self):
        return {}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 2, 8])
def test_errors_of_the_plan_come_in_their_place(workers, ahead, at):
    """Not before the batches that are there, and not as the end of the data."""

    class Data(list):
        if ahead:
            prefetch = lambda self, index: asked.append(index)  # noqa: E731

    asked, plan = [], Failing(at)
    batches = Batches(Data(row(i) for i in range(12)), 2, plan=plan, workers=workers)
    batches.start()
    assert rows_of(take(batches, at // 2)) == [(i, i + 1) for i in range(0, at, 2)]
    for _ in range(2):
        with pytest.raises(SourceError, match="shard 3"):
            next(batches)
        assert batches.state()["position"] == at and batches._pool is None
    plan.at = None
    assert rows_of(take(batches, 6 - at // 2)) == [(i, i + 1) for i in range(at, 12, 2)]
    assert batches.state()["epoch"] == 1 and bool(asked) == ahead
    batches.close()


def test_a_state_without_what_was_not_known_then():
    """Lengths may have been counted since: they are not compared with nothing."""
    data = [row(i) for i in range(6)]
    batches = Batches(data, 2, seed=1, workers=0, state={"epoch": 1, "position": 4, "seed": 1})
    assert rows_of(take(batches, 1)) == rows_of(take(Batches(data, 2, seed=1, workers=0), 6))[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_any_row(workers):
    """Known when they have been read; then it ends, and with a reason."""
    plan = Shuffled(Stream(3, lambda shard: 0), 2)
    with pytest.raises(InputError, match="the data has no rows"):
        next(Batches([], 2, plan=plan, epochs=1, workers=workers))


def test_media_are_asked_for_some_batches_ahead():
    class Far(list):
        def prefetch(self, index):
            asked.append(index)

    asked = []
    batches = Batches(Far(row(i) for i in range(100)), 2, shuffle=False, epochs=1, workers=0)
    next(batches)
    assert asked == list(range(2 * (LOOKED_AHEAD + 1))) and LOOKED_AHEAD == 16
    assert len(list(batches)) == 49 and asked == list(range(100))


class Torn(list):
    """Rows of which some are bad."""

    def __init__(self, n, bad):
        super().__init__(row(i) for i in range(n))
        self.torn = bad

    def __getitem__(self, i):
        if i in self.torn:
            raise InputError(f"train.csv:{i + 2}: bad row")
        return super().__getitem__(i)


def test_a_share_may_have_no_good_row():
    options = {"shuffle": False, "epochs": 2, "on_bad_row": "skip", "max_bad_rows": 1.0}
    first, second = (list(Batches(Torn(4, {1, 3}), 2, share=(k, 2), **options)) for k in (0, 1))
    assert rows_of(first) == [(0,), (2,)] * 2 and second == [None] * 4


def test_bad_rows_of_packed_batches():
    """Counted by rows of the data; a packed row without a good one is none."""
    data = Torn(12, {0, 5})
    plan = Packed([3] * 12, 2, 6, 1)
    with Batches(data, 2, seed=1, plan=plan, epochs=1, on_bad_row="skip") as batches:
        found = [row_id for batch in batches for row_ids in batch.row_ids for row_id in row_ids.split(", ")]
    assert sorted(found, key=int) == [str(i) for i in range(12) if i not in (0, 5)]
    assert batches.state()["looked_at"] == 12 and batches.state()["bad"] == 2
    (whole,) = [r for b in plan.batches(0) for r in b if 0 in r]
    data = Torn(12, set(whole))
    with Batches(data, 2, seed=1, plan=plan, epochs=1, on_bad_row="skip") as batches:
        assert sum(len(batch.row_ids) for batch in batches) == len(plan.rows(0)) - 1
