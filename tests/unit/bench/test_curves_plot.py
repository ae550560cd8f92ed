from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.curves import points
from tests.bench.curves_plot import BOTTOM, FILES, TOP, draw, main, read

SVG = "{http://www.w3.org/2000/svg}"
MADE_UP = {
    ("live", "base"): {8: 5.0, 16: 10.0, 32: 18.0},
    ("live", "rank <8>"): {32: 20.0, 8: 6.0},
    ("registered", "same"): {8: 4.0, 64: 4.0, 512: 12.0},
    ("largest rank", "one row"): {8: 4.0, 16: 4.5, 128: 9.0},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    def line(utc: str, plot: str, series: str, x: int, ms: float) -> str:
        point, times = {"plot": plot, "series": series, "x": x}, {"median_ms": ms, "least_ms": ms / 2}
        return json.dumps({"utc": utc, "point": point, "times": times}) + "\n"

    file = tmp_path / "curves.jsonl"
    latest = [line("today", *key, x, ms) for key, series in MADE_UP.items() for x, ms in series.items()]
    file.write_text("".join([line("yesterday", "live", "base", 8, 99.0), *latest]))
    return file


def _panels(svg: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f"{SVG}g")


def _circles(panel: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in panel.findall(f"{SVG}circle")]


def _texts(panel: ElementTree.Element, anchor: str) -> dict[str, tuple[float, float]]:
    """Text → where it is; the anchor tells ticks of y (end), of x (middle) and the legend (start) apart."""
    return {
        str(one.text): (float(one.attrib["x"]), float(one.attrib["y"]))
        for one in panel.findall(f"{SVG}text")
        if one.attrib["text-anchor"] == anchor
    }


def test_the_latest_run_is_read_and_ascends(results: Path) -> None:
    assert read(results)["live"]["base"] == [(8, 5.0), (16, 10.0), (32, 18.0)]
    assert read(results)["live"]["rank <8>"] == [(8, 6.0), (32, 20.0)]


def test_points_are_where_the_axes_say(results: Path) -> None:
    (panel,) = _panels(draw(FILES["cost-live.svg"], read(results)))
    circles, of_x, of_y = _circles(panel), _texts(panel, "middle"), _texts(panel, "end")
    assert [x for x, _ in circles] == [of_x[tick][0] for tick in ("8", "16", "32", "8", "32")]
    assert of_x["16"][0] - of_x["8"][0] == pytest.approx(of_x["8"][0] - of_x["0"][0], abs=0.2)
    zero, ten, twenty = (of_y[ms][1] for ms in ("0", "10", "20"))
    assert zero - 4 == BOTTOM > ten > twenty >= TOP
    assert ten == pytest.approx((zero + twenty) / 2)
    assert circles[1][1] == pytest.approx(ten - 4), "10 ms; a label stands 4 below its line"
    assert circles[4][1] == pytest.approx(twenty - 4)
    assert circles[0][1] == pytest.approx((zero + ten) / 2 - 4)


def test_a_line_joins_the_markers_of_each_series_and_the_legend_names_it(results: Path) -> None:
    (panel,) = _panels(draw(FILES["cost-live.svg"], read(results)))
    lines, circles = panel.findall(f"{SVG}polyline"), panel.findall(f"{SVG}circle")
    joined = [tuple(map(float, at.split(","))) for line in lines for at in line.attrib["points"].split()]
    assert joined == _circles(panel)
    colours = [line.attrib["stroke"] for line in lines]
    assert len(set(colours)) == 2
    assert [one.attrib["fill"] for one in circles] == [colours[0]] * 3 + [colours[1]] * 2
    for name, colour in zip(("base", "rank <8>"), colours, strict=True):
        (key,) = (one for one in panel.findall(f"{SVG}path") if one.attrib.get("stroke") == colour)
        assert f" {_texts(panel, 'start')[name][1] - 4:g}h" in key.attrib["d"]


def test_equal_factors_are_equal_distances_and_panels_have_one_scale(results: Path) -> None:
    registered, rank = _panels(draw(FILES["cost-registered.svg"], read(results)))
    (x8, y8), (x64, _), (x512, _) = _circles(registered)
    assert x64 - x8 == pytest.approx(x512 - x64, abs=0.2)
    (at8, four), (at16, _), (at128, _) = _circles(rank)
    assert 3 * (at16 - at8) == pytest.approx(at128 - at16, abs=0.4)
    assert four == y8, "4 ms are as high in either"
    assert min(y for _, y in _circles(registered)) >= TOP


def test_the_files_are_written_on_white_and_always_the_same(results: Path, tmp_path: Path) -> None:
    main([str(results), str(tmp_path)])
    for name, panels in FILES.items():
        text = (tmp_path / name).read_text()
        assert text == draw(panels, read(results))
        root = ElementTree.fromstring(text)
        assert root[0].attrib == {"width": root.attrib["width"], "height": root.attrib["height"], "fill": "#ffffff"}


def test_the_panels_reach_as_far_as_the_points() -> None:
    for panels in FILES.values():
        for panel in panels:
            values = {point.x for point in points() if point.plot == panel.plot}
            assert max(values) == max(panel.ticks)
            assert set(panel.ticks) - {0} <= values
