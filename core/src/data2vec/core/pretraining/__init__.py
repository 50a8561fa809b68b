"""data2vec itself: masks, student, teacher, targets, predictors and the objective."""
