"""The page in a real browser: Markdown of answers, whole and half written, and what means harm."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from page_reader import Browser, Page, ask, expect, ready
from page_stand_in import Server

HOSTILE = """<script>window.harmed = 1</script>
<img src="x" onerror="window.harmed = 2">

[x](javascript:alert(1)) [y](JaVaScRiPt:alert(2)) [z](data:text/html,<script>alert(3)</script>) [w](/v1/models)
[v]( java\tscript:alert(4)) <javascript:alert(5)> ![p](https://example.org/p.png) ![q](javascript:alert(6))

<a href="https://example.org" onclick="alert(7)">link</a> <svg onload=alert(8)> <iframe src="https://example.org">

| <b>cell</b> | [c](javascript:alert(9)) |
|---|---|
| <style>body { display: none }</style> | `<script>` |

```html"><script>alert(10)</script>
<script>window.harmed = 3</script>
```
"""


def test_an_answer_that_means_harm_is_text(page: Page, page_server: Server) -> None:
    page_server.script("Harm.", *re.findall(r"(?s).{1,7}", HOSTILE))
    ask(page, "Harm.")
    answer = page.locator(".markdown")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    expect(answer).to_contain_text("<script>window.harmed = 1</script>")
    expect(answer).to_contain_text("[x](javascript:alert(1))")
    expect(answer).to_contain_text('<img src="x" onerror="window.harmed = 2">')
    tags = {
        "p",
        "br",
        "a",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "code",
        "pre",
        "div",
        "span",
        "button",
        "svg",
        "use",
    }
    assert set(answer.evaluate("(all) => [...all.querySelectorAll('*')].map((one) => one.localName)")) <= tags
    links = answer.evaluate("(all) => [...all.querySelectorAll('a')].map((one) => [one.textContent, one.href])")
    address = ["https://example.org", "https://example.org/"]  # of an attribute: text, in which it is a plain link
    assert links == [["p", "https://example.org/p.png"], address, address]
    assert page.evaluate("window.harmed") is None


def rendered(page: Page, text: str, *, open: bool = False) -> str:
    code = """async ([text, open]) => {
        const { Rendering } = await import("/page/markdown.js");
        const place = document.createElement("div");
        new Rendering(place).update(text, open);
        for (const one of place.querySelectorAll("svg, .code-head")) one.remove();
        for (const one of place.querySelectorAll("*")) {
            const kept = ["href", "start", "class"];
            for (const { name } of [...one.attributes]) if (!kept.includes(name)) one.removeAttribute(name);
        }
        return place.innerHTML;
    }"""
    return page.evaluate(code, [text, open])


@pytest.fixture(scope="module")
def renderer(browser: Browser, page_server: Server) -> Iterator[Page]:
    """A page for trying Markdown on, without a test's own browser."""
    with browser.new_context() as context:
        opened = context.new_page()
        ready(opened, page_server.address)
        yield opened


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (
            "a *b* **c** ***d*** _e_ ~~f~~",
            "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <em>e</em> <del>f</del></p>",
        ),
        ("2 * 3 * 4, snake_case_name, 5*", "<p>2 * 3 * 4, snake_case_name, 5*</p>"),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"),
        (r"\*a\* \`b\` \[c](d) e\f", r"<p>*a* `b` [c](d) e\f</p>"),
        ("`a*b*` ``c`d`` `e", "<p><code>a*b*</code> <code>c`d</code> `e</p>"),
        ("**汉字**和`代码`", "<p><strong>汉字</strong>和<code>代码</code></p>"),
        ("one\ntwo<br>three", "<p>one<br>two<br>three</p>"),
        ("# A\n###### B #\n#hash", "<h3>A</h3><h6>B</h6><p>#hash</p>"),
        ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
        (
            "- a\n- b\n\n  c\n\n* d",
            "<ul><li><p>a</p></li><li><p>b</p><p>c</p></li></ul><ul><li><p>d</p></li></ul>",
        ),
        (
            "1. a\n   - b\n     - c\n2. d\n    * e",
            "<ol><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul></li>"
            "<li><p>d</p><ul><li><p>e</p></li></ul></li></ol>",
        ),
        (
            "1. a\n  - b\n  - c\n2. d",
            "<ol><li><p>a</p><ul><li><p>b</p></li><li><p>c</p></li></ul></li><li><p>d</p></li></ol>",
        ),
        ("3) a\n4) b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        (
            "- a\n  ```\n  b\n\n    c\n  ```\n- d",
            '<ul><li><p>a</p><div class="code"><pre><code>b\n\n  c</code></pre></div></li><li><p>d</p></li></ul>',
        ),
        ("The year\n1984. Then\n- so", "<p>The year<br>1984. Then</p><ul><li><p>so</p></li></ul>"),
        (
            "> a\n> - b\n>> c",
            "<blockquote><p>a</p><ul><li><p>b</p></li></ul><blockquote><p>c</p></blockquote></blockquote>",
        ),
        ("~~~\n```\na\n~~~\nb", '<div class="code"><pre><code>```\na</code></pre></div><p>b</p>'),
        (
            "a | b\n:-:|--:\n`x|` \\| | **y**\nz\n\nend",
            '<div class="table"><table><thead><tr><th class="center">a</th><th class="right">b</th></tr></thead><tbody>'
            '<tr><td class="center">`x</td><td class="right">` |</td></tr></tbody></table></div><p>z</p><p>end</p>',
        ),
        ("a | b\nnot a table", "<p>a | b<br>not a table</p>"),
        ("[a *b*](https://x.org/y_(z) 'title')!", '<p><a href="https://x.org/y_(z)">a <em>b</em></a>!</p>'),
        (
            "See https://x.org/a_b_c, (https://y.org/).",
            '<p>See <a href="https://x.org/a_b_c">https://x.org/a_b_c</a>, ('
            '<a href="https://y.org/">https://y.org/</a>).</p>',
        ),
        (
            "<https://x.org> <mailto:a@b.org> <b>",
            '<p><a href="https://x.org/">https://x.org</a> <a href="mailto:a@b.org">mailto:a@b.org</a> &lt;b&gt;'
            '</p>',
        ),
        ("[a](ftp://x) [b](c.html) [d] [e][f]", "<p>[a](ftp://x) [b](c.html) [d] [e][f]</p>"),
    ],
)  # fmt: skip
def test_markdown(renderer: Page, text: str, html: str) -> None:
    assert rendered(renderer, text) == html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b", "<p>a <strong>b</strong></p>"),
        ("a **b*", "<p>a <strong>b</strong></p>"),
        ("a **", "<p>a </p>"),
        ("a *b", "<p>a <em>b</em></p>"),
        ("a ***b", "<p>a <em><strong>b</strong></em></p>"),
        ("5*3", "<p>5*3</p>"),
        ("a `b", "<p>a <code>b</code></p>"),
        ("a [b](https://x.o", "<p>a <span>b</span></p>"),
        ("a\n-", "<p>a</p>"),
        ("a\n\n2.", "<p>a</p>"),
        ("a\n\n##", "<p>a</p>"),
        ("```py", '<div class="code"><pre><code></code></pre></div>'),
        ("```py\na\n``", '<div class="code"><pre><code>a</code></pre></div>'),
        (
            "| a | b |\n|--",
            '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody></tbody></table></div>',
        ),
    ],
)  # fmt: skip
def test_what_is_half_written_is_shown_as_what_it_will_be(renderer: Page, text: str, html: str) -> None:
    assert rendered(renderer, text, open=True) == html


