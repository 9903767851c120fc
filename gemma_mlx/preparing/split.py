"""Rows -> splits, so that rows that belong together stay together."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from gemma_mlx.errors import InputError

NAMES = ("train", "valid", "test")


def read_fractions(text: str) -> dict[str, float]:
    """``0.9`` -> train 0.9, valid 0.1; ``train=0.8,valid=0.1,test=0.1`` as it says.

    Raises:
        InputError: neither form, an unknown or repeated name, or shares that do not sum to 1.
    """
    hint = "give --split 0.9 or --split train=0.8,valid=0.1,test=0.1"
    try:
        if "=" not in text:
            share = float(text)
            pairs = [("train", share), ("valid", 1.0 - share)]
        else:
            pairs = [(name.strip(), float(share)) for name, share in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise InputError(f"--split {text}: not a share of 1; {hint}") from None
    names = [name for name, _ in pairs]
    if unknown := [name for name in names if name not in NAMES]:
        raise InputError(f"--split {text}: unknown split {unknown[0]!r}; known: {', '.join(NAMES)}")
    if len(set(names)) != len(names):
        raise InputError(f"--split {text}: a split stands twice; {hint}")
    shares = [share for _, share in pairs]
    if not all(0.0 < share < 1.0 for share in shares) or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise InputError(f"--split {text}: shares lie between 0 and 1 and sum to 1; {hint}")
    return dict(pairs)


def group_key(value: str | bytes) -> int:
    """A group's 64 bits, never 0."""
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def assign(groups: np.ndarray, fractions: dict[str, float], seed: int) -> np.ndarray:
    """The number of each row's split.

    Groups are put in the order of their hashes with the seed, and each goes to the split in whose stretch of all rows
    its middle lies. Neither the order of rows nor anything but the seed and the groups has a say, and rows that are
    added later move few others.

    Args:
        groups: uint64 [rows].
        fractions: name -> share of the rows.
        seed: any whole number.

    Returns:
        int8 [rows], positions in `fractions`.

    Raises:
        InputError: a split would be empty.
    """
    found, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    key = int(seed).to_bytes(16, "little", signed=True)
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(g.tobytes(), digest_size=8, key=key).digest(), "little") for g in found],
        np.uint64,
    )
    order = np.argsort(hashes, kind="stable")
    ends = np.cumsum(counts[order])
    middles = (ends - counts[order] / 2.0) / max(len(groups), 1)
    bounds = np.cumsum(list(fractions.values()))[:-1]
    chosen = np.empty(len(found), np.int8)
    chosen[order] = np.searchsorted(bounds, middles, side="right")
    splits = chosen[inverse.reshape(-1)]
    for number, name in enumerate(fractions):
        if not (splits == number).any():
            raise InputError(
                f"--split: no row would be in {name}: {len(groups)} rows in {len(found)} groups are too few for "
                f"{fractions[name]:g}; give it a larger share"
            )
    return splits
