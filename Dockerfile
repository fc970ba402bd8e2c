# hvpd serve, for a CPU or an NVIDIA GPU:
#
#     docker build --target cpu -t hvpd:cpu .
#     docker build --target cuda -t hvpd:cuda .
#
# BASE is any Debian with Python 3.11 or newer and its venv module. constraints.txt
# lists the packages' versions.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
RUN python3 -m venv /opt/hvpd
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY client client
COPY server server

FROM build AS build-cpu
RUN /opt/hvpd/bin/pip install --no-cache-dir --constraint constraints.txt '.[server]'

FROM build AS build-cuda
RUN /opt/hvpd/bin/pip install --no-cache-dir --constraint constraints.txt '.[cuda13]'

# The server writes to the store in /data and to /tmp only, so it runs with --read-only
# --tmpfs /tmp.
FROM ${BASE} AS base
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp hvpd \
    && install --directory --owner=hvpd --group=hvpd /data
ENV PATH=/opt/hvpd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HVPD_STORE=/data
USER 10001:10001
VOLUME /data
EXPOSE 7070 7071
# Warming a large store takes a while. Until then the server is not healthy.
HEALTHCHECK --interval=10s --timeout=10s --start-period=10m CMD ["hvpd", "health", "--connect-timeout", "5"]
STOPSIGNAL SIGTERM
# The server listens on loopback, unless HVPD_HOST is set, with TLS and tokens or with
# HVPD_INSECURE=1.
ENTRYPOINT ["hvpd"]
CMD ["serve"]

FROM base AS cuda
COPY --from=build-cuda /opt/hvpd /opt/hvpd
# Without a GPU (docker run --gpus all) the server refuses to start, so that it does not
# serve on the CPU.
ENV JAX_PLATFORMS=cuda

FROM base AS cpu
COPY --from=build-cpu /opt/hvpd /opt/hvpd
