import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest

from analysis.gallery import draw_figures
from analysis.glance import glance
from analysis.report import SECTIONS, ReportInput, summarise, write_report
from analysis.report_tables import number, to_grid
from tests import synthetic_study as study
from tests.test_summary import sentences

SCRIPT = "<script>document.title='owned'</script>"
IMAGE = '"><img src=x onerror="document.title=\'owned\'">'
ENTITY = "&lt;script&gt; </pre></div></details> {{ 7 * 7 }} \u202e \x00"
LAYER = {"layer": 3, "condition": "none"}


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.title = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)
        if self.tags and self.tags[-1][0] == "title" and not self.title:
            self.title = data.strip()

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def report_input(**changes):
    values = {
        "title": "A study", "description": "What moves?\n\nAnd why?", "summary": ["em: it moved."],
        "resolved_yaml": "seeds: [0]", "figures": [], "tables": {}, "provenance": [("torch", "2.13")],
        "steps": pd.DataFrame({"step": ["train"], "key": ["abc"], "seconds": [1.25], "finished": ["now"]}),
        "warnings": [], "citation": "cite me", "fast": False, "samples": study.samples(["base", "em"]),
    }  # fmt: skip
    return ReportInput(**(values | changes))


def written(folder, **changes):
    write_report(folder / "report.html", report_input(**changes))
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small_tables():
    return {
        "shifts": study.shifts(arms=["base", "em", "benign"], layers=6, directions=["evil:text", "identity:presence:none"]),
        "self_recognition": study.self_recognition(), "my_own_table": pd.DataFrame({"x": [1.23456], "y": ["z"]}),
    }  # fmt: skip


def test_every_figure_and_table_is_there(tmp_path, small_tables):
    figures = draw_figures(small_tables, tmp_path / "figures", **LAYER)
    page = Page(written(tmp_path, figures=figures, tables=small_tables, layer=3))
    images = page.all("img")
    assert sorted(i["alt"] for i in images) == sorted(f.title for f in figures)
    assert all(i["src"].startswith("data:image/svg+xml;base64,") for i in images)
    for figure in figures:
        assert figure.caption in page.text
    links = {a["href"] for a in page.all("a") if not a["href"].startswith("#")}
    assert links == {f"figures/{f.name}.{end}" for f in figures for end in ("svg", "png", "csv")}
    assert all((tmp_path / link).is_file() for link in links)
    for name in small_tables:
        assert f"table-{name}" in [attrs.get("id") for _, attrs in page.tags]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")}
    assert targets <= set(ids)
    assert "1.23" in page.text


def test_a_wide_figure_is_not_shrunk_until_nobody_can_read_it(tmp_path, small_tables):
    """Below seven tenths of its own size the reader scrolls, in the figure's own box."""
    figures = draw_figures({"shifts": small_tables["shifts"]}, tmp_path / "figures", **LAYER)
    text = written(tmp_path, figures=figures, tables=small_tables, layer=3)
    for figure in figures:
        inches = float(re.search(r'width="([0-9.]+)pt"', figure.svg.read_text())[1]) / 72
        (image,) = (i for i in Page(text).all("img") if i["alt"] == figure.title)
        assert image["style"] == f"min-width: {round(0.7 * 96 * inches)}px"
    assert re.search(r"figure .card {[^}]*overflow-x: auto", text)


def test_a_long_finding_is_a_list_of_its_sentences(tmp_path):
    told = [
        f"em: larger than along random directions: {'; '.join(['evil:text +0.50 [+0.40, +0.60] SD'] * 5)}. No effect found along b.",
        "x: y.",
    ]
    text = written(tmp_path, summary=told)
    assert "<li>No effect found along b.</li>" in text
    assert "<b>x</b>: y.</li>" in text
    said, there = ("".join(t.split()).lower() for t in (told[0], Page(text).text))
    assert said in there  # nothing is lost


def test_every_sentence_of_the_summary_begins_with_a_capital_letter(tmp_path):
    """Names of arms and directions are written as they are: none stands at the beginning."""
    told = sentences(base="base", **study.all_tables()) + sentences(
        shifts=study.shifts(seeds=(0, 1, 2)), self_recognition=study.self_recognition(arms=study.ARMS[1:])
    )
    text = written(tmp_path, summary=told)
    summary = text[text.index("What was found") : text.index('id="how-to-read"')]
    starts = re.findall(r"<li>(?:<b>)?\s*(\S+)", summary)
    assert len(starts) > 40
    assert not [word for word in starts if not (word[0].isupper() or word[0].isdigit())]
    named = {*study.ARMS, *study.DIRECTIONS, *(name.capitalize() for name in study.DIRECTIONS)} - {"base"}
    assert not named & {word.rstrip(":.,") for word in starts}


