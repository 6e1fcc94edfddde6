"""The page, in a browser: what is shown are the tensors, clicks change it, and nothing is asked for."""

import csv
import io
import os
import shutil

import pytest
import torch

import attnlib
from attnlib.look import Axis, LayerMaps, Page, Part, Record, Run, Statistics, difference, page, read
from attnlib.look.viewer.packing import decode, encode, head_numbers, layer_bytes
from attnlib.look.viewer.tokens import pieces, text_axis

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WORDS = ["The", " to", "ken", " </script>", "<!--", " שלום", " end", "."]


def softmax(*shape, seed=0, causal=False):
    scores = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(~torch.ones(shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1)


def text_run(name="first", seed=0, words=WORDS, overlays=None):
    axis = Axis(list(words), pieces(["The", "Ġto", "ken", "Ġ</script>", "<!--", "Ġשלום", "Ġend", "."][: len(words)]))
    n = len(words)
    layers = [LayerMaps(str(i), softmax(4, n, n, seed=10 * seed + i, causal=True), kv_heads=2) for i in range(3)]
    return Run(name, layers, {"tokens": axis}, overlays or {})


def within(scale, exact):
    """How far a weight may be from the byte that stands for it."""
    return ((exact.abs() * scale).sqrt() / 255 + scale / 255**2).clamp_min(1e-7) * 1.01


# ---- without a browser


def test_bytes_are_as_close_as_they_say():
    for signed in (False, True):
        weights = softmax(3, 9, 30) - (softmax(3, 9, 30, seed=1) if signed else 0)
        codes, scale = encode(weights, signed)
        found = decode(codes, scale, signed)
        limit = within(scale.unsqueeze(-1), weights) * (2.02 if signed else 1)
        assert codes.dtype == torch.uint8 and bool(((found - weights).abs() <= limit).all())
        largest = weights.abs().argmax(-1, keepdim=True)
        torch.testing.assert_close(found.gather(-1, largest), weights.gather(-1, largest))


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(40, (2, 9))}


def test_a_model_is_read_and_counted_as_the_statistics_count():
    model, inputs = tiny_llama()
    run = read(model, inputs, sample=1, name="tiny")
    recorder, statistics = Record(rows="all"), Statistics(what=("entropy", "distance", "sink"))
    single = {"input_ids": inputs["input_ids"][1:]}
    with torch.no_grad(), attnlib.attach(model, recorder, statistics) as session:
        model(**single)
    assert run.axes["tokens"].labels == [str(i) for i in single["input_ids"][0].tolist()]
    for i, layer in enumerate(run.layers):
        assert (layer.kv_heads, layer.kind, layer.label) == (2, "self", str(i))
        torch.testing.assert_close(layer.weights, session.results["record"][i]["weights"][0][0])
        counted, mine = session.results["statistics"][i], head_numbers(layer.weights)
        for name, other in (("entropy", "entropy"), ("distance", "distance"), ("sink", "sink_score")):
            torch.testing.assert_close(mine[name].float(), counted[other].float(), msg=name)


