"""A conversation on a terminal: lines in, answers out as they come; files by command or by dragging them in."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gemma_mlx.adapters.attach import swap
from gemma_mlx.data.blob import described
from gemma_mlx.data.examples import Prompts
from gemma_mlx.data.processor import Processor
from gemma_mlx.data.sources.cells import kind_of
from gemma_mlx.data.turns import Audio, Example, Image, Text, Turn, Video, system_turns
from gemma_mlx.errors import InputError
from gemma_mlx.generation import stream
from gemma_mlx.lora import remembered_options
from gemma_mlx.prompt_cache import PromptCache
from gemma_mlx.prompting import user_turn
from gemma_mlx.sampling import Settings
from gemma_mlx.signals import Interrupted, stop_request

KINDS: dict[str, type[Image] | type[Video] | type[Audio]] = {"image": Image, "video": Video, "audio": Audio}
HELP = """\
/image FILE, /audio FILE, /video FILE   goes with your next line; or drag the file in; an empty line sends it alone
/adapter FOLDER | none                  put an adapter on the model, or take it off; the conversation stays
/system TEXT                            what the model is told first; without TEXT nothing
/undo, /reset                           take back your last message and its answer, or all of them
/save FILE                              add the conversation to a JSONL file, a line that train reads
/help, /quit                            Ctrl-C stops an answer, Ctrl-D ends"""
_MARK = "> "


class Chat:
    """One conversation with a loaded model.

    What goes wrong is one line on standard error, and the conversation stays as it was.

    Args:
        model, processor: of `gemma_mlx.load`.
        settings: how answers are made.
        prompts: what is said where the person says nothing, and the system turn; as the adapter remembers it or flags
            said.
        given: the parts of it that flags said; an adapter that is put on later does not change them.
        language: of clips, for the default prompt.
        loaded: how the base was loaded (audio_window, quantize), to tell where an adapter wants it otherwise.
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        settings: Settings,
        prompts: Prompts | None = None,
        *,
        given: Iterable[str] = (),
        language: str | None = None,
        loaded: dict[str, Any] | None = None,
    ):
        self.model, self.processor, self.settings, self.language = model, processor, settings, language
        self._flags, self._given, self._loaded = prompts or Prompts(), frozenset(given), loaded or {}
        self.prompts = self._flags
        self.turns: list[Turn] = []
        self.waiting: list[Image | Video | Audio] = []
        self._own_system: str | None = None
        self._cache = PromptCache()

    def run(self) -> None:
        """Reads lines until there are no more, or /quit.

        Raises:
            Interrupted: SIGTERM.
        """
        asking = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        if asking:
            _edit_lines()
            _tell("Write to the model; /help shows what else there is.")
        while (line := _next_line(asking)) is not None:
            try:
                if not self.take(line):
                    return
            except InputError as error:
                _tell(f"error: {' '.join(str(error).split())}")
            except KeyboardInterrupt as stop:
                if isinstance(stop, Interrupted):
                    raise
                self._cache = PromptCache()  # it may have been left half written
                _tell("\nstopped; the message was taken back")

    def take(self, line: str) -> bool:
        """One line: files, a command or something to say; false where it ends the chat."""
        if files := media_in(line):
            for kind, path in files:
                self._add(kind, path)
            return True
        word, _, rest = line.partition(" ")
        if line.startswith("/"):
            if word in ("/quit", "/exit"):
                return False
            if word not in self._commands:
                raise InputError(f"{word}: no such command; /help shows them (a space in front says it to the model)")
            self._commands[word](rest.strip())
        elif line.strip() or self.waiting:
            self._say(line.strip() or None)
        return True

    @property
    def system(self) -> str | None:
        """What the model is told first."""
        return self.prompts.system if self._own_system is None else self._own_system

    @property
    def _commands(self) -> dict[str, Callable[[str], None]]:
        files = {f"/{kind}": lambda rest, kind=kind: self._add(kind, file_named(rest, f"/{kind}")) for kind in KINDS}
        return {
            **files, "/adapter": self._adapter, "/system": self._set_system, "/reset": self._reset, "/undo": self._undo,
            "/save": self._save, "/help": lambda _: _tell(HELP),
        }  # fmt: skip

    def _add(self, kind: str, path: Path) -> None:
        part = KINDS[kind](path)
        probe = Example((Turn("user", (Text("?"), part)),))
        self.processor.prompt(probe, with_features=False)  # or says what is wrong with it
        self.waiting.append(part)
        _tell(f"{path.name}: goes with your next line ({len(self.waiting)} waiting); an empty line sends it alone")

    def _say(self, text: str | None) -> None:
        """Sends what the person said and what is waiting, and keeps it with the answer."""
        parts = {make: [part.path for part in self.waiting if isinstance(part, make)] for make in KINDS.values()}
        waiting, self.waiting = self.waiting, []  # what cannot be read would stand in the way of the next line
        turn = user_turn(text, parts[Image], parts[Video], parts[Audio], self.prompts, self.language)
        answer, whole = self._answer(Example((*system_turns(self.system), *self.turns, turn)))
        if not answer.strip():
            self.waiting = waiting
            _tell("no answer; the message was taken back")
            return
        self.turns += [turn, Turn("model", (Text(answer),), learned=whole)]

    def _answer(self, example: Example) -> tuple[str, bool]:
        """(what was printed, whether it is all of the answer)."""
        text, pieces = "", stream(self.model, self.processor, example, self.settings, self._cache)
        with stop_request() as stop:
            try:
                for piece in pieces:
                    click.echo(piece, nl=False)
                    text += piece
                    if stop:
                        break
            finally:
                pieces.close()
                click.echo()
        if stop and stop.signum != 2:
            raise Interrupted("terminated", stop.signum)
        if stop:
            _tell("stopped")
        return text, not stop

    def _adapter(self, name: str) -> None:
        if not name:
            raise InputError("/adapter FOLDER puts an adapter on, /adapter none takes it off")
        folder = None if name == "none" else str(Path(_unquoted(name)).expanduser())
        options = remembered_options(folder)
        swap(self.model, folder)
        self._cache = PromptCache()
        changed = {
            field: options.get(option)
            for field, option in (("audio", "audio_prompt"), ("image", "image_prompt"), ("system", "system"))
            if option not in self._given
        }
        self.prompts = replace(self._flags, **changed)
        for option, value in self._loaded.items():
            if folder and option in options and options[option] != value:
                flag = option.replace("_", "-")
                _tell(f"note: it was trained with {option} {options[option]}, this base has {value}; see --{flag}")
        _tell("the base alone" if folder is None else f"adapter {folder}")

    def _set_system(self, text: str) -> None:
        self._own_system = text
        _tell("system: " + (text or "nothing"))

    def _reset(self, _: str) -> None:
        self.turns, self.waiting = [], []
        _tell("the conversation is empty")

    def _undo(self, _: str) -> None:
        if self.waiting:
            _tell(f"{described(self.waiting.pop().path)}: taken back")
        elif self.turns:
            said = self.turns[-2].text
            del self.turns[-2:]
            _tell(f"taken back: {said[:60]}{'…' if len(said) > 60 else ''}")
        else:
            raise InputError("nothing to take back")

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save FILE needs the name of a JSONL file")
        if not self.turns:
            raise InputError("nothing to save yet")
        path = Path(os.path.abspath(Path(_unquoted(name)).expanduser()))
        turns = (*system_turns(self.system), *self.turns)
        outside = save_conversation(turns, path)
        hint = "".join(f" --media-root {shlex.quote(folder)}" for folder in outside)
        _tell(f"added to {path}" + (f"; train it with{hint}" if hint else ""))


