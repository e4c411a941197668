"""Evals: a checkpoint's behaviour, questions in and scores out."""
