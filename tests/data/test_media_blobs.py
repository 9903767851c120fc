"""Media from blobs are those from files; and files that lie about themselves are refused in one line, within bounds."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from gemma_mlx.data import media
from gemma_mlx.data.blob import Embedded, Member
from gemma_mlx.data.media import audio_samples, image_dimensions, load_audio, load_image
from gemma_mlx.data.video import load_frames, video_info
from gemma_mlx.errors import InputError, SourceError

RNG = np.random.default_rng(11)


def tone(seconds, rate, channels=1):
    t = np.arange(int(seconds * rate))[:, None] / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 90 * np.arange(channels)) * t)).astype(np.float32)


def write_aac(path, seconds, form=None):
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream("aac", rate=44_100, layout="stereo")
        for start in range(0, int(44_100 * seconds), 1024):
            block = np.ascontiguousarray(tone(1024 / 44_100, 44_100, 2).T)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44_100, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_video(path, frames=5, size=(64, 48), codec="mpeg4"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=3)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr24" if codec == "rawvideo" else "yuv420p"
        for i in range(frames):
            picture = np.full((*size, 3), 20 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


class Opened:
    """A blob whose file is one of this machine's, or anything else that `make` returns."""

    suffix = ""

    def __init__(self, make, name="far://away/a"):
        self.make, self.name = make, name

    def size(self):
        return 1

    def open(self):
        return self.make()


class Callbacks(io.RawIOBase):
    """A file without a descriptor that is no BytesIO: read by calls back into Python."""

    def __init__(self, data):
        self._file = io.BytesIO(data)

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        return self._file.readinto(buffer)

    def seek(self, offset, whence=0):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()


def blobs(path):
    """The same bytes as every kind of medium, none of whose names tell the format."""
    data = path.read_bytes()
    archive = path.with_suffix(".archive")
    archive.write_bytes(b"x" * 513 + data + b"y" * 99)
    return [
        str(path),
        Embedded("cell", data),
        Embedded("cell", data, ".png" if path.suffix != ".png" else ".wav"),
        Member(archive, 513, len(data), "member"),
        Opened(lambda: path.open("rb")),
        Opened(lambda: Callbacks(data)),
    ]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for suffix, rate, channels in (("wav", 16_000, 1), ("flac", 16_000, 1), ("ogg", 44_100, 2), ("mp3", 44_100, 2)):
        soundfile.write(folder / f"a.{suffix}", tone(2, rate, channels), rate)
    soundfile.write(folder / "a.aiff", tone(2, 16_000), 16_000)
    soundfile.write(folder / "a.opus", tone(2, 48_000, 2), 48_000, format="OGG", subtype="OPUS")
    for suffix, form in (("m4a", None), ("aac", "adts"), ("mka", "matroska")):
        write_aac(folder / f"a.{suffix}", 2, form)
    return folder


CLIPS = ["wav", "flac", "ogg", "mp3", "aiff", "opus", "m4a", "aac", "mka"]


@pytest.mark.parametrize("suffix", CLIPS)
def test_clips_from_blobs(clips, suffix):
    path = clips / f"a.{suffix}"
    expected = load_audio(path)
    assert len(expected) == pytest.approx(32_000, abs=2000) and np.abs(expected).max() > 0.2
    for medium in blobs(path):
        assert np.array_equal(load_audio(medium), expected), medium
        assert audio_samples(medium) == len(expected)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_blocks_change_nothing(tmp_path, monkeypatch, channels):
    for suffix in ("wav", "flac", "ogg"):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, tone(1, 16_000, channels), 16_000)
        whole = load_audio(path)
        assert np.array_equal(whole, soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1))
        with monkeypatch.context() as patch:
            patch.setattr(media, "_BLOCK", 1000)
            assert np.array_equal(load_audio(path), whole)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "heic"])
def test_pictures_from_blobs(tmp_path, suffix, monkeypatch):
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    expected = load_image(path)
    assert expected.shape == (40, 56, 3)
    for medium in blobs(path):
        assert np.array_equal(load_image(medium), expected)
        assert image_dimensions(medium) == (40, 56)
    monkeypatch.setattr(media, "_STRIP", 300)  # strip by strip
    assert np.array_equal(load_image(path), expected)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_videos_from_blobs(tmp_path, name):
    path = write_video(tmp_path / name)
    expected = load_frames(path, count=3)
    assert video_info(path).frames == 5 and len(expected) == 3
    for medium in blobs(path):
        assert video_info(medium) == video_info(path)
        assert np.array_equal(load_frames(medium, count=3), expected)


