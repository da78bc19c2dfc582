r"""Products with the curvature of the training loss, K vectors in one pass over the data.

.. math:: H = \frac1n \sum_i \nabla^2 L(z_i) \qquad G = \frac1n \sum_i J_i^T\, \nabla^2_{out} L_i\, J_i
          \qquad F = \frac1n \sum_i \nabla L(z_i) \nabla L(z_i)^T

`J_i` is the Jacobian of the outputs of sample i. `products` differentiates twice, `jacobian` multiplies with rows that
were captured, `operator` is what the solvers see, `spectrum` estimates its eigenvalues.
"""

from infl_cache.maths.curvature.operator import Curvature, require_finite
from infl_cache.maths.curvature.rows import Rows, captured, output_rows, remembered
from infl_cache.maths.curvature.spectrum import Spectrum, spectrum_of

__all__ = [
    "Curvature",
    "Rows",
    "Spectrum",
    "captured",
    "output_rows",
    "remembered",
    "require_finite",
    "spectrum_of",
]
