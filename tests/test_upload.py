"""Uploading to the Hub: a server on 127.0.0.1, asked through the real client in a child process, because the client
reads its settings when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repo

from mlx_gemma3.convert.upload import upload
from mlx_gemma3.errors import OptionError, SourceError

CHILD = """
import json, sys, time
from pathlib import Path
from mlx_gemma3.convert.upload import upload
from mlx_gemma3.errors import Gemma3Error
assert "huggingface_hub" not in sys.modules
import huggingface_hub
time.sleep = lambda seconds: None
folder, names, options = json.loads(sys.argv[1])
for name in names:
    try:
        said = {"url": upload(Path(folder), name, **options)}
    except Gemma3Error as error:
        said = {"code": error.code, "message": str(error)}
    print(json.dumps(said))
"""
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
INDEX = "model.safetensors.index.json"
WORDS = {"config.json": b"{}", "README.md": b"---\nlicense: gemma\n---\n", "tokenizer.json": b"{ }"}
FILES = {**WORDS, INDEX: b"three", FIRST: bytes(100_000), SECOND: b"2" * 200_000, THIRD: b"3" * 300_000}


@dataclass
class Answer:
    url: str = ""
    code: str = ""
    message: str = ""


@dataclass
class Machine:
    """A machine of its own, logged in or not; each `send` is a new process."""

    home: Path
    endpoint: str
    token: str = "mine"
    stderr: str = ""

    def send(self, files: dict[str, bytes], *names: str, offline: bool = False, **options: Any) -> list[Answer]:
        folder = self.home / "folder"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HOME": str(self.home),
            "NO_PROXY": "*",
            "PATH": os.environ.get("PATH", ""),
        }
        if self.token:
            settings["HF_TOKEN"] = self.token
        arguments = json.dumps([str(folder), names, {"quiet": True} | options])
        done = subprocess.run(
            [sys.executable, "-c", CHILD, arguments],
            env=settings,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        assert {path.name for path in folder.iterdir()} == files.keys(), "the folder itself is left alone"
        return [Answer(**json.loads(line)) for line in done.stdout.splitlines()]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_new_repository_holds_the_folder(tmp_path: Path) -> None:
    with HubServer({}, writers={"mine": "me"}) as hub:
        mac = Machine(tmp_path, hub.url)
        (answer,) = mac.send(FILES, "me/gemma")
        assert answer == Answer(url=f"{hub.url}/me/gemma")
        assert hub.repos["me/gemma"].files == FILES
        assert not hub.repos["me/gemma"].private
        assert len(hub.uploads()) == 3
        assert mac.stderr == ""


def test_the_same_folder_again_sends_nothing(tmp_path: Path) -> None:
    with HubServer({}, writers={"mine": "me"}) as hub:
        mac = Machine(tmp_path, hub.url)
        mac.send(FILES, "me/gemma")
        commit, sent = hub.repos["me/gemma"].commit, len(hub.uploads())
        assert mac.send(FILES, "me/gemma") == [Answer(url=f"{hub.url}/me/gemma")]
        assert (hub.repos["me/gemma"].commit, len(hub.uploads())) == (commit, sent)
        assert mac.stderr == ""


def test_bars_go_to_stderr_unless_quiet(tmp_path: Path) -> None:
    with HubServer({}, writers={"mine": "me"}) as hub:
        mac = Machine(tmp_path, hub.url)
        mac.send(FILES, "me/gemma", quiet=False)
        assert THIRD in mac.stderr
        assert "Warning" not in mac.stderr


def test_older_weights_go_and_other_files_stay(tmp_path: Path) -> None:
    other = {"LICENSE": b"l", "extra/model.safetensors": b"e", "model.gguf": b"g"}
    single = {**WORDS, "config.json": b"{ }", INDEX: b"one", "model.safetensors": b"all"}
    with HubServer({"me/gemma": Repo({**FILES, **other})}, writers={"mine": "me"}) as hub:
        mac = Machine(tmp_path, hub.url)
        assert mac.send(single, "me/gemma")[0].url
        assert hub.repos["me/gemma"].files == single | other
        assert mac.send(FILES, "me/gemma")[0].url
        assert hub.repos["me/gemma"].files == FILES | other


def test_private(tmp_path: Path) -> None:
    with HubServer({"me/open": Repo({})}, writers={"mine": "me"}) as hub:
        mac = Machine(tmp_path, hub.url)
        new, known, public = mac.send(FILES, "me/new", "me/new", "me/open", private=True)
        assert hub.repos["me/new"].private
        assert new == known == Answer(url=f"{hub.url}/me/new")
        assert public.code == "option"
        assert "me/open exists and is public: want a private repository; choose another name" in public.message
        assert not hub.repos["me/open"].files


def test_a_second_run_goes_on_where_the_first_broke_off(tmp_path: Path) -> None:
    with HubServer({}, writers={"mine": "me"}, cut={sha256(FILES[SECOND]): 1000}) as hub:
        mac = Machine(tmp_path, hub.url)
        (broken,) = mac.send(FILES, "me/gemma")
        assert broken.code == "offline"
        assert broken.message.startswith("me/gemma is uploaded only in part: got ")
        assert "Error while uploading" not in broken.message, "what happened, not the library's wrapping of it"
        assert broken.message.endswith("; run it again with a network: what is there is not sent twice")
        assert mac.stderr == ""
        assert not hub.repos["me/gemma"].files, "all of it or nothing"
        whole = set(hub.objects)
        assert sha256(FILES[SECOND]) not in whole
        hub.cut.clear()
        before = len(hub.uploads())
        assert mac.send(FILES, "me/gemma")[0].url
        assert hub.repos["me/gemma"].files == FILES
        sent = {request.path.removeprefix("lfs/") for request in hub.uploads()[before:]}
        assert sent == {sha256(FILES[name]) for name in (FIRST, SECOND, THIRD)} - whole


def test_a_short_cut_is_not_noticed(tmp_path: Path) -> None:
    with HubServer({}, writers={"mine": "me"}, cut={sha256(FILES[FIRST]): 2}) as hub:
        assert Machine(tmp_path, hub.url).send(FILES, "me/gemma")[0].url
        assert hub.repos["me/gemma"].files == FILES


def test_refusals_in_one_line(tmp_path: Path) -> None:
    with HubServer({"google/gemma": Repo({})}, writers={"mine": "me", "hers": "her"}) as hub:
        mac = Machine(tmp_path, hub.url)
        expected = {
            "her/gemma": ("output", "her/gemma: no permission to write: got HTTP 403"),
            "google/gemma": ("output", "a token that may write to google"),
            "me/..": ("option", "repository: got 'me/..', want a name that the Hub takes"),
        }
        for answer, (code, words) in zip(mac.send(FILES, *expected), expected.values(), strict=True):
            assert (answer.code, words in answer.message, "\n" in answer.message) == (code, True, False), answer
        assert mac.stderr == ""
        mac.token = "old"
        (unknown,) = mac.send(FILES, "me/gemma")
        assert unknown.code == "output"
        assert "me/gemma: the Hub does not know the token: got HTTP 401" in unknown.message
        mac.token = ""
        new, public = mac.send(FILES, "me/gemma", "google/gemma")
        for answer in (new, public):
            assert answer.code == "output"
            assert "not logged in to the Hub: got HTTP 401" in answer.message
            assert "log in with `hf auth login`" in answer.message
        assert mac.stderr == ""
        assert hub.repos.keys() == {"google/gemma"}
        assert not hub.repos["google/gemma"].files and not hub.objects


def test_a_card_that_the_hub_does_not_take(tmp_path: Path) -> None:
    with HubServer({}, writers={"mine": "me"}) as hub:
        mac = Machine(tmp_path, hub.url)
        (answer,) = mac.send({**FILES, "README.md": b"---\nlicense: unheard-of\n---\n"}, "me/gemma")
        assert answer.code == "source"
        assert 'the Hub does not take the folder: got Invalid metadata in README.md. - "license" must' in answer.message
        assert not hub.uploads()
        assert mac.send({**FILES, "README.md": b"bare"}, "me/gemma", quiet=False)[0].url
        assert "metadata" not in mac.stderr


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    mac = Machine(tmp_path, nowhere)
    (gone,), (offline,) = mac.send(FILES, "me/gemma"), mac.send(FILES, "me/gemma", offline=True)
    assert (gone.code, offline.code) == ("offline", "offline")
    assert gone.message.startswith("me/gemma is not uploaded: got ")
    assert "HF_HUB_OFFLINE is set; unset it" in offline.message
    assert mac.stderr == ""


def test_what_is_refused_before_any_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("gemma", "", "a/b/c", "a/", "/b", "https://huggingface.co/a/b", "a/b@main", "a b/c"):
        with pytest.raises(OptionError, match="want owner/name"):
            upload(tmp_path, name)
    for folder in (tmp_path / "none", tmp_path / "config.json"):
        with pytest.raises(SourceError, match=r"no config\.json"):
            upload(folder, "me/gemma")


def test_the_command_converts_reports_and_uploads(text_folder: Path, tmp_path: Path) -> None:
    with HubServer({}, writers={"mine": "me"}) as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "mine",
            "NO_PROXY": "*",
            "PATH": os.environ.get("PATH", ""),
        }
        command = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli", "convert", str(text_folder), "out", "-q"]

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *words], env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=120
            )

        done = run("--bits", "4", "--upload", "me/gemma")
        assert (done.returncode, done.stderr) == (0, "")
        assert "bits a weight" in done.stdout and done.stdout.splitlines()[-1] == f"{hub.url}/me/gemma"
        files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert hub.repos["me/gemma"].files == files and {"README.md", "head-scales.safetensors"} < files.keys()
        plain = run("--dequantize", "--overwrite", "--upload", "me/gemma", "--json")
        assert json.loads(plain.stdout)["url"] == f"{hub.url}/me/gemma"
        assert "head-scales.safetensors" not in hub.repos["me/gemma"].files
        refused = run("--bits", "4", "--overwrite", "--upload", "her/gemma")  # the folder and the report stay
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1) and "bits a weight" in refused.stdout
