"""Chat templates of others: programs in Jinja, run in its sandbox, with a bound on what they take.

Owns the environment (filters, globals, extensions) and the bounds. Knows nothing of messages or files.

A template comes with a checkpoint from anywhere. Jinja's sandbox keeps it from Python's insides; against one that never
ends, or asks for all memory, stand two more bounds. Time: it runs in a thread that is interrupted at a deadline.
Memory: no value may weigh more than MOST (characters, and elements of all that it holds, counted as a tree), and
nothing that takes more time or memory than its operands weigh is begun before what comes of it was reckoned. So each
step of Python's own that an interrupt has to wait for is short.

Source: transformers 5.23, utils/chat_template_utils.py (environment), Jinja 3.1.6 (sandbox.py, compiler.py).
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import jinja2
import jinja2.meta
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension

from ..errors import TemplateError

MOST = 16 << 20  # of one value: characters and elements
_ELEMENT = 16  # what an element of a list weighs, in characters
SECONDS = 1.0  # of one rendering
_COMPILING = 5.0  # seconds: a template is no longer than template_files.py lets it be, and is compiled once
_SPENT = 20 * MOST  # of all values that one rendering makes
_INTEGER_BITS = 100_000
_NUMBER = re.compile(r"\d+")

T = TypeVar("T")


class Rendered(NamedTuple):
    """What a template wrote, and the ranges of characters in its {% generation %} blocks."""

    text: str
    generation: list[tuple[int, int]]


class Program:
    """A compiled template.

    Raises:
        TemplateError: it is no Jinja, or takes too long to compile.
    """

    def __init__(self, text: str) -> None:
        environment = _environment()
        self._template: jinja2.Template
        self._template, tree = _bounded(lambda: (environment.from_string(text), environment.parse(text)), _COMPILING)
        literals = {node.data for node in tree.find_all(nodes.TemplateData)}
        literals |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self.literals = "\0".join(sorted(literals))  # all that it writes by itself
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
        self.assigned = frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "store")

    def render(self, *values: Mapping[str, Any]) -> list[Rendered]:
        """What it writes for each of these values, all of them within the time of one.

        Raises:
            TemplateError: what it raised, in its own words, or a bound that it went over.
        """
        return _bounded(lambda: [self._render(one) for one in values])

    def _render(self, values: Mapping[str, Any]) -> Rendered:
        state.spent, state.blocks, state.generation = 0, [], []
        for block in self._template.generate(**values):
            _spend(len(block))
            state.blocks.append(block)
        return Rendered("".join(state.blocks), state.generation)


class _State(threading.local):
    """Of the rendering in this thread."""

    spent = 0
    blocks: list[str]
    generation: list[tuple[int, int]]


state = _State()


class _TooLong(BaseException):
    """Raised in a thread whose time is over; no `except Exception` of Jinja's holds it up."""


class _TooMuchError(Exception):
    """More than a template may ask for."""


@functools.lru_cache(16)
def compiled(text: str) -> Program:
    """The program of a template; compiled once. Raises TemplateError."""
    return Program(text)


def _bounded(work: Callable[[], T], seconds: float = SECONDS) -> T:
    """Do it in a thread of its own, which is interrupted when it takes too long. Raises TemplateError."""
    found: list[T] = []
    wrong: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # told in the caller's thread
            wrong.append(error)

    thread = threading.Thread(target=run, name="chat template", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TooLong))
        thread.join(0.2)
    if found:
        return found[0]
    error = wrong[0] if wrong else _TooLong()
    if isinstance(error, _TooLong):
        raise TemplateError("chat template", got=f"no end after {seconds} seconds", want="one that ends") from None
    if isinstance(error, _TooMuchError | MemoryError):
        raise TemplateError(
            "chat template", got=str(error) or "no memory", want=f"at most {MOST:,} characters"
        ) from None
    if isinstance(error, RecursionError):
        raise TemplateError("chat template", got="calls or lists nested too deep", want="one that ends") from None
    if isinstance(error, jinja2.TemplateSyntaxError):
        got = f"line {error.lineno}: {error.message}"
        raise TemplateError("chat template", got=got, want="a template that Jinja 2 reads") from None
    if isinstance(error, Exception):
        raise TemplateError(
            str(error) or type(error).__name__, do="the checkpoint's own chat template says so"
        ) from None
    raise error


def _spend(count: int) -> None:
    state.spent += count
    if count > MOST or state.spent > _SPENT:
        raise _TooMuchError(f"{max(count, state.spent):,} characters or elements")


def _weight(value: Any) -> int:
    """Characters and elements of a value, all that it holds counted each time that it holds it."""
    if isinstance(value, str | bytes):
        return len(value) + 1
    total, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        total += _ELEMENT + (len(one) if isinstance(one, str | bytes | range) else 0)
        if isinstance(one, int) and not isinstance(one, bool):
            total += one.bit_length() // 8
        if isinstance(one, _Namespace):
            one = one._Namespace__attrs  # what Jinja lets through by this name alone
        if isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        if total + _ELEMENT * len(waiting) > MOST:
            raise _TooMuchError(f"a value of more than {MOST:,} characters or elements")
    return total


def _reckon(count: int) -> None:
    """Refuse what would become too large before it is made."""
    if count > MOST:
        raise _TooMuchError(f"{count:,} characters or elements")


def _made(value: T) -> T:
    """Count a value that was made."""
    if isinstance(value, str | bytes):
        _spend(len(value))
    elif isinstance(value, list | tuple | dict | set | frozenset):
        _weight(value)
        _spend(len(value))
    return value


