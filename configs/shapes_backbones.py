"""The small world's backbones, trained from nothing and written into the package.

    python -m minigpt5_jax.shapes.backbones.pretrain --config configs/shapes_backbones.py

Data: made up as it is needed; stories and dialogues for the language model are written to ``work`` first.
Not a configuration of the model: its keys are those below.
Hardware: CPU; stopped runs go on.  Expected numbers: minigpt5_jax/shapes/README.md.
"""

from ml_collections import ConfigDict

STEPS = {
    "vae": 3700,
    "vae_decoder": 1500,
    "text": 1000,
    "unet": 3500,
    "unet_scenes": 6000,
    "vision": 1000,
    "llama": 3000,
    "llama_describing": 2000,
    "stories": 2000,
    "dialogs": 2000,
}


def get_config() -> ConfigDict:
    """``parts`` to train, ``out`` (default: the package's assets), ``work`` for what is kept to go on."""
    return ConfigDict(
        {
            "parts": "vae,text,unet,vision,llama",
            "out": "",
            "work": "runs/backbones",
            "seed": 0,
            "images": 500,
            "steps": STEPS,
        }
    )
