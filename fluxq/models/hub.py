"""Models from the Hugging Face hub: read from its cache or downloaded, only the files that one part needs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxq.console import Notify, console, working
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import PICKLE_SUFFIXES
from fluxq.formats.checkpoint.shards import FOLDERS, SUFFIXES, locate
from fluxq.formats.checkpoint.source import OPENERS
from fluxq.formats.quantized import require_disk_space


class NotFetched(WrongRequest):
    """The files are on the hub but not in its cache; `nbytes` would have to be downloaded."""

    def __init__(self, repository: str, files: list[str], nbytes: int) -> None:
        self.repository, self.files, self.nbytes = repository, files, nbytes
        super().__init__(f"{len(files)} files of {repository}, {nbytes / 1e9:.1f} GB, are not in the hub's cache yet")


def hub_id(path: Path) -> str | None:
    """`path` as a hub id, owner/name; None if it is not one. A path that exists is never a hub id."""
    text = path.as_posix()
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text)
    is_file = path.suffix.lower() in {*SUFFIXES, *PICKLE_SUFFIXES, ".json"}
    return text if is_id and not is_file and not path.exists() else None


def hub_cache() -> Path:
    """The folder where the hub's library stores downloads, including tokenizers: HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def from_hub(repository: str, part: str, notify: Notify, fetch: bool = True) -> Path:
    """The local path of the model `part` of `repository`; downloads missing files and notifies of it before.

    If files are missing and `fetch` is false, raises NotFetched. Raises WrongRequest if the hub refuses or cannot be
    reached, or if the disk has no room for them.
    """
    from huggingface_hub import constants, snapshot_download

    if path := in_hub_cache(repository, part):
        return path
    if not constants.HF_HUB_OFFLINE:
        say = notify if fetch else console.print  # `fluxq check` shows no other choices
        say(f"{part} of {repository} is not in the hub's cache: looking it up on huggingface.co")
    with _hub_errors(repository):
        files, nbytes = _files_of(repository, part)
        if not fetch:
            raise NotFetched(repository, files, nbytes)
        require_disk_space(hub_cache() / repository, nbytes)
        notify(f"fetching {len(files)} files of {repository} for {part}, {nbytes / 1e9:.1f} GB, once")
        with working(f"fetching {repository}"):
            snapshot_download(repository, allow_patterns=files)
    path = in_hub_cache(repository, part)
    if path is None:
        raise WrongRequest(f"{repository} was fetched, but holds no usable file with {part}; give another")
    return path


def folder_from_hub(
    repository: str,
    wanted: Callable[[str], bool],
    complete: Callable[[Path], bool],
    notify: Notify,
    offline: bool = False,
) -> Path:
    """The local folder with the files of `repository` whose names are `wanted`, downloaded unless it is `complete`.

    Notifies before it downloads. Raises WrongRequest as `from_hub` does, and if `offline` forbids it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    if (folder := _cached_folder(repository)) and complete(folder):
        return folder
    if offline or constants.HF_HUB_OFFLINE:
        raise WrongRequest(
            f"{repository} is not in the hub's cache ({hub_cache()}), and "
            f"{'--offline' if offline else 'HF_HUB_OFFLINE'} forbids downloading it; name a model's folder, or start "
            "once without"
        )
    notify(f"{repository} is not in the hub's cache: looking it up on huggingface.co")
    with _hub_errors(repository):
        siblings = HfApi().model_info(repository, files_metadata=True).siblings or ()
        sizes = {file.rfilename: file.size or 0 for file in siblings if wanted(file.rfilename)}
        nbytes = sum(sizes.values())
        require_disk_space(hub_cache() / repository, nbytes)
        notify(f"fetching {len(sizes)} files of {repository}, {nbytes / 1e9:.1f} GB, once")
        with working(f"fetching {repository}"):
            folder = Path(snapshot_download(repository, allow_patterns=[*sizes]))
    return folder


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """What the hub refuses, or a network that is not there, as a WrongRequest about `repository`."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise WrongRequest(
            f"{repository} asks you to accept its license: do so on its page on the hub, create a token in your "
            "settings there, and run `hf auth login` or set HF_TOKEN; then start again"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise WrongRequest(
            f"{repository} is neither a file or folder here nor a model on the Hugging Face hub; check the name "
            "(a private one needs `hf auth login`)"
        ) from error
    except (HfHubHTTPError, OSError, _transport_error()) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise WrongRequest(
            f"{repository} is neither a file or folder here nor complete in the hub's cache, and the hub cannot be "
            f"reached ({reason}); go online once, or give paths"
        ) from error


def _transport_error() -> type[Exception]:
    """The base class of the HTTP client's errors, which the hub's library does not convert if there is no network."""
    for client in ("httpx2", "httpx"):
        if importlib.util.find_spec(client):
            return importlib.import_module(client).HTTPError
    return OSError


def in_hub_cache(repository: str, part: str) -> Path | None:
    """The file or index in the hub's cache; None if it is missing or incomplete."""
    if (folder := _cached_folder(repository)) is None:
        return None
    try:
        path = locate(folder, part)
        OPENERS[part](path)
    except WrongRequest:
        return None
    return path


def _cached_folder(repository: str) -> Path | None:
    """What the hub's cache has of `repository`, perhaps incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError as error:  # the error has the path of a partial download
        folder = getattr(error, "snapshot_path", None)
        return Path(folder) if folder else None
    except (HFValidationError, OSError):
        return None


def _files_of(repository: str, part: str) -> tuple[list[str], int]:
    """The files of `repository` that hold `part`, and their bytes: its folder in diffusers' layout, else the only
    .safetensors file.
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
                f"{repository} has no folder {FOLDERS[part]} but {names}; download the file with {part} "
                "and give its path"
            )
    return inside, sum(sizes[name] for name in inside)
