"""What the page says of cost: the size of the graphs, the time, memory and disk of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from otau.toolchain.html.bars import change_bars, span_bar
from otau.toolchain.html.elements import Child, number_cell, number_head, table, tag
from otau.toolchain.html.numbers import bytes_text, count_text, duration, error_text, memory

__all__ = ["graphs_section", "pipeline_section"]


def _passes(name: str, graph: Mapping[str, Any]) -> Child:
    passes = graph.get("passes")
    if not passes:
        return None
    most = max(each.get(key) or 0 for each in passes for key in ("nodes_before", "nodes_after"))

    def row(each: Mapping[str, Any]) -> list[Child]:
        before, after = each.get("nodes_before") or 0, each.get("nodes_after") or 0
        error = each.get("error")
        return [
            each["name"],
            number_cell(f"{before:,}"),
            number_cell(f"{after:,}"),
            tag("td", change_bars(f"{before:,} nodes before, {after:,} after", before, after, most)),
            number_cell(bytes_text(each.get("bytes_before"))),
            number_cell(bytes_text(each.get("bytes_after"))),
            number_cell("" if error is None else error_text(error)),
            number_cell(duration(each.get("seconds"))),
        ]

    columns = ["pass", *map(number_head, ("nodes before", "after")), f"0 to {most:,} nodes"]
    columns += map(number_head, ("size before", "after", "error", "time"))
    return table(
        f"{name}: nodes and size before (pale) and after (dark) each pass", columns, map(row, passes)
    )


def graphs_section(report: Mapping[str, Any]) -> Child:
    """The size of each graph, and what each pass did to it; None if there is no graph."""
    graphs = report.get("graphs")
    if not graphs:
        return None
    most = max(graph.get(key) or 0 for graph in graphs.values() for key in ("nodes_exported", "nodes_final"))

    def row(name: str, graph: Mapping[str, Any]) -> list[Child]:
        before, after = graph.get("nodes_exported") or 0, graph.get("nodes_final") or 0
        return [
            name,
            tag("td", graph.get("file"), class_="long"),
            number_cell(count_text(graph.get("parameters"))),
            number_cell(bytes_text(graph.get("bytes"))),
            number_cell(f"{before:,}"),
            number_cell(f"{after:,}"),
            tag("td", change_bars(f"{before:,} nodes exported, {after:,} final", before, after, most)),
        ]

    columns = ["graph", "file", *map(number_head, ("parameters", "size", "nodes exported", "final"))]
    columns.append(f"0 to {most:,} nodes")
    summary = table(
        "Graphs as exported and as they are in the bundle", columns, (row(*g) for g in graphs.items())
    )
    return [summary, [_passes(name, graph) for name, graph in graphs.items()]]


def pipeline_section(report: Mapping[str, Any]) -> Child:
    """Time, memory and disk of each stage; None if no stage has run."""
    stages = report.get("stages")
    if not stages:
        return None
    whole = sum(stage.get("seconds") or 0 for stage in stages)
    peaks = [stage.get("peak_rss_mb") or 0 for stage in stages]
    disk = [stage["disk_bytes"] for stage in stages if stage.get("disk_bytes") is not None]
    rows, start = [], 0.0
    for stage, peak in zip(stages, peaks, strict=True):
        end = start + (stage.get("seconds") or 0)
        cached = bool(stage.get("cached"))
        title = f"from {duration(start)} to {duration(end)}" + (", cached" if cached else "")
        rows.append(
            [
                stage["name"],
                "cached" if cached else "run",
                number_cell(duration(stage.get("seconds"))),
                tag("td", span_bar(title, start, end, whole, "cached" if cached else "bar")),
                number_cell(memory(stage.get("peak_rss_mb"))),
                tag("td", span_bar(memory(peak), 0, peak, max(peaks))),
                number_cell(bytes_text(stage.get("disk_bytes"))),
            ]
        )
        start = end
    columns = ["stage", "result", number_head("time"), f"0 to {duration(whole)}", number_head("peak memory")]
    columns += [f"0 to {memory(max(peaks))}", number_head("disk")]
    foot = ["all", "", number_cell(duration(whole)), "", number_cell(memory(max(peaks))), ""]
    foot.append(number_cell(bytes_text(sum(disk)) if disk else ""))
    return table("Stages in their order; memory is the process's largest resident set", columns, rows, foot)
