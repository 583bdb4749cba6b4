import base64
from typing import Any

import pytest

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic_parts import part_blocks

CACHE = {"cache_control": {"type": "ephemeral"}}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def file(**fields: Any) -> dict[str, Any]:
    return {"type": "file", "file": fields}


def inline(kind: str, media_type: str, data: str) -> dict[str, Any]:
    return {"type": kind, "source": {"type": "base64", "media_type": media_type, "data": data}}


def document(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": words}, **more}


WORDS = "héllo, you"
ENCODED = base64.b64encode(WORDS.encode()).decode()


@pytest.mark.parametrize(
    ("part", "blocks"),
    [
        ({"type": "text", "text": "Hi", **CACHE}, [{"type": "text", "text": "Hi", **CACHE}]),
        ({"type": "refusal", "refusal": "No"}, [{"type": "text", "text": "No"}]),
        ({"type": "text", "text": " "}, []),
        (image("data:image/png;base64,AAAA"), [inline("image", "image/png", "AAAA")]),
        (image("data:image/jpg;base64,AAAA"), [inline("image", "image/jpeg", "AAAA")]),
        (image("DATA:IMAGE/GIF;x=y;BASE64,AAAA"), [inline("image", "image/gif", "AAAA")]),
        (
            {**image("https://x/y.webp"), **CACHE},
            [{"type": "image", "source": {"type": "url", "url": "https://x/y.webp"}, **CACHE}],
        ),
        (
            {"type": "image_url", "image_url": "https://x/y"},
            [{"type": "image", "source": {"type": "url", "url": "https://x/y"}}],
        ),
        (
            file(file_data="data:application/pdf;base64,AAAA", filename="a.pdf"),
            [{**inline("document", "application/pdf", "AAAA"), "title": "a.pdf"}],
        ),
        (
            file(file_data=f"data:text/csv;base64,{ENCODED}", filename="a.csv"),
            [document(WORDS, title="a.csv")],
        ),
        (file(file_data="data:text/plain;charset=utf-8,h%C3%A9llo, you"), [document(WORDS)]),
        (file(file_data="data:text/plain,"), []),
        (file(file_data="data:image/webp;base64,AAAA"), [inline("image", "image/webp", "AAAA")]),
        (
            {**file(file_id="file_011"), **CACHE},
            [{"type": "document", "source": {"type": "file", "file_id": "file_011"}, **CACHE}],
        ),
    ],
)
def test_a_part_becomes_its_blocks(part: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    assert part_blocks(part, "p") == blocks


@pytest.mark.parametrize(
    ("part", "param"),
    [
        (image("data:image/svg+xml;base64,AAAA"), "p.image_url.url"),
        (image("data:image/png,AAAA"), "p.image_url.url"),
        (image("data:image/png;base64"), "p.image_url.url"),
        (image("http://x/y.png"), "p.image_url.url"),
        (image("file:///etc/passwd"), "p.image_url.url"),
        (image(None), "p.image_url.url"),
        ({"type": "image_url"}, "p.image_url.url"),
        ({"type": "input_audio", "input_audio": {}}, "p.input_audio"),
        (file(), "p.file.file_data"),
        ({"type": "file"}, "p.file.file_data"),
        (file(file_id="file-abc"), "p.file.file_id"),
        (file(file_data="AAAA"), "p.file.file_data"),
        (file(file_data="data:application/zip;base64,AAAA"), "p.file.file_data"),
        (file(file_data="data:application/pdf,AAAA"), "p.file.file_data"),
        (file(file_data="data:text/plain;base64,!"), "p.file.file_data"),
        (file(file_data="data:text/plain;base64,/w=="), "p.file.file_data"),
        (file(file_data="data:image/tiff;base64,AAAA"), "p.file.file_data"),
        ({"type": "video"}, "p.type"),
        ({"type": ["text"]}, "p.type"),
        ({}, "p.type"),
    ],
)
def test_a_part_without_a_counterpart_is_refused(part: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        part_blocks(part, "p")
    assert (caught.value.status, caught.value.param) == (400, param)
