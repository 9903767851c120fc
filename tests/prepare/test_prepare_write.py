"""What prepare writes, read again by soundfile, pyarrow, `datasets` and this library, beside the originals."""

import base64
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image
from prepared_rows import read_csv, read_json, read_jsonl, table

from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.media import load_audio, load_image
from gemma_mlx.preparing.convert import flac
from gemma_mlx.preparing.write import write_parquet


@pytest.fixture
def rows(folder):
    return table(
        folder / "train.csv",
        [
            {"id": "1", "audio_path": "a.wav", "text": "one, two", "speaker": "x"},
            {"id": "2", "audio_path": "b.wav", "text": 'quo"ted', "speaker": "y"},
            {"id": "3", "audio_path": "stereo.wav", "text": "line\nbreak", "speaker": "x"},
            {"id": "4", "image_path": "p.png", "question": "Was ist das?", "answer": "Ünïcode"},
            {"id": "5", "text": "nothing but text"},
        ],
    )


def same_examples(first, second):
    """The same turns, media by what they decode to; (mean and most) error of clips in sixteen-bit steps."""
    worst = 0.0
    one, two = read_examples(first), read_examples(second)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.row_id == b.row_id and a.reference == b.reference and a.completion == b.completion
        for part, other in zip(a.media(), b.media(), strict=True):
            assert type(part) is type(other)
            if type(part).__name__ == "Audio":
                x, y = load_audio(part.path), load_audio(other.path)
                assert x.shape == y.shape
                worst = max(worst, float(np.abs(np.clip(x, -1, 32767 / 32768) - y).max()))
            else:
                np.testing.assert_array_equal(load_image(part.path), load_image(other.path))
    return worst * 32768


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("convert", [(), ("--convert", "flac")])
def test_every_format_gives_the_same_examples(rows, run, tmp_path, kind, convert):
    code, _, err = run(rows, "--out", tmp_path / "o", "--write", kind, *convert)
    assert code == 0, err
    written = tmp_path / "o" / f"train.{kind}"
    assert same_examples(rows, written) <= (0.501 if convert else 0.0)
    suffixes = {p.suffix for p in (tmp_path / "o" / "media").rglob("*.*")}
    assert suffixes == ({".flac", ".png"} if convert else {".wav", ".png"})
    assert read_json(tmp_path / "o" / "report.json")["written"] == {f"train.{kind}": 5}
    for path in (tmp_path / "o" / "media").rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")


def test_sixteen_bit_clips_keep_every_sample(folder, run, tmp_path):
    path = table(folder / "t.csv", [{"audio_path": "a.wav", "text": "x"}])
    run(path, "--out", tmp_path / "o", "--convert", "flac")
    made = next((tmp_path / "o" / "media").rglob("*.flac"))
    samples, _ = soundfile.read(made, dtype="int16")
    original, _ = soundfile.read(folder / "a.wav", dtype="int16")
    np.testing.assert_array_equal(samples, original)


def test_flac_is_the_nearest_sixteen_bit_value_and_clips(tmp_path):
    wave = np.array([0.0, 1.0, -1.0, 2.0, -3.0, 0.4 / 32768, 0.6 / 32768, 1e-3], np.float32)
    flac(tmp_path / "x.flac", wave)
    samples, rate = soundfile.read(tmp_path / "x.flac", dtype="int16")
    assert rate == 16_000
    assert samples.tolist() == [0, 32767, -32768, 32767, -32768, 0, 1, 33]


def test_other_columns_are_kept_and_other_rows_in_order(rows, run, tmp_path):
    run(rows, "--out", tmp_path / "o", "--write", "csv", "--convert", "flac")
    written, original = read_csv(tmp_path / "o" / "train.csv"), read_csv(rows)
    for row, source in zip(written, original, strict=True):
        assert {k: v for k, v in row.items() if not k.endswith("_path")} == {
            k: v for k, v in source.items() if not k.endswith("_path")
        }


