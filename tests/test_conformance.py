"""Every mechanism of the table is held to every claim it makes."""

from table import rows

from attnlib.check import conformance

test_conformance = conformance(rows())
