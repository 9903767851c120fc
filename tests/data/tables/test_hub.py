"""Dataset repositories by name: the conventions on listings, and the real client library against a local server."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import pytest

from gemma_mlx.data.blob import Blob
from gemma_mlx.data.sources.hub import HubBlob, hub_files, hub_tables
from gemma_mlx.data.sources.hub_layout import Listing, choose
from gemma_mlx.data.sources.table import Row
from gemma_mlx.errors import InputError, SourceError

NAME = "hf://datasets/o/n"


def chosen(files, path="", split="train", configs=()):
    return choose(Listing("0" * 40, tuple(files.split()), tuple(configs)), path, split, NAME)


# which files are a split's


@pytest.mark.parametrize(
    "files, split, expected",
    [
        ("README.md .gitattributes train.csv test.csv", "train", "train.csv"),
        ("README.md train.csv test.csv", "test", "test.csv"),
        ("data/train-00001-of-00002.parquet data/train-00000-of-00002.parquet data/test-00000-of-00001.parquet",
         "train", "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet"),
        ("data/train-00000-of-00001.parquet data/extra.clean-00000-of-00001.parquet", "extra.clean",
         "data/extra.clean-00000-of-00001.parquet"),
        ("data/train.clean.100-00000-of-00001.parquet data/train-00000-of-00001.parquet", "train",
         "data/train-00000-of-00001.parquet"),
        ("train/a.tar train/b.tar validation/a.tar", "valid", "validation/a.tar"),
        ("my_dev_set.jsonl my-training-set.jsonl", "val", "my_dev_set.jsonl"),
        ("my_dev_set.jsonl my-training-set.jsonl", "train", "my-training-set.jsonl"),
        ("b.jsonl a.jsonl constraint.jsonl", "train", "a.jsonl b.jsonl constraint.jsonl"),
        ("a/eval_1.json b/Test.json", "test", "a/eval_1.json b/Test.json"),
        ("audio/train/metadata.csv audio/train/1.wav audio/train/1.txt audio/test/metadata.csv", "train",
         "audio/train/metadata.csv"),
        ("train.csv dataset_infos.json .hidden/train.json __x__/train.json", "train", "train.csv"),
        ("part-1.txt README.txt LICENSE.txt", "train", "part-1.txt"),
        ("train.csv notes.txt", "train", "train.csv"),
    ],
)  # fmt: skip
def test_files_of_a_split(files, split, expected):
    assert chosen(files, split=split) == expected.split()


@pytest.mark.parametrize(
    "path, expected",
    [
        ("en/train.csv", "en/train.csv"),
        ("de/test.csv", "de/test.csv"),  # a named file stands for itself
        ("en", "en/train.csv"),
        ("*/train.csv", "de/train.csv en/train.csv"),
        ("**/t*n.csv", "de/train.csv en/train.csv train.csv"),
        ("{de,en}/t?st.csv", "de/test.csv"),
        ("[!d]*/train.csv", "en/train.csv"),
        ("[a-d]e/train.csv", "de/train.csv"),
        ("*.csv", "train.csv"),
    ],
)
def test_a_path_narrows(path, expected):
    files = "README.md train.csv en/train.csv de/train.csv de/test.csv en/notes.md en/clips/1.wav"
    assert chosen(files, path) == expected.split()


CONFIGS = (
    {"config_name": "en", "data_files": [{"split": "train", "path": ["en/a-*.csv", "en/b.csv"]},
                                         {"split": "dev", "path": "en/held.csv"}]},
    {"config_name": "de", "data_dir": "german", "data_files": "*.csv"},
)  # fmt: skip
CARD_FILES = "en/a-1.csv en/a-2.csv en/b.csv en/held.csv en/other.csv german/x.csv fr/x.csv"


def test_what_the_card_declares_comes_first():
    assert chosen(CARD_FILES, "en", "train", CONFIGS) == ["en/a-1.csv", "en/a-2.csv", "en/b.csv"]
    assert chosen(CARD_FILES, "en", "validation", CONFIGS) == ["en/held.csv"]
    assert chosen(CARD_FILES, "de", "train", CONFIGS) == ["german/x.csv"]
    assert chosen(CARD_FILES, "", "train", [CONFIGS[0]]) == ["en/a-1.csv", "en/a-2.csv", "en/b.csv"]
    assert chosen(CARD_FILES, "", "train", [CONFIGS[0], CONFIGS[1] | {"default": True}]) == ["german/x.csv"]
    assert chosen(CARD_FILES, "fr", "train", CONFIGS) == ["fr/x.csv"]  # a folder that is no configuration


@pytest.mark.parametrize(
    "files, path, split, configs, told",
    [
        ("train.csv test.csv", "", "validation", (), "no split 'validation'; the repository has test, train"),
        ("a.csv b.csv", "", "test", (), "no split 'test'; the repository has train"),
        ("train.csv train.jsonl", "", "train", (), "files of several kinds (.csv, .jsonl); name one kind: …/**.csv"),
        ("x/train.csv y/train.parquet", "*/*", "train", (), "several kinds (.csv, .parquet)"),
        ("a.wav b.wav c.wav d.wav e.wav README.md", "", "train", (), "only a.wav, b.wav, c.wav, d.wav and 2 more"),
        ("1.wav 1.txt", "", "train", (), "no data files"),
        ("a.csv", "b.csv", "train", (), "no b.csv in the repository; it has a.csv"),
        ("a.csv", "b/*.csv", "train", (), "no file matches b/*.csv; the repository has a.csv"),
        ("a.csv model.bin", "model.bin", "train", (), ".bin is no known kind of data"),
        ("", "", "train", (), "no file in the repository; it has no files"),
        (".gitattributes", "", "train", (), "no data files"),
        (CARD_FILES, "", "train", CONFIGS, "has several configurations; name one after a slash: de, en"),
        (CARD_FILES, "en", "test", CONFIGS, "no split 'test'; the repository has train, validation"),
        ("en/x.csv", "en", "train", CONFIGS, "the card's en/a-*.csv, en/b.csv matches no file"),
        ("a.csv", "{a.csv", "train", (), "not a pattern"),
    ],
)
def test_refused_choices(files, path, split, configs, told):
    with pytest.raises(InputError) as caught:
        chosen(files, path, split, configs)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# against a server


@pytest.fixture(scope="module")
def server():
    with fake_hub.serving() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server, empty, as the client library's Hub, with caches of its own and no token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)  # made of ENDPOINT at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("gemma_mlx.data.sources.hub.cache_folder", lambda: tmp_path / "ours")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.repos, server.failing, server.status = {}, 0, 503
    server.asked.clear(), server.cdn_tokens.clear()
    return server


def refused(error=InputError, **what):
    with pytest.raises(InputError) as caught:
        hub_files("o/n", **what)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith("hf://datasets/o/n") and "\n" not in message
    return message


FILES = {"README.md": "x", "train.csv": "text\na\n", "test.csv": "text\n" + "b\n" * 5000, "clips/1.wav": b"RIFF" * 2000}


def test_a_split_is_downloaded_once_at_its_commit(hub):
    sha = hub.add("o/n", FILES)
    found = hub_files("o/n")
    assert (found.sha, found.names) == (sha, ("train.csv",))
    assert found.paths[0].read_bytes() == b"text\na\n" and hub.downloads() == [f"/datasets/o/n/resolve/{sha}/train.csv"]
    hub.add("o/n", FILES | {"train.csv": "text\nnew\n"})
    assert hub_files("o/n").paths[0].read_bytes() == b"text\nnew\n"
    hub.asked.clear()
    assert hub_files("o/n", sha).paths[0].read_bytes() == b"text\na\n"
    assert hub_files("o/n", sha).paths == found.paths
    assert hub.downloads() == [] and len(hub.asked) == 1  # its listing, once


def test_a_large_file_comes_by_a_redirect_without_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    hub.add("o/n", FILES, access="private")
    assert hub_files("o/n", split="test").paths[0].stat().st_size == len(FILES["test.csv"])
    assert hub.cdn_tokens and set(hub.cdn_tokens) == {None}


def test_branches_tags_and_pull_requests(hub):
    old = hub.add("o/n", FILES)
    hub.add("o/n", FILES | {"train.csv": "text\nnew\n"})
    hub.repos["o/n"].branches |= {"v1": old, "refs/pr/3": old}
    opened = []
    for source in (f"{NAME}@v1", f"{NAME}@refs/pr/3", f"{NAME}@refs%2Fpr%2F3/train.csv", f"{NAME}@{old}/*train.csv"):
        hub_tables(source, "train", lambda path, name, base: opened.append((path.read_text(), name)) or Rows(path))
    assert opened == [("text\na\n", f"{NAME}@{old[:12]}/train.csv")] * 4


def test_several_files_keep_their_order(hub):
    hub.add("o/n", {f"data/train-{i:05}-of-00007.csv": f"text\n{i}\n" for i in range(7)})
    assert [path.read_text()[5] for path in hub_files("o/n").paths] == list("0123456")


@pytest.mark.parametrize(
    "access, told",
    [
        ("gated", "a gated dataset; accept its conditions"),
        ("private", "no such dataset on the Hub, or a private one"),
        ("disabled", "the Hub gives no access (HTTP 403)"),
    ],
)
def test_no_access(hub, access, told):
    hub.add("o/n", FILES, access=access)
    assert told in refused()


def test_nothing_of_that_name(hub):
    assert "no such dataset on the Hub" in refused()
    hub.add("o/n", FILES)
    assert "no such revision" in refused(revision="v9")
    assert "no such revision" in refused(revision="0" * 40)
    assert "no split 'validation'; the repository has test, train" in refused(split="validation")
    with pytest.raises(InputError, match=r"hf://datasets/o/-: not a name of a dataset; write hf://datasets/owner"):
        hub_files("o/-")


def test_a_bad_token(hub, monkeypatch):
    hub.add("o/n", FILES)
    hub.failing, hub.status = -1, 403
    assert "no access (HTTP 403); log in with `hf auth login`" in refused()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_fails_is_a_failed_source(hub, status):
    hub.add("o/n", FILES)
    hub.failing, hub.status = -1, status
    assert f"does not answer (HTTP {status})" in refused(SourceError)


def test_a_download_survives_a_moment_of_failure_and_names_its_file_after_more(hub):
    sha = hub.add("o/n", FILES)
    hub_files("o/n", sha, split="test")
    hub.failing = 1
    assert hub_files("o/n", sha).paths[0].read_bytes() == b"text\na\n"
    blob = HubBlob(hub_files("o/n", sha).repository, "clips/1.wav")
    hub.failing = -1
    with pytest.raises(SourceError, match=r"hf://datasets/o/n@.*: clips/1.wav: the Hub does not answer"):
        blob.open()


def test_no_network(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer (" in refused(SourceError)


def test_a_full_disk(hub, monkeypatch):
    import huggingface_hub

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    hub.add("o/n", FILES)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    assert "train.csv: cannot be written to the Hub's cache (No space left" in refused(SourceError)


def test_offline(hub, monkeypatch):
    from huggingface_hub import constants

    hub.add("o/n", FILES)
    paths = hub_files("o/n").paths
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert hub_files("o/n").paths == paths and not hub.asked
    assert "test.csv: not in the cache, and HF_HUB_OFFLINE is set" in refused(split="test")
    assert "not in the cache, and HF_HUB_OFFLINE is set" in refused(revision="v1")
    assert not hub.asked


# media


class Rows:
    """A table of a CSV file, as `opener` gives one."""

    units = None

    def __init__(self, path, name="t", base=""):
        with Path(path).open(newline="") as file:
            self._rows = list(csv.DictReader(file))
        self.name, self.base = name, base
        self.columns = tuple(self._rows[0])

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return Row(dict(self._rows[index]), f"{self.name}:{index + 2}")

    def fingerprint(self):
        return repr(self._rows)


def table_of(hub, rows, **files):
    hub.add(
        "o/n", {"train/metadata.csv": rows, "train/a/1.wav": b"one", "train/2.png": b"two", "3.flac": b"three"} | files
    )
    (table,) = hub_tables(NAME, "train", Rows)
    return table


def test_a_file_name_is_a_medium_that_comes_when_it_is_opened(hub):
    table = table_of(hub, "file_name,text\na/1.wav,hello\n2.png,seen\n,nothing\n")
    assert table.columns == ("image_path", "audio_path", "text") and len(table) == 3
    first, second, third = (table[i].values for i in range(3))
    sha = hub.repos["o/n"].branches["main"]
    assert first["text"] == "hello" and third == {"text": "nothing"} and set(second) == {"image_path", "text"}
    blob = first["audio_path"]
    assert isinstance(blob, Blob) and (blob.name, blob.suffix) == (f"{NAME}@{sha[:12]}/train/a/1.wav", ".wav")
    assert str(blob) == blob.name and not [path for path in hub.downloads() if "csv" not in path]
    with blob.open() as file:
        assert file.seekable() and file.read() == b"one" and blob.size() == 3
    assert len([path for path in hub.downloads() if path.endswith("1.wav")]) == 1


def test_paths_in_any_column_are_found_in_the_repository_and_only_there(hub):
    table = table_of(hub, "audio_path,clip,text,id\na/1.wav,3.flac,see 3.flac,3.mp3\n../3.flac,../../x.wav,x,/3.flac\n")
    first, second = table[0].values, table[1].values
    assert (first["audio_path"].path, first["clip"].path) == ("train/a/1.wav", "3.flac")
    assert (first["text"], first["id"]) == ("see 3.flac", "3.mp3")
    assert second["audio_path"].path == "3.flac"  # inside the repository
    assert (second["clip"], second["id"]) == ("../../x.wav", "/3.flac")
    assert not [path for path in hub.downloads() if "metadata" not in path]


def test_lists_and_messages_are_looked_through(hub):
    from gemma_mlx.data.sources.hub import HubTable

    table = table_of(hub, "file_name\na/1.wav\n")

    class Nested(Rows):
        def __getitem__(self, index):
            parts = [{"type": "audio", "audio": "a/1.wav"}, {"type": "text", "text": "a/1.wav is long"}]
            return Row({"messages": [{"content": parts}], "file_names": ["a/1.wav", "../3.flac", "2.png"], "n": 1}, "w")

    nested = HubTable(Nested(hub_files("o/n").paths[0]), table._repository, "train/metadata.csv")
    values = nested[0].values
    assert values["messages"][0]["content"][0]["audio"].path == "train/a/1.wav"
    assert values["messages"][0]["content"][1]["text"] == "a/1.wav is long" and values["n"] == 1
    assert [blob.path for blob in values["audio_path"]] == ["train/a/1.wav", "3.flac"]
    assert values["image_path"].path == "train/2.png"


@pytest.mark.parametrize(
    "rows, told",
    [
        ("file_name,text\ngone.wav,x\n", "file_name 'gone.wav': no such audio, image or video in o/n"),
        ("file_name,text\nmetadata.csv,x\n", "file_name 'metadata.csv': no such audio"),
        ("file_name,text\n../../../etc/x.wav,x\n", "no such audio"),
        ("file_name,audio_path\na/1.wav,3.flac\n", "file_name and another column both give audio_path"),
        ("file_name,b_file_name\na/1.wav,../3.flac\n", "b_file_name and another column both give audio_path"),
    ],
)
def test_a_file_name_that_names_no_one_medium(hub, rows, told):
    table = table_of(hub, rows)
    with pytest.raises(InputError) as caught:
        table[0]
    assert told in str(caught.value) and str(caught.value).startswith(f"{table.name}:2: ")


def test_the_fingerprint_is_of_rows_and_commit(hub):
    rows = "file_name\na/1.wav\n"
    prints = {table_of(hub, rows).fingerprint() for _ in range(2)}
    assert len(prints) == 1
    prints.add(table_of(hub, rows, **{"train/a/1.wav": b"other"}).fingerprint())
    assert len(prints) == 2


@pytest.mark.parametrize(
    "source",
    ["hf://o/n", "hf://datasets/", "hf://datasets/o/n@", "hf://datasets/a/b@v/../x", "hf://datasets/o/n/a\\b", "hf://models/o/n"],
)  # fmt: skip
def test_sources_that_name_no_dataset(source):
    with pytest.raises(InputError, match=r": not a dataset of the Hub; write hf://datasets/owner/name"):
        hub_tables(source, "train", Rows)


def test_end_to_end_by_environment_alone(hub, tmp_path):
    """Another process, that knows the server by HF_ENDPOINT and nothing of this test's patches."""
    sha = hub.add("o/n", {"train.csv": "audio_path,text\n1.flac,a\n", "1.flac": b"x" * 9000})
    code = (
        "from gemma_mlx.data.sources.opening import open_table\n"
        "t = open_table('hf://datasets/o/n'); b = t[0].values['audio_path']; print(t[0].where, b.name, b.size())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path / "me")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "xdg")
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert told.stdout.split() == [f"{NAME}@{sha[:12]}/train.csv:2", f"{NAME}@{sha[:12]}/1.flac", "9000"], told.stderr
