"""Tiny Gemma 3n checkpoints (E2B-shaped, random) made by transformers and timm, and inputs for them.

    hf = make(folder)                      # -> transformers' model, float32, eager, eval; also saved to folder
    batch = inputs("image+audio")          # dict of numpy arrays named as in transformers' forward

text=, vision= and audio= are merged into the sub-configs, other keywords go to Gemma3nConfig. style="hub" adds the
rotary keys of the published files, "native" leaves transformers' own. The vision tower has all its blocks, at an eighth
of their widths. Needs timm and torchvision.
"""

import json
import os

import numpy as np
import torchvision_operators

NTEXT, NV, NA = 256, 16, 16
VOFF, AOFF = NTEXT, NTEXT + NV
VOCAB = NTEXT + NV + NA
BOI, BOA = 250, 251
EOI, IMG = VOFF, VOFF + 1
EOA, AUD = AOFF, AOFF + 1
N_AUD, N_IMG = 24, 256  # soft tokens per clip (188 in the real model) / per image (MSFA is fixed 16x16)

TEXT = dict(
    vocab_size=VOCAB,
    vocab_size_per_layer_input=NTEXT,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=5,
    sliding_window=8,
    laurel_rank=8,
    layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 2,
    activation_sparsity_pattern=[0.95] * 3 + [0.0] * 7,
    altup_num_inputs=4,
    altup_active_idx=0,
    altup_coef_clip=120.0,
    altup_correct_scale=True,
    final_logit_softcapping=30.0,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
VISION = dict(
    hidden_size=2048,
    vocab_size=NV,
    vocab_offset=VOFF,
    rms_norm_eps=1e-6,
    do_pooling=False,
    architecture="mobilenetv5_300m_enc",
)
AUDIO = dict(
    hidden_size=32,
    vocab_size=NA,
    vocab_offset=AOFF,
    input_feat_size=128,
    conf_num_hidden_layers=2,
    conf_num_attention_heads=4,
    conf_attention_chunk_size=12,
    conf_attention_context_left=13,
    conf_attention_context_right=0,
    conf_attention_logit_cap=50.0,
    conf_conv_kernel_size=5,
    conf_reduction_factor=4,
    conf_residual_weight=0.5,
    sscp_conv_channel_size=[16, 8],
    sscp_conv_group_norm_eps=1e-3,
    sscp_conv_kernel_size=[[3, 3], [3, 3]],
    sscp_conv_stride_size=[[2, 2], [2, 2]],
    rms_norm_eps=1e-6,
)


def randomise(model, seed=0):
    import torch

    g = torch.Generator().manual_seed(seed)

    def rn(p):
        return torch.randn(p.shape, generator=g, dtype=torch.float32)

    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith(("norm.weight", "correct_output_scale")) or "norm" in n.rsplit(".", 2)[-2] or ".bn" in n:
                # Attention has scale 1: a q_norm of d^-1/2 keeps scores near 1, and float32 noise small.
                p.copy_((1.0 + 0.2 * rn(p)) * (p.numel() ** -0.5 if n.endswith("q_norm.weight") else 1.0))
            elif n.endswith("gamma"):
                p.copy_(0.3 + 0.1 * rn(p))
            elif p.ndim <= 1:
                p.copy_(0.3 * rn(p))
            elif "embed_tokens" in n or n.endswith("embedding.weight"):
                p.copy_(rn(p) / p.shape[-1] ** 0.5)
            else:
                p.copy_(rn(p) / p[0].numel() ** 0.5)
    return model


def config(text=None, vision=None, audio=None, **top):
    torchvision_operators.declare()
    from transformers import Gemma3nConfig

    t, v, a = {**TEXT, **(text or {})}, {**VISION, **(vision or {})}, {**AUDIO, **(audio or {})}
    v.setdefault("model_args", {"channel_multiplier": 0.125})
    kw = dict(
        text_config=t,
        vision_config=v,
        audio_config=a,
        audio_soft_tokens_per_image=N_AUD,
        vision_soft_tokens_per_image=N_IMG,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        image_token_id=IMG,
        boa_token_id=BOA,
        eoa_token_id=EOA,
        audio_token_id=AUD,
    )
    kw.update({"attn_implementation": "eager", **top})
    return Gemma3nConfig(**kw)


def make(outdir, seed=0, style="hub", text=None, vision=None, audio=None, **overrides):
    import torch

    cfg = config(text, vision, audio, **overrides)
    from transformers import Gemma3nForConditionalGeneration

    cfg.dtype = "float32"
    torch.manual_seed(seed)
    model = randomise(Gemma3nForConditionalGeneration(cfg).float().eval(), seed)
    os.makedirs(outdir, exist_ok=True)
    model.save_pretrained(outdir)
    if style == "hub":
        path = os.path.join(outdir, "config.json")
        with open(path) as f:
            js = json.load(f)
        tc = js["text_config"]
        rope = tc.get("rope_parameters") or {}
        tc["rope_theta"] = rope.get("full_attention", {}).get("rope_theta", 1e6)
        tc["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta", 1e4)
        tc["rope_scaling"] = None
        with open(path, "w") as f:
            json.dump(js, f, indent=2)
    return model


def audio_inputs(lens=(80,), mel=128, seed=2):
    """-> input_features [N, T, 128], input_features_mask [N, T] True=valid"""
    r = np.random.default_rng(seed)
    T = max(lens)
    m = np.arange(T)[None] < np.array(lens)[:, None]
    return r.standard_normal((len(lens), T, mel)).astype(np.float32) * m[..., None], m


def inputs(kind="text", seed=3, n_text=24, lens=(80,), n_img=1, size=256, batch=1):
    r = np.random.default_rng(seed)
    out, na, ni = {}, 0, 0
    if "image" in kind:
        out["pixel_values"] = r.random((n_img, 3, size, size)).astype(np.float32)
        ni = n_img
    if "audio" in kind:
        out["input_features"], out["input_features_mask"] = audio_inputs(lens)
        na = len(lens)

    def txt(n):
        return r.integers(3, 240, n).tolist()

    segs = [[] for _ in range(max(na, ni, 1))]
    for i in range(ni):
        segs[i] += [BOI] + [IMG] * N_IMG + [EOI]
    for i in range(na):
        segs[i] += [BOA] + [AUD] * N_AUD + [EOA]
    if batch == 1:
        row = [2, *txt(4)]
        for s in segs:
            row += s + txt(3)
        rows = [row + txt(n_text)]
    else:
        rows = [[2, *txt(4), *segs[i % len(segs)], *txt(n_text - 3 * i)] for i in range(batch)]
    L = max(map(len, rows))
    ids = np.zeros((len(rows), L), np.int64)
    am = np.zeros((len(rows), L), np.int64)
    for i, x in enumerate(rows):
        ids[i, : len(x)] = x
        am[i, : len(x)] = 1
    out["input_ids"], out["attention_mask"] = ids, am
    return out
