"""Rows to sequences of tokens, and which of them count: what the model is to say, or all of it.

    <bos> <start_of_turn> user … <end_of_turn> <start_of_turn> model  a red hexagon <end_of_turn>
      .         .           .         .              .          .     #  #    #           #        counts: assistant
      .         #           #         #              #          #     #  #    #           #        counts: all

A picture's rows never count. What is too long is cut at its end, before a picture that would be cut in two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from ..config import Config
from ..errors import DataError, Gemma3Error, PromptError
from ..prompt import messages as written
from ..prompt.chat_template import REASONING
from ..prompt.processor import Processor, Prompt
from ..prompt.snapshot import pictures as listed_pictures
from ..prompt.vocabulary import END_OF_TURN, START_OF_IMAGE, START_OF_TURN
from .data import Data, Problem, Row, form_of, refuse
from .forward import Sample

# Parts of an answer beside its words, which would be left out in silence.
_NOT_LEARNT = {"tool_calls": "calls", **dict.fromkeys(REASONING, "thoughts")}
Pixels = npt.NDArray[np.float32]
See = Callable[[Pixels], str]  # keeps a picture (S, S, 3) and names it


@dataclass(frozen=True, eq=False)
class Item:
    """One example as the model is trained on it: a sequence, or the chosen and the rejected one."""

    row: Row
    samples: tuple[Sample, ...]

    @property
    def length(self) -> int:
        return sum(len(one.tokens) for one in self.samples)

    @property
    def count(self) -> int:
        return sum(int(one.counts.sum()) for one in self.samples)


@dataclass(frozen=True, eq=False)
class Encoded:
    """All items of some data, in its order."""

    items: list[Item]
    preferences: bool
    truncated: int  # items that were cut


class Encoder:
    """Makes items for one checkpoint."""

    def __init__(
        self, processor: Processor, config: Config, *, instruct: bool, max_length: int, loss_on: str = "assistant"
    ) -> None:
        """
        Args:
            instruct: tuned for chat: prompt and completion are turns.
            max_length: tokens of a sequence, at most.
            loss_on: "assistant" or "all".
        """
        self.processor, self.config, self.instruct = processor, config, instruct
        self.max_length, self.loss_on = max_length, loss_on
        self._own = processor.template is not None  # turns as the checkpoint's own template has them
        self._read = written.kept if self._own else written.read
        tokenizer = processor.tokenizer
        self._eos = config.eos_token_ids[0]
        self._turn, self._end = (tokenizer.id(name) for name in (START_OF_TURN, END_OF_TURN))
        self._opening = tokenizer.encode("model\n", special=False)
        self._line = tokenizer.encode("\n", special=False)

    def encode(self, data: Data, see: See, progress: Callable[[int, int], None] = lambda done, total: None) -> Encoded:
        """Every row, or one error that names every line that cannot be learnt from.

        Args:
            see: called with each picture.

        Raises:
            DataError: lines that cannot be learnt from; preferences among other rows.
        """
        problems, items, cut = list(data.problems), list[Item](), 0
        kinds: dict[bool, int] = {}
        for number, row in enumerate(data.rows):
            progress(number, len(data.rows))
            kinds.setdefault(form_of(row.values) == "preference", row.line)
            try:
                made, shorter = self._item(row, see)
            except Gemma3Error as error:
                problems.append(Problem(row.line, str(error)))
                continue
            items += made
            cut += shorter
        total = len(data.rows) + len(data.problems)
        if len(kinds) > 1:
            problems.append(Problem(max(kinds.values()), "preferences and other rows in one file"))
        refuse(data.name, sorted(problems, key=lambda problem: problem.line), total)
        if not items:
            raise DataError(f"data {data.name}", got="no rows", want="lines to learn from")
        return Encoded(items, True in kinds, cut)

    def pixels(self, row: Row) -> list[Pixels]:
        """The pictures of a row again, in the order of its samples."""
        found: list[Pixels] = []

        def keep(pixels: Pixels) -> str:
            found.append(pixels)
            return ""

        self._item(row, keep)
        return found

    def _item(self, row: Row, see: See) -> tuple[list[Item], int]:
        values, form = row.values, form_of(row.values)
        images = self._images(values, row.folder)
        if form == "text":
            return self._text(row, images, see)
        if form == "preference":
            asked = values["messages"] if "messages" in values else values["prompt"]
            chats = [self._answered(asked, values[name], name, row.folder) for name in ("chosen", "rejected")]
            if chats[0] == chats[1]:
                raise PromptError("rejected", got="the same as chosen", want="another answer")
        elif form == "completion":
            prompt, completion = (_words(values, name) for name in ("prompt", "completion"))
            if not completion.strip():
                raise PromptError("completion", got="no words", want="an answer")
            if not self.instruct:
                return self._completion(row, prompt, completion, images, see)
            chats = [self._answered(prompt, completion, "completion", row.folder)]
        else:
            chats = [_resolved(self._read(values["messages"]), row.folder)]
        made = [self._chat(chat, images, see, last=form != "messages") for chat in chats]
        samples = tuple(sample for sample, _ in made)
        return [Item(row, samples)], int(any(cut for _, cut in made))

    def _images(self, values: Mapping[str, Any], folder: Path) -> list[Any]:
        if "image" in values and "images" in values:
            raise PromptError("image", got="a column images too", want="one of them")
        given = values.get("images", values.get("image"))
        if isinstance(given, Mapping):
            given = [given]
        found = []
        for one in listed_pictures(given):
            source = one
            if isinstance(one, Mapping):  # as the Hub's data sets keep them
                source = one.get("bytes") or one.get("path") or one.get("url")
            found.append(_placed(source, folder))
        return found

    def _answered(self, asked: Any, answer: Any, name: str, folder: Path) -> list[dict[str, Any]]:
        """A chat that ends with an answer; both may be a text or messages."""
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        answers = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        for part, what in ((turns, "prompt"), (answers, name)):
            if not isinstance(part, Sequence) or isinstance(part, bytes) or not part:
                raise PromptError(what, got=type(part).__name__, want="a text or messages")
        return _resolved(self._read([*turns, *answers]), folder)

    def _chat(self, chat: Any, images: list[Any], see: See, *, last: bool) -> tuple[Sample, bool]:
        """
        Args:
            last: only the last answer counts.
        """
        if not self._own:
            written.check_roles(chat)
        roles = [message.get("role") for message in chat]
        answers = [n for n, role in enumerate(roles) if role in ("assistant", "model")]
        if not answers or answers[-1] != len(roles) - 1:
            raise PromptError("last message", got=roles[-1] if roles else "none", want="the assistant's")
        for number in answers:
            if not _has_words(chat[number].get("content")):
                raise PromptError(f"message {number + 1}", got="no words", want="an answer")
            for key, what in _NOT_LEARNT.items():
                if chat[number].get(key):
                    want = f"words alone, for {what} are not learnt"
                    raise PromptError(f"message {number + 1}: {key}", got="a value", want=want)
        missing = len(images) - sum(item.get("type") == "image" and "image" not in item for item in _items(chat))
        if missing > 0:
            chat = _with_pictures(chat, missing)
        prompt = self.processor.prepare(chat, images, special=False, add_generation_prompt=False)
        runs = self._answers(prompt)
        if self._own and [prompt.tokens[start:stop] for start, stop in runs] != [self._given(chat[n]) for n in answers]:
            # TranslateGemma's puts a line of blanks before past answers, which is not to be learnt
            if not last and len(answers) > 1:
                raise PromptError(
                    "answers", got=f"{len(answers)}, which the template writes otherwise than the model gives them",
                    want="one", do="make a line of each, with what was said before",
                )  # fmt: skip
            prompt = self.processor.prepare(chat[:-1], images, special=False)
            ids = [*prompt.tokens, *self._given(chat[-1])]
            return self._sample(np.array(ids, np.int32), np.arange(len(ids)) >= len(prompt.tokens), prompt, see)
        if len(runs) != len(answers):
            raise PromptError("answers", got=f"{len(runs)} turns of the model", want=f"{len(answers)}")
        tokens = np.array(prompt.tokens, np.int32)
        counts = np.zeros(len(tokens), bool)
        for start, stop in runs[-1:] if last else runs:
            counts[start:stop] = True
        end = runs[-1][1]
        return self._sample(tokens[:end], counts[:end], prompt, see)

    def _given(self, message: Mapping[str, Any]) -> list[int]:
        """An answer as the model gives it, to the end of its turn."""
        text = "".join(item.get("text", "") for item in written.items(message["content"]))
        return [*self.processor.tokenizer.encode(text.strip(), special=False), self._end]

    def _answers(self, prompt: Prompt) -> list[tuple[int, int]]:
        """Where the model's turns stand: what follows their opening, with the token that ends them."""
        tokens, found = prompt.tokens, []
        for place, token in enumerate(tokens):
            first = place + 1 + len(self._opening)
            if token == self._turn and tokens[place + 1 : first] == self._opening and self._end in tokens[first:]:
                found.append((first, tokens.index(self._end, first) + 1))
        return found

    def _completion(
        self, row: Row, prompt: str, completion: str, images: list[Any], see: See
    ) -> tuple[list[Item], int]:
        made = self.processor.prepare(_with_places(prompt, images), images, special=False)
        ids = [*made.tokens, *self.processor.tokenizer.encode(completion, special=False), self._eos]
        counts = np.arange(len(ids)) >= len(made.tokens)
        sample, cut = self._sample(np.array(ids, np.int32), counts, made, see)
        return [Item(row, (sample,))], int(cut)

    def _text(self, row: Row, images: list[Any], see: See) -> tuple[list[Item], int]:
        """All of a text; a long one without pictures in pieces, each after <bos>."""
        text = _words(row.values, "text")
        if not text.strip():
            raise PromptError("text", got="no words", want="a text")
        made = self.processor.prepare(_with_places(text, images), images, special=False)
        ids = [*made.tokens, self._eos]
        if not made.spans and len(ids) > self.max_length:
            size = self.max_length - 1
            pieces = [ids[at : at + size] for at in range(1, len(ids), size)]
            items = []
            for piece in pieces:
                tokens = np.array([ids[0], *piece], np.int32)
                items.append(Item(row, (Sample(tokens, np.arange(len(tokens)) > 0),)))
            return items, 0
        sample, cut = self._sample(np.array(ids, np.int32), np.arange(len(ids)) > 0, made, see)
        return [Item(row, (sample,))], int(cut)

    def _sample(
        self, tokens: npt.NDArray[np.int32], counts: npt.NDArray[np.bool_], prompt: Prompt, see: See
    ) -> tuple[Sample, bool]:
        end = len(tokens)
        if end > self.max_length:
            end = self.max_length
            for start, stop in prompt.spans:
                if start - 1 < end < stop + 1:  # not within a picture, nor between it and its borders
                    end = start - 1
        tokens, cut = tokens[:end], end < len(tokens)
        counts = counts[:end].copy()
        if self.loss_on == "all":
            counts[1:] = True
        spans = [span for span in prompt.spans if span[1] <= end]
        for start, stop in spans:
            counts[start:stop] = False
        counts[:1] = False
        if not counts.any():
            raise PromptError(
                "length", got=f"{len(prompt.tokens)} tokens, and no word of an answer in the first {self.max_length}",
                want=f"at most {self.max_length}", do="raise --max-length (max_length)",
            )  # fmt: skip
        names = tuple(see(prompt.pixels[n]) for n in range(len(spans))) if prompt.pixels is not None else ()
        return Sample(tokens, counts, tuple(spans), names), cut


