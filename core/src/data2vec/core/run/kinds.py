"""The kinds of training that there are."""

from __future__ import annotations

from data2vec.core.errors import ConfigError
from data2vec.core.run.classifying import Classifying
from data2vec.core.run.kind import Kind
from data2vec.core.run.pretraining import Pretraining
from data2vec.core.run.recognising import Recognising
from data2vec.core.settings.fields import Recipe
from data2vec.core.settings.finetuning import Classification, Recognition
from data2vec.core.settings.pretraining import Experiment

_KINDS: dict[str, Kind] = {
    Experiment.kind: Pretraining(),
    Classification.kind: Classifying(),
    Recognition.kind: Recognising(),
}


def kind_of(recipe: Recipe) -> Kind:
    """Find the kind of training that the settings describe.

    Raises:
        ConfigError: there is none.
    """
    if recipe.kind not in _KINDS:
        raise ConfigError([f"{recipe.name}: {recipe.kind} is no kind of training; there is {', '.join(_KINDS)}"])
    return _KINDS[recipe.kind]
