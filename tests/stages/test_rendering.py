"""What samples are shown as: by the task's `render`, checked, or by what they look like."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from infl_cache import BadInput, Task
from infl_cache.maths.params import select
from infl_cache.stages.opening import task_identity
from infl_cache.stages.rendering import as_it_looks, in_a_line, label_text, picture_at, shown
from tests import tasks

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5) * 10
RGB = np.stack([GREY, GREY // 2, 255 - GREY], axis=2)


def shown_by(render):
    return shown(dataclasses.replace(tasks.mlp(), render=render), "train", 3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (RGB, RGB),
        (RGB.astype(np.int64), RGB),
        (RGB / 255, RGB),
        (torch.tensor(RGB), RGB),
        (torch.tensor(RGB).permute(2, 0, 1), RGB),
        (torch.tensor(RGB / 255, dtype=torch.float32, requires_grad=True), RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), np.stack([GREY] * 3, axis=2)),
        (Image.fromarray(RGB).convert("RGBA"), RGB),
        (GREY[..., None], np.stack([GREY] * 3, axis=2)),
        (GREY > 90, np.stack([(GREY > 90) * np.uint8(255)] * 3, axis=2)),
        (np.array([[-1e-7, 1.0000002]], np.float32), np.array([[[0] * 3, [255] * 3]])),  # as normalising back rounds
    ],
    ids=lambda each: type(each).__name__,
)
def test_pictures_of_any_kind_are_shown_as_they_are(given, expected):
    found = shown_by(lambda sample: given)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_texts_and_rows_are_shown_and_long_ones_shortened():
    assert shown_by(lambda sample: "so so") == "so so"
    assert shown_by(lambda sample: "x" * 10**6) == "x" * 2000 + " ... (1,000,000 letters)"
    cells = {"age": 31, 7: 0.123456, "city": "Ulm", "there": True, "t": torch.tensor(2.5), "none": None}
    expected = {"age": "31", "7": "0.1235", "city": "Ulm", "there": "True", "t": "2.5", "none": "None"}
    assert shown_by(lambda sample: cells) == expected
    odd = shown_by(lambda sample: {"boxes": [[1], [1, 2]], "adjacency": torch.eye(2).to_sparse()})
    assert odd["boxes"] == "[[1], [1, 2]]"
    assert odd["adjacency"].startswith("tensor(indices=")
    wide = shown_by(lambda sample: dict.fromkeys(range(1000), 0.5))
    assert (len(wide), wide["..."]) == (65, "1,000 values")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "found NoneType"),
        (["a", "b"], "found list"),
        (np.zeros((4, 5, 2)), r"found numbers of shape \(4, 5, 2\)"),
        (np.zeros((0, 5)), r"found numbers of shape \(0, 5\)"),
        (np.float64(3), r"found numbers of shape \(\)"),
        (np.full((4, 4), np.nan), "finite numbers, found NaN or Inf"),
        (np.full((4, 4), 7.5), "a picture of float64 from 0 to 1, found 7.5 to 7.5"),
        (np.full((4, 4), -3), "a picture of int64 from 0 to 255, found -3 to -3"),
        (np.full((4, 4), 1j), "found ndarray"),
    ],
)
def test_anything_else_is_refused_and_names_the_sample(given, words):
    with pytest.raises(BadInput, match=rf"render, on train\[3\]: expected .*{words}"):
        shown_by(lambda sample: given)


def test_an_exception_of_render_names_the_sample_and_ends_with_its_traceback():
    with pytest.raises(BadInput, match=r"(?s)render, on train\[3\], raised KeyError: 'text'.*Traceback"):
        shown_by(lambda sample: {}["text"])


def test_render_is_a_function_and_no_part_of_the_identity():
    task = tasks.mlp()
    with pytest.raises(BadInput, match="render: expected a function, found int"):
        Task(task.model, task.train, task.test, task.loss, render=3)
    parameters = select(task.model, None)
    other = dataclasses.replace(task, render=lambda sample: "x")
    assert task_identity(other, parameters) == task_identity(task, parameters)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ((torch.zeros(3, 8, 9), 1), (8, 9, 3)),
        ((torch.zeros(1, 8, 9), 1), (8, 9)),
        ((torch.zeros(64), 1), (8, 8)),
        ((torch.zeros(64, dtype=torch.uint8), 1), (8, 8)),
        ((torch.zeros(3, 8, 9, dtype=torch.bfloat16), 1), (8, 9, 3)),
        ({"pixel_values": torch.zeros(3, 8, 9), "labels": 1}, (8, 9, 3)),
        ({"image": Image.fromarray(RGB).convert("P"), "label": 1}, (4, 5, 3)),
        ((torch.full((3, 8, 9), torch.nan), 1), (8, 9, 3)),
    ],
)
def test_what_looks_like_a_picture_is_one(sample, expected):
    assert as_it_looks(sample).shape == expected


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ((torch.arange(64), 1), " ".join(map(str, range(64)))),
        ((torch.arange(1000, dtype=torch.int32), 1), " ".join(map(str, range(256))) + " ... (1,000 tokens)"),
        ({"input_ids": torch.tensor([5, 6]), "attention_mask": torch.tensor([1, 1])}, "5 6"),
        ({"input_ids": [5, 6], "text": "so so", "label": 1}, "so so"),
        (("so so", 1), "so so"),
        ("so so", "so so"),
        ((torch.tensor([0.5, 2.0]), 1), {"0": "0.5", "1": "2"}),
        ({"x": 0.5, "name": "a", "v": torch.zeros(3, 2)}, {"x": "0.5", "name": "a"}),
        ({"v": torch.zeros(3, 2)}, "v: float32 of shape 3 x 2"),
        ((torch.tensor(0.25), 1), "0.25"),
        ((torch.zeros(2, 3, 4, 5), 1), "float32 of shape 2 x 3 x 4 x 5"),
        ((torch.zeros(0), 1), "float32 of shape 0"),
        ({"boxes": [[1], [1, 2]], "id": 3}, {"id": "3"}),
        ({"boxes": [[1], [1, 2]]}, "boxes: list"),
        ({"adjacency": torch.eye(3).to_sparse(), "id": 3}, {"id": "3"}),
        ((["so", "so"], 1), "so so"),
        ({"tokens": ["so", "so"], "labels": [1, 2]}, "so so"),
        ({"image": None, "text": "so so"}, "so so"),
        ((object(), 1), "object"),
        ((), "tuple"),
    ],
)
def test_everything_else_is_shown_as_what_it_is(sample, expected):
    found = as_it_looks(sample)
    assert found == expected or (expected == "tuple" and isinstance(found, str))


def test_a_picture_at_is_scaled_and_a_line_holds_no_commands():
    task = dataclasses.replace(tasks.mlp(), render=lambda sample: RGB)
    np.testing.assert_allclose(picture_at(task, "test", 0), RGB / 255)
    assert picture_at(tasks.mlp(), "test", 0) is None
    assert in_a_line(RGB) == ""
    assert in_a_line("a\n\x1b[31m\u202eb\u2028" + "c" * 200).startswith("a [31m b ccc")
    assert len(in_a_line("c" * 10**6)) == 100
    assert [label_text(float(each)) for each in ("nan", "inf", "-inf")] == ["-", "-", "-"]
    assert [label_text(each) for each in (1e300, 2.0**53, 2.0**53 - 1)] == ["1e+300", "9.01e+15", "9007199254740991"]
