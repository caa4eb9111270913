"""What `/set` shows and changes: the options of the answers to come."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from ...errors import OptionError
from ...runtime.options import SETTINGS, Options, OptionValues, default_of
from ..answers import typed

# The other options belong to the whole conversation, or show nothing in a chat.
# Values for a chat template belong to the command line.
NAMES = [name for name, setting in SETTINGS.items() if setting.talk and setting.kind != "values"]


class Settings:
    """The options of the answers to come.

    Args:
        values: where they start; None leaves a sampling setting to the checkpoint.

    Raises:
        OptionError: a value out of its range.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._options = Options.build(values)

    @property
    def values(self) -> OptionValues:
        """As the keyword arguments of `Session.send`."""
        return cast(OptionValues, {name: value for name, value in asdict(self._options).items() if SETTINGS[name].talk})

    def show(self, name: str) -> str:
        """The value in words."""
        value, setting = getattr(self._options, name), SETTINGS[name]
        if isinstance(value, bool):
            return "on" if value else "off"
        if value is None and setting.saved:
            return "the checkpoint's own"
        if value is None and setting.kind == "text":
            return "none"
        if value is None:
            return "a new one each time" if setting.usual is None else f"{setting.usual:g}"
        if setting.kind == "biases":
            return " ".join(f"{token}={bias:g}" for token, bias in value.items()) or "none"
        return " ".join(map(shlex.quote, value)) or "none" if setting.kind == "texts" else str(value)

    def rows(self) -> list[tuple[str, str]]:
        return [(name, self.show(name)) for name in NAMES]

    def named(self, word: str) -> str:
        """The option that a word means: `top-k` is top_k.

        Raises:
            OptionError: there is none.
        """
        name = word.lower().replace("-", "_")
        name = next((one for one in NAMES if SETTINGS[one].word == name), name)
        if name in NAMES:
            return name
        close = difflib.get_close_matches(name, NAMES, n=1)
        do = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(NAMES)}"
        raise OptionError(f"/set {word}", got="an unknown name", do=do)

    def set(self, word: str, text: str) -> str:
        """Take a value from what was typed; `default` is what an answer has when nobody says anything.

        Returns the setting's name.

        Raises:
            OptionError: an unknown name, or a value of another kind or out of its range; nothing changes then.
        """
        name = self.named(word)
        value = default_of(name) if text.lower() == "default" else typed(name, text)
        self._options = Options.build({**self.values, name: value})
        return name
