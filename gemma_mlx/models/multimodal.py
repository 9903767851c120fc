"""Encode pictures and clips, splice their soft tokens into the text, run the decoder."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from gemma_mlx.errors import InputError
from gemma_mlx.models.base import CausalModel
from gemma_mlx.models.cache import Cache
from gemma_mlx.models.gemma4.audio import AudioTower
from gemma_mlx.models.gemma4.text import TextModel, place
from gemma_mlx.models.gemma4.unified import UnifiedVisionEmbedder
from gemma_mlx.models.gemma4.vision import VisionTower
from gemma_mlx.models.label_rows import LabelRows
from gemma_mlx.models.layers import MultimodalEmbedder
from gemma_mlx.models.media import MEDIA, module_names, soft_token_index
from gemma_mlx.models.padding import check_ids, host, known_valid
from gemma_mlx.spec import ModelSpec

Array = Any
"""A numpy or MLX array."""


def splice(embeddings: mx.array, slots: mx.array, soft_tokens: mx.array) -> mx.array:
    """Write soft tokens [n, H] into `embeddings` [B, T, H] at `slots` (bool [B, T]), in reading order."""
    index = mx.cumsum(slots.reshape(-1).astype(mx.int32)) - 1
    rows = mx.take(soft_tokens, mx.clip(index, 0, soft_tokens.shape[0] - 1), axis=0)
    rows = rows.reshape(*slots.shape, -1).astype(embeddings.dtype)
    return mx.where(slots[..., None], rows, embeddings)


class Gemma4Model(nn.Module):
    """Towers, embedders and text decoder under the names of transformers' ``Gemma4Model``.

    Gemma 4 12B (``Gemma4UnifiedModel``) has embedders alone.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        text, vision, audio = spec.text, spec.vision, spec.audio
        self.language_model = TextModel(text)
        if vision is not None and spec.unified:
            self.embed_vision = UnifiedVisionEmbedder(vision, text.hidden_size)
        elif vision is not None:
            self.vision_tower = VisionTower(vision)
            self.embed_vision = MultimodalEmbedder(vision.hidden_size, text.hidden_size, vision.rms_norm_eps)
        if audio is not None and spec.unified:
            self.embed_audio = MultimodalEmbedder(audio.audio_embed_dim, text.hidden_size, audio.rms_norm_eps)
        elif audio is not None:
            self.audio_tower = AudioTower(audio, audio.attention_window)
            self.embed_audio = MultimodalEmbedder(audio.output_proj_dims, text.hidden_size, audio.rms_norm_eps)

    def soft_tokens(self, kind: str, values: Array, where: Array, index: mx.array) -> mx.array:
        """Soft tokens [n, H] of all media of a kind, in order, padding dropped. Can be traced.

        Args:
            kind: "image", "video" or "audio".
            values: pixels or audio features.
            where: their positions or mask.
            index: `soft_token_index` of `where`.
        """
        if module_names(kind)[0] in self:
            return self.project(kind, self.features(kind, values, where, index))
        values, where = mx.array(values), mx.array(where)
        if kind == "audio":
            soft = self.embed_audio(values.astype(self.language_model.norm.weight.dtype))
        else:
            soft = self.embed_vision(values, where)
        return mx.take(soft.reshape(-1, soft.shape[-1]), index, axis=0)

    def features(self, kind: str, values: Array, where: Array, index: mx.array) -> mx.array:
        """The tower's output [n, D], as `soft_tokens` before the embedder; for models with towers."""
        return self[module_names(kind)[0]](mx.array(values), mx.array(where), index)

    def project(self, kind: str, features: mx.array) -> mx.array:
        """The embedder's output [n, H] for the tower's."""
        return self[module_names(kind)[1]](features)


