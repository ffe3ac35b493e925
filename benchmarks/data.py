"""Samples per second of one core through the data layer, ours against a PyTorch DataLoader; JSON lines.

    JAX_PLATFORMS=cpu python -m benchmarks.data                   # two minutes, needs torch
    JAX_PLATFORMS=cpu python -m benchmarks.data --workers 4       # processes on both sides

The files are made first, alike for both: 256-pixel JPEGs of about 20 kB with white borders, each named by
many rows of a table, because grain's shuffle is slow on very short ones.  Rows:

* ``cc3m``: a caption and a 512-pixel target image (stage 1).
* ``vist``: one to four 224-pixel input images, a target and a story.
* ``features``: as ``cc3m``, with ready moments bf16[64 64 8] in the place of the image.

The PyTorch side does what the original's Dataset and collator do: PIL decode, white square, resize, crop,
flip, scale to float, normalise, pad the ids, collate in bf16.  It gets its ids from our tokenizer, which
is faster than the original's, and no caption ids.  Ours hands over bytes; scaling is done on the device.
Its features are the original's too: a ``.pt`` file an image; ours come from our store.
Blocks of either side alternate; figures are medians over blocks with their least and greatest.  Without
worker processes the clock is this process's CPU time, which neighbours on the machine disturb little; with
them it is the wall, divided by the workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minigpt5_jax.data.batches.encode import EncodeConfig
from minigpt5_jax.data.batches.image_index import image_index
from minigpt5_jax.data.batches.pipeline import make_loader
from minigpt5_jax.data.batches.spec import BatchSpec
from minigpt5_jax.data.prepare.feature_writer import FeatureWriter, claim, write_missing
from minigpt5_jax.data.sources import Cc3mSource, JsonlSource, Source
from minigpt5_jax.data.sources.features import FeatureSpec, FeatureStore, image_fingerprint
from minigpt5_jax.data.text.tokenizer import ClipTokenizer, LlamaTokenizer

ASSETS = Path(__file__).parents[1] / "minigpt5_jax" / "shapes" / "assets"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CAPTION = "a large red circle above a small blue square on a white background"
SEED, ROWS = 0, 10_000


# ---------------------------------------------------------------------------------------------
# Files


def make_images(folder: Path, count: int) -> list[str]:
    """Letterboxed JPEGs with the detail of photographs (about 20 kB)."""
    random, names = np.random.default_rng(SEED), []
    for i in range(count):
        height = int(random.integers(150, 257))
        scales = [
            Image.fromarray(random.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (4, 16, 64, 256)
        ]
        layers = [np.asarray(s.resize((256, height), Image.Resampling.BICUBIC), np.float32) for s in scales]
        photo = sum(w * layer for w, layer in zip((0.55, 0.25, 0.15, 0.05), layers))
        square = np.full((256, 256, 3), 255, np.uint8)
        square[(256 - height) // 2 :][:height] = photo.clip(0, 255).astype(np.uint8)
        names.append(f"{i:09d}.jpg")
        Image.fromarray(square).save(folder / names[-1], quality=92)
    return names


def cc3m(folder: Path, names: list[str]) -> Source:
    """Stage-1 pairs."""
    table = folder / "pairs.tsv"
    rows = itertools.islice(itertools.cycle(names), ROWS)
    table.write_text("caption\timage_path\n" + "".join(f"{CAPTION}\t{name}\n" for name in rows))
    return Cc3mSource(table)


def features(folder: Path, source: Source, config: EncodeConfig) -> FeatureStore:
    """Random moments: in our store, and a ``.pt`` file beside each image."""
    import torch

    spec = FeatureSpec(
        image_fingerprint=image_fingerprint(source),
        samples=len(source),
        towers={"vae": "none"},
        target=(64, 64, 8),
        image=None,
        target_size=512,
        image_size=224,
        target_dtype="bfloat16",
    )
    random = np.random.default_rng(SEED)

    def encoder(images: np.ndarray) -> np.ndarray:
        return random.standard_normal((len(images), 64, 64, 8), dtype=np.float32)

    claim(folder / "store", spec)
    store = FeatureStore(folder / "store", spec)
    writer = FeatureWriter(store)
    index = image_index(source, config, seed=SEED, trees=False, folder=folder / "index")
    write_missing(source, index, store, writer, {"target": encoder}, batch_size=16)
    writer.close()
    for image in folder.glob("*.jpg"):
        torch.save(torch.randn(8, 64, 64).to(torch.bfloat16), image.with_suffix(".pt"))
    return FeatureStore(folder / "store")


def vist(folder: Path, names: list[str]) -> Source:
    """Steps of stories: one to four images read, one drawn."""
    ring, lines = itertools.cycle(names), []
    for i, name in enumerate(itertools.islice(itertools.cycle(names), ROWS)):
        history = [
            part
            for _ in range(1 + i % 4)
            for part in ({"type": "text", "text": CAPTION}, {"type": "image", "path": next(ring)})
        ]
        answer = [{"type": "text", "text": CAPTION}, {"type": "image", "path": name, "caption": CAPTION}]
        turns = [{"role": "user", "content": history}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"turns": turns}))
    (folder / "stories.jsonl").write_text("\n".join(lines))
    return JsonlSource(folder / "stories.jsonl")


# ---------------------------------------------------------------------------------------------
# The original's way


def torch_transform(size: int, square: bool, mean: tuple[float, ...], std: tuple[float, ...], random: Any):
    """torchvision's Resize, CenterCrop, RandomHorizontalFlip, ToTensor and Normalize, call by call."""
    import torch

    means, stds = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def transform(path: str) -> torch.Tensor:
        image = Image.open(path).convert("RGB")
        if square and image.width != image.height:
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), (255, 255, 255))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        short, long = min(image.size), max(image.size)
        if short != size:
            other = int(size * long / short)
            shape = (size, other) if image.width <= image.height else (other, size)
            image = image.resize(shape, Image.Resampling.BILINEAR)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255).clone().sub_(means).div_(stds)

    return transform


