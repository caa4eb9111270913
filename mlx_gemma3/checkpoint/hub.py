"""One revision of a repository on the Hub: which files, are they allowed, do they fit, fetch them.

With convert/upload.py and prompt/address.py one of the files that know huggingface_hub or httpx, imported when they are
needed and not before; retries,
progress bars and the cache are the library's. Owns the sentence for everything that can go wrong on the way, and the
rule for a cached copy that is whole. Written for huggingface_hub 1.0 to 2.4.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..boundary.paths import temporary_folder
from ..errors import CheckpointError, ConfigError, GatedSource, OfflineSource, SourceError, SourceNotFound
from ..prompt.vocabulary import VOCABULARIES
from ..visible import visible
from .safetensors import INDEX
from .selection import CONFIG_FILES, Plan, choose


@dataclass(frozen=True)
class Repository:
    """One revision of a model on the Hub, and its copy in the library's cache."""

    name: str
    revision: str

    def fetch(self, wanted: str, text_only: bool, quiet: bool) -> Path:
        """The snapshot folder, or the .gguf in it, whole. Nothing is written before everything is known to be there,
        allowed, and to fit on the disk.
        """
        from huggingface_hub import snapshot_download

        with quiet_library(quiet):
            try:
                commit, names = self._listing()
            except failures() as error:
                return self._cached(wanted, text_only, error)
            try:
                folder = self._snapshot()
                known = folder if folder is not None and folder.name == commit else None
                plan = choose(names, self.name, wanted, text_only, lambda: self._index(commit, known))
                if known is None or plan.missing(known):
                    self._rehearse(commit, plan)
                    revision = self.revision  # by name first, so that the library notes which commit it means
                    for stage in filter(None, plan.stages):
                        patterns = [glob.escape(name) for name in stage]
                        known = Path(
                            snapshot_download(
                                self.name, revision=revision, allow_patterns=patterns, cache_dir=library_cache()
                            )
                        )
                        revision = known.name
            except failures() as error:
                again = "run it again: it goes on from the files that are whole"
                raise self._explained(error, "is fetched only in part", again) from None
            assert known is not None, plan
            return known / plan.file

    def _listing(self) -> tuple[str, list[str]]:
        """The commit that the revision means now, and its files."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.name, revision=self.revision, timeout=10)
        if info.sha is None:
            raise ValueError("an answer without a commit")
        if info.siblings is None:
            return info.sha, _printable(HfApi().list_repo_files(self.name, revision=info.sha))
        return info.sha, _printable(sibling.rfilename for sibling in info.siblings)

    def _snapshot(self, *patterns: str) -> Path | None:
        """The cached folder, whole or not; None when there is none, or the library knows that it lacks a file of
        these patterns.
        """
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    local_files_only=True,
                    allow_patterns=list(patterns),
                    cache_dir=library_cache(),
                )
            )
        except failures():
            return None

    def _index(self, commit: str, known: Path | None) -> str:
        from huggingface_hub import hf_hub_download

        if known is not None and (known / INDEX).is_file():
            return (known / INDEX).read_text("utf-8")
        with tempfile.TemporaryDirectory() as scratch:
            return Path(hf_hub_download(self.name, INDEX, revision=commit, local_dir=scratch)).read_text("utf-8")

    def _rehearse(self, commit: str, plan: Plan) -> None:
        """Ask for each file's size: refused here means refused before anything is written."""
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(name) for stage in plan.stages for name in stage]
        with quiet_library(quiet=True):
            files = snapshot_download(
                self.name, revision=commit, allow_patterns=patterns, dry_run=True, cache_dir=library_cache()
            )
        need = sum(file.file_size or 0 for file in files if file.will_download)
        cache = library_cache().absolute()
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
        if need > free:
            raise _full(self.name, f"{megabytes(free)} free in {cache}", megabytes(need))

    def _cached(self, wanted: str, text_only: bool, error: Exception) -> Path:
        """The cached copy when it is whole: the Hub gave no list of files, so the library's own note of them is
        asked, and where that is missing our order of fetching is enough.

        Raises:
            SourceError: as `_explained` words the `error` that the Hub's list ended in.
        """
        folder = self._snapshot()
        if folder is None:
            raise self._explained(error, "is not in the cache") from None
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        lacking = self._explained(error, "is in the cache only in part")
        try:
            plan = choose(names, self.name, wanted, text_only, lambda: (folder / INDEX).read_text("utf-8"))
        except (SourceNotFound, ConfigError, CheckpointError):
            raise lacking from None
        if not plan.file:
            expected = [*CONFIG_FILES, INDEX]
            expected += [] if names.intersection(VOCABULARIES) else VOCABULARIES
            expected += [] if names.intersection((INDEX, "model.safetensors")) else ["model*.safetensors"]
            if self._snapshot(*expected) is None:
                raise lacking from None
        return folder / plan.file

    def _explained(self, error: Exception, state: str, do: str = "run it again with a network") -> SourceError:
        """What to tell the user about a failure of the library. `state` finishes the sentence "<name> …" where the
        network is to blame, and `do` is what helps then.
        """
        from huggingface_hub import errors

        # These two only wrap what happened.
        while isinstance(error, errors.LocalEntryNotFoundError | errors.DryRunError):
            if not isinstance(error.__cause__, Exception):
                break
            error = error.__cause__
        login = "log in with `hf auth login`"
        if isinstance(error, errors.GatedRepoError):
            return GatedSource(
                f"{self.name} is gated", do=f"accept its licence at https://huggingface.co/{self.name} and {login}"
            )
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            return SourceNotFound(
                f"{self.name} is neither a path here nor a repository on the Hub",
                do=f"check the name, or, if the repository is private, {login}",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return SourceNotFound(f"{self.name}: revision", got=self.revision, want="a branch, a tag or a commit")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return OfflineSource(
                f"{self.name} {state}", got="HF_HUB_OFFLINE is set", do="unset it for one run with a network"
            )
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return GatedSource(f"{self.name}: the Hub refuses access", got=f"HTTP {status}", do=login)
            return OfflineSource(f"{self.name} {state}", got=f"HTTP {status} from the Hub", do=do)
        if isinstance(error, ImportError) or type(error).__name__ == "InvalidURL":
            return OfflineSource(f"{self.name} {state}", **_about_proxies(error))
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _full(self.name, os.strerror(code))
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            return SourceError(
                f"{self.name}: the cache cannot be written", got=error, do="set HF_HUB_CACHE to another folder"
            )
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, ValueError) and _proxies():
            return OfflineSource(f"{self.name} {state}", **_about_proxies(error))
        return OfflineSource(f"{self.name} {state}", got=reason, do=do)


