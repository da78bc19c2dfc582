"""grad_z, s_test and influences one at a time, and all of them in a folder: beside plain autograd and the modes."""

import logging

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import infl_cache.ptif as ptif
from infl_cache.errors import BadInput
from tests.ptif.test_calculating import dense_influences, matrix


def flat(vectors):
    return torch.cat([each.flatten() for each in vectors])


def plain_gradient(given, x, y):
    loss = cross_entropy(given.model(x), y)
    return flat(torch.autograd.grad(loss, list(given.model.parameters())))


def dense_s_test(given, gradient, damp):
    x, y = given.trainloader.dataset.tensors
    weight, bias = (each.detach() for each in given.model.parameters())

    def loss(theta):
        return cross_entropy(x @ theta[:12].view(3, 4).T + theta[12:], y)

    h = torch.autograd.functional.hessian(loss, torch.cat([weight.flatten(), bias]))
    return torch.linalg.solve(h + damp * torch.eye(15, dtype=torch.float64), gradient)


def test_grad_z_is_that_of_autograd_for_one_sample_and_for_a_batch(given):
    x, y = given.testloader.dataset.tensors
    for rows in (slice(0, 1), slice(2, 7)):
        found = ptif.grad_z(x[rows], y[rows], given.model, -1)
        assert [each.shape for each in found] == [each.shape for each in given.model.parameters()]
        torch.testing.assert_close(flat(found), plain_gradient(given, x[rows], y[rows]))
    with pytest.raises(BadInput, match="a single sample is a batch of one"):
        ptif.grad_z(x[0], y[0], given.model)
    with pytest.raises(BadInput, match="a single sample is a batch of one"):
        ptif.grad_z(x[0], int(y[0]), given.model)


def test_s_test_is_the_damped_inverse_times_the_gradient(given):
    x, y = given.testloader.dataset.tensors
    expected = dense_s_test(given, plain_gradient(given, x[:1], y[:1]), 0.1)
    for found, tolerance in (
        (ptif.s_test(x[:1], y[:1], given.model, given.trainloader, -1, 0.1, 25.0, 2000), 0.02),
        (ptif.s_test(x[:1], y[:1], given.model, given.trainloader, damp=0.1, config={"solver": "exact"}), 1e-9),
        (ptif.calc_s_test_single(given.model, x[:1], y[:1], given.trainloader, -1, 0.1, 25, 2000, 3), 0.02),
        (
            ptif.calc_s_test_single(given.model, x[:1], y[:1], given.trainloader, damp=0.1, config={"solver": "cg"}),
            1e-3,
        ),
    ):
        assert (flat(found) - expected).norm() < tolerance * expected.norm()
    with pytest.raises(BadInput, match="expected those that need no stored gradients, found fisher"):
        ptif.s_test(x[:1], y[:1], given.model, given.trainloader, config={"solver": "fisher"})


def test_a_config_that_is_given_besides_is_what_holds_unless_an_argument_says_something_else(given, tmp_path):
    x, y = given.testloader.dataset.tensors
    one, loaders = (x[:1], y[:1], given.trainloader), (given.testloader, given.trainloader)
    config = {"solver": "exact", "damp": 0.5}
    expected = dense_s_test(given, plain_gradient(given, x[:1], y[:1]), 0.5)
    torch.testing.assert_close(flat(ptif.calc_s_test_single(given.model, *one, config=config)), expected)
    torch.testing.assert_close(flat(ptif.calc_s_test(given.model, *loaders, config=config)[0][0]), expected)
    with pytest.raises(BadInput, match=r"expected 0.3, as the argument says, or config\['damp'\] 0.5, found both"):
        ptif.calc_s_test_single(given.model, *one, damp=0.3, config=config)


def test_the_influences_on_one_test_sample_are_a_row_of_all(given, caplog):
    expected = dense_influences(given, 0.1)[4]
    x, y = given.testloader.dataset.tensors
    exact = {"solver": "exact"}
    with caplog.at_level(logging.INFO):
        row, harmful, helpful, test = ptif.calc_influence_single(
            given.model, given.trainloader, given.testloader, 4, -1, time_logging=True, damp=0.1, config=exact
        )
    np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-8)
    assert "influences on test sample 4" in caplog.text
    assert (helpful, harmful, test) == (np.argsort(expected).tolist(), np.argsort(-expected).tolist(), 4)
    vector = ptif.calc_s_test_single(given.model, x[4:5], y[4:5], given.trainloader, damp=0.1, config=exact)
    again = ptif.calc_influence_single(*given.given, 4, -1, 5000, 1, vector)
    assert again[0] == row
    with pytest.raises(BadInput, match="test_id_num: expected 0 to 11, found 12"):
        ptif.calc_influence_single(*given.given, 12)
    with pytest.raises(BadInput, match="s_test_vec: expected tensors of the parameters' shapes"):
        ptif.calc_influence_single(*given.given, 4, s_test_vec=vector[:1])


