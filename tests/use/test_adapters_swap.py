"""Adapters put on one resident base, taken off, exchanged, and combined with weights."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
import adapter_pairs

import gemma_mlx as gm
from gemma_mlx.adapters.attach import attach, attached, detach, swap
from gemma_mlx.adapters.combine import shrink
from gemma_mlx.adapters.fitting import fit
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.exporting.peft import write
from gemma_mlx.full import full_modules, train_fully, trained_places
from gemma_mlx.lora import apply_lora, load_adapter, lora_layers, remembered_options, save_adapter
from gemma_mlx.models.load import load_model

BOUND = 2e-4  # absolute, of logits of scale 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.make(str(folder), seed=10)
    return folder


def made(base, out, targets="decoder", rank=3, alpha=6.0, seed=0, full=None, dora=False, options=None):
    model = load_model(base)
    if targets:
        apply_lora(model, targets, rank, alpha, dora=dora)
        adapter_pairs.randomise(model, seed)
    if full:
        train_fully(model, full)
        rng = np.random.default_rng(seed)
        for name, place in trained_places(model).items():
            if "lora_" not in name:
                noise = mx.array(rng.standard_normal(place.get().shape).astype(np.float32))
                place.put(place.get() * (1 + 0.2 * noise))
    save_adapter(model, out, options=options)
    return out


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Adapters of other ranks, targets and kinds; one with modules in full."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "a": made(base, folder / "a", "decoder", 3, 6.0, 0),
        "b": made(base, folder / "b", "all", 5, 2.0, 1),
        "dora": made(base, folder / "dora", "decoder.q_proj,audio", 2, 2.0, 2, dora=True),
        "full": made(base, folder / "full", "decoder.q_proj", 2, 4.0, 3, full="embed_audio,language_model.norm"),
        "whole": made(base, folder / "whole", None, seed=4, full="decoder.layers.3.mlp,embed_audio"),
    }


@pytest.fixture(scope="module")
def inputs():
    return tiny.inputs("image+audio", n_text=20, lens=(61,))


def same_tensors(a, b):
    a, b = (dict(tree_flatten(m.parameters())) for m in (a, b))
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n], equal_nan=True) for n in a
    )


@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_swapped_is_as_freshly_loaded(base, adapters, inputs, bits):
    """In every order, on a float and a packed base, bit for bit; off, the base is what it was."""
    model, plain = load_model(base, quantize=bits), load_model(base, quantize=bits)
    fresh = {}
    for name, folder in adapters.items():
        if bits and name == "whole":  # packed weights cannot be replaced
            continue
        fresh[name] = load_model(base, quantize=bits)
        load_adapter(fresh[name], folder)
    expected = {name: m(**inputs) for name, m in fresh.items()}
    order = [*fresh, *list(fresh)[-2::-1]]
    for name in order:
        swap(model, adapters[name])
        assert mx.array_equal(model(**inputs), expected[name]), name
        assert same_tensors(model, fresh[name])
        assert [n for n, _ in tree_flatten(model.trainable_parameters())] == [
            n for n, _ in tree_flatten(fresh[name].trainable_parameters())
        ]
    assert swap(model, None) == [] and same_tensors(model, plain)
    assert mx.array_equal(model(**inputs), plain(**inputs))
    assert not tree_flatten(model.trainable_parameters()) and not lora_layers(model) and not full_modules(model)
    assert len({float(mx.abs(w).sum()) for w in expected.values()}) == len(expected)


def test_fifty_swaps_take_no_memory(base, adapters):
    """And `changes` tells what was computed before from what comes after."""
    model = load_model(base)
    mx.eval(model.parameters())
    inputs = tiny.inputs("text", n_text=5)
    used, changes = [], attached(model).changes
    for i in range(50):
        swap(model, adapters[("a", "full")[i % 2]])
        mx.eval(model(**inputs))
        mx.clear_cache()
        used.append(mx.get_active_memory())
    assert used[-1] <= used[1] and used[-2] <= used[0], (used[:2], used[-2:])
    assert attached(model).changes - changes == 100
    assert attached(model).names == (str(adapters["full"]),)


def test_what_does_not_fit_leaves_the_old_one_on(base, adapters, inputs, tmp_path):
    model = load_model(base)
    config = json.loads((adapters["a"] / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"][0] = "model.language_model.layers.99.mlp.up_proj"
    tensors = dict(mx.load(str(adapters["a"] / "adapters.safetensors")))
    old = json.loads((adapters["a"] / "adapter_config.json").read_text())["lora_parameters"]["keys"][0]
    for leaf in ("lora_a", "lora_b"):
        tensors[f"model.language_model.layers.99.mlp.up_proj.{leaf}"] = tensors.pop(f"{old}.{leaf}")
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name in ("b", "full"):
        swap(model, adapters[name])
        before, on = model(**inputs), attached(model).names
        for folders, weights in (
            (tmp_path, None),
            (tmp_path / "none", None),
            ([adapters["dora"], adapters["b"]], [1, 2]),
        ):
            with pytest.raises(InputError):
                swap(model, folders, weights)
            assert mx.array_equal(model(**inputs), before) and attached(model).names == on
    swap(model, None)
    assert same_tensors(model, load_model(base))


def test_what_a_model_remembers_of_its_adapter_survives_a_swap_that_fails(base, adapters, tmp_path):
    """Its names, exact weights and originals are as before; that something happened shows in the number of changes."""
    from gemma_mlx.adapters.attach import instead

    other = tmp_path / "other"
    tiny.make(str(other), seed=2, text=dict(hidden_size=32))
    wrong = made(other, tmp_path / "wrong")
    model = load_model(base)
    attach(model, adapters["full"])
    before = replace(attached(model))
    with pytest.raises(InputError):
        swap(model, wrong)
    first = replace(attached(model))
    with instead(model, None):
        assert not lora_layers(model)
    then = attached(model)
    for state in (first, then):
        assert (state.names, set(state.originals)) == (before.names, set(before.originals))
        assert state.exact.keys() == before.exact.keys() and len(state.exact) > 0
    assert before.changes < first.changes < then.changes


def test_a_file_cut_short_is_named_and_changes_nothing(base, adapters, tmp_path):
    import shutil

    cut = shutil.copytree(adapters["a"], tmp_path / "cut")
    weights = cut / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    model = load_model(base)
    with pytest.raises(InputError, match=r"adapters\.safetensors"):
        attach(model, cut)
    assert not lora_layers(model)


def test_attach_twice_and_detach_of_nothing(base, adapters):
    model = load_model(base)
    detach(model)
    attach(model, adapters["whole"])
    with pytest.raises(InputError, match="already has an adapter"):
        attach(model, adapters["a"])
    detach(model)
    attach(model, adapters["a"])
    with pytest.raises(InputError, match="already has an adapter"):
        attach(model, adapters["whole"])
    detach(model)
    train_fully(model, "language_model.norm")
    with pytest.raises(InputError, match="trained in full in this process"):
        detach(model)
    with pytest.raises(InputError, match="no folder named"):
        attach(load_model(base), [])


def dense(layer):
    """ΔW [out, in] of a layer in float64."""
    a, b = (np.array(w.astype(mx.float32)).astype(np.float64) for w in (layer.lora_a, layer.lora_b))
    return layer.scale * (a @ b).T


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -2.5], None])
def test_a_weighted_sum_is_the_formulas(base, adapters, weights):
    """float64 NumPy: ΔW = Σ wᵢ·sᵢ·(Aᵢ·Bᵢ)ᵀ of adapters with other ranks, scales and targets."""
    model, parts = load_model(base), []
    for name in ("a", "b"):
        part = load_model(base)
        attach(part, adapters[name])
        parts.append(lora_layers(part))
    attach(model, [adapters["a"], adapters["b"]], weights)
    layers = lora_layers(model)
    assert layers.keys() == parts[0].keys() | parts[1].keys() and len(parts[0]) < len(layers)
    for path, layer in layers.items():
        given = [(w, p[path]) for w, p in zip(weights or [1, 1], parts, strict=True) if path in p]
        expected = sum(w * dense(part) for w, part in given)
        assert layer.lora_a.shape[1] == sum(part.lora_a.shape[1] for _, part in given)
        assert np.abs(dense(layer) - expected).max() <= 1e-6 * np.abs(expected).max(), path


def test_a_weighted_sum_is_pefts(base, adapters, inputs, tmp_path):
    """Logits of PEFT's add_weighted_adapter with combination_type "cat"."""
    from peft import PeftModel

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(Source(base, "some/base", adapter=adapters[name]), tmp_path / name, ExportOptions())
    reference = PeftModel.from_pretrained(adapter_pairs.theirs(base), tmp_path / "a", adapter_name="a")
    reference.load_adapter(tmp_path / "b", adapter_name="b")
    # PEFT combines layers that both adapters have; "b" has more, which "a" does not change.
    reference.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type="cat")
    reference.set_adapter("sum")
    model, _ = gm.load(base, adapter=[adapters["a"], tmp_path / "b"], adapter_weights=[0.7, 0.4])
    found = tiny.reference_logits(reference.eval(), inputs)
    assert adapter_pairs.difference(model(**inputs), found, inputs) <= BOUND
    alone, _ = gm.load(base, adapter=adapters["a"])
    assert adapter_pairs.difference(alone(**inputs), found, inputs) > 0.1


