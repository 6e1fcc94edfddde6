"""Multimodal models that look again, learn and answer: one module per question, lines of ``multimodal-models``.

``attnlib bench --suite multimodal-models --out benchmarks/results`` goes through all lines, ``--suite
multimodal-models-<line>`` through one, which writes ``multimodal-models-<line>-cpu.json`` and its pictures, and goes on
where it stopped.

A line is a module of this package with

- ``QUESTION``: what is asked, as a sentence;
- ``measure(progress=None, keep=None, pictures=None, ...)``: plain values for JSON. ``progress`` is told of every piece;
  ``keep`` is a file that takes every finished piece (:func:`attnlib.bench.small.study` does so) and from which a later
  call goes on; ``pictures`` is a folder. Every other argument has a default, and a test calls it with small ones.

Modules whose name begins with ``_`` are shared by lines and are none.
"""
