"""One family of errors. Each message says what failed, where, and what to do about it."""

from __future__ import annotations


class LinearizeError(Exception):
    """Base of every error that `linearize` raises on purpose; the CLI prints it as one line and exits with 1."""


class CaptureError(LinearizeError):
    """The model could not be turned into a graph."""


class VerificationError(LinearizeError):
    """A pass broke something that must hold: graph validity, shapes, or equality of an exact pass."""


class RewriteError(LinearizeError):
    """A planned rewrite cannot be carried out."""


class RecipeError(LinearizeError):
    """A recipe or plan does not exist or is not valid."""


class DataError(LinearizeError):
    """Token ids or calibration data are unusable."""


class StateError(LinearizeError):
    """A recurrent state does not fit the model or the call."""


class ArtifactError(LinearizeError):
    """A directory or file cannot be read or written."""


class ExportError(LinearizeError):
    """A compiled model cannot be exported, or the exported file disagrees with it."""