LOADERS = [load_audio, audio_samples, load_image, image_dimensions, video_info, load_frames]


@pytest.mark.parametrize("load", LOADERS)
def test_a_blob_s_name_stands_in_its_errors(load):
    pytest.importorskip("av")
    for data in (b"", b"x", RNG.bytes(3000)):
        with pytest.raises(InputError) as caught:
            load(Embedded("train.parquet:8 audio", data), "train.parquet:8")
        message = str(caught.value)
        assert message.startswith("train.parquet:8: train.parquet:8 audio: ") and "\n" not in message
        assert not isinstance(caught.value, SourceError)


@pytest.mark.parametrize("load", LOADERS)
def test_a_source_that_fails_is_no_bad_row(load, clips):
    pytest.importorskip("av")

    def fail():
        raise SourceError("gs://clinic/7.flac: the server does not answer")

    with pytest.raises(SourceError, match=r"^gs://clinic/7.flac: the server"):
        load(Opened(fail), "t.csv:2")

    def refuse():
        raise InputError("gs://clinic/7.flac: no such object")

    with pytest.raises(InputError, match=r"^t.csv:2: gs://clinic/7.flac: no such object"):
        load(Opened(refuse), "t.csv:2")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "m4a", "mka"])
def test_a_source_that_fails_while_it_is_decoded(clips, suffix, capfd):
    data = (clips / f"a.{suffix}").read_bytes()

    class Failing(Callbacks):
        def readinto(self, buffer):
            if self.tell() > len(data) // 2:
                raise SourceError("gs://clinic/7: the connection broke")
            return super().readinto(buffer)

    with pytest.raises(SourceError, match="the connection broke"):
        load_audio(Opened(lambda: Failing(data)))
    assert "Traceback" not in capfd.readouterr().err


def refused(load, path, *words, **options):
    """One line with these words, from the file and from a blob of it, in no time."""
    for medium in (path, Embedded("cell", path.read_bytes())):
        began = time.monotonic()
        with pytest.raises(InputError) as caught:
            load(medium, "t.csv:2", **options)
        message = str(caught.value)
        assert message.startswith("t.csv:2: ") and "\n" not in message
        assert any(word in message for word in words), message
        assert time.monotonic() - began < 5


def wav(rate=16_000, channels=1, claimed=32_000, data=bytes(32_000)):
    block = min(65_535, 2 * channels)
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, min(2**32 - 1, rate * block), block, 16)
    return b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + head + b"data" + struct.pack("<I", claimed) + data


@pytest.mark.parametrize("rate", [0, 1, 100, 10**9, 2**31 - 1])
def test_sample_rates_that_are_none(tmp_path, rate):
    (tmp_path / "a.wav").write_bytes(wav(rate))
    refused(load_audio, tmp_path / "a.wav", f"its sample rate is {rate:,} Hz", "unreadable audio")


@pytest.mark.parametrize("long_audio", ["error", "truncate"])
def test_headers_that_promise_too_much(tmp_path, clips, long_audio):
    path = tmp_path / "a"
    path.write_bytes(wav(claimed=36_000 * 32_000, data=bytes(1000)))
    refused(load_audio, path, "promises 1,152,000,000 bytes of samples, 1,000 are there", long_audio=long_audio)
    data = bytearray((clips / "a.flac").read_bytes())
    data[21] |= 0xF  # STREAMINFO: 36 bits of total samples
    data[22:26] = b"\xff" * 4
    path.write_bytes(data)
    refused(load_audio, path, "over-long audio: 4294967.3 s", "unreadable", "truncated", long_audio=long_audio)
    data = bytearray((clips / "a.mp3").read_bytes())
    at = max(data.find(b"Xing"), data.find(b"Info"))
    frames = struct.unpack(">I", data[at + 8 : at + 12])[0]
    data[at + 8 : at + 12] = struct.pack(">I", frames * 18_000)
    path.write_bytes(data)
    refused(load_audio, path, "over-long", "truncated audio: its header promises 30.0 s", long_audio=long_audio)
    path.write_bytes(with_granule((clips / "a.ogg").read_bytes(), 36_000 * 44_100))
    refused(load_audio, path, "over-long", "truncated audio: its header promises 30.0 s", long_audio=long_audio)


