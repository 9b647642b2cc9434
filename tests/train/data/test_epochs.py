"""Orders of epochs."""

import numpy as np
import pytest

from train.data.epochs import Epochs


def test_every_element_once_per_epoch_in_new_orders():
    order = Epochs(7, seed=3)
    first, second = order.run(0, 7), order.run(7, 7)
    np.testing.assert_array_equal(np.sort(first), np.arange(7))
    np.testing.assert_array_equal(np.sort(second), np.arange(7))
    assert (first != second).any() and (Epochs(7, seed=4).run(0, 7) != first).any()


def test_elements_are_found_by_number_alone():
    long = Epochs(5, seed=0).run(0, 20)
    np.testing.assert_array_equal(Epochs(5, seed=0).run(8, 6), long[8:14])
    with pytest.raises(ValueError, match="give at least 1"):
        Epochs(0, seed=0)
