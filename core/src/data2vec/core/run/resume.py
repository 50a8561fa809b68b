"""The checkpoint that a run continues from, and the settings that may have changed since."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data2vec.core.checkpoints import checkpoint
from data2vec.core.errors import CheckpointError
from data2vec.core.settings.declare import Free
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.overrides import from_yaml
from data2vec.core.settings.tree import differences, freedom
from data2vec.core.training.schedule import learning_rate

_FIRST_TASK = "pretraining"  # of checkpoints that do not record any
_NAMED = 8  # changed settings that an error names


def recorded_configuration(recipe: Recipe, configuration: str) -> dict[str, str]:
    """The settings of a run as a checkpoint records them, for :func:`find_checkpoint`."""
    return {"task": recipe.kind, "yaml": configuration}


@dataclass(frozen=True)
class Continued:
    """A checkpoint that a run goes on from.

    ``recipe``: its settings. ``notice``: what a person should know about that, empty for nothing.
    """

    saved: checkpoint.Loaded
    recipe: Recipe
    notice: str = ""


def find_checkpoint(recipe: Recipe, folder: Path) -> Continued | None:
    """Find what the run continues from, and check it against the settings before anything is touched.

    Raises:
        CheckpointError: it belongs to another configuration, or the folder must be empty and is not.
    """
    resume = recipe.train.resume
    if resume == "never":
        if (folder / "checkpoints").exists():
            raise CheckpointError(
                f"train.resume=never: {folder} already holds a run; remove it or choose another train.folder"
            )
        return None
    place = checkpoint.latest(folder / "checkpoints") if resume == "auto" else Path(resume)
    if place is None:
        return None
    saved = checkpoint.load(place)
    configuration = saved.state.get("configuration", {})
    recorded, task = configuration.get("yaml"), configuration.get("task", _FIRST_TASK)
    if not isinstance(recorded, str):
        raise CheckpointError(f"{place}: records no configuration; choose another checkpoint")
    if task != recipe.kind:
        raise CheckpointError(f"{place} is of {task}, not of {recipe.kind}; choose another train.folder for this run")
    old = from_yaml(recorded, type(recipe))
    allowed = Free.WITH_NEW_END if recipe.train.new_end else Free.YES
    changed = {
        key: f"{key}: {before} there, {now} now"
        for key, before, now in differences(old, recipe)
        if freedom(recipe, key) < allowed
    }
    if changed:
        with_new_end = all(freedom(recipe, key) is Free.WITH_NEW_END for key in changed)
        raise CheckpointError(_refusal(place, [*changed.values()], with_new_end))
    return Continued(saved, old, _notice(old, recipe, int(saved.state["update"]), place))


def _refusal(place: Path, changed: list[str], with_new_end: bool) -> str:
    more = f" (and {len(changed) - _NAMED} more)" if len(changed) > _NAMED else ""
    listed = "; ".join(changed[:_NAMED])
    longer = "train.new_end=true continues it to another end; or use " if with_new_end else "Use "
    return (
        f"{place} was made with another configuration: {listed}{more}. "
        f"{longer}its settings to continue it, or another train.folder to start a new run"
    )


def _notice(old: Recipe, new: Recipe, update: int, place: Path) -> str:
    """Say what changes for a run that continues to another end.

    Raises:
        CheckpointError: the run is past it.
    """
    updates = new.train.updates
    if (old.train.updates, old.optim.hold) == (updates, new.optim.hold):
        return ""
    if updates < update:
        raise CheckpointError(
            f"train.updates={updates}: {place} has {update} already; choose a later end, or an earlier checkpoint "
            "with train.resume"
        )
    before = learning_rate(old.optim, update, old.train.updates)
    now = learning_rate(new.optim, update, updates)
    return (
        f"train.new_end: the run ends at update {updates} instead of {old.train.updates}; the learning rate follows "
        f"the new schedule from here on and goes from {before:.3g} to {now:.3g}"
    )
