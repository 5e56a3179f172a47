from __future__ import annotations

import base64
import copy
import hashlib
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otau.toolchain.html.elements import Markup, tag
from otau.toolchain.html_report import html_report

HOSTILE = "<script>alert(1)</script>\" ' & --> ]]> </style></title>"
METRIC = "max |error| / max(1, max |reference|)"
SECTIONS = {
    "gates": "gates",
    "kv-error": "kv_error",
    "action-error": "action_error",
    "chunk": "chunk",
    "noise-floor": "noise_floor",
    "graphs": "graphs",
    "pipeline": "stages",
    "versions": "versions",
    "command": "command",
}
"""Sections of the page by the key of the report that they show."""
VOID = {"meta"}
NEVER = {
    "script",
    "iframe",
    "object",
    "embed",
    "link",
    "img",
    "image",
    "base",
    "form",
    "foreignobject",
    "use",
}


class Page(HTMLParser):
    """A page, parsed: fails where a tag is not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        """Texts by the innermost element they are in."""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> set[str | None]:
        return {attributes["id"] for attributes in self.of("section")}

    @property
    def verdict(self) -> str:
        return next(text for text in self.text["p"] if "gate" in text)


def full_report(steps: int = 50, dims: int = 32, layers: int = 18) -> dict[str, Any]:
    chunk = [[math.sin(t / 9 + a) for a in range(dims)] for t in range(steps)]
    graph = {
        "file": "prefix.onnx",
        "nodes_exported": 900,
        "nodes_final": 700,
        "parameters": 2_900_000_000,
        "bytes": 11_300_000_000,
        "passes": [
            {
                "name": "FoldWeightTransposes",
                "nodes_before": 900,
                "nodes_after": 700,
                "bytes_before": 11_400_000_000,
                "bytes_after": 11_300_000_000,
                "error": 1e-8,
                "seconds": 0.3,
            }
        ],
    }
    return {
        "bundle": ".",
        "command": "otau compile checkpoint --target cpu --out bundle",
        "policy": "pi05",
        "target": "cpu",
        "precision": "fp32",
        "num_steps": 10,
        "otau": "0.1.0",
        "checkpoint": {"format": "DeepSpeed ZeRO-2", "parameters": 3_362_000_000, "bytes": 6_724_000_000},
        "stages": [
            {"name": "intake", "seconds": 1.2, "cached": True, "peak_rss_mb": 812.0, "disk_bytes": 0},
            {"name": "gate", "seconds": 70.0, "cached": False, "peak_rss_mb": 15000.0, "disk_bytes": 5},
        ],
        "graphs": {"prefix": graph, "ingest": graph | {"passes": []}},
        "gates": [
            {
                "name": name,
                "metric": METRIC,
                "value": v,
                "limit": 1e-5,
                "passed": True,
                "control_failed": True,
            }
            for name, v in (("prefix", 1e-6), ("decoder", 2.5e-7))
        ],
        "noise_floor": {
            "keys": [4e-3] * layers,
            "values": [5e-3] * layers,
            "actions": 0.004,
            "seed_spread": 0.8,
        },
        "kv_error": {"keys": [2e-7] * layers, "values": [3e-7] * layers, "limit": 1e-5},
        "action_error": {"steps_by_dims": [[1e-7] * dims for _ in range(steps)], "limit": 2e-6},
        "chunk": {"probe": "full", "reference": chunk, "compiled": copy.deepcopy(chunk)},
        "versions": {"otau": "0.1.0", "torch": "2.13.0"},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return full_report()


def hostile(value: Any) -> Any:
    """A report with every text replaced, and every name of a mapping that is data."""
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def test_a_full_report_has_every_section_and_the_figures(report: dict[str, Any]) -> None:
    page = Page(html_report(report))
    assert page.sections == set(SECTIONS)
    assert {link["href"] for link in page.of("a")} == {f"#{name}" for name in SECTIONS}
    assert page.verdict == "All 2 of 2 gates passed; tightest: prefix, headroom 10x."
    assert {"3.36 B", "6.72 GB", "1 min 11 s", "14.6 GiB", "10"} <= set(page.text["dd"])
    assert {"11.3 GB", "2.90 B", "812 MiB", "cached", "300 ms", "2.13.0"} <= set(page.text["td"])
    assert page.text["code"] == [report["command"]]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("how", ["missing", "null", "empty"])
def test_what_the_report_lacks_the_page_leaves_out(report: dict[str, Any], section: str, how: str) -> None:
    key = SECTIONS[section]
    if how == "missing":
        del report[key]
    else:
        report[key] = None if how == "null" else type(report[key])()
    page = Page(html_report(report))
    assert page.sections == set(SECTIONS) - {section}
    assert f"#{section}" not in {link["href"] for link in page.of("a")}


@pytest.mark.parametrize("key", sorted(full_report()))
def test_no_key_of_the_report_is_needed(key: str) -> None:
    Page(html_report({each: value for each, value in full_report().items() if each != key}))
    Page(html_report({key: full_report()[key]}))


def test_an_empty_report_says_that_nothing_is_known() -> None:
    page = Page(html_report({}))
    assert page.sections == set()
    assert page.verdict.startswith("No gate was run")


def test_parts_of_parts_may_be_missing(report: dict[str, Any]) -> None:
    for key in ("checkpoint", "noise_floor", "kv_error", "action_error", "chunk"):
        for part in report[key]:
            for lack in ({}, {part: None}):
                less = {each: value for each, value in report[key].items() if each != part} | lack
                Page(html_report(report | {key: less}))
    for key in ("stages", "gates"):
        for part in set(report[key][0]) - {"name"}:
            Page(
                html_report(
                    report | {key: [{k: v for k, v in each.items() if k != part} for each in report[key]]}
                )
            )
            Page(html_report(report | {key: [each | {part: None} for each in report[key]]}))
    for part in report["graphs"]["prefix"]:
        Page(html_report(report | {"graphs": {"prefix": report["graphs"]["prefix"] | {part: None}}}))


class TestHostileText:
    def test_every_text_is_only_text(self, report: dict[str, Any]) -> None:
        before, after = Page(html_report(report)), Page(html_report(hostile(report)))
        assert [name for name, _ in before.elements] == [name for name, _ in after.elements]
        assert after.text["code"] == [HOSTILE]
        assert f"Compilation report: {HOSTILE}, {HOSTILE}, {HOSTILE}" in after.text["title"]

    def test_names_that_are_keys_too(self, report: dict[str, Any]) -> None:
        report["graphs"] = {HOSTILE: report["graphs"]["prefix"]}
        report["versions"] = {HOSTILE: "1"}
        page = Page(html_report(report))
        assert page.text["th"].count(HOSTILE) == 2
        assert not NEVER & {name for name, _ in page.elements}

    def test_no_attribute_can_be_added(self) -> None:
        (_, attributes) = Page(tag("p", "", title='" onclick="alert(1)')).elements[0]
        assert attributes == {"title": '" onclick="alert(1)'}

    def test_markup_stays_and_text_that_looks_like_it_does_not(self) -> None:
        assert tag("p", tag("b", "1 < 2"), "<b>") == "<p><b>1 &lt; 2</b>&lt;b&gt;</p>"
        assert not isinstance(tag("b", "x").upper(), Markup)

    @pytest.mark.parametrize("character", ["\x00", "\x1b", "\u202e", "\u200b", "\udce9", "\x85"])
    def test_what_cannot_be_seen_is_made_visible(self, report: dict[str, Any], character: str) -> None:
        text = html_report(report | {"command": f"a{character}b"})
        assert character not in text
        text.encode("utf-8")
        assert re.search(r"<code>a\\(x|u)[0-9a-f]+b</code>", text)

    @given(st.text())
    def test_any_text_comes_back_or_is_escaped(self, text: str) -> None:
        page = Page(tag("p", text))
        assert [name for name, _ in page.elements] == ["p"]
        printable = "".join(c for c in text if c.isprintable())
        if printable == text and text:
            assert "".join(page.text["p"]) == text


class TestSelfContained:
    @pytest.fixture
    def page(self) -> Page:
        return Page(html_report(full_report()))

    def test_nothing_is_loaded_and_nothing_runs(self, page: Page) -> None:
        assert not NEVER & {name for name, _ in page.elements}
        for name, attributes in page.elements:
            for key, value in attributes.items():
                assert not key.startswith("on"), name
                assert key not in {"src", "srcset", "style", "action", "data", "xmlns", "xlink:href"}, name
                assert key != "href" or (value or "").startswith("#"), name
        text = html_report(full_report())
        assert not re.search(r"https?:|//|url\(|@import|javascript:", text)

    def test_the_policy_allows_the_stylesheet_alone(self, page: Page) -> None:
        (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv")]
        (style,) = page.text["style"]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert policy == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )

    def test_every_class_is_in_the_stylesheet(self, page: Page) -> None:
        used = {name for _, attributes in page.elements for name in (attributes.get("class") or "").split()}
        styled = set(re.findall(r"\.([a-z][a-z0-9-]*)", page.text["style"][0]))
        assert used <= styled

    def test_pictures_have_titles_and_heads_of_tables_have_scopes(self, page: Page) -> None:
        pictures = page.of("svg")
        assert len(pictures) > 30
        assert all(picture["role"] == "img" for picture in pictures)
        after = [
            following
            for (name, _), (following, _) in zip(page.elements, page.elements[1:], strict=False)
            if name == "svg"
        ]
        assert set(after) == {"title"}
        assert {head["scope"] for head in page.of("th")} == {"col", "row"}

    def test_light_dark_and_print(self, page: Page) -> None:
        style = page.text["style"][0]
        assert "prefers-color-scheme: dark" in style
        assert "@media print" in style

    def test_sizes(self) -> None:
        assert len(html_report(full_report()).encode()) < 250_000
        assert len(html_report(full_report(1000, 64, 100)).encode()) < 1_000_000


class TestVerdict:
    def test_failed_gates_are_named(self, report: dict[str, Any]) -> None:
        report["gates"][1] |= {"value": 1e30, "passed": False}
        page = Page(html_report(report))
        assert page.verdict == "1 of 2 gates failed: decoder."
        assert {"class": "verdict failed"} in page.of("p")
        assert {"FAILED", "not finite", "none"} <= set(page.text["td"])

    def test_a_control_that_passed_is_a_failure(self, report: dict[str, Any]) -> None:
        report["gates"][0]["control_failed"] = False
        page = Page(html_report(report))
        assert "negative control did not fail" in page.verdict
        assert {"class": "verdict failed"} in page.of("p")
        assert "NO" in page.text["td"]

    def test_a_gate_that_does_not_say_it_passed_failed(self, report: dict[str, Any]) -> None:
        report["gates"][0]["passed"] = None
        assert Page(html_report(report)).verdict == "1 of 2 gates failed: prefix."


@pytest.mark.parametrize("steps", [[], [[]], [[], []], None])
def test_no_cell_no_map(steps: list[list[float]] | None) -> None:
    assert Page(html_report({"action_error": {"steps_by_dims": steps, "limit": 1e-6}})).sections == set()


def test_the_caption_of_the_map_names_the_largest(report: dict[str, Any]) -> None:
    report["action_error"]["steps_by_dims"][7][3] = 1.9e-6
    report["action_error"]["steps_by_dims"][8][4] = 1e30
    captions = Page(html_report(report)).text["figcaption"]
    (caption,) = [text for text in captions if "actions' scale" in text]
    assert "largest is 1.9e-6, at step 7 of dimension 3" in caption
    assert "1 of 1,600 are not finite" in caption


def test_the_noise_floor_of_layers_is_drawn_where_known(report: dict[str, Any]) -> None:
    def names() -> set[str]:
        return {text for text in Page(html_report(report)).text["text"] if text.endswith((" K", " V"))}

    assert names() == {"compiled K", "compiled V", "bf16 K", "bf16 V"}
    report["noise_floor"] = None
    assert names() == {"compiled K", "compiled V"}


def test_captions_explain_only_what_is_there(report: dict[str, Any]) -> None:
    said = ("exactly 0", "not finite", "A column is the largest of ")
    captions = " ".join(Page(html_report(report)).text["figcaption"])
    assert [each for each in said if each in captions] == []
    report["kv_error"] |= {"keys": [0.0, 1e30]}
    report["action_error"]["steps_by_dims"] = [[1e-7]] * 1000
    captions = " ".join(Page(html_report(report)).text["figcaption"])
    assert [each for each in said if each in captions] == list(said)


@pytest.mark.parametrize("value", [0.0, None, math.nan, math.inf, 1e30, 5e-324])
def test_any_error_can_be_drawn(report: dict[str, Any], value: float | None) -> None:
    def each(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: each(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [each(inner) for inner in part]
        return value if isinstance(part, float) else part

    errors = ("gates", "noise_floor", "kv_error", "action_error", "chunk")
    page = Page(html_report(report | {key: each(report[key]) for key in errors}))
    assert page.sections == set(SECTIONS)
    for _, attributes in page.elements:
        assert not re.search(
            r"nan|inf", " ".join(attributes.get(key) or "" for key in ("d", "x", "y", "cx", "cy"))
        )
