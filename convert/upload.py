"""A converted folder → a repository on the Hub.

Transfer, retries and progress bars are huggingface_hub's, imported when it is needed and not before. Owns the sentence
for everything that can go wrong on the way, and what becomes of an older conversion in the same repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_gemma3.checkpoint.hub import failures, quiet_library
from mlx_gemma3.errors import Gemma3Error, OfflineSource, OptionError, OutputError, SourceError

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Weights of an earlier upload that this one does not replace: programs would load them beside the new ones.
_WEIGHTS = ["model*.safetensors", "head-scales.safetensors", "model.safetensors.index.json"]


def check_repository(name: str) -> None:
    """Refuse, before any work, what is no name of a repository. Raises OptionError."""
    if not _NAME.fullmatch(name):
        raise OptionError("repository", got=repr(name), want="owner/name")


def upload(folder: Path, repository: str, *, private: bool = False, quiet: bool = False) -> str:
    """Make the repository where there is none, and bring it to the state of the folder; returns its address.

    Other files of the repository stay, but for weights under our names. What is there already is not sent again, so
    a second run goes on where a first one broke off; nothing refers to new weights before all of them are there.

    Args:
        folder: as `convert` writes it.
        repository: `owner/name`.
        private: make a new repository a private one.
        quiet: no progress bars on stderr.

    Raises:
        OptionError: `repository` is not owner/name, or it is public already and was to be private.
        SourceError: no converted folder, or one that the Hub does not take.
        OutputError: not logged in, or no permission to write there.
        OfflineSource: no network, or none until the end.
    """
    check_repository(repository)
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder}", got="no config.json", want="a converted folder")
    from huggingface_hub import HfApi

    api, state = HfApi(), "is not uploaded"
    with quiet_library(quiet):
        try:
            api.create_repo(repository, private=private or None, exist_ok=True)
            if private and not api.model_info(repository).private:
                raise OptionError(
                    f"{repository} exists and is public",
                    want="a private repository",
                    do="choose another name, or make it private in its settings on the Hub",
                )
            state = "is uploaded only in part"
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Upload a conversion by mlx-gemma3",
                delete_patterns=_WEIGHTS,
            )
        except failures() as error:
            raise _explained(error, repository, state) from None
    return f"{api.endpoint}/{repository}"


def _explained(error: Exception, repository: str, state: str) -> Gemma3Error:
    """What to tell the user. `state` finishes the sentence "<repository> …" where the network is to blame."""
    from huggingface_hub import errors, get_token

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # it only names the file
        error = error.__cause__
    if isinstance(error, errors.HFValidationError):
        return OptionError("repository", got=repr(repository), want="a name that the Hub takes", do=_first_line(error))
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OfflineSource(f"{repository} {state}", got="HF_HUB_OFFLINE is set", do="unset it for this run")
    again = "run it again with a network: what is there is not sent twice"
    if isinstance(error, errors.HfHubHTTPError):
        status, said = error.response.status_code, error.server_message
        got = f"HTTP {status}" + (f" ({said})" if said else "")
        login = f"log in with `hf auth login` and a token that may write to {repository.partition('/')[0]}"
        if status == 401:
            what = "the Hub does not know the token" if get_token() else "not logged in to the Hub"
            return OutputError(f"{repository}: {what}", got=got, do=login)
        if status in (403, 404):
            return OutputError(f"{repository}: no permission to write", got=got, do=login)
        if status in (408, 429) or status >= 500:
            return OfflineSource(f"{repository} {state}", got=got, do=again)
        return SourceError(f"{repository}: the Hub does not take the folder", got=got)
    if isinstance(error, OSError) and error.filename is not None:
        return SourceError(f"{error.filename}", got=error.strerror or error, want="a readable file")
    if isinstance(error, ValueError):  # the card's header is not what the Hub wants, or an answer that makes no sense
        return SourceError(f"{repository}: the Hub does not take the folder", got=error)
    return OfflineSource(f"{repository} {state}", got=_first_line(error), do=again)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
