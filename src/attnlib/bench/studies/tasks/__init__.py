"""Models of tasks on made-up and real data whose truth is known: one module per question, lines of ``tasks``.

``attnlib bench --suite tasks --out benchmarks/results`` goes through all lines, ``--suite tasks-<line>`` through one. A
line is a module of this package with ``QUESTION``, a sentence, and ``measure(progress=None, keep=None, pictures=None,
...)``, as the lines of :mod:`attnlib.bench.studies.multimodal_models` are.
"""
