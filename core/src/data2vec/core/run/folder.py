"""A run's folder: where it is, who writes to it, and the settings in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from data2vec.core.errors import ConfigError
from data2vec.core.files import write_atomically
from data2vec.core.lock import only_writer
from data2vec.core.settings.fields import Recipe

CONFIGURATION = "config.yaml"


def run_folder(recipe: Recipe) -> Path:
    """``train.folder``, or ``runs/NAME``."""
    return Path(recipe.train.folder or Path("runs") / recipe.name)


def check_folder(folder: Path) -> None:
    """Refuse a run's folder that cannot be made or written to, without making it.

    Raises:
        ConfigError: it is below a file, or in a folder without permission.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "is no folder" if not place.is_dir() else "cannot be written to"
        raise ConfigError([f"train.folder={folder}: {place} {reason}; choose another place for the run"])


def hold(held: contextlib.ExitStack, folder: Path) -> None:
    """Be the only writer of the folder until ``held`` ends.

    Raises:
        FolderInUseError: another process is.
        ConfigError: it cannot be written to.
    """
    try:
        held.enter_context(only_writer(folder))
    except OSError as error:
        raise ConfigError([f"train.folder={folder}: cannot be written to ({error})"]) from None


def write_configuration(folder: Path, configuration: str) -> None:
    """Write the settings into the folder, as YAML.

    Raises:
        ConfigError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIGURATION, configuration.encode())
    except OSError as error:
        raise ConfigError([f"train.folder={folder}: cannot be written to ({error})"]) from None
