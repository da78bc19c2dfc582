"""What other programs read: JSON in the structure of `pytorch_influence_functions`, CSV, Parquet, and named arrays."""

from infl_cache.stages.export.named import named_arrays
from infl_cache.stages.export.writing import ALL, FORMATS, export

__all__ = ["ALL", "FORMATS", "export", "named_arrays"]
