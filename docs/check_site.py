"""Check the built pages: every link within the site leads somewhere, and no page needs anything from elsewhere.

`python docs/check_site.py FOLDER` prints what is wrong and exits with status 1 if anything is. Links to other sites are
not followed.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "What a page links to, what it loads, and the places in it that links can name."

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.places.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "link", "iframe", "source") and ("src" in given or "href" in given):
            self.loads.append(given.get("src") or given["href"])


def broken(folder: Path) -> list[str]:
    "What is wrong with the site in `folder`, one line each."
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    wrong.append(f"{path.relative_to(folder)}: loads {link} from elsewhere")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                wrong.append(f"{path.relative_to(folder)}: {link} leads nowhere")
            elif target in pages and unquote(parts.fragment) not in pages[target].places:
                wrong.append(f"{path.relative_to(folder)}: {link} names no place of that page")
    return wrong if pages else [f"{folder} holds no page"]


if __name__ == "__main__":
    problems = broken(Path(sys.argv[1]).resolve())
    print("\n".join(problems) or "every link within the site holds")
    sys.exit(bool(problems))
