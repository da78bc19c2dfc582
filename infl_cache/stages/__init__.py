"""The stages: the only place where the disk column and the maths column meet."""
