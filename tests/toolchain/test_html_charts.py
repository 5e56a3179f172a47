from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otau.toolchain.html.bars import HeadroomBars, headroom, headroom_text
from otau.toolchain.html.heat_map import NOT_FINITE, OVER, ZERO, heat_map, level, level_edges
from otau.toolchain.html.layer_plot import Series, plot_layers
from otau.toolchain.html.multiples import chunk_multiples, largest_difference, shown_steps


def shapes(picture: str, name: str, kind: str = "") -> list[dict[str, str]]:
    """The attributes of a picture's elements of a name whose class holds a word."""
    found = ElementTree.fromstring(picture).iter(name)
    return [each.attrib for each in found if kind in each.get("class", "").split() or not kind]


def texts(picture: str, name: str) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.fromstring(picture).iter(name)]


class TestHeatMap:
    @given(st.floats(1e-20, 1e20), st.floats(0, 1e25), st.floats(0, 1e25))
    def test_larger_errors_have_higher_levels(self, limit: float, a: float, b: float) -> None:
        edges = level_edges(limit)
        low, high = sorted((a, b))
        assert level(low, edges) <= level(high, edges) < NOT_FINITE
        assert (level(high, edges) >= OVER) == (high > limit)

    @pytest.mark.parametrize("value", [None, math.nan, math.inf, 1e30])
    def test_what_is_not_finite_is_above_all(self, value: float | None) -> None:
        assert level(value, level_edges(1e-6)) == NOT_FINITE

    def test_every_level_can_be_had(self) -> None:
        values = [0, 1e-9, 2e-3, 5e-3, 2e-2, 5e-2, 0.2, 1, 2, 20, 200, math.inf]
        assert [level(value, level_edges(1.0)) for value in values] == list(range(ZERO, NOT_FINITE + 1))

    def test_columns_of_many_steps_show_the_largest(self) -> None:
        errors = [[0.0, 0.0] for _ in range(1000)]
        errors[777][1] = 1.0
        picture, steps = heat_map("errors", errors, 1e-3)
        assert steps == 4
        (worst,) = shapes(picture, "path", "heat-10")
        assert worst["d"] == f"M{777 // 4} 1h1v1h-1z"

    def test_each_cell_is_drawn_once(self) -> None:
        picture, steps = heat_map("errors", [[10.0 ** -(t + a) for a in range(7)] for t in range(10)], 1e-4)
        cells = re.findall(r"M(\d+) (\d+)h1", "".join(path["d"] for path in shapes(picture, "path")))
        assert steps == 1
        assert sorted(cells) == sorted((str(t), str(a)) for t in range(10) for a in range(7))

    @pytest.mark.parametrize("limit", [None, 0.0, math.nan, 1e-6])
    @pytest.mark.parametrize(("value", "kind"), [(0.0, "heat-0"), (None, "heat-11"), (1e-9, None)])
    def test_errors_that_are_all_alike(
        self, value: float | None, kind: str | None, limit: float | None
    ) -> None:
        picture, _ = heat_map("errors", [[value] * 3] * 5, limit)
        (cells,) = shapes(picture, "path")
        assert kind is None or cells["class"] == kind

    def test_the_limit_is_marked_where_there_is_one(self) -> None:
        assert "limit" in texts(heat_map("errors", [[1e-9]], 1e-6)[0], "text")
        assert "limit" not in texts(heat_map("errors", [[1e-9]], None)[0], "text")


class TestLayerPlot:
    def markers(self, values: list[float | None]) -> list[tuple[str, float]]:
        """Kind and height of the markers of the layers, without the legend's."""
        picture = plot_layers("plot", [Series("compiled K", "line-k", values)], 1e-5)
        circles = [(each["class"].split()[1], float(each["cy"])) for each in shapes(picture, "circle")]
        return [*circles[:-1], *(("cross", 0.0) for _ in shapes(picture, "path", "cross"))]

    def test_markers_rise_with_the_error(self) -> None:
        heights = [height for _, height in self.markers([1e-9, 1e-8, 3e-7, 1e-5, 1e-2])]
        assert heights == sorted(heights, reverse=True)
        assert len(set(heights)) == 5

    def test_zero_is_open_and_below_and_not_finite_is_a_cross(self) -> None:
        markers = self.markers([0.0, 1e-7, None, math.nan, 1e30])
        assert [kind for kind, _ in markers] == ["open", "dot", "cross", "cross", "cross"]
        assert markers[0][1] > markers[1][1]

    def test_a_line_breaks_where_nothing_can_be_drawn(self) -> None:
        picture = plot_layers("plot", [Series("K", "line-k", [1e-7, 1e-7, None, 1e-7, 1e-7])], None)
        line, _ = shapes(picture, "path", "curve")
        assert re.sub(r"[^ML]", "", line["d"]) == "MLML"

    def test_the_limit_is_between_what_is_below_and_above_it(self) -> None:
        picture = plot_layers("plot", [Series("K", "line-k", [1e-6, 1e-4])], 1e-5)
        (limit,) = shapes(picture, "line", "limit")
        below, above, _ = (float(circle["cy"]) for circle in shapes(picture, "circle"))
        assert below > float(limit["y1"]) > above

    @pytest.mark.parametrize("layers", [1, 2, 100])
    def test_any_number_of_layers(self, layers: int) -> None:
        assert len(self.markers([1e-7] * layers)) == layers