def test_all_vectors_go_to_a_folder_of_any_name_and_come_from_it(given, tmp_path, config):
    x, y = given.trainloader.dataset.tensors
    place, exact = tmp_path / "any name", {"solver": "exact"}
    grads, saved = ptif.calc_grad_z(given.model, given.trainloader, place, config=exact)
    assert saved == place
    vectors, _ = ptif.calc_s_test(given.model, given.testloader, given.trainloader, place, damp=0.1, config=exact)
    loaded = ptif.load_grad_z(place, 30)
    assert len(grads) == len(loaded) == 30
    for i, vector in enumerate(loaded):
        torch.testing.assert_close(flat(vector), plain_gradient(given, x[i : i + 1], y[i : i + 1]))
    average, every = ptif.load_s_test(place, 3)
    assert torch.equal(flat(average), flat(vectors[3]))
    assert len(every) == 1
    # The second mode goes on with what is there.
    config.update(solver="exact", save_pth=str(place))
    influences, _, _ = ptif.calc_all_grad_then_test(config, *given.given)
    products = -np.array([[float(flat(s) @ flat(g)) for g in grads] for s in vectors]) / 30
    np.testing.assert_allclose(matrix(influences), products, rtol=1e-4, atol=1e-8)
    with pytest.raises(BadInput, match="expected gradients of 31 samples, found 30"):
        ptif.load_grad_z(place, 31)


def test_without_a_folder_they_are_in_memory_from_a_start_on(given):
    x, y = given.testloader.dataset.tensors
    grads, saved = ptif.calc_grad_z(given.model, given.trainloader, start=28)
    assert (len(grads), saved) == (2, False)
    vectors, _ = ptif.calc_s_test(
        given.model, given.testloader, given.trainloader, damp=0.1, start=10, config={"solver": "exact"}
    )
    assert len(vectors) == 2
    expected = dense_s_test(given, plain_gradient(given, x[10:11], y[10:11]), 0.1)
    torch.testing.assert_close(flat(vectors[0]), expected)
    with pytest.raises(BadInput, match="start: expected the id of a test sample, 0 to 11, found 12"):
        ptif.calc_s_test(given.model, given.testloader, given.trainloader, start=12)


def test_s_test_alone_needs_the_model_for_its_shapes(given, tmp_path):
    ptif.calc_s_test(given.model, given.testloader, given.trainloader, tmp_path / "s", config={"solver": "identity"})
    with pytest.raises(BadInput, match="expected the model, for the shapes"):
        ptif.load_s_test(tmp_path / "s", 1)
    found, _ = ptif.load_s_test(tmp_path / "s", 1, model=given.model)
    x, y = given.testloader.dataset.tensors
    torch.testing.assert_close(flat(found), plain_gradient(given, x[1:2], y[1:2]))
    with pytest.raises(BadInput, match="expected a run folder with grads, found none"):
        ptif.load_grad_z(tmp_path / "s")


def test_ids_by_class(given):
    by_class, ids = ptif.get_dataset_sample_ids(2, given.testloader, 3, 1)
    assert by_class == {0: [3, 6], 1: [4, 7], 2: [5, 8]}
    assert ids == [3, 4, 5, 6, 7, 8]
    assert ptif.get_dataset_sample_ids(False, given.testloader, 2)[0] == {0: [0, 3, 6, 9], 1: [1, 4, 7, 10]}
    assert ptif.get_dataset_sample_ids_per_class(2, 2, given.testloader, 0) == [2, 5]
    assert ptif.get_dataset_sample_ids_per_class(9, 2, given.testloader) == []
    for wrong, start in ((-1, 0), (1, -1), ("a", 0), (0.5, 0), (0, 0)):
        with pytest.raises(BadInput, match=r"(num_samples|start_index): expected False or a whole number"):
            ptif.get_dataset_sample_ids(wrong, given.testloader, None, start)
