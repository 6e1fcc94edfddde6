"""Exams for language models, each after a paper: red herrings, words of two languages, prompts and their errors."""
