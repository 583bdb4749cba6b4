"""Parts of a message's content as Anthropic's blocks: text, images, documents.

Source: OpenAI's content parts and Anthropic's Messages API, version 2023-06-01.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any
from urllib.parse import unquote_to_bytes

from perpetuo.errors import InvalidRequest

_IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")

Block = dict[str, Any]


def text_block(text: object, source: dict[str, Any], place: str) -> list[Block]:
    """One text block, none for blank text, which Anthropic rejects. `source` may carry a cache mark."""
    if not isinstance(text, str):
        raise InvalidRequest(f"'{place}' must be a text.", param=place)
    return [marked({"type": "text", "text": text}, source)] if text.strip() else []


def marked(block: Block, source: dict[str, Any]) -> Block:
    """`block` with the cache mark of what it was made from, if that had one."""
    mark = source.get("cache_control")
    return {**block, "cache_control": mark} if isinstance(mark, dict) else block


def content_parts(content: object, place: str) -> list[dict[str, Any]]:
    """Content in any of its forms as a list of parts; a text is one text part, null is none."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidRequest(f"'{place}' must be a text or a list of parts.", param=place)
    for number, part in enumerate(content):
        if not isinstance(part, dict):
            raise InvalidRequest(f"'{place}[{number}]' must be an object.", param=f"{place}[{number}]")
    return content


def text_of_part(part: dict[str, Any], place: str) -> list[Block]:
    """The block of a part that must be text or a refusal: other kinds have no place where it stands."""
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise InvalidRequest(f"A part of type {kind!r} is not possible here.", param=f"{place}.type")
    return text_block(part.get(kind), part, f"{place}.{kind}")


def part_blocks(part: dict[str, Any], place: str) -> list[Block]:
    """The blocks of one part of a user's or a tool's message. Raises InvalidRequest."""
    kind = part.get("type")
    if kind == "image_url":
        return [marked(_image(part.get("image_url"), f"{place}.image_url"), part)]
    if kind == "file":
        return [marked(block, part) for block in _file(part.get("file"), f"{place}.file")]
    if kind in ("input_audio", "audio"):
        raise InvalidRequest("Anthropic's models take no audio.", param=f"{place}.{kind}")
    return text_of_part(part, place)


def _image(image: object, place: str) -> Block:
    url = image.get("url") if isinstance(image, dict) else image
    if isinstance(url, str) and url[:5].lower() == "data:":
        media_type, data = _split_data_url(url, f"{place}.url")
        return _base64_image(media_type, data, f"{place}.url")
    if isinstance(url, str) and url[:8].lower() == "https://":
        return {"type": "image", "source": {"type": "url", "url": url}}
    raise InvalidRequest("An image must be a data URL or an https URL.", param=f"{place}.url")


def _base64_image(media_type: str, data: str | None, place: str) -> Block:
    media_type = "image/jpeg" if media_type == "image/jpg" else media_type
    if media_type not in _IMAGE_TYPES or data is None:
        raise InvalidRequest("An image must be JPEG, PNG, GIF or WebP in base64.", param=place)
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def _file(file: object, place: str) -> list[Block]:
    file = file if isinstance(file, dict) else {}
    data, file_id = file.get("file_data"), file.get("file_id")
    if isinstance(data, str):
        return _document(data, file, f"{place}.file_data")
    if isinstance(file_id, str) and file_id.startswith("file_"):  # OpenAI's begin with `file-`
        return [_titled({"type": "document", "source": {"type": "file", "file_id": file_id}}, file)]
    if file_id is not None:
        raise InvalidRequest(
            "This file id is not one of Anthropic's; send the file itself as 'file_data'.",
            param=f"{place}.file_id",
        )
    raise InvalidRequest("A file needs 'file_data', a data URL.", param=f"{place}.file_data")


def _document(url: str, file: dict[str, Any], place: str) -> list[Block]:
    if url[:5].lower() != "data:":
        raise InvalidRequest("'file_data' must be a data URL.", param=place)
    media_type, data = _split_data_url(url, place)
    if media_type.startswith("image/"):
        return [_base64_image(media_type, data, place)]
    if media_type == "application/pdf" and data is not None:
        source = {"type": "base64", "media_type": media_type, "data": data}
        return [_titled({"type": "document", "source": source}, file)]
    if media_type.startswith("text/"):
        text = _decoded(url, data, place)
        if not text.strip():
            return []
        source = {"type": "text", "media_type": "text/plain", "data": text}
        return [_titled({"type": "document", "source": source}, file)]
    raise InvalidRequest("A file must be a PDF in base64, a text or an image.", param=place)


def _titled(block: Block, file: dict[str, Any]) -> Block:
    name = file.get("filename")
    return {**block, "title": name} if isinstance(name, str) and name else block


def _split_data_url(url: str, place: str) -> tuple[str, str | None]:
    """The media type in lower case, and the base64 text, None where the data is not in base64."""
    head, comma, data = url.partition(",")
    if not comma:
        raise InvalidRequest("The data URL has no data.", param=place)
    media_type, *options = head[5:].split(";")
    is_base64 = any(option.strip().lower() == "base64" for option in options)
    return media_type.strip().lower() or "text/plain", data if is_base64 else None


def _decoded(url: str, data: str | None, place: str) -> str:
    try:
        if data is None:
            return unquote_to_bytes(url.partition(",")[2]).decode()
        return base64.b64decode(data, validate=True).decode()
    except (ValueError, binascii.Error) as exc:
        raise InvalidRequest("The text of the file is not UTF-8 in a data URL.", param=place) from exc
