"""Models from the Hugging Face hub: out of its cache, else fetched, just the files that one part needs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import PICKLE_SUFFIXES
from fluxq.formats.checkpoint.shards import FOLDERS, SUFFIXES, locate
from fluxq.formats.checkpoint.source import OPENERS


class NotFetched(WrongRequest):
    """The files are in the hub and not in its cache; `nbytes` of them would have to be fetched."""

    def __init__(self, repository: str, files: list[str], nbytes: int) -> None:
        self.repository, self.files, self.nbytes = repository, files, nbytes
        super().__init__(f"{len(files)} files of {repository}, {nbytes / 1e9:.1f} GB, are not in the hub's cache yet")


def hub_id(path: Path) -> str | None:
    """`path` as owner/name where it can be read as one: what exists is always a path."""
    text = path.as_posix()
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text)
    is_file = path.suffix.lower() in {*SUFFIXES, *PICKLE_SUFFIXES, ".json"}
    return text if is_id and not is_file and not path.exists() else None


def hub_cache() -> Path:
    """Where the hub's library keeps what it fetches, tokenizers too: HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def from_hub(repository: str, part: str, notify: Callable[[str], None], fetch: bool = True) -> Path:
    """Where the model `part` of `repository` lies on this disk, after fetching what was missing; that is said.

    Raises NotFetched instead where `fetch` is false, and WrongRequest where the hub refuses or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if cached := _cached(repository, part):
        return cached
    try:
        files, nbytes = _needed(repository, part)
        if not fetch:
            raise NotFetched(repository, files, nbytes)
        notify(f"fetching {len(files)} files of {repository} for {part}, {nbytes / 1e9:.1f} GB, once")
        snapshot_download(repository, allow_patterns=files)
    except GatedRepoError as error:
        raise WrongRequest(
            f"{repository} asks you to accept its licence: do so on its page of the Hugging Face hub, make a token in "
            "your settings there, and run `hf auth login` or set HF_TOKEN; then start again"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise WrongRequest(
            f"{repository} is neither a file or folder here nor a model of the Hugging Face hub; check the name "
            "(a private one needs `hf auth login`)"
        ) from error
    except (HfHubHTTPError, OSError, _transport_error()) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WrongRequest(
            f"{repository} is neither a file or folder here nor wholly in the hub's cache, and the hub cannot be "
            f"reached ({reason}); go online once, or give paths"
        ) from error
    found = _cached(repository, part)
    if found is None:
        raise WrongRequest(f"{repository} was fetched, but holds no usable file with {part}; give another")
    return found


def _transport_error() -> type[Exception]:
    """What the hub's library lets through where there is no network: the base class of its HTTP client's errors."""
    for client in ("httpx2", "httpx"):
        if importlib.util.find_spec(client):
            return importlib.import_module(client).HTTPError
    return OSError


def _cached(repository: str, part: str) -> Path | None:
    """The file or index in the hub's cache, where it is there and whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError as error:  # what was fetched in part has its path with it
        folder = Path(getattr(error, "snapshot_path", None) or "")
    except (HFValidationError, OSError):
        return None
    if folder == Path(""):
        return None
    try:
        found = locate(folder, part)
        OPENERS[part](found)
    except WrongRequest:
        return None
    return found


def _needed(repository: str, part: str) -> tuple[list[str], int]:
    """The files of `repository` that hold `part`: its folder in diffusers' layout, else the only file; and their
    bytes.
    """
    from huggingface_hub import HfApi

    sizes = {
        file.rfilename: file.size or 0 for file in HfApi().model_info(repository, files_metadata=True).siblings or ()
    }
    inside = [name for name in sizes if re.fullmatch(rf"{FOLDERS[part]}/[^/]+\.(safetensors|json)", name)]
    if not any(name.endswith(".safetensors") for name in inside):
        inside = [name for name in sizes if "/" not in name and name.endswith(".safetensors")]
        if len(inside) != 1:
            names = ", ".join(inside[:6]) or "no .safetensors file"
            raise WrongRequest(
                f"{repository} has no folder {FOLDERS[part]}, and beside that {names}; download the one with {part} "
                "and give its path"
            )
    return inside, sum(sizes[name] for name in inside)