def with_granule(data, granule):
    """An Ogg file whose last page gives another length, with its checksum."""
    at = data.rfind(b"OggS")
    page = bytearray(data[at:])
    page[6:14], page[22:26] = struct.pack("<q", granule), bytes(4)
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = ((crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    page[22:26] = struct.pack("<I", crc)
    return data[:at] + page


@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_wav_from_a_pipe_goes_on_to_its_end(tmp_path, claimed):
    (tmp_path / "a.wav").write_bytes(wav(claimed=claimed))
    assert len(load_audio(tmp_path / "a.wav")) == 16_000


def test_255_channels_are_averaged(tmp_path):
    wave = RNG.integers(-3000, 3000, (8000, 255)).astype("<i2")
    (tmp_path / "a.wav").write_bytes(wav(channels=255, claimed=wave.nbytes, data=wave.tobytes()))
    expected = (wave.astype(np.float64) / 32_768).mean(axis=1)
    assert np.abs(load_audio(tmp_path / "a.wav") - expected).max() < 1e-6
    (tmp_path / "a.wav").write_bytes(wav(channels=0))
    refused(load_audio, tmp_path / "a.wav", "unreadable audio")


@pytest.mark.parametrize("suffix", CLIPS)
@pytest.mark.parametrize("part", [0.3, 0.6])
def test_truncated_clips(clips, tmp_path, suffix, part):
    data = (clips / f"a.{suffix}").read_bytes()
    (tmp_path / "a").write_bytes(data[: int(part * len(data))])
    refused(load_audio, tmp_path / "a", "truncated audio", "unreadable audio", "empty audio")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "avif", "jp2"])
