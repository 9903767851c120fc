"""Modules that train in full through the loop: what moves, what is saved, resumed, refused, and kept exact."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from gemma_mlx import loop
from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.processor import Processor
from gemma_mlx.errors import InputError
from gemma_mlx.full import full_modules, train_fully, trained_parameters
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora, load_adapter, lora_layers, save_adapter
from gemma_mlx.models.load import load, load_model, save_model
from gemma_mlx.models.tables import DiskTable
from gemma_mlx.step import Step, can_compile

FAST = dict(quiet=True, rank=2, batch_size=4, image_tokens=70, save_every=0, eval_every=0, warmup=0, lr=1e-2)
SOME = "embed_audio,decoder.layers.1,audio.subsample_conv_projection,vision.patch_embedder,embed_tokens"
CHOICES = {
    "alone": dict(targets="none", full=SOME),
    "beside LoRA": dict(targets="decoder", full="embedders,audio.layers.0.lconv1d,input_layernorm"),
}


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        yield


@pytest.fixture(scope="module")
def batches(checkpoint_folder, rows):
    processor = Processor(checkpoint_folder, image_tokens=70)
    samples = [processor.sample(e) for e in read_examples(rows / "media.csv")]
    return [collate(samples[i : i + 5], processor.pad_id, 8) for i in (0, 5)]


def base_weights(model):
    """Every tensor of the base, by its checkpoint name, with or without an adapter around its linear."""
    layers = [f"{path}." for path in lora_layers(model)]
    named = {}
    for name, w in tree_flatten(model.parameters()):
        inside = next((p for p in layers if name.startswith(p)), None)
        if inside is None:
            named[name] = np.array(w.astype(mx.float32))
        elif name.startswith(f"{inside}linear."):
            named[inside + name.removeprefix(f"{inside}linear.")] = np.array(w.astype(mx.float32))
    return named


def bit_equal(a, b):
    return np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("choice", CHOICES)
def test_what_was_chosen_moves_and_loads_to_bit_equal_logits(checkpoint_folder, rows, batches, tmp_path, choice, dtype):
    run = finetune(
        str(checkpoint_folder), data=rows / "media.csv", out=tmp_path / "run", steps=3, dtype=dtype,
        **CHOICES[choice], **FAST,
    )  # fmt: skip
    before, after = base_weights(load_model(checkpoint_folder, dtype)), base_weights(run.model)
    moved = {name for name in before if not bit_equal(before[name], after[name])}
    chosen = full_modules(run.model)
    names = {f"{m}.{leaf}" for m in chosen for leaf in ("weight", "bias") if f"{m}.{leaf}" in before}
    assert before.keys() == after.keys() and moved == names and len(moved) > 4
    saved = mx.load(str(run.adapter / "adapters.safetensors"))
    assert {n for n in saved if ".lora_" not in n} == names and {w.dtype for w in saved.values()} == {mx.float32}
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"] == chosen
    assert config["fine_tune_type"] == ("full" if choice == "alone" else "lora")
    fresh, _ = load(checkpoint_folder, adapter=run.adapter, dtype=dtype)
    inputs = batches[0].inputs()
    assert mx.array_equal(fresh(**inputs), run.model(**inputs))
    assert not mx.array_equal(fresh(**inputs), load_model(checkpoint_folder, dtype)(**inputs))
    assert all(fresh_w.dtype == w.dtype for (_, fresh_w), (_, w) in zip(
        tree_flatten(fresh.parameters()), tree_flatten(run.model.parameters()), strict=True))  # fmt: skip
    found = [trained_parameters(fresh), {n: w.astype(mx.float32) for n, w in trained_parameters(run.model).items()}]
    assert found[0].keys() == found[1].keys() and all(mx.array_equal(w, found[1][n]) for n, w in found[0].items())


def test_mlx_lm_reads_what_was_trained_in_full_alone(checkpoint_folder, tmp_path):
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    ours, theirs = load_model(checkpoint_folder), load_model(checkpoint_folder)
    train_fully(ours, SOME)
    for name in [name for name, _ in tree_flatten(ours.trainable_parameters())]:
        owner, _, leaf = name.rpartition(".")
        module = dict(ours.named_modules())[owner]
        module[leaf] = module[leaf] * 1.5
    save_adapter(ours, tmp_path)
    utils.load_adapters(theirs, str(tmp_path))
    for (_, a), (_, b) in zip(tree_flatten(ours.parameters()), tree_flatten(theirs.parameters()), strict=True):
        assert bit_equal(np.array(a), np.array(b))


def test_a_merged_checkpoint_needs_no_adapter(checkpoint_folder, rows, batches, tmp_path):
    """Nothing but the base's own tensors changed, so that the model can be saved as it is."""
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / "run", steps=2, targets="none",
        full="decoder.mlp", **FAST,
    )  # fmt: skip
    save_model(run.model, tmp_path / "whole")
    inputs = batches[0].inputs()
    assert mx.array_equal(load_model(tmp_path / "whole")(**inputs), run.model(**inputs))


