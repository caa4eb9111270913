"""What `/set` shows and changes: the options of the answers to come."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import asdict
from typing import Any, cast

from ...errors import OptionError
from ...runtime.options import Options, OptionValues

# As they are typed in; str stands for several texts. The other fields of Options belong to the whole conversation.
KINDS: dict[str, type] = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "stop": str,
    "pan_and_scan": bool,
}
_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


class Settings:
    """The options of the answers to come.

    Args:
        values: where they start; None leaves a sampling setting to the checkpoint.

    Raises:
        OptionError: a value out of its range.
    """

    def __init__(self, values: OptionValues) -> None:
        self._options = Options.build(values)

    @property
    def values(self) -> OptionValues:
        """As the keyword arguments of `Session.send`."""
        return cast(OptionValues, {name: value for name, value in asdict(self._options).items() if name in KINDS})

    def show(self, name: str) -> str:
        """The value in words."""
        value = getattr(self._options, name)
        if isinstance(value, bool):
            return "on" if value else "off"
        if value is None:
            return "a new one each time" if name == "seed" else "the checkpoint's own"
        return " ".join(map(shlex.quote, value)) or "none" if name == "stop" else str(value)

    def rows(self) -> list[tuple[str, str]]:
        return [(name, self.show(name)) for name in KINDS]

    def named(self, word: str) -> str:
        """The option that a word means: `top-k` is top_k.

        Raises:
            OptionError: there is none.
        """
        name = word.lower().replace("-", "_")
        if name in KINDS:
            return name
        close = difflib.get_close_matches(name, KINDS, n=1)
        do = f"did you mean {close[0]}?" if close else f"the settings are {', '.join(KINDS)}"
        raise OptionError(f"/set {word}", got="an unknown name", do=do)

    def set(self, word: str, text: str) -> str:
        """Take a value from what was typed; `default` is what an answer has when nobody says anything.

        Returns the setting's name.

        Raises:
            OptionError: an unknown name, or a value of another kind or out of its range; nothing changes then.
        """
        name = self.named(word)
        value = getattr(Options(), name) if text.lower() == "default" else _value(name, text)
        self._options = Options.build({**self.values, name: value})
        return name


def _value(name: str, text: str) -> Any:
    kind = KINDS[name]
    want = {str: "texts, in quotes where they hold spaces", bool: "on or off", int: "a whole number"}
    try:
        if kind is str:
            return shlex.split(text)
        return _SWITCH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise OptionError(name, got=text, want=want.get(kind, "a number")) from None
