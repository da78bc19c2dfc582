"""Figures of a run: each module draws one kind, `of_run` reads what it needs, `writing` makes files of them."""
