"""A plan's report as lines for people. Called by the command line."""

from __future__ import annotations

from jaxtml.plan.report import Report
from jaxtml.plan.roofline import GIB


def format_report(report: Report) -> str:
    """Returns a report as lines for people."""
    memory, limit = report["memory"], report["chip_memory_bytes"]
    if report["program"] == "serve":
        figures = [_format_turn(report, name) for name in report["turn_ms"]]
        p50, p95, longest = (report["mix_ms"][name] for name in ("p50", "p95", "longest"))
        figures.append(
            f"sessions as in {report['mix']}: half of the micro-turns take {p50:.0f} ms or less, 95 % {p95:.0f}, "
            f"the longest {longest:.0f}"
        )
        most = report["sessions_at_200_ms"]
        figures.append(f"sessions           {report['sessions']:8} planned, at most {most} for micro-turns of 200 ms")
        if not report["real_time"]:
            figures.append("NOT IN REAL TIME: the longest micro-turn takes more than 200 ms")
    else:
        figures = [
            f"a step, at best    {report['roofline_step_ms']:8.0f} ms, bound by {report['bound_by']}",
            f"tokens/s per chip  {report['tokens_per_s_per_chip']:8.0f} at best, MFU {report['mfu']:.1%}",
        ]
    lines = [
        f"{report['config']}, {report['program']} on {report['topology']} ({report['chips']} chips), "
        f"mesh {report['mesh']}",
        f"memory per chip    {report['bytes_per_chip'] / GIB:8.2f} GiB of {limit / GIB:.0f}: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items()),
        f"FLOPs per chip     {report['flops_per_chip']:8.3e}, {report['flops_ratio']:.3f} x what the tokens need",
        *(f"sent per device    {size / GIB:8.2f} GiB {kind}" for kind, size in report["collective_bytes"].items()),
        *figures,
        *(
            f"{' '.join(result['set']):40} {result['bytes_per_chip'] / GIB:8.2f} GiB, MFU {result['mfu']:.1%} at best"
            for result in report.get("searched", ())
        ),
    ]
    return "\n".join(lines)


def _format_turn(report: Report, name: str) -> str:
    """Returns the line of one of the micro-turns of `turn_ms`."""
    roofline, total = report["turn_ms"][name], report["turn_with_latency_ms"][name]
    return (
        f"{name + ' micro-turn':20}{total:7.1f} ms at best: roofline {roofline:.1f}, of which "
        f"{report['weight_floor_ms'][name]:.1f} to read the weights in {report['turn_passes'][name]} passes; "
        f"latency of {report['turn_collectives'][name]} collectives {total - roofline:.1f}"
    )
