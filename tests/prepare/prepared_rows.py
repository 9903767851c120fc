"""Small tables written and read plainly."""

import csv
import json


def table(path, rows, columns=None):
    """Writes a CSV."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, columns)
        out.writeheader()
        out.writerows(rows)
    return path


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


CLIPS = {"a.wav": (16_000, 16_000), "b.wav": (48_000, 44_100), "c.wav": (8_000, 16_000), "d.wav": (24_000, 8_000)}
"""Name -> (samples, rate)."""
