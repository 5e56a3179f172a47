"""The bundle's `report.html`: one page that needs nothing but itself.

Inline SVG and one stylesheet, no script, no request; the page's Content-Security-Policy allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from otau.toolchain.html.accuracy import (
    action_error_section,
    chunk_section,
    gates_section,
    kv_error_section,
    noise_floor_section,
)
from otau.toolchain.html.bars import headroom, headroom_text
from otau.toolchain.html.costs import graphs_section, pipeline_section
from otau.toolchain.html.elements import Child, Markup, table, tag
from otau.toolchain.html.numbers import bytes_text, count_text, duration, memory

__all__ = ["html_report"]


def _verdict(gates: Sequence[Mapping[str, Any]]) -> Markup:
    """What the gates say, in one line; a gate whose negative control passed has shown nothing."""
    failed = [gate["name"] for gate in gates if not gate.get("passed")]
    blind = [gate["name"] for gate in gates if gate.get("passed") and gate.get("control_failed") is False]
    said = []
    if not gates:
        said.append("No gate was run: nothing is known of this bundle's accuracy.")
    if failed:
        said.append(f"{len(failed)} of {len(gates)} gates failed: {', '.join(failed)}.")
    if blind:
        said.append(f"The negative control did not fail, so the gate shows nothing: {', '.join(blind)}.")
    if said:
        return tag("p", " ".join(said), class_="verdict failed")
    tightest = min(gates, key=headroom)
    room = f"tightest: {tightest['name']}, headroom {headroom_text(tightest)}"
    return tag("p", f"All {len(gates)} of {len(gates)} gates passed; {room}.", class_="verdict")


def _facts(report: Mapping[str, Any]) -> Markup:
    checkpoint = report.get("checkpoint") or {}
    stages = report.get("stages") or []
    peaks = [stage["peak_rss_mb"] for stage in stages if stage.get("peak_rss_mb") is not None]
    facts = {
        "policy": report.get("policy"),
        "target": report.get("target"),
        "precision": report.get("precision"),
        "denoise steps": report.get("num_steps"),
        "checkpoint": checkpoint.get("format"),
        "parameters": count_text(checkpoint.get("parameters")),
        "checkpoint size": bytes_text(checkpoint.get("bytes")),
        "compiled in": duration(sum(stage.get("seconds") or 0 for stage in stages)) if stages else None,
        "peak memory": memory(max(peaks, default=None)),
        "otau": report.get("otau"),
    }
    known = {name: str(value) for name, value in facts.items() if value not in (None, "")}
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in known.items()])


def _versions(report: Mapping[str, Any]) -> Child:
    versions = report.get("versions")
    return table("What compiled it", ["package", "version"], versions.items()) if versions else None


def _command(report: Mapping[str, Any]) -> Child:
    command = report.get("command")
    return tag("pre", tag("code", command)) if command else None


_SECTIONS = (
    ("gates", "Gates", gates_section),
    ("kv-error", "KV cache error", kv_error_section),
    ("action-error", "Action error", action_error_section),
    ("chunk", "One action chunk", chunk_section),
    ("noise-floor", "Noise floor", noise_floor_section),
    ("graphs", "Graphs", graphs_section),
    ("pipeline", "Pipeline", pipeline_section),
    ("versions", "Versions", _versions),
    ("command", "Command", _command),
)
"""What the page holds, in this order."""


def html_report(report: Mapping[str, Any]) -> str:
    """The page of a compilation, for `report.html`.

    Args:
        report: What `report.json` holds. A key that is missing, null or empty leaves its part out; an error
            that is null, NaN, infinite or at least 1e30 is shown as not finite.

    Returns:
        HTML to be written as UTF-8. Every text of the report is escaped; nothing is loaded, and nothing runs.

    Raises:
        ValueError: The two chunks differ in their shapes.
    """
    style = files("otau.toolchain.html").joinpath("style.css").read_text(encoding="utf-8")
    # The browser takes this stylesheet alone: the hash is of its exact text.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    known = [report[key] for key in ("policy", "target", "precision") if report.get(key)]
    title = "Compilation report" + (f": {', '.join(map(str, known))}" if known else "")
    parts = [(key, name, made) for key, name, section in _SECTIONS if (made := section(report)) is not None]
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Markup(style)),
        ),
        tag(
            "body",
            tag(
                "header",
                tag("h1", title),
                _verdict(report.get("gates") or []),
                _facts(report),
                tag("nav", [tag("a", name, href=f"#{key}") for key, name, _ in parts], aria_label="Contents"),
            ),
            tag("main", [tag("section", tag("h2", name), made, id=key) for key, name, made in parts]),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"