def test_datasets_reads_embedded_media(rows, folder, run, tmp_path):
    import datasets

    code, _, err = run(rows, "--out", tmp_path / "o", "--embed")
    assert code == 0, err
    assert not (tmp_path / "o" / "media").exists()
    read = datasets.Dataset.from_parquet(str(tmp_path / "o" / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(read.features["audio_path"], datasets.Audio)
    assert isinstance(read.features["image_path"], datasets.Image)
    plain = read.cast_column("audio_path", datasets.Audio(decode=False))
    assert plain[1]["audio_path"]["bytes"] == (folder / "b.wav").read_bytes()
    assert plain[3]["audio_path"] is None
    np.testing.assert_array_equal(np.array(plain[3]["image_path"]), np.array(Image.open(folder / "p.png")))
    assert same_examples(rows, tmp_path / "o" / "train.parquet") == 0.0


def test_embedded_and_converted_and_taken_out_again(rows, run, tmp_path):
    assert run(rows, "--out", tmp_path / "o", "--embed", "--convert", "flac")[0] == 0
    noted = pq.read_schema(tmp_path / "o" / "train.parquet").metadata[b"huggingface"]
    assert json.loads(noted)["info"]["features"]["audio_path"] == {"sampling_rate": 16_000, "_type": "Audio"}
    assert run(tmp_path / "o" / "train.parquet", "--out", tmp_path / "p", "--write", "jsonl")[0] == 0
    assert same_examples(tmp_path / "o" / "train.parquet", tmp_path / "p" / "train.jsonl") == 0.0


def test_media_of_one_content_are_one_file(folder, run, tmp_path):
    path = table(folder / "t.csv", [{"audio_path": "a.wav", "text": str(i)} for i in range(5)])
    run(path, "--out", tmp_path / "o", "--write", "csv")
    assert len([p for p in (tmp_path / "o" / "media").rglob("*") if p.is_file()]) == 1


def test_conversations_keep_their_messages_and_their_media(folder, run, tmp_path):
    rows = [
        {
            "id": "1",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "Noise."},
                {"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "a.wav"}}]},
                {"role": "assistant", "content": [{"type": "text", "text": "More noise."}]},
            ],
        },
        {"id": "2", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"id": "3", "images": ["p.png", "q.png"], "messages": [
            {"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "The second."}]},
        {"id": "4", "image_path": ["q.png", "p.png"], "question": "Which?", "answer": "Both"},
    ]  # fmt: skip
    source = folder / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("jsonl", "csv", "parquet"):
        code, out, err = run(source, "--out", tmp_path / kind, "--write", kind, "--convert", "flac")
        assert code == 0, out + err
        assert same_examples(source, tmp_path / kind / f"train.{kind}") <= 0.501
        for one, two in zip(read_examples(source), read_examples(tmp_path / kind / f"train.{kind}"), strict=True):
            assert [(t.role, t.text) for t in one.turns] == [(t.role, t.text) for t in two.turns]
    code, _, err = run(source, "--out", tmp_path / "o", "--embed")
    assert code == 2 and f"{source}:1: messages: media inside messages are not embedded" in err
    assert not (tmp_path / "o").exists()
    first = read_jsonl(tmp_path / "jsonl" / "train.jsonl")[0]["messages"]
    assert first[0]["content"][0]["image"].startswith("media/") and first[0]["content"][1] == {
        "type": "text",
        "text": "What?",
    }
    assert first[2]["content"][0]["type"] == "audio" and first[2]["content"][0]["audio"].endswith(".flac")
    assert first[1] == {"role": "assistant", "content": "Noise."}


def test_a_folder_and_a_tar_become_tables(folder, run, tmp_path):
    place = tmp_path / "pairs"
    place.mkdir()
    for name in ("a", "b"):
        (place / f"{name}.wav").write_bytes((folder / f"{name}.wav").read_bytes())
        (place / f"{name}.txt").write_text(f"said in {name}")
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for path in sorted(place.iterdir()):
            tar.add(path, path.name)
    for source in (place, tmp_path / "pairs.tar"):
        out = tmp_path / f"out-{source.name}"
        code, _, err = run(source, "--out", out, "--write", "jsonl")
        assert code == 0, err
        rows = read_jsonl(out / "train.jsonl")
        assert [row["text"] for row in rows] == ["said in a", "said in b"]
        assert [(out / row["audio_path"]).read_bytes() for row in rows] == [
            (folder / f"{name}.wav").read_bytes() for name in ("a", "b")
        ]


def test_heic_becomes_png(folder, run, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.open(folder / "p.png")).save(folder / "p.heic")
    path = table(folder / "t.csv", [{"image_path": "p.heic", "caption": "x"}])
    run(path, "--out", tmp_path / "o", "--convert", "flac")
    made = next((tmp_path / "o" / "media").rglob("*.png"))
    np.testing.assert_array_equal(np.array(Image.open(made)), load_image(folder / "p.heic"))


def test_long_clips_keep_their_end_where_training_cuts_it(folder, run, tmp_path):
    path = table(folder / "t.csv", [{"audio_path": "long.wav", "text": "x"}])
    assert run(path, "--out", tmp_path / "o", "--convert", "flac")[0] == 2
    assert run(path, "--out", tmp_path / "p", "--convert", "flac", "--long-audio", "truncate")[0] == 0
    assert soundfile.info(next((tmp_path / "p" / "media").rglob("*.flac"))).frames == 31 * 16_000


def test_mapped_columns_and_media_roots(folder, run, tmp_path):
    apart = tmp_path / "apart"
    apart.mkdir()
    path = table(apart / "t.tsv", [{"clip": "a.wav", "sentence": "x"}])
    path.write_text("clip\tsentence\na.wav\tfirst\nb.wav\tsecond\n")
    flags = ("--columns", "audio_path=clip", "--columns", "text=sentence")
    assert run(path, "--out", tmp_path / "o", "--media-root", folder, *flags, "--write", "csv")[0] == 0
    written = read_csv(tmp_path / "o" / "train.csv")
    assert [row["sentence"] for row in written] == ["first", "second"]
    assert (tmp_path / "o" / written[0]["clip"]).read_bytes() == (folder / "a.wav").read_bytes()
    again = run(tmp_path / "o" / "train.csv", "--out", tmp_path / "p", *flags)
    assert again[0] == 0


def test_parquet_types_follow_the_values(tmp_path):
    rows = [
        {"n": 1, "x": 1, "mixed": "a", "list": ["p"], "empty": None, "deep": {"a": [1]}},
        {"n": 2, "x": 0.5, "mixed": 3, "list": [], "deep": {"a": [], "b": "x"}},
        {"n": None, "mixed": {"k": [1]}, "list": ["q", "r"]},
    ]
    path = tmp_path / "x.parquet"
    names = ["n", "x", "mixed", "list", "empty", "deep"]
    assert write_parquet(path, names, lambda _: ((row, "here") for row in rows), {}) == 3
    read = pq.read_table(path).to_pylist()
    assert [row["n"] for row in read] == [1, 2, None]
    assert [row["x"] for row in read] == [1.0, 0.5, None]
    assert [row["mixed"] for row in read] == ["a", "3", '{"k": [1]}']
    assert [row["list"] for row in read] == [["p"], [], ["q", "r"]]
    assert [row["empty"] for row in read] == [None] * 3
    assert read[1]["deep"] == {"a": [], "b": "x"}
    assert pq.read_schema(path).field("n").type == "int64"


def test_a_full_folder_is_refused_and_a_failure_leaves_nothing(rows, run, tmp_path, monkeypatch):
    import gemma_mlx.preparing.run as module

    assert run(rows, "--out", tmp_path / "o", "--write", "csv")[0] == 0
    code, _, err = run(rows, "--out", tmp_path / "o", "--write", "csv")
    assert code == 2 and "not empty" in err
    before = sorted(p.name for p in tmp_path.iterdir())

    def stopped(*_):
        raise KeyboardInterrupt

    for name in ("write_rows", "duplicates"):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, stopped)
            assert run(rows, "--out", tmp_path / "new", "--write", "csv", "--convert", "flac")[0] == 130
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "train.csv").write_text("of a run that was killed")
    assert run(rows, "--out", tmp_path / "new")[0] == 0
    assert not (tmp_path / "new" / "train.csv").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "new"])


