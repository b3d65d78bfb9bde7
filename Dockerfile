# The service with its weights. `docker build -t ddpm-service .`, then with or without `--gpus all`:
#     docker run --rm -p 8000:8000 ddpm-service
FROM python:3.12.12-slim-bookworm AS build
RUN pip install --no-cache-dir uv==0.13.9
# Hash-based bytecode: it stays valid when a copy between stages or an export changes the files' times.
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH
RUN python -m venv --without-pip /venv
COPY requirements.lock /tmp/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /venv/bin/python --require-hashes -r /tmp/requirements.lock

FROM python:3.12.12-slim-bookworm
RUN useradd --uid 10001 --no-create-home ddpm
COPY --from=build /venv /venv
WORKDIR /srv
COPY ddpm_core ddpm_core
COPY app app
COPY weights weights
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DDPM_HOST=0.0.0.0 \
    DDPM_PORT=8000
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"DDPM_PORT\"]}/readyz', timeout=4)"]
CMD ["python", "-m", "app"]
