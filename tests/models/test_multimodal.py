"""Assembly: encode, count, splice, decode. Logits against transformers for every modality are in tests/parity."""

import mlx.core as mx
import numpy as np
import pytest
import tiny

from gemma_mlx.errors import InputError
from gemma_mlx.models.load import load_model
from gemma_mlx.models.multimodal import splice

TOLERANCE = 2e-4
KINDS = {
    "text": {},
    "image": dict(grids=((6, 6), (9, 3))),
    "audio": dict(lens=(61, 101)),
    "image+audio": dict(lens=(61,), grids=((9, 3),)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimodal")
    tiny.make(folder)
    return load_model(folder)


def test_splice_against_numpy():
    rng = np.random.default_rng(0)
    embeddings, soft = rng.standard_normal((3, 7, 4)).astype(np.float32), rng.standard_normal((9, 4)).astype(np.float32)
    slots = np.zeros(21, bool)
    slots[rng.choice(21, 9, replace=False)] = True
    slots = slots.reshape(3, 7)
    expected = embeddings.copy()
    expected[slots] = soft
    assert np.array_equal(np.array(splice(mx.array(embeddings), mx.array(slots), mx.array(soft))), expected)
    gradient = mx.grad(lambda s: (splice(mx.array(embeddings), mx.array(slots), s) * mx.array(embeddings)).sum())
    assert np.array_equal(np.array(gradient(mx.array(soft))), embeddings[slots])


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("change", [-1, 1])
def test_count_mismatch_names_both_counts(model, kind, change):
    batch = tiny.inputs(kind, **KINDS[kind])
    token = {"image": tiny.IMG, "audio": tiny.AUD}[kind]
    slots = np.argwhere(batch["input_ids"][0] == token)[:, 0]
    found = len(slots)
    text = np.argwhere(batch["input_ids"][0] < 490)[:, 0]
    batch["input_ids"][0, slots[0] if change < 0 else text[-1]] = 7 if change < 0 else token
    with pytest.raises(InputError, match=f"{found + change} {kind} slots .id {token}.*{found} soft tokens"):
        model(**batch)


def test_slots_without_media_and_media_without_slots(model):
    batch = tiny.inputs("image", grids=((6, 6),))
    with pytest.raises(InputError, match=r"4 image slots .*0 soft tokens"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(InputError, match=r"0 image slots .*4 soft tokens"):
        model(**{**batch, "input_ids": np.where(batch["input_ids"] == tiny.IMG, 9, batch["input_ids"])})
    with pytest.raises(InputError, match="1 video slots"):
        model(input_ids=np.array([[2, tiny.VID, 5]]))


@pytest.mark.parametrize("wrong", [-1, tiny.VOCAB])
def test_id_outside_the_vocabulary(model, wrong):
    """MLX would read whatever lies beyond the table."""
    with pytest.raises(InputError, match=f"input_ids hold {wrong}; this checkpoint's ids are 0 to 511"):
        model(input_ids=np.array([[2, 5, wrong]]))


def test_media_that_cannot_be_encoded(tmp_path, model):
    pictures, clips = tiny.inputs("image"), tiny.inputs("audio")
    with pytest.raises(InputError, match="need image_position_ids"):
        model(input_ids=pictures["input_ids"], pixel_values=pictures["pixel_values"])
    with pytest.raises(InputError, match="need input_features_mask"):
        model(input_ids=clips["input_ids"], input_features=clips["input_features"])
    tiny.make(tmp_path, vision=None, audio=None)
    text_only = load_model(tmp_path)
    with pytest.raises(InputError, match="no vision tower"):
        text_only(**pictures)
    with pytest.raises(InputError, match="no audio tower"):
        text_only(**clips)


@pytest.mark.parametrize("kind", ["image", "audio", "image+audio"])
def test_soft_tokens_in_place_of_media(model, kind):
    """encode, then hidden with its result, is the whole call; what encode returns is flat."""
    batch = tiny.inputs(kind, **KINDS[kind])
    names = ("pixel_values", "image_position_ids", "input_features", "input_features_mask")
    soft = model.encode(**{k: v for k, v in batch.items() if k in names})
    slots = {"image": tiny.IMG, "audio": tiny.AUD}
    counts = {f"{k}_soft_tokens": (batch["input_ids"] == t).sum() for k, t in slots.items()}
    assert {k: v.shape for k, v in soft.items()} == {k: (n, 64) for k, n in counts.items() if n}
    rest = {k: v for k, v in batch.items() if k not in names}
    again = model.logits(model.hidden(**rest, **soft))
    assert np.array_equal(np.array(again), np.array(model(**batch)))


def test_slot_ids_are_replaced_by_pad(tmp_path):
    """The table rows of slot ids are never used, that of pad is: its per-layer row serves every slot."""
    tiny.make(tmp_path)
    model, batch = load_model(tmp_path), tiny.inputs("image+audio", **KINDS["image+audio"])
    text = model.model.language_model
    before = np.array(model.hidden(**batch))
    for table in (text.embed_tokens, text.embed_tokens_per_layer):
        table.weight[[tiny.IMG, tiny.AUD, tiny.VID]] = 100.0
    assert np.array_equal(np.array(model.hidden(**batch)), before)
    text.embed_tokens_per_layer.weight[0] = 100.0
    assert np.abs(np.array(model.hidden(**batch)) - before).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached(model, kind):
    """Prompt with its media first, then 30 single tokens past the window, for each modality."""
    batch = tiny.inputs(kind, n_text=3, **KINDS[kind])
    after = np.random.default_rng(5).integers(3, 490, (1, 30))
    whole = {**batch, "input_ids": np.concatenate([batch["input_ids"], after], axis=1)}
    del whole["attention_mask"], whole["mm_token_type_ids"]
    expected = np.array(model(**whole))[:, -31:]
    cache = model.make_cache()
    found = [np.array(model(**batch, cache=cache))[:, -1]]
    found += [np.array(model(input_ids=after[:, t : t + 1], cache=cache))[:, 0] for t in range(30)]
    assert np.abs(np.stack(found, axis=1) - expected).max() <= TOLERANCE


def test_chunked_prefill_with_media(model):
    """Soft tokens of one encode, handed out chunk by chunk."""
    batch = tiny.inputs("audio", **KINDS["audio"])
    soft = model.encode(input_features=batch["input_features"], input_features_mask=batch["input_features_mask"])
    soft = soft["audio_soft_tokens"]
    ids, cache, used, parts = batch["input_ids"], model.make_cache(), 0, []
    for start in range(0, ids.shape[1], 13):
        chunk = ids[:, start : start + 13]
        n = int((chunk == tiny.AUD).sum())
        parts.append(np.array(model(input_ids=chunk, audio_soft_tokens=soft[used : used + n], cache=cache)))
        used += n
    assert np.abs(np.concatenate(parts, axis=1) - np.array(model(**batch))).max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_causal(model, kind):
    """Media or not, changing the last token changes no earlier logit."""
    batch = tiny.inputs(kind, **KINDS[kind])
    changed = {**batch, "input_ids": batch["input_ids"].copy()}
    changed["input_ids"][0, -1] = 3 + (batch["input_ids"][0, -1] + 1) % 400
    a, b = np.array(model(**batch)), np.array(model(**changed))
    assert np.array_equal(a[:, :-1], b[:, :-1]) and not np.array_equal(a[:, -1], b[:, -1])


def test_mlx_and_numpy_inputs_agree(model):
    batch = tiny.inputs("image+audio", **KINDS["image+audio"])
    assert np.array_equal(np.array(model(**{k: mx.array(v) for k, v in batch.items()})), np.array(model(**batch)))


def test_compiled(tmp_path):
    """The decoder compiles: ids, mask and soft tokens traced, the soft tokens filled up to a bucket's length."""
    layers = ["sliding_attention", "full_attention", "full_attention"]  # few: a C++ compiler builds every kernel
    text = dict(num_hidden_layers=3, layer_types=layers, num_kv_shared_layers=1)
    tiny.make(tmp_path, vision=None, audio=None, text=text)
    model, batch = load_model(tmp_path), tiny.inputs("audio", lens=(61, 101), batch=2, n_text=12)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    soft = mx.random.normal((int((ids == tiny.AUD).sum()), 64))
    filled = mx.concatenate([soft, mx.zeros((7, 64))])
    traced = mx.compile(lambda ids, mask, tokens: model.hidden(ids, mask, audio_soft_tokens=tokens))
    found = traced(mx.array(ids), mx.array(mask), filled)
    expected = model.hidden(ids, mask, audio_soft_tokens=soft)
    keep = mask.astype(bool)
    assert not keep.all()
    assert np.abs(np.array(found) - np.array(expected))[keep].max() <= TOLERANCE
