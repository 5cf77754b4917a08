import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import gradient_flow
from gradient_flow import Args, build_network, digits, gradient_norms, measure_initial
from s3net_common.errors import InputError

SMALL = {"growth_rate": 4, "batch_size": 8, "depths": (2, 4), "seeds": 2, "training_depths": (3,), "steps": 20}
SMALL |= {"training_seeds": 2, "peaks": (0.1, 0.01)}


def decades(kind, normalisation, depth, seeds=4):
    job = {"kind": kind, "normalisation": normalisation, "depth": depth, "growth_rate": 8, "batch_size": 16}
    runs = [measure_initial({**job, "seed": seed}) for seed in range(seeds)]
    return [np.mean([run[name][0] - run[name][-1] for run in runs]) for name in ("outputs", "weights")]


def test_the_norms_are_those_of_the_losses_gradient():
    torch.manual_seed(0)
    network = build_network("sparse", 3, 4).double()
    images, labels, _, _ = digits()
    images, labels = images[:6].double(), labels[:6]
    of_outputs, of_weights, loss = gradient_norms(network, images, labels)
    layers = network.blocks[0].layers
    h = [F.relu(network.stem.norm(network.stem.conv(images)))]
    for layer in layers:
        h.append(layer(h[-1]))
    features = F.relu(network.norm(torch.cat(h, dim=1))).mean(dim=(2, 3))
    expected = F.cross_entropy(network.classifier(features), labels)
    weights = [layer[-1].conv.weight for layer in layers]
    gradients = [float(g.norm()) for g in torch.autograd.grad(expected, h[1:] + weights)]
    assert loss == pytest.approx(expected.item())
    np.testing.assert_allclose(10 ** np.concatenate([of_outputs, of_weights]), gradients, rtol=1e-9)


def test_without_batchnorm_a_chain_vanishes_and_shortcuts_prevent_it():
    """PyTorch's initial weights have the variance 1 / (3 fan-in), and ReLU halves the mean square.

    So each layer divides a gradient's norm by sqrt(6), 0.39 decades; the zero padding makes it a little more.
    """
    outputs, weights = decades("chain", "none", 30)
    assert -29 * 0.45 < outputs < -29 * 0.37
    assert abs(weights) < 1  # the layers' inputs shrink as the gradients do
    for kind in ("sparse", "dense", "sparse, sum"):
        outputs, _ = decades(kind, "none", 30)
        assert abs(outputs) < 0.5
    assert decades("sparse", "none", 30)[1] > 8  # the inputs of the late layers still vanish


def test_with_batchnorm_gradients_explode_in_a_chain_also_with_sparse_shortcuts():
    outputs = {kind: decades(kind, "BatchNorm", 40, seeds=2)[0] for kind in gradient_flow.CONNECTIONS}
    assert min(outputs["chain"], outputs["sparse"]) > 1.8
    assert max(outputs["dense"], outputs["residual"]) < 1.2


def test_networks_without_batchnorm_have_none():
    network = build_network("dense", 3, 4, "none, He initialisation")
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    weight = build_network("chain", 3, 64, "none, He initialisation").blocks[0].layers[1][-1].conv.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)


def test_the_script_keeps_finished_jobs_and_writes_the_summary(tmp_path, capsys):
    args = Args(out=tmp_path, **SMALL)
    gradient_flow.main(args)
    results = json.loads((tmp_path / "gradient_flow.json").read_text())
    assert len(list((tmp_path / "jobs").iterdir())) == 5 * 3 * 2 * 2 + 4 * 2 * 2
    assert len(results["initial"]) == 5 * 3 * 2 and len(results["training"]) == 4
    chain = results["training"][[row["kind"] for row in results["training"]].index("chain")]
    runs = [json.loads(file.read_text()) for file in sorted((tmp_path / "jobs").glob("training-chain-d3-*"))]
    assert [run["job"]["peak"] for run in runs] == [0.01, 0.01, 0.1, 0.1]
    assert all(len(run["losses"]) == 20 and 0 <= run["test_error"] <= 100 for run in runs)
    best = min((0.01, 0.1), key=lambda peak: np.mean([r["losses"][-10:] for r in runs if r["job"]["peak"] == peak]))
    assert chain["best_peak"] == best
    errors = [run["test_error"] for run in runs if run["job"]["peak"] == best]
    assert chain["test_error"]["mean"] == pytest.approx(np.mean(errors))
    assert f"chain, 3 layers: test error {chain['test_error']['mean']:.1f}% after 20 steps" in capsys.readouterr().out
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert [len(curve["outputs"]) for curve in curves["initial"]] == [4] * 5 * 3
    assert all(curve["outputs"][-1] == curve["weights"][-1] == 0 for curve in curves["initial"])
    assert len(curves["training"]) == 4 * 2 * 2 and curves["training"][0]["losses"]
    for name in gradient_flow.OTHER_FILES[1:]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    file = tmp_path / "jobs" / "training-chain-d3-lr0.1-s1.json"
    before = json.loads(file.read_text())
    file.unlink()
    kept = tmp_path / "jobs" / "training-sparse-d3-lr0.1-s0.json"
    marked = json.loads(kept.read_text()) | {"test_error": 12.5}
    kept.write_text(json.dumps(marked))
    gradient_flow.main(Args(out=tmp_path, **SMALL, only=("training",)))
    again = json.loads((tmp_path / "gradient_flow.json").read_text())
    assert "initial" not in again
    sparse = again["training"][[row["kind"] for row in again["training"]].index("sparse")]
    assert sparse["test_errors"]["0.1"][0] == 12.5
    assert {**json.loads(file.read_text()), "cpu_seconds": 0} == {**before, "cpu_seconds": 0}  # the same, bit for bit


