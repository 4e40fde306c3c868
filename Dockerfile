# The server with its worker. Which build of torch goes in (CPU, or a version of CUDA) is decided by the package index that
# pytorch.org's "Start locally" page names for it:
#   docker build --build-arg TORCH_INDEX=… .
# Without it pip takes the default build, which on Linux is a large one for CUDA and runs on CPUs as well.
FROM python:3.11-slim

ARG TORCH_INDEX=""

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
# torch alone first: the largest layer, and the one that changes least
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
COPY pyproject.toml README.md ./
COPY pgengine ./pgengine
COPY server ./server
COPY migrations ./migrations
RUN pip install -c constraints.txt ".[server,postgres]"

RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin pgengine \
    && install --directory --owner=pgengine --group=pgengine /data
USER pgengine
# not /app: what runs is the installed package
WORKDIR /home/pgengine
ENV PGENGINE_DATA_DIR=/data \
    PGENGINE_HOST=0.0.0.0 \
    PGENGINE_PORT=8000
VOLUME /data
EXPOSE 8000
CMD ["python", "-m", "server", "serve"]
