"""Every option of a training run, once: its name, type, default, range and help.

The command line's flags, the keys of a ``--config`` file and the keyword arguments of ``finetune`` are all derived
from the fields of ``TrainConfig``; nothing else in the library has a default for them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gemma_mlx.errors import InputError

CONFIG_FILE = "config.yaml"
METRICS, LEDGER, REPORT = "metrics.jsonl", "rows.jsonl", "report.json"
ADAPTER = "adapter"
"""Files of a run's folder, and the folder of its adapter."""
"""A run's options, in its folder."""
NO_TARGETS = "none"
"""For ``targets``: no adapters."""
NO_MASTERS = "none"
"""For ``master_weights``: no float32 copy."""


def option(
    default: Any,
    kind: str,
    group: str,
    help: str,
    *,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    high: float | None = None,
    resumable: bool = False,
) -> Any:
    """A field with its rules. ``kind``: text, int, float, flag, list (repeatable) or mapping (name=value, repeatable).

    ``low`` and ``high`` are inclusive. ``resumable``: may differ when a run is resumed, because it does not change
    what the finished steps computed.
    """
    rules = {"kind": kind, "group": group, "help": help, "choices": choices, "low": low, "high": high}
    rules |= {"resumable": resumable, "optional": default is None}
    if kind in ("list", "mapping"):
        return field(default_factory=list if kind == "list" else dict, metadata=rules)
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class TrainConfig:
    """The options of one run. Values are converted and checked on construction; a bad one raises InputError."""

    model: str | None = option(None, "text", "run", "Checkpoint: a folder, a GGUF file (Gemma 3) or a Hub id.")
    data: str | None = option(
        None, "text", "run",
        "Training rows: a CSV, TSV, JSONL, Parquet, tar or text file, a folder, a pattern, an https, gs, hf or bq URL, "
        "or a mixture (mix.yaml).",
    )  # fmt: skip
    valid: str | None = option(None, "text", "run", "Validation rows, alike; without them the last adapter is kept.")
    out: str | None = option(None, "text", "run", "Run folder; must not hold a run yet, unless --resume is given.")
    resume: bool = option(
        False, "flag", "run", "Go on from the newest whole checkpoint in --out; other options come from that run."
    )

    media_root: list[str] = option(  # noqa: RUF009
        None, "list", "data", "Folder where media may lie besides the CSV's own folder; repeatable."
    )
    columns: dict[str, str] = option(  # noqa: RUF009
        None, "mapping", "data", "Read NAME (text, audio_path, ...) from COLUMN; repeatable; 'NAME=' leaves it unread."
    )
    audio_prompt: str | None = option(None, "text", "data", "Instruction beside a clip; default: a transcription one.")
    image_prompt: str | None = option(None, "text", "data", "Instruction beside a picture that has no question.")
    system: str | None = option(None, "text", "data", "System turn put before every row.")
    image_tokens: int | None = option(
        None,
        "int",
        "data",
        "Soft tokens a picture may take; default: the checkpoint's.",
        choices=(70, 140, 280, 560, 1120),
    )
    long_audio: str = option(
        "error", "text", "data", "Clips over 30 s: stop with an error, or keep the first 30 s.",
        choices=("error", "truncate"),
    )  # fmt: skip
    train_on: str = option("all", "text", "data", "Model turns that count in the loss.", choices=("all", "last"))
    text_rows: str = option(
        "line", "text", "data", "What is a row of a .txt file.", choices=("line", "paragraph", "document")
    )
    patches: str | None = option(
        None, "text", "data",
        "Folder of corrections by id: override_text_perfect, override_text_verbatim, do_not_blacklist, delete.",
    )  # fmt: skip
    language_mode: str | None = option(
        None, "text", "data", "Languages of rows: strict, mixed or override:XX (docs/data.md); default: as given."
    )
    allow_host: list[str] = option(  # noqa: RUF009
        None, "list", "data",
        "A host that rows' URLs may name although its address is private; hosts in --data, --valid and --media-root "
        "may be; repeatable.",
    )  # fmt: skip
    media_cache_gb: float = option(
        20.0, "float", "data", "Most gigabytes of remote media kept on disk, the longest unused go first.",
        low=0.01, resumable=True,
    )  # fmt: skip
    media_cache_dir: str | None = option(
        None, "text", "data", "Their folder; default: gemma_mlx/media in the user's cache folder.", resumable=True
    )

    train_split: str = option("train", "text", "reading", "Split of --data, where it has several.")
    valid_split: str = option("validation", "text", "reading", "Split of --valid, where it has several.")
    check: str = option(
        "auto", "text", "reading",
        "Rows whose text and media headers are read before the first step: all, some (a sample; the others when their "
        "turn comes), or all of up to 20,000 rows on this machine and some of others (auto).",
        choices=("auto", "all", "some"),
    )  # fmt: skip
    on_bad_row: str = option(
        "stop", "text", "reading", "Bad rows: stop, or skip them and list them in bad_rows.csv; the others stay where "
        "they are.", choices=("stop", "skip"),
    )  # fmt: skip
    max_bad_rows: float = option(
        0.05, "float", "reading", "Stop when more than this part of the rows is bad.", low=0.0, high=1.0, resumable=True
    )
    workers: int = option(2, "int", "reading", "Threads that make batches.", low=1, high=256, resumable=True)
    read_ahead_mb: float = option(
        1024.0, "float", "reading", "Most megabytes of batches made ahead.", low=0.0, resumable=True
    )

    dtype: str | None = option(
        None,
        "text",
        "model",
        "Dtype of the base; default: the checkpoint's own on a GPU, float32 on a CPU (its bfloat16 is slow).",
        choices=("bfloat16", "float32"),
    )
    audio_window: int = option(
        12, "int", "model", "Keys an audio frame attends to: 12 as in transformers, 13 as in Google's release.",
        choices=(12, 13),
    )  # fmt: skip
    quantize: int | None = option(
        None, "int", "model", "Bits of the decoder's frozen matrices (QLoRA); default: what the checkpoint holds.",
        choices=(4, 6, 8),
    )  # fmt: skip
    allow_unexpected: bool = option(False, "flag", "model", "Ignore checkpoint tensors that the model does not have.")

    init_adapter: str | None = option(
        None, "text", "adapter",
        "Go on training this adapter (a run's, PEFT's, mlx-lm's or mlx-vlm's folder, or a Hub id); its rank, alpha, "
        "targets and kind hold.",
    )  # fmt: skip
    targets: str = option(
        "decoder", "text", "adapter",
        "Layers that get an adapter: names (q_proj, audio.q_proj) or groups (decoder, vision, audio, embedders, all), "
        "comma separated; none with --full alone.",
    )  # fmt: skip
    full: str | None = option(
        None, "text", "adapter",
        "Modules whose own weights train, beside the adapters: names (embed_audio, layers.3.mlp) or groups, comma "
        "separated.",
    )  # fmt: skip
    master_weights: str = option(
        "float32", "text", "adapter",
        "Keep weights that train in full in float32 beside the bfloat16 base; none keeps them in bfloat16 alone, with "
        "stochastic rounding (4 bytes less for a weight).",
        choices=("float32", NO_MASTERS),
    )  # fmt: skip
    rank: int = option(16, "int", "adapter", "Rank of the adapters.", low=1, high=4096)
    alpha: float | None = option(
        None, "float", "adapter", "The adapter counts alpha/rank times; default: the rank (Google's recipe: 16 at 16).",
        low=0.0,
    )  # fmt: skip
    dora: bool = option(False, "flag", "adapter", "DoRA: also learn the length of each adapted row.")
    dropout: float = option(0.0, "float", "adapter", "Dropout on the adapters' input.", low=0.0, high=0.99)

    epochs: float = option(
        3.0, "float", "training", "Passes over the data, unless --steps is given.", low=0.0, resumable=True
    )
    steps: int | None = option(None, "int", "training", "Optimizer steps.", low=1, resumable=True)
    batch_size: int = option(4, "int", "training", "Rows in a batch.", low=1)
    packing: bool = option(
        False, "flag", "training",
        "Lay rows of the data end to end in the rows of a batch, up to --pack-tokens; each sees itself alone.",
    )  # fmt: skip
    pack_tokens: int | None = option(
        None, "int", "training", "Most tokens in a packed row; a longer one is alone. Default: those of the longest.",
        low=1,
    )  # fmt: skip
    group_by_length: bool = option(False, "flag", "training", "Batches of rows of similar length, in random order.")
    accumulate: int = option(
        1, "int", "training", "Batches in an optimizer step; weighted by their label tokens.", low=1
    )
    lr: float = option(2e-4, "float", "training", "Peak learning rate.", low=0.0)
    schedule: str = option(
        "cosine", "text", "training", "Learning rate after the warm-up.", choices=("cosine", "linear", "constant")
    )
    warmup: float = option(0.03, "float", "training", "Warm-up: steps, or a part of all steps if below 1.", low=0.0)
    min_lr: float = option(0.0, "float", "training", "Learning rate at the end of cosine and linear.", low=0.0)
    weight_decay: float = option(0.0, "float", "training", "Decoupled weight decay.", low=0.0)
    optimizer: str = option(
        "adamw", "text", "training",
        "adamw (8 bytes of state for a weight), adamw8bit (2, quantized in blocks) or adafactor (nearly none: factored "
        "second moments, no first).",
        choices=("adamw", "adamw8bit", "adafactor"),
    )  # fmt: skip
    clip: float = option(1.0, "float", "training", "Largest global gradient norm; 0 never clips.", low=0.0)
    seed: int = option(
        0, "int", "training", "Seed of the adapter, the order of rows, and dropout.", low=0, high=2**63 - 1
    )

    label_positions: str = option(
        "auto", "text", "memory",
        "Compute the layers above the last one with keys and values of its own at label positions alone, where that is "
        "exact and cheaper; off computes all positions.",
        choices=("auto", "off"), resumable=True,
    )  # fmt: skip
    checkpoint_layers: int = option(
        0, "int", "memory",
        "Gradient checkpointing: the backward recomputes every N-th decoder layer (1: all, least memory; 0: none).",
        low=0, resumable=True,
    )  # fmt: skip

    tower_cache: str = option(
        "memory", "text", "memory",
        "Keep what frozen towers make of each picture and clip: in memory for the run, on disk for later runs too, "
        "or not. On disk they lie unencrypted in --tower-cache-dir, readable by you alone: as private as the media.",
        choices=("memory", "disk", "off"), resumable=True,
    )  # fmt: skip
    tower_cache_gb: float | None = option(
        None, "float", "memory",
        "Most gigabytes kept, the longest unused go first; default: 1 in memory, 20 on disk.",
        low=0.0, resumable=True,
    )  # fmt: skip
    tower_cache_dir: str | None = option(
        None, "text", "memory",
        "Folder of the cache on disk; default: gemma_mlx/soft_tokens in the user's cache folder (~/Library/Caches on "
        "macOS, else $XDG_CACHE_HOME or ~/.cache).",
        resumable=True,
    )  # fmt: skip
    auto: bool = option(
        False, "flag", "memory",
        "Where the run does not fit the memory: apply what makes it fit (checkpointing, smaller batches accumulated to "
        "the same step, then 8 or 4 bits) instead of refusing.", resumable=True,
    )  # fmt: skip
    memory_gb: float | None = option(
        None, "float", "memory", "Memory that the run may take, in GB; default: the machine's.", low=0.0, resumable=True
    )

    eval_every: int = option(
        100, "int", "watching", "Steps between validations (0: at the end only).", low=0, resumable=True
    )
    save_every: int = option(
        100, "int", "watching", "Steps between checkpoints (0: at the end only).", low=0, resumable=True
    )
    keep: int = option(2, "int", "watching", "Newest checkpoints kept.", low=1, resumable=True)
    patience: int = option(
        0, "int", "watching", "Stop after so many validations without a better loss (0: never).", low=0, resumable=True
    )
    log_every: int = option(1, "int", "watching", "Steps between lines of metrics.jsonl.", low=1, resumable=True)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, convert(f, getattr(self, f.name), f.name))
        if self.patience and not self.valid:
            raise InputError("patience: early stopping needs validation rows (valid)")
        if self.targets == NO_TARGETS and not self.full:
            raise InputError("targets: none leaves nothing to train; name modules in full")
        if self.master_weights == NO_MASTERS and not self.full:
            raise InputError("master_weights: none concerns modules that train in full; name them in full")
        if self.packing and self.group_by_length:
            raise InputError("packing: packed rows are of one length already; leave out group_by_length")
        if self.pack_tokens and not self.packing:
            raise InputError("pack_tokens: bounds packed rows alone; add packing, or leave it out")
        if self.min_lr > self.lr:
            raise InputError(f"min_lr: expected at most lr ({self.lr:g}), got {self.min_lr:g}")

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that the user gave, or that a resumed run has, where `configure` made this."""
        return self.__dict__.get("_given", frozenset())

    @property
    def adapter_alpha(self) -> float:
        """Alpha with its default filled in."""
        return float(self.rank) if self.alpha is None else self.alpha

    def to_yaml(self) -> str:
        """All options but ``resume``, as a file that ``--config`` reads back to an equal config."""
        values = dataclasses.asdict(self)
        del values["resume"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


REMEMBERED = ("audio_window", "quantize", "image_tokens", "audio_prompt", "image_prompt", "system")
"""Options that decide what the model is given: an adapter must be used with those it was trained with."""

FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(TrainConfig)}
"""Option name -> field, in the order of the help page."""


def configure(values: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> TrainConfig:
    """Options as given by the user -> config; with ``resume`` the rest comes from the run folder's own config.

    ``labels`` says what to call an option in messages (``--lr``, ``c.yaml: lr``). Raises InputError for an unknown
    name, with the closest known one; for a value of the wrong type or out of range; and, on resume, for a value that
    differs from the run's where that would change what was already computed.
    """
    labels = labels or {}
    checked = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise InputError(f"{labels.get(name, name)}: unknown option{_closest(name, FIELDS)}")
        checked[name] = convert(FIELDS[name], value, labels.get(name, name))
    if checked.get("resume"):
        checked = _resumed(checked, labels)
    config = TrainConfig(**checked)
    object.__setattr__(
        config, "_given", frozenset(checked)
    )  # no option: it is not written, and two runs do not differ by it
    return config


def _resumed(given: dict[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """The stored options of the run in ``out``, with the given ones on top where they may differ."""
    if not given.get("out"):
        raise InputError(f"{labels.get('resume', 'resume')}: name the run folder to go on from (out)")
    path = Path(given["out"]) / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{labels.get('resume', 'resume')}: {given['out']} holds no run ({CONFIG_FILE} is missing)")
    stored = {k: convert(FIELDS[k], v, f"{path}: {k}") for k, v in read_yaml(path).items()}
    for name, value in given.items():
        if name in ("resume", "out") or FIELDS[name].metadata["resumable"] or value == stored.get(name):
            continue
        raise InputError(
            f"{labels.get(name, name)}: the run in {given['out']} was started with {stored.get(name)!r}, "
            f"not {value!r}; resume it without this option, or start another run folder"
        )
    return {**stored, **given}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of options -> name -> value; dashes in names are read as underscores. Raises InputError."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected options as `name: value`, found a {type(loaded).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    for key in values:
        if key not in FIELDS:
            raise InputError(f"{path}: unknown option {key!r}{_closest(key, FIELDS)}")
    return values


def _closest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known options: {', '.join(known)}"


def convert(f: dataclasses.Field[Any], value: Any, label: str) -> Any:
    """A value from a flag (text), YAML or Python -> the field's type, checked against its choices and range."""
    rules = f.metadata
    if value is None:
        if rules["kind"] == "list":
            return []
        if rules["kind"] == "mapping":
            return {}
        if rules["optional"]:
            return None
        raise InputError(f"{label}: expected {_expected(rules)}, got nothing")
    if value is False and "off" in rules["choices"]:
        value = "off"  # as YAML reads a bare `off`
    try:
        result = _CONVERTERS[rules["kind"]](value)
    except (ValueError, TypeError):
        raise InputError(f"{label}: expected {_expected(rules)}, got {value!r}") from None
    low, high = rules["low"], rules["high"]
    out_of_range = (low is not None and result < low) or (high is not None and result > high)
    if out_of_range or (rules["choices"] and result not in rules["choices"]):
        raise InputError(f"{label}: expected {_expected(rules)}, got {value!r}")
    return result


