"""report.html: self-contained, escaped, complete, and written from whatever a run left."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loong_core.train import report
from loong_core.train.metrics import encode, row

EVIL = '<script>alert("x")</script>&'


def rows(number: int, recomputed: float = 0.0, **changes: Any) -> list[dict[str, Any]]:
    result = []
    for step in range(1, number + 1):
        measured = {
            "loss": 5 / step,
            "counted": 1000,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "step_seconds": 0.5 + (9.5 if step == 1 else 0),
            "data_seconds": 0.01,
            **changes,
        }
        if step % 20 == 0:
            measured["eval_loss"] = 6 / step
        counted = {"flops": 1e11, "recomputed": recomputed, "world": 2, "peak_flops": 1e12}
        result.append(row(measured, step=step, samples=4, memory_bytes=step * 2**20, **counted))
    return result


def fill(folder: Path, found: list[dict[str, Any]], **files: str) -> str:
    (folder / "metrics.jsonl").write_text("".join(encode(each) + "\n" for each in found))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    assert report.write(folder) == folder / "report.html"
    return (folder / "report.html").read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects elements that could load something, ids, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]
        if tag not in ("meta", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def hover(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_whole_report(tmp_path: Path) -> None:
    page = fill(
        tmp_path,
        rows(100),
        recipe_yaml="run: {name: demo, steps: 120}\nmodel: {family: llama}\nprecision: bf16\n",
        plan_json=json.dumps(
            {"world": 2, "parameters": 1_500_000, "memory": {"total": 3 * 2**30}, "stages": [[0, 1], [2, 3]]}
        ),
        manifest_json=json.dumps({"packages": {"loong-core": "0.1.0"}, "git": None}),
        sample_txt="def answer():\n    return 42\n",
    )
    text = "\n".join(checked(page).texts)
    for part in ("100 of 120", "0.0500", "0.0600", "2.0k", "0-1, 2-3", "3.00 GiB", "loong-core", "return 42", "llama"):
        assert part in text, part
    for title in ("Loss", "Throughput", "Gradient norm", "Learning rate", "Memory", "Time per step"):
        assert title in text
    loss = hover(page)[0]
    assert [series["name"] for series in loss["series"]] == ["loss", "smoothed", "held-out"]
    assert loss["series"][2]["x"] == [20, 40, 60, 80, 100]
    assert 'circle class="s1"' in page


def test_it_loads_nothing(tmp_path: Path) -> None:
    page = fill(tmp_path, rows(3))
    assert checked(page).loads == []
    assert "http" not in page.replace('http-equiv="', "") and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_every_text_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / EVIL.replace("/", "|")
    folder.mkdir()
    page = fill(
        folder,
        rows(2),
        recipe_yaml=f"run: {{name: '{EVIL}'}}\nmodel: {{family: '{EVIL}'}}\nprecision: '{EVIL}'\n",
        plan_json=json.dumps({EVIL: EVIL, "reasons": [EVIL * 3]}),
        manifest_json=json.dumps({"a": {EVIL: [EVIL]}}),
        sample_txt=EVIL,
    )
    checker = checked(page)
    assert checker.tags.count("script") == 2
    assert "alert(" not in re.sub(r"&lt;script&gt;alert\(", "", page)
    assert EVIL in checker.texts


def test_names_in_the_charts_data_cannot_end_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loong_core.train.plot import Chart, Series

    chart = Chart(title="T", series=(Series(name="</script>", x=[1, 2], y=[1.0, 2.0]),))
    monkeypatch.setattr(report, "charts", lambda rows, counts: [chart])
    page = fill(tmp_path, rows(2))
    assert hover(page)[0]["series"][0]["name"] == "</script>" and checked(page).tags.count("script") == 2


def test_a_run_without_anything(tmp_path: Path) -> None:
    report.write(tmp_path)
    text = "".join(checked((tmp_path / "report.html").read_text()).texts)
    assert "No step of this run was recorded" in text


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "recipe.yaml", "metrics.jsonl"])
def test_damaged_files_do_not_stop_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"a": [1, \xff')
    report.write(tmp_path)
    checked((tmp_path / "report.html").read_text())


def test_steps_without_a_number(tmp_path: Path) -> None:
    found = rows(10)
    found[4]["loss"] = float("nan")
    found[7]["loss"] = float("inf")
    page = fill(tmp_path, found)
    assert "2 steps without a number" in page and "NaN" not in page and "Infinity" not in page
    assert hover(page)[0]["series"][0]["y"][4] is None


def test_unknown_peak_and_memory(tmp_path: Path) -> None:
    found = rows(5)
    for each in found:
        each["mfu"] = each["hfu"] = each["memory_bytes"] = None
    page = fill(tmp_path, found)
    assert "no values" in page and "median MFU" not in page


def test_hardware_utilisation_is_shown_where_it_differs(tmp_path: Path) -> None:
    page = fill(tmp_path, rows(5))
    assert "median MFU" in page and "10.0%" in page and "median HFU" not in page
    page = fill(tmp_path, rows(5, recomputed=2e10))
    assert "median MFU" in page and "median HFU" in page and "12.0%" in page


def test_the_first_step_does_not_count_in_medians(tmp_path: Path) -> None:
    assert "0.5 s" in fill(tmp_path, rows(2))


def test_long_runs_stay_small(tmp_path: Path) -> None:
    page = fill(tmp_path, rows(20_000))
    assert len(page) < 1_500_000


def test_it_is_replaced_whole(tmp_path: Path) -> None:
    first = fill(tmp_path, rows(3))
    second = fill(tmp_path, rows(4))
    assert first != second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_smoothing_is_centred() -> None:
    straight = [float(value) for value in range(100)]
    assert report._smooth(straight) == pytest.approx(straight)
    with_gap: list[float | None] = [1.0] * 60
    with_gap[30] = None
    assert report._smooth(with_gap) == with_gap


def test_models_without_tokens_are_told_in_samples(tmp_path: Path) -> None:
    page = fill(
        tmp_path,
        rows(3),
        recipe_yaml="data: {global_batch: 4, seq_len: 2048}\n",
        manifest_json=json.dumps({"counts": "elements of action chunks"}),
    )
    text = "\n".join(checked(page).texts)
    for part in ("4 samples per step", "median samples/s", "samples in all"):
        assert part in text, part
    assert "tokens/s" not in text and "tokens in all" not in text
    assert [chart["series"][0]["name"] for chart in hover(page)][1] == "samples/s"


def test_figures_of_a_run_are_drawn_and_others_passed_over(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    line = {"name": EVIL, "x": [0, 1, 2], "y": [0.5, None, 1.5]}
    good = {"title": EVIL, "note": "raw units", "series": [line, {**line, "name": "recorded"}]}
    for name, content in {"a": good, "b": {"series": [{"name": "x"}]}, "c": {"series": [{**line, "x": [1]}]}}.items():
        (tmp_path / "figures" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "figures" / "d.json").write_text("{")
    page = fill(tmp_path, rows(2))
    charts = hover(page)
    assert len(charts) == 7 and [series["name"] for series in charts[6]["series"]] == [EVIL, "recorded"]
    checker = checked(page)
    assert "Evaluation" in checker.texts and EVIL in "".join(checker.texts) and checker.tags.count("script") == 2
    assert 'data-chart="6"' in page and 'data-chart="7"' not in page
