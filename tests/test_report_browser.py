"""The report in a real browser, as a reader uses it: filters, overlays, keys; nothing is asked of a network.

Debian's packages chromium and chromium-driver; skipped where they are not installed.
"""

import json
import shutil
import time

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from sklearn_sparseattn import SparseAttnClassifier, write_report
from sklearn_sparseattn.datasets import make_cells

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: apt-get install chromium chromium-driver"
)

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><img src=http://198.51.100.1/a.png>\u2028'",
]
FOREIGN = [
    "לימפוציט (פעיל) מסוג 2, עם שם ארוך מאוד",
    "خلية\nوحيدة",
    "Z" + "\u0334\u0327\u0353\u030d\u0352" * 30 + "algo",
    "\u202egnp.exe \u2066open",  # turns around what follows, and does not end it
    "A_very_long_name_" * 20,
    "",
]
# Of a click, until the filtered gallery is laid out and drawn.
MOST_MS = 200
MOST_BYTES = 15e6
COLOURS = ("color", "backgroundColor")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A report of 1,000 cells, and what they are and were called."""
    cells = make_cells(1000, modality="brightfield", image_size=64, random_state=0)
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(cells.images[:200], cells.target[:200])
    file = tmp_path_factory.mktemp("large") / "report.html"
    write_report(clf, cells.images, cells.target, file, class_names=cells.target_names)
    return file, cells.target, clf.predict(cells.images)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 255, size=(60, 16, 20), dtype=np.uint8)
    labels = np.array(HOSTILE)[np.arange(60) % 3]
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(images, labels)
    file = tmp_path_factory.mktemp("hostile") / "report.html"
    write_report(clf, images, labels, file, names=[f"{label} {i}" for i, label in enumerate(labels)])
    return file


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Names in other scripts, with line breaks, too long, or of nothing; some cells are wrong."""
    images = np.random.default_rng(0).integers(0, 255, size=(60, 16, 20), dtype=np.uint8)
    labels = np.array(FOREIGN, dtype=object)[np.arange(60) % len(FOREIGN)]
    clf = SparseAttnClassifier(max_epochs=1, random_state=0).fit(images, labels)
    file = tmp_path_factory.mktemp("foreign") / "report.html"
    write_report(
        clf, images, labels, file, names=[f"{label}/תמונה {i}.tif" for i, label in enumerate(labels)]
    )
    return file, labels.astype(str), clf.predict(images)


@pytest.fixture
def page(browser, request):
    """Open the report that the test names; afterwards nothing may be in the console, or be asked for."""
    browser.get(
        "about:blank"
    )  # else the page that the browser opens with may still ask for things of its own
    browser.get_log("performance"), browser.get_log("browser")
    file = request.getfixturevalue(request.param)
    browser.get((file[0] if isinstance(file, tuple) else file).as_uri())
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [browser.current_url]


large_page = pytest.mark.parametrize("page", ["large"], indirect=True)
foreign_page = pytest.mark.parametrize("page", ["foreign"], indirect=True)
hostile_page = pytest.mark.parametrize("page", ["hostile"], indirect=True)


def find(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector)


def shown(page):
    return page.execute_script("return [...gallery.children].filter(item => item.checkVisibility()).length")


def matrix_cell(true, predicted):
    return f'#matrix [data-true="{true}"][data-predicted="{predicted}"]'


def choose(page, name, value):
    find(page, f"[name={name}][value={value}]").click()


def press(page, *keys):
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def focused(page, what):
    return page.execute_script(f"return document.activeElement.{what}")


def most_common_mistake(true, predicted):
    pairs, counts = np.unique(np.stack([true, predicted])[:, true != predicted], axis=1, return_counts=True)
    return *pairs[:, counts.argmax()].tolist(), int(counts.max())


@large_page
def test_numbers_of_the_table_filter_the_gallery(page, large):
    _, true, predicted = large
    assert shown(page) == 1000
    i, j, n = most_common_mistake(true, predicted)
    button = find(page, matrix_cell(i, j))
    assert button.text == str(n)
    button.click()
    assert shown(page) == n
    assert button.get_attribute("aria-pressed") == "true"
    assert find(page, "#status").text.startswith(f"{n} of {n} cells · true: ")
    find(page, matrix_cell(i, -1)).click()
    assert shown(page) == (true == i).sum()
    assert button.get_attribute("aria-pressed") == "false"
    find(page, matrix_cell(-1, j)).click()
    assert shown(page) == (predicted == j).sum()
    choose(page, "verdict", "wrong")
    assert shown(page) == ((predicted == j) & (true != j)).sum()
    choose(page, "verdict", "right")
    assert shown(page) == ((predicted == j) & (true == j)).sum()
    find(page, "#clear").click()
    assert shown(page) == 1000
    assert not find(page, "#clear").is_displayed()
    button.click()
    button.click()  # twice is as before
    assert shown(page) == 1000


