"""Calls of tools, read out of a whole answer: FunctionGemma's own form, and the ones that Gemma 3 is asked for.

    functiongemma   <start_function_call>call:NAME{key:<escape>text<escape>,other:[1,true]}<end_function_call> …
    gemma3          {"name": "f", "parameters": {…}} or [f(a=1), g()] as the whole answer; or in a fence
                    ``` tool_code, tool_call, json or python

What cannot be read stays text. An escaped text is never anything but a text; a bare word that is no number, truth or
null is one too. Knows nothing of tokens: control tokens stand in the text by their names.

Source: FunctionGemma's chat template, of which the first form is the inverse; Google's page on function calling for
Gemma 3 (https://ai.google.dev/gemma/docs/capabilities/function-calling). No reference implementation exists.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypedDict

from ..boundary.arguments import takes
from ..errors import OptionError

START, END, RESPONSE = "<start_function_call>", "<end_function_call>", "<start_function_response>"
ESCAPE = "<escape>"
CALL_TOKENS = (START, END, ESCAPE)  # of an answer that calls
_END_OF_TURN = "<end_of_turn>"
_HEAD = re.compile(r"\s*call:\s*([\w.\-]+)\s*(?=\{)")
_TAIL = re.compile(rf"\s*(?:{END}|(?={START}|{RESPONSE}|{_END_OF_TURN})|$)")
_STOPS = re.compile(rf"(?:{RESPONSE}|{_END_OF_TURN})\s*$")
_KEY = re.compile(r"\s*([^:{}\[\],]+?)\s*(?=:)")
_SPACE = re.compile(r"\s*")
_WHOLE = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?")
_CONSTANTS = {"null": None, "None": None}
_FENCE = re.compile(r"```(tool_code|tool_call|json|python)?[ \t]*\n(.*?)(?:\n[ \t]*```|```|\Z)", re.DOTALL)
_PYTHON_LIST = re.compile(r"\[\s*[A-Za-z_]")
_JSON_LIST = re.compile(r"\[\s*\{")


class ParsedCall(TypedDict):
    """A call as it was written."""

    name: str
    arguments: dict[str, Any]


Parsed = tuple[list[ParsedCall], str, bool]


class _NoCallError(Exception):
    """The text is no call."""


@takes(text="text", form="text")
def parse_tool_calls(text: str, form: Literal["gemma3", "functiongemma"] = "gemma3") -> Parsed:
    """The calls of an answer.

    Args:
        text: the whole answer, control tokens by their names (`tokenizer.decode(ids)`).
        form: how the model writes calls.

    Returns:
        (calls, what else was written, whether something began as a call and is none).

    Raises:
        OptionError: another form.
    """
    if form == "functiongemma":
        return _functiongemma(text)
    if form == "gemma3":
        return _gemma3(text)
    raise OptionError("form", got=repr(form), want="gemma3 or functiongemma")


def read_call(text: str) -> ParsedCall | None:
    """The call of one stretch of FunctionGemma's, from after its start token to its end token; None if it is none."""
    try:
        call, end = _call(text, 0)
    except (_NoCallError, RecursionError):
        return None
    return call if not text[end:].strip() else None


def _functiongemma(text: str) -> Parsed:
    calls: list[ParsedCall] = []
    kept: list[str] = []
    wrong, place = False, 0
    while (start := text.find(START, place)) >= 0:
        kept.append(text[place:start])
        inside = start + len(START)
        try:
            call, end = _call(text, inside)
            tail = _TAIL.match(text, end)
            if tail is None:
                _refuse()
            calls.append(call)
            place = tail.end()
        except (_NoCallError, RecursionError):
            wrong = True
            place = _behind(text, inside)
            kept.append(text[start:place])
    kept.append(text[place:])
    return calls, _STOPS.sub("", "".join(kept).rstrip()).strip(), wrong


def _behind(text: str, inside: int) -> int:
    """Where to go on behind what began as a call: after its end token, or at the next start."""
    end, start = text.find(END, inside), text.find(START, inside)
    if end >= 0 and (start < 0 or end < start):
        return end + len(END)
    return start if start >= 0 else len(text)


def _call(text: str, place: int) -> tuple[ParsedCall, int]:
    head = _HEAD.match(text, place)
    if head is None:
        _refuse()
    arguments, end = _mapping(text, head.end())
    return {"name": head[1], "arguments": arguments}, end


def _mapping(text: str, place: int) -> tuple[dict[str, Any], int]:
    """The object that opens here, and the place behind it."""
    made: dict[str, Any] = {}
    place = _skip(text, place + 1)
    if text.startswith("}", place):
        return made, place + 1
    while True:
        place = _skip(text, place)
        if text.startswith(ESCAPE, place):
            key, place = _escaped(text, place)
        else:
            found = _KEY.match(text, place)
            if found is None:
                _refuse()
            key, place = found[1].strip("\"'"), found.end()
        if not text.startswith(":", place):
            _refuse()
        made[key], place = _value(text, place + 1, ",}")
        if text[place - 1 : place] == "}":
            return made, place


