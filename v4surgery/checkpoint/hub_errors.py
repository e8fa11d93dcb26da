"""What the Hub's refusals mean, and what to do about them."""

from __future__ import annotations

from v4surgery.errors import CheckpointError, ReadError

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def refusal(
    status: int, code: str | None, message: str, where: str, endpoint: str, has_token: bool
) -> CheckpointError:
    """The error for an answer that no retry will change.

    Args:
        status: Of the answer.
        code: Its ``X-Error-Code``.
        message: Its ``X-Error-Message``, one line.
        where: What was asked for: begins with the repository.
        endpoint: Of the Hub.
        has_token: Whether a token was sent.

    Source: the codes are those that huggingface_hub's ``hf_raise_for_status`` tells apart.
    """
    value = f"{status} {message}".rstrip()
    repo = "/".join(where.partition("@")[0].split("/")[:2])
    if code == "GatedRepo":
        who = "this token has not been given access" if has_token else "there is no token"
        then = "" if has_token else f", then {_LOG_IN}"
        return CheckpointError(
            "access to this repository is gated",
            where=where,
            value=value,
            rule=f"a token that has been given access; {who}",
            hint=f"ask for access at {endpoint}/{repo}{then}",
        )
    if code == "RevisionNotFound":
        return CheckpointError(
            "no such revision in this repository",
            where=where,
            value=value,
            rule="a branch, a tag or a commit",
            hint=f"see {endpoint}/{repo}/commits/main",
        )
    if code == "EntryNotFound":
        return ReadError(
            "no such file in this repository", where=where, value=value, hint="check the revision"
        )
    if status == 401 and code is None:
        return CheckpointError(
            "the Hub does not accept the token",
            where=where,
            value=value,
            hint=f"{_LOG_IN}; or unset HF_TOKEN for a public repository",
        )
    if code == "RepoNotFound" or status in (401, 404):
        hint = "check the name; no local folder has it either"
        return CheckpointError(
            "no such repository, or none that may be read"
            + (" with this token" if has_token else " without a token"),
            where=where,
            value=value,
            hint=hint if has_token else f"{hint}. For a private repository {_LOG_IN}",
        )
    return CheckpointError(
        "the Hub refuses the request",
        where=where,
        value=value,
        hint="check the token's permissions" if status == 403 else None,
    )


def offline_error(where: str) -> ReadError:
    """HF_HUB_OFFLINE is set, and something is not in the cache."""
    return ReadError(
        "this is not in the cache, and the Hub may not be asked",
        where=where,
        value="HF_HUB_OFFLINE is set",
        rule="offline, everything that is needed is in the cache",
        hint="unset HF_HUB_OFFLINE, or download the repository first: hf download "
        + "/".join(where.partition("@")[0].split("/")[:2]),
    )


__all__ = ["offline_error", "refusal"]
