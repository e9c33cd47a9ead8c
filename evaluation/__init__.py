"""Benchmarks: files, questions, answers, scores."""