def test_cross_attention_has_two_kinds_of_tokens():
    from transformers import BartConfig, BartForConditionalGeneration

    size = dict(encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    config = BartConfig(
        vocab_size=50, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, **size
    )
    model = BartForConditionalGeneration(config).eval()
    run = read(model, {"input_ids": torch.arange(3, 10)[None], "decoder_input_ids": torch.arange(4, 8)[None]})
    assert [(la.label, la.kind) for la in run.layers] == [("0", "self"), ("0", "cross"), ("1", "self"), ("1", "cross")]
    assert run.axes["tokens"].labels == ["4", "5", "6", "7"] and len(run.axes["keys"]) == 7


def test_a_kept_run_comes_back(tmp_path):
    run = picture_run()
    again = Run.load(run.save(tmp_path / "run.safetensors"))
    assert again.axes["tokens"].parts == run.axes["tokens"].parts
    torch.testing.assert_close(again.axes["tokens"].picture, run.axes["tokens"].picture, rtol=0, atol=0)
    assert str(Page(again)) == str(Page(run))


def test_differences_are_aligned_by_token():
    first = text_run()
    words = [*WORDS[:2], " new", *WORDS[2:]]
    more = [LayerMaps(la.label, softmax(4, 9, 9, seed=7, causal=True), kv_heads=2) for la in first.layers]
    second = Run("second", more, {"tokens": words})
    apart = difference(first, second)
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    assert apart.axes["tokens"].labels == WORDS and apart.signed
    for x, y, d in zip(first.layers, second.layers, apart.layers, strict=True):
        torch.testing.assert_close(d.weights, y.weights[:, kept][:, :, kept] - x.weights)
        torch.testing.assert_close(d.numbers["change"].float(), d.weights.abs().sum(-1).mean(-1) / 2)
    same = difference(first, first)
    assert float(same.layers[0].weights.abs().max()) == 0


def test_word_pieces():
    assert pieces(["a", "b"]) == [0, 1]
    assert pieces(["▁At", "tention", ",", "▁we", "▁see"]) == [0, 0, 1, 2, 3]
    assert pieces(["Ġ", "×ľ", "Ö"], [" ", "\ufffd", "\ufffd"]) == [0, 1, 1]

    class Tokenizer:
        names = ["[CLS]", "to", "##ken", "[SEP]"]

        def convert_ids_to_tokens(self, ids):
            return [self.names[i] for i in ids]

        def decode(self, ids, **_):
            return " ".join(self.names[i] for i in ids).replace(" ##", "").replace("##", "")

    axis = text_axis(Tokenizer(), [0, 1, 2, 3])
    assert axis.labels == Tokenizer.names and axis.texts == ["[CLS]", "token", "[SEP]"]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: str(Page(text_run(), limit=1000)), "over its size limit of 1,000 bytes"),
        (lambda: Page([text_run(), picture_run()]), "difference of unlike models"),
        (lambda: difference(text_run(), text_run(words=list("abcdefgh"))), "no token of 'tokens' in common"),
        (lambda: Run("x", [], {}), "no layer with maps"),
        (lambda: Run("x", [LayerMaps("0", torch.eye(3)[None])], {"tokens": ["a"]}), "has 3 queries"),
        (lambda: LayerMaps("0", torch.eye(3)), r"must be \(heads, N, M\)"),
        (lambda: LayerMaps("0", torch.full((1, 2, 2), float("nan"))), "not finite"),
        (lambda: text_run(overlays={"mine": torch.ones(5)}), r"overlay 'mine' has shape \(5,\), .* possible"),
        (lambda: Axis(["a"], picture=torch.ones(3, 4, 4)), "no part of the axis is a grid"),
        (lambda: Run.load(__file__), "is no run that was kept"),
    ],
)
def test_bad_input_is_told(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_what_cannot_be_written_is_told(tmp_path):
    for write in (text_run().save, Page(text_run()).write):
        with pytest.raises(FileNotFoundError, match="there is no folder .*none' to write 'x.html' into"):
            write(tmp_path / "none" / "x.html")
    with pytest.raises(ValueError, match="a difference is not kept"):
        difference(text_run(), text_run()).save(tmp_path / "run.safetensors")
    with pytest.raises(TypeError, match="b must be a Run"):
        difference(text_run(), "kept")
    wide = torch.rand(1, 1, (1 << 16) + 1)
    with pytest.raises(ValueError, match="at most 65536 keys"):
        layer_bytes(wide, False, 4)
    assert layer_bytes(wide[..., 1:], False, 4)[1] == {"top": 4}


def test_the_file_may_ask_for_nothing(tmp_path):
    html = page(text_run(), tmp_path / "page.html").read_text()
    assert "default-src 'none'" in html and "unsafe" not in html.split("<style>")[0]
    manifest = html.split('id="manifest">')[1].split("</script>")[0]
    assert "\\u003c/script\\u003e" in manifest and "<!--" not in manifest
    assert "http://" not in html and "https://" not in html
    assert not list(tmp_path.glob(".*"))
    assert "sandbox=" in text_run()._repr_html_() and "<script" not in text_run()._repr_html_()


# ---- in a browser


def picture_run():
    labels = ["[CLS]"] + [f"patch {r},{c}" for r in range(3) for c in range(4)]
    axis = Axis(labels, parts=(Part("special", 0, 1), Part("image", 1, 13, (3, 4))), picture=torch.rand(3, 30, 40))
    over = {"relevance": torch.arange(12.0).view(3, 4), "pixels": torch.rand(30, 40)}
    return Run("picture", [LayerMaps("0", softmax(2, 13, 13, seed=5))], {"tokens": axis}, over)


def cross_run():
    layers = [
        LayerMaps("0", softmax(2, 3, 3, causal=True)),
        LayerMaps("0", softmax(2, 3, 5, seed=3), "cross", keys="keys"),
    ]
    return Run("cross", layers, {"tokens": ["x", "y", "z"], "keys": list("abcde")})


def long_run(n=300):
    return Run("long", [LayerMaps("0", softmax(2, n, n, seed=4))], {"tokens": [f" t{i}" for i in range(n)]})


@pytest.fixture(scope="module")
def browser():
    where = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        where, sync_playwright = None, None
    if where is None:
        if os.environ.get("ATTNLIB_NEEDS_BROWSER"):
            pytest.fail("ATTNLIB_NEEDS_BROWSER is set, but playwright or chromium is not installed")
        pytest.skip("no browser: playwright or chromium is not installed")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=where, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a page of runs; nothing may be said on its console, nothing asked for but the file."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    said, asked = [], []

    def opened(runs, address="", **settings):
        path = page(runs, tmp_path / "page.html", **settings)
        tab = context.new_page()
        tab.set_default_timeout(20000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"file://{path}{address}")
        tab.evaluate("attnlibLook.ready")
        return tab

    yield opened
    context.close()
    assert not said
    assert asked and all(url.startswith("blob:") or "page.html" in url for url in asked)


def until(tab, expression, seconds=20.0):
    """Ask again until it holds; the browser may not ask by itself, since the page's policy forbids evaluated text."""
    for _ in range(int(seconds / 0.02)):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(20)
    pytest.fail(f"not within {seconds} s: {expression}")


def hover(tab, i, j, click=False):
    cross, place = tab.locator("#cross"), tab.evaluate(f"attnlibLook.box({i}, {j})")
    cross.click(position=place) if click else cross.hover(position=place)
    return tab.locator("#readout").get_attribute("data-value"), tab.inner_text("#readout")


def choose_head(tab, layer, head):
    tab.locator("#heads").click(position=tab.evaluate(f"attnlibLook.cell({layer}, {head})"))
    until(tab, f"document.getElementById('name').textContent.startsWith('Layer {layer}, head {head}')")


def test_shown_values_are_the_tensors_and_clicks_hold(open_page):
    run = text_run(overlays={"effect": torch.arange(12.0).view(3, 4) - 5})
    tab = open_page(run)
    for layer, head, i, j in ((0, 0, 7, 3), (2, 3, 6, 1), (1, 2, 5, 5)):
        choose_head(tab, layer, head)
        value, text = hover(tab, i, j)
        exact = run.layers[layer].weights[head]
        assert abs(float(value) - float(exact[i, j])) <= float(within(exact[i].max(), exact[i, j]))
        assert WORDS[j].strip() in text and f"[{i}]" in text
        assert tab.evaluate(f"attnlibLook.value(0, {layer}, {head}, {i}, {j})") == float(value)
    assert f"effect {1.0:.4f}" in tab.inner_text("#numbers")  # layer 1, head 2
    hover(tab, 4, 1, click=True)
    held = tab.inner_text("#readout")
    assert hover(tab, 7, 2)[1] == held and "Esc" in tab.inner_text("#lock")
    tab.keyboard.press("Escape")
    assert hover(tab, 7, 2)[1] != held and tab.inner_text("#lock") == ""
    assert tab.locator(".strip bdi").nth(3).inner_text() == "</script>"
    tab.locator(".strip bdi").nth(5).click()
    assert "שלום" in tab.inner_text("#readout") and tab.locator(".strip bdi.held").count() == 1
    # Query heads stand beside those that share their key/value head.
    assert tab.locator("#family button").all_inner_texts() == ["head 2", "head 3"]
    tab.keyboard.press("ArrowRight")
    until(tab, "attnlibLook.state().h === 3")


def test_heads_are_sorted_and_filtered(open_page):
    run = text_run()
    tab = open_page(run)
    sinks = {
        (i, h): float(v) for i, la in enumerate(run.layers) for h, v in enumerate(head_numbers(la.weights)["sink"])
    }
    tab.select_option("#sort", "sink")
    until(tab, "attnlibLook.state().sort === 'sink'")
    order = [tuple(c) for c in tab.evaluate("attnlibLook.order()")]
    assert order == sorted(sinks, key=lambda c: -sinks[c])
    tab.locator("#min").fill("60")
    until(tab, "attnlibLook.order().length < 12")
    least = min(sinks.values()) + 0.6 * (max(sinks.values()) - min(sinks.values()))
    assert {tuple(c) for c in tab.evaluate("attnlibLook.order()")} == {c for c, v in sinks.items() if v >= least}


def test_words_are_merged_the_first_token_hidden_and_the_address_keeps_it(open_page):
    run = text_run()
    tab = open_page(run)
    tab.click("#merge")
    until(tab, "document.querySelectorAll('.strip bdi').length === 7")
    value, text = hover(tab, 5, 1)  # rows of " end", keys of " to" + "ken"
    exact = run.layers[0].weights[0]
    assert "token" in text and "[1–2]" in text
    assert float(value) == pytest.approx(float(exact[6, 1:3].sum()), abs=0.01)
    tab.click("#first")
    until(tab, "attnlibLook.state().first === 1")
    hover(tab, 5, 1, click=True)
    assert "The" not in tab.locator("#list bdi").all_inner_texts()
    tab.keyboard.press("d")
    until(tab, "document.documentElement.classList.contains('dark')")
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    address = tab.evaluate("location.hash")
    again = open_page(run, address)
    assert again.evaluate("attnlibLook.state()") == tab.evaluate("attnlibLook.state()")
    assert again.inner_text("#readout") == tab.inner_text("#readout")
    assert again.evaluate("getComputedStyle(document.body).backgroundColor") == dark != "rgb(251, 251, 250)"


def test_search_exports_and_the_other_direction(open_page):
    run = text_run()
    tab = open_page(run)
    tab.keyboard.press("/")
    tab.keyboard.type("en")
    assert tab.inner_text("#found") == "2 found"
    tab.keyboard.press("Enter")
    assert "ken" in tab.inner_text("#readout")
    tab.keyboard.press("Enter")
    assert "end" in tab.inner_text("#readout")
    with tab.expect_download() as kept:
        tab.click("#csv")
    rows = list(csv.DictReader(io.StringIO(kept.value.path().read_text(encoding="utf-8-sig"))))
    exact = run.layers[0].weights[0]
    assert len(rows) == 64 and rows[3 * 8 + 3]["key token"] == " </script>"
    assert all(
        float(r["weight"]) == pytest.approx(float(exact[int(r["query"]), int(r["key"])]), abs=0.01) for r in rows
    )
    with tab.expect_download() as kept:
        tab.click("#png")
    assert kept.value.path().read_bytes().startswith(b"\x89PNG")
    tab.click("#side")
    until(tab, "attnlibLook.state().side === 1")
    tab.keyboard.press("Escape")
    tab.locator(".strip bdi").nth(1).hover()
    assert "Who reads" in tab.inner_text("#readout")
    given = exact[:, 1].argmax()
    assert tab.locator("#list .i").first.inner_text() == str(int(given))


def test_pictures_overlays_cross_and_differences(open_page):
    run = picture_run()
    tab = open_page(run)
    canvas = tab.locator(".picture canvas")
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.5})  # row 1, column 3
    assert "patch 1,3" in tab.inner_text("#readout")
    exact = run.layers[0].weights[0, 8]
    assert tab.locator("#list .i").first.inner_text() == str(int(exact.argmax()))
    before = canvas.evaluate("c => c.toDataURL()")
    tab.select_option("#over", "relevance")
    until(tab, "attnlibLook.state().over === 'relevance'")
    assert tab.locator(".picture canvas").evaluate("c => c.toDataURL()") != before

    tab = open_page(cross_run())
    tab.select_option("#kind", "cross")
    until(tab, "document.getElementById('name').textContent.includes('cross')")
    assert tab.locator(".strip").count() == 2
    weights = cross_run().layers[1].weights[0]
    assert float(hover(tab, 2, 4)[0]) == pytest.approx(float(weights[2, 4]), abs=0.01)

    first, second = text_run(), text_run("second", seed=1)
    tab = open_page([first, second])
    assert tab.locator("#view option").count() == 3
    tab.select_option("#view", "2")
    until(tab, "attnlibLook.state().v === 2 && document.getElementById('numbers').textContent.includes('change')")
    apart = second.layers[0].weights[0] - first.layers[0].weights[0]
    assert float(hover(tab, 6, 2)[0]) == pytest.approx(float(apart[6, 2]), abs=0.012)


def test_beyond_256_tokens_the_largest_and_one_rest(open_page):
    run = long_run()
    tab = open_page(run, top=16)
    exact = run.layers[0].weights[1]
    best = exact[200].topk(16).indices.tolist()
    value = tab.evaluate(f"attnlibLook.value(0, 0, 1, 200, {best[5]})")
    assert value == pytest.approx(float(exact[200, best[5]]), abs=0.01)
    rest = tab.evaluate("attnlibLook.rest(0, 0, 1, 200)")
    assert rest == pytest.approx(1 - float(exact[200, best].sum()), abs=1e-5)
    left_out = int(exact[200].argmin())
    choose_head(tab, 0, 1)
    _, text = hover(tab, 200, left_out)
    assert "other keys together" in text
