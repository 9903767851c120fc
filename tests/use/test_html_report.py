"""report.html: whole, safe, playable, and the same words marked as jiwer counts."""

import base64
import io
import re
from html.parser import HTMLParser

import jiwer
import numpy as np
import pytest
import soundfile
from PIL import Image

from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.examples import Audio, Example, Text, Turn
from gemma_mlx.data.examples import Image as Picture
from gemma_mlx.data.media import load_audio, load_image
from gemma_mlx.data.processor import Processor
from gemma_mlx.evaluating.page import write_page
from gemma_mlx.evaluating.report import Report
from gemma_mlx.evaluation import Prediction, evaluate
from gemma_mlx.models.load import load

VOID = {"meta", "input", "img", "br"}


class Page(HTMLParser):
    """Every tag with its attributes and text; tags that do not close in order are a failure."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.scripts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag}: an attribute twice"
        assert not any(name.startswith("on") for name in names)
        found = {"tag": tag, "text": "", "inside": [t["tag"] for t in self.open], **dict(attrs)}
        self.tags.append(found)
        if tag not in VOID:
            self.open.append(found)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> inside {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for tag in self.open:
            tag["text"] += data

    def all(self, tag, **attributes):
        wanted = attributes.items()
        return [t for t in self.tags if t["tag"] == tag and all(t.get(n.rstrip("_")) == v for n, v in wanted)]

    @property
    def rows(self):
        return [t for t in self.all("tr") if "data-kinds" in t]


def write(folder, predictions, examples=None, processor=None, other=None, **options):
    report = Report(tuple(predictions), other=other and tuple(other), other_name="base")
    examples = examples or [
        Example((Turn("user", (Text("?"),)), Turn("model", (Text(p.reference),)))) for p in predictions
    ]
    write_page(folder, report, examples, processor, **options)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(checkpoint_folder, scored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    report = evaluate(*load(checkpoint_folder), scored, folder, max_tokens=3, group_by=["duration", "task"])
    return Page((folder / "report.html").read_text(encoding="utf-8")), report, folder


def decoded(address):
    head, data = address.split(",", 1)
    assert head in ("data:audio/flac;base64", "data:image/jpeg;base64")
    return base64.b64decode(data, validate=True)


def test_every_clip_plays_and_every_picture_shows(page, scored):
    parsed, _, folder = page
    examples = read_examples(scored)
    by_name = {part.path.name: part for e in examples for part in e.media()}
    sounds, pictures = parsed.all("audio"), parsed.all("img")
    assert {t["title"] for t in sounds} | {t["title"] for t in pictures} == set(by_name) and len(by_name) == 7
    for tag in sounds:
        heard, rate = soundfile.read(io.BytesIO(decoded(tag["src"])), dtype="float32")
        wanted = load_audio(by_name[tag["title"]].path)
        assert rate == 16000 and heard.shape == wanted.shape
        np.testing.assert_allclose(heard, wanted, atol=1 / 32768)
    for tag in pictures:
        with Image.open(io.BytesIO(decoded(tag["src"]))) as seen:
            wanted = load_image(by_name[tag["title"]].path)
            assert seen.format == "JPEG" and (seen.height, seen.width) == wanted.shape[:2]
    assert not (folder / "report_media").exists()


def test_nothing_comes_from_elsewhere(page):
    parsed, _, folder = page
    for tag in parsed.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert tag.get(name, "data:").startswith("data:"), tag
    assert len(parsed.all("script")) == 1 and "src" not in parsed.all("script")[0] and not parsed.all("link")
    text = (folder / "report.html").read_text()
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "//" not in style
    policy = next(t["content"] for t in parsed.all("meta") if "content" in t and "default-src" in t["content"])
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "http" not in policy


def test_the_policy_names_the_script_that_is_there(page):
    import hashlib

    parsed, _, folder = page
    script = re.search(r"<script>(.*)</script>", (folder / "report.html").read_text(), re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert any(f"script-src 'sha256-{digest}'" in t.get("content", "") for t in parsed.all("meta"))


def test_scores_groups_and_rows_are_there(page):
    parsed, report, _ = page
    figures = [t["text"] for t in parsed.all("table", class_="figures")]
    assert len(figures) == 3
    for m in report.measured:
        assert f"{m.title}{len(m.rows)}{m.tell(m.value)}" in figures[0]
    assert "transcript4" in figures[2] and "answer3" in figures[2]
    errors = [float(row["text"].lstrip()[:5]) for row in parsed.rows]
    assert errors == sorted(errors, reverse=True) and len(errors) == 7


HOSTILE = [
    "<script>alert(1)</script>", "</td></tr></table><img src=x onerror=alert(1)>", '"><b>', "a & b &lt;i&gt;",
    "{{rows}} {{script}} {{nothing}}", "]]> <!-- -->", "</script><script>alert(2)</script>", "'quoted' `ticks` \\u003c",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_text(tmp_path, text):
    p = Prediction(
        text, f"{text}.csv:2", "transcript", f"one {text} two", f"one two {text}", language=text, source=text
    )
    parsed = write(tmp_path, [p], other=[p])
    assert len(parsed.all("script")) == 1 and not parsed.all("img") and not parsed.all("b") and not parsed.all("i")
    assert len(parsed.rows) == 1
    words = [t["text"] for t in parsed.all("span", class_="words")]
    assert words == [p.reference, p.prediction, p.prediction]
    assert text in parsed.rows[0]["text"].replace("\n", "")


@pytest.mark.parametrize("seed", range(4))
def test_marked_words_are_jiwers_errors(tmp_path, seed):
    r = np.random.default_rng(seed)
    vocabulary = ["alfa", "Bravo,", "ça", "echo.", "FOXTROT", "gólf"]
    predictions = [
        Prediction(str(i), f"t:{i}", "transcript", *(" ".join(r.choice(vocabulary, r.integers(1, 9))) for _ in "ab"))
        for i in range(12)
    ]
    parsed = write(tmp_path, predictions)
    clean = lambda text: text.lower().replace(",", "").replace(".", "")  # noqa: E731
    wanted = jiwer.process_words([clean(p.reference) for p in predictions], [clean(p.prediction) for p in predictions])
    inside = lambda tag, **at: [t for t in parsed.all(tag, **at) if "tbody" in t["inside"]]  # noqa: E731
    assert len(inside("del")) == wanted.deletions and len(inside("ins")) == wanted.insertions
    assert len(inside("span", class_="substitute")) == 2 * wanted.substitutions  # on both sides
    assert not {t["text"] for t in inside("del")} & {""}


def test_text_that_runs_from_right_to_left(tmp_path):
    p = Prediction("1", "t:2", "transcript", "שלום עולם", "שלום world", language="he")
    parsed = write(tmp_path, [p])
    for tag in parsed.all("span", class_="words"):
        assert tag["dir"] == "auto" and tag["text"] in (p.reference, p.prediction)  # no word of ours decides for it


def test_a_comparison_shows_both_sides(tmp_path):
    own = [
        Prediction(str(i), f"t:{i}", "transcript", "a b c d", text) for i, text in enumerate(("a b c d", "a b", "a"))
    ]
    other = [Prediction(str(i), f"t:{i}", "transcript", "a b c d", text) for i, text in enumerate(("a", "a b", "a b"))]
    parsed = write(tmp_path, own, other=other)
    kinds = {row["text"].split("t:")[1][0]: row["data-kinds"].split() for row in parsed.rows}
    assert kinds == {"0": ["right", "better"], "1": ["wrong"], "2": ["wrong", "worse"]}
    assert [t["value"] for t in parsed.all("option")] == ["", "wrong", "right", "cut", "better", "worse"]
    changes = [t["text"] for t in parsed.all("td") if re.fullmatch(r"[+-]\d\.\d{3}", t["text"])]
    assert changes == ["+0.250", "+0.000", "-0.750"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 examples with a picture each, larger than a page shows."""
    folder = tmp_path_factory.mktemp("pictures")
    r = np.random.default_rng(0)
    found = []
    for i in range(40):
        Image.fromarray(r.integers(0, 255, (60, 1030 if i == 0 else 70, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = (Turn("user", (Picture(folder / f"{i}.png"), Text("?"))), Turn("model", (Text("a b c d"),)))
        found.append(Example(turns, f"t:{i}", str(i)))
    return found


def test_many_rows_keep_the_worst_and_some_others(tmp_path, pictures, checkpoint_folder):
    answers = ["a b c d", "a b c", "a b", "a", ""]
    predictions = [
        Prediction(e.row_id, e.where, "transcript", e.reference, answers[i // 8]) for i, e in enumerate(pictures)
    ]
    processor = Processor(checkpoint_folder)
    parsed = write(tmp_path, predictions, pictures, processor, rows=30, media_rows=5)
    assert len(parsed.rows) == 30 and "The 30 worst of 40 rows" in parsed.all("p")[-2]["text"]
    assert "Media of 10 of the 40 rows" in parsed.all("p")[-2]["text"]
    with_pictures = [i for i, row in enumerate(parsed.rows) if "not in this page" not in row["text"]]
    assert len(with_pictures) == 10 and with_pictures[:5] == [0, 1, 2, 3, 4] and len(parsed.all("img")) == 10


def test_media_without_room_lie_beside_the_page(tmp_path, pictures, checkpoint_folder):
    predictions = [Prediction(e.row_id, e.where, "answer", e.reference, "x") for e in pictures]
    beside_it = tmp_path / "report_media"
    beside_it.mkdir()
    (beside_it / "00099.jpg").write_bytes(b"of an earlier page")
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "00001.jpg").write_bytes(b"somebody's own")
    parsed = write(tmp_path, predictions, pictures, Processor(checkpoint_folder), room=100_000)
    addresses = [t["src"] for t in parsed.all("img")]
    inside = [a for a in addresses if a.startswith("data:")]
    beside = [a for a in addresses if not a.startswith("data:")]
    assert inside and beside and len(addresses) == 40
    assert sum(len(decoded(a)) for a in inside) <= 100_000
    assert {f"report_media/{p.name}" for p in beside_it.iterdir()} == set(beside)
    assert (tmp_path / "media" / "00001.jpg").exists()
    for address in beside:
        with Image.open(tmp_path / address) as seen:
            assert seen.format == "JPEG" and max(seen.size) <= 512
    with Image.open(io.BytesIO(decoded(inside[0]))) as seen:
        assert seen.size == (512, 30)  # of 1030 × 60


def test_a_clip_that_is_gone_is_said(tmp_path, checkpoint_folder):
    turns = (Turn("user", (Audio(tmp_path / "gone <1>.wav"),)), Turn("model", (Text("a"),)))
    parsed = write(
        tmp_path, [Prediction("1", "t:1", "transcript", "a", "b")], [Example(turns, "t:1", "1")],
        Processor(checkpoint_folder),
    )  # fmt: skip
    assert "no such file" in parsed.rows[0]["text"] and not parsed.all("audio")
