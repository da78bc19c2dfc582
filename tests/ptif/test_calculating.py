"""Both modes: the numbers, the lists, the files, and who may be split, resumed and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import infl_cache.ptif as ptif
from infl_cache import Run, Task
from infl_cache.errors import BadInput, DamagedStore, ForeignRun, Interrupted
from tests.ptif.conftest import old
from tests.tasks import built, cross_entropy, normal
from tests.twins import dense_ggn, gradient_rows

MODES = [ptif.calc_img_wise, ptif.calc_all_grad_then_test]


def matrix(influences):
    return np.array([entry["influence"] for entry in influences.values()])


def dense_influences(given, damping):
    """`-(1/n) G_test (H + damping I)^-1 G_train^T` with everything written out."""
    task = Task(given.model, given.trainloader.dataset, given.testloader.dataset, cross_entropy)
    train, test = gradient_rows(task, range(30)), gradient_rows(task, range(12), data="test")
    h = dense_ggn(task) + damping * torch.eye(train.shape[1], dtype=torch.float64)
    return -(test @ torch.linalg.solve(h, train.T) / len(train)).numpy()


def test_both_modes_agree_with_each_other_and_with_the_exact_inverse(given, config, tmp_path):
    for solver, tolerance in (("exact", 1e-5), ("lissa", 0.02)):
        one, two = (
            mode({**config, "outdir": str(tmp_path / f"{solver}{k}"), "solver": solver}, *given.given)
            for k, mode in enumerate(MODES)
        )
        expected = dense_influences(given, 0.1)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(matrix(one[0]), matrix(two[0]), rtol=0, atol=1e-5 * largest)
        np.testing.assert_allclose(matrix(one[0]), expected, rtol=0, atol=tolerance * largest)
        assert one[1:] == two[1:]


@pytest.mark.parametrize("mode", MODES)
def test_the_return_value_has_the_old_structure_and_lists_the_right_way_round(mode, given, config):
    influences, harmful, helpful = mode({**config, "solver": "cg"}, *given.given)
    assert list(influences) == [str(j) for j in range(12)]
    for key, entry in influences.items():
        assert set(entry) == {"label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"}
        assert entry["label"] == int(key) % 3
        assert entry["num_in_dataset"] == int(key)
        assert entry["time_calc_influence_s"] > 0
        row = np.array(entry["influence"])
        assert row.shape == (30,)
        assert sorted(entry["helpful"]) == list(range(30))
        assert (np.diff(row[entry["helpful"]]) >= 0).all()
        assert (np.diff(row[entry["harmful"]]) <= 0).all()
        assert row[entry["helpful"][0]] < 0 < row[entry["harmful"][0]]
    mean = matrix(influences).mean(axis=0)
    assert helpful == np.argsort(mean, kind="stable").tolist()
    assert harmful == np.argsort(-mean, kind="stable").tolist()
    (file,) = [
        name for name in os.listdir(config["outdir"]) if name.startswith("influence_results") and "meta" not in name
    ]
    assert file == "influence_results_0_all.json"
    assert json.loads(Path(config["outdir"], file).read_text()) == influences


def test_what_is_called_helpful_lowers_the_loss_of_a_model_that_is_trained_with_more_of_it(tmp_path):
    # Trained to its minimum, by plain torch: the influence of leaving out is told by retraining.
    given = old()
    (x, y), (a, b) = (loader.dataset.tensors for loader in (given.trainloader, given.testloader))

    def fitted(weights):
        model = built(lambda: nn.Linear(4, 3), torch.float64)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-10, tolerance_change=1e-14)  # fmt: skip

        def closure():
            optimizer.zero_grad()
            decay = sum((p**2).sum() for p in model.parameters())
            value = (weights * cross_entropy(model(x), y)).sum() / len(x) + 0.05 / 2 * decay
            value.backward()
            return value

        optimizer.step(closure)
        return model

    full = fitted(torch.ones(30, dtype=torch.float64))
    config = {
        "outdir": str(tmp_path),
        "damp": 0.0,
        "solver": "exact",
        "test_sample_ids": [4],
        "display_progress": False,
    }
    influences, _, helpful = ptif.calc_img_wise(config, full, given.trainloader, given.testloader, weight_decay=0.05)
    before = cross_entropy(full(a[4:5]), b[4:5]).item()
    changes = []
    for i in range(30):
        weights = torch.ones(30, dtype=torch.float64)
        weights[i] = 0
        changes.append(cross_entropy(fitted(weights)(a[4:5]), b[4:5]).item() - before)
    assert np.corrcoef(changes, -np.array(influences["4"]["influence"]))[0, 1] > 0.99
    assert changes[helpful[0]] > 0, "without the most helpful one the loss is higher"


def test_calc_img_wise_leaves_nothing_but_the_json(given, config):
    ptif.calc_img_wise({**config, "test_sample_num": 1}, *given.given)
    assert sorted(os.listdir(config["outdir"])) == ["influence_results_0_1.json", "influence_results_0_1.meta.json"]


def test_calc_all_grad_then_test_leaves_a_run_that_this_package_opens(given, config, tmp_path):
    config["save_pth"] = str(tmp_path / "kept")
    influences, _, _ = ptif.calc_all_grad_then_test(config, *given.given)
    run = Run(tmp_path / "kept")
    np.testing.assert_array_equal(run.scores(), matrix(influences).astype(np.float32))
    assert run.helpful(3, 5).ids.tolist() == influences["3"]["helpful"][:5]


def test_calc_method_chooses_the_mode(given, config):
    config.update(solver="identity", test_sample_num=1)
    for method, folder in (("img_wise", False), ("all_grad_then_test", True)):
        ptif.calc_influences({**config, "calc_method": method}, *given.given)
        assert os.path.exists(f"{config['outdir']}/run/grad_z.zarr") is folder


def test_samples_of_each_class_from_a_start_and_two_parts_together_equal_the_whole(config):
    given = old(torch.float32)
    config.update(test_sample_num=4, recursion_depth=300)
    whole = ptif.calc_img_wise(config, *given.given)
    parts = [
        ptif.calc_img_wise({**config, "test_sample_num": 2, "test_sample_start_per_class": start}, *given.given)
        for start in (0, 2)
    ]
    assert [list(part[0]) for part in parts] == [list("012345"), ["6", "7", "8", "9", "10", "11"]]
    together, harmful, helpful = ptif.combine(*(part[0] for part in parts))
    assert list(together) == list(whole[0])
    largest = np.abs(matrix(whole[0])).max()
    np.testing.assert_allclose(matrix(together), matrix(whole[0]), rtol=0, atol=1e-5 * largest)
    assert ptif.combine(*(f"{config['outdir']}/influence_results_{start}_2.json" for start in (0, 2))) == (
        together, harmful, helpful,
    )  # fmt: skip
    assert helpful[:5] == whole[2][:5]
    later = ptif.calc_img_wise({**config, "test_sample_num": False, "test_sample_start_per_class": 3}, *given.given)
    assert list(later[0]) == ["9", "10", "11"]


@pytest.mark.parametrize("mode", MODES)
def test_results_that_are_there_are_read_and_not_computed_again(mode, given, config, monkeypatch):
    config["solver"] = "identity"
    first = mode(config, *given.given)
    stamp = os.stat(f"{config['outdir']}/influence_results_0_all.json").st_mtime_ns
    monkeypatch.setattr("infl_cache.ptif.calculating.results_of", None)
    assert mode(config, *given.given) == first
    assert os.stat(f"{config['outdir']}/influence_results_0_all.json").st_mtime_ns == stamp


def test_results_of_another_config_or_nobody_are_refused_unless_forced(given, config):
    config["solver"] = "identity"
    ptif.calc_img_wise(config, *given.given)
    changed = {**config, "solver": "cg"}
    with pytest.raises(ForeignRun, match=r"solver: identity there, cg here.*json_filename"):
        ptif.calc_img_wise(changed, *given.given)
    forced = ptif.calc_img_wise({**changed, "force": True}, *given.given)
    assert ptif.calc_img_wise(changed, *given.given) == forced
    file = f"{config['outdir']}/influence_results_0_all.json"
    with open(file, "a") as opened:
        opened.write(" ")
    with pytest.raises(DamagedStore, match="expected the file that was written"):
        ptif.calc_img_wise(changed, *given.given)
    os.remove(file.replace(".json", ".meta.json"))
    with pytest.raises(ForeignRun, match=r"found a file without influence_results_0_all.meta.json"):
        ptif.calc_img_wise(changed, *given.given)


def test_results_by_another_seed_are_others_wherever_the_seed_decides_a_number(given, config):
    config.update(solver="cg", options={"curvature_samples": 8})
    first = ptif.calc_img_wise({**config, "seed": 1}, *given.given)
    with pytest.raises(ForeignRun, match="seed: 1 there, 2 here"):
        ptif.calc_img_wise({**config, "seed": 2}, *given.given)
    assert ptif.calc_img_wise({**config, "seed": 2, "force": True}, *given.given) != first
    config.update(outdir=f"{config['outdir']}/all", options={})
    assert ptif.calc_img_wise({**config, "seed": 1}, *given.given) == ptif.calc_img_wise(config, *given.given)


def test_a_run_folder_of_another_config_is_refused_in_words_of_the_config_unless_forced(given, config, tmp_path):
    config.update(solver="cg", save_pth=str(tmp_path / "kept"), json_filename="one")
    ptif.calc_all_grad_then_test(config, *given.given)
    other = {**config, "damp": 0.5, "json_filename": "two"}
    with pytest.raises(ForeignRun, match=r"config\['save_pth'\]"):
        ptif.calc_all_grad_then_test(other, *given.given)
    influences, _, _ = ptif.calc_all_grad_then_test({**other, "force": True}, *given.given)
    np.testing.assert_allclose(matrix(influences), dense_influences(given, 0.5), rtol=0, atol=1e-4)


def test_stopped_in_the_middle_img_wise_goes_on_where_it_was(given, config, monkeypatch):
    config.update(solver="cg", at_once=2)
    stop = {"after": 3}
    begin = Run.influence

    def interrupted(self, force=False):
        if stop.pop("after", None):
            raise Interrupted("stopped", 2)
        return begin(self, force)

    monkeypatch.setattr(Run, "influence", interrupted)
    with pytest.raises(Interrupted):
        ptif.calc_img_wise(config, *given.given)
    solved = []
    solve = Run.stest
    monkeypatch.setattr(Run, "stest", lambda self, force=False: solved.append(solve(self, force).computed))
    influences, _, _ = ptif.calc_img_wise(config, *given.given)
    assert solved == [0]
    np.testing.assert_allclose(matrix(influences), dense_influences(given, 0.1), rtol=0, atol=1e-4)
    assert len(os.listdir(config["outdir"])) == 2


def test_shuffling_and_batch_size_change_no_id_and_no_number(config, tmp_path):
    found = []
    for k, loader in enumerate(({"shuffle": True, "batch_size": 7}, {"shuffle": False, "batch_size": 30})):
        given = old(**loader)
        found.append(ptif.calc_img_wise({**config, "solver": "cg", "outdir": str(tmp_path / str(k))}, *given.given)[0])
    np.testing.assert_allclose(matrix(found[0]), matrix(found[1]), rtol=1e-3, atol=1e-7)


def test_a_sampler_that_draws_a_part_is_told_about(config, caplog):
    given = old()
    loader = DataLoader(given.trainloader.dataset, batch_size=5, sampler=SubsetRandomSampler(range(10)))
    ptif.calc_img_wise({**config, "solver": "identity"}, given.model, loader, given.testloader)
    assert "its sampler draws 10 of 30 samples, all of which are taken" in caplog.text


def doubled(samples):
    x, y = torch.utils.data.default_collate(samples)
    return 2 * x, y


def test_the_collate_fn_of_the_loaders_is_respected(config, tmp_path):
    given, plain = old(collate_fn=doubled), old()
    found = ptif.calc_img_wise({**config, "solver": "exact"}, *given.given)[0]
    for loader in (plain.trainloader, plain.testloader):
        x, y = loader.dataset.tensors
        loader.dataset.tensors = (2 * x, y)
    np.testing.assert_allclose(matrix(found), dense_influences(plain, 0.1), rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="expected one collate_fn for both, found two"):
        ptif.calc_img_wise(config, given.model, given.trainloader, old().testloader)


def one_doubled(sample):
    return 2 * sample[0], sample[1]


def test_a_loader_without_batches_has_its_collate_fn_called_on_single_samples(config, tmp_path):
    found = [
        ptif.calc_img_wise({**config, "solver": "identity", "outdir": str(tmp_path / str(k))}, *old(**loader).given)[0]
        for k, loader in enumerate(
            ({"batch_size": None, "collate_fn": one_doubled, "shuffle": False}, {"collate_fn": doubled})
        )
    ]
    np.testing.assert_array_equal(matrix(found[0]), matrix(found[1]))


def test_num_classes_alone_says_nothing(given, config):
    config.update(solver="identity", num_classes=2)
    assert len(ptif.calc_img_wise(config, *given.given)[0]) == 12
    assert list(ptif.calc_img_wise({**config, "test_sample_num": 1}, *given.given)[0]) == ["0", "1"]


def squared(outputs, targets):
    return (outputs.squeeze(1) - targets) ** 2


def test_a_regression_with_its_own_loss(config, tmp_path):
    x = normal(20, 3)
    data = TensorDataset(x, x.sum(1) + 0.5)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    model = built(lambda: nn.Linear(3, 1), torch.float64)
    config.update(solver="exact", test_sample_ids=[5, 2])
    influences, _, _ = ptif.calc_img_wise(config, model, loader, loader, loss=squared)
    task = Task(model, data, data, squared)
    g = gradient_rows(task, range(20))
    expected = -(g[[2, 5]] @ torch.linalg.solve(dense_ggn(task) + 0.1 * torch.eye(4, dtype=torch.float64), g.T)) / 20
    np.testing.assert_allclose(matrix(influences), expected.numpy(), rtol=1e-5, atol=1e-7)
    assert influences["5"]["label"] == pytest.approx(float(x[5].sum() + 0.5))
    assert list(influences) == ["2", "5"]
    with pytest.raises(BadInput, match="expected an integer label"):
        ptif.calc_img_wise(
            {**config, "test_sample_ids": None, "test_sample_num": 1}, model, loader, loader, loss=squared
        )
    with pytest.raises(BadInput, match='use reduction="none"'):
        ptif.calc_img_wise({**config, "outdir": str(tmp_path / "x")}, model, loader, loader, loss=mean_squared)


def mean_squared(outputs, targets):
    return squared(outputs, targets).mean()


class Noisy(Dataset):
    """Augmentation: another sample each time."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.1 * torch.randn(4, dtype=torch.float64), y


