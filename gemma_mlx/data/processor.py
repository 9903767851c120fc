"""Everything between an example and a sample: tokenizer, template, media, token counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gemma_mlx.batch import IGNORE_INDEX
from gemma_mlx.data import template_gemma3 as gemma3
from gemma_mlx.data import template_gemma3n
from gemma_mlx.data.batches import clip_tokens
from gemma_mlx.data.blob import described
from gemma_mlx.data.features import Patches, image_patches, log_mel, raw_frames
from gemma_mlx.data.features_gemma3n import log_mel as gemma3n_log_mel
from gemma_mlx.data.features_gemma3n import square_picture
from gemma_mlx.data.media import LONG_AUDIO, audio_samples, image_dimensions, load_audio, load_image
from gemma_mlx.data.template import (
    AUDIO,
    DEFAULT_TEMPLATE,
    IMAGE,
    TEXT,
    TRAIN_ON,
    VIDEO,
    ChatTemplate,
    Sample,
    WithFrames,
    check_texts,
    encode,
    expand,
    render_conversation,
    render_prompt,
)
from gemma_mlx.data.template_gemma3n import WithBreaks
from gemma_mlx.data.tokenizer import Tokenizer, read_json
from gemma_mlx.data.turns import Audio, Example, Image, Text, Video
from gemma_mlx.data.video import load_frames, timestamps, video_info
from gemma_mlx.errors import InputError
from gemma_mlx.spec import ModelSpec, image_soft_tokens, read_spec
from gemma_mlx.spec_gemma3n import Gemma3nSpec

VIDEO_FRAMES, VIDEO_TOKENS = 32, 70
"""Frames of a video, and the most soft tokens of each, where the checkpoint's processor config says nothing."""