class Gemma4(CausalModel):
    """Gemma 4 with its media (transformers' ``Gemma4ForConditionalGeneration`` and
    ``Gemma4UnifiedForConditionalGeneration``): module paths are their names.

    All methods take numpy or MLX arrays named as in transformers' forward: input_ids int [B, T]; attention_mask
    [B, T], 1 on tokens; pixel_values float [N, P, 3·patch²] in [0, 1] with image_position_ids int [N, P, 2], −1 on
    padding; pixel_values_videos and video_position_ids, the same with the frames of all videos one after the other;
    input_features float [M, F, 128] (12B: [M, F, 640] raw samples) with input_features_mask bool [M, F]. Media of all
    rows come in reading order. mm_token_type_ids int [B, T] (0 text, 1 image, 2 video, 3 audio) tells models whose
    pictures see themselves whole where they are; without it attention is causal. E2B and E4B do not need it.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.model = Gemma4Model(spec)

    def encode(self, num_frames_per_video: Array | None = None, **media: Array) -> dict[str, mx.array]:
        """Soft tokens in the decoder's embedding space, flat over all media, padding dropped.

        Args:
            num_frames_per_video: accepted and not needed, since frames come one after the other.
            media: the arrays of `MEDIA`; None for none.

        Returns:
            `image_soft_tokens`, `video_soft_tokens` and `audio_soft_tokens`, [n, H] each, those whose media were given;
            `hidden` and `__call__` take them in place of the media.

        Raises:
            InputError: media for which the checkpoint has no tower, or without their positions or mask.
        """
        if unknown := set(media) - {name for names in MEDIA.values() for name in names}:
            raise TypeError(f"unknown input {min(unknown)!r}")
        out = {}
        for kind, (values, where) in MEDIA.items():
            if media.get(values) is None:
                continue
            part = "audio" if kind == "audio" else "vision"
            if getattr(self.spec, part) is None:
                raise InputError(f"{values} given, but the checkpoint has no {part} tower")
            if media.get(where) is None:
                raise InputError(f"{values} need {where}")
            index = mx.array(soft_token_index(self.spec, kind, np.asarray(media[where])))
            out[f"{kind}_soft_tokens"] = self.model.soft_tokens(kind, media[values], media[where], index)
        return out

    def embed(
        self,
        input_ids: Array,
        image_soft_tokens: mx.array | None = None,
        audio_soft_tokens: mx.array | None = None,
        video_soft_tokens: mx.array | None = None,
        per_layer_rows: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """(embeddings [B, T, H] with the soft tokens spliced in, per-layer inputs [B, T, layers, width] or None).

        Raises:
            InputError: the number of slots differs from the number of soft tokens; an id beyond the vocabulary.
        """
        spec, text = self.spec, self.model.language_model
        soft = {
            spec.image_token_id: ("image", image_soft_tokens),
            spec.audio_token_id: ("audio", audio_soft_tokens),
            spec.video_token_id: ("video", video_soft_tokens),
        }
        check_ids(input_ids, spec.text.vocab_size, soft)
        ids = self._without_slots(mx.array(input_ids))
        embeddings = text.embed(ids)
        for token_id, (_, tokens) in soft.items():
            if tokens is not None and tokens.shape[0]:
                embeddings = splice(embeddings, mx.array(input_ids) == token_id, tokens)
        return embeddings, text.per_layer_inputs(ids, embeddings, per_layer_rows)

    def _without_slots(self, ids: mx.array) -> mx.array:
        """The ids with the pad id at soft slots."""
        spec = self.spec
        is_slot = (ids == spec.image_token_id) | (ids == spec.audio_token_id) | (ids == spec.video_token_id)
        return mx.where(is_slot, mx.array(spec.text.pad_token_id, ids.dtype), ids)

    def per_layer_ids(self, input_ids: np.ndarray) -> np.ndarray:
        """Which row [B, T] of the per-layer table belongs to each id: the pad id's at soft slots."""
        spec = self.spec
        slots = np.isin(input_ids, (spec.image_token_id, spec.audio_token_id, spec.video_token_id))
        return np.where(slots, spec.text.pad_token_id, input_ids)

    def hidden(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        mm_token_type_ids: Array | None = None,
        segment_ids: Array | None = None,
        image_soft_tokens: mx.array | None = None,
        audio_soft_tokens: mx.array | None = None,
        video_soft_tokens: mx.array | None = None,
        per_layer_rows: mx.array | None = None,
        cache: Cache | None = None,
        labels: LabelRows | None = None,
        recompute: int = 0,
        **media: Array,
    ) -> mx.array:
        """Hidden states [B, T, H] after the final norm.

        Right padding needs no attention_mask without a cache: causality hides it from every token. What comes out at
        padded positions means nothing. With a cache, tokens continue those it has seen; attention_mask then tells the
        padding among the new ones ([B, T], or [B, seen + T] of which the end is used; so mm_token_type_ids), and padded
        keys stay hidden. per_layer_rows: [B, T, layers · width], the per-layer table's at `per_layer_ids`, needed only
        where this call is traced and the table lies on disk. segment_ids int [B, T], as in `Batch`: samples end to end
        in a row, each of which sees itself alone and counts its positions from 0; without a cache. For a training step:
        with `labels` hidden states [N, H] at those positions alone, for a fraction of the work; `recompute` n
        recomputes every n-th layer in the backward.

        Raises:
            InputError: the number of slots differs from the number of soft tokens, or media without a tower.
        """
        encoded = self.encode(**media)
        embeddings, per_layer = self.embed(
            input_ids,
            encoded.get("image_soft_tokens", image_soft_tokens),
            encoded.get("audio_soft_tokens", audio_soft_tokens),
            encoded.get("video_soft_tokens", video_soft_tokens),
            per_layer_rows,
        )
        valid = known_valid(attention_mask, input_ids.shape, cache)
        types = self._vision_types(mm_token_type_ids, input_ids.shape[1])
        segments = None if segment_ids is None else mx.array(segment_ids)
        where = place(self.spec.text, input_ids.shape[1], embeddings.dtype, valid, cache, types, segments)
        return self.model.language_model(embeddings, per_layer, where, cache, labels, recompute)

    def _vision_types(self, mm_token_type_ids: Array | None, length: int) -> mx.array | None:
        """Token types of the last `length` tokens, or None where they change nothing."""
        if mm_token_type_ids is None or not self.spec.text.bidirectional_vision:
            return None
        known = host(mm_token_type_ids)
        if known is not None and not np.isin(known[:, -length:], (1, 2)).any():
            return None
        return mx.array(mm_token_type_ids)[:, -length:].astype(mx.int32)