def test_weights_trained_in_full_add_up_from_the_base(base, adapters):
    model, plain = load_model(base), dict(tree_flatten(load_model(base).parameters()))
    attach(model, [adapters["full"], adapters["whole"]], [0.5, 2.0])
    name = "model.embed_audio.embedding_projection.weight"
    files = [mx.load(str(adapters[n] / "adapters.safetensors"))[name] for n in ("full", "whole")]
    w, f, g = (np.array(t).astype(np.float64) for t in (plain[name], *files))
    found = np.array(dict(tree_flatten(model.parameters()))[name])
    assert np.abs(found - (w + 0.5 * (f - w) + 2.0 * (g - w))).max() <= 1e-6
    detach(model)
    assert same_tensors(model, load_model(base))


def test_what_is_no_sum_is_refused(base, adapters, tmp_path):
    def refused(names, weights, words):
        model = load_model(base)
        with pytest.raises(InputError, match=words) as caught:
            attach(model, [adapters[n] for n in names], weights)
        assert "\n" not in str(caught.value) and not lora_layers(model)

    refused(["dora", "a"], None, "has DoRA, which is no sum")
    refused(["dora"], [0.5], "has DoRA, which is no sum")
    refused(["a", "whole"], None, "one adapter has low-rank weights there, another trained it in full")
    refused(["a", "b"], [1.0], "1 weights for 2 adapters")
    refused(["a", "b"], [1.0, float("nan")], "numbers are needed")
    with pytest.raises(InputError, match="no adapter to weight"):
        gm.load(base, adapter_weights=[1.0])
    other = made(base, tmp_path / "other", "decoder.o_proj")
    model = load_model(base)
    attach(model, [adapters["dora"], other])  # on other layers DoRA stays what it is
    assert len(lora_layers(model)) == len(read_adapter(adapters["dora"]).layers) + 10


