"""The run that another one starts from: the network of its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data2vec.core.errors import ConfigError
from data2vec.core.run.folder import CONFIGURATION, run_folder
from data2vec.core.run.load import configuration_of, folder_of
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import FineTuning
from data2vec.core.settings.network import with_network_of
from data2vec.core.settings.rules import show
from data2vec.core.settings.tree import settings_of


def with_network_of_start(recipe: Recipe, overrides: Sequence[str], before: Recipe | None = None) -> Recipe:
    """A recipe of fine-tuning with the network of the run it starts from; any other recipe as it is.

    Args:
        recipe: with ``overrides`` applied.
        overrides: what the user has set, as ``key=value``.
        before: the recipe of a run that is made first, where there is none yet.

    Raises:
        CheckpointError: there is no such run.
        ConfigError: it has another modality, or the user has set what the run decides.
    """
    if not isinstance(recipe, FineTuning) or not (recipe.start or "").strip():
        return recipe
    assert recipe.start is not None
    folder, own = folder_of(Path(recipe.start)), run_folder(recipe)
    found = [place for place in (folder, own) if (place / CONFIGURATION).is_file()]  # the run itself, once it has begun
    if before is not None and not found and run_folder(before) == folder:
        start = before
    else:
        start = configuration_of(found[0] if found else folder)
    named = [override.partition("=")[0].strip() for override in overrides]
    taken = with_network_of(recipe, start, named)
    own_values, after = settings_of(recipe), settings_of(taken)
    problems = [
        f"{show(key, own_values[key].value)}: the network is that of start={recipe.start}, which has "
        f"{show(key, after[key].value).partition('=')[2]}; leave it out"
        for key in named
        if key in after and after[key].value != own_values[key].value
    ]
    if problems:
        raise ConfigError(problems)
    return taken
