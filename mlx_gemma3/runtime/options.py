"""What a caller may set for one answer: each setting stands here once, with its kind, its range and its words.

The keyword arguments of an engine, the flags of the commands, `/set` of the chat and the worker's schema are made of
it. Knows no MLX when it is imported: the commands read it to show their help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypedDict

from ..boundary.arguments import argument, described
from ..errors import OptionError

if TYPE_CHECKING:
    from ..generation.sampling import Sampling


class OptionValues(TypedDict, total=False):
    """The keyword arguments of `Engine.generate` and `Engine.stream`: for type checkers; a test holds it to Options."""

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
    prompt_logprobs: int | None
    adapter: str | None
    schema: Mapping[str, Any] | str | type | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None
    free_first: int | None
    tools: Sequence[Any] | None
    tool_choice: str | None
    parallel_tool_calls: bool | None
    template_args: Mapping[str, Any] | None
    source_lang: str | None
    target_lang: str | None


@dataclass(frozen=True)
class Setting:
    """How an option is asked for."""

    kind: str  # of arguments.KINDS
    help: str
    usual: float | None = None  # where neither the caller nor generation_config.json says anything
    low: float | None = None
    high: float | None = None
    flag: bool = True  # a flag of `generate`
    talk: bool = True  # a flag of `chat` and its /set; else it belongs to a whole request
    saved: bool = False  # generation_config.json may say it
    sampling: bool = False  # a field of generation.Sampling
    word: str = ""  # of its flag, where that is not the name


def _set(default: Any, kind: str, help: str, **more: Any) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"setting": Setting(kind, help, **more)})
    return field(default=default, metadata={"setting": Setting(kind, help, **more)})


_REQUEST = {"flag": False, "talk": False}  # the commands ask for it in ways of their own
_SAVED = {"saved": True, "sampling": True}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one answer. None is the default; for sampling, the checkpoint's own (generation_config.json).

    Raises:
        OptionError: a value of a wrong type or out of its range.
    """

    system: str | None = _set(None, "text", "Said before the first turn.", **_REQUEST)
    raw: bool | None = _set(None, "switch", "Complete the text: no chat template.", **_REQUEST)
    pan_and_scan: bool = _set(False, "switch", "Show wide and tall pictures in crops too.")
    continue_final_message: bool = _set(False, "switch", "The answer goes on with the last message.", **_REQUEST)
    max_tokens: int = _set(1024, "whole", "Longest answer, in tokens.", low=1)
    temperature: float | None = _set(None, "number", "0 always takes the likeliest token.", usual=1, low=0, **_SAVED)
    top_k: int | None = _set(None, "whole", "Draw from the k likeliest; 0 is off.", usual=64, low=0, **_SAVED)
    top_p: float | None = _set(None, "number", "Draw from this share; 1 is off.", usual=0.95, low=0, high=1, **_SAVED)
    min_p: float | None = _set(None, "number", "Least share of the best; 0 is off.", usual=0, low=0, high=1, **_SAVED)
    repetition_penalty: float | None = _set(None, "number", "Above 1 repeats less.", usual=1, low=0, **_SAVED)
    presence_penalty: float | None = _set(
        None, "number", "Taken from the logits of what the answer has.", usual=0, low=-2, high=2, sampling=True
    )
    frequency_penalty: float | None = _set(
        None, "number", "The same for each time that it has it.", usual=0, low=-2, high=2, sampling=True
    )
    logit_bias: Mapping[int, float] = _set(
        {}, "biases", "Added to the logit of a token, as ID=NUMBER; again for more.", low=-100, high=100, sampling=True
    )
    seed: int | None = _set(None, "whole", "The same seed, the same answer.", low=0, sampling=True)
    # Strings that end the answer, themselves left out; names of control tokens mean those too.
    stop: Sequence[str] = _set((), "texts", "Text that ends the answer; give it again for more.")
    logprobs: int | None = _set(
        None,
        "whole",
        "With --json: log-probabilities of each token and of so many of the likeliest.",
        low=0,
        high=20,
        talk=False,
        sampling=True,
    )
    # The same of the prompt's tokens, the first of which has none; the whole prompt is read then.
    prompt_logprobs: int | None = _set(
        None, "whole", "Log-probabilities of the prompt's tokens too.", low=0, high=20, **_REQUEST
    )
    adapter: str | None = _set(None, "text", "One of the adapters that were loaded, by its name.", **_REQUEST)

    # The form of the answer (runtime/forms.py): at most one of these four.
    schema: Any = _set(  # noqa: RUF009
        None, "schema", "The answer is JSON that fits this schema: a file, or the schema.", talk=False
    )
    regex: str | None = _set(None, "text", "The answer matches this regular expression.", talk=False)
    grammar: str | None = _set(None, "text", "The answer follows this grammar (Lark): a file, or itself.", talk=False)
    choices: Sequence[str] = _set(
        (), "texts", "The answer is one of these; give it again for more.", talk=False, word="choice"
    )
    free_first: int = _set(0, "whole", "Most tokens of free text before the form.", low=0, talk=False)
    tools: Sequence[Any] = _set((), "tools", "Functions that the model may ask for.", **_REQUEST)
    tool_choice: str = _set("auto", "text", "auto, none, required, or the name of the one to call.", **_REQUEST)
    parallel_tool_calls: bool = _set(True, "switch", "Whether an answer may hold several calls.", **_REQUEST)

    # Of checkpoints with a chat template of their own.
    template_args: Mapping[str, Any] = _set(
        {},
        "values",
        "A value for the chat template, as NAME=VALUE, JSON or a text; again for more.",
        word="template_arg",
    )
    source_lang: str | None = _set(None, "text", "TranslateGemma: the language of the text, as de.", word="from")
    target_lang: str | None = _set(None, "text", "TranslateGemma: the language to put it into, as en.", word="to")

    @property
    def free(self) -> bool:
        """Whether an answer may be anything; else runtime/forms.py says what it is held to."""
        form = self.schema is not None or self.regex is not None or self.grammar is not None
        return not (form or self.choices or self.tools or self.free_first)

    def declarations(self) -> list[dict[str, Any]]:
        """The tools that may be called, as the prompt says them."""
        if not self.tools or self.tool_choice == "none":
            return []
        from ..grammar.tools import read  # nobody else waits for it

        return [tool.declaration for tool in read(self.tools)]

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, argument(name, getattr(self, name), setting.kind, default_of(name)))
        if self.max_tokens < 1:
            raise OptionError("max_tokens", got=described(self.max_tokens), want="a whole number >= 1")
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= 20:
            raise OptionError("prompt_logprobs", got=described(self.prompt_logprobs), want="0 to 20")
        if not all(self.stop):
            raise OptionError("stop", got=described(list(self.stop)), want="strings that are not empty")
        if self.free_first < 0 or not all(self.choices):
            name = "choices" if self.free_first >= 0 else "free_first"
            raise OptionError(name, got=described(getattr(self, name)), want="texts that are not empty; 0 or more")
        self.sampling({})

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Options:
        """From keyword arguments.

        Raises:
            OptionError: an unknown name, or a value outside its range.
        """
        for name in values:
            if name not in SETTINGS:
                raise OptionError(f"option {name}", got="an unknown name", want=", ".join(SETTINGS))
        return cls(**values)

    def sampling(self, defaults: Mapping[str, Any]) -> Sampling:
        """What was asked for, else what generation_config.json says, else Gemma 3's published defaults."""
        from ..generation.sampling import Sampling

        values = {
            name: defaults[name]
            for name, setting in SETTINGS.items()
            if setting.saved and defaults.get(name) is not None
        }
        if defaults.get("do_sample") is False:
            values["temperature"] = 0.0
        asked = {name: getattr(self, name) for name, setting in SETTINGS.items() if setting.sampling}
        values |= {name: value for name, value in asked.items() if value is not None}
        return Sampling(**values)