def test_a_job_with_other_settings_is_run_again(tmp_path):
    job = gradient_flow.initial_jobs(Args(**SMALL))[0]
    first = gradient_flow.run_job(tmp_path, job)
    assert gradient_flow.run_job(tmp_path, job) == first
    other = gradient_flow.run_job(tmp_path, job | {"batch_size": 9})
    assert other["outputs"] != first["outputs"]


def test_jobs_run_in_several_processes(tmp_path):
    jobs = gradient_flow.initial_jobs(Args(**SMALL))[:3]
    records = gradient_flow.run_jobs(tmp_path, jobs, parallel=2)
    assert [record["job"] for record in records] == jobs
    assert records[2]["outputs"] == gradient_flow.measure_initial(jobs[2])["outputs"]


def test_a_run_with_an_infinite_loss_ends_and_loses_against_every_other():
    job = {"kind": "chain", "depth": 3, "seed": 0, "growth_rate": 4, "batch_size": 8, "steps": 40}
    record = gradient_flow.train({**job, "peak": 1e30})
    assert 0 < record["failed_step"] < 40 and len(record["losses"]) == record["failed_step"]
    assert gradient_flow.last_loss(record) == math.inf
    records = [{**record, "job": {**job, "peak": 1e30}, "cpu_seconds": 0.0}]
    records.append({**gradient_flow.train({**job, "peak": 0.1}), "job": {**job, "peak": 0.1}, "cpu_seconds": 0.0})
    [row] = gradient_flow.summarise_training(records)
    assert row["best_peak"] == 0.1 and row["last_losses"]["1e+30"] == [None]
    assert row["test_error"]["ci95"] is None


def test_the_interval_is_that_of_the_t_distribution():
    values = [1.0, 2.5, 2.0, 4.0]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert gradient_flow.mean_and_interval(values)["ci95"] == pytest.approx([interval.low, interval.high])


@pytest.mark.parametrize("make_jobs", [gradient_flow.training_jobs, gradient_flow.initial_jobs])
def test_the_densely_connected_network_has_a_smaller_largest_depth(make_jobs):
    jobs = make_jobs(Args(training_depths=(25, 200), depths=(25, 200), dense_depth=100))
    depths = {kind: {job["depth"] for job in jobs if job["kind"] == kind} for kind in gradient_flow.CONNECTIONS}
    assert depths == {"chain": {25, 200}, "sparse": {25, 200}, "residual": {25, 200}, "dense": {25}}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"depths": (1,)}, "--depths must be one or more whole numbers from 2 to 1000"),
        ({"training_depths": ()}, "--training-depths must be"),
        ({"peaks": (0.0,)}, "--peaks must be one or more learning rates above 0"),
        ({"seeds": 1}, "--seeds is 1: give 2 or more"),
        ({"steps": 10}, "--steps is 10: give 20 or more"),
        ({"batch_size": 2000}, "--batch-size is 2000: give 2 to 1,437"),
        ({"only": ()}, "--only needs one or both of initial, training"),
    ],
)
def test_invalid_flags_are_an_input_error(tmp_path, flags, text):
    with pytest.raises(InputError, match=text):
        gradient_flow.main(Args(out=tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()
