"""Messages or text, and pictures, to a Prompt: token ids, pixels, and where the pictures' rows are.

Owns how a picture is written into the prompt, which picture belongs to which place, and what text may act as a control
token. Knows nothing of the model.

    \\n\\n <start_of_image> <image_soft_token> × T <end_of_image> \\n\\n        T = mm_tokens_per_image

A control token is a hard border for merging, so the stretches between are encoded one by one with the ids of the whole
string encoded at once. The blocks' own \\n\\n are part of those stretches: they join with newlines beside them.

Source: transformers 5.23, processing_gemma3.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..boundary.arguments import takes
from ..config import Config
from ..errors import OptionError, PromptError
from . import messages as written
from .address import Progress, opened
from .chat_template import ChatTemplate
from .snapshot import pictures as listed
from .template import Control, Message, render_pieces
from .tokenizer import Tokenizer
from .vocabulary import BOS, END_OF_IMAGE, IMAGE, START_OF_IMAGE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    Picture = str | Path | bytes | Image.Image


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """What the model reads."""

    text: str  # with the image blocks written out
    tokens: list[int]
    pixels: NDArray[np.float32] | None  # (N, S, S, 3) in [-1, 1]: one for each image block, in order
    spans: list[tuple[int, int]]  # half-open ranges of tokens: the T soft tokens of each image block
    image_count: int  # pictures; N counts their pan-and-scan crops too


class Processor:
    """Makes prompts for one checkpoint. Immutable; may be used from several threads."""

    @takes(tokenizer=Tokenizer, config=Config)
    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Config,
        *,
        no_pictures: str = "",
        template: ChatTemplate | None = None,
    ) -> None:
        """
        Args:
            no_pictures: what to do, for a checkpoint without vision that might have it.
            template: the checkpoint's own; None for Gemma 3's.
        """
        self.tokenizer, self.config, self.template = tokenizer, config, template
        self._no_pictures = (
            ("none: no vision part was found", no_pictures)
            if no_pictures
            else ("none: this checkpoint is text-only", "use a 4B, 12B or 27B checkpoint")
        )

    @takes(pan_and_scan="switch", special="switch", add_generation_prompt="switch", continue_final_message="switch")
    def prepare(
        self,
        text_or_messages: str | Sequence[Message] | None,
        images: Picture | Sequence[Picture] | None = (),
        *,
        pan_and_scan: bool = False,
        special: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Prompt:
        """Make the prompt, which begins with one <bos>.

        Args:
            text_or_messages: a text to complete, in which `<start_of_image>` is a picture's place; or the messages
                of a chat; or None for the pictures alone.
            images: paths, addresses (https, http, data, file), bytes of files, or Pillow images, for the places in
                order; one alone is a list of one. Content items of messages may carry their own, in any of the
                shapes that messages.py lists; then `images` fill the other places.
            pan_and_scan: add crops of long pictures, each with an image block of its own.
            special: names of control tokens act as such in the text, as in the reference. If False they are plain
                characters: in messages `<start_of_image>` too, in a text to complete it still is a picture's place.
            add_generation_prompt, continue_final_message: as in `render_chat`; for messages only.
            tools: declarations for a template that reads them, see ChatTemplate.render; Gemma 3's own reads none.
            template_args: what else such a template reads, by name.
            progress: called with ("pictures", read, in all) before each picture and with ("download", bytes, bytes
                in all or 0) while one is fetched; what it raises ends the work.

        Raises:
            PromptError: not one picture for each place, a picture for a checkpoint without vision, an item of a
                message that is neither text nor picture.
            TemplateError: messages that do not fit the chat template.
            ImageError: a picture that cannot be fetched or read.
            OptionError: an argument of another kind.
        """
        images = listed(images)
        chat = not (text_or_messages is None or isinstance(text_or_messages, str))
        if text_or_messages is None:
            if not images:
                raise PromptError("prompt", got="nothing", want="a text, messages or pictures")
            pieces: list[str] = [" ".join([START_OF_IMAGE] * len(images))]
        elif isinstance(text_or_messages, str):
            pieces = [text_or_messages]
        elif self.template is not None:
            pieces = self.template.pieces(
                written.kept(text_or_messages),
                self.tokenizer,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_args or {}),
            )
        else:
            for name, given in (("tools", tools), ("template_args", template_args)):
                if given:
                    do = "write them in a message" if name == "tools" else ""
                    raise OptionError(name, got="some", want="none: Gemma 3's own chat template reads none", do=do)
            pieces = render_pieces(
                written.read(text_or_messages),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        if special or not chat:
            pieces = list(_with_places(pieces))

        pictures = self._pictures(pieces, images)
        blocks: list[NDArray[np.float32]] = []
        expanded: list[str] = []
        place = 0
        for piece in pieces:
            if _is_place(piece):
                if progress is not None:
                    progress("pictures", place, len(pictures))
                pixels = self._pixels(pictures[place], pan_and_scan=pan_and_scan, progress=progress)
                place += 1
                blocks += pixels
                expanded += _picture_pieces(len(pixels) - 1, self.config.mm_tokens_per_image)
            else:
                expanded.append(piece)
        tokens, spans = self._encode(expanded, special=special)
        return Prompt(
            text="".join(expanded),
            tokens=tokens,
            pixels=np.stack(blocks) if blocks else None,
            spans=spans,
            image_count=sum(map(_is_place, pieces)),
        )

    def _pictures(self, pieces: list[str], images: Sequence[Picture]) -> list[Any]:
        """The source of each place's picture: the one that its content item carries, else the next of `images`."""
        carried = [_carried(piece) for piece in pieces if _is_place(piece)]
        count = len(images) + sum(source is not None for source in carried)
        if count and self.config.vision is None:
            want, do = self._no_pictures
            raise PromptError("pictures", got=count, want=want, do=do)
        if count != len(carried):
            raise PromptError(
                "pictures and their places in the prompt",
                got=f"{len(carried)} {START_OF_IMAGE} tokens and {count} images",
                want="as many of one as of the other",
                do=f"write {START_OF_IMAGE} in a text, or an item of type image in a message, once for each picture",
            )
        rest = iter(images)
        return [next(rest) if source is None else source for source in carried]

    def _pixels(self, source: Any, *, pan_and_scan: bool, progress: Progress | None) -> list[NDArray[np.float32]]:
        """The picture itself, then its crops: each (S, S, 3) float32."""
        from .images import load_image, pan_and_scan_boxes, to_pixels

        assert self.config.vision is not None, "checked by _pictures"
        size = self.config.vision.image_size
        content, name = opened(source, progress)
        image = load_image(content, name=name)
        crops = [image.crop(box) for box in pan_and_scan_boxes(*image.size)] if pan_and_scan else []
        return [to_pixels(view, size) for view in (image, *crops)]

    def _encode(self, pieces: list[str], *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the span of each run of our own soft tokens."""
        config = self.config
        ids = {START_OF_IMAGE: config.boi_token_id, IMAGE: config.image_token_id, END_OF_IMAGE: config.eoi_token_id}
        tokens: list[int] = []
        spans = []
        for control, run in groupby(pieces, key=lambda piece: isinstance(piece, Control)):
            if not control:
                tokens += self.tokenizer.encode("".join(run), special=special)
                continue
            for name, same in groupby(filter(None, run)):  # an empty one is a border, and no token
                token = ids.get(name)
                start = len(tokens)
                tokens += [self.tokenizer.id(name) if token is None else token] * len(list(same))
                if name == IMAGE:
                    spans.append((start, len(tokens)))
        bos = self.tokenizer.id(BOS)
        if tokens[:1] != [bos]:
            tokens.insert(0, bos)
            spans = [(start + 1, stop + 1) for start, stop in spans]
        return tokens, spans


def _picture_pieces(crops: int, rows: int) -> list[str]:
    """What stands for one picture: its block, and with pan and scan one more for each crop."""
    block = ["\n\n", Control(START_OF_IMAGE), *[Control(IMAGE)] * rows, Control(END_OF_IMAGE), "\n\n"]
    if not crops:
        return block
    return [
        "Here is the original image ",
        *block,
        " and here are some crops to help you see better ",
        *([*block, " "] * crops)[:-1],
    ]


def _is_place(piece: str) -> bool:
    return isinstance(piece, Control) and piece == START_OF_IMAGE


def _with_places(pieces: list[str]) -> Iterator[str]:
    """Typed `<start_of_image>` becomes a picture's place, also where the text of two items makes it together."""
    for control, run in groupby(pieces, key=lambda piece: isinstance(piece, Control)):
        if control:
            yield from run
            continue
        first, *others = "".join(run).split(START_OF_IMAGE)
        yield first
        for text in others:
            yield Control(START_OF_IMAGE)
            yield text


def _carried(place: str) -> Any:
    item = place.item if isinstance(place, Control) else None
    return item.get("image") if item else None
