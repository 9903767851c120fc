"""A profile of the existing tuner's ``config.ini`` -> options of a run that trains as that profile trained there.

What a key says and what it did are not always the same there (training gives its optimizer no warm-up, whatever
``warmup_steps`` says, and reads ``lora_target_modules``, not ``target_modules``). The options follow what was done;
every key that had no effect, or has no counterpart here, gets a line that says so and what to set instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma_mlx.config import FIELDS, convert
from gemma_mlx.data.examples import STANDARD
from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.tuner.ini import Settings, read_settings
from gemma_mlx.data.tuner.languages import STRICT, LanguageMode
from gemma_mlx.data.tuner.layout import PatchedTable, audio_column, find_dataset
from gemma_mlx.data.tuner.patches import Patches
from gemma_mlx.data.tuner.remarks import remarks
from gemma_mlx.errors import InputError

MODALITIES = ("audio", "text", "image", "audiovisual")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What gets adapters there, and all that ``lora_target_modules`` can choose from."""
SEEN_AND_HEARD = "Describe what the picture shows and what is heard."
"""The instruction of ``modality = audiovisual``, whose answer is no transcript."""
_PATHS = ("audio_path", "image_path", "video_path")
_SAVE_STEPS = 500
"""Steps between checkpoints there under ``save_strategy = steps``, which does not get ``save_steps``."""


def read_profile(path: Path, profile: str, root: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """The options of a profile, and lines about what did not become one.

    Args:
        path: the tuner's config.ini.
        profile: the name after ``profile:``.
        root: the tuner's project folder, which holds ``data/datasets`` and ``data_patches`` and from which audio paths
            start. Default: the folder of config.ini (the one above, if that is named ``config``) or the working
            directory, whichever has the data set; the working directory is first if it has a config.ini, as there.

    Returns:
        Options by the names of `gemma_mlx.config.FIELDS`, in its order; paths in the working directory are relative to
        it. And the lines, each naming the key and its section.

    Raises:
        InputError: naming the file and section: no such profile (with those there are), no data, a value that is none.
    """
    settings = read_settings(Path(path), profile)
    root = root or _project(settings)
    lines: list[str] = []
    train = find_dataset(root, settings.text("dataset"), "train")
    modality = settings.choice("modality", "audio", MODALITIES)
    rows = CsvTable(train)
    columns = _columns(settings, modality, rows.columns, train)
    patches = _patches(settings, root, lines)
    options = {
        "model": settings.needed("base_model", "the checkpoint's Hub id, in the section of its model"),
        "data": _shown(train),
        "valid": _valid(settings, root, train, lines),
        "out": _shown(root / settings.text("output_dir", "output") / profile),
        "columns": columns,
        "patches": None if patches is None else _shown(patches.folder),
        **_media(settings, modality, root, lines),
        **_adapter(settings, modality, lines),
        **_training(settings, modality, lines),
    }
    left = PatchedTable(rows, patches)
    lines += left.report()
    options |= _watching(settings, options, len(left))
    for key in ("model", "group", "image_token_budget", "language_mode"):
        settings.text(key)  # said by other keys, or without a meaning in this modality
    lines += remarks(settings)
    return {name: options[name] for name in FIELDS if options.get(name) is not None}, lines


def to_yaml(options: dict[str, Any], notes: Iterable[str] = ()) -> str:
    """Options as the text of a file that ``--config`` reads, below the notes as comments."""
    comments = "".join(f"# {' '.join(note.split())}\n" for note in notes)
    return comments + yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=1 << 20)


def _project(settings: Settings) -> Path:
    folder = settings.path.resolve().parent
    tries = [folder.parent if folder.name == "config" else folder, Path.cwd()]
    if Path("config.ini").exists() or Path("config/config.ini").exists():
        tries.reverse()
    inside = Path("data", "datasets", settings.text("dataset"))
    return next((root for root in tries if (root / inside).is_dir()), tries[0])


def _shown(path: Path) -> str:
    """A path from the working directory where it lies in there, else in full."""
    full, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(full, here) if Path(full).is_relative_to(here) else full