class TestChunk:
    def chunks(self) -> tuple[list[list[float | None]], list[list[float | None]]]:
        """Two equal chunks (50, 8)."""
        rows = [[math.sin(t / 9 + a) for a in range(8)] for t in range(50)]
        return rows, [list(row) for row in rows]

    def test_the_largest_difference_is_printed(self) -> None:
        reference, compiled = self.chunks()
        compiled[12][3] += 0.25
        compiled[13][4] = None
        said = texts(chunk_multiples(reference, compiled), "figcaption")
        same = [f"dimension {dim}max |Δ| 0 at step 0" for dim in (0, 1, 2, 5, 6, 7)]
        lost = "dimension 4max |Δ| not finite at step 13"
        assert sorted(said) == sorted([*same, "dimension 3max |Δ| 0.25 at step 12", lost])

    def test_a_difference_moves_the_line(self) -> None:
        def moved() -> list[int]:
            picture = chunk_multiples(reference, compiled)
            pairs = zip(
                shapes(picture, "path", "reference"), shapes(picture, "path", "compiled"), strict=True
            )
            return [dim for dim, (a, b) in enumerate(pairs) if a["d"] != b["d"]]

        reference, compiled = self.chunks()
        assert moved() == []
        compiled[12][3] += 0.25
        assert moved() == [3]

    @given(st.integers(1, 1500), st.integers(0, 10**6))
    def test_thinned_lines_keep_ends_extremes_and_the_largest_difference(self, steps: int, seed: int) -> None:
        place = seed % steps
        reference = [math.sin(step * 0.7 + seed) for step in range(steps)]
        compiled = list(reference)
        compiled[place] += 1e-3
        shown = shown_steps(reference, compiled)
        assert shown == sorted(set(shown))
        assert len(shown) <= 302
        extremes = {pick(range(steps), key=reference.__getitem__) for pick in (min, max)}
        assert {0, steps - 1, place} | extremes <= set(shown)
        assert largest_difference(reference, compiled)[1] == place

    def test_thinned_lines_keep_the_extremes_of_the_compiled_line(self) -> None:
        reference = [math.sin(step * 0.7) for step in range(1500)]
        compiled = list(reference)
        # In one group: the largest difference, and a smaller one to the other side.
        compiled[310], compiled[315] = 9.0, -5.0
        assert {310, 315} <= set(shown_steps(reference, compiled))

    @pytest.mark.parametrize("compiled", [[[0.0, 1.0]], [[0.0], [1.0]]])
    def test_chunks_of_two_shapes_are_refused(self, compiled: list[list[float]]) -> None:
        with pytest.raises(ValueError, match="zip"):
            chunk_multiples([[0.0, 1.0], [0.0, 1.0]], compiled)

    def test_constant_and_lost_lines(self) -> None:
        rows = [[0.0, None, 1e30]] * 4
        picture = chunk_multiples(rows, rows)
        assert [bool(path["d"]) for path in shapes(picture, "path", "compiled")] == [True, False, False]

    def test_a_value_between_two_that_are_lost_is_drawn(self) -> None:
        rows = [[None], [0.5], [None]]
        (line,) = shapes(chunk_multiples(rows, rows), "path", "compiled")
        assert re.fullmatch(r"M[\d.]+ [\d.]+h0", line["d"])


class TestHeadroom:
    @pytest.mark.parametrize(
        ("value", "limit", "room", "text"),
        [
            (1e-6, 1e-5, 10, "10x"),
            (1e-5, 1e-5, 1, "1x"),
            (2e-5, 1e-5, 0.5, "0.5x"),
            (0.0, 1e-5, 1e6, "exact"),
            (0.0, 0.0, 1e6, "exact"),
            (1e-30, 1e-5, 1e6, "1e6x"),
            (1e30, 1e-5, 0, "none"),
            (math.nan, 1e-5, 0, "none"),
            (None, 1e-5, 0, "none"),
            (1e-5, None, 0, "none"),
            (1e-5, 0.0, 0, "none"),
        ],
    )
    def test_values(self, value: float | None, limit: float | None, room: float, text: str) -> None:
        gate = {"value": value, "limit": limit}
        assert headroom(gate) == pytest.approx(room)
        assert headroom_text(gate) == text

    def test_bars_grow_with_the_headroom_and_turn_at_the_limit(self) -> None:
        values = [1e-8, 1e-7, 1e-6, 0.99e-5, 3e-5, 1e-3, 1e30]
        gates = [{"value": value, "limit": 1e-5, "passed": value < 1e-5} for value in values]
        bars = HeadroomBars(gates)
        rects = [shapes(bars.bar(gate), "rect")[0] for gate in gates]
        assert [shape["class"] for shape in rects] == ["bar"] * 4 + ["bad"] * 3
        widths = [float(shape["width"]) for shape in rects]
        assert widths[:4] == sorted(widths[:4], reverse=True)
        assert widths[4:] == sorted(widths[4:])
        limit = float(shapes(bars.bar(gates[0]), "line")[0]["x1"])
        assert all(float(shape["x"]) == limit for shape in rects[:4])
        assert all(float(shape["x"]) < limit for shape in rects[4:])

    def test_what_is_exact_does_not_stretch_the_axis(self) -> None:
        gates = [{"value": value, "limit": 1e-5, "passed": True} for value in (1e-6, 0.0)]
        assert texts(HeadroomBars(gates).axis(), "text") == ["1x", "10x"]
