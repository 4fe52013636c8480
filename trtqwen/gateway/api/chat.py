"""`/v1/chat/completions`: from a request to a plan for the engine.

With tool_choice "auto", nothing constrains the model, and a call may violate its tool's parameters. `strict` is
accepted there, because many clients always send it, but it has no effect. If tool_choice forces a call, the call
matches the parameters: for a strict tool in full, for others as far as the grammar can enforce them.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

from trtqwen.gateway.api.envelope import choice_count
from trtqwen.gateway.api.fields import refuse_unsupported
from trtqwen.gateway.api.prompt import Conversation
from trtqwen.gateway.api.reasoning import END
from trtqwen.gateway.api.response_format import plan_guide
from trtqwen.gateway.api.sampling import plan_sampling
from trtqwen.gateway.api.schemas import ChatRequest
from trtqwen.gateway.api.tool_choice import call_guide, calls_or_answer, offered_tools
from trtqwen.gateway.chat_template import ChatTemplate
from trtqwen.gateway.config import GatewayConfig
from trtqwen.gateway.errors import bad_request, unsupported
from trtqwen.gateway.generation.plan import GenerationPlan, fit_answer
from trtqwen.gateway.model import ServedModel
from trtqwen.gateway.tools import OPEN


@dataclass(frozen=True)
class ChatPlan:
    """The plan of a chat request.

    Attributes:
        parse_calls: look for tool calls in the answer.
        forced_call: the answer is a call from its first token on.
        named_call: the finish reason of a forced call is `stop`.
        one_call: the answer ends with its first call.
        reasoning: whether the answer begins `inside` or `outside` the reasoning; None does not parse reasoning.
        show_reasoning: return the reasoning.
        echo: text in front of the answers.
        continuous_usage: each chunk of a stream carries the usage so far.
    """

    generation: GenerationPlan
    parse_calls: bool = False
    forced_call: bool = False
    named_call: bool = False
    one_call: bool = False
    reasoning: Literal["inside", "outside"] | None = None
    show_reasoning: bool = True
    echo: str = ""
    include_usage: bool = False
    continuous_usage: bool = False


def plan_chat(
    model: ServedModel,
    template: ChatTemplate | None,
    config: GatewayConfig,
    request: ChatRequest,
    *,
    request_id: str = "",
) -> ChatPlan:
    """Render, tokenize and check a chat request.

    Args:
        request_id: of the answer; empty draws one.

    Raises:
        ApiError: naming the field, if it cannot be served as asked.
    """
    refuse_unsupported(request)
    choices = choice_count(request.n, 1, config.max_choices)
    tools = offered_tools(request)
    guide = plan_guide(model, request)
    one_call = bool(tools.forced) or request.parallel_tool_calls is False
    if tools.forced:
        if guide is not None:
            raise bad_request("tool_choice forces a call, response_format an answer; drop one", param="tool_choice")
        guide = call_guide(model, tools.forced)
    elif tools.told and guide is not None:
        guide = calls_or_answer(model, tools.told, guide, one_call=one_call)
    conversation = Conversation(
        model,
        template,
        config,
        request.messages,
        tools.told,
        add_generation_prompt=request.add_generation_prompt,
        continue_final=bool(request.continue_final_message),
        variables=request.chat_template_kwargs,
        documents=request.documents,
    )
    if tools.told and template is not None and not template.takes_tools:
        raise unsupported("tools", f"the chat template of {model.name} has no place for tools; leave them out")
    reasoning = conversation.reasoning(config) if request.separate_reasoning is not False else None
    begun = ""
    if reasoning == "inside" and guide is not None:
        reasoning, begun = None, f"\n{END}\n\n"  # the form holds from the first token on, so nothing is thought
    if tools.forced:
        begun += f"{OPEN}\n"
    ids = conversation.ids(begun)
    if request.truncate_prompt_tokens is not None:
        ids = truncated(model, ids, request.truncate_prompt_tokens)
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    room = fit_answer(model, config, len(ids), asked)
    log_probs = bool(request.logprobs) or bool(request.top_logprobs)
    generation = GenerationPlan(
        request_id=request_id or f"chatcmpl-{uuid.uuid4().hex}",
        prompts=(ids,) * choices,
        choices=choices,
        max_tokens=room.max_tokens,
        reserved=room.reserved,
        sampling=plan_sampling(
            model,
            request,
            log_probs=log_probs,
            top_log_probs=request.top_logprobs or 0,
            prompt_log_probs=request.prompt_logprobs,
            guide=guide,
        ),
        stop=request.stop_strings,
        keep_stop=bool(request.include_stop_str_in_output),
        priority=request.priority or 0,
    )
    return ChatPlan(
        generation,
        parse_calls=bool(tools.told),
        forced_call=bool(tools.forced),
        named_call=tools.named,
        one_call=one_call,
        reasoning=reasoning,
        show_reasoning=request.include_reasoning is not False,
        echo=request.messages[-1].text if request.echo and request.messages[-1].role == "assistant" else "",
        include_usage=request.include_usage,
        continuous_usage=request.continuous_usage,
    )


def truncated(model: ServedModel, ids: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The last `most` ids of a prompt; -1 keeps what leaves room for a token of the answer."""
    most = model.limits.max_seq_len - 1 if most < 0 else most
    return ids[-most:] if most else ids
