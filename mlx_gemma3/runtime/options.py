"""What a caller may set for one answer, checked in one place before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from ..arguments import argument, described
from ..errors import OptionError
from ..generation.sampling import Sampling


class OptionValues(TypedDict, total=False):
    """The keyword arguments of `Engine.generate` and `Engine.stream`: the fields of Options."""

    system: str | None
    raw: bool | None
    pan_and_scan: bool | None
    continue_final_message: bool | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one answer. None is the default; for sampling, the checkpoint's own (generation_config.json).

    Raises:
        OptionError: a value of a wrong type or out of its range.
    """

    system: str | None = None  # said before the first user turn
    raw: bool | None = None  # True: complete the text, no chat template; None: as the checkpoint was trained
    pan_and_scan: bool = False  # wide and tall pictures are also shown in crops
    continue_final_message: bool = False  # of messages: the answer goes on with the last one
    max_tokens: int = 1024
    stop: Sequence[str] = ()  # strings that end the answer, themselves left out; names of control tokens mean those too
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = argument(field.name, getattr(self, field.name), _KINDS[field.name], field.default)
            object.__setattr__(self, field.name, value)
        if self.max_tokens < 1:
            raise OptionError("max_tokens", got=described(self.max_tokens), want="a whole number >= 1")
        if not all(self.stop):
            raise OptionError("stop", got=described(list(self.stop)), want="strings that are not empty")
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
        return Sampling(**values, seed=self.seed)


_KINDS = {  # of arguments.KINDS
    "system": "text",
    "raw": "switch",
    "pan_and_scan": "switch",
    "continue_final_message": "switch",
    "max_tokens": "whole",
    "stop": "texts",
    "temperature": "number",
    "top_k": "whole",
    "top_p": "number",
    "min_p": "number",
    "repetition_penalty": "number",
    "seed": "whole",
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
