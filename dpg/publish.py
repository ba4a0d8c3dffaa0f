"""A finished run's generator and data set on the Hugging Face hub."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from dpg.folder import RunFolder, RunFolderError

NEEDED = {"generator": ("config.json", "model.safetensors*", "README.md"), "dataset": ("train.jsonl", "README.md")}
TYPES = {"generator": "model", "dataset": "dataset"}
WHAT = (*TYPES, "both")


class PublishError(Exception):
    """Something that the hub, or the way to it, did not allow; the message says what to do."""


class Upload(NamedTuple):
    """A folder, and the repository that it goes to.

    Attributes:
        repo_type: model or dataset, as the hub has them.
        files: names within the folder, with their bytes.
    """

    folder: Path
    repo: str
    repo_type: str
    files: dict[str, int]

    def __str__(self) -> str:
        size = sum(self.files.values()) / 1e6
        return f"{self.folder} -> {self.repo_type} {self.repo}: {len(self.files)} files, {size:.1f} MB"


def uploads(path: Path, repo: str, what: str = "both") -> list[Upload]:
    """What is to be uploaded of the run in `path`, checked to be whole.

    Raises:
        ValueError: for a name that the hub does not allow.
        RunFolderError: if the run is not finished.
    """
    if what not in WHAT:
        raise ValueError(f"{what!r} cannot be pushed. Choose from: {', '.join(WHAT)}.")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{error} Pass --repo NAME, or OWNER/NAME for an organisation's.") from error
    RunFolder(path).read_config()  # Refuses what is no run.
    return [_upload(path / name, repo, kind) for name, kind in TYPES.items() if what in (name, "both")]


def push(path: Path, repo: str, *, private: bool = False, what: str = "both") -> list[str]:
    """Make the repositories if they are not there, upload each folder in one commit, and return their addresses.

    Args:
        repo: the name of both: the hub keeps models and data sets apart.
        private: of repositories that are made now; others stay as they are.
        what: generator, dataset or both.

    Raises:
        ValueError, RunFolderError: as `uploads`.
        PublishError: if nobody is logged in, or the hub refuses.
    """
    chosen, api = uploads(path, repo, what), HfApi()
    if get_token() is None:
        raise PublishError(
            "nobody is logged in to the hub. Run `hf auth login`, or set HF_TOKEN to one that may write."
        )
    addresses = []
    for upload in chosen:
        try:
            made = api.create_repo(repo, repo_type=upload.repo_type, private=private or None, exist_ok=True)
            api.upload_folder(
                folder_path=upload.folder,
                repo_id=made.repo_id,
                repo_type=upload.repo_type,
                allow_patterns=list(upload.files),
                commit_message=f"Upload of a run of dpg: {path.name}",
            )
        except HfHubHTTPError as error:
            done = f" Uploaded before that: {', '.join(addresses)}." if addresses else ""
            why = " ".join(str(error).split())
            raise PublishError(f"the hub refused {upload.repo_type} {repo}: {why}{done}") from error
        addresses.append(str(made))
    return addresses


def _upload(folder: Path, repo: str, repo_type: str) -> Upload:
    missing = [pattern for pattern in NEEDED[folder.name] if not any(folder.glob(pattern))]
    if missing:
        raise RunFolderError(
            f"{folder} holds no {missing[0].rstrip('*')}: the run in {folder.parent} is not finished, or an older "
            "version made it. Continue it with --resume."
        )
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.suffix != ".tmp"}
    return Upload(folder, repo, repo_type, files)
