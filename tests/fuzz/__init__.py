"""A seeded fuzzer: valid calls of public functions, and calls with one argument spoilt, each judged by what comes out.

By hand ``python -m tests.fuzz 20000 --seed 3``, with ``--only ops,masks`` and ``--resume file``. A trial is named by
target, seed and number, and repeats exactly: ``--trial ops.attention:3:17``.
"""
