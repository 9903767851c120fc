"""Videos: sampled frames, times, token ids and arrays, against transformers' functions on the same files."""

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data.batches import collate
from gemma_mlx.data.dataset import Dataset
from gemma_mlx.data.examples import Example, Image, Text, Turn, Video
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.video import load_frames, sampled, spell_frames, timestamps, video_info
from gemma_mlx.errors import InputError

pytest.importorskip("av")


def write_video(path, frames, rate=3, size=(90, 130), codec="mpeg4"):
    import av

    rng = np.random.default_rng(frames)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        base = rng.integers(0, 256, (size[0] // 10, size[1] // 10, 3), dtype=np.uint8)
        for i in range(frames):
            picture = np.kron(np.roll(base, i, axis=1), np.ones((10, 10, 1), np.uint8))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Longer and shorter than the frames that are sampled; 75 frames at 1 a second pass the minute."""
    folder = tmp_path_factory.mktemp("films")
    write_video(folder / "long.mp4", 75, rate=1)
    write_video(folder / "short.mp4", 5, size=(60, 40))
    write_video(folder / "no-count.mkv", 40)
    return folder


@pytest.mark.parametrize("name", ["long.mp4", "no-count.mkv"])
@pytest.mark.parametrize("count", [1, 7, 32])
def test_frames_are_those_of_transformers(films, name, count):
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

    info = video_info(films / name)
    metadata = VideoMetadata(total_num_frames=info.frames, fps=info.fps)
    expected = default_sample_indices_fn(metadata, num_frames=count)
    assert sampled(info.frames, count) == expected.tolist()
    if name == "long.mp4":  # the other file's header has no count, which the reference needs
        frames, theirs = read_video_pyav(str(films / name), lambda metadata: expected)
        assert (info.frames, info.fps) == (theirs.total_num_frames, theirs.fps) == (75, 1.0)
        found = load_frames(films / name, count=count)
        assert np.array_equal(np.stack(found), frames)


def test_short_videos_are_read_whole(films):
    info = video_info(films / "short.mp4")
    assert (info.frames, info.size) == (5, (60, 40))
    assert len(load_frames(films / "short.mp4", count=32)) == 5
    assert timestamps(info, 32) == ["00:00", "00:00", "00:00", "00:01", "00:01"]


def test_frames_spelt_in_order():
    films = [["00:00", "00:01"], ["01:10"]]
    assert spell_frames("a<v>b<v>c", "<v>", films) == "a00:00 <v> 00:01 <v>b01:10 <v>c"
    assert spell_frames("a<v>b", "<v>", films) == "a00:00 <v> 00:01 <v>b"
    assert spell_frames("ab", "<v>", films) == "ab"


def test_token_ids_types_and_labels(checkpoint, media, films):
    """A conversation with two videos and a picture: the whole text written out by transformers' processor."""
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.video_utils import VideoMetadata

    long, short, wide = Video(films / "long.mp4"), Video(films / "short.mp4"), Image(media / "wide.png")
    turns = [
        Turn("user", (long, Text("What is in this "), wide)),
        Turn("model", (Text("The sun."),)),
        Turn("user", (Text("and now"), short, Text("hello"))),
        Turn("model", (Text("the fox"),)),
    ]
    processor = Processor(checkpoint, image_tokens=70)
    sample = processor.sample(Example(tuple(turns), "here"))
    marks = SimpleNamespace(boi_token="<|image>", eoi_token="<image|>", video_token="<|video|>")
    expected = []
    for file, count in ((long, 32), (short, 5)):
        info = video_info(file.path)
        data = VideoMetadata(total_num_frames=info.frames, fps=info.fps, frames_indices=sampled(info.frames, count))
        # 130 × 90 and 40 × 60 pixels at 70 tokens: 10 × 6 and 6 × 10 cells
        inputs = {"num_soft_tokens_per_video": [60], "video_metadata": [data]}
        expected.append(Gemma4Processor.replace_video_token(marks, inputs, 0))
    picture = f"<|image>{'<|image|>' * sample.images[0].soft_tokens}<image|>"
    text = (
        f"<bos><|turn>user\n{expected[0]}What is in this{picture}<turn|>\n<|turn>model\nThe sun.<turn|>\n"
        f"<|turn>user\nand now{expected[1]}hello<turn|>\n<|turn>model\nthe fox<turn|>\n"
    )
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert sample.input_ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert "01:10 <|image>" in expected[0]
    video_id = processor.spec.video_token_id
    assert np.array_equal(sample.token_types == 2, sample.input_ids == video_id)
    assert (sample.labels[sample.token_types == 2] == IGNORE_INDEX).all()
    learned = sample.labels[sample.labels != IGNORE_INDEX].tolist()
    assert learned == tokenizer.encode("The sun.<turn|>the fox<turn|>", add_special_tokens=False).ids
    light = processor.sample(Example(tuple(turns), "here"), with_features=False)
    assert np.array_equal(light.input_ids, sample.input_ids) and not light.videos


def test_arrays_are_those_of_the_video_processor(checkpoint, films):
    """Frames as transformers' picture processor makes them at 70 tokens, video after video; its video processor too
    where torchvision is there (which resizes a little differently)."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    processor = Processor(checkpoint, image_tokens=280)
    samples = [
        processor.sample(Example((Turn("user", (Video(films / name),)), Turn("model", (Text("x"),))), name))
        for name in ("short.mp4", "long.mp4")
    ]
    batch = collate(samples, pad_id=0)
    assert batch.num_frames_per_video.tolist() == [5, 32] and batch.pixel_values is None
    frames = [f for name in ("short.mp4", "long.mp4") for f in load_frames(films / name)]
    expected = Gemma4ImageProcessorPil(max_soft_tokens=70)(frames, return_tensors="np")
    pixels = batch.inputs()["pixel_values_videos"]
    patches = pixels.shape[1]
    assert np.abs(pixels - expected["pixel_values"][:, :patches]).max() <= 1e-6
    assert np.array_equal(batch.video_position_ids, expected["image_position_ids"][:, :patches])
    try:
        from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
    except Exception:
        return
    long = np.stack(frames[5:]).transpose(0, 3, 1, 2)
    theirs = Gemma4VideoProcessor(do_sample_frames=False)(videos=[long], return_tensors="np")
    assert theirs["num_soft_tokens_per_video"] == [60]
    ours, n = pixels[5:], 60 * 9
    assert np.array_equal(batch.video_position_ids[5:, :n], theirs["video_position_ids"][:, :n])
    difference = np.abs(ours[:, :n] - theirs["pixel_values_videos"][:, :n])
    assert difference.mean() <= 2 / 255 and np.percentile(difference, 99) <= 8 / 255


def test_video_column(checkpoint, films):
    path = films / "train.csv"
    path.write_text("video_path,caption,question,answer\nshort.mp4,a red house,,\nlong.mp4,,What is it?,The sun.\n")
    dataset = Dataset(path, Processor(checkpoint))
    assert [type(part) for part in dataset.examples[0].turns[0].parts] == [Video, Text]
    assert dataset.examples[0].turns[0].parts[1].text == "Describe this video."
    assert [len(sample.videos[0]) for sample in dataset] == [5, 32]
    path.write_text("video,caption\nshort.mp4,a red house\n")
    with pytest.raises(InputError, match="video_path=video"):
        Dataset(path, Processor(checkpoint))


def test_bad_videos_are_one_line(checkpoint, films, media):
    (films / "empty.mp4").write_bytes(b"")
    (films / "broken.mp4").write_bytes((films / "long.mp4").read_bytes()[:900])
    for name, message in (("empty.mp4", "unreadable"), ("broken.mp4", "unreadable"), ("none.mp4", "no such file")):
        with pytest.raises(InputError, match=f"t.csv:2: .*{name}.*{message}") as caught:
            video_info(films / name, "t.csv:2")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no video track"):
        video_info(media / "short.wav")