DOCUMENT = """## A heading

Some **bold and *both*** words, `code`, [a link](https://example.org/a) and ~~struck~~ ones.

1. One
   - inner **bold**
   - `code`
2. Two

   more of two

| left | right |
|:-----|------:|
| `a` | **1** |
| b | 2 |

> A quote
> of two lines

---

```python
def f():
    return "**not bold**"
```

The end.
"""


def test_no_prefix_of_an_answer_shows_marks_or_changes_what_stands(renderer: Page) -> None:
    code = """async (text) => {
        const { Rendering } = await import("/page/markdown.js");
        const [grown, whole] = [document.createElement("div"), document.createElement("div")];
        const tagsOf = (place) => [...place.children].map((one) => one.localName + one.className);
        const growing = new Rendering(grown);
        const seen = [];
        for (let length = 1; length <= text.length; length += 1) {
            growing.update(text.slice(0, length), true);
            const fresh = document.createElement("div");
            new Rendering(fresh).update(text.slice(0, length), true);
            const words = fresh.cloneNode(true);
            for (const one of words.querySelectorAll("pre")) one.remove();
            seen.push({ same: fresh.isEqualNode(grown), words: words.textContent, tags: tagsOf(fresh) });
        }
        growing.update(text, false);
        new Rendering(whole).update(text, false);
        return { seen, same: whole.isEqualNode(grown), tags: tagsOf(whole) };
    }"""
    found = renderer.evaluate(code, DOCUMENT)
    assert found["same"]
    assert found["tags"] == ["h4", "p", "ol", "divtable", "blockquote", "hr", "divcode", "p"]
    for length, step in enumerate(found["seen"], start=1):
        prefix = DOCUMENT[:length]
        assert step["same"], prefix
        assert not re.search(r"[*`~|#]|\]\(|example|-{2}", step["words"]), (prefix, step["words"])
        assert step["tags"] == found["tags"][: len(step["tags"])], prefix


@pytest.mark.parametrize(
    "text",
    [
        "[" * 60_000, "[a](" * 8_000, "[x](" + " " * 30_000, "*a " * 10_000, "`" * 20_001, "a`b``" * 6_000,
        "> " * 5_000, "- " * 5_000, "|" * 10_000 + "\n" + "-|" * 5_000, " " * 50_000 + "x", "#" + " " * 50_000 + "x#",
        "https://" + "a)" * 10_000,
    ],
    ids=lambda text: text.strip()[:5],
)  # fmt: skip
def test_an_answer_that_would_hold_the_page_up_does_not(renderer: Page, text: str) -> None:
    code = """async (text) => {
        const { Rendering } = await import("/page/markdown.js");
        const begun = performance.now();
        new Rendering(document.createElement("div")).update(text, true);
        return performance.now() - begun;
    }"""
    assert renderer.evaluate(code, text) < 2000  # milliseconds; quadratic ones take minutes
