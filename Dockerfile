# syntax=docker/dockerfile:1
# Every package at the version of requirements.lock, as `make setup` installs them. docs/setup.md
# shows how to build and run the image. Torch's own wheels contain CUDA, so one base image serves
# both builds:
#   docker build -t uiollms:cuda .
#   docker build -t uiollms:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12.11-slim-bookworm

# Empty: torch for CUDA, from PyPI. Another index has other builds, such as the one for CPUs alone.
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUTF8=1

# Triton and torch.compile call a compiler. Debian keeps only one version of a package at a time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/uiollms
COPY requirements.lock ./
RUN grep -v '^torch==' requirements.lock > pins.txt \
    && pip install --no-deps -r pins.txt \
    && pip install -c pins.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        "$(grep '^torch==' requirements.lock)"

COPY pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md train.py test.py ./
COPY 32x.json 8x.json demo.json smollm2-16x.json smollm2-8x.json test.json ./
COPY config ./config
COPY adapters ./adapters
COPY src ./src
RUN pip install --no-deps --no-build-isolation .

# The directory that a user mounts: inputs are read from it, and runs are written to it.
RUN useradd --create-home --uid 1000 researcher && install -d -o researcher /work
USER 1000
WORKDIR /work
ENTRYPOINT ["uiollms"]
CMD ["--help"]