def test_a_caption_that_repeats_the_one_before_is_folded(tmp_path):
    tables = {
        "shifts": study.shifts(
            arms=["base", "em", "benign"], layers=6, directions=["evil:text", "evil:prompts"]
        )
    }
    figures = draw_figures(tables, tmp_path / "figures", **LAYER)
    text = written(tmp_path, figures=figures, tables=tables, layer=3)
    captions = {f.name: f.caption for f in figures}
    first, second = (text.index(f'id="figure-shift_by_layer_evil-{way}"') for way in ("text", "prompts"))
    assert "as above" not in text[first:second]
    rest = html.unescape(text[second : text.index("</figure>", second)])
    said, _, folded = rest.partition("how to read it: as above")
    assert "Numbers: shift_by_layer_evil-prompts.csv" in said
    assert "n = 48 questions" in said
    assert "positive = more of what" not in said
    assert captions["shift_by_layer_evil-prompts"] in folded


def test_self_contained_and_without_script(tmp_path):
    text = written(tmp_path)
    page = Page(text)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not page.all("script")
    assert not page.all("link")
    assert "http" not in re.sub(r"http-equiv", "", text)


def test_nothing_measured_is_said_and_does_not_crash(tmp_path):
    empty = {"shifts": study.shifts(layers=2).iloc[:0], "steering": pd.DataFrame()}
    page = Page(
        written(
            tmp_path,
            tables=empty,
            samples=pd.DataFrame(),
            steps=pd.DataFrame(),
            summary=[],
            description="",
            provenance=[],
        )
    )
    absent = page.text.partition("This study did not ask for what follows")[2]
    assert all(section.title in absent for section in SECTIONS)
    assert (
        len(page.all("h2")) == 6
    )  # summary, how to read, not measured, samples, provenance, citation: none for each
    assert "Where the change is carried: patching" in absent
    assert "No replies were sampled" in page.text
    assert "Nothing was measured." in page.text


def test_the_tables_at_a_glance_stand_above_the_folded_sentences(tmp_path):
    tables = study.all_tables()
    text = written(
        tmp_path,
        glance=glance(tables, **LAYER),
        folded=["em: it moved."],
        summary=["Steering: it did nothing."],
    )
    first, second = glance(tables, **LAYER)
    places = [
        text.index(s)
        for s in (first.title, second.title, "em</b>: it moved.", "Steering</b>: it did nothing.")
    ]
    assert places == sorted(places)
    folded = text[text.index('<details id="in-sentences">') :]
    assert folded.index("em</b>: it moved.") < folded.index("</details>") < folded.index("Steering</b>")
    starred = [c for _, cells in first.rows for c in cells if c.stars]
    assert starred
    for cell in starred:
        assert f'<b>{cell.value}{cell.stars}</b> <span class="soft">{cell.interval}</span>' in text


def test_banner_and_warnings(tmp_path):
    plain = Page(written(tmp_path))
    assert "Rehearsal" not in plain.text
    assert "warning" not in plain.text
    loud = Page(written(tmp_path, fast=True, warnings=["the mask was empty", "second"]))
    assert "Rehearsal (--fast)." in loud.text
    assert "2 warnings" in loud.text
    assert "the mask was empty" in loud.text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder with a report made of hostile text, and that report's HTML."""
    folder = tmp_path_factory.mktemp("hostile")
    evil = SCRIPT + IMAGE + ENTITY
    lone = "\ud800"  # a lone surrogate: no UTF-8 file can hold it, and no pandas string either
    samples = pd.DataFrame([{"arm": evil, "seed": 0, "question": evil, "reply": evil, "claimed_name": evil}])
    shifts = study.shifts(arms=["base", "em"], layers=4, directions=["evil:text"]).assign(
        arm=evil, direction=evil
    )
    tables = {"shifts": shifts, evil: pd.DataFrame({evil: [evil, "b"], "c": [evil, evil]})}
    figures = draw_figures(tables, folder / "figures", **LAYER)
    text = written(
        folder, title=evil + lone, description=evil + lone, summary=[evil], folded=summarise(tables, **LAYER), glance=glance(tables, **LAYER), resolved_yaml=f"arms: {evil}",
        figures=figures, tables=tables, provenance=[(evil, evil)], warnings=[evil], citation=evil + lone, samples=samples,
        steps=pd.DataFrame({"step": [evil], "key": ["k"], "seconds": [1.0], "finished": [evil]}),
        table_files={evil: folder / "javascript:alert(1)\"'.csv"},
    )  # fmt: skip
    return folder, text


