"""PEFT's files: transformers with PEFT computes what this library does, and what PEFT wrote comes back bit for bit."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from adapter_pairs import MAKERS, adapted, batches, difference, made_once, ours, randomise, theirs
from safetensors.torch import load_file, save_file

from gemma_mlx.adapters.attach import attach
from gemma_mlx.adapters.reading import read_adapter
from gemma_mlx.adapters.writing import save
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.exporting.peft import write
from gemma_mlx.full import train_fully, trained_places
from gemma_mlx.lora import apply_lora, load_adapter, lora_layers, save_adapter
from gemma_mlx.models.load import load_model

BOUND = 2e-4  # absolute, of logits of scale 1
FAST = ("E2B", "Gemma 3")


def slowly(names):
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(family) -> its folder, made once."""
    return made_once(tmp_path_factory, lambda name, folder: MAKERS[name](str(folder)))


def exported(folder, adapter, out, **options):
    out.mkdir()
    return write(Source(folder, "some/base", "v1", adapter=adapter), out, ExportOptions(**options))


def with_peft(folder, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(theirs(folder), adapter).eval()


@pytest.mark.parametrize("name", slowly(MAKERS))
@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_transformers_with_peft_computes_the_same(base, tmp_path, name, dora):
    """Adapters on every linear, in the decoder, its per-layer parts, towers inside their clips, embedders, router."""
    model, adapter = adapted(name, base(name), tmp_path / "adapter", dora=dora)
    exported(base(name), adapter, tmp_path / "peft")
    reference = with_peft(base(name), tmp_path / "peft")
    on = {path.removeprefix("base_model.model.") for path, m in reference.named_modules() if hasattr(m, "lora_A")}
    assert on == set(lora_layers(model))
    for what, inputs in batches(name).items():
        found = tiny.reference_logits(reference, inputs)
        apart = difference(model(**inputs), found, inputs)
        print(f"{name}, {what}, dora {dora}: {apart:.1e}")
        assert apart <= BOUND, what
        with reference.disable_adapter():
            assert difference(tiny.reference_logits(reference, inputs), found, inputs) > 0.5, what


def test_config_says_what_peft_needs(base, tmp_path):
    _, adapter = adapted("E2B", base("E2B"), tmp_path / "adapter", targets="audio.q_proj,decoder.q_proj")
    lines = exported(base("E2B"), adapter, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, "some/base")
    assert (config["revision"], config["task_type"], config["bias"]) == ("v1", "CAUSAL_LM", "none")
    assert len(config["target_modules"]) == 12 and all(p.startswith("model.") for p in config["target_modules"])
    assert sum("audio_tower" in path for path in config["target_modules"]) == 2 and "12 layers" in lines[0]
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    "name,full,targets",
    [
        ("E2B", "embed_audio,audio_tower.layers.0,language_model.norm,conv,decoder.layers.9.mlp", "decoder.q_proj"),
        ("Gemma 3", "embed_tokens,layers.1", "layers.0.self_attn.q_proj"),
        pytest.param("26B", "experts,layers.0.self_attn", "layers.3.self_attn.q_proj", marks=pytest.mark.slow),
    ],
)
def test_modules_trained_in_full(base, tmp_path, name, full, targets):
    """As PEFT's modules_to_save: linears, norms, convolutions (in torch's axes), experts, the tied embedding."""
    model = ours(name, base(name))
    apply_lora(model, targets, 3, 6.0)
    randomise(model)
    train_fully(model, full)
    rng = np.random.default_rng(0)
    for tensor, place in trained_places(model).items():
        if "lora" not in tensor:
            noise = mx.array(rng.standard_normal(place.get().shape).astype(np.float32))
            place.put(place.get() * (1 + 0.1 * noise))
    save_adapter(model, tmp_path / "adapter")
    exported(base(name), tmp_path / "adapter", tmp_path / "peft")
    reference = with_peft(base(name), tmp_path / "peft")
    for inputs in batches(name).values():
        assert difference(model(**inputs), tiny.reference_logits(reference, inputs), inputs) <= BOUND
    again = ours(name, base(name))
    load_adapter(again, tmp_path / "peft")
    inputs = batches(name)["text"]
    assert mx.array_equal(again(**inputs), model(**inputs))


