# Built in one stage, run in another: no compiler, no pip cache and no root in what is served.
FROM python:3.11-slim AS build
WORKDIR /app
COPY requirements.txt .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --require-hashes -r requirements.txt

FROM python:3.11-slim
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    PERPETUO_ENV=production PERPETUO_DATA=/data
RUN useradd --system --no-create-home perpetuo && install -d -o perpetuo -m 700 /data
COPY --from=build /venv /venv
WORKDIR /app
COPY gunicorn.conf.py wsgi.py ./
COPY migrations migrations
COPY perpetuo perpetuo
USER perpetuo
VOLUME /data
EXPOSE 8000
# Migrates on start, under a lock, so that any number of instances may start at once; then becomes the server.
CMD ["sh", "-c", "flask --app wsgi db upgrade && exec gunicorn wsgi:app"]
