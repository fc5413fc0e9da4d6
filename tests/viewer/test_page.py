"""Pages: hostile text stays text, and no page can run a script."""

from __future__ import annotations

import html
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from retool.viewer.charts import bar_chart, line_chart
from retool.viewer.page import Page, TracePart, TraceView, render

HOSTILE = "</pre></script><img src=x onerror=alert(1)><script>alert(2)</script>{{ 7*7 }}"


class Tags(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_with(text: str) -> Page:
    view = TraceView(text, "right", (TracePart("policy", text), TracePart("code", text)), text)
    return Page(text, text, [(text, [text], [[text]])], [], [(text, [view])])


def test_hostile_text_is_inert() -> None:
    seen = Tags()
    seen.feed(render(page_with(HOSTILE)))
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "img", "iframe", "object"}
    assert not any(key.startswith("on") for _, attrs in seen.tags for key in attrs)
    assert seen.text.count("alert(1)") >= 5
    assert "49" not in seen.text
    policies = [a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and "default-src 'none'" in str(policies[0]) and "script" not in str(policies[0])


@given(st.text(max_size=60))
def test_any_text_adds_no_tag(text: str) -> None:
    plain, odd = Tags(), Tags()
    plain.feed(render(page_with("x")))
    odd.feed(render(page_with(text)))
    assert [t for t, _ in odd.tags] == [t for t, _ in plain.tags]
    assert html.escape(text, quote=False) in render(page_with(text)).replace("&#39;", "'").replace("&#34;", '"')


def test_charts_are_images_that_survive_gaps() -> None:
    for uri in (
        line_chart("a", {"x": [1.0, float("nan"), 2.0], "y": [float("inf")]}),
        bar_chart("b", ["f", "g"], {"s": [(0.5, 0.4, 0.6), (0.0, 0.0, 0.1)]}),
    ):
        assert uri.startswith("data:image/svg+xml;base64,")
