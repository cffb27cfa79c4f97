"""Webhooks: which receivers may be called, the body of a call, and the secret that signs it."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Header
from pydantic import BaseModel, Field

from app.api.answers import view
from app.api.bodies import WEBHOOK_TYPES, WebhookBody, WebhookType
from app.api.deps import Services, TheExchange, TheServices, authenticate
from app.api.description import NEEDS_KEY, problems
from app.api.gateway import Exchange
from app.api.views import JobView, Moment
from app.errors import InvalidRequest
from app.jobs.job import JobStatus, Progress, Webhook
from app.jobs.outbox import Delivery
from app.outbound import NotAllowed

calls = APIRouter(tags=["Webhooks"])  # the calls to receivers, for the OpenAPI description
router = APIRouter(prefix="/api/v1/webhooks", tags=["Jobs"], dependencies=[Depends(authenticate)])

_TYPES = {status: name for name, statuses in WEBHOOK_TYPES.items() for status in statuses}


class WebhookMessage(BaseModel):
    """The body of a webhook call."""

    type: WebhookType
    timestamp: Moment = Field(description="When it happened")
    data: JobView


class SigningSecret(BaseModel):
    """The secret that signs webhooks."""

    key: str = Field(
        description="As libraries of Standard Webhooks take it", examples=["whsec_C2FVsBQIhrscChlQ"]
    )


@router.get(
    "/signing-secret",
    operation_id="getSigningSecret",
    summary="The secret that signs your webhooks",
    responses=problems(401),
    openapi_extra=NEEDS_KEY,
)
async def get_signing_secret(services: TheServices, exchange: TheExchange) -> SigningSecret:
    """Return the calling key's secret, unchanged while the key keeps its name and the server its data."""
    return SigningSecret(key=services.signer.webhook_secret(exchange.tenant))


@calls.post("image.job", operation_id="receiveJob", summary="A job has got somewhere", status_code=204)
async def receive_job(
    message: WebhookMessage,
    webhook_id: Annotated[str, Header(description="The same for every attempt")],
    webhook_timestamp: Annotated[str, Header(description="Of this attempt, in seconds since 1970")],
    webhook_signature: Annotated[str, Header(description="`v1,BASE64`, as Standard Webhooks has it")],
) -> None:
    """Answer with any status from 200 to 299. 410 ends all attempts; after others, another one follows."""


def check_receiver(webhook: WebhookBody, services: Services) -> None:
    """Refuse a receiver that would certainly never be called."""
    try:
        services.outbound.require_allowed(str(webhook.url))
    except NotAllowed as error:
        message = f"webhook.url must lead to a public address: {error}"
        raise InvalidRequest(message, param="webhook", places=[("/webhook/url", message)]) from None


async def message_body(services: Services, delivery: Delivery, webhook: Webhook) -> bytes:
    """Return the body of a webhook call, with freshly signed picture URLs."""
    has_started = delivery.status == JobStatus.RUNNING
    job = delivery.job.as_started() if has_started else delivery.job
    happened_at = job.started_at if has_started else job.completed_at
    progress = Progress("prior", 0, job.request.prior_steps) if has_started else None
    message = WebhookMessage(
        type=_TYPES[delivery.status],
        timestamp=datetime.fromtimestamp(happened_at or job.created_at, UTC),
        data=await view(job, services, Exchange(delivery.id), webhook.base, progress=progress),
    )
    return message.model_dump_json().encode()
