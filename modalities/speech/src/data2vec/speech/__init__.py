"""data2vec for speech."""

# Before anything that could import fairseq2.
from data2vec.speech import _native as _native
from data2vec.speech.config import MaskConfig, MaskKind, PositionsConfig, Speech
from data2vec.speech.encoder import SpeechEncoder, load_encoder
from data2vec.speech.extractor import Geometry, PositionConvolutions, SpeechExtractor
from data2vec.speech.loader import AudioConfig, AudioDecoder
from data2vec.speech.masker import SpanMasker

__all__ = [
    "AudioConfig",
    "AudioDecoder",
    "Geometry",
    "MaskConfig",
    "MaskKind",
    "PositionConvolutions",
    "PositionsConfig",
    "SpanMasker",
    "Speech",
    "SpeechEncoder",
    "SpeechExtractor",
    "load_encoder",
]