def test_hostile_text_is_inert(hostile, tmp_path):
    _, text = hostile
    page = Page(text)
    assert not page.all("script")
    assert all(i["src"].startswith("data:image/svg+xml;base64,") for i in page.all("img"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page.text
    assert "\x00" not in text
    assert all(":" not in a["href"] for a in page.all("a"))
    assert html.escape(SCRIPT, quote=True).replace("&#x27;", "&#39;") in text
    tags = {tag for tag, _ in page.tags}
    assert tags == {
        tag for tag, _ in Page(written(tmp_path, **_ordinary(tmp_path))).tags
    }  # no tag of its own


def _ordinary(folder):
    tables = {"shifts": study.shifts(arms=["base", "em"], layers=4, directions=["evil:text"])}
    figures = draw_figures(tables, folder / "figures", **LAYER)
    return {"tables": tables, "figures": figures, "warnings": ["w"], "glance": glance(tables, **LAYER)}


def in_chromium(path, profile):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: the page was checked as text only")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return Page(done.stdout.decode("utf-8"))


@pytest.mark.browser
def test_hostile_text_does_nothing_in_a_browser(hostile):
    folder, text = hostile
    unguarded = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text
    )  # escaping alone must do
    assert unguarded != text
    (folder / "unguarded.html").write_text(unguarded, encoding="utf-8")
    planted = text.replace(
        "<nav", "<script>document.title='owned'</script><nav", 1
    )  # and the policy alone must do
    (folder / "planted.html").write_text(planted, encoding="utf-8")
    (folder / "control.html").write_text(  # neither: shows that this test can see a script that runs
        planted.replace('http-equiv="Content-Security-Policy"', "name=off"), encoding="utf-8"
    )
    seen = {}
    for name in ("report", "unguarded", "planted", "control"):
        page = in_chromium(folder / f"{name}.html", folder / "profile")
        seen[name] = page.title == "owned"
        assert len(page.all("img")) == text.count('<img alt="')
    assert seen == {"report": False, "unguarded": False, "planted": False, "control": True}


def test_tables_read_well():
    table = pd.DataFrame({
        "arm": ["em", "sgtr"], "seed": [0, 0], "sd": [1.23456, -0.00001], "sd_low": [1.0, -0.2], "sd_high": [1.5, 0.2],
        "p_random": [0.0004, 0.25], "n": [48, 1234], "ok": [True, False], "none": [None, 3.0],
    })  # fmt: skip
    grid = to_grid("t", table)
    assert grid.fixed == [("seed", "0")]
    assert grid.header == ["arm", "sd [95 %]", "p_random", "n", "ok", "none"]
    assert grid.rows == [
        ["em", "1.23 [1.00, 1.50]", "<0.001", "48", "yes", "–"],
        ["sgtr", "0.000 [−0.200, 0.200]", "0.250", "1234", "no", "3"],
    ]
    zero = to_grid("t", pd.DataFrame({"x": [0.0, 1.0], "x_low": [0.0, 0.5], "x_high": [0.0, 1.5]}))
    assert zero.rows == [["0.00 [0.00, 0.00]"], ["1.00 [0.50, 1.50]"]]
    assert [number(v) for v in (0.0, 12345.6, 0.000012, float("inf"), float("nan"), -0.5)] == [
        "0", "12,346", "1.2e−05", "∞", "–", "−0.500",
    ]  # fmt: skip


def test_long_tables_say_what_is_left_out():
    table = pd.DataFrame({"layer": [0, 1, 2] * 300, "x": range(900)})
    grid = to_grid("t", table, layer=1)
    assert grid.note == "layer 1 only, of 3 layers; the first 200 rows of 300"
    assert grid.long
    assert len(grid.rows) == 200
