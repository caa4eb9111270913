"""One server, one set of weights, two adapters and the base: as models of their own, in each protocol, at once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import tiny
import tiny_adapter
from serving import serving

import mlx_gemma3

ANSWER: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


def test_adapters_are_models(chat_folder: Path, tmp_path: Path) -> None:
    config = tiny.image_config()
    words = tiny_adapter.write(tmp_path / "words", config, ["q_proj", "down_proj"], seed=5)
    others = tiny_adapter.write(tmp_path / "others", config, ["v_proj", "up_proj"], seed=6, dora=True)
    flags = ["--adapter", f"words={words}", "--adapter", str(others), "--alias", f"mine={chat_folder}"]
    with mlx_gemma3.load(chat_folder, adapters={"words": words, "others": others}) as alone:
        want = {name: alone.generate("Why?", adapter=name, **ANSWER).text for name in (None, "words", "others")}
    assert len(set(want.values())) == 3
    with serving("-m", str(chat_folder), *flags) as running:
        base = running.ask("/v1/models")[1]["data"][0]["id"]
        listed = {model["id"]: model for model in running.ask("/v1/models")[1]["data"]}
        assert list(listed) == [base, f"{base}:words", f"{base}:others", "mine"]
        assert listed[f"{base}:words"]["parent"] == base and listed[base]["parent"] is None
        assert all(model["loaded"] for model in listed.values())
        messages = [{"role": "user", "content": "Why?"}]
        names = {base: None, f"{base}:words": "words", "mine:others": "others", f"{base}:others": "others"}
        wrong: list[Any] = []

        def ask(model: str, adapter: str | None) -> None:
            called = base if adapter is None else f"{base}:{adapter}"
            status, told = running.ask("/v1/chat/completions", {"model": model, "messages": messages, **ANSWER})
            if status != 200 or told["choices"][0]["message"]["content"] != want[adapter] or told["model"] != called:
                wrong.append((model, told))
            given = {"model": model, "messages": messages, "stream": False, "options": {"num_predict": 8}}
            given["options"]["temperature"] = 0  # type: ignore[index]
            status, told = running.ask("/api/chat", given)
            if status != 200 or told["message"]["content"] != want[adapter] or told["model"] != called:
                wrong.append((model, told))

        threads = [threading.Thread(target=ask, args=pair) for pair in names.items() for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        status, told = running.ask("/v1/messages", {"model": f"{base}:words", "messages": messages, **ANSWER})
        assert (status, told["content"][0]["text"]) == (200, want["words"])
        assert running.ask("/v1/chat/completions", {"model": f"{base}:x", "messages": messages})[0] == 404
        assert running.ask(f"/v1/models/{base}:words")[1]["root"] == base
        assert running.metric("mlx_gemma3_models_loaded") == 1