def _widths(form: str, sign: str, given: Any) -> None:
    """Reckon with what a text with places in it becomes."""
    most = max([0, *(int(number[:12]) for number in _NUMBER.findall(form))])
    whole = [one for one in _flat(given) if isinstance(one, int)]
    most = max([most, *(abs(one) for one in whole)]) if "*" in form or "{" in form.replace("{{", "")[1:] else most
    _reckon(len(form) + form.count(sign) * (most + _weight(given)))


def _flat(given: Any) -> Iterable[Any]:
    return given.values() if isinstance(given, Mapping) else given if isinstance(given, tuple | list) else (given,)


def _check_call(name: str, subject: Any, args: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Refuse a method or filter that would make too much of what it is given."""
    given = [*args, *options.values()]
    numbers = [one for one in given if isinstance(one, int) and not isinstance(one, bool)]
    for number in numbers:
        _reckon(abs(number))
    text = subject if isinstance(subject, str | bytes) else None
    if name == "replace" and len(given) > 1:
        subject = text if text is not None else str(subject)
        old, new = given[:2]
        if isinstance(old, str | bytes) and isinstance(new, str | bytes):
            _reckon(len(subject) + (len(subject) // max(len(old), 1) + 1) * len(new))
    elif name == "join":
        both = (subject, *given)
        parts = next((one for one in both if isinstance(one, list | tuple | Mapping)), None)
        glue = next((one for one in both if isinstance(one, str | bytes)), "")
        _reckon(_weight(subject) + sum(map(_weight, given)) + len(glue) * len(parts if parts is not None else glue))
    elif name in ("expandtabs", "indent", "wordwrap", "translate"):
        _reckon(_weight(subject) + len(text or "") * max([0, *numbers, *(_weight(one) for one in given)]))
    elif name == "urlize":
        _reckon(_weight(subject) * 1000)
    elif name == "tojson":
        _reckon(_weight(subject) * (1 + max([0, *numbers])) + _weight(given) * _weight(subject))
    elif name == "sum" and any(not isinstance(one, int | float | str) for one in given):
        _reckon(_weight(subject) ** 2 // 2)
    elif name in ("string", "pprint", "format"):
        _weight(subject)
        if name == "format" and isinstance(text, str):
            _widths(text, "%", tuple(given))


class _Code(CodeGenerator):
    """What templates become: joining with `~`, and lists, pass through the environment, which counts."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._counted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _counted(self, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.counted(")
        visit(node, frame)
        self.write(")")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)
    counted = staticmethod(_made)

    @staticmethod
    def joined(parts: Sequence[Any]) -> str:
        """`a ~ b`."""
        _reckon(sum(map(_weight, parts)))
        return _made("".join(map(str, parts)))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """What a macro or a block wrote."""
        parts = list(parts)
        _reckon(sum(map(len, parts)))
        return _made("".join(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _INTEGER_BITS:
                raise _TooMuchError(f"a number of {bits:,} bits")
        elif operator == "*":
            for many, few in ((left, right), (right, left)):
                if isinstance(few, int) and not isinstance(many, int | float):
                    _reckon(_weight(many) * max(few, 0))
        elif operator == "+":
            if isinstance(left, str | list | tuple | bytes):
                _reckon(len(left) + (len(right) if hasattr(right, "__len__") else 0))
        elif operator == "%" and isinstance(left, str | bytes):
            _widths(left if isinstance(left, str) else left.decode("latin-1"), "%", right)
        return _made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        @functools.wraps(inner)
        def counted(*args: Any, **options: Any) -> Any:
            _widths(str(value.__self__), "{", [*args, *options.values()])
            return _made(inner(*args, **options))

        return counted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (a template's own)
        subject = getattr(__obj, "__self__", None)
        if isinstance(subject, str | bytes | int | float | list | tuple | Mapping):
            _check_call(getattr(__obj, "__name__", ""), subject, args, kwargs)
        elif __obj is jinja2.utils.generate_lorem_ipsum:
            _check_call("lipsum", "", args, kwargs)
        return _made(super().call(__context, __obj, *args, **kwargs))


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that reckons first and counts afterwards."""
    skipped = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def counted(*args: Any, **options: Any) -> Any:
        if len(args) > skipped:
            _check_call(name, args[skipped], args[skipped + 1 :], options)
        return _made(function(*args, **options))

    return counted


def _finalize(value: Any) -> Any:
    """Weigh what is to be printed: text is made of it next."""
    if not isinstance(value, str):
        _weight(value)
    return value


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the model wrote."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    @jinja2.pass_eval_context
    def _written(self, _: Any, caller: Callable[[], str]) -> str:
        text = caller()
        start = sum(map(len, state.blocks))
        state.generation.append((start, start + len(text)))
        return text


class _Dict:
    """`dict(…)` and `dict.fromkeys(…)`, and nothing else of it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(…)`, without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        made, rest = args[0], args[1:]
        given = dict(*rest, **values)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(made, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
            "Please rename the attribute."
        )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where Jinja's own filter writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return now().strftime(form)


def now() -> datetime:
    """Local time, as `strftime_now` has it."""
    return datetime.now()


@functools.cache
def _environment() -> jinja2.Environment:
    made = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], finalize=_finalize
    )
    made.filters["tojson"] = _tojson
    made.filters = {name: _counted_filter(name, function) for name, function in made.filters.items()}
    made.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
    return made
