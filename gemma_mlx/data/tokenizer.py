"""The checkpoint's own tokenizer and chat template files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_mlx import gguf_file
from gemma_mlx.data import template_gemma3 as gemma3
from gemma_mlx.errors import InputError
from gemma_mlx.spec import ModelSpec

TURN_OPEN, TURN_CLOSE = "<|turn>", "<turn|>"
_TURNS = (TURN_OPEN, TURN_CLOSE, gemma3.TURN_OPEN, gemma3.TURN_CLOSE)
_TOOL_RESPONSE = "<|tool_response>"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # beside a GGUF file there are none
        return {}
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not readable as JSON ({e}); download the checkpoint again") from None
    return found if isinstance(found, dict) else {}


class Tokenizer:
    """Text <-> ids through ``tokenizer.json``, read when first needed.

    Args:
        folder: the checkpoint's folder, or a GGUF file, which carries its own.
        spec: its spec, for the ids of media and control tokens.

    Raises (when first used):
        InputError: no tokenizer.json, an unreadable one, or one that does not fit the spec.
    """

    def __init__(self, folder: str | Path, spec: ModelSpec):
        self.folder, self.spec = Path(folder), spec

    @cached_property
    def _tokenizer(self) -> Any:
        loaded = gguf_file.tokenizer(self.folder) if gguf_file.is_gguf(self.folder) else self._from_json()
        rows = self.spec.text.vocab_size
        added = loaded.get_added_tokens_decoder()
        size = loaded.get_vocab_size(with_added_tokens=True) - sum(i >= rows for i in added)
        if size > rows:
            raise InputError(
                f"{self.folder}: the tokenizer has {size} tokens, the model {rows}; use the files of one checkpoint"
            )
        loaded.no_truncation()
        loaded.no_padding()
        return loaded

    def _from_json(self) -> Any:
        from tokenizers import Tokenizer as Loader

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: not found; text needs the checkpoint's tokenizer.json, put it into the folder")
        try:
            return Loader.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({e}); download it again") from None

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it stands: nothing is added before or after; special tokens written in it are recognised."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, without the tokens that the vocabulary marks as special unless they are asked for."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        """The id of a whole token, None where the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def text_of(self, token_id: int) -> str | None:
        """The text of a token, None where the vocabulary lacks it."""
        return None if token_id < 0 else self._tokenizer.id_to_token(token_id)

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and the like -> text, as a chat template sees them."""
        found = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            for key, value in read_json(self.folder / name).items():
                text = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(text, str):
                    found[key] = text
        text = self.spec.text
        for key, token_id in (("bos_token", text.bos_token_id), ("eos_token", self.eos_id)):
            found.setdefault(key, self.text_of(token_id) or "")
        return found

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""
        eos = self.spec.text.eos_token_id
        return eos if isinstance(eos, int) else eos[0]

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that structure a conversation and may not stand inside what somebody says."""
        text = self.spec.text
        found = [self.text_of(i) for i in (text.pad_token_id, text.bos_token_id, self.eos_id)]
        found += [token for token in _TURNS if self.id_of(token) is not None]
        return (*(token for token in found if token), *self.media_tokens)

    @cached_property
    def media_tokens(self) -> tuple[str, ...]:
        """Slots and markers of pictures, films and clips."""
        s = self.spec
        ids = (s.boi_token_id, s.image_token_id, s.eoi_token_id, s.video_token_id)
        found = [self.text_of(i) for i in (*ids, s.boa_token_id, s.audio_token_id, s.eoa_token_id)]
        return (*(token for token in found if token), *self._without_row)

    @property
    def _without_row(self) -> list[str]:
        """Added tokens that the model has no row for: Gemma 3's text checkpoints name a picture's."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for i, token in added.items() if i >= self.spec.text.vocab_size]

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end generation: generation_config.json's, else end of text, end of turn and a call for a tool."""
        found = read_json(self.folder / "generation_config.json").get("eos_token_id")
        if isinstance(found, int):
            return (found,)
        if isinstance(found, Sequence) and found:
            return tuple(int(i) for i in found)
        known = [self.eos_id, self.id_of(TURN_CLOSE), self.id_of(gemma3.TURN_CLOSE), self.id_of(_TOOL_RESPONSE)]
        return tuple(i for i in known if i is not None)

    @cached_property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Slots of media, and generation_config.json's ``suppress_tokens`` (12B: the closing markers of media)."""
        s = self.spec
        named = read_json(self.folder / "generation_config.json").get("suppress_tokens") or []
        known = {s.image_token_id, s.video_token_id, s.audio_token_id, *map(int, named)}
        return tuple(sorted(i for i in known if 0 <= i < s.text.vocab_size))

    @cached_property
    def chat_template(self) -> str | None:
        """The checkpoint's template: chat_template.jinja, chat_template.json, tokenizer_config.json's or a GGUF's."""
        if gguf_file.is_gguf(self.folder):
            return gguf_file.chat_template(self.folder)
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError) as e:
                raise InputError(f"{path}: not readable as UTF-8 text ({e}); download it again") from None
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = read_json(self.folder / name).get("chat_template")
            if isinstance(found, list):  # several by name
                found = next((t.get("template") for t in found if t.get("name") == "default"), None)
            if isinstance(found, str):
                return found
        return None
