"""The front end: any module that maps token ids to logits becomes a Program."""

from __future__ import annotations

from linearize._callable import make_callable
from linearize.capture.torch_export import capture

__all__ = ["capture"]

make_callable(__name__, capture)
