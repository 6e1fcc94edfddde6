"""What techniques do inside trained generators of painted scenes: one module per question, lines of ``diffusion``.

``attnlib bench --suite diffusion --out benchmarks/results`` goes through all lines, ``--suite diffusion-<line>``
through one, which writes ``diffusion-<line>-cpu.json`` and its pictures, and goes on where it stopped. Generators and
the judge lie in ``examples/diffusion/weights``; see :mod:`attnlib.bench.worlds`.

A line is a module of this package with

- ``QUESTION``: what is asked, as a sentence;
- ``PARTS``: names of trained parts that it loads, of :data:`attnlib.bench.worlds.models.PARTS`, and ``"judge"``;
- ``measure(progress=None, keep=None, pictures=None, ...)``: plain values for JSON. ``progress`` is told of every piece;
  ``keep`` is a file that takes every finished piece (:func:`attnlib.bench.small.study` does so) and from which a later
  call goes on; ``pictures`` is a folder. Every other argument has a default, and a test calls it with small ones.

Modules whose name begins with ``_`` are shared by lines and are none.
"""
