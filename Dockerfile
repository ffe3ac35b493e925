# minigpt5_jax in a container: docker build --target cpu -t minigpt5 . (or --target cuda, --target tpu)
#
#   docker run --rm -v "$PWD":/work -w /work minigpt5 chat --checkpoint shapes --message "please draw: a large red circle."
#   docker run --rm --gpus all -v "$PWD":/work -w /work minigpt5-cuda train --config /opt/minigpt5/configs/shapes_stage1.py --workdir first
#   docker run --rm --privileged --net=host -v "$PWD":/work -w /work minigpt5-tpu train ...
#
# CUDA comes with JAX's wheels: the host needs NVIDIA's driver and container toolkit, no image of NVIDIA's.
FROM python:3.12-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1
WORKDIR /opt/minigpt5
COPY setup.py pyproject.toml README.md LICENSE ./
COPY minigpt5_jax ./minigpt5_jax
COPY configs ./configs
RUN useradd --create-home --uid 1000 minigpt5
ENTRYPOINT ["minigpt5"]
CMD ["--help"]

FROM base AS cuda
# Versions are those of setup.py.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[metrics,cuda]"
USER 1000

FROM base AS tpu
# Versions are those of setup.py.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[metrics,tpu]"
# As root, whom the chips' devices belong to.

FROM base AS cpu
# Versions are those of setup.py.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[metrics]"
USER 1000
