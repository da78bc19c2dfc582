"""What tests of the stages share."""

import pytest

from infl_cache.stages import stest as stage


@pytest.fixture
def lights_out(monkeypatch):
    """`begun = lights_out()`: as the third block of stage 2 (or `at`) from now on begins, it fails; blocks begun."""

    def patched(at=3):
        original, begun = stage._right_hand_sides, []

        def failing(run, forms, block):
            begun.append(block.index)
            if len(begun) == at:
                raise RuntimeError("the lights went out")
            return original(run, forms, block)

        monkeypatch.setattr(stage, "_right_hand_sides", failing)
        return begun

    return patched