def test_augmentation_is_noticed_and_can_be_held_fast(config):
    given = old()
    loader = DataLoader(Noisy(given.trainloader.dataset), batch_size=4)
    config["solver"] = "identity"
    with pytest.raises(BadInput, match="augmentation"):
        ptif.calc_img_wise(config, given.model, loader, given.testloader)
    found = ptif.calc_img_wise({**config, "freeze_augmentation": True}, given.model, loader, given.testloader)
    assert len(found[0]) == 12


def test_the_model_and_the_random_state_are_left_as_they_were(config):
    given = old()
    given.model.train()
    state = torch.get_rng_state()
    ptif.calc_img_wise({**config, "test_sample_num": 1}, *given.given)
    assert given.model.training
    assert all(parameter.requires_grad for parameter in given.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_gives_the_same_numbers(config, tmp_path):
    given = old(n_train=200)
    config.update(test_sample_num=1, recursion_depth=30)
    found = [
        matrix(ptif.calc_img_wise({**config, "seed": seed, "outdir": str(tmp_path / str(k))}, *given.given)[0])
        for k, seed in enumerate((1, 1, 2))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0


def test_a_gpu_that_is_not_there_is_named(given, config):
    with pytest.raises(BadInput, match="device: expected one that works here, found 'cuda:7'"):
        ptif.calc_img_wise({**config, "gpu": 7}, *given.given)


def test_the_files_have_the_names_that_are_asked_for(given, config):
    config.update(solver="identity", json_filename="mine")
    ptif.calc_img_wise(config, *given.given)
    assert sorted(os.listdir(config["outdir"])) == ["mine.json", "mine.meta.json"]
    with pytest.raises(BadInput, match=r"json_filename'\]: expected a file name without a folder"):
        ptif.calc_img_wise({**config, "json_filename": "../mine"}, *given.given)


def test_fields_of_a_task_are_passed_on_and_others_refused(given, config, tmp_path):
    config["solver"] = "identity"
    whole = ptif.calc_img_wise(config, *given.given)
    part = ptif.calc_img_wise({**config, "outdir": str(tmp_path / "b")}, *given.given, parameters=["bias"])
    assert np.abs(matrix(whole[0]) - matrix(part[0])).max() > 0
    with pytest.raises(BadInput, match="parametres: expected a field of"):
        ptif.calc_img_wise(config, *given.given, parametres=["bias"])
