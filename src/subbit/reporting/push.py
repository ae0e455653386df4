"""push(): a checkpoint to the Hugging Face hub, checked before a byte leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

from subbit.calibration.text import split_sources
from subbit.checkpoint.files import LOG_FILE, MANIFEST_FILE
from subbit.checkpoint.reader import open_checkpoint
from subbit.errors import UserError
from subbit.evaluation.record import read_evaluations
from subbit.reporting.card import CARD_FILE, PLACEHOLDER, SourceFacts, new_card, read_card

__all__ = ["Upload", "push"]


@dataclass(frozen=True)
class Upload:
    """What goes to the hub."""

    repo: str
    files: dict[str, int]  # name → bytes; the card as it will be there
    card: str
    metadata: str  # of the card, YAML
    notes: tuple[str, ...]  # what the user may want to mend before
    url: str | None = None  # where it is; None before it is


def push(directory: str | Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload a finished checkpoint as a model repository, which is made if it is not there.

    The log stays here: it has times and local paths. A checkpoint without a card gets one.

    Args:
        repo: ``name`` or ``organization/name``.
        private: of a repository that is made; one that exists stays what it is.
        dry_run: only say what would be uploaded; needs no network and writes nothing.

    Raises:
        CheckpointError: an unfinished, damaged or altered checkpoint.
        UserError: no such name, not logged in, no network.
    """
    prepared = prepare(Path(directory), repo)
    if dry_run:
        return addressed(prepared, repo)
    try:
        api = HfApi()
        upload = addressed(prepared, api.create_repo(repo, private=private or None, exist_ok=True).repo_id)
        operations = [
            CommitOperationAdd(name, upload.card.encode() if name == CARD_FILE else str(Path(directory) / name))
            for name in upload.files
        ]
        api.create_commit(upload.repo, operations, commit_message="Upload a checkpoint compressed by subbit")
    except Exception as error:  # network, login, permissions, quota: all of them the user's to mend
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise UserError(f"cannot upload to {repo}: {reason}; check the network and `hf auth login`") from error
    return replace(upload, url=f"https://huggingface.co/{upload.repo}")


def prepare(directory: Path, repo: str) -> Upload:
    """Check a checkpoint with all its checksums, and list what would be uploaded."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(f"{repo!r} is no name of a repository; give NAME or ORGANIZATION/NAME") from None
    checkpoint = open_checkpoint(directory)
    checkpoint.check_contents()
    path = directory / CARD_FILE
    text = str(read_card(path)) if path.exists() else new_card(checkpoint, SourceFacts(), read_evaluations(directory))
    there = {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if goes_along(file)}
    files = dict(sorted({**there, CARD_FILE: len(text.encode())}.items()))
    values = ModelCard(text).data.to_dict()
    return Upload(repo, files, text, metadata_of(text), notes(values, checkpoint.manifest))


def addressed(upload: Upload, repo: str) -> Upload:
    """The same, with the name of the repository in the lines of the card that load the model."""
    text = upload.card.replace(f'"{PLACEHOLDER}"', f'"{repo}"')
    return replace(upload, repo=repo, card=text, files={**upload.files, CARD_FILE: len(text.encode())})


def goes_along(file: Path) -> bool:
    """Whether a file of a checkpoint is uploaded: not the log, nothing hidden, no folder."""
    return file.is_file() and not file.name.startswith(".") and file.name != LOG_FILE


def metadata_of(text: str) -> str:
    """The YAML at the head of a card."""
    return text.partition("---\n")[2].partition("\n---\n")[0]


def notes(card: dict[str, Any], manifest: dict[str, Any]) -> tuple[str, ...]:
    """What a reader of the repository would miss, or should not see."""
    found = []
    if "base_model" not in card:
        found.append(f"the card names no base_model; add the hub id of the dense model to the head of {CARD_FILE}")
    if "license" not in card:
        found.append(f"the card names no license; add that of the dense model to the head of {CARD_FILE}")
    source = str(manifest.get("recipe", {}).get("calibration", {}).get("source", ""))
    for part in split_sources(source):
        if Path(part).is_absolute():
            found.append(f"recipe and manifest name the calibration file {part}")
    if "files" not in manifest:
        found.append(f"no checksum was compared: {MANIFEST_FILE} is not there")
    return tuple(found)
