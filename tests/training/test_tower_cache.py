"""The cache of frozen towers' outputs: the right soft tokens, each medium once, within its limit."""

import mlx.core as mx
import numpy as np

from gemma_mlx.tower_cache import TowerCache
from gemma_mlx.tower_store import Memory


class Tower:
    """Doubles what it reads and counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, features, where):
        self.calls.append(features.shape)
        return mx.array(features[0] * 2 + where[0].sum())


def media(lengths, seed=0):
    r = np.random.default_rng(seed)
    features = np.zeros((len(lengths), max(lengths), 4), np.float32)
    valid = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    features[valid] = r.standard_normal((sum(lengths), 4))
    return features, valid.astype(np.int32)


def test_media_come_in_order_without_their_padding_and_are_made_once():
    tower = Tower()
    cache = TowerCache(tower)
    features, where = media([3, 7, 5])
    expected = np.concatenate([features[i, :n] * 2 + n for i, n in enumerate([3, 7, 5])])
    for _ in range(3):
        assert np.array_equal(np.array(cache(features, where)), expected)
    assert tower.calls == [(1, 3, 4), (1, 7, 4), (1, 5, 4)]
    again = features[[2, 0]], where[[2, 0]]
    assert np.array_equal(np.array(cache(*again)), np.concatenate([expected[10:], expected[:3]]))
    assert len(tower.calls) == 3


def test_other_content_or_positions_are_other_media():
    tower = Tower()
    cache = TowerCache(tower)
    features, where = media([4])
    cache(features, where)
    cache(features + 1, where)
    cache(features, where + 1)
    assert len(tower.calls) == 3


def test_padding_stays_where_the_tower_reads_it_and_nothing_need_be_padded():
    tower = Tower()
    features, where = media([3, 7])
    made = TowerCache(tower, trim=False)(features, where)
    assert tower.calls == [(1, 7, 4), (1, 7, 4)] and made.shape == (14, 4)
    pictures = np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype(np.float32)
    made = TowerCache(lambda values, _: mx.array(values[0]).reshape(-1, 5))(pictures, None)
    assert np.array_equal(np.array(made), pictures.reshape(-1, 5))


def test_the_longest_unused_go_and_the_limit_holds():
    tower = Tower()
    cache = TowerCache(tower, store=Memory(2 * 5 * 4 * 4))  # two media of five soft tokens
    one, two, three = (media([5], seed) for seed in range(3))
    for item in (one, two, one, three):  # three drives out two
        cache(*item)
    assert len(tower.calls) == 3
    cache(*one)
    assert len(tower.calls) == 3
    cache(*two)
    assert len(tower.calls) == 4
    nothing = TowerCache(tower, store=Memory(0))
    for _ in range(2):
        nothing(*one)
    assert len(tower.calls) == 6


def test_a_run_encodes_each_medium_once(checkpoint_folder, rows, tmp_path, monkeypatch):
    """Over four epochs, with frozen towers; with adapters on the towers nothing is kept."""
    from gemma_mlx.estimate import Estimate
    from gemma_mlx.loop import finetune
    from gemma_mlx.models.gemma4.audio import AudioTower

    monkeypatch.setenv("GEMMA_MLX_COMPILE", "off")
    monkeypatch.setattr("gemma_mlx.fit.estimate_run", lambda *_: Estimate({}))  # asks towers for their shapes
    calls = []
    original = AudioTower.__call__
    monkeypatch.setattr(AudioTower, "__call__", lambda self, *a: calls.append(len(a[0])) or original(self, *a))
    options = dict(data=rows / "media.csv", batch_size=5, steps=8, rank=2, quiet=True, image_tokens=70)
    finetune(str(checkpoint_folder), out=tmp_path / "frozen", targets="decoder,embedders", **options)
    assert calls == [1] * 4  # media.csv has four clips
    calls.clear()
    finetune(str(checkpoint_folder), out=tmp_path / "trained", targets="audio", **options)
    assert sum(calls) == 4 * 4


def test_digests_stand_for_contents():
    tower = Tower()
    cache = TowerCache(tower)
    features, where = media([3, 5])
    expected = np.concatenate([features[i, :n] * 2 + n for i, n in enumerate([3, 5])])
    found = cache.look_up(features, where, [b"a", b"b"])
    assert np.array_equal(np.array(cache.encode(found)), expected)
    again = cache.look_up(features[[1, 0, 0]], where[[1, 0, 0]], [b"b", b"a", b"c"])
    assert [medium.kept is not None for medium in again] == [True, True, False]
    assert len({medium.key for medium in (*found, *cache.look_up(features, where))}) == 4
