"""Pages: self-contained, escaped, drawn where the numbers say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.drive_bag import small_drive

from spanvla_ros.report import charts, page, pictures
from spanvla_ros.report.drive_page import write_page
from spanvla_ros.report.drive_summary import summarise


class Balance(HTMLParser):
    """Fails on a closing tag that does not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ('meta', 'input', 'br', 'img'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text: str) -> None:
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(link.startswith(('data:', '#')) for link in links)
    assert '@import' not in text
    assert 'url(' not in text


def test_a_page_is_written_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / 'deep' / 'index.html'
    page.write_page(path, 'first', ['<p>one</p>'])
    page.write_page(path, 'A & B', [page.section('two', page.table(['a'], [[1.5]]))])
    text = path.read_text()
    assert '<title>A &amp; B</title>' in text
    assert '<p>one</p>' not in text
    assert [entry.name for entry in path.parent.iterdir()] == ['index.html']
    check_page(text)


@given(st.text(max_size=40))
def test_text_cannot_break_out(text):
    made = page.headline(text, text, [page.Fact(text, text, text)])
    made += charts.timeline([charts.Entry(1.0, text, text)]) + page.table([text], [[text]])
    check_page(page.render_page(text, [made]))


@pytest.mark.parametrize(
    ('value', 'shown'),
    [
        (0.0, '0'),
        (0.01234, '0.0123'),
        (1.2345, '1.23'),
        (-2.5, '-2.50'),
        (12.345, '12.3'),
        (1234.5, '1234'),
        (7, '7'),
        (True, 'yes'),
        (None, '-'),
        (float('nan'), '-'),
    ],
)
def test_numbers_have_the_digits_a_reader_wants(value, shown):
    assert page.number(value) == shown


def test_an_interval_is_drawn_to_scale():
    made = page.interval_table('m', [page.Interval('a', 2.0, 1.0, 4.0)])
    assert 'left:25.00%;width:75.00%' in made
    assert 'class="dot" style="left:50.00%' in made


def test_a_chart_interrupts_its_line_where_a_value_is_missing():
    values = np.array([1.0, 2.0, np.nan, 3.0, 4.0])
    made = charts.time_chart('t', [charts.Series('s', np.arange(5.0), values)], 'm')
    path = re.search(r'<path d="([^"]*)"', made).group(1)
    assert path.count('M') == 2
    assert path.count('L') == 2


def test_a_long_line_is_thinned_but_keeps_its_peak():
    values = np.ones(5000)
    values[1234] = 99.0
    made = charts.time_chart('t', [charts.Series('s', np.arange(5000.0), values)], 'm')
    assert '99.0' in made
    assert made.count('L') < charts.MAX_POINTS + 10


def test_the_view_from_above_has_y_up_and_its_centre_in_the_middle():
    shape = charts.Shape(np.array([[10.0, 5.0], [11.0, 5.0]]), 'ego')
    made = charts.bird_view([shape], center=(10.0, 5.0), radius_m=10.0, height=200)
    scale = re.search(r'scale\(([-\d.]+) ([-\d.]+)\)', made)
    assert float(scale[1]) == pytest.approx(10.0)
    assert float(scale[2]) == pytest.approx(-10.0)
    assert 'translate(-10.000 -5.000)' in made


@given(st.floats(-1e3, 1e3), st.floats(0.01, 1e4))
def test_ticks_cover_their_range_with_few_round_steps(low, span):
    ticks = charts.nice_ticks(low, low + span)
    assert ticks[0] <= low + 1e-6 * span
    assert ticks[-1] >= low + span - 1e-6 * span
    assert 2 <= len(ticks) <= 9


def test_a_ground_point_is_drawn_where_the_pinhole_formula_puts_it():
    view = pictures.CameraView('front', 224, 112, 60.0, x_m=1.5, z_m=1.5)
    focal = 112.0 / np.tan(np.radians(30.0))
    pixels = pictures.project_ground(view, np.array([[11.5, 2.0], [21.5, -3.0]]))
    assert pixels[0] == pytest.approx([112.0 - focal * 2.0 / 10.0, 56.0 + focal * 1.5 / 10.0])
    assert pixels[1] == pytest.approx([112.0 + focal * 3.0 / 20.0, 56.0 + focal * 1.5 / 20.0])


def test_a_camera_turned_left_sees_what_lies_left_in_its_middle():
    view = pictures.CameraView('left', 224, 112, 60.0, z_m=1.5, yaw_deg=55.0)
    ray = np.array([np.cos(np.radians(55.0)), np.sin(np.radians(55.0))])
    pixels = pictures.project_ground(view, np.array([10.0 * ray, 20.0 * ray]))
    assert pixels[:, 0] == pytest.approx([112.0, 112.0])
    assert (pixels[:, 1] > 56.0).all()


def test_a_line_that_starts_behind_the_camera_is_cut_in_front_of_it():
    view = pictures.CameraView('front', 224, 112, 60.0, x_m=1.5, z_m=1.5)
    pixels = pictures.project_ground(view, np.array([[0.0, 0.0], [3.0, 0.0], [9.0, 0.0]]))
    assert len(pixels) == 3
    depth_m = pictures.NEAR_M
    assert pixels[0, 1] == pytest.approx(56.0 + view.focal_px * 1.5 / depth_m)
    behind = pictures.project_ground(view, np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert len(behind) == 0


def test_the_page_of_a_drive_shows_pictures_plan_and_words(tmp_path):
    bag = small_drive().write(tmp_path / 'bag')
    view = pictures.CameraView('front', 32, 16, 60.0, x_m=1.5, z_m=1.5)
    path = write_page(bag, summarise(bag), tmp_path / 'index.html', [view])
    text = path.read_text()
    check_page(text)
    # All 40 plans have their picture, each with the plan over it (a light and a coloured line).
    assert text.count('data:image/jpeg') == 40
    assert text.count('stroke-opacity=".55"') == 40
    assert 'lead vehicle 15 m braking' in text
    assert 'FALLBACK' in text
    assert 'lane keeping, seed 3' in text
