"""Model cards: what the Hub reads in their header, and what they must not tell."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gemma_mlx.config import TrainConfig
from gemma_mlx.errors import InputError
from gemma_mlx.exporting import mlx, peft
from gemma_mlx.exporting.card import write_card
from gemma_mlx.exporting.options import ExportOptions, Source
from gemma_mlx.lora import apply_lora, save_adapter
from gemma_mlx.models.load import load_model

DEMO = Path(__file__).parents[2] / "gemma_mlx" / "demo" / "checkpoint"
SECRET = "/home/somebody/secret"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(DEMO)
    apply_lora(model, "decoder.q_proj", 2, 3.0)
    return save_adapter(model, folder)


@pytest.fixture
def run(tmp_path):
    """A run's folder with what a card reads."""
    run = tmp_path / "run"
    run.mkdir()
    config = dataclasses.replace(
        TrainConfig(), model=f"{SECRET}/base", data=f"{tmp_path}/data/train.csv", out=f"{SECRET}/run", rank=2, lr=3e-4,
        system="You work for Somebody", audio_prompt="Somebody speaks",
    )  # fmt: skip
    (run / "config.yaml").write_text(config.to_yaml())
    report = {"steps": 7, "best_step": 5, "best_valid_loss": 0.1234, "final_loss": 0.2, "tokens": 1234, "bad_rows": 1}
    (run / "report.json").write_text(json.dumps(report | {"label_tokens": 99, "config": {"data": SECRET}}))
    lines = [{"step": i, "rows": [f"{SECRET}.csv:{i}", f"{SECRET}.csv:1"]} for i in range(1, 4)]
    (run / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ro')
    (tmp_path / "data").mkdir()
    prepared = {"audio": {"clips": 3, "hours": 0.5}, "images": {"pictures": 12}, "languages": {"de": 5, "en": 3}}
    (tmp_path / "data" / "report.json").write_text(json.dumps({"data": SECRET, "train": prepared}))
    return run


def card(folder, source, form="hf", scores=None, **options):
    """(metadata as the Hub reads it, whole text)."""
    write_card(folder, source, form, ExportOptions(**options), scores)
    found = ModelCard.load(folder / "README.md")
    found.data.to_dict()
    return found.data, found.text


def test_a_run_with_everything(run, adapter, tmp_path):
    (tmp_path / "scores").mkdir()
    scores = {"transcripts": 40, "wer": 0.125, "cer": 0.05, "normalizer": "whisper (whisper-normalizer 0.1)"}
    intervals = {"level": 0.95, "wer": [0.1, 0.15], "cer": {"low": 0.04, "high": 0.06}}
    (tmp_path / "scores" / "report.json").write_text(json.dumps(scores | {"intervals": intervals}))
    source = Source(DEMO, "google/gemma-4-E2B-it", "abc123", adapter, run, 5)
    data, text = card(tmp_path, source, scores=tmp_path / "scores")
    assert data.base_model == "google/gemma-4-E2B-it" and data.license == "apache-2.0"
    assert data.library_name == "transformers" and data.pipeline_tag == "image-text-to-text"
    assert data.language == ["de", "en"] and {"gemma", "lora"} <= set(data.tags)
    for said in (
        "`abc123`", "step 5", "- rows: 3", "- seconds of audio: 1,800", "- pictures: 12", "de 5, en 3", "| rank | 2 |",
        "| lr | 0.0003 |", "validation loss: 0.1234 (step 5)", "| word error rate | 0.125 | 0.1 to 0.15 |",
        "| character error rate | 0.05 | 0.04 to 0.06 |", "40 transcripts", "whisper-normalizer", "from_pretrained",
    ):  # fmt: skip
        assert said in text, said
    assert "ecret" not in text and "omebody" not in text and str(tmp_path) not in text


def test_a_base_named_by_a_path_is_not_named_to_the_hub(adapter, tmp_path):
    data, text = card(tmp_path, Source(DEMO, str(DEMO), None, adapter))
    assert data.base_model is None and data.license is None
    assert str(DEMO.parent) not in text and "Base: checkpoint (named by a path" in text
    assert "do not say under which licence" in text and "rank 2, scale 1.5" in text


@pytest.mark.parametrize("form", [peft, mlx])
def test_no_file_of_an_adapter_holds_the_path_of_its_base(form, adapter, tmp_path):
    form.write(Source(DEMO, str(DEMO), None, adapter), tmp_path, ExportOptions())
    configs = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert configs and all(str(DEMO.parent) not in text and '"checkpoint"' in text for text in configs)


@pytest.mark.parametrize(
    "kind, header, expected",
    [("gemma3n", None, "gemma"), ("gemma4", None, None), ("gemma4", "license: mit", "mit"),
     ("gemma3n", "license: mit", "mit"), ("gemma4", "license: [", None), ("gemma4", "x: 1", None)],
)  # fmt: skip
def test_the_licence_is_the_bases_or_none(kind, header, expected, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    if header:
        (base / "README.md").write_text(f"---\n{header}\n---\n# Base\n")
    if kind != "gemma4":
        from gemma_mlx.exporting import card as module

        spec = dataclasses.replace(module.read_spec(base), config={"model_type": kind})
        monkeypatch.setattr(module, "read_spec", lambda _: spec)
    data, text = card(tmp_path, Source(base, str(base)))
    assert data.license == expected
    assert ("ai.google.dev/gemma/terms" in text) == (expected == "gemma")


@pytest.mark.parametrize(
    "form, options, library, said",
    [
        ("peft", {}, "peft", "PeftModel.from_pretrained(base"),
        ("mlx", {}, "mlx", "--adapter-path mlx-vlm"),
        ("gguf", {}, "gguf", "llama-mtmd-cli -m m.gguf --mmproj mmproj-m.gguf"),
        ("hf", {"bits": 4}, "mlx", "packed in 4 bits"),
    ],
)
def test_each_format_says_how_it_is_used(form, options, library, said, adapter, tmp_path):
    (tmp_path / "mlx-vlm").mkdir()
    if form == "gguf":
        (tmp_path / "m.gguf").touch(), (tmp_path / "mmproj-m.gguf").touch()
    data, text = card(tmp_path, Source(DEMO, "google/gemma-4-E2B-it", None, adapter), form, **options)
    assert data.library_name == library and said in text


def test_a_public_dataset_is_named_and_scores_must_be_there(run, adapter, tmp_path):
    text = (run / "config.yaml").read_text().replace(f"{tmp_path}/data/train.csv", "hf://datasets/o/n@main/en")
    (run / "config.yaml").write_text(text)
    source = Source(DEMO, "google/gemma-4-E2B-it", None, adapter, run, 5)
    assert card(tmp_path, source)[0].datasets == ["o/n"]
    with pytest.raises(InputError, match=r"--scores .*run: holds no evaluation's report.json with scores"):
        card(tmp_path, source, scores=run)
