"""Upload of an output folder to the Hugging Face hub."""

import argparse
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from fedlora.core.errors import ConfigError


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """``--push`` and ``--private``."""
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to this hub id")
    parser.add_argument(
        "--private", action="store_true", help="if the repository is made by --push"
    )


def push(folder: Path, options: argparse.Namespace) -> None:
    """Upload a folder as one commit to the repository of ``--push``, which is made if missing.

    Raises:
        ConfigError: if the hub refuses or cannot be reached; the folder stays as it is.
    """
    if options.push is None:
        return
    api = HfApi()
    try:
        repository = api.create_repo(options.push, private=options.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message="Upload by fedlora",
            delete_patterns="*",  # files of an earlier upload are no part of this one
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"--push {options.push}: the hub did not take {folder}, which is written: "
            f"{str(error).strip().splitlines()[0]} (log in with hf auth login, or set HF_TOKEN)"
        ) from error
    print(f"pushed: {done.commit_url}")
