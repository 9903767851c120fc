"""A decoder without towers behind the interface that training and generation use."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from gemma_mlx.errors import InputError
from gemma_mlx.models.base import CausalModel
from gemma_mlx.models.cache import Cache
from gemma_mlx.models.decoder import place
from gemma_mlx.models.gemma3.text import TextModel
from gemma_mlx.models.label_rows import LabelRows
from gemma_mlx.models.padding import check_ids, known_valid
from gemma_mlx.spec import ModelSpec


class Gemma3(CausalModel):
    """Gemma 3 for text (transformers' ``Gemma3ForCausalLM``): a checkpoint name is a module path.

    All methods take numpy or MLX arrays: input_ids int [B, T]; attention_mask [B, T], 1 on tokens. mm_token_type_ids
    is accepted and means nothing here.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.model = TextModel(spec.text)

    @property
    def decoder(self) -> TextModel:
        """The text decoder: all there is."""
        return self.model

    def encode(self, **media: Any) -> dict[str, mx.array]:
        """No media, no soft tokens.

        Raises:
            InputError: media were given.
        """
        if given := sorted(name for name, value in media.items() if value is not None):
            raise InputError(f"{given[0]} given, but this checkpoint has no towers: it reads text only")
        return {}

    def hidden(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        mm_token_type_ids: Any = None,
        segment_ids: Any = None,
        cache: Cache | None = None,
        labels: LabelRows | None = None,
        recompute: int = 0,
        **media: Any,
    ) -> mx.array:
        """Hidden states [B, T, H] after the final norm; padding, `segment_ids`, `cache`, `labels` and `recompute` as
        in `Gemma4.hidden`.

        Raises:
            InputError: an id beyond the vocabulary; media were given.
        """
        self.encode(**media)
        check_ids(input_ids, self.spec.text.vocab_size, {})
        embeddings = self.model.embed(mx.array(input_ids))
        valid = known_valid(attention_mask, input_ids.shape, cache)
        segments = None if segment_ids is None else mx.array(segment_ids)
        where = place(self.spec.text, input_ids.shape[1], embeddings.dtype, valid, cache, segment_ids=segments)
        return self.model(embeddings, where, cache, labels, recompute)
