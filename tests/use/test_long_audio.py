"""Long clips: where they are cut, that nothing of them is lost, and that the pieces' transcripts are the clip's."""

import csv
import json
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

import gemma_mlx
from gemma_mlx.data.examples import TRANSCRIBE
from gemma_mlx.data.media import audio_blocks, load_audio
from gemma_mlx.data.silence import FRAME, stretches
from gemma_mlx.errors import InputError
from gemma_mlx.long_audio import FORMATS, Piece, Transcript, stamp, transcribe
from gemma_mlx.sampling import Settings

RATE = 16_000
DEMO = Path(gemma_mlx.__file__).parent / "demo"
DEMO_EDGES = (0.02, 0.18)
"""Seconds of silence that leave a demo clip as it was: its sound begins after 0.04 s, 0.02 s of that in the average."""
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")
BOOK = sorted(LIBRIVOX.glob("*.wav"))


def in_blocks(samples, r):
    """Samples in blocks of random lengths."""
    edges = np.sort(r.integers(0, len(samples) + 1, int(r.integers(0, 12))))
    return [np.ascontiguousarray(b) for b in np.split(samples, edges) if len(b)]


def cut(samples, seconds=30.0, r=None):
    return list(stretches([samples] if r is None else in_blocks(samples, r), round(seconds * RATE)))


def covered(found, samples):
    """How often each sample is in a stretch; checks that stretches are the clip's own samples."""
    times = np.zeros(len(samples), int)
    for s in found:
        np.testing.assert_array_equal(s.samples, samples[s.start : s.end])
        times[s.start : s.end] += 1
    return times


def syllables(r, seconds, level):
    """Noise whose loudness goes up and down a few times a second, as in speech: float32 [samples], dB of its peaks."""
    n = round(seconds * RATE)
    t = np.arange(n) / RATE
    swing = 0.6 + 0.4 * np.sin(2 * np.pi * r.uniform(3, 6) * t + r.uniform(0, 6))
    return (10 ** (level / 20) * swing * r.standard_normal(n)).astype(np.float32)


def spoken(r, words, gaps, noise_db, level=-20.0):
    """(samples, [(start, end)] of words): words with pauses behind them over a floor of noise."""
    parts, edges, at = [], [], 0
    for word, gap in zip(words, gaps, strict=True):
        sound = syllables(r, word, level)
        edges.append((at, at + len(sound)))
        parts += [sound, np.zeros(round(gap * RATE), np.float32)]
        at += len(sound) + len(parts[-1])
    samples = np.concatenate(parts)
    return samples + (10 ** (noise_db / 20) * r.standard_normal(len(samples))).astype(np.float32), edges


@pytest.mark.parametrize("seed", range(12))
def test_every_sound_is_in_exactly_one_stretch_and_none_is_too_long(seed):
    """Random sounds, some longer than a stretch may be, random pauses, random blocks; floors from none to loud."""
    r = np.random.default_rng(seed)
    n = int(r.integers(1, 25))
    words = r.choice([0.05, 0.3, 1.0, 6.0, 40.0], n, p=[0.1, 0.3, 0.4, 0.17, 0.03]) * r.uniform(0.7, 1.3, n)
    gaps = r.choice([0.0, 0.05, 0.3, 1.0, 4.0], n) * r.uniform(0.5, 1.5, n)
    noise = float(r.choice([-120, -70, -50]))
    samples, edges = spoken(r, words, gaps, noise)
    samples = np.concatenate([np.zeros(int(r.integers(0, 80_000)), np.float32), samples])
    first = len(samples) - (edges[-1][1] + round(gaps[-1] * RATE))
    samples = samples[: len(samples) - int(r.integers(0, 159))]  # a last frame that is no whole one
    limit = float(r.choice([1.0, 3.7, 12.0, 30.0]))
    found = cut(samples, limit, r)
    times = covered(found, samples)
    assert times.max(initial=0) <= 1
    for a, b in edges:
        assert times[first + a : first + b].min() == 1
    assert max(len(s.samples) for s in found) <= limit * RATE
    assert [s.start for s in found] == sorted(s.start for s in found)


def test_blocks_change_nothing():
    r = np.random.default_rng(1)
    samples, _ = spoken(r, r.uniform(0.3, 3, 40), r.uniform(0.1, 3, 40), -60)
    whole = cut(samples, 10)
    for _ in range(4):
        again = cut(samples, 10, r)
        assert [(s.start, s.end) for s in again] == [(s.start, s.end) for s in whole]


