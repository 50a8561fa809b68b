"""The modality-agnostic half of data2vec: model, EMA teacher, objective, data, training, evaluation."""

from data2vec.core.batch import Batch
from data2vec.core.errors import Data2VecError
from data2vec.core.pretraining.data2vec import Data2Vec
from data2vec.core.run.cli import main
from data2vec.core.run.load import LoadedRun, load_run
from data2vec.core.settings.pretraining import Experiment

__all__ = ["Batch", "Data2Vec", "Data2VecError", "Experiment", "LoadedRun", "load_run", "main"]
