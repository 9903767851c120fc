"""Models of every family at moderate sizes, with random weights: large enough that a step's memory is its arrays'."""

import mlx.core as mx

from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.full import train_fully
from gemma_mlx.lora import apply_lora, freeze_base
from gemma_mlx.models.families import build
from gemma_mlx.models.quantize import quantize_model
from gemma_mlx.spec import read_spec

IDS = dict(image_token_id=60, audio_token_id=61, video_token_id=62)
HEADS = dict(num_attention_heads=8, head_dim=32, sliding_window=128)
EDGE = dict(HEADS, vocab_size=4096, vocab_size_per_layer_input=4096, hidden_size=256, intermediate_size=1024,
            global_head_dim=64, hidden_size_per_layer_input=32)  # fmt: skip
LARGE = dict(HEADS, vocab_size=4096, hidden_size=256, intermediate_size=512, num_key_value_heads=4,
             num_global_key_value_heads=2, global_head_dim=64)  # fmt: skip
EXPERTS = dict(num_experts=8, top_k_experts=2, moe_intermediate_size=128)
NANO = dict(HEADS, vocab_size=4096, vocab_size_per_layer_input=4096, hidden_size=256, num_key_value_heads=2,
            hidden_size_per_layer_input=32, laurel_rank=16, num_kv_shared_layers=4)  # fmt: skip
VISION = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=4, head_dim=32, use_clipped_linears=True)  # fmt: skip
AUDIO = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, subsampling_conv_channels=[128, 32],
             output_proj_dims=256)  # fmt: skip


def _with(name, layers, **text):
    real = CHECKPOINTS[name]
    own = {**real["text_config"], "num_hidden_layers": layers, **text}
    own["layer_types"] = own["layer_types"][:layers]
    return {**real, "text_config": own, **IDS}


def edge(name="gemma-4-E2B", layers=10, **text):
    """Half of the layers share keys and values."""
    config = _with(name, layers, **{**EDGE, "num_kv_shared_layers": layers // 2, **text})
    return config | dict(vision_config=VISION, audio_config=AUDIO)


def experts():
    return _with("gemma-4-26B-A4B", 6, **LARGE, **EXPERTS) | dict(vision_config=VISION, audio_config=None)


def unified():
    return _with("gemma-4-12B", 6, **LARGE) | dict(vision_config={"mm_embed_dim": 256}, audio_config={})


def nano(layers=10):
    sparse = dict(intermediate_size=[1024] * layers, activation_sparsity_pattern=[0.95] * 3 + [0.0] * (layers - 3))
    return _with("gemma-3n-E2B", layers, **NANO, **sparse) | dict(vision_config=None, audio_config=None)


def small():
    config = {**CHECKPOINTS["gemma-3-1b"], "num_hidden_layers": 8, "vocab_size": 4096, "head_dim": 64}
    return config | dict(hidden_size=256, intermediate_size=1024)


def model(config, dtype="float32", bits=None, targets="decoder", rank=16, full=None, dora=False):
    """With adapters or modules to train; nothing is evaluated but packed matrices."""
    mx.random.seed(0)
    made = build(read_spec(config))
    made.set_dtype(getattr(mx, dtype))
    made.freeze()
    if bits:
        quantize_model(made, bits)
    if targets:
        apply_lora(made, targets, rank, dora=dora)
    else:
        freeze_base(made)
    if full:
        train_fully(made, full)
    return made
