"""Drives the page in a headless Chromium, where one is installed."""

import asyncio
import json
from pathlib import Path

import pytest
from browser import BROWSER, BROWSERS, browser_page
from server import running

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)
EVIL = "<img src=x onerror=document.title='evil'>.txt"
TEXT = "<script>document.title='evil'</script> It was a bright cold day. " * 8


async def layout(page, width: int, dark: bool) -> None:
    """Checks that nothing is wider than the window, and that text can be read."""
    found = await page.run("""(() => { const root = document.documentElement, style = getComputedStyle(document.body);
        return { scroll: root.scrollWidth, back: style.backgroundColor, text: style.color,
                 wide: [...document.body.querySelectorAll("*")].filter(e =>
                     e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)) }; })()""")
    assert found["scroll"] <= width and found["wide"] == []
    back, text = (sum(map(int, found[name][4:-1].split(", "))) for name in ("back", "text"))
    assert (back < text) == dark and abs(back - text) > 450


@pytest.mark.parametrize("width, dark", [(420, True), (1200, False)])
def test_drop_a_document_ask_and_see_what_was_attended(tiny, width, dark):
    """A document with markup in its name and text is uploaded, compressed, asked and deleted."""
    Path(EVIL).write_text(TEXT)

    async def use(server) -> None:
        async with browser_page() as page:
            await page.open(server.url, width, dark)
            await page.until("!document.getElementById('content').hidden")
            with server.service.turns:  # the compression waits for its turn
                await page.choose_file("#file", Path(EVIL).resolve())
                await page.until("document.querySelector('#documents li progress')")
                await layout(page, width, dark)
            await page.until("document.querySelector('#documents input')?.checked")
            (made,) = server.http.get("/v1/memories").json()["data"]
            about = await page.run("document.querySelector('.about').textContent")
            assert about.startswith(
                f"{made['tokens_in']} tokens in, {made['slots_out']} slots out, 8 : 1"
            )
            assert await page.run("document.querySelector('#documents label').textContent") == EVIL
            asked = "document.getElementById('question').value = 'Why?'; document.getElementById('send').click()"
            await page.run(asked)
            await page.until("document.querySelectorAll('#top blockquote').length === 3")
            await page.until("document.getElementById('usage').textContent !== ''")
            body = dict(messages=[{"role": "user", "content": "Why?"}], memory=made["id"])
            answer = server.http.post(
                "/v1/chat/completions", json=body | dict(max_tokens=200, attention=True)
            ).json()
            choice = answer["choices"][0]
            shown = await page.run("document.getElementById('answer').textContent")
            cut = " …" * (choice["finish_reason"] == "length")
            assert shown == choice["message"]["content"] + cut
            best = max(answer["attention"], key=lambda chunk: chunk["fraction"])
            quoted = await page.run("document.querySelector('#top blockquote').textContent")
            chunk = server.http.get(f"/v1/memories/{made['id']}/chunks/{best['chunk']}").json()
            assert quoted == chunk["text"]
            cells = await page.run("document.querySelectorAll('.strip span').length")
            assert cells == made["chunks"]
            await layout(page, width, dark)
            await page.run("document.querySelector('#documents button').click()")
            await page.until("document.querySelectorAll('#documents li').length === 0")
            assert await page.run("document.title") == "uiollms" and page.errors == []

    with running(*tiny, Path("memories")) as server:
        asyncio.run(asyncio.wait_for(use(server), 120))


def test_the_page_asks_for_the_token_and_shows_errors(tiny):
    async def use(server) -> None:
        async with browser_page() as page:
            await page.open(server.url)
            await page.until("!document.getElementById('login').hidden")
            for token in ("wrong-token", "right-token"):
                script = f"document.getElementById('token').value = {json.dumps(token)}; document.querySelector('#login button').click()"
                await page.run(script)
                if token == "wrong-token":
                    await page.until("!document.getElementById('error').hidden")
                    assert await page.run("document.getElementById('content').hidden")
            await page.until("!document.getElementById('content').hidden")
            Path("large.txt").write_text("x" * 2000)
            await page.choose_file("#file", Path("large.txt").resolve())
            await page.until("document.getElementById('error').textContent.includes('2,000 bytes')")
            Path("binary.txt").write_bytes(b"\xff")
            await page.choose_file("#file", Path("binary.txt").resolve())
            await page.until(
                "document.querySelector('#documents .bad')?.textContent.includes('UTF-8')"
            )

    with running(*tiny, Path("memories"), token="right-token", max_upload=1000) as server:
        asyncio.run(asyncio.wait_for(use(server), 120))
