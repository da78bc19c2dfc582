"""Per-sample gradients: factors where a layer's gradient is a product, plain rows for the rest.

A linear layer's gradient for one sample is `output_grad^T @ input`, over its T positions: one ordinary
batched forward and backward gives both factors for every sample at once (DESIGN: "store what makes the
gradient"). `forms` says which layer is kept how, `linear` and `mapped` are the two ways to get there,
`decide` chooses and checks, `engine` runs them over a batch.
"""

from infl_cache.maths.capture.decide import decide_forms
from infl_cache.maths.capture.engine import Captured, capture, rows_of
from infl_cache.maths.capture.forms import Forms, Layer

__all__ = ["Captured", "Forms", "Layer", "capture", "decide_forms", "rows_of"]
