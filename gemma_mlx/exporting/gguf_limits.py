"""What llama.cpp's graphs have fixed in their source: a checkpoint that is otherwise would give other answers there.

Published checkpoints are all as llama.cpp expects; the converter writes none of these numbers, so nothing else tells.
"""

from __future__ import annotations

from gemma_mlx.errors import InputError
from gemma_mlx.gguf_file import LAYERS_OF_27B
from gemma_mlx.spec import FULL, SLIDING, ModelSpec

_PERIOD_3 = 6
_OWN_KV_3N, _SPARSE_3N, _SPARSITY_3N = 20, 10, 0.95
_PER_LAYER_3N, _LAUREL_3N = 256, 64
_THETA = 10_000.0


def check_limits(spec: ModelSpec) -> None:
    """Raise InputError for a decoder that llama.cpp would compute otherwise than it is meant."""
    text, kind = spec.text, spec.config["model_type"]
    shared = getattr(text, "num_kv_shared_layers", 0)
    if kind.startswith("gemma3n"):
        _equal(kind, "layers with keys of their own", text.num_hidden_layers - shared, _OWN_KV_3N)
        wanted = tuple(_SPARSITY_3N if i < _SPARSE_3N else 0.0 for i in range(text.num_hidden_layers))
        _equal(kind, "hidden_size_per_layer_input", text.hidden_size_per_layer_input, _PER_LAYER_3N)
        _equal(kind, "laurel_rank", text.laurel_rank, _LAUREL_3N)
        _equal(kind, "activation_sparsity_pattern", tuple(text.activation_sparsity_pattern), wanted)
    elif kind.startswith("gemma3"):
        types = tuple(FULL if i % _PERIOD_3 == _PERIOD_3 - 1 else SLIDING for i in range(text.num_hidden_layers))
        _equal(kind, "layer_types", tuple(text.layer_types), types)
        large = text.num_hidden_layers == LAYERS_OF_27B
        scale = text.hidden_size // text.num_attention_heads if large else text.head_dim
        _equal(kind, "query_pre_attn_scalar", float(text.query_pre_attn_scalar), float(scale))
        _equal(kind, "rope_theta of sliding layers", text.rope_parameters[SLIDING]["rope_theta"], _THETA)
    if shared:
        last = tuple(text.layer_types[: text.num_hidden_layers - shared][-2:])
        _equal(kind, "the last two layers with keys of their own", last, (SLIDING, FULL))


def _equal(kind: str, what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise InputError(
            f"--format gguf: {what} of this {kind} checkpoint is {found}; llama.cpp computes with {wanted}, so its "
            "answers would differ: use --format hf"
        )
