"""The service over HTTP: who may ask, what a request looks like, and which status says what."""

import asyncio
import hmac
import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dpg.serve.batch import Failure, Refused
from dpg.serve.service import Service
from dpg.serve.wire import read_order, reply

STATUS = {
    "malformed": 400,
    "unauthorized": 401,
    "conflict": 409,
    "over": 410,
    "too-large": 413,
    "media-type": 415,
    "uneven": 422,
    "failed": 500,
    "busy": 503,
    "stopping": 503,
    "incomplete": 504,
    "overdue": 504,
}
"""The HTTP status of every refusal and failure, by its kind."""


def make_app(service: Service, token: str | None) -> Starlette:
    """The routes of a service. With a token, all but `/health` want it as `Authorization: Bearer TOKEN`."""

    async def rewards(request: Request) -> Response:
        try:
            _refuse_unknown(request, token)
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                # What a web page can send from a browser without asking first is of another type.
                raise Refused("media-type", "the body must be sent as Content-Type: application/json.")
            order = read_order(await _body(request, service.limits.body_bytes), service.limits)
            done = await _unless_gone(request, service.answer(order))
        except Refused as refused:
            return _error(refused.kind, str(refused))
        except ClientDisconnect:
            return Response(status_code=499)  # Nobody reads it.
        if isinstance(done.outcome, Failure):
            return _error(done.outcome.kind, done.outcome.message)
        return JSONResponse(reply(order, done, done.outcome))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def status(request: Request) -> Response:
        try:
            _refuse_unknown(request, token)
        except Refused as refused:
            return _error(refused.kind, str(refused))
        return JSONResponse(service.status())

    return Starlette(
        routes=[
            Route("/v1/rewards", rewards, methods=["POST"]),
            Route("/v1/status", status, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ]
    )


def _refuse_unknown(request: Request, token: str | None) -> None:
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # In constant time: how long it takes tells nothing of how much of a guess is right.
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogatepass"), token.encode())
    if scheme.lower() != "bearer" or not same:
        raise Refused("unauthorized", "send the service's token as `Authorization: Bearer TOKEN`.")


async def _body(request: Request, limit: int) -> bytes:
    """The body, of which no more than `limit` bytes are ever held."""
    announced = request.headers.get("content-length", "0")
    content = bytearray()
    if announced.isdecimal() and int(announced) <= limit:
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                break
        else:
            return bytes(content)
    raise Refused("too-large", f"the body is above the limit body_bytes={limit}. Send fewer samples in one request.")


async def _unless_gone(request: Request, answering: Any) -> Any:
    """The result of `answering`.

    Raises:
        ClientDisconnect: if the client went away first.
    """
    answer, gone = asyncio.ensure_future(answering), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect()
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(kind: str, message: str) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if kind == "unauthorized" else {}
    headers |= {"Retry-After": "1"} if STATUS[kind] == 503 else {}
    # ASCII: a message may show a lone surrogate, which is no UTF-8.
    content = json.dumps({"error": kind, "message": message})
    return Response(content, STATUS[kind], headers, "application/json")
