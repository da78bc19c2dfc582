r"""The functions of `pytorch_influence_functions`, so that code written for it runs after changing its import.

    import infl_cache.ptif as ptif

    ptif.init_logging()
    config = ptif.get_default_config()
    influences, harmful, helpful = ptif.calc_img_wise(config, model, trainloader, testloader)

For a training sample :math:`z_i` and a test sample :math:`z_j`

.. math:: influence[j][i] = -\frac1n \nabla L(z_j)^T (C + damp\, I)^{-1} \nabla L(z_i),

the value that package has, too. **Negative is helpful**, and `helpful` begins with the most negative; there the two
lists were swapped. `C` is the Gauss-Newton form of the Hessian of the mean training loss (`config["curvature"]`).
What else differs stands in the page "migration" of this package.
"""

from infl_cache.ptif.calculating import calc_all_grad_then_test, calc_img_wise, calc_influences
from infl_cache.ptif.config import Config, get_default_config
from infl_cache.ptif.journal import display_progress, init_logging
from infl_cache.ptif.loaders import get_dataset_sample_ids, get_dataset_sample_ids_per_class
from infl_cache.ptif.results import combine
from infl_cache.ptif.saving import save_json
from infl_cache.ptif.single import calc_influence_single, calc_s_test_single, grad_z, s_test
from infl_cache.ptif.vectors import calc_grad_z, calc_s_test, load_grad_z, load_s_test

__all__ = [
    "Config", "calc_all_grad_then_test", "calc_grad_z", "calc_img_wise", "calc_influence_single", "calc_influences",
    "calc_s_test", "calc_s_test_single", "combine", "display_progress", "get_dataset_sample_ids",
    "get_dataset_sample_ids_per_class", "get_default_config", "grad_z", "init_logging", "load_grad_z", "load_s_test",
    "s_test", "save_json",
]  # fmt: skip
