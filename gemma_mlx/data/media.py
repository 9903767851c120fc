"""Files and blobs -> arrays: clips as 16 kHz mono float32, pictures as RGB uint8.

libsndfile reads wav, flac, ogg/opus and mp3; PyAV (the extra ``media``) reads m4a, mp4, aac and the rest. Pillow reads
pictures, with pillow-heif (the extra ``media``) for HEIC. What a file is, its content decides, whatever its name says.
Every failure is an `InputError` that starts with `where`, but a source's own (`SourceError`).

No file takes more memory or time than its limits allow: clips are refused, or cut, by what the header says and again
by what is decoded, and channels are averaged block by block; pictures are refused by the size in their header.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO

import numpy as np

from gemma_mlx.data.blob import Medium
from gemma_mlx.data.containers import MAX_PIXELS, container
from gemma_mlx.data.headers import counts_its_frames, missing_end, wants_av
from gemma_mlx.data.opening import Watched, as_medium, descriptor, length, opened, told
from gemma_mlx.errors import InputError
from gemma_mlx.spec import MAX_AUDIO_SAMPLES, SAMPLE_RATE, audio_frames

LONG_AUDIO = ("error", "truncate")
"""What may happen to clips over the limit (30 s): refuse them, or use their beginning as the reference does."""
MOST_SECONDS = 3600
"""Of a clip where the model sets no limit: an hour is 230 MB of samples."""
SAMPLE_RATES = (1_000, 768_000)
"""Hz that sound is recorded at."""
MAX_PICTURE_BYTES = 1 << 30
"""Of a picture's file."""

_BROKEN = (RuntimeError, OSError, ValueError)
"""What soundfile raises on broken files; its own error is the first."""
_NO_LIMIT_S = 1 << 30
"""Seconds: for clips that are read block by block."""
_UNKNOWN = 1 << 40
"""Samples that no file has: libsndfile gives 2^63 − 1 where a header has no length."""
_BLOCK = 1 << 22
"""Values (samples × channels) decoded at a time: 16 MB, and all of most clips."""
_STRIP = 1 << 23
"""Pixels converted at a time."""
_NEEDS_AV = {".m4a", ".mp4", ".aac", ".m4b", ".mov", ".mkv", ".webm", ".3gp", ".wma", ".amr"}
_TRUE_HEADERS = {"WAV", "WAVEX", "FLAC"}
_TIMED = {"mp4", "matroska", "flac", "wav"}
"""PyAV's containers whose headers hold a duration."""
_HEIF = {".heic", ".heif", ".avif"}
# Not every format that Pillow has: EPS runs another program, and some are read by nobody's models.
_PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "MPO", "PPM", "TGA", "ICO", "DIB")


def load_audio(
    medium: str | Medium, where: str = "", long_audio: str = "error", max_samples: int | None = MAX_AUDIO_SAMPLES
) -> np.ndarray:
    """A clip as mono float32 [samples] at 16 kHz, nominally in [−1, 1]: channels averaged, resampled by soxr.

    Args:
        medium: the file or blob.
        where: "train.csv:8", put before messages.
        long_audio: "error" refuses clips longer than the limit, "truncate" keeps their beginning.
        max_samples: the limit, in samples at 16 kHz; None for `MOST_SECONDS`.

    Raises:
        InputError: missing, unreadable, truncated, empty (10 ms or less) or over-long audio, a sample rate outside
            `SAMPLE_RATES`, or samples that are not finite.
        SourceError: the blob's source failed.
    """
    if long_audio not in LONG_AUDIO:
        raise InputError(f"long_audio is {long_audio!r}; expected one of {', '.join(LONG_AUDIO)}")
    name = told(medium, where)
    limit_s = MOST_SECONDS if max_samples is None else max_samples // SAMPLE_RATE
    with opened(medium, where, "empty audio") as file:
        clip = _Clip(file, as_medium(medium), name, long_audio, limit_s)
        mono, rate = clip.decode_av() if wants_av(file) else clip.decode()
    _check_finite(mono, name)
    samples = _resample(mono, rate)[:max_samples]
    _check_empty(len(samples), name, "; remove the row")
    return np.ascontiguousarray(samples)


