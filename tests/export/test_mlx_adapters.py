"""Files for mlx-lm and mlx-vlm: their own loaders put them on, and compute what this library does."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from adapter_pairs import MAKERS, TARGETS, adapted, made_once, ours, randomise
from mlx.utils import tree_flatten

from gemma_mlx.adapters.adapter import LowRank
from gemma_mlx.adapters.attach import adapted as with_change
from gemma_mlx.adapters.attach import attach
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.mlx import VLM, uniform, write
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.full import train_fully, trained_places
from gemma_mlx.lora import apply_lora, lora_layers, save_adapter
from gemma_mlx.models.quantize import put_module

BOUND = 2e-4  # absolute, of logits of scale 1
TEXT = {name: targets.replace("all", "decoder") for name, targets in TARGETS.items()}
TEXT["3n"] = "decoder,per_layer_input_gate,per_layer_projection,linear_left,linear_right"
FAST = ("E2B", "Gemma 3")
S, F = "sliding_attention", "full_attention"
MLX_LM_GEMMA3 = dict(layer_types=[S, F] * 4, sliding_window_pattern=2)
"""mlx-lm knows patterns of Gemma 3 by one number; its norms and rope are those of the published models."""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(family) -> its folder, made once, of a form that mlx-lm reads."""

    def make(name, folder):
        MAKERS[name](str(folder), **(dict(layer_types=[S, F] * 4) if name == "Gemma 3" else {}))
        as_mlx_lm_reads(name, folder)

    return made_once(tmp_path_factory, make)


def as_mlx_lm_reads(name, folder):
    """Keys of config.json and tensors that published files have and transformers no longer writes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if name == "Gemma 3":
        rope = config["rope_parameters"]
        config |= {"rope_theta": rope[F]["rope_theta"], "rope_local_base_freq": rope[S]["rope_theta"]}
        config |= {"sliding_window_pattern": 2, "rope_scaling": None}
    text = config.get("text_config", config)
    text.setdefault("hidden_size_per_layer_input", 0)
    if name == "12B":
        text.pop("per_layer_config", None)
        text |= {"global_head_dim": 32, "num_global_key_value_heads": 2}
        config["vision_config"]["model_patch_size"] = 12
        config["audio_config"] |= {"audio_samples_per_token": 40, "output_proj_dims": 40}
    config.setdefault("vocab_size", text["vocab_size"])
    if name == "3n":  # keys and values of layers that share others', which nothing reads
        tensors = dict(mx.load(str(folder / "model.safetensors")))
        first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
        for i in range(first, text["num_hidden_layers"]):
            for leaf in ("k_norm", "k_proj", "v_proj"):
                own = tensors[f"model.language_model.layers.0.self_attn.{leaf}.weight"]
                tensors[f"model.language_model.layers.{i}.self_attn.{leaf}.weight"] = mx.random.normal(own.shape)
        mx.eval(tensors)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    path.write_text(json.dumps(config))


def lm(folder, adapter=None):
    """mlx-lm's model, with an adapter by its own loader."""
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(folder)
    return model if adapter is None else utils.load_adapters(model, str(adapter))


def lm_logits(model, ids):
    """With a cache, as mlx-lm generates: without one its Gemma 3n shares no keys and values."""
    from mlx_lm.models.cache import make_prompt_cache

    return np.array(model(mx.array(ids), cache=make_prompt_cache(model)).astype(mx.float32))


def exported(folder, adapter, out, **options):
    out.mkdir()
    return write(Source(folder, "some/base", adapter=adapter), out, ExportOptions(**options))


IDS = np.random.default_rng(5).integers(3, 240, (2, 41))


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MAKERS])
@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_mlx_lm_computes_the_same(base, tmp_path, name, dora):
    model, adapter = adapted(name, base(name), tmp_path / "adapter", targets=TEXT[name], dora=dora)
    exported(base(name), adapter, tmp_path / "mlx")
    plain = np.abs(lm_logits(lm(base(name)), IDS) - np.array(ours(name, base(name))(input_ids=IDS))).max()
    found = lm_logits(lm(base(name), tmp_path / "mlx"), IDS)
    expected = np.array(model(input_ids=IDS))
    print(f"{name}: without adapter {plain:.1e}, with {np.abs(found - expected).max():.1e}")
    assert np.abs(found - expected).max() <= BOUND
    assert np.abs(found - lm_logits(lm(base(name)), IDS)).max() > 0.5


def test_mlx_lm_load_itself(checkpoint_folder, tmp_path):
    """The whole way: `mlx_lm.load(folder, adapter_path=…)` of a checkpoint with a tokenizer, and an answer by it."""
    mlx_lm = pytest.importorskip("mlx_lm")
    from gemma_mlx.models.load import load_model

    model = load_model(checkpoint_folder)
    apply_lora(model, "decoder", 3, 6.0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    exported(checkpoint_folder, tmp_path / "adapter", tmp_path / "mlx")
    folder = shutil.copytree(checkpoint_folder, tmp_path / "base")
    as_mlx_lm_reads("E2B", folder)
    theirs, tokenizer = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "mlx"))
    ids = np.array([tokenizer.encode("Repeat: alfa bravo charlie")])
    found = lm_logits(theirs, ids)
    assert np.abs(found - np.array(model(input_ids=ids))).max() <= BOUND
    assert found.std() > 0.5


