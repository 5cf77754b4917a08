import numpy as np
import pytest

import tabular
from kernel_regression import NtkMatrices, mean_squared_error, ntk_matrices, predict
from kernels import TOPOLOGIES, closed_form_kernels, stax_network
from neural_tangents_compat import neural_tangents as nt

DATA = tabular.split(tabular.boston(), tabular.PAPER_SEED)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_matrices_contain_the_closed_form_kernels(topology):
    matrices = ntk_matrices(DATA.x_train, DATA.x_test, topology, [2, 3])
    assert matrices.keys() == {2, 3}
    for depth, (train, test) in matrices.items():
        expected = closed_form_kernels(DATA.x_train, None, topology, depth)[depth].ntk
        lower = np.tril_indices(455)
        np.testing.assert_allclose(train[lower], expected[lower], rtol=1e-7)
        np.testing.assert_allclose(
            test, closed_form_kernels(DATA.x_test, DATA.x_train, topology, depth)[depth].ntk, rtol=1e-7
        )


def test_the_prediction_equals_that_of_neural_tangents():
    train, test = DATA.x_train[:60], DATA.x_test[:7]
    _, _, kernel_fn = stax_network("proposed", 2)
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, train, DATA.y_train[:60, None], diag_reg=0.1)
    prediction = predict(ntk_matrices(train, test, "proposed", [2])[2], DATA.y_train[:60], 0.1)
    assert prediction.shape == (7,)
    np.testing.assert_allclose(prediction, np.asarray(predict_fn(x_test=test, get="ntk"))[:, 0], rtol=1e-6)


def test_predicting_does_not_change_the_matrices():
    matrices = ntk_matrices(DATA.x_train[:30], DATA.x_test, "residual", [1])[1]
    before = matrices.train.copy()
    first = predict(matrices, DATA.y_train[:30], 0.1)
    np.testing.assert_array_equal(matrices.train, before)
    np.testing.assert_array_equal(predict(matrices, DATA.y_train[:30], 0.1), first)


def test_the_error_for_a_singular_matrix_names_the_regulariser():
    with pytest.raises(ValueError, match="diag_reg 1e-300 leaves the kernel matrix singular"):
        predict(NtkMatrices(np.ones((3, 3)), np.ones((1, 3))), np.ones(3), 1e-300)


def test_mean_squared_error():
    assert mean_squared_error(np.array([1.0, 2.0]), np.array([2.0, 4.0])) == 2.5
