"""One page to look at attention with: what a model read, packed into a file that asks for nothing.

>>> from attnlib.look.viewer import Run, page, read
"""

from .aligning import difference
from .runs import Axis, LayerMaps, Part, Run
from .tokens import pieces, text_axis
from .write import Page, page, read

__all__ = ["Axis", "LayerMaps", "Page", "Part", "Run", "difference", "page", "pieces", "read", "text_axis"]
