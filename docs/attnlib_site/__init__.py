"""The site: pages written from the register, the docstrings and the measured figures, then built by zensical.

``python -m attnlib_site --out DIR`` (with ``docs`` on the path) writes the pages and the settings of the generator;
``make docs`` does that and builds them. What is new in the catalogue, the registry, the packages of techniques,
``benchmarks/results`` or ``docs`` has its page without a change here.
"""
