"""`fluxq caption`: write the captions that are missing, edit those that are there, show what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fluxq.captioning.fill import fill, to_fill
from fluxq.captioning.folder import Backup, Captioned, captioned, edits, without_effect, write_edits
from fluxq.console import console, plural, progress_bar
from fluxq.data.caption_edits import frequent, phrase_pattern
from fluxq.errors import WrongRequest

Answer = dict[str, Any]


def caption_command(
    folders: Sequence[Path],
    recursive: bool = False,
    trigger: str | None = None,
    model: str | None = None,
    prompt: str | None = None,
    max_words: int | None = None,
    batch: int | None = None,
    overwrite: bool = False,
    offline: bool = False,
    remove: Sequence[str] = (),
    replace: Sequence[tuple[str, str]] = (),
    table: bool = False,
) -> Answer:
    """Caption the images of `folders` that have none, all with `overwrite`; or, with `remove`, `replace` or `table`,
    edit and count the captions that are there. Returns what --json prints.

    Raises WrongRequest for options that contradict each other.
    """
    asks = {"--model": model, "--prompt": prompt, "--max-words": max_words, "--batch": batch}
    asks |= {"--overwrite": overwrite, "--offline": offline}
    edit = {"--remove": remove, "--replace": replace, "--table": table}
    if (ask := next(filter(asks.get, asks), None)) and (other := next(filter(edit.get, edit), None)):
        raise WrongRequest(
            f"{ask} is for captions that a model writes, {other} for those that are there; run one after the other"
        )
    if prompt is not None and not prompt.strip():
        raise WrongRequest("--prompt is empty; write what to ask, or leave it out")
    if not any(edit.values()):
        return _write(captioned(folders, recursive), model, prompt, max_words, batch, overwrite, offline, trigger)
    if trigger and not (remove or replace):
        raise WrongRequest("--trigger changes nothing in a --table; leave it out, or pass --remove or --replace too")
    phrases = _phrases(remove, replace, trigger)
    items = captioned(folders, recursive)
    answer = _edit(items, phrases, replace, trigger) if remove or replace else {}
    if table:
        answer["table"] = _table(captioned(folders, recursive))
    return answer


def _phrases(remove: Sequence[str], replace: Sequence[tuple[str, str]], trigger: str | None) -> list[str]:
    """What to remove. Raises WrongRequest for edits that make no sense."""
    phrases = [" ".join(phrase.split()) for text in remove for phrase in text.split(",")]
    if not all(phrases):
        raise WrongRequest('--remove has an empty phrase; write phrases with commas between them: "red hair, glasses"')
    for phrase in phrases:
        if trigger and phrase_pattern(phrase).search(trigger):
            raise WrongRequest(f"--remove {phrase} would take out the trigger {trigger}; leave one of them out")
    for old, new in replace:
        if not old.strip() or not new.strip():
            raise WrongRequest(f"--replace '{old}' '{new}' needs two texts; to take something out use --remove")
        if old == new:
            raise WrongRequest(f"--replace '{old}' '{new}' changes nothing; leave it out")
    return phrases


def _write(
    items: Sequence[Captioned],
    model: str | None,
    prompt: str | None,
    max_words: int | None,
    batch: int | None,
    overwrite: bool,
    offline: bool,
    trigger: str | None,
) -> Answer:
    from fluxq.captioning.model import DEFAULT_MODEL, Captioner

    model = model or DEFAULT_MODEL
    settings = repr((model, prompt, max_words, trigger)).encode("utf-8", "surrogateescape")
    backup = Backup(blake2b(settings, digest_size=4).hexdigest()) if overwrite else None
    wanted = to_fill(items, backup)
    answer: Answer = {
        "images": len(items),
        "captioned": 0,
        "captions": {},
        "unread": [],
        "speechless": [],
        "backups": [],
    }
    if there := len(items) - len(wanted):
        why = (
            "were captioned anew before this was interrupted"
            if overwrite
            else "have a caption, which --overwrite replaces"
        )
        console.print(f"{there:,} of {plural(len(items), 'image')} {why}")
    if not wanted:
        return answer | ({"backups": [str(path) for path in backup.finish()]} if backup else {})
    console.print(f"{plural(len(wanted), 'image')} to caption with {model}")
    captioner = Captioner(model, prompt, max_words, offline, console.print)
    on_gpu = captioner.model.device.type == "cuda"
    batch = batch or (8 if on_gpu else 1)
    console.print(f"on the {'GPU' if on_gpu else 'CPU'}, {plural(batch, 'image')} at a time")
    try:
        with progress_bar() as progress:
            filled = fill(wanted, captioner, trigger, batch, backup, progress, console.print)
    except KeyboardInterrupt:
        console.print("what is written stays; the same command goes on")
        raise
    for line in filled.unread.values():
        console.print(f"not captioned: {line}")
    for image in filled.speechless:
        console.print(f"not captioned: the model says nothing about {image}")
    _tell_backups(filled.backups)
    console.print(f"{plural(len(filled.captions), 'caption')} written")
    return answer | {
        "captioned": len(filled.captions),
        "captions": {str(file): text for file, text in filled.captions.items()},
        "unread": [*filled.unread.values()],
        "speechless": [str(image) for image in filled.speechless],
        "backups": [str(path) for path in filled.backups],
        "model": model,
        "batch": filled.batch,
    }


def _edit(
    items: Sequence[Captioned], remove: Sequence[str], replace: Sequence[tuple[str, str]], trigger: str | None
) -> Answer:
    changes = edits(items, remove, replace, trigger)
    for file, (before, after) in changes.items():
        console.print(str(file))
        for sign, lines in (("-", before), ("+", after)):
            for line in lines:
                console.print(f"  {sign} {line}")
    backups = write_edits(changes)
    unmatched = without_effect(items, [*remove, *(old for old, _ in replace)])
    for phrase in unmatched:
        console.print(f"'{phrase}' is in no caption")
    _tell_backups(backups)
    console.print(f"{plural(len(changes), 'caption')} changed, of {plural(len(items), 'image')}")
    return {
        "images": len(items),
        "changed": {str(file): {"before": c.before, "after": c.after} for file, c in changes.items()},
        "unmatched": unmatched,
        "backups": [str(path) for path in backups],
    }


def _table(items: Sequence[Captioned]) -> list[Answer]:
    captions = [item.caption.text for item in items if item.caption.text]
    if not captions:
        console.print("no image has a caption")
    rows = frequent(captions)
    for row in rows:
        console.print(f"{row.captions:>6} of {len(captions)}  {row.phrase}")
    return [{"phrase": row.phrase, "captions": row.captions, "of": len(captions)} for row in rows]


def _tell_backups(backups: Sequence[Path]) -> None:
    for path in backups:
        console.print(f"the captions as they were: {path}")
