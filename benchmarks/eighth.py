"""A random Gemma 4 with E2B's 35 layers and proportions at an eighth of its width, and batches of clips for it."""

import mlx.core as mx
import numpy as np

from gemma_mlx.batch import IGNORE_INDEX, Batch
from gemma_mlx.catalog import CHECKPOINTS
from gemma_mlx.lora import apply_lora
from gemma_mlx.models.families import build
from gemma_mlx.spec import read_spec

VOCABULARY = 32_768
AUDIO, BOA, EOA, TEXT_IDS = 501, 505, 506, (3, 490)
FRAMES_A_SECOND, FRAMES_A_TOKEN = 100, 4


def config() -> dict:
    """config.json of the model: decoder 192 wide, MLP 768 and 1,536, 8 heads of 32 and 64; audio tower 128 × 12."""
    real = CHECKPOINTS["gemma-4-E2B"]
    text = {
        **real["text_config"],
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 32,
        "final_logit_softcapping": 30.0,
    }
    audio = {
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "subsampling_conv_channels": [128, 32],
        "output_proj_dims": 192,
    }
    ids = {"audio_token_id": AUDIO, "boa_token_id": BOA, "eoa_token_index": EOA, "image_token_id": 500}
    return {"model_type": "gemma4", "text_config": text, "vision_config": None, "audio_config": audio, **ids}


def model(rank: int = 16, dtype: mx.Dtype = mx.float32):
    """The model with adapters on all seven decoder linears, their B not zero."""
    mx.random.seed(0)
    made = build(read_spec(config()))
    made.set_dtype(dtype)
    made.freeze()
    for path in apply_lora(made, "decoder", rank):
        layer = made
        for part in path.split("."):
            layer = layer[int(part)] if isinstance(layer, list) else getattr(layer, part)
        layer.lora_b = 0.02 * mx.random.normal(layer.lora_b.shape)
    mx.eval(made.parameters())
    return made


def clips(seconds=(30, 22, 14, 10), prompt: int = 24, answer: int = 48, seed: int = 0) -> Batch:
    """A row a clip: `prompt` tokens, the clip, `answer` tokens with labels."""
    r = np.random.default_rng(seed)
    frames = [s * FRAMES_A_SECOND - 1 for s in seconds]
    features = np.zeros((len(seconds), max(frames), 128), np.float32)
    mask = np.arange(max(frames))[None] < np.array(frames)[:, None]
    features[mask] = r.standard_normal((int(mask.sum()), 128)).astype(np.float32)
    rows = []
    for n in frames:
        words = r.integers(*TEXT_IDS, prompt + answer).tolist()
        rows.append([2, *words[:prompt], BOA, *[AUDIO] * -(-n // FRAMES_A_TOKEN), EOA, *words[prompt:]])
    length = max(map(len, rows))
    ids, labels = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), IGNORE_INDEX, np.int32)
    valid = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], valid[i, : len(row)] = row, 1
        labels[i, len(row) - answer : len(row)] = row[len(row) - answer :]
    types = np.where(ids == AUDIO, 3, 0).astype(np.int32)
    return Batch(ids, valid, types, labels, input_features=features, input_features_mask=mask)
