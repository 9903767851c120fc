"""Profiles of the existing tuner's config.ini as options: inheritance, columns by modality, and what is left out."""

import csv
import random

import pytest
import yaml

from gemma_mlx.config import FIELDS, configure, read_yaml
from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE, TRANSCRIBE_IN, Audio, Image, Prompts, RowReader, Text
from gemma_mlx.data.places import Folders
from gemma_mlx.data.sources.local import CsvTable
from gemma_mlx.data.tuner.ini import read_settings
from gemma_mlx.data.tuner.layout import audio_column, find_dataset, patching
from gemma_mlx.data.tuner.profile import SEEN_AND_HEARD, read_profile, to_yaml
from gemma_mlx.errors import InputError

COMMON = """
[DEFAULT]
num_train_epochs = 3          ; passes
logging_steps = 25
save_steps = 1000
gradient_accumulation_steps = 1
learning_rate = 1e-5
warmup_steps = 50
output_dir = runs

[dataset_defaults]
text_column = text_perfect
max_duration = 30.0
learning_rate = 3e-5

[group:gemma]
dtype = bfloat16
learning_rate = 7e-5
lora_r = 4

[model:small]
base_model = google/gemma-4-E2B-it
group = gemma
per_device_train_batch_size = 2

[model:nano]
base_model = google/gemma-3n-E2B-it
group = gemma

[dataset:notes]
source = clinic
train_split = train
num_train_epochs = 9

[profile:plain]
model = small
dataset = notes
"""
ROWS = [[n, f"data/audio/{n}.m4a", f"clean {n}", f"uh {n}", "de" if n % 2 else "??"] for n in range(1, 11)]
HEADER = ["id", "audio_path", "text_perfect", "text_verbatim", "language"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes a tuner's folder and goes there; gives config.ini's path."""

    def write(profile="", header=HEADER, rows=ROWS, files=("train.csv", "validation.csv"), ini="config.ini"):
        folder = tmp_path / "data" / "datasets" / "notes"
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            with (folder / name).open("w", newline="") as file:
                csv.writer(file).writerows([header, *rows])
        path = tmp_path / ini
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMMON + profile)
        monkeypatch.chdir(tmp_path)
        return path

    return write


def test_options_of_a_plain_profile(project, tmp_path):
    options, lines = read_profile(project(), "plain")
    assert options == {
        "model": "google/gemma-4-E2B-it",
        "data": "data/datasets/notes/train.csv",
        "valid": "data/datasets/notes/validation.csv",
        "out": "runs/plain",
        "media_root": ["."],
        "columns": {"text": "text_perfect", "image_path": "", "video_path": ""},
        "language_mode": "strict",
        "long_audio": "truncate",
        "targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "rank": 4, "alpha": 32.0, "dropout": 0.05,
        "epochs": 3.0, "batch_size": 2, "accumulate": 1, "lr": 3e-5, "schedule": "linear", "warmup": 0.0,
        "log_every": 25, "eval_every": 5, "save_every": 5,
    }  # fmt: skip
    assert any("no folder data_patches/clinic, so there are no patches" in line for line in lines)
    for key in ("[DEFAULT] warmup_steps = 50: had no effect", "[DEFAULT] save_steps = 1000: had no effect"):
        assert any(key in line for line in lines), lines
    # [DEFAULT] has these too, so that they count in [dataset_defaults] and profiles alone.
    assert sum("only [dataset_defaults] and a profile go before it" in line for line in lines) == 2
    assert any("[group:gemma] learning_rate = 7e-5: " in line for line in lines)
    assert any("[dataset:notes] num_train_epochs = 9: " in line for line in lines)
    assert not any("train_split" in line or "base_model" in line for line in lines)


def test_the_yaml_is_read_back_to_the_same_options(project, tmp_path):
    options, lines = read_profile(project(), "plain")
    text = to_yaml(options, [*lines, "two\nlines: of a note"])
    assert yaml.safe_load(text) == options
    assert all(line.startswith("# ") for line in text.splitlines()[: len(lines) + 1])
    assert list(options) == [name for name in FIELDS if name in options]
    (tmp_path / "run.yaml").write_text(text)
    config = configure(read_yaml(tmp_path / "run.yaml"))
    assert {name: getattr(config, name) for name in options} == options


PROFILE = """
[profile:tuned]
model = small
dataset = notes
text_column = text_verbatim
language_mode = override:fr
learning_rate = 2e-4
num_train_epochs = 1
per_device_train_batch_size = 4
gradient_accumulation_steps = 3
gradient_checkpointing = Yes
lora_r = 8
lora_alpha = 16
lora_dropout = 0.1
lora_target_modules = q_proj, v_proj, linear_start
max_steps = 70
logging_steps = 1
eval_strategy = steps
save_strategy = no
load_validation = on
max_samples = 100
weight_decay = 0.01
target_modules = q_proj
model_revision = abc
favourite_colour = blue
languages = en,fr
train_split = all
"""


def test_options_of_a_tuned_profile(project):
    options, lines = read_profile(project(PROFILE), "tuned")
    want = {
        "columns": {"text": "text_verbatim", "image_path": "", "video_path": ""}, "language_mode": "override:fr",
        "lr": 2e-4, "epochs": 1.0, "steps": 70, "batch_size": 4, "accumulate": 3, "checkpoint_layers": 1,
        "rank": 8, "alpha": 16.0, "dropout": 0.1, "targets": "q_proj,v_proj",
        "log_every": 1, "eval_every": 1, "save_every": 0,
    }  # fmt: skip
    assert {name: options[name] for name in want} == want
    assert "weight_decay" not in options
    for part in (
        "linear_start: left out there",
        "target_modules = q_proj: had no effect there",
        "per_device_train_batch_size = 4: on a Mac there 2 at most",
        "max_samples = 100: took there the first rows",
        "weight_decay = 0.01: had no effect on training there, which has none; weight_decay: 0.01 does it here",
        "model_revision = abc: there is no such option",
        "favourite_colour = blue: not a key that training there reads",
        "languages = en,fr: acted there when the CSVs were made",
        "train_split = all: had no effect",
        "language_mode = override:fr: acts there in evaluation alone",
    ):
        (line,) = [line for line in lines if f"{part}" in line]
        assert "config.ini [profile:tuned] " in line and "\n" not in line


def test_the_profile_is_layered_as_there_whatever_the_sections_say(tmp_path):
    draw = random.Random(5)
    sections = ["DEFAULT", "dataset_defaults", "group:g", "model:m", "dataset:d", "profile:p"]
    for _ in range(100):
        said = {name: {f"key{k}": f"{name} {k}" for k in range(8) if draw.random() < 0.4} for name in sections}
        said["model:m"]["group"] = "g"
        said["profile:p"] |= {"model": "m", "dataset": "d"}
        want = {}
        for name in sections:
            whole = name in ("DEFAULT", "dataset_defaults", "profile:p")
            want |= {key: (value, name) for key, value in said[name].items() if whole or key not in said["DEFAULT"]}
        draw.shuffle(order := list(sections))
        text = "".join(f"[{n}]\n" + "".join(f"{k.upper()} = {v}  # c\n" for k, v in said[n].items()) for n in order)
        (tmp_path / "config.ini").write_text(text)
        settings = read_settings(tmp_path / "config.ini", "p")
        assert settings.values == want
        lost = [(n, k) for n in sections[2:5] for k in said[n] if k in said["DEFAULT"]]
        assert sorted((n, k) for n, k, _ in settings.lost) == sorted(lost)


def read_rows(options):
    """Rows of the training data as a run reads them with these options."""
    put = patching(options.get("patches"), options.get("language_mode"))
    table = put(CsvTable(options["data"]), options["columns"])
    folders = Folders(table.base, options.get("media_root", ()))
    prompts = Prompts(options.get("audio_prompt"))
    reader = RowReader(table.columns, folders, table.name, options["columns"], prompts)
    return [reader.example(table[i]) for i in range(len(table))]


def parts(example):
    return [
        [part.text if isinstance(part, Text) else (type(part), part.path.name) for part in turn.parts]
        for turn in example.turns
    ]


def test_rows_with_patches_are_read_from_the_working_directory(project, tmp_path):
    ini = project(header=[*HEADER, "text", "caption", "prompt"], rows=[[*row, "x", "y", "z"] for row in ROWS])
    (tmp_path / "data" / "audio").mkdir()
    for n in range(1, 11):
        (tmp_path / "data" / "audio" / f"{n}.m4a").write_bytes(b"x")
    for name, content in {
        "override_text_perfect": "id,text_perfect\n1.0,corrected\n",
        "delete": "id\n2\n3\n",
        "do_not_blacklist": "id\n3.0\n",
    }.items():
        (tmp_path / "data_patches" / "clinic" / name).mkdir(parents=True)
        (tmp_path / "data_patches" / "clinic" / name / "a.csv").write_text(content)
    options, lines = read_profile(ini, "plain")
    assert options["patches"] == "data_patches/clinic" and options["eval_every"] == 5  # 9 rows by 2
    assert any("1 of 10 rows left out, 1 kept by do_not_blacklist" in line for line in lines)
    rows = read_rows(options)
    assert [row.row_id for row in rows] == ["1", *map(str, range(3, 11))]
    german = TRANSCRIBE_IN.replace("{language}", "German")
    assert parts(rows[0]) == [[german, (Audio, "1.m4a")], ["corrected"]] and rows[0].task == "transcript"
    assert parts(rows[2]) == [[TRANSCRIBE, (Audio, "4.m4a")], ["clean 4"]]
    assert rows[0].where.endswith("train.csv:2") and rows[1].where.endswith("train.csv:4")


ODD = [
    "id",
    "prompt",
    "question",
    "answer",
    "text",
    "caption",
    "image_path",
    "shot",
    "audio_path",
    "audio",
    "messages",
    "system",
]
ODD_ROW = ["7", "p?", "q?", "an answer", "a text", "a caption", "a.png", "b.png", "a.wav", "b.wav", "[]", "be brief"]


@pytest.mark.parametrize(
    ("keys", "turns", "completion"),
    [
        ("modality = text\nprompt_column = prompt\ntext_column = caption", [["p?"], ["a caption"]], False),
        ("modality = TEXT\ntext_sub_mode = completion\ntext_column = answer", [["an answer"]], True),
        ("modality = image\ntext_column = text", [[(Image, "a.png"), DESCRIBE], ["a text"]], False),
        (
            "modality = image\nimage_sub_mode = vqa\nprompt_column = question\nimage_path_column = shot\n"
            "text_column = caption",
            [[(Image, "b.png"), "q?"], ["a caption"]], False,
        ),
        (
            "modality = audiovisual\nimage_path_column = shot\ntext_column = answer",
            [[(Image, "b.png"), SEEN_AND_HEARD, (Audio, "a.wav")], ["an answer"]], False,
        ),
        ("modality = audio\ntext_column = caption", [[TRANSCRIBE, (Audio, "a.wav")], ["a caption"]], False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("patched", [False, True])
def test_each_modality_reads_its_columns_and_no_others(project, tmp_path, keys, turns, completion, patched):
    ini = project(f"[profile:odd]\nmodel = small\ndataset = notes\n{keys}\n", header=ODD, rows=[ODD_ROW])
    for name in ("a.png", "b.png", "a.wav", "b.wav"):
        (tmp_path / "data" / "datasets" / "notes" / name).write_bytes(b"x")
    if patched:  # whatever the column that the model learns is called, it gets the text
        (tmp_path / "data_patches" / "clinic" / "override_text_verbatim").mkdir(parents=True)
        (tmp_path / "data_patches" / "clinic" / "override_text_verbatim" / "a.csv").write_text(
            "id,text_verbatim\n7,new\n"
        )
        turns = [*turns[:-1], ["new"]]
    options, _ = read_profile(ini, "odd")
    (row,) = read_rows(options)
    assert parts(row) == turns and row.completion == completion and row.row_id == "7"
    assert (row.task == "transcript") == ("modality = audio\n" in keys)
    configure(options)


def test_only_pictures_get_a_budget_of_tokens_and_gemma_3n_none(project):
    text = "dataset = notes\nmodality = image\ntext_column = text\nimage_token_budget = 70\n"
    ini = project(f"[profile:a]\nmodel = small\n{text}[profile:b]\nmodel = nano\n{text}", header=ODD, rows=[ODD_ROW])
    assert read_profile(ini, "a")[0]["image_tokens"] == 70
    options, lines = read_profile(ini, "b")
    assert "image_tokens" not in options and any(
        "image_token_budget = 70: Gemma 3n takes 256" in line for line in lines
    )


def test_a_text_run_adapts_the_decoder_alone(project):
    text = "model = small\ndataset = notes\nmodality = text\nprompt_column = prompt\ntext_column = text\n"
    ini = project(
        f"[profile:a]\n{text}[profile:b]\n{text}lora_target_modules = q_proj,up_proj\n", header=ODD, rows=[ODD_ROW]
    )
    assert read_profile(ini, "a")[0]["targets"] == "decoder" and "media_root" not in read_profile(ini, "a")[0]
    assert read_profile(ini, "b")[0]["targets"] == "decoder.q_proj,decoder.up_proj"


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("audio_url", "audio", "audio_path"), "audio_path"), (("audio_url", "audio"), "audio"),
        (("id", "audio_url"), "audio_url"), (("id", "text"), None),
    ],
)  # fmt: skip
def test_which_column_names_the_clip(project, columns, found):
    assert audio_column(columns) == found
    header = [*columns, "text_perfect"]
    ini = project(header=header, rows=[["x"] * len(header)])
    if found is None:
        with pytest.raises(
            InputError, match=r"train.csv:1: missing column 'audio_path' \(or 'audio'\); found id, text"
        ):
            read_profile(ini, "plain")
    else:
        assert read_profile(ini, "plain")[0]["columns"].get("audio_path", "audio_path") == found


def test_where_a_split_is(tmp_path):
    folder = tmp_path / "data" / "datasets" / "notes"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"neither .*train.csv nor notes_prepared.csv is there"):
        find_dataset(tmp_path, "notes", "train")
    (folder / "notes_prepared.csv").touch()
    assert find_dataset(tmp_path, "notes", "validation").name == "notes_prepared.csv"
    (folder / "train.csv").touch()
    assert find_dataset(tmp_path, "notes", "train") == folder / "train.csv"
    for name in ("", "..", ".", "../notes", "a/b", "/etc", "a\\b", "a\0"):
        with pytest.raises(InputError, match="expected the name of a folder"):
            find_dataset(tmp_path, name, "train")


def test_no_validation_on_the_training_rows(project):
    ini = project(files=("notes_prepared.csv",))
    options, lines = read_profile(ini, "plain")
    assert options["data"].endswith("notes_prepared.csv") and "valid" not in options and "eval_every" not in options
    assert any("there the training rows themselves are validated on" in line for line in lines)
    (ini.parent / "data" / "datasets" / "notes" / "notes_prepared.csv").rename(
        ini.parent / "data" / "datasets" / "notes" / "train.csv"
    )
    options, lines = read_profile(ini, "plain")
    assert "valid" not in options and any("no validation rows" in line for line in lines)
    ini = project("load_validation = false\n")
    options, lines = read_profile(ini, "plain")
    assert "valid" not in options and not any("validation rows" in line or "validated" in line for line in lines)


def test_from_another_folder_paths_are_in_full(project, tmp_path, monkeypatch):
    ini = project(ini="config/config.ini")
    assert read_profile(ini, "plain")[0]["data"] == "data/datasets/notes/train.csv"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options, _ = read_profile(ini, "plain")
    assert options["data"] == str(tmp_path / "data/datasets/notes/train.csv")
    assert options["media_root"] == [str(tmp_path)]
    # A config.ini in the working directory makes that the project's folder, if it has the data set.
    (tmp_path / "elsewhere" / "config.ini").touch()
    assert read_profile(ini, "plain")[0] == options
    (tmp_path / "elsewhere" / "data" / "datasets" / "notes").mkdir(parents=True)
    (tmp_path / "elsewhere" / "data" / "datasets" / "notes" / "train.csv").write_text("id,audio,text_perfect\n1,a,b\n")
    assert read_profile(ini, "plain")[0]["data"] == "data/datasets/notes/train.csv"
    assert read_profile(ini, "plain", tmp_path)[0]["data"] == options["data"]


def test_folders_of_corpora_are_media_roots(project, tmp_path):
    (tmp_path / "vox").mkdir()
    text = f"audio_source_voxpopuli = {tmp_path / 'vox'}\naudio_source_ytc = /nowhere/ytc\n"
    options, lines = read_profile(project(text), "plain")
    assert options["media_root"] == [".", "vox"]
    assert any("audio_source_ytc = /nowhere/ytc: no such folder" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora_r = sixteen", "[profile:plain] lora_r: expected a whole number"),
        ("lora_r = 0", "lora_r: expected a whole number from 1"),
        ("learning_rate = fast", "[profile:plain] learning_rate: expected a number"),
        ("lora_dropout = 1.5", "lora_dropout: expected a number from 0"),
        ("modality = smell", "[profile:plain] modality: expected audio or text or image or audiovisual, got 'smell'"),
        ("modality = text", "no prompt_column"),
        ("modality = image\nimage_sub_mode = vqa", "no prompt_column"),
        (
            "modality = image\nimage_token_budget = 100\nimage_path_column = id",
            "image_token_budget: expected 70 or 140",
        ),
        ("text_column = speech", "train.csv:1: missing column 'speech'; found id, audio_path"),
        ("language_mode = strict:en", "[profile:plain] language_mode: language_mode: expected strict"),
        ("lora_target_modules = fc1", "lora_target_modules: fc1: expected one or more of q_proj"),
        ("eval_strategy = daily", "eval_strategy: expected epoch or steps or no"),
        ("[profile:other]\nmodel = big\ndataset = notes", None),
    ],
)
def test_values_that_are_none_are_named_with_their_section(project, text, says):
    ini = project(text + "\n")
    if says is None:
        with pytest.raises(InputError, match=r"no model 'big' \(\[model:big\]\); models: small, nano"):
            read_profile(ini, "other")
        return
    with pytest.raises(InputError) as caught:
        read_profile(ini, "plain")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "profile", "says"),
    [
        (COMMON, "plane", "config.ini: no profile 'plane' ([profile:plane]); did you mean plain?; profiles: plain"),
        ("[x]\ny = 1\n", "plain", "profiles: the file has no section [profile:...]"),
        ("[profile:p]\ndataset = d\n[model:m]\n", "p", "[profile:p]: no model; name one: m"),
        ("[profile:p]\nmodel = m\n[model:m]\n", "p", "[profile:p]: no dataset"),
        ("words\n", "p", "config.ini:1: not an INI file"),
        ("[a]\nb = 1\nwords\n", "p", "config.ini:3: not an INI file"),
        ("[a]\nb = 1\n[a]\n", "p", "config.ini:3: not an INI file"),
        ("[DEFAULT]\nx = %(y)s\n[profile:p]\nmodel = m\ndataset = d\n[model:m]\n[dataset:d]\n", "p", "Bad value"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, profile, says):
    (tmp_path / "config.ini").write_text(content)
    with pytest.raises(InputError) as caught:
        read_profile(tmp_path / "config.ini", profile)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"config.ini: no such file"):
        read_profile(tmp_path / "config.ini", "p")
    (tmp_path / "config.ini").write_bytes(b"[a]\nb = \xff\n")
    with pytest.raises(InputError, match=r"config.ini: cannot be read"):
        read_profile(tmp_path / "config.ini", "p")


def test_whose_patches(project, tmp_path):
    for name in ("notes", "clinic", "other"):
        (tmp_path / "data_patches" / name / "delete").mkdir(parents=True)
    ini = project("source = other\n")
    options, lines = read_profile(ini, "plain")
    assert options["patches"] == "data_patches/clinic"
    assert any("[profile:plain] source = other: had no effect on training there in this section" in s for s in lines)
    ini.write_text(ini.read_text().replace("source = clinic", "source = clinic\nsource_type = Granary"))
    assert read_profile(ini, "plain")[0]["patches"] == "data_patches/notes"
    ini.write_text(COMMON.replace("source = clinic\n", ""))
    assert read_profile(ini, "plain")[0]["patches"] == "data_patches/notes"


@pytest.mark.parametrize(("steps", "given"), [("", None), ("0", None), ("-1", None), ("25", 25)])
def test_steps_instead_of_epochs(project, steps, given):
    assert read_profile(project(f"max_steps = {steps}\n"), "plain")[0].get("steps") == given


def test_default_sections_may_stand_twice(project):
    ini = project("[DEFAULT]\nlora_alpha = 7\n")
    assert read_profile(ini, "plain")[0]["alpha"] == 7


def test_a_limit_of_tokens_acts_on_text_alone(project):
    text = "model = small\ndataset = notes\nmodality = text\nprompt_column = prompt\ntext_column = text\n"
    said = "max_seq_length = 512\n"
    ini = project(f"{said}[profile:told]\n{text}{said}", header=[*ODD, "text_perfect"], rows=[[*ODD_ROW, "x"]])
    assert any("max_seq_length = 512: cut there long prompts" in line for line in read_profile(ini, "told")[1])
    assert any("max_seq_length = 512: had no effect on training" in line for line in read_profile(ini, "plain")[1])


def test_columns_of_media_that_a_modality_does_not_read_are_no_mistake(project):
    ini = project(
        "[profile:told]\nmodel = small\ndataset = notes\nmodality = text\nprompt_column = said\ntext_column = text\n",
        header=["id", "said", "text", "wav", "img"],
        rows=[["1", "p", "t", "a.wav", "a.png"]],
    )
    options, _ = read_profile(ini, "told")
    (row,) = read_rows(options)
    assert parts(row) == [["p"], ["t"]]
