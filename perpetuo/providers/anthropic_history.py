"""Tool calls, their results and thoughts of earlier turns, as Anthropic's blocks.

Ids may have been minted by any provider (`tool_ids`). Thoughts go back only with the signature that came
with them, unaltered: Anthropic checks it.
"""

from __future__ import annotations

from typing import Any

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic_parts import Block, content_parts, marked, part_blocks
from perpetuo.providers.jsonbody import read_json
from perpetuo.providers.tool_ids import word_id

THOUGHT_FORMAT = "anthropic-claude-v1"  # as OpenRouter names it in `reasoning_details`
MAX_NAME_CHARACTERS = 64


def tool_name(name: object, place: str) -> str:
    """A tool's name as Anthropic accepts it. The same for a definition, a choice and a call of the past."""
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"'{place}' must be the name of a function.", param=place)
    return word_id(name, MAX_NAME_CHARACTERS)


def call_blocks(message: dict[str, Any], place: str, legacy_ids: list[str]) -> list[Block]:
    """The `tool_use` blocks of an assistant's message; ids made up for legacy calls go into `legacy_ids`."""
    calls, legacy = message.get("tool_calls"), message.get("function_call")
    if calls is not None and not isinstance(calls, list):
        raise InvalidRequest(f"'{place}.tool_calls' must be a list.", param=f"{place}.tool_calls")
    blocks = [_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls or ())]
    if isinstance(legacy, dict):
        call_id = word_id(f"{place}.function_call")
        legacy_ids.append(call_id)
        blocks.append(_tool_use(call_id, legacy, f"{place}.function_call"))
    return blocks


def _call(call: object, place: str) -> Block:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise InvalidRequest(f"'{place}' must be the call of a function.", param=place)
    if not isinstance(call.get("id"), str):
        raise InvalidRequest(f"'{place}.id' must be a text.", param=f"{place}.id")
    return marked(_tool_use(word_id(call["id"]), function, f"{place}.function"), call)


def _tool_use(call_id: str, function: dict[str, Any], place: str) -> Block:
    name = tool_name(function.get("name"), f"{place}.name")
    return {"type": "tool_use", "id": call_id, "name": name, "input": _input(function.get("arguments"))}


def _input(arguments: object) -> dict[str, Any]:
    """Arguments as the object that Anthropic wants; what is none is wrapped, a model may have written it."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, str):
        return arguments if isinstance(arguments, dict) else {"_raw": arguments}
    try:
        value = read_json(arguments.encode())
    except ValueError:  # lone surrogates too
        return {"_raw": arguments}
    return value if isinstance(value, dict) else {"_raw": arguments}


def result_block(message: dict[str, Any], place: str, legacy_ids: list[str]) -> Block:
    """The `tool_result` block of a message with the role tool or function."""
    if message["role"] == "function":
        call_id = legacy_ids.pop(0) if legacy_ids else word_id(place)
    elif isinstance(message.get("tool_call_id"), str):
        call_id = word_id(message["tool_call_id"])
    else:
        raise InvalidRequest(f"'{place}.tool_call_id' must be a text.", param=f"{place}.tool_call_id")
    block: Block = {"type": "tool_result", "tool_use_id": call_id}
    content = message.get("content")
    if isinstance(content, str):
        said: object = content
    else:
        parts = enumerate(content_parts(content, f"{place}.content"))
        said = [b for number, part in parts for b in part_blocks(part, f"{place}.content[{number}]")]
    if said:
        block["content"] = said
    if message.get("is_error") is True:
        block["is_error"] = True
    return marked(block, message)


def thought_blocks(message: dict[str, Any]) -> list[Block]:
    """Thoughts that came from Anthropic: our own `reasoning_details`, or LiteLLM's `thinking_blocks`.

    What has no signature, or another provider's, is left out: it would be rejected.
    """
    details, blocks = message.get("reasoning_details"), message.get("thinking_blocks")
    if isinstance(details, list) and details:
        found = [_thought_of_detail(detail) for detail in details if isinstance(detail, dict)]
    else:
        given = blocks if isinstance(blocks, list) else []
        found = [_thought(block) for block in given if isinstance(block, dict)]
    return [block for block in found if block is not None]


def _thought_of_detail(detail: dict[str, Any]) -> Block | None:
    if detail.get("format", THOUGHT_FORMAT) != THOUGHT_FORMAT:
        return None
    if detail.get("type") == "reasoning.encrypted":
        return _thought({**detail, "type": "redacted_thinking"})
    return _thought({**detail, "type": "thinking", "thinking": detail.get("text")})


def _thought(block: dict[str, Any]) -> Block | None:
    signature, data = block.get("signature"), block.get("data")
    if block.get("type") == "thinking" and isinstance(signature, str) and signature:
        thinking = block.get("thinking")
        text = thinking if isinstance(thinking, str) else ""
        return {"type": "thinking", "thinking": text, "signature": signature}
    if block.get("type") == "redacted_thinking" and isinstance(data, str) and data:
        return {"type": "redacted_thinking", "data": data}
    return None
