"""What comes from outside is data: text of data sets in the rendered report, model folders, names, archives."""

from html.parser import HTMLParser

import nbformat
import pytest
from report_fixtures import execute_compare, make_run

from basics import paths
from papertrail import records
from papertrail.report import render
from papertrail.report.render import inspect

# Names of sources that are attacks on HTML, Markdown, Pandoc, Quarto and JupyterLab.
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "](javascript:alert(1)) [x](javascript:alert(2))",
    '"><svg/onload=alert(3)>',
    "![i](http://tracker.example/i.png)",
    "{{< include secret.txt >}} {{< var x >}}",
    "```{=html}",
    "`<b>raw</b>`{=html}",
    "::: {.callout onclick=alert(4)}",
    "@nobody2020 [@nobody2020] ?@tbl-nothing",
    r"$x^2$ \(y\) \begin{align}z\end{align}",
    "a | b | c",
    "# heading",
    "<!-- comment --> &lt;entity&gt;",
    "</td></tr></table><h1>out</h1>",
]


class Page(HTMLParser):
    """The text a reader sees, and the elements and attributes that could act."""

    def __init__(self, html: str):
        super().__init__()
        self.pieces, self.tags, self.attributes, self.hidden = [], set(), [], 0
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.hidden += tag in ("style", "script")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if not self.hidden:
            self.pieces.append(data)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """The page of a run whose sources have the attacks for names, in the training and notebook 00."""
    run = make_run(tmp_path_factory.mktemp("runs") / "fake")
    for name in ("00_data", "01_pretrain"):
        path = run / "notebooks" / f"{name}.ipynb"
        book = nbformat.read(path, as_version=4)
        for cell in book.cells:
            for output in cell.outputs:
                values = output.data[records.MIME]
                if values["name"] == "data/sources":
                    rows = [{"source": attack} for attack in ATTACKS]
                    output.data["text/markdown"] = records.table(rows)
                if values["name"] == "stage/pretrain":
                    named = [{"source": attack, "split": "train"} for attack in ATTACKS]
                    values["values"]["fingerprint"]["config"]["data"]["pretrain"] = named
        nbformat.write(book, path)
    execute_compare(run, paths.NOTEBOOKS / "percent" / "06_compare.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda name: None)
        return render(run, paths.REPORT, say=lambda line: None).read_text(encoding="utf-8")


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_from_data_shows_as_text_in_the_report(attacked, attack):
    """In the table of notebook 00 and in the prose, through the report's variables."""
    assert Page(attacked).text.count(" ".join(attack.split())) >= 2


def test_nothing_on_the_page_acts_or_loads(attacked):
    page = Page(attacked)
    assert inspect(attacked) == []
    assert not page.tags & {"script", "iframe", "object", "embed", "form", "base", "svg"}
    for name, value in page.attributes:
        assert not name.startswith("on") and not value.strip().lower().startswith(("javascript:", "vbscript:"))
        if name == "src":
            assert value.startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    "html",
    [
        '<img srcset="//x.example/a.png 2x">',
        '<object data="https://x.example/a"></object>',
        '<video poster="https://x.example/a.png"></video>',
        '<body background="https://x.example/a.png">',
        '<link rel="preload" href="style.css">',
        '<base href="https://x.example/">',
        '<p style="background: url(https://x.example/a)">',
        "<style>p { background: url('https://x.example/a') }</style>",
        "<style>@import url(https://x.example/a);</style>",
        '<meta http-equiv="refresh" content="0; url=https://x.example">',
        '<a ping="https://x.example/" href="#x">',
        '<link rel="preload" as="image" imagesrcset="https://x.example/a.png 2x">',
        '<iframe srcdoc="&lt;img src=&quot;https://x.example/a.png&quot;&gt;"></iframe>',
        '<svg><image href="https://x.example/a.png"/></svg>',
        "<IMG\nSRC = https://x.example/a.png>",
    ],
)
def test_whatever_a_page_would_fetch_is_found(html):
    (found,) = inspect(html)
    assert found.startswith("would fetch")


def test_pandoc_reads_no_other_file_and_no_address(attacked, tmp_path):
    """Markdown of the report's author that embeds a local file or an address: an error, not a copy of the file."""
    from basics.errors import ReportError
    from papertrail.report import pandoc

    (tmp_path / "secret.png").write_bytes(b"secret")
    for target in (tmp_path / "secret.png", "secret.png", "http://127.0.0.1:9/x.png"):
        (tmp_path / "index.qmd").write_text(f"---\ntitle: x\n---\n\n![a]({target})\n")
        with pytest.raises(ReportError, match="Could not fetch resource"):
            pandoc.render(tmp_path)
