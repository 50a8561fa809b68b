"""data2vec for images."""

from data2vec.vision.classifier import ImageClassifier, load_classifier
from data2vec.vision.config import MaskConfig, MaskKind, PositionKind, Vision
from data2vec.vision.encoder import ImageEncoder, load_encoder
from data2vec.vision.extractor import PatchExtractor, PatchInit, RelativePositionBias, SinePositions
from data2vec.vision.loader import AugmentConfig, ImageDecoder
from data2vec.vision.masker import BlockMasker, InverseBlockMasker

__all__ = [
    "AugmentConfig",
    "BlockMasker",
    "ImageClassifier",
    "ImageDecoder",
    "ImageEncoder",
    "InverseBlockMasker",
    "MaskConfig",
    "MaskKind",
    "PatchExtractor",
    "PatchInit",
    "PositionKind",
    "RelativePositionBias",
    "SinePositions",
    "Vision",
    "load_classifier",
    "load_encoder",
]