@large_page
def test_wrong_ones_come_first_in_either_order(page, large):
    read = """return [...gallery.children].map(item =>
        [item.classList.contains("wrong"), parseFloat(item.querySelector(".sure").textContent)])"""
    for value, sign in [("surest", -1), ("least", 1), ("surest", -1)]:
        choose(page, "order", value)
        wrong, sure = np.array(page.execute_script(read)).T
        n_wrong = (large[1] != large[2]).sum()
        np.testing.assert_array_equal(wrong, np.arange(1000) < n_wrong)
        assert (np.diff(sign * sure[:n_wrong]) >= 0).all()
        assert (np.diff(sign * sure[n_wrong:]) >= 0).all()


@large_page
def test_overlays_lie_over_the_images_in_view(page):
    """Also over those that are scrolled to; each the picture of its own cell."""
    is_right = """const [layer, at] = arguments;
        return [...gallery.children].slice(at, at + 5).every(item => {
            const over = item.querySelector(".over");
            const i = items.indexOf(item);
            return over && over.complete && over.naturalWidth === 64 && over.checkVisibility()
                && over.src.endsWith(data.layers[layer][i]);
        })"""
    for layer, at in [("coarse", 0), ("chosen", 400), ("fine", 400), ("contribution", 990)]:
        choose(page, "layer", layer)
        page.execute_script("gallery.children[arguments[0]].scrollIntoView()", at)
        deadline = time.monotonic() + 30
        while not page.execute_script(is_right, layer, at):
            assert time.monotonic() < deadline, (layer, at)
        assert find(page, f'.key[data-layer="{layer}"]').is_displayed()
    choose(page, "layer", "image")
    assert not page.execute_script(
        "return [...document.querySelectorAll('.over')].some(o => o.checkVisibility())"
    )


@large_page
def test_printing_draws_the_overlay_of_every_cell(page):
    choose(page, "layer", "fine")
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    drawn = page.execute_script(
        "return items.every((item, i) => item.querySelector('.over').src === source('fine', i))"
    )
    assert drawn


@large_page
def test_a_thousand_cells_are_small_and_respond_at_once(page, large):
    assert large[0].stat().st_size < MOST_BYTES
    i, j, _ = most_common_mistake(large[1], large[2])
    script = """const [selector, done] = arguments;
        const start = performance.now();
        document.querySelector(selector).click();
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)))"""
    clicks = [matrix_cell(i, j), "#clear", "[name=layer][value=fine]", "[name=order][value=least]"]
    # The least of five: the machine has other work to do.
    took = {click: min(page.execute_async_script(script, click) for _ in range(5)) for click in clicks}
    assert max(took.values()) < MOST_MS, took


@large_page
def test_the_keyboard_reaches_everything(page):
    page.execute_script("document.querySelector('#matrix [tabindex=\"0\"]').focus()")
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert focused(page, "dataset.true") == focused(page, "dataset.predicted") == "1"
    assert page.execute_script("return document.activeElement.matches(':focus-visible')")
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press(page, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP)  # stays in the table, on the head of a column
    assert (focused(page, "dataset.true"), focused(page, "dataset.predicted")) == ("-1", "1")
    press(page, Keys.SPACE)
    in_column = shown(page)
    assert 0 < in_column < 1000
    stops = []
    for _ in range(6):
        press(page, Keys.TAB)
        stops.append(focused(page, "name") or focused(page, "id") or focused(page, "parentElement.className"))
    # One stop each: three groups of radio buttons, the slider, the button, the gallery.
    assert stops[:5] == ["verdict", "order", "layer", "strength", "clear"]
    assert stops[5].startswith("cell")
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.END, Keys.ARROW_RIGHT)
    last = "[...gallery.children].filter(item => !item.hidden).at(-1).firstChild"
    assert page.execute_script(f"return document.activeElement === {last}")
    press(page, Keys.ENTER)
    assert find(page, "#detail").is_displayed()
    assert len(page.find_elements(By.CSS_SELECTOR, "#detail-layers img.over")) == 4
    assert find(page, "#detail-layers img").get_attribute("src") == page.execute_script(
        f"return {last}.querySelector('img').src"
    )
    title = find(page, "#detail-title").text
    press(page, Keys.ARROW_LEFT)
    assert find(page, "#detail-title").text != title
    for _ in range(2):  # to the end and no further, where the arrow keys still answer
        find(page, "#next").click()
    assert find(page, "#detail-title").text == title
    assert find(page, "#next").get_attribute("aria-disabled") == "true"
    press(page, Keys.ARROW_LEFT)
    assert find(page, "#detail-title").text != title
    press(page, Keys.ESCAPE)
    assert not find(page, "#detail").is_displayed()
    assert focused(page, "title") != title
    # Radio buttons by their arrows.
    page.execute_script("document.querySelector('[name=layer]:checked').focus()")
    press(page, Keys.ARROW_DOWN)
    assert focused(page, "value") == "coarse"
    assert page.execute_script("return cells.dataset.layer") == "coarse"


