"""Who made the processor, as the system tells it."""

import pytest

from infl_cache import processor


@pytest.mark.parametrize(
    ("text", "expected"),
    [("processor : 0\nvendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False), ("", False),
     (None, False)],
)  # fmt: skip
def test_it_is_read_where_the_system_tells(text, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", file)
    processor.made_by_intel.cache_clear()
    assert processor.made_by_intel() == expected
    processor.made_by_intel.cache_clear()
