"""The estimated peak of a step against the measured one, over families and options; refusing and changing a run."""

import gc
import json

import mlx.core as mx
import pytest
import shapes
import yaml
from mlx.utils import tree_flatten

from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.cli import door
from gemma_mlx.cli.estimate import SETTINGS, choice, usable
from gemma_mlx.config import TrainConfig
from gemma_mlx.errors import InputError
from gemma_mlx.estimate import Estimate, estimate
from gemma_mlx.fit import changes, fit
from gemma_mlx.full import trained_parameters
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora
from gemma_mlx.machine import Room
from gemma_mlx.models.load import load_model
from gemma_mlx.models.quantize import quantized_paths
from gemma_mlx.optim import adamw_init, adamw_scalars
from gemma_mlx.skeleton import skeleton, skeleton_of
from gemma_mlx.spec import read_spec
from gemma_mlx.step import Step, add, can_compile
from gemma_mlx.typical import typical_batch

ROWS = dict(rows=2, seconds=4, image_tokens=64, text=96, labels=32)
TEXT = dict(rows=2, seconds=0, image_tokens=0, text=200, labels=64)
slow = pytest.mark.slow
CASES = {
    "edge": (shapes.edge(), {}, ROWS, {}),
    "edge, every position": (shapes.edge(), {}, {**ROWS, "labels": 90}, {"pick_labels": False}),
    "4 bits, all layers computed again": (shapes.edge(), {"bits": 4}, ROWS, {"recompute": 1}),
    "E4B with DoRA": (shapes.edge("gemma-4-E4B", 12), {"dora": True}, ROWS, {}),
    "towers too, computed again": (shapes.edge(), {"targets": "all"}, {**ROWS, "rows": 1}, {"recompute": 1}),
    "audio tower, bfloat16": (
        shapes.edge(), {"dtype": "bfloat16", "targets": "audio,embedders"},
        dict(rows=1, seconds=2, image_tokens=0, text=40, labels=16), {},
    ),
    "decoder in full": (shapes.edge(), {"targets": None, "full": "decoder"}, TEXT, {}),
    "two layers in full, bfloat16": (
        shapes.edge(), {"dtype": "bfloat16", "targets": None, "full": "layers.8,layers.9"}, TEXT, {},
    ),
    "experts": (shapes.experts(), {}, ROWS, {}),
    "experts of 4 bits, every other layer again": (shapes.experts(), {"bits": 4}, ROWS, {"recompute": 2}),
    "12B": (shapes.unified(), {}, ROWS, {}),
    "3n": (shapes.nano(), {}, TEXT, {}),
    "3n computed again": (shapes.nano(), {}, TEXT, {"recompute": 1}),
    "Gemma 3, logits": (shapes.small(), {}, TEXT, {"chunked_loss": False}),
    "rank 64, three batches a step": (shapes.edge(), {"rank": 64}, ROWS, {"accumulate": 3}),
    "edge, compiled": (shapes.edge(), {}, ROWS, {"compiled": True}),
    "two lanes": (shapes.edge(), {}, {**ROWS, "rows": 8}, {"lanes": 2}),
}  # fmt: skip
QUICK = ("edge", "Gemma 3, logits", "3n")


def measured(model, batch, accumulate=1, compiled=False, **options):
    """`mx.get_peak_memory` over two steps, as the loop takes them."""
    step = Step(model, 1.0, compiled, **options)
    weights = trained_parameters(model)
    moments = adamw_init(weights)
    mx.eval(model.parameters(), weights)
    step.install(weights)
    mx.reset_peak_memory()
    for _ in range(2):
        grads = None
        for _ in range(accumulate):
            more, sums = step.gradients(weights, batch, mx.random.key(0))
            grads = more if grads is None else add(grads, more)
            if accumulate > 1:
                mx.eval(grads, sums.loss, sums.correct)
        weights, moments, norm = step.apply(weights, moments, grads, sums.labels, adamw_scalars(1, 1e-4, 0.0))
        mx.eval(weights, moments, norm, sums.loss, sums.correct)
        step.install(weights)
    return mx.get_peak_memory()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=slow) for n in CASES])
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(name):
    config, trained, rows, options = CASES[name]
    if options.get("compiled") and not can_compile():
        pytest.skip("no compiler")
    model = shapes.model(config, **trained)
    batch = typical_batch(model.spec, **rows)
    gc.collect()
    held = mx.get_active_memory()  # packed matrices of this model; whatever else was left behind
    held -= sum(a.nbytes for path in quantized_paths(model) for _, a in tree_flatten(_at(model, path).parameters()))
    found = estimate(model, batch, **options)
    peak = measured(model, batch, **options) - held
    print(f"{name}: estimated {found.peak / 1e6:.1f} MB, measured {peak / 1e6:.1f} MB ({found.describe()})")
    assert abs(found.peak - peak) <= 0.1 * peak


def _at(model, path):
    return dict(model.named_modules())[path]


@pytest.mark.parametrize("name,bits", [("gemma-4-31B", None), ("gemma-4-26B-A4B", 4)])
def test_nothing_of_the_model_is_made(name, bits):
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    spec = read_spec(CHECKPOINTS[name])
    model = skeleton(spec, quantize=bits)
    apply_lora(model, "q_proj", 16)
    found = estimate(model, typical_batch(spec, text=16, labels=8, image_tokens=70))
    assert found.parts["weights"] > (50e9 if bits is None else 13e9)
    assert mx.get_peak_memory() - held < 50e6


