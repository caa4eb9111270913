"""Calls of tools read out of whole answers, in FunctionGemma's form and in Gemma 3's."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mlx_gemma3 as g3
from mlx_gemma3.errors import OptionError

S, E, R, Q = "<start_function_call>", "<end_function_call>", "<start_function_response>", "<escape>"


def call(inside: str) -> str:
    return f"{S}call:{inside}{E}"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("f{}", {}),
        (f"f{{a:{Q}x, }}{{ y{Q},b:-1,c:2.50,d:1e3,e:TRUE,f:None,g:null}}",
         {"a": "x, }{ y", "b": -1, "c": 2.5, "d": 1000.0, "e": True, "f": None, "g": None}),
        (f"f{{a:{Q}15{Q},b:{Q}true{Q},c:{Q}{Q}}}", {"a": "15", "b": "true", "c": ""}),
        (f"f{{ a : [ 1 , {Q}b{Q} , [] , {{}} ] , {Q}k:{Q}: word here }}", {"a": [1, "b", [], {}], "k:": "word here"}),
        ('f{a:"x\\n, y",b:{c:{d:[{e:1}]}}}', {"a": "x\n, y", "b": {"c": {"d": [{"e": 1}]}}}),
        ("f{a:1,a:2}", {"a": 2}),
    ],
)  # fmt: skip
def test_functiongemmas_values(text: str, arguments: dict[str, Any]) -> None:
    found = g3.parse_tool_calls(call(text), form="functiongemma")
    assert found == ([{"name": "f", "arguments": arguments}], "", False)
    assert json.dumps(found[0][0]["arguments"]) == json.dumps(arguments), "true is not 1"


@pytest.mark.parametrize(
    ("text", "names", "content", "wrong"),
    [
        ("no call", [], "no call", False),
        (f"Sure. {call('a{}')} Done.<end_of_turn>\n", ["a"], "Sure.  Done.", False),
        (call("a{x:1}") + call("b.c-d{}") + R, ["a", "b.c-d"], "", False),
        (f"{S}call:a{{x:1}}", ["a"], "", False),
        (f"{S}call:a{{x:1}}{call('b{}')}", ["a", "b"], "", False),
        (f"{S}call:a{{x:{Q}open", [], f"{S}call:a{{x:{Q}open", True),
        (call("a{x}") + call("b{}"), ["b"], call("a{x}"), True),
        (call("{a:1}"), [], call("{a:1}"), True),
        (call("a{x:1,}"), [], call("a{x:1,}"), True),
        (call(f"a{{x:b{Q}c{Q}}}"), [], call(f"a{{x:b{Q}c{Q}}}"), True),
        (call("a{x:1} please"), [], call("a{x:1} please"), True),
        (f"{S}call:a{{x:" + "[" * 50_000, [], f"{S}call:a{{x:" + "[" * 50_000, True),
    ],
)
def test_functiongemmas_answers(text: str, names: list[str], content: str, wrong: bool) -> None:
    calls, said, error = g3.parse_tool_calls(text, form="functiongemma")
    assert ([one["name"] for one in calls], said, error) == (names, content, wrong)


@pytest.mark.parametrize(
    ("text", "calls", "content", "wrong"),
    [
        ("[f(a=1, b=[True, None], c={'k': 'v'}), g()]",
         [("f", {"a": 1, "b": [True, None], "c": {"k": "v"}}), ("g", {})], "", False),
        ('{"name": "f", "parameters": {"x": 1}}', [("f", {"x": 1})], "", False),
        ('[{"name": "f", "arguments": "{\\"x\\": 1}"}, {"function": {"name": "g"}}]',
         [("f", {"x": 1}), ("g", {})], "", False),
        ("a\n```tool_code\nprint(x.y(z='1'))\n```\nb<end_of_turn>", [("x.y", {"z": "1"})], "a\n\nb", False),
        ("```python\nprint(1)\n```", [], "```python\nprint(1)\n```", False),
        ("```tool_call\nno\n```", [], "```tool_call\nno\n```", True),
        ("[f(1)]", [], "[f(1)]", False),
        ("[f(**x)]", [], "[f(**x)]", False),
        ("[f(a=b)]", [], "[f(a=b)]", False),
        ("[f(a={1, 2})]", [], "[f(a={1, 2})]", False),
        ("[f(a=__import__('os'))]", [], "[f(a=__import__('os'))]", False),
        ("[" * 5000, [], "[" * 5000, False),
        ("f(a=1)", [], "f(a=1)", False),
    ],
)  # fmt: skip
def test_gemma_3s_answers(text: str, calls: list[tuple[str, Any]], content: str, wrong: bool) -> None:
    found, said, error = g3.parse_tool_calls(text)
    assert ([(one["name"], one["arguments"]) for one in found], said, error) == (calls, content, wrong)


def test_another_form_is_refused() -> None:
    with pytest.raises(OptionError, match="gemma3 or functiongemma"):
        g3.parse_tool_calls("", form="hermes")  # type: ignore[arg-type]