def torch_loader(
    source: Source, config: EncodeConfig, batch: int, workers: int, ready: bool
) -> Iterator[Any]:
    """Batches of a DataLoader over a Dataset written as the original's, without an end.

    Args:
      ready: targets are ``.pt`` files of moments.
    """
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Images(Dataset):
        """One sample: ids, label mask, images as normalised floats."""

        def __init__(self):
            random = np.random.default_rng(SEED)
            self.read = torch_transform(224, False, CLIP_MEAN, CLIP_STD, random)
            self.draw = torch_transform(512, True, (0.5,) * 3, (0.5,) * 3, random)
            self.examples = [source[i] for i in range(len(source))]  # the original keeps lists of strings

        def target(self, path: str) -> torch.Tensor:
            return torch.load(path.replace(".jpg", ".pt")) if ready else self.draw(path)

        def __len__(self) -> int:
            return len(self.examples)

        def __getitem__(self, index: int) -> dict[str, Any]:
            example = self.examples[index]
            before, after = (config.tokenizer.encode(text) for text in (example.source, example.target))
            ids = torch.tensor([config.tokenizer.bos_id, *before, *after])
            labels = torch.tensor([-100] * (1 + len(before)) + after)
            return {
                "input_ids": ids,
                "labels": labels,
                "attention_mask": torch.ones_like(ids),
                "input_images": torch.stack([self.read(p) for p in example.images])
                if example.images
                else torch.zeros(1, 3, 224, 224),
                "output_image": self.target(example.target_image)[None],
                "caption": example.caption,
            }

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([s["input_ids"] for s in samples], True, config.tokenizer.pad_id),
            "labels": pad([s["labels"] for s in samples], True, -100),
            "attention_mask": pad([s["attention_mask"] for s in samples], True, 0),
            "input_images": [s["input_images"].to(torch.bfloat16) for s in samples],
            "output_image": torch.cat([s["output_image"] for s in samples]).to(torch.bfloat16),
            "caption": [s["caption"] for s in samples],
        }

    loader = DataLoader(
        Images(),
        batch,
        shuffle=True,
        collate_fn=collate,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


# ---------------------------------------------------------------------------------------------
# Measuring


def our_loader(source: Source, config: EncodeConfig, batch: int, workers: int, images: int) -> Iterator[Any]:
    """Batches of this project, without an end."""
    spec = BatchSpec(
        rows=batch,
        length=64 + 64 * images,
        items=batch,
        images=images * batch,
        targets=32,
        image_size=224,
        target_size=512,
    )
    if (store := config.features) is not None:
        dtype = store.spec.target_dtype
        spec = dataclasses.replace(spec, target_moments=store.spec.target, moments_dtype=dtype)
    return make_loader(
        source,
        config,
        spec,
        global_batch=batch,
        seed=SEED,
        worker_count=workers,
        prefetch=2 if workers else 0,
    )


@dataclasses.dataclass
class Side:
    """One side of a comparison and the rates of its blocks, samples per second and core."""

    batches: Iterator[Any]
    rates: list[float] = dataclasses.field(default_factory=list)

    def block(self, seconds: float, batch: int, workers: int) -> None:
        """Takes batches for ``seconds`` of the clock."""
        clock: Callable[[], float] = time.perf_counter if workers else time.process_time
        start, samples = clock(), 0
        while clock() - start < seconds:
            next(self.batches)
            samples += batch
        self.rates.append(samples / (clock() - start) / max(1, workers))

    def summary(self) -> dict[str, float]:
        return {
            "median": round(statistics.median(self.rates), 1),
            "min": round(min(self.rates), 1),
            "max": round(max(self.rates), 1),
        }


def compare(row: str, ours: Iterator[Any], torch: Iterator[Any], flags: argparse.Namespace) -> dict[str, Any]:
    """Alternating blocks after one of warming up on each side."""
    sides = {"ours": Side(ours), "torch": Side(torch)}
    for number in range(flags.blocks + 1):
        for side in sides.values():
            side.block(flags.seconds, flags.batch, flags.workers)
            if not number:
                side.rates.clear()
    ratios = sorted(a / b for a, b in zip(sides["ours"].rates, sides["torch"].rates))
    return {
        "row": row,
        "workers": flags.workers,
        "batch": flags.batch,
        "blocks": flags.blocks,
        "unit": "samples/s/core",
        **{name: side.summary() for name, side in sides.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(ratios[0], 2),
            "max": round(ratios[-1], 2),
        },
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=0, help="processes of either side")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a block")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of either side")
    parser.add_argument("--files", type=int, default=128)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    config = EncodeConfig(
        LlamaTokenizer(ASSETS / "llama" / "tokenizer.model"),
        ClipTokenizer(ASSETS / "sd" / "tokenizer"),
        flip_mode="independent",
    )
    with tempfile.TemporaryDirectory() as folder:
        names = make_images(Path(folder), flags.files)
        pairs, stories = cc3m(Path(folder), names), vist(Path(folder), names)
        ready = dataclasses.replace(config, features=features(Path(folder), pairs, config))
        rows = {"cc3m": (pairs, config, 0), "vist": (stories, config, 4), "features": (pairs, ready, 0)}
        for row, (source, own, images) in rows.items():
            ours = our_loader(source, own, flags.batch, flags.workers, images)
            torchs = torch_loader(source, config, flags.batch, flags.workers, ready=row == "features")
            print(json.dumps(compare(row, ours, torchs, flags)), flush=True)


if __name__ == "__main__":
    main()
