"""What became of a profile's keys that did not become options, and why."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_mlx.data.tuner.ini import Settings

_UNREAD = "had no effect on training there"
_PREPARED = "acted there when the CSVs were made, not in training"
_EVALUATION = "acts there in evaluation, not in training"

REASONS: dict[str, str] = {
    "attn_implementation": "chose there among implementations of the same attention; here there is one",
    "bf16": f"{_UNREAD}, which takes bfloat16 where the GPU can; so does this (dtype: float32 for the other)",
    "concatenate_audio": _UNREAD,
    "dataloader_num_workers": f"{_UNREAD}; here media are decoded ahead in threads",
    "dtype": f"{_UNREAD}, which takes bfloat16 where the GPU can; so does this (dtype: float32 for the other)",
    "enable_8bit": f"{_UNREAD}; quantize: 8 does it here",
    "force_languages": _UNREAD,
    "fp16": f"{_UNREAD}, and there is no float16 here; see dtype",
    "id_column": f"{_PREPARED}; the CSVs name it id",
    "languages": f"{_PREPARED}; rows of other languages in them are trained on, there and here",
    "max_duration": f"{_PREPARED}; clips over 30 s are cut there, and with long_audio: truncate here",
    "max_label_length": f"{_EVALUATION}; here no text is cut",
    "max_samples": "took there the first rows before patches; there is no such option here: cut the CSV, or give steps",
    "max_seq_length": "cut there long prompts from their start; here no text is cut, and a run that does not fit the "
    "memory says so before it starts",
    "model_revision": "there is no such option here: download that revision, and give its folder as model",
    "optim": f"{_UNREAD}, which takes AdamW; here optimizer",
    "peft_method": f"{_UNREAD}, which takes LoRA",
    "per_device_eval_batch_size": "here validation takes batch_size",
    "preprocessing_num_workers": f"{_UNREAD}; here media are decoded ahead in threads",
    "sample_validation_rate": _PREPARED,
    "save_steps": f"{_UNREAD}, which saves as save_strategy says; here save_every",
    "save_total_limit": f"{_UNREAD}, which keeps all checkpoints; here keep",
    "seed": f"{_UNREAD}; here seed",
    "skip_audio_validation": _PREPARED,
    "source": f"{_UNREAD} in this section; the data set's decides",
    "source_type": f"{_UNREAD} in this section; the data set's decides",
    "streaming_enabled": "refused there for training when true; here rows are always read as they are needed",
    "torch_compile": "steps are compiled here without an option",
    "use_peft": f"{_UNREAD}, which takes LoRA",
    "validation_wer_threshold": "a limit there for making patches; here evaluate --flag-bad-rows",
    "visualize": "shows there a page in the browser; here metrics.jsonl and plots lie in the run folder",
    "warmup_steps": f"{_UNREAD}, which has no warm-up; warmup: {{value}} does it here",
    "weight_decay": f"{_UNREAD}, which has none; weight_decay: {{value}} does it here",
    "wer_threshold": "a limit there for making patches; here evaluate --flag-bad-rows",
}
"""Key -> what it does there and what does it here; ``{value}`` is the profile's."""

_SILENT = {
    ("train_split", "train"), ("validation_split", "validation"), ("streaming_enabled", "false"),
    ("load_validation", "true"), ("id_column", "id"),
}  # fmt: skip
"""What says nothing but the usual."""
_OF_DATASET = ("source", "source_type")


def remarks(settings: Settings) -> Iterator[str]:
    """A line for every key of a profile that was not asked for, and for every one that was lost on the way."""
    for section, key, value in settings.lost:
        yield (
            f"{settings.path} [{section}] {key} = {value}: had no effect there, since [DEFAULT] has {key} too and only "
            "[dataset_defaults] and a profile go before it"
        )
    for key, (value, _) in sorted(settings.values.items()):
        value = value.strip()
        known = key in settings.asked or (settings.dataset.get(key) == value and key in _OF_DATASET)
        if known or not value or (key, value.lower()) in _SILENT:
            continue
        if key in ("train_split", "validation_split"):
            reason = f"{_UNREAD}, which reads train.csv and validation.csv; so does this"
        else:
            reason = REASONS.get(key, "not a key that training there reads").replace("{value}", value)
        if key == "max_seq_length" and settings.text("modality", "audio").lower() != "text":
            reason = _UNREAD
        yield f"{settings.label(key)} = {value}: {reason}"
