"""What an export says of a release that was imported: what its newest file said of itself."""

from __future__ import annotations

import pytest

from minigpt5_jax.config import get_config
from minigpt5_jax.wiring.export_view import training_progress

FILES = {
    "b1.ckpt": {"epoch": 4, "global_step": 70, "hyper_parameters": {"real_batch_size": 48}},
    "a2.ckpt": {"epoch": 1, "global_step": 9, "hyper_parameters": {"real_batch_size": 32}},
}


@pytest.mark.parametrize(
    "names, newest",
    [(["b1.ckpt"], "b1.ckpt"), (["b1.ckpt", "a2.ckpt"], "a2.ckpt"), (["a2.ckpt", "b1.ckpt"], "a2.ckpt")],
)
def test_the_newest_file_speaks(names, newest):
    config = get_config()
    config.run.init_from = "b1.ckpt" if len(names) > 1 else ""
    meta = {"imported": {"files": {name: FILES[name] for name in names}}}
    about = FILES[newest]
    assert training_progress(config, meta, 70) == {
        "hyper_parameters": about["hyper_parameters"],
        "epoch": about["epoch"],
        "step": about["global_step"],
    }


def test_a_run_of_ours_speaks_for_itself():
    found = training_progress(get_config(), {}, 3)
    assert (found["epoch"], found["step"]) == (0, 3) and found["hyper_parameters"]["real_batch_size"]