def made_by_peft(folder, out, dtype=torch.float32, **options):
    """A random adapter that PEFT made and saved; transformers' model with it on."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = get_peft_model(theirs(folder), config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                if "magnitude" in name:
                    p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
                else:
                    p.copy_(0.5 * torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
                p.copy_(p.to(dtype))
    model.save_pretrained(out)
    if dtype != torch.float32:
        tensors = {name: t.to(dtype) for name, t in load_file(out / "adapter_model.safetensors").items()}
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return model.eval()


MADE = {
    "decoder": dict(target_modules=r".*language_model.*\.(q_proj|down_proj)"),
    "rank_pattern": dict(
        target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj)",
        rank_pattern={"v_proj": 7, r"layers\.[0-2]\.self_attn\.q_proj": 3}, alpha_pattern={"o_proj": 11},
    ),
    "rslora": dict(
        target_modules=r".*language_model.*\.(q_proj|up_proj)|.*vision_tower.*q_proj\.linear",
        rank_pattern={"up_proj": 3}, use_rslora=True,
    ),
    "dora": dict(target_modules=r".*language_model.*\.k_proj|.*audio_tower.*\.q_proj\.linear", use_dora=True),
    "modules": dict(target_modules=r".*language_model.*\.k_proj", modules_to_save=["embed_audio", "norm_out"]),
}  # fmt: skip


QUICK = (("rank_pattern", torch.float32), ("rslora", torch.bfloat16))
EVERY = [(kind, dtype) for kind in MADE for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    "kind,dtype", [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERY]
)
def test_what_peft_wrote_comes_back_bit_for_bit(base, tmp_path, kind, dtype):
    from peft import LoraConfig

    folder = base("E2B")
    reference = made_by_peft(folder, tmp_path / "made", dtype, **MADE[kind])
    exported(folder, tmp_path / "made", tmp_path / "again")
    save(read_adapter(tmp_path / "made"), tmp_path / "own") if kind != "modules" else None
    before = load_file(tmp_path / "made" / "adapter_model.safetensors")
    ways = ["again"]
    if kind != "modules":  # PEFT's modules hold tensors that never train, which this library's folder leaves out
        exported(folder, tmp_path / "own", tmp_path / "through")
        ways.append("through")
    scales = {n: m.scaling["default"] for n, m in reference.named_modules() if hasattr(m, "lora_A")}
    for way in ways:
        after = load_file(tmp_path / way / "adapter_model.safetensors")
        assert before.keys() == after.keys() and len(before) > 5
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype == dtype and tensor.shape == after[name].shape
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
        config = LoraConfig.from_pretrained(tmp_path / way)
        loaded = with_peft(folder, tmp_path / way)
        again = {n: m.scaling["default"] for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
        assert again.keys() == scales.keys() and config.use_rslora == (kind == "rslora" and way == "again")
        assert all(abs(again[n] - s) <= (0 if way == "again" else 1e-15) for n, s in scales.items())
    model = ours("E2B", folder)
    attach(model, tmp_path / "made")
    inputs = batches("E2B")["media"]
    assert difference(model(**inputs), tiny.reference_logits(loaded, inputs), inputs) <= BOUND


def test_of_a_quantized_base(base, tmp_path):
    """The file of a 4-bit run is an ordinary one; the adapter is the same tensors."""
    model = load_model(base("E2B"), quantize=4)
    apply_lora(model, "decoder", 3, 6.0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", options={"quantize": 4})
    out = tmp_path / "peft"
    out.mkdir()
    source = Source(base("E2B"), "some/base", adapter=tmp_path / "adapter", remembered={"quantize": 4})
    assert any("4 bits" in line for line in write(source, out, ExportOptions()))
    tensors = load_file(out / "adapter_model.safetensors")
    for path, layer in lora_layers(model).items():
        assert np.array_equal(tensors[f"base_model.model.{path}.lora_A.weight"].numpy(), np.array(layer.lora_a).T)
        assert np.array_equal(tensors[f"base_model.model.{path}.lora_B.weight"].numpy(), np.array(layer.lora_b).T)
    reference, plain = with_peft(base("E2B"), out), ours("E2B", base("E2B"))
    attach(plain, out)
    inputs = batches("E2B")["text"]
    assert difference(plain(**inputs), tiny.reference_logits(reference, inputs), inputs) <= BOUND
    again = load_model(base("E2B"), quantize=4)
    attach(again, out)
    assert mx.array_equal(again(**inputs), model(**inputs))


def test_towers_merged_into_a_base_beside_it(base, tmp_path):
    """For programs that put adapters on the decoder alone: the same logits from base/ with the decoder's part."""
    model, adapter = adapted(
        "E2B", base("E2B"), tmp_path / "adapter", targets="q_proj,embed_audio.embedding_projection"
    )
    lines = exported(base("E2B"), adapter, tmp_path / "peft", merge_towers=True)
    assert "5 layers of towers and embedders are merged" in lines[0]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["revision"] is None
    assert len(config["target_modules"]) == 10 and all("language_model" in path for path in config["target_modules"])
    reference = with_peft(tmp_path / "peft" / "base", tmp_path / "peft")
    inputs = batches("E2B")["media"]
    assert difference(model(**inputs), tiny.reference_logits(reference, inputs), inputs) <= BOUND
    _, adapter = adapted("E2B", base("E2B"), tmp_path / "towers", targets="audio.q_proj")
    with pytest.raises(InputError, match="all of this adapter is in towers"):
        exported(base("E2B"), adapter, tmp_path / "none", merge_towers=True)
    _, adapter = adapted("Gemma 3", base("Gemma 3"), tmp_path / "text", targets="q_proj")
    exported(base("Gemma 3"), adapter, tmp_path / "alone", merge_towers=True)
    assert not (tmp_path / "alone" / "base").exists()


