"""Files -> arrays: clips as 16 kHz mono float32, pictures as RGB uint8.

libsndfile reads wav, flac, ogg/opus and mp3; PyAV (the extra ``media``) reads m4a, mp4, aac and the rest. Pillow reads
pictures, with pillow-heif (the extra ``media``) for HEIC. Every failure is an `InputError` that starts with `where`.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.spec import MAX_AUDIO_SAMPLES, SAMPLE_RATE, audio_frames

LONG_AUDIO = ("error", "truncate")
"""What may happen to clips over the limit (30 s): refuse them, or use their beginning as the reference does."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs (a quarter of a gigabyte of RGB)."""

_UNKNOWN = 1 << 40
"""Samples that no file has: libsndfile gives 2^63 − 1 where a header has no length."""
_NEEDS_AV = {".m4a", ".mp4", ".aac", ".m4b", ".mov", ".mkv", ".webm", ".3gp", ".wma", ".amr"}
_HEIF = {".heic", ".heif", ".avif"}


def load_audio(
    path: str | Path, where: str = "", long_audio: str = "error", max_samples: int | None = MAX_AUDIO_SAMPLES
) -> np.ndarray:
    """A clip as mono float32 [samples] at 16 kHz, nominally in [−1, 1]: channels averaged, resampled by soxr.

    Args:
        path: the file.
        where: "train.csv:8", put before messages.
        long_audio: "error" refuses clips longer than the limit, "truncate" keeps their beginning.
        max_samples: the limit, in samples at 16 kHz; None for none.

    Raises:
        InputError: missing, unreadable, empty (10 ms or less) or over-long audio, or samples that are not finite.
    """
    path = Path(path)
    told = f"{where}: {path}" if where else str(path)
    if long_audio not in LONG_AUDIO:
        raise InputError(f"long_audio is {long_audio!r}; expected one of {', '.join(LONG_AUDIO)}")
    limit_s = None if max_samples is None else max_samples // SAMPLE_RATE
    wave, rate = _decode(path, told, long_audio, limit_s)
    if not np.isfinite(wave).all():
        raise InputError(f"{told}: the audio has samples that are not finite numbers; export the clip again")
    mono = wave.mean(axis=1, dtype=np.float32) if wave.shape[1] != 1 else wave[:, 0]
    samples = _resample(mono, rate)[:max_samples]
    if not audio_frames(len(samples)):
        raise InputError(
            f"{told}: empty audio: {len(samples)} samples at 16 kHz, at least 161 are needed; remove the row"
        )
    return np.ascontiguousarray(samples)


def audio_samples(
    path: str | Path, where: str = "", long_audio: str = "error", max_samples: int | None = MAX_AUDIO_SAMPLES
) -> int:
    """How many samples `load_audio` gives, read from the header where the header can be trusted."""
    path = Path(path)
    if path.suffix.lower() in (".wav", ".flac"):
        import soundfile

        try:
            info = soundfile.info(str(path))
        except (soundfile.LibsndfileError, OSError):
            return len(load_audio(path, where, long_audio, max_samples))  # says what is wrong
        short = max_samples is None or info.frames / info.samplerate <= max_samples // SAMPLE_RATE
        if 0 < info.frames < _UNKNOWN and short:
            return resampled_length(info.frames, info.samplerate)
    return len(load_audio(path, where, long_audio, max_samples))


def resampled_length(samples: int, rate: int) -> int:
    """Samples at 16 kHz of a clip of `samples` at `rate`, rounded half up."""
    return (2 * samples * SAMPLE_RATE + rate) // (2 * rate)


def _check_length(seconds: float, told: str, long_audio: str, limit_s: int | None) -> None:
    if limit_s is not None and seconds > limit_s and long_audio == "error":
        raise InputError(
            f"{told}: over-long audio: {seconds:.1f} s, the limit is {limit_s} s; cut the clip, or use its first "
            f"{limit_s} s with --long-audio truncate"
        )


def _decode(path: Path, told: str, long_audio: str, limit_s: int | None) -> tuple[np.ndarray, int]:
    """(float32 [samples, channels], rate), no more than about `limit_s` seconds of it."""
    if not path.is_file():
        raise InputError(f"{told}: no such file; correct the path")
    if path.stat().st_size == 0:
        raise InputError(f"{told}: empty audio: the file has 0 bytes; record or download it again")
    if path.suffix.lower() in _NEEDS_AV:
        return _decode_av(path, told, long_audio, limit_s)
    import soundfile

    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            if file.frames >= _UNKNOWN:
                raise RuntimeError("its header gives no length")
            _check_length(file.frames / rate, told, long_audio, limit_s)
            count = file.frames if limit_s is None else min(file.frames, limit_s * rate)
            wave = file.read(count, dtype="float32", always_2d=True)
    except InputError:
        raise
    except (soundfile.LibsndfileError, OSError, RuntimeError, ValueError) as e:
        # PyAV also reads streams without a length and formats by another name; for the rest it says what is wrong.
        if importlib.util.find_spec("av"):
            return _decode_av(path, told, long_audio, limit_s)
        raise InputError(
            f"{told}: unreadable audio ({str(e).splitlines()[0]}); expected a whole wav, flac, ogg or mp3 file "
            "(pip install 'gemma-mlx[media]' for more formats)"
        ) from None
    return wave, rate


