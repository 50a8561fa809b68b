"""data2vec for speech: settings, waveform extractor, span masker and loader will live here, on fairseq2's layers."""
