"""Other people's text in messages: what a terminal would act on is written out, long names are cut, lists counted."""

from __future__ import annotations

from mlx_gemma3.errors import Gemma3Error
from mlx_gemma3.visible import listed, shortened, visible


def test_every_control_character_but_tab_and_newline_is_written_out() -> None:
    hidden = [chr(code) for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"]
    for character in [*hidden, "\u202e", "\u2066", "\udc80", "\ud800"]:
        assert visible(f"a{character}b").isprintable()
    assert visible("\x1b]0;t\x07") == "\\x1b]0;t\\x07"
    assert visible("caf\udce9") == "caf\\xe9"
    assert visible("a\tb\nc é 💥 \u200d") == "a\tb\nc é 💥 \u200d"


def test_long_names_keep_their_ends_and_lists_say_how_many_more() -> None:
    assert shortened("x" * 300) == "x" * 300
    cut = shortened("a" * 5000 + "end")
    assert len(cut) == 300 and cut.startswith("aaa") and cut.endswith("end") and "…" in cut
    assert listed(["b", "a"]) == "a, b"
    assert listed([f"{n:05}" for n in range(20_000)]) == "00000, 00001, 00002 and 19,997 more"
    assert len(listed(["x" * 5000] * 9)) < 330


def test_a_message_is_one_short_line_whatever_it_quotes() -> None:
    message = str(Gemma3Error("a\x1b[31m\nb", got="c" * 10_000, want="\x07", do="d\x9b"))
    assert message.isprintable() and "\n" not in message
    assert message.startswith("a\\x1b[31m b: got cc") and message.endswith("want \\x07; d\\x9b") and len(message) < 400
