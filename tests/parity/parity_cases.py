"""Batches of every shape that the parity tests go through, from a small notation.

A row is a list: an int is that many random text tokens, `image(w, h)` a picture of w × h patches, `video(n, w, h)` n
such frames with two text tokens before each, `audio(frames)` a clip. Labels lie on the last text of each row.
"""

from __future__ import annotations

import numpy as np
import tiny

from gemma_mlx.batch import IGNORE_INDEX, Batch

PATCH_DIMS = 3 * tiny.VISION["patch_size"] ** 2


def image(width: int, height: int):
    return ("image", width, height)


def video(frames: int, width: int, height: int):
    return ("video", frames, width, height)


def audio(frames: int):
    return ("audio", frames)


CASES = {
    "text": [[24]],
    "beyond the window": [[75]],  # nine windows of 8
    "right-padded batch": [[24], [9], [17]],
    "one image": [[4, image(6, 6), 12]],
    "two images in a row": [[4, image(6, 6), 3, image(9, 3), 10]],
    "two images over a batch": [[4, image(6, 6), 12], [3, image(9, 3), 7]],
    "1 and 2 images per row": [[4, image(6, 6), 12], [3, image(9, 3), 2, image(3, 6), 7]],
    "audio of 101 frames": [[4, audio(101), 12]],
    "audio of 61 frames": [[4, audio(61), 12]],
    "two clips in a row, shorter first": [[4, audio(61), 3, audio(101), 10]],
    "two clips over a batch, shorter first": [[4, audio(61), 12], [3, audio(101), 7]],
    "image and audio": [[4, image(6, 6), 3, audio(61), 10]],
    "everything": [[30], [3, image(9, 3), audio(61), 9], [audio(101), 2, image(6, 6), 2, image(3, 3), 8]],
}


def _row(items, rng, media, frames_per_token: int = 4) -> tuple[list[int], list[int]]:
    """(ids, labels) of one row; appends its media to `media`."""
    ids, labels = [2], [IGNORE_INDEX]
    for item in items:
        if isinstance(item, int):
            part = rng.integers(3, 490, item).tolist()
        elif item[0] == "image":
            media["image"].append(item[1:])
            part = [tiny.BOI, *[tiny.IMG] * (item[1] * item[2] // 9), tiny.EOI]
        elif item[0] == "video":
            media["video"].append(item[1:])
            slots = [tiny.BOI, *[tiny.VID] * (item[2] * item[3] // 9), tiny.EOI]
            part = [t for _ in range(item[1]) for t in (*rng.integers(3, 490, 2).tolist(), *slots)]
        else:
            media["audio"].append(item[1])
            part = [tiny.BOA, *[tiny.AUD] * -(-item[1] // frames_per_token), tiny.EOA]
        ids += part
        labels += part if item is items[-1] else [IGNORE_INDEX] * len(part)
    return ids, labels


def _padded(rows: list[list[int]], fill: int) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _pictures(grids, patches: int | None, seed: int, unified: bool):
    """Pixels and positions; in merged patches for a unified model."""
    if unified:
        grids = [(w // 3, h // 3) for w, h in grids]
    most = max(w * h for w, h in grids) if patches is None else patches
    patch = tiny.VISION["patch_size"] * (3 if unified else 1)
    pixels, positions, _ = tiny.image_inputs(grids, most, patch, seed=seed)
    return pixels, positions.astype(np.int32)


def make_batch(rows: list, seed: int = 0, patches: int | None = None, unified: bool = False) -> Batch:
    """Rows in the notation above as a `Batch`; `patches` pads the pictures to that many.

    `unified` for models in the manner of 12B: pictures of merged patches, clips of raw samples.
    """
    rng = np.random.default_rng(seed)
    media: dict[str, list] = {"image": [], "video": [], "audio": []}
    parts = [_row(items, rng, media, 1 if unified else 4) for items in rows]
    ids, labels = _padded([p[0] for p in parts], 0), _padded([p[1] for p in parts], IGNORE_INDEX)
    mask = _padded([[1] * len(p[0]) for p in parts], 0)
    types = np.select([ids == tiny.IMG, ids == tiny.VID, ids == tiny.AUD], [1, 2, 3], 0).astype(np.int32)
    arrays = {}
    if grids := media["image"]:
        arrays["pixel_values"], arrays["image_position_ids"] = _pictures(grids, patches, seed + 1, unified)
    if films := media["video"]:
        frames = [film[1:] for film in films for _ in range(film[0])]
        arrays["pixel_values_videos"], arrays["video_position_ids"] = _pictures(frames, patches, seed + 3, unified)
        arrays["num_frames_per_video"] = np.array([film[0] for film in films], np.int32)
    if lengths := media["audio"]:
        bins = tiny.UNIFIED_AUDIO["audio_embed_dim"] if unified else 128
        features, frames, _ = tiny.audio_inputs(lengths, bins, seed=seed + 2)
        arrays |= {"input_features": features, "input_features_mask": frames}
    return Batch(ids, mask, types, labels, **arrays)


def random_lora(shapes: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> dict[str, tuple]:
    """Path -> (A [in, rank], B [rank, out]), neither zero, for linears of (out, in)."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)  # noqa: E731
    return {path: (draw(inner, rank), 0.3 * draw(rank, out)) for path, (out, inner) in shapes.items()}


def relative_differences(ours: dict[str, tuple], theirs: dict[str, tuple]) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ of each adapter tensor; 0 where both are zero, infinite where only theirs is."""
    assert ours.keys() == theirs.keys()
    out = {}
    for path, pair in theirs.items():
        for name, a, b in zip("AB", ours[path], pair, strict=True):
            difference, size = np.linalg.norm(np.asarray(a) - b), np.linalg.norm(b)
            out[f"{path}.{name}"] = 0.0 if difference == 0 else float(difference / size) if size else float("inf")
    return out
