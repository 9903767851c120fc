"""NeMo and Granary manifests: stretches of clips, languages, tasks."""

import json

import numpy as np
import pytest
import soundfile
from prepared_rows import read_csv, read_jsonl

from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.examples import TRANSCRIBE, TRANSCRIBE_IN
from gemma_mlx.data.media import load_audio
from gemma_mlx.preparing.nemo import PLAIN, Cut


def manifest(folder, *rows):
    path = folder / "manifest.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_stretches_are_cut_by_offset_and_duration(folder, run, tmp_path):
    path = manifest(
        folder,
        {"audio_filepath": "a.wav", "offset": 0.25, "duration": 0.5, "text": "middle"},
        {"audio_filepath": "a.wav", "offset": 0, "duration": 0.25, "text": "start"},
        {"audio_filepath": "b.wav", "duration": 1.0884, "text": "whole"},
        {"audio_filepath": str(folder / "stereo.wav"), "offset": 0.9, "duration": 0.1, "text": "end"},
    )
    code, out, err = run(path, "--out", tmp_path / "o", "--convert", "flac", "--write", "jsonl")
    assert code == 0, out + err
    rows = read_jsonl(tmp_path / "o" / "train.jsonl")
    assert [row["text"] for row in rows] == ["middle", "start", "whole", "end"]
    clips = [soundfile.read(tmp_path / "o" / row["audio_path"], dtype="int16")[0] for row in rows]
    original, _ = soundfile.read(folder / "a.wav", dtype="int16")
    np.testing.assert_array_equal(clips[0], original[4_000:12_000])
    np.testing.assert_array_equal(clips[1], original[:4_000])
    assert abs(len(clips[2]) - round(48_000 * 16_000 / 44_100)) <= 1
    stereo, _ = soundfile.read(folder / "stereo.wav")
    assert np.abs(clips[3] / 32768 - stereo[14_400:].mean(axis=1)).max() <= 0.5 / 32768 + 1e-7


def test_without_conversion_stretches_are_lossless_files(folder, run, tmp_path):
    soundfile.write(folder / "float.wav", np.linspace(-1.5, 1.5, 44_100, dtype=np.float32), 44_100, "FLOAT")
    path = manifest(folder, {"audio_filepath": "float.wav", "offset": 0.5, "duration": 0.25, "text": "x"})
    assert run(path, "--out", tmp_path / "o", "--write", "csv", "--manifest", "nemo")[0] == 0
    (row,) = read_csv(tmp_path / "o" / "train.csv")
    cut, rate = soundfile.read(tmp_path / "o" / row["audio_path"], dtype="float32")
    whole, _ = soundfile.read(folder / "float.wav", dtype="float32")
    assert rate == 44_100
    np.testing.assert_array_equal(cut, whole[22_050:33_075])


def test_a_cut_is_what_decoding_the_whole_gives(folder):
    cut = Cut(folder / "d.wav", 1.0, 1.5, "x:1")
    whole, _ = soundfile.read(folder / "d.wav", dtype="float32")
    with cut.open() as file:
        got, rate = soundfile.read(file, dtype="float32")
    np.testing.assert_array_equal(got, whole[8_000:20_000])
    assert rate == 8_000 and cut.size() == len(cut.open().read())
    assert len(load_audio(cut)) == 24_000


def test_languages_tasks_and_punctuation(folder, run, tmp_path):
    audio = {"audio_filepath": "a.wav", "duration": 1.0}
    path = manifest(
        folder,
        {**audio, "text": "Hallo.", "lang": "de"},
        {**audio, "text": "Hello.", "source_lang": "de", "target_lang": "en", "taskname": "s2t_translation"},
        {**audio, "answer": "Bonjour", "source_lang": "fr", "target_lang": "fr", "taskname": "asr", "pnc": "no"},
        {**audio, "text": "Plain", "speaker": "s1"},
    )
    assert run(path, "--out", tmp_path / "o", "--write", "jsonl")[0] == 0
    examples = read_examples(tmp_path / "o" / "train.jsonl")
    prompts = [e.turns[0].text for e in examples]
    assert prompts[0] == TRANSCRIBE_IN.format(language="German").strip()
    assert "from German into English" in prompts[1]
    assert prompts[2] == (TRANSCRIBE_IN.format(language="French") + PLAIN).strip()
    assert prompts[3] == TRANSCRIBE
    assert [e.reference for e in examples] == ["Hallo.", "Hello.", "Bonjour", "Plain"]
    assert [e.task for e in examples] == ["transcript", "answer", "transcript", "transcript"]
    assert read_jsonl(tmp_path / "o" / "train.jsonl")[3]["speaker"] == "s1"


def test_bad_stretches_name_their_line(folder, run, tmp_path):
    audio = {"audio_filepath": "a.wav", "text": "x"}
    path = manifest(
        folder,
        {**audio, "offset": 0.5, "duration": 0.5},
        {**audio, "offset": 0.5, "duration": 2},
        {**audio, "offset": 5, "duration": 1},
        {**audio, "offset": -1, "duration": 1},
        {**audio, "offset": 0},
        {**audio, "offset": "NaN", "duration": 1},
        {**audio, "audio_filepath": "../x.wav", "offset": 0, "duration": 1},
        {**audio, "audio_filepath": "p.png", "offset": 0, "duration": 1},
        {**audio, "offset": 0.95, "duration": 0.1},
    )
    assert run(path, "--out", tmp_path / "o")[0] == 2
    bad = read_csv(tmp_path / "o" / "bad_rows.csv")
    assert [row["where"] for row in bad] == [f"{path}:{line}" for line in range(2, 9)]
    words = ["ends at 2.5 s", "ends at 6 s", *["expected seconds"] * 3, "outside", "unreadable"]
    for row, word in zip(bad, words, strict=True):
        assert word in row["reason"], row


def test_tar_shards_are_refused(folder, run, tmp_path):
    path = manifest(folder, {"audio_filepath": "a.wav", "text": "x", "shard_id": 3})
    code, _, err = run(path, "--out", tmp_path / "o")
    assert code == 2 and "shard_id" in err and "unpack" in err


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest.json"])
def test_a_mapped_manifest_is_an_ordinary_table(folder, run, tmp_path, name):
    row = {"audio_filepath": "a.wav", "offset": 0.5, "duration": 0.1, "text": "x"}
    path = manifest(folder, row).rename(folder / name)
    flags = ("--columns", "audio_path=audio_filepath")
    assert run(path, "--out", tmp_path / "o", *flags, "--write", "jsonl")[0] == 0
    row = read_jsonl(tmp_path / "o" / "train.jsonl")[0]
    assert soundfile.info(tmp_path / "o" / row["audio_filepath"]).frames == 16_000