def _list(text: str, place: int) -> tuple[list[Any], int]:
    made: list[Any] = []
    place = _skip(text, place + 1)
    if text.startswith("]", place):
        return made, place + 1
    while True:
        one, place = _value(text, place, ",]")
        made.append(one)
        if text[place - 1 : place] == "]":
            return made, place


def _value(text: str, place: int, ends: str) -> tuple[Any, int]:
    """A value, and the place behind the character of `ends` that follows it."""
    place = _skip(text, place)
    value: Any
    if text.startswith(ESCAPE, place):
        value, place = _escaped(text, place)
    elif text.startswith("[", place):
        value, place = _list(text, place)
    elif text.startswith("{", place):
        value, place = _mapping(text, place)
    elif text.startswith('"', place):
        try:
            value, place = json.JSONDecoder().raw_decode(text, place)
        except ValueError:
            _refuse()
    else:
        end = next((at for at in range(place, len(text)) if text[at] in ends), len(text))
        word = text[place:end]
        if ESCAPE in word:
            _refuse()
        value, place = _word(word.strip()), end
    place = _skip(text, place)
    if place >= len(text) or text[place] not in ends:
        _refuse()
    return value, place + 1


def _word(word: str) -> Any:
    if not word:
        _refuse()
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    try:
        if _WHOLE.fullmatch(word):
            return int(word)
        if _FLOAT.fullmatch(word):
            return float(word)
    except ValueError:  # thousands of digits
        return word
    return word


def _escaped(text: str, place: int) -> tuple[str, int]:
    start = place + len(ESCAPE)
    end = text.find(ESCAPE, start)
    if end < 0:
        _refuse()
    return text[start:end], end + len(ESCAPE)


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found is not None else place


def _refuse() -> NoReturn:
    raise _NoCallError


def _gemma3(text: str) -> Parsed:
    calls: list[ParsedCall] = []
    kept: list[str] = []
    wrong, place = False, 0
    text = re.sub(rf"{_END_OF_TURN}\s*$", "", text)
    for fence in _FENCE.finditer(text):
        kind, code = fence[1], fence[2].strip()
        kept.append(text[place : fence.start()])
        try:
            as_json = code[:1] in ("{", "[") and kind != "tool_code" and not _PYTHON_LIST.match(code)
            calls += _json(code) if as_json else _python(code)
        except _NoCallError:
            wrong = wrong or kind in ("tool_code", "tool_call")
            kept.append(fence[0])
        place = fence.end()
    kept.append(text[place:])
    if not calls and not wrong:
        whole = text.strip()
        try:
            if whole[:1] == "{" or _JSON_LIST.match(whole):
                return _json(whole), "", False
            if whole[:1] == "[":
                return _python(whole), "", False
        except _NoCallError:
            pass
    return calls, "".join(kept).strip(), wrong


def _json(code: str) -> list[ParsedCall]:
    found = _parsed(code)
    calls: list[ParsedCall] = []
    for one in found if isinstance(found, list) else [found]:
        inner = one.get("function") if isinstance(one, Mapping) else None
        call = inner if isinstance(inner, Mapping) else one
        if not isinstance(call, Mapping) or not isinstance(name := call.get("name"), str):
            _refuse()
        given = call.get("parameters", call.get("arguments", {}))
        given = _parsed(given) if isinstance(given, str) else given
        if not isinstance(given, dict):
            _refuse()
        calls.append({"name": name, "arguments": given})
    if not calls:
        _refuse()
    return calls


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        _refuse()


def _python(code: str) -> list[ParsedCall]:
    """Calls as Python writes them, with keyword arguments that are literals. Nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape in a text
            statements = ast.parse(code.strip()).body
        calls = [_python_call(node) for statement in statements for node in _nodes(statement)]
        json.dumps(calls)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        _refuse()
    if not calls:
        _refuse()
    return calls


def _nodes(statement: ast.stmt) -> list[ast.expr]:
    if not isinstance(statement, ast.Expr):
        _refuse()
    return statement.value.elts if isinstance(statement.value, ast.List) else [statement.value]


def _python_call(node: ast.expr) -> ParsedCall:
    if not isinstance(node, ast.Call):
        _refuse()
    name = _name(node.func)
    if name == "print" and len(node.args) == 1 and not node.keywords:
        return _python_call(node.args[0])
    if node.args:
        _refuse()
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            _refuse()
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return {"name": name, "arguments": arguments}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    _refuse()
