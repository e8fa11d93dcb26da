"""``v4surgery push``: a replica to the Hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from v4surgery.cli._groups import Output, grouped
from v4surgery.cli._options import Token, Workers


@grouped
def run(
    replica: Annotated[str, typer.Argument(metavar="REPLICA", help="Folder of a replica.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="ORG/NAME on the Hub.")],
    *,
    create: Annotated[
        bool, typer.Option("--create", help="Make the repository, or the branch, if need be.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make it a public one; by default it is private.")
    ] = False,
    revision: Annotated[
        str, typer.Option(metavar="NAME", help="The branch to commit to, or refs/pr/N.")
    ] = "main",
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="By default it names recipe and parent.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Although verify has not passed, or over a model that is no replica."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be sent.")
    ] = False,
    token: Token = None,
    max_workers: Workers = None,
    output: Output,
) -> None:
    """Push a replica to the Hub, with its card.

    One commit or one pull request. What the Hub has already is not sent: the same command again
    goes on where it was stopped, and when all is there, it does nothing.
    """
    import sys

    from v4surgery.api import default_workers
    from v4surgery.checkpoint.reader import open_checkpoint
    from v4surgery.cli._output import print_json, progress_bar, say, set_verbosity, size, warn
    from v4surgery.hub.client import Hub
    from v4surgery.hub.parcel import pack_replica
    from v4surgery.hub.push import Destination, plan_push, push, summarize_push

    set_verbosity(output.verbose)
    to = Destination(
        repo_id,
        revision,
        create=create,
        private=not public,
        create_pr=create_pr,
        message=commit_message,
    )
    hub = Hub(token, show_progress=not output.quiet and sys.stderr.isatty())
    with open_checkpoint(replica, token=token) as checkpoint:
        with progress_bar(checkpoint.payload_bytes, "hash", quiet=output.quiet) as progress:
            parcel = pack_replica(
                checkpoint,
                repo_id,
                force=force,
                workers=max_workers or default_workers(),
                progress=progress,
            )
        plan = plan_push(parcel, to, hub, force=force)
        summary = summarize_push(plan, hub.endpoint)
        if parcel.unverified is not None:
            warn(f"pushed by force: {parcel.unverified}")
        committed = None if dry_run else push(plan, hub)
    if output.as_json:
        done = committed and {
            "oid": committed.oid,
            "url": committed.url,
            "pull_request_url": committed.pull_request_url,
        }
        print_json({**summary, "dry_run": dry_run, "commit": done})
        return
    if dry_run:
        show(summary)
    elif committed is None:
        say(f"{summary['repository']}: has it all already, nothing was sent")
    else:
        say(
            f"{committed.pull_request_url or committed.url}: {len(plan.to_send)} file(s), "
            f"{size(summary['bytes_to_send'])}"
        )


def show(summary: dict[str, Any]) -> None:
    """Print a plan for people."""
    from v4surgery.cli._output import print_table, say, size

    visibility = "private" if summary["private"] else "public"
    state = f"{visibility}, to be made" if summary["creates"] == "repository" else visibility
    typer.echo(f"{summary['repository']} ({state}), revision {summary['revision']}\n")
    rows = [(file["change"], file["bytes"], file["name"]) for file in summary["files"]]
    rows += [("deleted", "", name) for name in summary["deletes"]]
    print_table(None, ("on the Hub", "bytes", "file"), rows, right=("bytes",))
    if summary["left_out"]:
        say(f"not sent: {', '.join(summary['left_out'])}")
    if summary["pull_request"]:
        say(f"{summary['pull_request']} holds it all already")
    elif summary["done"]:
        say("the Hub has it all already")
    else:
        kind = "a pull request" if summary["create_pr"] else "a commit"
        say(f"would send {size(summary['bytes_to_send'])} in {kind}: {summary['message']}")
