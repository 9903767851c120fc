"""Gemma 3n whole: encode pictures and clips, splice them into the text, run the decoder."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.models.base import CausalModel
from gemma_mlx.models.cache import Cache
from gemma_mlx.models.decoder import place
from gemma_mlx.models.gemma3n.audio import AudioTower
from gemma_mlx.models.gemma3n.text import TextModel
from gemma_mlx.models.gemma3n.vision import VisionTower
from gemma_mlx.models.label_rows import LabelRows
from gemma_mlx.models.layers import RMSNorm
from gemma_mlx.models.multimodal import splice
from gemma_mlx.models.padding import check_ids, known_valid
from gemma_mlx.spec_gemma3n import Gemma3nAudioSpec, Gemma3nSpec, Gemma3nVisionSpec


class Embedder(nn.Module):
    """Soft tokens of a tower, or rows of its own small vocabulary, -> the decoder's embedding space.

    Norm, linear, norm without a weight (transformers' ``Gemma3nMultimodalEmbedder``).
    """

    def __init__(self, spec: Gemma3nVisionSpec | Gemma3nAudioSpec, text_dims: int):
        super().__init__()
        dims, eps = spec.hidden_size, spec.rms_norm_eps
        self.offset, self.rows = spec.vocab_offset, spec.vocab_size
        self.embedding = nn.Embedding(spec.vocab_size, dims)
        self.hard_embedding_norm = RMSNorm(dims, eps)
        self.soft_embedding_norm = RMSNorm(dims, eps)
        self.embedding_projection = nn.Linear(dims, text_dims, bias=False)
        self.embedding_post_projection_norm = RMSNorm(text_dims, eps, with_scale=False)

    def __call__(self, soft_tokens: mx.array) -> mx.array:
        x = self.embedding_projection(self.soft_embedding_norm(soft_tokens))
        return self.embedding_post_projection_norm(x)

    def table(self) -> mx.array:
        """Embeddings [rows, text_dims] of the whole vocabulary, token `offset` first."""
        x = self.embedding_projection(self.hard_embedding_norm(self.embedding(mx.arange(self.rows))))
        return self.embedding_post_projection_norm(x)


class Gemma3nModel(nn.Module):
    """Towers, embedders and text decoder under the names of transformers' ``Gemma3nModel``."""

    def __init__(self, spec: Gemma3nSpec):
        super().__init__()
        self.spec = spec
        self.language_model = TextModel(spec.text)
        if spec.vision is not None:
            self.vision_tower = VisionTower(spec.vision)
            self.embed_vision = Embedder(spec.vision, spec.text.hidden_size)
        if spec.audio is not None:
            self.audio_tower = AudioTower(spec.audio)
            self.embed_audio = Embedder(spec.audio, spec.text.hidden_size)

    def soft_tokens(self, kind: str, values: Any, where: Any = None, index: Any = None) -> mx.array:
        """Soft tokens [n, H] of all media of a kind, in order; as many for each. Can be traced.

        Args:
            kind: "image" or "audio".
            values: pixels [N, 3, H, W] or features [M, F, bins].
            where: the mask of features [M, F]; nothing for pixels.
            index: not needed, since nothing is dropped.
        """
        return self.project(kind, self.features(kind, values, where))

    def features(self, kind: str, values: Any, where: Any = None, index: Any = None) -> mx.array:
        """The tower's output [n, D] before the embedder; clips [n, D + 1], the last column 1 where there is sound.

        Raises:
            InputError: a clip of more soft tokens than it has slots.
        """
        if kind == "image":
            soft = self.vision_tower(mx.array(values))
            return (soft * mx.array(self.spec.vision.hidden_size**0.5, soft.dtype)).flatten(0, 1)
        states, valid = self.audio_tower(mx.array(values), mx.array(where))
        heard, slots = valid.shape[1], self.spec.audio.tokens_each
        if heard > slots:
            raise InputError(f"input_features: {values.shape[1]} frames give {heard} soft tokens; a clip has {slots}")
        told = mx.concatenate([states, valid[..., None].astype(states.dtype)], axis=-1)
        return mx.pad(told, [(0, 0), (0, slots - heard), (0, 0)]).flatten(0, 1)

    def project(self, kind: str, features: mx.array) -> mx.array:
        """The embedder's output [n, H]; the last id of the audio vocabulary stands where there is no sound."""
        if kind == "image":
            return self.embed_vision(features)
        return mx.where(features[:, -1:] > 0, self.embed_audio(features[:, :-1]), self.embed_audio.table()[-1])

    def embed(self, input_ids: mx.array) -> mx.array:
        """Token embeddings [B, T, H], ids of the vision and audio vocabularies through their embedders."""
        embeddings = self.language_model.embed(input_ids)
        upper = None
        for name in ("embed_audio", "embed_vision"):  # the audio vocabulary begins where the vision vocabulary ends
            if name not in self:
                continue
            part = self[name]
            inside = input_ids >= part.offset
            if upper is not None:
                inside = inside & (input_ids < upper)
            upper = part.offset
            rows = part.table()[mx.clip(input_ids - part.offset, 0, part.rows - 1)]
            embeddings = mx.where(inside[..., None], rows.astype(embeddings.dtype), embeddings)
        return embeddings


class Gemma3n(CausalModel):
    """Gemma 3n (transformers' ``Gemma3nForConditionalGeneration``): a checkpoint name is a module path.

    All methods take numpy or MLX arrays named as in transformers' forward: input_ids int [B, T]; attention_mask [B, T],
    1 on tokens; pixel_values float [N, 3, H, W] in [0, 1], both sides multiples of 256 (768 in the reference's
    processor); input_features float [M, F, 128] with input_features_mask bool [M, F], true on valid frames. Every
    picture has 256 slots and every clip 188, whatever its size. Media of all rows come in reading order.
    mm_token_type_ids is accepted and means nothing: attention is causal.
    """

    def __init__(self, spec: Gemma3nSpec):
        super().__init__()
        self.spec = spec
        self.model = Gemma3nModel(spec)
        self.eval()  # the AltUp clamp is for training; the training step turns it on

    def encode(
        self, pixel_values: Any = None, input_features: Any = None, input_features_mask: Any = None, **other: Any
    ) -> dict[str, mx.array]:
        """Soft tokens in the decoder's embedding space, flat over all media.

        Returns:
            `image_soft_tokens` and `audio_soft_tokens`, [n, H] each, those whose media were given.

        Raises:
            InputError: media for which the checkpoint has no tower, features without a mask, or a video.
        """
        if given := sorted(name for name, value in other.items() if value is not None):
            raise InputError(f"{given[0]} given, but Gemma 3n reads pictures, clips and text only")
        out = {}
        media = (("image", "vision", pixel_values, None), ("audio", "audio", input_features, input_features_mask))
        for kind, part, values, where in media:
            if values is None:
                continue
            if getattr(self.spec, part) is None:
                raise InputError(f"{kind} given, but the checkpoint has no {part} tower")
            if kind == "audio" and where is None:
                raise InputError("input_features need input_features_mask")
            out[f"{kind}_soft_tokens"] = self.model.soft_tokens(kind, values, where)
        return out

    def per_layer_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """Which row [B, T] of the per-layer table belongs to each id: 0 for ids beyond it (vision's and audio's)."""
        within = (input_ids >= 0) & (input_ids < self.spec.text.vocab_size_per_layer_input)
        return np.where(within, input_ids, 0)

    def hidden(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        mm_token_type_ids: Any = None,
        segment_ids: Any = None,
        image_soft_tokens: mx.array | None = None,
        audio_soft_tokens: mx.array | None = None,
        per_layer_rows: mx.array | None = None,
        cache: Cache | None = None,
        labels: LabelRows | None = None,
        recompute: int = 0,
        **media: Any,
    ) -> mx.array:
        """Hidden states [B, T, H] after the final norm; padding, `segment_ids`, `per_layer_rows`, `cache`, `labels` and
        `recompute` as in `Gemma4.hidden`.

        Raises:
            InputError: the number of slots differs from that of the soft tokens, an id beyond the vocabulary, media
                without a tower.
        """
        encoded = self.encode(**media)
        soft = {
            "image": encoded.get("image_soft_tokens", image_soft_tokens),
            "audio": encoded.get("audio_soft_tokens", audio_soft_tokens),
        }
        given = {getattr(self.spec, f"{kind}_token_id"): (kind, t) for kind, t in soft.items() if t is not None}
        check_ids(input_ids, self.spec.text.vocab_size, given)
        ids, text = mx.array(input_ids), self.model.language_model
        embeddings = self.model.embed(ids)
        for kind, tokens in soft.items():
            if tokens is not None and tokens.shape[0]:
                embeddings = splice(embeddings, ids == getattr(self.spec, f"{kind}_token_id"), tokens)
        valid = known_valid(attention_mask, ids.shape, cache)
        segments = None if segment_ids is None else mx.array(segment_ids)
        where = place(self.spec.text, ids.shape[1], embeddings.dtype, valid, cache, segment_ids=segments)
        return text(embeddings, text.per_layer_inputs(ids, embeddings, per_layer_rows), where, cache, labels, recompute)
