"""data2vec for text."""

# Before anything that could import fairseq2.
from data2vec.text import _native as _native
from data2vec.text.classifier import TextClassifier, load_text_classifier
from data2vec.text.config import MaskConfig, MaskKind, Text
from data2vec.text.encoder import TextEncoder, load_encoder
from data2vec.text.extractor import TextExtractor
from data2vec.text.loader import TextDecoder
from data2vec.text.masker import SpanMasker, TokenMasker, corrupt
from data2vec.text.tokenizer import Tokenizer

__all__ = [
    "MaskConfig",
    "MaskKind",
    "SpanMasker",
    "Text",
    "TextClassifier",
    "TextDecoder",
    "TextEncoder",
    "TextExtractor",
    "TokenMasker",
    "Tokenizer",
    "corrupt",
    "load_encoder",
    "load_text_classifier",
]
