"""Fetching from the Hub: a server on 127.0.0.1, asked through the real client in a child process, because the client
reads its settings when it is imported.
"""

from __future__ import annotations

import importlib.util
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

ROOT = Path(__file__).parents[1]

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TWO_SHARDS = json.dumps(
    {"weight_map": {"vision_tower.vision_model.post_layernorm.bias": FIRST, "model.norm.weight": SECOND}}
).encode()
SMALL = {
    name: name.encode()
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json")
}
UNWANTED = {
    name: name.encode() for name in ("README.md", "pytorch_model.bin", "original/model.pth", "onnx/model.safetensors")
}
SINGLE = {**SMALL, **UNWANTED, "tokenizer.json": b"j" * 1000, "model.safetensors": bytes(range(256)) * 400}
SHARDED = {**SMALL, INDEX: TWO_SHARDS, FIRST: b"first", SECOND: b"second"}


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


CHILD = """
import json, sys, time, warnings
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.errors import Gemma3Error
names, options, chunk, limit, free = json.loads(sys.argv[1])
assert "huggingface_hub" not in sys.modules
import huggingface_hub.constants, shutil
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = chunk or huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE
time.sleep = lambda seconds: None
if limit:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if free:
    shutil.disk_usage = lambda path: type("Usage", (), {"free": free})
for name in names:
    try:
        said = {"path": str(resolve(name, **options).path)}
    except Gemma3Error as error:
        said = {"code": error.code, "message": str(error)}
    print(json.dumps(said))
"""


@dataclass
class Answer:
    path: str = ""
    code: str = ""
    message: str = ""