def save_conversation(turns: Iterable[Turn], path: Path) -> list[str]:
    """Adds a conversation to a JSONL file, a line of ``messages``; files below its folder are named from there.

    Returns:
        Folders of the other files: the media roots that reading the line needs.

    Raises:
        InputError: the file cannot be written, or its name says that it is no JSONL.
    """
    if path.suffix not in (".jsonl", ".ndjson"):
        raise InputError(f"{path}: conversations are lines of JSONL; end the name in .jsonl")
    outside: dict[str, None] = {}
    messages = [_message(turn, path.parent, outside) for turn in turns]
    line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    try:
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = "\n" + line
            file.write(line.encode())
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); give another name") from None
    return list(outside)


def _message(turn: Turn, folder: Path, outside: dict[str, None]) -> dict[str, Any]:
    role = {"model": "assistant"}.get(turn.role, turn.role)
    weight = {} if turn.learned else {"weight": 0}
    if all(isinstance(part, Text) for part in turn.parts):
        return {"role": role, "content": "".join(part.text for part in turn.parts), **weight}
    content = []
    for part in turn.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
            continue
        kind = next(name for name, make in KINDS.items() if isinstance(part, make))
        named = Path(os.path.realpath(part.path))
        root = Path(os.path.realpath(folder))
        if named.is_relative_to(root):
            named = named.relative_to(root)
        else:
            outside[str(named.parent)] = None
        content.append({"type": kind, kind: str(named)})
    return {"role": role, "content": content}


def media_in(line: str) -> list[tuple[str, Path]]:
    """(kind, file) of each word of a line that holds nothing but names of media files, as terminals write them when
    files are dragged in; [] for any other line."""
    if _is_file(whole := Path(line.strip()).expanduser()) and (kind := kind_of(whole.suffix.lower())):
        return [(kind, Path(os.path.abspath(whole)))]
    try:
        words = shlex.split(line)
    except ValueError:  # an apostrophe
        return []
    paths = [Path(word).expanduser() for word in words]
    kinds = [kind_of(path.suffix.lower()) for path in paths]
    if not paths or not all(kinds) or not all(map(_is_file, paths)):
        return []
    return [(kind, Path(os.path.abspath(path))) for kind, path in zip(kinds, paths, strict=True)]


def file_named(text: str, command: str) -> Path:
    """The file that a command names: as it is, in quotes or with escaped spaces.

    Raises:
        InputError: there is none.
    """
    if not text:
        raise InputError(f"{command} FILE needs the name of a file")
    path = Path(text).expanduser()
    path = path if _is_file(path) else Path(_unquoted(text)).expanduser()
    if not _is_file(path):
        raise InputError(f"{command} {text}: no such file; correct the path")
    return Path(os.path.abspath(path))


def _unquoted(text: str) -> str:
    """A name without quotes and escapes around its spaces."""
    try:
        words = shlex.split(text)
    except ValueError:
        return text
    return words[0] if len(words) == 1 else text


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def _tell(text: str) -> None:
    click.echo(text, err=True)


def _edit_lines() -> None:
    """Arrow keys and earlier lines, where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is there)


def _next_line(asking: bool) -> str | None:
    """The next line without its end; None at the end of the input."""
    if not asking:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    while True:
        try:
            return input(_MARK)
        except EOFError:
            click.echo()
            return None
        except KeyboardInterrupt:
            _tell("\nCtrl-D or /quit ends the chat")