def test_truncated_pictures(tmp_path, suffix):
    whole = io.BytesIO()
    form = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    Image.fromarray(RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(whole, form)
    for part in (0.05, 0.5, 0.9):
        (tmp_path / "a").write_bytes(whole.getvalue()[: int(part * len(whole.getvalue()))])
        refused(load_image, tmp_path / "a", "unreadable image")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, before=(), after=(), data=b""):
    """Black, one grey value a pixel."""
    packer = zlib.compressobj(6)
    rows = data or b"".join(packer.compress(bytes((width * bits + 7) // 8 + 1)) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", head, *before, chunk(b"IDAT", rows), *after, chunk(b"IEND", b"")))


def test_pictures_that_unpack_to_too_much(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(png(50_000, 50_000, 1))
    assert path.stat().st_size < 500_000
    refused(load_image, path, "image too large")
    refused(image_dimensions, path, "image too large")
    gif = io.BytesIO()
    Image.new("P", (10, 10)).save(gif, "GIF")
    for at, size in ((6, (65_535, 65_535)), (gif.getvalue().find(b"\x2c") + 5, (65_535, 65_535))):  # screen; frame
        data = bytearray(gif.getvalue())
        data[at : at + 4] = struct.pack("<HH", *size)
        path.write_bytes(data)
        refused(load_image, path, "image too large")
    webp = io.BytesIO()
    Image.new("RGB", (16, 16)).save(webp, "WEBP", lossless=True)
    at = webp.getvalue().find(b"VP8L") + 9
    data = bytearray(webp.getvalue())
    data[at : at + 4] = struct.pack("<I", 16_382 | 16_382 << 14)
    path.write_bytes(data)
    refused(load_image, path, "image too large")
    tiff = io.BytesIO()
    Image.new("1", (9000, 9000)).save(tiff, "TIFF", compression="group4")
    data = tiff.getvalue().replace(struct.pack("<HHII", 256, 4, 1, 9000), struct.pack("<HHII", 256, 4, 1, 900_000))
    data = data.replace(struct.pack("<HHIHH", 256, 3, 1, 9000, 0), struct.pack("<HHII", 256, 4, 1, 900_000))
    path.write_bytes(data)
    refused(load_image, path, "image too large")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_png_chunks_that_unpack_to_too_much(tmp_path, kind):
    packed = zlib.compress(bytes(50_000_000), 6)
    extra = chunk(kind, b"k\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + packed)
    (tmp_path / "a").write_bytes(png(4, 4, before=(extra,)))
    refused(load_image, tmp_path / "a", "unreadable image (Decompressed data too large")
    (tmp_path / "a").write_bytes(png(4, 4, data=packed))  # more pixels than its size has: not unpacked
    assert load_image(tmp_path / "a").shape == (4, 4, 3)


@pytest.mark.parametrize(
    "script",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", b"#EXTM3U\n"],
)
def test_formats_that_run_or_open_something_are_none(tmp_path, script):
    (tmp_path / "a").write_bytes(script)
    refused(load_image, tmp_path / "a", "no known picture format")


def test_playlists_open_no_other_file(clips, tmp_path):
    pytest.importorskip("av")
    clip = clips / "a.aac"
    for script in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nfile://{clip}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {clip}\n",
    ):
        for name in ("a.mp4", "a.m3u8"):
            (tmp_path / name).write_text(script)
            refused(load_audio, tmp_path / name, "unreadable audio")
            refused(video_info, tmp_path / name, "unreadable video")


def test_videos_that_promise_too_much(tmp_path):
    data = write_video(tmp_path / "v.mp4").read_bytes()
    lie = bytearray(data)
    many = struct.pack(">I", 150_000_000)
    for box, at, value in ((b"stsz", 8, struct.pack(">I", 1) + many), (b"stsc", 16, many), (b"stts", 12, many)):
        start = lie.find(box) + at
        lie[start : start + len(value)] = value
    (tmp_path / "lie.mp4").write_bytes(lie)
    refused(video_info, tmp_path / "lie.mp4", "its header promises 150,000,000 frames in")
    refused(load_frames, tmp_path / "lie.mp4", "its header promises 150,000,000 frames in")
    data = bytearray(write_video(tmp_path / "v.avi", codec="rawvideo").read_bytes())
    at = data.find(b"strf") + 12  # BITMAPINFOHEADER: width, height
    data[at : at + 8] = struct.pack("<ii", 20_000, 20_000)
    (tmp_path / "wide.avi").write_bytes(data)
    refused(video_info, tmp_path / "wide.avi", "video too large", "unreadable video", "empty video")


_PEAK = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import av, soundfile, soxr
from PIL import Image
from gemma_mlx.data.media import load_audio, load_image
load, path, option = sys.argv[1:]
Image.init()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = load_image(path) if load == "image" else load_audio(path, long_audio=option)
    outcome = str(found.shape)
except ValueError as e:
    outcome = str(e)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown // (1024 if sys.platform == "linux" else 1 << 20), outcome)
"""


def peak(load, path, option=""):
    """(MiB that the process grew by, what came of it)."""
    out = subprocess.run(
        [sys.executable, "-c", _PEAK, load, str(path), option], capture_output=True, text=True, check=True
    )
    grown, _, outcome = out.stdout.strip().partition(" ")
    return int(grown), outcome


@pytest.mark.parametrize(
    ("suffix", "rate"), [("flac", 16_000), pytest.param("flac", 192_000, marks=pytest.mark.slow), ("ogg", 8_000)]
)
def test_hours_of_silence_take_neither_memory_nor_time(tmp_path, suffix, rate):
    pytest.importorskip("av")
    path = tmp_path / f"a.{suffix}"
    hours = 10 if suffix == "flac" and rate == 16_000 else 1
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        minute = np.zeros(60 * rate, np.float32)
        for _ in range(60 * hours):
            file.write(minute)
    assert path.stat().st_size < 3_000_000
    refused(load_audio, path, f"over-long audio: {3600.0 * hours} s")
    refused(audio_samples, path, f"over-long audio: {3600.0 * hours} s")
    began = time.process_time()
    assert len(load_audio(path, long_audio="truncate")) == 480_000
    assert time.process_time() - began < 2
    grown, outcome = peak("audio", path, "truncate")
    assert outcome == "(480000,)" and grown < 100, grown
    grown, outcome = peak("audio", path, "error")
    assert "over-long" in outcome and grown < 20, grown


def test_a_large_picture_takes_no_more_than_twelve_bytes_a_pixel(tmp_path):
    """The largest that is read: 4 bytes a pixel in Pillow, 3 in the result, and strips."""
    pytest.importorskip("av")
    (tmp_path / "a.png").write_bytes(png(9400, 9500))
    assert (tmp_path / "a.png").stat().st_size < 500_000
    grown, outcome = peak("image", tmp_path / "a.png")
    assert outcome == "(9500, 9400, 3)" and grown < 12 * 9400 * 9500 / 2**20, grown


def test_paths_of_every_sort(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path("a\0b"), Path("x" * 5000)):
        for load in LOADERS:
            with pytest.raises(InputError, match=r"^t.csv:2: .*(no such file|cannot be read)"):
                load(path, "t.csv:2")
    if os.geteuid():
        (tmp_path / "a.wav").write_bytes(wav())
        (tmp_path / "a.wav").chmod(0)
        with pytest.raises(InputError, match="cannot be read"):
            load_audio(tmp_path / "a.wav")
