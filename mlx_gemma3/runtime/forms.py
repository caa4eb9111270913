"""What an answer is held to, by the options of its request: a schema, a regex, a grammar, choices, or tools."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from typing import Any

from ..errors import OptionError
from ..generation.constraint import Constraint
from ..grammar import functions, hints, schema, tools
from ..grammar.matcher import Grammar, Matcher
from .loaded import Loaded
from .options import Options

_FORMS = ("schema", "regex", "grammar", "choices")


class Form:
    """What the options ask of an answer's form. Compiled when it first begins an answer, then kept."""

    def __init__(self, options: Options) -> None:
        """
        Raises:
            OptionError: two forms at once, a form that is none, or one beside an option that would break it.
        """
        asked = [name for name in _FORMS if getattr(options, name) not in (None, ())]
        self.tools = tools.read(options.tools) if options.tools and options.tool_choice != "none" else []
        if len(asked) > 1 or (asked and self.tools):
            both = " and ".join([*asked, *(["tools"] if self.tools else [])])
            raise OptionError(both, got="both", want="one of them")
        self.name = asked[0] if asked else "tools" if self.tools else None
        if asked and options.stop:
            raise OptionError("stop", got=f"texts beside {self.name}", want="none: the form says where it ends")
        if options.free_first and not asked:
            raise OptionError("free_first", got=options.free_first, want="a form that follows: " + ", ".join(_FORMS))
        self._options = options
        self.text = self._text()

    def compile(self, loaded: Loaded) -> None:
        """Make the grammar; takes a second or two for the first of a model. For any thread but the engine's.

        Raises:
            OptionError: no answer can be held to it, or llguidance is not installed.
        """
        options = self._options
        if self.name == "tools" and loaded.form == "functiongemma":
            text = functions.lark(
                self.tools, loaded.tokenizer, choice=options.tool_choice, parallel=options.parallel_tool_calls
            )
            self._grammar = Grammar(loaded.tokenizer, text, self.name, loaded.call_ids)
        elif self.text is not None:
            self._grammar = Grammar(loaded.tokenizer, self.text, self.name or "form")

    def start(self, loaded: Loaded, ends: Collection[int]) -> Matcher | None:
        """What one answer is held to; None where it is free. Compiled before."""
        if self.text is None:
            return None
        rows = loaded.config.text.vocab_size
        return self._grammar.start(ends, rows=rows, free_first=self._options.free_first)

    def parsed(self, held: Constraint | None) -> Any:
        """What is told as `parsed` of an answer that is whole, by what it was held to: plain types."""
        assert isinstance(held, Matcher), "made by start"
        text = held.text
        if self.name == "schema":
            try:
                return schema.parsed(text)
            except ValueError:  # a number of thousands of digits
                return None
        return text

    @cached_property
    def _model(self) -> type | None:
        return self._options.schema if hints.is_model(self._options.schema) else None

    def _text(self) -> str | None:
        options = self._options
        if self.name == "tools":
            return tools.lark(self.tools, choice=options.tool_choice, parallel=options.parallel_tool_calls)
        if self.name == "schema":
            return schema.lark(options.schema if self._model is None else hints.schema_of(self._model))
        if self.name == "regex":
            return f"start: {_regex(options.regex or '')}\n"
        if self.name == "choices":
            return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in options.choices) + "\n"
        return options.grammar


def _regex(pattern: str) -> str:
    """A regular expression between the slashes that Lark has around it."""
    made, escaped = "", False
    for letter in pattern:
        made += {"/": "/" if escaped else "\\/", "\n": "n" if escaped else "\\n"}.get(letter, letter)
        escaped = letter == "\\" and not escaped
    return f"/{made}/"
