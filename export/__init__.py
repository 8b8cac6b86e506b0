"""Files that run elsewhere: the one stateful graph as ONNX with a manifest, checked when written.

`linearize.export(compiled, directory, format="onnx")` is the way in, `linearize.export.runner.OnnxModel` the way back.
"""

from linearize._callable import make_callable
from linearize.export.write import export

__all__ = ["export"]

make_callable(__name__, export)
