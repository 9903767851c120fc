"""A checkpoint folder without weights: config, a small tokenizer with Gemma 4's special tokens, a chat template."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool_response>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog and says hello to everybody in the room while the sun goes down",
    "Transcribe the following speech segment in its original language. Write only the transcription, no line breaks.",
    "What is in this picture? A small red house.\n\nDescribe it in two lines.\nuser\nmodel\nsystem\n",
)

# The format of Gemma 4's instruction-tuned checkpoints, with the parts that matter to training: roles, parts, trimming,
# thoughts taken out of what the model said, and the generation prompt.
TEMPLATE = """\
{%- macro without_thoughts(text) -%}
    {%- set ns = namespace(out='') -%}
    {%- for piece in text.split('<channel|>') -%}
        {%- set ns.out = ns.out + piece.split('<|channel>')[0] -%}
    {%- endfor -%}
    {{- ns.out | trim -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set first = 0 -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {{- '<|turn>system\\n' + (messages[0]['content'] | trim) + '<turn|>\\n' -}}
    {%- set first = 1 -%}
{%- endif -%}
{%- for message in messages[first:] -%}
    {%- if message['role'] not in ('user', 'assistant') -%}
        {{- raise_exception('no such role: ' + message['role']) -}}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {%- if role == 'model' -%}
            {{- without_thoughts(message['content']) -}}
        {%- else -%}
            {{- message['content'] | trim -}}
        {%- endif -%}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{- item['text'] | trim -}}
            {%- else -%}
                {{- '<|' + item['type'] + '|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""
EMPTY_THOUGHT = TEMPLATE.replace(
    "'<|turn>model\\n' -}}\n{%- endif -%}", "'<|turn>model\\n<|channel>thought\\n<channel|>' -}}\n{%- endif -%}"
)
assert EMPTY_THOUGHT != TEMPLATE


def make_tokenizer() -> Tokenizer:
    """Byte-fallback BPE over text whose spaces are ▁, as Gemma's is; runs of line breaks can be one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|▁[^▁\n]*|[^▁\n]+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Byte tokens belong to the vocabulary, but are nothing special.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(data))


def make_folder(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Writes the files of a checkpoint that data needs."""
    from tiny import config

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    at = tokenizer.token_to_id
    names = {
        **{"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        **{"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"},
        **{"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"},
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", **names})
    )
    sizes = {"vocab_size": 512, "vocab_size_per_layer_input": 512}
    made = config(
        text={**sizes, "pad_token_id": at("<pad>"), "eos_token_id": at("<eos>"), "bos_token_id": at("<bos>")},
        vision={"patch_size": 16},
        boi_token_id=at("<|image>"),
        image_token_id=at("<|image|>"),
        eoi_token_id=at("<image|>"),
        boa_token_id=at("<|audio>"),
        audio_token_id=at("<|audio|>"),
        eoa_token_index=at("<audio|>"),
        video_token_id=at("<|video|>"),
    )
    made.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def reference_processor(folder: Path):
    """transformers' processor over the same files."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

    class WithoutVideo(Gemma4Processor):
        """The video processor needs torchvision, which nothing here uses."""

        def check_argument_for_proper_class(self, argument_name, argument):
            return (
                None
                if argument_name == "video_processor"
                else super().check_argument_for_proper_class(argument_name, argument)
            )

    names = json.loads((folder / "tokenizer_config.json").read_text())
    extra = {k: v for k, v in names.items() if k.split("_")[0] in ("boi", "image", "eoi", "boa", "audio", "eoa")}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=extra)
    template = folder / "chat_template.jinja"
    return WithoutVideo(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessorPil(),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=template.read_text() if template.is_file() else None,
    )
