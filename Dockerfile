# docs/scaling.md. A CPU image; for GPUs build on an image with CUDA's runtime: PyTorch's wheels bring the rest.
#
#     docker build -t fedlora .
#     docker run --rm --shm-size=2g -v "$PWD/outputs:/outputs" -v fedlora-cache:/cache fedlora run experiment=smoke
ARG BASE=python:3.11-slim
FROM ${BASE}

# Options of pip, such as --extra-index-url for PyTorch's CPU wheels, which are a tenth of the size.
ARG PIP_OPTIONS=""

WORKDIR /opt/fedlora
COPY . .
RUN python -m pip install --no-cache-dir ${PIP_OPTIONS} -c constraints.txt . && rm -rf build *.egg-info

# Whoever runs it: `docker run --user "$(id -u):$(id -g)"` keeps the owner of what is written.
RUN mkdir -p /cache /outputs /work && chmod 1777 /cache /outputs /work
ENV FEDLORA_CACHE=/cache FEDLORA_OUTPUT=/outputs HOME=/work RAY_TMPDIR=/tmp
WORKDIR /work
ENTRYPOINT ["fedlora"]
CMD ["--help"]
