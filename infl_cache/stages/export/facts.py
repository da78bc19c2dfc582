"""What the numbers of a run mean, for files that leave it: sizes, system, measure, sign."""

from __future__ import annotations

from infl_cache.disk.run import RunFolder
from infl_cache.maths.measures import HIGHER_IS_BETTER
from infl_cache.stages.selection import count_of_tests
from infl_cache.stages.tiles import matrix_tests, sign_of

DEFINITION = "influence[j, i] = -(1/n_train) s_test[j] . grad_z[i], s_test[j] = (C + damping I)^-1 grad measure(z_j)"


def facts_of(folder: RunFolder) -> dict[str, int | float | str]:
    """Of a run with influences: plain numbers and words by name."""
    plan, identity = folder.plan("stest"), folder.manifest.stages["stest"]["identity"]
    damping = plan.get("damping", identity["damping"])
    measure = str(plan.get("measure", "loss"))
    better = "higher" if measure in HIGHER_IS_BETTER else "lower"
    helpful, harmful = ("negative", "positive") if sign_of(folder) > 0 else ("positive", "negative")
    return {
        "n_train": int(folder.plan("grads")["n_rows"]),
        "n_test": count_of_tests(folder),
        "n_test_asked": len(matrix_tests(folder)),
        "damping": damping if isinstance(damping, str) else float(damping),
        "solver": str(identity["solver"]),
        "curvature": str(plan.get("curvature", identity["curvature"])),
        "measure": measure,
        "sign": f"{helpful} = helpful, {harmful} = harmful (the {measure} is better when {better})",
        "definition": DEFINITION,
        "removal": "removing training sample i changes the measure of test sample j by about -influence[j, i]",
    }
