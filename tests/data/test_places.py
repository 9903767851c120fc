"""Media below URLs: what is fetched, and every reference that would leave its place."""

from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest

from gemma_mlx.data.blob import Embedded
from gemma_mlx.data.places import Folders
from gemma_mlx.errors import InputError


class Fetcher:
    """Gives blobs that know only their URL."""

    def blob(self, url):
        if "no.such" in url:
            raise InputError("not a proper host")
        return Embedded(url, b"")


def find(cell, data="https://host/data/", roots=()):
    return Folders(data, roots, Fetcher()).find(cell, "audio_path", "t.csv:2")


@pytest.mark.parametrize(
    ("cell", "path"),
    [
        ("a.wav", "a.wav"),
        ("clips/a b.wav", "clips/a%20b.wav"),
        ("clips/./x/../a#1?.wav", "clips/a%231%3F.wav"),
        ("é/日.wav", "%C3%A9/%E6%97%A5.wav"),
        ("50%.wav", "50%25.wav"),
        ("a%20b.wav", "a%2520b.wav"),
        ("a:b.wav", "a%3Ab.wav"),
        ("..a.wav", "..a.wav"),
    ],
)
def test_relative_paths_below_a_url(cell, path):
    found = find(cell).name
    assert found == f"https://host/data/{path}"
    # As a client of the standard library would split and join it: one path, no query, below the folder.
    assert urlsplit(found)[3:] == ("", "") and urljoin("https://host/data/", found) == found


def test_names_of_objects_are_not_encoded():
    assert find("é b#1?.wav", "gs://bucket/dir").name == "gs://bucket/dir/é b#1?.wav"
    assert find("gs://other/é b.wav").name == "gs://other/é b.wav"


def test_full_urls():
    assert find("https://else.org/a b/é.wav?x=1&y=%20#t").name == "https://else.org/a%20b/%C3%A9.wav?x=1&y=%20#t"
    assert find("HTTPS://else.org/a.wav").name == "HTTPS://else.org/a.wav"


def test_folders_come_before_urls(tmp_path):
    (tmp_path / "here.wav").write_bytes(b"x")
    for data, roots in (("https://host/data/", [tmp_path]), (tmp_path, ["gs://b/dir", "https://host/"])):
        assert find("here.wav", data, roots) == tmp_path / "here.wav"
        assert find(str(tmp_path / "here.wav"), data, roots) == tmp_path / "here.wav"
    assert find("there.wav", tmp_path, ["gs://b/dir", "https://host/"]).name == "gs://b/dir/there.wav"
    for cell, says in ((str(tmp_path), "is a folder"), ("/etc/hostname", "lies outside")):
        with pytest.raises(InputError, match=says):
            find(cell, "https://host/", [tmp_path])


@pytest.mark.parametrize("data", ["https://host/data/", "gs://bucket/dir/"])
@pytest.mark.parametrize(
    "cell",
    ["../a.wav", "a/../../b.wav", "..", "/etc/passwd", "//evil.org/a.wav", "%2e%2e/a.wav", "%2E%2E%2fa.wav", "..%2fa",
     "%252e%252e/a.wav", "%2fetc/passwd", "a/%2e%2e/%2e%2e/b", "a\nb.wav", "a%0d%0ab"],
)  # fmt: skip
def test_paths_that_leave_a_url(data, cell):
    with pytest.raises(InputError, match=r"^t.csv:2: audio_path .* lies outside ") as caught:
        find(cell, data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("a\\b.wav", "no backslash"),
        ("a%5cb.wav", "no backslash"),
        ("a\0.wav", "NUL character"),
        ("folder/", "is a folder"),
        (".", "is a folder"),
        ("file:///etc/passwd", "file:// is not read"),
        ("FILE:///etc/passwd", "file:// is not read"),
        ("ftp://host/a.wav", "ftp:// is not read"),
        ("https://host\\@evil.org/a", "no backslash"),
        ("https://host/a\r\nb", "no control characters"),
        ("gs://bucket/a\nb", "no control characters"),
        ("https://no.such/a", "not a proper host"),
        ("x" * 5000 + "/../../../y", "lies outside"),
    ],
)
def test_references_that_are_refused(cell, says):
    with pytest.raises(InputError, match=says) as caught:
        find(cell)
    assert str(caught.value).startswith("t.csv:2: audio_path ") and len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_link_out_of_a_folder_is_not_looked_up_elsewhere(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.wav").write_bytes(b"x")
    (tmp_path / "in" / "a.wav").symlink_to(tmp_path / "secret.wav")
    with pytest.raises(InputError, match="through a symbolic link"):
        find("a.wav", tmp_path / "in", ["https://host/"])


def test_without_a_fetcher_only_files_are_read(tmp_path):
    for data, cell in ((tmp_path, "https://host/a.wav"), ("https://host/data/", "a.wav")):
        with pytest.raises(InputError, match="is a URL; only files can be read: download it and give its path"):
            Folders(data).find(cell, "audio_path", "t.csv:2")
    with pytest.raises(InputError, match="--media-root https://host/ is a URL; only files"):
        Folders(tmp_path, ["https://host/"])
    with pytest.raises(InputError, match="--media-root ftp://host/: ftp:// is not read"):
        Folders(tmp_path, ["ftp://host/"], Fetcher())
    with pytest.raises(InputError, match="no such folder"):
        Folders("https://host/", [Path("/nowhere/at/all")], Fetcher())
