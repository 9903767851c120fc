"""A random Gemma 4 with E2B's 35 layers and proportions at a part of its width, and batches of clips for it."""

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.lora import apply_lora
from gemma_mlx.models.families import build
from gemma_mlx.spec import read_spec

AUDIO, BOA, EOA, TEXT_IDS = 501, 505, 506, (3, 490)
FRAMES_A_SECOND, FRAMES_A_TOKEN = 100, 4


def config(divide: int = 8, vision: bool = False) -> dict:
    """config.json of the model: E2B with its sizes divided by so much.

    By 8: decoder 192 wide, MLP 768 and 1,536, 8 heads of 32 and 64, 32,768 ids; audio tower 128 × 12. With `vision` a
    small tower, which some loaders insist on.
    """
    real, full = CHECKPOINTS["gemma-4-E2B"]["text_config"], read_spec(CHECKPOINTS["gemma-4-E2B"]).text
    sizes = ("vocab_size", "vocab_size_per_layer_input", "hidden_size", "intermediate_size", "head_dim",
             "global_head_dim", "hidden_size_per_layer_input")  # fmt: skip
    text = {
        **real,
        **{name: getattr(full, name) // divide for name in sizes},
        "num_attention_heads": 8,
        "final_logit_softcapping": 30.0,
    }
    audio = {
        "hidden_size": 1024 // divide,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "subsampling_conv_channels": [128, 32],
        "output_proj_dims": 1536 // divide,
    }
    ids = {"audio_token_id": AUDIO, "boa_token_id": BOA, "eoa_token_index": EOA, "image_token_id": 500}
    pictures = {
        "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 6, "head_dim": 16, "patch_size": 16,
    } if vision else None  # fmt: skip
    return {"model_type": "gemma4", "text_config": text, "vision_config": pictures, "audio_config": audio, **ids}


def base(divide: int = 8, dtype: mx.Dtype = mx.float32):
    """The frozen model with all towers, as it is written to a folder."""
    mx.random.seed(0)
    made = build(read_spec({"architectures": ["Gemma4ForConditionalGeneration"], **config(divide, vision=True)}))
    made.set_dtype(dtype)
    made.freeze()
    return made


def adapted(made, rank: int = 16):
    """The model with adapters on all seven decoder linears, their B not zero."""
    for path in apply_lora(made, "decoder", rank):
        layer = made
        for part in path.split("."):
            layer = layer[int(part)] if isinstance(layer, list) else getattr(layer, part)
        layer.lora_b = 0.02 * mx.random.normal(layer.lora_b.shape)
    return made


def model(rank: int = 16, dtype: mx.Dtype = mx.float32):
    """The model at an eighth of the width, with adapters."""
    mx.random.seed(0)
    made = build(read_spec(config()))
    made.set_dtype(dtype)
    made.freeze()
    mx.eval(adapted(made, rank).parameters())
    return made


def clips(seconds=(30, 22, 14, 10), prompt: int = 24, answer: int = 48, seed: int = 0, spoken: bool = True) -> Batch:
    """A row a clip: `prompt` tokens, the clip (words, unless `spoken`), `answer` tokens with labels."""
    r = np.random.default_rng(seed)
    frames = [s * FRAMES_A_SECOND - 1 for s in seconds]
    features = np.zeros((len(seconds), max(frames), 128), np.float32)
    mask = np.arange(max(frames))[None] < np.array(frames)[:, None]
    features[mask] = r.standard_normal((int(mask.sum()), 128)).astype(np.float32)
    rows = []
    for n in frames:
        words = r.integers(*TEXT_IDS, prompt + answer).tolist()
        tokens = -(-n // FRAMES_A_TOKEN)
        clip = [AUDIO] * tokens if spoken else r.integers(*TEXT_IDS, tokens).tolist()
        rows.append([2, *words[:prompt], BOA, *clip, EOA, *words[prompt:]])
    length = max(map(len, rows))
    ids, labels = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), IGNORE_INDEX, np.int32)
    valid = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], valid[i, : len(row)] = row, 1
        labels[i, len(row) - answer : len(row)] = row[len(row) - answer :]
    types = np.where(ids == AUDIO, 3, 0).astype(np.int32)
    media = {"input_features": features, "input_features_mask": mask} if spoken else {}
    return Batch(ids, valid, types, labels, **media)
