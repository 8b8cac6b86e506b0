"""The page of `linearize inspect --html`: in a real browser, at desk and phone width, many layers, from the keys."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from linearize.page.build import Subject, page
from linearize.page.costs import cache_bytes, predicted_speedup, state_bytes, weight_bytes
from linearize.page.groups import groups_of
from linearize.page.layout import Shape, draw
from linearize.page.pipes import dot, svg
from linearize.program import Program, Record, program_text
from tests import zoo
from tests.browser import chromium, console_errors

RECIPE = "lolcats{window=5}"


def subject(name: str = "llama", recipe: str = RECIPE) -> Subject:
    before, compiled = zoo.captured(name), zoo.compiled(name, recipe)
    history = compiled.program.history
    return Subject("Tiny <Llama>", before, compiled.program, compiled.plan, compiled.report, history, ["a <note>"])


def many_layers(layers: int, operators: int = 60) -> Program:
    """A graph as wide and deep as a large model's, without its weights."""
    graph = fx.Graph()
    current = graph.placeholder("input_ids")
    for layer in range(layers):
        for step in range(operators):
            target = torch.ops.aten.add.Tensor if step % 3 else torch.ops.aten.mul.Tensor
            current = graph.call_function(target, (current, current))
            current.meta["linearize_scope"] = f"model.layers.{layer}.part{step // 20}"
    graph.output(current)
    return Program(module=fx.GraphModule(torch.nn.Module(), graph), model_name="Large", captured_by="hand")


def test_the_page_opens_compares_and_fits_every_width(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(subject()))
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    for width in (1280, 390):
        with chromium(width, 900) as driver:
            wait = WebDriverWait(driver, 30)
            driver.get(path.as_uri())

            def all_of(selector: str, driver: Any = driver) -> list[Any]:
                return driver.find_elements(By.CSS_SELECTOR, selector)

            layer = next(one for one in all_of("button.group") if "layers.0" in one.text)
            layer.send_keys(Keys.ENTER)
            wait.until(lambda _, all_of=all_of: all_of(".view svg"))
            assert layer.get_attribute("aria-expanded") == "true"
            assert len(all_of(".view g")) == len(all_of(".view g title")) > 20
            scroll, drawn = all_of(".scroll")[0], all_of(".view svg")[0]
            before = float(drawn.get_attribute("width"))
            scroll.send_keys("+")
            assert float(drawn.get_attribute("width")) > before
            scroll.send_keys("0", Keys.ESCAPE)
            assert not all_of(".view")
            driver.execute_script("document.querySelector('[data-all=after]').click()")
            wait.until(lambda _, all_of=all_of: len(all_of(".view")) == len(all_of("[data-graph=after]")))
            driver.execute_script("document.querySelector('[data-none=after]').click()")
            assert not all_of(".view")
            driver.execute_script("document.getElementById('compare').click()")
            wait.until(lambda _, all_of=all_of: all_of("#diff .add"))
            said = all_of("#diff p")[0].text
            assert re.fullmatch(r"[1-9]\d* lines went, [1-9]\d* came", said)
            assert len(all_of("#diff .del")) == int(said.split()[0])
            wide = driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide[0] <= wide[1] == width
            assert console_errors(driver) == []


def test_a_page_of_126_layers_is_small_and_usable(tmp_path: Path) -> None:
    program = many_layers(126)
    text = program_text(program)
    texts = [text.replace("add_tensor_1 ", f"sum_{number} ") for number in range(12)]
    stages = [Record(f"pass_{number}", one, {"aten.add": 1}, 0.1) for number, one in enumerate(texts)]
    content = page(Subject("Large", program, program, stages=stages))
    assert len(content.encode()) < 5_000_000
    path = tmp_path / "page.html"
    path.write_text(content)
    from selenium.webdriver.support.ui import WebDriverWait

    with chromium() as driver:
        driver.get(path.as_uri())
        count = "return document.querySelectorAll(arguments[0]).length"
        assert driver.execute_script(count, "button.group") == 2 * 126
        driver.execute_script("document.querySelector('[data-all=after]').click()")
        WebDriverWait(driver, 60).until(lambda one: one.execute_script(count, ".view svg") == 126)
        driver.execute_script("document.getElementById('compare').click()")
        WebDriverWait(driver, 60).until(lambda one: one.execute_script(count, "#diff .add") > 0)
        assert console_errors(driver) == []


def test_names_and_notes_are_text_and_not_markup() -> None:
    content = page(subject())
    assert "Tiny &lt;Llama&gt;" in content
    assert "a &lt;note&gt;" in content
    assert "<Llama>" not in content
    assert "http://" not in content.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in content


def test_a_refused_attention_is_told_with_its_chain() -> None:
    program = zoo.captured("thresholded")
    content = page(Subject("Refused", program, None, notes=[]))
    reason = program.refused[0].reason
    assert f"refused: {reason.partition(':')[0]}" in content
    assert '<span class="bad">' in content
    assert "Nothing was refused." not in content


def test_every_operator_is_in_exactly_one_group() -> None:
    program = zoo.compiled("llama", RECIPE).program
    groups = groups_of(program)
    computed = [node for node in program.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    assert sorted(node.name for group in groups for node in group.nodes) == sorted(node.name for node in computed)
    assert {group.name: group.sites for group in groups if group.sites} == {f"model.layers.{i}": [i] for i in (0, 1)}


def test_a_shape_is_laid_out_once_with_edges_that_go_down() -> None:
    shapes: list[Shape] = []
    drawn = draw(groups_of(many_layers(20)), shapes, {})
    assert len(drawn) == 20
    assert len(shapes) == 2  # the first layer reads no other
    for shape in shapes:
        places = [(x, y) for _, _, x, y in shape.nodes]
        assert len(set(places)) == len(places)
        assert all(shape.nodes[source][3] < shape.nodes[node][3] for source, node in shape.edges)
        assert all(0 < x < shape.width and 0 < y < shape.height for x, y in places)


def test_costs_are_those_of_the_tensors() -> None:
    before, compiled = zoo.captured("llama"), zoo.compiled("llama", RECIPE)
    assert cache_bytes(before, 1000) == 2 * 2 * (8 + 8) * 4 * 1000  # layers, kv heads, keys and values, bytes
    assert state_bytes(compiled.program, 1000) == compiled.state_bytes(context=1000)
    source = weight_bytes(before) + cache_bytes(before, 1000)
    ours = weight_bytes(compiled.program) + compiled.state_bytes()
    assert predicted_speedup(before, compiled.program, 1000) == pytest.approx(source / ours)
    sliding = zoo.captured("mistral")
    assert cache_bytes(sliding, 1000) == cache_bytes(sliding, 6)


def test_dot_and_svg_hold_every_operator() -> None:
    program = zoo.compiled("llama", RECIPE).program
    nodes = [node for group in groups_of(program) for node in group.nodes]
    text = dot(program)
    assert text.count("subgraph") == len(groups_of(program))
    assert all(f'"{node.name}" [label=' in text for node in nodes)
    root = ElementTree.fromstring(svg(program))
    titles = [tag.text or "" for tag in root.iter() if tag.tag.endswith("title")]
    assert {node.name for node in nodes} <= {title.split(" = ")[0] for title in titles}
