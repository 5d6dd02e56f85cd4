"""The page's files: all of them served, none from elsewhere, nothing inline that its policy would forbid."""

import re
from importlib.resources import files

from strop.serve import page

WEB = files("strop.serve").joinpath("web")
NAMES = [entry.name for entry in WEB.iterdir()]
TEXTS = {name: WEB.joinpath(name).read_text(encoding="utf-8") for name in NAMES}


def test_every_file_is_served_and_every_reference_found() -> None:
    assert {path.removeprefix("/web/") if path != "/" else "index.html" for path in page.PATHS} == set(NAMES)
    references = re.findall(r'(?:src|href)="([^"#]+)"', TEXTS["index.html"])
    imports = [f"web/{name}" for text in TEXTS.values() for name in re.findall(r'from "\./([\w.]+)"', text)]
    assert references and imports
    assert {f"/{name}" for name in [*references, *imports]} <= set(page.PATHS)


def test_nothing_comes_from_elsewhere() -> None:
    for name, text in TEXTS.items():
        known = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[\w.]+/|@import|\burl\(", known), name


def test_no_text_becomes_markup() -> None:
    for name, text in TEXTS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", TEXTS["index.html"])
