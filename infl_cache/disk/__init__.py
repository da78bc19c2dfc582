"""The disk column: what lies in a run folder and how it gets there. Never imports torch."""
