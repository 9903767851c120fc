"""Pieces of text while tokens come: together they are the whole text, and stop texts never show."""

from pathlib import Path

import numpy as np
import pytest

from gemma_mlx.data.processor import Processor
from gemma_mlx.generation import answers, as_example, generate, stream
from gemma_mlx.models.load import load_model
from gemma_mlx.sampling import Settings
from gemma_mlx.text_pieces import TextPieces, _begun

DEMO = Path(__file__).resolve().parents[2] / "gemma_mlx" / "demo" / "checkpoint"


@pytest.fixture(scope="module")
def processor():
    return Processor(DEMO)


@pytest.fixture(scope="module")
def ready(checkpoint_folder):
    return load_model(checkpoint_folder, dtype="float32"), Processor(checkpoint_folder)


def id_rows(processor, count, seed):
    """Rows of ids in which characters of several bytes, broken ones, spaces and special tokens meet."""
    r = np.random.default_rng(seed)
    tokenizer = processor.tokenizer
    byte = [tokenizer.id_of(f"<0x{b:02X}>") for b in range(256)]
    special = [tokenizer.id_of(token) for token in ("<|turn>", "<eos>", "<pad>")]
    for _ in range(count):
        row = []
        for kind in r.integers(0, 4, r.integers(1, 25)):
            if kind == 0:
                row += tokenizer.encode(str(r.choice(["a word", " two  spaces", "ünï", "€", "日本", "👩‍🚀", " "])))
            elif kind == 1:
                row += [byte[b] for b in r.integers(0, 256, r.integers(1, 4))]
            elif kind == 2:
                row.append(special[r.integers(0, 3)])
            else:
                whole = [byte[b] for b in "€".encode()]
                row += whole[: r.integers(1, 4)]
        yield row


def test_pieces_make_up_the_decoded_text(processor):
    pieces_seen = 0
    for row in id_rows(processor, 300, 0):
        pieces = TextPieces(processor)
        told = [*map(pieces.push, row), pieces.end()]
        assert "".join(told) == processor.decode(row)
        pieces_seen += sum(map(bool, told)) > 2
    assert pieces_seen > 100, "text should come in pieces, not all at the end"


def test_a_piece_is_told_as_soon_as_it_is_certain(processor):
    ids = processor.tokenizer.encode("hi €!")
    pieces = TextPieces(processor)
    told = list(map(pieces.push, ids))
    assert told[0] and "�" not in "".join(told) and "".join(told) + pieces.end() == "hi €!"


def test_stop_texts_never_show(processor):
    """A stop text is cut from a random place of the text, so it spans tokens; others are nearly there."""
    r, spans = np.random.default_rng(3), 0
    for row in id_rows(processor, 300, 1):
        text = processor.decode(row)
        if len(text) < 3:
            continue
        at, length = r.integers(0, len(text) - 1), r.integers(1, 6)
        stop = text[at : at + length]
        near = stop + "☃"
        pieces, shown = TextPieces(processor, (stop, near)), ""
        for token in row:
            shown += pieces.push(token)
            assert stop not in shown
        assert shown + pieces.end() == text[: text.index(stop)]
        assert pieces.stopped
        missing = TextPieces(processor, (near,))
        assert "".join(map(missing.push, row)) + missing.end() == text and not missing.stopped
        spans += len(stop) > 1
    assert spans > 100


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "seed": 4, "repetition_penalty": 1.2}])
def test_a_stream_is_what_generate_gives(ready, sampling):
    """40 tokens of a random model, bytes among them; sampled ones too, for the first row of a batch."""
    model, processor = ready
    question = "Repeat: alfa bravo"
    [whole] = generate(model, processor, [question], 40, **sampling)
    pieces = list(stream(model, processor, question, Settings(40, **sampling)))
    assert "".join(pieces) == whole and len(pieces) > 5 and all(pieces)
    stop = whole[len(whole) // 2 :][:3]
    cut = Settings(40, stop=(stop,), **sampling)
    [(_, answer)] = answers(model, processor, [as_example(question)], cut)
    assert "".join(stream(model, processor, question, cut)) == answer.text == whole[: whole.index(stop)]
    assert answer.finish == "stop"


def test_how_much_of_a_stop_text_has_begun():
    """The longest end of the text that the stop text begins with, short of all of it."""
    draws = np.random.default_rng(4)
    for _ in range(500):
        text, stop = ("".join(draws.choice(list("ab"), n)) for n in draws.integers(1, 7, 2))
        fits = [n for n in range(len(stop)) if n <= len(text) and text[len(text) - n :] == stop[:n]]
        assert _begun(text, stop) == max(fits)
