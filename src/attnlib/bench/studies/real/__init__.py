"""Evidence on real pretrained models: one module per question, each a line of the suite ``real``.

``attnlib bench --suite real --out benchmarks/results`` goes through all lines, ``--suite real-<line>`` through one,
which writes ``real-<line>-cpu.json`` and its pictures, and goes on where it stopped. ``make models`` fetches the models
first.

A line is a module of this package with

- ``QUESTION``: what is asked, as a sentence;
- ``MODELS``: names of :mod:`attnlib.bench.models` that it loads;
- ``measure(progress=None, keep=None, pictures=None, ...)``: plain values for JSON. ``progress`` is told of every piece;
  ``keep`` is a file that takes every finished piece (:func:`attnlib.bench.small.study` does so) and from which a later
  call goes on; ``pictures`` is a folder. Every other argument has a default, and a test calls it with small ones on a
  model of a few numbers.

Modules whose name begins with ``_`` are shared by lines and are none.
"""
