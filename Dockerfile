# syntax=docker/dockerfile:1
# docker build -t qserve .
# docker run --rm -p 8000:8000 -v /path/to/artifact:/model:ro qserve
#
# The build stage has a compiler and makes the kernels; the image that runs has neither compiler nor root.

FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 QSERVE_CACHE=/opt/qserve/cache
RUN python -m venv /opt/qserve
WORKDIR /src
COPY constraints.txt ./
# An image for CUDA takes torch as the package index gives it; pass --build-arg TORCH_ARGS to pip for another build of it.
ARG TORCH_ARGS=""
RUN /opt/qserve/bin/pip install --constraint constraints.txt ${TORCH_ARGS} torch
COPY pyproject.toml README.md LICENSE ./
COPY qserve qserve
COPY training training
COPY clients clients
RUN /opt/qserve/bin/pip install --constraint constraints.txt . \
    && /opt/qserve/bin/python -m qserve.kernels.build

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 qserve
COPY --from=build /opt/qserve /opt/qserve
ENV PATH=/opt/qserve/bin:$PATH QSERVE_CACHE=/opt/qserve/cache PYTHONUNBUFFERED=1
USER qserve
VOLUME /model
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["qserve"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
