"""Per-sample gradients: factors where a layer's gradient is a product, plain rows for the rest.

A linear layer's gradient for one sample is `output_grad^T @ input`, over its T positions: one ordinary
batched forward and backward gives both factors for every sample at once (DESIGN: "store what makes the
gradient"). `rules` holds one such rule for each kind of layer, `tape` what a pass leaves behind, `forms` says
which layer is kept how, `survey` and `cost` find and choose, `decide` proves the choice, `engine` runs it over a
batch; `alone` and `mapped` are the ways for what no rule covers.
"""

from infl_cache.maths.capture.decide import check_forms, decide_forms
from infl_cache.maths.capture.engine import Captured, Factors, capture, rows_of
from infl_cache.maths.capture.forms import Forms, Layer

__all__ = ["Captured", "Factors", "Forms", "Layer", "capture", "check_forms", "decide_forms", "rows_of"]
