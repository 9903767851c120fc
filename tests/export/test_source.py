"""Which adapter a run, finished or not, is exported with."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from gemma_mlx import checkpoint
from gemma_mlx.errors import InputError
from gemma_mlx.exporting.source import find_source
from gemma_mlx.loop import finetune
from gemma_mlx.lora import apply_lora, load_adapter, lora_layers, save_adapter
from gemma_mlx.models.load import load_model

FAST = dict(quiet=True, rank=2, batch_size=3, image_tokens=70, lr=1e-2, keep=9)


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_MLX_COMPILE", "off")
        yield


@pytest.fixture(scope="module")
def made(checkpoint_folder, rows, tmp_path_factory):
    """A run without validation, DoRA and modules in full, with a checkpoint at every step."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    finetune(
        str(checkpoint_folder), data=rows / "train.csv", out=out, steps=3, save_every=1, alpha=5.0, dora=True,
        full="norm,embed_vision", targets="decoder.q_proj,audio.q_proj", system="Be brief.", **FAST,
    )  # fmt: skip
    return out


@pytest.fixture
def run(made, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def unfinished(run):
    shutil.rmtree(run / "adapter")
    (run / "report.json").unlink()
    return run


def damage(folder):
    path = folder / checkpoint.ADAPTER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def content(folder):
    return {name: np.array(a) for name, a in mx.load(str(folder / "adapters.safetensors")).items()}


def test_a_finished_run_has_its_last_adapter(run, checkpoint_folder):
    source = find_source(run)
    assert source.adapter == run / "adapter" and source.step == 3 and source.run == run
    assert source.base == checkpoint_folder and source.remembered["system"] == "Be brief."
    assert "adapter of step 3, its last" in source.told[0]


def test_the_newest_checkpoint_is_the_adapter_that_the_run_would_have_saved(run, made, checkpoint_folder):
    """Bit for bit, with scale, DoRA's lengths and modules in full; the folder goes when nobody holds the source."""
    source = find_source(unfinished(run))
    assert source.step == 3 and "checkpoint of step 3, the newest whole one" in source.told[-1]
    ours, saved = content(source.adapter), content(made / "adapter")
    assert ours.keys() == saved.keys() and all(np.array_equal(ours[k], saved[k]) for k in saved)
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (source.adapter, made / "adapter")]
    assert configs[0] == configs[1]
    assert dict(source.remembered) == dict(find_source(made).remembered)
    models = [load_model(checkpoint_folder) for _ in range(2)]
    for model, folder in zip(models, (source.adapter, made / "adapter"), strict=True):
        load_adapter(model, folder)
    ids = np.arange(30, 60)[None]
    assert mx.array_equal(*(model(input_ids=ids) for model in models)).item()
    kept = source.adapter
    del source
    assert not kept.exists()


def test_damaged_checkpoints_are_passed_over_with_a_warning(run):
    steps = sorted((unfinished(run) / "checkpoints").iterdir())
    damage(steps[2])
    source = find_source(run)
    assert source.step == 2 and "skipped a damaged checkpoint" in source.told[0] and "step-000003" in source.told[0]
    damage(steps[1]), damage(steps[0])
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        find_source(run)


def test_a_step_can_be_chosen(run):
    assert find_source(run, step=2).step == 2
    sources = [find_source(run, step=s) for s in (1, 2)]
    first, second = (content(source.adapter) for source in sources)
    assert any(not np.array_equal(first[name], second[name]) for name in first if name.endswith("lora_b"))
    with pytest.raises(InputError, match=r"step 7: .* has no such checkpoint; there are: 1, 2, 3"):
        find_source(run, step=7)
    damage(run / "checkpoints" / "step-000002")
    with pytest.raises(InputError, match=r"step 2: .*bytes changed.*choose another"):
        find_source(run, step=2)


def test_checkpoints_newer_than_a_finished_run_without_validation_win(run):
    report = json.loads((run / "report.json").read_text()) | {"steps": 2}
    (run / "report.json").write_text(json.dumps(report))  # as a run of two steps that was resumed for more
    source = find_source(run)
    assert source.step == 3 and source.adapter != run / "adapter"


def test_the_best_by_validation_even_where_the_run_goes_on(run):
    lines = [{"step": s, "valid_loss": v} for s, v in ((1, 2.5), (2, 1.5), (3, 1.5), (4, 1.75))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "val')
    assert find_source(run).step == 2
    (run / "report.json").unlink()
    source = find_source(run)
    assert source.step == 2 and source.adapter == run / "adapter"
    assert "the best by validation; the run is not finished" in source.told[0]


def test_the_runs_own_validation_agrees(checkpoint_folder, rows, tmp_path):
    run = finetune(
        str(checkpoint_folder), data=rows / "train.csv", valid=rows / "valid.csv", out=tmp_path / "run", steps=5,
        eval_every=1, save_every=0, **FAST | dict(lr=1.0),
    )  # fmt: skip
    assert run.report["best_step"] == find_source(tmp_path / "run").step < 5  # a rate at which it soon gets worse


def test_an_adapter_or_a_model_without_a_run(made, checkpoint_folder, tmp_path):
    source = find_source(adapter=made / "adapter")
    assert source.base == checkpoint_folder and source.run is None and source.step is None
    assert find_source(model=checkpoint_folder).adapter is None
    shutil.copytree(checkpoint_folder, tmp_path / "moved")
    assert find_source(made, model=tmp_path / "moved").base == tmp_path / "moved"


def test_several_adapters_become_their_sum(checkpoint_folder, tmp_path):
    for i in range(2):
        model = load_model(checkpoint_folder)
        apply_lora(model, "decoder.q_proj", 2 + i, 4.0, seed=i)
        for layer in lora_layers(model).values():
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(i))
        save_adapter(model, tmp_path / str(i))
    pair = [tmp_path / "0", tmp_path / "1"]
    source = find_source(adapter=pair, model=checkpoint_folder, adapter_weights=[0.5, 2.0])
    from gemma_mlx.adapters.attach import attach

    whole, parts = load_model(checkpoint_folder), load_model(checkpoint_folder)
    attach(whole, source.adapter), attach(parts, pair, [0.5, 2.0])
    ids = np.arange(30, 60)[None]
    assert mx.abs(whole(input_ids=ids) - parts(input_ids=ids)).max().item() < 1e-5


@pytest.mark.parametrize(
    "what, told",
    [
        (dict(), "nothing was named"),
        (dict(run="here", adapter="there"), "a run or an adapter, not both"),
        (dict(step=3, model="m"), "checkpoints belong to a run"),
        (dict(run="nowhere"), "no run here"),
        (dict(adapter="nowhere"), "no adapter here"),
        (dict(model="nowhere"), "no such folder"),
    ],
)
def test_refusals(what, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        find_source(**what)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_whose_base_has_moved(run, checkpoint_folder):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(checkpoint_folder), "bases/moved"))
    with pytest.raises(InputError, match=r"its base cannot be found .*--model"):
        find_source(run=run)
    assert find_source(run=run, model=checkpoint_folder).adapter == run / "adapter"


def test_a_run_that_has_saved_nothing_yet(run):
    shutil.rmtree(unfinished(run) / "checkpoints")
    with pytest.raises(InputError, match="neither an adapter nor a checkpoint yet"):
        find_source(run)
