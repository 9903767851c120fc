"""Compiled steps over ragged rows: few compilations, and the values of plain steps."""

import csv
from functools import partial
from itertools import combinations

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from bucketed import counted, model_with, relative
from PIL import Image

from gemma_mlx.data import buckets
from gemma_mlx.data.batches import Batches, collate
from gemma_mlx.data.buckets import LABELS, LONGEST, MEDIA, ROW_LABELS, SOFT, TOKENS, choose_buckets, of_batch
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.order import Grouped, Shuffled
from gemma_mlx.data.packing import Packed, joined
from gemma_mlx.data.processor import Processor
from gemma_mlx.layout import sizes
from gemma_mlx.loop import finetune
from gemma_mlx.lora import lora_parameters
from gemma_mlx.models import blocks
from gemma_mlx.step import Step, can_compile

needs_compiler = pytest.mark.skipif(not can_compile(), reason="no C++ compiler: steps run uncompiled here")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """ragged.csv: 64 rows of 3 to 120 words, a third with clips of 0.1 to 2 s, a third with pictures of all shapes."""
    folder, r = tmp_path_factory.mktemp("ragged"), np.random.default_rng(8)
    with (folder / "ragged.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, ["audio_path", "image_path", "question", "answer", "text", "prompt", "response"])
        out.writeheader()
        for i in range(64):
            words = " ".join(r.choice(["alfa", "bravo", "charlie", "delta"], int(np.exp(r.uniform(1, 4.8)))))
            answer = " ".join(r.choice(["echo", "golf"], r.integers(1, 30)))
            row = {"prompt": words, "response": answer}
            if i % 3 == 0:
                samples = 0.1 * r.standard_normal(int(r.integers(1600, 32000)))
                soundfile.write(folder / f"{i}.wav", samples.astype(np.float32), 16000)
                row = {"audio_path": f"{i}.wav", "text": answer}
            if i % 3 == 1:
                pixels = r.integers(0, 255, (int(r.integers(20, 120)), int(r.integers(20, 120)), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                row = {"image_path": f"{i}.png", "question": words, "answer": answer}
            out.writerow(row)
    return folder / "ragged.csv"


@pytest.fixture(scope="module")
def dataset(ragged, checkpoint_folder):
    return counted(Dataset(ragged, Processor(checkpoint_folder, image_tokens=70)))


def area(rows, line):
    return float(rows * line[TOKENS])


def plans(lengths, batch_size, seed=0):
    yield Shuffled(len(lengths), batch_size, seed)
    yield Grouped(lengths, batch_size, seed)
    yield Packed(lengths, batch_size, max(lengths), seed)


def test_sizes_before_decoding_are_those_of_the_batch(dataset):
    """Counted from the slots of rows whose media were not decoded, against the arrays of collated batches."""
    spec = dataset.processor.spec
    for plan in plans(dataset.lengths, 4):
        for rows, batch in zip(plan.batches(0), Batches(dataset, 4, plan=plan, epochs=1), strict=True):
            counted = of_batch(np.stack([buckets.of_row(dataset.sizes[row]) for row in rows]))
            assert (counted == sizes(batch, spec)).all()
    assert (dataset.sizes[:, SOFT].max(0) > 0).tolist() == [True, False, True]


def test_the_cut_is_the_best_of_all_cuts():
    """Against trying every cut, for one bucket to five; cost depends on several sizes."""
    r = np.random.default_rng(8)
    for _ in range(5):
        levels = np.sort(r.integers(1, 50, (9, 12)), axis=0) * 32
        levels[:, TOKENS] = np.cumsum(r.integers(1, 9, 9)) * 32
        levels[:, LABELS] = r.permutation(levels[:, LABELS])
        each = r.integers(1, 9, 9)

        def cost(line):
            return float(line[TOKENS] ** 1.3 + 40 * line[LABELS] + 3000)

        def total(edges, levels=levels, each=each):
            runs = list(zip((0, *edges), (*edges, 9), strict=True))
            return sum(cost(levels[a:b].max(axis=0)) * each[a:b].sum() for a, b in runs)

        best = [min(total(e) for m in range(k) for e in combinations(range(1, 9), m)) for k in range(1, 6)]
        for most in range(1, 6):
            found = buckets._cut(levels, each, cost, most)
            used = len(found)
            assert used <= most and best[used - 1] <= best[most - 1] * (1 + buckets.WORTH)
            edges = [int((levels[:, TOKENS] <= line[TOKENS]).sum()) for line in found][:-1]
            assert total(edges) == pytest.approx(best[used - 1], rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_batch_of_any_epoch_has_its_bucket(batch_size):
    """Random rows of text and three kinds of media; epochs that were not looked at too."""
    r = np.random.default_rng(batch_size)
    lines = np.zeros((900, 12), np.int32)
    for at in range(3):
        counts, longest = r.integers(0, 3, 900), r.integers(1, 280, 900)
        lines[:, 3 + at], lines[:, 6 + at], lines[:, 9 + at] = counts * longest, counts, longest * (counts > 0)
    lines[:, LABELS] = lines[:, ROW_LABELS] = r.integers(1, 90, 900)
    lines[:, TOKENS] = lines[:, SOFT].sum(1) + lines[:, LABELS] + r.integers(10, 400, 900)
    for plan in plans(lines[:, TOKENS].tolist(), batch_size):
        found = choose_buckets(lines, plan, batch_size, partial(area, batch_size))
        assert len(found.sizes) <= buckets.MOST + 1 and (found.sizes % buckets.MULTIPLES == 0).all()
        again = choose_buckets(lines, plan, batch_size, partial(area, batch_size))
        assert (again.sizes == found.sizes).all()
        missed = 0
        for epoch in (0, 1, 40):
            for batch in plan.batches(epoch):
                line = of_batch(np.stack([buckets.of_row(lines[row]) for row in batch]))
                bucket = found.find(line, len(batch))
                missed += bucket is None
                assert bucket is None or (bucket >= line).all()
        assert missed == 0 or isinstance(plan, Packed)
        assert 0 < found.padding < 0.8


def test_rows_all_alike_take_one_bucket():
    lines = np.zeros((40, 12), np.int32)
    lines[:, [TOKENS, LABELS, ROW_LABELS]] = 50, 7, 7
    found = choose_buckets(lines, Shuffled(40, 4), 4, partial(area, 4))
    assert len(found.sizes) == 1 and found.sizes[0, TOKENS] == 64
    assert not found.sizes[0, SOFT].any() and not found.sizes[0, MEDIA].any() and not found.sizes[0, LONGEST].any()


@pytest.fixture
def traced(monkeypatch):
    """More soft tokens than slots, as a compiled step has them, which cannot look; and rows that meet their keys at
    once, since in blocks a row sums in another order when it is padded, which the towers below amplify."""
    monkeypatch.setitem(blocks.BLOCK, mx.default_device().type.name, 1 << 20)
    monkeypatch.setattr("gemma_mlx.models.multimodal.check_ids", lambda *_: None)


def both(model, dataset, plan, batch_size):
    """(a plain step, one that pads to buckets) over a plan of the rows."""
    plain, padded = Step(model, compiled=False), Step(model, compiled=False)
    padded.buckets = choose_buckets(dataset.sizes, plan, batch_size, partial(padded.work, batch_size))
    return plain, padded


@pytest.mark.parametrize("targets", ["decoder", "all"])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_padding_to_buckets_changes_nothing(checkpoint_folder, dataset, targets, packed, traced):
    """Uncompiled: the loss within 1e-6, gradients within 1e-5; text, clips, pictures and mixtures, frozen towers and
    training ones, a smaller last batch. The rows' seed puts no value on a clip's bound or a ReLU's kink, where padding
    of any kind moves the plain step's gradients as far (5e-5)."""
    model = model_with(checkpoint_folder, targets)
    plan = Packed(dataset.lengths, 3, 2 * max(dataset.lengths)) if packed else Shuffled(len(dataset), 3)
    plain, padded = both(model, dataset, plan, 3)
    weights, key, shapes = lora_parameters(model), mx.random.key(0), set()
    batches = list(Batches(dataset, 3, plan=plan, epochs=1))
    for batch in [*batches[:4], batches[-1]]:
        wanted, sums = plain.gradients(weights, batch, key)
        found, other = padded.gradients(weights, batch, key)
        assert relative(other.loss, sums.loss) < 1e-6 and other.correct.item() == sums.correct.item()
        assert (other.labels, other.tokens) == (sums.labels, sums.tokens) and other.positions >= sums.positions
        assert max(relative(found[k], wanted[k]) for k in weights) < 1e-5
        assert relative(padded.evaluate(weights, batch).loss, sums.loss) < 1e-6
    for batch in batches:
        (laid,) = padded.lay_out(batch)
        ready = padded.prepare(laid).arrays
        shapes.add(tuple(sorted((name, a.shape, str(a.dtype)) for name, a in ready.items())))
    assert len(shapes) <= len(padded.buckets.sizes) <= 8


def test_a_batch_that_fits_nowhere_is_padded_by_itself(checkpoint_folder, dataset, traced):
    model = model_with(checkpoint_folder, "decoder")
    plain, padded = both(model, dataset, Shuffled(len(dataset), 2), 2)
    batch = collate([joined([dataset[0], dataset[1], dataset[2]]), joined([dataset[3]])], 0)
    larger = collate([dataset[i] for i in range(5)], 0)
    for odd in (larger, batch):
        assert padded.buckets.find(sizes(odd, model.spec), len(odd.input_ids)) is None or odd is batch
        a, b = (step.gradients(lora_parameters(model), odd, mx.random.key(0))[1].loss for step in (plain, padded))
        assert relative(a, b) < 1e-6


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("targets", ["decoder", "all"])
def test_few_compilations_over_ragged_rows(checkpoint_folder, dataset, targets):
    """Compiled: every batch of three epochs, and the first ones against the plain step: the loss within 1e-6, gradients
    within 1e-4 (fused float32 arithmetic rounds differently)."""
    model = model_with(checkpoint_folder, targets)
    plan = Shuffled(len(dataset), 4)
    plain, step = Step(model, compiled=False), Step(model, compiled=True)
    step.buckets = choose_buckets(dataset.sizes, plan, 4, partial(step.work, 4))
    weights, key = lora_parameters(model), mx.random.key(0)
    for i, batch in zip(range(48), Batches(dataset, 4, plan=plan), strict=False):
        grads, sums = step.gradients(weights, batch, key)
        mx.eval(grads, sums.loss)
        if i < 16:
            wanted, other = plain.gradients(weights, batch, key)
            assert relative(sums.loss, other.loss) < 1e-6
            assert max(relative(grads[k], wanted[k]) for k in weights) < 1e-4
    assert 1 < step.compilations == step.traces["gradients"] <= len(step.buckets.sizes) <= 8


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_stays_within_twelve(checkpoint_folder, ragged, tmp_path, monkeypatch):
    """Gradients, updates and validations together; the metrics count them, an uncompiled run has none."""
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "on")
    options = dict(data=ragged, batch_size=4, rank=2, image_tokens=70, quiet=True, schedule="constant", warmup=0)
    run = finetune(str(checkpoint_folder), out=tmp_path / "on", steps=40, valid=ragged, eval_every=20, **options)
    steps = [record for record in run.history if "loss" in record]
    counted = [record["compilations"] for record in steps]
    assert counted == sorted(counted) and run.report["compilations"]["apply"] == 1
    assert counted[-1] <= sum(run.report["compilations"].values()) <= 12
    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    plain = finetune(str(checkpoint_folder), out=tmp_path / "off", steps=8, **options)
    losses = [[record["loss"] for record in found[:8]] for found in (steps, plain.history)]
    assert np.allclose(*losses, rtol=1e-3) and sum(plain.report["compilations"].values()) == 0
