"""What `doctor` says of whole and of damaged checkpoints, checked against transformers and against loading them."""

import shutil

import mlx.core as mx
import pytest
import tiny
import tiny_gemma3 as gemma3
import tiny_gguf
from damage import DAMAGE
from mlx.utils import tree_flatten

from gemma_mlx.__main__ import verbs
from gemma_mlx.cli import door
from gemma_mlx.full import train_fully, trained_parameters
from gemma_mlx.inspection import examine
from gemma_mlx.lora import apply_lora, lora_parameters
from gemma_mlx.models.load import load_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return tiny.make(folder), folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "copy")


def doctor(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    capsys.readouterr()
    code = door.enter(verbs, ["doctor", *map(str, arguments)], "gemma-mlx")
    return code, *capsys.readouterr()


@pytest.mark.parametrize("bits", [8, 4])
def test_sizes_are_those_of_loaded_and_quantized_models(whole, bits):
    reference, folder = whole
    found = examine(folder)
    assert not found.problems and found.family == "Gemma 4: text, pictures, speech"
    count = sum(t.numel() for n, t in reference.state_dict().items() if n != "lm_head.weight")
    assert sum(part.weights for part in found.parts.values()) == count
    tower = sum(t.numel() for n, t in reference.state_dict().items() if ".audio_tower." in n)
    assert found.parts["audio tower"].weights == tower

    def held(model):
        return sum(a.nbytes for _, a in tree_flatten(model.parameters()))

    assert sum(part.bytes for part in found.parts.values()) == held(load_model(folder))
    assert sum(part.packed[bits] for part in found.parts.values()) == held(load_model(folder, quantize=bits))


@pytest.mark.parametrize("target", ["decoder", "vision", "audio", "embedders", "all"])
def test_adapters_are_those_that_training_would_put_on(whole, target):
    found, model = examine(whole[1], rank=5), load_model(whole[1])
    layers = len(apply_lora(model, target, rank=5))
    assert found.trainable[target] == (layers, sum(w.size for w in lora_parameters(model).values()))
    assert found.by_name == ["per_layer_input_gate", "per_layer_model_projection", "per_layer_projection"]
    assert {"layer_scalar", "input_min", "embed_tokens_per_layer.weight"} <= set(found.frozen)
    assert not {"norm.weight", "embed_tokens.weight", "conv.weight"} & set(found.frozen)


@pytest.mark.parametrize("group", ["decoder", "vision", "audio", "embedders", "all"])
def test_full_counts_are_those_that_training_would_free(whole, group):
    found, model = examine(whole[1]), load_model(whole[1])
    modules = train_fully(model, group)
    assert found.full[group] == (len(modules), sum(w.size for w in trained_parameters(model).values()))


def test_the_report(checkpoint_folder, capsys):
    code, out, err = doctor(capsys, "--model", checkpoint_folder, "--rank", 4, "--read-weights")
    assert code == 0 and err == "" and out.endswith("it loads\n")
    expected = "Gemma 4: text, pictures, speech", "with a chat template; answers end at", "audio tower", "--quantize 4"
    for words in (*expected, "adapter weights at --rank 4"):
        assert words in out, words


def test_gemma3_folder_gguf_and_quantized(tmp_path, capsys):
    reference = gemma3.make(tmp_path / "float")
    path = tiny_gguf.write(tmp_path / "m.gguf", reference, {"embd.weight": "Q8_0"})
    code, out, _ = doctor(capsys, "--model", path)
    assert code == 0 and "Gemma 3: text" in out and "1 Q8_0" in out and "without a chat template" in out
    assert "'<eos>', '<end_of_turn>'" in out
    saved = dict(tree_flatten(load_model(tmp_path / "float", quantize=4).parameters()))
    mx.save_safetensors(str(tmp_path / "float" / "model.safetensors"), saved)
    found = examine(tmp_path / "float")
    assert "quantized: 33 matrices of 4 bits in groups of 64, 8 matrices of 4 bits in groups of 32" in found.facts
    count = sum(t.numel() for n, t in reference.state_dict().items() if n != "lm_head.weight")
    assert sum(part.weights for part in found.parts.values()) == count
    assert sum(part.bytes for part in found.parts.values()) == sum(a.nbytes for a in saved.values())


@pytest.mark.parametrize("case", DAMAGE)
def test_why_it_would_not_load(case, folder, capsys):
    damage, words = DAMAGE[case]
    damage(folder)
    code, out, err = doctor(capsys, "--model", folder, "--read-weights")
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert f"problem: {err.removeprefix('error: ').strip()[:60]}" in out
    assert "it loads" not in out


def test_without_a_model_it_describes_the_machine(capsys):
    code, out, _ = doctor(capsys)
    assert code == 0 and out.startswith("machine: cpu") and out.count("\n") == 1
