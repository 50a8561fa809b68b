"""The model: Transformer, masks, EMA teacher, targets, objective, predictors, and data2vec that joins them."""