def prompt_of(sample: Sample) -> tuple[Sample, list[int]]:
    """What stands before the last run of tokens that count, and that run."""
    stop = int(np.flatnonzero(sample.counts)[-1]) + 1
    start = stop
    while start > 1 and sample.counts[start - 1]:
        start -= 1
    keep = sum(last <= start for _, last in sample.spans)
    before = replace(
        sample, tokens=sample.tokens[:start], counts=sample.counts[:start], spans=sample.spans[:keep],
        pictures=sample.pictures[:keep],
    )  # fmt: skip
    return before, sample.tokens[start:stop].tolist()


def _words(values: Mapping[str, Any], name: str) -> str:
    if not isinstance(values[name], str):
        raise PromptError(name, got=type(values[name]).__name__, want="a text")
    text: str = values[name]
    return text


def _has_words(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return isinstance(content, list) and any(
        isinstance(item, Mapping) and str(item.get("text", "")).strip() for item in content
    )


def _items(chat: Any) -> list[Mapping[str, Any]]:
    contents = [message.get("content") for message in chat if isinstance(message, Mapping)]
    return [item for content in contents if isinstance(content, list) for item in content if isinstance(item, Mapping)]


def _with_pictures(chat: Any, count: int) -> Any:
    """Places for pictures before the words of the first of the user's messages."""
    made, done = [], False
    for message in chat:
        if not done and message.get("role") == "user":
            places = [{"type": "image"}] * count
            message = {**message, "content": [*places, *written.items(message.get("content") or [])]}
            done = True
        made.append(message)
    return made


def _with_places(text: str, images: Sequence[Any]) -> str:
    missing = len(images) - text.count(START_OF_IMAGE)
    return START_OF_IMAGE * missing + text if missing > 0 and START_OF_IMAGE not in text else text


def _resolved(chat: Any, folder: Path) -> Any:
    """Messages in which paths of pictures are whole ones."""
    if not isinstance(chat, list):
        raise PromptError("messages", got=type(chat).__name__, want="a list of messages")
    made = []
    for number, message in enumerate(chat, 1):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {number}", got=type(message).__name__, want="an object of role and content")
        content = message.get("content")
        if isinstance(content, list):
            content = [
                {**item, "image": _placed(item["image"], folder)}
                if isinstance(item, Mapping) and item.get("type") == "image" and "image" in item
                else item
                for item in content
            ]
            message = {**message, "content": content}
        made.append(message)
    return made


def _placed(source: Any, folder: Path) -> Any:
    """A path beside the data's file; addresses and whole paths as they are."""
    if isinstance(source, str) and source and not urlsplit(source).scheme and len(source) < 4096:
        path = Path(source)
        try:
            whole = path.expanduser() if path.is_absolute() or source.startswith("~") else folder / path
        except RuntimeError:
            return source
        if path.is_absolute() or whole.is_file() or path.suffix:
            return whole
    return source