def _full(name: str, got: str, want: str | None = None) -> SourceError:
    return SourceError(f"{name}: the disk is full", got=got, want=want, do="free some, or move HF_HUB_CACHE")


def _about_proxies(error: Exception) -> dict[str, str]:
    """What to say of a proxy that cannot be used: got, and what to do."""
    where = " or ".join(_proxies()) or "an address"
    if isinstance(error, ImportError):
        return {"got": f"a SOCKS proxy ({where}) and no package for it", "do": "pip install 'mlx-gemma3[socks]'"}
    reason = str(error).partition("\n")[0] or type(error).__name__
    return {"got": f"{where} that makes no sense ({reason})", "do": "mend or unset it"}


def _proxies() -> list[str]:
    """The environment's words on proxies that are set."""
    names = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
    return [name for word in names for name in (word, word.lower()) if os.environ.get(name)]


def library_cache() -> Path:
    """The library's cache; a temporary folder for a user without a home, for whom it would be named `~`."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        cache = Path(HF_HUB_CACHE).expanduser()
    except RuntimeError:
        return temporary_folder() / "hub"
    return cache


def _printable(names: Iterable[str]) -> list[str]:
    """Without files whose names a terminal would act on: the library shows them with its bars. No model needs them."""
    return [name for name in names if visible(name) == name and "\n" not in name and "\t" not in name]


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def failures() -> tuple[type[Exception], ...]:
    """What the library lets through.

    Its own errors are OSErrors. Transport errors come from httpx or httpx2, by its version, and share the first base
    of its HTTP errors. ValueError: a name or an answer that makes no sense, as from the login page of a hotel's
    network. RuntimeError: the transfer library under it. ImportError: a SOCKS proxy, for which a package is missing.
    InvalidURL: a proxy's address; it shares no base with the other errors of httpx.
    """
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__bases__[0]
    invalid = getattr(sys.modules.get(base.__module__.partition(".")[0]), "InvalidURL", base)
    return (base, invalid, OSError, ValueError, RuntimeError, ImportError)


@contextlib.contextmanager
def quiet_library(quiet: bool) -> Iterator[None]:
    """The library without its log lines and warnings, which our errors replace; without its bars when quiet."""
    from huggingface_hub.utils import logging as log
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level = log.get_verbosity()
    hide = (quiet or sys.stderr is None) and not are_progress_bars_disabled()
    log.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hide:
            disable_progress_bars()
        try:
            yield
        finally:
            if hide:
                enable_progress_bars()
            log.set_verbosity(level)
