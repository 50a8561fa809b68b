"""data2vec for speech."""

# Before anything that could import fairseq2.
from data2vec.speech import _native as _native
from data2vec.speech.config import MaskConfig, MaskKind, PositionsConfig, Speech
from data2vec.speech.encoder import SpeechEncoder, load_encoder
from data2vec.speech.extractor import Geometry, PositionConvolutions, SpeechExtractor
from data2vec.speech.loader import AudioConfig, AudioDecoder
from data2vec.speech.masker import SpanMasker
from data2vec.speech.recogniser import ClipClassifier, Recogniser, load_classifier, load_recogniser

__all__ = [
    "AudioConfig",
    "AudioDecoder",
    "ClipClassifier",
    "Geometry",
    "MaskConfig",
    "MaskKind",
    "PositionConvolutions",
    "PositionsConfig",
    "Recogniser",
    "SpanMasker",
    "Speech",
    "SpeechEncoder",
    "SpeechExtractor",
    "load_classifier",
    "load_encoder",
    "load_recogniser",
]
