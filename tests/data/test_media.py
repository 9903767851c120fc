"""Decoding: against soundfile, soxr and Pillow; and every kind of file that is refused."""

import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import soundfile
import soxr
from PIL import Image

from gemma_mlx.data.media import audio_samples, image_dimensions, load_audio, load_image
from gemma_mlx.errors import InputError

RNG = np.random.default_rng(3)


def tone(samples, rate, channels=1):
    t = np.arange(samples) / rate
    wave = np.stack([0.3 * np.sin(2 * np.pi * (200 + 90 * c) * t) for c in range(channels)], axis=1)
    return wave.astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_mono_at_16_khz(tmp_path, rate, channels):
    wave = tone(int(rate * 0.7) + 13, rate, channels)
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, rate, "FLOAT")
    found = load_audio(path)
    expected = soxr.resample(wave.astype(np.float64).mean(axis=1), rate, 16_000)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert abs(len(found) - len(expected)) <= 1
    n = min(len(found), len(expected))
    assert np.abs(found[:n] - expected[:n]).max() <= 1e-5
    assert audio_samples(path) == len(found)


@pytest.mark.parametrize(
    ("suffix", "subtype"),
    [("wav", "PCM_16"), ("wav", "PCM_24"), ("wav", "PCM_U8"), ("wav", "DOUBLE"), ("wav", "ULAW"), ("flac", "PCM_16"),
     ("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III")],
)  # fmt: skip
def test_sample_formats(tmp_path, suffix, subtype):
    path = tmp_path / f"a.{suffix}"
    wave = tone(16_000, 16_000)
    soundfile.write(path, wave, 16_000, subtype=subtype)
    found = load_audio(path)
    assert np.abs(found[1000:15000]).max() == pytest.approx(0.3, abs=0.03)
    if suffix in ("wav", "flac"):
        assert np.abs(found - wave[:, 0]).max() < 0.02


@pytest.mark.parametrize("suffix", ["m4a", "mp4"])
def test_aac_through_av(tmp_path, suffix):
    av = pytest.importorskip("av")
    path, rate = tmp_path / f"a.{suffix}", 44_100
    wave = tone(rate, rate, 2)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=rate, layout="stereo")
        for start in range(0, rate, 1024):
            block = np.ascontiguousarray(wave[start : start + 1024].T)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    found = load_audio(path)
    assert abs(len(found) - 16_000) < 600
    spectrum = np.abs(np.fft.rfft(found[4000:12000]))
    peaks = np.sort(np.argsort(spectrum)[-2:] * 16_000 / 8000)
    assert np.abs(peaks - [200, 290]).max() <= 2
    assert np.abs(found[4000:12000]).max() == pytest.approx(0.3, abs=0.05)  # two tones of 0.3, averaged


def test_m4a_without_av_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.m4a").write_bytes(b"x")
    with pytest.raises(InputError, match=r"need PyAV: pip install 'gemma-mlx\[media\]'"):
        load_audio(tmp_path / "a.m4a")