def _decode_av(path: Path, told: str, long_audio: str, limit_s: int | None) -> tuple[np.ndarray, int]:
    try:
        import av
    except ImportError:
        raise InputError(
            f"{told}: {path.suffix} files need PyAV: pip install 'gemma-mlx[media]', or convert the file to wav or flac"
        ) from None
    blocks: list[np.ndarray] = []
    rate = count = 0
    try:
        with av.open(str(path)) as file:
            if not file.streams.audio:
                raise InputError(f"{told}: the file has no audio track; give one that has")
            to_float = av.AudioResampler(format="fltp")
            for decoded in file.decode(audio=0):
                for frame in to_float.resample(decoded):
                    rate = frame.sample_rate
                    blocks.append(frame.to_ndarray())
                    count += blocks[-1].shape[1]
                # One frame beyond the limit is enough to know.
                if limit_s is not None and rate and count > limit_s * rate and long_audio == "truncate":
                    break
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as e:
        raise InputError(f"{told}: unreadable audio ({e}); expected a whole audio file") from None
    if not blocks:
        raise InputError(f"{told}: empty audio: no sample could be decoded; remove the row")
    _check_length(count / rate, told, long_audio, limit_s)
    return np.concatenate(blocks, axis=1).T[: None if limit_s is None else limit_s * rate], rate


def _resample(mono: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE or not len(mono):
        return mono
    import soxr

    out = soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32, copy=False)
    length = resampled_length(len(mono), rate)
    return np.pad(out, (0, max(0, length - len(out))))[:length]


def load_image(path: str | Path, where: str = "") -> np.ndarray:
    """A picture as RGB uint8 [height, width, 3], upright (EXIF orientation applied), first frame of several.

    Transparency is laid on white, as transformers' ``convert_to_rgb`` does; 16-bit greys keep their upper 8 bits.

    Raises:
        InputError: missing, unreadable, truncated, zero-size or enormous pictures.
    """
    from PIL import ImageOps

    told = f"{where}: {path}" if where else str(path)
    with _open_image(Path(path), told) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.array(_rgb(upright, told))
        except InputError:
            raise
        except Exception as e:  # codecs raise anything on broken files
            raise InputError(f"{told}: unreadable image ({e}); save or download it again") from None


def image_dimensions(path: str | Path, where: str = "") -> tuple[int, int]:
    """(height, width) that `load_image` gives, from the header alone."""
    with _open_image(Path(path), f"{where}: {path}" if where else str(path)) as image:
        width, height = image.size
        sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap the sides
        return (width, height) if sideways else (height, width)


def _open_image(path: Path, told: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise InputError(f"{told}: no such file; correct the path")
    if path.stat().st_size == 0:
        raise InputError(f"{told}: zero-size image: the file has 0 bytes; save or download it again")
    if path.suffix.lower() in _HEIF:
        _register_heif(path, told)
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        if _claims_no_pixels(path):
            raise InputError(f"{told}: zero-size image: its header says 0 pixels; save or download it again") from None
        raise InputError(
            f"{told}: unreadable image: no known picture format; expected png, jpeg, webp or the like"
        ) from None
    except Image.DecompressionBombError as e:
        raise InputError(f"{told}: image too large ({e}); scale it down") from None
    except Exception as e:  # codecs raise anything on broken files
        raise InputError(f"{told}: unreadable image ({e}); save or download it again") from None
    width, height = image.size
    if not width or not height:
        image.close()
        raise InputError(f"{told}: zero-size image: {width}x{height} pixels; remove the row")
    if width * height > MAX_PIXELS:
        image.close()
        raise InputError(f"{told}: image too large: {width}x{height}, the limit is {MAX_PIXELS} pixels; scale it down")
    return image


def _claims_no_pixels(path: Path) -> bool:
    """Whether a PNG, GIF or BMP header gives a side of 0, which Pillow takes for no picture at all."""
    with path.open("rb") as file:
        head = file.read(26)
    for magic, form, at in ((b"\x89PNG", ">II", 16), (b"GIF8", "<HH", 6), (b"BM", "<ii", 18)):
        if head.startswith(magic) and len(head) >= at + struct.calcsize(form):
            return 0 in struct.unpack_from(form, head, at)
    return False


def _register_heif(path: Path, told: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        if path.suffix.lower() == ".avif":  # newer Pillow reads it alone
            return
        raise InputError(
            f"{told}: {path.suffix} files need pillow-heif: pip install 'gemma-mlx[media]', or convert the file to png"
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
    return image.convert("RGB")
