"""A tiny Gemma 3 as llama.cpp's converter writes it: metadata, a SentencePiece vocabulary, norms with one added."""

import numpy as np
import tiny_gemma3 as gemma3

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
RUNS = ["\n", "\n\n", "\n\n\n", "  ", "   ", "    "]  # the converter writes SentencePiece's ▁ as spaces in these
WORDS = ["user", "model", "Repeat", "alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def vocabulary(size=gemma3.VOCAB):
    """(tokens, scores, kinds): pieces by falling score after the special ones, single characters last."""
    pieces = []
    for word in WORDS:
        for start in ("", "▁"):
            pieces += [(start + word)[:n] for n in range(2, len(start + word) + 1)]
    pieces = list(dict.fromkeys(sorted(pieces, key=lambda p: (len(p), p))))
    characters = ["▁", *(chr(c) for c in range(33, 127))]
    rows = [(t, -1000.0, UNKNOWN if t == "<unk>" else CONTROL) for t in SPECIAL]
    rows += [(t, -1000.0, USER_DEFINED) for t in RUNS]
    rows += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    rows += [(p, -float(i), NORMAL) for i, p in enumerate([*pieces, *characters])]
    assert len(rows) <= size and len({r[0] for r in rows}) == len(rows)
    rows += [(f"<unused{i}>", -1000.0, CONTROL) for i in range(size - len(rows))]
    return tuple(map(list, zip(*rows, strict=True)))


def write(path, reference, kinds=None, change=None, template=None):
    """`reference` (transformers' Gemma3ForCausalLM) as a GGUF file.

    kinds: GGUF quantization type by the end of a tensor's name; F32 otherwise. change: called with the writer before
    the tensors, and with each (name, array), which it may replace.
    """
    import gguf

    config, w = reference.config, gguf.GGUFWriter(path, "gemma3")
    w.add_context_length(512)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(config.head_dim)
    w.add_value_length(config.head_dim)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_sliding_window(config.sliding_window)
    w.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    tokens, scores, types = vocabulary(config.vocab_size)
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_pad_token_id(0)
    w.add_eos_token_id(1)
    w.add_bos_token_id(2)
    if template:
        w.add_chat_template(template)
    for name, tensor in reference.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy().astype(np.float32)
        array = array + 1 if "norm" in name else array
        name = _name(name)
        kind = next((k for end, k in (kinds or {}).items() if name.endswith(end)), "F32")
        if change:
            name, array = change(name, array)
        kind = gguf.GGMLQuantizationType[kind]
        w.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _name(name):
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"