def test_heic_without_pillow_heif_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"need pillow-heif: pip install 'gemma-mlx\[media\]'"):
        load_image(tmp_path / "a.heic")


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac", "m4a"])
def test_unreadable_audio(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(RNG.bytes(3000))
    with pytest.raises(InputError) as caught:
        load_audio(path, "train.csv:8")
    assert str(caught.value).startswith(f"train.csv:8: {path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("av", [True, False])
def test_a_stream_without_a_length(tmp_path, monkeypatch, av):
    """FLAC written to a pipe: the header has no number of samples."""
    path, wave = tmp_path / "a.flac", tone(8000, 16_000)
    soundfile.write(path, wave, 16_000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO: 36 bits of total samples
    data[22:26] = bytes(4)
    path.write_bytes(data)
    if av:
        pytest.importorskip("av")
        assert np.abs(load_audio(path) - wave[:, 0]).max() < 1e-4
        assert audio_samples(path) == 8000
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"unreadable audio \(its header gives no length\).*pip install"):
            load_audio(path)


def test_wrong_sample_format(tmp_path):
    """A WAV header that promises a codec which nothing reads."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1000, 16_000), 16_000)
    data = bytearray(path.read_bytes())
    data[20:22] = struct.pack("<H", 0x7777)
    path.write_bytes(data)
    with pytest.raises(InputError, match="unreadable audio"):
        load_audio(path, "train.csv:8")


@pytest.mark.parametrize("samples", [0, 1, 160])
def test_empty_audio(tmp_path, samples):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(samples, np.float32), 16_000)
    with pytest.raises(InputError, match=f"^train.csv:8: {path}: empty audio: {samples} samples"):
        load_audio(path, "train.csv:8")
    (tmp_path / "b.wav").write_bytes(b"")
    with pytest.raises(InputError, match="empty audio: the file has 0 bytes"):
        load_audio(tmp_path / "b.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audio_that_is_not_finite(tmp_path, value):
    wave = tone(4000, 16_000)
    wave[2000] = value
    soundfile.write(tmp_path / "a.wav", wave, 16_000, "FLOAT")
    with pytest.raises(InputError, match="not finite"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_over_long_audio(tmp_path, rate):
    path = tmp_path / "a.wav"
    wave = (0.1 * RNG.standard_normal(31 * rate)).astype(np.float32)
    soundfile.write(path, wave, rate, "FLOAT")
    with pytest.raises(InputError) as caught:
        load_audio(path, "train.csv:8")
    message = str(caught.value)
    assert message.startswith(f"train.csv:8: {path}: over-long audio: 31.0 s, the limit is 30 s")
    assert "--long-audio truncate" in message
    kept = load_audio(path, long_audio="truncate")
    assert len(kept) == 480_000 == audio_samples(path, long_audio="truncate")
    if rate == 16_000:
        assert np.array_equal(kept, wave[:480_000])
    soundfile.write(path, wave[: 30 * rate], rate, "FLOAT")
    assert len(load_audio(path)) == 480_000


def as_transformers(path):
    """What transformers' image processor sees of an opened picture."""
    from PIL import ImageOps
    from transformers.image_transforms import convert_to_rgb

    return convert_to_rgb(ImageOps.exif_transpose(Image.open(path)), return_numpy=True)


def picture(mode):
    pixels = RNG.integers(0, 256, (37, 53, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA") if mode == "RGBA" else Image.fromarray(pixels[..., :3])
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("L", "png"), ("1", "png"), ("P", "png"), ("P", "gif"),
     ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "webp"), ("RGB", "bmp")],
)  # fmt: skip
def test_pictures_equal_the_reference(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    picture(mode).save(path)
    assert np.array_equal(load_image(path), as_transformers(path))
    assert image_dimensions(path) == (37, 53)


def test_transparent_palette(tmp_path):
    path = tmp_path / "a.png"
    picture("P").save(path, transparency=3)
    assert np.array_equal(load_image(path), as_transformers(path))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = orientation
    picture("RGB").save(path, exif=exif)
    found = load_image(path)
    assert np.array_equal(found, as_transformers(path))
    assert image_dimensions(path) == found.shape[:2]


def test_16_bit_greys_keep_their_upper_bits(tmp_path):
    grey = RNG.integers(0, 65536, (9, 11), dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1))


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    smooth = np.linspace(0, 255, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.heic", quality=95)
    found = load_image(tmp_path / "a.heic")
    assert found.shape == (48, 64, 3) and np.abs(found.astype(int) - smooth).mean() < 3


def png(width, height):
    """A PNG header that claims this size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e" + b"\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_zero_size_image(tmp_path, size):
    path = tmp_path / "a.png"
    path.write_bytes(png(*size))
    with pytest.raises(InputError) as caught:
        load_image(path, "train.csv:8")
    assert str(caught.value).startswith(f"train.csv:8: {path}: ")
    assert "zero-size image" in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="zero-size image: the file has 0 bytes"):
        load_image(path)


def test_unreadable_truncated_and_enormous_images(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(RNG.bytes(500))
    with pytest.raises(InputError, match=r"^train.csv:8: .*unreadable image"):
        load_image(path, "train.csv:8")
    whole = tmp_path / "b.jpg"
    Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(whole)
    path.write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"unreadable image .*truncated"):
        load_image(path)
    for side in (10_000, 60_000):
        path.write_bytes(png(side, side))
        with warnings.catch_warnings(), pytest.raises(InputError, match="image too large"):
            warnings.simplefilter("ignore")
            load_image(path)
