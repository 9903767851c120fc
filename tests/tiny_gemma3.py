"""Tiny Gemma 3 text checkpoints made by transformers, every weight random.

hf = make(folder)                      # -> transformers' Gemma3ForCausalLM, float32, eager; also saved to folder
batch = rows(41, 7, 30)                # right-padded ids and mask
"""

import json
from pathlib import Path

import numpy as np

S, F = "sliding_attention", "full_attention"
VOCAB = 512
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=32,
    query_pre_attn_scalar=24,
    sliding_window=8,
    layer_types=[S] * 5 + [F] + [S] * 2,  # as the 1B, the last layer is a sliding one
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    rope_parameters={
        S: dict(rope_type="default", rope_theta=10_000.0),
        F: dict(rope_type="default", rope_theta=1_000_000.0),
    },
)


def randomise(model, seed=0):
    """Norm weights (of which 1 + w counts) around zero, q and k norms small enough for scores near 1."""
    import torch

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm" in name:
                p.copy_(0.2 * noise - (0.5 if name.endswith("q_norm.weight") else 0.0))
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)
    return model


def make(folder, seed=0, old_style=False, **text):
    """`old_style` spells config.json as the published files do: three rope keys and a pattern."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**{**TEXT, **text}, attn_implementation="eager")
    config.dtype = "float32"
    torch.manual_seed(seed)
    model = randomise(Gemma3ForCausalLM(config).float().eval(), seed)
    model.save_pretrained(folder)
    if old_style:
        path = Path(folder) / "config.json"
        content = json.loads(path.read_text())
        rope = content.pop("rope_parameters")
        full = rope[F]
        content |= {"rope_theta": full["rope_theta"], "rope_local_base_freq": rope[S]["rope_theta"]}
        scaled = full["rope_type"] == "linear"
        content["rope_scaling"] = {"rope_type": "linear", "factor": full["factor"]} if scaled else None
        path.write_text(json.dumps(content))
    return model


def rows(*lengths, seed=0):
    """Right-padded random rows as ids and mask."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(3, 490, mask.shape) * mask, "attention_mask": mask}
