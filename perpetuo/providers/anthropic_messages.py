"""OpenAI's messages as Anthropic's system blocks and turns.

Anthropic wants turns that alternate, begin with the user, and answer all tool calls of one turn at the
beginning of the next; these rules are made true here, or the request is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from perpetuo.errors import InvalidRequest
from perpetuo.providers.anthropic_history import call_blocks, result_block, thought_blocks
from perpetuo.providers.anthropic_parts import (
    Block,
    content_parts,
    marked,
    part_blocks,
    text_block,
    text_of_part,
)

_FIRST_WORDS = "(continue)"


@dataclass(slots=True)
class Conversation:
    """`turns` are `{"role", "content": [block, …]}`, `tool_names` those of the tools used in them."""

    system: list[Block] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    tool_names: list[str] = field(default_factory=list)

    @property
    def uses_files(self) -> bool:
        return any(
            block.get("type") == "document" and block["source"]["type"] == "file"
            for turn in self.turns
            for block in turn["content"]
        )

    @property
    def ends_in_unthought_calls(self) -> bool:
        """The last turn answers tool calls, and the thoughts that led to them are not there."""
        if len(self.turns) < 2 or self.turns[-1]["content"][0]["type"] != "tool_result":
            return False
        return not _is_thought(self.turns[-2]["content"][0])


def read_messages(messages: Sequence[object]) -> Conversation:
    """The conversation in `messages`. Raises InvalidRequest with the `param` at fault."""
    conversation = Conversation()
    legacy_ids: list[str] = []
    call_places: dict[str, str] = {}
    result_places: dict[str, str] = {}
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"'{place}' must be an object.", param=place)
        role = message.get("role")
        if role in ("system", "developer"):
            conversation.system += _system_blocks(message, place)
        elif role == "user":
            _add(conversation, "user", _user_blocks(message, place))
        elif role == "assistant":
            calls = call_blocks(message, place, legacy_ids)
            call_places |= {call["id"]: place for call in calls}
            conversation.tool_names += [call["name"] for call in calls]
            _add(conversation, "assistant", thought_blocks(message) + _said(message, place) + calls)
        elif role in ("tool", "function"):
            result = result_block(message, place, legacy_ids)
            result_places[result["tool_use_id"]] = place
            _add(conversation, "user", [result])
        else:
            raise InvalidRequest(f"'{place}.role' is not a role that is known.", param=f"{place}.role")
    _order(conversation.turns)
    _check_pairs(conversation.turns, call_places, result_places)
    _complete(conversation)
    return conversation


def _system_blocks(message: dict[str, Any], place: str) -> list[Block]:
    """One block for the message; a part with a cache mark ends a block, so that the mark stays there."""
    blocks: list[Block] = []
    texts: list[str] = []
    for number, part in enumerate(content_parts(message.get("content"), f"{place}.content")):
        for block in text_of_part(part, f"{place}.content[{number}]"):
            texts.append(block["text"])
            if "cache_control" in block:
                blocks.append({**block, "text": "".join(texts)})
                texts = []
    if texts:
        blocks.append({"type": "text", "text": "".join(texts)})
    if blocks:
        blocks[-1] = marked(blocks[-1], message)
    return blocks


def _user_blocks(message: dict[str, Any], place: str) -> list[Block]:
    content = message.get("content")
    if isinstance(content, str):
        return text_block(content, message, f"{place}.content")
    parts = enumerate(content_parts(content, f"{place}.content"))
    return [block for number, part in parts for block in part_blocks(part, f"{place}.content[{number}]")]


def _said(message: dict[str, Any], place: str) -> list[Block]:
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, str):
        blocks = text_block(content, message, f"{place}.content")
    else:
        parts = enumerate(content_parts(content, f"{place}.content"))
        blocks = [b for number, part in parts for b in text_of_part(part, f"{place}.content[{number}]")]
    return blocks + (text_block(refusal, {}, f"{place}.refusal") if refusal is not None else [])


def _add(conversation: Conversation, role: str, blocks: list[Block]) -> None:
    turns = conversation.turns
    if not blocks:
        return
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] += blocks
    else:
        turns.append({"role": role, "content": blocks})


def _order(turns: list[dict[str, Any]]) -> None:
    """Put tool results first in a user's turn and thoughts first in an assistant's."""
    for turn in turns:
        turn["content"].sort(key=lambda block: not (_is_thought(block) or block["type"] == "tool_result"))


def _is_thought(block: Block) -> bool:
    return block["type"] in ("thinking", "redacted_thinking")


def _check_pairs(
    turns: list[dict[str, Any]], call_places: dict[str, str], result_places: dict[str, str]
) -> None:
    asked: dict[str, None] = {}
    for turn in [*turns, {"role": "user", "content": []}]:
        blocks = turn["content"]
        answered = {block["tool_use_id"]: None for block in blocks if block["type"] == "tool_result"}
        for call_id in answered:
            if call_id not in asked:
                place = result_places[call_id]
                raise InvalidRequest(
                    f"'{place}' answers a tool call that the assistant's message before it does not have.",
                    param=f"{place}.tool_call_id",
                )
        for call_id in asked:
            if call_id not in answered:
                place = call_places[call_id]
                raise InvalidRequest(
                    f"A tool call of '{place}' is not answered by the messages that follow it.",
                    param=f"{place}.tool_calls",
                )
        asked = {block["id"]: None for block in blocks if block["type"] == "tool_use"}


def _complete(conversation: Conversation) -> None:
    """Give the conversation the beginning and the end that Anthropic wants."""
    turns = conversation.turns
    if turns and turns[-1]["role"] == "assistant":
        last = turns[-1]["content"][-1]
        if last["type"] == "text":  # a prefill: blanks at its end are rejected
            turns[-1]["content"][-1] = {**last, "text": last["text"].rstrip()}
    if not turns and conversation.system:
        turns.append({"role": "user", "content": [conversation.system.pop()]})
    if not turns:
        raise InvalidRequest("The messages are all empty.", param="messages")
    if turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": [{"type": "text", "text": _FIRST_WORDS}]})