@pytest.mark.parametrize("snr", [5, 10, 20, 40, 90])
def test_no_cut_is_inside_a_word_at_any_noise(snr):
    """Words of up to 1.5 s with pauses of a quarter of a second and more, under 60 s: each is whole in one stretch."""
    r = np.random.default_rng(snr)
    samples, edges = spoken(r, r.uniform(0.2, 1.5, 60), r.uniform(0.25, 0.8, 60), -20 - snr)
    found = cut(samples, 10)
    assert len(found) >= 8
    for a, b in edges:
        whole = [s for s in found if s.start <= a and b <= s.end]
        assert len(whole) == 1, (a / RATE, b / RATE)


def test_the_longest_pause_of_the_last_part_is_cut_in_its_middle():
    r = np.random.default_rng(2)
    samples, _ = spoken(r, [4, 2.5, 1, 1, 4], [0.9, 0.3, 0.6, 0.3, 0.1], -60)
    # Pauses at 4.0 s (0.9 s long, before the last part), 7.4 s (0.3 s) and 8.7 s (0.6 s).
    assert abs(cut(samples, 10)[0].end - 9.0 * RATE) <= 3 * FRAME


def test_a_longer_pause_counts_more_than_a_quieter_one():
    r = np.random.default_rng(12)
    samples, edges = spoken(r, [7.2, 0.8, 4], [0.3, 0.5, 0.1], -120)
    room = slice(edges[1][1], edges[2][0])
    samples[room] += (10 ** (-50 / 20) * r.standard_normal(room.stop - room.start)).astype(np.float32)
    assert abs(cut(samples, 10)[0].end - (8.3 + 0.25) * RATE) <= 3 * FRAME


def test_a_pause_before_the_last_part_counts_more_than_a_short_gap_in_it():
    """A gap of 0.1 s may be inside a word; a pause of 0.3 s in the middle third is not."""
    r = np.random.default_rng(13)
    samples, _ = spoken(r, [4.5, 3.2, 8], [0.3, 0.1, 0.1], -120)
    assert 4.5 * RATE < cut(samples, 10)[0].end < 4.8 * RATE


def test_silence_stays_at_edges_and_no_more_of_it():
    """Before a sound that begins where a window of silence ends, and behind one before a long pause that is cut."""
    r = np.random.default_rng(14)
    samples, edges = spoken(r, [1.0], [1.0], -70)
    late = cut(np.concatenate([np.zeros(30 * RATE + 800, np.float32), samples]))[0]
    assert 0.2 * RATE <= 30 * RATE + 800 - late.start <= 0.3 * RATE
    samples, edges = spoken(r, [7.5, 6], [1.6, 0.5], -70)
    first, second = cut(samples, 10)
    assert 0.2 * RATE <= first.end - edges[0][1] <= 0.3 * RATE
    assert 0.2 * RATE <= edges[1][0] - second.start <= 0.3 * RATE


def test_room_noise_behind_digital_silence_is_silence_after_two_minutes():
    r = np.random.default_rng(15)
    room = (10 ** (-55 / 20) * r.standard_normal(200 * RATE)).astype(np.float32)
    found = cut(np.concatenate([np.zeros(35 * RATE, np.float32), room]))
    assert found and found[-1].end < (35 + 150) * RATE


def test_without_a_pause_the_quietest_moment_is_cut():
    r = np.random.default_rng(3)
    samples = (0.1 * r.standard_normal(15 * RATE)).astype(np.float32)
    quiet = round(8.3 * RATE)
    samples[quiet : quiet + 8 * FRAME] *= 0.2  # 80 ms: too short for a pause
    found = cut(samples, 10)
    assert quiet <= found[0].end <= quiet + 8 * FRAME and found[1].start == found[0].end


def test_silence_is_left_out_but_for_the_edges():
    r = np.random.default_rng(4)
    for noise in (-120, -75, -50):
        samples, edges = spoken(r, [1, 2, 1], [40, 3, 65], noise)
        found = cut(samples)
        assert len(found) == 3
        for s, (a, b) in zip(found, edges, strict=True):
            assert a - RATE // 4 - 4 * FRAME <= s.start <= a and b <= s.end <= b + RATE // 4 + 4 * FRAME


