"""Fitting mixers to their teacher: data, the streaming teacher, and the fit by output MSE."""