def _expected(rules: Mapping[str, Any]) -> str:
    if rules["choices"]:
        return " or ".join(map(str, rules["choices"]))
    words = {"int": "a whole number", "float": "a number", "text": "text", "flag": "true or false"}
    text = words.get(rules["kind"], "a list of texts" if rules["kind"] == "list" else "NAME=COLUMN pairs")
    if rules["low"] is not None and rules["high"] is not None:
        return f"{text} from {rules['low']:g} to {rules['high']:g}"
    return f"{text} of at least {rules['low']:g}" if rules["low"] is not None else text


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    result = float(value)
    if isinstance(value, bool) or not math.isfinite(result):
        raise ValueError
    return result


def _text(value: Any) -> str:
    """Text or a path; a list of texts is joined with commas (``targets: [q_proj, v_proj]``)."""
    if isinstance(value, list | tuple) and value:
        return ",".join(_text(part) for part in value)
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError
    return str(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _list(value: Any) -> list[str]:
    return [_text(v) for v in ([value] if isinstance(value, str | Path) else value)]


def _mapping(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {_text(k): "" if v in ("", None) else _text(v) for k, v in value.items()}
    pairs = [part.partition("=") for part in _list(value)]
    if any(not name.strip() or not equals for name, equals, _ in pairs):
        raise ValueError
    return {name.strip(): column.strip() for name, _, column in pairs}


_CONVERTERS = {"int": _integer, "float": _number, "text": _text, "flag": _flag, "list": _list, "mapping": _mapping}
