"""``v4surgery kernels``: check and time the Triton kernels on this machine's GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from v4surgery.cli._options import AsJson, Device, Quiet

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    no_args_is_help=True, help="Check and time the Triton kernels on this machine's GPU."
)

Only = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only operations whose name contains this.")
]
CHECK_FAILED = 3


@app.command()
def check(
    only: Only = None,
    real: Annotated[
        bool, typer.Option("--real", help="Shapes of V4-Flash too; takes some GB.")
    ] = False,
    device: Device = "cuda",
    seed: Annotated[int, typer.Option(help="Of the arguments.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare every kernel with a float64 formula, or bit for bit where it is exact.

    Exit code 3 if one differs by more than its bound.
    """
    from v4surgery.cli._output import print_json, print_table, progress_bar
    from v4surgery.kernels.check import check_case, find_cases
    from v4surgery.kernels.dispatch import Ops

    where = _triton_device(device)
    cases, ops = find_cases(only, real=None if real else False), Ops("triton")
    results = []
    with progress_bar(len(cases), "check", quiet=quiet, unit="case") as advance:
        for case in cases:
            results.append(check_case(case, ops, where, seed))
            if advance:
                advance(1)
    failed = [result for result in results if not result.passed]
    if as_json:
        print_json({"device": describe(where), "cases": [r.to_json() for r in results]})
    else:
        print_table(
            describe(where),
            ("operation", "case", "error", "bound", ""),
            [
                (
                    r.op,
                    r.label,
                    f"{r.error:.3g}",
                    f"{r.bound:.3g}" if r.bound else "exact",
                    "ok" if r.passed else r.message or "DIFFERS",
                )
                for r in results
            ],
            right=("error", "bound"),
        )
        typer.echo(f"{len(results) - len(failed)} of {len(results)} cases within their bounds")
    if failed:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def bench(
    only: Only = None,
    device: Device = "cuda",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time every kernel on shapes of V4-Flash, beside what this GPU's ceilings allow."""
    from dataclasses import asdict

    from v4surgery.cli._output import print_json, print_table, progress_bar
    from v4surgery.kernels.check import bench_case, find_cases, measure_ceilings
    from v4surgery.kernels.dispatch import Ops

    where = _triton_device(device, timed=True)
    cases, ops = find_cases(only, real=True), Ops("triton")
    ceilings = measure_ceilings(where)
    results = []
    with progress_bar(len(cases), "bench", quiet=quiet, unit="case") as advance:
        for case in cases:
            results.append(bench_case(case, ops, where, ceilings))
            if advance:
                advance(1)
    if as_json:
        print_json(
            {
                "device": describe(where),
                "ceilings": asdict(ceilings),
                "cases": [asdict(result) for result in results],
            }
        )
        return
    print_table(
        f"{describe(where)}: copy {ceilings.bytes_per_second / 1e9:.0f} GB/s, "
        f"bf16 {ceilings.flops_per_second / 1e12:.0f} TFLOP/s",
        ("operation", "case", "ms", "GB/s", "TFLOP/s", "of floor"),
        [
            (
                r.op,
                r.label,
                f"{r.milliseconds:.3f}",
                f"{r.bytes_per_second / 1e9:.0f}",
                f"{r.flops_per_second / 1e12:.0f}",
                f"{r.floor_share:.0%}",
            )
            for r in results
        ],
        right=("ms", "GB/s", "TFLOP/s", "of floor"),
    )


def describe(device: torch.device) -> str:
    """The device and the versions that ran, in a line."""
    import torch
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted on the CPU"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def _triton_device(name: str, *, timed: bool = False) -> torch.device:
    """The device, once it is known that kernels run there."""
    from v4surgery.cli._model import find_device
    from v4surgery.errors import UsageError
    from v4surgery.kernels.launch import is_interpreted

    device = find_device(name)
    if device.type != "cuda" and (timed or not is_interpreted()):
        raise UsageError(
            "Triton kernels are timed on a GPU" if timed else "Triton kernels run on a GPU",
            where="--device",
            value=name,
            rule="cuda" if timed else "cuda; or cpu with TRITON_INTERPRET=1, which is slow",
        )
    return device