@dataclass
class Machine:
    """A machine of its own: an empty home and cache; each `ask` is a new process."""

    home: Path
    endpoint: str
    stderr: str = ""

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def ask(self, *names: str, chunk: int = 0, limit: int = 0, free: int = 0, **options: Any) -> list[Answer]:
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_CACHE": str(self.cache),
            "HF_HUB_OFFLINE": str(int(options.pop("offline", False))),
            "HF_HUB_DISABLE_XET": "1",
            "HOME": str(self.home),
            "NO_PROXY": "*",
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ.get("PATH", ""),
        } | options.pop("environment", {})
        options.setdefault("quiet", True)
        arguments = json.dumps([names, options, chunk, limit, free])
        done = subprocess.run(
            [sys.executable, "-c", CHILD, arguments], env=settings, cwd=self.home, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        return [Answer(**json.loads(line)) for line in done.stdout.splitlines()]

    def held(self) -> list[str]:
        """The files of all snapshots in the cache."""
        return sorted(
            path.relative_to(snapshot).as_posix()
            for snapshot in self.cache.glob("*/snapshots/*")
            for path in snapshot.rglob("*")
            if path.is_file()
        )


@pytest.fixture
def nowhere() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def machine(home: Path, endpoint: str) -> Machine:
    home.mkdir(exist_ok=True)
    return Machine(home, endpoint)


def test_only_what_is_needed_is_fetched_and_then_reused(tmp_path: Path, nowhere: str) -> None:
    wanted = sorted({*SMALL, "tokenizer.json", "model.safetensors"})
    with HubServer({"a/b": Repo(SINGLE)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (answer,) = mac.ask("a/b")
        assert mac.held() == hub.fetched() == wanted, "neither .bin, .pth nor onnx"
        folder = Path(answer.path)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {n: SINGLE[n] for n in wanted}
        assert mac.stderr == ""
        count = len(hub.requests)
        assert mac.ask("a/b", "a/b@main", f"a/b@{'0' * 39}1") == [answer] * 3
        assert not [r for r in hub.requests[count:] if "/resolve/" in r.path]
        count = len(hub.requests)
        assert mac.ask("a/b", offline=True) == [answer]
        assert len(hub.requests) == count
    assert mac.ask("a/b") == [answer], "the server is gone"
    assert machine(tmp_path / "mac", nowhere).ask("a/b") == [answer]
    assert mac.stderr == ""


def test_an_embedding_models_modules_are_fetched(tmp_path: Path) -> None:
    modules = {
        name: name.encode()
        for name in (
            "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
            "2_Dense/config.json", "2_Dense/model.safetensors",
        )
    }  # fmt: skip
    unwanted = dict.fromkeys(("2_Dense/pytorch_model.bin", "onnx/config.json", "4_Normalize/.keep"), b"x")
    with HubServer({"a/b": Repo(SINGLE | modules | unwanted)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (answer,) = mac.ask("a/b")
        assert mac.held() == sorted({*SMALL, "tokenizer.json", "model.safetensors", *modules})
        assert mac.ask("a/b", offline=True) == [answer]


def test_bars_go_to_stderr_unless_quiet(tmp_path: Path) -> None:
    with HubServer({"a/b": Repo(SINGLE)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        mac.ask("a/b", quiet=False)
        assert "Fetching" in mac.stderr
        assert "dry-run" not in mac.stderr


def test_a_vocabulary_as_json_when_there_is_no_other(tmp_path: Path) -> None:
    files = {name: content for name, content in SINGLE.items() if name != "tokenizer.model"}
    with HubServer({"a/b": Repo(files, siblings=False)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        mac.ask("a/b")
        assert "tokenizer.json" in mac.held()


def test_a_cached_copy_of_one_vocabulary_gets_the_other(tmp_path: Path) -> None:
    """Earlier versions fetched tokenizer.model alone; without a network that is still a whole copy."""
    with HubServer({"a/b": Repo(SINGLE)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (answer,) = mac.ask("a/b")
        (Path(answer.path) / "tokenizer.json").unlink()
        assert mac.ask("a/b", offline=True) == [answer] and "tokenizer.json" not in mac.held()
        assert mac.ask("a/b") == [answer] and "tokenizer.json" in mac.held()


def test_shards_of_the_index_and_of_vision(tmp_path: Path) -> None:
    files = {**SHARDED, "model.extra.safetensors": b"not in the index"}
    with HubServer({"a/b": Repo(files)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (text,) = mac.ask("a/b", text_only=True)
        assert mac.held() == sorted({*SMALL, INDEX, SECOND})
        (incomplete,) = mac.ask("a/b", offline=True)
        assert incomplete.code == "offline"
        assert "only in part" in incomplete.message
        assert mac.ask("a/b", offline=True, text_only=True) == [text]
        assert mac.ask("a/b") == [text]
        assert mac.held() == sorted({*SMALL, INDEX, FIRST, SECOND})
        assert mac.ask("a/b", offline=True) == [text]


def test_gguf_repositories(tmp_path: Path) -> None:
    one = {"g-Q4.gguf": b"q4", "mmproj-F16.gguf": b"f16", "mmproj-BF16.gguf": b"bf16", "config.json": b"{}"}
    two = {"g-Q4.gguf": b"q4", "g-Q8.gguf": b"q8", "sub/g-Q2.gguf": b"q2", "mmproj.gguf": b"p"}
    with HubServer({"a/one": Repo(one), "a/two": Repo(two)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (answer,) = mac.ask("a/one", text_only=True)
        assert mac.held() == ["g-Q4.gguf"]
        assert mac.ask("a/one") == [answer]
        assert Path(answer.path).name == "g-Q4.gguf"
        assert mac.held() == ["g-Q4.gguf", "mmproj-BF16.gguf"]
        assert mac.ask("a/one", offline=True) == [answer]
        several, none = mac.ask("a/two", "a/two/g-Q5.gguf")
        assert several.code == "source"
        assert "3 .gguf files: g-Q4.gguf, g-Q8.gguf, sub/g-Q2.gguf" in several.message
        assert "a/two/g-Q4.gguf, or download it and pass its path" in several.message
        assert none.code == "not_found"
        assert "g-Q5.gguf" in none.message
        assert mac.held() == ["g-Q4.gguf", "mmproj-BF16.gguf"]
        chosen, inner = mac.ask("a/two/g-Q8.gguf", "a/two/sub/g-Q2.gguf@main")
        assert Path(chosen.path).read_bytes() == b"q8"
        assert Path(inner.path).read_bytes() == b"q2"
        assert (Path(chosen.path).parent / "mmproj.gguf").read_bytes() == b"p"


def test_a_cut_download_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = len(SINGLE["model.safetensors"])
    with HubServer({"a/b": Repo(SINGLE)}, cut={"model.safetensors": 1}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (answer,) = mac.ask("a/b", chunk=1024)
        assert (Path(answer.path) / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
        first, second = hub.downloads("model.safetensors")
        assert first.range is None
        assert second.range == f"bytes={whole // 2}-"
        assert first.sent + second.sent == whole
        assert mac.stderr == "", "the library's warning is not for our users"


def test_a_download_that_breaks_off_is_not_taken_for_a_whole(tmp_path: Path) -> None:
    with HubServer({"a/b": Repo(SHARDED)}, die_after=SECOND) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (broken,) = mac.ask("a/b")
        assert broken.code == "offline"
        assert "only in part" in broken.message
        assert "run it again: it goes on from the files that are whole" in broken.message
        assert mac.stderr == ""
    for offline in (False, True):
        (still,) = mac.ask("a/b", offline=offline)
        assert still.code == "offline"
        assert "a/b is in the cache only in part" in still.message
    with HubServer({"a/b": Repo(SHARDED)}) as hub:
        mac.endpoint = hub.url
        (answer,) = mac.ask("a/b")
        assert (Path(answer.path) / SECOND).read_bytes() == b"second"
        assert not hub.downloads("config.json"), "what was whole is kept"


def test_a_cached_copy_that_lacks_a_file(tmp_path: Path, nowhere: str) -> None:
    with HubServer({"a/b": Repo(SHARDED)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (answer,) = mac.ask("a/b")
        mac.endpoint = nowhere
        for lost in (Path(answer.path) / name for name in ("generation_config.json", "tokenizer.model", INDEX, FIRST)):
            aside = lost.rename(mac.home / lost.name)
            (lacking,) = mac.ask("a/b")
            assert (lacking.code, "only in part" in lacking.message) == ("offline", True), lost
            aside.rename(lost)
        assert mac.ask("a/b") == [answer]
        lost.unlink()
        mac.endpoint = hub.url
        assert mac.ask("a/b") == [answer]
        assert lost.read_bytes() == SHARDED[FIRST]


def test_refusals_of_the_hub_write_nothing(tmp_path: Path, nowhere: str) -> None:
    broken = {**SMALL, INDEX: TWO_SHARDS, FIRST: b""}
    repos = {
        "a/gated": Repo(SINGLE, gated=True),
        "a/gated-shards": Repo(SHARDED, gated=True),
        "a/private": Repo(SINGLE, private=True),
        "a/b": Repo(SINGLE),
        "a/bin": Repo({**SMALL, "pytorch_model.bin": b""}),
        "a/text": Repo({"README.md": b""}),
        "a/broken": Repo(broken),
    }
    expected = {
        "a/gated": ("gated", "accept its licence at https://huggingface.co/a/gated and log in with `hf auth login`"),
        "a/gated-shards": ("gated", "https://huggingface.co/a/gated-shards"),
        "a/private": ("not_found", "a/private is neither a path here nor a repository on the Hub"),
        "a/missing": ("not_found", "if the repository is private, log in with `hf auth login`"),
        "a--b/c": ("not_found", "a--b/c"),
        "a/b@v9": ("not_found", "a/b: revision: got v9"),
        "a/bin": ("checkpoint", "a/bin: got no weights"),
        "a/text": ("config", "a/text: got no config.json"),
        "a/broken": ("checkpoint", SECOND),
        "gemma-3-4b-it": ("not_found", "google/gemma-3-4b-it"),
    }
    with HubServer(repos) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        answers = mac.ask(*expected, quiet=False)
        for answer, (code, words) in zip(answers, expected.values(), strict=True):
            assert (answer.code, words in answer.message) == (code, True), answer
            assert "\n" not in answer.message
        assert mac.stderr == ""
        mac.endpoint = nowhere
        assert [answer.code for answer in mac.ask("a/b", quiet=False)] == ["offline"]
        (offline,) = mac.ask("a/b", offline=True, quiet=False)
        assert offline.code == "offline"
        assert "HF_HUB_OFFLINE is set" in offline.message
        assert mac.stderr == ""
    assert not everything_in(mac.home)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with HubServer({"a/b": Repo(SINGLE)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (before,) = mac.ask("a/b", free=50_000)
        assert before.code == "source"
        assert "the disk is full" in before.message
        assert not everything_in(mac.home)
        (during,) = mac.ask("a/b", limit=50_000)
        assert during.code == "source"
        assert "the disk is full" in during.message
        assert mac.stderr == ""
        assert "model.safetensors" not in mac.held()
        assert not [name for name in everything_in(mac.home) if name.endswith(".incomplete")]
        assert mac.ask("a/b")[0].path


def test_a_hub_cache_that_cannot_be_written(tmp_path: Path) -> None:
    with HubServer({"a/b": Repo(SINGLE)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        mac.cache.write_bytes(b"a file where the folder should be")
        (answer,) = mac.ask("a/b")
        assert answer.code == "source"
        assert "HF_HUB_CACHE" in answer.message
        assert mac.stderr == ""


PROXIES = (
    {"ALL_PROXY": "socks5://127.0.0.1:9"}, {"all_proxy": "socks4://x"}, {"HTTPS_PROXY": "http://a:port"},
    {"HTTP_PROXY": "http://[::1"}, {"ALL_PROXY": "://"}, {"ALL_PROXY": "http://\x01"}, {"HTTP_PROXY": "ftp://x"},
    {"ALL_PROXY": "http://%zz:1"},
)  # fmt: skip


@pytest.mark.parametrize(
    "proxy", [*PROXIES[:1], *(pytest.param(proxy, marks=pytest.mark.slow) for proxy in PROXIES[1:])]
)
def test_a_proxy_that_makes_no_sense_is_one_sentence_and_a_cached_model_answers(
    tmp_path: Path, proxy: dict[str, str]
) -> None:
    with HubServer({"a/b": Repo(SINGLE)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        (answer,) = mac.ask("a/b")
        proxy = proxy | {"NO_PROXY": ""}
        assert mac.ask("a/b", environment=proxy) == [answer] == mac.ask("a/b", environment=proxy, offline=True)
        (other,) = mac.ask("a/other", environment=proxy)
        assert other.code == "offline" and "\n" not in other.message and len(other.message) < 400
        if "socks5" in proxy.get("ALL_PROXY", "") and importlib.util.find_spec("socksio") is None:
            assert "a SOCKS proxy (ALL_PROXY)" in other.message and "mlx-gemma3[socks]" in other.message


def test_files_with_names_that_drive_terminals_are_left_alone(tmp_path: Path) -> None:
    files = {**SINGLE, "model\x1b]0;OWNED\x07.safetensors": b"x"}
    with HubServer({"a/b": Repo(files)}) as hub:
        mac = machine(tmp_path / "mac", hub.url)
        mac.ask("a/b", quiet=False)
        assert "OWNED" not in mac.stderr and mac.held() == sorted({*SMALL, "tokenizer.json", "model.safetensors"})


def test_without_a_home_the_hubs_cache_is_a_temporary_folder(tmp_path: Path) -> None:
    code = (
        "import os, pwd\nos.environ.pop('HOME', None)\n"
        "def nobody(_): raise KeyError('nobody')\npwd.getpwuid = nobody\n"
        "from mlx_gemma3.checkpoint.hub import library_cache\nprint(library_cache())"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{tmp_path}/mlx-gemma3-{os.getuid()}/hub\n", done.stderr
