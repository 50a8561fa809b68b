"""What a run continues from, and which of its settings may have changed since."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data2vec.core.checkpoints import checkpoint
from data2vec.core.errors import CheckpointError
from data2vec.core.settings.fields import Experiment
from data2vec.core.settings.overrides import differences, from_yaml
from data2vec.core.training.schedule import learning_rate

# Settings that do not change what is computed: a run may be continued with other values of these.
_FREE = (
    "train.folder", "train.resume", "train.init_from", "train.new_end", "train.max_minutes", "train.log_every",
    "train.checkpoint_every", "train.checkpoint_minutes", "train.keep", "train.keep_best", "train.device",
    "train.compile", "train.micro_batch", "train.activation_checkpointing", "train.min_", "train.collapse_after",
    "evaluation.", "engine.", "data.train", "data.validation", "data.workers", "data.max_broken", "data.cache",
    "data.fetch_",
)  # fmt: skip
_END = ("train.updates", "optim.hold")  # what train.new_end allows to change
_NAMED = 8  # changed settings that an error names


@dataclass(frozen=True)
class Continued:
    """A checkpoint that a run goes on from. ``notice``: what a person should know about that, empty for nothing."""

    saved: checkpoint.Loaded
    notice: str = ""


def find_checkpoint(experiment: Experiment, folder: Path) -> Continued | None:
    """Find what the run continues from, and check it against the settings before anything is touched.

    Raises:
        CheckpointError: it belongs to another configuration, or the folder must be empty and is not.
    """
    resume = experiment.train.resume
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
    recorded = saved.state.get("configuration", {}).get("yaml")
    if not isinstance(recorded, str):
        raise CheckpointError(f"{place}: records no configuration; choose another checkpoint")
    old = from_yaml(recorded)
    changed = {
        key: f"{key}: {before} there, {now} now"
        for key, before, now in differences(old, experiment)
        if not key.startswith(_FREE) and key != "name"
    }
    if experiment.train.new_end:
        changed = {key: text for key, text in changed.items() if key not in _END}
    if changed:
        raise CheckpointError(_refusal(place, changed))
    return Continued(saved, _notice(old, experiment, int(saved.state["update"]), place))


def _refusal(place: Path, changed: dict[str, str]) -> str:
    more = f" (and {len(changed) - _NAMED} more)" if len(changed) > _NAMED else ""
    listed = "; ".join([*changed.values()][:_NAMED])
    longer = "train.new_end=true continues it to another end; or use " if set(changed) <= set(_END) else "Use "
    return (
        f"{place} was made with another configuration: {listed}{more}. "
        f"{longer}its settings to continue it, or another train.folder to start a new run"
    )


def _notice(old: Experiment, new: Experiment, update: int, place: Path) -> str:
    """What changes for a run that continues to another end.

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