def _columns(settings: Settings, modality: str, header: Sequence[str], table: Path) -> dict[str, str]:
    """Standard name -> column; "" for a column that the modality does not read there but would be read here."""
    text = settings.text("text_column", "text")
    told = settings.text("prompt_column")
    picture = settings.text("image_path_column", "image_path")
    mode = settings.choice("text_sub_mode", "instruction", ("instruction", "completion"))
    task = settings.choice("image_sub_mode", "caption", ("caption", "vqa"))
    if (modality == "text" and mode == "instruction") or (modality == "image" and task == "vqa"):
        settings.needed("prompt_column", f"the column of prompts or questions, which modality = {modality} needs")
    wanted = {"id": "id"} if "id" in header else {}
    if modality in ("audio", "audiovisual"):
        clip = audio_column(header)
        if clip is None:
            raise InputError(f"{table}:1: missing column 'audio_path' (or 'audio'); found {', '.join(header)}")
        wanted["audio_path"] = clip
    if modality in ("image", "audiovisual"):
        wanted["image_path"] = picture
    if modality == "text":
        wanted |= {"text": text} if mode == "completion" else {"prompt": told, "response": text}
    elif modality == "audio":
        wanted |= {"text": text, "language": "language"}
    else:
        vqa = modality == "image" and task == "vqa"
        wanted |= {"question": told, "answer": text} if vqa else {"caption": text}
    needed = [column for name, column in wanted.items() if name != "language"]
    if missing := next((column for column in needed if column not in header), None):
        raise InputError(f"{table}:1: missing column {missing!r}; found {', '.join(header)}")
    unread = {name: "" for name in STANDARD if name not in wanted and (name in header or name in _PATHS)}
    return {**{name: column for name, column in wanted.items() if name != column}, **unread}


def _patches(settings: Settings, root: Path, lines: list[str]) -> Patches | None:
    """The patches of the data set's source, if there are any."""
    name = settings.text("dataset")
    granary = settings.dataset.get("source_type", "").lower() == "granary"
    source = name if granary else settings.dataset.get("source") or name
    folder = root / "data_patches" / source
    if not folder.is_dir():
        section = f"{settings.path} [dataset:{name}]"
        lines.append(f"{section} source = {source}: no folder {_shown(folder)}, so there are no patches")
        return None
    return Patches.read(folder, settings.text("text_column", "text"))


def _valid(settings: Settings, root: Path, train: Path, lines: list[str]) -> str | None:
    """The validation rows, unless they would be the training rows."""
    if not settings.flag("load_validation", True):
        return None
    try:
        valid = find_dataset(root, settings.text("dataset"), "validation")
    except InputError as error:
        lines.append(f"{settings.path}: no validation rows, so the last adapter is kept, as there ({error})")
        return None
    if valid == train:
        lines.append(
            f"{settings.path}: no validation.csv beside {_shown(train)}: there the training rows themselves are "
            "validated on, here none; split off some rows and give them as valid"
        )
        return None
    return _shown(valid)


def _media(settings: Settings, modality: str, root: Path, lines: list[str]) -> dict[str, Any]:
    """Where media lie and how they and their rows are told of."""
    if modality == "text":
        return {}
    options: dict[str, Any] = {"media_root": [_shown(root), *_corpora(settings, lines)]}
    if modality != "image":
        options["long_audio"] = "truncate"
    if modality == "audio":
        mode = settings.text("language_mode", STRICT)
        try:
            LanguageMode.parse(mode)
        except InputError as error:
            raise InputError(f"{settings.label('language_mode')}: {error}") from None
        lines.append(
            f"{settings.label('language_mode')} = {mode}: acts there in evaluation alone; here the transcription "
            "prompt names the language that it says, in training too (mixed names none)"
        )
        return {**options, "language_mode": mode}
    if modality == "audiovisual":
        options["audio_prompt"] = SEEN_AND_HEARD
    if "3n" in settings.text("base_model"):
        budget = settings.text("image_token_budget", "280")
        lines.append(
            f"{settings.label('image_token_budget')} = {budget}: Gemma 3n takes 256 tokens for every picture; here it "
            "is not asked for others"
        )
        return options
    return {**options, "image_tokens": _value(settings, "image_token_budget", "image_tokens", "280")}


