"""What happens to a graph: one file per rewrite, on the channel graph only.

Imported as ``bnfold.passes``. Nothing here knows onnx or torch; a pass decides on facts and
leaves the editing to the front end.
"""

from bnfold.passes.leftover import with_forms
from bnfold.passes.local import plan_local
from bnfold.passes.maximal import plan_max

__all__ = ["plan_local", "plan_max", "with_forms"]