@hostile_page
def test_hostile_names_are_text_wherever_they_stand(page):
    in_head = [
        element.get_attribute("textContent") for element in page.find_elements(By.CSS_SELECTOR, "thead span")
    ]
    assert in_head == sorted(HOSTILE)
    find(page, matrix_cell(0, -1)).click()
    assert sorted(HOSTILE)[0] in find(page, "#status").text
    assert find(page, matrix_cell(0, -1)).get_attribute("title") == f"all that are {sorted(HOSTILE)[0]}"
    find(page, "#gallery li:not([hidden]) button").click()
    for _ in range(20):
        title = find(page, "#detail-title").get_attribute("textContent")
        assert any(title.startswith(label) for label in HOSTILE)
        page.execute_script("document.getElementById('next').click()")
    tags = page.execute_script("return [...document.querySelectorAll('img')].map(i => i.src.slice(0, 22))")
    assert set(tags) == {"data:image/webp;base64"}
    assert page.execute_script("return document.scripts.length") == 2
    find(page, "#close").click()


def set_size(page, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@foreign_page
def test_names_have_their_own_direction_and_choose_their_cells(page, foreign):
    _, true, predicted = foreign
    # Of each piece of text with a name in it: whether what stands around it is kept out.
    isolated = """const bare = (text) => text.replace(/\\s+/g, " ").trim();
        const names = [...data.classes, ...data.cells.map(one => one.name)].map(bare);
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        const found = [];
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const parent = node.parentElement;
            if (parent.tagName !== "SCRIPT" && names.some(name => bare(node.data).includes(name)))
                found.push(names.includes(bare(node.data)) && getComputedStyle(parent).unicodeBidi);
        }
        return found"""
    classes = page.execute_script("return data.classes")
    assert '""' in classes
    for i, label in enumerate(sorted(FOREIGN)):
        button = find(page, matrix_cell(i, -1))
        assert button.is_displayed()
        button.click()
        assert shown(page) == (true == label).sum() == 10
        assert classes[i] in find(page, "#status").get_attribute("textContent")
        j = sorted(FOREIGN).index(predicted[true == label][0])
        cell = find(page, matrix_cell(i, j))
        page.execute_script("arguments[0].click()", cell)
        assert (
            shown(page)
            == int(cell.text)
            == ((true == label) & (predicted == predicted[true == label][0])).sum()
        )
        find(page, "#gallery li:not([hidden]) button").click()
        kinds = page.execute_script(isolated)
        # In the lists and tables, above the gallery, in the gallery, in the window of the cell.
        assert len(kinds) > 4 * len(FOREIGN) + len(true)
        assert set(kinds) == {"isolate"}
        find(page, "#close").click()


@foreign_page
@pytest.mark.parametrize("width", [400, 1280])
def test_names_do_not_break_the_page(page, width):
    set_size(page, width, 700)
    page.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    for i in range(len(FOREIGN)):
        page.execute_script("document.querySelector(arguments[0]).click()", matrix_cell(i, -1))
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    find(page, "#clear").click()
    # Pictures stand in rows, whether the caption has two lines or three; captions end inside their cell.
    boxes = page.execute_script("""return items.map(item => {
        const box = (element) => element.getBoundingClientRect();
        item.style.contentVisibility = "visible";
        const texts = [...item.querySelectorAll("bdi, .sure")].map(box);
        const [button, picture] = [box(item.firstChild), box(item.querySelector("img"))];
        return [button.top, picture.top, button.bottom - Math.max(...texts.map(text => text.bottom)),
            button.right - Math.max(...texts.map(text => text.right)),
            Math.min(...texts.map(text => text.left)) - button.left];
    })""")
    cells, pictures, *inside = np.array(boxes).T
    np.testing.assert_allclose(pictures - cells, pictures[0] - cells[0], atol=0.5)
    assert np.min(inside) >= 0
    rows = page.execute_script(
        "return [...document.querySelectorAll('#matrix tr')].map(row => row.offsetHeight)"
    )
    assert max(rows[1:]) < 50
    assert rows[0] < 180
    find(page, "#gallery button").click()
    for _ in range(5):
        assert page.execute_script(
            "return detail.scrollTop === 0 && detail.scrollWidth <= detail.clientWidth"
        )
        in_view = """const box = document.activeElement.getBoundingClientRect();
            return box.top >= 0 && box.bottom <= innerHeight && document.activeElement.id"""
        assert page.execute_script(in_view) == "next"
        press(page, Keys.ENTER)
    find(page, "#close").click()
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@large_page
def test_charts_speak_and_their_numbers_are_reached_by_the_keyboard(page):
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    said = [node["name"]["value"] for node in tree if node["role"]["value"] == "image"]
    charts = page.find_elements(By.CSS_SELECTOR, ".charts svg")
    spoken = [text for text in said if "epoch" in text or "probability" in text]
    assert len(spoken) == len(charts) == 3
    page.execute_script("document.querySelector('.charts summary').focus()")
    for i, figure in enumerate(page.find_elements(By.CSS_SELECTOR, ".charts figure")):
        table = figure.find_element(By.TAG_NAME, "table")
        assert not table.is_displayed()
        press(page, Keys.ENTER)
        assert table.is_displayed()
        first = table.find_elements(By.CSS_SELECTOR, "tbody tr:first-child td")[1].text
        assert first in charts[i].get_attribute("aria-label")
        press(page, Keys.TAB)  # into the table, which may scroll
        assert focused(page, "className") == "wide numbers"
        press(page, Keys.TAB)
    assert focused(page, "dataset.true") == "0"


@large_page
def test_the_legend_lies_over_no_line(page):
    legend, axes = find(page, "#calibration-legend_1"), find(page, "#calibration-patch_2")
    assert legend.rect["y"] + legend.rect["height"] <= axes.rect["y"] + 1


@large_page
def test_the_window_of_a_cell_has_the_scales_of_its_maps(page):
    find(page, "#gallery button").click()
    captions = [one.text.split("\n") for one in page.find_elements(By.CSS_SELECTOR, "#detail figcaption")]
    assert captions == [
        ["image"],
        ["coarse attention", "low to high"],
        ["chosen pixels"],
        ["fine attention", "low to high"],
        ["signed contribution", "− to +"],
    ]
    find(page, "#close").click()


@large_page
def test_paper_has_what_it_needs_and_no_instructions(page):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    set_size(page, 720, 1000)
    caption = find(page, "#matrix caption")
    assert caption.text == "True class down, predicted class across."
    assert not any(
        one.is_displayed() for one in page.find_elements(By.CSS_SELECTOR, ".screen, fieldset, summary")
    )
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@hostile_page
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_and_nothing_is_wider_than_a_telephone(page, scheme):
    """WCAG's 4.5 to 1 for text, drawn or in charts."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    set_size(page, 400, 800)
    luminance = """const element = document.querySelector(arguments[1] ?? "body");
        const color = getComputedStyle(element)[arguments[0]] ||
            getComputedStyle(document.documentElement).getPropertyValue(arguments[0]);
        const context = document.createElement("canvas").getContext("2d");
        context.fillStyle = color.trim();
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b"""
    ground = page.execute_script(luminance, "backgroundColor")
    assert (ground > 0.5) == (scheme == "light")
    for name in ("--ink", "--soft", "--wrong", "--first", "--second", "color"):
        low, high = sorted([page.execute_script(luminance, name), ground])
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
    for kind in ("hit", "miss"):  # numbers of the table on their strongest colour
        page.execute_script(f"document.querySelector('#matrix .{kind}').style.setProperty('--share', 1)")
        low, high = sorted(page.execute_script(luminance, name, f"#matrix .{kind}") for name in COLOURS)
        assert (high + 0.05) / (low + 0.05) >= 4.5, kind
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
