# bingo-compress with torch; one image for CPU and GPU. How to use it: docs/containers.md
# Any base with glibc and Python 3.11 or newer with venv will do; a digest pins it: --build-arg BASE=python:3.11-slim@sha256:...
ARG BASE=python:3.11-slim

# uv, by the version and the hashes in constraints.txt. Nothing of the first two stages is left in the image.
# The secret `index` is a package index's address, where the default one is out of reach; a secret, so that no layer and no history holds it.
FROM ${BASE} AS uv
WORKDIR /uv
COPY constraints.txt pyproject.toml ./
RUN --mount=type=secret,id=index \
    sed -n '/^uv==/,/[^\\]$/p' constraints.txt > uv.txt \
    && python3 -m venv . \
    && PIP_INDEX_URL="$(cat /run/secrets/index 2>/dev/null || true)" bin/pip install --no-cache-dir --require-hashes -r uv.txt

FROM uv AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=secret,id=index \
    UV_DEFAULT_INDEX="$(cat /run/secrets/index 2>/dev/null || true)" \
    /uv/bin/uv build --wheel --out-dir /wheel --no-cache --system-certs --require-hashes --build-constraints /uv/constraints.txt

FROM ${BASE}
# A layer of its own for torch and the rest, some GB that change with the pins alone. --require-hashes refuses what constraints.txt does not list.
RUN --mount=type=bind,from=uv,source=/uv,target=/uv --mount=type=secret,id=index \
    /uv/bin/uv venv --python python3 /opt/bingo \
    && UV_DEFAULT_INDEX="$(cat /run/secrets/index 2>/dev/null || true)" \
        /uv/bin/uv pip install --python /opt/bingo --no-cache --system-certs --compile-bytecode --require-hashes \
        -r /uv/pyproject.toml --extra cpu -c /uv/constraints.txt
# Open to every user, as /tmp is: the image runs under any --user, and a new named volume takes the rights of the folder that it covers.
RUN --mount=type=bind,from=uv,source=/uv,target=/uv --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /uv/bin/uv pip install --python /opt/bingo --no-cache --compile-bytecode --no-deps /wheel/*.whl \
    && mkdir -m 1777 /cache /data /work

# All caches are under /cache, one volume. HOME and USER: a number given by --user has neither, and torch asks for both.
# ORT_DISABLE_TELEMETRY: from 1.29 on, onnxruntime's Linux wheels report machine and model to their maker unless they are told not to.
# No VOLUME: it would leave an unnamed volume behind every run, and weights could not be baked into an image built on this one.
ENV PATH=/opt/bingo/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    USER=bingo \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    ORT_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="bingo-compress" \
      org.opencontainers.image.description="Distil any timm teacher into any timm student on photos without labels, prove it, export it to ONNX." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /work
USER 1000:1000
# A command that ends by itself, no service: its exit status tells its health.
HEALTHCHECK NONE
ENTRYPOINT ["bingo-compress"]
CMD ["--help"]
