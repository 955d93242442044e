"""Find the files of the two tokenizers, which model files do not contain, and turn captions into ids.

CLIP's is a byte-level BPE (vocab.json and merges.txt, or tokenizer.json), T5's a SentencePiece model (spiece.model,
tokenizer.json, or inside a GGUF T5, of which nothing else is read). Every form gives the same ids as transformers, also
for special tokens that a caption spells out, such as `</s>`.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from fluxq.console import Notify
from fluxq.errors import WrongRequest
from fluxq.model.text import Tokenize

from .checkpoint.files import printable
from .gguf_tokenizer import read_gguf_tokenizer, spiece_of

LEVELS_UP = 6  # a model may be in ComfyUI/models/text_encoders/flux/ and the tokenizers in ComfyUI/comfy/
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
TRIAL = "A caf\u00e9, 2 cats"  # some damage only shows when a caption is encoded
T5_PIECES, T5_SENTINELS = 32000, 100  # in the public T5 models; the sentinels are not in spiece.model


@dataclass(frozen=True)
class Kind:
    """A tokenizer to look for.

    forms    the sets of files that work, best first; the first may also be directly next to a model, because its
             names are unmistakable
    folders  searched in the model's folder and the folders above it
    hub      (repository, folder in it), searched in the hub's cache; the files are downloaded from the first
    option   the setting that names the files
    """

    name: str
    forms: tuple[tuple[str, ...], ...]
    folders: tuple[str, ...]
    hub: tuple[tuple[str, str], ...]
    option: str

    def within(self, folder: Path) -> list[tuple[Path, ...]]:
        """The paths that the files of each form would have in `folder`."""
        return [tuple(folder / name for name in form) for form in self.forms]


FORGE = "backend/huggingface/black-forest-labs/FLUX.1-dev"
BFL = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")
CLIP = Kind(
    name="CLIP",
    forms=(("vocab.json", "merges.txt"), ("tokenizer.json",)),
    folders=("tokenizer", "comfy/sd1_tokenizer", f"{FORGE}/tokenizer"),
    hub=(("openai/clip-vit-large-patch14", ""), *((repository, "tokenizer") for repository in BFL)),
    option="clip_tokenizer=FOLDER",
)
T5 = Kind(
    name="T5",
    forms=(("spiece.model",), ("tokenizer.json",)),
    folders=("tokenizer_2", "comfy/text_encoders/t5_tokenizer", f"{FORGE}/tokenizer_2"),
    hub=(("google/t5-v1_1-xxl", ""), *((repository, "tokenizer_2") for repository in BFL)),
    option="t5_tokenizer=FILE",
)

# --- finding the files ---


def find_tokenizers(
    model_files: Sequence[Path],
    clip: Path | None = None,
    t5: Path | None = None,
    known: Callable[[Path], bool] = Path.is_file,
    notify: Notify = print,
    fetch: Callable[[Kind, Notify], tuple[Path, ...]] | None = None,
    offline: bool = False,
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files of CLIP's and of T5's tokenizer.

    `clip` and `t5`, if given, name a tokenizer's file or folder. Otherwise the search goes, in this order:
    1. the folders of `model_files` and those above them, where a diffusers folder, ComfyUI and Forge keep tokenizers;
    2. for T5, a GGUF T5 next to one of the models;
    3. the hub's cache;
    4. a download from the hub, announced with `notify`. `fetch` replaces this step, `offline` forbids it.

    A missing file counts as found if `known` is true for it, unless it is a GGUF that was not named. If a tokenizer is
    found nowhere, raises WrongRequest with the files' names and usual places.
    """
    files, failed = [], []
    for kind, given in ((CLIP, clip), (T5, t5)):
        try:
            if given:
                local = _given(kind, given, known)
            else:
                local = _near(kind, model_files, known) or _gguf_near(kind, model_files) or _cached(kind)
            if local or not offline:
                files.append(local or (fetch or _fetched)(kind, notify))
            else:
                failed.append(kind)
        except OSError:
            failed.append(kind)
    if failed:
        names = " and ".join(f"{kind.name}'s tokenizer ({' and '.join(kind.forms[0])})" for kind in failed)
        places = ", ".join(place for kind in failed for place in _usual_places(kind))
        options = " ".join(f"--set model.{kind.option}" for kind in failed)
        verb = "was" if len(failed) == 1 else "were"
        raise WrongRequest(
            f"{names} {verb} found neither near the model files nor in the hub's cache, and "
            f"{'--offline forbids downloading them' if offline else 'the hub cannot be reached'}; copy the files next "
            f"to the text encoders or pass {options} (the files are usually in {places})"
        )
    return files[0], files[1]


def _given(kind: Kind, path: Path, known: Callable[[Path], bool]) -> tuple[Path, ...]:
    """The tokenizer's files at `path`, a file or folder that the user named."""
    forms = kind.within(path)
    for exists in (Path.is_file, known):
        for form in forms:
            if all(map(exists, form)):
                return form
        if exists(path):
            return (path,)
    names = " or ".join(" with ".join(form) for form in kind.forms)
    raise WrongRequest(f"{path} is not a {kind.name} tokenizer; use {names} (--set model.{kind.option})")


def _near(kind: Kind, model_files: Sequence[Path], known: Callable[[Path], bool]) -> tuple[Path, ...] | None:
    """The nearest files; files that exist come before files that are only `known`."""
    near = _folders(model_files)
    candidates = [kind.within(folder)[0] for folder in near]
    levels = [(folder, *folder.parents)[:LEVELS_UP] for folder in near]
    for level in range(LEVELS_UP):
        for folder in dict.fromkeys(chain[level] for chain in levels if level < len(chain)):
            candidates += [form for part in kind.folders for form in kind.within(folder / part)]
    for exists in (Path.is_file, known):
        for form in candidates:
            if all(map(exists, form)):
                return form
    return None