def audio_blocks(medium: str | Medium, where: str = "") -> Iterator[np.ndarray]:
    """The samples that `load_audio` gives, without its limit: block by block, so that hours need little memory.

    Yields:
        float32 [some samples], none of them empty; end to end they are the clip.

    Raises:
        InputError, SourceError: as `load_audio`; what is wrong at the end of a file is known when it is reached.
    """
    name = told(medium, where)
    with opened(medium, where, "empty audio") as file:
        clip = _Clip(file, as_medium(medium), name, "truncate", _NO_LIMIT_S)
        total = 0
        for block in _resampled(clip.blocks_av() if wants_av(file) else clip.blocks()):
            _check_finite(block, name)
            total += len(block)
            yield np.ascontiguousarray(block)
    _check_empty(total, name)


def _check_finite(samples: np.ndarray, name: str) -> None:
    if not np.isfinite(samples).all():
        raise InputError(f"{name}: the audio has samples that are not finite numbers; export the clip again")


def _check_empty(samples: int, name: str, then: str = "") -> None:
    if not audio_frames(samples):
        raise InputError(f"{name}: empty audio: {samples} samples at 16 kHz, at least 161 are needed{then}")


def _resampled(blocks: Iterator[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
    """The same at 16 kHz, in blocks of about a second and more."""
    import soxr

    stream, waiting, given, out, rate = None, [], 0, 0, SAMPLE_RATE
    for block, rate in blocks:
        given += len(block)
        waiting.append(block)
        if sum(map(len, waiting)) < rate:
            continue
        if stream is None and rate != SAMPLE_RATE:
            stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        mono = np.concatenate(waiting)
        mono = mono if stream is None else stream.resample_chunk(mono)
        waiting, out = [], out + len(mono)
        if len(mono):
            yield mono
    rest = np.concatenate([*waiting, np.zeros(0, np.float32)])
    if stream is None:
        rest = _resample(rest, rate)
    else:
        wanted = resampled_length(given, rate) - out
        rest = stream.resample_chunk(rest, last=True)
        rest = np.pad(rest, (0, max(0, wanted - len(rest))))[: max(0, wanted)]
    if len(rest):
        yield rest


def audio_samples(
    medium: str | Medium, where: str = "", long_audio: str = "error", max_samples: int | None = MAX_AUDIO_SAMPLES
) -> int:
    """How many samples `load_audio` gives, read from the header where the header can be trusted."""
    limit_s = MOST_SECONDS if max_samples is None else max_samples // SAMPLE_RATE
    with opened(medium, where, "empty audio") as file:
        clip = _Clip(file, as_medium(medium), told(medium, where), long_audio, limit_s)
        frames, rate = (0, 0) if wants_av(file) else clip.header()
    if 0 < frames <= limit_s * rate:
        return resampled_length(frames, rate)
    return len(load_audio(medium, where, long_audio, max_samples))  # or says what is wrong


def resampled_length(samples: int, rate: int) -> int:
    """Samples at 16 kHz of a clip of `samples` at `rate`, rounded half up."""
    return (2 * samples * SAMPLE_RATE + rate) // (2 * rate)


class _Unread(Exception):
    """libsndfile does not know the format, or how long the clip is."""


class _Clip:
    """An audio file while it is decoded, no more than about `limit_s` seconds of it."""

    def __init__(self, file: BinaryIO, medium: Medium, told: str, long_audio: str, limit_s: int):
        self.file, self.medium, self.told, self.long_audio, self.limit_s = file, medium, told, long_audio, limit_s

    @contextmanager
    def _sound(self) -> Iterator[Any]:
        """The file as libsndfile opens it; `_Unread` where it does not."""
        import soundfile

        self.file.seek(0)
        handle = descriptor(self.file)
        watched = None if handle is not None else Watched(self.file)
        try:
            try:
                sound = soundfile.SoundFile(watched if handle is None else handle, closefd=False)
            except (*_BROKEN, TypeError) as e:
                raise _Unread(_reason(e)) from None
            with sound:
                yield sound
        except Exception as e:
            if watched is not None and watched.error is not None:
                raise watched.error from None
            if isinstance(e, (_Unread, InputError)) or not isinstance(e, _BROKEN):
                raise
            raise InputError(f"{self.told}: unreadable audio ({_reason(e)}); download or export it again") from None
        if watched is not None and watched.error is not None:
            raise watched.error

    def header(self) -> tuple[int, int]:
        """(samples of a channel, rate) where the header can be trusted, else zeros."""
        missing = missing_end(self.file)
        try:
            with self._sound() as sound:
                if sound.format in _TRUE_HEADERS and sound.frames < _UNKNOWN and not missing:
                    return sound.frames, sound.samplerate
        except _Unread:
            pass
        return 0, 0

    def decode(self) -> tuple[np.ndarray, int]:
        """(mono float32 [samples], rate)."""
        return self._joined(self.blocks())

    def decode_av(self) -> tuple[np.ndarray, int]:
        """As `decode`, by PyAV."""
        return self._joined(self.blocks_av())

    def _joined(self, blocks: Iterator[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
        pairs = list(blocks)
        if not pairs:
            return np.zeros(0, np.float32), SAMPLE_RATE
        found, rates = zip(*pairs, strict=True)
        mono = found[0] if len(found) == 1 else np.concatenate(found)
        return mono[: self.limit_s * rates[-1]], rates[-1]

    def blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """(mono float32 [some samples], rate), end to end the clip up to its limit."""
        missing = missing_end(self.file)  # now: a decoder may share the file's position
        try:
            with self._sound() as sound:
                rate, frames, form = sound.samplerate, sound.frames, sound.format
                if frames >= _UNKNOWN:
                    raise _Unread("its header gives no length")
                self._check_rate(rate)
                self._check_length(frames / rate)
                if missing:
                    raise InputError(f"{self.told}: truncated audio: {missing}; download or export it again")
                count = min(frames, self.limit_s * rate)
                there = 0
                for block in _read_mono(sound, count):
                    there += len(block)
                    yield block, rate
        except _Unread as e:
            # PyAV also reads streams without a length and more formats; for the rest it says what is wrong.
            if importlib.util.find_spec("av") or self.medium_suffix in _NEEDS_AV:
                yield from self.blocks_av()
                return
            raise InputError(
                f"{self.told}: unreadable audio ({e}); expected a whole wav, flac, ogg or mp3 file "
                "(pip install 'gemma-mlx[media]' for more formats)"
            ) from None
        if there < count and form != "MP3":
            self._short(count, there, rate)
        if there < 0.99 * count - 0.1 * rate and counts_its_frames(self.file):
            self._short(count, there, rate)

    @property
    def medium_suffix(self) -> str:
        return self.medium.suffix.lower()

    def blocks_av(self) -> Iterator[tuple[np.ndarray, int]]:
        """As `blocks`, by PyAV; the last one may go beyond the limit."""
        try:
            import av
        except ImportError:
            kind = f"{self.medium_suffix or 'such'} files"
            raise InputError(
                f"{self.told}: {kind} need PyAV: pip install 'gemma-mlx[media]', or convert the file to wav or flac"
            ) from None
        rate = count = 0
        with container(self.file, self.medium, self.told, "audio") as opened_file:
            if not opened_file.streams.audio:
                raise InputError(f"{self.told}: the file has no audio track; give one that has")
            claimed = _claimed_seconds(opened_file)
            self._check_length(claimed)
            to_float = av.AudioResampler(format="fltp")
            for frame in (f for decoded in opened_file.decode(audio=0) for f in to_float.resample(decoded)):
                rate = frame.sample_rate
                self._check_rate(rate)
                block = _averaged(frame.to_ndarray().T)
                count += len(block)
                yield block, rate
                if count > self.limit_s * rate:  # one frame beyond the limit is enough to know
                    self._check_length(count / rate)
                    break
        if not count:
            raise InputError(f"{self.told}: empty audio: no sample could be decoded; remove the row")
        if min(claimed, self.limit_s) - count / rate > max(0.5, 0.02 * claimed):  # codecs' delays aside
            self._short(int(min(claimed, self.limit_s) * rate), count, rate)

    def _short(self, wanted: int, there: int, rate: int) -> None:
        raise InputError(
            f"{self.told}: truncated audio: its header promises {wanted / rate:.1f} s, {there / rate:.1f} s can be "
            "decoded; download or export it again"
        )

    def _check_rate(self, rate: int) -> None:
        low, high = SAMPLE_RATES
        if not low <= rate <= high:
            raise InputError(
                f"{self.told}: its sample rate is {rate:,} Hz; expected {low:,} to {high:,} Hz: export it at 16,000 Hz"
            )

    def _check_length(self, seconds: float) -> None:
        if seconds > self.limit_s and self.long_audio == "error":
            long = f"{seconds:.1f} s" if seconds >= self.limit_s + 0.1 else f"more than {self.limit_s} s"
            raise InputError(
                f"{self.told}: over-long audio: {long}, the limit is {self.limit_s} s; cut the clip, or use "
                f"its first {self.limit_s} s with --long-audio truncate; generate --long-audio split cuts it in pauses"
            )


def _reason(e: Exception) -> str:
    """libsndfile's words, without the file's name."""
    return str(getattr(e, "error_string", None) or e).splitlines()[0].rstrip(".")


def _claimed_seconds(opened_file: Any) -> float:
    """What the header of a PyAV container says of its sound; 0 where it says nothing, or FFmpeg only guesses."""
    if not any(name in _TIMED for name in opened_file.format.name.split(",")):
        return 0.0
    stream = opened_file.streams.audio[0]
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return 0.0 if opened_file.streams.video else (opened_file.duration or 0) / 1e6


def _read_mono(sound: Any, count: int) -> Iterator[np.ndarray]:
    """Up to `count` samples, float32, channels averaged, in blocks."""
    step, left = max(1, _BLOCK // sound.channels), count
    while left > 0:
        block = sound.read(min(left, step), dtype="float32", always_2d=True)
        if not len(block):
            break
        yield _averaged(block)
        left -= len(block)


def _averaged(block: np.ndarray) -> np.ndarray:
    """[samples, channels] -> [samples]."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told later
        if block.shape[1] == 1:
            return block[:, 0]
        if block.shape[1] == 2:  # the same as the mean, which walks along the short axis
            return (block[:, 0] + block[:, 1]) * np.float32(0.5)
        return block.mean(axis=1, dtype=np.float32)


def _resample(mono: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE or not len(mono):
        return mono
    import soxr

    out = soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32, copy=False)
    samples = resampled_length(len(mono), rate)
    return np.pad(out, (0, max(0, samples - len(out))))[:samples]


def load_image(medium: str | Medium, where: str = "") -> np.ndarray:
    """A picture as RGB uint8 [height, width, 3], upright (EXIF orientation applied), first frame of several.

    Transparency is laid on white, as transformers' ``convert_to_rgb`` does; 16-bit greys keep their upper 8 bits.

    Raises:
        InputError: missing, unreadable, truncated, zero-size or enormous pictures.
        SourceError: the blob's source failed.
    """
    with _open_image(medium, where) as (image, name):
        image.load()
        _check_pixels(image, name)  # a GIF's first frame may exceed its screen
        if _orientation(image) != 1:
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
        return _pixels(image, name)


def image_dimensions(medium: str | Medium, where: str = "") -> tuple[int, int]:
    """(height, width) that `load_image` gives, from the header alone."""
    with _open_image(medium, where) as (image, _):
        width, height = image.size
        sideways = _orientation(image) in (5, 6, 7, 8)  # those that swap the sides
        return (width, height) if sideways else (height, width)


@contextmanager
def _open_image(medium: str | Medium, where: str) -> Iterator[tuple[Any, str]]:
    """(an opened Pillow image, what messages start with); what goes wrong inside is one line."""
    from PIL import Image, UnidentifiedImageError

    name = told(medium, where)
    with opened(medium, where, "zero-size image") as file:
        if (size := length(file)) > MAX_PICTURE_BYTES:
            raise InputError(f"{name}: image too large: {size:,} bytes; scale it down")
        if as_medium(medium).suffix.lower() in _HEIF or _is_heif(file):
            _register_heif(as_medium(medium).suffix.lower(), name)
        try:
            with Image.open(file, formats=_formats()) as image:
                _check_pixels(image, name)
                yield image, name
        except InputError:
            raise
        except UnidentifiedImageError:
            if _claims_no_pixels(file):
                message = f"{name}: zero-size image: its header says 0 pixels; save or download it again"
                raise InputError(message) from None
            raise InputError(
                f"{name}: unreadable image: no known picture format; expected png, jpeg, webp or the like"
            ) from None
        except Image.DecompressionBombError as e:
            raise InputError(f"{name}: image too large ({_line(e)}); scale it down") from None
        except Exception as e:  # codecs raise anything on broken files
            raise InputError(f"{name}: unreadable image ({_line(e)}); save or download it again") from None


def _orientation(image: Any) -> int:
    """EXIF's."""
    return image.getexif().get(0x0112, 1)


def _pixels(image: Any, name: str) -> np.ndarray:
    """RGB uint8 [height, width, 3]. Large pictures are converted strip by strip, since each step copies them."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return np.asarray(_rgb(image, name))
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        out[top:bottom] = np.asarray(_rgb(image.crop((0, top, width, bottom)), name))
    return out


def _line(e: Exception) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _check_pixels(image: Any, name: str) -> None:
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name}: zero-size image: {width}x{height} pixels; remove the row")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: image too large: {width}x{height}, the limit is {MAX_PIXELS} pixels; scale it down")


@cache
def _plugins() -> None:
    from PIL import Image

    Image.init()


def _formats() -> list[str]:
    """The formats that are read, and that this Pillow has."""
    from PIL import Image

    _plugins()
    return [form for form in _PICTURES if form in Image.OPEN]


def _is_heif(file: BinaryIO) -> bool:
    head = file.read(12)
    file.seek(0)
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def _claims_no_pixels(file: BinaryIO) -> bool:
    """Whether a PNG, GIF or BMP header gives a side of 0, which Pillow takes for no picture at all."""
    file.seek(0)
    head = file.read(26)
    for magic, form, at in ((b"\x89PNG", ">II", 16), (b"GIF8", "<HH", 6), (b"BM", "<ii", 18)):
        if head.startswith(magic) and len(head) >= at + struct.calcsize(form):
            return 0 in struct.unpack_from(form, head, at)
    return False


def _register_heif(suffix: str, told: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        if suffix == ".avif":  # newer Pillow reads it alone
            return
        kind = suffix or ".heic"
        raise InputError(
            f"{told}: {kind} files need pillow-heif: pip install 'gemma-mlx[media]', or convert the file to png"
        ) from None
    pillow_heif.register_heif_opener()


def _rgb(image: Any, told: str) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):  # convert("RGB") would clip 16-bit greys to white
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise InputError(f"{told}: unreadable image: 32-bit greys; save it with 8 or 16 bits a channel")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InputError(f"{told}: unreadable image: floating-point pixels; save it with 8 or 16 bits a channel")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