def _corpora(settings: Settings, lines: list[str]) -> list[str]:
    """Folders of ``audio_source_NAME``, where a Granary data set's clips lie."""
    found = []
    for key in settings.values:
        if not key.startswith("audio_source_") or not (folder := settings.text(key)):
            continue
        if Path(folder).is_dir():
            found.append(_shown(Path(folder)))
        else:
            lines.append(f"{settings.label(key)} = {folder}: no such folder, so it is no media_root")
    return found


def _value(settings: Settings, key: str, option: str, default: str) -> Any:
    """A key's value as an option's type, checked as that option is."""
    return convert(FIELDS[option], settings.text(key, default), settings.label(key))


def _adapter(settings: Settings, modality: str, lines: list[str]) -> dict[str, Any]:
    asked = [name.strip() for name in settings.text("lora_target_modules", ",".join(TARGETS)).split(",")]
    targets = [name for name in asked if name in TARGETS]
    strange = [name for name in asked if name and name not in TARGETS]
    label = settings.label("lora_target_modules")
    if not targets:
        raise InputError(f"{label}: {', '.join(strange)}: expected one or more of {', '.join(TARGETS)}")
    if strange:
        lines.append(f"{label}: {', '.join(strange)}: left out there without a word; add to targets what is wanted")
    if other := settings.text("target_modules"):
        lines.append(
            f"{settings.label('target_modules')} = {other}: had no effect there (lora_target_modules is read); the "
            f"adapters were on {', '.join(targets)}, and are here; set targets: {other} for what it says"
        )
    chosen = targets
    if (
        modality == "text"
    ):  # towers that read nothing learn nothing: without their adapters the run is the same, smaller
        chosen = ["decoder"] if set(targets) == set(TARGETS) else [f"decoder.{name}" for name in targets]
    return {
        "targets": ",".join(chosen),
        "rank": _value(settings, "lora_r", "rank", "16"),
        "alpha": _value(settings, "lora_alpha", "alpha", "32"),
        "dropout": _value(settings, "lora_dropout", "dropout", "0.05"),
    }


def _training(settings: Settings, modality: str, lines: list[str]) -> dict[str, Any]:
    """How it is trained; what is fixed there (no warm-up, a linear schedule) is said too."""
    batch = _value(settings, "per_device_train_batch_size", "batch_size", "2")
    most = 1 if modality == "text" else 2
    if batch > most:
        label = settings.label("per_device_train_batch_size")
        lines.append(f"{label} = {batch}: on a Mac there {most} at most; set batch_size: {most} for the same steps")
    options = {
        "epochs": _value(settings, "num_train_epochs", "epochs", "1"),
        "batch_size": batch,
        "accumulate": _value(settings, "gradient_accumulation_steps", "accumulate", "8"),
        "lr": _value(settings, "learning_rate", "lr", "2e-4"),
        "schedule": "linear",
        "warmup": 0.0,
    }
    if (steps := settings.text("max_steps")) and steps != "0" and not steps.startswith("-"):
        options["steps"] = _value(settings, "max_steps", "steps", steps)
    if settings.flag("gradient_checkpointing"):
        options["checkpoint_layers"] = 1
    return options


def _watching(settings: Settings, options: dict[str, Any], rows: int) -> dict[str, Any]:
    """When it is validated and saved: there after every epoch, unless said otherwise; here in steps."""
    epoch = max(1, math.ceil(math.ceil(rows / options["batch_size"]) / options["accumulate"]))
    log = _value(settings, "logging_steps", "log_every", "10")
    known = ("epoch", "steps", "no")
    evaluate = {"epoch": epoch, "steps": log, "no": 0}[settings.choice("eval_strategy", "epoch", known)]
    save = {"epoch": epoch, "steps": _SAVE_STEPS, "no": 0}[settings.choice("save_strategy", "epoch", known)]
    return {"log_every": log, "save_every": save, "eval_every": evaluate if options["valid"] else None}
