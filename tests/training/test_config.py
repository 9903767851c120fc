"""Every option exists once: the dataclass decides, and flags, YAML keys and keyword arguments follow it."""

import dataclasses

import pytest
import yaml

from gemma_mlx.config import FIELDS, TrainConfig, configure, convert, read_yaml
from gemma_mlx.errors import InputError

SAMPLES = {"text": "some text", "int": 3, "float": 0.5, "flag": True, "list": ["a", "b"], "mapping": {"text": "t"}}


def sample(name):
    f = FIELDS[name]
    return f.metadata["choices"][-1] if f.metadata["choices"] else SAMPLES[f.metadata["kind"]]


def as_flags(name, value):
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    if isinstance(value, dict):
        return [part for k, v in value.items() for part in (flag, f"{k}={v}")]
    return [part for v in (value if isinstance(value, list) else [value]) for part in (flag, str(v))]


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "resume"])
def test_flag_yaml_and_keyword_give_the_same_config(name, tmp_path):
    from gemma_mlx.train import parse

    value = sample(name)
    extra = {"valid": "v.csv"} if name == "patience" else {}
    extra |= {"lr": 1.0} if name == "min_lr" else {"packing": True} if name == "pack_tokens" else {}
    keyword = configure({name: value, **extra})
    assert getattr(keyword, name) == value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({name.replace("_", "-"): value, **extra}))
    flags = [part for k, v in {name: value, **extra}.items() for part in as_flags(k, v)]
    assert configure(*parse(flags)) == configure(*parse(["--config", str(tmp_path / "c.yaml")])) == keyword


def test_flags_are_the_fields_and_nothing_else():
    from gemma_mlx.train import command

    names = [p.name for p in command.params]
    assert sorted(names) == sorted([*FIELDS, "config", "demo"]) and len(set(names)) == len(names)
    helps = {p.name: p.help for p in command.params}
    for name, f in FIELDS.items():
        assert f.metadata["help"] in helps[name] and f.metadata["group"]


def test_a_flag_wins_over_the_file(tmp_path):
    from gemma_mlx.train import parse

    (tmp_path / "c.yaml").write_text("rank: 4\nlr: 1e-3\ntargets: [q_proj, v_proj]\ncolumns: {text: sentence}\n")
    config = configure(*parse(["--rank", "8", "--config", str(tmp_path / "c.yaml")]))
    assert (config.rank, config.lr, config.targets) == (8, 1e-3, "q_proj,v_proj")
    assert config.columns == {"text": "sentence"}


def test_yaml_round_trip(tmp_path):
    config = TrainConfig(model="m", data="d.csv", targets="all", lr=3.3e-5, columns={"text": "t"}, media_root=["/a b"])
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert configure(read_yaml(tmp_path / "c.yaml")) == config
    assert set(yaml.safe_load(config.to_yaml())) == set(FIELDS) - {"resume"}


@pytest.mark.parametrize(
    "values,words",
    [
        ({"learning_rat": 1}, ["learning_rat", "unknown option"]),
        ({"rnak": 1}, ["rnak", "did you mean rank"]),
        ({"rank": "x"}, ["rank", "whole number", "'x'"]),
        ({"rank": 0}, ["rank", "from 1"]),
        ({"rank": 2.5}, ["rank", "2.5"]),
        ({"rank": True}, ["rank", "True"]),
        ({"lr": "fast"}, ["lr", "number", "fast"]),
        ({"lr": float("nan")}, ["lr", "nan"]),
        ({"lr": -1}, ["lr", "at least 0"]),
        ({"schedule": "cosin"}, ["schedule", "cosine or linear or constant", "cosin"]),
        ({"image_tokens": 100}, ["image_tokens", "70 or 140"]),
        ({"dropout": 1.0}, ["dropout", "0.99"]),
        ({"columns": "text"}, ["columns", "NAME=COLUMN"]),
        ({"resume": "yes"}, ["resume", "true or false"]),
        ({"steps": [3]}, ["steps", "[3]"]),
        ({"batch_size": None}, ["batch_size", "nothing"]),
        ({"patience": 3}, ["patience", "valid"]),
        ({"lr": 1e-4, "min_lr": 1e-3}, ["min_lr", "0.0001"]),
        ({"pack_tokens": 256}, ["pack_tokens", "packing"]),
        ({"packing": True, "pack_tokens": 0}, ["pack_tokens", "at least 1"]),
        ({"packing": True, "group_by_length": True}, ["packing", "group_by_length"]),
        ({"resume": True}, ["resume", "out"]),
    ],
)
def test_bad_value_is_one_line_that_names_the_option(values, words):
    with pytest.raises(InputError) as caught:
        configure(values)
    assert all(w in str(caught.value) for w in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text,words",
    [
        ("rnak: 4", ["c.yaml", "rnak", "rank"]),
        ("rank: four", ["c.yaml: rank", "'four'"]),
        ("- a\n- b", ["c.yaml", "list"]),
        ("a: [1", ["c.yaml:1", "YAML"]),
        (None, ["c.yaml", "no such"]),
    ],
)
def test_bad_file_is_named(tmp_path, text, words):
    from gemma_mlx.train import parse

    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        configure(*parse(["--config", str(tmp_path / "c.yaml")]))
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_resume_takes_the_rest_from_the_run(tmp_path):
    stored = TrainConfig(model="m", data="d.csv", out=str(tmp_path), rank=5, steps=10)
    (tmp_path / "config.yaml").write_text(stored.to_yaml())
    resumed = configure({"resume": True, "out": str(tmp_path), "steps": 20, "rank": 5})
    assert resumed == dataclasses.replace(stored, resume=True, steps=20)
    with pytest.raises(InputError, match=r"--rank: .*started with 5, not 6"):
        configure({"resume": True, "out": str(tmp_path), "rank": 6}, {"rank": "--rank"})
    with pytest.raises(InputError, match="holds no run"):
        configure({"resume": True, "out": str(tmp_path / "x")})


def test_defaults_pass_their_own_rules():
    for name, f in FIELDS.items():
        default = getattr(TrainConfig(), name)
        assert convert(f, default, name) == default
    assert TrainConfig().adapter_alpha == 16.0 and TrainConfig(rank=4).adapter_alpha == 4.0
    assert TrainConfig(rank=4, alpha=32).adapter_alpha == 32.0