def test_originals_are_untouched(rows, folder, run, tmp_path):
    before = {p.name: (p.read_bytes(), p.stat().st_mode) for p in folder.iterdir()}
    for i, flags in enumerate((["--write", "csv"], ["--convert", "flac"], ["--embed"])):
        assert run(rows, "--out", tmp_path / str(i), *flags)[0] == 0
    assert {p.name: (p.read_bytes(), p.stat().st_mode) for p in folder.iterdir()} == before


def test_headers_alone_are_enough_to_write(rows, run, tmp_path):
    assert run(rows, "--out", tmp_path / "o", "--headers-only", "--split", "0.6", "--write", "jsonl")[0] == 0
    written = [read_examples(tmp_path / "o" / f"{name}.jsonl") for name in ("train", "valid")]
    assert sorted(e.row_id for part in written for e in part) == ["1", "2", "3", "4", "5"]
    assert read_json(tmp_path / "o" / "report.json")["media_compared_by"] == "name"


def test_media_written_into_a_row_become_files(folder, run, tmp_path):
    data = (folder / "a.wav").read_bytes()
    row = {"audio_path": f"data:audio/wav;base64,{base64.b64encode(data).decode()}", "text": "x"}
    (folder / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert run(folder / "t.jsonl", "--out", tmp_path / "o", "--write", "csv")[0] == 0
    (written,) = read_csv(tmp_path / "o" / "train.csv")
    assert (tmp_path / "o" / written["audio_path"]).read_bytes() == data
    assert written["audio_path"].endswith(".wav")


def test_patches_are_in_what_is_written(rows, folder, run, tmp_path):
    for name, content in {
        "delete": "id\n2\n",
        "override_text_verbatim": "id,text_verbatim\n1.0,corrected\n",
    }.items():
        (tmp_path / "patches" / name).mkdir(parents=True)
        (tmp_path / "patches" / name / "x.csv").write_text(content)
    code, _, err = run(rows, "--out", tmp_path / "o", "--write", "csv", "--patches", tmp_path / "patches")
    assert code == 0, err
    written = read_csv(tmp_path / "o" / "train.csv")
    assert [(row["id"], row["text"]) for row in written][:2] == [("1", "corrected"), ("3", "line\nbreak")]