def test_an_adapter_of_the_text_model_alone(base, tmp_path):
    """transformers' Gemma4ForCausalLM names its layers without `language_model`; they are found in the whole model."""
    model, adapter = adapted("E2B", base("E2B"), tmp_path / "adapter", targets="decoder.q_proj")
    exported(base("E2B"), adapter, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = {name.replace(".language_model.", "."): t for name, t in load_file(path).items()}
    assert all(".model.model.layers." in name for name in tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    again = ours("E2B", base("E2B"))
    assert attach(again, tmp_path / "peft") == list(lora_layers(model))
    inputs = batches("E2B")["text"]
    assert mx.array_equal(again(**inputs), model(**inputs))


def test_dtype_of_the_file(base, tmp_path):
    _, adapter = adapted("Gemma 3", base("Gemma 3"), tmp_path / "adapter", targets="q_proj")
    exported(base("Gemma 3"), adapter, tmp_path / "peft", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "peft" / "adapter_model.safetensors").values()} == {torch.bfloat16}


BAD = {
    "another kind": (lambda c, t: c.update(peft_type="IA3"), "peft_type 'IA3'"),
    "biases": (lambda c, t: c.update(bias="all"), "bias 'all'"),
    "adapter biases": (lambda c, t: c.update(lora_bias=True), "lora_bias is set"),
    "transposed": (lambda c, t: c.update(fan_in_fan_out=True), "fan_in_fan_out is set"),
    "parameters": (lambda c, t: c.update(target_parameters=["experts.down_proj"]), "target_parameters is set"),
    "replicated": (lambda c, t: c.update(layer_replication=[[0, 2]]), "layer_replication is set"),
    "a moved base": (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), "changed the base's weights"),
    "another rank": (lambda c, t: c.update(r=5), "says rank 5"),
    "half a layer": (lambda c, t: t.pop(next(n for n in t if "lora_B" in n)), "lora_B"),
    "no lengths": (lambda c, t: c.update(use_dora=True), "lora_magnitude_vector"),
    "an embedding": (
        lambda c, t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 9)}), "embeddings"
    ),
    "a layer unknown": (
        lambda c, t: t.update({n.replace("layers.0.", "layers.77."): v for n, v in list(t.items())}), "layers.77"
    ),
    "a tensor unknown": (lambda c, t: t.update({"base_model.model.model.x.weight": torch.zeros(2)}), "belongs to no"),
    "other sizes": (
        lambda c, t: t.update({n: torch.zeros(4, 65) for n in t if n.endswith("q_proj.lora_A.weight")}), "(4, 65)"
    ),
    "nothing": (lambda c, t: (t.clear(), t.update(x=torch.zeros(1))), "belongs to no"),
    "no number": (lambda c, t: c.update(r="many"), "not an adapter's config"),
}  # fmt: skip


@pytest.fixture(scope="module")
def peft_folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    made_by_peft(base("Gemma 3"), folder, target_modules=["q_proj", "o_proj"])
    return folder


@pytest.mark.parametrize("damage", BAD)
def test_what_cannot_be_applied_is_one_clear_line(base, peft_folder, tmp_path, damage):
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change, words = BAD[damage]
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    model = ours("Gemma 3", base("Gemma 3"))
    with pytest.raises(InputError) as caught:
        attach(model, folder)
    assert words in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not lora_layers(model)


def test_a_pickle_is_refused(peft_folder, tmp_path):
    folder = shutil.copytree(peft_folder, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="a pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors is missing"):
        read_adapter(folder)


def test_of_another_base(base, peft_folder):
    """The base that it was made for is named."""
    with pytest.raises(InputError, match="it was trained on"):
        attach(ours("E2B", base("E2B")), peft_folder)


def test_a_lower_rank_says_what_it_costs(base, tmp_path):
    """The error in the line is that of the layer that suffers most, by NumPy."""
    model, adapter = adapted("Gemma 3", base("Gemma 3"), tmp_path / "adapter", targets="q_proj,o_proj", rank=5)
    lines = exported(base("Gemma 3"), adapter, tmp_path / "peft", adapter_rank=2)
    small, errors = read_adapter(tmp_path / "peft"), []
    for path, layer in lora_layers(model).items():
        product = np.array(layer.lora_a, np.float64) @ np.array(layer.lora_b, np.float64)
        kept = small.layers[path]
        found = kept.scale / layer.scale * (np.array(kept.a, np.float64) @ np.array(kept.b, np.float64))
        assert kept.rank == 2
        errors.append(np.linalg.norm(product - found) / np.linalg.norm(product))
    assert lines[0].startswith("16 layers brought to rank 2") and lines[0].endswith(f"{max(errors):.1e}")
    from gemma_mlx.exporting import mlx

    (tmp_path / "mlx").mkdir()
    source = Source(base("Gemma 3"), "some/base", adapter=adapter)
    assert lines[0] in mlx.write(source, tmp_path / "mlx", ExportOptions(adapter_rank=2))


def test_needs_an_adapter(base, tmp_path):
    with pytest.raises(InputError, match="no adapter to write"):
        write(Source(base("E2B"), "x"), tmp_path, ExportOptions())
