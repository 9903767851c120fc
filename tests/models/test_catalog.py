"""Names and shapes of every published checkpoint against transformers', and the table in docs/."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.models.families import build
from gemma_mlx.models.names import to_torch_axes
from gemma_mlx.spec import read_spec

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # tensors of a state_dict without the tied head, 10⁹ parameters
    "gemma-4-E2B": (1951, 5.104), "gemma-4-E4B": (2076, 7.941), "gemma-4-12B": (677, 11.960),
    "gemma-4-26B-A4B": (1013, 25.806), "gemma-4-31B": (1188, 31.273), "gemma-3n-E2B": (1526, 5.418),
    "gemma-3n-E4B": (1631, 7.819), "gemma-3-270m": (236, 0.268), "gemma-3-1b": (340, 1.000),
}  # fmt: skip


def reference(config):
    """transformers' (configuration, state_dict names and shapes) for a config.json, nothing allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(**json.loads(json.dumps(config)))
    auto = AutoModelForCausalLM if config.model_type == "gemma3_text" else AutoModelForImageTextToText
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in auto.from_config(config).state_dict().items()}
    del shapes["lm_head.weight"]
    return config, shapes


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_and_shapes(name):
    """Every tensor as transformers lays it out; its whole configuration, spelt its way, is read alike."""
    config, theirs = reference(CHECKPOINTS[name])
    spec = read_spec(CHECKPOINTS[name])
    ours = {}
    for path, array in tree_flatten(build(spec).parameters()):
        axes = to_torch_axes(path, array.ndim)
        ours[path] = tuple(array.shape) if axes is None else tuple(array.shape[a] for a in axes)
    assert ours == theirs
    assert (len(ours), round(sum(map(np.prod, ours.values())) / 1e9, 3)) == PUBLISHED[name]
    whole = read_spec(json.loads(config.to_json_string(use_diff=False)))
    assert (whole.text, whole.vision, whole.audio) == (spec.text, spec.vision, spec.audio)


def test_the_table_in_docs_is_this_one():
    """Made anew by benchmarks/checkpoints.py."""
    table = runpy.run_path(str(ROOT / "benchmarks" / "checkpoints.py"))["table"]()
    assert table in (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
