"""`mlx-gemma3 serve`: a local server for the programs that speak OpenAI's, Anthropic's or Ollama's protocol."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from .adapters import named
from .prompt_cache import Folder, Size, kept_in
from .speculation import Draft, Off, guessed_by
from .terminal import tell


def serve(
    models: Annotated[list[str], typer.Option("--model", "-m", help="Alias, folder, Hub id or .gguf; again for more.")],
    alias: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL: another name for one of the models.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH: an adapter of the first model, which then is MODEL:NAME too; MODEL:NAME=PATH for another.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MLX_GEMMA3_API_KEY", help="Key that clients must send.", show_default=False),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with the key.", show_default=False)] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Another host than this machine's without a key.")] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Whose web pages may ask, as https://example.org, or *.", show_default=False),
    ] = None,
    allow_private_addresses: Annotated[
        bool, typer.Option("--allow-private-addresses", help="Fetch pictures from this machine and its network too.")
    ] = False,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Answers at once.")] = 8,
    queue: Annotated[int, typer.Option(min=0, max=65536, help="Requests that wait; more are refused.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer where a client asks for none.")] = 4096,
    max_context: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt and its answer.")] = None,
    max_body: Annotated[int, typer.Option(min=1, max=4096, help="Longest request, in MiB.")] = 64,
    max_images: Annotated[int, typer.Option(min=0, max=4096, help="Pictures in a request.")] = 32,
    kv_bits: Annotated[int, typer.Option(help="Keys and values of global layers: 16, 8 or 4.")] = 16,
    local_kv_bits: Annotated[int, typer.Option(help="The same of local layers.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    draft: Draft = None,
    no_speculation: Off = False,
    prompt_cache: Folder = None,
    prompt_cache_size: Size = "20GB",
    grace: Annotated[float, typer.Option(min=0, help="Seconds that answers have to end in after SIGTERM.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what is asked to stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each request.")] = False,
) -> None:
    """Serve models on this machine: OpenAI's, Anthropic's and Ollama's protocols, and a page at the address.

    docs/server.md says what each protocol's fields do here.
    """
    for name in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        if find_spec(name) is None:
            raise OptionError("serve", got=f"no {name}", want="it", do="pip install 'mlx-gemma3[serve]'")
    from ..server.run import run
    from ..server.settings import Settings, key_from_file

    keys = [*(api_key or []), *([] if api_key_file is None else [key_from_file(api_key_file)])]
    load: dict[str, Any] = {
        "dtype": dtype, "text_only": text_only, "kv_bits": kv_bits, "local_kv_bits": local_kv_bits,
        "max_context": max_context, "parallel": parallel, "queue": queue, "quiet": quiet,
        **kept_in(prompt_cache, prompt_cache_size), **guessed_by(draft, off=no_speculation),
    }  # fmt: skip
    settings = Settings(
        models=tuple(models),
        adapters=tuple(_adapter(text) for text in adapter or []),
        aliases=dict(_pair(text) for text in alias or []),
        host=host,
        port=port,
        api_keys=tuple(keys),
        no_auth=no_auth,
        origins=tuple(allow_origin or []),
        allow_private_addresses=allow_private_addresses,
        max_tokens=max_tokens,
        max_body_bytes=max_body << 20,
        max_images=max_images,
        grace=grace,
        log_prompts=log_prompts,
        quiet=quiet,
        load=load,
    )
    raise typer.Exit(run(settings, tell))


def _adapter(text: str) -> tuple[str, str, str]:
    """(model, name, folder) of [MODEL:]NAME=PATH or PATH."""
    before, equals, path = text.partition("=")
    model, colon, name = before.rpartition(":")
    ((name, path),) = named([f"{name}={path}" if equals and colon else text]).items()
    return model if equals else "", name, path


def _pair(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise OptionError("--alias", got=text, want="NAME=MODEL")
    return name, model