_FIELDS: Mapping[str, Field[Any]] = {one.name: one for one in fields(Options)}
SETTINGS: Mapping[str, Setting] = {name: one.metadata["setting"] for name, one in _FIELDS.items()}


def default_of(name: str) -> Any:
    """What an option is when nobody says anything: None where the checkpoint decides."""
    return {} if SETTINGS[name].kind in ("biases", "values") else _FIELDS[name].default


def schema_of(name: str) -> dict[str, Any]:
    """An option as JSON Schema has it, for docs/worker.schema.json."""
    setting = SETTINGS[name]
    text = {"type": "string", "minLength": 1}
    if setting.kind == "texts":
        return {"description": setting.help, "anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": text}]}
    bounds = {"minimum": setting.low, "maximum": setting.high}
    limits = {key: value for key, value in bounds.items() if value is not None}
    if setting.kind == "schema":
        return {"description": "A JSON schema, or its text.", "type": ["object", "string", "null"]}
    if setting.kind == "tools":
        return {"description": setting.help, "type": ["array", "null"], "items": {"type": "object"}}
    if setting.kind == "biases":
        return {
            "description": "A number for each token id.",
            "type": ["object", "null"],
            "additionalProperties": {"type": "number", **limits},
        }
    if setting.kind == "values":
        return {"description": "Values for the chat template, by name.", "type": ["object", "null"]}
    types = {"text": "string", "switch": "boolean", "whole": "integer", "number": "number"}
    return {"description": setting.help, "type": [types[setting.kind], "null"], **limits}
