"""What is kept of a conversation changes how much is read, and no token of what is answered."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from PIL import Image

from gemma_mlx.data.processor import Processor
from gemma_mlx.generation import stream
from gemma_mlx.models.cache import GROWTH, Cache
from gemma_mlx.models.load import load_model
from gemma_mlx.prompt_cache import PromptCache, _common, marks_of
from gemma_mlx.sampling import Settings

SETTINGS = Settings(max_tokens=30)


@pytest.fixture(scope="module")
def ready(checkpoint_folder):
    """Sliding window 16; layers that share keys and values."""
    return load_model(checkpoint_folder, dtype="float32"), Processor(checkpoint_folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, r = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(r.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.open(folder / "a.png").save(folder / "copy.png")
    return folder


def said(role, *parts):
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def ask(ready, conversation, cache=None, settings=SETTINGS):
    return "".join(stream(*ready, conversation, settings, cache))


def test_turn_after_turn(ready):
    cache, conversation, read = PromptCache(), [], []
    for question in ("Repeat: alfa bravo charlie", "And again?", "Once more, please."):
        conversation.append(said("user", question))
        expected = ask(ready, conversation)
        assert ask(ready, conversation, cache) == expected
        prompt = len(ready[1].prompt(_example(conversation)))
        read.append(prompt - cache.reused)
        conversation.append(said("model", expected))
    assert cache.reused > 30 and read[1] < prompt and len(cache) > prompt


def _example(conversation):
    from gemma_mlx.generation import as_example

    return as_example(conversation)


def test_the_same_prompt_again_reads_its_last_token_alone(ready):
    cache, conversation = PromptCache(), [said("user", "Repeat: alfa bravo charlie delta")]
    first = ask(ready, conversation, cache)
    assert ask(ready, conversation, cache) == first
    assert cache.reused == len(ready[1].prompt(_example(conversation))) - 1


@pytest.mark.parametrize("answer_tokens", [30, pytest.param(GROWTH + 40, marks=pytest.mark.slow)])
def test_a_prompt_that_departs(ready, answer_tokens):
    """Another answer than the one given, another last question, another first one (read anew: the window has left it);
    answers longer than the buffers' reserve leave the snapshots alone to come back to."""
    long = replace(SETTINGS, max_tokens=answer_tokens)
    cache, first = PromptCache(), said("user", "Repeat: alfa bravo charlie delta echo")
    ask(ready, [first], cache, long)
    prompt = len(ready[1].prompt(_example([first])))
    for conversation, reused in (
        ([first, said("model", "no"), said("user", "Why?")], prompt - 1),
        ([first, said("model", "no"), said("user", "How?")], prompt - 1),
        ([said("user", "Repeat: golf"), said("model", "no"), said("user", "Why?")], 0),
        ([said("user", "No.")], 0),
    ):
        assert ask(ready, conversation, cache, long) == ask(ready, conversation, settings=long)
        assert cache.reused >= reused


def test_pictures_count_by_their_contents(ready, pictures):
    cache = PromptCache()
    reused = []
    for name in ("a", "copy", "b", "b"):
        picture = {"type": "image", "image": pictures / f"{name}.png"}
        conversation = [said("user", "Look.", picture, "Which digit is this?")]
        assert ask(ready, conversation, cache) == ask(ready, conversation)
        reused.append(cache.reused)
    prompt = ready[1].prompt(_example(conversation))
    assert reused == [0, len(prompt) - 1, 0, len(prompt) - 1]


def test_a_caller_that_stops_early_loses_nothing(ready):
    cache, conversation = PromptCache(), [said("user", "Repeat: alfa bravo")]
    pieces = stream(*ready, conversation, SETTINGS, cache)
    next(pieces)
    pieces.close()
    assert len(cache) >= len(ready[1].prompt(_example(conversation)))
    assert ask(ready, conversation, cache) == ask(ready, conversation)
    assert cache.reused


def test_a_step_that_fails_leaves_an_empty_cache(ready, monkeypatch):
    import gemma_mlx.decoding as decoding

    cache, conversation = PromptCache(), [said("user", "Repeat: alfa bravo")]
    pieces = stream(*ready, conversation, SETTINGS, cache)
    next(pieces)

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoding.Running, "_following", fails)
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
    assert len(cache) == 0
    assert ask(ready, conversation, cache) == ask(ready, conversation)


def test_no_cut_within_a_medium(ready, pictures):
    """Held slots of one picture; the same picture stands in the new prompt with another one right behind it."""
    picture = {"type": "image", "image": pictures / "a.png"}
    sample = ready[1].prompt(_example([said("user", picture)]))
    marks = marks_of(sample)
    inside = int(np.flatnonzero(marks[:, 1])[2])
    other = marks.copy()
    other[inside:, 1] += 1
    assert _common(marks, other) == np.flatnonzero(marks[:, 1])[0]


def test_a_trimmed_cache_holds_what_it_held(tmp_path):
    """Layer by layer: keys and values after a trim are those of a cache that never went further; none where the window
    is gone."""
    import mlx.core as mx

    tiny.make(tmp_path, seed=3)
    model = load_model(tmp_path, dtype="float32")
    ids = np.random.default_rng(0).integers(3, 490, (1, 60))
    short, long = Cache(model.spec.text), Cache(model.spec.text)
    model.hidden(ids[:, :20], cache=short)
    model.hidden(ids[:, :20], cache=long)
    for i in range(20, 40):
        model.hidden(ids[:, i : i + 1], cache=long)
    assert long.trim(20) and long.offset == 20
    for a, b in zip(short.layers, long.layers, strict=True):
        assert all(mx.array_equal(x, y) for x, y in zip(a.held(), b.held(), strict=True))
    whole = Cache(model.spec.text)
    model.hidden(ids, cache=whole)
    assert not whole.trim(20) and whole.offset == 60, "read at once, nothing before its last window is left"


def test_an_adapter_put_on_or_taken_off_is_noticed(checkpoint_folder, tmp_path):
    """Keys and values of the model as it was before are never used."""
    import mlx.core as mx

    from gemma_mlx.adapters.attach import swap
    from gemma_mlx.errors import InputError
    from gemma_mlx.lora import apply_lora, lora_layers, save_adapter

    model = load_model(checkpoint_folder, dtype="float32")
    apply_lora(model, "decoder", 2)
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(i))
    save_adapter(model, tmp_path)
    ready = load_model(checkpoint_folder, dtype="float32"), Processor(checkpoint_folder)
    cache, conversation = PromptCache(), [said("user", "Repeat: alfa bravo charlie delta")]
    bare = ask(ready, conversation, cache)
    swap(ready[0], tmp_path)
    adapted = ask(ready, conversation, cache)
    assert cache.reused == 0 and adapted != bare and adapted == ask(ready, conversation)
    with pytest.raises(InputError):
        swap(ready[0], tmp_path / "none")
    assert ask(ready, conversation, cache) == adapted and cache.reused
    swap(ready[0], None)
    assert ask(ready, conversation, cache) == bare and cache.reused == 0