class Processor:
    """Makes samples of examples with a checkpoint's own tokenizer and chat template.

    A folder without a tokenizer will do until text is first needed. Reading a sample decodes its media; the processor
    may be used from several threads.

    Args:
        folder: the checkpoint's folder.
        spec: its spec; read from the folder if None.
        image_tokens: the most soft tokens a picture may take; None for the checkpoint's own setting.
        long_audio: "error" or "truncate", for clips over 30 s.
        train_on: "all" model turns of a conversation or the "last" one: what it ends with. Turns that are not
            `learned` carry no loss either way.
        chat_template: a template to use instead of the checkpoint's.

    Raises:
        InputError: an option that does not exist, or an unreadable config.json.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: ModelSpec | None = None,
        *,
        image_tokens: int | None = None,
        long_audio: str = "error",
        train_on: str = "all",
        chat_template: str | None = None,
    ):
        self.folder = Path(folder)
        self.spec = spec if spec is not None else read_spec(self.folder)
        for name, value, known in (("long_audio", long_audio, LONG_AUDIO), ("train_on", train_on, TRAIN_ON)):
            if value not in known:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if image_tokens is not None and image_tokens < 1:
            raise InputError(f"image_tokens is {image_tokens}; expected at least 1 (the reference has 70 to 1120)")
        self.long_audio, self.train_on = long_audio, train_on
        self.tokenizer = Tokenizer(self.folder, self.spec)
        self._image_tokens, self._chat_template = image_tokens, chat_template

    @property
    def pad_id(self) -> int:
        """The id in padding positions."""
        return self.spec.text.pad_token_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end generation."""
        return self.tokenizer.eos_ids

    @cached_property
    def image_tokens(self) -> int:
        """The most soft tokens a picture may take: asked for, else the processor's config, else the model's."""
        if self._image_tokens is not None:
            return self._image_tokens
        nested = read_json(self.folder / "processor_config.json").get("image_processor") or {}
        flat = read_json(self.folder / "preprocessor_config.json")
        vision = self.spec.vision
        own = nested.get("max_soft_tokens") or flat.get("max_soft_tokens")
        return int(own) if own else vision.default_output_length if vision else 280

    @property
    def _is_3n(self) -> bool:
        return isinstance(self.spec, Gemma3nSpec)

    @property
    def _slot_texts(self) -> tuple[str, ...]:
        found = (self.tokenizer.text_of(i) for i in (self.spec.image_token_id, self.spec.audio_token_id))
        return tuple(text for text in found if text)

    @cached_property
    def image_side(self) -> int:
        """Pixels on the side of a picture, where all are squashed to one square (Gemma 3n)."""
        nested = read_json(self.folder / "processor_config.json").get("image_processor") or {}
        size = nested.get("size") or read_json(self.folder / "preprocessor_config.json").get("size") or {}
        return int(size.get("height", 768))

    @cached_property
    def video_limits(self) -> tuple[int, int]:
        """(frames of a video, the most soft tokens of each), from the processor's config."""
        own = read_json(self.folder / "processor_config.json").get("video_processor") or {}
        own = {**read_json(self.folder / "video_preprocessor_config.json"), **own}
        return int(own.get("num_frames") or VIDEO_FRAMES), int(own.get("max_soft_tokens") or VIDEO_TOKENS)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template in use: asked for, else the checkpoint's, else the family's format."""
        default = DEFAULT_TEMPLATE if self.tokenizer.id_of(gemma3.TURN_OPEN) is None else gemma3.DEFAULT_TEMPLATE
        default = template_gemma3n.DEFAULT_TEMPLATE if self._is_3n else default
        source = self._chat_template or self.tokenizer.chat_template or default
        return ChatTemplate(source, self.tokenizer.special_tokens)

    def check(self, example: Example) -> None:
        """What can be known of an example without rendering it or decoding its media.

        Raises:
            InputError: media that the checkpoint has no tower for, or control tokens inside the text.
        """
        for part in example.media():
            self._need_tower(part, example)
        check_texts(example, self.tokenizer)

    def sample(self, example: Example, with_features: bool = True) -> Sample:
        """The example with its labels.

        Args:
            example: a conversation that ends with a model turn, or a completion.
            with_features: false to leave `images` and `clips` empty; slots are counted from the files' headers.

        Raises:
            InputError: naming the example's place: empty text, unreadable media, media without a tower for them.
        """
        self.check(example)
        if example.completion:
            return self._completion(example)
        ids, labels = encode(render_conversation(example, self._template(example), self.train_on), self.tokenizer)
        return self._with_media(example, ids, labels, with_features)

    def prompt(self, example: Example, with_features: bool = True) -> Sample:
        """The example up to where the model is to go on: its last model turn is left out. No position carries loss."""
        self.check(example)
        if example.completion:
            start = np.array([self.spec.text.bos_token_id], np.int32)
            return self._text_sample(example, start, np.full(1, IGNORE_INDEX, np.int32))
        ids, labels = encode(render_prompt(example, self._template(example)), self.tokenizer)
        return self._with_media(example, ids, labels, with_features)

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """The ids that an answer never holds: slots of media, and those that the checkpoint's own settings name."""
        return self.tokenizer.suppressed_ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of generated ids."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def _completion(self, example: Example) -> Sample:
        """``<bos>`` text ``<eos>``; either is left out where the text has its own. All but ``<bos>`` carries loss."""
        text = "".join(part.text for turn in example.turns for part in turn.parts if isinstance(part, Text))
        if not text.strip():
            raise InputError(f"{example.where}: empty text: nothing to learn; fill the cell or remove the row")
        ids = self.tokenizer.encode(text)
        bos, eos = self.spec.text.bos_token_id, self.tokenizer.eos_id
        ids = [*([] if ids[0] == bos else [bos]), *ids, *([] if ids[-1] == eos else [eos])]
        input_ids = np.array(ids, np.int32)
        labels = input_ids.copy()
        labels[0] = IGNORE_INDEX
        return self._text_sample(example, input_ids, labels)

    def _text_sample(self, example: Example, input_ids: np.ndarray, labels: np.ndarray) -> Sample:
        types = np.full_like(input_ids, TEXT)
        return Sample(input_ids, labels, types, where=example.where, row_id=example.row_id)

    def _template(self, example: Example) -> ChatTemplate | WithFrames | WithBreaks:
        """The template, writing videos as the frames that they are read as."""
        videos = [part for part in example.media() if isinstance(part, Video)]
        if not videos:
            return WithBreaks(self.template, self._slot_texts) if self._is_3n else self.template
        films = [timestamps(video_info(part.path, example.where), self.video_limits[0]) for part in videos]
        return WithFrames(self.template, self.tokenizer.text_of(self.spec.video_token_id) or "<|video|>", films)

    def _with_media(self, example: Example, ids: list[int], labels: list[int], with_features: bool) -> Sample:
        images: list[Patches] = []
        videos: list[tuple[Patches, ...]] = []
        clips: list[np.ndarray] = []
        slots: list[tuple[int, int]] = []
        per_token = getattr(self.spec.audio, "frames_per_token", 4)
        for part in example.media():
            if not with_features:
                slots += self._slots(part, example.where)
            elif isinstance(part, Image):
                images.append(self._patches(load_image(part.path, example.where), part, example.where))
                slots.append((IMAGE, images[-1].soft_tokens))
            elif isinstance(part, Video):
                frames = load_frames(part.path, example.where, self.video_limits[0])
                videos.append(tuple(self._patches(frame, part, example.where) for frame in frames))
                slots += [(VIDEO, frame.soft_tokens) for frame in videos[-1]]
            else:
                clips.append(self._features(part, example.where))
                slots.append((AUDIO, clip_tokens(clips[-1], per_token)))
        input_ids, label_ids, types = expand(ids, labels, slots, self.tokenizer, example.where)
        media = (tuple(images), tuple(clips), example.where, example.row_id, tuple(videos), per_token)
        return Sample(input_ids, label_ids, types, *media)

    def _slots(self, part: Image | Video | Audio, where: str) -> list[tuple[int, int]]:
        """(token type, slots) of a medium, without decoding more of it than its size needs."""
        if self._is_3n:
            return [self._fixed_slots(part, where)]
        if isinstance(part, Image):
            return [(IMAGE, image_soft_tokens(*image_dimensions(part.path, where), *self._budget(part)))]
        if isinstance(part, Video):
            info = video_info(part.path, where)
            frames = min(info.frames, self.video_limits[0])
            return [(VIDEO, image_soft_tokens(*info.size, *self._budget(part)))] * frames
        audio = self.spec.audio
        return [(AUDIO, audio.soft_tokens(audio_samples(part.path, where, self.long_audio, audio.max_samples)))]

    def _fixed_slots(self, part: Image | Audio, where: str) -> tuple[int, int]:
        """Gemma 3n's, after reading the file's header."""
        if isinstance(part, Image):
            image_dimensions(part.path, where)
            return IMAGE, self.spec.vision.tokens_each
        audio_samples(part.path, where, self.long_audio, self.spec.audio.max_samples)
        return AUDIO, self.spec.audio.tokens_each

    def _features(self, part: Audio, where: str) -> np.ndarray:
        return self.clip_features(load_audio(part.path, where, self.long_audio, self.spec.audio.max_samples))

    def clip_features(self, wave: np.ndarray) -> np.ndarray:
        """What the audio tower reads of float32 samples, mono at 16 kHz."""
        audio = self.spec.audio
        if self._is_3n:
            return gemma3n_log_mel(wave, audio.tokens_each)
        return raw_frames(wave, audio.audio_embed_dim) if self.spec.unified else log_mel(wave)

    def picture_patches(self, picture: np.ndarray, most: int | None = None) -> Patches:
        """What the vision tower reads of a picture, uint8 [height, width, 3], with at most so many soft tokens (by
        default as many as set; Gemma 3n's are always as many)."""
        if self._is_3n:
            return square_picture(picture, self.image_side, self.spec.vision.tokens_each)
        vision = self.spec.vision
        return image_patches(picture, most or self.image_tokens, vision.input_patch, vision.input_pooling)

    def _patches(self, picture: np.ndarray, part: Image | Video, where: str) -> Patches:
        try:
            return self.picture_patches(picture, self.video_limits[1] if isinstance(part, Video) else None)
        except InputError as e:
            raise InputError(f"{where}: {described(part.path)}: {e}") from None

    def _budget(self, part: Image | Video) -> Sequence[int]:
        """(the most soft tokens, pixels of a patch's side, patches of a soft token's side)."""
        vision = self.spec.vision
        most = self.image_tokens if isinstance(part, Image) else self.video_limits[1]
        return most, vision.input_patch, vision.input_pooling

    def _need_tower(self, part: Image | Video | Audio, example: Example) -> None:
        kind, tower = ("audio", self.spec.audio) if isinstance(part, Audio) else ("vision", self.spec.vision)
        if tower is None:
            raise InputError(
                f"{example.where}: {described(part.path)}: this checkpoint has no {kind} tower ({kind}_config in "
                "config.json); leave the column out or use another checkpoint"
            )
