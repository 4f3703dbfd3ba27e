"""The report page: one self-contained HTML file in which every number comes from the demo's result."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from flashtile.cli.console import Result, milliseconds, number, size
from flashtile.cli.demo.attentions import TITLES
from flashtile.cli.demo.scaling import MODES
from flashtile.cli.demo.style import STYLE

Images = dict[str, dict[str, bytes]]


def page(result: Result, images: Images) -> str:
    """The whole page; images are PNG files by plot and theme."""
    verdict = "All checks passed" if result["ok"] else "A check failed"
    parts = [
        f"<h1>flashtile on this machine</h1><p class='lead'>{_machine(result)}</p>",
        f"<h2 class='{_mark(result['ok'])}'>{verdict}</h2>{_checks(result)}{_highlights(result)}",
        f"<h2>1. Exactness</h2>{_exactness(result)}",
        f"<h2>2. Time and memory over sequence length</h2>{_scaling(result, images)}",
        f"<h2>3. Training a small GPT</h2>{_training(result, images)}",
        f"<h2>Machine and versions</h2>{_facts(result)}",
    ]
    body = "".join(f"<section>{part}</section>" for part in parts)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>flashtile report</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        # An empty data URL: browsers ask for /favicon.ico otherwise.
        "<link rel='icon' href='data:,'>"
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def find(result: Result, name: str, mode: str, length: int) -> Result:
    """The row of one attention, mode and length."""
    key = (name, mode, length)
    return next(r for r in result["scaling"]["rows"] if (r["attention"], r["mode"], r["length"]) == key)


def _machine(result: Result) -> str:
    device = result["device"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    quick = " A quick run: too small for its figures to mean much." if result["quick"] else ""
    versions = result["versions"]
    return (
        f"Measured on {escape(device['name'])}{threads}, with flashtile {versions['flashtile']} and "
        f"PyTorch {versions['torch']}, in {result['seconds']:.0f} s ({escape(result['date'])}).{quick}"
    )


def _checks(result: Result) -> str:
    rows = [
        [f"<span class='{_mark(c['ok'])}'>{_mark(c['ok'])}</span>", escape(c["name"]), escape(c["detail"])]
        for c in result["checks"]
    ]
    return _table(["", "check", "result"], rows, words=3)


def _mark(ok: bool) -> str:
    return "passed" if ok else "failed"


def _highlights(result: Result) -> str:
    """How flashtile compares at the longest length that both it and the other ran."""
    cards = []
    for other in ("standard", "sdpa"):
        for mode, title in MODES.items():
            ran = [n for n in result["scaling"]["settings"]["lengths"] if _both_ran(result, other, mode, n)]
            if ran:
                a, b = (find(result, name, mode, ran[-1]) for name in (other, "flashtile"))
                ratio = a["milliseconds"]["median"] / b["milliseconds"]["median"]
                cards.append((f"{ratio:.2g}×", f"as fast as {TITLES[other]}, {title}, {ran[-1]} tokens"))
                if other == "standard" and mode == "train" and a["peak_bytes"] and b["peak_bytes"]:
                    share = f"{b['peak_bytes'] / a['peak_bytes']:.2%}"
                    cards.append((share, f"of the peak memory of {TITLES[other]}, {title}, {ran[-1]} tokens"))
    return "".join(
        ["<ul class='cards'>", *(f"<li><strong>{value}</strong> {escape(what)}</li>" for value, what in cards), "</ul>"]
    )


def _both_ran(result: Result, other: str, mode: str, length: int) -> bool:
    return all(find(result, name, mode, length)["milliseconds"] is not None for name in (other, "flashtile"))


def _exactness(result: Result) -> str:
    names = ("out", "lse", "dq", "dk", "dv")
    rows = []
    for row in result["exactness"]["rows"]:
        ratios = [_against_plain(row["errors"].get(name)) for name in names]
        others = [_against_plain(error) for name, error in row["errors"].items() if name not in names]
        share = row["reason"] or f"{float(row['share']):.0%}"
        mark = f"<span class='{_mark(row['ok'])}'>{_mark(row['ok'])}</span>"
        case = f"<span title='{escape(row['why'], quote=True)}'>{escape(row['case'])}</span>"
        rows.append([case, row["dtype"], *ratios, ", ".join(others) or "–", escape(share), mark])
    backends = ", ".join(sorted({row["backend"] for row in result["exactness"]["rows"]}))
    return (
        f"<p>Each case was computed with the {escape(backends)} backend, forward and backward, and compared with "
        "float64. The numbers are its largest error divided by that of plain PyTorch attention in the same dtype: "
        "below 1 is more exact than that. A result may use up to 100 % of its error budget, which is twice plain "
        "PyTorch's error and the unavoidable roundings.</p>"
        + _table(["case", "dtype", *names, "dbias, dsinks", "budget used", ""], rows, words=2)
    )


def _against_plain(error: Any) -> str:
    if error is None:
        return "–"
    if error["plain"] == 0:
        return "0" if error["error"] == 0 else f"{float(error['error']):.1e} abs."
    return f"{float(error['error']) / float(error['plain']):.2f}"


def _scaling(result: Result, images: Images) -> str:
    scale = result["scaling"]
    shape = scale["settings"]
    limit = scale["memory_limit_bytes"]
    share = f" or more than {size(limit)} ({shape['memory_share']:.0%} of the memory that was free)" if limit else ""
    memory = f"Peak memory: {escape(scale['memory_method'])}. " if scale["memory_method"] else ""
    text = (
        f"<p>Causal self-attention, batch {shape['batch']}, {shape['heads']} heads of {shape['dim']}, "
        f"{scale['dtype']}. Time: {escape(scale['timing_method'])}. {memory}"
        f"A call predicted to take more than {shape['call_seconds']:g} s{share} is left out (✕ in the plots).</p>"
    )
    figures = _picture(images, "scaling-time", "Time over sequence length") + _picture(
        images, "scaling-memory", "Peak memory over sequence length"
    )
    return text + figures + "".join(_scaling_table(result, mode, title) for mode, title in MODES.items())


def _scaling_table(result: Result, mode: str, title: str) -> str:
    rows = []
    lengths = result["scaling"]["settings"]["lengths"]
    for length in lengths:
        found = [find(result, name, mode, length) for name in TITLES]
        rows.append([f"{length:,}", *map(_time, found), *(_bytes(row["peak_bytes"]) for row in found)])
    heads = [f"{what}, {name}" for what in ("time", "memory") for name in TITLES.values()]
    first_left_out = [
        next((row for n in lengths if (row := find(result, name, mode, n))["reason"]), None) for name in TITLES
    ]
    reasons = [
        f"{TITLES[row['attention']]} from {row['length']:,} tokens on: {escape(row['reason'])}"
        for row in first_left_out
        if row is not None
    ]
    note = f"<p class='note'>Left out: {'; '.join(reasons)}.</p>" if reasons else ""
    return f"<h3>{title.capitalize()}</h3>" + _table(["tokens", *heads], rows) + note


def _time(row: Result) -> str:
    return "–" if row["milliseconds"] is None else milliseconds(row["milliseconds"]["median"])


def _bytes(count: int | None) -> str:
    return "–" if count is None else size(count)


def _training(result: Result, images: Images) -> str:
    trained = result["training"]
    setting, text, gap = trained["settings"], trained["text"], trained["differences"]["flashtile"]
    intro = (
        f"<p>A byte-level GPT of {number(trained['parameters'])} parameters ({setting['layers']} layers, "
        f"{setting['heads']} heads, width {setting['width']}, context {setting['context']}) learned "
        f"{size(text['training_bytes'])} of {escape(text['source'])} in {setting['steps']} steps of "
        f"{setting['batch']} × {setting['context']} bytes, in {trained['dtype']}; "
        f"{size(text['held_out_bytes'])} were held out. All runs start from the same parameters and see the same "
        "bytes; their steps take turns.</p>"
    )
    rows = [
        [TITLES[name], milliseconds(run["step_milliseconds"]), _bytes(run["peak_bytes"]),
         f"{float(run['losses'][0]):.4f}", f"{float(run['losses'][-1]):.4f}", f"{float(run['held_out_loss']):.4f}"]
        for name, run in trained["runs"].items()
    ]  # fmt: skip
    heads = ["trained with", "time of a step", "peak memory of a step", "first loss", "last loss", "held-out loss"]
    control = trained["differences"]["sdpa"]
    outro = (
        "<p>Losses are in nats a byte. The peak memory of a step is beyond the parameters and the optimizer's state. "
        "Who only knows how often each byte occurs in the held-out text has a loss of "
        f"{text['held_out_byte_entropy']:.2f} there.</p>"
        "<p>Exact attentions differ by rounding, and training amplifies that. With flashtile the loss was never "
        f"farther than {float(gap['largest_loss_gap']):.1e} from standard attention's, with PyTorch's SDPA never "
        f"farther than {float(control['largest_loss_gap']):.1e}; flashtile is allowed {gap['loss_tolerance']:.2g} at "
        "any step (one in a hundred of a typical loss, or twice SDPA's distance where that is more). "
        f"The first gradient, before any amplification, differed by {float(gap['first_gradient']):.1e} of its "
        f"length (allowed {gap['first_gradient_tolerance']:g}).</p>"
    )
    sample = trained["sample"]
    written = f"<h3>What the model trained with flashtile writes after “{escape(sample['prompt'].strip())}”</h3>"
    written += f"<pre>{escape(sample['prompt'] + sample['text'])}</pre>"
    return intro + _table(heads, rows) + _picture(images, "training-loss", "Loss curves") + outro + written


def _facts(result: Result) -> str:
    facts = {**result["device"], **{k: v for k, v in result["versions"].items() if v is not None}}
    facts["memory"] = _bytes(facts.pop("memory_bytes", None))
    load = result["load_before"]
    facts["load before the run"] = None if load is None else f"{load:.1f}"
    facts["seconds"] = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["part_seconds"].items())
    rows = [[escape(key.replace("_", " ")), escape(str(value))] for key, value in facts.items() if value is not None]
    return _table(["", ""], rows, words=2)


def _picture(images: Images, name: str, alternative: str) -> str:
    light, dark = (base64.b64encode(images[name][theme]).decode() for theme in ("light", "dark"))
    return (
        f"<picture><source srcset='data:image/png;base64,{dark}' media='(prefers-color-scheme: dark)'>"
        f"<img src='data:image/png;base64,{light}' alt='{escape(alternative, quote=True)}'></picture>"
    )


def _table(heads: list[str], rows: list[list[str]], words: int = 1) -> str:
    """Cells are HTML; the first `words` columns are text, the others numbers."""
    kinds = ["word" if index < words else "number" for index in range(len(heads))]
    head = "".join(f"<th class='{kind}'>{escape(text)}</th>" for kind, text in zip(kinds, heads, strict=True))
    lines = [
        "<tr>" + "".join(f"<td class='{kind}'>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    head = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    return f"<div class='wide'><table>{head}<tbody>{''.join(lines)}</tbody></table></div>"
