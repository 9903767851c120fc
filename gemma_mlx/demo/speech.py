# ruff: noqa: SIM905
"""Synthetic speech of the demo: espeak-ng's words in many voices, as 16 kHz mono.

A *voice* is one of espeak-ng's speaker variants; accent, speed and pitch are drawn per clip. Variants that are versions
of one speaker ("steph", "steph2", "steph3") always stay on one side of a split, so that an unheard voice is unheard.
"""

from __future__ import annotations

import io
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

RATE = 16_000
BITS = 11  # significant bits kept: FLAC then stores five wasted bits a sample for free
LEAD, TAIL = 0.04, 0.20  # seconds of silence; without a tail the last letters have no frames left to be written on

EVERYDAY = """apple bread water milk butter cheese orange lemon table chair window door kitchen garden house street
river mountain forest summer winter spring monday friday morning evening yellow purple green black white silver dog cat
horse rabbit zebra chicken fish jump quick quarter box taxi travel ladder paper pencil doctor teacher music dance
village voice engine jacket queen king mother thunder lazy seven eight market""".split()

# what is written -> what espeak-ng is asked to say
NATO = {w: w for w in """alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar
papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu""".split()} | {"xray": "x-ray"}

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd")

VOICES = {
    "base": """Alex Alicia Andrea Andy Denis Henrique Jacky Mario Mike Nguyen RicishayMax RicishayMax2 RicishayMax3
        Tweaky adam anikaRobot antonio aunty benjamin boris caleb ed f1 f4 grandma gustave kaukovalta klatt2 klatt4 m1
        m4 m5 marcelo michel miguel norbert pedro robert robosoft robosoft4 robosoft6 robosoft8 shelby travis
        zac""".split(),
    "base_test": "f5 m7 grandpa Diogo quincy klatt5 announcer".split(),
    "tune": "f2 m3 m8 Gene Gene2 iven iven2 iven3 iven4 victor pablo Lee max sandro anika david klatt3 linda".split(),
    "tune_test": "f3 m2 m6 Annie Michael Hugo john belinda rob steph steph2 steph3 edward edward2 paul".split(),
}


@dataclass(frozen=True)
class Clip:
    """What one clip says and how: enough to make it again."""

    text: str  # the transcript
    spoken: str  # the text given to espeak-ng
    voice: str
    accent: str
    speed: int  # words per minute
    pitch: int  # espeak-ng's 0..99


def draw_clips(n: int, words: dict[str, str], voices: list[str], seed: int, most: int = 3) -> list[Clip]:
    """`n` clips of 1 to `most` words; words and voices come round equally often, the rest is drawn."""
    rng = np.random.default_rng(seed)
    names, bag, clips = list(words), [], []
    for i in range(n):
        count = int(rng.integers(1, most + 1))
        while len(bag) < count:
            bag += [names[j] for j in rng.permutation(len(names))]
        chosen, bag = bag[:count], bag[count:]
        clips.append(Clip(
            text=" ".join(chosen), spoken=" ".join(words[w] for w in chosen), voice=voices[i % len(voices)],
            accent=ACCENTS[int(rng.integers(len(ACCENTS)))], speed=int(rng.integers(145, 206)),
            pitch=int(rng.integers(25, 76))))
    return [clips[j] for j in rng.permutation(n)]


def synthesise(clip: Clip) -> np.ndarray:
    """float32 mono at 16 kHz in [-1, 1], peak 0.5, trimmed, with LEAD and TAIL seconds of silence."""
    command = ["espeak-ng", "-v", f"{clip.accent}+{clip.voice}", "-s", str(clip.speed), "-p", str(clip.pitch),
               "--stdout", clip.spoken]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    wave, rate = soundfile.read(io.BytesIO(raw), dtype="float32")
    wave = soxr.resample(wave, rate, RATE, quality="HQ")
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    wave = wave[loud[0]:loud[-1] + 1]
    wave = np.concatenate([np.zeros(int(LEAD * RATE)), 0.5 * wave / np.abs(wave).max(), np.zeros(int(TAIL * RATE))])
    return quantise(wave)


def quantise(wave: np.ndarray) -> np.ndarray:
    """Round to BITS significant bits of 16, as the committed files are."""
    step = 2.0 ** (1 - BITS)
    return (np.round(wave / step) * step).astype(np.float32)


def synthesise_all(clips: list[Clip], threads: int = 2) -> list[np.ndarray]:
    """All clips in order; espeak-ng runs as `threads` processes at a time."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(synthesise, clips))


def write_flac(path, wave: np.ndarray) -> None:
    """16-bit FLAC, the lowest 16 - BITS bits zero."""
    soundfile.write(path, np.round(wave * 32768).clip(-32768, 32767).astype(np.int16), RATE, format="FLAC",
                    subtype="PCM_16", compression_level=1.0)
