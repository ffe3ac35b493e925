"""torch-fidelity's Inception network, beside ours in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

INSTALL = (
    "pip install --no-deps torchvision==0.28.0 torch-fidelity==0.4.0 (best in an environment of its own)"
)


def load(weights: Path, threads: int, batch: int) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Images u8[h w 3] of one size -> pool3 f32[n 2048] and logits f32[n 1008] by torch-fidelity 0.4.0.

    Raises:
      ImportError: torch-fidelity or torchvision is not installed, or cannot be loaded.
    """
    import torch

    # The wheels of torchvision are built for CUDA, and its operators do not load beside a CPU build of torch.
    # These two are declared, so that its Python part can be imported; the network uses neither.
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except RuntimeError as error:  # an operator of torchvision that is not known
        raise ImportError(str(error)) from None

    torch.set_num_threads(threads)
    wanted = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", wanted, feature_extractor_weights_path=str(weights)
    )
    network.eval()

    @torch.inference_mode()
    def features(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = []
        for start in range(0, len(images), batch):
            pixels = np.stack(images[start : start + batch]).transpose(0, 3, 1, 2)
            rows.append([part.numpy() for part in network(torch.from_numpy(np.ascontiguousarray(pixels)))])
        return [np.concatenate(column) for column in zip(*rows)]

    return features
