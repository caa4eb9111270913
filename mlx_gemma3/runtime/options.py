"""What a caller may set for one answer, checked in one place before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
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
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logprobs: int | None


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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these token ids
    seed: int | None = None
    logprobs: int | None = None  # tell the log-probability of each token, and of so many of the likeliest ones

    def __post_init__(self) -> None:
        for one in fields(self):
            default = {} if one.name == "logit_bias" else one.default
            value = argument(one.name, getattr(self, one.name), _KINDS[one.name], default)
            object.__setattr__(self, one.name, value)
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
        known = [one.name for one in fields(cls)]
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
        own = {name: getattr(self, name) for name in _OWN if getattr(self, name) is not None}
        return Sampling(**values, **own)


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
    "presence_penalty": "number",
    "frequency_penalty": "number",
    "logit_bias": "biases",
    "seed": "whole",
    "logprobs": "whole",
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OWN = ("presence_penalty", "frequency_penalty", "logit_bias", "seed", "logprobs")  # no generation_config.json has them
