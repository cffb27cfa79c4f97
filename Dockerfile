# The server as an image:
#   docker build -t cascade:cpu .
#   docker build -t cascade:cuda --build-arg ACCELERATOR=cuda .      (the driver is the host's)
# It runs as a user of its own and writes to /data only, so the root may be read-only:
#   docker run --read-only --tmpfs /tmp --init -v cascade:/data -p 127.0.0.1:8000:8000 -e CASCADE_API_KEYS=... cascade:cpu

ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
ARG ACCELERATOR=cpu
# Where torch comes from that brings no CUDA libraries along; for cuda the usual index has it.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source

# torch by itself: the largest layer by far, and the one that changes least.
COPY constraints.txt ./
RUN case "${ACCELERATOR}" in \
        cpu) index="${TORCH_CPU_INDEX:+--extra-index-url=${TORCH_CPU_INDEX}}" ;; \
        cuda) index="" ;; \
        *) echo "ACCELERATOR must be cpu or cuda, not ${ACCELERATOR}" >&2; exit 1 ;; \
    esac && \
    python -m venv /opt/cascade && \
    /opt/cascade/bin/pip install --no-cache-dir ${index:+"${index}"} "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY cascade cascade
RUN /opt/cascade/bin/pip install --no-cache-dir --constraint constraints.txt ".[c2pa,s3,tracing]"

FROM python:${PYTHON}
ARG ACCELERATOR=cpu
# Engines find tcmalloc by themselves. CASCADE_COMPILE=full has a C compiler build the launchers of its kernels.
# hadolint ignore=DL3008,SC2086
RUN if [ "${ACCELERATOR}" = cuda ]; then compiler="gcc libc6-dev"; fi && \
    apt-get update && \
    apt-get install -y --no-install-recommends libtcmalloc-minimal4 ${compiler:-} && \
    rm -rf /var/lib/apt/lists/*
RUN groupadd --system --gid 10001 cascade && \
    useradd --system --uid 10001 --gid cascade --home-dir /data --no-create-home cascade && \
    install -d -o cascade -g cascade -m 0700 /data
COPY --from=build /opt/cascade /opt/cascade

ENV PATH=/opt/cascade/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor \
    CASCADE_HOST=0.0.0.0 \
    CASCADE_DATA_DIR=/data \
    CASCADE_LOG_FORMAT=json
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 CMD ["cascade", "health"]
ENTRYPOINT ["cascade"]
CMD ["serve"]
