"""A server finds on disk what the one before it has read."""

from __future__ import annotations

from pathlib import Path

from serving import QUESTION, serving


def test_a_new_server_goes_on_from_the_prompts_of_the_old_one(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": f"{QUESTION} " * 60}]
    known, said = [], []
    for _ in range(2):
        with serving("-m", "demo", "--prompt-cache", str(tmp_path / "kept"), "--prompt-cache-size", "1GB") as server:
            asked = {"model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0}
            status, answer = server.ask("/v1/chat/completions", asked)
            assert status == 200, answer
            known.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            said.append(answer["choices"][0]["message"]["content"])
            assert server.end() == 0
    assert known[0] == 0 and known[1] > 256 and said[0] == said[1]
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".prompt"]