def test_small_updates_are_not_lost_in_bfloat16(checkpoint_folder, rows, tmp_path):
    """AdamW's steps of 1e-4 on norms near one, where bfloat16's are 8e-3 and 4e-3: they add up in float32."""
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / "run", steps=60, dtype="bfloat16",
        targets="none", full="language_model.norm", schedule="constant", **FAST | dict(lr=1e-4),
    )  # fmt: skip
    (name,) = trained_parameters(run.model)
    start = dict(tree_flatten(load_model(checkpoint_folder, "bfloat16").parameters()))[name]
    saved = mx.load(str(run.adapter / "adapters.safetensors"))[name]
    held = dict(tree_flatten(run.model.parameters()))[name]
    assert held.dtype == mx.bfloat16 and mx.array_equal(held, saved.astype(mx.bfloat16))
    change = np.abs(np.array(saved - start.astype(mx.float32)))
    assert 1e-3 < change.max() < 7e-3  # at most 60 steps of about 1e-4
    lost = start - mx.array(1e-4, mx.bfloat16)
    assert mx.array_equal(lost, start)  # what one step does to bfloat16 weights
    assert not mx.array_equal(held, start)


def steps_taken(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = {"tokens_per_second", "step_seconds", "data_wait", "peak_memory_gb"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.parametrize(
    "choice,dtype", [pytest.param("alone", "bfloat16", marks=pytest.mark.slow), ("beside LoRA", "float32")]
)
def test_a_resumed_run_is_the_same_bit_for_bit(checkpoint_folder, rows, tmp_path, monkeypatch, choice, dtype):
    given = dict(
        data=rows / "media.csv", valid=rows / "valid.csv", steps=8, dtype=dtype, weight_decay=0.01, dropout=0.1,
        **CHOICES[choice], **FAST | dict(save_every=3, eval_every=4, batch_size=8),
    )  # fmt: skip
    whole = finetune(str(checkpoint_folder), out=tmp_path / "whole", **given)
    advance = loop.Job.advance

    def crash(job, *arguments):
        if job.progress.step == 5:
            raise OSError("the machine went down")
        return advance(job, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Job, "advance", crash)
        with pytest.raises(OSError, match="went down"):
            finetune(str(checkpoint_folder), out=tmp_path / "run", **given)
    resumed = finetune(str(checkpoint_folder), out=tmp_path / "run", resume=True, quiet=True)
    assert steps_taken(whole.folder) == steps_taken(resumed.folder)
    adapters = [(run.adapter / "adapters.safetensors").read_bytes() for run in (whole, resumed)]
    assert adapters[0] == adapters[1]
    newest = [sorted((run.folder / "checkpoints").iterdir())[-1] for run in (whole, resumed)]
    for file in ("adapter.safetensors", "optimizer.safetensors"):
        assert (newest[0] / file).read_bytes() == (newest[1] / file).read_bytes()


@pytest.mark.parametrize("full,frozen", [
    ("embedders,decoder.layers.0,embed_tokens", {"image", "video", "audio"}),
    ("audio.layers.0.norm_out", {"image", "video"}),
    ("vision.patch_embedder", {"audio"}),
    ("all", set()),
])  # fmt: skip
def test_a_tower_that_trains_is_not_frozen(checkpoint_folder, batches, full, frozen):
    """What the step keeps of other towers gives the gradients of everything inside."""
    model = load_model(checkpoint_folder)
    train_fully(model, full)
    outside, inside = Step(model, compiled=False), Step(model, compiled=False)
    assert set(outside.frozen) == frozen
    inside.frozen = {}
    weights, key = trained_parameters(model), mx.random.key(0)
    a, b = (step.gradients(weights, batches[0], key)[0] for step in (outside, inside))
    assert set(a) == set(weights)
    assert max(relative(a[name], b[name]) for name in weights) < 1e-4


def relative(a, b):
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-7)


@pytest.mark.parametrize("dtype,bound", [("float32", 1e-4), ("bfloat16", 0.1)])
def test_lanes_share_the_rows(checkpoint_folder, batches, dtype, bound):
    """Threads side by side; the model holds its own weights again afterwards, in its own dtype."""
    model = load_model(checkpoint_folder, dtype)
    apply_lora(model, "decoder", rank=2)
    train_fully(model, "embedders,audio,input_layernorm,embed_tokens")
    weights, held = trained_parameters(model), base_weights(model)
    one, several = Step(model, compiled=False), Step(model, compiled=False, lanes=2)
    for batch in batches:
        wanted, sums = one.gradients(weights, batch, mx.random.key(0))
        got, other = several.gradients(weights, batch, mx.random.key(0))
        largest = max(float(mx.linalg.norm(g)) for g in wanted.values())
        for name, g in wanted.items():
            assert float(mx.linalg.norm(got[name] - g)) <= bound * float(mx.linalg.norm(g)) + 1e-3 * bound * largest
        assert relative(other.loss, sums.loss) < bound and other.labels == sums.labels
        assert {g.dtype for g in got.values()} == {mx.float32}
    after = base_weights(model)
    assert all(bit_equal(held[name], after[name]) for name in held)
    assert {w.dtype for n, w in tree_flatten(model.parameters()) if ".lora_" not in n} == {getattr(mx, dtype)}


@pytest.mark.parametrize("dtype,bound", [
    ("float32", 1e-4), pytest.param("bfloat16", 0.1, marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_equals_plain(checkpoint_folder, batches, dtype, bound):
    """The compiled step takes the trained weights as arguments: it follows them when they change."""
    if not can_compile():
        pytest.skip("MLX needs a C++ compiler to compile on a CPU")
    model = load_model(checkpoint_folder, dtype)
    train_fully(model, "embedders,decoder.layers.1,embed_tokens,language_model.norm")
    start = trained_parameters(model)
    moved = {name: w * 1.25 for name, w in start.items()}
    plain, compiled = (Step(model, compiled=c) for c in (False, True))
    losses = []
    for weights in (start, moved):
        wanted, sums = plain.gradients(weights, batches[0], mx.random.key(0))
        got, other = compiled.gradients(weights, batches[0], mx.random.key(0))
        assert relative(other.loss, sums.loss) < bound / 10
        assert max(relative(got[name], wanted[name]) for name in weights) < bound
        losses.append(sums.loss.item())
        assert relative(compiled.evaluate(weights, batches[0]).loss, sums.loss) < bound / 10
    assert abs(losses[0] - losses[1]) > 0.01 * losses[0]


def refused(words, **options):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        finetune(quiet=True, steps=1, **options)
    assert "\n" not in str(caught.value)


def test_bad_choices_are_one_line_before_anything_is_written(checkpoint_folder, rows, tmp_path):
    given = dict(model=str(checkpoint_folder), data=rows / "train.csv", out=tmp_path / "run")
    refused("targets: none leaves nothing to train", targets="none", **given)
    refused("o_proj has an adapter; name it in targets or in full", targets="o_proj", full="decoder", **given)
    refused("'embed_audoi' names no module", targets="none", full="embed_audoi", **given)
    refused("'layer_scalar' names no module", targets="none", full="layer_scalar", **given)
    refused("embed_tokens_per_layer cannot train", targets="none", full="embed_tokens_per_layer", **given)
    refused("embed_tokens is quantized, and packed weights", targets="none", full="embed_tokens", quantize=8, **given)
    assert not (tmp_path / "run").exists()


def test_flag_yaml_and_keyword_are_one_option(tmp_path):
    from gemma_mlx.config import configure
    from gemma_mlx.train import parse

    (tmp_path / "c.yaml").write_text("targets: none\nfull: [embed_audio, layers.3.mlp]\n")
    flags = ["--targets", "none", "--full", "embed_audio,layers.3.mlp"]
    configs = [configure(*parse(words)) for words in (flags, ["--config", str(tmp_path / "c.yaml")])]
    assert configs[0] == configs[1] == configure({"targets": "none", "full": "embed_audio,layers.3.mlp"})


def test_beside_a_quantized_decoder(checkpoint_folder, rows, batches, tmp_path):
    """Towers and norms stay float and can train; the decoder's matrices have adapters."""
    run = finetune(
        str(checkpoint_folder), data=rows / "media.csv", out=tmp_path / "run", steps=2, quantize=8,
        full="embedders,language_model.norm", **FAST,
    )  # fmt: skip
    fresh, _ = load(checkpoint_folder, adapter=run.adapter)
    inputs = batches[0].inputs()
    assert mx.array_equal(fresh(**inputs), run.model(**inputs))


def test_with_the_per_layer_table_on_disk(checkpoint_folder, rows, tmp_path, monkeypatch):
    """The same run bit for bit; the table is refused there too."""
    given = dict(data=rows / "train.csv", steps=2, targets="none", full="embed_tokens,decoder.layers.0", **FAST)
    runs = [finetune(str(checkpoint_folder), out=tmp_path / "memory", **given)]
    monkeypatch.setattr("gemma_mlx.models.load.DISK_BYTES", 0)
    runs.append(finetune(str(checkpoint_folder), out=tmp_path / "disk", **given))
    saved = [(run.adapter / "adapters.safetensors").read_bytes() for run in runs]
    assert saved[0] == saved[1]
    model = load_model(checkpoint_folder)
    assert isinstance(model.model.language_model.embed_tokens_per_layer, DiskTable)
    with pytest.raises(InputError, match="embed_tokens_per_layer cannot train"):
        train_fully(model, "embed_tokens_per_layer")
    assert train_fully(model, "all")


def test_a_second_run_needs_a_base(checkpoint_folder, rows, tmp_path):
    model, processor = load(checkpoint_folder)
    given = dict(processor=processor, data=rows / "train.csv", targets="none", full="embed_audio", **FAST)
    finetune(model, out=tmp_path / "a", steps=1, **given)
    with pytest.raises(InputError, match=r"embedding_projection: trained in full by an earlier run"):
        finetune(model, out=tmp_path / "b", steps=1, **given)


DAMAGES = {
    "a tensor less": (lambda w, c: w.pop("model.embed_audio.embedding_projection.weight"), "weight is missing"),
    "a tensor more": (lambda w, c: w.update({"model.x.weight": mx.zeros(2)}), "model.x.weight belongs to no layer"),
    "another shape": (
        lambda w, c: w.update({"model.embed_audio.embedding_projection.weight": mx.zeros((3, 9))}), "has shape (3, 9)"
    ),
    "a module unknown": (lambda w, c: c["modules_to_save"].append("model.nothing"), "has no module model.nothing"),
    "no modules": (lambda w, c: c.pop("modules_to_save"), "0 layers"),
    "not a list": (lambda w, c: c.update(modules_to_save=3), "not an adapter's config"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_file_is_one_clear_line_and_changes_nothing(checkpoint_folder, tmp_path, damage):
    model = load_model(checkpoint_folder)
    train_fully(model, "embed_audio,language_model.norm")
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = dict(mx.load(str(tmp_path / "adapters.safetensors")))
    change, words = DAMAGES[damage]
    change(weights, config)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = load_model(checkpoint_folder)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        load_adapter(base, tmp_path)
    assert "\n" not in str(caught.value) and not full_modules(base)


def test_quantized_modules_neither_train_nor_take_weights(tmp_path):
    tiny.make(tmp_path, vision=None, audio=None)
    model, packed = load_model(tmp_path), load_model(tmp_path, quantize=8)
    for names, module in (("decoder", "layers.0.mlp.down_proj"), ("layers.3.mlp.up_proj", "layers.3.mlp.up_proj")):
        with pytest.raises(InputError, match=f"{module} is quantized, and packed weights cannot train"):
            train_fully(packed, names)
    train_fully(packed, "input_layernorm")  # floats beside them
    assert len(full_modules(packed)) == 10
    train_fully(model, "decoder.layers.0.mlp.up_proj")
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"adapter_config.json: .*up_proj is quantized"):
        load_adapter(load_model(tmp_path, quantize=8), tmp_path / "adapter")
