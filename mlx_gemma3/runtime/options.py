"""What a caller may set for one answer, checked in one place before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, TypedDict

from ..errors import OptionError
from ..generation.sampling import Sampling


class OptionValues(TypedDict, total=False):
    """The keyword arguments of `Engine.generate` and `Engine.stream`: the fields of Options."""

    system: str | None
    raw: bool | None
    pan_and_scan: bool
    max_tokens: int
    stop: str | Sequence[str]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one answer. A sampling setting left at None is the checkpoint's own (generation_config.json)."""

    system: str | None = None  # said before the first user turn
    raw: bool | None = None  # True: complete the text, no chat template; None: as the checkpoint was trained
    pan_and_scan: bool = False  # wide and tall pictures are also shown in crops
    max_tokens: int = 1024
    stop: Sequence[str] = ()  # strings that end the answer, themselves left out; names of control tokens mean those too
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise OptionError("max_tokens", got=self.max_tokens, want="a whole number >= 1")
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if (value is not None and not isinstance(value, kind)) or (isinstance(value, bool) and kind is not bool):
                raise OptionError(name, got=repr(value), want=_NAMES[kind])
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = tuple(stop) if isinstance(stop, Sequence) else (None,)
        if not all(isinstance(text, str) and text for text in stop):
            raise OptionError("stop", got=list(stop), want="strings that are not empty")
        object.__setattr__(self, "stop", stop)
        self.sampling({})

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Options:
        """From keyword arguments.

        Raises:
            OptionError: an unknown name, or a value outside its range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise OptionError(f"option {name}", got="an unknown name", want=", ".join(known))
        return cls(**values)

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """What was asked for, else what generation_config.json says, else Gemma 3's published defaults."""
        values = {name: defaults[name] for name in _SAMPLING if defaults.get(name) is not None}
        if defaults.get("do_sample") is False:
            values["temperature"] = 0.0
        asked = {name: getattr(self, name) for name in _SAMPLING}
        values |= {name: value for name, value in asked.items() if value is not None}
        try:
            return Sampling(**values, seed=self.seed)
        except TypeError:
            raise OptionError("sampling options", got=values, want="numbers") from None


_KINDS: dict[str, type | UnionType] = {
    "system": str,
    "raw": bool,
    "pan_and_scan": bool,
    "temperature": int | float,
    "top_k": int,
    "top_p": int | float,
    "min_p": int | float,
    "repetition_penalty": int | float,
    "seed": int,
}
_NAMES: dict[type | UnionType, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    int | float: "a number",
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
