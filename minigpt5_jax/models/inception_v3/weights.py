"""Weight table of Inception v3: the file that pytorch-fid and torch-fidelity publish under two names."""

from __future__ import annotations

from collections.abc import Callable

from minigpt5_jax.models.inception_v3.model import FID_INCEPTION, InceptionConfig, InceptionV3
from minigpt5_jax.models.tower import Tower, module_shapes
from minigpt5_jax.weights.table import CONV, Rule, Table, linear_rules
from minigpt5_jax.weights.view import Tensors


def _conv_rules(path: str) -> tuple[Rule, ...]:
    """Rules of ``mixed_5b/branch1x1``, which torch calls ``Mixed_5b.branch1x1``."""
    name = path[0].upper() + path[1:].replace("/", ".")
    return (
        Rule(f"{name}.conv.weight", f"{path}/kernel", CONV),
        Rule(f"{name}.bn.weight", f"{path}/scale"),
        Rule(f"{name}.bn.bias", f"{path}/bias"),
        Rule(f"{name}.bn.running_mean", f"{path}/mean"),
        Rule(f"{name}.bn.running_var", f"{path}/var"),
    )


def table(config: InceptionConfig) -> Table:
    """Names of ``pt_inception-2015-12-05-6726825d.pth`` and ``weights-inception-2015-12-05-6726825d.pth``."""
    shapes = module_shapes(lambda rngs: InceptionV3(config, rngs=rngs))
    convolutions = [path.removesuffix("/mean") for path in shapes if path.endswith("/mean")]
    return Table(
        (*(rule for path in convolutions for rule in _conv_rules(path)), *linear_rules("fc", "fc")),
        ignored={r".*\.num_batches_tracked": "a counter of training"},
    )


def _cause(source: Tensors, shape: Callable[[str], tuple[int, ...]]) -> str:
    if any(key.startswith("AuxLogits.") for key in source) or shape("fc.weight")[:1] == (1000,):
        return (
            "this is torchvision's Inception v3; scores need the 2015 network, "
            "pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
        )
    return ""


TOWER = Tower(
    InceptionConfig,
    {"fid": FID_INCEPTION},
    InceptionV3,
    lambda _, sizes: table(sizes),
    marks=("Conv2d_1a_3x3.",),
    cause=_cause,
    file="pt_inception-2015-12-05-6726825d.pth",
)
