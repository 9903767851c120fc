"""Which cells become what, and every row that is refused with its file and line."""

import os

import pytest

from gemma_mlx.data.dataset import read_examples
from gemma_mlx.data.examples import DESCRIBE, TRANSCRIBE, Audio, Image, Prompts, Text
from gemma_mlx.errors import InputError


def said(example):
    """(role, [parts]) with file names for media."""
    return [(turn.role, [p.text if isinstance(p, Text) else p.path.name for p in turn.parts]) for turn in example.turns]


CASES = {
    "transcript": (
        "audio_path,text\nshort.wav,hello\n",
        [("user", [TRANSCRIBE, "short.wav"]), ("model", ["hello"])],
    ),
    "caption": ("image_path,caption\ntall.png,a house\n", [("user", ["tall.png", DESCRIBE]), ("model", ["a house"])]),
    "question": (
        "image_path,question,answer\ntall.png,What?,this\n",
        [("user", ["tall.png", "What?"]), ("model", ["this"])],
    ),
    "chat": ("prompt,response\nhi,ho\n", [("user", ["hi"]), ("model", ["ho"])]),
    "both media": (
        "image_path,audio_path,prompt,text\ntall.png,short.wav,Say it,hello\n",
        [("user", ["tall.png", "Say it", "short.wav"]), ("model", ["hello"])],
    ),
    "spoken question": (
        "image_path,audio_path,answer\ntall.png,short.wav,this\n",
        [("user", ["tall.png", "short.wav"]), ("model", ["this"])],
    ),
    "answer before caption before text": (
        "image_path,question,text,caption,answer\ntall.png,Q,t,c,a\n",
        [("user", ["tall.png", "Q"]), ("model", ["a"])],
    ),
    "system and language": (
        "audio_path,text,language,system\nshort.wav,salut,French,be brief\n",
        [
            ("system", ["be brief"]),
            ("user", [pytest.approx, "short.wav"]),
            ("model", ["salut"]),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_row_types(table, name):
    content, expected = CASES[name]
    (example,) = read_examples(table(content))
    found = said(example)
    if name == "system and language":
        assert found[1][1][0].startswith("Transcribe the following speech segment in French into French text.")
        found[1][1][0] = expected[1][1][0]
    assert found == expected and not example.completion
    assert example.reference == expected[-1][1][0]


def test_text_alone_is_a_completion(table):
    (example,) = read_examples(table("text\n once upon a time \n"))
    assert example.completion and example.reference == " once upon a time "


def test_row_types_mix_in_one_file(table):
    content = (
        "id,image_path,audio_path,question,answer,text\n"
        "a,tall.png,,What?,this,\n"
        "b,,short.wav,,,hello\n"
        "c,,,Why?,because,\n"
        ",,,,,once\n"
    )
    path = table(content)
    examples = read_examples(path)
    kinds = [[type(p) for p in e.media()] for e in examples]
    assert kinds == [[Image], [Audio], [], []]
    assert [e.completion for e in examples] == [False, False, False, True]
    assert [e.row_id for e in examples] == ["a", "b", "c", f"{path}:5"]
    assert [e.where for e in examples] == [f"{path}:{line}" for line in (2, 3, 4, 5)]


def test_columns_are_mapped(table):
    path = table("wav,sentence,text\nshort.wav,hello,notes\n")
    (example,) = read_examples(path, columns={"audio_path": "wav", "text": "sentence"})
    assert said(example) == [("user", [TRANSCRIBE, "short.wav"]), ("model", ["hello"])]
    (example,) = read_examples(table("prompt,response,text\np,r,t\n"), columns={"response": ""})
    assert said(example)[-1] == ("model", ["t"])


def test_prompts_can_be_set(table):
    path = table("audio_path,text,language\nshort.wav,x,Welsh\n")
    (example,) = read_examples(path, prompts=Prompts(audio="Write the {language}.", system="Obey."))
    assert said(example)[:2] == [("system", ["Obey."]), ("user", ["Write the Welsh.", "short.wav"])]


def test_rows_to_predict_need_no_answer(table):
    (example,) = read_examples(table("audio_path\nshort.wav\n"), need_answer=False)
    assert said(example) == [("user", [TRANSCRIBE, "short.wav"])] and example.reference == ""


def test_media_in_roots_and_by_absolute_path(table, media, tmp_path):
    path = table("audio_path,text\nsub/clip.wav,hello\n")
    root = tmp_path / "elsewhere"
    (root / "sub").mkdir(parents=True)
    os.link(media / "short.wav", root / "sub" / "clip.wav")
    (example,) = read_examples(path, media_roots=[root])
    assert example.media()[0].path == root / "sub" / "clip.wav"
    (example,) = read_examples(table(f"audio_path,text\n{media}/short.wav,hello\n"), media_roots=[media])
    assert example.media()[0].path == media / "short.wav"
    (example,) = read_examples(table("audio_path,text\nnowhere/../short.wav,hello\n"))
    assert example.media()[0].path == tmp_path / "short.wav"


def refused(path, **options):
    with pytest.raises(InputError) as caught:
        read_examples(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("audio_path,id\nshort.wav,1\n", {}, "none of answer, response, completion, caption, text, messages, conv"),
        ("audio,text\nshort.wav,hello\n", {}, "missing column 'audio_path'; found audio, text"),
        ("prompt,response\na,b\n", {"columns": {"text": "sentence"}}, "missing column 'sentence'"),
        ("prompt,response\na,b\n", {"columns": {"txt": "prompt"}}, "unknown name 'txt'"),
    ],
)
def test_missing_column(table, content, options, says):
    assert says in refused(table(content), **options)


@pytest.mark.parametrize(
    "content",
    [
        "audio_path,text\nshort.wav,ok\nshort.wav,\n",
        "audio_path,text\nshort.wav,ok\nshort.wav,  \n",
        "prompt,response\na,b\n,c\n",
        'text\nok\n""\n',
        "image_path,question,answer\ntall.png,Q,A\ntall.png,,A\n",
    ],
)
def test_empty_text(table, content):
    path = table(content)
    assert refused(path).startswith(f"{path}:3: empty text: ")


def test_first_bad_row_and_how_many_more(table):
    path = table("prompt,response\na,\nb,c\nd,\ne,\n")
    message = refused(path)
    assert message.startswith(f"{path}:2: empty text") and message.endswith("(2 more bad rows in this file)")


@pytest.mark.parametrize("cell", ["../secret.wav", "/etc/hostname", "link.wav", "linked/short.wav", "a/../../x.wav"])
def test_path_outside(table, media, tmp_path, cell):
    path = table(f"audio_path,text\nshort.wav,ok\n{cell},hello\n")
    (tmp_path / "link.wav").symlink_to(media / "long.wav")
    (tmp_path / "linked").symlink_to(media)
    message = refused(path)
    assert message.startswith(f"{path}:3: audio_path {cell!r} lies outside the data folder and media roots")
    assert "--media-root" in message


def test_a_link_into_a_media_root_is_fine(table, media, tmp_path):
    path = table("audio_path,text\nlink.wav,hello\n")
    (tmp_path / "link.wav").symlink_to(media / "long.wav")
    assert len(read_examples(path, media_roots=[media])) == 1


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("absent.wav", "no such file in"),
        ("sub\\absent.wav", "write / between folders"),
        ("https://example.org/a.wav", "is a URL"),
        ("folder", "is a folder"),
    ],
)
def test_missing_file(table, tmp_path, cell, says):
    path = table(f"audio_path,text\n{cell},hello\n")
    (tmp_path / "folder").mkdir()
    message = refused(path)
    assert message.startswith(f"{path}:2: audio_path {cell!r}") and says in message


def test_media_root_must_exist(table, tmp_path):
    assert "no such folder" in refused(table("text\na\n"), media_roots=[tmp_path / "none"])


def test_no_rows(table):
    assert "no rows below the header" in refused(table("audio_path,text\n"))


def test_two_files_for_one_medium_are_refused(table):
    """Neither is dropped in silence; the same one twice is one."""
    with pytest.raises(InputError, match=r"train.csv:2: 'audio_path' and 'audio' name different files"):
        read_examples(table("audio_path,audio,text\nshort.wav,long.wav,hello\n"))
    (example,) = read_examples(table("audio_path,audio,text\nshort.wav,short.wav,hello\n"))
    assert len(example.media()) == 1