def test_shrunk_to_a_rank_is_the_best_there_is(base, adapters):
    """Eckart and Young: the error is that of the left out singular values, which it reports."""
    model = load_model(base)
    adapter = fit(read_adapter(adapters["b"]), model)
    adapter = replace(adapter, layers=dict(list(adapter.layers.items())[::9]))
    for rank in (1, 3, 5):
        small, error = shrink(adapter, rank)
        worst = 0.0
        for path, layer in adapter.layers.items():
            before, after = (
                w.scale * (np.array(w.a, np.float64) @ np.array(w.b, np.float64)) for w in (layer, small.layers[path])
            )
            s = np.linalg.svd(before, compute_uv=False)
            best = float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))
            assert small.layers[path].rank <= rank
            assert abs(np.linalg.norm(before - after) / np.linalg.norm(before) - best) <= 1e-6
            worst = max(worst, best)
        assert abs(error - worst) <= 1e-9 or rank == 5
    same, error = shrink(adapter, 5)
    assert error == 0.0 and all(same.layers[p] is layer for p, layer in adapter.layers.items())


def test_options_that_two_adapters_remember(base, tmp_path):
    a = made(base, tmp_path / "a", "decoder.q_proj", options={"audio_prompt": "One", "audio_window": 12})
    b = made(base, tmp_path / "b", "decoder.q_proj", options={"audio_prompt": "Two", "image_tokens": 70})
    assert remembered_options([a, b], {"audio_prompt"})["image_tokens"] == 70
    with pytest.raises(InputError, match="trained with audio_prompt 'Two', another adapter with 'One'"):
        remembered_options([a, b])


def test_options_that_load_decides_by(base, tmp_path):
    """Prompts are not its concern; what it uses must be agreed on, or given."""
    options = ({"audio_prompt": "One", "image_tokens": 70}, {"audio_prompt": "Two", "image_tokens": 140})
    names = [made(base, tmp_path / str(i), "decoder.q_proj", options=o) for i, o in enumerate(options)]
    with pytest.raises(InputError, match="trained with image_tokens 140, another adapter with 70"):
        gm.load(base, adapter=names)
    _, processor = gm.load(base, adapter=names, image_tokens=280)
    assert processor.image_tokens == 280
    _, processor = gm.load(base, adapter=names[1])
    assert processor.image_tokens == 140


def test_a_runs_folder_means_its_adapter(base, adapters, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(adapters["a"])
    assert read_adapter(tmp_path / "run").layers.keys() == read_adapter(adapters["a"]).layers.keys()
    with pytest.raises(InputError, match="adapter nobody/nothing: not a local folder"):
        read_adapter("nobody/nothing")
