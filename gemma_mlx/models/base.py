"""What the models of all families have in common: the tied embedding of their decoders, and how they are called."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from gemma_mlx.models.cache import Cache


class TiedDecoder(nn.Module):
    """A text decoder whose head is its embedding: has `spec` and `embed_tokens`."""

    def embed(self, input_ids: mx.array) -> mx.array:
        """Token embeddings [B, T, hidden] times sqrt(hidden), which is rounded to the weights' dtype first."""
        rows = self.embed_tokens(input_ids)
        return rows * mx.array(self.spec.hidden_size**0.5, rows.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states [..., hidden] -> float32 logits [..., vocab], softly capped where the checkpoint caps them."""
        out = self.embed_tokens.as_linear(hidden).astype(mx.float32)
        cap = self.spec.final_logit_softcapping
        return out if cap is None else mx.tanh(out / cap) * cap


class CausalModel(nn.Module):
    """A whole model: has `spec`, `decoder` and `hidden`."""

    @property
    def decoder(self) -> TiedDecoder:
        """The text decoder, where it is beside towers."""
        return self.model.language_model

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states [..., H] -> float32 logits [..., V], softly capped where the checkpoint caps them."""
        return self.decoder.logits(hidden)

    def output_head(self) -> tuple[nn.Module, float | None]:
        """(the tied embedding, the softcap or None): what `logits` is made of."""
        return self.decoder.embed_tokens, self.spec.text.final_logit_softcapping

    def make_cache(self) -> Cache:
        """An empty cache for generation; pass it to every call of one conversation batch."""
        return Cache(self.spec.text)

    def __call__(self, input_ids: Any, cache: Cache | None = None, **inputs: Any) -> mx.array:
        """Logits float32 [B, T, V]; arguments as for `hidden`."""
        return self.logits(self.hidden(input_ids, cache=cache, **inputs))
