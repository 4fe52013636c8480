"""The routes that make tokens, by OpenAI's, Anthropic's and Triton's names; each parses, plans and answers."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from trtqwen.gateway.api.chat import plan_chat
from trtqwen.gateway.api.chat_response import ChatAnswers
from trtqwen.gateway.api.completions import CompletionAnswers, plan_completion
from trtqwen.gateway.api.generate import PlainAnswer, plan_plain
from trtqwen.gateway.api.respond import Route, answer_id, respond, work_out
from trtqwen.gateway.api.schemas import ChatRequest, CompletionRequest, GenerateRequest
from trtqwen.gateway.api.select import select

router = APIRouter(route_class=Route)


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """A chat, by the model's own template."""
    runtime = select(request, body)
    planned = partial(plan_chat, runtime.model, runtime.template, runtime.config, body)
    plan = await work_out(request, body, partial(planned, request_id=answer_id(request, "chatcmpl-")))
    return await respond(request, plan.generation, ChatAnswers(plan, runtime.generator), stream=body.stream)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """The continuation of prompts, taken as they are."""
    runtime = select(request, body)
    planned = partial(plan_completion, runtime.model, runtime.config, body)
    plan = await work_out(request, body, partial(planned, request_id=answer_id(request, "cmpl-")))
    return await respond(request, plan.generation, CompletionAnswers(plan, runtime.generator), stream=body.stream)


@router.post("/generate")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Plain text in and out."""
    return await _generate(request, body, stream=False)


@router.post("/generate_stream")
async def generate_stream(request: Request, body: GenerateRequest) -> Response:
    """Plain text in, events out."""
    return await _generate(request, body, stream=True)


async def _generate(request: Request, body: GenerateRequest, *, stream: bool) -> Response:
    runtime = select(request, body)
    planned = partial(plan_plain, runtime.model, runtime.config, body)
    plan = await work_out(request, body, partial(planned, request_id=answer_id(request, "gen-")))
    answer = PlainAnswer(plan, runtime.generator)
    return await respond(request, plan.generation, answer, stream=stream or bool(body.stream))