def test_a_runs_own_folder_in_mlx_lm(base, tmp_path):
    """Where mlx-lm names the decoder as transformers does, it reads a run's adapter as it is; of Gemma 4 it says no."""
    model, adapter = adapted("Gemma 3", base("Gemma 3"), tmp_path / "a", targets="decoder")
    found = lm_logits(lm(base("Gemma 3"), adapter), IDS)
    assert np.abs(found - np.array(model(input_ids=IDS))).max() <= BOUND
    _, adapter = adapted("E2B", base("E2B"), tmp_path / "b", targets="decoder")
    with pytest.raises(ValueError, match="not an adapter parameter in the model"):
        lm(base("E2B"), adapter)


def test_ranks_and_scales_that_differ_are_brought_to_one(base, tmp_path):
    """Random ranks and scales: mlx-lm has one of each, and every product stays what it was."""
    model = ours("Gemma 3", base("Gemma 3"))
    rng = np.random.default_rng(2)
    paths = list(lora_layers_of(model, "q_proj,down_proj"))
    for path, linear in paths:
        out, inner = linear.weight.shape
        rank, scale = int(rng.integers(1, 9)), float(rng.uniform(0.3, 3))
        a, b = (
            mx.array(rng.standard_normal(s).astype(np.float32)) * s[0] ** -0.5 for s in ((inner, rank), (rank, out))
        )
        put_module(model, path, with_change(linear, LowRank(a, b, scale)))
    save_adapter(model, tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert raw["gemma_mlx"]["format"] == 2
    lines = exported(base("Gemma 3"), tmp_path / "adapter", tmp_path / "mlx")
    assert any("ranks or scales differ" in line for line in lines)
    found = lm_logits(lm(base("Gemma 3"), tmp_path / "mlx"), IDS)
    assert np.abs(found - np.array(model(input_ids=IDS))).max() <= BOUND
    again = ours("Gemma 3", base("Gemma 3"))
    attach(again, tmp_path / "adapter")
    assert mx.array_equal(again(input_ids=IDS), model(input_ids=IDS))
    assert {p: layer.scale for p, layer in lora_layers(again).items()} == {
        p: layer.scale for p, layer in lora_layers(model).items()
    }
    layers, scale = uniform(read_adapter(tmp_path / "adapter").layers)
    for path, layer in lora_layers(model).items():
        product = lambda a, b, s: s * np.array(a).astype(np.float64) @ np.array(b).astype(np.float64)  # noqa: E731
        before, after = product(layer.lora_a, layer.lora_b, layer.scale), product(layers[path].a, layers[path].b, scale)
        assert np.abs(before - after).max() <= 2e-7 * np.abs(before).max()


def lora_layers_of(model, targets):
    """(path, linear) of targets."""
    from gemma_mlx.lora import module_at, resolve_targets

    return [(path, module_at(model, path)) for path in resolve_targets(model, targets)]


@pytest.mark.parametrize("name", ["Gemma 3", pytest.param("E2B", marks=pytest.mark.slow)])
def test_modules_trained_in_full(base, tmp_path, name):
    model = ours(name, base(name))
    model.freeze()
    train_fully(model, f"decoder.layers.1,embed_tokens,{'language_model' if name == 'E2B' else 'model'}.norm")
    rng = np.random.default_rng(0)
    for place in trained_places(model).values():
        place.put(place.get() * (1 + 0.2 * mx.array(rng.standard_normal(place.get().shape).astype(np.float32))))
    save_adapter(model, tmp_path / "adapter")
    exported(base(name), tmp_path / "adapter", tmp_path / "mlx")
    found = lm_logits(lm(base(name), tmp_path / "mlx"), IDS)
    assert np.abs(found - np.array(model(input_ids=IDS))).max() <= BOUND
    again = ours(name, base(name))
    attach(again, tmp_path / "mlx")
    assert mx.array_equal(again(input_ids=IDS), model(input_ids=IDS))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_mlx_lm_trained_is_read(base, tmp_path, dora):
    """Its own file: keys by the ends of paths, the last blocks alone."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder, theirs = base("E2B"), lm(base("E2B"))
    parameters = {"rank": 5, "scale": 1.7, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    theirs.freeze()
    linear_to_lora_layers(theirs, 4, parameters, use_dora=dora)
    rng = np.random.default_rng(1)
    weights = {}
    for path, w in tree_flatten(theirs.trainable_parameters()):
        noise = mx.array(rng.standard_normal(w.shape).astype(np.float32))
        weights[path] = w * (1 + 0.2 * noise) if path.endswith(".m") else 0.4 * noise * w.shape[0] ** -0.5
    out = tmp_path / "theirs"
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 4, "lora_parameters": parameters}
    (out / "adapter_config.json").write_text(json.dumps(config))
    model = ours("E2B", folder)
    assert len(attach(model, out)) == 8 and read_adapter(out).layout == "mlx-lm"
    found = lm_logits(lm(folder, out), IDS)
    assert np.abs(found - np.array(model(input_ids=IDS))).max() <= BOUND
    exported(folder, out, tmp_path / "again")
    before, after = (mx.load(str(f / "adapters.safetensors")) for f in (out, tmp_path / "again"))
    assert before.keys() == after.keys() and all(mx.array_equal(before[n], after[n]) for n in before)


def vlm():
    """mlx-vlm's own loader of adapters."""
    return pytest.importorskip("mlx_vlm.trainer.peft")


def vlm_model(name, folder):
    """mlx-vlm's model of a tiny checkpoint, by its own loader; of 3n, whose tower has one size there, the modules."""
    pytest.importorskip("mlx_vlm")
    from mlx_vlm.models import gemma3n
    from mlx_vlm.utils import load_model, update_module_configs

    if name != "3n":
        model = load_model(folder)
    else:
        content = json.loads((folder / "config.json").read_text())
        config = update_module_configs(
            gemma3n.ModelConfig.from_dict(dict(content)), gemma3n, content, ["text", "vision", "audio"]
        )
        model = gemma3n.Model(config)
    for module in model.modules():  # mlx-vlm makes some of the audio tower without what `freeze` needs, and fails there
        if not hasattr(module, "_no_grad"):
            module._no_grad, module._training = set(), True
    return model


@pytest.mark.parametrize("name", ["E2B", *(pytest.param(n, marks=pytest.mark.slow) for n in ("31B", "12B", "3n"))])
def test_mlx_vlm_puts_it_on_the_same_weights(base, tmp_path, name):
    """Every layer's product is what it is here, on a base weight that is the same, towers among them."""
    model, adapter = adapted(name, base(name), tmp_path / "adapter")
    exported(base(name), adapter, tmp_path / "mlx")
    theirs = vlm_model(name, base(name))
    vlm().apply_lora_layers(theirs, tmp_path / "mlx" / VLM)
    found = {p: m for p, m in theirs.named_modules() if "lora_a" in m}
    layers = lora_layers(model)
    assert len(found) == len(layers)
    seen = {bytes(np.array(layer.linear.weight)): layer for layer in layers.values()}
    for path, module in found.items():
        if name == "3n":
            mine = layers["model." + path.replace("language_model.model.", "language_model.")]
        else:
            mine = seen[bytes(np.array(module.linear.weight))]
        assert mine.linear.weight.shape == module.linear.weight.shape
        assert mx.array_equal(mine.lora_a, module.lora_a) and mx.array_equal(mine.lora_b, module.lora_b), path
        assert module.scale == mine.scale
    again = ours(name, base(name))
    attach(again, tmp_path / "mlx" / VLM)
    assert lora_layers(again).keys() == layers.keys()
    assert all(mx.array_equal(lora_layers(again)[p].lora_b, layer.lora_b) for p, layer in layers.items())


def test_what_mlx_lm_cannot_hold_is_said(base, tmp_path):
    _, adapter = adapted("E2B", base("E2B"), tmp_path / "a", targets="q_proj")
    lines = exported(base("E2B"), adapter, tmp_path / "mlx")
    assert any("mlx-lm has no towers" in line for line in lines)
    assert len(mx.load(str(tmp_path / "mlx" / "adapters.safetensors"))) == 2 * 10
    assert len(mx.load(str(tmp_path / "mlx" / VLM / "adapters.safetensors"))) == 2 * 14
    _, adapter = adapted("E2B", base("E2B"), tmp_path / "b", targets="audio.q_proj")
    exported(base("E2B"), adapter, tmp_path / "towers")
    assert [p.name for p in (tmp_path / "towers").iterdir()] == [VLM]
    model = ours("E2B", base("E2B"))
    apply_lora(model, "decoder.q_proj")
    train_fully(model, "language_model.norm")
    save_adapter(model, tmp_path / "c")
    with pytest.raises(InputError, match="one kind or the other"):
        exported(base("E2B"), tmp_path / "c", tmp_path / "mixed")
    model = ours("26B", base("26B"))
    train_fully(model, "layers.0.experts")
    save_adapter(model, tmp_path / "d")
    with pytest.raises(InputError, match="experts in other stacks"):
        exported(base("26B"), tmp_path / "d", tmp_path / "experts")


def test_legacy_files_of_mlx_vlm(base, tmp_path):
    """Tensors A and B, and alpha instead of a scale, which is divided by the rank."""
    model, adapter = adapted("E2B", base("E2B"), tmp_path / "a", targets="decoder.q_proj", rank=4, alpha=2.0)
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    renamed = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        path = path.replace("model.language_model.", "language_model.model.")
        renamed[f"{path}.{leaf[-1].upper()}"] = tensor
    out = tmp_path / "legacy"
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), renamed)
    (out / "adapter_config.json").write_text(json.dumps({"rank": 4, "alpha": 2.0, "dropout": 0.1}))
    assert read_adapter(out).layout == "mlx-vlm"
    again = ours("E2B", base("E2B"))
    attach(again, out)
    assert mx.array_equal(again(input_ids=IDS), model(input_ids=IDS))
