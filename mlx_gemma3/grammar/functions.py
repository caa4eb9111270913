"""The grammar of FunctionGemma's calls: words, or calls between its own tokens, each with arguments of its schema.

    <start_function_call>call:NAME{key:<escape>text<escape>,list:[1,2],open:true}<end_function_call>

Keys stand in the order in which the model was shown them, sorted without regard to case; those that are not required
may be left out. Of a schema the kinds of values, enum, const, properties, required, items, anyOf and references are
held; ranges, patterns and lengths are not. What a grammar lets through, prompt/tool_calls.py reads.

Source: FunctionGemma's chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import OptionError
from ..prompt.tokenizer import Tokenizer
from ..prompt.tool_calls import END, ESCAPE, START
from .tools import Tool

_BARE = re.compile(r"[^\s:{}\[\],\"'<]+(?: [^\s:{}\[\],\"'<]+)*")  # keys that need no escape
_TEXT = f"TEXT: /(.|\\n)+/ & ~/(.|\\n)*({START}|{END}|{ESCAPE})(.|\\n)*/"
_FREE = (
    "any: text | NUMBER | TRUTH | NULL | any_list | any_object",
    'any_list: "[" (any ("," any)*)? "]"',
    'any_object: "{" (NAME ":" any ("," NAME ":" any)*)? "}"',
    "NAME: /[A-Za-z_][A-Za-z0-9_-]{0,63}/",
    "NUMBER: /-?(0|[1-9][0-9]{0,15})(\\.[0-9]{1,15})?(e[+-]?[0-9]{1,2})?/",
    "WHOLE: /-?(0|[1-9][0-9]{0,15})/",
    'TRUTH: "true" | "false"',
    'NULL: "null"',
    _TEXT,
)
_KINDS = {"integer": "WHOLE", "number": "NUMBER", "boolean": "TRUTH", "null": "NULL", "string": "text"}
_DEEPEST = 64


def lark(tools: Sequence[Tool], tokenizer: Tokenizer, *, choice: str, parallel: bool) -> str:
    """The grammar of an answer.

    Args:
        choice: "auto": words or calls; "required": calls; or the name of the one to call.
        parallel: whether it may hold several calls.

    Raises:
        OptionError: no tool of that name.
    """
    chosen = [tool for tool in tools if choice in ("auto", "required", tool.name)]
    if not chosen:
        raise OptionError("tool_choice", got=choice, want="auto, none, required, or a tool's name")
    rules = _Rules(tokenizer)
    calls = "call+" if parallel else "call"
    rules.add("start", f"TEXT | {calls}" if choice == "auto" else calls)
    heads = [f"{json.dumps(f'call:{tool.name}')} {rules.members(tool.parameters, tool.parameters)}" for tool in chosen]
    rules.add("call", f"{rules.token(START)} ({' | '.join(heads)}) {rules.token(END)}")
    rules.add("text", f"{rules.token(ESCAPE)} TEXT? {rules.token(ESCAPE)}")
    return "\n".join([*rules.lines, *_FREE]) + "\n"


class _Rules:
    """Rules of a grammar as they come up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.lines: list[str] = []
        self._tokenizer, self._count = tokenizer, 0
        self._references: dict[tuple[int, str], str] = {}

    def token(self, name: str) -> str:
        return f"<[{self._tokenizer.id(name)}]>"

    def add(self, name: str, body: str) -> str:
        self.lines.append(f"{name}: {body}")
        return name

    def new(self, body: str) -> str:
        self._count += 1
        return self.add(f"r{self._count}", body)

    def value(self, schema: Any, root: Mapping[str, Any], depth: int = 0) -> str:
        """What matches a value of a schema."""
        if not isinstance(schema, Mapping) or depth > _DEEPEST:
            return "any"
        if isinstance(reference := schema.get("$ref"), str):
            return self._referred(reference, root, depth)
        if "const" in schema:
            return self.literal(schema["const"])
        if isinstance(given := schema.get("enum"), list) and given:
            return "(" + " | ".join(map(self.literal, given)) + ")"
        for key in ("anyOf", "oneOf"):
            if isinstance(given := schema.get(key), list) and given:
                return "(" + " | ".join(self.value(one, root, depth + 1) for one in given) + ")"
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            return "(" + " | ".join(self.value({**schema, "type": one}, root, depth + 1) for one in kind) + ")"
        kind = kind.lower() if isinstance(kind, str) else "object" if "properties" in schema else None
        if kind == "array":
            item = self.value(schema.get("items"), root, depth + 1)
            return f'("[" ({item} ("," {item})*)? "]")'
        if kind == "object":
            return self.members(schema, root, depth)
        return _KINDS.get(kind or "", "any")

    def _referred(self, reference: str, root: Mapping[str, Any], depth: int) -> str:
        known = (id(root), reference)
        if known not in self._references:
            found: Any = root
            for part in reference.removeprefix("#").strip("/").split("/"):
                part = part.replace("~1", "/").replace("~0", "~")
                found = found.get(part) if isinstance(found, Mapping) and part else found
            self._count += 1
            name = self._references[known] = f"r{self._count}"  # before it is made: it may hold itself
            self.add(name, self.value(found, root, depth + 1))
        return self._references[known]

    def members(self, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> str:
        """What matches an object: its braces, and its properties in order."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return '"{" "}"' if properties is not None and depth == 0 else "any_object"
        required = schema.get("required")
        required = set(map(str, required)) if isinstance(required, list) else set()
        names = sorted(properties, key=lambda name: str(name).lower())
        alone = after = ""  # what may still follow where nothing was written yet, and where something was
        for name in reversed(names):
            one = f"{self._key(str(name))} {self.value(properties[name], root, depth + 1)}"
            first, next_one = f"{one} {after}".rstrip(), f'"," {one} {after}'.rstrip()
            if str(name) in required:
                alone, after = self.new(first), self.new(next_one)
            else:
                alone = self.new(f"{first} | {alone}" if alone else f"({first})?")
                after = self.new(f"{next_one} | {after}" if after else f"({next_one})?")
        return f'"{{" {alone} "}}"'

    def _key(self, name: str) -> str:
        if _BARE.fullmatch(name):
            return json.dumps(f"{name}:", ensure_ascii=False)
        return f'{self._escaped(name)} ":"'

    def literal(self, value: Any) -> str:
        """What matches this value alone."""
        if isinstance(value, str):
            return self._escaped(value)
        if value is None:
            return "NULL"
        if isinstance(value, list):
            return '"[" ' + ' "," '.join(map(self.literal, value)) + ' "]"'
        if isinstance(value, Mapping):
            inner = ' "," '.join(f"{self._key(str(name))} {self.literal(one)}" for name, one in value.items())
            return f'"{{" {inner} "}}"'
        return json.dumps(json.dumps(value))

    def _escaped(self, text: str) -> str:
        inner = json.dumps(text, ensure_ascii=False) if text else ""
        return f"({self.token(ESCAPE)} {inner} {self.token(ESCAPE)})"
