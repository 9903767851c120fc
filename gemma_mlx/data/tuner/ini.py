"""The existing tuner's ``config.ini``: which value a profile has for each key, and which section gave it.

Sections are laid over each other, later ones winning: ``[DEFAULT]``, ``[dataset_defaults]``, ``[group:G]`` (G is the
model's ``group``), ``[model:M]``, ``[dataset:D]``, ``[profile:P]``. As there, a key that ``[DEFAULT]`` has too counts
in ``[dataset_defaults]`` and the profile alone; in the other sections it is without effect. Values may hold
``%(key)s`` references everywhere but in the profile, and end at ``#`` or ``;`` after a space.
"""

from __future__ import annotations

import configparser
import difflib
from dataclasses import dataclass, field
from pathlib import Path

from gemma_mlx.errors import InputError

_COMMENTS = ("#", ";")
_TRUE = ("1", "true", "yes", "y", "on")


@dataclass
class Settings:
    """A profile's values.

    Attributes:
        path: the config.ini.
        profile: the profile's name.
        values: key (lower case) -> (value, section).
        dataset: the values of the data set's section and ``[DEFAULT]`` alone: where its rows come from.
        lost: (section, key, value) of what a section says in vain; see the top of this file.
        asked: keys that were looked up.
    """

    path: Path
    profile: str
    values: dict[str, tuple[str, str]]
    dataset: dict[str, str] = field(default_factory=dict)
    lost: list[tuple[str, str, str]] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)

    def text(self, key: str, default: str = "") -> str:
        """A value without spaces around it; the default where there is none or it is empty."""
        self.asked.add(key)
        value, _ = self.values.get(key, ("", ""))
        return value.strip() or default

    def flag(self, key: str, default: bool = False) -> bool:
        """True of 1, true, yes, y and on; any other text is false, as there."""
        text = self.text(key)
        return text.lower() in _TRUE if text else default

    def label(self, key: str) -> str:
        """What messages call a key: the file, the section that gives the value, and the key."""
        section = self.values.get(key, ("", f"profile:{self.profile}"))[1]
        return f"{self.path} [{section}] {key}"

    def choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        """One of several words, in any case; InputError for another."""
        word = self.text(key, default).lower()
        if word not in known:
            raise InputError(f"{self.label(key)}: expected {' or '.join(known)}, got {word!r}")
        return word

    def needed(self, key: str, why: str) -> str:
        """A value that must be there; InputError saying why."""
        text = self.text(key)
        if not text:
            raise InputError(f"{self.path} [profile:{self.profile}]: no {key}, {why}")
        return text


def read_settings(path: Path, profile: str) -> Settings:
    """The values of one profile.

    Raises:
        InputError: the file cannot be read or parsed (with its line), or it has no such profile, model or data set,
            with those that it has.
    """
    full, own = _parsers(path)
    top = f"profile:{profile}"
    _present(path, own, "profile", profile)
    said = dict(own[top])
    for key in ("model", "dataset"):
        said[key] = said.get(key) or own.get("DEFAULT", key, fallback="")
        if not said[key]:
            raise InputError(f"{path} [{top}]: no {key}; name one: {_names(own, key)}")
        _present(path, own, key, said[key])
    model, dataset = f"model:{said['model']}", f"dataset:{said['dataset']}"
    settings = Settings(path, profile, {})
    try:
        defaults = full.defaults()
        settings.values = {key: (full.get("DEFAULT", key), "DEFAULT") for key in defaults}
        group = full.get(model, "group", fallback="")
        for section in ("dataset_defaults", f"group:{group}", model, dataset):
            _lay(settings, full, own, section, set() if section == "dataset_defaults" else set(defaults))
        settings.dataset = {key: (full.get(dataset, key) or "").strip() for key in full[dataset]}
    except configparser.Error as error:
        raise InputError(f"{path}: {_one_line(error)}") from None
    settings.values |= {key: (value or "", top) for key, value in said.items()}
    return settings


def _lay(
    settings: Settings,
    full: configparser.ConfigParser,
    own: configparser.ConfigParser,
    section: str,
    without: set[str],
) -> None:
    """Lays a section's own keys over the settings, but for those that have no effect in it."""
    if not own.has_section(section):
        return
    for key in own[section]:
        value = full.get(section, key) or ""
        if key in without:
            if value != settings.values[key][0]:
                settings.lost.append((section, key, value))
        else:
            settings.values[key] = (value, section)


def _parsers(path: Path) -> tuple[configparser.ConfigParser, configparser.ConfigParser]:
    """The file as it is read there, and with ``[DEFAULT]`` as a section like others, so that keys are told apart."""
    full = configparser.ConfigParser(inline_comment_prefixes=_COMMENTS)
    own = configparser.ConfigParser(
        inline_comment_prefixes=_COMMENTS, interpolation=None, default_section="\0", strict=False
    )
    try:
        text = path.read_text(encoding="utf-8-sig")
        full.read_string(text, str(path))
        own.read_string(text, str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of the tuner's config.ini") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({_one_line(error)})") from None
    except configparser.Error as error:
        line = getattr(error, "lineno", None) or next((n for n, _ in getattr(error, "errors", [])), None)
        raise InputError(f"{path}:{line or 1}: not an INI file ({_one_line(error)})") from None
    return full, own


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _names(own: configparser.ConfigParser, kind: str) -> str:
    """The sections of a kind, for messages."""
    found = [section.split(":", 1)[1] for section in own.sections() if section.startswith(f"{kind}:")]
    return ", ".join(found) or f"the file has no section [{kind}:...]"


def _present(path: Path, own: configparser.ConfigParser, kind: str, name: str) -> None:
    if own.has_section(f"{kind}:{name}"):
        return
    known = _names(own, kind)
    close = difflib.get_close_matches(name, known.split(", "), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise InputError(f"{path}: no {kind} {name!r} ([{kind}:{name}]){hint}; {kind}s: {known}")
