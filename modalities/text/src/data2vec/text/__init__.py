"""data2vec for text: settings, token embedding, token and span maskers and loader will live here, on fairseq2."""