def _gguf_near(kind: Kind, model_files: Sequence[Path]) -> tuple[Path, ...] | None:
    """The first GGUF T5 with a tokenizer next to a model; files that cannot be read are skipped."""
    if kind is not T5:
        return None
    for folder in _folders(model_files):
        with contextlib.suppress(OSError):
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() == ".gguf":
                    with contextlib.suppress(WrongRequest):
                        read_gguf_tokenizer(path)
                        return (path,)
    return None


def _folders(model_files: Sequence[Path]) -> list[Path]:
    """The folders of the models, and the folders that symbolic links lead to."""
    return list(dict.fromkeys(path.parent for file in model_files for path in (file.absolute(), file.resolve())))


def _cached(kind: Kind) -> tuple[Path, ...] | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in kind.hub:
        for form in kind.forms:
            names = [f"{folder}/{name}" if folder else name for name in form]
            paths = [try_to_load_from_cache(repository, name) for name in names]
            if all(isinstance(path, str) for path in paths):
                return tuple(Path(str(path)) for path in paths)
    return None


def _fetched(kind: Kind, notify: Notify) -> tuple[Path, ...]:
    """Download the files from the hub. Raises OSError if it cannot be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    repository, names = kind.hub[0][0], kind.forms[0]
    if not HF_HUB_OFFLINE:
        notify(f"downloading {kind.name}'s tokenizer ({', '.join(names)}) from {repository} (only this once)")
    return tuple(Path(hf_hub_download(repository, name)) for name in names)


def _usual_places(kind: Kind) -> list[str]:
    diffusers, comfy, forge = kind.folders
    return [
        f"ComfyUI's {comfy}",
        f"Forge's {forge}",
        f"the {diffusers} of a diffusers folder",
        f"{kind.hub[0][0]} on huggingface.co",
    ]


# --- captions to ids ---


def load_clip_tokenizer(files: Sequence[Path]) -> tuple[Tokenize, tuple[int, int]]:
    """CLIP's tokenizer, and its (begin, end) ids. `files`: vocab.json and merges.txt, or tokenizer.json.

    Raises WrongRequest for any other files.
    """
    with _usable(files, "CLIP tokenizer", "vocab.json with merges.txt"):
        tokenizer = _read_json(files[0]) if len(files) == 1 else _clip_bpe(*files)
        begin, end = tokenizer.token_to_id(CLIP_BEGIN), tokenizer.token_to_id(CLIP_END)
        if begin is None or end is None:
            raise ValueError(f"it has no {CLIP_BEGIN if begin is None else CLIP_END}")
        tokenize = _ids_of(tokenizer)
        tokenize(TRIAL)
    return tokenize, (begin, end)


def load_t5_tokenizer(files: Sequence[Path]) -> Tokenize:
    """T5's tokenizer. `files`: exactly one of spiece.model, tokenizer.json or a GGUF T5.

    Raises WrongRequest for any other file.
    """
    (path,) = files
    with _usable(files, "T5 tokenizer", "spiece.model"):
        tokenize = _t5_json(path) if path.suffix == ".json" else _t5_pieces(path)
        tokenize(TRIAL)
    return tokenize


def _t5_json(path: Path) -> Tokenize:
    tokenizer = _read_json(path)
    if (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")) != (0, 1):
        raise ValueError("its ids 0 and 1 are not <pad> and </s>")
    return _ids_of(tokenizer)


def _t5_pieces(path: Path) -> Tokenize:
    from sentencepiece import SentencePieceProcessor

    prepare = str
    if path.suffix.lower() == ".gguf":
        values = read_gguf_tokenizer(path)
        processor = SentencePieceProcessor(model_proto=spiece_of(values))
        if not values.get("precompiled_charsmap"):  # T5 uses nmt_nfkc; this differs from it in a few rare letters
            prepare = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()]).normalize_str
    else:
        processor = SentencePieceProcessor(model_file=str(path))
    pieces = processor.vocab_size()
    special = {processor.id_to_piece(i): i for i in (0, 1, 2)}
    if pieces == T5_PIECES:
        special |= {f"<extra_id_{n}>": pieces + T5_SENTINELS - 1 - n for n in range(T5_SENTINELS)}
    split = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def tokenize(caption: str) -> list[int]:
        parts = split.split(caption)
        return [i for part in parts for i in ([special[part]] if part in special else processor.encode(prepare(part)))]

    return tokenize


def _clip_bpe(vocabulary: Path, merges: Path) -> Tokenizer:
    """OpenAI's: lower case, collapsed white space, split into words, then byte-level BPE with `</w>` at word ends."""
    bpe = models.BPE.from_file(str(vocabulary), str(merges), unk_token=CLIP_END, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([name for name in (CLIP_BEGIN, CLIP_END) if bpe.token_to_id(name) is not None])
    return tokenizer


def _read_json(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids_of(tokenizer: Tokenizer) -> Tokenize:
    return lambda caption: tokenizer.encode(caption, add_special_tokens=False).ids


@contextlib.contextmanager
def _usable(files: Sequence[Path], what: str, wanted: str) -> Iterator[None]:
    """Whatever is raised inside becomes a WrongRequest."""
    try:
        yield
    except WrongRequest:
        raise
    except BaseException as error:  # the libraries raise any type, and a panic in Rust is not even an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = printable(str(error).strip().split("\n")[0])
        names = " with ".join(map(str, files))
        raise WrongRequest(f"{names} is not a usable {what} ({reason}); use {wanted}") from error
