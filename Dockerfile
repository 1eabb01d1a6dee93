# One image for every GenPulse process; the command says which one it is.
#   docker build -t genpulse .

FROM python:3.13.9-slim-trixie AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/genpulse
ENV PATH=/opt/genpulse/bin:$PATH
WORKDIR /src

# The locked packages are a layer of their own: a change of our code does not install them again.
COPY requirements.lock ./
RUN pip install --require-hashes --only-binary :all: -r requirements.lock

# Built with the locked hatchling; nothing is fetched that has no hash.
COPY pyproject.toml README.md LICENSE CHANGELOG.md celeryconfig.py ./
COPY genpulse genpulse
RUN pip install --no-deps --no-build-isolation . && python -m compileall -q /opt/genpulse/lib


FROM python:3.13.9-slim-trixie

RUN groupadd --gid 10001 genpulse \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin genpulse \
 && install --directory --owner genpulse --group genpulse --mode 0750 /data
COPY --from=build /opt/genpulse /opt/genpulse

ENV PATH=/opt/genpulse/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GENPULSE_DATA_DIR=/data \
    GENPULSE_LOG_FORMAT=json
WORKDIR /data
USER 10001:10001
EXPOSE 8000

# SIGTERM is what every process understands: gunicorn ends its requests, a worker hands its tasks back.
STOPSIGNAL SIGTERM
ENTRYPOINT ["genpulse"]
CMD ["--help"]
