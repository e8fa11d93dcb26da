"""What goes wrong between us and the Hub: what may pass by itself, and how the rest is told.

An exception of huggingface_hub may quote what a server said, and a server may quote a token: it
is told in our words, without what looks like one, and is not chained to ours.
"""

from __future__ import annotations

from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from v4surgery.checkpoint.patience import RETRIED_STATUSES, Transient, asked_wait
from v4surgery.errors import HubError
from v4surgery.redact import without_tokens

CONFLICTS = (409, 412)
_MAX_REASON = 500
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "run the same command again: what is up stays up"


def cause_of(error: Exception) -> BaseException:
    """What an upload failed of; huggingface_hub wraps it in a RuntimeError that names the file."""
    is_wrapper = type(error) is RuntimeError and error.__cause__ is not None
    return error.__cause__ or error if is_wrapper else error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that it stands for."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def transient_of(error: BaseException) -> Transient | None:
    """What may pass by itself: some refusals, broken connections, answers that are no JSON."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        headers = {name.lower(): value for name, value in error.response.headers.items()}
        refused = Transient(f"HTTP {status}", asked_wait(headers))
        return refused if status in RETRIED_STATUSES else None
    # By name: of httpx or httpx2, whichever this huggingface_hub is built on.
    names = {base.__name__ for base in type(error).__mro__}
    return Transient(str(error)) if names & {"TransportError", "JSONDecodeError"} else None


def explained(what: str, where: str, error: BaseException, token: str | None) -> HubError:
    """The error for the user: what the Hub did not do, why, and the next step."""
    status = status_of(error)
    rule, hint = _advice(error, status, has_token=token is not None)
    reason = getattr(error, "server_message", None) or str(error) or type(error).__name__
    if status is not None:
        reason = f"HTTP {status}: {reason}"
    return HubError(
        f"the Hub did not {what}",
        where=where,
        value=without_tokens(" ".join(reason.split()), (token,) if token else ())[:_MAX_REASON],
        rule=rule,
        hint=hint,
    )


def _advice(error: BaseException, status: int | None, *, has_token: bool) -> tuple[str | None, str]:
    """The rule that was broken, and the next step."""
    if isinstance(error, OfflineModeIsEnabled):
        return "a push needs the Hub", "unset HF_HUB_OFFLINE"
    if isinstance(error, RevisionNotFoundError):
        return None, "check --revision; --create makes a branch that is not there"
    if status in (401, 403, 404) and not has_token:
        return "pushing needs a token that may write", _LOG_IN
    if status == 401:
        return "a valid token", _LOG_IN
    if status == 403:
        hint = "ask the namespace's owner, or use --create-pr where the repository exists"
        return "a token that may write there", hint
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return "a repository that is there", "check REPO_ID; --create makes it"
    if status in CONFLICTS:
        return "nobody else changes it meanwhile", "run the same command again"
    if status == 429:
        return "the Hub's rate limit", f"wait, then {_AGAIN}"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return "front matter that the Hub takes", "correct the head of README.md"
    return None, _AGAIN


__all__ = ["CONFLICTS", "cause_of", "explained", "status_of", "transient_of"]
