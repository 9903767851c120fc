# ruff: noqa: SIM905
"""The demo checkpoint's shape: vocabulary, chat template and the JSON files beside the weights.

Everything a Gemma 4 E2B folder has, made small: the special tokens are Gemma 4's by name, the other 480 tokens are
single characters, bytes, and whole words that occur in prompts (so that an instruction costs few positions).
"""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL = """<pad> <eos> <bos> <unk> <mask> <|turn> <turn|> <|image> <|image|> <image|> <|audio> <|audio|> <audio|>
<|video|> <|channel> <channel|> <|think|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|>
<|"|>""".split()

# Whole words, each at the start of a line and after a space. Answers are spelt letter by letter.
WORDS = """user model system Transcribe transcribe the following speech segment in its original language into English
text this audio clip recording Write down what you hear Which What which digit letter shape number word words is are
shown it picture image Answer with one only output transcription spoken said say says Repeat Copy exactly Please speaker
written of to and from that can be see question a""".split()
SPACED = "without line breaks digits".split()  # only after a space: "line" by itself is an answer of the base

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<|turn>' + role + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] | trim -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] | trim -}}
{%- elif part['type'] in ('image', 'audio', 'video') -%}
{{- '<|' + part['type'] + '|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def vocabulary() -> list[str]:
    """All tokens in id order: special, newline, printable ASCII (space as U+2581), 256 bytes, words."""
    characters = ["\n"] + ["▁" if c == 32 else chr(c) for c in range(32, 127)]
    spaced = [prefix + word for word in WORDS for prefix in ("", "▁")]
    words = [w for w in dict.fromkeys(spaced) if len(w) > 1] + ["▁" + word for word in SPACED]
    tokens = SPECIAL + characters + [f"<0x{b:02X}>" for b in range(256)] + words
    assert len(set(tokens)) == len(tokens)
    return tokens + [f"<unused{i}>" for i in range(-len(tokens) % 64)]


def tokenizer():
    """A `tokenizers.Tokenizer`: Gemma's normaliser and byte fallback; whole known words, else single characters."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = vocabulary()
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>", fuse_unk=True,
                       byte_fallback=True, ignore_merges=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    # a word with the space before it, else any single character: the model takes the word whole if it knows it
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|[\s\S]"), behavior="isolated")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return made


def config() -> dict:
    """config.json, spelt as on the Hub (global_head_dim; no per_layer_config)."""
    ids = {t: i for i, t in enumerate(vocabulary())}
    size = len(ids)
    text = dict(
        model_type="gemma4_text", vocab_size=size, vocab_size_per_layer_input=size, hidden_size=128,
        hidden_size_per_layer_input=32, intermediate_size=256, use_double_wide_mlp=True, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=1, num_global_key_value_heads=None, head_dim=32, global_head_dim=64,
        num_kv_shared_layers=2, sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        attention_k_eq_v=False, attention_bias=False, attention_dropout=0.0, use_bidirectional_attention=None,
        enable_moe_block=False, num_experts=None, top_k_experts=None, moe_intermediate_size=None,
        final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh", max_position_embeddings=4096,
        rms_norm_eps=1e-6, initializer_range=0.02, tie_word_embeddings=True, use_cache=True, pad_token_id=ids["<pad>"],
        eos_token_id=ids["<eos>"], bos_token_id=ids["<bos>"],
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=10_000.0),
            full_attention=dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1_000_000.0)))
    vision = dict(
        model_type="gemma4_vision", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, global_head_dim=32, hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6, initializer_range=0.02, max_position_embeddings=4096, attention_bias=False,
        attention_dropout=0.0, rope_parameters=dict(rope_type="default", rope_theta=100.0), patch_size=16,
        pooling_kernel_size=3, position_embedding_size=256, default_output_length=70, use_clipped_linears=True,
        standardize=False)
    audio = dict(
        model_type="gemma4_audio", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, hidden_act="silu",
        subsampling_conv_channels=[128, 32], conv_kernel_size=5, residual_weight=0.5, attention_chunk_size=12,
        attention_context_left=13, attention_context_right=0, attention_logit_cap=50.0,
        attention_invalid_logits_value=-1e9, use_clipped_linears=True, rms_norm_eps=1e-6, gradient_clipping=1e10,
        output_proj_dims=128, initializer_range=0.02)
    return dict(
        architectures=["Gemma4ForConditionalGeneration"], model_type="gemma4", dtype="bfloat16",
        tie_word_embeddings=True, initializer_range=0.02, text_config=text, vision_config=vision, audio_config=audio,
        eos_token_id=[ids["<eos>"], ids["<turn|>"]], image_token_id=ids["<|image|>"], boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"], audio_token_id=ids["<|audio|>"], boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"], video_token_id=ids["<|video|>"], vision_soft_tokens_per_image=70)


def processor_config() -> dict:
    image = dict(image_processor_type="Gemma4ImageProcessor", do_convert_rgb=True, do_resize=True, do_rescale=True,
                 do_normalize=False, rescale_factor=1 / 255, resample=3, image_mean=[0.0] * 3, image_std=[1.0] * 3,
                 patch_size=16, pooling_kernel_size=3, max_soft_tokens=70, image_seq_length=70)
    audio = dict(feature_extractor_type="Gemma4AudioFeatureExtractor", feature_size=128, sampling_rate=16_000,
                 padding_value=0.0, padding_side="right", return_attention_mask=True, frame_length=320, hop_length=160,
                 fft_length=512, min_frequency=0.0, max_frequency=8000.0, preemphasis=0.0, preemphasis_htk_flavor=True,
                 fft_overdrive=False, dither=0.0, input_scale_factor=1.0, mel_floor=1e-3, per_bin_mean=None,
                 per_bin_stddev=None)
    video = dict(video_processor_type="Gemma4VideoProcessor", do_convert_rgb=True, do_resize=True, do_rescale=True,
                 do_normalize=True, do_sample_frames=True, num_frames=32, rescale_factor=1 / 255, resample=3,
                 image_mean=[0.0] * 3, image_std=[1.0] * 3, patch_size=16, pooling_kernel_size=3, max_soft_tokens=70)
    return dict(processor_class="Gemma4Processor", image_seq_length=70, audio_seq_length=750, audio_ms_per_token=40,
                feature_extractor=audio, image_processor=image, video_processor=video)


def tokenizer_config() -> dict:
    return dict(
        tokenizer_class="PreTrainedTokenizerFast", processor_class="Gemma4Processor", padding_side="left",
        model_max_length=4096, add_bos_token=False, clean_up_tokenization_spaces=False, bos_token="<bos>",
        eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", sot_token="<|turn>",
        eot_token="<turn|>", boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>", boa_token="<|audio>",
        eoa_token="<audio|>", audio_token="<|audio|>", soc_token="<|channel>", eoc_token="<channel|>",
        think_token="<|think|>", stc_token="<|tool_call>", etc_token="<tool_call|>", std_token="<|tool>",
        etd_token="<tool|>", str_token="<|tool_response>", etr_token="<tool_response|>", escape_token='<|"|>',
        extra_special_tokens=["<|video|>"],
        model_specific_special_tokens=dict(
            image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>",
            boa_token="<|audio>", eoa_token="<audio|>"))


def generation_config() -> dict:
    ids = {t: i for i, t in enumerate(vocabulary())}
    return dict(bos_token_id=ids["<bos>"], pad_token_id=ids["<pad>"], eos_token_id=[ids["<eos>"], ids["<turn|>"]],
                do_sample=True, temperature=1.0, top_k=64, top_p=0.95)


def write_files(folder: Path) -> None:
    """Write all of the checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": config(), "processor_config.json": processor_config(),
                          "tokenizer_config.json": tokenizer_config(),
                          "generation_config.json": generation_config()}.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer().save(str(folder / "tokenizer.json"))
