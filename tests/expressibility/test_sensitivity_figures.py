from sensitivity_figures import draw_cells


def test_the_maps_name_the_data_sets_and_their_explanation_is_below_them():
    cell = {"scaling": "raw", "w_std": 1.5, "K": 4, "diag_reg": 0.1, "percent": 2.0, "win_rate": 0.9}
    chain = {"percent": -1.0, "win_rate": 0.25, "holm_p_value": 0.5}
    cells = [cell | {"dataset": name, "holm_p_value": 0.01, "chain": chain} for name in ("boston", "my_table")]
    settings = {"splits": 10, "w_stds": [1.5], "depths": [2], "diag_regs": [0.1]}
    for rival, number, name in (("residual", "90", "residual topology"), ("chain", "(25)", "chain without shortcuts")):
        figure = draw_cells({"settings": settings, "cells": cells}, rival)
        first, second = figure.axes[:2]
        assert first.get_title() == "Boston housing, raw features, W_std 1.5"
        assert second.get_title() == "my_table, raw features, W_std 1.5"
        assert [text.get_text() for text in first.texts] == [number]
        assert figure.get_suptitle() == f"Proposed topology against the {name}"
        assert "% of 10 random splits" in " ".join(figure.get_supxlabel().split())