def test_a_skeleton_has_the_shapes_of_the_loaded_model(checkpoint_folder):
    for bits in (None, 4):
        loaded = load_model(checkpoint_folder, quantize=bits)
        for bare in (skeleton_of(loaded), skeleton_of(load_model(checkpoint_folder), bits)):
            found, wanted = (
                {name: (a.shape, a.dtype) for name, a in tree_flatten(m.parameters())} for m in (bare, loaded)
            )
            assert found == wanted


def test_label_fraction_batch_and_length_count():
    model = shapes.model(shapes.edge())
    peaks = [
        estimate(model, typical_batch(model.spec, **{**TEXT, **more})).peak
        for more in ({}, {"labels": 8}, {"rows": 1}, {"text": 100})
    ]
    assert all(peak < peaks[0] for peak in peaks[1:])


# --- what would make a run fit


def test_changes_keep_the_step_and_go_from_cheap_to_dear():
    config = TrainConfig(batch_size=6, accumulate=2)
    found = list(changes(config, pictures=True))
    assert found[:3] == [{"checkpoint_layers": 2}, {"checkpoint_layers": 1}, {"batch_size": 3, "accumulate": 4}]
    for change in found:
        assert change.get("batch_size", 6) * change.get("accumulate", 2) == 12
    assert found[-1]["image_tokens"] == 70 and {"quantize": 4} in found
    assert not any("quantize" in change for change in changes(TrainConfig(quantize=4)))


def test_a_run_that_does_not_fit_is_told_the_three_cheapest_ways_that_do():
    def needs(config):
        weights = {None: 100, 8: 55, 4: 30}[config.quantize]
        row = 10**8 * (2 if config.image_tokens is None else 1)
        return Estimate({"weights": 10**7 * weights, "activations": row * config.batch_size})

    room = Room(15 * 10**8, None, "of --memory-gb")
    with pytest.raises(InputError) as error:
        fit(TrainConfig(batch_size=4), needs, room, True)
    told = str(error.value)
    assert told.startswith("the run needs 1.80 GB of the 1.50 GB of --memory-gb (weights 1.00, activations 0.80);")
    ways = ("--batch-size 2 --accumulate 2 (1.40 GB)", "--quantize 8 (1.35 GB)", "--image-tokens 70 (1.40 GB)")
    assert told.endswith("; ".join(ways))
    config, found, change = fit(TrainConfig(batch_size=4, auto=True), needs, room, False)
    assert change == {"batch_size": 2, "accumulate": 2} and found.peak == 14 * 10**8 and config.accumulate == 2


def test_the_largest_buffer_counts_too():
    with pytest.raises(InputError, match=r"a buffer of 2\.00 GB where 1\.00 GB is the limit"):
        fit(TrainConfig(), lambda _: Estimate({}, largest=2 * 10**9), Room(10**10, 10**9, "x"), False)


def arguments(folder, rows, out, *more):
    given = ["--model", folder, "--data", rows / "train.csv", "--out", out, "--steps", 2, *more]
    return [str(a) for a in given]


def entered(arguments, capsys):
    from gemma_mlx.train import command

    capsys.readouterr()
    code = door.enter(command, arguments, "train")
    return code, capsys.readouterr()


def test_the_door_refuses_and_writes_nothing(checkpoint_folder, rows, tmp_path, capsys):
    given = arguments(checkpoint_folder, rows, tmp_path / "run", "--memory-gb", "0.0001", "--batch-size", 1)
    code, told = entered(given, capsys)
    assert code == 2 and told.err.startswith("error: the run needs") and told.err.count("\n") == 1
    assert "of the 0.00 GB of --memory-gb" in told.err and not (tmp_path / "run").exists()


def test_the_doctor_says_which_mac_trains_it(checkpoint_folder, tmp_path, capsys):
    from gemma_mlx.__main__ import verbs

    capsys.readouterr()
    given = ["doctor", "--estimate", "--model", str(checkpoint_folder), "--out", str(tmp_path / "memory.md")]
    assert door.enter(verbs, given, "gemma-mlx") == 0
    told = capsys.readouterr().out
    assert (tmp_path / "memory.md").read_text() in told
    assert "| checkpoint | 8 GB (5.7) | 16 GB (11.5)" in told and f"| {checkpoint_folder.name} | bf16 0." in told
    assert door.enter(verbs, [*given[:-1], str(tmp_path / "no" / "memory.md")], "gemma-mlx") == 2
    assert "no such folder" in capsys.readouterr().err


def test_what_fits_on_a_mac():
    made = {name: Estimate({"weights": size}) for name, size in zip(SETTINGS, (90, 70, 60, 40, 30, 20), strict=True)}
    assert [choice(made, limit) for limit in (95, 65, 10)] == ["bf16 0.0", "8-bit 0.0", "no"]
    assert usable(24) == 16 * 2**30 and usable(64) == 48 * 2**30


def test_auto_makes_it_fit_and_the_run_remembers(checkpoint_folder, rows, tmp_path, capsys):
    gc.collect()
    held = mx.get_active_memory() / 1e9  # of other tests
    needed = finetune(
        checkpoint_folder, data=str(rows / "train.csv"), out=str(tmp_path / "plain"), steps=2, batch_size=8, quiet=True
    ).report
    assert needed["estimated_peak_gb"] > 0.9 * (needed["peak_memory_gb"] - held)
    limit = 0.9 * needed["estimated_peak_gb"]
    given = arguments(checkpoint_folder, rows, tmp_path / "run", "--memory-gb", limit, "--auto", "--batch-size", 8)
    code, told = entered(given, capsys)
    assert code == 0 and "--auto: to fit" in told.out + told.err
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["checkpoint_layers"] or stored["accumulate"] > 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["estimated_peak_gb"] <= limit
    code, told = entered(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"], capsys)
    assert code == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == {**stored, "steps": 3}
