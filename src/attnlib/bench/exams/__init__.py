"""Exams for language and multimodal models, each after a paper: walls, words of two languages, prompts, judges."""
