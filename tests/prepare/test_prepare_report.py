"""What prepare says of data: every bad row, durations, lengths, languages, duplicates, leaks; counted by hand."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_rows import CLIPS, read_csv, read_json, table

import gemma_mlx
from gemma_mlx.preparing.tally import Tally, duplicates, leaks

DEMO = Path(gemma_mlx.__file__).parent / "demo" / "checkpoint"


@pytest.fixture
def mixed(folder):
    rows = [
        {"id": "1", "audio_path": "a.wav", "text": "one sentence of the first clip", "language": "German"},
        {"id": "2", "audio_path": "b.wav", "text": "another of the second", "language": "German"},
        {"id": "3", "audio_path": "c.wav", "text": "and the third one", "language": "French"},
        {"id": "4", "image_path": "p.png", "question": "What?", "answer": "noise"},
        {"id": "5", "image_path": "q.png", "caption": "more noise"},
        {"id": "6", "text": "nothing but a text"},
        {"id": "7", "image_path": "p.png", "audio_path": "d.wav", "answer": "both at once"},
    ]
    return table(folder / "train.csv", rows)


def test_counts_and_durations_are_those_of_the_files(mixed, run, tmp_path):
    code, out, _ = run(mixed, "--out", tmp_path / "o")
    assert code == 0
    report = read_json(tmp_path / "o" / "report.json")
    train = report["train"]
    assert (train["rows"], train["good"], train["bad"]) == (7, 7, 0)
    assert train["kinds"] == {"audio": 3, "image": 2, "text": 1, "audio+image": 1}
    seconds = sorted(samples / rate for samples, rate in CLIPS.values())
    assert train["audio"]["clips"] == 4
    assert train["audio"]["hours"] == pytest.approx(sum(seconds) / 3600, abs=1e-4)
    assert train["audio"]["seconds"] == pytest.approx(
        {"min": seconds[0], "median": (seconds[1] + seconds[2]) / 2, "max": seconds[3]}, abs=1e-3
    )
    assert train["audio"]["sample_rates"] == {"16000": 2, "44100": 1, "8000": 1}
    assert train["audio"]["over_30_s"] == 0
    assert train["images"]["width"] == {"min": 33, "median": 60, "max": 60}
    assert train["images"]["height"] == {"min": 40, "median": 40, "max": 77}
    assert train["languages"] == {"German": 2, "French": 1}
    assert "estimated" in report["tokens"]["by"] and report["tokens"]["total"] > 0
    for name in ("token_lengths.png", "durations.png"):
        with Image.open(tmp_path / "o" / name) as picture:
            assert picture.width > 300 and len(set(picture.convert("L").getdata())) > 10
    assert "7 rows, 0 bad" in out and "German 2" in out


def test_every_bad_row_is_listed_with_its_line_and_reason(folder, run, tmp_path):
    rows = [
        {"id": "1", "audio_path": "a.wav", "text": "good"},
        {"id": "2", "audio_path": "nowhere.wav", "text": "missing"},
        {"id": "3", "audio_path": "damaged.wav", "text": "cut in the middle"},
        {"id": "4", "audio_path": "long.wav", "text": "too long"},
        {"id": "5", "audio_path": "b.wav", "text": ""},
        {"id": "6", "audio_path": "../secret.wav", "text": "outside"},
        {"id": "7", "audio_path": "p.png", "text": "not a clip"},
    ]
    path = table(folder / "train.csv", rows)
    with path.open("a") as file:
        file.write("8,a.wav,too,many,cells\n9,c.wav,good\n")
    code, out, err = run(path, "--out", tmp_path / "o", "--write", "csv")
    assert code == 2 and "7 bad rows" in err
    bad = read_csv(tmp_path / "o" / "bad_rows.csv")
    assert [row["where"] for row in bad] == [f"{path}:{line}" for line in (3, 4, 5, 6, 7, 8, 9)]
    assert [row["id"] for row in bad] == ["2", "3", "4", "5", "6", "7", ""]
    words = ["no such file", "truncated audio", "over-long", "empty text", "outside", "unreadable", "5 cells"]
    for row, word in zip(bad, words, strict=True):
        assert word in row["reason"], row
        assert f"{row['where']}: {row['reason']}" in out
    report = read_json(tmp_path / "o" / "report.json")
    assert (report["train"]["good"], report["train"]["bad"]) == (2, 7)
    assert report["train"]["audio"]["over_30_s"] == 1
    assert not (tmp_path / "o" / "train.csv").exists() and not (tmp_path / "o" / "media").exists()
    code, _, _ = run(path, "--out", tmp_path / "o", "--write", "csv", "--on-bad-row", "skip")  # a mere report gives way
    assert code == 0
    assert [row["id"] for row in read_csv(tmp_path / "o" / "train.csv")] == ["1", "9"]


def test_all_rows_bad(folder, run, tmp_path):
    path = table(folder / "t.csv", [{"audio_path": "nowhere.wav", "text": "x"}])
    code, _, err = run(path, "--out", tmp_path / "o", "--write", "csv", "--on-bad-row", "skip")
    assert code == 2 and "no good row" in err
    assert len(read_csv(tmp_path / "o" / "bad_rows.csv")) == 1 and not (tmp_path / "o" / "train.csv").exists()


def test_a_bad_row_leaves_no_media_behind(folder, run, tmp_path):
    rows = [
        {"image_path": "p.png", "audio_path": "damaged.wav", "answer": "x"},
        {"image_path": "q.png", "audio_path": "a.wav", "answer": "y"},
    ]
    path = table(folder / "t.csv", rows)
    assert run(path, "--out", tmp_path / "o", "--write", "csv", "--on-bad-row", "skip")[0] == 0
    stems = sorted(p.name.split("-")[0] for p in (tmp_path / "o" / "media").rglob("*.*"))
    assert stems == ["a", "q"]


def test_only_decoding_finds_damage_that_headers_hide(folder, run, tmp_path):
    Image.open(folder / "q.png").save(folder / "q.jpg", quality=95)
    whole = (folder / "q.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    path = table(folder / "t.csv", [{"image_path": "cut.jpg", "caption": "half"}])
    assert run(path, "--out", tmp_path / "o", "--headers-only")[0] == 0
    assert read_json(tmp_path / "o" / "report.json")["train"]["images"]["height"]["max"] == 77
    assert run(path, "--out", tmp_path / "p")[0] == 2


def test_only_the_first_twenty_are_shown(folder, run, tmp_path):
    rows = [{"audio_path": f"{i}.wav", "text": "x"} for i in range(30)] + [{"audio_path": "a.wav", "text": "y"}]
    code, out, _ = run(table(folder / "t.csv", rows), "--out", tmp_path / "o")
    assert code == 2
    assert out.count("no such file") == 20 and "30 bad rows in all" in out
    assert len(read_csv(tmp_path / "o" / "bad_rows.csv")) == 30


def test_duplicates_and_leaks(folder, run, tmp_path):
    train = [
        {"id": "1", "audio_path": "a.wav", "text": "The very first sentence of all."},
        {"id": "2", "audio_path": "again.wav", "text": "the very first sentence, of all"},  # the same clip and text
        {"id": "3", "audio_path": "again.wav", "text": "Something else is said here."},  # the same clip
        {"id": "3", "audio_path": "b.wav", "text": "A sentence that is in both files."},  # the same id
        {"id": "5", "image_path": "p.png", "question": "What?", "answer": "no"},
        {"id": "6", "prompt": "How far is the moon?", "response": "Far."},
        {"id": "7", "prompt": "How far is the  Moon", "response": "far"},  # the same text
    ]
    valid = [
        {"id": "1", "audio_path": "d.wav", "text": "A sentence, that is in both files"},  # leaks by its text
        {"id": "2", "audio_path": "a.wav", "text": "no such text"},  # by its clip
        {"id": "3", "image_path": "q.png", "question": "What?", "answer": "no"},  # too short to count
        {"id": "4", "prompt": "How far is the moon?", "response": "Far."},
        {"id": "5", "prompt": "How far is the moon?", "response": "It depends."},
    ]
    paths = [table(folder / f"{name}.csv", rows) for name, rows in (("train", train), ("valid", valid))]
    code, out, _ = run(paths[0], "--valid", paths[1], "--out", tmp_path / "o")
    assert code == 0
    report = read_json(tmp_path / "o" / "report.json")
    assert report["duplicates"] == {"id": 1, "row": 2, "media": 2}
    assert report["leaks"] == {"media": 1, "text": 2}
    listed = {(r["same"], r["where"], r["first_where"]) for r in read_csv(tmp_path / "o" / "duplicates.csv")}
    t, v = (f"{path}:" for path in paths)
    assert listed == {
        ("id", f"{t}5", f"{t}4"),
        ("row", f"{t}3", f"{t}2"),
        ("row", f"{t}8", f"{t}7"),
        ("media", f"{t}3", f"{t}2"),
        ("media", f"{t}4", f"{t}2"),
        ("leak: media", f"{v}3", f"{t}2"),
        ("leak: text", f"{v}2", f"{t}5"),
        ("leak: text", f"{v}5", f"{t}7"),
    }
    assert "leaks into validation" in out


def test_repeats_are_those_of_a_plain_search():
    r = np.random.default_rng(3)
    train, valid = Tally(), Tally()
    media = {}
    for tally, name, n in ((train, "t", 400), (valid, "v", 150)):
        media[name] = [[int(k) for k in r.integers(1, 300, r.integers(0, 4))] for _ in range(n)]
        for row in media[name]:
            tally.good.append(1)
            for key in ("id", "row", "text"):
                tally.keys[key].append(int(r.integers(0, 200)))
            for content in row:
                tally._content.extend([content, 7])
            tally._starts.append(len(tally._content) // 2)
    found = duplicates(train)
    for key in ("id", "row"):
        keys = train.keys[key].tolist()
        want = [(i, keys.index(k)) for i, k in enumerate(keys) if k and keys.index(k) < i]
        assert list(map(tuple, found[key])) == want
    t = [set(row) for row in media["t"]]
    firsts = [min((j for j in range(i) if t[j] & row), default=None) for i, row in enumerate(t)]
    assert list(map(tuple, found["media"])) == [(i, j) for i, j in enumerate(firsts) if j is not None]
    shared = leaks(train, valid)
    keys = train.keys["text"].tolist()
    assert list(map(tuple, shared["text"])) == [
        (i, keys.index(k)) for i, k in enumerate(valid.keys["text"]) if k and k in keys
    ]
    firsts = [min((j for j, first in enumerate(t) if first & set(row)), default=None) for row in media["v"]]
    assert list(map(tuple, shared["media"])) == [(i, j) for i, j in enumerate(firsts) if j is not None]


def test_lengths_with_a_model_are_those_of_its_samples_and_need_no_weights(mixed, run, tmp_path):
    from gemma_mlx.data.dataset import read_examples
    from gemma_mlx.data.processor import Processor

    model = tmp_path / "model"
    shutil.copytree(DEMO, model, ignore=shutil.ignore_patterns("*.safetensors"))
    code, _, _ = run(mixed, "--out", tmp_path / "o", "--model", model)
    assert code == 0
    report = read_json(tmp_path / "o" / "report.json")
    processor = Processor(model)
    lengths = [len(processor.sample(example).input_ids) for example in read_examples(mixed)]
    assert report["tokens"]["total"] == sum(lengths)
    assert report["tokens"]["each"] == {"min": min(lengths), "median": np.median(lengths), "max": max(lengths)}
    assert report["tokens"]["by"] == str(model)


def test_the_estimate_is_near_what_a_tokenizer_counts(mixed, run, tmp_path):
    totals = []
    for name, more in (("o", ("--image-tokens", 70)), ("p", ("--model", DEMO))):
        run(mixed, "--out", tmp_path / name, *more)
        totals.append(read_json(tmp_path / name / "report.json")["tokens"]["total"])
    assert totals[0] == pytest.approx(totals[1], rel=0.5)  # the demo's tokenizer is a small one


def test_no_framework_is_loaded(mixed, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from gemma_mlx.__main__ import verbs; from gemma_mlx.cli.door import enter;"
        f"assert enter(verbs, ['prepare', {str(mixed)!r}, '--out', {str(tmp_path / 'o')!r}]) == 0;"
        "print(sorted({'mlx', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{data}"], "prepare needs the data and a new folder"),
        (["nowhere.csv", "--out", "{out}"], "no such file"),
        (["{data}", "--out", "{out}", "--split-by", "id"], "goes with --split"),
        (["{data}", "--out", "{out}", "--split", "1.5"], "between 0 and 1"),
        (["{data}", "--out", "{out}", "--split", "0.9", "--valid", "{data}"], "leave --valid out"),
        (["{data}", "--out", "{out}", "--split", "0.9", "--split-by", "speaker"], "no column 'speaker'"),
        (["{data}", "--out", "{out}", "--embed", "--write", "csv"], "add --write parquet"),
        (["{data}", "--out", "{out}", "--headers-only", "--convert", "flac"], "--headers-only"),
        (["{data}", "--out", "{out}", "--model", "nowhere"], "no such folder"),
        (["{data}", "--out", "{data}"], "is a file"),
        (["{data}", "--out", "{out}/x/y"], "make it first"),
        (["{data}", "--out", "{out}", "--manifest", "nemo"], "not a NeMo manifest"),
    ],
)
def test_what_cannot_work_is_one_line(mixed, run, tmp_path, arguments, words):
    places = {"data": mixed, "out": tmp_path / "o"}
    code, _, err = run(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert words in err and err.strip().count("\n") == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_rows_of_mere_header_and_hostile_cells(folder, run, tmp_path):
    path = folder / "t.csv"
    path.write_text("audio_path,text\n")
    assert run(path, "--out", tmp_path / "o")[0] == 2
    rows = [{"audio_path": cell, "text": "x"} for cell in ("/etc/passwd", "file:///etc/passwd", "a.wav/..", ".")]
    code, _, _ = run(table(path, rows), "--out", tmp_path / "o")
    assert code == 2 and len(read_csv(tmp_path / "o" / "bad_rows.csv")) == 4
    (folder / "t.jsonl").write_text('{"audio_path": "a.wav", "text": "x"}\n[1]\n{"audio_path": 5, "text": {}}\nnot\n')
    code, _, _ = run(folder / "t.jsonl", "--out", tmp_path / "p")
    bad = read_csv(tmp_path / "p" / "bad_rows.csv")
    assert code == 2 and [row["where"].rsplit(":")[-1] for row in bad] == ["2", "3", "4"]


def test_a_profile_of_the_existing_tuner_becomes_yaml(run, tmp_path, monkeypatch):
    import gemma_mlx.data.tuner.profile as profile

    seen = []
    monkeypatch.setattr(
        profile, "read_profile", lambda path, name: (seen.append((path, name)) or {"rank": 8}, ["lost"])
    )
    code, _, err = run("--from-tuner", tmp_path / "config.ini", "asr", "--out", tmp_path / "run.yaml")
    assert code == 0 and seen == [(tmp_path / "config.ini", "asr")] and "lost" in err
    assert (tmp_path / "run.yaml").read_text().splitlines() == ["# lost", "rank: 8"]
