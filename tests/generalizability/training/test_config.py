"""training/config.py: the flags with which a run is resumed."""

import json
from pathlib import Path

import pytest

from s3net_common.errors import InputError
from training.config import check_same_recipe, config_from_json

RESULTS = Path(__file__).resolve().parents[3] / "generalizability" / "results" / "fast_recipes"


@pytest.mark.parametrize("run", ["runs/fast_progressive_s0", "test_error/fast_recipe_s0"])
def test_a_run_is_resumed_with_the_default_options_of_its_network(run):
    """The first run was started with flags for growth rate and depth, the second without."""
    path = RESULTS / run / "config.json"
    config = config_from_json(json.loads(path.read_text()), path)
    options = {"growth_rate": 12, "depth": 40, "drop_rate": 0.0, "connections": "sparse"}
    check_same_recipe(options, config, path.parent)
    with pytest.raises(InputError, match=r"--connections dense changes the recipe .* started with sparse: leave"):
        check_same_recipe(options | {"connections": "dense"}, config, path.parent)