@pytest.mark.parametrize("noise", [-120, -60, -45])
def test_a_clip_without_sound_has_no_stretch(noise):
    r = np.random.default_rng(5)
    samples = (10 ** (noise / 20) * r.standard_normal(75 * RATE)).astype(np.float32)
    assert cut(samples) == [] and cut(samples[: RATE // 3]) == []


def test_an_offset_is_no_sound():
    r = np.random.default_rng(6)
    samples, _ = spoken(r, [1, 1], [5, 5], -60)
    assert [len(s.samples) for s in cut(samples + np.float32(0.2))] == [len(s.samples) for s in cut(samples)]
    assert len(cut(samples)) == 2


def test_a_room_that_gets_louder_is_a_floor_again_after_a_while():
    """A fan of -30 dB goes on for five minutes: after two its noise alone is silence, and words over it are found."""
    r = np.random.default_rng(7)
    quiet, _ = spoken(r, [1] * 20, [1] * 20, -60)
    fan = (10 ** (-30 / 20) * r.standard_normal(300 * RATE)).astype(np.float32)
    word = syllables(r, 1, -10)
    fan[250 * RATE : 251 * RATE] += word
    found = cut(np.concatenate([quiet, fan]))
    late = [s for s in found if s.start > len(quiet) + 160 * RATE]
    assert len(late) == 1 and late[0].start <= len(quiet) + 250 * RATE and late[0].end >= len(quiet) + 251 * RATE


def test_pieces_of_less_than_a_second_are_refused():
    with pytest.raises(InputError, match="expected at least 1 s"):
        list(stretches([np.zeros(RATE, np.float32)], RATE - 1))


@pytest.mark.parametrize("seed", range(4))
def test_known_words_of_a_voice_stay_whole(seed, tmp_path):
    """espeak says numbers one by one; the files' own sounds are the words' boundaries."""
    r = np.random.default_rng(seed)
    parts, edges, at = [], [], 0
    for i, number in enumerate(r.integers(10, 99, 14)):
        path = tmp_path / f"{i}.wav"
        subprocess.run(["espeak-ng", "-s", "160", "-w", path, f"{number}"], check=True)
        word = load_audio(path)
        loud = np.flatnonzero(np.abs(word) > 0.02)
        word = word[loud[0] : loud[-1] + 1]
        gap = round(float(r.uniform(0.25, 0.6)) * RATE)
        edges.append((at, at + len(word)))
        parts += [word, np.zeros(gap, np.float32)]
        at += len(word) + gap
    clean = np.concatenate(parts)
    for snr in (15, 30, 60):
        noise = np.sqrt(np.mean(clean**2)) * 10 ** (-snr / 20)
        samples = clean + (noise * r.standard_normal(len(clean))).astype(np.float32)
        found = cut(samples, 4)
        assert len(found) >= 3
        for a, b in edges:
            inner = a + 400, b - 400  # a word's faint beginning and end may lie below the noise
            assert len([s for s in found if s.start <= inner[0] and inner[1] <= s.end]) == 1


@pytest.mark.skipif(not BOOK, reason="pocketsphinx-testdata is not installed")
@pytest.mark.parametrize("limit", [6.0, 12.0])
def test_read_speech_is_cut_between_its_clips(limit):
    """Sentences of a LibriVox reader with half a second of room noise between them: at most one cut each where a
    sentence is longer than a stretch, and no sample of speech lost."""
    r = np.random.default_rng(8)
    parts, edges, at = [], [], 0
    for path in BOOK * 2:
        clip = load_audio(path)
        room = (3e-4 * r.standard_normal(RATE // 2)).astype(np.float32)
        edges.append((at, at + len(clip)))
        parts += [clip, room]
        at += len(clip) + len(room)
    samples = np.concatenate(parts)
    found = cut(samples, limit, r)
    times = covered(found, samples)
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    loud = 20 * np.log10(frames.std(axis=1) + 1e-9) > -50
    assert times[: loud.size * FRAME].reshape(-1, FRAME)[loud].min() == 1
    assert times.max() == 1 and max(len(s.samples) for s in found) <= limit * RATE


@pytest.mark.parametrize(
    "rate,channels,suffix", [(16_000, 1, "wav"), (44_100, 2, "flac"), (8_000, 1, "ogg"), (22_050, 1, "mp3")]
)
def test_blocks_are_the_clip(tmp_path, rate, channels, suffix, monkeypatch):
    """Bit for bit what `load_audio` gives, whatever the blocks' lengths; how libsndfile decodes mp3 depends on them."""
    r = np.random.default_rng(9)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.1 * r.standard_normal((round(rate * 7.7) + 3, channels)), rate)
    whole = load_audio(path)
    for block in (1 << 22, 50_000, 1_000) if suffix != "mp3" else (1 << 22,):
        monkeypatch.setattr("gemma_mlx.data.media._BLOCK", block)
        found = list(audio_blocks(path))
        np.testing.assert_array_equal(np.concatenate(found), whole)
    assert suffix == "mp3" or len(found) >= 5


def test_blocks_of_m4a_are_the_clip(tmp_path):
    av = pytest.importorskip("av")
    r = np.random.default_rng(10)
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44_100, layout="mono")
        for _ in range(200):
            frame = av.AudioFrame.from_ndarray((0.1 * r.standard_normal((1, 1024))).astype(np.float32), "fltp", "mono")
            frame.sample_rate = 44_100
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    np.testing.assert_array_equal(np.concatenate(list(audio_blocks(path))), load_audio(path))


def test_what_is_wrong_with_a_clip_is_one_line(tmp_path):
    good = tmp_path / "good.wav"
    soundfile.write(good, np.zeros(40_000), RATE)
    for name, data in (("torn.wav", good.read_bytes()[:20_000]), ("none.wav", b""), ("text.wav", b"words" * 50)):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=name):
            list(audio_blocks(path))
    with pytest.raises(InputError, match="no such file"):
        list(audio_blocks(tmp_path / "missing.wav"))
    soundfile.write(good, np.zeros(100), RATE)
    with pytest.raises(InputError, match="empty audio: 100 samples"):
        list(audio_blocks(good))
    soundfile.write(good, np.array([0.0] * 9000 + [np.nan]), RATE, subtype="FLOAT")
    with pytest.raises(InputError, match="not finite"):
        list(audio_blocks(good))


TRANSCRIPT = Transcript(
    (Piece(0.0, 1.2345, "a <b>\nc"), Piece(61.5, 62.0, ""), Piece(3723.5, 3730.0, "d & e")), 4000.0, (2,)
)


def test_formats():
    assert TRANSCRIPT.text == "a <b> c d & e"
    assert TRANSCRIPT.written("text") == "a <b> c d & e\n"
    assert TRANSCRIPT.written("timestamps").splitlines() == [
        "[00:00:00.000 --> 00:00:01.234] a <b> c",
        "[00:01:01.500 --> 00:01:02.000]",
        "[01:02:03.500 --> 01:02:10.000] d & e",
    ]
    assert TRANSCRIPT.written("srt") == (
        "1\n00:00:00,000 --> 00:00:01,234\na <b> c\n\n2\n01:02:03,500 --> 01:02:10,000\nd & e\n"
    )
    assert TRANSCRIPT.written("vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.234\na &lt;b&gt; c\n\n01:02:03.500 --> 01:02:10.000\nd &amp; e\n"
    )
    found = json.loads(TRANSCRIPT.written("json"))
    assert found["pieces"][2] == {"start": 3723.5, "end": 3730.0, "text": "d & e"}
    assert found["text"] == TRANSCRIPT.text and found["seconds"] == 4000.0
    assert abs(found["skipped_seconds"] - (4000 - 1.2345 - 0.5 - 6.5)) < 1e-3
    with pytest.raises(InputError, match="expected one of text"):
        TRANSCRIPT.written("doc")
    assert set(FORMATS) == {"text", "timestamps", "srt", "vtt", "json"}
    assert stamp(359_999.9996) == "100:00:00.000"


def test_scripts_without_spaces_are_joined_without_them():
    def joined(*texts):
        return Transcript(tuple(Piece(i, i + 1, text) for i, text in enumerate(texts)), 9.0).text

    assert joined("今日は", "晴れ") == "今日は晴れ" and joined("สวัสดี", "ครับ") == "สวัสดีครับ"
    assert joined("안녕", "하세요") == "안녕 하세요" and joined("see 東京", "now") == "see 東京 now"


def test_memory_does_not_grow_with_the_clip():
    """Half an hour in blocks of 10 s (115 MB of samples) within 20 MB."""
    r = np.random.default_rng(11)
    block = spoken(r, [2, 1, 3, 0.5], [0.5, 1, 0.3, 1.7], -60)[0]
    tracemalloc.start()
    try:
        total = sum(len(s.samples) for s in stretches(block.copy() for _ in range(180)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6 and total > 0.6 * 180 * len(block)


@pytest.fixture(scope="module")
def demo():
    return gemma_mlx.load(DEMO / "checkpoint")


def demo_clips(count):
    with (DEMO / "data" / "test_everyday.csv").open() as file:
        return [DEMO / "data" / row["audio_path"] for row, _ in zip(csv.DictReader(file), range(count), strict=False)]


def asked(path):
    content = [{"type": "text", "text": TRANSCRIBE}, {"type": "audio", "audio": path}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("count", [10, pytest.param(120, marks=pytest.mark.slow)])
def test_a_concatenation_is_transcribed_as_its_clips_one_by_one(demo, tmp_path, count):
    model, processor = demo
    r = np.random.default_rng(0)
    paths = demo_clips(count)
    alone = gemma_mlx.generate(model, processor, [asked(path) for path in paths])
    parts, starts, at = [], [], 0
    for path in paths:
        clip = load_audio(path)
        gap = int(r.integers(2.5 * RATE, 3 * RATE))
        gap -= (len(clip) + gap) % FRAME  # the toy model hears 10 ms more or less of silence
        starts.append(at / RATE)
        parts += [clip, np.zeros(gap, np.float32)]
        at += len(clip) + gap
    path = tmp_path / "long.flac"
    soundfile.write(path, np.concatenate(parts), RATE)
    told = []
    found = transcribe(model, processor, path, edge_seconds=DEMO_EDGES, on_piece=told.append)
    assert [piece.text for piece in found.pieces] == alone
    assert found.text == " ".join(alone) and told == list(found.pieces) and found.seconds == at / RATE
    assert all(abs(piece.start_s - start) <= 0.02 for piece, start in zip(found.pieces, starts, strict=True))
    assert found.unfinished == ()


def test_pieces_are_answered_as_files_of_the_same_samples(demo, tmp_path):
    """Two pieces at a time, of a clip that is cut where there is no long pause; the oracle reads files of its cuts."""
    model, processor = demo
    whole = np.concatenate([np.concatenate([load_audio(path), np.zeros(4800, np.float32)]) for path in demo_clips(9)])
    soundfile.write(tmp_path / "a.wav", whole, RATE, subtype="FLOAT")
    options = {"piece_seconds": 4.0, "edge_seconds": (0.1, 0.2), "settings": Settings(max_tokens=12)}
    found = transcribe(model, processor, tmp_path / "a.wav", batch_size=2, prompt="Write it down.", **options)
    assert len(found.pieces) >= 3 and len({piece.text for piece in found.pieces}) >= 3
    questions = []
    for i, piece in enumerate(found.pieces):
        assert piece.end_s - piece.start_s <= 4
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, whole[round(piece.start_s * RATE) : round(piece.end_s * RATE)], RATE, subtype="FLOAT")
        question = asked(path)
        question[0]["content"][0]["text"] = "Write it down."
        questions.append(question)
    assert [piece.text for piece in found.pieces] == gemma_mlx.generate(model, processor, questions, max_tokens=12)


def test_pieces_that_end_at_the_most_tokens_are_told(demo, tmp_path):
    model, processor = demo
    found = transcribe(model, processor, demo_clips(1)[0], settings=Settings(max_tokens=2))
    assert len(found.pieces) == 1 and found.unfinished == (0,)


def test_silence_has_an_empty_transcript(demo, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(40 * RATE), RATE)
    found = transcribe(*demo, tmp_path / "a.wav")
    assert found.pieces == () and found.text == "" and found.skipped_seconds == found.seconds == 40
    assert found.written("srt") == "" and found.written("vtt") == "WEBVTT\n"


@pytest.mark.parametrize(
    "options,message",
    [
        ({"piece_seconds": 31}, "piece_seconds is 31; expected 1 to 30"),
        ({"piece_seconds": 0.5}, "expected 1 to 30"),
        ({"edge_seconds": (0.1, 1.5)}, "expected 0 to 1 s"),
    ],
)
def test_bad_options_are_one_line(demo, options, message):
    with pytest.raises(InputError, match=message):
        transcribe(*demo, demo_clips(1)[0], **options)
