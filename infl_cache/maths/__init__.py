"""The maths column: gradients, curvature, solvers, scores. Never imports zarr, never opens a file to write."""
