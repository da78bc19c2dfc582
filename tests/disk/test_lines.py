import pytest

from infl_cache.disk.lines import append_line, read_lines

FIRST, SECOND = {"key": "a", "values": [0.1, -1e-300]}, {"key": "b", "values": [2.0]}


def test_lines_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert list(read_lines(path)) == []
    append_line(path, FIRST)
    append_line(path, SECOND)
    assert list(read_lines(path)) == [FIRST, SECOND]


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_a_torn_end_is_ignored_and_the_next_line_is_whole(tmp_path, cut):
    path = tmp_path / "lines.jsonl"
    append_line(path, FIRST)
    append_line(path, SECOND)
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [FIRST, SECOND] if cut == 1 else [FIRST]  # all but the end of the line is all there is to it
    assert list(read_lines(path)) == kept
    append_line(path, SECOND)
    assert list(read_lines(path)) == [*kept, SECOND]


def test_a_changed_line_is_not_believed(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, FIRST)
    append_line(path, SECOND)
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.7"))
    assert list(read_lines(path)) == [SECOND]
